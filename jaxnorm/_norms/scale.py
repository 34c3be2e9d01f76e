"""Scale norm: unit length times one learned number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._core.arrays import align_param, as_float_array, canonicalize_axes
from .._core.types import Features
from .._ops.length import check_mode, normalize_length
from .base import RowSpec
from .declare import function_of, spec

Array = jax.Array


class ScaleParams(NamedTuple):
    """The parameters of `scale_norm`."""

    g: Array | None  # (), one number


@spec
class ScaleNorm(RowSpec):
    """The hyperparameters of `scale_norm`.

    Args:
      use_scale: whether `init` makes a g. It starts at the root of the number of features.
      scale_offset: added to g in float32.
      axis: the axis or axes whose elements make one vector.
      epsilon: in units of x where it is "max", of x squared where it is "inside"; >= 0.
      epsilon_mode: "max", the least length that x is divided by; or "inside" of the root, for which there are kernels.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.ScaleNorm()
    >>> params, state = norm.init(4)
    >>> float(params.g), norm.apply(params, state, np.array([[0., 0., -5., 0.]]))[0].round(3).tolist()
    (2.0, [[0.0, 0.0, -2.0, 0.0]])
    """

    Params: ClassVar[Any] = ScaleParams
    scales: ClassVar[tuple[str, ...]] = ("g",)

    axis: int | Sequence[int] = -1
    epsilon: float = 1e-5
    epsilon_mode: str = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_mode("ScaleNorm", self.epsilon_mode)

    if TYPE_CHECKING:

        def init(self, features: Features) -> tuple[ScaleParams, tuple[()]]: ...

    @classmethod
    def option_for(cls, name: str) -> str:
        return "use_scale"

    def init_param(self, name: str, shape: tuple[int, ...]) -> Array:
        return jnp.full((), math.sqrt(math.prod(shape)) - self.scale_offset, self.param_dtype)


@function_of(ScaleNorm)
def scale_norm(
    x: ArrayLike,
    g: ArrayLike | None = None,
    *,
    axis,
    mask: ArrayLike | None = None,
    **options,
) -> Array:
    """Scale norm: x over its length, times one learned number.

        "max":     y = (g + scale_offset) x / max(sqrt(sum(|x|^2)), epsilon),       sum over `axis`
        "inside":  y = (g + scale_offset) x / sqrt(sum(|x|^2) + epsilon)

    Args:
      x: array of any shape of rank 1 or more. Integers are promoted to float32.
      g: one number; None is 1. x-transformers stores g / sqrt(C): multiply it, or put a scale of sqrt(C) after it.

    Returns:
      An array of x's shape.

    Raises:
      ValueError: a bad axis, epsilon, epsilon_mode, or backend; a g or mask that fits x nowhere.
      TypeError: a dtype that cannot hold the result.
      NameError: axis_name is not bound here.

    Used by x-transformers, and by translation models.

    Source: Nguyen, Salazar, "Transformers without Tears" (2019), arXiv:1910.05895.

    >>> import jaxnorm as jn, numpy as np
    >>> jn.scale_norm(np.array([[0., -2.]]), 3., epsilon=4.).tolist()
    [[0.0, -1.5]]
    """
    x = as_float_array("scale_norm", x, rank=1, layout="the normalized axes among its own")
    axes = canonicalize_axes("scale_norm", x.ndim, axis)
    g = align_param("scale_norm", "g", g, x.shape, ())
    return normalize_length("scale_norm", x, g, axes, mask=mask, **options)
