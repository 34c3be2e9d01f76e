"""One formula for each platform, and what the backward pass recomputes."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import numpy as np
from jax import lax

from .dtypes import are_static
from .types import Reduction

_FEWEST = 1 << 17  # elements from which it pays to compile a second branch, which runs as a rule never; measured


def by_platform(reduction: Reduction, *args, default: Callable, **formulas: Callable):
    """`lax.platform_dependent`; of a plain reduction the CPU's formula. Constants, which NumPy holds, remain so."""
    if reduction.plain:
        return formulas.get("cpu", default)(*args)
    constant = [isinstance(a, np.ndarray) for a in args]

    def of_arrays(formula: Callable) -> Callable:
        def of(*arrays):
            others = iter(arrays)
            return formula(*(a if c else next(others) for a, c in zip(args, constant, strict=True)))

        return of

    arrays = [a for a, c in zip(args, constant, strict=True) if not c]
    platforms = {name: of_arrays(formula) for name, formula in formulas.items()}
    return lax.platform_dependent(*arrays, default=of_arrays(default), **platforms)


def recompute(f: Callable, plain: bool) -> Callable:
    """f, of which the backward pass keeps the arguments alone. `plain` leaves it to JAX what is kept."""
    return f if plain else jax.checkpoint(f, prevent_cse=False)


def is_for_one_cpu(shape: tuple[int, ...]) -> bool:
    """Whether a program may branch on whether any sum overflowed, on which several devices would have to agree."""
    return are_static(*shape) and math.prod(shape) >= _FEWEST and _has_one_cpu()


def _has_one_cpu() -> bool:
    try:
        return len(jax.devices("cpu")) == 1
    except RuntimeError:  # JAX_PLATFORMS names others alone
        return False
