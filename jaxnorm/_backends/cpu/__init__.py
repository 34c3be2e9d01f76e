"""The CPU backend: C++ kernels that XLA calls inside a compiled program, on its own threads.

This file loads the library, sees a norm as the shape that its kernels know (`View`), and calls them. It knows nothing
of derivatives, which are the seam's. Legend: (B, N, S, G, D, P) as in view.h; x is of any shape that has such a view.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
from jaxlib import xla_client

from ..._core.dtypes import accumulator, are_static
from ..._core.install import reinstall
from ..._core.types import Reduction

Array = jax.Array

_TARGETS = ("forward", "moments", "normalize", "backward", "gradient_sums", "gradient")
_NAME = "jaxnorm_cpu"


class Library(NamedTuple):
    """The shared library, as far as it could be brought in."""

    loaded: bool
    reason: str  # the instruction set in use, or what is missing and the line that mends it
    instruction_sets: tuple[str, ...] = ()  # those that this processor supports, the best one first


_INSTRUCTION_SETS = ("avx512bf16", "avx512", "avx2", "baseline")


@functools.cache
def library() -> Library:
    """Load the library and register its kernels with XLA, once.

    Raises:
      ValueError: JAXNORM_NATIVE or JAXNORM_ISA has a value that `jaxnorm.backends` does not list.
    """
    native, isa = _setting("JAXNORM_NATIVE", ("0", "1")), _setting("JAXNORM_ISA", _INSTRUCTION_SETS)
    if native == "0":
        return Library(False, "switched off by JAXNORM_NATIVE=0 in the environment")
    names = (f"{_NAME}{suffix}" for suffix in (".so", ".dylib"))
    found = [path for folder in __path__ for name in names if (path := Path(folder, name)).exists()]
    if not found:
        return Library(
            False,
            "not built: no C++17 compiler (GCC or Clang) was found when jaxnorm was installed. "
            f"Install one and run: {reinstall()}",
        )
    try:
        kernels = ctypes.cdll.LoadLibrary(str(found[0]))
        sets = _instruction_sets(kernels)
        _register(kernels)
    except Exception as error:  # built for another system, by another jaxnorm, or for another FFI than jaxlib's
        return Library(
            False,
            f"{found[0].name} does not work with jaxlib {jaxlib.version.__version__}: {error}. "
            f"Build it again with a current jaxnorm: {reinstall()}",
        )
    if isa and isa not in sets:
        raise ValueError(
            f"JAXNORM_ISA={isa}: this processor does not support {isa}. Write one of {', '.join(sets)}, or unset it."
        )
    kernels.jaxnorm_instruction_set.restype = ctypes.c_char_p
    return Library(True, f"C++ kernels for {kernels.jaxnorm_instruction_set().decode()}", sets)


def _setting(name: str, allowed: tuple[str, ...]) -> str | None:
    """The value of an environment variable, None where it is unset or empty."""
    value = os.environ.get(name) or None
    if value is not None and value not in allowed:
        raise ValueError(f"{name}={value}: unknown value. Write one of {', '.join(allowed)}, or unset it.")
    return value


def _instruction_sets(kernels: ctypes.CDLL) -> tuple[str, ...]:
    kernels.jaxnorm_instruction_sets.restype = ctypes.c_char_p
    return tuple(kernels.jaxnorm_instruction_sets().decode().split())


def _register(kernels: ctypes.CDLL) -> None:
    """Register the kernels with XLA now, or raise.

    `jax.ffi.register_ffi_target` would queue them until the CPU client starts. If XLA refused one then, no JAX program
    would run in this process. Asking XLA itself at once is the only complete check: it supports a range of versions of
    its FFI, and its headers state only the upper end.
    """
    kernels.jaxnorm_ffi_version.restype = ctypes.POINTER(ctypes.c_int)
    built = tuple(kernels.jaxnorm_ffi_version()[:2])
    supported = _ffi_version()
    # Across major versions even the question what a handler was built for could crash.
    if supported and (built[0] != supported[0] or built > supported):
        raise RuntimeError(f"it was built for XLA FFI {_dotted(built)}, and jaxlib has {_dotted(supported)}")
    for target in _TARGETS:
        handler = jax.ffi.pycapsule(getattr(kernels, f"jaxnorm_{target}"))
        platform = xla_client.xla_platform_names["cpu"]
        register = xla_client._xla.register_custom_call_target  # pyright: ignore[reportPrivateImportUsage]
        register(f"jaxnorm_{target}", handler, platform, 1)


def _ffi_version() -> tuple[int, ...] | None:
    """The version of XLA's FFI that jaxlib's headers state; None where they are not installed."""
    try:
        text = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    except OSError:
        return None
    numbers = dict(re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", text))
    return (int(numbers["MAJOR"]), int(numbers["MINOR"])) if len(numbers) == 2 else None


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


# --- the shape -------------------------------------------------------------------------------------------------------


class View(NamedTuple):
    """x's axes grouped into (B, N, S, G, D, P): sizes, and which of them a scale or a bias is spread over."""

    sizes: tuple[int, ...]
    parameters: tuple[int, ...]  # x's rank: the sizes of the axes that belong to B, G and D, 1 elsewhere

    @property
    def elements(self) -> int:
        """The number of elements of one statistic."""
        return math.prod(self.sizes[slot] for slot in _REDUCED)


