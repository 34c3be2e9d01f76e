"""The one entry of all norms: x normalized by its own statistics, by formula or by kernel."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax

from .._backends import registry
from .._core.types import Plan, Statistics
from .._core.vma import varying
from . import activation as _activation
from .by_formula import in_channels, standardize_by_formula
from .by_kernel import backend_supports, prepare_for_kernel, standardize_by_kernel
from .epilogue import inner_plan, standardize_with_epilogue

Array = jax.Array


def standardize(
    norm: str,
    plan: Plan,
    x: Array,
    scale: Array | None,
    bias: Array | None,
    mask=None,
    weights=None,
    gate=None,
    ids=None,
) -> tuple[Array, Statistics]:
    """Normalize x by its own statistics. Returns the output, and the statistics as constants, without a derivative.

    For the backward pass only x (and a gate), in its own dtype, and the statistics are kept.
    """
    if plan.activation is not None:
        plain = inner_plan(plan, x, scale, bias, gate)
        seen = jax.eval_shape(functools.partial(_activation.prologue, plan), x, gate, None)
        if backend_supports(norm, plain, seen, scale, bias, mask, weights):
            plain, scale, bias = prepare_for_kernel(plain, seen, scale, bias)
            return standardize_with_epilogue(plan, plain, True, x, scale, bias, mask, weights, gate, ids)

        def around(plan: Plan, *arrays) -> tuple[Array, Statistics]:
            return standardize_with_epilogue(plan, replace(plain, reduction=plan.reduction), False, *arrays)

        return in_channels(around, plan, x, scale, bias, mask, weights, gate, ids)
    if backend_supports(norm, plan, x, scale, bias, mask, weights):
        plan, scale, bias = prepare_for_kernel(plan, x, scale, bias)
        return standardize_by_kernel(plan, x, scale, bias, None)[:2]
    return standardize_by_formula(plan, x, scale, bias, mask, weights, ids)


def can_fuse_add(norm: str, plan: Plan, x, residual, scale, bias, mask) -> bool:
    """Whether `add_and_standardize` is for this norm: a kernel backend takes it, of x and of the sum."""
    if mask is not None or plan.activation is not None or not registry.fuses_add(plan.backend):
        return False
    of_parameters = frozenset().union(*(varying(p) for p in (scale, bias) if p is not None))
    if not of_parameters <= varying(x) | varying(residual):
        return False  # the sum would inherit the varying axes of the parameters: one primitive returns both
    stream = jax.ShapeDtypeStruct(x.shape, residual.dtype)
    return all([backend_supports(norm, plan, seen, scale, bias, None, None) for seen in (x, stream)])


def add_and_standardize(plan: Plan, x, residual, scale, bias) -> tuple[Array, Array]:
    """`standardize` of x + residual, and that sum, in one kernel where a backend adds."""
    plan, scale, bias = prepare_for_kernel(plan, jax.ShapeDtypeStruct(x.shape, residual.dtype), scale, bias)
    y, _, new = standardize_by_kernel(plan, x, scale, bias, residual)
    assert new is not None
    return y, new
