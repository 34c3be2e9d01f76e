"""Sums of squares that stay in range: the powers of two that x is scaled by before it is squared."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .types import Reduction

Array = jax.Array


def prescales(epsilon: float, n: int, dtype) -> tuple[float, float | None]:
    """The prescale for a sum of n squares in float32, or two, for small and for large values, if no single one will do.

    |x| may be up to 1e30, so that |x - shift| is up to 2**100.66, and epsilon anything. The sum stays finite if
    n (prescale 2**100.66)**2 < 2**128. A square below 2**-126 is flushed to zero. That changes 1 / sqrt(var + epsilon)
    by less than 2e-6 of itself if epsilon prescale**2 >= 2**-108. One prescale meets both for the default epsilons up
    to some 10**4 or 10**5 elements. Otherwise squares are summed with two. Where the sum for small values overflows,
    the one for large values is used. What was flushed there is then below 2**-22 of it.
    """
    if jnp.finfo(dtype).bits == 64:
        return 2.0**-40, None
    half = math.log2(max(n, 16)) / 2 if isinstance(n, int) else 14.0  # a symbolic size counts as a large one
    down = math.ceil(36.66 + half)
    if epsilon * 4.0**-down >= 2.0**-108:
        return 2.0**-down, None
    beside_epsilon = math.ceil(-54 - math.log2(epsilon) / 2) if epsilon else 62
    return 2.0 ** min(62, math.floor(115.5 - half - down), beside_epsilon), 2.0**-down


FULL = 2.0**127  # a sum of squares up to here has not overflowed


def abs_squared(z: Array) -> Array:
    """|z|**2, real."""
    return lax.square(z.real) + lax.square(z.imag) if jnp.iscomplexobj(z) else lax.square(z)


def scaled_abs_squared(a: Array, prescale: float | Array) -> Array:
    """|prescale * a|**2 of a few numbers. Without the maximum XLA would square a single one before it scales it."""
    if jnp.iscomplexobj(a) or (isinstance(prescale, float) and prescale == 1.0):
        return abs_squared(scaled_by(a, prescale))
    return lax.square(jnp.maximum(jnp.abs(scaled_by(a, prescale)), 0.0))


def pick_in_range(reduction: Reduction, small: Array, large: Array) -> tuple[Array, Array]:
    """From the sums of squares by the small and by the large prescale, the one in range, and its prescale."""
    assert reduction.large_prescale is not None
    fits = small <= FULL  # False also for NaN
    return where(fits, small, large), jnp.where(fits, reduction.prescale, reduction.large_prescale)


@jax.custom_jvp
def ratio(a: Array, b: Array) -> Array:
    """a / b, whose derivatives stay in range where b**2 does not. JAX's own divide by b**2."""
    return a / b


@ratio.defjvp
def _(primals, tangents):
    (a, b), (da, db) = primals, tangents
    y = ratio(a, b)
    return y, ratio(da - y * db, b)


def reciprocal(b: Array) -> Array:
    """1 / b, with the derivatives of `ratio`."""
    return ratio(jnp.ones_like(b), b)


def nonzero_divisor(n: Array) -> Array:
    """n, but 1 where it is 0: a divisor for sums that are 0 there. Of a constant, which NumPy holds, a constant."""
    return n + (n == 0) if isinstance(n, np.ndarray) else where(n == 0, 1.0, n)


def where(condition: Array, a: Array | float, b: Array | float) -> Array:
    """`jnp.where`, of arrays of one shape and of numbers without a function of its own in the program."""
    shaped: list[Any] = [v for v in (a, b) if not isinstance(v, float)]
    if not shaped or any([v.shape != condition.shape or v.dtype != shaped[0].dtype for v in shaped]):
        return jnp.where(condition, a, b)
    return lax.select(condition, *(lax.full_like(shaped[0], v) if isinstance(v, float) else v for v in (a, b)))


def nan_if_infinite(a: Array) -> Array:
    """a, with NaN for infinity: of a sum that overflowed, or a variance, so that y is not a plausible 0."""
    return a + 0.0 * a


def scaled_by(a: Array, prescale: float | Array) -> Array:
    return a * (prescale.astype(a.dtype) if isinstance(prescale, jax.Array) else prescale)


@jax.custom_jvp
def tanh(u: Array) -> Array:
    """`jnp.tanh`, whose derivative keeps its digits where tanh is near 1: there 1 - tanh**2 cancels."""
    return jnp.tanh(u)


@tanh.defjvp
def _(primals, tangents):
    return tanh(*primals), sech_squared(*primals) * tangents[0]


@jax.custom_jvp
def sech_squared(u: Array) -> Array:
    """1 / cosh(u)**2 = 4 t / (1 + t)**2 with t = exp(-2 |u|), the derivative of tanh."""
    if jnp.iscomplexobj(u):
        return 1.0 - jnp.square(jnp.tanh(u))
    t = jnp.exp(-2.0 * jnp.abs(u))
    return 4.0 * t / jnp.square(1.0 + t)


@sech_squared.defjvp
def _(primals, tangents):
    s = sech_squared(*primals)
    return s, -2.0 * s * tanh(*primals) * tangents[0]
