"""A residual stream taken one step on, and normalized: what stands between any two parts of a transformer.

Legend: x is what the last part made, residual the stream before it, new_residual the stream after.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
from jax.typing import ArrayLike

from .._core.arrays import align_param, as_float_array, canonicalize_axes, canonicalize_dtype
from .._core.checks import check_cast
from .._core.explain import explained
from .._core.types import Params
from .._core.vma import shard_like
from .._ops.residual import add_times, as_residual, match_types
from .._ops.rows import normalize_rows, normalize_stream
from .base import QuantizableSpec
from .declare import S, function_of, spec

Array = jax.Array


@spec
class AddRMSNorm(QuantizableSpec):
    """The hyperparameters of `add_rms_norm`. The residual stream is an argument of `apply`, after x.

    Args:
      axis: the axis or axes normalized over.
      epsilon: added to the mean square, in units of x squared; >= 0.
      cast: "after_scale" rounds once, at the end (Gemma); "before_scale" rounds x / rms to the output's dtype and again
        after the scale (Llama). They differ in the last bit of a half-precision output.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.AddRMSNorm(epsilon=0.)
    >>> params, state = norm.init(2)
    >>> (y, stream), state = norm.apply(params, state, np.array([[1., -3.]]), np.array([[1., 1.]]))
    >>> y.round(3).tolist(), stream.tolist()
    ([[1.0, -1.0]], [[2.0, -2.0]])
    """

    use_bias: bool = False
    axis: int | Sequence[int] = -1
    epsilon: float = 1e-6
    cast: str = "after_scale"

    _spare_axes: ClassVar[int] = 1  # per head: (H, D)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_cast("AddRMSNorm", self.cast)

    @explained("apply")
    def apply(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, params: Params, state: S, x: ArrayLike, residual: ArrayLike, *, train: Any = None, mask: Any = None,
        branch_scale: Any = None, quantize_scale: ArrayLike | None = None,
    ) -> tuple[tuple[Any, Array], S]:  # fmt: skip
        """The normalized sum and the new stream, and the state `()` as it came."""
        more = dict(branch_scale=branch_scale, quantize_scale=quantize_scale)
        return self._applied(params, state, x, residual, mask=mask, **more), state


@function_of(AddRMSNorm, inline=True)  # x and residual have one cotangent, which a call would return twice
def add_rms_norm(
    x: ArrayLike,
    residual: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis,
    cast,
    mask: ArrayLike | None = None,
    branch_scale: ArrayLike | None = None,
    quantize_scale: ArrayLike | None = None,
    **options,
) -> tuple[Any, Array]:
    """Add x to the residual stream and apply RMS norm to the sum.

        new_residual = x + residual;   y = rms_norm(new_residual, scale, bias, ...)

    The sum is taken in float32 or wider and rounded once, to the stream's own dtype, and what is normalized is the
    stream as it is returned: `y` is the same to the bit whether the two are written together or apart, and the backward
    pass keeps `new_residual` alone. For a stream in float32 under parts in bfloat16 give a float32 residual: y is in
    x's dtype.

    Args:
      x: array of any shape of rank 1 or more, to add. Integers are promoted to float32.
      residual: the stream so far, of x's shape; its dtype is the stream's.
      scale: as for `rms_norm`.
      bias: the same.
      activation: of y; see `layer_norm`. The stream has none.
      mask: True where an element counts in the norm; see `rms_norm`. The stream is the sum everywhere.
      dtype: of y; None is x's. That of new_residual is residual's.

      branch_scale: multiplies x before it is added, as LayerScale's gamma: like scale; None is 1.

    Returns:
      y and new_residual, each of x's shape; with `quantize` y is a `jaxnorm.Quantized`.

    Raises:
      ValueError: a residual of another shape; and what `rms_norm` raises.
      TypeError: a dtype that cannot hold the result.
      NameError: axis_name is not bound here.

    Used by Llama, Mistral, Qwen and most pre-norm transformers since.

    Source: Zhang, Sennrich, "Root Mean Square Layer Normalization" (2019), arXiv:1910.07467, before each part as in
    Xiong et al., "On Layer Normalization in the Transformer Architecture" (2020), arXiv:2002.04745.

    >>> import jaxnorm as jn, numpy as np
    >>> y, stream = jn.add_rms_norm(np.array([[1., -3.]]), np.array([[1., 1.]]), epsilon=0.)
    >>> y.round(3).tolist(), stream.tolist()
    ([[1.0, -1.0]], [[2.0, -2.0]])
    """
    check_cast("add_rms_norm", cast)
    return _normalized(
        "add_rms_norm", x, residual, scale, bias, axis, branch_scale, mask=mask, quantize_scale=quantize_scale,
        **options,
        centered=False, cast_before_scale=cast == "before_scale",
    )  # fmt: skip


@spec
class AddLayerNorm(QuantizableSpec):
    """The hyperparameters of `add_layer_norm`. The residual stream is an argument of `apply`, after x.

    Args:
      axis: the axis or axes normalized over.
      epsilon: added to the variance, in units of x squared; >= 0.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.AddLayerNorm(epsilon=0.)
    >>> params, state = norm.init(2)
    >>> (y, stream), state = norm.apply(params, state, np.array([[1., -3.]]), np.array([[1., 1.]]))
    >>> y.round(3).tolist(), stream.tolist()
    ([[1.0, -1.0]], [[2.0, -2.0]])
    """

    use_bias: bool = True
    axis: int | Sequence[int] = -1
    epsilon: float = 1e-6

    _spare_axes: ClassVar[int] = 1  # per head: (H, D)

    @explained("apply")
    def apply(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, params: Params, state: S, x: ArrayLike, residual: ArrayLike, *, train: Any = None, mask: Any = None,
        branch_scale: Any = None, quantize_scale: ArrayLike | None = None,
    ) -> tuple[tuple[Any, Array], S]:  # fmt: skip
        """The normalized sum and the new stream, and the state `()` as it came."""
        more = dict(branch_scale=branch_scale, quantize_scale=quantize_scale)
        return self._applied(params, state, x, residual, mask=mask, **more), state


@function_of(AddLayerNorm, inline=True)  # x and residual have one cotangent, which a call would return twice
def add_layer_norm(
    x: ArrayLike,
    residual: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis,
    mask: ArrayLike | None = None,
    branch_scale: ArrayLike | None = None,
    quantize_scale: ArrayLike | None = None,
    **options,
) -> tuple[Any, Array]:
    """Add x to the residual stream and apply layer norm to the sum.

        new_residual = x + residual;   y = layer_norm(new_residual, scale, bias, ...)

    Sums, dtypes, masks and what is kept are those of `add_rms_norm`. Where the norm comes after each part (the first
    transformers, BERT), y is the next stream, and new_residual is left alone.

    Args:
      x: array of any shape of rank 1 or more, to add. Integers are promoted to float32.
      residual: the stream so far, of x's shape; its dtype is the stream's.
      scale: as for `layer_norm`.
      bias: the same.
      activation: of y; see `layer_norm`. The stream has none.
      mask: True where an element counts in the norm; see `layer_norm`. The stream is the sum everywhere.
      dtype: of y; None is x's. That of new_residual is residual's.

      branch_scale: multiplies x before it is added, as LayerScale's gamma: like scale; None is 1.

    Returns:
      y and new_residual, each of x's shape; with `quantize` y is a `jaxnorm.Quantized`.

    Raises:
      ValueError: a residual of another shape; and what `layer_norm` raises.
      TypeError: a dtype that cannot hold the result.
      NameError: axis_name is not bound here.

    Used by GPT-2 and ViT, before a part; BERT, after it.

    Source: Ba, Kiros, Hinton, "Layer Normalization" (2016), arXiv:1607.06450; before or after each part: Xiong et al.,
    "On Layer Normalization in the Transformer Architecture" (2020), arXiv:2002.04745.

    >>> import jaxnorm as jn, numpy as np
    >>> y, stream = jn.add_layer_norm(np.array([[1., 2.]]), np.array([[1., 4.]]))
    >>> y.round(3).tolist(), stream.tolist()
    ([[-1.0, 1.0]], [[2.0, 6.0]])
    """
    return _normalized(
        "add_layer_norm", x, residual, scale, bias, axis, branch_scale, mask=mask, quantize_scale=quantize_scale,
        **options,
    )  # fmt: skip


def _normalized(norm: str, x, residual, scale, bias, axis, branch_scale, *, dtype, **options) -> tuple[Any, Array]:
    x = as_float_array(norm, x, rank=1, layout="the normalized axes among its own")
    residual = as_residual(norm, x, residual)
    out = canonicalize_dtype(norm, dtype, x, residual)
    axes = canonicalize_axes(norm, x.ndim, axis)
    if branch_scale is not None:
        x, residual = match_types(x, residual)
        factor: Any = align_param(norm, "branch_scale", branch_scale, x.shape, axes)
        stream = add_times(options["implementation"] == "lax", shard_like(x, factor), x, residual)
        return normalize_rows(norm, stream, scale, bias, axes, axes, dtype=out, **options), stream
    return normalize_stream(norm, x, residual, scale, bias, axes, axes, dtype=out, **options)
