"""Segment normalization: every segment of a packed array, such as a graph or a sequence, by its own statistics."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.typing import ArrayLike

from .._core.arrays import align_segment_ids, as_float_array
from .._core.channels import canonicalize_group_count, spans_devices, split_channels
from .._core.checks import canonicalize_flags
from .._core.explain import explained
from .._core.messages import shown
from .._core.over import Segments
from .._core.types import Params
from .._ops.rows import normalize_rows
from .base import RowSpec
from .declare import S, function_of, spec

Array = jax.Array

KINDS = ("layer", "rms", "group", "instance")


@spec
class SegmentNorm(RowSpec):
    """The hyperparameters of `segment_norm`. The ids are an argument of `apply`, after x.

    Args:
      num_segments: how many segments there may be. Static: ids are below it, and segments may be empty.
      kind: "layer" takes the statistics of a segment over all its elements, "group" over groups of its channels, and
        "instance" over each channel. "rms" is "layer" with the mean taken as zero.
      num_groups: for kind="group": the number of groups. Give it or group_size.
      group_size: for kind="group": the number of channels in a group.
      indices_are_sorted: promises that the ids do not decrease, which makes sums faster on some platforms. A false
        promise gives wrong statistics.
      epsilon: added to the variance, in units of x squared; >= 0.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.SegmentNorm(num_segments=2, epsilon=0.)
    >>> params, state = norm.init(1)
    >>> x, ids = np.array([[1.], [3.], [50.], [60.]]), np.array([0, 0, 1, 1])
    >>> norm.apply(params, state, x, ids)[0].round(3).tolist()
    [[-1.0], [1.0], [-1.0], [1.0]]
    """

    use_bias: bool = True
    num_segments: int | None = None
    kind: str = "layer"
    num_groups: int | None = None
    group_size: int | None = None
    indices_are_sorted: bool = False
    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_kind("SegmentNorm", self.kind, self.num_groups, self.group_size)

    def _check_features(self, shape: tuple[int, ...]) -> None:
        super()._check_features(shape)
        if self.kind == "group":
            canonicalize_group_count("SegmentNorm.init", math.prod(shape), self.num_groups, self.group_size)

    @explained("apply")
    def apply(
        self, params: Params, state: S, x: ArrayLike, segment_ids: ArrayLike, *, train: Any = None, mask: Any = None
    ) -> tuple[Array, S]:
        """The normalized x, and the state `()` as it came."""
        return self._applied(params, state, x, segment_ids, mask=mask), state


def _check_kind(norm: str, kind, num_groups, group_size) -> None:
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f'{norm}: kind must be one of {KINDS}, got {shown(kind)}. Write kind="layer".')
    if kind != "group" and not (num_groups is None and group_size is None):
        raise ValueError(
            f'{norm}: num_groups={shown(num_groups)} and group_size={shown(group_size)} are for kind="group", and '
            f'kind is {kind!r}. Write kind="group", or leave them out.'
        )


@function_of(SegmentNorm)
def segment_norm(
    x: ArrayLike,
    segment_ids: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    num_segments,
    kind,
    num_groups,
    group_size,
    indices_are_sorted,
    mask: ArrayLike | None = None,
    **options,
) -> Array:
    """Normalization of each segment of a packed array by its own statistics: of each graph, sequence or point cloud.

        y = (x - mean) / sqrt(var + epsilon) * (scale + scale_offset) + bias

    with mean and var over the elements that have the same id and, for an "instance" or "group", the same channel or
    group of channels. One segment is the norm of that name of all the rows.

    Args:
      x: array of shape (M, ..., C), or (B, T, ..., C), the channels last. Integers are promoted to float32.
      segment_ids: integers of the shape of x's leading axes: (M,) or (B, T). A negative one, or one that is not below
        num_segments, makes its row absent, as a mask does. On several devices they mean the same segments.
      scale: of shape (C,), or of a shape that broadcasts against x; None is 1.
      bias: the same; None is 0.

    Returns:
      An array of x's shape.

    Raises:
      ValueError: ids that do not cover x's leading axes; no num_segments; a bad kind, epsilon or backend; groups that
        do not divide the channels; a scale, bias or mask that fits x nowhere.
      TypeError: ids that are not integers; a dtype that cannot hold the result.
      NameError: axis_name is not bound here.

    Used by graph networks and packed sequences.

    Source: Fey, Lenssen, "Fast Graph Representation Learning with PyTorch Geometric" (2019), arXiv:1903.02428; its
    `LayerNorm` and `InstanceNorm` with a batch vector.

    >>> import jaxnorm as jn, numpy as np
    >>> x, ids = np.array([[1., 3.], [5., 7.], [2., 4.]]), np.array([0, 0, -1])
    >>> jn.segment_norm(x, ids, num_segments=1, kind="instance").round(3).tolist()
    [[-1.0, -1.0], [1.0, 1.0], [0.0, 0.0]]
    """
    norm = "segment_norm"
    _check_kind(norm, kind, num_groups, group_size)
    x = as_float_array(norm, x, rank=2, layout="(rows, ..., channels)")
    ids, rows, number = align_segment_ids(norm, x, segment_ids, num_segments)
    channel, others = x.ndim - 1, tuple(range(rows, x.ndim - 1))
    view: dict[str, Any] = {}
    if kind == "group":
        groups = canonicalize_group_count(norm, x.shape[-1], num_groups, group_size)
        view = dict(
            view=lambda a: split_channels(a, x.shape, channel, groups), spans_devices=spans_devices(x, channel, groups)
        )
    axes = others + {"instance": (), "group": (channel + 1,)}.get(kind, (channel,))
    over = Segments(number, axes, rows, *canonicalize_flags(norm, indices_are_sorted=indices_are_sorted))
    return normalize_rows(
        norm,
        x,
        scale,
        bias,
        axes,
        (channel,),
        mask=mask,
        centered=kind != "rms",
        segments=(over, ids),
        **view,
        **options,
    )
