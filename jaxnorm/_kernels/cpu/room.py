"""What the CPU room does in the place of a primitive's formula, and when."""

from __future__ import annotations

import jax
from jax import lax

from .. import cpu
from ..call import BACKWARD, FORWARD, Call
from ..partition import Across
from ..xla import Statistics

Array = jax.Array


def takes(call: Call, operands, by_default: bool) -> bool:
    """Whether the kernels run a call: one that names the room where there is a view at all, others where they pay."""
    x = operands[0]
    view = cpu.view_of(x.shape, call.recipe.how.axes, call.varying(operands))
    return view is not None and (call.recipe.room == "native" or (by_default and cpu.pays(view, x.dtype)))


def _static(call: Call, operands, names) -> cpu.Static:
    """What a kernel has to know, for this device's part of x; reduced axes are spread over the mesh axes `names`."""
    recipe, how = call.recipe, call.recipe.how
    view = cpu.view_of(operands[0].shape, how.axes, call.varying(operands))
    assert view is not None  # a part of x has the view that x has
    count = view.elements * (lax.axis_size(names) if names else 1)
    unit = how.unit if how.large is None else 0.0  # for kernels, too, m2 is then its root
    return cpu.Static(view, count, recipe.epsilon, unit, how.centered, recipe.round_before_scale)


def forward(call: Call, names, across: Across, *operands) -> tuple[Array, ...]:
    """y, and the statistics over all devices."""
    static, recipe = _static(call, operands, names), call.recipe
    x, scale, bias = call.unpacked(operands, FORWARD)
    if not names:
        return cpu.forward(static, recipe.how.axes, recipe.dtype, x, scale, bias)
    stats = Statistics(cpu.count(static, x), *cpu.moments(static, recipe.how.axes, x))
    _, shift, offset, m2 = across.merged(stats, names, recipe.how)
    return cpu.normalize(static, recipe.dtype, x, shift, offset, m2, scale, bias), shift, offset, m2


def backward(call: Call, names, across: Across, *operands) -> tuple[Array, ...]:
    """dx, and those gradients of scale and bias that are wanted, of this device's part."""
    static, axes = _static(call, operands, names), call.recipe.how.axes
    x, shift, offset, m2, scale, g = call.unpacked(operands, BACKWARD)
    if not names:
        dx, *gradients = cpu.backward(static, x, shift, offset, m2, scale, g)
    else:
        *sums, dscale, dbias = cpu.gradient_sums(static, axes, x, shift, offset, m2, scale, g)
        dx = cpu.gradient(static, x, shift, offset, m2, scale, g, *across.summed(sums, names))
        gradients = dscale, dbias
    summed = lambda d, shape: d.sum([a for a, n in enumerate(shape) if n == 1], keepdims=True)
    return dx, *(summed(d, s) for d, s in zip(gradients, call.wanted, strict=True) if s is not None)
