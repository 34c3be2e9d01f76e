"""Elementwise prologue and epilogue of a norm: an activation after it, or a gate before or after it.

Legend: z is the norm's output in float32 or wider; f is the activation; `keep` is where elements count, None for all.

    activation alone: y = f(z)      gate "after": y = z f(gate)      gate "before": the norm is that of x f(gate)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from .._core.dtypes import accumulator, round_to, widest
from .._core.masks import finite_where_masked
from .._core.messages import shown
from .._core.types import Plan

Array = jax.Array
Activation = str | Callable[[Array], Array]

NAMED: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": lambda z: jax.nn.gelu(z, approximate=False),
    "gelu_tanh": lambda z: _gelu_tanh(z),
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
}


def _gelu_tanh(z: Array) -> Array:
    """`jax.nn.gelu(z, approximate=True)`, z (1 + tanh(u)) / 2, as z sigmoid(2 u): nothing cancels for negative z."""
    return z * jax.nn.sigmoid(math.sqrt(8.0 / math.pi) * (z + 0.044715 * z**3))


_CALM = 1e4  # masked-out elements above it are replaced by 0 before f, which might overflow


def check_activation(norm: str, activation: Activation | None, shape: tuple[int, ...], dtype) -> None:
    """A name from the list, or a function that keeps shapes and holds no traced values of its own."""
    check_activation_name(norm, activation)
    if activation is None:
        return
    if isinstance(activation, str):
        if jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(
                f"{norm}: activation={activation!r} is for real values, got {jnp.dtype(dtype)}. "
                "Write activation=None, or a function of complex values."
            )
        return
    wide = jax.ShapeDtypeStruct(shape, widest(dtype, jnp.float32))
    traced, out = jax.make_jaxpr(activation, return_shape=True)(wide)
    name = getattr(activation, "__name__", repr(activation))
    if getattr(out, "shape", None) != shape or not jnp.issubdtype(out.dtype, jnp.inexact):
        raise ValueError(
            f"{norm}: activation must be elementwise, but {name} makes {jax.tree.map(_typed, out)} of {_typed(wide)}. "
            "Write activation=None and apply it to the output."
        )
    if any(isinstance(c, Tracer) for c in traced.consts):
        raise ValueError(
            f"{norm}: activation must be a function of its argument alone, but {name} holds traced values. "
            "Write activation=None and apply it to the output."
        )


def check_activation_name(norm: str, activation: Activation | None) -> None:
    """All that can be said of an activation before there is an x."""
    if activation is None or callable(activation) or (isinstance(activation, str) and activation in NAMED):
        return
    raise ValueError(
        f"{norm}: activation must be one of {sorted(NAMED)}, a function, or None; got {shown(activation)}. "
        'Write activation="relu".'
    )


def _typed(a) -> str:
    return f"{a.dtype}{list(a.shape)}"


def activate(activation: Activation, z: Array) -> Array:
    return (NAMED[activation] if isinstance(activation, str) else activation)(z)


def prologue(plan: Plan, x: Array, gate: Array | None, keep: Array | None) -> Array:
    """What the norm is taken of."""
    if plan.gate != "before":
        return x
    assert gate is not None
    x = finite_where_masked(x.astype(widest(accumulator(x), accumulator(gate))), keep)
    return x * _of_gate(plan, gate, keep, x.dtype)


def widened(plan: Plan, z: Array) -> Array:
    """What the norm gives, as `after` takes it: in float32 or wider, with the precision that z was rounded to.

    The value and the derivative of f are then those at one and the same z.
    """
    return z if plan.gate == "before" else round_to(z.astype(accumulator(z)), z.dtype)


def widened_to(z: Array, *params: Array | None):
    """The dtype in which an activation takes what z and these parameters make: none of them is rounded."""
    return widest(accumulator(z), *(p.dtype for p in params if p is not None))


def epilogue(plan: Plan, z: Array, gate: Array | None, keep: Array | None) -> Array:
    """The output, rounded to its dtype."""
    if plan.gate == "before":
        return z.astype(plan.dtype)
    if plan.gate is None:
        return activate_output(plan.activation, z, keep).astype(plan.dtype)
    assert gate is not None
    z = z.astype(widest(z.dtype, accumulator(gate)))
    return (z * _of_gate(plan, gate, keep, z.dtype)).astype(plan.dtype)


def activate_output(activation: Activation, z: Array, keep: Array | None) -> Array:
    """f(z). A z that is huge where an element is absent counts as 0.

    One that is NaN there stays so: not padding made it, which gives the bias, but its statistics or a parameter.
    """
    return activate(activation, z if keep is None else _zero_unless(keep | ~(jnp.abs(z) >= _CALM), z))


def _of_gate(plan: Plan, gate: Array, keep: Array | None, dtype) -> Array:
    """f(gate), computed in this dtype. A gate that is NaN, infinite or huge where an element is absent counts as 0."""
    gate = gate.astype(dtype if jnp.iscomplexobj(gate) else jnp.finfo(dtype).dtype)
    gate = gate if keep is None else _zero_unless(keep | (jnp.abs(gate) < _CALM), gate)
    return activate(plan.activation, gate).astype(dtype)


def _zero_unless(keep: Array, z: Array) -> Array:
    return jnp.where(keep, z, jnp.zeros((), z.dtype))


def jvp_or_none(f: Callable[..., Array], primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    """f and its tangent, where None is a tangent of zero."""
    moving = [i for i, t in enumerate(tangents) if t is not None]
    if not moving:
        return f(*primals), None

    def of_moving(*values):
        at = dict(zip(moving, values, strict=True))
        return f(*(at.get(i, p) for i, p in enumerate(primals)))

    return jax.jvp(of_moving, [primals[i] for i in moving], [tangents[i] for i in moving])
