"""The kernel backends beside XLA, the default of each platform, and how a call that one supports is lowered to it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace

import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import mlir

from .._core.masks import zeroed
from .._core.vma import without_sharding, without_vma
from .call import BACKWARD, BACKWARD_OF_SUM, FORWARD, FORWARD_OF_SUM, Call, packed
from .cpu.adapter import Native
from .pallas.adapter import Mosaic
from .partition import Collectives, can_partition, partitioned
from .protocol import KernelBackend, Request, Support

BACKENDS: dict[str, KernelBackend] = {
    backend.name: backend
    for backend in (
        Native(),
        Mosaic("mosaic_gpu", "cuda", partitions=True),
        Mosaic("mosaic_tpu", "tpu", partitions=False),
    )
}
#: Platform: the backend of implementation=None, where it was measured to win.
DEFAULTS = {"cpu": "native", "cuda": "mosaic_gpu"}


def supports(name: str | None, request: Request) -> Support:
    """Whether the named backend, or one that is the default of a platform, has kernels for this norm."""
    answer = Support.no("no platform has a default backend")
    for each in DEFAULTS.values() if name is None else (name,):
        answer = BACKENDS[each].supports(request)
        if answer.ok:
            break
    return answer


def quantizes(name: str | None, request: Request) -> bool:
    """Whether the named backend, or one that is the default of a platform, quantizes the output of this norm."""
    found = [BACKENDS[each] for each in (DEFAULTS.values() if name is None else (name,)) if each in BACKENDS]
    return any([backend.quantizes and backend.supports(request).ok for backend in found])


def is_default(backend: KernelBackend) -> bool:
    return DEFAULTS.get(backend.platform) == backend.name


def is_active(backend: KernelBackend) -> bool:
    """Whether `implementation=None` may choose it on this machine."""
    return is_default(backend) and backend.active().ok


def fuses_add(name: str | None) -> bool:
    """Whether the named backend, or one that is the default of a platform, adds x to a residual stream."""
    names = DEFAULTS.values() if name is None else (name,)
    return any([name in BACKENDS and BACKENDS[name].fuses_add for name in names])


def register(primitive: Primitive, kernel: str, formula: Callable, add: Callable, collectives: Collectives) -> None:
    """Lower `primitive` to the `kernel` ("forward", "backward", "quantize") of a backend that supports it, else to
    `formula`."""
    for name, backend in BACKENDS.items():
        if backend.platform != "cpu" or backend.available().ok:
            if kernel == "quantize" and not backend.quantizes:
                continue
            run = getattr(backend, kernel)
            if not backend.fuses_add and kernel != "quantize":
                run = _forward_adding(run, add) if kernel == "forward" else _backward_adding(run)
            if not backend.takes_masks:
                run = _forward_of_present(run) if kernel == "forward" else _backward_of_present(run)
            rule = _lowering(backend, f"{name} {kernel}", run, formula, collectives)
            mlir.register_lowering(primitive, rule, platform=backend.platform)


def _forward_adding(forward: Callable, add: Callable) -> Callable:
    """The kernel for a backend that knows of no residual stream: XLA adds."""

    def run(call: Call, names, collectives, *operands) -> tuple:
        x, *others, residual = call.unpacked(operands, FORWARD_OF_SUM)
        if residual is None:
            return forward(call, names, collectives, *operands)
        new = add(x, residual)
        named, given = packed(FORWARD, (new, *others))
        return *forward(replace(call, operand_names=named), names, collectives, *given), new

    return run


def _backward_adding(backward: Callable) -> Callable:
    """The same of the backward pass, which gets the stream as x."""

    def run(call: Call, names, collectives, *operands) -> tuple:
        *known, g_stream = call.unpacked(operands, BACKWARD_OF_SUM)
        named, given = packed(BACKWARD, known)
        dx, *gradients = backward(replace(call, operand_names=named), names, collectives, *given)
        return dx if g_stream is None else dx + g_stream, *gradients

    return run


def _forward_of_present(forward: Callable) -> Callable:
    """The kernel for a backend without masks: rows that are out are 0 to it."""

    def run(call: Call, names, collectives, *operands) -> tuple:
        if (mask := call.of("mask", operands)) is None:
            return forward(call, names, collectives, *operands)
        there, given = call.without(operands, "mask")
        y, mean_hi, *others = forward(there, names, collectives, zeroed(mask, given[0]), *given[1:])
        n = math.prod([given[0].shape[a] for a in call.plan.reduction.axes])
        counts = jnp.broadcast_to(jnp.where(mask, jnp.asarray(n, mean_hi.dtype), 0), mean_hi.shape)
        return y, mean_hi, *others[:2], counts, *others[2:]

    return run


def _backward_of_present(backward: Callable) -> Callable:
    """The same of the backward pass."""

    def run(call: Call, names, collectives, *operands) -> tuple:
        if (mask := call.of("mask", operands)) is None:
            return backward(call, names, collectives, *operands)
        there, given = call.without(operands, "mask", "count")
        dx, *gradients = backward(there, names, collectives, zeroed(mask, given[0]), *given[1:])
        return zeroed(mask, dx), *gradients

    return run


def _lowering(
    backend: KernelBackend, name: str, kernel: Callable, formula: Callable, collectives: Collectives
) -> Callable:
    def merging(call: Call, names, collectives: Collectives, *operands):
        if names and (not backend.merges_shards or call.plan.quantize is not None):
            return formula(*operands, call=call.over(names))
        return kernel(call, names, collectives, *operands)

    sharded = partitioned(name, backend.platform, merging, collectives)

    def rule(context, *operands, call: Call):
        check_platform(context, call)
        module = context.module_context
        where = module.axis_context
        manual = getattr(where, "manual_axes", frozenset())
        alone = bool(manual) or devices_of(where) == 1
        possible = alone or (backend.partitions and can_partition())
        if not possible and backend is BACKENDS.get(call.plan.backend or ""):
            raise ValueError(
                f"implementation={call.plan.backend!r} cannot be split over devices by jit. Call the norm inside "
                "jax.shard_map, which hands every device its own rows, or write implementation=None."
            )
        # A program for other processes, and one that is manual over some mesh axes only, are XLA's.
        by_default = (
            not getattr(module.lowering_parameters, "for_export", False)
            and not (manual and set(manual) != set(where.mesh.axis_names))
            and possible
            and call.plan.backend is None
            and is_active(backend)
        )
        kinds = [without_vma(kind) for kind in context.avals_in]
        takes = backend.takes_masks or call.masks_rows(kinds)
        if not takes or not backend.runs(call, kinds, by_default):
            run = functools.partial(formula, call=call if backend.platform == "cpu" else by_devices(context, call))
        elif alone:
            run, kinds = functools.partial(kernel, call, (), collectives), [without_sharding(kind) for kind in kinds]
        else:
            return sharded(context, *operands, call=call)
        return mlir.lower_fun(run, multiple_results=True)(context.replace(avals_in=kinds), *operands)

    return rule


def check_platform(context, call: Call) -> None:
    """A backend that is named runs, or says that it cannot."""
    platforms = context.platforms or context.module_context.platforms
    backend = BACKENDS.get(call.plan.backend or "")
    if backend is not None and any(p != backend.platform for p in platforms):
        raise ValueError(
            f"implementation={call.plan.backend!r} runs on {backend.platform.upper()}, and this program is for "
            f"{', '.join(platforms)}. Write implementation=None for the best backend of each platform."
        )


def devices_of(where) -> int:
    """The number of devices among which jit partitions a program lowered in this context."""
    return getattr(where, "num_devices", None) or 1


def by_devices(context, call: Call) -> Call:
    """The call with its statistics in a part for each device, where jit is to partition the program among several."""
    where, reduction = context.module_context.axis_context, call.plan.reduction
    devices, x = devices_of(where), context.avals_in[0]
    if getattr(where, "manual_axes", ()) or not (reduction.one_pass and 0 in reduction.axes) or x.shape[0] % devices:
        return call
    return replace(call, plan=replace(call.plan, reduction=replace(reduction, num_shards=devices)))
