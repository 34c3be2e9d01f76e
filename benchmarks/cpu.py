"""What a norm costs on a CPU, beside other libraries, in units of a copy of the same bytes.

Contestants take turns: every round times each of them once, in random order. A cell is the median over the rounds of
the time over that of a copy of x in the same round: the fastest of NumPy's with one thread and with all, and torch's.
The JAX libraries share a process. torch has one whose idle threads sleep, and one whose idle threads spin, which is
faster if the cores are free. One process works at a time.

"forward" is a jitted call that returns y. "forward+backward" returns y and, for a random cotangent, the gradients of x,
scale and bias. Each contestant is compared with float64 before it is timed. Images are NHWC: channels_last for torch,
and NCHW for equinox, which has no other layout.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from benchmarks.harness import records, table
from benchmarks.harness.case import Case, least
from benchmarks.harness.contest import Crew, measured
from benchmarks.harness.timing import ALLOCATORS, Worker, cpu_devices
from benchmarks.peers import TORCH

ROWS = ((8192, 1024), (65536, 256), (2048, 4096), (16384, 768), (256, 1024), (64, 256))
IMAGES = ((32, 56, 56, 64), (64, 28, 28, 128), (16, 14, 14, 1024))
SHAPES = {"layer": ROWS, "rms": ROWS, "batch": IMAGES, "group": IMAGES, "instance": IMAGES}
SMALL_ROWS = ((1, 16), (2, 32), (4, 64), (4, 128), (8, 128), (16, 256), (64, 256), (256, 1024), (4096, 8),
              (64, 1024), (512, 1024), (1024, 1000), (2048, 1024), (4096, 1024), (16384, 1024))  # fmt: skip
SMALL_IMAGES = ((2, 4, 4, 32), (4, 4, 4, 32), (8, 4, 4, 32), (8, 8, 8, 32), (16, 16, 16, 32), (8, 16, 16, 128),
                (16, 32, 32, 64))  # fmt: skip
SMALL = {"layer": SMALL_ROWS, "batch": SMALL_IMAGES, "group": SMALL_IMAGES}
DTYPES = ("float32", "bfloat16")
PASSES = ("forward", "forward+backward")
FLAX_AND_OTHERS = ("flax.linen", "flax.nnx", "haiku", "equinox", "keras")
NAMES = ("jaxnorm", "jaxnorm-xla", *FLAX_AND_OTHERS, "jax.nn.standardize", "torch", "torch-spin")
RATIOS = {
    "best of others / jaxnorm": FLAX_AND_OTHERS,
    "torch / jaxnorm": ("torch", "torch-spin"),
    "jaxnorm-xla / jaxnorm": ("jaxnorm-xla",),
}
NOTES = f"""Cells: the time over that of a copy of x, median of the rounds. "copy": the time of one. "limit" is that of
a norm that moves each array once (for a batch twice, because its statistics read all of it first); with a last cache it
can be less. "-": no such norm. "failed": see below. "best of others": the fastest of {", ".join(FLAX_AND_OTHERS)}.
"torch / jaxnorm" takes the faster of torch's two."""


def crews_of(names: tuple[str, ...], allocator: str, worker: type) -> list[Crew]:
    from benchmarks.harness.jax_process import JaxContest
    from benchmarks.harness.torch_process import SpinningContest, TorchContest

    crews = [Crew(JaxContest, "cpu", tuple(n for n in names if n not in TORCH), allocator=allocator, worker=worker)]
    kinds = {"torch": TorchContest, "torch-spin": SpinningContest}
    return crews + [Crew(kinds[n], "cpu", (n,), allocator=allocator, worker=worker) for n in kinds if n in names]


