"""Batch-instance normalization: for each channel a learned mixture of batch norm and instance norm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._core.arrays import as_float_array, canonicalize_axes
from .._core.types import Features, RunningStats
from .._ops.elementwise import OfElements
from .._ops.mixed import Mixed, normalize_mixed
from .declare import S, as_params, function_of, refuse_params_as_state, spec
from .running import RunningSpec, taken_policy

Array = jax.Array


class BatchInstanceParams(NamedTuple):
    """The parameters of `batch_instance_norm`."""

    scale: Array | None  # feature shape
    bias: Array | None  # the same
    rho: Array | None  # the same: the share of batch norm


@spec
class BatchInstanceNorm(RunningSpec):
    """The hyperparameters of `batch_instance_norm`.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.BatchInstanceNorm(epsilon=0.)
    >>> params, state = norm.init(1)
    >>> x = np.array([[[1.], [3.]], [[5.], [7.]]])
    >>> norm.apply(params._replace(rho=np.zeros(1)), state, x, train=True)[0].round(3)[..., 0].tolist()
    [[-1.0, 1.0], [-1.0, 1.0]]
    """

    Params: ClassVar[Any] = BatchInstanceParams

    if TYPE_CHECKING:

        def init(self, features: Features) -> tuple[BatchInstanceParams, RunningStats]: ...

    def init_param(self, name: str, shape: tuple[int, ...]) -> Array:
        return jnp.ones(shape, self.param_dtype) if name == "rho" else super().init_param(name, shape)

    def clip_params(self, params: BatchInstanceParams) -> BatchInstanceParams:
        """The parameters with rho between 0 and 1: for after each step of the optimizer.

        >>> import jaxnorm as jn, jax.numpy as jnp
        >>> norm = jn.BatchInstanceNorm()
        >>> params = norm.init(2)[0]._replace(rho=jnp.array([1.5, 0.5]))
        >>> norm.clip_params(params).rho.tolist()
        [1.0, 0.5]
        """
        params = as_params("BatchInstanceNorm.clip_params", params, BatchInstanceParams)
        return params if params.rho is None else params._replace(rho=jnp.clip(params.rho, 0.0, 1.0))


@function_of(BatchInstanceNorm)
def batch_instance_norm(
    x: ArrayLike,
    params: Any,
    state: S,
    *,
    train: Any,
    axis,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    update_stats: bool = True,
    **options,
) -> tuple[Array, S]:
    """Batch-instance normalization.

        y = (rho batch(x) + (1 - rho) instance(x)) * (scale + scale_offset) + bias

    with batch(x) = (x - mean) / sqrt(var + epsilon) by the statistics of the batch, at inference by the running ones,
    and instance(x) by those of each example and channel over space. rho is used as it is: clip it to [0, 1] after each
    step of the optimizer, by `BatchInstanceNorm.clip_params`.

    Args:
      x: array of shape (N, ..., C), the channels at `axis`. Integers are promoted to float32.
      params: `BatchInstanceParams(scale, bias, rho)`, each of shape (C,), or of one that broadcasts against x, or None;
        or a dict of the same names. Without rho it is 1.
      state: `RunningStats(mean, var, count)`, float32 (C,), or a dict of them, as for `batch_norm`. In training also
        `Moments`, which those of the batch are merged into.
      mask: True where an element counts, as for `batch_norm`. It holds for both kinds of statistics.

    Returns:
      An array of x's shape, and the new state: its tree, shapes and dtypes are the old one's.

    Raises:
      ValueError: the batch axis as channel axis; a bad axis, momentum, epsilon, sync or virtual_batch_size; params,
        state or mask that fit x nowhere; a backend of kernels.
      TypeError: a dtype that cannot hold the result; `train` is not a bool.
      NameError: axis_name is not bound here.

    Used by style-robust classifiers and domain generalization.

    Source: Nam, Kim, "Batch-Instance Normalization for Adaptively Style-Invariant Neural Networks" (2018),
    arXiv:1805.07925.

    >>> import jaxnorm as jn, numpy as np
    >>> params, state = jn.BatchInstanceNorm().init(1)
    >>> y, state = jn.batch_instance_norm(np.array([[[1.], [3.]]]), params, state, train=True, momentum=0.9, epsilon=0.)
    >>> print(y.round(3).ravel(), state.mean.round(3))
    [-1.  1.] [0.2]
    """
    norm = "batch_instance_norm"
    x = as_float_array(norm, x, rank=2, layout="(batch, ..., channels)")
    channels = canonicalize_axes(norm, x.ndim, axis)
    refuse_params_as_state(norm, state, BatchInstanceParams)
    scale, bias, rho = as_params(norm, params, BatchInstanceParams)
    policy = taken_policy(norm, options)
    return normalize_mixed(
        norm, Mixed(_mixture, ("instance",)), x, scale, bias, {"rho": rho}, state, policy, channels=channels,
        train=train, mask=mask, weights=weights, update_stats=update_stats, **options,
    )  # fmt: skip


def _mixture(x: Array, batch: OfElements, instance: OfElements, affine, epsilon: float, rho: Array | None) -> Array:
    of_batch = batch.standardize(x, epsilon)
    if rho is None:
        return affine(of_batch)
    rho = rho.astype(of_batch.dtype)
    return affine(rho * of_batch + (1.0 - rho) * instance.standardize(x, epsilon))
