"""The seam: which rooms can run a norm on this machine, and which one does. XLA defines the meaning of all of them."""

from __future__ import annotations

from typing import NamedTuple

from . import cpu, rooms


class Backend(NamedTuple):
    """One room of kernels, as `backends()` reports it."""

    active: bool  # True: `implementation=None` may choose it here
    reason: str  # what it is good for, or why it is not active


def backends() -> dict[str, Backend]:
    """The rooms of kernels in this build, whether each is active on this machine, and why.

    Two environment variables are read when jaxnorm is imported. Any other value than these raises ValueError there.

      JAXNORM_NATIVE: 0 leaves the native CPU kernels out; 1, like no value, uses them where they were built.
      JAXNORM_ISA: avx512bf16, avx512, avx2 or baseline: the instruction set of the native kernels. No value picks the
        best one that the processor supports; one that it does not support raises ValueError.

    >>> import jaxnorm as jn
    >>> jn.backends()["xla"].active
    True
    """
    return {
        "xla": Backend(True, "plain XLA on every platform; defines what the other rooms must compute"),
        "native": Backend(*cpu.library()[:2]),
        **{name: Backend(False, _not_by_default(name)) for name in ("mosaic_gpu", "mosaic_tpu")},
    }


def _not_by_default(name: str) -> str:
    room = rooms.ROOMS[name]
    if (missing := room.missing()) is not None:
        return missing
    return (
        "Pallas kernels for layer and RMS norm of rows, and of a residual stream that they add to, compiled for "
        f"{room.platform.upper()} and not yet timed there: "
        f"only implementation={name!r} runs them"
    )


def checked_implementation(norm: str, implementation: str | None) -> None:
    """A named room runs or says why it does not."""
    names = {"xla", *rooms.ROOMS}
    if implementation is None or implementation in names:
        return
    raise ValueError(
        f"{norm}: implementation={implementation!r} is not a room of this build, which has {sorted(names)}. "
        "Write implementation=None for the best one, and see jaxnorm.backends() for the reasons."
    )
