"""A whole training step, with the norms of flax.linen and with jaxnorm's, which is one import swapped.

    python -m benchmarks.training [--models NAME ...] [--dtypes NAME ...] [--rounds N] [--markdown] [--json PATH]

A step is forward, backward and optimizer update, jitted, its state donated: a decoder transformer under AdamW, and a
ResNet under SGD with momentum. A third variant has no norm at all, so that one sees what the norms cost of a step. All
variants run in turn, one step each in every round, and every ratio is taken within a round. CPU only.

Both variants begin with the same parameters, and the script stops unless their parameter trees are equal and their
losses close. Each line is measured in a process of its own, in which glibc's malloc keeps the pages that were freed.
`--allocator default` leaves malloc alone: then the kernel zeroes most pages anew in every step. (REUSE needs the single
arena: XLA allocates in threads of its own, and heaps other than the main one map each large block by itself.)
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import resource
import sys
import time
import types
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

import jaxnorm
import jaxnorm.linen


@dataclass(frozen=True)
class Sizes:
    """How large the models and their batches are."""

    layers: int = 4
    width: int = 512
    heads: int = 8
    tokens: tuple[int, int] = (4, 256)  # sequences, length
    stages: tuple[int, ...] = (32, 64, 128)  # channels
    blocks: int = 2  # in a stage
    images: tuple[int, int, int, int] = (64, 32, 32, 3)


FULL = Sizes()
TINY = Sizes(layers=1, width=16, heads=2, tokens=(2, 8), stages=(8, 16), blocks=1, images=(4, 8, 8, 3))
VOCABULARY, CLASSES = 1000, 10
ROUNDS, WARM_UP = 15, 3
#: How far the losses of the warm-up steps may be apart, relative.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}
#: malloc serves every size and every thread from one heap, and gives none of it back.
REUSE = {"MALLOC_MMAP_THRESHOLD_": str(1 << 35), "MALLOC_TRIM_THRESHOLD_": str(1 << 35), "MALLOC_ARENA_MAX": "1"}
OPTIONS = {"BatchNorm": dict(use_running_average=False, momentum=0.9), "GroupNorm": dict(num_groups=8)}
NORMS = ("LayerNorm", "RMSNorm", "BatchNorm", "GroupNorm")
#: In place of a module of norms: layers that return their input.
IDENTITY = types.SimpleNamespace(**dict.fromkeys(NORMS, lambda **options: lambda x: x))
VARIANTS = {"flax": nn, "jaxnorm": jaxnorm.linen, "identity": IDENTITY}
#: The columns of the table: step time of the first over that of the second.
RATIOS = {"flax / no norms": ("flax", "identity"), "jaxnorm / no norms": ("jaxnorm", "identity"),
          "speed-up: flax / jaxnorm": ("flax", "jaxnorm")}  # fmt: skip


class Model(nn.Module):
    """A model whose norms are those of a module: `norms` is flax.linen, jaxnorm.linen, or IDENTITY."""

    norms: Any
    norm: str
    dtype: Any
    sizes: Sizes

    @nn.nowrap
    def layers(self) -> tuple[Callable, Callable, Callable]:
        """Constructors of a norm, a dense layer and a 3x3 convolution that compute in `dtype`."""
        norm = partial(getattr(self.norms, self.norm), dtype=self.dtype, **OPTIONS.get(self.norm, {}))
        conv = partial(nn.Conv, kernel_size=(3, 3), use_bias=False, dtype=self.dtype)
        return norm, partial(nn.Dense, dtype=self.dtype), conv


class Transformer(Model):
    """Decoder only, the norm before each sublayer: tokens (batch, sequence) -> logits (batch, sequence, vocabulary)."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        sizes, (norm, dense, _) = self.sizes, self.layers()
        embed = partial(nn.Embed, features=sizes.width, dtype=self.dtype)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = embed(VOCABULARY)(tokens) + embed(tokens.shape[1])(positions)
        causal = nn.make_causal_mask(tokens)
        for _ in range(sizes.layers):
            x += nn.MultiHeadDotProductAttention(sizes.heads, dtype=self.dtype)(norm()(x), mask=causal)
            x += dense(sizes.width)(nn.gelu(dense(4 * sizes.width)(norm()(x))))
        return dense(VOCABULARY)(norm()(x))


