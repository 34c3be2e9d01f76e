"""Unit norm: weights that are projected to unit length after each step of an optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.typing import ArrayLike, DTypeLike

from .._core.arrays import as_float_array, canonicalize_axes
from .._core.types import AxisName
from .._ops.length import normalize_length
from .base import Reparametrization, options_of_rows

Array = jax.Array


def unit_norm(
    w: ArrayLike, *, axis: int | Sequence[int] = -2, epsilon: float = 0.0, axis_name: AxisName | None = None,
    dtype: DTypeLike | None = None, implementation: str | None = None,
) -> Array:  # fmt: skip
    """w over its length along one axis.

        w / max(|w|, epsilon),       |w| = sqrt(sum(w^2)) along `axis`

    A vector of zeros stays so.

    Args:
      w: the weight.
      axis: the axis that has unit length, that of the embedding: the inputs (-2) of a kernel (in, out) that reads the
        stream, and the outputs (-1) of one that writes to it.
      epsilon: the least length.
      axis_name: inside `shard_map`, the mesh axes over which `axis` is split.
      dtype: of the result; None is w's.
      implementation: the name of a backend; None chooses.

    Returns:
      An array of w's shape.

    Raises:
      ValueError: a bad axis, epsilon or backend.

    Used by nGPT and SimBaV2.

    Source: Loshchilov, Hsieh, Sun, Ginsburg, "nGPT" (2024), arXiv:2410.01131.

    >>> import numpy as np
    >>> from jaxnorm import weights
    >>> weights.unit_norm(np.array([[3.], [4.]])).round(3).tolist()
    [[0.6000000238418579], [0.800000011920929]]
    """
    norm = "unit_norm"
    w = as_float_array(norm, w, rank=1, layout="its embedding axis among its own", what="w")
    axes = canonicalize_axes(norm, w.ndim, axis)
    options = options_of_rows(axis_name, w.dtype if dtype is None else dtype, implementation)
    mode = "max" if epsilon else "inside"  # without epsilon they are one, and there are kernels for it
    return normalize_length(norm, w, None, axes, epsilon=epsilon, epsilon_mode=mode, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnitNorm(Reparametrization):
    """The hyperparameters of `unit_norm`. The parameter is w itself, projected by `init` and `project`.

    `apply` returns it as it is stored: call `project` after each step of the optimizer.

    Args:
      axis, epsilon, axis_name, dtype, implementation: of `unit_norm`.

    >>> import numpy as np
    >>> from jaxnorm import weights
    >>> spec = weights.UnitNorm(axis=-1)
    >>> w, _ = spec.init(np.array([[3., 4.]], "f"))
    >>> (w**2).sum().round(3).tolist(), (spec.project(2 * w) ** 2).sum().round(3).tolist()
    (1.0, 1.0)
    """

    axis: int | Sequence[int] = -2
    epsilon: float = 0.0
    axis_name: AxisName | None = None
    dtype: DTypeLike | None = None
    implementation: str | None = None

    def init(self, w: ArrayLike, key: Array | None = None) -> tuple[Array, tuple[()]]:
        return self.project(self.as_weight(w)), ()

    def project(self, params: Any) -> Array:
        return unit_norm(
            params, axis=self.axis, epsilon=self.epsilon, axis_name=self.axis_name, implementation=self.implementation
        )

    def apply(self, params: Any, state: Any = (), *, train: bool = False) -> tuple[Array, Any]:
        w = self.as_weight(params)
        return w if self.dtype is None else w.astype(self.dtype), state
