"""A norm by its formula, which XLA compiles. Masks, weights and axis names are here alone."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp

from .._core.platforms import recompute
from .._core.types import Plan, Statistics
from .._core.vma import tangent_like
from .formula import output, output_tangent
from .statistics import drop_symbolic_zeros, statistics

Array = jax.Array


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def standardize_by_formula(plan: Plan, x, scale, bias, mask, weights, ids=None) -> tuple[Array, Statistics]:
    stats = statistics(plan.reduction, x, mask, weights, ids)
    return output(plan, x, mask, weights, stats, scale, bias, ids), stats


@functools.partial(standardize_by_formula.defjvp, symbolic_zeros=True)
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