class ResNet(Model):
    """Residual blocks of two convolutions; each stage halves the image: (batch, h, w, 3) -> logits (batch, classes)."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        sizes, (norm, dense, conv) = self.sizes, self.layers()
        x = nn.relu(norm()(conv(sizes.stages[0])(images)))
        for stage, width in enumerate(sizes.stages):
            for block in range(sizes.blocks):
                strides = 2 if stage and not block else 1
                y = nn.relu(norm()(conv(width, strides=strides)(x)))
                y = norm()(conv(width)(y))
                if y.shape != x.shape:
                    x = norm()(conv(width, kernel_size=(1, 1), strides=strides)(x))
                x = nn.relu(x + y)
        return dense(CLASSES)(x.mean((1, 2)))


def text(sizes: Sizes) -> tuple[jax.Array, jax.Array]:
    """Random tokens, and after each the next."""
    batch, length = sizes.tokens
    tokens = jnp.asarray(np.random.default_rng(0).integers(VOCABULARY, size=(batch, length + 1)), jnp.int32)
    return tokens[:, :-1], tokens[:, 1:]


def pictures(sizes: Sizes) -> tuple[jax.Array, jax.Array]:
    """Noise, and a class for each image."""
    rng = np.random.default_rng(0)
    labels = rng.integers(CLASSES, size=sizes.images[0])
    return jnp.asarray(rng.normal(size=sizes.images), jnp.float32), jnp.asarray(labels, jnp.int32)


@dataclass(frozen=True)
class Task:
    """What is trained, with which of a module's norms, by which optimizer, on what."""

    model: type[Model]
    norm: str
    optimizer: optax.GradientTransformation
    batch: Callable[[Sizes], tuple[jax.Array, jax.Array]]


ADAMW, SGD = optax.adamw(1e-4), optax.sgd(1e-3, momentum=0.9)
TASKS = {
    "transformer-layer": Task(Transformer, "LayerNorm", ADAMW, text),
    "transformer-rms": Task(Transformer, "RMSNorm", ADAMW, text),
    "resnet-batch": Task(ResNet, "BatchNorm", SGD, pictures),
    "resnet-group": Task(ResNet, "GroupNorm", SGD, pictures),
}


