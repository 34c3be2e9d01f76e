"""The rooms of kernels beside XLA's: what each is asked, and how a program is lowered to one where it takes a call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from jax.extend.core import Primitive
from jax.interpreters import mlir

from . import cpu, mosaic
from .call import Call, varying_axes
from .cpu import room as native
from .partition import Across, can_partition, partitioned
from .varying import unsharded, unvarying
from .xla import Reduction, accumulator, known, widest


class Room(NamedTuple):
    """What a room of kernels answers, and does."""

    platform: str  # as JAX calls it
    missing: Callable[[], str | None]  # why it is not on this machine
    refusal: Callable  # (x, how, dtype, varying axes of parameters) -> why it does not take them, or None. As traced
    takes: Callable  # (call, operands, by default) -> bool. As lowered, of the part of one device
    forward: Callable  # (call, mesh axes that reduced ones are spread over, Across, *operands) -> y, statistics, stream
    backward: Callable  # the same -> dx, gradients of scale and bias
    merges: bool = False  # whether those two know what to do about such mesh axes
    partitions: bool = True  # whether jit can split them over devices: libtpu has no custom_partitioning
    adds: bool = False  # whether they also add to a residual stream what they normalize; others get the sum


def _mosaic(platform: str, module: str, partitions: bool) -> Room:
    about = lambda f: functools.partial(f, module)
    return Room(
        platform, about(mosaic.missing), about(mosaic.refusal), about(mosaic.takes),
        about(mosaic.forward), about(mosaic.backward), partitions=partitions, adds=True,
    )  # fmt: skip


ROOMS = {
    "native": Room(
        "cpu", lambda: None if cpu.library().loaded else cpu.library().reason, cpu.refusal,
        native.takes, native.forward, native.backward, merges=True,
    ),
    "mosaic_gpu": _mosaic("cuda", "mosaic_gpu", partitions=True),
    "mosaic_tpu": _mosaic("tpu", "mosaic_tpu", partitions=False),
}  # fmt: skip
DEFAULT = "native"  # the room of implementation=None: on its platform it has been measured to win, others have not


def refusal(name: str, x, how: Reduction, dtype, scale, bias, mask, weights) -> str | None:
    """Why a room does not take this norm, or None if it does. Of shapes and dtypes alone."""
    room = ROOMS[name]
    if (missing := room.missing()) is not None:
        return missing
    if not known(*x.shape):
        return f"x has symbolic sizes {x.shape}, as in jax.export"
    if mask is not None or weights is not None:
        return "masks and weights are XLA's"
    if how.axis_name is not None:
        return "statistics over an axis name are merged by XLA"
    for p in (scale, bias):
        if p is not None and widest(p.dtype, accumulator(x)) != accumulator(x):
            return f"a parameter of {p.dtype} is wider than the arithmetic for {x.dtype}"
    return room.refusal(x, how, dtype, varying_axes(scale, bias))


def adds(name: str | None) -> bool:
    return name in ROOMS and ROOMS[name].adds


def register(primitive: Primitive, kernel: str, formula: Callable, across: Across) -> None:
    """Lower `primitive` to the `kernel` ("forward" or "backward") of each room that takes a call, else to `formula`."""
    for name, room in ROOMS.items():
        if room.platform != "cpu" or room.missing() is None:
            rule = _lowering(room, f"{name} {kernel}", getattr(room, kernel), formula, across)
            mlir.register_lowering(primitive, rule, platform=room.platform)


def _lowering(room: Room, name: str, kernel: Callable, formula: Callable, across: Across) -> Callable:
    def merging(call: Call, names, across: Across, *operands):
        if names and not room.merges:
            return formula(*operands, call=call.over(names))
        return kernel(call, names, across, *operands)

    sharded = partitioned(name, room.platform, merging, across)

    def rule(context, *operands, call: Call):
        check_platform(context, call)
        module = context.module_context
        where = module.axis_context
        manual = getattr(where, "manual_axes", frozenset())
        alone = bool(manual) or devices_of(where) == 1
        runs = alone or (room.partitions and can_partition())
        if not runs and room is ROOMS.get(call.recipe.room or ""):
            raise ValueError(
                f"implementation={call.recipe.room!r} cannot be split over devices by jit. Call the norm inside "
                "jax.shard_map, which hands every device its own rows, or write implementation=None."
            )
        # A program for other processes, and one that is manual over some mesh axes only, are XLA's.
        by_default = (
            not getattr(module.lowering_parameters, "for_export", False)
            and not (manual and set(manual) != set(where.mesh.axis_names))
            and runs
        )
        kinds = [unvarying(kind) for kind in context.avals_in]
        if not room.takes(call, kinds, by_default):
            run = functools.partial(formula, call=call if room.platform == "cpu" else by_devices(context, call))
        elif alone:
            run, kinds = functools.partial(kernel, call, (), across), [unsharded(kind) for kind in kinds]
        else:
            return sharded(context, *operands, call=call)
        return mlir.lower_fun(run, multiple_results=True)(context.replace(avals_in=kinds), *operands)

    return rule


def check_platform(context, call: Call) -> None:
    """A room that is named runs, or says that it cannot."""
    platforms = context.platforms or context.module_context.platforms
    room = ROOMS.get(call.recipe.room or "")
    if room is not None and any(p != room.platform for p in platforms):
        raise ValueError(
            f"implementation={call.recipe.room!r} runs on {room.platform.upper()}, and this program is for "
            f"{', '.join(platforms)}. Write implementation=None for the best room of each platform."
        )


def devices_of(where) -> int:
    """The number of devices among which jit partitions a program lowered in this context."""
    return getattr(where, "num_devices", None) or 1


def by_devices(context, call: Call) -> Call:
    """The call with its statistics in a part for each device, where jit is to partition the program among several."""
    where, how = context.module_context.axis_context, call.recipe.how
    devices, x = devices_of(where), context.avals_in[0]
    if getattr(where, "manual_axes", ()) or not (how.one_pass and 0 in how.axes) or x.shape[0] % devices:
        return call
    return replace(call, recipe=replace(call.recipe, how=replace(how, parts=devices)))