_B, _N, _S, _G, _D, _P = range(6)
_REDUCED = (_S, _D, _P)
_VARIES = (_B, _G, _D)  # slots that parameters have an axis for
_RUN = 64  # pixels of a plane from which a loop over it is better than one over columns


def view_of(shape: tuple[int, ...], axes: tuple[int, ...], varying: frozenset[int]) -> View | None:
    """The view of an x of this shape, reduced over `axes`, with parameters along the axes `varying`; None without one.

    >>> view_of((8, 7, 7, 64), (0, 1, 2), frozenset({3})).sizes     # batch norm, channels last
    (1, 1, 392, 64, 1, 1)
    """
    return _view_of(shape, axes, varying) if are_static(*shape) else None


@functools.lru_cache(maxsize=4096)  # a search, asked for several times in each call of a norm
def _view_of(shape: tuple[int, ...], axes: tuple[int, ...], varying: frozenset[int]) -> View | None:
    runs: list[tuple[bool, bool, list[int]]] = []  # neighbouring axes of one kind, those of size 1 left out
    for axis, size in enumerate(shape):
        kind = (axis in axes, axis in varying)
        if size == 1:
            continue
        if runs and runs[-1][:2] == kind:
            runs[-1][2].append(axis)
        else:
            runs.append((*kind, [axis]))

    def fits(slots) -> bool:
        return all(
            (slot in _REDUCED) == reduced and (not varies or slot in _VARIES)
            for slot, (reduced, varies, _) in zip(slots, runs, strict=True)
        )

    def cost(slots) -> tuple:
        sizes = dict(zip(slots, (math.prod(shape[a] for a in run) for *_, run in runs), strict=True))
        short = _P in sizes and _S in sizes and sizes[_P] < _RUN
        # Parameters for each example only where they are; rows before slabs; planes where they are long enough.
        return (_B in slots, _S in slots, short, _P not in slots)

    fitting = [slots for slots in itertools.combinations(range(6), len(runs)) if fits(slots)]
    if not fitting:
        return None
    sizes, parameters = [1] * 6, [1] * len(shape)
    for slot, (*_, run) in zip(min(fitting, key=cost), runs, strict=True):
        sizes[slot] = math.prod(shape[a] for a in run)
        for axis in run if slot in _VARIES else ():
            parameters[axis] = shape[axis]
    return View(tuple(sizes), tuple(parameters))


# --- what the kernels take --------------------------------------------------------------------------------------------

_HALVES = ("float16", "bfloat16")
_PAIRS = {(t, t) for t in (*_HALVES, "float32", "float64")}
_PAIRS |= {pair for half in _HALVES for pair in ((half, "float32"), ("float32", half))}


def unsupported_reason(x: Array, reduction: Reduction, dtype, varying: frozenset[int]) -> str | None:
    """Why there is no kernel for this x, reduced so, with parameters along the axes `varying`; None if there is."""
    pair = (x.dtype.name, jnp.dtype(dtype).name)
    if pair not in _PAIRS:
        return f"there is no kernel from {pair[0]} to {pair[1]}"
    if view_of(x.shape, reduction.axes, varying) is None:
        return f"no kernel reduces axes {reduction.axes} of {x.shape} with such parameters without transposing"
    return None


