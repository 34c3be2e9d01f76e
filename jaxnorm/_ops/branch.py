"""A branch that is normalized and then added to the residual stream."""

from __future__ import annotations

from typing import Any

import jax

from .._core.arrays import align_gate, as_float_array, canonicalize_axes, canonicalize_dtype
from .._core.dtypes import accumulator, round_to, widest
from .._core.messages import shown
from .._core.types import Affine
from .residual import add_rounded, as_residual, match_types
from .rows import normalize_rows

Array = jax.Array

CASTS = ("after_add", "before_add", "before_scale")


def check_cast(norm: str, cast: Any) -> None:
    if not isinstance(cast, str) or cast not in CASTS:
        raise ValueError(f'{norm}: cast must be one of {CASTS}, got {shown(cast)}. Write cast="after_add".')


def add_normalized(
    norm: str, x, residual, scale, bias, gate, following: Affine | None, *, axis, cast, dtype, mask, activation,
    implementation, centered, quantize, quantize_scale, **options,
) -> Any:  # fmt: skip
    """residual + gate * norm(x), and with the parameters of a following norm the output of that as well."""
    check_cast(norm, cast)
    for what, option in dict(activation=activation, quantize=quantize).items() if following is None else ():
        if option is not None:
            raise ValueError(
                f"{norm}: {what}={shown(option)} is of the next norm, and there is none. Write {what}=None, or "
                "next=jaxnorm.Affine(scale, bias)."
            )
    x = as_float_array(norm, x, rank=1, layout="the normalized axes among its own")
    residual = as_residual(norm, x, residual)
    out = canonicalize_dtype(norm, dtype, x, residual)
    axes = canonicalize_axes(norm, x.ndim, axis)
    wide, twice = widest(accumulator(x), accumulator(residual)), cast == "before_scale"
    given = dict(options, mask=mask, implementation=implementation, centered=centered, cast_before_scale=twice)
    gated = {} if gate is None else dict(gate=align_gate(norm, gate, x), gate_where="after", activation=_same)
    branch = normalize_rows(norm, x, scale, bias, axes, axes, dtype=x.dtype if twice else wide, **given, **gated)
    if cast != "after_add":
        branch = round_to(branch.astype(wide), x.dtype)  # by an instruction: XLA may drop a cast there and back
    stream = add_rounded(implementation == "lax", *match_types(branch, residual))
    if following is None:
        return stream
    given |= dict(dtype=out, activation=activation, quantize=quantize, quantize_scale=quantize_scale)
    y = normalize_rows(norm, stream, *following, axes, axes, **given)
    return y, stream


def _same(gate: Array) -> Array:
    return gate
