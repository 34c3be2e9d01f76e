"""A norm by its formula, which XLA compiles."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax

from .._core.dtypes import are_static
from .._core.over import Axes, Groups
from .._core.platforms import recompute
from .._core.types import Plan, Reduction, Statistics
from .._core.vma import spec_of, tangent_like
from .formula import output, output_tangent
from .statistics import drop_symbolic_zeros, statistics

Array = jax.Array


def standardize_by_formula(plan: Plan, x, scale, bias, mask, weights, ids=None) -> tuple[Array, Statistics]:
    """y, and the statistics as constants."""
    return in_channels(_standardize, plan, x, scale, bias, mask, weights, ids)


def in_channels(run: Callable[..., tuple[Array, Statistics]], plan: Plan, x, *arrays) -> tuple[Array, Statistics]:
    """run(plan, x, *arrays), which gets the channels as one axis where x is viewed in groups of them."""
    if (groups := groups_of(plan.reduction, x)) is None:
        return run(plan, x, *arrays)
    plan = replace(plan, reduction=replace(plan.reduction, over=groups))
    y, stats = run(plan, *(None if a is None else groups.joined(a) for a in (x, *arrays)))
    return groups.split(y), Statistics(*(a[..., None] for a in stats))


def groups_of(reduction: Reduction, x: Array) -> Groups | None:
    """The groups of channels that x is viewed in, (..., groups, channels of each), where it is; None elsewhere."""
    last = x.ndim - 1
    if not isinstance(reduction.over, Axes) or len(reduction.axes) < 2 or last not in reduction.axes:
        return None
    if last - 1 in reduction.axes or not are_static(*x.shape[-2:]) or any(spec_of(x)[-2:]) or 0 in x.shape:
        return None
    return Groups(reduction.axes[:-1], x.shape[-2], x.shape[-2] * x.shape[-1])


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _standardize(plan: Plan, x, scale, bias, mask, weights, ids=None) -> tuple[Array, Statistics]:
    stats = statistics(plan.reduction, x, mask, weights, ids)
    stats = lax.optimization_barrier(stats) if plan.statistics_first else stats
    return output(plan, x, mask, weights, stats, scale, bias, ids), stats


@functools.partial(_standardize.defjvp, symbolic_zeros=True)
def _(plan, primals, tangents):
    x, scale, bias, mask, weights, ids = primals
    dx, dscale, dbias, _, dweights, _ = drop_symbolic_zeros(tangents)
    plan = replace(plan, for_backward=True)
    stats = statistics(plan.reduction, x, mask, weights, ids)
    y = output(plan, x, mask, weights, stats, scale, bias, ids)
    # Under checkpoint the map, linear in its last argument, keeps its other inputs for the backward pass and no more.
    tangent = recompute(functools.partial(output_tangent, plan), plan.reduction.plain)
    dy = tangent(x, mask, weights, stats, scale, (dx, dscale, dbias, dweights), ids)
    return (y, stats), (tangent_like(y, dy), jax.tree.map(jnp.zeros_like, stats))
