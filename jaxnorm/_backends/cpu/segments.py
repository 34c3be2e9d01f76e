"""The CPU kernels for norms of segments: statistics of lines that carry one id, and what is affine in x.

Legend: x is `lines` lines of K = G D columns. Tables are (segments + 1, K), of the accumulator's dtype, the last row
for absent lines. u = (x - shift) r.
"""

from __future__ import annotations

import jax
import numpy as np

from ..._core.dtypes import accumulator
from ..._core.types import Plan
from ..segments import LinesView
from . import _PAIRS, library

Array = jax.Array


def unsupported_reason(x, dtype) -> str | None:
    """Why there is no kernel for this x and this dtype of y; None if there is."""
    found = library()
    if not found.loaded:
        return found.reason
    pair = (x.dtype.name, np.dtype(dtype).name)
    return None if pair in _PAIRS else f"there is no kernel from {pair[0]} to {pair[1]}"


def _call(target: str, view: LinesView, results, *args, epsilon=0.0, prescale=1.0, centered=True) -> list[Array]:
    attributes = dict(
        view=np.array((1, 1, view.lines, view.groups, view.each, 1), np.int64), count=np.float64(0.0),
        epsilon=np.float64(epsilon), prescale=np.float64(prescale), centered=np.bool_(centered),
        cast_before_scale=np.bool_(False), segments=np.int64(view.segments),
    )  # fmt: skip
    shaped = [jax.ShapeDtypeStruct(*result) for result in results]
    return list(jax.ffi.ffi_call(f"jaxnorm_segment_{target}", shaped)(*args, **attributes))


def _of(plan: Plan) -> dict:
    reduction = plan.reduction
    prescale = reduction.prescale if reduction.large_prescale is None else 0.0
    return dict(epsilon=plan.epsilon, prescale=prescale, centered=reduction.centered)


def forward(view: LinesView, plan: Plan, x: Array, ids: Array, scale: Array, bias: Array) -> list[Array]:
    """Of the plain norm y, and mean_hi, mean_lo, m2 and counts, (segments, G)."""
    of = ((view.segments, view.groups), accumulator(x))
    return _call("forward", view, [(x.shape, plan.dtype), *[of] * 4], x, ids, scale, bias, **_of(plan))


def backward(view: LinesView, plan: Plan, x, g, ids, mean_hi, mean_lo, m2, counts, scale: Array) -> list[Array]:
    """Of the plain norm dx, and the gradients of scale and bias."""
    of = ((view.groups * view.each,), accumulator(x))
    args = (x, g, ids, mean_hi, mean_lo, m2, counts, scale)
    return _call("backward", view, [(x.shape, x.dtype), *[of] * 2], *args, **_of(plan))


def moments(view: LinesView, plan: Plan, x: Array, ids: Array) -> list[Array]:
    """mean_hi, mean_lo, m2 and counts, (segments, G)."""
    of = ((view.segments, view.groups), accumulator(x))
    return _call("moments", view, [of] * 4, x, ids, **_of(plan))


def normalize(view: LinesView, dtype, x: Array, ids: Array, shift, r, a, b) -> Array:
    """y = u a + b, and b of the last row for what is absent."""
    return _call("normalize", view, [(x.shape, dtype)], x, ids, shift, r, a, b)[0]


def gradient_sums(view: LinesView, x: Array, g: Array, ids: Array, shift, r) -> list[Array]:
    """The sums of g u and of g for each segment and column."""
    return _call("gradient_sums", view, [(view.table, accumulator(x))] * 2, x, g, ids, shift, r)


def gradient(view: LinesView, x: Array, g: Array, ids: Array, shift, r, a, p, q) -> Array:
    """dx = r (g a - q - u p), and 0 for what is absent."""
    return _call("gradient", view, [(x.shape, x.dtype)], x, g, ids, shift, r, a, p, q)[0]
