"""Channels in groups: how many, and the view that has an axis for the groups."""

from __future__ import annotations

import math

import jax

from .dtypes import are_static
from .messages import shown, to_python
from .vma import mesh_axes_of

Array = jax.Array


def split_channels(a: Array, shape: tuple[int, ...], channel: int, groups: int) -> Array:
    """a, which broadcasts to x of this shape, with the channel axis split into groups and the channels of a group."""
    split = (1, 1) if a.shape[channel] == 1 != shape[channel] else (groups, shape[channel] // max(groups, 1))
    return a.reshape(a.shape[:channel] + split + a.shape[channel + 1 :])


def spans_devices(x: Array, channel: int, groups: int) -> bool:
    """Whether a group of channels is on several devices of an Explicit mesh. Its types cannot express such a split."""
    sharding = jax.typeof(x).sharding
    return bool(groups % math.prod(sharding.mesh.shape[name] for name in mesh_axes_of(sharding.spec[channel])))


def canonicalize_group_count(
    norm: str, channels: int, num_groups: int | None, group_size: int | None, shape: tuple[int, ...] = ()
) -> int:
    """The number of groups, from it or from their size. `shape` is x's, where it is known."""
    num_groups, group_size = to_python(num_groups), to_python(group_size)
    if (num_groups is None) == (group_size is None):
        raise ValueError(
            f"{norm}: give one of num_groups and group_size, got num_groups={shown(num_groups)} and "
            f"group_size={shown(group_size)}. Write num_groups=32."
        )
    name, number = ("num_groups", num_groups) if group_size is None else ("group_size", group_size)
    if not are_static(channels) and (not isinstance(number, int) or number <= 0 or channels % number != 0):
        raise ValueError(
            f"{norm}: {name}={number} must divide the symbolic number of channels {channels}, whatever its value. "
            f'Write jax.export.symbolic_shape("{number}*c") for that size.'
        )
    if not isinstance(number, int) or number <= 0 or channels % number:
        divisors = [d for d in range(1, channels + 1) if channels % d == 0]
        near = min(divisors, key=lambda d: abs(d - number)) if isinstance(number, int) and divisors else 1
        write = f"{name}={near}"
        if isinstance(number, int) and number > 1 and len(shape) > 2 and shape[1] % number == 0:  # channels first
            write += f", or axis=1, where x {shape} has {shape[1]}"
        raise ValueError(f"{norm}: {name}={shown(number)} does not divide the {channels} channels of x. Write {write}.")
    return number if group_size is None else channels // number
