"""Batch normalization: every channel by its mean and variance over the batch, and by running ones at inference.

Legend: N batch, C channels, F the feature shape (C,), n the number of elements of a channel, t the number of updates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._core.arrays import as_float_array, canonicalize_axes
from .._core.explain import explained
from .._core.messages import shown
from .._core.types import Affine, Features, Moments, Params, RunningStats
from .._ops.batch import normalize_batch
from .._ops.normalize import as_affine
from .._ops.policy import EMA, Cumulative, Devices, Running, running_policy, sharing_policy
from .._ops.running import update_state
from .._ops.spread import BY, SPREADS, normalize_by, over_spread
from .._ops.states import as_stats, is_stats
from .base import Spec
from .declare import as_params, function_of, refuse_params_as_state, spec

Array = jax.Array
S = TypeVar("S", bound=RunningStats | Moments | Mapping[str, Any])
_RUNNING = ("momentum", "min_count", "skip_nonfinite", "zero_debias", "unbiased_running_var")


@spec
class BatchNorm(Spec):
    """The hyperparameters of `batch_norm`. See `jaxnorm.Norm` for what a spec does.

    Args:
      axis: the channel axis, or axes, at any position.
      momentum: the weight of the old statistics, as in Flax (1 - torch's): a number, or a scalar array such as a
        schedule computes, which may be traced. None: the exact cumulative statistics, those
        of all elements seen so far (needs `state.count`).
      epsilon: added to the variance, in units of x squared; >= 0.
      running: how the running statistics are updated, as one object: `EMA(...)` or `Cumulative()`, in place of
        momentum, min_count, skip_nonfinite, zero_debias and unbiased_running_var.
      share: which devices share statistics, as one object: `Devices(axis_name, groups)`, in place of axis_name,
        axis_index_groups and sync.
      axis_name: the mapped axis, or axes, of pmap, shard_map or vmap whose devices share statistics. Not touched at
        inference. Under jit over sharded arrays leave it None: statistics are global there. (Or name the mesh axes
        that the batch is sharded over, under `jax.set_mesh(mesh)`: then `sync` has the same meaning there.)
      axis_index_groups: the same as a `sync` of lists, by Flax's name.
      sync: which devices along axis_name share statistics: "global" (all), "local" (none), an int n (groups of n
        neighbouring devices, where the last of several axes runs fastest: the chips of one host, for
        axis_name=("host", "chip")), or lists of indices. The running statistics always use all devices, and are the
        same on all. "local" costs that small all-reduce alone; nothing waits for it, and there is none backward.
      virtual_batch_size: ghost batch norm: normalize each block of `virtual_batch_size` consecutive examples by its own
        statistics, on its own device. The last block may be shorter. The running statistics use the whole batch.
      min_count: a channel with fewer elements than this leaves its state as it was.
      frozen: normalize by the running statistics and never update them, in training too.
      skip_nonfinite: a channel whose batch statistics are not finite keeps its old ones.
      zero_debias: correct the running statistics for their start, as Adam does: after t updates their weights sum to 1,
        with nothing of the initial values (needs `state.count`).
      unbiased_running_var: the running variance takes m2 / (n - 1), as torch does, in place of m2 / n.
      spread: what x - mean is divided by. "std" is sqrt(var + epsilon). "rms" is sqrt(mean(x**2) + epsilon), and no
        mean is taken out. "l1" is sqrt(pi / 2) mean|x - mean| + epsilon, and `state.var` holds that spread, without
        epsilon. "none" divides by nothing: mean-only batch norm. All but "std" are of tier C: they may change in any
        release.
      implementation: a backend listed by `jaxnorm.backends()`. None picks the fastest one that supports the call. XLA
        runs inference for every backend: it is elementwise and fuses with what follows.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.BatchNorm(momentum=0.9)
    >>> params, state = norm.init(1)
    >>> y, state = norm.apply(params, state, np.array([[1.], [3.]]), train=True)
    >>> print(y.round(3), state.mean.round(3))
    [[-1.]
     [ 1.]] [0.2]
    """

    State: ClassVar[Any] = RunningStats

    use_bias: bool = True
    axis: int | Sequence[int] = -1
    momentum: float | Array | None = 0.99
    epsilon: float = 1e-5
    running: EMA | Cumulative | None = None
    share: Devices | None = None
    axis_name: str | tuple[str, ...] | None = None
    axis_index_groups: Sequence[Sequence[int]] | None = None
    sync: str | int | Sequence[Sequence[int]] = "global"
    virtual_batch_size: int | None = None
    min_count: float | None = None
    frozen: bool = False
    skip_nonfinite: bool = False
    zero_debias: bool = False
    unbiased_running_var: bool = False
    spread: str = "std"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_spread("BatchNorm", self.spread, self._running(), self.share, self.sync, self.virtual_batch_size)
        sharing = (self.share, self.axis_name, self.axis_index_groups, self.sync, self.virtual_batch_size)
        sharing_policy("BatchNorm", *sharing)

    def _running(self) -> Running:
        return running_policy("BatchNorm", self.running, **{name: getattr(self, name) for name in _RUNNING})

    if TYPE_CHECKING:

        def init(self, features: Features) -> tuple[Affine, RunningStats]: ...

    def init_state(self, shape: tuple[int, ...]) -> RunningStats:
        """Mean 0 and variance 1."""
        f32 = jnp.float32
        count = jnp.zeros(shape, f32) if self._running().needs_count else None
        return RunningStats(jnp.zeros(shape, f32), jnp.ones(shape, f32), count)

    @explained("apply")
    def apply(
        self, params: Params, state: S, x: ArrayLike, *, train: Any = None, mask: Any = None, weights: Any = None,
        update_stats: bool = True,
    ) -> tuple[Array, S]:  # fmt: skip
        """The normalized x and the new running statistics. Arguments as for `batch_norm`; frozen, it needs no train."""
        refuse_params_as_state("BatchNorm.apply", state)
        params = as_params("BatchNorm.apply", params)
        call = dict(train=train, mask=mask, weights=weights, update_stats=update_stats)
        return batch_norm(x, params, state, **call, **self.options())

    def update_state(self, state: S, moments: Any) -> S:
        """`jaxnorm.update_state` with this norm's hyperparameters: one update by the moments of many micro-batches.

        >>> import jaxnorm as jn
        >>> norm = jn.BatchNorm(momentum=0.5)
        >>> norm.update_state(norm.init(1)[1], jn.moments([[2.], [6.]], axes=0)).mean.tolist()
        [2.0]
        """
        if self.spread in ("l1", "rms"):
            raise ValueError(
                f"BatchNorm.update_state: moments hold no spread={self.spread!r}. Write spread='std', or update at "
                "each batch by norm.apply(params, state, x, train=True)."
            )
        return state if self.frozen else update_state(state, moments, running=self._running())

    def as_affine(self, params: Params, state: RunningStats | Mapping[str, Any]) -> Affine:
        """What the norm is at inference, but for an activation: y == x * affine.scale + affine.bias.

        >>> import jaxnorm as jn
        >>> norm = jn.BatchNorm(epsilon=0.)
        >>> norm.as_affine(*norm.init(1)).scale.tolist()
        [1.0]
        """
        scale, bias = as_params("BatchNorm.as_affine", params)
        if not is_stats(state) or "var" not in (stats := as_stats(state))._fields:
            raise TypeError(
                f"BatchNorm.as_affine: state must be a jaxnorm.RunningStats, got {shown(state)}. Write "
                "norm.as_affine(params, state)."
            )
        epsilon, offset, var = self.epsilon, self.scale_offset, stats.var
        if self.spread in ("l1", "none"):
            factor = over_spread(var, epsilon) if self.spread == "l1" else jnp.ones_like(var)
            scale = factor if scale is None else (jnp.asarray(scale, factor.dtype) + offset) * factor
            epsilon, offset, var = 0.0, 0.0, jnp.ones_like(var)
        return as_affine(stats.mean, var, scale, bias, epsilon=epsilon, scale_offset=offset)


@function_of(BatchNorm)
def batch_norm(
    x: ArrayLike,
    params: Params,
    state: S,
    *,
    train: Any,
    axis, momentum, running, share, sync, virtual_batch_size, min_count, skip_nonfinite, zero_debias,
    unbiased_running_var, spread,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    update_stats: bool = True,
    **options,
) -> tuple[Array, S]:  # fmt: skip
    """Batch normalization, synchronized over devices where `axis_name` says so.

        y = (x - mean) / sqrt(var + epsilon) * (scale + scale_offset) + bias

    In training mean and var are those of the batch over every axis but the channels', and
    `running = running + (1 - momentum) * (batch - running)`. At inference they are the running ones.

    Args:
      x: array of shape (N, ..., C), the channels at `axis`. Integers are promoted to float32.
      params: `Affine(scale, bias)`. Each is None or has shape (C,) or a shape that broadcasts against x (per sample:
        (N, 1, 1, C)). `params=None` means no scale and no bias. A dict {"scale", "bias"} does as well; a missing one is
        None.
      state: `RunningStats(mean, var, count)`, float32 (C,); `BatchNorm(...).init(C)` makes one. No gradient flows in. A
        dict {"mean", "var"}, with or without "count", does as well, and comes back as a dict.
        A variance that is nothing beside epsilon may be recorded as 0. In training also `Moments`, which those of the
        batch are merged into, for one `update_state` after many micro-batches.
      train: use the batch's statistics and update the running ones. A bool, or a traced bool.
      mask: True where an element counts. Broadcasts to x, or covers its leading axes. Masked-out elements do
        not affect the statistics, the state or any gradient, even if they are NaN. Finite ones are still normalized.
        A float mask holds 1 and 0. An additive one (0 where an element counts, negative elsewhere) is refused; if it
        is traced, so that its values are not known, it makes the output NaN.
      weights: a float weight >= 0 for each element, shaped as a mask may be. Differentiable. Negative ones are refused
        unless they are traced; then the result means nothing.
      update_stats: False leaves the state as it was.

    Returns:
      An array of x's shape, and the new state: its tree, shapes and dtypes are the old one's.

    Raises:
      ValueError: a bad axis, momentum, epsilon, backend, sync or virtual_batch_size; params, state or mask that fit x
        nowhere.
      TypeError: a dtype that cannot hold the result; `train` is not a bool.
      NameError: axis_name is not bound here.

    Warns:
      UserWarning: one element per channel in training, where the output is the bias alone.

    Used by ResNet and most convolutional networks.

    Source: Ioffe, Szegedy, "Batch Normalization" (2015), arXiv:1502.03167. Ghost batches: Hoffer, Hubara, Soudry,
    "Train longer, generalize better" (2017), arXiv:1705.08741. spread="l1": Hoffer, Banner, Golan, Soudry, "Norm
    matters" (2018), arXiv:1803.01814; "none": Salimans, Kingma, "Weight Normalization" (2016), arXiv:1602.07868.

    >>> import jaxnorm as jn, numpy as np
    >>> state = jn.RunningStats(np.zeros(1, "f"), np.ones(1, "f"))
    >>> y, state = jn.batch_norm(np.array([[1.], [3.]], "f"), None, state, train=True, momentum=0.9, epsilon=0.)
    >>> print(y, state.mean.round(3))
    [[-1.]
     [ 1.]] [0.2]
    """
    norm = "batch_norm"
    x = as_float_array(norm, x, rank=1, layout="(batch, ..., channels)")
    channels = canonicalize_axes(norm, x.ndim, axis)
    scale, bias = as_params(norm, params)
    refuse_params_as_state(norm, state)
    policy = running_policy(
        norm, running, momentum=momentum, min_count=min_count, skip_nonfinite=skip_nonfinite, zero_debias=zero_debias,
        unbiased_running_var=unbiased_running_var,
    )  # fmt: skip
    _check_spread(norm, spread, policy, share, sync, virtual_batch_size)
    return normalize_batch(
        norm, x, scale, bias, state, policy, train=train, channels=channels, mask=mask, weights=weights,
        update_stats=update_stats, share=share, sync=sync, virtual_batch_size=virtual_batch_size,
        centered=spread != "rms", by=BY[spread], given=normalize_by(spread), gathers=spread in ("std", "none"), **options,
    )  # fmt: skip


def _check_spread(norm: str, spread: Any, policy: Running, share: Any, sync: Any, virtual_batch_size: Any) -> None:
    if not isinstance(spread, str) or spread not in SPREADS:
        raise ValueError(f'{norm}: spread must be one of {SPREADS}, got {shown(spread)}. Write spread="std".')
    if spread != "l1":
        return
    parts = not (isinstance(sync, str) and sync == "global") or virtual_batch_size is not None
    parts |= share is not None and share.groups is not None
    if parts or policy.momentum is None or policy.unbiased:
        raise ValueError(
            f'{norm}: spread="l1" is no sum of squares, which merges: it takes no momentum=None, unbiased_running_var, '
            'virtual_batch_size or sync beside "global". Write spread="std", or leave them out.'
        )
