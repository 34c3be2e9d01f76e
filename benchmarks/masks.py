"""What a mask and weights cost a norm on a CPU: times over the same norm without them, forward + backward.

All take turns in one process: every round times each once, in random order. A cell is the median over the rounds of the
ratio to the unmasked call of the same round. "first half": the first half of the rows or images counts. "random rows",
"random pixels" and "elements": 7 of 10 do. "weights": a number for each image; "of elements": a weight for each.

    python -m benchmarks.masks --rounds 30
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

import jaxnorm as jn
from benchmarks.harness import records
from benchmarks.harness.table import section, table
from benchmarks.harness.timing import cpu_devices

ROWS, IMAGES = (8192, 1024), (32, 56, 56, 64)
SHAPES = {"layer": ROWS, "rms": ROWS, "batch": IMAGES, "group": IMAGES, "instance": IMAGES}
KINDS = ("unmasked", "first half", "random rows", "random pixels", "elements", "weights", "of elements")
DTYPES = ("float32", "bfloat16")


def masks(norm: str, rng: np.random.Generator) -> dict[str, dict]:
    shape = SHAPES[norm]
    rows, pixels = (shape[0], *[1] * (len(shape) - 1)), (*shape[:-1], 1)
    found = {
        "unmasked": {},
        "first half": {"mask": np.arange(shape[0]).reshape(rows) < shape[0] // 2},
        "random rows": {"mask": rng.random(rows) < 0.7},
        "elements": {"mask": rng.random(shape) < 0.7},
    }
    if len(shape) == 4:
        found["random pixels"] = {"mask": rng.random(pixels) < 0.7}
    if norm == "batch":
        found |= {"weights": {"weights": rng.random(rows, "f")}, "of elements": {"weights": rng.random(shape, "f")}}
    return found


def calls(norm: str, dtype: str, rng: np.random.Generator) -> Iterator[tuple[str, Callable]]:
    x, g = (jnp.asarray(rng.standard_normal(SHAPES[norm]), dtype) for _ in range(2))
    scale, bias = jnp.ones(x.shape[-1]), jnp.zeros(x.shape[-1])
    state = jn.RunningStats(jnp.zeros(x.shape[-1]), jnp.ones(x.shape[-1]))

    def f(x, scale, bias, given):
        if norm == "batch":
            return jn.batch_norm(x, (scale, bias), state, train=True, **given)[0]
        if norm == "rms":
            return jn.rms_norm(x, scale, **given)
        return getattr(jn, f"{norm}_norm")(x, scale, bias, **given, **({"num_groups": 32} if norm == "group" else {}))

    @jax.jit
    def both(x, scale, bias, g, given):
        y, pull = jax.vjp(lambda *a: f(*a, given), x, scale, bias)
        return y, pull(g)

    for kind, given in masks(norm, rng).items():
        args = x, scale, bias, g, jax.tree.map(jnp.asarray, given)
        yield kind, lambda args=args: jax.block_until_ready(both(*args))


def seconds(run: Callable) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(norms, dtypes, rounds: int) -> Iterator[list[dict]]:
    cpu_devices()
    yield [records.setting("masks")]
    rng = np.random.default_rng(0)
    for norm in norms:
        for dtype in dtypes:
            runs = dict(calls(norm, dtype, rng))
            taken = {kind: [] for kind in runs}
            for i in range(-1, rounds):  # the first compiles
                for kind in rng.permutation(list(runs)):
                    taken[kind] += [seconds(runs[kind])] * (i >= 0)
            plain = taken["unmasked"]
            times = lambda kind, taken=taken, plain=plain: [a / b for a, b in zip(taken[kind], plain, strict=True)]
            ratios = {kind: round(statistics.median(times(kind)), 3) for kind in runs}
            yield [{"norm": norm, "dtype": dtype, "seconds": statistics.median(plain), "ratios": ratios}]


def page(found: list[dict]) -> str:
    cell = lambda ratios, kind: f"{ratios[kind]:.2f}" if kind in ratios else "-"
    rows = [[f"{r['norm']} {r['dtype']}", *(cell(r["ratios"], kind) for kind in KINDS)] for r in records.results(found)]
    head = f"# Masks and weights on a CPU\n\n{records.origin(found)}\n"
    return head + section("times the unmasked norm, forward + backward", table(["", *KINDS], rows))


def main() -> None:
    parser = records.parser(__doc__)
    parser.add_argument("--norms", **records.choice(SHAPES))
    parser.add_argument("--dtypes", **records.choice(DTYPES))
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    records.publish("masks", options, lambda: measure(options.norms, options.dtypes, options.rounds), page)


if __name__ == "__main__":
    main()
