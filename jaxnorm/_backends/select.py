"""`jaxnorm.backends()`: which backends this build has, and whether each is active on this machine."""

from __future__ import annotations

from typing import NamedTuple

from . import registry
from .protocol import KernelBackend


class Backend(NamedTuple):
    """One kernel backend, as `backends()` reports it."""

    active: bool  # True: `implementation=None` may choose it here
    reason: str  # what it is good for, or why it is not active


def backends() -> dict[str, Backend]:
    """The kernel backends in this build, whether each is active on this machine, and why.

    "lax" is for programs that read jaxprs and know the operations of `jax.lax` alone, such as converters to ONNX. A
    norm is then the same operations on every platform, inside `jit` and `custom_jvp_call`. It computes what "xla"
    computes on a CPU. It is slower than "xla" on GPU and TPU, and keeps more for the backward pass.

    Two environment variables are read when jaxnorm is imported. Any other value than these raises ValueError there.

      JAXNORM_NATIVE: 0 leaves the native CPU kernels out; 1, like no value, uses them where they were built.
      JAXNORM_ISA: avx512bf16, avx512, avx2 or baseline: the instruction set of the native kernels. No value picks the
        best one that the processor supports; one that it does not support raises ValueError.

    >>> import jaxnorm as jn
    >>> jn.backends()["xla"].active
    True
    """
    return {
        "xla": Backend(
            True,
            "plain XLA on every platform; defines what the other backends must compute. The bits of a row may depend "
            "on the size of its batch",
        ),
        "lax": Backend(False, "lax operations alone, for readers of jaxprs: only implementation='lax' runs them"),
        **{name: _reported(backend) for name, backend in registry.BACKENDS.items()},
    }


def _reported(backend: KernelBackend) -> Backend:
    ok, reason = backend.available()
    if not ok or registry.is_active(backend):
        return Backend(ok, reason)
    why = backend.active().reason if registry.is_default(backend) else "not a default"
    return Backend(False, f"{reason}. Only implementation={backend.name!r} runs them here: {why}")


def check_implementation(norm: str, implementation: str | None) -> None:
    """Raise if there is no backend of this name."""
    names = {"xla", "lax", *registry.BACKENDS}
    if implementation is None or (isinstance(implementation, str) and implementation in names):
        return
    shown = repr(implementation) if isinstance(implementation, str) else type(implementation).__name__
    raise ValueError(
        f"{norm}: implementation={shown} is not a backend of this build, which has {sorted(names)}. "
        "Write implementation=None for the best one, and see jaxnorm.backends() for the reasons."
    )


_CALLS = {"native": "@jaxnorm_", "mosaic_gpu": "mosaic_gpu", "mosaic_tpu": "@tpu_custom_call"}  # in StableHLO


def backend_in(lowered: str) -> str:
    """The backend whose kernels a lowered program calls, from its text: "xla" if it calls none."""
    return next((name for name, call in _CALLS.items() if call in lowered), "xla")
