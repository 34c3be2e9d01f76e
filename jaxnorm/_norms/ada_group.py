"""Adaptive group normalization: scale and shift come from a condition, such as a time step or a style."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.typing import ArrayLike

from .._core.arrays import as_float_array, canonicalize_axes
from .._core.channels import canonicalize_group_count, spans_devices, split_channels
from .._ops.modulate import gated, modulated
from .._ops.rows import normalize_rows
from .base import RowSpec
from .declare import function_of, spec
from .modulated import ModulatedSpec

Array = jax.Array


@spec
class AdaGroupNorm(ModulatedSpec, RowSpec):
    """The hyperparameters of `ada_group_norm`. The condition is an argument of `apply`, after x.

    Args:
      num_groups: G, the number of groups; 32 unless it or group_size is given.
      group_size: C / G, the number of channels in a group; 1 is instance norm.
      axis: the channel axis, at any position.
      epsilon: added to the variance, in units of x squared; >= 0.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.AdaGroupNorm(num_groups=2, condition_features=3, epsilon=0.)
    >>> params, state = norm.init(4)
    >>> norm.apply(params, state, np.array([[1., 3., 10., 30.]]), np.ones((1, 3)))[0].round(3).tolist()
    [[-1.0, 1.0, -1.0, 1.0]]
    """

    num_groups: int | None = None
    group_size: int | None = None
    axis: int = -1
    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_groups is None and self.group_size is None:
            object.__setattr__(self, "num_groups", 32)

    def _check_features(self, shape: tuple[int, ...]) -> None:
        super()._check_features(shape)
        canonicalize_group_count("AdaGroupNorm.init", math.prod(shape), self.num_groups, self.group_size)


@function_of(AdaGroupNorm)
def ada_group_norm(
    x: ArrayLike,
    modulation: Any,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    parts,
    modulation_offset,
    scale_offset,
    num_groups,
    group_size,
    axis,
    mask: ArrayLike | None = None,
    **options,
) -> Any:
    """Group norm with a scale and a shift that come from a condition (AdaGN).

        y = norm(x) (m.scale + 1) + m.shift,   norm(x) = group_norm(x) (scale + scale_offset) + bias

    with the statistics of each group of channels over all axes but the batch axis 0. With group_size=1 it is instance
    norm: the AdaIN of StyleGAN, whose scale and shift come from a dense layer.

    Args:
      x: array of shape (B, ..., C), the channels at `axis`. Integers are promoted to float32.
      modulation: m, a dict or an array of parts, as for `ada_layer_norm`.
      scale: of the norm's own, of shape (C,) or of one that broadcasts against x; None is 1.
      bias: the same; None is 0.

    Returns:
      y, of x's shape; and where the modulation has a gate, that too, in y's dtype and of a shape that broadcasts
      against x.

    Raises:
      ValueError: groups that do not divide the channels; a modulation, scale, bias or mask that fits x nowhere; a bad
        axis, epsilon or backend.
      TypeError: a dtype that cannot hold the result.
      NameError: axis_name is not bound here.

    Source: Dhariwal, Nichol, "Diffusion Models Beat GANs on Image Synthesis" (2021), arXiv:2105.05233. Used by the
    UNets of guided diffusion, by diffusers' `AdaGroupNorm` and k-diffusion; StyleGAN: Karras, Laine, Aila (2018),
    arXiv:1812.04948.

    >>> import jaxnorm as jn, numpy as np
    >>> x, m = np.array([[1., 3., 10., 30.]]), {"scale": np.array([[0., 0., 1., 1.]])}
    >>> jn.ada_group_norm(x, m, num_groups=2, epsilon=0.).round(3).tolist()
    [[-1.0, 1.0, -2.0, 2.0]]
    """
    norm = "ada_group_norm"
    x = as_float_array(norm, x, rank=2, layout="(batch, ..., channels)")
    (channel,) = canonicalize_axes(norm, x.ndim, axis, most=1)
    groups = canonicalize_group_count(norm, x.shape[channel], num_groups, group_size, x.shape)
    affine, gate = modulated(norm, modulation, parts, x.shape, channel, scale, bias, scale_offset, modulation_offset)
    # In the view the channel axis c is two: the groups at c, and the channels of a group at c + 1.
    reduced = tuple(a if a < channel else a + 1 for a in range(1, x.ndim))
    y = normalize_rows(
        norm, x, axes=reduced, feature_axes=(channel,), mask=mask, **affine, **options,
        view=lambda a: split_channels(a, x.shape, channel, groups), spans_devices=spans_devices(x, channel, groups),
    )  # fmt: skip
    return gated(y, gate)
