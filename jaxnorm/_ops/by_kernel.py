"""A norm by three primitives that a kernel backend may run."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._backends import registry
from .._backends.call import is_of_rows
from .._backends.partition import Collectives
from .._backends.primitives import Fused
from .._backends.protocol import Request, Support
from .._core.collectives import merge_over_devices, psum_grouped
from .._core.dtypes import accumulator
from .._core.masks import zeroed
from .._core.types import Plan, Statistics
from .._core.vma import tangent_like
from .by_formula import standardize_by_formula
from .formula import effective_scale, output_tangent
from .quantize import as_quantized, quantized_rows, unquantized
from .residual import add_rounded, add_rounded_tangent
from .statistics import drop_symbolic_zeros, statistics_tangent

Array = jax.Array


def backend_supports(norm: str, plan: Plan, x, scale, bias, mask, weights) -> bool:
    """Whether a kernel backend takes this norm. One that is named takes it or says why not."""
    if plan.backend in ("xla", "lax"):
        return False
    request = Request(x, plan.reduction, plan.dtype, scale, bias, mask, weights)
    support = registry.supports(plan.backend, request)
    if plan.cast_dtype is not None:
        support = Support.no("no kernel rounds before the scale to another dtype than that of its output")
    if not support.ok and plan.backend is not None:
        raise ValueError(
            f"{norm}: implementation={plan.backend!r} cannot run here: {support.reason}. Write implementation=None."
        )
    return support.ok


def backend_quantizes(plan: Plan, x, scale, bias) -> bool:
    """Whether a kernel backend writes this norm in the plan's format."""
    if plan.backend in ("xla", "lax"):
        return False
    request = Request(x, plan.reduction, plan.dtype, scale, bias, quantize=plan.quantize)
    return registry.quantizes(plan.backend, request)


def prepare_for_kernel(plan: Plan, x, scale, bias) -> tuple[Plan, Array | None, Array | None]:
    """The kernels' arithmetic has one dtype, and its scale no offset."""
    acc = accumulator(x)
    scale = None if scale is None else effective_scale(scale, plan.scale_offset, acc)
    return replace(plan, scale_offset=0.0), scale, None if bias is None else bias.astype(acc)


# Devices of a CPU share memory: from here on two all-reduces of what is merged are faster than one of all slots.
_SLOT_BYTES = 1 << 15


def _quantized(plan: Plan, x, scale, bias, given):
    y, stats = standardize_by_formula(unquantized(plan.quantize, plan, x), x, scale, bias, None, None)
    return quantized_rows(plan.quantize, as_quantized(plan.quantize, y, plan.dtype), plan.reduction, given), stats


def _by_rows(plan: Plan, x, mask, weights) -> bool:
    """Whether a mask is one of whole rows, which are cheaper as zeros than masked in every sum."""
    return mask is not None and weights is None and is_of_rows(mask, x, plan.reduction.axes)


def _output(plan: Plan, x, scale, bias, mask, weights) -> tuple[Array, Statistics]:
    if not _by_rows(plan, x, mask, weights):
        return standardize_by_formula(plan, x, scale, bias, mask, weights)
    y, stats = standardize_by_formula(plan, zeroed(mask, x), scale, bias, None, None)
    return y, stats._replace(count=jnp.where(mask, stats.count, 0.0))


def _tangent(plan: Plan, x, stats: Statistics, scale, mask, weights, tangents) -> Array:
    dx, *others = tangents
    if _by_rows(plan, x, mask, weights):
        x, dx, mask = zeroed(mask, x), None if dx is None else zeroed(mask, dx), None
    return output_tangent(plan, x, mask, weights, stats, scale, (dx, *others, None))


primitives = Fused(
    output=_output,
    tangent=_tangent,
    add=functools.partial(add_rounded, False),
    quantized=_quantized,
    collectives=Collectives(
        merged=lambda stats, names, reduction: merge_over_devices(stats, names, None, reduction, _SLOT_BYTES),
        summed=lambda parts, names: psum_grouped(parts, names, None),
    ),
)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def standardize_by_kernel(
    plan: Plan, x, scale, bias, mask, weights, residual, given=None
) -> tuple[Any, Statistics, Array | None]:
    """y, the statistics, and, where there is a residual, its sum with x, which is then what y and they are of.

    If the plan has a format, y is data and what was found; see `quantize.quantized_rows`, which says what `given` is.
    With a gradient a third, zeros that have the tangent of y.
    """
    return _forward(plan, x, scale, bias, mask, weights, residual, given)


