"""What norms cost before a program runs: seconds of trace, lower and compile, and lines of StableHLO.

    python -m benchmarks.compile_time [--models NAME ...] [--rounds N] [--out FOLDER] [--again]

A model is compiled with the norms of Flax, with those of jaxnorm on the native kernels, and with jaxnorm's XLA path.
The variants take turns in one process, whose caches are emptied before each. Seconds are those of the processor, so
that the compiler's threads count. Lines are those of the lowered program, for cpu, cuda and tpu. Nothing is run.
"""

from __future__ import annotations

import functools
import itertools
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxnorm.linen
import jaxnorm.nnx
from benchmarks.harness import records
from benchmarks.harness.table import section, table
from benchmarks.harness.timing import Timed, Worker, cpu_devices, in_turn, quartiles

DEPTH, WIDTH = 100, 64
NORMS = {"LayerNorm": {}, "RMSNorm": {}, "GroupNorm": {"num_groups": 8}, "InstanceNorm": {}, "BatchNorm": {}}
STEPS = ("trace", "lower", "compile")
PLATFORMS = ("cpu", "cuda", "tpu")
NOTES = """Seconds: medians, over those of Flax in the same round in brackets. Lines: of StableHLO, without the kernels,
which are for a CPU alone, beside those of Flax."""


def variants(flax_norms: Any, ours: Any) -> dict[str, Any]:
    """Modules of norms by name. "native" is the default of the CPU."""
    plain = {name: functools.partial(getattr(ours, name), implementation="xla") for name in NORMS}
    return {"flax": flax_norms, "native": ours, "xla": types.SimpleNamespace(**plain)}


class MLP(flax.linen.Module):
    """Residual layers of 64 features, with a norm before each."""

    norms: Any

    @flax.linen.compact
    def __call__(self, x, train: bool):
        for _ in range(DEPTH):
            x = x + flax.linen.relu(flax.linen.Dense(WIDTH)(self.norms.LayerNorm()(x)))
        return x


class ResNet50(flax.linen.Module):
    """Of images of 64 x 64, with a batch norm after each of 53 convolutions."""

    norms: Any

    @flax.linen.compact
    def __call__(self, x, train: bool):
        conv = functools.partial(flax.linen.Conv, use_bias=False)
        norm = functools.partial(self.norms.BatchNorm, use_running_average=not train)
        x = flax.linen.relu(norm()(conv(64, (7, 7), 2)(x)))
        for stage, blocks in enumerate((3, 4, 6, 3)):
            for block in range(blocks):
                width, strides, old = 64 * 2**stage, 2 if stage and not block else 1, x
                y = flax.linen.relu(norm()(conv(width, (1, 1))(x)))
                y = flax.linen.relu(norm()(conv(width, (3, 3), strides)(y)))
                y = norm()(conv(4 * width, (1, 1))(y))
                if old.shape != y.shape:
                    old = norm()(conv(4 * width, (1, 1), strides)(x))
                x = flax.linen.relu(old + y)
        return x


class One(flax.linen.Module):
    """One norm."""

    norms: Any
    name_of_norm: str

    @flax.linen.compact
    def __call__(self, x, train: bool):
        more = {"use_running_average": not train} if self.name_of_norm == "BatchNorm" else {}
        return getattr(self.norms, self.name_of_norm)(**NORMS[self.name_of_norm], **more)(x)


def of_linen(module: Callable, shape: tuple[int, ...], train: bool, gradient: bool) -> dict[str, tuple]:
    """For each variant a function and the shapes of its arguments."""
    x, made = jax.ShapeDtypeStruct(shape, jnp.float32), {}
    run = lambda model, v, x: model.apply(v, x, train, mutable=["batch_stats"])
    loss = lambda model, p, rest, x: jnp.sum(jnp.square(run(model, {"params": p, **rest}, x)[0]))
    for name, norms in variants(flax.linen, jaxnorm.linen).items():
        model = module(norms)
        v = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), x)
        rest = {kind: value for kind, value in v.items() if kind != "params"}
        f = jax.grad(functools.partial(loss, model)) if gradient else functools.partial(run, model)
        made[name] = f, (v["params"], rest, x) if gradient else (v, x)
    return made


def of_nnx(gradient: bool) -> dict[str, tuple]:
    """The same residual layers in nnx."""
    x, made = jax.ShapeDtypeStruct((32, WIDTH), jnp.float32), {}

    class Layers(nnx.Module):
        def __init__(self, norms):
            rngs = nnx.Rngs(0)
            self.norms = nnx.List([norms.LayerNorm(WIDTH, rngs=rngs) for _ in range(DEPTH)])
            self.dense = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(DEPTH)])

        def __call__(self, x):
            for norm, dense in zip(self.norms, self.dense, strict=True):
                x = x + nnx.relu(dense(norm(x)))
            return x

    run = lambda graph, state, x: nnx.merge(graph, state)(x)
    loss = lambda graph, state, x: jnp.sum(jnp.square(run(graph, state, x)))
    for name, norms in variants(nnx, jaxnorm.nnx).items():
        graph, state = nnx.split(nnx.eval_shape(functools.partial(Layers, norms)))
        made[name] = functools.partial(jax.grad(loss, 1) if gradient else run, graph), (state, x)
    return made


IMAGES = (8, 64, 64, 3)
MODELS: dict[str, Callable[[], dict[str, tuple]]] = {
    f"{DEPTH} layer norms, linen, gradient": lambda: of_linen(MLP, (32, WIDTH), True, True),
    f"{DEPTH} layer norms, linen, forward": lambda: of_linen(MLP, (32, WIDTH), True, False),
    f"{DEPTH} layer norms, nnx, gradient": lambda: of_nnx(True),
    "ResNet-50, linen, gradient": lambda: of_linen(ResNet50, IMAGES, True, True),
    "ResNet-50, linen, inference": lambda: of_linen(ResNet50, IMAGES, False, False),
}
for _norm in NORMS:
    for _which in ("gradient", "forward", "inference")[: 3 if _norm == "BatchNorm" else 2]:
        _one = functools.partial(One, name_of_norm=_norm)
        _how = _which != "inference", _which == "gradient"
        MODELS[f"{_norm} alone, {_which}"] = functools.partial(of_linen, _one, (8, 16, 16, WIDTH), *_how)


def lines(f: Callable, args: tuple, platform: str) -> int:
    """Of the program that f is lowered to."""
    return jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text().count("\n")


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
