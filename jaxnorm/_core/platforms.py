"""One formula for each platform, and what the backward pass recomputes."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax import lax

from .types import Reduction


def by_platform(reduction: Reduction, *args, default: Callable, **formulas: Callable):
    """`lax.platform_dependent`; of a plain reduction the CPU's formula."""
    if reduction.plain:
        return formulas.get("cpu", default)(*args)
    return lax.platform_dependent(*args, default=default, **formulas)


def recompute(f: Callable, plain: bool) -> Callable:
    """f, of which the backward pass keeps the arguments alone. `plain` leaves it to JAX what is kept."""
    return f if plain else jax.checkpoint(f, prevent_cse=False)
