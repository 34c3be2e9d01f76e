"""Norms as authors of JAX models write them: statistics in float32, the result in the dtype of x."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.harness.case import EPSILON, FP8_SCALE, HEAD
from benchmarks.peers import Peer


class Written(Peer):
    package = "jax"
    norms = ()

    def ada_layer(self, x, scale, shift):  # DiT
        return ((layer(x) * (1 + scale[:, None]) + shift[:, None]).astype(x.dtype),)

    def ada_layer_zero(self, x, scale, shift, gate):
        return *self.ada_layer(x, scale, shift), gate

    def ada_rms(self, x, scale, shift):  # openpi
        return ((rms(x) * (1 + scale[:, None]) + shift[:, None]).astype(x.dtype),)

    def qk(self, q, q_scale, k, k_scale):  # Gemma 3
        return (rms(q) * q_scale).astype(q.dtype), (rms(k) * k_scale).astype(k.dtype)

    def rms_add(self, x, scale, residual):  # OLMo 2
        return (residual + (rms(x) * scale).astype(x.dtype),)

    def layer_add(self, x, scale, bias, residual):  # Swin V2
        return (residual + (layer(x) * scale + bias).astype(x.dtype),)

    def rms_add_next(self, x, residual, scale, next_scale):  # Gemma 2
        stream = residual + (rms(x) * scale).astype(x.dtype)
        return stream, (rms(stream) * next_scale).astype(x.dtype)

    def group_rms(self, x, scale):  # Mamba 2
        grouped = rms(x.reshape(*x.shape[:-1], -1, HEAD)).reshape(x.shape)
        return ((grouped * scale).astype(x.dtype),)

    def l2(self, x):  # gated DeltaNet
        of = wide(x)
        return ((of * lax.rsqrt(jnp.sum(of * of, -1, keepdims=True) + EPSILON)).astype(x.dtype),)

    def dyt(self, x, alpha, scale, bias):
        return ((jnp.tanh(alpha * wide(x)) * scale + bias).astype(x.dtype),)

    def derf(self, x, alpha, shift, scale, bias):
        return ((jax.scipy.special.erf(alpha * wide(x) + shift) * scale + bias).astype(x.dtype),)

    def rms_alone(self, x, scale):
        return (rms(x) * scale,)

    def fp8(self, x, scale):  # a static scale
        (y,) = self.rms_alone(x, scale)
        return jnp.clip(y / FP8_SCALE, -448, 448).astype(jnp.float8_e4m3fn), jnp.float32(FP8_SCALE)

    def fp8_row(self, x, scale):  # vLLM's
        (y,) = self.rms_alone(x, scale)
        by = jnp.maximum(jnp.max(jnp.abs(y), -1, keepdims=True) / 448, 1 / (448 * 512))
        return jnp.clip(y / by, -448, 448).astype(jnp.float8_e4m3fn), by

    def int8_row(self, x, scale):
        (y,) = self.rms_alone(x, scale)
        by = jnp.maximum(jnp.max(jnp.abs(y), -1, keepdims=True) / 127, 2**-23)
        return jnp.round(y / by).astype(jnp.int8), by

    def mxfp8(self, x, scale):
        blocks = self.rms_alone(x, scale)[0].reshape(*x.shape[:-1], -1, 32)
        by = jnp.exp2(jnp.ceil(jnp.log2(jnp.max(jnp.abs(blocks), -1, keepdims=True) / 448)))
        data = jnp.clip(blocks / by, -448, 448).astype(jnp.float8_e4m3fn)
        return data.reshape(x.shape), by[..., 0].astype(jnp.float8_e8m0fnu)


def wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def rms(x):
    x = wide(x)
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + EPSILON)


def layer(x):
    x = wide(x)
    return (x - jnp.mean(x, -1, keepdims=True)) * lax.rsqrt(jnp.var(x, -1, keepdims=True) + EPSILON)
