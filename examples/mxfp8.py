"""An RMS norm in mxfp8 that feeds a matrix product: `python -m examples.mxfp8`.

On a GPU the product is `jax.nn.scaled_matmul`, which takes data and scales as the norm writes them. Elsewhere it is
that of the dequantized arrays.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import jaxnorm as jn


def quantized_weights(w: jax.Array) -> jn.Quantized:
    """Weights (out, in) in mxfp8."""
    blocks = w.reshape(w.shape[0], -1, 32)
    amax = jnp.abs(blocks).max(-1, keepdims=True)
    exponent = jnp.ceil(jnp.log2(jnp.maximum(amax, 1e-30) / 448.0))
    data = (blocks * jnp.exp2(-exponent)).reshape(w.shape).astype(jnp.float8_e4m3fn)
    return jn.Quantized(data, jnp.exp2(exponent.squeeze(-1)).astype(jnp.float8_e8m0fnu))


def product(y: jn.Quantized, w: jn.Quantized) -> jax.Array:
    """y (M, K) times w (N, K) transposed, in float32."""
    dequantized = lambda *_: y.dequantize() @ w.dequantize().T
    if not hasattr(jax.nn, "scaled_matmul"):
        return dequantized()
    with jax.numpy_dtype_promotion("standard"):
        scaled = lambda *of: jax.nn.scaled_matmul(*(a[None] for a in of), preferred_element_type=jnp.float32)[0]
        return jax.lax.platform_dependent(y.data, w.data, y.scale, w.scale, cuda=scaled, default=dequantized)


@jax.jit
def layer(x: jax.Array, scale: jax.Array, w: jn.Quantized) -> jax.Array:
    y: Any = jn.rms_norm(x, scale, quantize=jn.MxFp8())
    return product(y, w)


def main() -> float:
    """Print and return the error against the product in float32, relative to its size."""
    x = jax.random.normal(jax.random.key(0), (128, 256), jnp.bfloat16)
    w = jax.random.normal(jax.random.key(1), (128, 256)) / 16
    scale = jnp.ones(256)
    want = jn.rms_norm(x.astype(jnp.float32), scale) @ w.T
    error = float(jnp.linalg.norm(layer(x, scale, quantized_weights(w)) - want) / jnp.linalg.norm(want))
    print(f"relative error of an mxfp8 layer: {error:.3f}")
    return error


if __name__ == "__main__":
    main()
