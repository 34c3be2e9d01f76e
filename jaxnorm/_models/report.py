"""What the norms of a model did in one step, and what is wrong with them: `report`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

from .._core.install import extra
from .._core.messages import shown
from .collect import Seen, on_host
from .findings import findings
from .layer import Finding, Layer
from .table import as_text, print_table, rich_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = {  # of the table: quantity, and how it is written
    "count": "{:g}", "drift_mean": "{:.2f}", "drift_var": "{:.2f}", "dead": "{:.0%}", "saturated": "{:.0%}",
    "tiny": "{:.0%}", "nonfinite": "{:.1%}", "rms": "{:.3g}", "gradient": "{:.2g}",
}  # fmt: skip


class Row(NamedTuple):
    """One call of a norm: its path, its kind, and its quantities, of which `Report` has the list."""

    path: str
    kind: str
    quantities: dict[str, float]


class Report:
    """A row for each norm, and the faults that were found. `print(report)` shows both.

    `rows[i].quantities` has, as far as a norm has them:

      count: the least number of elements that a statistic is taken of: valid ones, on all devices that share it.
      empty: the share of statistics without an element.
      drift_mean: the root mean square over channels of the batch's mean minus the running one, in running standard
        deviations.
      drift_var: the median over channels of |log2(variance of the batch / running variance)|.
      dead: the share of channels whose output is constant.
      saturated: the share of outputs where tanh or sigmoid has less than 2 % or 4 % of its slope.
      tiny: the share of statistics, of channels or rows, whose variance is below epsilon and not 0.
      constant: the share of statistics whose variance is 0.
      nonfinite: the share of the input that is NaN or infinite.
      rms: the root mean square of the input.
      growth: rms over that of the first norm of this kind and width.
      apart: the largest distance of running means between devices, in running standard deviations.
      gradient: the norm of the gradient of scale.

    `findings` are tuples (path, fault, says, write). `left_out` has the paths that were not measured, with the reason.
    """

    def __init__(self, rows: list[Row], findings: list[Finding], left_out: dict[str, str]) -> None:
        self.rows = rows
        self.findings = findings
        self.left_out = left_out

    def as_dict(self) -> dict[str, float]:
        """All quantities as one flat dict, "path/quantity": for `wandb.log`, or a TensorBoard writer's scalars.

        "findings" is the number of faults.
        """
        flat = {f"{row.path}/{name}": value for row in self.rows for name, value in row.quantities.items()}
        return flat | {"findings": float(len(self.findings))}

    def _table(self) -> tuple[list[str], list[list[str]]]:
        shown = [name for name in _COLUMNS if any(name in row.quantities for row in self.rows)]
        cell = lambda row, name: _COLUMNS[name].format(row.quantities[name]) if name in row.quantities else ""
        return ["path", "norm", *shown], [
            [row.path, row.kind, *(cell(row, name) for name in shown)] for row in self.rows
        ]

    def _notes(self) -> list[str]:
        notes = [f"{i}. {finding}" for i, finding in enumerate(self.findings, 1)]
        notes = notes or ["Nothing found." if self.rows else "No norm was seen: collect sees layers and spec.apply."]
        return notes + [f"Left out {path}: {reason}." for path, reason in self.left_out.items()]

    def __str__(self) -> str:
        return "\n".join([as_text(*self._table()), "", *self._notes()] if self.rows else self._notes())

    def __rich__(self) -> Any:
        return rich_table(*self._table(), self._notes())

    def print(self) -> None:
        """Print it by rich if that is installed, else as plain text."""
        print_table(self)

    def plot(self) -> Figure:
        """A figure of pyplot: the size of each norm's input, its drift and gradient, and the shares that should be 0.

        Norms with a finding are red.

        Raises:
          ImportError: matplotlib is not installed.
        """
        try:
            from .plot import figure
        except ImportError as error:
            raise ImportError(f"Report.plot needs matplotlib. Write: {extra('demo')}", name="matplotlib") from error
        return figure(self)


def report(seen: Seen, *, train: bool | None = None) -> Report:
    """What the norms of a model did, from what `jaxnorm.models.collect` measured: a row each, and what is wrong.

    On the host, after a step:

        (logits, state), seen = jax.jit(models.collect(apply))(variables, x)
        print(jn.report(seen))

    Each finding names the norm, a fault, and the line to write. The faults: "never updated", "momentum of torch",
    "statistics lag", "other data", "stale statistics", "training mode at evaluation", "statistics differ over
    devices", "small batch", "channels without elements", "dead channels", "saturated activation", "epsilon dominates",
    "not finite", "variance grows with depth", "gradient explodes", "gradient vanishes", "wrong axis".

    Args:
      seen: what `collect` returned, from a compiled program or not. After a scan each norm has a row for each step.
      train: whether the model was to be trained in that step. None: whatever it did was meant.

    Raises:
      TypeError: seen is no `Seen`, or it is traced, as inside of `jax.jit`.

    >>> import jaxnorm as jn, jax.numpy as jnp
    >>> from jaxnorm import models
    >>> norm = jn.LayerNorm(epsilon=1e-5)
    >>> y, seen = models.collect(norm.apply)(norm.init(2)[0], (), 1e-4 * jnp.array([[1., 3.], [2., 0.]]))
    >>> finding = jn.report(seen).findings[0]
    >>> finding.fault, finding.write
    ('epsilon dominates', 'Write LayerNorm(epsilon=1e-12), or scale the input.')
    """
    if not isinstance(seen, Seen):
        raise TypeError(
            f"report: seen must be what collect measured, got {shown(seen)}. Write out, seen = "
            "models.collect(apply)(...), and report(seen)."
        )
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(seen)):
        raise TypeError(
            "report: seen is traced. Return it from the compiled step, and write report(seen) outside of it."
        )
    if not (train is None or isinstance(train, bool)):
        raise TypeError(f"report: train must be True, False or None, got {shown(train)}. Write train=False.")
    layers = [Layer(*call) for call in on_host(seen)]
    first: dict[tuple[str, int], float] = {}
    rows = [Row(layer.path, layer.what.kind, _quantities(layer, first)) for layer in layers]
    return Report(rows, findings(layers, train), dict(seen.left_out))


def _quantities(layer: Layer, first: dict[tuple[str, int], float]) -> dict[str, float]:
    m, what = layer.m, layer.what
    rms = float(np.sqrt(m.square))
    before = first.setdefault((what.kind, what.shape[-1]), rms)
    found = {"count": m.count, "empty": m.empty}
    if what.running:
        found |= {"drift_mean": layer.drift_mean, "drift_var": layer.drift_var}
    if m.out_var.size:
        found["dead"] = layer.dead.mean()
    if m.saturated.size:
        found["saturated"] = m.saturated.mean()
    if what.epsilon is not None:
        found["tiny"] = m.tiny
    found |= {"constant": m.constant, "nonfinite": m.nonfinite, "rms": rms}
    found["growth"] = rms / before if before > 0 else 1.0
    if what.axis_name and what.running:
        found["apart"] = m.apart
    if not np.isnan(m.gradient_rms):
        found["gradient"] = m.gradient
    return {name: float(value) for name, value in found.items()}
