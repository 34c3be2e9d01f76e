"""The static part of a call, resolved once."""

from __future__ import annotations

import dataclasses
import math

from jax import lax

from .._backends.select import check_implementation as check_implementation
from .._core.arithmetic import prescales
from .._core.dtypes import accumulator
from .._core.mesh import is_bound
from .._core.messages import shown
from .._core.types import Plan, Reduction


def refuse_kernels(norm: str, implementation) -> None:
    """Raise if a backend is named that has no kernel for a norm of its own formula."""
    check_implementation(norm, implementation)
    if implementation not in (None, "xla", "lax"):
        raise ValueError(
            f"{norm}: implementation={shown(implementation)} cannot run here: it has no kernel for this norm, because "
            "XLA fuses elementwise functions. Write implementation=None."
        )


def make_plan(x, names, epsilon, scale_offset, dtype, reduction: Reduction, implementation, **more) -> Plan:
    """The static part of a call on x, with the prescale of its squares; `names` are mapped axes to merge over."""
    n = reduction.over.size(x.shape) * math.prod([lax.axis_size(name) for name in names if is_bound(name)])
    prescale, large = prescales(epsilon, n, accumulator(x))
    reduction = dataclasses.replace(reduction, prescale=prescale, large_prescale=large, plain=implementation == "lax")
    return Plan(reduction, epsilon, float(scale_offset), dtype, backend=implementation, **more)
