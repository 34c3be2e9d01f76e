"""What is compiled: shapes of the five norms, a scan of transformer blocks, and a stage of a ResNet."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

import jaxnorm.linen

NORMS = {"layer": (8192, 4096), "rms": (8192, 4096), "batch": (32, 56, 56, 256), "group": (32, 56, 56, 256),
         "instance": (32, 56, 56, 256)}  # fmt: skip
BLOCKS, WIDTH, HEADS, TOKENS = 12, 1024, 16, (32, 128)
STAGE = (16, 56, 56, 256)  # the images on one device


# --- whole models, written once: `norms` is the module that their norms come from -----------------------------------


class Block(nn.Module):
    """A transformer block in bfloat16, its weights too, the norm before each sublayer.

    The backward pass recomputes scores and activations, as flash attention does. What remains in memory are the inputs
    of the matrix products and the residuals of the norms.
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
    """step(params, x) -> gradients of a scan of 12 blocks; and the shapes of its arguments."""
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
    """step(variables, x) -> gradients and new statistics of a batch that is sharded over devices."""
    model = Stage(norms)
    x = jax.ShapeDtypeStruct((devices * STAGE[0], *STAGE[1:]), jnp.bfloat16)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), x)

    def loss(params, stats, x):
        y, stats = model.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
        return jnp.sum(jnp.square(y.astype(jnp.float32))), stats

    step = lambda variables, x: jax.grad(loss, has_aux=True)(variables["params"], variables["batch_stats"], x)
    return step, [variables, x]


MODULES = {"jaxnorm": jaxnorm.linen, "flax.linen": nn}
