"""Adapter from the norm primitives to the Pallas kernels for GPU and TPU.

Pallas is imported when a backend is named or a program is lowered for its platform, not with jaxnorm. The GPU's kernels
are the default on Hopper, where they were measured; the TPU's compile but have not run on hardware.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from types import ModuleType

import jax
import jax.numpy as jnp

from ..._core.dtypes import accumulator
from ..call import BACKWARD_OF_SUM, FORWARD_OF_SUM, Call
from ..protocol import Request, Support, only_plain
from .rows import Job, Rows, rows_of

Array = jax.Array


_DISTRIBUTIONS = {"absl": "absl-py"}  # modules that Pallas imports, where pip knows them by another name


@functools.cache
def _loaded(backend: str) -> ModuleType | str:
    """The kernels, or why they cannot be had."""
    module = f"{__package__}.{backend.removeprefix('mosaic_')}"
    try:
        return importlib.import_module(module)
    except Exception as error:  # Pallas moves quickly from one JAX to the next: a name, a signature, anything
        package = ((isinstance(error, ModuleNotFoundError) and error.name) or "jax").partition(".")[0]
        if package not in ("jax", "jaxlib"):
            package = _DISTRIBUTIONS.get(package, package)
            return f"Pallas needs {package}, which is not installed. Write: pip install {package}"
        return f"jax {jax.__version__} lacks the Pallas API that {backend} needs: {error}"


def _kernels(backend: str) -> ModuleType:
    kernels = _loaded(backend)
    assert isinstance(kernels, ModuleType)  # or the backend would have been refused
    return kernels


@dataclass(frozen=True)
class Mosaic:
    """Pallas kernels of one platform, for the last axes of x as rows."""

    name: str
    platform: str
    partitions: bool  # libtpu has no custom partitioning
    fuses_add: bool = True
    merges_shards: bool = False
    quantizes: bool = False  # XLA fuses the formula: see docs/quantized.md
    takes_masks: bool = False

    def available(self) -> Support:
        kernels = _loaded(self.name)
        if isinstance(kernels, str):
            return Support.no(kernels)
        return Support.yes(
            "Pallas kernels for layer and RMS norm of rows, and of a residual stream that they add to, compiled for "
            f"{self.platform.upper()}"
        )

    def active(self) -> Support:
        library = self.available()
        return _kernels(self.name).measured_here() if library.ok else library

    def supports(self, request: Request) -> Support:
        if not (library := self.available()).ok:
            return library
        if not (plain := only_plain(request)).ok:
            return plain
        x, axes = request.x, request.reduction.axes
        if request.quantize is not None:
            return Support.no("its kernels write no quantized outputs")
        shape = rows_of(x.shape, axes, request.varying)
        if shape is None:
            return Support.no(
                "its kernels are for rows, the last axes of x with parameters along them or for each example or head, "
                f"not {axes} of {x.shape}"
            )
        reason = _kernels(self.name).unsupported_reason(shape[:2], x.dtype, request.dtype)
        return Support.yes() if reason is None else Support.no(reason)

    def runs(self, call: Call, operands, by_default: bool) -> bool:
        x, plan, named = operands[0], call.plan, call.plan.backend == self.name
        if not (by_default or named) or isinstance(_loaded(self.name), str):
            return False
        shape, kernels = rows_of(x.shape, plan.reduction.axes, call.varying(operands)), _kernels(self.name)
        if shape is None or not (named or (shape.examples == 1 and kernels.is_profitable(shape.columns, plan))):
            return False
        return (
            kernels.unsupported_reason(shape[:2], plan.dtype, *(a.dtype for a in operands if a.shape == x.shape))
            is None
        )

    def forward(self, call: Call, names, collectives, *operands) -> tuple[Array, ...]:
        """y and the statistics, of rows that are whole on this device, and the new stream where there is a residual."""
        x, scale, bias, _, _, residual = call.unpacked(operands, FORWARD_OF_SUM)
        job, rows = _static(call, operands)
        shape, along = rows[:2], functools.partial(_along, x, call.plan.reduction.axes, rows)
        residual = None if residual is None else residual.reshape(shape)
        y, mean_hi, mean_lo, m2, *new = _kernels(self.name).forward(
            job, call.plan.dtype, x.reshape(shape), along(scale), along(bias), residual
        )
        kept = tuple(1 if a in call.plan.reduction.axes else n for a, n in enumerate(x.shape))
        return (
            y.reshape(x.shape),
            *(s.reshape(kept) for s in (mean_hi, mean_lo, m2)),
            *(a.reshape(x.shape) for a in new),
        )

    def backward(self, call: Call, names, collectives, *operands) -> tuple[Array, ...]:
        """dx, with the cotangent of a stream added where there is one, and those gradients of scale and bias wanted."""
        x, _, *statistics, scale, g, _, _, g_stream = call.unpacked(operands, BACKWARD_OF_SUM)
        job, rows = _static(call, operands)
        shape, scale = rows[:2], _along(x, call.plan.reduction.axes, rows, scale)
        statistics = (s.reshape(shape[0]) for s in statistics)
        grad_shapes = tuple(s is not None for s in call.grad_shapes)
        g_stream = None if g_stream is None else g_stream.reshape(shape)
        dx, *gradients = _kernels(self.name).backward(
            job, grad_shapes, x.reshape(shape), *statistics, scale, g.reshape(shape), g_stream
        )
        full = _full(x, call.plan.reduction.axes, rows)
        summed = lambda d, shape: d.reshape(full).sum([a for a, n in enumerate(shape) if n == 1], keepdims=True)
        return dx.reshape(x.shape), *map(summed, gradients, [s for s in call.grad_shapes if s is not None])


def _static(call: Call, operands) -> tuple[Job, Rows]:
    plan, reduction = call.plan, call.plan.reduction
    rows = rows_of(operands[0].shape, reduction.axes, call.varying(operands))
    assert rows is not None  # a part of x is of rows as x is
    prescales = reduction.prescale, reduction.large_prescale
    how = rows.columns, plan.epsilon, reduction.centered, plan.cast_before_scale
    return Job(*how, *prescales, rows.examples, rows.in_turn), rows


def _full(x: Array, axes, rows: Rows) -> tuple[int, ...]:
    """The shape of a scale or bias for every column, and every example or head where they have their own."""
    return tuple(n if a in axes or a in rows.own else 1 for a, n in enumerate(x.shape))


def _along(x: Array, axes, rows: Rows, p: Array | None) -> Array | None:
    """A scale or bias for every column: (D,), or (examples, D)."""
    if p is None:
        return None
    spread = jnp.broadcast_to(p.astype(accumulator(x)), _full(x, axes, rows))
    return spread.reshape(-1) if rows.examples == 1 else spread.reshape(rows.examples, rows.columns)
