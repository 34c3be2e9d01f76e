"""Statistics of all that came so far: of a `Prefix` of x, and of a carry, the moments of what came before x.

What is here is called by the function that `by_statistics` takes, with the carry among its parameters. So every
derivative, that of the carry as well, follows from there, and a carry costs no pass over x.

Legend: a carry is `Moments`, which broadcast against x; None is nothing. Its count is a constant.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from .._core.arithmetic import nonzero_divisor
from .._core.types import Moments
from .elementwise import OfElements
from .moments import merge, moments

Array = jax.Array


def count_so_far(of: OfElements, carry: Moments | None) -> Array:
    return of.count if carry is None else of.count + lax.stop_gradient(carry.count)


def mean_so_far(of: OfElements, carry: Moments | None) -> Array:
    return of.mean if carry is None else of.mean - _gap(of, carry) * _share_of_carry(of, carry).astype(of.mean.dtype)


def deviation_so_far(x: Array, of: OfElements, carry: Moments | None) -> Array:
    """x - mean, of the prefix and the carry together."""
    d = of.deviation(x)
    return d if carry is None else d + _gap(of, carry) * _share_of_carry(of, carry).astype(d.dtype)


def rsqrt_so_far(of: OfElements, epsilon: float | Array, carry: Moments | None) -> Array:
    """1 / sqrt(var + epsilon), of the prefix and the carry together; 0 where nothing was counted.

        var = (m2 + m2_carry + |mean - mean_carry|**2 n n_carry / (n + n_carry)) / (n + n_carry)

    Where the mean is taken as zero, m2_carry is all that counts.
    """
    if carry is None:
        return of.rsqrt(epsilon)
    before, count = lax.stop_gradient(carry.count), count_so_far(of, carry)
    total = nonzero_divisor(count)
    beside = jnp.zeros_like(of.count)
    if of.reduction.centered:
        beside = _gap(of, carry) * (jnp.sqrt(of.count * before) / total).astype(of.mean.dtype)
    r = of.rsqrt(epsilon + carry.m2 / total, of.count / total, beside)
    return jnp.where(count == 0, 0.0, r)


def moments_after(
    x: Array, axes: tuple[int, ...], mask: Array | None, carry: Moments | None, implementation: str | None
) -> Moments:
    """The next carry: the moments of x over `axes`, and of what came before. It has no gradient for its count."""
    seen = moments(x, axes, mask=mask, implementation=implementation)
    return seen if carry is None else merge(carry._replace(count=lax.stop_gradient(carry.count)), seen)


def _gap(of: OfElements, carry: Moments) -> Array:
    return of.mean - carry.mean.astype(of.mean.dtype)


def _share_of_carry(of: OfElements, carry: Moments) -> Array:
    return lax.stop_gradient(carry.count) / nonzero_divisor(count_so_far(of, carry))
