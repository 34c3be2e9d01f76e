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

from .._core.arrays import sizes_along
from .._core.dtypes import accumulator
from .base import BY_LIKE, Reparametrization, length, split_axes, spread_over

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
    dtype: DTypeLike | None = None

    def init(self, w: ArrayLike, key: Array | None = None) -> tuple[DoRAParams, tuple[()]]:
        w = self.as_weight(w)
        kept, rest = split_axes(self.name, w, self.axis)
        outs, ins = sizes_along(w.shape, kept), sizes_along(w.shape, rest)
        key = jax.random.key(0) if key is None else key
        bound = max(math.prod(ins), 1) ** -0.5
        a = jax.random.uniform(key, (math.prod(ins), self.rank), w.dtype, -bound, bound)
        magnitude = length(w, rest).reshape(outs).astype(w.dtype)
        return DoRAParams(w, magnitude, a, jnp.zeros((self.rank, math.prod(outs)), w.dtype)), ()

    def apply(self, params: Any, state: Any = (), *, train: bool = False) -> tuple[Array, Any]:
        w, magnitude, a, b = self.read(params)
        w = lax.stop_gradient(jnp.asarray(w))
        kept, rest = split_axes(self.name, w, self.axis)
        wide, outs, ins = accumulator(w), sizes_along(w.shape, kept), sizes_along(w.shape, rest)
        factor = 1.0 if self.alpha is None else self.alpha / self.rank
        update = jnp.matmul(jnp.asarray(a).astype(wide), jnp.asarray(b).astype(wide), precision=lax.Precision.HIGHEST)
        order = rest + kept
        update = update.reshape(ins + outs).transpose([order.index(axis) for axis in range(w.ndim)])
        v = w.astype(wide) + factor * update
        norm = lax.stop_gradient(length(v, rest))
        scale: Any = spread_over(self.name, "magnitude", magnitude, w, kept)
        return (v * (scale.astype(wide) / jnp.where(norm == 0, 1.0, norm))).astype(self.dtype or w.dtype), state
