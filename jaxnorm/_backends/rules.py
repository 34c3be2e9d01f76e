"""JAX's rules that primitives have in common whose meaning is a formula. Each takes `call`, its static parameter."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer
from jax.extend.core import Primitive
from jax.interpreters import ad


def compiled(primitive: Primitive, formula: Callable) -> Callable:
    """What a primitive does outside of jit: a program of its own for each call, compiled also under `disable_jit`."""

    @functools.cache
    def program(call: Any) -> Callable:
        def run(*operands):
            # JAX itself calls this function on arrays to find the operation that made a NaN, under `debug_nans`. The
            # formula has operations; the primitive would come back here.
            traced = any(isinstance(a, Tracer) for a in operands)
            return primitive.bind(*operands, call=call) if traced else formula(*operands, call=call)

        return jax.jit(run)

    def implementation(*operands, call: Any):
        if not jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue]
            return program(call)(*operands)
        with jax.disable_jit(False):
            return program(call)(*operands)

    return implementation


def jvp_by_formula(primitive: Primitive, formula: Callable, primals, tangents, call: Any):
    """The primitive's outputs, and their tangents by those of its formula."""
    moving = [i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero)]

    def of_moving(*values):
        at = dict(zip(moving, values, strict=True))
        return formula(*(at.get(i, p) for i, p in enumerate(primals)), call=call)

    pick = lambda values: [values[i] for i in moving]
    return primitive.bind(*primals, call=call), list(jax.jvp(of_moving, pick(primals), pick(tangents))[1])