# Elements from which the kernels beat XLA, as `python -m benchmarks.break_even` measures: of x where it is rows, and of
# an example where that is a slab of lines, each of which costs some bookkeeping.
SMALLEST, SMALLEST_SLAB = 512, 1024


def is_profitable(view: View, dtype) -> bool:
    """Whether the kernels beat XLA for this shape and dtype: the rule of the default."""
    size, (B, N, S, *_) = math.prod(view.sizes), view.sizes
    few_parameters = B == 1 or 4 * math.prod(view.parameters) <= size
    return few_parameters and size >= (SMALLEST if S == 1 else SMALLEST_SLAB * B * N)


# --- the calls -------------------------------------------------------------------------------------------------------


class Static(NamedTuple):
    """What a kernel has to know of a norm besides its arrays."""

    view: View
    count: float  # the elements of one statistic, on all devices
    epsilon: float
    prescale: float
    centered: bool
    cast_before_scale: bool = False

    def attributes(self):
        return dict(
            view=np.array(self.view.sizes, np.int64), count=np.float64(self.count), epsilon=np.float64(self.epsilon),
            prescale=np.float64(self.prescale), centered=np.bool_(self.centered),
            cast_before_scale=np.bool_(self.cast_before_scale),
        )  # fmt: skip


def _call(target: str, static: Static, results, *args) -> tuple[Array, ...]:
    shaped = [jax.ShapeDtypeStruct(*result) for result in results]
    return tuple(jax.ffi.ffi_call(f"jaxnorm_{target}", shaped)(*args, **static.attributes()))


def _parameter(p: Array | None, x: Array, view: View) -> Array:
    """A scale or bias for every (b, g, d), in the accumulator's dtype; of no elements where it is absent."""
    if p is None:
        return jnp.zeros((0,), accumulator(x))
    return jnp.broadcast_to(p.astype(accumulator(x)), view.parameters)


def _statistics(x: Array, axes) -> tuple:
    return tuple(1 if a in axes else n for a, n in enumerate(x.shape)), accumulator(x)


def count(static: Static, x: Array) -> Array:
    """The elements of one statistic here, as `Statistics` has them."""
    return jnp.full((1,) * x.ndim, static.view.elements, accumulator(x))


def _gradient(x: Array, static: Static) -> tuple:
    return static.view.parameters, accumulator(x)


def forward(static: Static, axes, dtype, x, scale, bias) -> tuple[Array, ...]:
    """y, and mean_hi, mean_lo and m2 of x's rank."""
    parameters = (_parameter(p, x, static.view) for p in (scale, bias))
    return _call("forward", static, [(x.shape, dtype), *[_statistics(x, axes)] * 3], x, *parameters)


def backward(static: Static, x, mean_hi, mean_lo, m2, scale, g) -> tuple[Array, ...]:
    """dx, and the gradients of scale and bias for every (b, g, d), of x's rank."""
    args = (x, g, mean_hi, mean_lo, m2, _parameter(scale, x, static.view))
    return _call("backward", static, [(x.shape, x.dtype), *[_gradient(x, static)] * 2], *args)


# The same in parts, between which statistics and sums can be merged over devices.


def moments(static: Static, axes, x) -> tuple[Array, ...]:
    return _call("moments", static, [_statistics(x, axes)] * 3, x)


def normalize(static: Static, dtype, x, mean_hi, mean_lo, m2, scale, bias) -> Array:
    parameters = (_parameter(p, x, static.view) for p in (scale, bias))
    return _call("normalize", static, [(x.shape, dtype)], x, mean_hi, mean_lo, m2, *parameters)[0]


def gradient_sums(static: Static, axes, x, mean_hi, mean_lo, m2, scale, g) -> tuple[Array, ...]:
    """The sums of h = g scale and of h xhat for every statistic, and the gradients of scale and bias."""
    args = (x, g, mean_hi, mean_lo, m2, _parameter(scale, x, static.view))
    return _call("gradient_sums", static, [*[_statistics(x, axes)] * 2, *[_gradient(x, static)] * 2], *args)


def gradient(static: Static, x, mean_hi, mean_lo, m2, scale, g, h, hx) -> Array:
    """dx, from such sums."""
    args = (x, g, mean_hi, mean_lo, m2, _parameter(scale, x, static.view), h, hx)
    return _call("gradient", static, [(x.shape, x.dtype)], *args)[0]
