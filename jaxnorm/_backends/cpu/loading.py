"""The shared library of the CPU kernels: loaded and registered with XLA once, or the reason why not."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jaxlib.version
from jaxlib import xla_client

from ..._core.install import reinstall

_OF_SEGMENTS = ("forward", "backward", "moments", "normalize", "gradient_sums", "gradient")
_TARGETS = ("forward", "quantize", "moments", "normalize", "backward", "gradient_sums", "gradient",
            *(f"segment_{name}" for name in _OF_SEGMENTS))  # fmt: skip
_NAME = "jaxnorm_cpu"
_FOLDERS = list(sys.modules[__package__ or ""].__path__)  # several in an editable install


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
    found = [path for folder in _FOLDERS for name in names if (path := Path(folder, name)).exists()]
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
