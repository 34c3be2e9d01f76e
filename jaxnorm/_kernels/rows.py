"""The shape that row kernels know, rows one after the other in memory, and the arithmetic that they share."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .xla import FULL, known, nan_if_infinite

Array = jax.Array


class Rows(NamedTuple):
    """What a row kernel has to know of a norm besides its arrays."""

    columns: int  # elements of a row
    epsilon: float
    unit: float  # squares are those of unit * x, as in `Reduction`
    centered: bool  # False: RMS norm
    round_first: bool = False  # xhat to the dtype of y before scale
    large: float | None = None  # as in `Reduction`: then m2 is the root of the sum

    @property
    def units(self) -> tuple[float, ...]:
        return (self.unit,) if self.large is None else (self.unit, self.large)


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
    """1 / sqrt(var + epsilon), and 0 where that is 1 / 0: a constant row without epsilon. NaN where m2 is infinite."""
    if how.large is None:
        v = nan_if_infinite(m2) * (1.0 / how.columns) + how.epsilon * how.unit**2
        return jnp.where(v == 0.0, 0.0, how.unit * lax.rsqrt(v))
    spread, least = m2 * (1.0 / math.sqrt(how.columns)), math.sqrt(how.epsilon)
    larger = nan_if_infinite(jnp.maximum(spread, least))
    divisor = jnp.where(larger == 0.0, 1.0, larger)
    r = lax.rsqrt(1.0 + jnp.square(jnp.minimum(spread, least) / divisor)) / divisor
    return jnp.where(larger == 0.0, 0.0, r)


def xhat_of(x, shift, offset, r):
    return ((x - shift) - offset) * r


def settled(how: Rows, shift, offset, squares) -> tuple[Array, Array, Array]:
    """The statistics, from the sums of squares about the shift in each of `how.units`.

    Those whose m2 is below the rounding noise of its own two terms are those of a constant row.
    """
    # The maxima are for XLA, which in interpret mode would square a single number before it scales it.
    size = lambda unit: jnp.maximum(jnp.maximum(offset * unit, offset * -unit), 0.0)
    correction = lambda unit: how.columns * jnp.square(size(unit)) if how.centered else 0.0
    m2, less, inverse = squares[0], correction(how.unit), 1.0
    if how.large is not None:
        fits = m2 <= FULL
        m2, less = jnp.where(fits, m2, squares[1]), jnp.where(fits, less, correction(how.large))
        inverse = jnp.where(fits, 1.0 / how.unit, 1.0 / how.large)
    if how.centered:
        m2 = m2 - less
        constant = m2 <= 2.0**-18 * less
        shift, offset = jnp.where(constant, shift + offset, shift), jnp.where(constant, 0.0, offset)
        m2 = jnp.where(constant, 0.0, m2)
    if how.large is not None:
        m2 = jnp.where(m2 == 0.0, 0.0, m2 * lax.rsqrt(m2)) * inverse  # its root: Mosaic for GPUs has no lax.sqrt
    return shift, offset, m2
