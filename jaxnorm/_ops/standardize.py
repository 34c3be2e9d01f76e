"""The one entry of all norms: x normalized by its own statistics, by formula or by kernel."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from .._backends import registry
from .._backends.protocol import Request
from .._core.formats import NvFp4
from .._core.quantized import Quantized
from .._core.types import Plan, Statistics
from .._core.vma import varying
from . import activation as _activation
from .by_formula import in_channels, standardize_by_formula
from .by_kernel import backend_quantizes, backend_supports, prepare_for_kernel, standardize_by_kernel
from .epilogue import inner_plan, standardize_with_epilogue
from .quantize import (
    assembled,
    carrier,
    largest_of_all,
    needs_amax,
    quantize_array,
    refuse_gradient,
    unquantized,
)  # fmt: skip

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
        return standardize_by_kernel(plan, x, scale, bias, mask, weights, None)[:2]
    return standardize_by_formula(plan, x, scale, bias, mask, weights, ids)


def standardize_quantized(norm: str, fmt: Any, plan: Plan, x: Any, scale, bias, mask, keep, given) -> Quantized:
    """`standardize`, its output in a format. `given` is the scale of a tensor; elements that `keep` leaves out do not
    count in its largest value.

    By a kernel that quantizes, or else by XLA's formula, unless a backend is named.
    """
    if not fmt.straight_through:
        x, scale, bias = (None if a is None else refuse_gradient(norm, a) for a in (x, scale, bias))
    by_kernel = replace(plan, quantize=fmt)
    plain = mask is None and keep is None and plan.activation is None and not isinstance(fmt, NvFp4)
    if plain and backend_quantizes(by_kernel, x, scale, bias):
        by_kernel, scale, bias = prepare_for_kernel(by_kernel, x, scale, bias)
        run = lambda given, *args: standardize_by_kernel(by_kernel, *args, None, None, None, _of_rank(x, given))[0]
        amax = None
        if needs_amax(fmt, given):
            still = jax.lax.stop_gradient((x, scale, bias))
            amax = largest_of_all(fmt, run(jnp.ones((), jnp.float32), *still)[1], plan.reduction)
            given = fmt.scale_for(amax)
        data, found, *gradient = run(given, x, scale, bias)
        if fmt.of_tensor and amax is None:
            amax = largest_of_all(fmt, found, plan.reduction)
        made = assembled(fmt, data, found, given, amax)
        return replace(made, gradient=gradient[0] if gradient else None)
    plain = unquantized(fmt, plan, x)
    plain = replace(plain, backend="xla") if plain.backend is None else plain
    y, _ = standardize(norm, plain, x, scale, bias, mask)
    made = quantize_array(fmt, y, plan.reduction, given, keep, plan.dtype)
    return replace(made, gradient=carrier(y.astype(plan.dtype))) if fmt.straight_through else made


def _of_rank(x: Array, scalar: Array | None) -> Array | None:
    return None if scalar is None else scalar.reshape((1,) * x.ndim)


def takes_mask(plan: Plan, x, scale, bias, mask) -> bool:
    """Whether a kernel backend takes this norm with its mask."""
    if plan.activation is not None or plan.backend in ("xla", "lax"):
        return False
    return registry.supports(plan.backend, Request(x, plan.reduction, plan.dtype, scale, bias, mask)).ok


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
    y, _, new = standardize_by_kernel(plan, x, scale, bias, None, None, residual)
    assert new is not None
    return y, new
