"""The data that modules exchange: what is reduced, the plan, statistics, parameters and states. No logic.

Legend: x is any shape. Statistics keep the reduced axes with size 1, so that everything broadcasts against x.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from .exported import exported
from .over import Over

Array = jax.Array


@dataclass(frozen=True)
class Reduction:
    """What is reduced, and how: everything static about the statistics."""

    over: Over  # the elements that share a statistic: see `over`
    centered: bool = True  # False: the mean is taken as zero (RMS norm)
    one_pass: bool = False  # True: read x once, about a sample mean: for columns, where passes are expensive
    prescale: float = 1.0  # squares are those of prescale * x; a power of two keeps their sum in range, and is exact
    large_prescale: float | None = None  # for values too large for `prescale`; None: one will do
    axis_name: str | tuple[str, ...] | None = None  # devices to merge over
    groups: tuple[tuple[int, ...], ...] | None = None  # ... in these groups of indices along axis_name
    num_shards: int = (
        1  # of the leading axis, each with statistics of its own: jit may spread them over as many devices
    )
    plain: bool = False  # lax operations alone, the same on every platform, for programs that read jaxprs

    @property
    def axes(self) -> tuple[int, ...]:
        return self.over.axes

    @property
    def prescales(self) -> tuple[float, ...]:
        return (self.prescale,) if self.large_prescale is None else (self.prescale, self.large_prescale)


@dataclass(frozen=True)
class Plan:
    """Everything static about normalizing: hashable, so that equal recipes share one trace."""

    reduction: Reduction
    epsilon: float
    scale_offset: float
    dtype: Any  # of the output
    cast_before_scale: bool = False
    backend: str | None = None  # of kernels: "xla", "native", or None for the best
    activation: Any = None  # f, a name or a function. A kernel backend never sees one: `standardize` puts it around
    for_backward: bool = (
        False  # the statistics are kept for a backward pass, and y may as well be made of the same ones
    )
    gate: str | None = None  # f(gate) multiplies "before" or "after" the norm; None: f is of the output
    within: bool = False  # this is the norm inside of an activation or a gate
    cast_dtype: Any = None  # what `cast_before_scale` rounds to; None: dtype
    statistics_first: bool = False  # by a barrier, so that each kernel that needs y makes it of x
    quantize: Any = None  # a format of `formats`, of a norm whose kernel quantizes; dtype is that of the plain output


class Statistics(NamedTuple):
    """Count, mean and second moment, the mean held as an unevaluated sum so that x - mean keeps its low bits."""

    count: Array  # float32, broadcasts against shift: how many elements, or the sum of their weights
    mean_hi: Array  # mean == mean_hi + mean_lo, |mean_lo| small beside the spread of x
    mean_lo: Array
    m2: Array  # real: the sum of |prescale * (x - mean)|**2; with two prescales the root of the sum of |x - mean|**2


AxisName = str | tuple[str, ...]


Groups = Sequence[Sequence[int]]


@exported
class Moments(NamedTuple):
    """Count, mean and second moment of a set of numbers. `merge` joins two; `Moments(0., 0., 0.)` is the identity."""

    count: Array  # float32, reduced: the number of elements, or the sum of their weights
    mean: Array  # float32 or wider, reduced: sum(w x) / count, and 0 where count is 0
    m2: Array  # float32 or wider, real, reduced: sum(w |x - mean|**2)

    @property
    def var(self) -> Array:
        """The variance m2 / count (the biased one), and 0 where nothing was counted."""
        return self.m2 / jnp.where(self.count == 0, 1.0, self.count)

    @classmethod
    def empty(cls, features: int | tuple[int, ...] = (), dtype: DTypeLike = jnp.float32) -> Moments:
        """The moments of nothing, of a feature shape: where gathering them starts. `dtype` is the mean's.

        >>> import jaxnorm as jn
        >>> jn.Moments.empty(2).count.tolist()
        [0.0, 0.0]
        """
        mean = jnp.zeros(features, dtype)
        return cls(mean.real, mean, mean.real)


@exported
class Affine(NamedTuple):
    """A scale and a bias, each of the feature shape or None. The `params` of every norm, and what a norm folds into."""

    scale: Array | None  # feature shape, any floating dtype
    bias: Array | None  # the same


Features = int | tuple[int, ...]


Params = Affine | Mapping[str, Any] | None  # what a norm takes as params: a dict as Flax has it, too


@exported
class RunningStats(NamedTuple):
    """The state of batch norm: statistics gathered over training, used at inference."""

    mean: Array  # feature shape, float32
    var: Array  # feature shape, float32
    count: Array | None = None  # feature shape, float32: elements or updates seen; None where the spec needs none


@exported
class WindowStats(NamedTuple):
    """What was taken out of a window: x = y * std + mean, but for the parameters of the norm."""

    mean: Array  # with x's rank, and size 1 along the axes of the window; float32 or wider
    std: Array  # the same, real
