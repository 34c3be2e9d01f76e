"""One class per library: `norm(which, x, scale, bias) -> y`, and what else a benchmark asks of it.

A norm of the family is a method of its name in each class that has it: `ada_layer(x, scale, shift) -> (y,)`.

`make(name)` imports the library. A new library is a class and a line in `PEERS`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable

#: By name: the class, and the options that it is made with.
PEERS = {
    "jaxnorm": ("jaxnorm:Jaxnorm", {}),
    "jaxnorm-xla": ("jaxnorm:Jaxnorm", {"backend": "xla"}),
    "jaxnorm-native": ("jaxnorm:Jaxnorm", {"backend": "native"}),
    "jaxnorm-mosaic_gpu": ("jaxnorm:Jaxnorm", {"backend": "mosaic_gpu"}),
    "jaxnorm-mosaic_tpu": ("jaxnorm:Jaxnorm", {"backend": "mosaic_tpu"}),
    "jaxnorm-composed": ("jaxnorm:Jaxnorm", {"fused": False}),
    "plain norm": ("jaxnorm:Plain", {}),
    "jnp": ("written:Written", {}),
    "flax.linen": ("flax:Linen", {}),
    "flax.linen use_fast_variance=False": ("flax:Linen", {"use_fast_variance": False}),
    "flax.nnx": ("flax:NNX", {}),
    "haiku": ("others:Haiku", {}),
    "equinox": ("others:Equinox", {}),
    "keras": ("others:Keras", {}),
    "jax.nn.standardize": ("others:Standardize", {}),
    "torch": ("torch:Torch", {}),
    "torch-spin": ("torch:Torch", {}),
    "torch.compile": ("torch:Torch", {"compiled": True}),
    "liger": ("torch:Liger", {}),
}
COMPOSED = ("add_rms", "gated_rms")  # of an RMS norm, by every library that has one
TORCH = ("torch", "torch-spin", "torch.compile", "liger")


def make(name: str) -> Peer:
    """Raises whatever importing the library raises."""
    where, options = PEERS[name]
    module, kind = where.split(":")
    return getattr(importlib.import_module(f"benchmarks.peers.{module}"), kind)(name, **options)


class Peer:
    """A library. A call that it does not have is None. Fused calls are composed of a plain norm."""

    package: str
    norms: tuple[str, ...] = ("layer", "rms", "batch", "group", "instance")
    channels_first = False  # images are NCHW
    strict: bool | None = False  # its errors must be those of one rounding; None: another norm, only timed
    #: masked(which, x, mask) -> y, without parameters, in training. The mask has x's shape for "layer", (batch,) for
    #: "batch". True marks a valid element.
    masked: Callable | None = None
    #: The norms of which it has that.
    masks: tuple[str, ...] = ("layer", "batch")
    #: synchronized(x, mask) -> (mean, var) of a batch norm over the axis "devices"; x (batch, features), mask (batch,)
    synchronized: Callable | None = None

    def __init__(self, name: str):
        self.name = name
        self.library = importlib.import_module(self.package)

    @property
    def version(self) -> str:
        for distribution in (self.package.split(".")[0], f"dm-{self.package}"):
            try:
                return importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                continue
        return getattr(self.library, "__version__", "unknown")

    def norm(self, which: str, x, scale, bias=None):
        """y, in training, with x's dtype. An RMS norm has no bias."""
        raise NotImplementedError

    def takes(self, norm: str) -> bool:
        return norm in self.norms or (hasattr(self, norm) and (norm not in COMPOSED or "rms" in self.norms))

    def call(self, norm: str) -> Callable:
        """The norm as a call (*args, *consts) -> outputs."""
        return getattr(self, norm, lambda *args: (self.norm(norm, *args),))

    def add_rms(self, x, scale, residual):
        stream = x + residual
        return self.norm("rms", stream, scale), stream

    def gated_rms(self, x, gate, scale):
        return (self.norm("rms", x, scale) * self.silu(gate),)

    def silu(self, gate):
        import jax

        return jax.nn.silu(gate)
