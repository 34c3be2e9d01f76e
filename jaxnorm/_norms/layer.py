"""Layer normalization: every example by its own mean and variance over the features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import jax

from .._core.arrays import as_float_array, canonicalize_axes
from .._core.explain import explained
from .._ops.activation import Activation
from .._ops.rows import normalize_rows
from .base import RowSpec, spec

Array = jax.Array


@explained("function")
def layer_norm(
    x,
    scale=None,
    bias=None,
    *,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-6,
    scale_offset: float = 0.0,
    activation: Activation | None = None,
    mask=None,
    axis_name: str | tuple[str, ...] | None = None,
    axis_index_groups=None,
    dtype=None,
    implementation: str | None = None,
) -> Array:
    """Layer normalization.

        y = (x - mean) / sqrt(var + epsilon) * (scale + scale_offset) + bias,   mean and var over `axis`

    Args:
      x: array of any shape of rank 1 or more. Integers are promoted to float32.
      scale: of the shape of the normalized axes, or of a shape that broadcasts against x (adaLN: (B, 1, C)); None is 1.
      bias: the same; None is 0.
      axis: the axis or axes normalized over.
      epsilon: added to the variance, in units of x squared; >= 0.
      scale_offset: added to scale in float32; 1.0 makes a zero-centred gamma.
      activation: of the output, before it is rounded: "relu", "silu" (or "swish"), "gelu" (the exact one), "gelu_tanh",
        "sigmoid", "tanh", or an elementwise function. The backward pass recomputes it, so only x is
        stored. Pass a named function: a fresh lambda at every call triggers retracing.
      mask: True where an element counts. Broadcasts to x, or covers its leading axes. Masked-out elements do
        not affect the statistics or any gradient, even if they are NaN. A row with no valid element returns the bias.
        A float mask holds 1 and 0. An additive one (0 where an element counts, negative elsewhere) is refused; if it
        is traced, so that its values are not known, it makes the output NaN.
      axis_name: a mapped axis, or several, over which the normalized axes are sharded.
      axis_index_groups: groups of indices along axis_name that normalize together.
      dtype: of the output; None is x's. Statistics and arithmetic are in float32 or wider, with one rounding.
      implementation: a backend listed by `jaxnorm.backends()`. None picks the fastest one that supports the call.

    Returns:
      An array of x's shape.

    Raises:
      ValueError: a bad axis, epsilon, or backend; a scale, bias or mask that fits x nowhere.
      TypeError: a dtype that cannot hold the result.
      NameError: axis_name is not bound here.

    Source: Ba, Kiros, Hinton, "Layer Normalization" (2016), arXiv:1607.06450.

    >>> import jaxnorm as jn, numpy as np
    >>> jn.layer_norm(np.array([[1., 3.], [5., 5.]]), bias=np.array([0., 1.])).round(3).tolist()
    [[-1.0, 2.0], [0.0, 1.0]]
    """
    x = as_float_array("layer_norm", x, rank=1, layout="the normalized axes among its own")
    axes = canonicalize_axes("layer_norm", x.ndim, axis)
    return normalize_rows(
        "layer_norm", x, scale, bias, axes, axes, epsilon=epsilon, scale_offset=scale_offset,
        activation=activation, mask=mask, axis_name=axis_name, axis_index_groups=axis_index_groups, dtype=dtype,
        implementation=implementation,
    )  # fmt: skip


@spec(layer_norm)
class LayerNorm(RowSpec):
    """The hyperparameters of `layer_norm`, said once. See `jaxnorm.Norm` for what a spec does.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.LayerNorm(epsilon=1e-5, use_bias=False)
    >>> params, state = norm.init(2)
    >>> y, state = norm.apply(params, state, np.array([[1., 3.]]))
    >>> y.round(3).tolist(), state
    ([[-1.0, 1.0]], ())
    """

    use_bias: bool = True
    axis: int | tuple[int, ...] = -1
    epsilon: float = 1e-6

    _spare_axes: ClassVar[int] = 1  # per head: (H, D)
