"""What the CPU room does in the place of a primitive's formula, and when: chosen as a program is lowered."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir

from .. import cpu
from ..call import BACKWARD, FORWARD, Call
from ..partition import Across, has_devices, partitioned
from ..varying import unvarying
from ..xla import Statistics

Array = jax.Array


def lowering(primitive: Primitive, kernel: Callable, formula: Callable, across: Across) -> Callable:
    """The rule that lowers a primitive for CPU: to its kernel where that takes the shape and pays, else its formula."""
    sharded, can_shard = partitioned(kernel, across), has_devices(primitive)

    def lowered(run: Callable, pays: Callable, *operands, call: Call):
        x = operands[0]
        view = cpu.view_of(x.shape, call.recipe.how.axes, call.varying(operands))
        takes = view is not None and (call.recipe.room == "native" or pays(view, x.dtype))
        return list(run(call, *operands) if takes else formula(*operands, call=call))

    def rule(context, *operands, call: Call):
        module = context.module_context
        where = module.axis_context
        manual = getattr(where, "manual_axes", frozenset())
        alone = getattr(where, "num_devices", 0) == 1 or bool(manual)
        # A program for other processes, and one that is manual over some mesh axes only, are XLA's.
        refused = (
            getattr(module.lowering_parameters, "for_export", False)
            or (manual and set(manual) != set(where.mesh.axis_names))
            or not (alone or can_shard)
        )
        run = functools.partial(lowered, sharded.fun if alone else sharded, _never if refused else cpu.pays)
        context = context.replace(avals_in=[unvarying(kind) for kind in context.avals_in])
        return mlir.lower_fun(run, multiple_results=True)(context, *operands, call=call)

    return rule


def _never(view, dtype) -> bool:
    return False


def _static(call: Call, operands, names) -> cpu.Static:
    """What a kernel has to know, for this device's part of x; reduced axes are spread over the mesh axes `names`."""
    recipe, how = call.recipe, call.recipe.how
    view = cpu.view_of(operands[0].shape, how.axes, call.varying(operands))
    assert view is not None  # a part of x has the view that x has
    count = view.elements * (lax.axis_size(names) if names else 1)
    return cpu.Static(view, count, recipe.epsilon, how.unit, how.centered, recipe.round_before_scale)


def forward(call: Call, names, across: Across, *operands) -> tuple[Array, ...]:
    """y, and the statistics over all devices."""
    static, recipe = _static(call, operands, names), call.recipe
    x, scale, bias = call.unpacked(operands, FORWARD)
    if not names:
        return cpu.forward(static, recipe.how.axes, recipe.dtype, x, scale, bias)
    stats = Statistics(cpu.count(static, x), *cpu.moments(static, recipe.how.axes, x))
    _, shift, offset, m2 = across.merged(stats, names, recipe.how.unit)
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
