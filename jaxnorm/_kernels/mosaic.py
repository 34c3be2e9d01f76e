"""What the two Mosaic rooms, of GPU and TPU, do in the place of a primitive's formula: rows go to Pallas kernels.

Pallas is imported when a room is named, not with jaxnorm. Nothing takes these rooms by default: they have been compiled
for their chips, and not been timed on one.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import jax
import jax.numpy as jnp

from .call import BACKWARD_OF_SUM, FORWARD_OF_SUM, Call
from .rows import Rows, rows_of
from .xla import Reduction, accumulator

Array = jax.Array


_DISTRIBUTIONS = {"absl": "absl-py"}  # modules that Pallas imports, where pip knows them by another name


@functools.cache
def _loaded(module: str) -> ModuleType | str:
    """The kernels, or why they cannot be had."""
    try:
        return importlib.import_module(f".{module}", __package__)
    except (ImportError, AttributeError, TypeError) as error:  # Pallas moves quickly from one JAX to the next
        package = ((isinstance(error, ModuleNotFoundError) and error.name) or "jax").partition(".")[0]
        if package not in ("jax", "jaxlib"):
            package = _DISTRIBUTIONS.get(package, package)
            return f"Pallas needs {package}, which is not installed. Write: pip install {package}"
        return f"jax {jax.__version__} lacks a part of Pallas that jaxnorm._kernels.{module} needs: {error}"


def _kernels(module: str) -> ModuleType:
    kernels = _loaded(module)
    assert isinstance(kernels, ModuleType)  # or the room would have been refused
    return kernels


def missing(module: str) -> str | None:
    kernels = _loaded(module)
    return kernels if isinstance(kernels, str) else None


def refusal(module: str, x: Array, how: Reduction, dtype, varying: frozenset[int]) -> str | None:
    shape = rows_of(x.shape, how.axes, varying)
    if shape is None:
        return f"its kernels are for rows, the last axes of x with parameters along them, not {how.axes} of {x.shape}"
    return _kernels(module).refusal(shape, x.dtype, dtype)


def takes(module: str, call: Call, operands, by_default: bool) -> bool:
    x, how = operands[0], call.recipe.how
    if call.recipe.room != module:
        return False
    shape = rows_of(x.shape, how.axes, call.varying(operands))
    dtypes = (a.dtype for a in operands if a.shape == x.shape)
    return shape is not None and _kernels(module).refusal(shape, *dtypes) is None


def forward(module: str, call: Call, names, across, *operands) -> tuple[Array, ...]:
    """y and the statistics, of rows that are whole on this device, and the new stream where there is a residual."""
    x, scale, bias, residual = call.unpacked(operands, FORWARD_OF_SUM)
    how, shape = _static(call, operands)
    along = functools.partial(_along, x, call.recipe.how.axes)
    residual = None if residual is None else residual.reshape(shape)
    y, shift, offset, m2, *new = _kernels(module).forward(
        how, call.recipe.dtype, x.reshape(shape), along(scale), along(bias), residual
    )
    kept = tuple(1 if a in call.recipe.how.axes else n for a, n in enumerate(x.shape))
    return y.reshape(x.shape), *(s.reshape(kept) for s in (shift, offset, m2)), *(a.reshape(x.shape) for a in new)


def backward(module: str, call: Call, names, across, *operands) -> tuple[Array, ...]:
    """dx, with the cotangent of a stream added where there is one, and those gradients of scale and bias wanted."""
    x, *statistics, scale, g, g_stream = call.unpacked(operands, BACKWARD_OF_SUM)
    how, shape = _static(call, operands)
    scale = _along(x, call.recipe.how.axes, scale)
    statistics = (s.reshape(shape[0]) for s in statistics)
    wanted = tuple(s is not None for s in call.wanted)
    g_stream = None if g_stream is None else g_stream.reshape(shape)
    dx, *gradients = _kernels(module).backward(
        how, wanted, x.reshape(shape), *statistics, scale, g.reshape(shape), g_stream
    )
    full = tuple(n if a in call.recipe.how.axes else 1 for a, n in enumerate(x.shape))
    summed = lambda d, shape: d.reshape(full).sum([a for a, n in enumerate(shape) if n == 1], keepdims=True)
    return dx.reshape(x.shape), *map(summed, gradients, [s for s in call.wanted if s is not None])


def _static(call: Call, operands) -> tuple[Rows, tuple[int, int]]:
    recipe, how = call.recipe, call.recipe.how
    shape = rows_of(operands[0].shape, how.axes, call.varying(operands))
    assert shape is not None  # a part of x is of rows as x is
    rows = Rows(shape[1], recipe.epsilon, how.unit, how.centered, recipe.round_before_scale, how.large)
    return rows, shape


def _along(x: Array, axes, p: Array | None) -> Array | None:
    """A scale or bias for every column."""
    if p is None:
        return None
    full = tuple(n if a in axes else 1 for a, n in enumerate(x.shape))
    return jnp.broadcast_to(p.astype(accumulator(x)), full).reshape(-1)
