"""A function as one program for each set of its options: calls that are alike are traced once, under jit or not.

What a call has to say of the values of its arrays, and whatever it warns of, it says outside of the program: see
`tracing`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .messages import to_python
from .tracing import in_program, values_are_hidden

F = TypeVar("F", bound=Callable[..., Any])


def as_program(f: F, static: Iterable[str] = (), inline: bool = False) -> F:
    """Compile f once for each set of static options and each shape of its arrays.

    What comes by position, and options that are arrays, are operands; but scalars of ints and bools, and options named
    `static`, are read. Where something by position is no array, nor a tree of some, where an option cannot be hashed,
    and where f raises or warns, f runs as it is.

    Under jit the program is a function that is lowered once and called, unless it is written `inline`.
    """
    read = frozenset(static)

    @functools.lru_cache(maxsize=4096, typed=True)  # typed: 1 and True are equal
    def program(hides_values: bool, **static):
        def run(args, options):
            with in_program(hides_values):
                return f(*args, **options, **static)

        run.__name__ = run.__qualname__ = f.__name__
        return jax.jit(run, inline=inline)

    @functools.wraps(f)
    def call(*args, **options):
        arrays = {name: value for name, value in options.items() if isinstance(value, _ARRAYS)}
        for name, value in [*arrays.items()]:
            if name in read or (value.ndim == 0 and not jnp.issubdtype(value.dtype, jnp.inexact)):
                value = options[name] = to_python(value)
                if not isinstance(value, _ARRAYS):
                    del arrays[name]
        leaves = jax.tree.leaves((args, arrays))
        if _is_debugging() or not all([isinstance(a, _ARRAYS) for a in leaves]):
            return f(*args, **options)
        hides = values_are_hidden() or not all([isinstance(a, Tracer) for a in leaves])
        static = {name: value for name, value in options.items() if name not in arrays} if arrays else options
        try:
            return program(hides, **static)(args, arrays)
        except Exception:  # f explains it, from the values as given
            return f(*args, **options)

    return cast(F, call)


_ARRAYS = (jax.Array, np.ndarray)


def _is_debugging() -> bool:
    """Whether a switch of JAX looks at the values between operations."""
    config: Any = jax.config
    return config.jax_debug_nans or config.jax_debug_infs or config.jax_disable_jit
