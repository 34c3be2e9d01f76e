"""The numerics of normalization layers of several libraries: errors, bytes kept for the backward pass, masks.

Each library keeps its own defaults; only epsilon is the same for all. Errors are against float64. "-" means that the
library has no such call. It runs on 8 CPU devices that it makes itself. Libraries that are not installed are left out.
"""

from __future__ import annotations

import inspect
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

from benchmarks.harness.timing import cpu_devices

DEVICES = 8
if __name__ == "__main__":  # whoever imports this module chooses the devices
    cpu_devices(DEVICES)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import oracle  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

from benchmarks import peers  # noqa: E402
from benchmarks.harness import errors, records  # noqa: E402
from benchmarks.harness.case import EPSILON, GROUPS  # noqa: E402
from benchmarks.harness.table import names_of, section, table  # noqa: E402
from benchmarks.peers import Peer  # noqa: E402

NAMES = ("jaxnorm", "flax.linen", "flax.linen use_fast_variance=False", "flax.nnx", "haiku", "equinox", "keras",
         "jax.nn.standardize")  # fmt: skip
NOTES = f"""Epsilon is {EPSILON:g}; everything else is each library's default. Errors are against float64.
Devices: a batch norm with masks and axis_name="devices" inside shard_map, on 8 devices, against all data on one.
Bytes kept: all arrays that jax.vjp holds for the backward pass. Ulp: 0.5 is correct rounding."""
ROWS, FEATURES = 1024, 512
UNIT = np.ones(FEATURES, np.float32), np.zeros(FEATURES, np.float32)  # scale and bias


def truth(which: str, x, scale=None, bias=None) -> np.ndarray:
    params = (None if p is None else np.asarray(p)[None] for p in (scale, bias))
    return oracle.normalize(x, oracle.labels(which, x.shape, GROUPS), *params, epsilon=EPSILON).y


def offset_error(peer: Peer, which: str, mean: float) -> float:
    """Largest absolute error of a float32 norm, without parameters, of N(mean, 1)."""
    rng = np.random.default_rng(0 if which == "layer" else 1)
    x = jnp.asarray(rng.normal(mean, 1.0, (ROWS, FEATURES)), jnp.float32)
    return float(np.abs(oracle.wide(peer.norm(which, x, *UNIT)) - truth(which, np.asarray(x))).max())


def synchronized_error(peer: Peer, statistic: str) -> float:
    """Largest relative error of the batch mean or variance over 8 devices with 1 to 128 valid rows each."""
    lengths = np.array([128, 96, 64, 32, 16, 8, 4, 1])
    mask = (np.arange(128)[None] < lengths[:, None]).reshape(-1)
    rng = np.random.default_rng(2)
    x = rng.normal(2.0 + np.arange(DEVICES)[:, None, None] / 4, 1.0, (DEVICES, 128, 64)).astype(np.float32)
    x = x.reshape(-1, 64)
    mesh = jax.make_mesh((DEVICES,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    call = jax.shard_map(peer.synchronized, mesh=mesh, in_specs=P("devices"), out_specs=P())
    got = jax.jit(call)(x, mask)[("mean", "var").index(statistic)]
    want = oracle.normalize(x, oracle.labels("batch", x.shape, GROUPS), None, None, epsilon=EPSILON, mask=mask[:, None])
    return float(np.abs(oracle.wide(got) / getattr(want, statistic)[0] - 1.0).max())


def residual_bytes(peer: Peer) -> float:
    """Bytes that jax.vjp of a bfloat16 layer norm holds for the backward pass, per element. Each array counts once."""
    x = jnp.asarray(np.random.default_rng(3).normal(0.0, 1.0, (ROWS, FEATURES)), jnp.bfloat16)
    _, backward = jax.vjp(lambda *args: peer.norm("layer", *args), x, *UNIT)
    held = {id(a): a.nbytes for a in jax.tree.leaves(backward) if isinstance(a, jax.Array)}
    return sum(held.values()) / x.size


def half_precision_error(peer: Peer) -> float:
    """Largest error of a bfloat16 layer norm with scale and bias, in units in the last place of the exact result, or of
    1 where that is smaller."""
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.normal(1.0, 1.0, (ROWS, FEATURES)), jnp.bfloat16)
    scale, bias = (jnp.asarray(rng.normal(m, 0.5, FEATURES), jnp.bfloat16).astype(jnp.float32) for m in (1.0, 0.0))
    y = np.asarray(peer.norm("layer", x, scale, bias))
    if y.dtype != jnp.bfloat16:
        raise TypeError(f"a bfloat16 input gave {y.dtype}")
    want = truth("layer", np.asarray(x), scale, bias)
    unit = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(want), 1.0))) - 7)
    return float((np.abs(oracle.wide(y) - want) / unit).max())


def batches_with_other_bits(peer: Peer) -> float:
    """Of the batch sizes 2, 4, ..., 1024, how many give the first row of a jitted layer norm other bits than 1 does."""
    x = jnp.asarray(np.random.default_rng(6).normal(1.0, 1.0, (ROWS, FEATURES)), jnp.float32)
    norm = jax.jit(lambda x: peer.norm("layer", x, *UNIT))
    alone, *others = (np.asarray(norm(x[: 1 << k]))[0] for k in range(11))
    return float(sum(not np.array_equal(alone, row) for row in others))


