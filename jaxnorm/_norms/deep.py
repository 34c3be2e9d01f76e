"""DeepNorm: layer norm after each part of a transformer, with the residual scaled up.

Legend: N layers of an encoder, M of a decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
from jax.typing import ArrayLike

from .._core.arrays import as_float_array, canonicalize_axes, canonicalize_dtype
from .._core.checks import canonicalize_number
from .._core.explain import explained
from .._core.messages import shown
from .._core.types import Params
from .._ops.residual import add_scaled, as_residual, match_types
from .._ops.rows import normalize_rows
from .base import RowSpec
from .declare import S, function_of, spec

Array = jax.Array


@spec
class DeepNorm(RowSpec):
    """The hyperparameters of `deep_norm`. The residual is an argument of `apply`, after x.

    Args:
      alpha: what multiplies the residual; see `deep_norm_alpha`.
      axis: the axis or axes normalized over.
      epsilon: added to the variance, in units of x squared; >= 0.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.DeepNorm(alpha=2., epsilon=0.)
    >>> params, state = norm.init(2)
    >>> norm.apply(params, state, np.array([[1., -3.]]), np.array([[1., 1.]]))[0].tolist()
    [[1.0, -1.0]]
    """

    use_bias: bool = True
    alpha: float = 1.0
    axis: int | Sequence[int] = -1
    epsilon: float = 1e-6

    _spare_axes: ClassVar[int] = 1  # per head: (H, D)

    def __post_init__(self) -> None:
        super().__post_init__()
        canonicalize_number("DeepNorm", "alpha", self.alpha, "1.0")

    @explained("apply")
    def apply(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, params: Params, state: S, x: ArrayLike, residual: ArrayLike, *, train: Any = None, mask: Any = None
    ) -> tuple[Array, S]:
        """The normalized sum, which is the next residual, and the state `()` as it came."""
        return self._applied(params, state, x, residual, mask=mask), state


@function_of(DeepNorm)
def deep_norm(
    x: ArrayLike,
    residual: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    alpha,
    axis,
    dtype,
    implementation,
    mask: ArrayLike | None = None,
    **options,
) -> Array:
    """DeepNorm: add x to the residual times alpha, and apply layer norm to the sum.

        y = layer_norm(alpha * residual + x, scale, bias)

    y is the next residual. The sum is taken in float32 or wider and rounded once, to the residual's own dtype, and the
    backward pass keeps it alone.

    Args:
      x: array of any shape of rank 1 or more, what a part of the network made. Integers are promoted to float32.
      residual: what went into that part, of x's shape.
      scale: as for `layer_norm`.
      bias: the same.

    Returns:
      An array of x's shape.

    Raises:
      ValueError: a residual of another shape; a bad alpha; and what `layer_norm` raises.
      TypeError: a dtype that cannot hold the result.
      NameError: axis_name is not bound here.

    Used by DeepNet, GLM-130B and torchscale, with initial weights times `deep_norm_beta`.

    Source: Wang et al., "DeepNet: Scaling Transformers to 1,000 Layers" (2022), arXiv:2203.00555.

    >>> import jaxnorm as jn, numpy as np
    >>> jn.deep_norm(np.array([[1., -3.]]), np.array([[1., 1.]]), alpha=jn.deep_norm_alpha(8), epsilon=0.).tolist()
    [[1.0, -1.0]]
    """
    norm = "deep_norm"
    x = as_float_array(norm, x, rank=1, layout="the normalized axes among its own")
    residual = as_residual(norm, x, residual)
    out = canonicalize_dtype(norm, dtype, x, residual)
    axes = canonicalize_axes(norm, x.ndim, axis)
    alpha = canonicalize_number(norm, "alpha", alpha, "1.0")
    total = add_scaled(implementation == "lax", alpha, *match_types(x, residual))
    return normalize_rows(
        norm, total, scale, bias, axes, axes, mask=mask, dtype=out, implementation=implementation, **options
    )


def deep_norm_alpha(encoder_layers: int = 0, decoder_layers: int = 0, side: str | None = None) -> float:
    """DeepNorm's alpha, what multiplies the residual.

        one side of N layers:  (2 N)^(1/4);    both:  0.81 (N^4 M)^(1/16) in the encoder, (3 M)^(1/4) in the decoder

    Args:
      encoder_layers: N.
      decoder_layers: M.
      side: "encoder" or "decoder", where there are both.

    Raises:
      ValueError: no layers, or a side that is not there.

    Source: Wang et al. (2022), arXiv:2203.00555, figure 2.

    >>> import jaxnorm as jn
    >>> jn.deep_norm_alpha(8), round(jn.deep_norm_alpha(6, 6, "decoder"), 3)
    (2.0, 2.06)
    """
    n, m, side = _counts("deep_norm_alpha", encoder_layers, decoder_layers, side)
    if side == "encoder":
        return 0.81 * (n**4 * m) ** (1 / 16)
    return (3 * m) ** 0.25 if side == "decoder" else (2 * (n or m)) ** 0.25


def deep_norm_beta(encoder_layers: int = 0, decoder_layers: int = 0, side: str | None = None) -> float:
    """DeepNorm's beta, which multiplies the initial weights of the value, output and feed-forward projections.

        one side of N layers:  (8 N)^(-1/4);    both:  0.87 (N^4 M)^(-1/16) in the encoder, (12 M)^(-1/4) in the decoder

    Args:
      encoder_layers: N.
      decoder_layers: M.
      side: "encoder" or "decoder", where there are both.

    Raises:
      ValueError: no layers, or a side that is not there.

    Source: Wang et al. (2022), arXiv:2203.00555, figure 2.

    >>> import jaxnorm as jn
    >>> jn.deep_norm_beta(decoder_layers=2)
    0.5
    """
    n, m, side = _counts("deep_norm_beta", encoder_layers, decoder_layers, side)
    if side == "encoder":
        return 0.87 * (n**4 * m) ** (-1 / 16)
    return (12 * m) ** -0.25 if side == "decoder" else (8 * (n or m)) ** -0.25


def _counts(name: str, encoder: int, decoder: int, side: str | None) -> tuple[int, int, str]:
    """The two counts, and the side where there are both; else ""."""
    if not all(isinstance(n, int) and n >= 0 for n in (encoder, decoder)) or encoder + decoder == 0:
        raise ValueError(f"{name}: needs numbers of layers, got {shown((encoder, decoder))}. Write {name}(12).")
    both = encoder > 0 and decoder > 0
    if side not in ("encoder", "decoder") if both else side not in (None, "encoder" if encoder else "decoder"):
        write = f'{name}({encoder}, {decoder}, "encoder")' if both else f"{name}({encoder}, {decoder})"
        raise ValueError(f"{name}: side must be one of those that have layers, got {shown(side)}. Write {write}.")
    return encoder, decoder, side or "" if both else ""
