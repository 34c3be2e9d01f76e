"""Adapter from the norm primitives to the native CPU kernels."""

from __future__ import annotations

import jax
from jax import lax

from .. import cpu
from ..call import BACKWARD, FORWARD, QUANTIZE, Call
from ..partition import Collectives
from ..protocol import Request, Support, only_static

Array = jax.Array


class Native:
    """The C++ kernels for CPU."""

    name, platform = "native", "cpu"
    merges_shards, partitions, fuses_add, quantizes, takes_masks = True, True, False, True, True

    def available(self) -> Support:
        return Support(*cpu.library()[:2])

    def active(self) -> Support:
        return self.available()

    def supports(self, request: Request) -> Support:
        """Whether there are kernels from x's dtype to the output's, and a view of x."""
        if not (library := self.available()).ok:
            return library
        if not (plain := only_static(request)).ok:
            return plain
        reason = _reason(request.x, request.reduction, request.dtype, request.varying, request.quantize)
        return Support.yes() if reason is None else Support.no(reason)

    def runs(self, call: Call, operands, by_default: bool) -> bool:
        """Any call with a view if this backend is named, otherwise those that profit."""
        x, plan, varying = call.normalized(operands), call.plan, call.varying(operands)
        if _reason(x, plan.reduction, plan.dtype, varying, plan.quantize) is not None:
            return False
        view = cpu.view_of(x.shape, plan.reduction.axes, varying)
        assert view is not None  # or it would not be supported
        return plan.backend == self.name or (by_default and cpu.is_profitable(view, x.dtype))

    def forward(self, call: Call, names, collectives: Collectives, *operands) -> tuple[Array, ...]:
        """y, and the statistics over all devices; where there are weights, their counts are the last."""
        static, plan = _static(call, operands, names), call.plan
        x, scale, bias, mask, weights = call.unpacked(operands, FORWARD)
        weights = cpu.weights_of(static.view, x, mask, weights, whole=not names)
        if not names:
            return cpu.forward(static, plan.reduction.axes, plan.dtype, x, scale, bias, weights)
        stats = cpu.moments(static, plan.reduction.axes, x, weights)
        counts, mean_hi, mean_lo, m2 = collectives.merged(stats, names, plan.reduction)
        weights = None if weights is None else cpu.Weights(weights, counts)
        y = cpu.normalize(static, plan.dtype, x, mean_hi, mean_lo, m2, scale, bias, weights)
        return y, mean_hi, mean_lo, m2, *[counts] * (weights is not None)

    def quantize(self, call: Call, names, collectives: Collectives, *operands) -> tuple[Array, ...]:
        """Data and what was found, and the statistics, of rows that are whole on this device."""
        plan = call.plan
        x, scale, bias, given = call.unpacked(operands, QUANTIZE)
        static = _static(call, operands, names)
        return cpu.quantize(static, plan.reduction.axes, plan.dtype, plan.quantize, x, scale, bias, given)

    def backward(self, call: Call, names, collectives: Collectives, *operands) -> tuple[Array, ...]:
        """dx, and those gradients of scale and bias that are wanted, of this device's part."""
        static, axes = _static(call, operands, names), call.plan.reduction.axes
        x, count, mean_hi, mean_lo, m2, scale, g, mask, weights = call.unpacked(operands, BACKWARD)
        weights = cpu.weights_of(static.view, x, mask, weights, whole=not names)
        weights = None if weights is None else cpu.Weights(weights, count)
        if not names:
            dx, *gradients = cpu.backward(static, x, mean_hi, mean_lo, m2, scale, g, weights)
        else:
            *sums, dscale, dbias = cpu.gradient_sums(static, axes, x, mean_hi, mean_lo, m2, scale, g, weights)
            h, hx = collectives.summed(sums, names)
            dx = cpu.gradient(static, x, mean_hi, mean_lo, m2, scale, g, h, hx, weights)
            gradients = dscale, dbias
        summed = lambda d, shape: d.sum([a for a, n in enumerate(shape) if n == 1], keepdims=True)
        return dx, *(summed(d, s) for d, s in zip(gradients, call.grad_shapes, strict=True) if s is not None)


def _reason(x, reduction, dtype, varying: frozenset[int], fmt) -> str | None:
    if fmt is not None:
        return cpu.unquantized_reason(x, reduction, dtype, varying, fmt)
    return cpu.unsupported_reason(x, reduction, dtype, varying)


def _static(call: Call, operands, names) -> cpu.Static:
    """What a kernel has to know, for this device's part of x; reduced axes are spread over the mesh axes `names`."""
    plan, reduction = call.plan, call.plan.reduction
    view = cpu.view_of(operands[0].shape, reduction.axes, call.varying(operands))
    assert view is not None  # a part of x has the view that x has
    count = view.elements * (lax.axis_size(names) if names else 1)
    prescale = reduction.prescale if reduction.large_prescale is None else 0.0  # for kernels, too, m2 is then its root
    return cpu.Static(view, count, plan.epsilon, prescale, reduction.centered, plan.cast_before_scale)
