"""Weight standardization: a weight of mean 0 and variance 1 for each output; scaled, of the variance of its fan-in."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from .._core.arithmetic import nonzero_divisor
from .._core.arrays import as_float_array, sizes_along
from .._core.checks import canonicalize_epsilon
from .._core.dtypes import accumulator, widest
from .._core.messages import shown
from .._core.types import AxisName
from .._ops.elementwise import OfElements, normalize_by_statistics
from .._ops.rows import normalize_rows
from .base import BY_LIKE, Reparametrization, count_of, options_of_rows, split_axes, spread_over, summed

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class _Standardized:
    """(w - mean) r of one output. Equal ones share a trace."""

    mode: str  # r = 1 / sqrt(v + epsilon), 1 / (sqrt(v) + epsilon), or 1 / sqrt(max(n v, epsilon))
    unbiased: bool
    fan_in: bool  # r / sqrt(n)

    def __call__(self, w: Array, of: OfElements, affine: Callable, epsilon: float) -> Array:
        n = nonzero_divisor(of.count)
        c = jnp.sqrt(n / jnp.maximum(n - 1.0, 1.0)) if self.unbiased else jnp.ones_like(n)
        if self.mode == "inside":
            r = of.rsqrt(epsilon / jnp.square(c)) / c
        else:
            r = of.rsqrt(0.0)  # 0 where the variance is
            if self.mode == "outside":
                r = jnp.where(r == 0, 1.0 / epsilon if epsilon else 0.0, r / (c + epsilon * r))
            else:
                r = r / jnp.sqrt(n)
                most = 1.0 / math.sqrt(epsilon) if epsilon else math.inf
                r = jnp.where(r == 0, most if epsilon else 0.0, jnp.minimum(r, most))
        r = r / jnp.sqrt(n) if self.fan_in and self.mode != "max" else r
        return affine(of.deviation(w) * r.astype(w.dtype))


def _standardized(
    norm: str, w: ArrayLike, gain: ArrayLike | None, *, axis, epsilon, mode: str, modes: tuple[str, ...],
    factor: float = 1.0, unbiased=False, fan_in=False, axis_name=None, dtype=None, implementation=None,
) -> Array:  # fmt: skip
    w = as_float_array(norm, w, rank=1, layout="its output axis among its own", what="w")
    kept, reduced = split_axes(norm, w, axis)
    if mode not in modes:
        either = " or ".join(f'"{m}"' for m in modes)
        raise ValueError(f'{norm}: epsilon_mode must be {either}, got {shown(mode)}. Write "{modes[0]}".')
    epsilon, n = canonicalize_epsilon(norm, epsilon), math.prod(sizes_along(w.shape, reduced))
    scale = spread_over(norm, "gain", gain, w, kept)
    options = options_of_rows(axis_name, w.dtype if dtype is None else dtype, implementation)
    by_kernel = mode == "inside" and axis_name is None and n > 1
    if by_kernel:  # it is a layer norm
        c = (n - 1) / n if unbiased else 1.0
        epsilon, factor = epsilon * c, factor * math.sqrt(c / (n if fan_in else 1))
    if factor != 1.0:
        scale = (
            jnp.full((1,) * w.ndim, factor, jnp.float32)
            if scale is None
            else scale.astype(widest(scale.dtype, jnp.float32)) * factor
        )
    if by_kernel:
        return normalize_rows(norm, w, scale, None, reduced, reduced, epsilon=epsilon, **options)
    of = _Standardized(mode, unbiased, fan_in)
    return normalize_by_statistics(norm, of, w, {}, scale, None, reduced, reduced, epsilon=epsilon, **options)


def standardize(
    w: ArrayLike, *, axis: int | Sequence[int] | None = -1, epsilon: float = 1e-6, epsilon_mode: str = "inside",
    unbiased: bool = False, scale: bool = True, axis_name: AxisName | None = None, dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> Array:  # fmt: skip
    """Weight standardization.

        "inside":   (w - m) / sqrt(v + epsilon)
        "outside":  (w - m) / (sqrt(v) + epsilon)         m, v over all axes but `axis`

    Args:
      w: the weight, of any shape of rank 1 or more.
      axis: the output axis or axes, -1 in a kernel of Flax and 0 in a weight of torch.
      epsilon: a number >= 0.
      epsilon_mode: "inside" or "outside" of the root.
      unbiased: divide the sum of squares by n - 1.
      scale: False gives w - m alone, the weight centering of MABN.
      axis_name: inside `shard_map`, the mesh axes over which the reduced axes of w are split.
      dtype: of the result; None is w's.
      implementation: the name of a backend; None chooses.

    Returns:
      An array of w's shape.

    Raises:
      ValueError: a bad axis, epsilon, mode or backend.

    Used by BiT, ViT hybrids and the UNets of diffusion models.

    Source: Qiao, Wang, Liu, Shen, Yuille, "Weight Standardization" (2019), arXiv:1903.10520.

    >>> import numpy as np
    >>> from jaxnorm import weights
    >>> weights.standardize(np.array([[1., 5.], [3., 5.]])).round(3).tolist()
    [[-1.0, 0.0], [1.0, 0.0]]
    """
    if not scale:
        w = as_float_array("standardize", w, rank=1, layout="its output axis among its own", what="w")
        reduced, wide = split_axes("standardize", w, axis)[1], w.astype(accumulator(w))
        n = max(count_of(w, reduced, axis_name), 1)
        return (wide - summed(wide.sum(reduced, keepdims=True), axis_name) / n).astype(dtype or w.dtype)
    return _standardized(
        "standardize", w, None, axis=axis, epsilon=epsilon, mode=epsilon_mode, modes=("inside", "outside"),
        unbiased=unbiased, axis_name=axis_name, dtype=dtype, implementation=implementation,
    )  # fmt: skip


def scaled_standardize(
    w: ArrayLike, gain: ArrayLike | None = None, *, axis: int | Sequence[int] | None = -1, gamma: float = 1.0,
    epsilon: float = 1e-4, epsilon_mode: str = "max", axis_name: AxisName | None = None,
    dtype: DTypeLike | None = None, implementation: str | None = None,
) -> Array:  # fmt: skip
    """Scaled weight standardization: outputs keep the variance of the inputs.

        "max":      gain gamma (w - m) / sqrt(max(n v, epsilon))
        "inside":   gain gamma (w - m) / sqrt(n (v + epsilon))       m, v over all axes but `axis`, n elements

    Args:
      w: the weight, of any shape of rank 1 or more.
      gain: of the sizes of w along `axis`; None is 1.
      axis: the output axis or axes, -1 in a kernel of Flax and 0 in a weight of torch.
      gamma: what undoes the activation; see `variance_gain`. DeepMind multiplies the activation by it, timm the weight.
      epsilon: a number >= 0.
      epsilon_mode: "max" or "inside".
      axis_name: inside `shard_map`, the mesh axes over which the reduced axes of w are split.
      dtype: of the result; None is w's.
      implementation: the name of a backend; None chooses.

    Returns:
      An array of w's shape.

    Raises:
      ValueError: a bad axis, epsilon, mode or backend; a gain that does not fit.

    Used by NF-ResNet and NFNet.

    Source: Brock, De, Smith, "Characterizing signal propagation to close the performance gap in unnormalized ResNets"
    (2021), arXiv:2101.08692.

    >>> import numpy as np
    >>> from jaxnorm import weights
    >>> weights.scaled_standardize(np.array([[1., 5.], [3., 5.]])).round(3).tolist()
    [[-0.7070000171661377, 0.0], [0.7070000171661377, 0.0]]
    """
    return _standardized(
        "scaled_standardize", w, gain, axis=axis, epsilon=epsilon, mode=epsilon_mode, modes=("max", "inside"),
        factor=float(gamma), fan_in=True, axis_name=axis_name, dtype=dtype, implementation=implementation,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Standardize(Reparametrization):
    """The hyperparameters of `standardize`. The parameter is w itself.

    Args:
      axis, epsilon, epsilon_mode, unbiased, scale, axis_name, dtype, implementation: of `standardize`.
      like: "timm" (axis 0), "official" (axis 0, unbiased, 1e-5 outside), "big_vision" (1e-5 outside), "bit" (axis 0,
        1e-10 inside).

    >>> import numpy as np
    >>> from jaxnorm import weights
    >>> weights.Standardize().bake(np.array([[1.], [3.]])).round(3).tolist()
    [[-1.0], [1.0]]
    """

    defaults: ClassVar[Mapping[str | None, Mapping[str, Any]]] = {
        None: {"axis": -1, "epsilon": 1e-6, "epsilon_mode": "inside", "unbiased": False},
        "timm": {"axis": 0},
        "official": {"axis": 0, "epsilon": 1e-5, "epsilon_mode": "outside", "unbiased": True},
        "big_vision": {"epsilon": 1e-5, "epsilon_mode": "outside"},
        "bit": {"axis": 0, "epsilon": 1e-10},
    }

    axis: int | Sequence[int] | None = BY_LIKE
    epsilon: float = BY_LIKE
    epsilon_mode: str = BY_LIKE
    unbiased: bool = BY_LIKE
    scale: bool = True
    axis_name: AxisName | None = None
    dtype: DTypeLike | None = None
    implementation: str | None = None

    def apply(self, params: Any, state: Any = (), *, train: bool = False) -> tuple[Array, Any]:
        w = standardize(
            params, axis=self.axis, epsilon=self.epsilon, epsilon_mode=self.epsilon_mode, unbiased=self.unbiased,
            scale=self.scale, axis_name=self.axis_name, dtype=self.dtype, implementation=self.implementation,
        )  # fmt: skip
        return w, state


class ScaledStandardizeParams(NamedTuple):
    """The parameters of `ScaledStandardize`."""

    w: Array  # the shape of the weight
    gain: Array  # the sizes along the output axes


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaledStandardize(Reparametrization):
    """The hyperparameters of `scaled_standardize`. gain starts at 1.

    Args:
      axis, gamma, epsilon, epsilon_mode, axis_name, dtype, implementation: of `scaled_standardize`.
      like: "nfnets" (DeepMind: epsilon 1e-4 as a maximum) or "timm" (axis 0, 1e-6 inside).

    >>> import numpy as np
    >>> from jaxnorm import weights
    >>> spec = weights.ScaledStandardize(gamma=weights.variance_gain("relu"))
    >>> params, state = spec.init(np.array([[1.], [3.]], "f"))
    >>> spec.bake(params).round(3).tolist()
    [[-1.2120000123977661], [1.2120000123977661]]
    """

    defaults: ClassVar[Mapping[str | None, Mapping[str, Any]]] = {
        None: {"axis": -1, "epsilon": 1e-4, "epsilon_mode": "max"},
        "nfnets": {},
        "timm": {"axis": 0, "epsilon": 1e-6, "epsilon_mode": "inside"},
    }
    Params: ClassVar[Any] = ScaledStandardizeParams

    axis: int | Sequence[int] | None = BY_LIKE
    gamma: float = 1.0
    epsilon: float = BY_LIKE
    epsilon_mode: str = BY_LIKE
    axis_name: AxisName | None = None
    dtype: DTypeLike | None = None
    implementation: str | None = None

    def init(self, w: ArrayLike, key: Array | None = None) -> tuple[ScaledStandardizeParams, tuple[()]]:
        w = self.as_weight(w)
        kept, _ = split_axes(self.name, w, self.axis)
        return ScaledStandardizeParams(w, jnp.ones(sizes_along(w.shape, kept), w.dtype)), ()

    def apply(self, params: Any, state: Any = (), *, train: bool = False) -> tuple[Array, Any]:
        w, gain = self.read(params)
        effective = scaled_standardize(
            w, gain, axis=self.axis, gamma=self.gamma, epsilon=self.epsilon, epsilon_mode=self.epsilon_mode,
            axis_name=self.axis_name, dtype=self.dtype, implementation=self.implementation,
        )  # fmt: skip
        return effective, state
