"""Normalize by statistics that are given, as at inference."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from .._backends.select import check_implementation
from .._core.arithmetic import nan_if_infinite
from .._core.arrays import align_param, as_float_array, canonicalize_axes, canonicalize_dtype
from .._core.checks import canonicalize_epsilon, canonicalize_number
from .._core.dtypes import accumulator, widest
from .._core.explain import explained
from .._core.masks import deviation
from .._core.platforms import recompute
from .._core.program import as_program
from .._core.types import Affine
from .._core.vma import shard_like
from . import activation as _activation
from .activation import Activation, check_activation
from .formula import affine, effective_scale, rsqrt

Array = jax.Array


@explained("function")
@as_program
def normalize(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-5,
    scale_offset: float = 0.0,
    activation: Activation | None = None,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> Array:
    """Normalize by statistics that are given, as batch norm does at inference.

        y = (x - mean) / sqrt(var + epsilon) * (scale + scale_offset) + bias,   then the activation, if there is one

    Args:
      x: array of any shape.
      mean: of the feature shape, or of a shape that broadcasts against x.
      var: the same; real.
      scale: the same, or None for 1.
      bias: the same, or None for 0.
      epsilon: added to the variance, in units of x squared; >= 0.
      scale_offset: added to scale in float32; 1.0 makes a zero-centred gamma.
      activation: of the output, before it is rounded: a name such as "relu", or an elementwise function; see
        `layer_norm`.
      axis: the feature axis or axes, where parameters of the feature shape belong.
      implementation: a backend of `jaxnorm.backends()`. All but "lax" are the same here.
      dtype: of the output; None is x's. The arithmetic is in float32 or wider.

    Raises:
      ValueError: a parameter that fits x nowhere, a bad epsilon, or a bad activation.

    >>> import jaxnorm as jn, numpy as np
    >>> jn.normalize(np.array([[1., 2.]]), np.array([1., 0.]), np.array([1., 4.]), epsilon=0.).tolist()
    [[0.0, 1.0]]
    """
    return normalize_given(
        x, mean, var, scale, bias, None, axis=axis, epsilon=epsilon, scale_offset=scale_offset, activation=activation,
        dtype=dtype, implementation=implementation,
    )  # fmt: skip


def normalize_given(
    x, mean, var, scale, bias, keep: Array | None, *, axis, epsilon, scale_offset, activation, dtype, implementation
) -> Array:
    """`normalize`. Padding, where `keep` is False, reaches no gradient. `keep` has x's rank."""
    x = as_float_array("normalize", x)
    axes = canonicalize_axes("normalize", x.ndim, axis)
    names = ("mean", "var", "scale", "bias")
    mean, var, scale, bias = (
        align_param("normalize", w, p, x.shape, axes) for w, p in zip(names, (mean, var, scale, bias), strict=True)
    )
    mean, var, scale, bias = (None if p is None else shard_like(x, p) for p in (mean, var, scale, bias))
    out = canonicalize_dtype("normalize", dtype, x, mean, scale, bias)
    check_activation("normalize", activation, x.shape, x.dtype)
    scale_offset = canonicalize_number("normalize", "scale_offset", scale_offset, "1.0")
    check_implementation("normalize", implementation)
    static = (canonicalize_epsilon("normalize", epsilon), scale_offset, activation, out)
    return _normalize_given(implementation == "lax", static, x, mean, var, scale, bias, keep)


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _normalize_given(plain: bool, static, *arrays):
    """For the backward pass x in its own dtype is all that is kept of x's size."""
    return recompute(functools.partial(_given, *static), plain)(*arrays)


def _given(epsilon, scale_offset, activation, dtype, x, mean, var, scale, bias, keep):
    acc = widest(accumulator(x), mean.dtype, var.dtype)
    x, mean, var = x.astype(acc), mean.astype(acc), var.astype(jnp.finfo(acc).dtype)
    r = rsqrt(nan_if_infinite(var), jnp.ones((), var.dtype), 1.0, epsilon)
    xhat = deviation(x, keep, mean) * r.astype(acc)
    if activation is None:
        return affine(xhat, scale, bias, scale_offset, dtype)
    wide = widest(acc, *(p.dtype for p in (scale, bias) if p is not None))
    return _activation.activate_output(activation, affine(xhat, scale, bias, scale_offset, wide), keep).astype(dtype)


@explained("function")
@as_program
def as_affine(
    mean: ArrayLike,
    var: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    epsilon: float = 1e-5,
    scale_offset: float = 0.0,
) -> Affine:
    """The affine map that `normalize` is: y == x * affine.scale + affine.bias, to fold into a neighbouring layer.

        affine.scale = (scale + scale_offset) / sqrt(var + epsilon);   affine.bias = bias - mean * affine.scale

    All arguments are of the feature shape, or None for an absent scale or bias; the result is float32 or wider.

    >>> import jaxnorm as jn, numpy as np
    >>> folded = jn.as_affine(np.array([3.]), np.array([4.]), bias=np.array([1.]), epsilon=0.)
    >>> folded.scale.tolist(), folded.bias.tolist()
    ([0.5], [-0.5])
    """
    mean, var = (as_float_array("as_affine", a) for a in (mean, var))
    scale, bias = (None if p is None else jnp.asarray(p) for p in (scale, bias))
    wide = widest(jnp.float32, *(a.dtype for a in (mean, var, scale, bias) if a is not None))
    mean, var = mean.astype(wide), var.astype(jnp.finfo(wide).dtype)
    r = rsqrt(nan_if_infinite(var), jnp.ones_like(var), 1.0, canonicalize_epsilon("as_affine", epsilon))
    s = effective_scale(scale, canonicalize_number("as_affine", "scale_offset", scale_offset, "1.0"), wide) * r.astype(
        wide
    )
    return Affine(s, -mean * s if bias is None else bias.astype(wide) - mean * s)
