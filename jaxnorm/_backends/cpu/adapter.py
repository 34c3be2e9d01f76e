"""Adapter from the norm primitives to the native CPU kernels."""

from __future__ import annotations

import jax
from jax import lax

from ..._core.types import Statistics
from .. import cpu
from ..call import BACKWARD, FORWARD, Call
from ..partition import Collectives

Array = jax.Array


def supports(call: Call, operands, by_default: bool) -> bool:
    """Whether the kernels run a call: any with a view if it names this backend, otherwise those that profit."""
    x = operands[0]
    view = cpu.view_of(x.shape, call.plan.reduction.axes, call.varying(operands))
    return view is not None and (call.plan.backend == "native" or (by_default and cpu.is_profitable(view, x.dtype)))


def _static(call: Call, operands, names) -> cpu.Static:
    """What a kernel has to know, for this device's part of x; reduced axes are spread over the mesh axes `names`."""
    plan, reduction = call.plan, call.plan.reduction
    view = cpu.view_of(operands[0].shape, reduction.axes, call.varying(operands))
    assert view is not None  # a part of x has the view that x has
    count = view.elements * (lax.axis_size(names) if names else 1)
    prescale = reduction.prescale if reduction.large_prescale is None else 0.0  # for kernels, too, m2 is then its root
    return cpu.Static(view, count, plan.epsilon, prescale, reduction.centered, plan.cast_before_scale)


def forward(call: Call, names, collectives: Collectives, *operands) -> tuple[Array, ...]:
    """y, and the statistics over all devices."""
    static, plan = _static(call, operands, names), call.plan
    x, scale, bias = call.unpacked(operands, FORWARD)
    if not names:
        return cpu.forward(static, plan.reduction.axes, plan.dtype, x, scale, bias)
    stats = Statistics(cpu.count(static, x), *cpu.moments(static, plan.reduction.axes, x))
    _, mean_hi, mean_lo, m2 = collectives.merged(stats, names, plan.reduction)
    return cpu.normalize(static, plan.dtype, x, mean_hi, mean_lo, m2, scale, bias), mean_hi, mean_lo, m2


def backward(call: Call, names, collectives: Collectives, *operands) -> tuple[Array, ...]:
    """dx, and those gradients of scale and bias that are wanted, of this device's part."""
    static, axes = _static(call, operands, names), call.plan.reduction.axes
    x, mean_hi, mean_lo, m2, scale, g = call.unpacked(operands, BACKWARD)
    if not names:
        dx, *gradients = cpu.backward(static, x, mean_hi, mean_lo, m2, scale, g)
    else:
        *sums, dscale, dbias = cpu.gradient_sums(static, axes, x, mean_hi, mean_lo, m2, scale, g)
        dx = cpu.gradient(static, x, mean_hi, mean_lo, m2, scale, g, *collectives.summed(sums, names))
        gradients = dscale, dbias
    summed = lambda d, shape: d.sum([a for a, n in enumerate(shape) if n == 1], keepdims=True)
    return dx, *(summed(d, s) for d, s in zip(gradients, call.grad_shapes, strict=True) if s is not None)
