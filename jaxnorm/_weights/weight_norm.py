"""Weight norm: the direction of a weight and its length, learned apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from .._core.arrays import as_float_array, sizes_along
from .._core.types import AxisName
from .._ops.length import normalize_length
from .base import BY_LIKE, Reparametrization, length, options_of_rows, split_axes, spread_over

Array = jax.Array


class WeightNormParams(NamedTuple):
    """The parameters of `WeightNorm`."""

    v: Array  # the shape of the weight
    g: Array  # the sizes along the output axes


def weight_norm(
    v: ArrayLike, g: ArrayLike | None = None, *, axis: int | Sequence[int] | None = -1, epsilon: float = 0.0,
    epsilon_mode: str = "inside", axis_name: AxisName | None = None, dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> Array:  # fmt: skip
    """Weight norm.

        w = g v / |v|,        |v| = sqrt(sum(v^2) + epsilon) over all axes but `axis`

    A v of zeros gives zeros.

    Args:
      v: the direction, of any shape of rank 1 or more.
      g: the length, of the sizes of v along `axis`, or with 1 along all others as torch has it; None is 1.
      axis: the output axis or axes, -1 in a kernel of Flax and 0 in a weight of torch. None is one length for all of v.
      epsilon: a number >= 0.
      epsilon_mode: "inside" of the root, or "max": |v| is at least epsilon.
      axis_name: inside `shard_map`, the mesh axes over which the reduced axes of v are split. Under jit, leave it out.
      dtype: of the result; None is v's.
      implementation: the name of a backend; None chooses.

    Returns:
      An array of v's shape.

    Raises:
      ValueError: a bad axis, epsilon or backend; a g that does not fit.

    Used by vocoders (HiFi-GAN, Encodec, DAC) and in reinforcement learning.

    Source: Salimans, Kingma, "Weight Normalization" (2016), arXiv:1602.07868.

    >>> import numpy as np
    >>> from jaxnorm import weights
    >>> weights.weight_norm(np.array([[3., 0.], [4., 0.]]), np.array([10., 1.])).round().tolist()
    [[6.0, 0.0], [8.0, 0.0]]
    """
    v = as_float_array("weight_norm", v, rank=1, layout="its output axis among its own", what="v")
    kept, reduced = split_axes("weight_norm", v, axis)
    scale = spread_over("weight_norm", "g", g, v, kept)
    return normalize_length(
        "weight_norm", v, scale, reduced, epsilon=epsilon, epsilon_mode=epsilon_mode,
        **options_of_rows(axis_name, v.dtype if dtype is None else dtype, implementation),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightNorm(Reparametrization):
    """The hyperparameters of `weight_norm`. g starts at |v|, so the effective weight starts as the weight itself.

    Args:
      axis, epsilon, epsilon_mode, axis_name, dtype, implementation: of `weight_norm`.
      init_g: the first value of g; None is |v|.
      like: "torch" is its `parametrizations.weight_norm`, with axis=0. "flax" is its `WeightNorm`: g starts at 1, and
        epsilon is 1e-12.

    >>> import numpy as np
    >>> from jaxnorm import weights
    >>> spec = weights.WeightNorm()
    >>> params, state = spec.init(np.array([[3., 0.], [4., 2.]], "f"))
    >>> params.g.tolist(), spec.bake(params).round().tolist()
    ([5.0, 2.0], [[3.0, 0.0], [4.0, 2.0]])
    """

    defaults: ClassVar[Mapping[str | None, Mapping[str, Any]]] = {
        None: {"axis": -1, "epsilon": 0.0, "init_g": None},
        "torch": {"axis": 0},
        "flax": {"epsilon": 1e-12, "init_g": 1.0},
    }
    Params: ClassVar[Any] = WeightNormParams

    axis: int | Sequence[int] | None = BY_LIKE
    epsilon: float = BY_LIKE
    epsilon_mode: str = "inside"
    axis_name: AxisName | None = None
    dtype: DTypeLike | None = None
    implementation: str | None = None
    init_g: float | None = BY_LIKE

    def init(self, w: ArrayLike, key: Array | None = None) -> tuple[WeightNormParams, tuple[()]]:
        w = self.as_weight(w)
        kept, reduced = split_axes(self.name, w, self.axis)
        shape = sizes_along(w.shape, kept)
        if self.init_g is None:
            return WeightNormParams(w, length(w, reduced, self.axis_name).reshape(shape).astype(w.dtype)), ()
        return WeightNormParams(w, jnp.full(shape, self.init_g, w.dtype)), ()

    def apply(self, params: Any, state: Any = (), *, train: bool = False) -> tuple[Array, Any]:
        v, g = self.read(params)
        w = weight_norm(
            v, g, axis=self.axis, epsilon=self.epsilon, epsilon_mode=self.epsilon_mode, axis_name=self.axis_name,
            dtype=self.dtype, implementation=self.implementation,
        )  # fmt: skip
        return w, state
