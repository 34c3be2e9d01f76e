"""The page of all norms: `python -m tests.gallery` writes docs/all-norms.md from docstrings and the catalogue.

`--check` says whether it is current. `--passes` first compiles a large call of each norm for a TPU v5e, which is not
needed, and counts its traffic; without it the page keeps the counts that it has.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import jax
import jax.numpy as jnp
from catalogue import NOT_NATIVE, ROWS, Row

import jaxnorm as jn
from jaxnorm._core.docstrings import sections

ROOT = Path(__file__).parents[1]
PAGE, COUNTS = ROOT / "docs" / "all-norms.md", ROOT / "benchmarks" / "results" / "passes.json"
WHICH = ("inference", "forward+backward")  # of `passes`: y alone, in training too; and y with all gradients
# The norms of another's statistics, which have no row of their own: whose row tells what they reduce over.
AS = {
    "AddLayerNorm": "LayerNorm", "AddRMSNorm": "RMSNorm", "LayerNormAdd": "LayerNorm", "GatedRMSNorm": "RMSNorm",
    "AdaLayerNormZero": "AdaLayerNorm", "AdaLayerNormSingle": "AdaLayerNorm", "PositionalNorm": "LayerNorm",
    "ConditionalNorm": "BatchNorm",
}  # fmt: skip
KERNELS_OF_SEGMENTS = (jn.SegmentNorm, jn.GraphNorm, jn.PairNorm, jn.MeanSubtractionNorm)
TIER_A = {
    "BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm", "AddLayerNorm", "AddRMSNorm", "GatedRMSNorm",
    "BatchRenorm", "QKNorm", "RMSNormAdd", "LayerNormAdd", "GroupRMSNorm", "L2Norm", "DynamicTanh", "DynamicErf",
    "AdaLayerNorm", "AdaLayerNormZero", "AdaRMSNorm",
}  # fmt: skip
HEAD = """# All norms

`python -m tests.gallery` makes this page from the docstrings and from the catalogue that every law runs on.

