"""The statistics of all elements up to each place of an axis: those of the places, merged in a scan."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax

from .arithmetic import nonzero_divisor, pick_in_range, scaled_abs_squared
from .formulas import mean_of, rounded, two_pass
from .masks import count_valid, valid_mask
from .over import Axes, Prefix
from .types import Reduction, Statistics

Array = jax.Array
_SAME = ("prescale", "large_prescale", "plain")  # of a place and of the prefix that it is part of


def statistics_so_far(x, mask, weights, n: Array, reduction: Reduction, over: Prefix) -> Statistics:
    """The mean is held about a number that all places share: `mean_hi` is that, and its derivative is 0.

    Source: Chan, Golub, LeVeque (1979), "Updating formulae and a pairwise algorithm for computing sample variances".
    """
    places = Axes(over.axes)
    of_place = replace(Reduction(places), **{name: getattr(reduction, name) for name in _SAME})
    count = count_valid(x, mask, weights, places)
    hi, lo, m2 = two_pass(x, valid_mask(mask, weights), weights, count, of_place, round_mean=True)
    count = jnp.broadcast_to(count, m2.shape)
    whole = lambda a: a.sum(over.axis, keepdims=True)
    shared = rounded(lax.stop_gradient(mean_of(whole(count.astype(hi.dtype) * hi), whole(count))))  # see `two_pass`
    large = reduction.large_prescale is not None
    squares = [scaled_abs_squared(m2, prescale) for prescale in reduction.prescales] if large else [m2]

    def merged(a, b):
        (n_a, mean_a, *m2_a), (n_b, mean_b, *m2_b) = a, b
        total = n_a + n_b
        part, gap = n_b / nonzero_divisor(total), mean_b - mean_a
        between = (n_a * part * scaled_abs_squared(gap, prescale) for prescale in reduction.prescales)
        return total, mean_a + part.astype(gap.dtype) * gap, *map(sum, zip(m2_a, m2_b, between, strict=True))

    _, offset, *m2 = lax.associative_scan(merged, (count, (hi - shared) + lo, *squares), axis=over.axis)
    shift = jnp.broadcast_to(shared, offset.shape)
    if not large:
        return Statistics(n, shift, offset, m2[0])
    square, prescale = pick_in_range(reduction, *m2)
    return Statistics(n, shift, offset, jnp.sqrt(square) / prescale)
