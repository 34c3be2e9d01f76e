"""From which size on the CPU kernels beat XLA: the rule of the default (`jaxnorm._kernels.cpu.pays`), measured.

    python -m benchmarks.break_even [--json PATH]

jaxnorm's two rooms on small arrays, in turn, medians: how many times as long the XLA room takes as the kernels,
forward, and forward + backward with all gradients. Last, why batch norm at inference is left to XLA: it is one
elementwise pass there, which XLA fuses with what follows it, and a kernel cannot be fused.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import jaxnorm as jn
from jaxnorm._backends import cpu

ROOMS = ("xla", "native")
ROWS = ((1, 16), (2, 32), (4, 64), (4, 128), (8, 128), (16, 256), (64, 256), (256, 1024), (4096, 8))
IMAGES = ((2, 4, 4, 8), (4, 4, 4, 8), (8, 4, 4, 16), (8, 8, 8, 32), (16, 16, 16, 32))
DTYPES = ("float32", "bfloat16")
ROUNDS = 15


def layer(x, scale, bias, room):
    return jn.layer_norm(x, scale, bias, implementation=room)


def group(x, scale, bias, room):
    return jn.group_norm(x, scale, bias, num_groups=4, implementation=room)


def batch(x, scale, bias, room):
    state = jn.RunningStats(jnp.zeros_like(bias), jnp.ones_like(bias))
    return jn.batch_norm(x, jn.Affine(scale, bias), state, train=True, implementation=room)[0]


def in_turn(calls, seconds: float = 2e-3) -> list[float]:
    """Median seconds of each call, round robin, each looped for so long at a time."""
    for call in calls:
        call()
    once = [_looped(call, 3) for call in calls]
    times = [[] for _ in calls]
    for _ in range(ROUNDS):
        for call, guess, record in zip(calls, once, times, strict=True):
            record.append(_looped(call, max(3, int(seconds / guess))))
    return [statistics.median(record) for record in times]


def _looped(call, times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / times


def both(norm, x, scale, bias, g):
    y, vjp = jax.vjp(norm, x, scale, bias)
    return y, vjp(g)


def measured(norm, shape, dtype) -> dict:
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(2))
    params = jnp.ones(shape[-1]), jnp.zeros(shape[-1])
    rooms = [partial(norm, room=room) for room in ROOMS]
    forward = in_turn([partial(jax.jit(f), x, *params) for f in rooms])
    backward = in_turn([partial(jax.jit(partial(both, f)), x, *params, g) for f in rooms])
    ratio = lambda pair: pair[0] / pair[1]
    default = jax.jit(partial(norm, room=None)).lower(x, *params).compile().as_text()
    return {
        "norm": norm.__name__, "shape": shape, "dtype": dtype, "elements": x.size, "forward": ratio(forward),
        "forward+backward": ratio(backward), "default": "native" if "jaxnorm_" in default else "xla",
    }  # fmt: skip


def inference(shape, dtype, follow) -> dict:
    """The given statistics applied, and then `follow`: by XLA as one program, and by the kernel and XLA after it."""
    rng = np.random.default_rng(0)
    x, c = jnp.asarray(rng.normal(size=shape), dtype), shape[-1]
    mean, var, scale, bias = jnp.zeros(c), jnp.ones(c), jnp.ones(c), jnp.zeros(c)
    in_rank = lambda a: a.reshape(1, 1, 1, c)
    view = cpu.view_of(shape, (0, 1, 2), frozenset({3}))
    static = cpu.Static(view, 1.0, 1e-5, 1.0, True)
    kernel = lambda x, *s: cpu.normalize(static, x.dtype, x, in_rank(mean), in_rank(mean), *map(in_rank, s))
    by_xla = jax.jit(lambda x: follow(jn.normalize(x, mean, var, scale, bias), x))
    by_kernel = jax.jit(lambda x: follow(kernel(x, var, scale, bias), x))
    xla, native = in_turn([partial(by_xla, x), partial(by_kernel, x)], 2e-2)
    return {"shape": shape, "dtype": dtype, "follow": follow.__name__, "ratio": xla / native}


def nothing(y, x):
    return y


def relu(y, x):
    return jax.nn.relu(y)


def relu_of_sum(y, x):
    return jax.nn.relu(y + x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="PATH", help="also write every number to this file")
    options = parser.parse_args()
    if not cpu.library().loaded:
        raise SystemExit(f"there is nothing to compare: {cpu.library().reason}")
    print(f"jax {jax.__version__}, {jn.backends()['native'].reason}. Ratios: XLA's time over the kernels'.\n")
    print(f"{'norm':6} {'shape':18} {'dtype':9} {'elements':>8}  forward  forward+backward  the default")
    rows = []
    for norm, shapes in ((layer, ROWS), (batch, IMAGES), (group, IMAGES)):
        for shape in shapes:
            for dtype in DTYPES:
                rows.append(r := measured(norm, shape, dtype))
                print(f"{r['norm']:6} {shape!s:18} {dtype:9} {r['elements']:8}  {r['forward']:7.2f}"
                      f"  {r['forward+backward']:16.2f}  {r['default']}", flush=True)  # fmt: skip
    print("\nbatch norm at inference, and what follows it")
    fused = []
    for follow in (nothing, relu, relu_of_sum):
        for dtype in DTYPES:
            fused.append(r := inference((32, 56, 56, 64), dtype, follow))
            print(f"{r['follow']:12} {dtype:9} {r['ratio']:5.2f}", flush=True)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"jax": jax.__version__, "small": rows, "inference": fused}, file, indent=2)


if __name__ == "__main__":
    main()
