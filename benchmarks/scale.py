"""Synchronized batch norm beyond this machine: collectives from compiled programs, and a model of what they cost.

    python -m benchmarks.scale [--targets NAME ...] [--json PATH] [--plot PATH]

The first table is counted in what XLA's compiler makes, for 8 to 1024 chips, of two residual blocks with six batch
norms (each chip 16 images of 56x56x256, bfloat16), forward and backward: statistics of all chips, of groups of 8, of
each chip alone, and no batch norm at all, whose collectives are those of the convolutions' gradients. (Layer and RMS
norm of a data-parallel transformer ask nothing of other chips but to add up the gradients of scale and bias.)

The second is a model, not a measurement. An all-reduce of b bytes over a torus of sides d goes round each ring in turn:

    t = 2 sum(d - 1) hop + 2 b / link           (a ring of d needs d - 1 steps to reduce and d - 1 to gather)

and is set against the time that memory alone takes for the batch norm it belongs to, 8 passes over x. Hop and link are
those of `CHIPS`: round figures of public descriptions, the hop a guess of the order of a microsecond.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import types
from dataclasses import dataclass

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec as P

import jaxnorm.linen
from benchmarks.compiled import AXIS, TARGETS, cases, missing, placed, report

SIZES = ("v5ex8", "v5ex64", "v5ex256", "v5px8", "v5px64", "v5px256", "v5px1024")
GROUP = 8
PASSES = 8  # of batch norm over x, forward and backward: the least there is


@dataclass(frozen=True)
class Chip:
    memory: float  # bytes a second
    link: float  # bytes a second and direction
    hop: float  # seconds from a chip to its neighbour


CHIPS = {"v5e": Chip(819e9, 45e9, 1e-6), "v5p": Chip(2765e9, 90e9, 1e-6)}


def sides(target: str, chips: int | None = None) -> list[int]:
    """The sides of a target's torus, or of a part of it of so many chips."""
    whole = [int(d) for d in TARGETS[target].topology.split(":")[1].split("x")]
    if chips is None:
        return whole
    part = []
    for d in whole:
        part.append(math.gcd(d, chips // math.prod(part)))
    return part


def seconds(chip: Chip, rings: list[int], payload: int) -> float:
    """The model's time of one all-reduce."""
    steps = 2 * sum(d - 1 for d in rings)
    return steps * chip.hop + (2 * payload / chip.link if steps else 0.0)


class _Nothing(nn.Module):
    """In the place of a norm."""

    @nn.compact
    def __call__(self, x):
        return x


NORMS = {
    "global": functools.partial(jaxnorm.linen.BatchNorm, axis_name=AXIS),
    f"groups of {GROUP}": functools.partial(jaxnorm.linen.BatchNorm, axis_name=AXIS, sync=GROUP),
    "local": functools.partial(jaxnorm.linen.BatchNorm, axis_name=AXIS, sync="local"),
    "no norm": lambda **_: _Nothing(),
}


def counted(target: str, norm: str) -> dict:
    """The collectives of a step of the stage, and its temporary memory, for each chip."""
    devices = TARGETS[target].devices
    f, (variables, x) = cases.stage(types.SimpleNamespace(BatchNorm=NORMS[norm]), devices)
    if norm == "no norm":
        f, variables = _without_state(f), {"params": variables["params"], "batch_stats": {}}
    args = placed(target, variables), placed(target, x, P(AXIS))
    return report(f, target, *args, unit=x.size * 2 // devices).asdict()


def _without_state(f):
    return lambda variables, x: f(variables, x)[0]


def modelled(target: str, channels: int, images: int, pixels: int) -> dict[str, float]:
    """The time of a batch norm's two all-reduces over that of its memory traffic, for each who normalizes together."""
    chip = CHIPS[target[:3]]
    memory = PASSES * images * pixels * channels * 2 / chip.memory
    payload = 2 * channels * 4
    rings = {"global": sides(target), f"groups of {GROUP}": sides(target, GROUP), "local": []}
    return {name: 2 * seconds(chip, ring, payload) / memory for name, ring in rings.items()}


LAYERS = {"56x56x256": (256, 56 * 56), "14x14x1024": (1024, 14 * 14), "7x7x2048": (2048, 7 * 7)}
IMAGES = (4, 16, 64)  # of a chip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--json", metavar="PATH", help="also write every number to this file")
    parser.add_argument("--plot", metavar="PATH", help="draw the model to this file")
    options = parser.parse_args()
    print(f"jax {jax.__version__}; compiled, not run.")
    programs = []
    if (reason := missing("tpu")) is not None:
        print(f"Left out, {reason}")
    else:
        _row("chips", "statistics", "all-reduces", "their bytes", "other collectives", "temporary memory, MiB")
        _row("---", "---", "---:", "---:", "---:", "---:")
        for target in options.targets:
            for norm in NORMS:
                found = counted(target, norm)
                programs.append({"target": target, "statistics": norm, **found})
                count, size = (dict(found[key]) for key in ("collectives", "collective_bytes"))
                reduced, bytes_ = count.pop("all-reduce", 0), size.pop("all-reduce", 0)
                _row(target, norm, reduced, bytes_, count or "none", f"{found['temp_bytes'] / 2**20:.0f}")
    print()
    _row("model: all-reduces over memory time", "images a chip", *next(iter(_model(options.targets)))["ratio"])
    _row("---", "---:", *["---:"] * 3)
    model = list(_model(options.targets))
    for row in model:
        _row(f"{row['target']}, {row['layer']}", row["images"], *(f"{r:.2f}" for r in row["ratio"].values()))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"jax": jax.__version__, "programs": programs, "model": model}, file, indent=1)
    if options.plot:
        _draw(model, options.plot)


def _model(targets):
    for target in targets:
        for layer, (channels, pixels) in LAYERS.items():
            for images in IMAGES:
                ratio = modelled(target, channels, images, pixels)
                yield {"target": target, "layer": layer, "images": images, "ratio": ratio}


def _row(*cells) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def _draw(model, path: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for axis, kind in zip(axes, CHIPS, strict=True):
        rows = [r for r in model if r["target"].startswith(kind) and r["images"] == 16]
        for color, layer in zip(("tab:blue", "tab:orange", "tab:green"), LAYERS, strict=True):
            mine = [r for r in rows if r["layer"] == layer]
            chips = [TARGETS[r["target"]].devices for r in mine]
            for style, name in (("-", "global"), ("--", f"groups of {GROUP}")):
                heights, label = [r["ratio"][name] for r in mine], f"{layer}, {name}"
                axis.plot(chips, heights, style, color=color, marker="o", label=label)
        axis.axhline(1.0, color="gray", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel="chips", title=f"{kind}, 16 images a chip (model)")
    axes[0].set_ylabel("two all-reduces / the norm's own memory time")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