class Run:
    """One variant in training: its step, compiled, and its state, which each step takes over."""

    def __init__(self, model: Model, optimizer: optax.GradientTransformation, variables: dict, batch: tuple):
        stats, params = flax.core.pop(jax.tree.map(jnp.copy, variables), "params")
        self.batch, self.state = batch, (params, stats, optimizer.init(params))

        def loss_of(params, stats, x, labels):
            logits, stats = model.apply({"params": params, **stats}, x, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
            return losses.mean(), stats

        def step(state, x, labels):
            params, stats, moments = state
            (loss, stats), gradients = jax.value_and_grad(loss_of, has_aux=True)(params, stats, x, labels)
            updates, moments = optimizer.update(gradients, moments, params)
            return (optax.apply_updates(params, updates), stats, moments), loss

        self.compiled = jax.jit(step, donate_argnums=0).lower(self.state, *batch).compile()

    def step(self) -> tuple[float, float]:
        """The loss before a step, and the seconds that the step took."""
        start = time.perf_counter()
        self.state, loss = jax.block_until_ready(self.compiled(self.state, *self.batch))
        return float(loss), time.perf_counter() - start


def variables_of(models: dict[str, Model], x: jax.Array) -> dict[str, dict]:
    """What each variant starts from: flax's variables, if jaxnorm would make the same tree; without those of norms."""
    init = lambda name: partial(models[name].init, jax.random.key(0), x)
    layouts = {name: flatten_dict(jax.eval_shape(init(name))) for name in models}
    if layouts["flax"] != layouts["jaxnorm"]:
        raise AssertionError(f"the variables differ. flax: {layouts['flax']}, jaxnorm: {layouts['jaxnorm']}")
    values = flatten_dict(jax.jit(init("flax"))())
    return {name: unflatten_dict({path: values[path] for path in layout}) for name, layout in layouts.items()}


def measure(name: str, dtype: str, sizes: Sizes, rounds: int) -> dict:
    """One line: losses while warming up; quartiles of all seconds, and of the ratios within a round; page faults.

    A page fault is 4 KiB that the kernel zeroes for this process; a step that reuses its memory has almost none.
    """
    task = TASKS[name]
    batch = task.batch(sizes)
    models = {k: task.model(norms, task.norm, jnp.dtype(dtype), sizes) for k, norms in VARIANTS.items()}
    runs = {k: Run(models[k], task.optimizer, v, batch) for k, v in variables_of(models, batch[0]).items()}
    losses = {k: [run.step()[0] for _ in range(WARM_UP)] for k, run in runs.items()}
    np.testing.assert_allclose(losses["jaxnorm"], losses["flax"], rtol=TOLERANCE[dtype], err_msg=f"{name}, {dtype}")
    page_faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    seconds, order, faults = {k: np.empty(rounds) for k in runs}, list(runs), page_faults()
    for i in range(rounds):
        for k in order:
            seconds[k][i] = runs[k].step()[1]
        order.append(order.pop(0))
    quartiles = lambda values: np.percentile(values, (25, 50, 75)).tolist()
    return {
        "model": name, "dtype": dtype, "losses": losses,
        "seconds": {k: quartiles(s) for k, s in seconds.items()},
        "ratios": {column: quartiles(seconds[a] / seconds[b]) for column, (a, b) in RATIOS.items()},
        "page_faults_per_step": (page_faults() - faults) / (rounds * len(runs)),
    }  # fmt: skip


def table(results: list[dict], markdown: bool) -> str:
    """Each ratio as its median, with the quartiles behind it."""
    ratio = lambda low, median, high: f"{median:.2f} ({low:.2f}-{high:.2f})"
    rows = [[r["model"], r["dtype"], *(ratio(*r["ratios"][column]) for column in RATIOS)] for r in results]
    lines = [["training step", "compute", *RATIOS], *rows]
    if markdown:
        lines.insert(1, ["---", "---", *("---:" for _ in RATIOS)])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines)


def apart(allocator: str, *arguments: Any) -> dict:
    """`measure(*arguments)` in a fresh process, whose environment gives it one CPU device and malloc its limits."""
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in f]
    os.environ.update(JAX_PLATFORMS="cpu", XLA_FLAGS=" ".join(flags))
    for variable in REUSE:
        os.environ.pop(variable, None)
    os.environ.update(REUSE if allocator == "reuse" else {})
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--dtypes", nargs="+", choices=TOLERANCE, default=list(TOLERANCE), help="of the computation")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timed steps of each variant")
    parser.add_argument("--allocator", choices=("reuse", "default"), default="reuse", help="may malloc give pages back")
    parser.add_argument("--tiny", action="store_true", help="models too small to measure, to see that all works")
    parser.add_argument("--markdown", action="store_true", help="print a table for a README")
    parser.add_argument("--json", metavar="PATH", help="also write every number to this file")
    options = parser.parse_args()
    sizes, results = TINY if options.tiny else FULL, []
    for name, dtype in itertools.product(options.models, options.dtypes):
        print(f"{name}, {dtype} ...", file=sys.stderr)
        results.append(apart(options.allocator, name, dtype, sizes, options.rounds))
    versions = {module.__name__: module.__version__ for module in (jax, flax, optax, jaxnorm)}
    print(table(results, options.markdown))
    print(f"\nTime of one step over that of another: median (quartiles) of {options.rounds} rounds. CPU,")
    print(f"{os.cpu_count()} cores, malloc: {options.allocator}, {', '.join(f'{k} {v}' for k, v in versions.items())}.")
    if options.json:
        setting = {"allocator": options.allocator, "cores": os.cpu_count(), "rounds": options.rounds}
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"versions": versions, **setting, "sizes": vars(sizes), "results": results}, file, indent=2)


if __name__ == "__main__":
    main()
