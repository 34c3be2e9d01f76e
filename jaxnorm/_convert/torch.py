"""torch: modules and state dicts. A kernel of torch has its outputs first, and a running variance divides by n - 1."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from .._core.loaded import is_a
from .._norms.base import Spec
from .leaf import Leaf, Specs, as_like
from .norm import Read, add_spec, read_arrays, refuse

LIBRARY = "torch"
_KEPT = (("", None, "kept"),)


def is_module(tree: Any) -> bool:
    return is_a(tree, "torch.nn")


def is_state_dict(tree: Any) -> bool:
    """A flat mapping from names to arrays, as torch and safetensors have."""
    return isinstance(tree, Mapping) and bool(tree) and all(hasattr(v, "shape") for v in tree.values())


class Tree:
    """A module, which is filled in place; or a flat dict of arrays, where a new one is returned.

    A dict has torch's layouts, but for arrays called kernel and embedding, which are Flax's.
    """

    library = LIBRARY

    def __init__(self, tree: Any, module: bool):
        self.tree, self.module = tree, module
        self.specs: Specs = {}
        kinds: dict[str, str | None] = {}
        if module:
            for name, layer in tree.named_modules():
                kinds[name] = _kind(layer)
                add_spec(self.specs, tuple(name.split(".")), layer, lambda layer: read(layer, arrays=False))
        self.state = tree.state_dict() if module else tree
        self.leaves = [
            Leaf(path, keys := _keys(path), value, kinds.get(path.rpartition(".")[0]), _layout(keys),
                 otherwise=_KEPT if path.endswith("num_batches_tracked") else ())
            for path, value in self.state.items()
            if hasattr(value, "shape")
        ]  # fmt: skip

    def write(self, values: dict[str, np.ndarray]) -> Any:
        new = {path: as_like(values[path], self.state[path]) for path in values}
        if not self.module:
            return {path: new.get(path, old) for path, old in self.state.items()}
        self.tree.load_state_dict(new, strict=False)  # no others: tied weights would get their old values back
        return self.tree


def _keys(path: str) -> tuple[str, ...]:
    """The keys of a name. A flat dict may be one of Flax's variables, with "/" and a collection."""
    keys = tuple(re.split("[./]", path))
    return keys[1:] if len(keys) > 1 and keys[0] in ("params", "batch_stats") else keys


def _layout(keys: tuple[str, ...]) -> str:
    return "flax" if keys[-1] in ("kernel", "embedding") else LIBRARY


def _rms(nn: Any) -> tuple[Any, ...]:
    """torch has an RMS norm since 2.4."""
    return (nn.RMSNorm,) if hasattr(nn, "RMSNorm") else ()


def _kind(layer: Any) -> str | None:
    import torch

    nn = torch.nn
    kinds = {
        "dense": (nn.Linear,),
        "conv": (nn.Conv1d, nn.Conv2d, nn.Conv3d),
        "transposed": (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        "embedding": (nn.Embedding, nn.EmbeddingBag),
        "vector": (nn.LayerNorm, *_rms(nn), nn.GroupNorm, nn.modules.batchnorm._NormBase),
    }
    return next((kind for kind, types in kinds.items() if isinstance(layer, types)), None)


def read_layer(name: str, layer: Any, state: Any = None) -> Read | None:
    """The norm of a layer of torch, or of (spec, state dict)."""
    return read_arrays(name, layer, Tree(state, False)) if isinstance(layer, Spec) else read(layer)


def read(layer: Any, arrays: bool = True) -> Read | None:
    """The norm that a layer of torch is; None if it is none."""
    import torch

    nn, batchnorm = torch.nn, torch.nn.modules.batchnorm
    store: Any = Tree(layer, True) if arrays else None
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin) and layer.has_uninitialized_params():
        refuse("from_torch", type(layer).__name__, "it is lazy and has seen no input. Call it once.")
    if isinstance(layer, batchnorm._NormBase):
        batch, momentum = isinstance(layer, batchnorm._BatchNorm), layer.momentum
        kind = "BatchNorm" if batch else "InstanceNorm"
        options = {"epsilon": layer.eps, "use_scale": layer.affine, "use_bias": layer.affine}
        caveats = {}
        if batch:
            options["momentum"] = None if momentum is None else 1.0 - momentum
            if momentum is None:
                caveats[("momentum", "frozen")] = (
                    "momentum=None averages the variances of batches alike, which jaxnorm does not: its own None is "
                    "the variance of all elements. Write momentum=0.9, or frozen=True for inference."
                )
            if not layer.track_running_stats:
                caveats[()] = "it has no running statistics. Write jaxnorm.BatchNorm, and train=True always."
        elif layer.track_running_stats:
            caveats[()] = "it has running statistics for inference, which jaxnorm.InstanceNorm has not."
        return Read(LIBRARY, kind, options, (layer.num_features,), store, caveats)
    if isinstance(layer, nn.GroupNorm):
        options = {"num_groups": layer.num_groups, "epsilon": layer.eps}
        options |= {"use_scale": layer.affine, "use_bias": layer.affine}
        return Read(LIBRARY, "GroupNorm", options, (layer.num_channels,), store)
    if isinstance(layer, (nn.LayerNorm, *_rms(nn))):
        shape = tuple(layer.normalized_shape)
        options: dict[str, Any] = {"axis": tuple(range(-len(shape), 0)) if len(shape) > 1 else -1}
        options["use_scale"] = layer.elementwise_affine
        if isinstance(layer, nn.LayerNorm):
            options["use_bias"] = layer.bias is not None
        if layer.eps is not None:
            options["epsilon"] = layer.eps
        kind = "LayerNorm" if isinstance(layer, nn.LayerNorm) else "RMSNorm"
        return Read(LIBRARY, kind, options, shape, store)
    return None
