"""Mean subtraction: the mean of the nodes of a graph is taken out of each channel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._core.explain import explained
from .._core.types import Features
from .._ops.elementwise import OfElements
from .._ops.graphs import normalize_nodes
from .base import NoParams, RowSpec
from .declare import S, function_of, spec

Array = jax.Array


@spec
class MeanSubtractionNorm(RowSpec):
    """The hyperparameters of `mean_subtraction_norm`. It has no parameters. The ids come after x in `apply`.

    Args:
      use_scale: without effect here.
      scale_offset: without effect here.
      num_segments: how many graphs there may be. Static: ids are below it, and graphs may be empty.
      indices_are_sorted: promises that the ids do not decrease, which makes sums faster on some platforms. A false
        promise gives wrong means.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.MeanSubtractionNorm(num_segments=1)
    >>> params, state = norm.init(1)
    >>> norm.apply(params, state, np.array([[2.], [6.]]), np.array([0, 0]))[0].tolist()
    [[-2.0], [2.0]]
    """

    Params: ClassVar[Any] = NoParams

    num_segments: int | None = None
    indices_are_sorted: bool = False

    if TYPE_CHECKING:

        def init(self, features: Features) -> tuple[NoParams, tuple[()]]: ...

    @explained("apply")
    def apply(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, params: Any, state: S, x: ArrayLike, segment_ids: ArrayLike, *, train: Any = None, mask: Any = None
    ) -> tuple[Array, S]:
        """x without its mean, and the state `()` as it came."""
        return self._applied(params, state, x, segment_ids, mask=mask), state


@function_of(MeanSubtractionNorm)
def mean_subtraction_norm(
    x: ArrayLike,
    segment_ids: ArrayLike,
    *,
    num_segments,
    indices_are_sorted,
    scale_offset,
    mask: ArrayLike | None = None,
    **options,
) -> Array:
    """Mean subtraction: y = x - mean, each channel by the nodes that have the same id.

    Args:
      x: array of shape (M, ..., C), or (B, T, ..., C), the channels last. Integers are promoted to float32.
      segment_ids: integers of the shape of x's leading axes: (M,) or (B, T). A negative one, or one that is not below
        num_segments, makes its node absent, as a mask does. On several devices they mean the same graphs.

    Returns:
      An array of x's shape.

    Raises:
      ValueError: ids that do not cover x's leading axes; no num_segments; a bad backend; a mask that fits x nowhere.
      TypeError: ids that are not integers; a dtype that cannot hold the result.
      NameError: axis_name is not bound here.

    Used by PyTorch Geometric. Tier C: it may change in any release.

    Source: Yang, Wang, Yao, Liu, Abdelzaher, "Revisiting Over-smoothing in Deep GCNs" (2020), arXiv:2003.13663.

    >>> import jaxnorm as jn, numpy as np
    >>> jn.mean_subtraction_norm(np.array([[2.], [6.], [9.]]), np.array([0, 0, 1]), num_segments=2).tolist()
    [[-2.0], [2.0], [0.0]]
    """
    return normalize_nodes(
        "mean_subtraction_norm", _without_mean, x, segment_ids, {}, None, None, num_segments=num_segments,
        indices_are_sorted=indices_are_sorted, scale_offset=0.0, epsilon=0.0, mask=mask, **options,
    )  # fmt: skip


def _without_mean(x: Array, of: OfElements, affine, epsilon: float) -> Array:
    return affine(of.bounded(jnp.where(of.count == 0, 0.0, of.deviation(x))))
