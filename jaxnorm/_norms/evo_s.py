"""EvoNorm of the S series: normalization and activation in one, by statistics of each example."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._core.arrays import as_float_array, canonicalize_axes
from .._core.channels import canonicalize_group_count
from .._core.messages import shown
from .._core.types import Features
from .._ops.elementwise import OfElements, normalize_by_statistics
from .base import RowSpec
from .declare import function_of, spec

Array = jax.Array


class EvoSParams(NamedTuple):
    """The parameters of `evo_norm_s`."""

    scale: Array | None  # feature shape
    bias: Array | None  # the same
    u: Array | None  # the same, of variant S0


@spec
class EvoNormS(RowSpec):
    """The hyperparameters of `evo_norm_s`. 32 groups, as in the paper, unless told otherwise.

    Args:
      variant: "S0", "S1" or "S2".
      num_groups: the number of groups of channels. Give it or group_size.
      group_size: the number of channels in a group.
      axis: the channel axis, at any position but 0.
      epsilon: added to the variance or the mean square, in units of x squared; >= 0.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.EvoNormS(num_groups=1, variant="S1", epsilon=0.)
    >>> params, state = norm.init(1)
    >>> print(np.asarray(norm.apply(params, state, np.array([[[-1.], [1.]]]))[0]).round(3).ravel())
    [-0.269  0.731]
    """

    Params: ClassVar[Any] = EvoSParams

    use_bias: bool = True
    variant: str = "S0"
    num_groups: int | None = None
    group_size: int | None = None
    axis: int = -1
    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_variant("EvoNormS", self.variant)
        if self.num_groups is None and self.group_size is None:
            object.__setattr__(self, "num_groups", 32)

    if TYPE_CHECKING:

        def init(self, features: Features) -> tuple[EvoSParams, tuple[()]]: ...

    def _check_features(self, shape: tuple[int, ...]) -> None:
        super()._check_features(shape)
        canonicalize_group_count("EvoNormS.init", math.prod(shape), self.num_groups, self.group_size)

    def init_params(self, shape: tuple[int, ...]) -> EvoSParams:
        params = super().init_params(shape)
        return params if self.variant == "S0" else params._replace(u=None)

    def init_param(self, name: str, shape: tuple[int, ...]) -> Array:
        return jnp.ones(shape, self.param_dtype) if name == "u" else super().init_param(name, shape)


@function_of(EvoNormS)
def evo_norm_s(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    u: ArrayLike | None = None,
    *,
    variant,
    num_groups,
    group_size,
    axis,
    mask: ArrayLike | None = None,
    **options,
) -> Array:
    """EvoNorm of the S series, in the place of a group norm and its activation.

        S0: y = x sigmoid(u x) / sqrt(var + epsilon) * (scale + scale_offset) + bias
        S1: y = x sigmoid(x) / sqrt(var + epsilon) * (scale + scale_offset) + bias
        S2: y = x sigmoid(x) / sqrt(ms + epsilon) * (scale + scale_offset) + bias

    with the variance or the mean square of each example over space and a group of neighbouring channels.

    Args:
      x: array of shape (N, ..., C), the channels at `axis`. Integers are promoted to float32.
      scale: of shape (C,), or of a shape that broadcasts against x; None is 1.
      bias: the same; None is 0.
      u: the same, of variant S0 alone; None is 1.

    Returns:
      An array of x's shape.

    Raises:
      ValueError: groups that do not divide the channels; the batch axis as channel axis; a bad variant, axis, epsilon
        or backend; a parameter or mask that fits x nowhere.
      TypeError: a dtype that cannot hold the result.
      NameError: axis_name is not bound here.

    Used by timm's ResNetV2 and RegNetZ models, and for training with small batches.

    Source: Liu, Brock, Simonyan, Le, "Evolving Normalization-Activation Layers" (2020), arXiv:2004.02967.

    >>> import jaxnorm as jn, numpy as np
    >>> print(np.asarray(jn.evo_norm_s(np.array([[[-1.], [1.]]]), num_groups=1, epsilon=0.)).round(3).ravel())
    [-0.269  0.731]
    """
    norm = "evo_norm_s"
    _check_variant(norm, variant)
    x = as_float_array(norm, x, rank=2, layout="(batch, ..., channels)")
    (channel,) = canonicalize_axes(norm, x.ndim, axis, most=1)
    if channel == 0:
        raise ValueError(
            f"{norm}: axis={axis} is the batch axis of x {x.shape}, whose examples are normalized apart. "
            "Write axis=-1 for channels last, or axis=1."
        )
    if u is not None and variant != "S0":
        raise ValueError(f"{norm}: u is a parameter of variant S0, got variant={variant!r}. Write u=None.")
    if num_groups is None and group_size is None:
        num_groups = 32
    groups = canonicalize_group_count(norm, x.shape[channel], num_groups, group_size, x.shape)
    space = tuple(a for a in range(1, x.ndim) if a != channel)
    return normalize_by_statistics(
        norm, _gated, x, {"u": u}, scale, bias, space, (channel,), mask=mask, centered=variant != "S2", groups=groups,
        **options,
    )  # fmt: skip


def _gated(x: Array, of: OfElements, affine, epsilon: float, u: Array | None) -> Array:
    gate = jax.nn.sigmoid(x if u is None else u.astype(x.dtype) * x)
    return affine((x * gate) * of.rsqrt(epsilon).astype(x.dtype))


def _check_variant(norm: str, variant) -> None:
    if variant not in ("S0", "S1", "S2"):
        write = "Write jaxnorm.EvoNormB." if variant in ("B0", "B1", "B2") else 'Write variant="S0".'
        raise ValueError(f'{norm}: variant must be "S0", "S1" or "S2", got {shown(variant)}. {write}')
