"""Graph size normalization: nodes by the root of how many there are in their graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._core.arithmetic import nonzero_divisor
from .._core.explain import explained
from .._core.types import Features
from .._ops.elementwise import OfElements
from .._ops.graphs import normalize_nodes
from .base import NoParams, RowSpec
from .declare import S, function_of, spec

Array = jax.Array


@spec
class GraphSizeNorm(RowSpec):
    """The hyperparameters of `graph_size_norm`. It has no parameters. The ids are an argument of `apply`, after x.

    Args:
      use_scale: without effect here.
      scale_offset: without effect here.
      num_segments: how many graphs there may be. Static: ids are below it, and graphs may be empty.
      indices_are_sorted: promises that the ids do not decrease, which makes sums faster on some platforms. A false
        promise gives wrong counts.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.GraphSizeNorm(num_segments=1)
    >>> params, state = norm.init(1)
    >>> norm.apply(params, state, np.ones((4, 1)), np.zeros(4, int))[0].tolist()
    [[0.5], [0.5], [0.5], [0.5]]
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
        """x by its graph's size, and the state `()` as it came."""
        return self._applied(params, state, x, segment_ids, mask=mask), state


@function_of(GraphSizeNorm)
def graph_size_norm(
    x: ArrayLike,
    segment_ids: ArrayLike,
    *,
    num_segments,
    indices_are_sorted,
    scale_offset,
    mask: ArrayLike | None = None,
    **options,
) -> Array:
    """Graph size normalization: y = x / sqrt(n), with n the valid nodes that have the same id.

    With an x of more axes than nodes and channels, n counts all valid elements of a channel.

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

    Used by PyTorch Geometric and graph benchmarks. Tier C: it may change in any release.

    Source: Dwivedi, Joshi, Luu, Laurent, Bengio, Bresson, "Benchmarking Graph Neural Networks" (2020),
    arXiv:2003.00982.

    >>> import jaxnorm as jn, numpy as np
    >>> x, ids = np.ones((5, 1)), np.array([0, 0, 0, 0, -1])
    >>> jn.graph_size_norm(x, ids, num_segments=1).tolist()
    [[0.5], [0.5], [0.5], [0.5], [0.0]]
    """
    return normalize_nodes(
        "graph_size_norm", _by_size, x, segment_ids, {}, None, None, num_segments=num_segments, centered=False,
        indices_are_sorted=indices_are_sorted, scale_offset=0.0, epsilon=0.0, mask=mask, is_affine=False,
        **options,
    )  # fmt: skip


def _by_size(x: Array, of: OfElements, affine, epsilon: float) -> Array:
    r = jnp.where(of.count == 0, 0.0, 1.0 / jnp.sqrt(nonzero_divisor(of.count)))
    return affine(of.bounded(x * r.astype(x.dtype)))
