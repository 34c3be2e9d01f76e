"""The shape that row kernels know, rows one after the other in memory, and the arithmetic that they share."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .xla import known

Array = jax.Array


class Rows(NamedTuple):
    """What a row kernel has to know of a norm besides its arrays."""

    columns: int  # elements of a row
    epsilon: float
    unit: float  # squares are those of (unit * x), which keeps 1e20**2 in range
    centered: bool  # False: RMS norm
    round_first: bool = False  # xhat to the dtype of y before scale


def rows_of(shape: tuple[int, ...], axes: tuple[int, ...], varying: frozenset[int]) -> tuple[int, int] | None:
    """(rows, columns) where the reduced axes are the last ones and parameters lie along them alone; None elsewhere.

    >>> rows_of((8, 128, 4, 64), (2, 3), frozenset({3}))
    (1024, 256)
    """
    if not known(*shape):
        return None
    long = [a for a, n in enumerate(shape) if n != 1]
    reduced = [a for a in long if a in axes]
    if reduced != long[len(long) - len(reduced) :] or not varying <= set(reduced):
        return None
    columns = math.prod(shape[a] for a in reduced)
    return math.prod(shape) // max(columns, 1), columns


def rsqrt(how: Rows, m2: Array) -> Array:
    """1 / sqrt(var + epsilon), and 0 where that is 1 / 0: a constant row without epsilon."""
    v = m2 * (1.0 / how.columns) + how.epsilon * how.unit**2
    return jnp.where(v == 0.0, 0.0, how.unit * lax.rsqrt(v))


def xhat_of(x, shift, offset, r):
    return ((x - shift) - offset) * r


def settled(shift, offset, m2, correction) -> tuple[Array, Array, Array]:
    """Statistics whose m2 is below the rounding noise of its own two terms are those of a constant row."""
    constant = m2 <= 2.0**-18 * correction
    return (
        jnp.where(constant, shift + offset, shift),
        jnp.where(constant, 0.0, offset),
        jnp.where(constant, 0.0, m2),
    )
