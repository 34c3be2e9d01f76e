"""Group RMS norm: every run of channels of a token by its own root mean square, as heads and mixers have it.

Legend: C channels, G groups of them, D = C / G channels of a group.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._core.arrays import as_float_array, canonicalize_axes
from .._core.channels import canonicalize_group_count, spans_devices, split_channels
from .._core.checks import canonicalize_flags, check_cast
from .._core.messages import shown
from .._ops.rows import normalize_rows
from .base import RowSpec
from .declare import function_of, spec

Array = jax.Array


@spec
class GroupRMSNorm(RowSpec):
    """The hyperparameters of `group_rms_norm`. There is no bias unless `use_bias=True`.

    Args:
      num_groups: G, the number of groups, such as heads. Give it or group_size.
      group_size: D, the number of channels in a group.
      centered: subtract the mean of each group, and divide by its deviation: a layer norm of each group.
      axis: the channel axis, at any position.
      epsilon: added to the mean square, in units of x squared; >= 0.
      cast: as for `rms_norm`.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.GroupRMSNorm(num_groups=2, epsilon=0.)
    >>> params, state = norm.init(4)
    >>> norm.apply(params, state, np.array([[1., -1., 10., -10.]]))[0].round(3).tolist()
    [[1.0, -1.0, 1.0, -1.0]]
    """

    use_bias: bool = False
    num_groups: int | None = None
    group_size: int | None = None
    centered: bool = False
    axis: int = -1
    epsilon: float = 1e-5
    cast: str = "after_scale"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_cast("GroupRMSNorm", self.cast)
        if (self.num_groups is None) == (self.group_size is None):
            raise ValueError(
                f"GroupRMSNorm: give one of num_groups and group_size, got num_groups={shown(self.num_groups)} and "
                f"group_size={shown(self.group_size)}. Write num_groups=8, for 8 heads."
            )


@function_of(GroupRMSNorm)
def group_rms_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    num_groups,
    group_size,
    centered,
    axis,
    axis_name,
    cast,
    mask: ArrayLike | None = None,
    **options,
) -> Array:
    """RMS norm of each group of neighbouring channels: of each head, where heads lie in the channels.

        y = x / sqrt(mean(|x|^2) + epsilon) * (scale + scale_offset) + bias

    with the mean over the D = C / G channels of a group. Space, time and other axes are not reduced: that is
    `group_norm`. With `centered` the mean of the group is subtracted first, which is a layer norm of each group.

    Args:
      x: array of any shape of rank 1 or more, the channels at `axis`. Integers are promoted to float32.
      scale: of shape (C,), of shape (D,), which all groups share, or of a shape that broadcasts against x; None is 1.
      bias: the same; None is 0.

    Returns:
      An array of x's shape.

    Raises:
      ValueError: groups that do not divide the channels; a bad axis, epsilon, cast or backend; a scale, bias or mask
        that fits x nowhere; an axis name, whose devices would merge different groups.
      TypeError: a dtype that cannot hold the result.

    Used by Mamba-2, fla's models and Diff Transformer; RetNet without parameters; xLSTM with `centered=True`.

    Source: Dao, Gu, "Transformers are SSMs" (2024), arXiv:2405.21060, section 7.2.

    >>> import jaxnorm as jn, numpy as np
    >>> x = np.array([[1., -1., 10., -10.]])
    >>> jn.group_rms_norm(x, np.array([1., 2.]), group_size=2, epsilon=0.).round(3).tolist()
    [[1.0, -2.0, 1.0, -2.0]]
    """
    norm = "group_rms_norm"
    check_cast(norm, cast)
    x = as_float_array(norm, x, rank=1, layout="the channel axis among its own")
    (channel,) = canonicalize_axes(norm, x.ndim, axis, most=1)
    (centered,) = canonicalize_flags(norm, centered=centered)
    groups = canonicalize_group_count(norm, x.shape[channel], num_groups, group_size)
    if groups != 1 and axis_name is not None:
        raise ValueError(
            f"{norm}: {groups} groups are on each device, and axis_name={shown(axis_name)} would merge them with those "
            "of others. Write axis_name=None."
        )
    scale, bias = (_of_all_groups(p, x.shape[channel], groups) for p in (scale, bias))
    one = groups == 1  # then x is seen as it is
    return normalize_rows(
        norm, x, scale, bias, (channel if one else channel + 1,), (channel,), mask=mask, axis_name=axis_name, **options,
        centered=centered, cast_before_scale=cast == "before_scale",
        view=lambda a: a if one else split_channels(a, x.shape, channel, groups),
        spans_devices=not one and spans_devices(x, channel, groups),
    )  # fmt: skip


def _of_all_groups(p: Any, channels: int, groups: int) -> Any:
    """A parameter of one group, which all share, as one of all channels."""
    shared = groups != 1 and getattr(p, "shape", None) == (channels // groups,)
    return jnp.tile(jnp.asarray(p), groups) if shared else p