def _forward(plan: Plan, x, *operands) -> tuple[Any, Statistics, Array | None]:
    y, stats, new = primitives.forward(plan, x, *operands)
    if plan.quantize is not None and plan.quantize.straight_through:
        y = (*y, tangent_like(x, jnp.zeros(x.shape, plan.dtype)))
    return y, stats, new


def _tangent_of_output(y: Any, dy: Array) -> Any:
    """The tangent of y, where it is quantized that of its last part."""
    if not isinstance(y, tuple):
        return tangent_like(y, dy)
    still = lambda a: (
        jnp.zeros_like(a) if jnp.issubdtype(a.dtype, jnp.inexact) else np.zeros(a.shape, jax.dtypes.float0)
    )
    return (*map(still, y[:-1]), tangent_like(y[-1], dy))


@functools.partial(standardize_by_kernel.defjvp, symbolic_zeros=True)
def _(plan, primals, tangents):
    (y, stats, new), _, (dy, dnew) = _by_kernel_with_tangent(plan, primals, drop_symbolic_zeros(tangents))
    return (y, stats, new), (dy, jax.tree.map(jnp.zeros_like, stats), dnew)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def standardize_by_kernel_differentiable(
    plan: Plan, x, scale, bias, mask, weights, residual, given=None
) -> tuple[Any, Statistics, Array | None]:
    """The same, the statistics with their derivatives: what derivatives of higher order are made of."""
    return _forward(plan, x, scale, bias, mask, weights, residual, given)


@functools.partial(standardize_by_kernel_differentiable.defjvp, symbolic_zeros=True)
def _(plan, primals, tangents):
    tangents = drop_symbolic_zeros(tangents)
    (y, stats, new), (x, dx), (dy, dnew) = _by_kernel_with_tangent(plan, primals, tangents)
    mask, weights, dweights = *primals[3:5], tangents[4]
    dstats = jax.tree.map(jnp.zeros_like, stats)
    if dx is not None or dweights is not None:
        of_statistics = jax.checkpoint(functools.partial(statistics_tangent, plan.reduction), prevent_cse=False)
        dstats = of_statistics(x, mask, weights, stats, dx, dweights)
    return (y, stats, new), (dy, dstats, dnew)


def _by_kernel_with_tangent(plan: Plan, primals, tangents):
    """What the backend gives; what is normalized, and its tangent; the tangents of y and of the new stream."""
    (x, scale, _, mask, weights, residual, _), (dx, dscale, dbias, _, dweights, dresidual, _) = primals, tangents
    plan = replace(plan, for_backward=True)
    y, stats, new = standardize_by_kernel_differentiable(plan, *primals)
    plan = replace(plan, quantize=None)
    if new is None:
        dy = kernel_tangent(plan, x, mask, weights, stats, scale, (dx, dscale, dbias, dweights))
        return (y, stats, None), (x, dx), (_tangent_of_output(y, dy), None)
    dx = add_rounded_tangent(residual.dtype, dx, dresidual)
    if dx is None:
        dy = kernel_tangent(plan, new, None, None, stats, scale, (None, dscale, dbias, None))
        dnew = jnp.zeros_like(new)
    else:
        dy, dnew = primitives.tangent_of_sum(plan, new, stats, scale, (dx, dscale, dbias))
    return (y, stats, new), (new, dx), (tangent_like(y, dy), tangent_like(new, dnew))


def kernel_tangent(plan: Plan, x, mask, weights, stats: Statistics, scale, tangents) -> Array:
    """The tangent of y, whose transpose is a kernel but for the part of weights, which is that of a formula."""
    *others, dweights = tangents
    parts = []
    if any(t is not None for t in others):
        parts.append(primitives.tangent(plan, x, stats, scale, mask, weights, others))
    if dweights is not None:
        of_weights = jax.checkpoint(functools.partial(output_tangent, plan), prevent_cse=False)
        parts.append(of_weights(x, mask, weights, stats, scale, (None, None, None, dweights)))
    return functools.reduce(jnp.add, parts) if parts else jnp.zeros(x.shape, plan.dtype)
