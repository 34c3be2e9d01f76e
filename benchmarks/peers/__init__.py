"""One file and one class per library: `norm(which, x, scale, bias) -> y`, and what else a benchmark asks of it.

`make(name)` imports the library. A new library is a file with one class and a line in `PEERS`.
"""

from __future__ import annotations

import importlib

from benchmarks.peers.base import Peer as Peer

#: By name: the class, and the options that it is made with.
PEERS = {
    "jaxnorm": ("jaxnorm:Jaxnorm", {}),
    "jaxnorm-xla": ("jaxnorm:Jaxnorm", {"backend": "xla"}),
    "jaxnorm-native": ("jaxnorm:Jaxnorm", {"backend": "native"}),
    "jaxnorm-mosaic_gpu": ("jaxnorm:Jaxnorm", {"backend": "mosaic_gpu"}),
    "jaxnorm-mosaic_tpu": ("jaxnorm:Jaxnorm", {"backend": "mosaic_tpu"}),
    "jaxnorm-composed": ("jaxnorm:Jaxnorm", {"fused": False}),
    "flax.linen": ("linen:Linen", {}),
    "flax.linen use_fast_variance=False": ("linen:Linen", {"use_fast_variance": False}),
    "flax.nnx": ("nnx:NNX", {}),
    "haiku": ("haiku:Haiku", {}),
    "equinox": ("equinox:Equinox", {}),
    "keras": ("keras:Keras", {}),
    "jax.nn.standardize": ("standardize:Standardize", {}),
    "tokamax": ("tokamax:Tokamax", {}),
    "torch": ("torch:Torch", {}),
    "torch-spin": ("torch:Torch", {}),
    "torch.compile": ("torch:Torch", {"compiled": True}),
    "liger": ("liger:Liger", {}),
    "quack": ("quack:Quack", {}),
}
TORCH = ("torch", "torch-spin", "torch.compile", "liger", "quack")


def make(name: str) -> Peer:
    """Raises whatever importing the library raises."""
    where, options = PEERS[name]
    module, kind = where.split(":")
    return getattr(importlib.import_module(f"benchmarks.peers.{module}"), kind)(name, **options)
