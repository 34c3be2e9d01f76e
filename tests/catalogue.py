"""One row per norm and configuration. Every law runs over all of them; a new norm is one row."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from jax import Array

import jaxnorm as jn
from jaxnorm._ops.activation import NAMED


@dataclass(frozen=True)
class Row:
    name: str
    spec: Any
    shape: tuple[int, ...]  # of x
    param: tuple[int, ...]  # of scale and bias, in x's rank
    statistic: Callable[..., Any]  # coordinates of an element -> what names its statistic, e.g. (n, g)
    given: tuple[int, ...] | None = None  # the shape in which parameters are handed over, where it is not x's rank
    flags: frozenset = field(default_factory=frozenset)

    def __str__(self):
        return self.name

    @property
    def centered(self) -> bool:
        return not isinstance(self.spec, jn.RMSNorm)

    @property
    def batch(self) -> bool:
        return isinstance(self.spec, jn.BatchNorm)

    @property
    def features(self) -> int:
        return int(np.prod(self.param)) if "per-sample" not in self.flags else self.param[-1]

    def with_shape(self, shape) -> tuple[np.ndarray, tuple[int, ...]]:
        """Labels for x of another shape of the same rank, and the shape of its parameters."""
        index = np.indices(shape)
        names = np.stack([np.broadcast_to(a, shape).ravel() for a in self.statistic(*index)], -1)
        labels = np.unique(names, axis=0, return_inverse=True)[1].reshape(shape) if names.size else index[0]
        return labels, tuple(1 if p == 1 else s for p, s in zip(self.param, shape, strict=True))

    @property
    def labels(self) -> np.ndarray:
        return self.with_shape(self.shape)[0]

    def params(self, rng: np.random.Generator, dtype=np.float32, x_rank: bool = False) -> jn.Affine:
        """Random parameters, as they are handed to the norm (or in x's rank); None where the spec has none."""
        shape = self.param if x_rank or self.given is None else self.given
        scale, bias = rng.normal(size=(2, *shape))
        return jn.Affine(
            jnp.asarray(scale, dtype) if self.spec.use_scale else None,
            jnp.asarray(bias, dtype) if self.spec.use_bias else None,
        )

    def in_rank(self, params) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Parameters for the oracle: float64, in x's rank, scale_offset included."""
        scale, bias = (None if p is None else oracle.wide(p).reshape(self.param) for p in params)
        return None if scale is None else scale + self.spec.scale_offset, bias

    def state(self):
        return self.spec.init(self.features)[1]

    def apply(self, params, x, **call) -> Array:
        """The norm in training, compiled once per row and shape whichever test asks."""
        return _apply(self, params, x, call)

    def truth(self, params, x, **call) -> oracle.Truth:
        truth = self._before_activation(params, x, **call)
        return truth._replace(y=self.activated(truth.y))

    def gradients(self, params, x, g, **call):
        how = dict(epsilon=self.spec.epsilon, centered=self.centered, **call)
        if self.spec.activation is not None:
            g = g * oracle.ACTIVATIONS[self.spec.activation][1](self._before_activation(params, x, **call).y)
        return oracle.gradients(x, self.labels, *self.in_rank(params), g, **how)

    def activated(self, z):
        return z if self.spec.activation is None else oracle.ACTIVATIONS[self.spec.activation][0](oracle.wide(z))

    def _before_activation(self, params, x, **call) -> oracle.Truth:
        how = dict(epsilon=self.spec.epsilon, centered=self.centered, **call)
        return oracle.normalize(x, self.labels, *self.in_rank(params), **how)

    def reference(self, params, x) -> Array:
        """The norm as plain differentiable jnp, for the transformations whose truth the oracle does not write out."""
        labels = jnp.asarray(self.labels).ravel()
        total = lambda a: jax.ops.segment_sum(a.ravel(), labels, int(self.labels.max()) + 1)[labels].reshape(a.shape)
        n = total(jnp.ones_like(x))
        mean = total(x) / n if self.centered else jnp.zeros_like(x)
        var = total(jnp.square(x - mean)) / n
        y = (x - mean) / jnp.sqrt(var + self.spec.epsilon)
        scale, bias = (None if p is None else jnp.broadcast_to(p.reshape(self.param), x.shape) for p in params)
        y = y if scale is None else y * (scale + self.spec.scale_offset)
        y = y if bias is None else y + bias
        return y if self.spec.activation is None else NAMED[self.spec.activation](y)


@functools.partial(jax.jit, static_argnums=0)
def _apply(row: Row, params, x, call):
    return row.spec.apply(params, row.state(), x, train=True, **call)[0]


def row(name, spec, shape, param, statistic, given=None, *flags) -> Row:
    return Row(name, spec, shape, param, statistic, given, frozenset(flags))


_image, _planes, _tokens = (6, 5, 4, 12), (6, 12, 5, 4), (4, 6, 40)

ROWS = [
    row("layer", jn.LayerNorm(), _tokens, (1, 1, 40), lambda n, t, c: (n, t), (40,)),
    row("layer-two-axes", jn.LayerNorm(axis=(-2, -1)), _tokens, (1, 6, 40), lambda n, t, c: (n,), (6, 40)),
    row("layer-nchw", jn.LayerNorm(axis=1), _planes, (1, 12, 1, 1), lambda n, c, h, w: (n, h, w), (12,)),
    row("layer-no-params", jn.LayerNorm(use_scale=False, use_bias=False), _tokens, (1, 1, 40), lambda n, t, c: (n, t)),
    row("layer-zero-centred", jn.LayerNorm(scale_offset=1.0), _tokens, (1, 1, 40), lambda n, t, c: (n, t), (40,)),
    row("layer-adaptive", jn.LayerNorm(), _tokens, (4, 1, 40), lambda n, t, c: (n, t), None, "per-sample"),
    row("layer-gelu", jn.LayerNorm(activation="gelu"), _tokens, (1, 1, 40), lambda n, t, c: (n, t), (40,)),
    row("rms", jn.RMSNorm(), _tokens, (1, 1, 40), lambda n, t, c: (n, t), (40,)),
    row("rms-bias", jn.RMSNorm(use_bias=True, scale_offset=1.0), _tokens, (1, 1, 40), lambda n, t, c: (n, t), (40,)),
    row("rms-no-scale", jn.RMSNorm(use_scale=False), _tokens, (1, 1, 40), lambda n, t, c: (n, t)),
    row("rms-per-head", jn.RMSNorm(), (3, 4, 5, 16), (1, 1, 5, 16), lambda n, t, h, d: (n, t, h), (5, 16)),
    row("rms-two-axes", jn.RMSNorm(axis=(1, 2)), _tokens, (1, 6, 40), lambda n, t, c: (n,), (6, 40)),
    row("rms-before-scale", jn.RMSNorm(cast="before_scale"), _tokens, (1, 1, 40), lambda n, t, c: (n, t), (40,), "twice"),
    row("rms-silu", jn.RMSNorm(activation="silu"), _tokens, (1, 1, 40), lambda n, t, c: (n, t), (40,)),
    row("group-nhwc", jn.GroupNorm(num_groups=3), _image, (1, 1, 1, 12), lambda n, h, w, c: (n, c // 4), (12,)),
    row("group-nchw", jn.GroupNorm(num_groups=3, axis=1), _planes, (1, 12, 1, 1), lambda n, c, h, w: (n, c // 4), (12,)),
    row("group-size", jn.GroupNorm(group_size=6), (5, 7, 12), (1, 1, 12), lambda n, t, c: (n, c // 6), (12,)),
    row("group-some-axes", jn.GroupNorm(num_groups=2, reduction_axes=(2, 3)), _image, (1, 1, 1, 12),
        lambda n, h, w, c: (n, h, c // 6), (12,)),
    row("group-adaptive", jn.GroupNorm(num_groups=3), _image, (6, 1, 1, 12), lambda n, h, w, c: (n, c // 4), None,
        "per-sample"),
    row("group-gelu-tanh", jn.GroupNorm(num_groups=3, axis=1, activation="gelu_tanh"), _planes, (1, 12, 1, 1),
        lambda n, c, h, w: (n, c // 4), (12,)),
    row("instance-nhwc", jn.InstanceNorm(), _image, (1, 1, 1, 12), lambda n, h, w, c: (n, c), (12,)),
    row("instance-nchw", jn.InstanceNorm(axis=1), _planes, (1, 12, 1, 1), lambda n, c, h, w: (n, c), (12,)),
    row("instance-sequence", jn.InstanceNorm(scale_offset=1.0), (5, 30, 4), (1, 1, 4), lambda n, t, c: (n, c), (4,)),
    row("batch-nhwc", jn.BatchNorm(), (16, 5, 4, 6), (1, 1, 1, 6), lambda n, h, w, c: (c,), (6,)),
    row("batch-relu", jn.BatchNorm(activation="relu"), (16, 5, 4, 6), (1, 1, 1, 6), lambda n, h, w, c: (c,), (6,)),
    row("batch-nchw", jn.BatchNorm(axis=1), (16, 6, 5, 4), (1, 6, 1, 1), lambda n, c, h, w: (c,), (6,)),
    row("batch-flat", jn.BatchNorm(momentum=0.9, scale_offset=1.0), (48, 7), (1, 7), lambda n, c: (c,), (7,)),
    row("batch-no-params", jn.BatchNorm(use_scale=False, use_bias=False), (48, 7), (1, 7), lambda n, c: (c,)),
    row("batch-conditional", jn.BatchNorm(), (16, 5, 4, 6), (16, 1, 1, 6), lambda n, h, w, c: (c,), None, "per-sample"),
    row("batch-ghost", jn.BatchNorm(virtual_batch_size=8), (16, 9, 6), (1, 1, 6), lambda n, t, c: (n // 8, c), (6,),
        "ghost"),
    row("batch-ghost-remainder", jn.BatchNorm(virtual_batch_size=6), (16, 9, 6), (1, 1, 6),
        lambda n, t, c: (n // 6, c), (6,), "ghost"),
]  # fmt: skip

ROW_NORMS = [r for r in ROWS if not r.batch]
BATCH_NORMS = [r for r in ROWS if r.batch]
by_name = {r.name: r for r in ROWS}
# One row for each mechanism of axes, parameters, statistics and roundings: for laws that cost much of each row.
MECHANISMS = {
    "layer": "the last axis", "layer-two-axes": "several axes", "layer-nchw": "an axis that kernels do not take",
    "layer-adaptive": "parameters per example", "layer-gelu": "an activation", "rms": "no mean",
    "rms-per-head": "parameters of two axes", "rms-before-scale": "two roundings", "group-nhwc": "groups",
    "group-some-axes": "groups, with an axis kept", "instance-nhwc": "planes", "batch-nhwc": "columns",
    "batch-nchw": "columns that are planes", "batch-conditional": "columns, and parameters per example",
    "batch-ghost-remainder": "ghost batches, the last of them smaller",
}  # fmt: skip
EACH = [by_name[n] for n in ("layer", "rms", "group-nhwc", "instance-nhwc", "batch-nhwc")]  # one of each norm


def draw(rng: np.random.Generator, shape, mean=0.0, dtype=np.float32) -> np.ndarray:
    return (rng.normal(size=shape) + mean).astype(dtype)
