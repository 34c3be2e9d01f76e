"""The CPU backend: C++ kernels that XLA calls inside a compiled program, on its own threads.

`loading` brings them in, `view` sees a norm as the shape that they know. Here is what they take, and how they are
called. They know nothing of derivatives. Legend: (B, N, S, G, D, P) as in view.h; x is of any shape with such a view.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..._core.dtypes import accumulator
from ..._core.types import Reduction, Statistics
from .loading import Library as Library
from .loading import library as library
from .view import OF_LINES, OF_ROWS
from .view import View as View
from .view import view_of as view_of

Array = jax.Array


# --- what the kernels take --------------------------------------------------------------------------------------------

_HALVES = ("float16", "bfloat16")
_PAIRS = {(t, t) for t in (*_HALVES, "float32", "float64")}
_PAIRS |= {pair for half in _HALVES for pair in ((half, "float32"), ("float32", half))}


def unsupported_reason(x: Array, reduction: Reduction, dtype, varying: frozenset[int]) -> str | None:
    """Why there is no kernel for this x, reduced so, with parameters along the axes `varying`; None if there is."""
    pair = (x.dtype.name, jnp.dtype(dtype).name)
    if pair not in _PAIRS:
        return f"there is no kernel from {pair[0]} to {pair[1]}"
    if view_of(x.shape, reduction.axes, varying) is None:
        return f"no kernel reduces axes {reduction.axes} of {x.shape} with such parameters without transposing"
    return None


def unquantized_reason(x: Array, reduction: Reduction, dtype, varying: frozenset[int], fmt) -> str | None:
    """Why there is no kernel for this x that writes rows in a format; None if there is."""
    if x.dtype.name not in _ROUNDINGS or jnp.dtype(dtype).name not in _ROUNDINGS or fmt.kind.name not in _KINDS:
        return f"there is no kernel that quantizes {x.dtype.name} to {fmt.kind.name} from {jnp.dtype(dtype).name}"
    view = view_of(x.shape, reduction.axes, varying)
    if view is None or view.sizes[2] != 1 or math.prod(x.shape) == 0:
        return f"what is quantized are rows, the last axes of x, not {reduction.axes} of {x.shape}"
    return None


# Elements of an example from which the kernels beat XLA where an example is a slab of lines, each of which costs some
# bookkeeping, as `python -m benchmarks.cpu --small` measures. Rows are faster on the kernels however few they are.
SMALLEST_SLAB = 1024


def is_profitable(view: View, dtype) -> bool:
    """Whether the kernels beat XLA for this shape and dtype: the rule of the default.

    It asks for the size of an example, and not for how many there are: so a row has the same bits in every batch.
    """
    B, N, S, *_ = view.sizes
    return S == 1 or math.prod(view.sizes) >= SMALLEST_SLAB * B * N


# --- the calls -------------------------------------------------------------------------------------------------------


class Static(NamedTuple):
    """What a kernel has to know of a norm besides its arrays."""

    view: View
    count: float  # the elements of one statistic, on all devices
    epsilon: float
    prescale: float
    centered: bool
    cast_before_scale: bool = False

    def attributes(self):
        return dict(
            view=np.array(self.view.sizes, np.int64), count=np.float64(self.count), epsilon=np.float64(self.epsilon),
            prescale=np.float64(self.prescale), centered=np.bool_(self.centered),
            cast_before_scale=np.bool_(self.cast_before_scale),
        )  # fmt: skip


def _call(target: str, static: Static, results, *args, **more) -> tuple[Array, ...]:
    shaped = [jax.ShapeDtypeStruct(*result) for result in results]
    return tuple(jax.ffi.ffi_call(f"jaxnorm_{target}", shaped)(*args, **static.attributes(), **more))


class Weights(NamedTuple):
    """The weights of x as the kernels take them, and their sums for each statistic."""

    values: Array  # see `weights_of`
    counts: Array


def weights_of(view: View, x: Array, mask: Array | None, weights: Array | None, whole: bool) -> Array | None:
    """A boolean or a number for each element, or only for each row or line, of which nothing of x's size is made.

    `mask` and `weights` have x's rank and broadcast to it. `whole`: a statistic is of this part of x alone.
    """
    if weights is not None:
        weights = weights.astype(accumulator(x))
        given = weights if mask is None else jnp.where(mask, weights, 0.0)
    elif mask is not None:
        given = mask
    else:
        return None
    if view.has_rows:
        shape = view.spread(given.shape, OF_ROWS) if whole and weights is None else None
        return jnp.broadcast_to(given, x.shape if shape is None else shape)
    shape = view.spread(given.shape, OF_LINES)
    return jnp.broadcast_to(given, x.shape) if shape is None else jnp.broadcast_to(given.astype(accumulator(x)), shape)


def _parameter(p: Array | None, x: Array, view: View) -> Array:
    """A scale or bias for every (b, g, d), in the accumulator's dtype; of no elements where it is absent."""
    if p is None:
        return jnp.zeros((0,), accumulator(x))
    return jnp.broadcast_to(p.astype(accumulator(x)), view.parameters)


