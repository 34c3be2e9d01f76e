"""QK norm: the queries and the keys of attention, normalized before their dot product.

Legend: H heads of q, K heads of k (K = H, or fewer), D the width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._core.arrays import align_param, as_float_array, canonicalize_axes, sizes_along
from .._core.checks import canonicalize_number, check_cast
from .._core.dtypes import accumulator
from .._core.explain import explained
from .._core.messages import shown
from .._core.types import Features
from .._ops.formula import affine_times
from .._ops.length import normalize_length
from .._ops.rows import normalize_rows
from .base import RowSpec
from .declare import S, function_of, spec

Array = jax.Array

KINDS = ("rms", "layer", "l2")


class QKParams(NamedTuple):
    """The parameters of `qk_norm`. In layers and checkpoints `q_scale` is `q_norm/scale`, and so on."""

    q_scale: Array | None  # (D,), one of each head (H, D), or over all heads (H D,)
    k_scale: Array | None  # the same, with K heads
    q_bias: Array | None  # like q_scale
    k_bias: Array | None  # like k_scale
    temperature: Array | None  # (), one number


@spec
class QKNorm(RowSpec):
    """The hyperparameters of `qk_norm`. The keys are an argument of `apply`, after the queries.

    Args:
      use_temperature: whether `init` makes a temperature.
      init_temperature: its first value. For sequences of length L, Henry et al. have log2(L^2 - L).
      init_k_heads: the number of heads of k, for parameters of each head, where k has fewer heads than q.
      kind: "rms", "layer" (ViT-22B) or "l2" (unit length).
      axis: the width of a head, or (heads, width) to normalize over all heads together.
      epsilon: added to the mean square, the variance, or for "l2" the sum of squares; >= 0.
      cast: as for `rms_norm`: "before_scale" for Qwen3.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.QKNorm(epsilon=0.)
    >>> params, state = norm.init(2)
    >>> (q, k), state = norm.apply(params, state, np.array([[[3., -3.]]]), np.array([[[0.5, 0.5]]]))
    >>> q.round(3).tolist(), k.round(3).tolist()
    ([[[1.0, -1.0]]], [[[1.0, 1.0]]])
    """

    Params: ClassVar[Any] = QKParams
    scales: ClassVar[tuple[str, ...]] = ("q_scale", "k_scale")
    paths: ClassVar[Mapping[str, str]] = {
        f"{of}_{name}": f"{of}_norm/{name}" for of in "qk" for name in ("scale", "bias")
    }
    whole: ClassVar[tuple[str, ...]] = QKParams._fields
    _spare_axes: ClassVar[int] = 1  # per head: (H, D)

    use_bias: bool = False
    use_temperature: bool = False
    init_temperature: float = 1.0
    init_k_heads: int | None = None
    kind: str = "rms"
    axis: int | Sequence[int] = -1
    epsilon: float = 1e-6
    cast: str = "after_scale"

    def __post_init__(self) -> None:
        super().__post_init__()
        canonicalize_number("QKNorm", "init_temperature", self.init_temperature, "1.0")
        _check_kind("QKNorm", self.kind, self.cast)

    if TYPE_CHECKING:

        def init(self, features: Features) -> tuple[QKParams, tuple[()]]: ...

    @classmethod
    def option_for(cls, name: str) -> str:
        return f"use_{name.rpartition('_')[2]}"

    def init_param(self, name: str, shape: tuple[int, ...]) -> Array:
        if name == "temperature":
            return jnp.full((), self.init_temperature, self.param_dtype)
        if name[0] == "k" and len(shape) > 1 and self.init_k_heads is not None:
            shape = (self.init_k_heads, *shape[1:])
        shape = (
            (math.prod(shape),) if len(self.feature_axes()) > 1 else shape
        )  # over all heads it is flat, as OLMo 2 has it
        return super().init_param(name, shape)

    @explained("apply")
    def apply(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, params: Any, state: S, q: ArrayLike, k: ArrayLike, *, train: Any = None, mask: Any = None,
        k_mask: Any = None,
    ) -> tuple[tuple[Array, Array], S]:  # fmt: skip
        """The normalized queries and keys, and the state `()` as it came."""
        return self._applied(params, state, q, k, mask=mask, k_mask=k_mask), state


def _check_kind(norm: str, kind: Any, cast: Any) -> None:
    check_cast(norm, cast)
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f'{norm}: kind must be one of {KINDS}, got {shown(kind)}. Write kind="rms".')
    if kind == "l2" and cast == "before_scale":
        raise ValueError(f'{norm}: cast="before_scale" is for kind="rms" and "layer". Write cast="after_scale".')


@function_of(QKNorm)
def qk_norm(
    q: ArrayLike,
    k: ArrayLike,
    q_scale: ArrayLike | None = None,
    k_scale: ArrayLike | None = None,
    q_bias: ArrayLike | None = None,
    k_bias: ArrayLike | None = None,
    temperature: ArrayLike | None = None,
    *,
    mask: ArrayLike | None = None,
    k_mask: ArrayLike | None = None,
    **options,
) -> tuple[Array, Array]:
    """QK norm: queries and keys, each normalized before attention.

        q' = temperature * (norm(q) * (q_scale + scale_offset) + q_bias)
        k' = norm(k) * (k_scale + scale_offset) + k_bias

    Args:
      q: the queries, of any shape of rank 1 or more, such as (B, T, H, D).
      k: the keys, the same; it may have fewer heads and another length.
      q_scale: of shape (D,), one of each head (H, D), or one that broadcasts against q; over all heads (H D,);
        None is 1.
      k_scale: the same of k.
      q_bias: like q_scale; None is 0.
      k_bias: like k_scale.
      temperature: one number that multiplies the queries, in place of 1 / sqrt(D) in the softmax; None is 1.
      mask: True where an element of q counts; see `layer_norm`. A mask (B, T) of tokens is one of k as well.
      k_mask: the same of k; None is `mask`.
      dtype: of both results; None is that of q and that of k.

    Returns:
      q' and k', of the shapes of q and k.

    Raises:
      ValueError: a bad kind, axis, epsilon, cast or backend; a scale, bias or mask that fits q or k nowhere.
      TypeError: a dtype that cannot hold the result.
      NameError: axis_name is not bound here.

    Used per head by Qwen3, Gemma 3, Qwen3-Next, FLUX and SD 3.5, without scale by Llama 4; over all heads by OLMo 2 and
    Wan; as layer norm by ViT-22B; as L2 norm by gated DeltaNet.

    Used by Qwen3, Gemma 3, OLMo 2 and 3, Llama 4, FLUX, Stable Diffusion 3.5, Wan, ViT-22B.

    Source: Henry, Dachapally, Pawar, Chen, "Query-Key Normalization for Transformers" (2020), arXiv:2010.04245;
    Dehghani et al., "Scaling Vision Transformers to 22 Billion Parameters" (2023), arXiv:2302.05442.

    >>> import jaxnorm as jn, numpy as np
    >>> q, k = jn.qk_norm(np.array([[0., -4.]]), np.array([[0., 2.]]), kind="l2", temperature=10., epsilon=0.)
    >>> q.round(3).tolist(), k.round(3).tolist()
    ([[0.0, -10.0]], [[0.0, 1.0]])
    """
    return (
        _normalized("q", q, q_scale, q_bias, temperature, mask=mask, **options),
        _normalized("k", k, k_scale, k_bias, None, mask=mask if k_mask is None else k_mask, **options),
    )


def _normalized(
    which: str, x, scale, bias, temperature, *, kind, axis, cast, scale_offset, mask, axis_name, **options
) -> Array:
    norm = "qk_norm"
    _check_kind(norm, kind, cast)
    x = as_float_array(norm, x, rank=1, layout="the axis of a head's width among its own", what=which)
    axes = canonicalize_axes(norm, x.ndim, axis)
    scale, bias, temperature = (
        _aligned(norm, what, p, x, axes)
        for what, p in ((f"{which}_scale", scale), (f"{which}_bias", bias), ("temperature", temperature))
    )
    if temperature is not None:
        scale_offset = canonicalize_number(norm, "scale_offset", scale_offset, "1.0")
        scale, bias = affine_times(temperature, scale, bias, scale_offset, accumulator(x))
        scale_offset = 0.0
    given = dict(options, scale_offset=scale_offset, mask=mask, axis_name=axis_name)
    if kind != "l2":
        return normalize_rows(
            norm, x, scale, bias, axes, axes, **given, centered=kind == "layer",
            cast_before_scale=cast == "before_scale",
        )  # fmt: skip
    if bias is not None:
        raise ValueError(f'{norm}: {which}_bias is for kind="rms" and "layer". Write {which}_bias=None.')
    return normalize_length(norm, x, scale, axes, epsilon_mode="inside", **given)


def _aligned(norm: str, what: str, p, x: Array, axes: tuple[int, ...]) -> Array | None:
    """A parameter of x's rank; over all heads it may be flat."""
    sizes = sizes_along(x.shape, axes)
    if p is not None and len(sizes) > 1 and jnp.shape(p) == (math.prod(sizes),):
        p = jnp.reshape(jnp.asarray(p), sizes)
    return align_param(norm, what, p, x.shape, axes)
