"""Graph normalization: each channel by the nodes of its graph, with a learned share of the mean taken out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._core.explain import explained
from .._core.types import Features
from .._ops.elementwise import OfElements
from .._ops.graphs import normalize_nodes
from .base import RowSpec
from .declare import S, function_of, spec

Array = jax.Array


class GraphNormParams(NamedTuple):
    """The parameters of `graph_norm`."""

    scale: Array | None  # (C,)
    bias: Array | None  # the same
    mean_scale: Array | None  # the same: the share of the mean that is taken out


@spec
class GraphNorm(RowSpec):
    """The hyperparameters of `graph_norm`. The ids are an argument of `apply`, after x.

    Args:
      use_mean_scale: whether `init` makes a mean_scale, of ones. Without it all of the mean is taken out.
      num_segments: how many graphs there may be. Static: ids are below it, and graphs may be empty.
      indices_are_sorted: promises that the ids do not decrease, which makes sums faster on some platforms. A false
        promise gives wrong statistics.
      epsilon: added to the mean square, in units of x squared; >= 0.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.GraphNorm(num_segments=2, epsilon=0.)
    >>> params, state = norm.init(1)
    >>> x, ids = np.array([[1.], [3.], [50.], [60.]]), np.array([0, 0, 1, 1])
    >>> norm.apply(params, state, x, ids)[0].round(3).tolist()
    [[-1.0], [1.0], [-1.0], [1.0]]
    """

    Params: ClassVar[Any] = GraphNormParams

    use_bias: bool = True
    use_mean_scale: bool = True
    num_segments: int | None = None
    indices_are_sorted: bool = False
    epsilon: float = 1e-5

    if TYPE_CHECKING:

        def init(self, features: Features) -> tuple[GraphNormParams, tuple[()]]: ...

    def init_param(self, name: str, shape: tuple[int, ...]) -> Array:
        return jnp.ones(shape, self.param_dtype) if name == "mean_scale" else super().init_param(name, shape)

    @explained("apply")
    def apply(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, params: Any, state: S, x: ArrayLike, segment_ids: ArrayLike, *, train: Any = None, mask: Any = None
    ) -> tuple[Array, S]:
        """The normalized x, and the state `()` as it came."""
        return self._applied(params, state, x, segment_ids, mask=mask), state


@function_of(GraphNorm)
def graph_norm(
    x: ArrayLike,
    segment_ids: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    mean_scale: ArrayLike | None = None,
    *,
    num_segments,
    indices_are_sorted,
    mask: ArrayLike | None = None,
    **options,
) -> Array:
    """GraphNorm: each channel by the nodes of its graph, with a learned share of the mean taken out.

        o = x - mean_scale mean;   y = o / sqrt(mean(o^2) + epsilon) * (scale + scale_offset) + bias

    with means over the nodes that have the same id. mean(o^2) is var + (1 - mean_scale)^2 mean^2. With a mean_scale of
    1 it is `segment_norm(kind="instance")`.

    Args:
      x: array of shape (M, ..., C), or (B, T, ..., C), the channels last. Integers are promoted to float32.
      segment_ids: integers of the shape of x's leading axes: (M,) or (B, T). A negative one, or one that is not below
        num_segments, makes its node absent, as a mask does. On several devices they mean the same graphs.
      scale: of shape (C,), or of a shape that broadcasts against x; None is 1.
      bias: the same; None is 0.
      mean_scale: the same; None is 1. The paper calls it alpha.

    Returns:
      An array of x's shape.

    Raises:
      ValueError: ids that do not cover x's leading axes; no num_segments; a bad epsilon or backend; a parameter or mask
        that fits x nowhere.
      TypeError: ids that are not integers; a dtype that cannot hold the result.
      NameError: axis_name is not bound here.

    Used by graph neural networks in PyTorch Geometric and DGL.

    Source: Cai, Luo, Xu, He, Liu, Wang, "GraphNorm: A Principled Approach to Accelerating Graph Neural Network
    Training" (2020), arXiv:2009.03294.

    >>> import jaxnorm as jn, numpy as np
    >>> x, ids = np.array([[1.], [7.], [9.]]), np.array([0, 0, -1])
    >>> jn.graph_norm(x, ids, mean_scale=np.array([0.]), num_segments=1, epsilon=0.).round(3).tolist()
    [[0.20000000298023224], [1.4000000953674316], [0.0]]
    """
    return normalize_nodes(
        "graph_norm", _graph, x, segment_ids, {"mean_scale": mean_scale}, scale, bias, num_segments=num_segments,
        indices_are_sorted=indices_are_sorted, mask=mask, **options,
    )  # fmt: skip


def _graph(x: Array, of: OfElements, affine, epsilon: float, mean_scale: Array | None) -> Array:
    if mean_scale is None:
        return affine(of.standardize(x, epsilon))
    left = of.mean * (1.0 - mean_scale.astype(of.mean.dtype))
    r = jnp.where(of.count == 0, 0.0, of.rsqrt(epsilon, beside=left))
    return affine(of.bounded((of.deviation(x) + left.astype(x.dtype)) * r.astype(x.dtype)))