def measure(cases: list[Case], names: tuple[str, ...], allocators: list[str], rounds: int, seconds: float,
            worker: type = Worker, name: str = "cpu") -> Iterator[list[dict]]:  # fmt: skip
    """The setting, then the records of one case after another under each allocator."""
    if worker is Worker:
        cpu_devices()
    for run, allocator in enumerate(allocators):
        crews = crews_of(names, allocator, worker)
        about = {"versions": {}, "missing": {}} | crews[0].about
        for crew in crews:
            about["versions"] |= crew.versions
            about["missing"] |= crew.missing
        if run == 0:
            yield [records.setting(name, **about)]
        for i, case in enumerate(cases, 1):
            print(f"{allocator}, {i} of {len(cases)}: {case}", file=sys.stderr)
            yield [{"allocator": allocator, **record} for record in measured(case, crews, rounds, seconds)]
        for crew in crews:
            crew.close()


def page(found: list[dict]) -> str:
    parts = ["# Norms on a CPU\n", records.origin(found), f"\n{NOTES}\n"]
    cases = records.results(found)
    for (allocator,), of_allocator in records.grouped(cases, "allocator").items():
        for (norm,), of in records.grouped(of_allocator, "norm").items():
            text = table.contestants(of, PASSES, lambda norm, which, copies: f"{copies:.3g}")
            parts.append(table.section(f"{norm} norm, {allocator} allocator", text))
        parts.append(table.section(f"in units of jaxnorm's time, {allocator} allocator", summary(of_allocator)))
    parts.append(table.failures(cases))
    return "\n".join(parts).strip() + "\n"


def summary(of_allocator: list[dict]) -> str:
    """How many times as long as jaxnorm others take: the geometric mean over the shapes, and the range. And how many
    times the limit the best of the others takes, which is the most that there is to win."""
    heads = ["", *RATIOS, "best of others / limit"]
    rows = []
    for (norm, dtype), of in records.grouped(of_allocator, "norm", "dtype").items():
        for which in PASSES:
            cases = records.grouped(of, *table.CASE).values()
            ours = [table.copies_of(case, which, ["jaxnorm"]) for case in cases]
            row = [f"{norm} {dtype} {which}"]
            limits = [least(norm, which)] * len(ours)
            for names, units in [*((names, ours) for names in RATIOS.values()), (FLAX_AND_OTHERS, limits)]:
                theirs = [table.copies_of(case, which, names) for case in cases]
                row.append(table.spread([a / b for a, b in zip(theirs, units, strict=True) if a and b]))
            rows.append(row)
    return table.table(heads, rows)


def cases_of(shapes: dict, norms: list[str], dtypes: list[str], given: list[tuple[int, ...]] | None) -> list[Case]:
    """Those of the table, or the given shapes for each norm that takes arrays of their rank."""
    fitting = {norm: [s for s in given or shapes[norm] if len(s) == len(shapes[norm][0])] for norm in norms}
    return [Case(norm, shape, dtype) for norm in norms for shape in fitting[norm] for dtype in dtypes]


def main() -> None:
    parser = records.parser(__doc__)
    add = parser.add_argument
    shape = lambda text: tuple(int(n) for n in text.split("x"))
    add("--norms", **records.choice(SHAPES, None))
    add("--shapes", nargs="+", type=shape, metavar="SHAPE", help="such as 8192x1024, or 32x56x56x64 of an image norm")
    add("--dtypes", **records.choice(DTYPES))
    add("--only", **records.choice((*NAMES, "jaxnorm-native"), None))
    add("--allocators", **records.choice(ALLOCATORS, ["warm", "default"]))
    add("--rounds", type=int, default=30, help="samples of each contestant in each case, at most")
    add("--seconds", type=float, default=20.0, help="no further round of a case begins after this")
    add("--small", action="store_true", help="arrays of 16 elements to 64 MiB: kernels and XLA beside flax")
    options = parser.parse_args()
    shapes = SMALL if options.small else SHAPES
    cases = cases_of(shapes, options.norms or list(shapes), options.dtypes, options.shapes)
    if not cases:
        parser.error(f"none of {options.norms} takes arrays of the rank of these shapes")
    names = options.only or ("jaxnorm-native", "jaxnorm-xla", "flax.linen") if options.small else options.only or NAMES
    given = tuple(names), options.allocators, options.rounds, options.seconds
    name, draw = ("small", table.draw_sweep) if options.small else ("cpu", table.draw)
    records.publish(name, options, lambda: measure(cases, *given), page, draw)


if __name__ == "__main__":
    main()
