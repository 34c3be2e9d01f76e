"""What norms cost before a program runs: seconds of trace, lower and compile, and lines of StableHLO.

A model is compiled with the norms of Flax, with those of jaxnorm on the native kernels, and with jaxnorm's XLA path.
The variants take turns in one process, whose caches are emptied before each. Seconds are those of the processor, so
that the compiler's threads count. Lines are those of the lowered program, for cpu, cuda and tpu. Nothing is run.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator

import jax
import numpy as np
from helpers.models import MODELS, PLATFORMS, lines

import jaxnorm
from benchmarks.harness import records
from benchmarks.harness.table import section, table
from benchmarks.harness.timing import Timed, Worker, cpu_devices, in_turn, quartiles

STEPS = ("trace", "lower", "compile")
NOTES = """Seconds: medians, over those of Flax in the same round in brackets. Lines: of StableHLO, without the kernels,
which are for a CPU alone, beside those of Flax."""


class Compiling(Timed):
    """The variants of one model. A sample is trace, lower and compile, each in seconds of the processor."""

    def __init__(self, model: str):
        super().__init__()
        self.made = MODELS[model]()
        self.calls = {(name, "all"): None for name in self.made}

    def sample(self, key) -> tuple[float, ...]:
        f, args = self.made[key[0]]
        jax.clear_caches()
        clock = [time.process_time()]
        steps: tuple = (lambda _: jax.jit(f).trace(*args), lambda traced: traced.lower(), lambda low: low.compile())
        result = None
        for step in steps:
            result = step(result)
            clock.append(time.process_time())
        return tuple(b - a for a, b in itertools.pairwise(clock))

    def lines(self) -> dict[str, dict[str, int]]:
        return {name: {p: lines(*self.made[name], p) for p in PLATFORMS} for name in ("flax", "xla")}


def measured(model: str, rounds: int, worker: type = Worker) -> dict:
    runs = worker(Compiling, "default", model)
    taken = {name: of for (name, _), of in in_turn(dict.fromkeys(runs.ask("keys"), runs), rounds, 1e9).items()}
    found = {"model": model, "lines": runs.ask("lines")}
    runs.close()
    total = {name: of.sum(1) for name, of in taken.items()}
    found["seconds"] = {n: dict(zip(STEPS, np.median(of, 0).round(4).tolist(), strict=True)) for n, of in taken.items()}
    return found | {"ratios": {name: quartiles(of / total["flax"]) for name, of in total.items()}}


def page(found: list[dict]) -> str:
    of = records.results(found)
    seconds = [
        [r["model"], name, *(f"{r['seconds'][name][step]:.3g}" for step in STEPS),
         f"{sum(r['seconds'][name].values()):.3g} ({r['ratios'][name][1]:.2f})"]
        for r in of for name in r["seconds"]
    ]  # fmt: skip
    ratio = lambda r, p: f"{r['lines']['xla'][p]} ({r['lines']['xla'][p] / r['lines']['flax'][p]:.2f})"
    counts = [[r["model"], *(ratio(r, p) for p in PLATFORMS)] for r in of]
    return "\n".join([
        "# Trace, lower and compile\n", records.origin(found), f"\n{NOTES}\n",
        section("Seconds", table(["model", "norms", *STEPS, "all (over flax)"], seconds)),
        section("Lines of StableHLO (over flax's)", table(["model", *PLATFORMS], counts)),
    ])  # fmt: skip


def main() -> None:
    parser = records.parser(__doc__)
    parser.add_argument("--models", **records.choice(MODELS))
    parser.add_argument("--rounds", type=int, default=5, help="of each variant")
    options = parser.parse_args()

    def measure() -> Iterator[list[dict]]:
        cpu_devices()
        versions = {package: records.version(package) for package in ("flax",)} | {"jaxnorm": jaxnorm.__version__}
        yield [records.setting("compile_time", versions=versions)]
        for model in options.models:
            print(f"{model} ...", file=sys.stderr)
            yield [measured(model, options.rounds)]

    records.publish("compile_time", options, measure, page)


if __name__ == "__main__":
    main()
