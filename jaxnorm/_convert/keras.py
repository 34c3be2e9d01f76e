"""keras: built layers and models, which are filled in place. Epsilon is 1e-3 by default; variances divide by n."""

from __future__ import annotations

from typing import Any

import numpy as np

from .._core.loaded import is_a
from .._norms.base import Spec
from .leaf import Leaf, Specs
from .norm import Read, add_spec, read_arrays, refuse

LIBRARY = "keras"


def is_layer(tree: Any) -> bool:
    return is_a(tree, "keras.layers", "Layer")


class Tree:
    library = LIBRARY

    def __init__(self, layer: Any):
        self.layer = layer
        self.specs: Specs = {}
        kinds: dict[int, str | None] = {}
        self.variables = {}
        inside = [layer, *layer._flatten_layers(include_self=False)]
        for part in inside:
            kinds |= {id(variable): _kind(part) for variable in part._trainable_variables}
        for variable in layer.weights:
            path = variable.path if len(inside) > 1 else variable.name
            self.variables[path] = variable
        for part in inside if len(inside) > 1 else ():
            if part.weights:
                add_spec(self.specs, self._keys(part.weights[0].path)[:-1], part, lambda p: read(p, arrays=False))
        self.leaves = [
            Leaf(path, self._keys(path), _Value(variable), kinds.get(id(variable)), LIBRARY)
            for path, variable in self.variables.items()
        ]

    def _keys(self, path: str) -> tuple[str, ...]:
        """A path without the name of the model, which keras makes up."""
        return tuple(path.removeprefix(f"{self.layer.name}/").split("/"))

    def write(self, values: dict[str, np.ndarray]) -> Any:
        for path, value in values.items():
            self.variables[path].assign(value)
        return self.layer


class _Value:
    """A variable of keras as an array."""

    def __init__(self, variable: Any):
        self.variable, self.shape, self.dtype = variable, tuple(variable.shape), variable.dtype

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        import keras

        return np.array(keras.ops.convert_to_numpy(self.variable.value), dtype=dtype)


def _norms() -> dict[str, Any]:
    """keras's norms; RMS norm since 3.9."""
    from keras import layers

    kinds = ("Batch", "Layer", "RMS", "Group")
    return {f"{kind}Norm": of for kind in kinds if (of := getattr(layers, f"{kind}Normalization", None)) is not None}


def _kind(layer: Any) -> str | None:
    from keras import layers

    kinds = {
        "depthwise": (layers.DepthwiseConv1D, layers.DepthwiseConv2D),
        "transposed": (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose),
        "conv": (layers.Conv1D, layers.Conv2D, layers.Conv3D),
        "dense": (layers.Dense,),
        "embedding": (layers.Embedding,),
        "vector": tuple(_norms().values()),
    }
    return next((kind for kind, types in kinds.items() if isinstance(layer, types)), None)


def read_layer(name: str, layer: Any, arrays: Any = None) -> Read | None:
    """The norm of a built layer, or of (spec, layer)."""
    if isinstance(layer, Spec):
        return read_arrays(name, layer, Tree(arrays))
    if is_layer(layer) and not layer.built:
        refuse(name, layer.name, "it is not built. Write layer.build((None, 64)).")
    return read(layer)


def read(layer: Any, arrays: bool = True) -> Read | None:
    """The norm that a layer of keras is; None if it is none."""
    kind = next((name for name, of in _norms().items() if isinstance(layer, of)), None)
    if kind is None:
        return None
    options: dict[str, Any] = {"epsilon": layer.epsilon}
    caveats = {}
    axis = layer.axis if isinstance(layer.axis, int) else tuple(layer.axis)
    options["axis"] = axis[0] if isinstance(axis, tuple) and len(axis) == 1 else axis
    if kind != "RMSNorm":
        options |= {"use_scale": layer.scale, "use_bias": layer.center}
    if kind == "BatchNorm":
        options["momentum"] = layer.momentum
        if getattr(layer, "renorm", False):
            caveats[()] = "renorm=True is batch renormalization. Write jaxnorm.BatchRenorm."
    if kind == "GroupNorm":
        options["num_groups"] = layer.groups
    if getattr(layer, "rms_scaling", False):
        caveats[()] = "rms_scaling=True divides by the deviation without taking the mean out, which is no RMS norm."
    store: Any = Tree(layer) if arrays else None
    features = next((tuple(w.shape) for w in layer.weights), ())
    return Read(LIBRARY, kind, options, features, store, caveats)
