"""The calls that benchmarks make, and the fused calls composed of a plain norm."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable

NORMS = ("layer", "rms", "batch", "group", "instance")


class Peer:
    """A library. A call that it does not have is None."""

    package: str
    norms: tuple[str, ...] = NORMS
    channels_first = False  # images are NCHW
    strict = False  # its errors must be those of one rounding
    #: masked(which, x, mask) -> y, without parameters, in training. The mask has x's shape for "layer", (batch,) for
    #: "batch". True marks a valid element.
    masked: Callable | None = None
    #: The norms of which it has that.
    masks: tuple[str, ...] = ("layer", "batch")
    #: synchronized(x, mask) -> (mean, var) of a batch norm over the axis "devices"; x (batch, features), mask (batch,)
    synchronized: Callable | None = None

    def __init__(self, name: str):
        self.name = name
        importlib.import_module(self.package)

    @property
    def version(self) -> str:
        for distribution in (self.package.split(".")[0], f"dm-{self.package}"):
            try:
                return importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                continue
        return getattr(importlib.import_module(self.package), "__version__", "unknown")

    def norm(self, which: str, x, scale, bias=None):
        """y, in training, with x's dtype. An RMS norm has no bias."""
        raise NotImplementedError

    def takes(self, norm: str) -> bool:
        return norm in self.norms or (norm.endswith("_rms") and "rms" in self.norms)

    def call(self, norm: str) -> Callable:
        """The norm as a call (*args, *consts) -> outputs."""
        plain = lambda *args: (self.norm(norm, *args),)
        return {"add_rms": self.add_rms, "gated_rms": self.gated_rms}.get(norm, plain)

    def add_rms(self, x, scale, residual):
        stream = x + residual
        return self.norm("rms", stream, scale), stream

    def gated_rms(self, x, gate, scale):
        return (self.norm("rms", x, scale) * self.silu(gate),)

    def silu(self, gate):
        import jax

        return jax.nn.silu(gate)
