"""Partial RMS norm: the root mean square of the first features normalizes all.

Legend: C features, k of which the root mean square is taken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from .._core.arrays import align_boolean_mask, as_float_array, canonicalize_axes
from .._core.checks import canonicalize_number
from .._core.messages import shown, to_python
from .._core.types import Features
from .._ops.length import check_mode, normalize_rms
from .base import RowSpec
from .declare import function_of, spec

Array = jax.Array


class PartialRMSParams(NamedTuple):
    """The parameters of `partial_rms_norm`."""

    scale: Array | None  # (C,)


@spec
class PartialRMSNorm(RowSpec):
    """The hyperparameters of `partial_rms_norm`.

    Args:
      fraction: k / C; k is rounded down. The paper has 1/16.
      size: k itself, in place of a fraction: the true width of rows that are padded.
      axis: the feature axis.
      epsilon: in units of x squared where it is "inside", of x where it is "outside"; >= 0.
      epsilon_mode: "inside" of the root; or "outside", as in the paper's code, which has 1e-8.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.PartialRMSNorm(size=1, epsilon=0.)
    >>> params, state = norm.init(2)
    >>> norm.apply(params, state, np.array([[3., 9.]]))[0].tolist()
    [[1.0, 3.0]]
    """

    Params: ClassVar[Any] = PartialRMSParams

    fraction: float = 0.0625
    size: int | None = None
    axis: int = -1
    epsilon: float = 1e-6
    epsilon_mode: str = "inside"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_mode("PartialRMSNorm", self.epsilon_mode, ("inside", "outside"))
        canonicalize_number("PartialRMSNorm", "fraction", self.fraction, "0.0625", 0.0)

    if TYPE_CHECKING:

        def init(self, features: Features) -> tuple[PartialRMSParams, tuple[()]]: ...


@function_of(PartialRMSNorm)
def partial_rms_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    *,
    fraction,
    size,
    axis,
    mask: ArrayLike | None = None,
    **options,
) -> Array:
    """Partial RMS norm (pRMSNorm): the root mean square of the first k features normalizes all of them.

        "inside":   y = x / sqrt(mean(|x_:k|^2) + epsilon) * (scale + scale_offset)
        "outside":  y = x / (sqrt(mean(|x_:k|^2)) + epsilon) * (scale + scale_offset)

    A feature beyond k that is not finite counts as 0, as padding does: it has no part in the statistic.

    Args:
      x: array of any shape of rank 1 or more. Integers are promoted to float32.
      scale: of shape (C,), or of a shape that broadcasts against x; None is 1.

    Returns:
      An array of x's shape.

    Raises:
      ValueError: a fraction or size that is no number of features from 1 to C; a bad axis, epsilon, epsilon_mode, or
        backend; a scale or mask that fits x nowhere.
      TypeError: a dtype that cannot hold the result.
      NameError: axis_name is not bound here.

    Used by RMSNorm's paper; with `size` by InternVL's attention in vLLM, whose heads are padded.

    Source: Zhang, Sennrich, "Root Mean Square Layer Normalization" (2019), arXiv:1910.07467, section 4.

    >>> import jaxnorm as jn, numpy as np
    >>> jn.partial_rms_norm(np.array([[2., 4., 6., 8.]]), fraction=0.25, epsilon=0.).tolist()
    [[1.0, 2.0, 3.0, 4.0]]
    """
    norm = "partial_rms_norm"
    x = as_float_array(norm, x, rank=1, layout="the feature axis among its own")
    (axis,) = canonicalize_axes(norm, x.ndim, axis, most=1)
    k = _size(norm, x.shape[axis], fraction, size)
    if k != x.shape[axis]:
        x, mask = align_boolean_mask(norm, x, mask)
        first = lax.broadcasted_iota(jnp.int32, tuple(n if a == axis else 1 for a, n in enumerate(x.shape)), axis) < k
        mask = first if mask is None else mask & first
    return normalize_rms(norm, x, scale, (axis,), (axis,), mask=mask, **options)


def _size(norm: str, features: int, fraction: Any, size: Any) -> int:
    given, size = size, to_python(size)
    if size is None:
        size = int(canonicalize_number(norm, "fraction", fraction, "0.0625", 0.0) * features)
        what = f"fraction={shown(fraction)}"
    else:
        what = f"size={shown(given)}"
    if not isinstance(size, int) or isinstance(size, bool) or not (0 < size <= features or size == features):
        raise ValueError(
            f"{norm}: {what} must be of 1 to {features} features of x, got {shown(size)}. Write size={features // 2}."
        )
    return size