def _statistics(x: Array, axes) -> tuple:
    return tuple(1 if a in axes else n for a, n in enumerate(x.shape)), accumulator(x)


def _gradient(x: Array, static: Static) -> tuple:
    return static.view.parameters, accumulator(x)


def forward(static: Static, axes, dtype, x, scale, bias, weights: Array | None = None) -> tuple[Array, ...]:
    """y, and mean_hi, mean_lo and m2 of x's rank; with weights also their counts."""
    parameters = (_parameter(p, x, static.view) for p in (scale, bias))
    of_statistics = [_statistics(x, axes)] * (3 if weights is None else 4)
    return _call("forward", static, [(x.shape, dtype), *of_statistics], x, *parameters, *_given(weights))


def backward(static: Static, x, mean_hi, mean_lo, m2, scale, g, weights: Weights | None = None) -> tuple[Array, ...]:
    """dx, and the gradients of scale and bias for every (b, g, d), of x's rank."""
    args = (x, g, mean_hi, mean_lo, m2, _parameter(scale, x, static.view), *(weights or ()))
    return _call("backward", static, [(x.shape, x.dtype), *[_gradient(x, static)] * 2], *args)


_KINDS = ("float8_e4m3fn", "float8_e5m2", "int8")
_ROUNDINGS = ("float32", "bfloat16", "float16")  # the first three of `Type` in view.h


def quantize(static: Static, axes, dtype, fmt, x, scale, bias, given) -> tuple[Array, ...]:
    """Data and what was found, as `_ops.quantize.quantized_rows` has them, and mean_hi, mean_lo and m2.

    `dtype` is that of the output without quantization. `given` is the scale of a tensor, or None.
    """
    kept, accumulated = _statistics(x, axes)
    blocks = (*x.shape[:-1], x.shape[-1] // fmt.block) if fmt.per == "block" else kept
    powers = getattr(fmt, "rounding", None)
    rule = 0 if given is not None else 1 if powers is None else 2 if powers == "up" else 3
    upper = getattr(fmt, "upper", None)
    how = dict(
        kind=np.int64(_KINDS.index(fmt.kind.name)), rule=np.int64(rule),
        block=np.int64(fmt.block if fmt.per == "block" else static.view.elements),
        inverse=np.float64(np.float32(1.0 / fmt.largest)),
        upper=np.float64(np.finfo(np.float32).max if upper is None else upper),
        floor=np.float64(getattr(fmt, "floor", 0.0)), exponent=np.int64(int(math.log2(fmt.largest))),
        rounding=np.int64(_ROUNDINGS.index(jnp.dtype(dtype).name)), round_first=np.bool_(fmt.round_first),
    )  # fmt: skip
    parameters = (_parameter(p, x, static.view) for p in (scale, bias))
    given = jnp.zeros((0,), jnp.float32) if given is None else jnp.broadcast_to(given, kept)
    results = [(x.shape, fmt.kind), (blocks, fmt.found), *[(kept, accumulated)] * 3]
    return _call("quantize", static, results, x, *parameters, given, **how)


# The same in parts, between which statistics and sums can be merged over devices.


def moments(static: Static, axes, x, weights: Array | None = None) -> Statistics:
    *parts, count = _call(
        "moments", static, [_statistics(x, axes)] * (3 if weights is None else 4), x, *_given(weights)
    )
    if weights is None:
        parts, count = [*parts, count], jnp.full((1,) * x.ndim, static.view.elements, accumulator(x))
    return Statistics(count, *parts)


def normalize(static: Static, dtype, x, mean_hi, mean_lo, m2, scale, bias, weights: Weights | None = None) -> Array:
    parameters = (_parameter(p, x, static.view) for p in (scale, bias))
    args = (x, mean_hi, mean_lo, m2, *parameters, *(weights or ()))
    return _call("normalize", static, [(x.shape, dtype)], *args)[0]


def gradient_sums(
    static: Static, axes, x, mean_hi, mean_lo, m2, scale, g, weights: Weights | None = None
) -> tuple[Array, ...]:
    """The sums of h = g scale and of h xhat for every statistic, and the gradients of scale and bias."""
    args = (x, g, mean_hi, mean_lo, m2, _parameter(scale, x, static.view), *(weights or ()))
    return _call("gradient_sums", static, [*[_statistics(x, axes)] * 2, *[_gradient(x, static)] * 2], *args)


def gradient(static: Static, x, mean_hi, mean_lo, m2, scale, g, h, hx, weights: Weights | None = None) -> Array:
    """dx, from such sums."""
    args = (x, g, mean_hi, mean_lo, m2, _parameter(scale, x, static.view), h, hx, *(weights or ()))
    return _call("gradient", static, [(x.shape, x.dtype)], *args)[0]


def _given(weights: Array | None) -> tuple[Array, ...]:
    return () if weights is None else (weights,)
