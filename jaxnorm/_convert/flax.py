"""Flax: variables of linen, modules and states of nnx. Kernels have their outputs last; variances divide by n."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._core.loaded import is_a
from .._core.messages import shown
from .._core.paths import path_of
from .._norms.base import Spec
from .leaf import Leaf, Specs, as_jax
from .norm import Read, add_spec, read_arrays, refuse

LIBRARY = "flax"
_COUNTED = (("counter", lambda n: n, "the updates"),)
_KEPT = (("", None, "kept"),)


def is_nnx(tree: Any) -> bool:
    return is_a(tree, "flax.nnx") or is_a(tree, "flax.nnx", "State")


def is_linen_layer(tree: Any) -> bool:
    return is_a(tree, "flax.linen")


class Tree:
    """Variables of linen, or a tree of parameters of nested dicts. A new one is returned."""

    library = LIBRARY

    def __init__(self, tree: Any):
        flat, self.structure = jax.tree_util.tree_flatten_with_path(tree)
        self.values = [value for _, value in flat]
        self.paths = [path_of(keys) for keys, _ in flat]
        self.specs: Specs = {}
        collections = isinstance(tree, Mapping) and "params" in tree
        self.leaves = [
            self.leaf(path, value, collections)
            for path, value in zip(self.paths, self.values, strict=True)
            if hasattr(value, "shape") and not jnp.issubdtype(value.dtype, jax.dtypes.extended)
        ]

    def leaf(self, path: str, value: Any, collections: bool) -> Leaf:
        first, *rest = keys = path.split("/")
        otherwise = _COUNTED if keys[-1] == "count" else ()
        if collections:
            otherwise = otherwise if first in ("params", "batch_stats") else _KEPT
            keys = rest
        keys = self.short(tuple(keys))
        return Leaf(path, keys, value, self.kind(keys), otherwise=otherwise)

    def kind(self, keys: tuple[str, ...]) -> str | None:
        return None

    def short(self, keys: tuple[str, ...]) -> tuple[str, ...]:
        return keys

    def filled(self, values: dict[str, np.ndarray]) -> Any:
        old = zip(self.paths, self.values, strict=True)
        return jax.tree.unflatten(self.structure, [as_jax(values[p], a) if p in values else a for p, a in old])

    def write(self, values: dict[str, np.ndarray]) -> Any:
        return self.filled(values)


class NNX(Tree):
    """A module of nnx, which is filled in place; or its state, where a new one is returned."""

    def __init__(self, tree: Any):
        from flax import nnx

        self.module = tree if isinstance(tree, nnx.Module) else None
        self.kinds: dict[tuple[str, ...], str] = {}
        self.sequential: set[tuple[str, ...]] = set()  # modules whose key "layers" torch has not
        specs: Specs = {}
        if self.module is not None:
            for keys, layer in sorted(nnx.iter_modules(self.module), key=lambda found: len(found[0])):
                names = tuple(map(str, keys))
                names = self.short(names)
                if isinstance(layer, nnx.Sequential):
                    self.sequential.add(names)
                if kind := _kind(layer):
                    self.kinds[names] = kind
                add_spec(specs, names, layer, _spec_of)
            tree = nnx.state(self.module, nnx.Any(nnx.Param, nnx.BatchStat))
        super().__init__(tree)
        self.specs = specs

    def kind(self, keys: tuple[str, ...]) -> str | None:
        return self.kinds.get(keys[:-1])

    def short(self, keys: tuple[str, ...]) -> tuple[str, ...]:
        """The keys without those that `nnx.Sequential` adds."""
        made: tuple[str, ...] = ()
        for key in keys:
            made = made if key == "layers" and made in self.sequential else (*made, key)
        return made

    def write(self, values: dict[str, np.ndarray]) -> Any:
        new = self.filled(values)
        if self.module is None:
            return new
        from flax import nnx

        nnx.update(self.module, new)
        return self.module


def _kind(layer: Any) -> str | None:
    from flax import nnx

    if isinstance(layer, nnx.ConvTranspose):
        return "transposed_flipped" if layer.transpose_kernel else "transposed"
    kinds = {
        "dense": (nnx.Linear, nnx.LinearGeneral),
        "conv": (nnx.Conv,),
        "embedding": (nnx.Embed,),
        "vector": (nnx.BatchNorm, nnx.LayerNorm, nnx.RMSNorm, nnx.GroupNorm),
    }
    return next((kind for kind, types in kinds.items() if isinstance(layer, types)), None)


def read_layer(name: str, layer: Any, variables: Any = None) -> Read | None:
    """The norm of (layer, variables) of linen, of a layer of nnx, or of (spec, variables)."""
    if isinstance(layer, Spec):
        return read_arrays(name, layer, Tree(variables))
    found = read(layer)
    if found is None or is_nnx(layer):
        return found
    if not isinstance(variables, Mapping) or not {*variables} & {"params", "batch_stats"}:
        refuse(name, type(layer).__name__, f"a layer of linen has no arrays. Write {name}(layer, variables).")
    found.store = Tree(variables)
    found.features = read_arrays(name, found.spec(), found.store).features
    return found


def _spec_of(layer: Any) -> Read | None:
    return read(layer, arrays=False)


def read(layer: Any, arrays: bool = True) -> Read | None:
    """The norm that a layer of linen or nnx is, without the arrays of linen's; None if it is none."""
    own = getattr(layer, "_form", None)
    store: Any = NNX(layer) if arrays and is_nnx(layer) else None
    features = _features(layer, store)
    if own is not None:  # a layer of jaxnorm, of any spec
        form = own()
        options = form._options(layer)
        form.settle(options)
        spec = form.spec(**options)
        return Read(LIBRARY, type(spec).__name__, {}, features, store, given=spec)
    kinds = ("BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm")
    kind = next((kind for kind in kinds if _of_flax(layer, kind)), None)
    if kind is None:
        return None
    options = {"epsilon": layer.epsilon, "use_scale": layer.use_scale, "use_bias": getattr(layer, "use_bias", None)}
    options |= {"dtype": layer.dtype, "param_dtype": layer.param_dtype, "axis_name": layer.axis_name}
    options["axis_index_groups"] = layer.axis_index_groups
    caveats = {}
    if kind == "BatchNorm":
        options |= {"momentum": layer.momentum, "axis": layer.axis}
    elif kind == "GroupNorm":
        options |= {"num_groups": layer.num_groups}
        if layer.num_groups is None or is_nnx(layer):
            options["group_size"] = None if is_nnx(layer) else layer.group_size
        options["reduction_axes"] = layer.reduction_axes
    elif kind == "InstanceNorm":
        options["axis"] = layer.feature_axes
    else:
        options["axis"] = layer.reduction_axes
        if _axes(layer.reduction_axes) != _axes(layer.feature_axes):
            caveats[()] = (
                f"it normalizes over {shown(layer.reduction_axes)} with parameters over {shown(layer.feature_axes)}, "
                "which is no spec. Write jaxnorm.linen.LayerNorm or jaxnorm.nnx.LayerNorm, which take both."
            )
    return Read(LIBRARY, kind, options, features, store, caveats)


def _of_flax(layer: Any, kind: str) -> bool:
    return is_a(layer, "flax.linen", kind) or is_a(layer, "flax.nnx", kind)


def _axes(axes: Any) -> tuple[int, ...]:
    return tuple(sorted(axes)) if isinstance(axes, (tuple, list)) else (axes,)


def _features(layer: Any, store: Any) -> tuple[int, ...]:
    for leaf in store.leaves if store is not None else ():
        if leaf.role in ("weight", "bias", "mean"):
            return leaf.shape
    features = getattr(layer, "num_features", 1)
    return tuple(features) if isinstance(features, (tuple, list)) else (features,)
