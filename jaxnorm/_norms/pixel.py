"""Pixel norm: the channels of each pixel over their root mean square, without parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax
from jax.typing import ArrayLike

from .._core.arrays import as_float_array, canonicalize_axes
from .._core.types import Features
from .._ops.length import check_mode, normalize_rms
from .base import NoParams, RowSpec
from .declare import function_of, spec

Array = jax.Array


@spec
class PixelNorm(RowSpec):
    """The hyperparameters of `pixel_norm`. It has no parameters.

    Args:
      use_scale: without effect here: there is no scale.
      scale_offset: without effect here.
      axis: the channel axis, or all axes that are normalized together.
      epsilon: in units of x squared where it is "inside", of x where it is "outside"; >= 0.
      epsilon_mode: "inside" of the root, as in StyleGAN; or "outside" (EDM2, with axis=(1, 2, 3) and epsilon=1e-4).

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.PixelNorm()
    >>> params, state = norm.init(2)
    >>> params, norm.apply(params, state, np.array([[3., -3.]]))[0].round(3).tolist()
    (NoParams(), [[1.0, -1.0]])
    """

    Params: ClassVar[Any] = NoParams

    axis: int | Sequence[int] = -1
    epsilon: float = 1e-8
    epsilon_mode: str = "inside"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_mode("PixelNorm", self.epsilon_mode, ("inside", "outside"))

    if TYPE_CHECKING:

        def init(self, features: Features) -> tuple[NoParams, tuple[()]]: ...


@function_of(PixelNorm)
def pixel_norm(x: ArrayLike, *, axis, mask: ArrayLike | None = None, **options) -> Array:
    """Pixel norm: RMS norm over the channels, without a scale.

        "inside":   y = x / sqrt(mean(|x|^2) + epsilon),     mean over `axis`
        "outside":  y = x / (sqrt(mean(|x|^2)) + epsilon)

    Args:
      x: array of any shape of rank 1 or more. Integers are promoted to float32.

    Returns:
      An array of x's shape.

    Raises:
      ValueError: a bad axis, epsilon, epsilon_mode, or backend; a mask that fits x nowhere.
      TypeError: a dtype that cannot hold the result.
      NameError: axis_name is not bound here.

    Used by ProGAN and by StyleGAN 1 to 3 for latents; with epsilon outside by EDM2.

    Source: Karras, Aila, Laine, Lehtinen, "Progressive Growing of GANs" (2017), arXiv:1710.10196; EDM2: Karras et al.
    (2023), arXiv:2312.02696.

    >>> import jaxnorm as jn, numpy as np
    >>> jn.pixel_norm(np.array([[3., -3.]]), epsilon=3., epsilon_mode="outside").tolist()
    [[0.5, -0.5]]
    """
    x = as_float_array("pixel_norm", x, rank=1, layout="the normalized axes among its own")
    axes = canonicalize_axes("pixel_norm", x.ndim, axis)
    return normalize_rms("pixel_norm", x, None, axes, axes, mask=mask, **options)
