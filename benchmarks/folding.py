"""What folding saves when a model is served on a CPU: forward passes before and after, and of the model without norms.

All take turns in one process: every round times each once, in random order. "speed-up" is the time before over that
after, by the round; "no norms" is the same for a model whose norms return their input, which no folding can beat. The
operations are those of the optimized program.

    python -m benchmarks.folding --rounds 30
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from helpers.models import IDENTITY, ResNet50, Sizes, Transformer

import jaxnorm.linen
from benchmarks.harness import records
from benchmarks.harness.table import table
from benchmarks.harness.timing import cpu_devices, quartiles
from jaxnorm import models

OPERATIONS = ("rsqrt", "subtract", "multiply", "add")


class Depthwise(nn.Module):
    """Blocks of MobileNet: a depthwise convolution, then one of each pixel, with a batch norm after each."""

    norms: Any

    @nn.compact
    def __call__(self, x, train: bool):
        norm = partial(self.norms.BatchNorm, use_running_average=not train)
        x = nn.relu(norm()(nn.Conv(32, (3, 3), 2, use_bias=False)(x)))
        for width, strides in ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)):
            own = nn.Conv(x.shape[-1], (3, 3), strides, feature_group_count=x.shape[-1], use_bias=False)
            x = nn.relu(norm()(own(x)))
            x = nn.relu(norm()(nn.Conv(width, (1, 1), use_bias=False)(x)))
        return nn.Dense(10)(x.mean((1, 2)))


def transformer(norms: Any, norm: str) -> nn.Module:
    return Transformer(norms, norm, jnp.float32, Sizes(layers=4, width=256))


def cases() -> dict[str, tuple[Callable[[Any], nn.Module], tuple[Any, ...]]]:
    """A model by its norms, and what it is called with."""
    rng = np.random.default_rng(0)
    images = lambda *shape: (jnp.asarray(rng.standard_normal(shape, "f")), False)
    tokens = jnp.asarray(rng.integers(1000, size=(4, 64)), jnp.int32)
    return {
        "ResNet-50, 1 image of 64 x 64": (ResNet50, images(1, 64, 64, 3)),
        "ResNet-50, 8 images of 64 x 64": (ResNet50, images(8, 64, 64, 3)),
        "depthwise, 8 images of 128 x 128": (Depthwise, images(8, 128, 128, 3)),
        "transformer, LayerNorm": (partial(transformer, norm="LayerNorm"), (tokens,)),
        "transformer, RMSNorm": (partial(transformer, norm="RMSNorm"), (tokens,)),
    }


def programs(of: Callable[[Any], nn.Module], args: tuple[Any, ...]) -> tuple[dict[str, Callable], dict, models.Outcome]:
    """The compiled calls, the operations of each, and what was folded."""
    x, static = args[0], args[1:]
    calls, operations = {}, {}
    model, plain = of(jaxnorm.linen), of(IDENTITY)
    variables = model.init(jax.random.key(0), x, *static)
    folded = models.fold(model, variables, x, *static)
    for name, apply, v in (
        ("before", model.apply, variables),
        ("after", folded.apply, folded.variables),
        ("no norms", plain.apply, plain.init(jax.random.key(0), x, *static)),
    ):
        program = jax.jit(lambda v, x, apply=apply: apply(v, x, *static)).lower(v, x).compile()
        text = program.as_text()
        operations[name] = {op: len(re.findall(rf" {op}\(", text)) for op in OPERATIONS}
        calls[name] = partial(lambda program, v: jax.block_until_ready(program(v, x)), program, v)
    difference = np.abs(calls["before"]() - calls["after"]())
    if difference.max() > 1e-3:
        raise AssertionError(f"the folded model differs by {difference.max()}")
    return calls, operations, folded.outcome


def seconds(run: Callable) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(names: list[str], rounds: int) -> Iterator[list[dict]]:
    cpu_devices()
    yield [records.setting("folding", rounds=rounds, versions={"flax": records.version("flax")})]
    rng = np.random.default_rng(0)
    for name in names:
        calls, operations, outcome = programs(*cases()[name])
        taken: dict[str, list[float]] = {call: [] for call in calls}
        for i in range(-2, rounds):  # the first ones warm up
            for call in rng.permutation(list(calls)):
                taken[call] += [seconds(calls[call])] * (i >= 0)
        before = np.array(taken["before"])
        yield [{
            "model": name, "folded": len(outcome.changed), "left": len(outcome.left), "operations": operations,
            "seconds": {call: quartiles(np.array(of)) for call, of in taken.items()},
            "speed_up": {call: quartiles(before / np.array(of)) for call, of in taken.items() if call != "before"},
        }]  # fmt: skip


def page(found: list[dict]) -> str:
    (setting,), rows = records.settings(found), []
    ratio = lambda low, median, high: f"{median:.2f} ({low:.2f} to {high:.2f})"
    for r in records.results(found):
        change = [f"{r['operations']['before'][op]} -> {r['operations']['after'][op]}" for op in OPERATIONS]
        ms = [f"{1e3 * r['seconds'][call][1]:.2f}" for call in ("before", "after")]
        rows.append([r["model"], f"{r['folded']} of {r['folded'] + r['left']}", *ms,
                     ratio(*r["speed_up"]["after"]), ratio(*r["speed_up"]["no norms"]), *change])  # fmt: skip
    head = ["model", "folded", "ms before", "ms after", "speed-up", "no norms", *OPERATIONS]
    about = f"\nMedians (quartiles) of {setting['rounds']} rounds; {setting['threads']} threads.\n"
    return "\n".join(["# Folding, served on a CPU\n", records.origin(found), about, table(head, rows), ""])


def main() -> None:
    parser = records.parser(__doc__)
    parser.add_argument("--models", **records.choice(cases()))
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    records.publish("folding", options, lambda: measure(options.models, options.rounds), page)


if __name__ == "__main__":
    main()
