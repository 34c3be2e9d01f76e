"""The static part of a call, resolved once."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator

from jax import lax

from .._backends.select import backend_in as backend_in
from .._backends.select import check_implementation as check_implementation
from .._core.arithmetic import prescales
from .._core.dtypes import accumulator
from .._core.intercept import setting, traced_anew
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
    plan = Plan(reduction, epsilon, float(scale_offset), dtype, backend=implementation, **more)
    if (made := _made.get()) is not None:
        made.append((x.shape, plan))
    return plan


_made: contextvars.ContextVar[list[tuple[tuple[int, ...], Plan]] | None] = contextvars.ContextVar("made", default=None)


@contextlib.contextmanager
def plans_made() -> Iterator[list[tuple[tuple[int, ...], Plan]]]:
    """The plans of the norms that are traced within the context, each with the shape of what it normalizes.

    That shape has x's axis of channels as two where the norm has groups of them.
    """
    made: list[tuple[tuple[int, ...], Plan]] = []
    with setting(_made, made), traced_anew(object()):
        yield made
