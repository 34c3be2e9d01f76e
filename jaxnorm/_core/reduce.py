"""The statistics of what one device holds: which formula, on which platform. This is the reference implementation.

Every other backend must match it. Accumulation is in `accumulator(x)`: float32, or wider where x is wider.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from .arithmetic import abs_squared
from .dtypes import accumulator, are_static
from .formulas import (
    are_last,
    difference,
    in_range,
    in_unit,
    is_long,
    long_two_pass_on_cpu,
    one_pass,
    one_pass_by_parts,
    sharded_axes,
    two_pass,
    weighted,
    welford,
)
from .masks import count_valid, valid_mask
from .over import Axes, Groups, Prefix
from .platforms import by_platform
from .prefix import statistics_so_far
from .types import Reduction, Statistics

Array = jax.Array


_LONGEST_ROW = 1 << 14  # elements of a row up to which XLA makes one kernel for a GPU; measured by its compiler


def local_statistics(
    x: Array, mask: Array | None, weights: Array | None, reduction: Reduction, ids: Array | None = None
) -> Statistics:
    """The statistics of what this device holds. The formula for rows is chosen for the platform, at lowering."""
    over = reduction.over
    n = count_valid(x, mask, weights, over, ids)
    keep = valid_mask(mask, weights)
    args = (x, keep, weights, n)
    if not reduction.centered:
        zero = jnp.zeros(over.shape(x.shape), accumulator(x))
        squares = lambda prescale: over.sum(
            weighted(abs_squared(difference(x, keep, over.spread(zero, ids)) * prescale), weights), ids
        )
        if reduction.large_prescale is None:
            return Statistics(n, zero, zero, in_unit(reduction, squares, x))
        m2, prescale = in_range(reduction, squares)
        return Statistics(n, zero, zero, jnp.sqrt(m2) / prescale)
    if 0 in x.shape:
        zero = jnp.zeros(over.shape(x.shape), accumulator(x))
        return Statistics(n, zero, zero, zero.real)
    if ids is not None:
        return Statistics(n, *two_pass(*args, reduction, ids=ids))
    if isinstance(over, Prefix):
        return statistics_so_far(x, mask, weights, n, reduction, over)
    if isinstance(over, Groups):
        return _of_groups(x, mask, weights, n, reduction, over)
    by = lambda formula: lambda *args: formula(*args, reduction)
    long = is_long(x, over)
    rows = are_last(x, reduction.axes)
    on_cpu = by(one_pass if not rows else long_two_pass_on_cpu if long else two_pass)
    if reduction.one_pass and keep is None and sharded_axes(x):
        return Statistics(n, *one_pass(*args, reduction))
    if reduction.one_pass and keep is None:
        on_gpu = by(one_pass_by_parts)
        return Statistics(n, *by_platform(reduction, *args, cuda=on_gpu, rocm=on_gpu, default=by(one_pass)))
    if reduction.one_pass or keep is not None or sharded_axes(x):  # Welford's is for rows, and would lose the sharding
        if not long:
            return Statistics(n, *two_pass(*args, reduction))
        return Statistics(n, *by_platform(reduction, *args, cpu=by(long_two_pass_on_cpu), default=by(two_pass)))
    on_gpu = by(welford if rows else one_pass_by_parts)
    return Statistics(n, *by_platform(reduction, *args, cpu=on_cpu, cuda=on_gpu, rocm=on_gpu, default=by(welford)))


def _of_groups(x, mask, weights, n: Array, reduction: Reduction, over: Groups) -> Statistics:
    """On a CPU by sums of channels; elsewhere by the formula for x with its channels in groups."""
    viewed = replace(reduction, over=Axes((*over.axes, x.ndim)))
    split: Any = lambda a: None if a is None else over.split(a)

    def on_cpu(x, mask, weights, n):
        keep = valid_mask(mask, weights)
        formula = one_pass if keep is None else long_two_pass_on_cpu if is_long(x, over) else two_pass
        return formula(x, keep, weights, n, reduction)

    def elsewhere(x, mask, weights, n):
        return tuple(a[..., 0] for a in local_statistics(split(x), split(mask), split(weights), viewed)[1:])

    return Statistics(n, *by_platform(reduction, x, mask, weights, n, cpu=on_cpu, default=elsewhere))


def is_row(x: Array, reduction: Reduction) -> bool:
    """Whether a compiler may hold what is reduced, as a GPU's block of threads does: it is the last axes, not long."""
    size = math.prod(x.shape[a] for a in reduction.axes)
    mine = reduction.axis_name is None and not reduction.one_pass and not sharded_axes(x)
    mine = mine and are_last(x, reduction.axes) and not jnp.iscomplexobj(x)
    return mine and are_static(size) and 0 < size <= _LONGEST_ROW and 0 not in x.shape
