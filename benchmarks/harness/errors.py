"""Errors of norms and of their gradients under one condition after the other, against float64, as a table and a map.

An error is in units of the rounding of the dtype: 1 is half a unit in the last place of the largest element in
float32, and of the element itself in 16 bits, which no norm can beat; 1e7 is as large as the result. So one scale fits
all columns. What float32 cannot hold, such as a gradient of 1e-40, has no error if it comes out as small.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
from catalogue import ROWS

from benchmarks.harness.case import EPSILON, GROUPS
from benchmarks.peers import Peer

SHAPES = {"layer": (256, 512), "rms": (256, 512), "batch": (16, 8, 8, 64), "group": (16, 8, 8, 64),
          "instance": (16, 8, 8, 64)}  # fmt: skip
QUANTITIES = ("y", "dx", "dscale", "dbias")
SMALLEST = 2.0**-102  # 24 bits above the least normal number


class Condition(NamedTuple):
    """What x is: made of N(0, 1)."""

    key: str
    make: Callable[[np.ndarray], np.ndarray]
    dtype: str = "float32"
    masked: bool = False


CONDITIONS = (
    *(Condition(f"mean {mean:g}", lambda x, mean=mean: x + mean) for mean in (0, 1e1, 1e2, 1e3, 1e4, 1e5)),
    Condition("size 1e-20", lambda x: 1e-20 * x),
    Condition("size 1e20", lambda x: 1e20 * x),
    Condition("constant", lambda x: np.full_like(x, 1e4 / 3)),
    Condition("bfloat16", lambda x: x + 1, "bfloat16"),
    Condition("float16", lambda x: x + 1, "float16"),
    Condition("float16, size 1e3", lambda x: 1e3 * x, "float16"),
    Condition("masked, mean 1e2", lambda x: x + 1e2, masked=True),
)


def roundings(got, want: np.ndarray, dtype: str) -> float:
    """The largest error, in units of the rounding of the dtype; infinite for a NaN or a wrong shape."""
    got = oracle.wide(np.asarray(got))
    if got.shape != want.shape or not np.isfinite(got).all():
        return math.inf
    largest = np.abs(want).max(initial=0.0)
    if 0.0 < largest < SMALLEST:
        return 0.0 if np.abs(got).max() < SMALLEST else math.inf
    if largest == 0.0:
        return float(np.abs(got).max(initial=0.0) / np.finfo(np.float32).eps * 2)
    if dtype == "float32":
        return float(np.abs(got - want).max() / largest / (np.finfo(np.float32).eps / 2))
    size = np.maximum(np.abs(want), np.sqrt(np.mean(want**2)))
    info = ml_dtypes.finfo(dtype)
    unit = 2.0 ** np.floor(np.log2(size)) * float(info.eps)
    return float((np.abs(got - want) / (unit / 2)).max())


def of_peer(peer: Peer, which: str, condition: Condition) -> dict[str, float] | None:
    """The error of each quantity; None where the library has no such call."""
    shape = (64, 512) if condition.masked and which == "layer" else (256, 64) if condition.masked else SHAPES[which]
    if which not in peer.norms or (condition.masked and (peer.masked is None or which not in peer.masks)):
        return None
    rng = np.random.default_rng(0)
    dtype = jnp.dtype(condition.dtype)
    x = condition.make(rng.normal(size=shape)).astype(dtype)
    g = rng.normal(size=shape).astype(dtype)
    centered = which != "rms"
    labels = oracle.labels(which, shape, GROUPS)
    if condition.masked:
        mask = rng.random(shape) < 0.7 if which == "layer" else rng.random(shape[0]) < 0.7
        full = mask if mask.ndim == x.ndim else np.broadcast_to(mask[:, None], shape)
        g = np.where(full, g, 0).astype(dtype)
        y, vjp = jax.vjp(lambda x: peer.masked(which, x, jnp.asarray(mask)), jnp.asarray(x))
        got, params, kept = (jnp.where(full, y, 0), *vjp(jnp.asarray(g))), (None, None), full
    else:
        mask, kept = None, np.ones(shape, bool)
        params = [np.asarray(m + rng.normal(size=shape[-1]) / 4, dtype).astype(np.float32) for m in (1.0, 0.0)]
        params = params[: 2 if centered else 1]
        front = peer.channels_first and len(shape) > 2
        turn = (lambda a: np.moveaxis(a, -1, 1)) if front else (lambda a: a)
        back = (lambda a: jnp.moveaxis(a, 1, -1)) if front else (lambda a: a)
        norm = lambda x, *params: peer.norm(which, x, *params)
        y, vjp = jax.vjp(norm, jnp.asarray(turn(x)), *map(jnp.asarray, params))
        dx, *dparams = vjp(jnp.asarray(turn(g)).astype(y.dtype))
        got = back(y), back(dx), *dparams
    rank = lambda p: None if p is None else p.reshape(*[1] * (x.ndim - 1), -1)
    in_rank = [*map(rank, params), *[None] * (2 - len(params))]
    options = dict(epsilon=EPSILON, centered=centered, mask=None if mask is None else kept)
    want = [np.where(kept, oracle.normalize(x, labels, *in_rank, **options).y, 0.0)]
    want += [d for d in oracle.gradients(x, labels, *in_rank, g, **options) if d is not None]
    errors = {}
    for name, a, b in zip(QUANTITIES, got, want, strict=False):
        wide = condition.dtype if name in ("y", "dx") else "float32"  # gradients of float32 parameters
        errors[name] = roundings(np.reshape(np.asarray(a), np.shape(b)), b, wide)
    return errors


def of_row(row, condition: Condition) -> dict[str, float]:
    """The same of a row of the catalogue: any norm of jaxnorm, with all of its parameters."""
    rng = np.random.default_rng(0)
    x = condition.make(rng.normal(size=row.shape)).astype(condition.dtype)
    params, g = row.params(rng), rng.normal(size=row.shape).astype(condition.dtype)
    y, vjp = jax.vjp(lambda params, x: row.call(params, row.state(), x, train=True)[0], params, jnp.asarray(x))
    dparams, dx = vjp(jnp.asarray(g).astype(y.dtype))
    want_dx, *want_params = row.gradients(params, x, g)
    errors = {"y": roundings(y, row.truth(params, x).y, condition.dtype), "dx": roundings(dx, want_dx, condition.dtype)}
    pairs = [(a, b) for a, b in zip(dparams, want_params, strict=True) if b is not None and a is not None]
    if pairs:
        errors["dparams"] = max(roundings(np.reshape(a, np.shape(b)), b, "float32") for a, b in pairs)
    return errors


OF_ROWS = [CONDITIONS[i] for i in (0, 2, 4, 6, 7, 9)]


def measure(peers: list[Peer], every: bool = True) -> Iterator[list[dict]]:
    """A record for each library or norm of the catalogue, norm, condition and quantity."""
    for peer in peers:
        for which in SHAPES:
            yield [*records_of(peer.name, which, CONDITIONS, lambda c, peer=peer, which=which: of_peer(peer, which, c))]
    seen: set[type] = set()
    for row in ROWS if every else ():
        if type(row.spec) not in seen and row.oracle is not None:
            seen.add(type(row.spec))
            yield [*records_of("every norm", row.name, OF_ROWS, lambda c, row=row: of_row(row, c))]


def records_of(name: str, norm: str, conditions, errors_of) -> Iterator[dict]:
    for condition in conditions:
        try:
            errors = errors_of(condition)
        except Exception as error:
            print(f"{name}, {norm}, {condition.key}: {type(error).__name__}: {error}", file=sys.stderr)
            errors = {"failed": math.inf}
        for quantity, value in (errors or {}).items():
            value = value if math.isfinite(value) else None  # JSON has no infinity
            yield {"name": name, "norm": norm, "condition": condition.key, "quantity": quantity,
                   "roundings": value and float(f"{value:.3g}")}  # fmt: skip


def worst(records: list[dict], quantities) -> dict[tuple[str, str], dict[str, float]]:
    """(name, norm) -> condition -> the largest error of these quantities."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for record in records:
        if record["quantity"] in quantities or record["quantity"] == "failed":
            of = found.setdefault((record["name"], record["norm"]), {})
            value = math.inf if record["roundings"] is None else record["roundings"]
            of[record["condition"]] = max(of.get(record["condition"], 0.0), value)
    return found


