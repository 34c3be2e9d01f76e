"""The shape that row kernels know, rows one after the other in memory, and the arithmetic that they share."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..._core.arithmetic import FULL, nan_if_infinite
from ..._core.dtypes import are_static

Array = jax.Array


class Job(NamedTuple):
    """What a row kernel has to know of a norm besides its arrays."""

    columns: int  # elements of a row
    epsilon: float
    centered: bool  # False: RMS norm
    cast_before_scale: bool  # xhat to the dtype of y before scale
    prescale: float  # squares are those of prescale * x, as in `Reduction`
    large_prescale: float | None = None  # as in `Reduction`: then m2 is the root of the sum
    examples: int = 1  # that have a scale and a bias each, and as many rows
    in_turn: bool = False  # the rows of examples take turns, as those of heads do; False: one example after the other

    @property
    def prescales(self) -> tuple[float, ...]:
        return (self.prescale,) if self.large_prescale is None else (self.prescale, self.large_prescale)


class Rows(NamedTuple):
    """An array as rows. Those of an example, or of a head, share a scale and a bias."""

    rows: int
    columns: int
    examples: int = 1
    own: tuple[int, ...] = ()  # the axes that tell examples apart
    in_turn: bool = False  # they are the last ones before the rows: heads


def rows_of(shape: tuple[int, ...], axes: tuple[int, ...], varying: frozenset[int]) -> Rows | None:
    """x as rows where the reduced axes are the last ones, with parameters along them, or for each example or head.

    >>> rows_of((8, 128, 4, 64), (2, 3), frozenset({3}))
    Rows(rows=1024, columns=256, examples=1, own=(), in_turn=False)
    >>> rows_of((8, 128, 256), (2,), frozenset({0, 2}))
    Rows(rows=1024, columns=256, examples=8, own=(0,), in_turn=False)
    >>> rows_of((8, 128, 4, 64), (3,), frozenset({2, 3}))
    Rows(rows=4096, columns=64, examples=4, own=(2,), in_turn=True)
    """
    if not are_static(*shape):
        return None
    long = [a for a, n in enumerate(shape) if n != 1]
    reduced = [a for a in long if a in axes]
    if reduced != long[len(long) - len(reduced) :]:
        return None
    others, own = long[: len(long) - len(reduced)], sorted(varying - {*reduced})
    if own and len(own) == len(others):  # of every row: parameters of x's size
        return None
    first, last = own == others[: len(own)], own == others[len(others) - len(own) :]
    if not (first or last):
        return None
    columns, examples = math.prod(shape[a] for a in reduced), math.prod(shape[a] for a in own)
    return Rows(math.prod(shape) // max(columns, 1), columns, examples, tuple(own), not first)


def rsqrt(job: Job, m2: Array) -> Array:
    """1 / sqrt(var + epsilon), and 0 where that is 1 / 0: a constant row without epsilon. NaN where m2 is infinite."""
    if job.large_prescale is None:
        v = nan_if_infinite(m2) * (1.0 / job.columns) + job.epsilon * job.prescale**2
        return jnp.where(v == 0.0, 0.0, job.prescale * lax.rsqrt(v))
    spread, least = m2 * (1.0 / math.sqrt(job.columns)), math.sqrt(job.epsilon)
    larger = nan_if_infinite(jnp.maximum(spread, least))
    divisor = jnp.where(larger == 0.0, 1.0, larger)
    r = lax.rsqrt(1.0 + jnp.square(jnp.minimum(spread, least) / divisor)) / divisor
    return jnp.where(larger == 0.0, 0.0, r)


def xhat_of(x, mean_hi, mean_lo, r):
    return ((x - mean_hi) - mean_lo) * r


def finalize(job: Job, mean_hi, mean_lo, squares) -> tuple[Array, Array, Array]:
    """The statistics, from the sums of squares about mean_hi in each of `job.prescales`.

    Those whose m2 is below the rounding noise of its own two terms are those of a constant row.
    """
    # The maxima are for XLA, which in interpret mode would square a single number before it scales it.
    size = lambda prescale: jnp.maximum(jnp.maximum(mean_lo * prescale, mean_lo * -prescale), 0.0)
    correction = lambda prescale: job.columns * jnp.square(size(prescale)) if job.centered else 0.0
    m2, less, inverse = squares[0], correction(job.prescale), 1.0
    if job.large_prescale is not None:
        fits = m2 <= FULL
        m2, less = jnp.where(fits, m2, squares[1]), jnp.where(fits, less, correction(job.large_prescale))
        inverse = jnp.where(fits, 1.0 / job.prescale, 1.0 / job.large_prescale)
    if job.centered:
        m2 = m2 - less
        constant = m2 <= 2.0**-18 * less
        mean_hi, mean_lo = jnp.where(constant, mean_hi + mean_lo, mean_hi), jnp.where(constant, 0.0, mean_lo)
        m2 = jnp.where(constant, 0.0, m2)
    if job.large_prescale is not None:
        m2 = jnp.where(m2 == 0.0, 0.0, m2 * lax.rsqrt(m2)) * inverse  # its root: Mosaic for GPUs has no lax.sqrt
    return mean_hi, mean_lo, m2
