"""The output of a norm in a few bits: scales from the largest values of y, and y divided by them.

Legend: y is what the norm gives, in float32, before it is rounded; C is its last axis, along which blocks lie.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._core.collectives import max_over_devices
from .._core.dtypes import accumulator, are_static, round_to
from .._core.formats import Fp8, Int8, MxFp8, NvFp4, data_of
from .._core.messages import shown
from .._core.quantized import Quantized
from .._core.types import Plan, Reduction
from .._core.vma import by_jit, spec_of

Array = jax.Array


def check_quantize(norm: str, fmt: Any, x: Any, axes: tuple[int, ...], dtype) -> None:
    """Raise if this x cannot be quantized so."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(f"{norm}: quantize={_name(fmt)} is for real x, got {dtype}. Write quantize=None.")
    if fmt.per != "block":
        return
    last = x.ndim - 1
    if last not in axes or not are_static(x.shape[last]) or x.shape[last] % fmt.block:
        raise ValueError(
            f"{norm}: quantize={_name(fmt)} has blocks of {fmt.block} along the last axis, which must be normalized "
            f"over and a multiple of that; got x of shape {x.shape} and axis={shown(axes)}. "
            'Write quantize=jaxnorm.Fp8(per="row").'
        )
    if getattr(fmt, "transposed_scale", False) and x.ndim < 2:
        raise ValueError(f"{norm}: transposed_scale needs x of rank 2 or more, got {x.shape}. Write x[None].")


def scale_of_tensor(norm: str, fmt: Any, given: Any) -> Array | None:
    """The scale that the format or the call gives, a scalar in float32, without a derivative."""
    given = getattr(fmt, "scale", None) if given is None else given
    if given is None:
        return None
    given = lax.stop_gradient(jnp.asarray(given, jnp.float32))
    if given.size != 1:
        raise ValueError(
            f"{norm}: quantize_scale must be one number, got shape {given.shape}. "
            'Write quantize=jaxnorm.Fp8(per="row") for a scale of each row.'
        )
    return given.reshape(())


def _name(fmt: Any) -> str:
    return f"{type(fmt).__name__}()"


# --- one device's part, and what it means on all ---------------------------------------------------------------------


def quantized_rows(fmt: Any, y: Array, reduction: Reduction, given: Array | None, keep: Array | None = None):
    """Data, and what was found on the way: the scales of rows or blocks, or of a `given` scale the largest of each row.

    Rows are what the norm reduces; over devices where it does. Elements where `keep` is False do not count.
    """
    top = lambda a: _largest_or_nan(fmt, a, reduction.axes, keep)
    if given is not None:
        found = max_over_devices(top(y), reduction.axis_name, reduction.groups)
        return _divided(fmt, y, given), found
    if fmt.per == "row":
        amax = max_over_devices(top(y), reduction.axis_name, reduction.groups)
        scale = _linear_scale(fmt, amax)
        return _divided(fmt, y, scale), scale
    return _by_blocks(fmt, y, keep)


def _largest(y: Array, axes, keep: Array | None = None) -> Array:
    size = jnp.abs(y)
    return (size if keep is None else jnp.where(keep, size, 0.0)).max(axes, keepdims=True, initial=0.0)


def _largest_or_nan(fmt: Any, y: Array, axes, keep: Array | None = None) -> Array:
    """The same. Integers are NaN by their scale alone, and XLA for CPU may leave NaN out of a maximum."""
    top = _largest(y, axes, keep)
    if fmt.kind != jnp.int8:
        return top
    nan = (y != y) if keep is None else (y != y) & keep
    return jnp.where(nan.any(axes, keepdims=True), jnp.nan, top)


def _linear_scale(fmt: Any, amax: Array) -> Array:
    upper = float(jnp.finfo(jnp.float32).max) if fmt.upper is None else fmt.upper
    scale = jnp.maximum(jnp.minimum(amax, upper) * jnp.float32(1.0 / fmt.largest), fmt.floor)
    return jnp.where(amax == amax, scale, jnp.nan) if fmt.kind == jnp.int8 else scale


