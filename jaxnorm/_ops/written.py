"""Norms that JAX differentiates as they are written, because they are no elementwise function of a few statistics.

For the backward pass x is kept, in its own dtype, and the parameters. What is masked out counts as 0. `unit_of` keeps
squares and powers in range: a formula is written for x over its largest value, which is a constant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._core.arithmetic import nonzero_divisor
from .._core.arrays import align_boolean_mask, align_param, canonicalize_dtype
from .._core.checks import canonicalize_number
from .._core.masks import finite_padding, finite_where_masked
from .._core.platforms import recompute
from .._core.vma import shard_like
from .activation import activate_output, check_activation, widened_to
from .formula import affine
from .plan import refuse_kernels

Array = jax.Array


def normalize_written(
    norm: str, f: Callable[..., Array], x: Array, own: tuple, scale, bias, feature_axes: tuple[int, ...], *,
    scale_offset, activation, mask, dtype, implementation,
) -> Array:  # fmt: skip
    """y = activation(f(x, keep, affine, *own)), rounded once.

    `f` gets x in the accumulator's dtype, with 0 for what is masked out, and `keep`, the mask of x's rank or None. It
    calls `affine`: z -> z (scale + scale_offset) + bias. `own` are further arrays, or None.
    """
    refuse_kernels(norm, implementation)
    if jnp.iscomplexobj(x):
        raise TypeError(f"{norm}: x must be real, got {x.dtype}. Write {norm}(x.real, ...), and the same of x.imag.")
    scale, bias = (align_param(norm, name, p, x.shape, feature_axes) for name, p in (("scale", scale), ("bias", bias)))
    scale, bias = (None if p is None else shard_like(x, p) for p in (scale, bias))
    out = canonicalize_dtype(norm, dtype, x, scale, bias, *own)
    check_activation(norm, activation, x.shape, x.dtype)
    scale_offset = canonicalize_number(norm, "scale_offset", scale_offset, "1.0")
    x, mask = align_boolean_mask(norm, x, mask)

    def whole(x: Array, mask: Array | None, scale, bias, own: tuple) -> Array:
        wide = finite_where_masked(x, mask)
        wide = wide if mask is None else jnp.where(mask, wide, 0.0)
        z = f(wide, mask, lambda z: affine(z, scale, bias, scale_offset, widened_to(z, scale, bias)), *own)
        return (z if activation is None else activate_output(activation, z, mask)).astype(out)

    return recompute(whole, implementation == "lax")(finite_padding(x, mask), mask, scale, bias, own)


def unit_of(x: Array, axes: tuple[int, ...], least: float = 0.0) -> Array:
    """The largest of |x| along `axes`, and not below `least`: a constant, and 1 where it would be 0."""
    largest: Any = jnp.max(jnp.abs(lax.stop_gradient(x)), axes, keepdims=True, initial=0.0)
    return nonzero_divisor(jnp.maximum(largest, least))


def mean_of_kept(a: Array, keep: Array | None, axes: tuple[int, ...]) -> Array:
    """The mean along `axes` of an a that is 0 where it is masked out; 0 where all of it is."""
    total = a.sum(axes, keepdims=True)
    if keep is None:
        return total / max(a.size // max(total.size, 1), 1)
    return total / nonzero_divisor(jnp.broadcast_to(keep, a.shape).sum(axes, keepdims=True, dtype=a.dtype))
