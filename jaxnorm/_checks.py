"""What may come in: shapes, axes, dtypes, hyperparameters, and a message for each that may not.

Every message names the norm, says what it got and what it needs, and shows the line to write.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._kernels.xla import present

Array = jax.Array


def as_array(x) -> Array:
    """`jnp.asarray`, without the copy that it makes of a traced array: `jax.debug_nans` stops there at NaN padding."""
    return x if isinstance(x, jax.Array) else jnp.asarray(x)


def as_float_array(norm: str, x, *, rank: int = 0, layout: str = "", what: str = "x") -> Array:
    """x as a floating or complex array; integers and booleans are promoted to JAX's default float, never truncated."""
    try:
        x = as_array(x)
    except TypeError as error:
        got = type(x).__name__
        raise TypeError(f"{norm}: {what} must be an array, got {got}. Write jnp.asarray({what}).") from error
    if not jnp.issubdtype(x.dtype, jnp.number) and x.dtype != jnp.bool_:
        raise TypeError(f"{norm}: {what} must hold numbers, got dtype {x.dtype}. Write {what}.astype(jnp.float32).")
    if x.ndim < rank:
        raise ValueError(
            f"{norm}: x must have rank {rank} or more, {layout}; got shape {x.shape}. "
            f"Write x.reshape({(1,) * (rank - x.ndim) + x.shape})."
        )
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.result_type(float))


def checked_dtype(norm: str, dtype, x: Array, *others: Array | None):
    """The dtype of the output: what was asked for, else x's own."""
    out = x.dtype if dtype is None else jnp.dtype(dtype)
    if not jnp.issubdtype(out, jnp.inexact):
        raise TypeError(f"{norm}: dtype must be a floating dtype, got {out}. Write dtype=jnp.float32.")
    if not jnp.issubdtype(out, jnp.complexfloating) and any(jnp.iscomplexobj(a) for a in (x, *others)):
        raise TypeError(f"{norm}: {out} cannot hold a complex result. Write dtype=jnp.complex64.")
    return out


def checked_axes(norm: str, ndim: int, axes: int | Sequence[int], *, what: str = "axis") -> tuple[int, ...]:
    """Axes as sorted non-negative ints; an int is one axis."""
    try:
        several = axes if isinstance(axes, (tuple, list, set, frozenset)) else (axes,)
        given = tuple(operator.index(a) for a in several)  # pyright: ignore[reportArgumentType]
    except TypeError:
        raise TypeError(
            f"{norm}: {what} must be an int or a tuple of ints, got {axes!r}. Write {what}=-1."
        ) from None
    for a in given:
        if not -ndim <= a < ndim:
            raise ValueError(
                f"{norm}: {what}={axes} is out of range for x of rank {ndim}, whose axes are {-ndim}..{ndim - 1}. "
                f"Write {what}=-1 for the last one."
            )
    positive = sorted(a % ndim for a in given)
    if len(set(positive)) != len(positive):
        raise ValueError(f"{norm}: {what}={axes} names an axis twice. Write {what}={tuple(sorted(set(positive)))}.")
    return tuple(positive)


def aligned_mask(norm: str, mask, shape: tuple[int, ...], *, what: str = "mask") -> Array | None:
    """One rule for every norm: a mask (or weights) broadcasts to x, or covers x's leading axes. Rank becomes x's."""
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    rest = len(shape) - mask.ndim
    leading = trailing = None
    if rest >= 0:
        fits = lambda part: all(m in (1, s) for m, s in zip(mask.shape, part, strict=True))
        trailing = (1,) * rest + mask.shape if fits(shape[rest:]) else None
        leading = mask.shape + (1,) * rest if fits(shape[: mask.ndim]) else None
    if trailing is None and leading is None:
        raise ValueError(
            f"{norm}: {what} of shape {mask.shape} neither broadcasts to x of shape {shape} nor covers its leading "
            f"axes. Write for example {what}=jnp.ones({shape[:-1]})."
        )
    if trailing is not None and leading is not None and trailing != leading:
        raise ValueError(
            f"{norm}: {what} of shape {mask.shape} fits x of shape {shape} both as its leading and as its trailing "
            f"axes. Write {what}.reshape({leading}) or {what}.reshape({trailing})."
        )
    return mask.reshape(leading if trailing is None else trailing)