| column | what it says |
| --- | --- |
| reduces over | the axes whose elements share a statistic: n examples, t positions, h and w pixels, or h heads of width d, c channels, m rows of a packed array |
| mask | whether padding can be masked out |
| devices | how shards of the reduced axes share statistics: by `axis_name`, or under jit alone |
| kernels | what runs by default on a CPU: kernels, or the operations of XLA |
| passes | bytes from and to memory over those of x in bfloat16, forward / forward + backward, compiled for a TPU v5e |
| tier | [what gets in](../CONTRIBUTING.md#what-gets-in) |
"""


def row_of(kind: type) -> Row:
    """The first row of the catalogue with this spec, or with the one that it is like."""
    for name in (kind.__name__, AS.get(kind.__name__)):
        for row in ROWS:
            if type(row.spec).__name__ == name:
                return row
    raise LookupError(
        f"{kind.__name__} has no row in tests/catalogue.py. Add one, or name whose statistics it has in AS."
    )


def reduced(row: Row) -> str:
    """The axes along which the label of a statistic does not change; in groups where it changes now and then."""
    if row.statistic is None:
        return "nothing"
    labels, names = row.labels, list(inspect.signature(row.statistic).parameters)
    found = []
    for axis, name in enumerate(names):
        steps = jnp.diff(jnp.asarray(labels), axis=axis)
        if not bool(jnp.all(steps != 0)):
            found.append(name if bool(jnp.all(steps == 0)) else f"groups of {name}")
    return ", ".join(found) or "nothing"


def parameters(values: Any, width: int) -> str:
    """The names of parameters or of a state, with their shapes where these are not that of the features."""
    if not hasattr(values, "_asdict"):
        return "-"
    shape = lambda a: "()" if a.ndim == 0 else f"({', '.join('C' if n == width else str(n) for n in a.shape)})"
    named = []
    for name, value in values._asdict().items():
        if value is not None:
            shapes = {shape(leaf) for leaf in jax.tree.leaves(value)}
            named.append(name if shapes <= {"(C,)", "(C)"} else f"{name} {' '.join(sorted(shapes))}")
    return ", ".join(named) or "-"


def formula(doc: str) -> str:
    """The first indented block of a docstring."""
    found = re.search(r"^    .+(?:\n(?:    .+)?)*", doc, re.M)
    return inspect.cleandoc(found[0]).strip() if found else ""


def used_by(doc: str) -> str:
    """From "Used by" to the end of its paragraph."""
    found = re.search(r"\bused by .+?(?=\n\n|\Z)", doc, re.S | re.I)
    return f"U{' '.join(found[0].split())[1:]}" if found else ""


def tier(kind: type, doc: str) -> str:
    return "A" if kind.__name__ in TIER_A else "C" if "Tier C:" in doc else "B"


def entry(name: str, kind: Any, counts: dict[str, list[float]]) -> tuple[list[str], str]:
    """A row of the table, and a section."""
    row, function = row_of(kind), kind.function
    doc = inspect.cleandoc(function.__doc__)
    parts = sections(doc)
    try:
        params, state = (row.spec if type(row.spec) is kind else kind()).init(row.features)
    except (TypeError, ValueError):  # an option without a default, as the spec of the norm that is modulated
        params, state = row.spec.init(row.features)
    takes = inspect.signature(function).parameters
    options = {field.name for field in dataclasses.fields(kind)}
    kernels = "XLA" if NOT_NATIVE in row.exempt and not isinstance(row.spec, KERNELS_OF_SEGMENTS) else "kernels"
    devices = "axis_name" if {"axis_name", "share"} & options else "jit"
    passes = " / ".join(f"{n:.1f}" for n in counts.get(name, [])) or "-"
    cells = [
        f"[{function.__name__}](#{function.__name__})", reduced(row), parameters(params, row.features[-1]),
        parameters(state, row.features[-1]), "yes" if "mask" in takes else "no", devices, kernels, passes,
        tier(kind, doc),
    ]  # fmt: skip
    summary = " ".join(doc.split("\n\n")[0].split())
    source = " ".join(parts.get("Source", "").split()).partition(" Used by ")[0]
    text = f"### {function.__name__}\n\n{summary}\n\n"
    if shown := formula(parts[""]):
        text += f"```text\n{shown}\n```\n\n"
    return cells, text + f"`jn.{kind.__name__}`. {used_by(doc)}\n\nSource: {source}\n"


def page(counts: dict[str, list[float]]) -> str:
    entries = [entry(name, kind, counts) for name, kind in sorted(jn.catalogue().items())]
    head = ["norm", "reduces over", "parameters", "state", "mask", "devices", "kernels", "passes", "tier"]
    lines = [head, ["---"] * len(head), *(cells for cells, _ in entries)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([HEAD, table, "", *(text for _, text in entries)])


def count() -> dict[str, list[float]]:
    """Traffic of a large call: forward, and forward + backward."""
    from helpers.compiled import passes

    found: dict[str, list[float]] = {}
    for name, kind in sorted(jn.catalogue().items()):
        row = row_of(kind)
        if type(row.spec) is not kind:
            continue
        shape = large(row)
        params, state = row.spec.init(row.spec.features(shape))
        operands = row.operands(shape)
        f = lambda x, params, operands, row=row, state=state: row.applied(
            row.spec, params, state, x, **operands, train=True
        )[0]
        try:
            of = passes(f, "v5e", jax.ShapeDtypeStruct(shape, jnp.bfloat16), params, operands, which=WHICH)
            found[name] = [round(of[which].traffic, 2) for which in WHICH]
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
        print(name, found.get(name), flush=True)
    return found


def large(row: Row) -> tuple[int, ...]:
    """The shape of the row, enlarged beyond a TPU's vector memory; sizes that groups divide stay divisible."""
    times = {2: (4096, 64), 3: (64, 32, 32), 4: (32, 8, 4, 64)}[len(row.shape)]
    return tuple(size * by for size, by in zip(row.shape, times, strict=True))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--passes", action="store_true")
    options = parser.parse_args(arguments)
    if options.passes:
        COUNTS.write_text(json.dumps(count(), indent=1) + "\n")
    text = page(json.loads(COUNTS.read_text()) if COUNTS.exists() else {})
    if options.check:
        return int(PAGE.read_text() != text)
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
