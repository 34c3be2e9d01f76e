"""A whole training step with the norms of flax.linen, and with those of jaxnorm: one import is swapped.

A step is forward, backward and optimizer update, jitted, its state donated: a decoder transformer under AdamW, and a
ResNet under SGD with momentum. A third variant has no norms, which shows their share of a step. The variants take
turns, one step each in a round, and every ratio is taken within a round. CPU only.

All variants start from the same parameters. The script stops unless the parameter trees are equal and the losses close.
Each line is measured in a process of its own, whose malloc keeps freed pages; with `--allocator default` the kernel
zeroes most pages again in every step.
"""

from __future__ import annotations

import itertools
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

import jaxnorm.linen
from benchmarks.harness import records
from benchmarks.harness.table import table
from benchmarks.harness.timing import ALLOCATORS, Timed, Worker, cpu_devices, in_turn, quartiles


@dataclass(frozen=True)
class Sizes:
    """The sizes of the models and their batches."""

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
#: The largest relative difference between the losses of the warm-up steps.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}
OPTIONS = {"BatchNorm": dict(use_running_average=False, momentum=0.9), "GroupNorm": dict(num_groups=8)}
NORMS = ("LayerNorm", "RMSNorm", "BatchNorm", "GroupNorm")
#: Stands in for a module of norms: layers that return their input.
IDENTITY = types.SimpleNamespace(**dict.fromkeys(NORMS, lambda **options: lambda x: x))
VARIANTS = {"flax": nn, "jaxnorm": jaxnorm.linen, "identity": IDENTITY}
#: The columns of the table: step time of the first over that of the second.
RATIOS = {"flax / no norms": ("flax", "identity"), "jaxnorm / no norms": ("jaxnorm", "identity"),
          "speed-up: flax / jaxnorm": ("flax", "jaxnorm")}  # fmt: skip


class Model(nn.Module):
    """A model with the norms of a module: `norms` is flax.linen, jaxnorm.linen, or IDENTITY."""

    norms: Any
    norm: str
    dtype: Any
    sizes: Sizes

    @nn.nowrap
    def layers(self) -> tuple[Callable, Callable]:
        """Constructors of a norm and a dense layer that compute in `dtype`."""
        norm = partial(getattr(self.norms, self.norm), dtype=self.dtype, **OPTIONS.get(self.norm, {}))
        return norm, partial(nn.Dense, dtype=self.dtype)


class Transformer(Model):
    """Decoder only, a norm before each sublayer: tokens (batch, sequence) -> logits (batch, sequence, vocabulary)."""

    optimizer: ClassVar = optax.adamw(1e-4)

    @staticmethod
    def batch(sizes: Sizes) -> tuple[jax.Array, jax.Array]:
        """Random tokens, and for each the next one."""
        batch, length = sizes.tokens
        tokens = jnp.asarray(np.random.default_rng(0).integers(VOCABULARY, size=(batch, length + 1)), jnp.int32)
        return tokens[:, :-1], tokens[:, 1:]

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        sizes, (norm, dense) = self.sizes, self.layers()
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

    optimizer: ClassVar = optax.sgd(1e-3, momentum=0.9)

    @staticmethod
    def batch(sizes: Sizes) -> tuple[jax.Array, jax.Array]:
        """Noise, and a class for each image."""
        rng = np.random.default_rng(0)
        labels = rng.integers(CLASSES, size=sizes.images[0])
        return jnp.asarray(rng.normal(size=sizes.images), jnp.float32), jnp.asarray(labels, jnp.int32)

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        sizes, (norm, dense) = self.sizes, self.layers()
        conv = partial(nn.Conv, kernel_size=(3, 3), use_bias=False, dtype=self.dtype)
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


#: A model, and its norm.
TASKS = {
    "transformer-layer": (Transformer, "LayerNorm"),
    "transformer-rms": (Transformer, "RMSNorm"),
    "resnet-batch": (ResNet, "BatchNorm"),
    "resnet-group": (ResNet, "GroupNorm"),
}


class Training(Timed):
    """The variants of one task. Each has a compiled step that takes over its state."""

    seconds, fresh = 0.0, False  # a sample is one step

    def __init__(self, name: str, dtype: str, sizes: Sizes):
        super().__init__()
        (model, norm), self.losses = TASKS[name], {}
        batch = model.batch(sizes)
        models = {k: model(norms, norm, jnp.dtype(dtype), sizes) for k, norms in VARIANTS.items()}
        for variant, variables in variables_of(models, batch[0]).items():
            step = compiled(models[variant], variables, batch)
            self.losses[variant] = [float(step()) for _ in range(WARM_UP)]
            self.add((variant, "step"), partial(lambda step: step, step))
        want, got = self.losses["flax"], self.losses["jaxnorm"]
        np.testing.assert_allclose(got, want, rtol=TOLERANCE[dtype], err_msg=f"{name}, {dtype}")

    def present(self) -> dict[str, list[float]]:
        return self.losses