def quiet_padding(x: Array, mask: Array | None, weights: Array | None = None) -> Array:
    """x itself; under `jax.debug_nans` and `jax.debug_infs`, x with finite values where it is masked out.

    The switches check the result of every operation that runs outside of jit, and a NaN in padding is no mistake of the
    user's. Values and derivatives are those of `xla.cleaned`.
    """
    config: Any = jax.config
    keep = present(mask, weights) if config.jax_debug_nans or config.jax_debug_infs else None
    return x if keep is None else _finite_padding(x, keep)


@jax.custom_jvp
def _finite_padding(x: Array, keep: Array) -> Array:
    """By comparisons, whose results are booleans, and no operation of `jnp`, which may copy x first."""
    keep, zero = jnp.broadcast_to(keep, x.shape), lax.full_like(x, 0)
    if jnp.iscomplexobj(x):
        return lax.select(keep | lax.eq(x, x), x, zero)
    most = lax.full_like(x, min(1e30, float(jnp.finfo(x.dtype).max)))
    finite = lax.le(-most, x) & lax.le(x, most)
    return lax.select(keep | finite, x, lax.select(lax.gt(x, most), most, lax.select(lax.lt(x, -most), -most, zero)))


@_finite_padding.defjvp
def _(primals, tangents):
    return _finite_padding(*primals), tangents[0]


def aligned_param(norm: str, what: str, param, x_shape: tuple[int, ...], feature_axes: tuple[int, ...]) -> Array | None:
    """A scale or bias with x's rank: of the feature shape, put at the feature axes, or of one that broadcasts to x."""
    if param is None:
        return None
    param = jnp.asarray(param)
    features = tuple(x_shape[a] for a in feature_axes)
    if param.shape == features:
        return param.reshape(tuple(s if a in feature_axes else 1 for a, s in enumerate(x_shape)))
    rest = len(x_shape) - param.ndim
    if rest < 0 or any(p not in (1, s) for p, s in zip(param.shape, x_shape[rest:], strict=True)):
        raise ValueError(
            f"{norm}: {what} of shape {param.shape} fits neither the feature shape {features} of x {x_shape} nor "
            f"broadcasts to x. Write {what}=jnp.ones({features}), or give it x's rank, such as "
            f"{(x_shape[0], *(1,) * (len(x_shape) - 2), x_shape[-1])}."
        )
    return param.reshape((1,) * rest + param.shape)


def checked_epsilon(norm: str, epsilon: float) -> float:
    if not isinstance(epsilon, (int, float, np.number)) or not 0 <= epsilon < math.inf:
        raise ValueError(
            f"{norm}: epsilon must be a number >= 0, got {epsilon!r}. It is static. Write epsilon=1e-6."
        )
    return float(epsilon)


def checked_momentum(norm: str, momentum: float | None) -> None:
    if momentum is not None and (not isinstance(momentum, (int, float, np.number)) or not 0 <= momentum <= 1):
        raise ValueError(
            f"{norm}: momentum is the weight of the old statistics, from 0 to 1, or None for the cumulative average; "
            f"got {momentum!r}. Write momentum=0.9 where torch has momentum=0.1."
        )


def warn_if_single(norm: str, x: Array | jax.ShapeDtypeStruct, axes: tuple[int, ...], per: str) -> None:
    """Say so when every statistic would come from one element: its variance is 0, and the output is the bias."""
    if x.size and math.prod(x.shape[a] for a in axes) == 1:
        warnings.warn(
            f"{norm}: x of shape {x.shape} has one element per {per}, so each is its own mean and the output is the "
            "bias alone. Give it more data, or normalize over features with layer_norm.",
            UserWarning,
            stacklevel=3,
        )
