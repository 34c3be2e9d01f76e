"""Statistics of all that was ever seen: of any number of elements, in float32, without the loss of a long sum.

`merge` adds sums of squares and counts, which stop growing at 2**24 times what is added. Here each statistic is a pair
of numbers, and an update adds to it what the new elements change, which is their share of the difference. The rounding
errors of such updates are shares too, so that they come to a few units in the last place after any number of updates.

Legend: statistics have the feature shape. The shift of a mean and its low part are those of `Statistics`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from .._core.arithmetic import nonzero_divisor, prescales
from .._core.collectives import merge_over_devices
from .._core.dtypes import widest
from .._core.exported import exported
from .._core.masks import finite_padding
from .._core.mesh import active_axis_names, explain_unbound_axis
from .._core.over import Axes, Over
from .._core.types import AxisName, Features, Moments, Reduction, Statistics
from .._core.vma import broadcast_like, with_sharding_of
from .plan import make_plan
from .statistics import statistics

Array = jax.Array


@exported
class SeenStats(NamedTuple):
    """Count, mean and deviation of all that was seen. Each is the sum of two numbers: float32, and what it rounds off.

    `count`, `mean` and `std` alone are the statistics, rounded.

    >>> from jaxnorm import inputs
    >>> inputs.SeenStats.of([0.485, 0.456], [0.229, 0.224]).mean.shape
    (2,)
    """

    count: Array  # feature shape, float32: elements seen
    mean: Array  # the same
    std: Array  # the same: the root of the biased variance
    count_low: Array  # the same: what is added to each
    mean_low: Array
    std_low: Array

    @property
    def var(self) -> Array:
        """The biased variance. It has the range of float32, which `std` has twice over."""
        return jnp.square(self.std)

    @property
    def moments(self) -> Moments:
        """The same as `jaxnorm.Moments`, rounded to float32."""
        return Moments(self.count, self.mean, self.var * self.count)

    def merge(self, other: SeenStats) -> SeenStats:
        """The statistics of both together, such as of two workers that each have seen data of their own."""
        return join(self, other)

    @classmethod
    def of(cls, mean: ArrayLike, std: ArrayLike, count: ArrayLike = 0.0, dtype: DTypeLike = jnp.float32) -> SeenStats:
        """Statistics that are known, such as those that a data set is published with. For a count of 0 any data that
        is seen later takes their place."""
        mean, std, count = (jnp.asarray(a, dtype) for a in (mean, std, count))
        shape = jnp.broadcast_shapes(mean.shape, std.shape, count.shape)
        zero = jnp.zeros(shape, dtype)
        count, mean, std = (jnp.broadcast_to(a, shape) for a in (count, mean, std))
        return cls(count, mean, std, zero, zero, zero)

    @classmethod
    def empty(cls, features: Features = (), count: float = 0.0, dtype: DTypeLike = jnp.float32) -> SeenStats:
        """Mean 0 and deviation 1, of nothing or as if of `count` elements."""
        shape = features if isinstance(features, tuple) else (features,)
        return cls.of(jnp.zeros(shape, dtype), jnp.ones(shape, dtype), count, dtype)


class Observed(NamedTuple):
    """What is to be seen: x, and where its elements count. The statistics of x have the shape `features`."""

    x: Array
    mask: Array | None
    over: Over
    features: tuple[int, ...]
    ids: Array | None = None  # of segments


def see(norm: str, parts: Sequence[Observed], axis_name: AxisName | None = None) -> list[SeenStats]:
    """The statistics of some arrays, over `axis_name`'s devices together: one all-reduce for all of them, up to 1 MiB.

    They are constants for autodiff.
    """
    names = active_axis_names(axis_name)
    local = [_local(p) for p in parts]
    if names and local:
        with explain_unbound_axis(norm, axis_name):
            local = _merged(local, names)
    return [_as_seen(s) for s in local]


def _local(p: Observed) -> Statistics:
    """The statistics of one device. In the place of m2 is its root, so that no square leaves the range of float32."""
    x = lax.stop_gradient(finite_padding(p.x, p.mask))
    reduction = make_plan(x, (), 0.0, 0.0, x.dtype, Reduction(p.over), None).reduction
    s = statistics(reduction, x, p.mask, None, p.ids)
    root = s.m2 if reduction.large_prescale is not None else jnp.sqrt(s.m2) / reduction.prescale
    whole = [broadcast_like(s.mean_hi, jnp.asarray(a)) for a in (s.count, s.mean_hi, s.mean_lo, root)]
    return Statistics(*(lax.squeeze(a, range(a.ndim - len(p.features))) for a in whole))


def _merged(local: list[Statistics], names: tuple[str, ...]) -> list[Statistics]:
    dtype = widest(*(s.mean_hi.dtype for s in local))
    joined = lambda parts: jnp.concatenate([a.astype(dtype).ravel() for a in parts])
    flat = Statistics(*(joined(field) for field in zip(*local, strict=True)))
    small, large = prescales(0.0, 1 << 20, jnp.float32)
    merged = merge_over_devices(flat, names, None, Reduction(Axes(()), prescale=small, large_prescale=large))
    ends = [0]
    for s in local:
        ends.append(ends[-1] + s.count.size)
    cut = lambda a, i: lax.slice_in_dim(a, ends[i], ends[i + 1]).reshape(local[i].count.shape)
    return [Statistics(*(cut(a, i).astype(s.mean_hi.dtype) for a in merged)) for i, s in enumerate(local)]


def _as_seen(s: Statistics) -> SeenStats:
    count, hi, lo, root = map(lax.stop_gradient, s)
    mean, low = _two_sum(hi, lo)
    std, zero = root / jnp.sqrt(nonzero_divisor(count)), jnp.zeros_like(count)
    return SeenStats(count, mean, std, zero, low, zero)


def join(
    old: SeenStats, new: SeenStats, *, least: Any = 0.0, part: Array | None = None, skip_nonfinite: bool = False
) -> SeenStats:
    """The statistics of both together, in old's dtype; old, to the bit, where new has seen nothing.

        count = n + n';   mean = mean + p d;   var = var + p (var' - var) + p (1 - p) d**2

    with p = n' / (n + n') and d = mean' - mean, which is `merge` in shares. Beyond Chan's formula p may be at `least` a
    number, for a moving average, or be given as `part`: then old weighs 1 - p.
    """
    acc = widest(old.mean.dtype, jnp.float32)
    new = SeenStats(*(with_sharding_of(o, n.astype(acc)) for o, n in zip(old, new, strict=True)))
    wide = SeenStats(*(a.astype(acc) for a in old))
    seen = new.count > 0
    if skip_nonfinite:
        seen &= jnp.isfinite(new.mean) & jnp.isfinite(new.std)
    count, count_low = _two_sum(wide.count, wide.count_low + new.count)
    if part is None:
        part = jnp.maximum(new.count / nonzero_divisor(count), jnp.asarray(least, acc))
    # About the statistics that weigh more: those keep their bits, and what changes them is small.
    less = part <= 0.5
    pick = lambda a, b: jnp.where(less, a, b)
    mean, low, std, std_low = (pick(a, b) for a, b in zip(_parts(wide), _parts(new), strict=True))
    other_mean, other_low, other_std, _ = (pick(b, a) for a, b in zip(_parts(wide), _parts(new), strict=True))
    p = jnp.minimum(part, 1.0 - part)
    gap = (other_mean - mean) + (other_low - low)
    mean, low = _two_sum(mean, low + p * gap)
    unit = nonzero_divisor(jnp.maximum(jnp.maximum(std, other_std), jnp.abs(gap)))  # squares stay in range
    a, b, d = std / unit, other_std / unit, gap / unit
    change = p * ((b - a) * (b + a) + (1.0 - p) * jnp.square(d))
    after = jnp.sqrt(jnp.maximum(jnp.square(a) + change, 0.0))
    std, std_low = _two_sum(std, std_low + unit * (change / nonzero_divisor(after + a)))
    joined = SeenStats(count, mean, std, count_low, low, std_low)
    return SeenStats(
        *(lax.stop_gradient(jnp.where(seen, n.astype(o.dtype), o)) for n, o in zip(joined, old, strict=True))
    )


def _parts(s: SeenStats) -> tuple[Array, Array, Array, Array]:
    return s.mean, s.mean_low, s.std, s.std_low


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b, rounded, and the rounding error. Knuth, "The Art of Computer Programming", volume 2, theorem 4.2.2 B."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)
