"""Switchable normalization: learned mixtures of the statistics of instance, layer and batch norm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._core.arrays import as_float_array, canonicalize_axes
from .._core.dtypes import widest
from .._core.messages import shown
from .._core.types import Features, RunningStats
from .._ops.elementwise import OfElements, rsqrt_of_mixture
from .._ops.mixed import Mixed, mixed_by, normalize_mixed
from .declare import S, as_params, function_of, refuse_params_as_state, spec
from .running import RunningSpec, taken_policy

Array = jax.Array


class SwitchableParams(NamedTuple):
    """The parameters of `switchable_norm`. Logits are in the order instance, layer, batch."""

    scale: Array | None  # feature shape
    bias: Array | None  # the same
    mean_logits: Array | None  # (3,)
    var_logits: Array | None  # (3,)


@spec
class SwitchableNorm(RunningSpec):
    """The hyperparameters of `switchable_norm`.

    Args:
      axis: the channel axis, at any position but 0.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.SwitchableNorm(epsilon=0.)
    >>> params, state = norm.init(1)
    >>> x = np.array([[[1.], [3.]], [[5.], [7.]]])
    >>> of_batch = params._replace(mean_logits=np.array([-99., -99., 0.]), var_logits=np.array([-99., -99., 0.]))
    >>> print(np.asarray(norm.apply(of_batch, state, x, train=True)[0]).round(3).ravel())
    [-1.342 -0.447  0.447  1.342]
    """

    Params: ClassVar[Any] = SwitchableParams
    whole: ClassVar[tuple[str, ...]] = ("mean_logits", "var_logits")

    axis: int = -1

    if TYPE_CHECKING:

        def init(self, features: Features) -> tuple[SwitchableParams, RunningStats]: ...

    def init_param(self, name: str, shape: tuple[int, ...]) -> Array:
        return jnp.ones(3, self.param_dtype) if name in self.whole else super().init_param(name, shape)


@function_of(SwitchableNorm)
def switchable_norm(
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
    """Switchable normalization.

        y = (x - sum_k a_k mean_k) / sqrt(sum_k b_k var_k + epsilon) * (scale + scale_offset) + bias

    with a = softmax(mean_logits) and b = softmax(var_logits), where k is the instance (an example and channel over
    space), the layer (an example over space and channels), and the batch (a channel over examples and space; at
    inference the running statistics).

    The official code takes the instance's variance as unbiased, derives the other two from it, and starts the running
    variance at 0. Variances here are biased, and the running one starts at 1.

    Args:
      x: array of shape (N, ..., C), the channels at `axis`. Integers are promoted to float32.
      params: `SwitchableParams(scale, bias, mean_logits, var_logits)`, or a dict of the same names. scale and bias have
        shape (C,), or one that broadcasts against x, or are None; logits have shape (3,), or are None for equal shares.
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

    Used by detection and segmentation networks of 2018 to 2020. Tier C: it may change in any release.

    Source: Luo, Ren, Peng, Zhang, Li, "Differentiable Learning-to-Normalize via Switchable Normalization" (2018),
    arXiv:1806.10779.

    >>> import jaxnorm as jn, numpy as np
    >>> params, state = jn.SwitchableNorm().init(1)
    >>> y, state = jn.switchable_norm(np.array([[[1.], [3.]]]), params, state, train=True, momentum=0.9, epsilon=0.)
    >>> print(y.round(3).ravel(), state.mean.round(3))
    [-1.  1.] [0.2]
    """
    norm = "switchable_norm"
    x = as_float_array(norm, x, rank=2, layout="(batch, ..., channels)")
    channels = canonicalize_axes(norm, x.ndim, axis, most=1)
    refuse_params_as_state(norm, state, SwitchableParams)
    scale, bias, *logits = as_params(norm, params, SwitchableParams)
    names = ("mean_logits", "var_logits")
    own = {
        f"{name}[{k}]": share
        for name, of in zip(names, logits, strict=True)
        for k, share in enumerate(_shares(norm, name, of))
    }
    policy = taken_policy(norm, options)
    return normalize_mixed(
        norm, Mixed(_switched, ("instance", "layer")), x, scale, bias, own, state, policy, channels=channels,
        train=train, mask=mask, weights=weights, update_stats=update_stats, **options,
    )  # fmt: skip


def _shares(norm: str, name: str, logits) -> Array:
    if logits is None:
        return jnp.full(3, 1.0 / 3.0, jnp.float32)
    logits = as_float_array(norm, logits, what=name)
    if logits.shape != (3,):
        raise ValueError(
            f"{norm}: {name} must have shape (3,), for instance, layer and batch; got {shown(logits.shape)}. "
            f"Write {name}=jnp.ones(3)."
        )
    return jax.nn.softmax(logits.astype(widest(logits.dtype, jnp.float32)))


def _switched(x: Array, batch: OfElements, instance: OfElements, layer: OfElements, affine, epsilon, *shares) -> Array:
    of = (instance, layer, batch)
    as_x = lambda shares: tuple(share.astype(x.real.dtype) for share in shares)
    r = rsqrt_of_mixture(list(zip(as_x(shares[3:]), of, strict=True)), epsilon)
    return affine(mixed_by(as_x(shares[:3]), of, x) * r.astype(x.dtype))
