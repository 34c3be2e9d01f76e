"""Models whose norms are those of a module, Flax's or jaxnorm's: what is trained, and what is traced and lowered."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxnorm.linen
import jaxnorm.nnx

# --- trained ---------------------------------------------------------------------------------------------------------


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
OPTIONS = {"BatchNorm": dict(use_running_average=False, momentum=0.9), "GroupNorm": dict(num_groups=8)}
NORMS = ("LayerNorm", "RMSNorm", "BatchNorm", "GroupNorm")
#: Stands in for a module of norms: layers that return their input.
IDENTITY = types.SimpleNamespace(**dict.fromkeys(NORMS, lambda **options: lambda x: x))
VARIANTS = {"flax": nn, "jaxnorm": jaxnorm.linen, "identity": IDENTITY}


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


# --- traced and lowered ----------------------------------------------------------------------------------------------

DEPTH, WIDTH = 100, 64
KINDS = {"LayerNorm": {}, "RMSNorm": {}, "GroupNorm": {"num_groups": 8}, "InstanceNorm": {}, "BatchNorm": {}}
PLATFORMS = ("cpu", "cuda", "tpu")


def variants(flax_norms: Any, ours: Any) -> dict[str, Any]:
    """Modules of norms by name. "native" is the default of the CPU."""
    plain = {name: partial(getattr(ours, name), implementation="xla") for name in KINDS}
    return {"flax": flax_norms, "native": ours, "xla": types.SimpleNamespace(**plain)}


class MLP(nn.Module):
    """Residual layers of 64 features, with a norm before each."""

    norms: Any

    @nn.compact
    def __call__(self, x, train: bool):
        for _ in range(DEPTH):
            x = x + nn.relu(nn.Dense(WIDTH)(self.norms.LayerNorm()(x)))
        return x


class ResNet50(nn.Module):
    """Of images of 64 x 64, with a batch norm after each of 53 convolutions."""

    norms: Any

    @nn.compact
    def __call__(self, x, train: bool):
        conv = partial(nn.Conv, use_bias=False)
        norm = partial(self.norms.BatchNorm, use_running_average=not train)
        x = nn.relu(norm()(conv(64, (7, 7), 2)(x)))
        for stage, blocks in enumerate((3, 4, 6, 3)):
            for block in range(blocks):
                width, strides, old = 64 * 2**stage, 2 if stage and not block else 1, x
                y = nn.relu(norm()(conv(width, (1, 1))(x)))
                y = nn.relu(norm()(conv(width, (3, 3), strides)(y)))
                y = norm()(conv(4 * width, (1, 1))(y))
                if old.shape != y.shape:
                    old = norm()(conv(4 * width, (1, 1), strides)(x))
                x = nn.relu(old + y)
        return x


class One(nn.Module):
    """One norm."""

    norms: Any
    name_of_norm: str

    @nn.compact
    def __call__(self, x, train: bool):
        more = {"use_running_average": not train} if self.name_of_norm == "BatchNorm" else {}
        return getattr(self.norms, self.name_of_norm)(**KINDS[self.name_of_norm], **more)(x)


def of_linen(module: Callable, shape: tuple[int, ...], train: bool, gradient: bool) -> dict[str, tuple]:
    """For each variant a function and the shapes of its arguments."""
    x, made = jax.ShapeDtypeStruct(shape, jnp.float32), {}
    run = lambda model, v, x: model.apply(v, x, train, mutable=["batch_stats"])
    loss = lambda model, p, rest, x: jnp.sum(jnp.square(run(model, {"params": p, **rest}, x)[0]))
    for name, norms in variants(nn, jaxnorm.linen).items():
        model = module(norms)
        v = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), x)
        rest = {kind: value for kind, value in v.items() if kind != "params"}
        f = jax.grad(partial(loss, model)) if gradient else partial(run, model)
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
        graph, state = nnx.split(nnx.eval_shape(partial(Layers, norms)))
        made[name] = partial(jax.grad(loss, 1) if gradient else run, graph), (state, x)
    return made


IMAGES = (8, 64, 64, 3)
MODELS: dict[str, Callable[[], dict[str, tuple]]] = {
    f"{DEPTH} layer norms, linen, gradient": lambda: of_linen(MLP, (32, WIDTH), True, True),
    f"{DEPTH} layer norms, linen, forward": lambda: of_linen(MLP, (32, WIDTH), True, False),
    f"{DEPTH} layer norms, nnx, gradient": lambda: of_nnx(True),
    "ResNet-50, linen, gradient": lambda: of_linen(ResNet50, IMAGES, True, True),
    "ResNet-50, linen, inference": lambda: of_linen(ResNet50, IMAGES, False, False),
}
for _norm in KINDS:
    for _which in ("gradient", "forward", "inference")[: 3 if _norm == "BatchNorm" else 2]:
        _one = partial(One, name_of_norm=_norm)
        _how = _which != "inference", _which == "gradient"
        MODELS[f"{_norm} alone, {_which}"] = partial(of_linen, _one, (8, 16, 16, WIDTH), *_how)


def lines(f: Callable, args: tuple, platform: str) -> int:
    """Of the program that f is lowered to."""
    return jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text().count("\n")
