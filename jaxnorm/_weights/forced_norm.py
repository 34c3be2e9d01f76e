"""Forced weight norm, and the magnitude-preserving functions that belong to it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from .._core.arrays import as_float_array
from .._core.dtypes import widest
from .._core.types import AxisName
from .._ops.length import normalize_rms
from .base import BY_LIKE, Reparametrization, count_of, options_of_rows, split_axes

Array = jax.Array


def forced_norm(
    w: ArrayLike, gain: ArrayLike | float | None = None, *, axis: int | Sequence[int] | None = -1,
    epsilon: float = 1e-4, axis_name: AxisName | None = None, dtype: DTypeLike | None = None,
) -> Array:  # fmt: skip
    """A weight of unit root mean square for each output; with a gain, for use in a layer.

        project:   w / (rms(w) + epsilon)
        use:       the same, times gain / sqrt(n)        over all axes but `axis`, n elements

    Args:
      w: the weight, of any shape of rank 1 or more.
      gain: one number, for use; None projects.
      axis: the output axis or axes, -1 in a kernel of Flax and 0 in a weight of torch.
      epsilon: outside of the root.
      axis_name: inside `shard_map`, the mesh axes over which the reduced axes of w are split. Under
        jit, leave it out.
      dtype: of the result; None is w's.

    Returns:
      An array of w's shape.

    Raises:
      ValueError: a bad axis or epsilon.

    Used by EDM2 and other magnitude-preserving networks.

    Source: Karras, Aittala, Lehtinen, Hellsten, Aila, Laine, "Analyzing and Improving the Training Dynamics of
    Diffusion Models" (2023), arXiv:2312.02696.

    >>> import numpy as np
    >>> from jaxnorm import weights
    >>> weights.forced_norm(np.array([[3.], [-3.]]), epsilon=0.).round(3).tolist()
    [[1.0], [-1.0]]
    """
    norm = "forced_norm"
    w = as_float_array(norm, w, rank=1, layout="its output axis among its own", what="w")
    _, reduced = split_axes(norm, w, axis)
    scale = None
    if gain is not None:
        factor = max(count_of(w, reduced, axis_name), 1) ** -0.5
        scale = jnp.reshape(jnp.asarray(gain, widest(w.dtype, jnp.float32)) * factor, (1,) * w.ndim)
    options = options_of_rows(axis_name, w.dtype if dtype is None else dtype, None)
    return normalize_rms(norm, w, scale, reduced, reduced, epsilon=epsilon, epsilon_mode="outside", **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForcedNorm(Reparametrization):
    """The hyperparameters of `forced_norm`. The parameter is w itself, which `init` and `project` project.

    Call `project` after each step of the optimizer. EDM2 does it inside of the forward pass, in training alone.

    Args:
      axis, epsilon, axis_name, dtype: of `forced_norm`.
      gain: of the use, one number.
      like: "torch" is axis=0, as EDM2.

    >>> import numpy as np
    >>> from jaxnorm import weights
    >>> w, _ = weights.ForcedNorm().init(np.array([[3.], [-3.]], "f"))
    >>> w.round(3).tolist(), weights.ForcedNorm().bake(w).round(3).tolist()
    ([[1.0], [-1.0]], [[0.7070000171661377], [-0.7070000171661377]])
    """

    defaults: ClassVar[Mapping[str | None, Mapping[str, Any]]] = {None: {"axis": -1}, "torch": {"axis": 0}}

    axis: int | Sequence[int] | None = BY_LIKE
    epsilon: float = 1e-4
    gain: float = 1.0
    axis_name: AxisName | None = None
    dtype: DTypeLike | None = None

    def init(self, w: ArrayLike, key: Array | None = None) -> tuple[Array, tuple[()]]:
        return self.project(self.as_weight(w)), ()

    def project(self, params: Any) -> Array:
        return forced_norm(params, axis=self.axis, epsilon=self.epsilon, axis_name=self.axis_name)

    def apply(self, params: Any, state: Any = (), *, train: bool = False) -> tuple[Array, Any]:
        w = forced_norm(
            params, self.gain, axis=self.axis, epsilon=self.epsilon, axis_name=self.axis_name, dtype=self.dtype
        )
        return w, state


def mp_sum(a: ArrayLike, b: ArrayLike, t: float = 0.5) -> Array:
    """The sum of two uncorrelated arrays of unit variance, of unit variance.

        ((1 - t) a + t b) / sqrt((1 - t)^2 + t^2)

    Args:
      a: an array.
      b: another.
      t: the part of b.

    >>> import numpy as np
    >>> from jaxnorm import weights
    >>> weights.mp_sum(np.array([1.]), np.array([1.])).round(3).tolist()
    [1.4140000343322754]
    """
    length = math.hypot(1.0 - t, t)
    return jnp.asarray(a) * ((1.0 - t) / length) + jnp.asarray(b) * (t / length)


def mp_silu(x: ArrayLike) -> Array:
    """silu(x) / 0.596, which keeps unit variance.

    Args:
      x: an array.

    >>> from jaxnorm import weights
    >>> weights.mp_silu(0.).tolist()
    0.0
    """
    return jax.nn.silu(as_float_array("mp_silu", x)) / 0.596
