"""Group normalization: every example by the mean and variance of groups of its channels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
from jax.typing import ArrayLike

from .._core.arrays import as_float_array, canonicalize_axes, refuse_a_shape
from .._core.channels import canonicalize_group_count, spans_devices, split_channels
from .._core.checks import warn_if_single
from .._core.messages import shown, to_python
from .._ops.rows import normalize_rows
from .base import RowSpec
from .declare import function_of, spec

Array = jax.Array


@spec
class GroupNorm(RowSpec):
    """The hyperparameters of `group_norm`. 32 groups, as in the paper, unless told otherwise.

    Args:
      num_groups: G, the number of groups. Give it or group_size.
      group_size: C / G, the number of channels in a group.
      axis: the channel axis, at any position.
      reduction_axes: the axes reduced, the channel axis among them; None is all but the batch axis 0.
      epsilon: added to the variance, in units of x squared; >= 0.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.GroupNorm(num_groups=2)
    >>> params, state = norm.init(4)
    >>> norm.apply(params, state, np.array([[1., 3., 10., 30.]]))[0].round(3).tolist()
    [[-1.0, 1.0, -1.0, 1.0]]
    """

    peers: ClassVar[Any] = {
        "torch": {"num_groups": ..., "axis": 1, "epsilon": 1e-5},
        "flax": {"num_groups": 32},
        "keras": {"num_groups": 32, "epsilon": 1e-3},
        "haiku": {"num_groups": ..., "epsilon": 1e-5},
        "equinox": {"num_groups": ..., "axis": 1, "epsilon": 1e-5},
    }
    instead: ClassVar[Any] = {"group_size": ("num_groups",)}

    use_bias: bool = True
    num_groups: int | None = None
    group_size: int | None = None
    axis: int = -1
    reduction_axes: int | Sequence[int] | None = None
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_groups is None and self.group_size is None:
            object.__setattr__(self, "num_groups", 32)

    def _check_features(self, shape: tuple[int, ...]) -> None:
        super()._check_features(shape)
        canonicalize_group_count("GroupNorm.init", math.prod(shape), self.num_groups, self.group_size)


@function_of(GroupNorm)
def group_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    num_groups,
    group_size,
    axis,
    reduction_axes,
    axis_name,
    mask: ArrayLike | None = None,
    **options,
) -> Array:
    """Group normalization.

        y = (x - mean) / sqrt(var + epsilon) * (scale + scale_offset) + bias

    with mean and var over each group of C / G neighbouring channels and over the other `reduction_axes`. One group is
    layer norm over everything but the batch; C groups are instance norm.

    Args:
      x: array of shape (N, ..., C), the channels at `axis`. Integers are promoted to float32.
      scale: of shape (C,), or of a shape that broadcasts against x; None is 1.
      bias: the same; None is 0.

    Returns:
      An array of x's shape.

    Raises:
      ValueError: groups that do not divide the channels; a bad axis, epsilon or backend; a scale, bias or mask that
        fits x nowhere.
      TypeError: a dtype that cannot hold the result.
      NameError: axis_name is not bound here.

    Used by UNets of diffusion models, detection and segmentation with small batches.

    Source: Wu, He, "Group Normalization" (2018), arXiv:1803.08494.

    >>> import jaxnorm as jn, numpy as np
    >>> jn.group_norm(np.array([[1., 3., 10., 30.]]), num_groups=2).round(3).tolist()
    [[-1.0, 1.0, -1.0, 1.0]]
    """
    refuse_a_shape("group_norm", "scale", scale)
    x = as_float_array("group_norm", x, rank=2, layout="(batch, ..., channels)")
    (channel,) = canonicalize_axes("group_norm", x.ndim, axis, most=1)
    groups = canonicalize_group_count("group_norm", x.shape[channel], num_groups, group_size, x.shape)
    given = [a for a in range(x.ndim) if a != 0 or a == channel] if reduction_axes is None else reduction_axes
    given = canonicalize_axes("group_norm", x.ndim, given, what="reduction_axes")
    if channel not in given:
        raise ValueError(
            f"group_norm: reduction_axes={shown(to_python(reduction_axes))} must include the channel axis {channel}, "
            f"whose groups are reduced. Write reduction_axes={tuple(sorted((*given, channel)))}."
        )
    # In the view the channel axis c is two: the groups at c, and the channels of a group at c + 1.
    reduced = tuple(a if a < channel else a + 1 for a in given)

    if axis_name is None:
        shape = (*x.shape[:channel], groups, x.shape[channel] // max(groups, 1), *x.shape[channel + 1 :])
        warn_if_single("group_norm", jax.ShapeDtypeStruct(shape, x.dtype), reduced, "group")
    return normalize_rows(
        "group_norm", x, scale, bias, reduced, (channel,), mask=mask, axis_name=axis_name, **options,
        view=lambda a: split_channels(a, x.shape, channel, groups), spans_devices=spans_devices(x, channel, groups),
    )  # fmt: skip