def compiled(model: Model, variables: dict, batch: tuple) -> Callable:
    """A call that takes one step and returns the loss before it."""
    stats, params = flax.core.pop(jax.tree.map(jnp.copy, variables), "params")
    state = params, stats, model.optimizer.init(params)

    def loss_of(params, stats, x, labels):
        logits, stats = model.apply({"params": params, **stats}, x, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
        return losses.mean(), stats

    def step(state, x, labels):
        params, stats, moments = state
        (loss, stats), gradients = jax.value_and_grad(loss_of, has_aux=True)(params, stats, x, labels)
        updates, moments = model.optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), stats, moments), loss

    program = jax.jit(step, donate_argnums=0).lower(state, *batch).compile()

    def call():
        nonlocal state
        state, loss = jax.block_until_ready(program(state, *batch))
        return loss

    return call


def variables_of(models: dict[str, Model], x: jax.Array) -> dict[str, dict]:
    """The initial variables of each variant: those of flax. Raises unless jaxnorm makes the same tree."""
    init = lambda name: partial(models[name].init, jax.random.key(0), x)
    layouts = {name: flatten_dict(jax.eval_shape(init(name))) for name in models}
    if layouts["flax"] != layouts["jaxnorm"]:
        raise AssertionError(f"the variables differ. flax: {layouts['flax']}, jaxnorm: {layouts['jaxnorm']}")
    values = flatten_dict(jax.jit(init("flax"))())
    return {name: unflatten_dict({path: values[path] for path in layout}) for name, layout in layouts.items()}


def measured(name: str, dtype: str, sizes: Sizes, rounds: int, allocator="default", worker: type = Worker) -> dict:
    """One record. A page fault is 4 KiB that the kernel zeroes for the process."""
    runs = worker(Training, allocator, name, dtype, sizes)
    losses = runs.ask("present")
    taken = {variant: of for (variant, _), of in in_turn(dict.fromkeys(runs.ask("keys"), runs), rounds, 1e9).items()}
    runs.close()
    return {
        "model": name, "dtype": dtype, "losses": losses,
        "seconds": {variant: quartiles(of[:, 0]) for variant, of in taken.items()},
        "ratios": {column: quartiles(taken[a][:, 0] / taken[b][:, 0]) for column, (a, b) in RATIOS.items()},
        "page_faults_per_step": float(f"{np.mean([of[:, 1] for of in taken.values()]):.4g}"),
    }  # fmt: skip


def page(found: list[dict]) -> str:
    (setting,), of = records.settings(found), records.results(found)
    ratio = lambda low, median, high: f"{median:.2f} ({low:.2f} to {high:.2f})"
    rows = [[r["model"], r["dtype"], *(ratio(*r["ratios"][column]) for column in RATIOS)] for r in of]
    about = f"The time of one step over that of another: median (quartiles) of {setting['rounds']} rounds."
    about = f"\n{about} Allocator: {setting['allocator']}.\n"
    text = table(["model", "compute", *RATIOS], rows)
    return "\n".join(["# A training step\n", records.origin(found), about, text, ""])


def main() -> None:
    parser = records.parser(__doc__)
    add = parser.add_argument
    add("--models", **records.choice(TASKS))
    add("--dtypes", **records.choice(TOLERANCE))
    add("--rounds", type=int, default=ROUNDS, help="timed steps of each variant")
    add("--allocator", choices=ALLOCATORS, default="warm", help="whether malloc returns pages to the system")
    add("--tiny", action="store_true", help="models too small to measure, to try the script")
    options = parser.parse_args()
    sizes = TINY if options.tiny else FULL

    def measure() -> Iterator[list[dict]]:
        cpu_devices()
        versions = {package: records.version(package) for package in ("flax", "optax")}
        versions["jaxnorm"] = jaxnorm.__version__
        more = dict(versions=versions, allocator=options.allocator, rounds=options.rounds, sizes=vars(sizes))
        yield [records.setting("training", **more)]
        for name, dtype in itertools.product(options.models, options.dtypes):
            print(f"{name}, {dtype} ...", file=sys.stderr)
            yield [measured(name, dtype, sizes, options.rounds, options.allocator)]

    records.publish("training", options, measure, page)


if __name__ == "__main__":
    main()
