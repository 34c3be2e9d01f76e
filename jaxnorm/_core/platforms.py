"""One formula for each platform, and what the backward pass recomputes."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from jax import lax

from .types import Reduction


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