def shown(value: float | None) -> str:
    if value is None:
        return "-"
    return "NaN" if math.isinf(value) else f"{value:.1f}" if value < 100 else f"{value:.0e}"


def draw(records: list[dict], path: Path) -> None:
    """Two maps beside each other, of outputs and of gradients. A row is a norm of a library, a column a condition."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    panels = {"output": ("y",), "gradients, the worst of them": ("dx", "dscale", "dbias", "dparams")}
    of = [record for record in records if record["name"] != "every norm"]
    keys = [c.key for c in CONDITIONS]
    lines = [*worst(of, QUANTITIES)]
    lines.sort(key=lambda line: [*SHAPES].index(line[1]))
    figure = Figure(figsize=(13, 0.24 * len(lines) + 1.9), dpi=150, facecolor="white", layout="constrained")
    for i, (title, quantities) in enumerate(panels.items()):
        found = worst(of, quantities)
        values = np.array([[found.get(line, {}).get(key, np.nan) for key in keys] for line in lines])
        axes = figure.add_subplot(1, 2, i + 1)
        seen = np.where(np.isinf(values), 1e8, np.maximum(values, 1.0))
        image = axes.imshow(seen, norm=LogNorm(1.0, 1e7), cmap="RdYlGn_r", aspect="auto")
        for (y, x), value in np.ndenumerate(values):
            if not np.isnan(value):
                text = "NaN" if np.isinf(value) else f"{value:.0f}" if value < 1000 else f"1e{math.log10(value):.0f}"
                axes.text(x, y, text, ha="center", va="center", fontsize=6.5)
        axes.set_title(title, fontsize=11, loc="left", weight="bold")
        axes.set_xticks(range(len(keys)), keys, rotation=40, ha="right", fontsize=8)
        names = [f"{norm} norm, {name}" for name, norm in lines]
        axes.set_yticks(range(len(lines)), names if i == 0 else [""] * len(lines), fontsize=8)
        for label, (name, _) in zip(axes.get_yticklabels(), lines, strict=True):
            label.set_weight("bold" if name == "jaxnorm" else "normal")
        for y in range(1, len(lines)):
            if lines[y][1] != lines[y - 1][1]:
                axes.axhline(y - 0.5, color="white", linewidth=3)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=figure.axes, shrink=0.6, pad=0.01)
    bar.set_label("largest error, in roundings of the dtype")
    figure.savefig(path)
