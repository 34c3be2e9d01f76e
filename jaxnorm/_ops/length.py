"""Norms that divide by the length of a vector, or by its root mean square, with epsilon at the place that each has.

They are RMS norms, by kernels, where they can be, else elementwise functions. Legend: n elements of a vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .._core.arithmetic import nonzero_divisor
from .._core.arrays import refuse_a_shape, sizes_along
from .._core.checks import canonicalize_epsilon, canonicalize_number
from .._core.dtypes import accumulator, are_static
from .._core.messages import shown
from .elementwise import OfElements, normalize_by_statistics
from .formula import affine_times
from .rows import normalize_rows

Array = jax.Array


def check_mode(norm: str, mode: Any, modes: tuple[str, str] = ("inside", "max")) -> None:
    if mode not in modes:
        either = " or ".join(f'"{m}"' for m in modes)
        raise ValueError(f'{norm}: epsilon_mode must be {either}, got {shown(mode)}. Write "inside".')


def normalize_length(
    norm: str, x: Array, scale, axes: tuple[int, ...], *, epsilon, epsilon_mode, scale_offset, mask, axis_name,
    **options,
) -> Array:  # fmt: skip
    """x over its length along `axes`, which also are the feature axes, times scale + scale_offset."""
    check_mode(norm, epsilon_mode)
    refuse_a_shape(norm, "scale", scale)
    given: dict[str, Any] = dict(options, mask=mask, axis_name=axis_name, centered=False)
    sizes = sizes_along(x.shape, axes)
    if epsilon_mode == "max" or mask is not None or axis_name is not None or not are_static(*sizes) or 0 in sizes:
        of: Callable[..., Array] = _at_least if epsilon_mode == "max" else _inside
        return normalize_by_statistics(
            norm, of, x, {}, scale, None, axes, axes, epsilon=epsilon, scale_offset=scale_offset, **given
        )
    # Here n is known: it is an RMS norm, for which there are kernels.
    n = math.prod(sizes)
    scale_offset = canonicalize_number(norm, "scale_offset", scale_offset, "1.0")
    scale, _ = affine_times(n**-0.5, scale, None, scale_offset, accumulator(x))
    epsilon = canonicalize_epsilon(norm, epsilon) / n
    return normalize_rows(norm, x, scale, None, axes, axes, epsilon=epsilon, scale_offset=0.0, **given)


def _inside(x: Array, of: OfElements, affine, epsilon: float) -> Array:
    n = nonzero_divisor(of.count)
    return affine(of.standardize(x, epsilon / n) * (1.0 / jnp.sqrt(n)).astype(x.dtype))


def _at_least(x: Array, of: OfElements, affine, epsilon: float) -> Array:
    r = of.rsqrt(0.0) / jnp.sqrt(nonzero_divisor(of.count))
    if epsilon:  # r is 0 where the length is
        empty = of.count == 0
        r = jnp.where((r == 0.0) & ~empty, 1.0 / epsilon, jnp.minimum(r, 1.0 / epsilon))
    return affine(x * r.astype(x.dtype))


def normalize_rms(
    norm: str, x: Array, scale, axes: tuple[int, ...], feature_axes: tuple[int, ...], *, epsilon, epsilon_mode,
    **options,
) -> Array:  # fmt: skip
    """x over its root mean square along `axes`, epsilon "inside" of the root or "outside" of it."""
    check_mode(norm, epsilon_mode, ("inside", "outside"))
    given: dict[str, Any] = dict(options, epsilon=epsilon, centered=False)
    if epsilon_mode == "inside":
        return normalize_rows(norm, x, scale, None, axes, feature_axes, **given)
    return normalize_by_statistics(norm, _outside, x, {}, scale, None, axes, feature_axes, **given)


def _outside(x: Array, of: OfElements, affine, epsilon: float) -> Array:
    r = of.rsqrt(0.0)
    if epsilon:  # r is 0 where the root is
        empty = of.count == 0
        r = jnp.where((r == 0.0) & ~empty, 1.0 / epsilon, r / (1.0 + epsilon * r))
    return affine(x * r.astype(x.dtype))