def nan_reaches_gradient(peer: Peer, which: str) -> bool:
    """Whether a NaN that is masked out reaches the gradient of a loss over the valid elements."""
    rng = np.random.default_rng(5)
    mask = np.arange(8) < np.arange(1, 17)[:, None] if which == "layer" else np.arange(16) < 12
    full = np.broadcast_to(mask if mask.ndim == 2 else mask[:, None], (16, 8))
    x = jnp.asarray(np.where(full, rng.normal(size=full.shape), np.nan), jnp.float32)
    weight = jnp.asarray(rng.normal(size=full.shape), jnp.float32)
    loss = lambda x: jnp.where(full, peer.masked(which, x, jnp.asarray(mask)) * weight, 0.0).sum()
    return bool(np.isnan(np.asarray(jax.grad(loss)(x))).any())


class Row(NamedTuple):
    """One line of the table."""

    key: str
    title: str
    applies: Callable[[Peer], bool]  # whether a peer has the call
    measure: Callable[[Peer], float | bool]
    form: Callable


scientific, decimal, yes_or_no = "{:.1e}".format, "{:.2f}".format, ("no", "yes").__getitem__
always, synchronizes = lambda peer: True, lambda peer: peer.synchronized is not None
masks = lambda which: lambda peer: peer.masked is not None and which in peer.masks
TABLE = (
    *(Row(f"{which}_norm_1e{e}", f"{which} norm, float32, N(1e{e}, 1): max error", always,
          lambda peer, which=which, e=e: offset_error(peer, which, 10.0**e), scientific)
      for which in ("layer", "batch") for e in (2, 4)),
    *(Row(f"sync_{of}", f"batch {name} over 8 uneven devices: rel. error", synchronizes,
          lambda peer, of=of: synchronized_error(peer, of), scientific)
      for of, name in (("mean", "mean"), ("var", "variance"))),
    Row("residuals", "layer norm, bfloat16: bytes kept per element", always, residual_bytes, decimal),
    Row("bfloat16", "layer norm, bfloat16: max error in ulp", always, half_precision_error, decimal),
    Row("batch_bits", "layer norm, float32: batch sizes, of 10, that change a row's bits", always,
        batches_with_other_bits, "{:.0f}".format),
    *(Row(f"{which}_norm_nan", f"{which} norm: masked NaN reaches the gradient", masks(which),
          lambda peer, which=which: nan_reaches_gradient(peer, which), yes_or_no)
      for which in ("layer", "batch")),
)  # fmt: skip


def measured(peer: Peer, row: Row) -> float | bool | str | None:
    """The value; None if the peer has no such call; "NaN", or the name of the error that it raised."""
    if not row.applies(peer):
        return None
    try:
        value = row.measure(peer)
    except Exception as error:
        print(f"{peer.name}, {row.key}: {type(error).__name__}: {error}", file=sys.stderr)
        return type(error).__name__
    return "NaN" if math.isnan(value) else value if isinstance(value, bool) else float(f"{value:.4g}")


def imported(names: tuple[str, ...]) -> tuple[list[Peer], dict]:
    """The libraries that are here, and the setting of a run, which has the others."""
    found, missing = [], {}
    for name in names:
        try:
            found.append(peers.make(name))
        except ImportError as error:
            missing[name] = f"{type(error).__name__}: {error}"
    versions = {peer.name: peer.version for peer in found}
    return found, records.setting("accuracy", versions=versions, missing=missing)


def measure(names: tuple[str, ...]) -> Iterator[list[dict]]:
    """The setting, then a record for each row and peer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, setting = imported(names)
        yield [setting]
        for row in TABLE:
            yield [{"row": row.key, "name": peer.name, "value": measured(peer, row)} for peer in found]


def measure_errors(names: tuple[str, ...], every: bool = True) -> Iterator[list[dict]]:
    """The setting, then the errors of each norm under each condition."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, setting = imported(names)
        yield [setting]
        yield from errors.measure(found, every)


def page(found: list[dict]) -> str:
    of = records.results(found)
    names, rows = names_of(of), []
    for row in TABLE:
        values = {record["name"]: record["value"] for record in of if record["row"] == row.key}
        text = lambda v, row=row: "-" if v is None else v if isinstance(v, str) else row.form(v)
        rows.append([row.title, *(text(values.get(name)) for name in names)])
    return "\n".join(["# Accuracy\n", records.origin(found), f"\n{NOTES}\n", table(["", *names], rows), ""])


def page_of_errors(measured: list[dict]) -> str:
    """A line for each norm of a library: its worst error of y and of the gradients under each condition."""
    of, keys = records.results(measured), [condition.key for condition in errors.CONDITIONS]
    parts = ["# Errors\n", records.origin(measured), f"\n{inspect.getdoc(errors).partition(chr(10) * 2)[2]}\n"]
    titles = {"Output": ("y",), "Gradients": ("dx", "dscale", "dbias", "dparams")}
    for title, quantities in titles.items():
        for libraries in (True, False):
            found = errors.worst([r for r in of if (r["name"] != "every norm") == libraries], quantities)
            columns = keys if libraries else [c.key for c in errors.OF_ROWS]
            lines = [[f"{norm}, {name}" if libraries else norm, *(errors.shown(by.get(key)) for key in columns)]
                     for (name, norm), by in sorted(found.items(), key=lambda item: item[0][1])]  # fmt: skip
            if lines:
                heading = title if libraries else f"{title}: every norm of jaxnorm"
                parts.append(section(heading, table(["", *columns], lines)))
    return "\n".join(parts)


def main() -> None:
    parser = records.parser(__doc__)
    parser.add_argument("--only", **records.choice(NAMES))
    parser.add_argument("--parts", **records.choice(("table", "errors")))
    options = parser.parse_args()
    if "table" in options.parts:
        records.publish("accuracy", options, lambda: measure(tuple(options.only)), page)
    if "errors" in options.parts:
        records.publish("errors", options, lambda: measure_errors(tuple(options.only)), page_of_errors,
                        lambda found, path: errors.draw(records.results(found), path))  # fmt: skip


if __name__ == "__main__":
    main()
