"""Returns normalized by the distance of two of their percentiles."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from .._core.arrays import align_boolean_mask, as_float_array
from .._core.checks import canonicalize_flags, canonicalize_number, check_momentum
from .._core.collectives import gather_over_devices
from .._core.dtypes import accumulator
from .._core.explain import explained
from .._core.exported import exported
from .._core.masks import finite_padding
from .._core.mesh import active_axis_names, explain_unbound_axis
from .._core.messages import shown
from .._core.types import AxisName, Moments, RunningStats
from .._core.vma import by_jit
from .._norms.base import NoParams
from .._norms.declare import function_of, spec
from .._ops.policy import EMA
from .._ops.running import update_and_count
from .._ops.seen import SeenStats
from .base import GatherSpec, Standardized, if_training, refuse_params
from .trees import Leaf, mapped

Array = jax.Array


@exported
class PercentileState(NamedTuple):
    """The state of `percentile_norm`."""

    low: Array  # (), float32: the moving average of the lower percentile
    high: Array  # the same of the upper one
    count: Array  # (), float32: updates


@spec
class PercentileNorm(GatherSpec):
    """The hyperparameters of `percentile_norm`. It has no parameters.

    `PercentileNorm.like("dreamerv3")` has its numbers for returns, which are the defaults, and
    `like("dreamerv3_debiased")` those that it has elsewhere.

    Args:
      percentiles: the lower and the upper one, from 0 to 100.
      momentum: the weight of the old averages, from 0 to 1.
      floor: the least distance, so that small returns are not blown up.
      zero_debias: correct the averages for their start at 0, as Adam does. Without it they grow towards the first
        percentiles, and with a floor the first updates divide by that.
      dtype: of the output; None is x's.

    >>> from jaxnorm import inputs
    >>> import numpy as np
    >>> norm = inputs.PercentileNorm(momentum=0.)
    >>> params, state = norm.init()
    >>> y, state = norm.apply(params, state, np.arange(101.), train=True)
    >>> float(state.low), float(state.high), y.max().tolist()
    (5.0, 95.0, 1.1111111640930176)
    """

    LIKE: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "dreamerv3": dict(percentiles=(5.0, 95.0), momentum=0.99, floor=1.0, zero_debias=False),
        "dreamerv3_debiased": dict(percentiles=(5.0, 95.0), momentum=0.99, floor=1e-8, zero_debias=True),
    }

    percentiles: Sequence[float] = (5.0, 95.0)
    momentum: float = 0.99
    floor: float = 1.0
    zero_debias: bool = False
    dtype: DTypeLike | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("PercentileNorm", self.percentiles, self.momentum, self.floor)

    @explained("init")
    def init(self, features: tuple[()] = ()) -> tuple[NoParams, PercentileState]:
        """No parameters, and averages of 0. There is one state, whatever the shape of the returns."""
        zero = jnp.zeros((), jnp.float32)
        return NoParams(), PercentileState(zero, zero, zero)

    @explained("apply")
    def apply(
        self, params: Any, state: PercentileState, x: ArrayLike, *, returns: ArrayLike | None = None,
        train: Any = None, mask: ArrayLike | None = None,
    ) -> tuple[Array, PercentileState]:  # fmt: skip
        """x over the distance, and the new state. `train=True` updates it first; `train=False` leaves it frozen."""
        refuse_params("PercentileNorm.apply", params)
        return percentile_norm(x, state, returns, train=train, mask=mask, **self.options())

    def update(self, state: PercentileState, returns: ArrayLike, *, mask: ArrayLike | None = None) -> PercentileState:
        """The state after these returns."""
        return percentile_norm(returns, state, train=True, mask=mask, **self.options())[1]

    def scale(self, state: PercentileState) -> Array:
        """What x is divided by."""
        return _scale(state, self.floor)


def _check(norm: str, percentiles: Any, momentum: Any, floor: Any) -> None:
    two = isinstance(percentiles, tuple | list) and len(percentiles) == 2
    if not two or not all(isinstance(q, int | float) for q in percentiles):
        raise ValueError(f"{norm}: percentiles must be two numbers, got {shown(percentiles)}. Write (5.0, 95.0).")
    if not 0 <= percentiles[0] < percentiles[1] <= 100:
        raise ValueError(
            f"{norm}: percentiles must rise, and be from 0 to 100; got {shown(percentiles)}. Write (5.0, 95.0)."
        )
    check_momentum(norm, momentum)
    if momentum is None:
        raise ValueError(f"{norm}: momentum must be a number from 0 to 1, got None. Write momentum=0.99.")
    if canonicalize_number(norm, "floor", floor, "1.0", least=0.0) == 0.0:
        raise ValueError(f"{norm}: floor=0 would divide by 0 where all returns are equal. Write floor=1e-8.")


def _state(norm: str, state: Any) -> PercentileState:
    if isinstance(state, Mapping) and {*state} == {*PercentileState._fields}:
        state = PercentileState(**state)
    if not isinstance(state, PercentileState):
        raise TypeError(
            f"{norm}: state must be a PercentileState, got {shown(state)}. Write params, state = norm.init()."
        )
    return PercentileState(*map(jnp.asarray, state))


def _scale(state: PercentileState, floor: float) -> Array:
    return lax.stop_gradient(jnp.maximum(state.high - state.low, floor))


@function_of(PercentileNorm)
def percentile_norm(
    x: ArrayLike,
    state: PercentileState,
    returns: ArrayLike | None = None,
    *,
    train: Any,
    percentiles, momentum, floor, zero_debias, skip_nonfinite, axis_name, dtype,
    mask: ArrayLike | None = None,
) -> tuple[Array, PercentileState]:  # fmt: skip
    """Divide by the distance between two percentiles of the returns. Nothing is subtracted.

        low, high = moving averages of the 5th and the 95th percentile of the returns
        y = x / max(floor, high - low)

    Outliers of returns do not change the distance, and small returns stay small. In an actor's loss x are advantages,
    which are divided by the distance of the returns. The distance is a constant for autodiff.

    Args:
      x: what is divided, of any shape.
      state: see `PercentileNorm.init`.
      returns: what the percentiles are of; None is x.
      train: True updates the state first; False divides by the state as it is. It may be traced.
      mask: True where a return counts. Broadcasts to the returns, or covers their leading axes.
      axis_name: the mapped axis, or axes, of pmap or shard_map whose devices share the percentiles. Percentiles need
        all values, so the returns of all devices are brought together, in one all-reduce.

    Returns:
      An array of x's shape, and the new state. If no return counts, the old one. Percentiles are interpolated, as
      `numpy.percentile` does.

    Raises:
      ValueError: a bad option; a mask that fits the returns nowhere.
      TypeError: a state that is none.
      NameError: axis_name is not bound here.

    Used by DreamerV3.

    Source: Hafner et al., "Mastering Diverse Domains through World Models" (2023), arXiv:2301.04104.

    >>> from jaxnorm import inputs
    >>> import numpy as np
    >>> returns, state = np.linspace(0., 1000., 101), inputs.PercentileNorm().init()[1]
    >>> for _ in range(3):
    ...     y, state = inputs.percentile_norm(np.array([27.]), state, returns, train=True)
    >>> float(state.high - state.low), bool(y[0] > 1)
    (26.730899810791016, True)
    """
    norm = "percentile_norm"
    _check(norm, percentiles, momentum, floor)
    (debias,) = canonicalize_flags(norm, zero_debias=zero_debias)
    x, state = as_float_array(norm, x), _state(norm, state)
    r = x if returns is None else as_float_array(norm, returns, what="returns")
    if jnp.iscomplexobj(x) or jnp.iscomplexobj(r):
        raise TypeError(f"{norm}: x and returns must be real, got {x.dtype} and {r.dtype}. Write x.real.")
    r, keep = align_boolean_mask(norm, lax.stop_gradient(r), mask)
    r = finite_padding(r, keep)

    def update() -> PercentileState:
        with explain_unbound_axis(norm, axis_name):
            found, n = _percentiles(r, keep, tuple(percentiles), axis_name)
        old = RunningStats(jnp.stack([state.low, state.high]), jnp.ones(2), jnp.stack([state.count, state.count]))
        batch = Moments(jnp.broadcast_to(n, (2,)), found, jnp.zeros_like(found))
        policy = EMA(momentum=momentum, debias=debias, skip_nonfinite=skip_nonfinite)
        new = update_and_count(old, batch, policy)
        counted: Any = new.count
        return PercentileState(new.mean[0], new.mean[1], counted[0])

    state = if_training(norm, train, state, update)
    scale = _scale(state, floor)
    zero = jnp.zeros_like(scale)
    as_std = SeenStats(zero, zero, scale, zero, zero, zero)
    leaf = Leaf(norm, x, as_std, mask if returns is None else None)
    return mapped(Standardized(0.0, "max", centered=False), leaf, dtype), state


def _percentiles(
    x: Array, keep: Array | None, qs: tuple[float, ...], axis_name: AxisName | None
) -> tuple[Array, Array]:
    """Percentiles of the valid elements, and their number."""
    names, x = active_axis_names(axis_name), x.astype(accumulator(x))
    if names and keep is None:
        (x,) = gather_over_devices([x], names)
    elif names and keep is not None:
        x, here = gather_over_devices([jnp.where(keep, x, 0.0), jnp.broadcast_to(keep, x.shape).astype(x.dtype)], names)
        keep = here > 0
    args = (x,) if keep is None else (x, keep)
    found = by_jit(functools.partial(_sorted_percentiles, qs), (None,), *args)
    return found[:-1], found[-1]


def _sorted_percentiles(qs: tuple[float, ...], x: Array, keep: Array | None = None) -> Array:
    """Percentiles, and the number of valid elements behind them."""
    keep = None if keep is None else jnp.broadcast_to(keep, x.shape).ravel()
    x = x.ravel()
    n = jnp.asarray(x.size, jnp.int32) if keep is None else keep.sum(dtype=jnp.int32)
    if x.size == 0:
        return jnp.zeros(len(qs) + 1, x.dtype)
    undefined = jnp.isnan(x if keep is None else jnp.where(keep, x, 0.0)).any()
    x = jnp.sort(x if keep is None else jnp.where(keep, x, jnp.inf))
    last = jnp.maximum(n - 1, 0)
    found = []
    for q in qs:
        if keep is None:
            place = q / 100 * (x.size - 1)
            at, share = jnp.asarray(math.floor(place), jnp.int32), jnp.asarray(place - math.floor(place), x.dtype)
        else:
            place = (q * last.astype(x.dtype)) / 100.0
            at, share = jnp.floor(place).astype(jnp.int32), place - jnp.floor(place)
        low, high = x[jnp.minimum(at, last)], x[jnp.minimum(at + 1, last)]
        found.append(jnp.where(undefined, jnp.nan, jnp.where(share == 0, low, low + share * (high - low))))
    return jnp.stack([*found, n.astype(x.dtype)])
