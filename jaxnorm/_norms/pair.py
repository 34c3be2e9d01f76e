"""Pair normalization: the distances between the nodes of a graph stay as large as they were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._core.arithmetic import abs_squared, nonzero_divisor, reciprocal
from .._core.checks import canonicalize_flags, canonicalize_number
from .._core.explain import explained
from .._core.types import Features
from .._ops.elementwise import OfElements
from .._ops.graphs import normalize_nodes
from .base import NoParams, RowSpec
from .declare import S, function_of, spec

Array = jax.Array


@spec
class PairNorm(RowSpec):
    """The hyperparameters of `pair_norm`. It has no parameters. The ids are an argument of `apply`, after x.

    Args:
      use_scale: without effect here: the scale is a number, `output_scale`.
      scale_offset: without effect here.
      num_segments: how many graphs there may be. Static: ids are below it, and graphs may be empty.
      scale_individually: whether each node is brought to one length, and not all nodes of a graph on average.
      output_scale: the length, one number.
      indices_are_sorted: promises that the ids do not decrease, which makes sums faster on some platforms. A false
        promise gives wrong statistics.
      epsilon: added to the mean square, in units of x squared; with scale_individually to the length; >= 0.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.PairNorm(num_segments=1, epsilon=0.)
    >>> params, state = norm.init(2)
    >>> norm.apply(params, state, np.array([[0., 0.], [6., 8.]]), np.array([0, 0]))[0].round(3).tolist()
    [[-0.6000000238418579, -0.800000011920929], [0.6000000238418579, 0.800000011920929]]
    """

    Params: ClassVar[Any] = NoParams

    num_segments: int | None = None
    scale_individually: bool = False
    output_scale: float = 1.0
    indices_are_sorted: bool = False
    epsilon: float = 1e-5

    if TYPE_CHECKING:

        def init(self, features: Features) -> tuple[NoParams, tuple[()]]: ...

    @explained("apply")
    def apply(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, params: Any, state: S, x: ArrayLike, segment_ids: ArrayLike, *, train: Any = None, mask: Any = None
    ) -> tuple[Array, S]:
        """The normalized x, and the state `()` as it came."""
        return self._applied(params, state, x, segment_ids, mask=mask), state


@function_of(PairNorm)
def pair_norm(
    x: ArrayLike,
    segment_ids: ArrayLike,
    *,
    num_segments,
    scale_individually,
    output_scale,
    indices_are_sorted,
    scale_offset,
    mask: ArrayLike | None = None,
    **options,
) -> Array:
    """PairNorm: the nodes of a graph about their mean, at one mean squared length.

        c = x - mean;   y = output_scale c / sqrt(mean(|c|^2) + epsilon)
        scale_individually:  y = output_scale c / (|c| + epsilon)

    with means over the nodes that have the same id, each channel by itself, and |c| the length over the channels. All
    channels lie on one device.

    Args:
      x: array of shape (M, C), or (B, T, C), the channels last. Integers are promoted to float32.
      segment_ids: integers of the shape of x's leading axes: (M,) or (B, T). A negative one, or one that is not below
        num_segments, makes its node absent, as a mask does. On several devices they mean the same graphs.

    Returns:
      An array of x's shape.

    Raises:
      ValueError: ids that do not cover x's leading axes; no num_segments; a bad epsilon, output_scale or backend; a
        mask that fits x nowhere.
      TypeError: ids that are not integers; a dtype that cannot hold the result.
      NameError: axis_name is not bound here.

    Used by deep graph networks in PyTorch Geometric, against oversmoothing. Tier C: it may change in any release.

    Source: Zhao, Akoglu, "PairNorm: Tackling Oversmoothing in GNNs" (2019), arXiv:1909.12223.

    >>> import jaxnorm as jn, numpy as np
    >>> x, ids = np.array([[0., 0.], [6., 8.]]), np.array([0, 0])
    >>> jn.pair_norm(x, ids, num_segments=1, scale_individually=True, epsilon=0.).round(3).tolist()
    [[-0.6000000238418579, -0.800000011920929], [0.6000000238418579, 0.800000011920929]]
    """
    norm = "pair_norm"
    (each,) = canonicalize_flags(norm, scale_individually=scale_individually)
    size = canonicalize_number(norm, "output_scale", output_scale, "1.0")
    return normalize_nodes(
        norm, _Pair(each), x, segment_ids, {}, size, None, num_segments=num_segments,
        indices_are_sorted=indices_are_sorted, scale_offset=0.0, mask=mask, is_affine=not each, **options,
    )  # fmt: skip


@dataclass(frozen=True)
class _Pair:
    each: bool

    def __call__(self, x: Array, of: OfElements, affine, epsilon: float) -> Array:
        c = of.deviation(x)
        if not self.each:
            return affine(of.bounded(c * of.rsqrt_of_sum(-1, epsilon).astype(x.dtype)))
        counted = c if of.keep is None else jnp.where(of.keep, c, 0.0)
        unit = jax.lax.stop_gradient(jnp.abs(counted).max(-1, keepdims=True, initial=0.0))
        square = abs_squared(counted / nonzero_divisor(unit)).sum(-1, keepdims=True)
        length = unit * jnp.sqrt(jnp.where(unit == 0, 1.0, square))
        over = jnp.where(unit == 0, 0.0, reciprocal(nonzero_divisor(length + epsilon)))
        return affine(of.bounded(c * over))