def _divided(fmt: Any, y: Array, scale: Array) -> Array:
    """Floats are divided by the scale, integers multiplied by its reciprocal, as vLLM does."""
    return data_of(fmt, y * (1.0 / scale) if fmt.kind == jnp.int8 else y / scale)


_RUN = 32  # channels whose largest value is taken first: for runs of 128 XLA for TPU would copy y in float32


def _by_blocks(fmt: Any, y: Array, keep: Array | None) -> tuple[Array, Array]:
    """Data, and what was found for blocks, (..., C / block)."""
    run = _RUN if fmt.block % _RUN == 0 and fmt.kind != jnp.int8 else fmt.block
    split = lambda a, size: a.reshape(*a.shape[:-1], a.shape[-1] // size, size)
    of = (y,) if keep is None else (y, jnp.broadcast_to(keep, y.shape))
    per_block = _SCALES[type(fmt)]

    def made(y: Array, *keep: Array) -> tuple[Array, Array]:
        shape, y = y.shape, split(y, run)
        top = _largest_or_nan(fmt, y, (-1,), *(split(k, run) for k in keep)).squeeze(-1)
        top = top if run == fmt.block else split(top, fmt.block // run).max(-1)
        found, divisor = per_block(fmt, top)
        at = jnp.broadcast_to(divisor[..., None], (*divisor.shape, fmt.block // run)).reshape(*y.shape[:-1], 1)
        data = data_of(fmt, y * at) if isinstance(fmt, MxFp8) else _divided(fmt, y, at)
        return data.reshape(shape), found

    if not any(spec_of(y)):
        return made(*of)
    of_blocks = (*spec_of(y)[:-1], None)
    return by_jit(lambda *of: made(*of)[0], spec_of(y), *of), by_jit(lambda *of: made(*of)[1], of_blocks, *of)


def _linear(fmt: Any, amax: Array) -> tuple[Array, Array]:
    scale = _linear_scale(fmt, amax)
    return scale, scale


def _power_of_two(fmt: Any, amax: Array) -> tuple[Array, Array]:
    """The bits of float8_e8m0fnu, and the reciprocal. amax is m 2**e, and 1.75 2**emax the largest number of both
    float8 formats."""
    amax = jnp.minimum(amax, jnp.finfo(jnp.float32).max)  # an infinity is clipped; NaN stays
    # The barrier is around one number a block: without it XLA for GPU computes y in three kernels more.
    bits = lax.bitcast_convert_type(lax.optimization_barrier(amax), jnp.int32)
    code = (bits >> 23) - int(np.log2(fmt.largest))
    if fmt.rounding == "up":
        code = code + ((bits & 0x7FFFFF) > 0x600000).astype(jnp.int32)
    code = jnp.where(amax == amax, jnp.maximum(code, 0), 255)
    inverse = lax.bitcast_convert_type(jnp.where(code == 255, 0x7FC00000, (254 - code) << 23), jnp.float32)
    return code.astype(jnp.uint8), lax.optimization_barrier(inverse)


def _rounded_scale(fmt: Any, amax: Array) -> tuple[Array, Array]:
    """A scale in float8_e4m3fn, and as it is rounded; of a block of zeros the latter is infinite, for zeros."""
    scale = jnp.clip(amax / jnp.float32(fmt.largest), 0.0, 448.0)
    # By bits, to the nearest even: XLA may drop a cast there and back, and a barrier would cut its kernel.
    bits = lax.bitcast_convert_type(scale, jnp.int32)
    normal = lax.bitcast_convert_type((bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF, jnp.float32)
    rounded = jnp.where(scale < 2.0**-6, jnp.round(scale * 512.0) * 2.0**-9, normal)
    rounded = jnp.where(scale == scale, rounded, scale)
    return rounded.astype(jnp.float8_e4m3fn), jnp.where(rounded == 0.0, jnp.inf, rounded)


_SCALES = {Fp8: _linear, Int8: _linear, MxFp8: _power_of_two, NvFp4: _rounded_scale}


def unquantized(fmt: Any, plan: Plan, x: Any) -> Plan:
    """The plan of a norm of x whose output is y. `dtype` is that of the output without quantization.

    XLA for GPU would make 4 bits in a kernel of their own, which reads all of y.
    """
    plan = replace(plan, quantize=None, statistics_first=fmt.kind == jnp.float4_e2m1fn)
    if fmt.round_first:
        return plan
    return replace(plan, dtype=accumulator(x), cast_dtype=plan.dtype if plan.cast_before_scale else None)


def as_quantized(fmt: Any, y: Array, dtype) -> Array:
    """y in float32. Rounded by an instruction where it is rounded first: XLA may drop a cast there and back."""
    y = y.astype(accumulator(y))
    return (round_to(y, dtype) if fmt.round_first else y).astype(jnp.float32)


# --- a whole output ---------------------------------------------------------------------------------------------------


def needs_amax(fmt: Any, given: Array | None) -> bool:
    """Whether the scale is that of all of y, which is then made twice."""
    return given is None and (fmt.of_tensor or isinstance(fmt, NvFp4))


def largest_of_all(fmt: Fp8 | Int8 | NvFp4, found: Array, reduction: Reduction) -> Array:
    """The largest absolute value of y on all devices, a scalar, from those of rows."""
    names = lambda axis_name: () if axis_name is None else (axis_name,) if isinstance(axis_name, str) else axis_name
    over = tuple(dict.fromkeys((*names(reduction.axis_name), *names(fmt.axis_name))))
    return max_over_devices(lax.optimization_barrier(found).max(initial=0.0), over or None, None)


def quantize_array(
    fmt: Any, y: Array, reduction: Reduction, given: Array | None, keep: Array | None, dtype
) -> Quantized:
    """y in a format, without a gradient. `dtype` is that of the output, which `round_first` rounds to."""
    y = as_quantized(fmt, lax.stop_gradient(y), dtype)
    amax = None
    if fmt.of_tensor or isinstance(fmt, NvFp4):
        amax = largest_of_all(fmt, _largest(y, reduction.axes, keep), reduction)
        given = fmt.scale_for(amax) if given is None else given
    if isinstance(fmt, NvFp4):
        assert given is not None
        data, scale = _by_blocks(fmt, y / given.reshape((1,) * y.ndim), keep)
        return Quantized(data, scale, amax, given)
    rows = None if given is None else given.reshape((1,) * y.ndim)
    return assembled(fmt, *quantized_rows(fmt, y, reduction, rows, keep), given, amax)


def assembled(fmt: Any, data: Array, found: Array, given: Array | None, amax: Array | None) -> Quantized:
    """The output, from what `quantized_rows` gives."""
    if fmt.of_tensor:
        assert given is not None
        return Quantized(data, given, amax)
    if isinstance(fmt, MxFp8):
        return Quantized(data, lax.bitcast_convert_type(found, jnp.float8_e8m0fnu))
    transposed = getattr(fmt, "transposed_scale", False) and fmt.per == "block"
    return Quantized(data, jnp.swapaxes(found, -1, -2) if transposed else found, transposed_scale=transposed)


# --- gradients --------------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def refuse_gradient(norm: str, y: Array) -> Array:
    """y, which cannot be differentiated."""
    return y


@refuse_gradient.defjvp
def _(norm, primals, tangents):
    raise TypeError(no_gradient(norm))


def no_gradient(norm: str) -> str:
    return (
        f"{norm}: a quantized output has no gradient of its own. Write straight_through=True in the format, which "
        "gives it that of the norm without quantization, or jax.lax.stop_gradient(x)."
    )


@jax.custom_jvp
def carrier(y: Array) -> Array:
    """Zeros that have y's tangent."""
    return jnp.zeros_like(y)


@carrier.defjvp
def _(primals, tangents):
    return carrier(*primals), tangents[0]
