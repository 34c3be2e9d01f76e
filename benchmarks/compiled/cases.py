"""What is compiled: the five norms, a scan of transformer blocks, and a stage of a ResNet, of each library."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

import jaxnorm as jn
import jaxnorm.linen
from benchmarks import field

NORMS = {"layer": (8192, 4096), "rms": (8192, 4096), "batch": (32, 56, 56, 256), "group": (32, 56, 56, 256),
         "instance": (32, 56, 56, 256)}  # fmt: skip
ROOMS = {"xla": ("cuda", "tpu"), "mosaic_gpu": ("cuda",), "mosaic_tpu": ("tpu",)}
BLOCKS, WIDTH, HEADS, TOKENS = 12, 1024, 16, (32, 128)
STAGE = (16, 56, 56, 256)  # a device's images


def contestants() -> tuple[dict[str, Callable], list[str]]:
    """By name, norm(which, x, *params) -> y; and which peers are not installed. jaxnorm has one for each room here."""
    found, absent = {}, []
    for room in jn.backends():
        if room in ROOMS:
            peer = field.Jaxnorm()
            peer.implementation = room
            found[f"jaxnorm {room}"] = peer
    for kind in (field.Linen, field.Haiku, field.Equinox, field.Keras, field.Tokamax):
        try:
            found[kind.name] = kind()
        except ImportError:
            absent.append(kind.name)
    return found, absent


def has(contestant, name: str, which: str, platform: str) -> bool:
    """Whether a library has a norm, and, of jaxnorm, whether the room is one of that platform."""
    room = name.removeprefix("jaxnorm ")
    return which in getattr(contestant, "norms", NORMS) and platform in ROOMS.get(room, (platform,))


def norm(contestant, which: str) -> tuple[Callable, list[jax.ShapeDtypeStruct]]:
    """f(x, *params), and the shapes of x and params, in bfloat16 and float32; equinox takes images channels first."""
    x = jax.ShapeDtypeStruct(NORMS[which], jnp.bfloat16)
    param = jax.ShapeDtypeStruct(x.shape[-1:], jnp.float32)
    if getattr(contestant, "channels_first", False) and len(x.shape) == 4:
        x = jax.ShapeDtypeStruct((x.shape[0], x.shape[3], *x.shape[1:3]), x.dtype)
    return functools.partial(contestant.norm, which), [x, *[param] * (1 if which == "rms" else 2)]


# --- whole models, written once: their norms are those of a module ----------------------------------------------------


class Block(nn.Module):
    """A transformer block in bfloat16, its weights too, the norm before each sublayer.

    As flash attention does, and as memory is saved elsewhere, scores and activations are computed anew in the backward
    pass: what is left are the inputs of the matrix products, and what the norms keep.
    """

    norms: object

    @nn.compact
    def __call__(self, x, _):
        norm = functools.partial(self.norms.LayerNorm, dtype=jnp.bfloat16)
        dense = functools.partial(nn.DenseGeneral, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, use_bias=False)
        q, k, v = (dense((HEADS, WIDTH // HEADS), name=name)(y) for y in [norm()(x)] for name in "qkv")
        x += dense(WIDTH, axis=(-2, -1), name="out")(jax.checkpoint(jax.nn.dot_product_attention)(q, k, v))
        hidden = dense(4 * WIDTH, name="up")(norm()(x))
        down = self.param("down", nn.initializers.lecun_normal(), (4 * WIDTH, WIDTH), jnp.bfloat16)
        return x + jax.checkpoint(lambda h, w: nn.gelu(h) @ w)(hidden, down), None


def scan(norms) -> tuple[Callable, list]:
    """step(params, x) -> gradients of 12 blocks in a scan, and the shapes of its arguments."""
    stack = nn.scan(Block, {"params": 0}, split_rngs={"params": True}, length=BLOCKS)(norms)
    x = jax.ShapeDtypeStruct((*TOKENS, WIDTH), jnp.bfloat16)
    params = jax.eval_shape(lambda x: stack.init(jax.random.key(0), x, None), x)
    loss = lambda params, x: jnp.sum(jnp.square(stack.apply(params, x, None)[0].astype(jnp.float32)))
    return jax.grad(loss, (0, 1)), [params, x]


class Stage(nn.Module):
    """Two residual blocks of 1x1, 3x3 and 1x1 convolutions in bfloat16, each followed by batch norm."""

    norms: object

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(self.norms.BatchNorm, use_running_average=False, dtype=jnp.bfloat16)
        for _ in range(2):
            y = x
            for i, (width, size) in enumerate(((64, 1), (64, 3), (256, 1))):
                y = norm()(nn.Conv(width, (size, size), use_bias=False, dtype=jnp.bfloat16)(y))
                y = nn.relu(y) if i < 2 else y
            x = nn.relu(x + y)
        return x


BATCH_NORMS = 6  # in a stage


def stage(norms, devices: int) -> tuple[Callable, list]:
    """step(variables, x) -> gradients and new statistics of a batch that is spread over devices."""
    model = Stage(norms)
    x = jax.ShapeDtypeStruct((devices * STAGE[0], *STAGE[1:]), jnp.bfloat16)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), x)

    def loss(params, stats, x):
        y, stats = model.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
        return jnp.sum(jnp.square(y.astype(jnp.float32))), stats

    step = lambda variables, x: jax.grad(loss, has_aux=True)(variables["params"], variables["batch_stats"], x)
    return step, [variables, x]


MODULES = {"jaxnorm": jaxnorm.linen, "flax.linen": nn}
