"""Batch renormalization: batch norm, corrected toward the running statistics, for small or shifting batches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from .._core.arithmetic import nonzero_divisor
from .._core.arrays import as_float_array, canonicalize_axes
from .._core.explain import explained
from .._core.messages import shown
from .._core.types import Affine, Features, Moments, Params, RunningStats
from .._ops.batch import ByFormula, normalize_batch
from .._ops.elementwise import OfElements
from .._ops.normalize import as_affine
from .._ops.policy import EMA, Ramp, Running, check_schedule, counting_policy, scheduled
from .._ops.running import update_and_count
from .._ops.states import as_stats, is_stats
from .declare import S, as_params, function_of, refuse_params_as_state, spec
from .running import SharingOptions

Array = jax.Array
_RUNNING = ("momentum", "min_count", "skip_nonfinite", "zero_debias")


@spec
class BatchRenorm(SharingOptions):
    """The hyperparameters of `batch_renorm`. See `BatchNorm` for those that it has too.

    Args:
      axis: the channel axis, or axes, at any position.
      momentum: the weight of the old statistics: a number, or a scalar array such as a schedule computes.
      epsilon: added to the variance, in units of x squared; >= 0.
      r_max: the batch's deviation counts as at most this many times the running one, and at least that part of it. A
        number >= 1, or a function of the count of updates, such as `Ramp` or a schedule of optax, which maps an array
        of counts to one of its shape. The function is static: name it once, since a fresh lambda triggers retracing.
      d_max: the batch's mean counts as at most this many running deviations off. A number >= 0, or such a function.
      track: what the running average is of: "std", the deviation sqrt(var + epsilon), as in the paper and Keras; "var",
        the variance, as in sbx. `state.var` holds a variance either way.
      running: how the running statistics are updated, as one object: `EMA(...)`.
      virtual_batch_size: ghost batches of so many examples, each with its own statistics.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.BatchRenorm(r_max=1.0, d_max=1.0, epsilon=0.)
    >>> params, state = norm.init(1)
    >>> y, state = norm.apply(params, state, np.array([[1.], [3.]]), train=True)
    >>> y.round(3).tolist(), state.count.tolist()  # the batch's mean is 2: of those, 1 stays
    ([[0.0], [2.0]], [1.0])
    """

    axis: int | Sequence[int] = -1
    momentum: float | Array = 0.99
    epsilon: float = 1e-3
    r_max: float | Callable[[Any], Any] = Ramp(1.0, 3.0, 5_000.0, 40_000.0)
    d_max: float | Callable[[Any], Any] = Ramp(0.0, 5.0, 5_000.0, 25_000.0)
    track: str = "std"
    running: EMA | None = None
    virtual_batch_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._step()
        _check_limits("BatchRenorm", self.r_max, self.d_max)

    def _step(self) -> tuple[Running, Callable[..., RunningStats]]:
        flat = {name: getattr(self, name) for name in _RUNNING}
        return counting_policy("BatchRenorm", self.running, flat), _step_of("BatchRenorm", self.track, self.epsilon)

    if TYPE_CHECKING:

        def init(self, features: Features) -> tuple[Affine, RunningStats]: ...

    def init_state(self, shape: tuple[int, ...]) -> RunningStats:
        """Mean 0, variance 1 (with track="std" the deviation with epsilon is 1), and no updates."""
        var = max(1.0 - self.epsilon, 0.0) if self.track == "std" else 1.0
        return RunningStats(*(jnp.full(shape, first, jnp.float32) for first in (0.0, var, 0.0)))

    @explained("apply")
    def apply(
        self, params: Params, state: S, x: ArrayLike, *, train: Any = None, mask: Any = None, weights: Any = None,
        update_stats: bool = True,
    ) -> tuple[Array, S]:  # fmt: skip
        """The normalized x and the new state. Arguments as for `batch_renorm`; frozen, it needs no train."""
        refuse_params_as_state("BatchRenorm.apply", state)
        params = as_params("BatchRenorm.apply", params)
        call = dict(train=train, mask=mask, weights=weights, update_stats=update_stats)
        return batch_renorm(x, params, state, **call, **self.options())

    def as_affine(self, params: Params, state: RunningStats) -> Affine:
        """What the norm is at inference, but for an activation: y == x * affine.scale + affine.bias.

        >>> import jaxnorm as jn
        >>> norm = jn.BatchRenorm(epsilon=0.)
        >>> norm.as_affine(*norm.init(1)).scale.tolist()
        [1.0]
        """
        scale, bias = as_params("BatchRenorm.as_affine", params)
        if not is_stats(state) or "var" not in (stats := as_stats(state))._fields:
            raise TypeError(
                f"BatchRenorm.as_affine: state must be a jaxnorm.RunningStats, got {shown(state)}. Write "
                "norm.as_affine(params, state)."
            )
        return as_affine(stats.mean, stats.var, scale, bias, epsilon=self.epsilon, scale_offset=self.scale_offset)


@function_of(BatchRenorm)
def batch_renorm(
    x: ArrayLike,
    params: Params,
    state: S,
    *,
    train: Any,
    axis, momentum, epsilon, r_max, d_max, track, running, min_count, skip_nonfinite, zero_debias,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    update_stats: bool = True,
    **options,
) -> tuple[Array, S]:  # fmt: skip
    """Batch renormalization: in training, too, an output nearly that of inference, however small the batch.

        y = ((x - mean) / sqrt(var + epsilon) * r + d) * (scale + scale_offset) + bias
        r = clip(sqrt(var + epsilon) / D, 1 / r_max, r_max);   d = clip((mean - M) / D, -d_max, d_max)

    with mean and var of the batch, and the running mean M and deviation D as they were before this update. r and d are
    constants for derivatives. At inference y is that of `batch_norm`. r_max=1 and d_max=0 make it `batch_norm` in
    training too. The statistics are those of one all-reduce each way.

    Args:
      x: array of shape (N, ..., C), the channels at `axis`. Integers are promoted to float32.
      params: `Affine(scale, bias)`. Each is None or has shape (C,) or a shape that broadcasts against x.
      state: `RunningStats(mean, var, count)`, float32 (C,); `BatchRenorm(...).init(C)` makes one. `count` is the number
        of updates, and `RunningStats` of a batch norm do as well once they have one. A dict does too.
      mask: as for `batch_norm`.

    Returns:
      An array of x's shape, and the new state: its tree, shapes and dtypes are the old one's.

    Raises:
      ValueError: a bad axis, momentum, epsilon, r_max, d_max, track, backend or sync; a state without a count; params,
        state or mask that fit x nowhere.
      TypeError: a complex x; a dtype that cannot hold the result; `train` is not a bool.
      NameError: axis_name is not bound here.

    Warns:
      UserWarning: one element per channel in training.

    Used by CrossQ and its successors in reinforcement learning (sbx), and by Keras.

    Source: Ioffe, "Batch Renormalization" (2017), arXiv:1702.03275, whose schedules are the defaults. sbx has
    `r_max=Ramp(1.0, 3.0, 100_000, 100_000)`, `d_max=Ramp(0.0, 5.0, 100_000, 100_000)` and `track="var"`.

    >>> import jaxnorm as jn, numpy as np
    >>> state = jn.RunningStats(np.zeros(1, "f"), np.ones(1, "f"), np.zeros(1, "f"))
    >>> options = dict(train=True, epsilon=0., r_max=2.0, d_max=3.0)
    >>> y, state = jn.batch_renorm(np.array([[1.], [3.]], "f"), None, state, **options)
    >>> print(y, state.mean.round(3))
    [[1.]
     [3.]] [0.02]
    """
    norm = "batch_renorm"
    x = as_float_array(norm, x, rank=1, layout="(batch, ..., channels)")
    if jnp.iscomplexobj(x):
        raise TypeError(f"{norm}: d_max is for real values, got {x.dtype}. Write jaxnorm.batch_norm(...).")
    channels = canonicalize_axes(norm, x.ndim, axis)
    scale, bias = as_params(norm, params)
    refuse_params_as_state(norm, state)
    _check_limits(norm, r_max, d_max)
    flat = dict(momentum=momentum, min_count=min_count, skip_nonfinite=skip_nonfinite, zero_debias=zero_debias)
    policy, step = counting_policy(norm, running, flat), _step_of(norm, track, epsilon)
    if is_stats(state) and getattr(given := as_stats(state), "count", None) is None:
        raise ValueError(
            f"{norm}: the schedules need state.count, which is None. Write "
            f"state._replace(count=jnp.zeros({given.mean.shape}))."
        )
    limits = lambda old: (old.mean, old.var, scheduled(r_max, old.count), scheduled(d_max, old.count))
    return normalize_batch(
        norm, x, scale, bias, state, policy, train=train, channels=channels, epsilon=epsilon, mask=mask,
        weights=weights, update_stats=update_stats, by=ByFormula(_corrected), own=limits, step=step, gathers=False,
        **options,
    )  # fmt: skip


def _corrected(x: Array, of: OfElements, affine, epsilon: float, mean, var, r_max, d_max) -> Array:
    wide = lambda a: a.astype(of.var.dtype)
    over = lax.rsqrt(nonzero_divisor(wide(var) + epsilon))  # 1 / D
    own = of.rsqrt(epsilon)
    r = jnp.where(own == 0, 1.0, over / nonzero_divisor(own))
    r = lax.stop_gradient(jnp.clip(r, 1.0 / wide(r_max), wide(r_max)))
    d = jnp.where(of.count == 0, 0.0, of.deviation(wide(mean)) * -over)
    d = lax.stop_gradient(jnp.clip(d, -wide(d_max), wide(d_max)))
    return affine(of.standardize(x, epsilon) * r + d)


def _check_limits(norm: str, r_max: Any, d_max: Any) -> None:
    check_schedule(norm, "r_max", r_max, 1.0)
    check_schedule(norm, "d_max", d_max, 0.0)


def _step_of(norm: str, track: Any, epsilon: float) -> Callable[..., RunningStats]:
    if not isinstance(track, str) or track not in ("std", "var"):
        raise ValueError(f'{norm}: track must be "std" or "var", got {shown(track)}. Write track="std".')
    return update_and_count if track == "var" else functools.partial(_by_deviation, epsilon)


def _by_deviation(epsilon: float, old: RunningStats, batch: Moments, policy: Running) -> RunningStats:
    """The average is of sqrt(var + epsilon), and kept as the variance that has it."""
    n = jnp.maximum(batch.count - (1.0 if policy.unbiased else 0.0), 0.0)
    deviation = jnp.sqrt(batch.m2 / nonzero_divisor(n) + epsilon)
    of = RunningStats(old.mean, jnp.sqrt(old.var.astype(batch.m2.dtype) + epsilon), old.count)
    new = update_and_count(of, Moments(batch.count, batch.mean, n * deviation), policy)
    var = jnp.maximum(jnp.square(new.var) - epsilon, 0.0).astype(old.var.dtype)
    return RunningStats(new.mean, jnp.where(new.var == of.var, old.var, var), new.count)
