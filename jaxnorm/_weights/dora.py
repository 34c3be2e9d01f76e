"""DoRA: a low-rank update of a frozen weight, whose length is learned apart."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from .._core.arrays import sizes_along, spread_along
from .._core.dtypes import accumulator
from .._core.platforms import recompute
from .._core.types import AxisName
from .base import BY_LIKE, Reparametrization, count_of, divided, length, of_device, split_axes, spread_over

Array = jax.Array


class DoRAParams(NamedTuple):
    """The parameters of `DoRA`."""

    w: Array  # the frozen weight; its gradient is 0
    magnitude: Array  # the sizes along the output axes
    a: Array  # (rest, rank)
    b: Array  # (rank, out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoRA(Reparametrization):
    """DoRA.

        magnitude V / stop_gradient(|V|),       V = w + (alpha / rank) (a b), |V| over all axes but `axis`

    magnitude starts at |w|, a at random and b at 0, so the effective weight starts as the weight itself. w is frozen.
    An output of zeros stays so.

    Args:
      rank: of the update.
      alpha: the factor of the update is alpha / rank; None is rank.
      axis: the output axis or axes: -1 in a kernel of Flax, 0 in a weight of torch.
      axis_name: inside `shard_map`, the mesh axes over which the other axes of w, and the rows of a, are split. Columns
        of b are split as the outputs of w. Under jit, leave it out.
      dtype: of the result; None is w's.
      like: "torch" is axis=0, as PEFT.

    Used by PEFT. Tier C: it may change in any release.

    Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (2024), arXiv:2402.09353.

    >>> import jax, numpy as np
    >>> from jaxnorm import weights
    >>> params, _ = weights.DoRA(rank=1).init(np.array([[3.], [4.]], "f"), jax.random.key(0))
    >>> params.magnitude.tolist(), weights.DoRA(rank=1).bake(params).round().tolist()
    ([5.0], [[3.0], [4.0]])
    """

    defaults: ClassVar[Mapping[str | None, Mapping[str, Any]]] = {None: {"axis": -1}, "torch": {"axis": 0}}
    Params: ClassVar[Any] = DoRAParams
    labels: ClassVar[Mapping[str, str]] = MappingProxyType({"w": "fixed", "a": "decayed", "b": "decayed"})

    rank: int = 8
    alpha: float | None = None
    axis: int | Sequence[int] = BY_LIKE
    axis_name: AxisName | None = None
    dtype: DTypeLike | None = None

    def init(self, w: ArrayLike, key: Array | None = None) -> tuple[DoRAParams, tuple[()]]:
        w = self.as_weight(w)
        kept, rest = split_axes(self.name, w, self.axis)
        outs, ins = sizes_along(w.shape, kept), sizes_along(w.shape, rest)
        key = jax.random.key(0) if key is None else key
        bound = max(count_of(w, rest, self.axis_name), 1) ** -0.5
        key = of_device(key, self.axis_name)
        a = jax.random.uniform(key, (math.prod(ins), self.rank), w.dtype, -bound, bound)
        magnitude = length(w, rest, self.axis_name).reshape(outs).astype(w.dtype)
        return DoRAParams(w, magnitude, a, jnp.zeros((self.rank, math.prod(outs)), w.dtype)), ()

    def apply(self, params: Any, state: Any = (), *, train: bool = False) -> tuple[Array, Any]:
        w, magnitude, a, b = map(jnp.asarray, self.read(params))
        kept, rest = split_axes(self.name, w, self.axis)
        factor = 1.0 if self.alpha is None else self.alpha / self.rank
        scale: Any = spread_over(self.name, "magnitude", magnitude, w, kept)
        # Of w as the matrix that the product is, nothing is transposed: outputs are first or last in most weights.
        first = kept == tuple(range(len(kept)))
        order = kept + rest if first else rest + kept
        shape = tuple(math.prod(sizes_along(w.shape, axes)) for axes in ((kept, rest) if first else (rest, kept)))
        scale = jnp.broadcast_to(scale, spread_along(w.shape, kept)).transpose(order)
        scale = scale.reshape((-1, 1) if first else (1, -1))

        def updated(w, a, b) -> Array:
            w = lax.stop_gradient(w.transpose(order).reshape(shape))
            a, b = (t.astype(accumulator(w)) for t in ((b.T, a.T) if first else (a, b)))
            return w.astype(a.dtype) + factor * jnp.matmul(a, b, precision=lax.Precision.HIGHEST)

        norm = length(updated(w, *lax.stop_gradient((a, b))), (1 if first else 0,), self.axis_name)
        y = recompute(lambda w, a, b, scale: divided(updated(w, a, b), norm, self.dtype or w.dtype, scale), False)(
            w, a, b, scale
        )
        return y.reshape([w.shape[a] for a in order]).transpose([order.index(a) for a in range(w.ndim)]), state
