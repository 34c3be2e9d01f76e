"""Instance-batch normalization (IBN-a): instance norm for the first channels, batch norm for the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from .._core.arrays import (
    align_boolean_mask,
    align_param,
    align_weights,
    as_float_array,
    canonicalize_axes,
    canonicalize_dtype,
)
from .._core.checks import canonicalize_epsilon, canonicalize_number
from .._core.masks import finite_padding
from .._core.messages import shown
from .._core.over import Axes
from .._core.types import Affine, Features, Params, Reduction, RunningStats
from .._core.vma import shard_like
from .._ops.batch import normalize_batch
from .._ops.plan import make_plan
from .._ops.standardize import standardize
from .declare import S, as_params, function_of, refuse_params_as_state, spec
from .running import RunningSpec, taken_policy

Array = jax.Array


@spec
class InstanceBatchNorm(RunningSpec):
    """The hyperparameters of `instance_batch_norm`.

    Args:
      ratio: the share of channels that have instance norm: the first int(C ratio).
      axis: the channel axis, at any position but 0.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.InstanceBatchNorm(momentum=0.9)
    >>> params, state = norm.init(2)
    >>> x = np.array([[[1., 1.], [3., 3.]], [[5., 5.], [7., 7.]]])
    >>> y, state = norm.apply(params, state, x, train=True)
    >>> print(np.asarray(y[..., 0]).round(3).ravel(), np.asarray(y[..., 1]).round(3).ravel(), state.mean)
    [-1.  1. -1.  1.] [-1.342 -0.447  0.447  1.342] [0.4]
    """

    own_state_shape: ClassVar[bool] = True

    ratio: float = 0.5
    axis: int = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        _first(type(self).__name__, 2, self.ratio)

    if TYPE_CHECKING:

        def init(self, features: Features) -> tuple[Affine, RunningStats]: ...

    def init_state(self, shape: tuple[int, ...]) -> RunningStats:
        """Mean 0 and variance 1, of the channels that have batch norm."""
        *others, channels = shape
        return super().init_state((*others, channels - _first("InstanceBatchNorm", channels, self.ratio)))


@function_of(InstanceBatchNorm)
def instance_batch_norm(
    x: ArrayLike,
    params: Params,
    state: S,
    *,
    train: Any,
    axis,
    ratio,
    epsilon,
    scale_offset,
    dtype,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    update_stats: bool = True,
    **options,
) -> tuple[Array, S]:
    """Instance-batch normalization (IBN-a).

        y = [instance(x[..., :k]), batch(x[..., k:])] * (scale + scale_offset) + bias,   k = int(C ratio)

    The two are `instance_norm` and `batch_norm` of a part of the channels, so that a layer keeps the look of an image
    apart from its content.

    Args:
      x: array of shape (N, ..., C), the channels at `axis`. Integers are promoted to float32.
      params: `Affine(scale, bias)`, each of shape (C,), or of one that broadcasts against x, or None; or a dict of the
        same names.
      state: `RunningStats(mean, var, count)`, float32 (C - k,), or a dict of them, as for `batch_norm`. In training
        also `Moments`, which those of the batch are merged into.
      mask: True where an element counts, as for `batch_norm`. It holds for both kinds of statistics.

    Returns:
      An array of x's shape, and the new state: its tree, shapes and dtypes are the old one's.

    Raises:
      ValueError: the batch axis as channel axis; a bad axis, momentum, epsilon, sync or virtual_batch_size; params,
        state or mask that fit x nowhere; a backend of kernels.
      TypeError: a dtype that cannot hold the result; `train` is not a bool.
      NameError: axis_name is not bound here.


    Used by person re-identification and domain generalization, in IBN-Net's ResNets.

    Source: Pan, Luo, Shi, Tang, "Two at Once: Enhancing Learning and Generalization Capacities via IBN-Net" (2018),
    arXiv:1807.09441.

    >>> import jaxnorm as jn, numpy as np
    >>> params, state = jn.InstanceBatchNorm().init(2)
    >>> print(jn.instance_batch_norm(np.ones((1, 3, 2)), params, state, train=False)[0].round(3)[0, 0])
    [0. 1.]
    """
    norm = "instance_batch_norm"
    x = as_float_array(norm, x, rank=2, layout="(batch, ..., channels)")
    (channel,) = canonicalize_axes(norm, x.ndim, axis, most=1)
    if channel == 0:
        raise ValueError(
            f"{norm}: axis={axis} is the batch axis of x {x.shape}, whose examples have statistics of their own. "
            "Write axis=-1 for channels last, or axis=1."
        )
    refuse_params_as_state(norm, state)
    scale, bias = (
        align_param(norm, name, p, x.shape, (channel,)) for name, p in as_params(norm, params)._asdict().items()
    )
    policy = taken_policy(norm, options)
    epsilon = canonicalize_epsilon(norm, epsilon)
    scale_offset = canonicalize_number(norm, "scale_offset", scale_offset, "1.0")
    out = canonicalize_dtype(norm, dtype, x, scale, bias)
    x, mask = align_boolean_mask(norm, x, mask)
    weights, k = align_weights(norm, x, weights), _first(norm, x.shape[channel], ratio)

    def part(a: Any, start: int, stop: int) -> Any:
        if a is None or a.shape[channel] == 1 != x.shape[channel]:
            return a
        return lax.slice_in_dim(a, start, stop, axis=channel)

    head: list[Any]
    rest: list[Any]
    head, rest = ([part(a, *ends) for a in (x, scale, bias, mask, weights)] for ends in ((0, k), (k, x.shape[channel])))
    second, scale, bias, mask, weights = rest
    y, state = normalize_batch(
        norm, second, scale, bias, state, policy, train=train, channels=(channel,), epsilon=epsilon,
        scale_offset=scale_offset, dtype=out, mask=mask, weights=weights, update_stats=update_stats, **options,
    )  # fmt: skip
    first, scale, bias, mask, weights = head
    scale, bias = (None if p is None else shard_like(first, p) for p in (scale, bias))
    over = Reduction(Axes(tuple(a for a in range(1, x.ndim) if a != channel)))
    plan = make_plan(
        first, (), epsilon, scale_offset, out, over, options["implementation"], activation=options["activation"]
    )
    of_first: tuple[Any, ...] = (mask, weights)
    of_instances = standardize(norm, plan, finite_padding(first, *of_first), scale, bias, *of_first)[0]
    return jnp.concatenate([of_instances, y], channel), state


def _first(norm: str, channels: int, ratio) -> int:
    """How many channels have instance norm."""
    if not isinstance(ratio, (int, float)) or not 0 <= ratio <= 1:
        raise ValueError(f"{norm}: ratio must be a number from 0 to 1, got {shown(ratio)}. Write ratio=0.5.")
    return int(channels * ratio)
