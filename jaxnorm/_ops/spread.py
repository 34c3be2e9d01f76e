"""Measures of spread beside the standard deviation: that of absolute deviations, the root mean square, and none.

Running statistics hold the same measure in `var`: for "l1" that is the spread itself.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from .._core.arithmetic import nonzero_divisor, reciprocal
from .._core.arrays import align_param
from .._core.collectives import psum_grouped
from .._core.dtypes import accumulator
from .._core.masks import deviation, valid_mask
from .._core.platforms import recompute
from .._core.types import Plan, Reduction, Statistics
from .activation import activate_output, widened_to
from .batch import ByFormula
from .formula import affine, affine_times
from .normalize import normalize_given
from .standardize import standardize
from .statistics import statistics

Array = jax.Array

SPREADS = ("std", "l1", "rms", "none")
_OF_NORMAL = math.sqrt(math.pi / 2.0)  # the standard deviation of a normal distribution in mean absolute deviations


def by_absolute(norm: str, plan: Plan, x: Array, scale, bias, mask, weights) -> tuple[Array, Statistics]:
    """y = (x - mean) / (sqrt(pi / 2) mean|x - mean| + epsilon), in the place of `standardize`.

    The spread needs the mean: over devices that is one all-reduce more each way. For the backward pass x alone is kept.
    """
    reduction, keep = plan.reduction, valid_mask(mask, weights)
    stats = statistics(reduction, x, mask, weights)
    mean = stats.mean_hi, stats.mean_lo
    total = recompute(functools.partial(_absolute_sum, reduction), reduction.plain)(x, mask, weights, *mean)
    if reduction.axis_name is not None:
        (total,) = psum_grouped([total], reduction.axis_name, reduction.groups)
    spread = _OF_NORMAL * total / nonzero_divisor(jnp.asarray(stats.count))
    factor = jnp.where(stats.count == 0, 0.0, over_spread(spread, plan.epsilon))
    y = recompute(functools.partial(_times, plan), reduction.plain)(x, keep, *mean, factor, scale, bias)
    sum_of_spread = spread * stats.count  # in the place of m2, which is divided by the count, and by prescale**2
    if reduction.large_prescale is None:
        m2 = (sum_of_spread * reduction.prescale) * reduction.prescale
    else:
        m2 = jnp.sqrt(sum_of_spread)
    return y, Statistics(*map(jax.lax.stop_gradient, (stats.count, *mean, m2)))


def _absolute_sum(reduction: Reduction, x: Array, mask, weights, *mean) -> Array:
    a = jnp.abs(deviation(x, valid_mask(mask, weights), *mean))
    a = a if weights is None else a * weights.astype(a.dtype)
    return reduction.over.sum(a if mask is None else jnp.where(mask, a, 0.0), None)


def _times(plan: Plan, x: Array, keep, mean_hi, mean_lo, factor, scale, bias) -> Array:
    z = deviation(x, keep, mean_hi, mean_lo) * factor.astype(accumulator(x))
    if plan.activation is None:
        return affine(z, scale, bias, plan.scale_offset, plan.dtype)
    z = affine(z, scale, bias, plan.scale_offset, widened_to(z, scale, bias))
    return activate_output(plan.activation, z, keep).astype(plan.dtype)


def _deviation(x: Array, of, affine, epsilon: float) -> Array:
    return affine(jnp.where(of.count == 0, 0.0, of.deviation(x)))


BY: dict[str, Any] = {"std": standardize, "rms": standardize, "l1": by_absolute, "none": ByFormula(_deviation)}


def normalize_by(spread: str):
    """`normalize_given` for running statistics that hold this measure."""

    def given(x, mean, var, scale, bias, keep, *, axis, epsilon, scale_offset, **options) -> Array:
        if spread == "l1":
            scale, bias = (
                align_param("batch_norm", w, p, x.shape, axis) for w, p in (("scale", scale), ("bias", bias))
            )
            factor: Any = align_param("batch_norm", "state.var", over_spread(var, epsilon), x.shape, axis)
            scale, bias = affine_times(factor, scale, None, scale_offset, factor.dtype)[0], bias
            scale_offset = 0.0
        return normalize_given(
            x, mean, jnp.ones_like(var), scale, bias, keep, axis=axis, epsilon=0.0, scale_offset=scale_offset, **options
        )

    return normalize_given if spread in ("std", "rms") else given


def over_spread(spread: Array, epsilon: float) -> Array:
    """1 / (spread + epsilon), and 0 for 1 / 0."""
    over = spread + epsilon
    return jnp.where(over == 0, 0.0, reciprocal(nonzero_divisor(over)))
