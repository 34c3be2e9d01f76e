"""Batch normalization: every channel by its mean and variance over the batch, and by running ones at inference.

Legend: N batch, C channels, F the feature shape (C,), n the number of elements of a channel, t the number of updates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._core.arrays import as_float_array, canonicalize_axes
from .._core.messages import shown
from .._core.types import Affine, Features, Params, RunningStats
from .._ops.batch import normalize_batch
from .._ops.normalize import as_affine
from .._ops.policy import Running, running_policy
from .._ops.spread import BY, SPREADS, normalize_by, over_spread
from .._ops.states import as_stats, is_stats
from .declare import as_params, function_of, refuse_params_as_state, spec
from .running import RunningSpec, S

Array = jax.Array


@spec
class BatchNorm(RunningSpec):
    """The hyperparameters of `batch_norm`. See `jaxnorm.Norm` for what a spec does.

    Args:
      axis: the channel axis, or axes, at any position.
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

    peers: ClassVar[Any] = {
        "torch": {"momentum": 0.9, "axis": 1, "unbiased_running_var": True},
        "flax": {},
        "keras": {"epsilon": 1e-3},
        "haiku": {"momentum": ..., "zero_debias": True},
        "equinox": {"axis": 1, "zero_debias": True},  # mode="batch"
    }
    instead: ClassVar[Any] = {"running": ("momentum", "zero_debias", "unbiased_running_var")}

    spread: str = "std"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_spread("BatchNorm", self.spread, self._running(), self.share, self.sync, self.virtual_batch_size)

    if TYPE_CHECKING:

        def init(self, features: Features) -> tuple[Affine, RunningStats]: ...

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
        return super().update_state(state, moments)

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
      mask: True where an element counts. Broadcasts to x, or covers its leading axes. Masked-out elements do
        not affect the statistics, the state or any gradient, even if they are NaN. Finite ones are still normalized.
        A float mask holds 1 and 0. An additive one (0 where an element counts, negative elsewhere) is refused; if it
        is traced, so that its values are not known, it makes the output NaN.
      weights: a float weight >= 0 for each element, shaped as a mask may be. Differentiable. Negative ones are refused
        unless they are traced; then the result means nothing.

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
        centered=spread != "rms", by=BY[spread], given=normalize_by(spread), gathers=spread in ("std", "none"),
        **options,
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
