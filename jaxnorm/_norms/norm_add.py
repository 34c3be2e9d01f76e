"""A part of a transformer normalized, and then added to the residual stream: post-norm, and peri-LN with the next norm.

Legend: x is what the last part made, residual the stream before it, new_residual the stream after.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
from jax.typing import ArrayLike

from .._core.explain import explained
from .._core.types import Affine, Features, Params
from .._ops.branch import add_normalized, check_cast
from .base import QuantizableSpec
from .declare import S, as_params, function_of, refuse_params_as_state, spec

Array = jax.Array


class NormAddParams(NamedTuple):
    """The parameters of `rms_norm_add` and `layer_norm_add`. In layers `next_scale` is `next/scale`."""

    scale: Array | None  # feature shape
    bias: Array | None  # the same
    next_scale: Array | None  # of the next norm
    next_bias: Array | None


@spec
class _NormAdd(QuantizableSpec):
    """What the two have in common.

    Args:
      use_next: apply the next norm as well, and return its output before the new stream.
      axis: the axis or axes normalized over.
      cast: "after_add" rounds once, to the stream's dtype; "before_add" rounds the norm to x's dtype first, as Hugging
        Face's OLMo 2 and Gemma do; "before_scale" rounds x / rms, too (GLM-4), and so does the next norm.
    """

    Params: ClassVar[Any] = NormAddParams
    scales: ClassVar[tuple[str, ...]] = ("scale", "next_scale")
    paths: ClassVar[Mapping[str, str]] = {"next_scale": "next/scale", "next_bias": "next/bias"}
    _spare_axes: ClassVar[int] = 1  # per head: (H, D)

    use_next: bool = False
    axis: int | Sequence[int] = -1
    epsilon: float = 1e-6
    cast: str = "after_add"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_cast(type(self).__name__, self.cast)

    if TYPE_CHECKING:

        def init(self, features: Features) -> tuple[NormAddParams, tuple[()]]: ...

    @classmethod
    def option_for(cls, name: str) -> str:
        return f"use_{name.removeprefix('next_')}"

    def init_params(self, shape: tuple[int, ...]) -> Any:
        params = super().init_params(shape)
        return params if self.use_next else params._replace(next_scale=None, next_bias=None)

    @explained("apply")
    def apply(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, params: Any, state: S, x: ArrayLike, residual: ArrayLike, *, train: Any = None, mask: Any = None,
        gate: ArrayLike | None = None, quantize_scale: ArrayLike | None = None,
    ) -> tuple[Any, S]:  # fmt: skip
        """The new stream (with `use_next` after the next norm's output), and the state `()` as it came."""
        name = type(self).__name__
        refuse_params_as_state(name, state, self.Params)
        scale, bias, *others = as_params(name, params, self.Params, self.paths)
        following = Affine(*others) if self.use_next else None
        function = type(self).function
        more = dict(gate=gate, next=following, mask=mask, quantize_scale=quantize_scale)
        out = function(x, residual, scale, bias, **more, **self.options())
        return out, state


@spec
class RMSNormAdd(_NormAdd):
    """The hyperparameters of `rms_norm_add`. The residual stream is an argument of `apply`, after x.

    Args:
      epsilon: added to the mean square, in units of x squared; >= 0.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.RMSNormAdd(epsilon=0.)
    >>> params, state = norm.init(2)
    >>> norm.apply(params, state, np.array([[2., -2.]]), np.array([[10., 10.]]))[0].tolist()
    [[11.0, 9.0]]
    """

    use_bias: bool = False


@function_of(RMSNormAdd)
def rms_norm_add(
    x: ArrayLike,
    residual: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    gate: ArrayLike | None = None,
    next: Params = None,
    mask: ArrayLike | None = None,
    quantize_scale: ArrayLike | None = None,
    **options,
) -> Any:
    """RMS norm of x, added to the residual stream: the mirror image of `add_rms_norm`.

        new_residual = residual + gate * rms_norm(x, scale, bias);   with `next`  y = rms_norm(new_residual, *next)

    The norm stands after a part of a transformer (reordered, post-norm inside of the residual), and with `next` the
    norm before the following part is taken in the same call (peri-LN, sandwich). The sum is taken in float32 or wider
    and rounded once, to the stream's own dtype; y is that of the stream as it is returned. The backward pass keeps x
    and, for `next`, the new stream.

    Args:
      x: array of any shape of rank 1 or more, to normalize and add. Integers are promoted to float32.
      residual: the stream so far, of x's shape; its dtype is the stream's.
      scale: as for `rms_norm`.
      bias: the same.
      gate: multiplies the norm of x: of x's shape, or of one that broadcasts to it, per sample or per channel.
      next: the scale and bias of the next norm, as `jaxnorm.Affine` or a dict. None is no next norm.
      mask: True where an element counts in the norms; see `rms_norm`. The stream is the sum everywhere.
      activation: of y, the next norm's output; see `layer_norm`. The stream has none.
      dtype: of y; None is x's. That of new_residual is residual's.

    Returns:
      new_residual; with `next`, y and new_residual. Each is of x's shape; with `quantize` y is a `jaxnorm.Quantized`.

    Raises:
      ValueError: a residual or gate of another shape; a bad cast; an activation without `next`; and what `rms_norm`
        raises.
      TypeError: a dtype that cannot hold the result.
      NameError: axis_name is not bound here.

    Used by OLMo 2 and 3 (without `next`), and by Gemma 2 and 3, GLM-4 and Peri-LN (with it); with a gate by Lumina.

    Source: OLMo Team, "2 OLMo 2 Furious" (2024), arXiv:2501.00656; Kim et al., "Peri-LN" (2025), arXiv:2502.02732.

    >>> import jaxnorm as jn, numpy as np
    >>> x, residual = np.array([[2., -2.]]), np.array([[2., 4.]])
    >>> y, stream = jn.rms_norm_add(x, residual, next=jn.Affine(np.array([2., 1.]), None), epsilon=0.)
    >>> y.round(3).tolist(), stream.tolist()
    ([[2.0, 1.0]], [[3.0, 3.0]])
    """
    norm, following = "rms_norm_add", None if next is None else as_params("rms_norm_add", next)
    more = dict(quantize_scale=quantize_scale)
    return add_normalized(norm, x, residual, scale, bias, gate, following, centered=False, mask=mask, **more, **options)


@spec
class LayerNormAdd(_NormAdd):
    """The hyperparameters of `layer_norm_add`. The residual stream is an argument of `apply`, after x.

    Args:
      epsilon: added to the variance, in units of x squared; >= 0.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.LayerNormAdd(epsilon=0.)
    >>> params, state = norm.init(2)
    >>> norm.apply(params, state, np.array([[1., 5.]]), np.array([[10., 10.]]))[0].tolist()
    [[9.0, 11.0]]
    """

    use_bias: bool = True


@function_of(LayerNormAdd)
def layer_norm_add(
    x: ArrayLike,
    residual: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    gate: ArrayLike | None = None,
    next: Params = None,
    mask: ArrayLike | None = None,
    quantize_scale: ArrayLike | None = None,
    **options,
) -> Any:
    """Layer norm of x, added to the residual stream: the mirror image of `add_layer_norm`.

        new_residual = residual + gate * layer_norm(x, scale, bias);  with `next`  y = layer_norm(new_residual, *next)

    Sums, dtypes, masks and what is kept are those of `rms_norm_add`.

    Args:
      x: array of any shape of rank 1 or more, to normalize and add. Integers are promoted to float32.
      residual: the stream so far, of x's shape; its dtype is the stream's.
      scale: as for `layer_norm`.
      bias: the same.
      gate: multiplies the norm of x: of x's shape, or of one that broadcasts to it, per sample or per channel.
      next: the scale and bias of the next norm, as `jaxnorm.Affine` or a dict. None is no next norm.
      mask: True where an element counts in the norms; see `layer_norm`. The stream is the sum everywhere.
      activation: of y, the next norm's output; see `layer_norm`. The stream has none.
      dtype: of y; None is x's. That of new_residual is residual's.

    Returns:
      new_residual; with `next`, y and new_residual. Each is of x's shape; with `quantize` y is a `jaxnorm.Quantized`.

    Raises:
      ValueError: a residual or gate of another shape; a bad cast; an activation without `next`; and what `layer_norm`
        raises.
      TypeError: a dtype that cannot hold the result.
      NameError: axis_name is not bound here.

    Used by CogView and Swin Transformer V2.

    Source: Ding et al., "CogView" (2021), arXiv:2105.13290; Kim et al., "Peri-LN" (2025), arXiv:2502.02732.

    >>> import jaxnorm as jn, numpy as np
    >>> jn.layer_norm_add(np.array([[1., 5.]]), np.array([[10., 10.]]), gate=np.array([0.5]), epsilon=0.).tolist()
    [[9.5, 10.5]]
    """
    norm, following = "layer_norm_add", None if next is None else as_params("layer_norm_add", next)
    more = dict(quantize_scale=quantize_scale)
    return add_normalized(norm, x, residual, scale, bias, gate, following, centered=True, mask=mask, **more, **options)
