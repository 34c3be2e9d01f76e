"""The kernel backends beside XLA: what each provides, and how a call that one supports is lowered to it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from jax.extend.core import Primitive
from jax.interpreters import mlir

from .._core.dtypes import accumulator, are_static, widest
from .._core.over import Axes
from .._core.types import Reduction
from .._core.vma import without_sharding, without_vma
from . import cpu
from .call import Call, varying_axes
from .cpu import adapter as native
from .pallas import adapter as mosaic
from .partition import Collectives, can_partition, partitioned


class KernelBackend(NamedTuple):
    """What a kernel backend answers, and does."""

    platform: str  # as JAX calls it
    unavailable_reason: Callable[[], str | None]  # why it is not on this machine
    unsupported_reason: (
        Callable  # (x, how, dtype, varying axes of parameters) -> why it does not take them, or None. As traced
    )
    supports: Callable  # (call, operands, by default) -> bool. As lowered, of the part of one device
    forward: Callable  # (call, mesh axes that reduced ones are spread over, Across, *operands) -> y, statistics, stream
    backward: Callable  # the same -> dx, gradients of scale and bias
    merges_shards: bool = False  # whether those two know what to do about such mesh axes
    partitions: bool = True  # whether jit can split them over devices: libtpu has no custom_partitioning
    fuses_add: bool = False  # whether they also add to a residual stream what they normalize; others get the sum


def _mosaic(platform: str, module: str, partitions: bool) -> KernelBackend:
    of = lambda f: functools.partial(f, module)
    return KernelBackend(
        platform, of(mosaic.unavailable_reason), of(mosaic.unsupported_reason), of(mosaic.supports),
        of(mosaic.forward), of(mosaic.backward), partitions=partitions, fuses_add=True,
    )  # fmt: skip


BACKENDS = {
    "native": KernelBackend(
        "cpu", lambda: None if cpu.library().loaded else cpu.library().reason, cpu.unsupported_reason,
        native.supports, native.forward, native.backward, merges_shards=True,
    ),
    "mosaic_gpu": _mosaic("cuda", "mosaic_gpu", partitions=True),
    "mosaic_tpu": _mosaic("tpu", "mosaic_tpu", partitions=False),
}  # fmt: skip
DEFAULT = "native"  # the backend of implementation=None: on its platform it has been measured to win, others have not


def unsupported_reason(name: str, x, reduction: Reduction, dtype, scale, bias, mask, weights) -> str | None:
    """Why a backend does not take this norm, or None if it does. Of shapes and dtypes alone."""
    backend = BACKENDS[name]
    if (reason := backend.unavailable_reason()) is not None:
        return reason
    if not are_static(*x.shape):
        return f"x has symbolic sizes {x.shape}, as in jax.export"
    if not isinstance(reduction.over, Axes):
        return "statistics of segments are XLA's"
    if mask is not None or weights is not None:
        return "masks and weights are XLA's"
    if reduction.axis_name is not None:
        return "statistics over an axis name are merged by XLA"
    for p in (scale, bias):
        if p is not None and widest(p.dtype, accumulator(x)) != accumulator(x):
            return f"a parameter of {p.dtype} is wider than the arithmetic for {x.dtype}"
    return backend.unsupported_reason(x, reduction, dtype, varying_axes(scale, bias))


def fuses_add(name: str | None) -> bool:
    return name in BACKENDS and BACKENDS[name].fuses_add


def register(primitive: Primitive, kernel: str, formula: Callable, collectives: Collectives) -> None:
    """Lower `primitive` to the `kernel` ("forward" or "backward") of a backend that supports it, else to `formula`."""
    for name, backend in BACKENDS.items():
        if backend.platform != "cpu" or backend.unavailable_reason() is None:
            rule = _lowering(backend, f"{name} {kernel}", getattr(backend, kernel), formula, collectives)
            mlir.register_lowering(primitive, rule, platform=backend.platform)


def _lowering(
    backend: KernelBackend, name: str, kernel: Callable, formula: Callable, collectives: Collectives
) -> Callable:
    def merging(call: Call, names, collectives: Collectives, *operands):
        if names and not backend.merges_shards:
            return formula(*operands, call=call.over(names))
        return kernel(call, names, collectives, *operands)

    sharded = partitioned(name, backend.platform, merging, collectives)

    def rule(context, *operands, call: Call):
        check_platform(context, call)
        module = context.module_context
        where = module.axis_context
        manual = getattr(where, "manual_axes", frozenset())
        alone = bool(manual) or devices_of(where) == 1
        runs = alone or (backend.partitions and can_partition())
        if not runs and backend is BACKENDS.get(call.plan.backend or ""):
            raise ValueError(
                f"implementation={call.plan.backend!r} cannot be split over devices by jit. Call the norm inside "
                "jax.shard_map, which hands every device its own rows, or write implementation=None."
            )
        # A program for other processes, and one that is manual over some mesh axes only, are XLA's.
        by_default = (
            not getattr(module.lowering_parameters, "for_export", False)
            and not (manual and set(manual) != set(where.mesh.axis_names))
            and runs
        )
        kinds = [without_vma(kind) for kind in context.avals_in]
        if not backend.supports(call, kinds, by_default):
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
