"""What a reparametrized weight costs: on a CPU beside other libraries, and in passes over it, compiled for a TPU.

Contestants take turns in one process: every round times each once, in random order. A cell is the median over the
rounds of the time over that of NumPy's copy of the weight in the same round. "forward": the effective weight.
"forward+backward": it, and the gradients of its parameters for a random cotangent. flax is its linen wrapper around a
layer that returns its kernel; torch its parametrization, for standardization the batch norm of the weight that timm
writes; "jnp" the formula as authors of JAX models write it. torch's weights have their outputs first.

    python -m benchmarks.weights
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import records
from benchmarks.harness.table import section, table
from benchmarks.harness.timing import THREADS, cpu_devices
from jaxnorm import weights

DENSE, CONV = (1024, 4096), (3, 3, 256, 256)
SHAPES = {"dense": DENSE, "conv": CONV}
WHICH = ("forward", "forward+backward")
NAMES = ("jaxnorm", "jaxnorm-xla", "flax", "torch", "jnp")


def ours(spec: weights.Reparametrization, w, train: bool = False) -> tuple[Callable, Any]:
    params, state = spec.init(w)
    return lambda params: spec.apply(params, state, train=train), params


def of_flax(wrapper: str, w, **call) -> tuple[Callable, Any]:
    from flax import linen

    class Kernel(linen.Module):
        @linen.compact
        def __call__(self):
            return self.param("kernel", lambda _: w)

    module = getattr(linen, wrapper)(Kernel())
    variables = module.init(jax.random.key(0), **call)
    run = lambda params: module.apply({**variables, "params": params}, **call, mutable=["batch_stats"])
    return run, variables["params"]


def standardized(w):
    axes = tuple(range(w.ndim - 1))
    return (w - w.mean(axes, keepdims=True)) / jnp.sqrt(w.var(axes, keepdims=True) + 1e-6)


def normalized(params):
    v, g = params
    return v * (g / jnp.sqrt(jnp.sum(jnp.square(v), tuple(range(v.ndim - 1)), keepdims=True)))


def dora(params):
    w, magnitude, a, b = params
    v = jax.lax.stop_gradient(w) + (a @ b).reshape(w.shape)
    return magnitude * v / jax.lax.stop_gradient(jnp.linalg.norm(v.reshape(-1, w.shape[-1]), axis=0))


def contestants(norm: str, w) -> Iterator[tuple[str, Callable, Any]]:
    """Names, functions of parameters that return (the effective weight, whatever else), and parameters."""
    one = lambda f: lambda params: (f(params), ())
    if norm == "weight norm":
        yield "jaxnorm", *ours(weights.WeightNorm(), w)
        yield "jaxnorm-xla", *ours(weights.WeightNorm(implementation="xla"), w)
        yield "flax", *of_flax("WeightNorm", w)
        yield "jnp", one(normalized), (w, jnp.ones(w.shape[-1]))
    elif norm == "standardize":
        yield "jaxnorm", *ours(weights.Standardize(), w)
        yield "jaxnorm-xla", *ours(weights.Standardize(implementation="xla"), w)
        yield "jnp", one(standardized), w
    elif norm == "spectral norm":
        yield "jaxnorm", *ours(weights.SpectralNorm(init_steps=0), w, train=True)
        yield "flax", *of_flax("SpectralNorm", w, update_stats=True)
    else:
        params, _ = weights.DoRA().init(w)
        yield "jaxnorm", *ours(weights.DoRA(), w)
        yield "jnp", one(dora), tuple(params)


def of_torch(norm: str, w: np.ndarray, g: np.ndarray) -> dict[str, Callable] | None:
    import torch
    from torch.nn.utils import parametrizations

    torch.set_num_threads(THREADS)
    outs_first = lambda a: torch.tensor(np.ascontiguousarray(np.moveaxis(a, -1, 0)))
    layer, cotangent = torch.nn.Module(), outs_first(g)
    layer.weight = torch.nn.Parameter(outs_first(w))
    if norm == "standardize":
        rows = layer.weight.shape[0]
        batch_norm = torch.nn.functional.batch_norm
        of = lambda: batch_norm(layer.weight.reshape(1, rows, -1), None, None, training=True, eps=1e-6)
        cotangent = cotangent.reshape(1, rows, -1)
    elif norm in ("weight norm", "spectral norm"):
        getattr(parametrizations, norm.replace(" ", "_"))(layer)
        of = lambda: layer.weight
    else:
        return None

    def forward():
        with torch.no_grad():
            return of()

    return {"forward": forward, "forward+backward": lambda: torch.autograd.grad(of(), [*layer.parameters()], cotangent)}


def calls(norm: str, shape: tuple[int, ...]) -> Iterator[tuple[tuple[str, str], Callable]]:
    rng = np.random.default_rng(0)
    w, g = (rng.normal(size=shape).astype("f") for _ in range(2))
    for name, f, params in contestants(norm, jnp.asarray(w)):

        def both(params, g, f=f):
            y, back, more = jax.vjp(f, params, has_aux=True)
            return y, back(g), more

        programs = {"forward": (jax.jit(f), (params,)), "forward+backward": (jax.jit(both), (params, jnp.asarray(g)))}
        for which, (program, args) in programs.items():
            yield (name, which), lambda program=program, args=args: jax.block_until_ready(program(*args))
    for which, run in (of_torch(norm, w, g) or {}).items():
        yield ("torch", which), run
    target = np.empty_like(w)
    yield ("copy", ""), lambda: np.copyto(target, w)


def seconds(run: Callable, least: float = 2e-3) -> float:
    count, start = 0, time.perf_counter()
    while (taken := time.perf_counter() - start) < least or count < 2:
        run()
        count += 1
    return taken / count


def timed(norms: list[str], rounds: int) -> Iterator[dict]:
    rng = np.random.default_rng(0)
    for norm in norms:
        for kind, shape in SHAPES.items():
            with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
                runs = dict(calls(norm, shape))
                taken: dict[Any, list[float]] = {key: [] for key in runs}
                for i in range(-1, rounds):  # the first compiles
                    for key in rng.permutation(len(runs)):
                        key = list(runs)[key]
                        taken[key] += [seconds(runs[key])] * (i >= 0)
            copies = taken.pop(("copy", ""))
            for (name, which), times in taken.items():
                ratios = [a / b for a, b in zip(times, copies, strict=True)]
                low, middle, high = statistics.quantiles(ratios, n=4)
                yield {
                    "part": "cpu", "norm": norm, "shape": f"{kind} {'x'.join(map(str, shape))}", "name": name,
                    "which": which, "copies": [round(a, 3) for a in (low, middle, high)],
                    "ms": round(1e3 * statistics.median(times), 3),
                }  # fmt: skip


def counted(target: str) -> Iterator[dict]:
    from benchmarks.harness import weights as of_weights

    for where, shape in of_weights.SHAPES.items():
        for name in (None, *of_weights.SPECS):
            found = {"part": "passes", "target": target, "where": where, "shape": shape, "spec": name or "no norm"}
            yield found | {
                "alone": of_weights.moved_alone(name, target, shape) if name else {},
                "in a layer": of_weights.moved_in_a_layer(name, target, shape),
            }


NORMS = ("weight norm", "standardize", "spectral norm", "dora")


def page(found: list[dict]) -> str:
    by_part = {part: of for (part,), of in records.grouped(records.results(found), "part").items()}
    parts = [
        "# Reparametrized weights\n",
        records.origin(found),
        f"\n{__doc__.split(chr(10), 2)[2].rpartition('    python')[0]}",
    ]
    rows = []
    for (norm, shape, which), of in records.grouped(by_part.get("cpu", []), "norm", "shape", "which").items():
        at = {r["name"]: f"{r['copies'][1]:.3g} ({r['copies'][0]:.3g}-{r['copies'][2]:.3g})" for r in of}
        rows.append([f"{norm}, {shape}, {which}", *(at.get(name, "-") for name in NAMES)])
    parts += [
        section("On a CPU, in copies of the weight: median and quartiles", table(["float32", *NAMES], rows))
    ] * bool(rows)
    for (target, where), of in records.grouped(by_part.get("passes", []), "target", "where").items():
        cell = lambda r, kind: " / ".join(f"{r[kind][which]:.2f}" for which in WHICH) if r[kind] else "-"
        rows = [[r["spec"], cell(r, "alone"), cell(r, "in a layer")] for r in of]
        title = (
            f"Passes by XLA alone, {target}, {'x'.join(map(str, of[0]['shape']))}, {where}: forward / forward+backward"
        )
        parts.append(section(title, table(["", "alone", "in a layer"], rows)))
    return "\n".join(parts).strip() + "\n"


def main() -> None:
    parser = records.parser(__doc__)
    parser.add_argument("--norms", **records.choice(NORMS))
    parser.add_argument("--parts", **records.choice(("cpu", "passes")))
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args()

    def measure() -> Iterator[list[dict]]:
        os.environ.update(OMP_WAIT_POLICY="passive", GOMP_SPINCOUNT="0")  # before torch is imported
        cpu_devices()
        yield [records.setting("weights", versions={n: records.version(n) for n in ("flax", "torch", "libtpu")})]
        yield from ([r] for r in (timed(options.norms, options.rounds) if "cpu" in options.parts else ()))
        yield from ([r] for r in (counted("v5e") if "passes" in options.parts else ()))

    records.publish("weights", options, measure, page)


if __name__ == "__main__":
    main()
