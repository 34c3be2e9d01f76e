"""A norm with an activation or a gate around it. The backward pass recomputes what is between x and y."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp

from .._core.masks import valid_mask
from .._core.platforms import recompute
from .._core.types import Plan
from .._core.vma import tangent_like
from . import activation as _activation
from .activation import jvp_or_none
from .by_kernel import kernel_tangent, standardize_by_kernel_differentiable
from .formula import output, output_tangent
from .statistics import drop_symbolic_zeros, statistics

Array = jax.Array


def inner_plan(plan: Plan, x, scale, bias, gate) -> Plan:
    """The norm within. What it gives is rounded where the output is, or where it is asked to be by name."""
    plain = replace(plan, activation=None, gate=None, within=True)
    if plan.gate == "before" or plan.cast_before_scale:
        return plain
    return replace(plain, dtype=_activation.widened_to(x, scale, bias))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def standardize_with_epilogue(plan: Plan, plain: Plan, by_kernel: bool, x, scale, bias, mask, weights, gate, ids=None):
    y, stats = _with_epilogue_differentiable(plan, plain, by_kernel, x, scale, bias, mask, weights, gate, ids)
    return y, jax.tree.map(jax.lax.stop_gradient, stats)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _with_epilogue_differentiable(plan: Plan, plain: Plan, by_kernel: bool, x, scale, bias, mask, weights, gate, ids):
    keep = valid_mask(mask, weights)
    u = _activation.prologue(plan, x, gate, keep)
    if by_kernel:
        z, stats, _ = standardize_by_kernel_differentiable(plain, u, scale, bias, mask, weights, None)
    else:
        stats = statistics(plain.reduction, u, mask, weights, ids)
        z = output(plain, u, mask, weights, stats, scale, bias, ids)
    return _activation.epilogue(plan, _activation.widened(plan, z), gate, keep), stats


@functools.partial(standardize_with_epilogue.defjvp, symbolic_zeros=True)
def _(plan, plain, by_kernel, primals, tangents):
    plain = replace(plain, for_backward=True)
    y, stats = _with_epilogue_differentiable(plan, plain, by_kernel, *primals)
    # As in the inner norm: of what the map keeps, only x and the gate have x's size. It recomputes z.
    tangent = recompute(functools.partial(_with_epilogue_tangent, plan, plain, by_kernel), plan.reduction.plain)
    dy = tangent(stats, *primals, drop_symbolic_zeros(tangents))
    return (y, stats), (tangent_like(y, dy), jax.tree.map(jnp.zeros_like, stats))


def _with_epilogue_tangent(plan, plain, by_kernel, stats, x, scale, bias, mask, weights, gate, ids, tangents) -> Array:
    """The tangent of y, by the chain rule over what is before the norm, the norm, and what is after it."""
    dx, dscale, dbias, _, dweights, dgate, _ = tangents
    keep = valid_mask(mask, weights)
    u, du = jvp_or_none(lambda x, gate: _activation.prologue(plan, x, gate, keep), (x, gate), (dx, dgate))
    z = _activation.widened(plan, output(plain, u, mask, weights, stats, scale, bias, ids))
    plain = replace(plain, dtype=z.dtype)  # the tangent of z is not rounded
    if all(t is None for t in (du, dscale, dbias, dweights)):
        dz = None
    elif by_kernel:
        dz = kernel_tangent(plain, u, mask, weights, stats, scale, (du, dscale, dbias, dweights))
    else:
        dz = output_tangent(plain, u, mask, weights, stats, scale, (du, dscale, dbias, dweights), ids)
    _, dy = jvp_or_none(lambda z, gate: _activation.epilogue(plan, z, gate, keep), (z, gate), (dz, dgate))
    return jnp.zeros(x.shape, plan.dtype) if dy is None else dy
