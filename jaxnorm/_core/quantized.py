"""What a norm returns whose output is quantized: a pytree of data and scales."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass

import jax
import jax.export
import jax.numpy as jnp
from jax.typing import DTypeLike

from .arrays import as_dtype

Array = jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["data", "scale", "amax", "global_scale", "gradient"],
    meta_fields=["transposed_scale"],
)
@dataclass(frozen=True)
class Quantized:
    """A norm's output in few bits: y ~ data * scale.

    A pytree. Fields that a format does not have are None.

    Args:
      data: of x's shape: float8, float4 or int8.
      scale: what dequantizes: a scalar for a tensor; (..., 1) for rows; (..., C / block) for blocks of a row, or
        (..., C / block, T) if it is transposed.
      amax: the largest absolute value of y, of formats with a scale per tensor, for the history of delayed scaling.
      global_scale: the scalar that multiplies all scales of `NvFp4`.
      gradient: zeros of x's shape that carry the gradient of y, of formats with `straight_through=True`. A matrix
        product with a derivative of its own returns the cotangent of y here.
      transposed_scale: whether the last two axes of scale are exchanged.
    """

    data: Array
    scale: Array
    amax: Array | None = None
    global_scale: Array | None = None
    gradient: Array | None = None
    transposed_scale: bool = False

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> Array:
        """data * scale, multiplied in float32 and rounded once to `dtype`. Its gradient is that of y.

        >>> import jaxnorm as jn, numpy as np
        >>> y = jn.rms_norm(np.array([[3., -3., 1.5, 0.]], "f"), quantize=jn.Fp8(per="row"))
        >>> y.data.dtype.name, y.scale.shape, y.data.tolist()
        ('float8_e4m3fn', (1, 1), [[448.0, -448.0, 224.0, 0.0]])
        """
        y = _multiplied(jax.lax.stop_gradient(self)).astype(as_dtype("dequantize", dtype, "dtype"))
        return y if self.gradient is None else _with_gradient(y, self.gradient)


def _multiplied(q: Quantized) -> Array:
    scale = q.scale.astype(jnp.float32)
    scale = jnp.swapaxes(scale, -1, -2) if q.transposed_scale else scale
    if q.global_scale is not None:
        scale = scale * q.global_scale
    data = q.data.astype(jnp.float32)
    if scale.ndim == 0 or scale.shape[-1] in (1, data.shape[-1]):
        return data * scale.reshape(scale.shape if scale.ndim else (1,) * data.ndim)
    blocks = scale.shape[-1]
    return (data.reshape(*data.shape[:-1], blocks, -1) * scale[..., None]).reshape(data.shape)


@jax.custom_jvp
def _with_gradient(y: Array, gradient: Array) -> Array:
    """y, which has the tangent of `gradient`."""
    return y


@_with_gradient.defjvp
def _(primals, tangents):
    y, _ = primals
    return y, tangents[1].astype(y.dtype)


jax.export.register_pytree_node_serialization(
    Quantized,
    serialized_name="jaxnorm.Quantized",
    serialize_auxdata=lambda aux: json.dumps(aux).encode(),
    deserialize_auxdata=lambda text: tuple(json.loads(text)),
)
