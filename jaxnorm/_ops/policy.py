"""How running statistics are updated (`EMA`, `Cumulative`) and which devices share a statistic (`Devices`).

The flat keywords of `batch_norm` (momentum, zero_debias, axis_name, sync, ...) are the drop-in spelling of the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from .._core.checks import (
    canonicalize_flags,
    canonicalize_min_count,
    canonicalize_number,
    check_axis_name,
    check_momentum,
)
from .._core.messages import shown, to_python
from .sharing import Sync, canonicalize_sync

Array = jax.Array


@dataclass(frozen=True, kw_only=True)
class EMA:
    """Running statistics as an exponential moving average: running = momentum * running + (1 - momentum) * batch.

    Args:
      momentum: the weight of the old statistics, from 0 to 1: a number, or a scalar array such as a schedule computes.
      debias: correct for the start, as Adam does: after t updates the weights sum to 1, with nothing of the initial
        values (needs `state.count`).
      unbiased: the running variance takes m2 / (n - 1), as torch does, in place of m2 / n.
      min_count: a channel with fewer elements than this leaves its statistics as they were.
      skip_nonfinite: so does a channel whose batch statistics are not finite.

    Raises:
      ValueError: a momentum outside 0 to 1, or a negative min_count.

    >>> import jaxnorm as jn
    >>> jn.BatchNorm(running=jn.EMA(momentum=0.9, debias=True)).init(1)[1].count.tolist()
    [0.0]
    """

    momentum: float | Array = 0.99
    debias: bool = False
    unbiased: bool = False
    min_count: float | None = None
    skip_nonfinite: bool = False

    def __post_init__(self) -> None:
        if self.momentum is None:
            raise ValueError("EMA: momentum must be a number from 0 to 1, got None. Write jaxnorm.Cumulative().")
        _check("EMA", self)

    @property
    def needs_count(self) -> bool:
        return self.debias


@dataclass(frozen=True, kw_only=True)
class Cumulative:
    """Running statistics as the exact statistics of all elements seen so far (they need `state.count`).

    Args:
      unbiased: the running variance takes m2 / (n - 1), as torch does, in place of m2 / n.
      min_count: a channel with fewer elements than this leaves its statistics as they were.
      skip_nonfinite: so does a channel whose batch statistics are not finite.

    >>> import jaxnorm as jn, numpy as np
    >>> state = jn.BatchNorm(running=jn.Cumulative()).init(1)[1]
    >>> jn.update_state(state, jn.moments(np.array([[1.], [3.]]), 0), running=jn.Cumulative()).mean.tolist()
    [2.0]
    """

    unbiased: bool = False
    min_count: float | None = None
    skip_nonfinite: bool = False
    momentum: ClassVar[None] = None
    debias: ClassVar[bool] = False
    needs_count: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check("Cumulative", self)


@dataclass(frozen=True)
class Devices:
    """Which devices share a statistic: those along the named axes, all together or in groups.

    Args:
      axis_name: the mapped axis, or axes, of pmap, shard_map or vmap; under jit the mesh axes that shard the batch.
      groups: None: all devices share. An int n: groups of n neighbours, 1 for each device on its own; with several axes
        the last runs fastest. Or lists of indices along axis_name. Running statistics always use all devices.

    Raises:
      ValueError: groups that are neither.

    >>> import jaxnorm as jn
    >>> jn.BatchNorm(share=jn.Devices("data", groups=8)).share.groups
    8
    """

    axis_name: str | tuple[str, ...]
    groups: int | Sequence[Sequence[int]] | None = None

    def __post_init__(self) -> None:
        check_axis_name("Devices", self.axis_name)
        if self.axis_name is None:
            raise ValueError('Devices: axis_name must name an axis, got None. Write Devices("data").')
        for name in ("axis_name", "groups"):
            object.__setattr__(self, name, to_python(getattr(self, name)))
        if self.groups is not None:
            canonicalize_sync("Devices", self.groups, self.axis_name, None, None)


@dataclass(frozen=True)
class Ramp:
    """A schedule: a number that is `first` for `begin` updates, and moves along a line to `last` at update `end`.

    Args:
      first: the value while count <= begin.
      last: the value from count >= end on.
      begin: the count of updates where it starts to move.
      end: the count where it stops. The same as `begin` is a step there.

    Raises:
      ValueError: one of them is no finite number, or end < begin.

    >>> import jaxnorm as jn
    >>> r_max = jn.Ramp(1.0, 3.0, begin=5_000, end=40_000)
    >>> [float(r_max(count)) for count in (0, 22_500, 50_000)]
    [1.0, 2.0, 3.0]
    """

    first: float
    last: float
    begin: float
    end: float

    def __post_init__(self) -> None:
        for name in ("first", "last", "begin", "end"):
            object.__setattr__(self, name, canonicalize_number("Ramp", name, getattr(self, name), "0.0"))
        if self.end < self.begin:
            raise ValueError(f"Ramp: end={self.end:g} is before begin={self.begin:g}. Write begin={self.end:g}.")

    def __call__(self, count: Any) -> Array:
        count = jnp.asarray(count, jnp.float32)
        if self.begin == self.end:
            return jnp.where(count >= self.end, jnp.float32(self.last), jnp.float32(self.first))
        share = jnp.clip((count - self.begin) / (self.end - self.begin), 0.0, 1.0)
        return self.first + (self.last - self.first) * share


Schedule = float | Callable[[Any], Any]  # a number, or a function of the count of updates


def check_schedule(norm: str, what: str, value: Any, least: float) -> Schedule:
    """A schedule, whose number is at least that; what a function returns is not known before it runs."""
    if callable(value):
        return value
    return canonicalize_number(norm, what, value, f"{least}, or jaxnorm.Ramp({least}, 3.0, 5000, 40000)", least)


def scheduled(value: Schedule, count: Any) -> Array:
    """The value at each count, in its dtype and shape."""
    given = value(count) if callable(value) else value
    return jnp.broadcast_to(jnp.asarray(given).astype(count.dtype), count.shape)


Running = EMA | Cumulative
_RUNNING = {  # the flat keyword: the field
    "momentum": "momentum",
    "zero_debias": "debias",
    "unbiased_running_var": "unbiased",
    "min_count": "min_count",
    "skip_nonfinite": "skip_nonfinite",
}


def running_policy(norm: str, running: Running | None, **flat: Any) -> Running:
    """The policy, given as an object or by the flat keywords of `batch_norm`, of which `flat` holds all."""
    if running is None:
        try:
            return _known(norm, tuple(flat), *flat.values())
        except TypeError as error:
            if "unhashable" not in str(error):  # as an array is
                raise
        return _known.__wrapped__(norm, tuple(flat), *flat.values())
    if not isinstance(running, EMA | Cumulative):
        raise TypeError(
            f"{norm}: running must be jaxnorm.EMA(...) or jaxnorm.Cumulative(), got {shown(running)}. "
            "Write running=jaxnorm.EMA(momentum=0.99)."
        )
    for name, value in flat.items():
        default = getattr(EMA(), _RUNNING[name])
        if value is not default and not (isinstance(value, int | float) and value == default):
            raise ValueError(
                f"{norm}: running={shown(running)} and {name}={shown(value)} both say how running statistics are "
                f"updated. Write running=jaxnorm.EMA({_RUNNING[name]}={shown(value)}) alone."
            )
    return running


def counting_policy(norm: str, running: Running | None, flat: dict[str, Any]) -> Running:
    """`running_policy` of a norm whose `state.count` is that of updates, which schedules are functions of."""
    policy = running_policy(norm, running, **flat, unbiased_running_var=False)
    if policy.momentum is None:
        raise ValueError(
            f"{norm}: its count is that of updates, and cumulative statistics need that of elements; got momentum=None."
            " Write momentum=0.99."
        )
    return policy


def sharing_policy(
    norm: str, share: Devices | None, axis_name: Any, axis_index_groups: Any, sync: Any, virtual_batch_size: int | None
) -> tuple[Any, Sync]:
    """The axis names and what `sync` is along them, given as `Devices` or by the flat keywords of `batch_norm`."""
    if share is None:
        return axis_name, canonicalize_sync(norm, sync, axis_name, axis_index_groups, virtual_batch_size)
    if not isinstance(share, Devices):
        raise TypeError(
            f'{norm}: share must be jaxnorm.Devices, got {shown(share)}. Write share=jaxnorm.Devices("data").'
        )
    if axis_name is not None or axis_index_groups is not None or sync != "global":
        raise ValueError(
            f"{norm}: share and axis_name, axis_index_groups or sync both say which devices share statistics. Write "
            f"share=jaxnorm.Devices({shown(share.axis_name)}, groups={shown(share.groups)}) alone."
        )
    groups = "global" if share.groups is None else "local" if share.groups == 1 else share.groups
    return share.axis_name, canonicalize_sync(norm, groups, share.axis_name, None, virtual_batch_size)


def _check(name: str, policy: Any) -> None:
    """Check the fields, and bring them to one spelling."""
    check_momentum(name, policy.momentum)
    values = {"unbiased": policy.unbiased, "skip_nonfinite": policy.skip_nonfinite}
    values |= {"debias": policy.debias} if name == "EMA" else {}
    for field, value in zip(values, canonicalize_flags(name, **values), strict=True):
        object.__setattr__(policy, field, value)
    object.__setattr__(policy, "min_count", canonicalize_min_count(name, policy.min_count))


@functools.lru_cache(maxsize=1024, typed=True)
def _known(norm: str, names: tuple[str, ...], *values: Any) -> Running:
    """The policy of flat keywords, made once where they are hashable. Messages name these keywords."""
    flat = dict(zip(names, values, strict=True))
    check_momentum(norm, flat["momentum"])
    flat["min_count"] = canonicalize_min_count(norm, flat["min_count"])
    flags = {name: flat[name] for name in ("zero_debias", "unbiased_running_var", "skip_nonfinite")}
    flat |= dict(zip(flags, canonicalize_flags(norm, **flags), strict=True))
    cumulative = flat["momentum"] is None
    policy = object.__new__(Cumulative if cumulative else EMA)
    for name, field in _RUNNING.items():
        if not (cumulative and field in ("momentum", "debias")):
            object.__setattr__(policy, field, flat[name])
    return policy
