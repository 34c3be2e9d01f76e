"""L2 normalization: every example brought to unit length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
from jax.typing import ArrayLike

from .._core.arrays import as_float_array, canonicalize_axes
from .._core.types import Features
from .._ops.length import check_mode, normalize_length
from .base import RowSpec
from .declare import function_of, spec

Array = jax.Array


class L2Params(NamedTuple):
    """The parameters of `l2_norm`."""

    scale: Array | None  # feature shape


@spec
class L2Norm(RowSpec):
    """The hyperparameters of `l2_norm`. There is no scale unless `use_scale=True`.

    Args:
      axis: the axis or axes whose elements make one vector.
      epsilon: in units of x squared where it is "inside", of x where it is "max" (1e-12 in torch's F.normalize); >= 0.
      epsilon_mode: "inside" of the root, as in fla, TransformerEngine and Qwen3-Next; or "max", the least length that
        x is divided by, as in torch and Keras.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.L2Norm(epsilon=0.)
    >>> params, state = norm.init(2)
    >>> norm.apply(params, state, np.array([[3., -4.]]))[0].round(3).tolist()
    [[0.6000000238418579, -0.800000011920929]]
    """

    Params: ClassVar[Any] = L2Params

    use_scale: bool = False
    axis: int | Sequence[int] = -1
    epsilon: float = 1e-6
    epsilon_mode: str = "inside"

    _spare_axes: ClassVar[int] = 1  # per head: (H, D)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_mode("L2Norm", self.epsilon_mode)

    if TYPE_CHECKING:

        def init(self, features: Features) -> tuple[L2Params, tuple[()]]: ...


@function_of(L2Norm)
def l2_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    *,
    axis,
    mask: ArrayLike | None = None,
    **options,
) -> Array:
    """L2 normalization: x over its length.

        "inside":  y = x / sqrt(sum(|x|^2) + epsilon) * (scale + scale_offset),       sum over `axis`
        "max":     y = x / max(sqrt(sum(|x|^2)), epsilon) * (scale + scale_offset)

    A vector of zeros gives zeros. In Megatron, MaxText and Llama 4 a class named L2Norm is `rms_norm` without a scale.

    Args:
      x: array of any shape of rank 1 or more. Integers are promoted to float32.
      scale: of the shape of the normalized axes, or of one that broadcasts against x, such as one number; None is 1.

    Returns:
      An array of x's shape.

    Raises:
      ValueError: a bad axis, epsilon, epsilon_mode, or backend; a scale or mask that fits x nowhere.
      TypeError: a dtype that cannot hold the result.
      NameError: axis_name is not bound here.

    Used by gated DeltaNet, Qwen3-Next and Kimi Delta Attention for queries and keys, nGPT, and retrieval heads.

    Source: Yang, Wang, Zhang, Shen, Kim, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length"
    (2024), arXiv:2406.06484, section 3.3.

    >>> import jaxnorm as jn, numpy as np
    >>> jn.l2_norm(np.array([[3., -4.]]), epsilon=10., epsilon_mode="max").round(3).tolist()
    [[0.30000001192092896, -0.4000000059604645]]
    """
    x = as_float_array("l2_norm", x, rank=1, layout="the normalized axes among its own")
    axes = canonicalize_axes("l2_norm", x.ndim, axis)
    return normalize_length("l2_norm", x, scale, axes, mask=mask, **options)
