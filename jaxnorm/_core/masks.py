"""What a mask and weights leave of x: which elements are valid, and what stands in for the others."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .dtypes import accumulator, are_static
from .over import Axes, Groups, Over

Array = jax.Array


def valid_mask(mask: Array | None, weights: Array | None) -> Array | None:
    """Where elements count at all. An element of weight zero is as absent as a masked one."""
    if weights is None:
        return mask
    return weights != 0 if mask is None else mask & (weights != 0)


def zeroed(mask: Array, x: Array) -> Array:
    """x with 0 for what is masked out: of a row that is out as a whole, this gives the bias as well."""
    return jnp.where(mask, x, jnp.zeros((), x.dtype))


def finite_where_masked(x: Array, keep: Array | None) -> Array:
    """x in the accumulator's dtype, with 0 for padding: an absent element that is NaN, infinite or beyond 1e30."""
    x = x.astype(accumulator(x))
    return x if keep is None else jnp.where(usable(x, keep), x, 0.0)


def deviation(x: Array, keep: Array | None, *weighted_mean: Array) -> Array:
    """x minus the parts of its mean in the accumulator's dtype, with such padding as a constant that equals the mean.

    Padding then gives the bias: nothing overflows in a loss that multiplies by the mask after it squares the output.
    """
    x = x.astype(accumulator(x))
    minus = lambda a, *split_axes: functools.reduce(lambda a, b: a - b, split_axes, a)
    if keep is None:
        return minus(x, *weighted_mean)
    values = [lax.stop_gradient(part) for part in weighted_mean]
    d = jnp.where(usable(x, keep), minus(x, *values), 0.0)
    return minus(
        d, *(part - value for part, value in zip(weighted_mean, values, strict=True))
    )  # zeros, with the derivatives


def zero_where_padding(x: Array, keep: Array | None, dx: Array) -> Array:
    """dx, with 0 for such padding: what `centered` and `finite_where_masked` make of it does not depend on it."""
    return dx if keep is None else jnp.where(usable(x, keep), dx, 0.0)


def usable(x: Array, keep: Array) -> Array:
    return keep | (jnp.abs(x.astype(accumulator(x))) <= 1e30)


def count_valid(x: Array, mask: Array | None, weights: Array | None, over: Over, ids: Array | None = None) -> Array:
    """The number of present elements, or the sum of their weights, as float32 of broadcastable shape.

    NumPy's where it is a constant: then nothing is computed for groups that could be empty.
    """
    dtype = jnp.finfo(accumulator(x)).dtype
    if mask is None and weights is None and isinstance(over, (Axes, Groups)) and are_static(*x.shape):
        return np.full((1,) * x.ndim, over.size(x.shape), dtype)  # pyright: ignore
    ones = jnp.ones((1,) * x.ndim, dtype) if weights is None else weights.astype(dtype)
    kept = ones if mask is None else jnp.where(mask, ones, 0.0)
    total, repeats = over.sum(kept, ids), [x.shape[a] for a in over.axes if kept.shape[a] == 1]
    # Symbolic sizes are multiplied as floats: as the integers that they become in a program they could overflow.
    for n in [math.prod(repeats)] if are_static(*repeats) else repeats:
        total = total * n
    return total


def max_or_zero(x: Array, keep: Array, axes: tuple[int, ...]) -> Array:
    """The largest present value over `axes`, kept as size 1; 0 where there is none. Of complex values, by part."""

    def real(a):
        none = lowest(a.dtype)
        return zero_for_lowest(jnp.where(keep, a, none).max(axes, keepdims=True, initial=none))

    return lax.complex(real(x.real), real(x.imag)) if jnp.iscomplexobj(x) else real(x)


def lowest(dtype) -> Any:
    """What stands for "no value" under a maximum. It is finite, since `jax.debug_infs` stops at any infinity."""
    return jnp.finfo(dtype).min


def zero_for_lowest(top: Array) -> Array:
    """A maximum, and 0 where it is of no value at all."""
    return jnp.where(top <= lowest(top.dtype), 0.0, top)


def finite_padding(x: Array, mask: Array | None, weights: Array | None = None) -> Array:
    """Return x. Under `jax.debug_nans` and `jax.debug_infs`, masked-out elements of the result are finite.

    The switches check the result of every operation outside of jit, and a NaN in padding is no mistake of the user's.
    The number is one that `xla.centered` takes for padding, if x's dtype can hold it.
    """
    config: Any = jax.config
    keep = valid_mask(mask, weights) if config.jax_debug_nans or config.jax_debug_infs else None
    if keep is None:
        return x
    shared = tuple(a for a, n in enumerate(x.shape) if n == 1)
    return _finite_where(x, keep.any(shared, keepdims=True))


@jax.custom_jvp
def _finite_where(x: Array, keep: Array) -> Array:
    """By comparisons, whose results are booleans, and no operation of `jnp`, which may copy x first."""
    keep = jnp.broadcast_to(keep, x.shape)
    if jnp.iscomplexobj(x):
        return lax.select(keep | lax.eq(x, x), x, lax.full_like(x, 0))
    top = float(jnp.finfo(x.dtype).max)
    most = lax.full_like(x, min(1e30, top))
    usable = lax.le(lax.neg(most), x) & lax.le(x, most)
    return lax.select(keep | usable, x, lax.full_like(x, min(2e30, top)))


@_finite_where.defjvp
def _(primals, tangents):
    return _finite_where(*primals), tangents[0]
