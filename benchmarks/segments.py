"""What norms of segments and graphs cost on a CPU, in copies of x, beside the plain norm and what users write today.

All take turns in one process: every round times each once, in random order. A cell is the median over the rounds of the
time over that of a copy of x, the fastest of NumPy's, in the same round. Packed arrays of 16384 rows hold segments of
8, 128 or 1024 rows on average, of random lengths, one after the other ("sorted") or shuffled. "plain" is layer norm of
the same array, without segments. "jraph" is the formula as authors of JAX models write it, by `jax.ops.segment_sum`.
"PyG" is torch_geometric's module, eager, in the same process, where it is installed. "/ plain" is the time of jaxnorm
over that of "plain".

    python -m benchmarks.segments --rounds 20
"""

from __future__ import annotations

import functools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxnorm as jn
from benchmarks.harness import records
from benchmarks.harness.jax_process import numpy_copies
from benchmarks.harness.table import section, table
from benchmarks.harness.timing import ALLOCATORS, cpu_devices

ROWS, CHANNELS = 16384, 256
NORMS = ("layer", "instance", "graph", "pair", "mean_subtraction")
LENGTHS, DTYPES, ORDERS = (8, 128, 1024), ("float32", "bfloat16"), ("sorted", "shuffled")
PASSES = ("forward", "forward+backward")
ENVIRONMENT = {**ALLOCATORS["warm"], "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}


def segment_ids(length: int, order: str, rng: np.random.Generator) -> np.ndarray:
    ids = np.sort(rng.integers(0, ROWS // length, ROWS)).astype(np.int32)
    return ids if order == "sorted" else rng.permutation(ids)


def ours(norm: str, number: int, is_sorted: bool) -> Callable:
    options: dict[str, Any] = dict(num_segments=number, indices_are_sorted=is_sorted)

    def run(x, ids, scale, bias):
        if norm in ("layer", "instance"):
            return jn.segment_norm(x, ids, scale, bias, kind=norm, **options)
        if norm == "graph":
            return jn.graph_norm(x, ids, scale, bias, jnp.full(x.shape[-1], 0.9), **options)
        return getattr(jn, f"{norm}_norm")(x, ids, **options)

    return run


@jax.numpy_rank_promotion("allow")
def by_hand(norm: str, number: int, is_sorted: bool, x, ids, scale, bias):
    """As models in jraph's style have it."""
    total = functools.partial(
        jax.ops.segment_sum, segment_ids=ids, num_segments=number, indices_are_sorted=is_sorted
    )
    n = jnp.maximum(total(jnp.ones(len(ids), x.dtype)), 1)[:, None]
    wide = x.astype(jnp.float32)
    if norm == "layer":
        mean = total(wide.mean(-1, keepdims=True)) / n
        d = wide - mean[ids]
        r = jax.lax.rsqrt(total((d * d).mean(-1, keepdims=True)) / n + 1e-5)
        return (d * r[ids] * scale + bias).astype(x.dtype)
    mean = total(wide) / n
    d = wide - (0.9 if norm == "graph" else 1.0) * mean[ids]
    if norm == "mean_subtraction":
        return d.astype(x.dtype)
    if norm == "pair":
        return (d * jax.lax.rsqrt(total((d * d).sum(-1, keepdims=True)) / n + 1e-5)[ids]).astype(x.dtype)
    return (d * jax.lax.rsqrt(total(d * d) / n + 1e-5)[ids] * scale + bias).astype(x.dtype)


def jax_calls(f: Callable, x, g, ids, scale, bias) -> dict[str, Callable]:
    def both(x, g, ids, scale, bias):
        y, pull = jax.vjp(lambda x, scale, bias: f(x, ids, scale, bias), x, scale, bias)
        return y, pull(g)

    forward, together = jax.jit(f), jax.jit(both)
    return {
        "forward": lambda: jax.block_until_ready(forward(x, ids, scale, bias)),
        "forward+backward": lambda: jax.block_until_ready(together(x, g, ids, scale, bias)),
    }


def of_pyg(norm: str, number: int, x, g, ids) -> dict[str, Callable]:
    import torch
    from torch_geometric import nn

    kinds = {"layer": "LayerNorm", "instance": "InstanceNorm", "graph": "GraphNorm", "pair": "PairNorm",
             "mean_subtraction": "MeanSubtractionNorm"}  # fmt: skip
    options = {"instance": dict(affine=True)}.get(norm, {})
    sized = () if norm in ("pair", "mean_subtraction") else (CHANNELS,)
    module = getattr(nn, kinds[norm])(*sized, **options)
    of = lambda a: torch.from_numpy(np.asarray(a, np.float32)).to(getattr(torch, a.dtype.name))
    x, g, batch = of(x).requires_grad_(), of(g), torch.from_numpy(np.asarray(ids, np.int64))
    module = module.to(x.dtype)
    call = lambda: module(x, batch) if norm in ("pair", "mean_subtraction") else module(x, batch, batch_size=number)

    def both():
        y = call()
        return y, torch.autograd.grad(y, [x, *module.parameters()], g)

    both()
    return {"forward": torch.no_grad()(call), "forward+backward": both}


def contestants(norm: str, dtype: str, length: int, order: str, pyg: bool) -> dict[tuple[str, str], Callable]:
    rng, number = np.random.default_rng(0), ROWS // length
    x, g = (jnp.asarray(rng.standard_normal((ROWS, CHANNELS)), dtype) for _ in range(2))
    ids, scale, bias = jnp.asarray(segment_ids(length, order, rng)), jnp.ones(CHANNELS), jnp.zeros(CHANNELS)
    plain = lambda x, ids, scale, bias: jn.layer_norm(x, scale, bias)
    known = {
        "jaxnorm": jax_calls(ours(norm, number, order == "sorted"), x, g, ids, scale, bias),
        "plain": jax_calls(plain, x, g, ids, scale, bias),
        "jraph": jax_calls(functools.partial(by_hand, norm, number, order == "sorted"), x, g, ids, scale, bias),
    }
    if pyg:
        known["PyG"] = of_pyg(norm, number, x, g, ids)
    calls = {(name, which): call for name, of in known.items() for which, call in of.items()}
    return calls | {(name, "copy"): copy for name, copy in numpy_copies([np.asarray(x)]).items()}


def seconds(run: Callable) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(norms, dtypes, lengths, orders, rounds: int) -> Iterator[list[dict]]:
    cpu_devices()
    about, pyg = {}, True
    try:
        import torch
        import torch_geometric

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        about = {"torch": torch.__version__, "torch_geometric": torch_geometric.__version__}
    except ImportError as error:
        print(f"without PyG: {error}. Install it: pip install torch torch_geometric", file=sys.stderr)
        pyg = False
    yield [records.setting("segments", versions=about)]
    rng = np.random.default_rng(0)
    for case in ((n, d, m, o) for n in norms for d in dtypes for m in lengths for o in orders):
        print(*case, file=sys.stderr)
        calls = contestants(*case, pyg)
        taken = {key: [] for key in calls}
        for i in range(-2, rounds):  # the first compile
            for k in rng.permutation(len(calls)):
                key = list(calls)[k]
                taken[key] += [seconds(calls[key])] * (i >= 0)
        copy = [min(all_of) for all_of in zip(*(t for (_, which), t in taken.items() if which == "copy"), strict=True)]
        copies = {which: {name: round(statistics.median(a / b for a, b in zip(t, copy, strict=True)), 2)
                          for (name, of), t in taken.items() if of == which} for which in PASSES}  # fmt: skip
        yield [dict(zip(("norm", "dtype", "length", "order"), case, strict=True), copy=min(copy), copies=copies)]


def page(found: list[dict]) -> str:
    parts = [f"# Norms of segments on a CPU\n\n{records.origin(found)}\n\n{__doc__.split(chr(10), 2)[2]}"]
    names = ("jaxnorm", "plain", "jraph", "PyG")
    for (dtype,), of in records.grouped(records.results(found), "dtype").items():
        for which in PASSES:
            rows = []
            for r in of:
                cells = [f"{r['copies'][which][n]:.1f}" if n in r["copies"][which] else "-" for n in names]
                ratio = r["copies"][which]["jaxnorm"] / r["copies"][which]["plain"]
                rows.append([f"{r['norm']} of {r['length']}, {r['order']}", *cells, f"{ratio:.2f}"])
            parts.append(section(f"{dtype} {which}", table(["", *names, "/ plain"], rows)))
    return "\n".join(parts).strip() + "\n"


def main() -> None:
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):  # read when a process starts
        command = [sys.executable, "-m", "benchmarks.segments", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **ENVIRONMENT})
    parser = records.parser(__doc__)
    parser.add_argument("--norms", **records.choice(NORMS))
    parser.add_argument("--dtypes", **records.choice(DTYPES))
    parser.add_argument("--orders", **records.choice(ORDERS))
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    given = options.norms, options.dtypes, options.lengths, options.orders, options.rounds
    records.publish("segments", options, lambda: measure(*given), page)


if __name__ == "__main__":
    main()
