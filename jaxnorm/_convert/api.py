"""One norm from and to each library: what the functions of the face are made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .._core.messages import shown
from .._norms.base import Spec
from . import equinox, flax, haiku, keras, torch
from .norm import Read, from_layer, to_layer
from .report import Report

# What all functions return: the spec, its parameters, its state, and what was done.
Converted = tuple[Any, Any, Any, Report]


def from_torch(layer: Any, state_dict: Any = None, *, cast: bool = False, **options: Any) -> Converted:
    """A norm of torch as (spec, params, state, report).

    Args:
      layer: a torch `BatchNorm1d` to `3d`, `SyncBatchNorm`, `LayerNorm`, `RMSNorm`, `GroupNorm` or `InstanceNorm`; or a
        spec, such as `jaxnorm.BatchNorm.like("torch")`, with the arrays in `state_dict`.
      state_dict: the arrays of a spec: weight, bias, running_mean, running_var.
      cast: whether floats may be rounded to float32.
      options: fields of the spec that shall differ, such as axis=-1 for channels last.

    Raises:
      ConversionError: it is no norm of jaxnorm, or something does not fit. See `ConversionError.refused`.

    >>> import jaxnorm as jn, numpy as np
    >>> from jaxnorm import convert
    >>> norm = jn.LayerNorm.like("torch", use_bias=False)
    >>> spec, params, state, report = convert.from_torch(norm, {"weight": np.ones(3, "f")})
    >>> params.scale.tolist(), params.bias
    ([1.0, 1.0, 1.0], None)
    """
    if isinstance(layer, Spec):
        _check_arrays("from_torch", "state_dict", state_dict, "layer.state_dict()")
    known = isinstance(layer, Spec) or torch.is_module(layer)
    read = torch.read_layer("from_torch", layer, state_dict) if known else None
    return from_layer("from_torch", _known("from_torch", layer, read), options, cast)


def to_torch(spec: Spec, params: Any, state: Any, into: Any, *, cast: bool = False) -> tuple[Any, Report]:
    """Put a norm into a layer of torch, in place; or into a state dict, of which a new one is returned.

    The layer's hyperparameters must be the spec's, but for axis and scale_offset, which is added to the weight.
    num_batches_tracked is left as it is.

    Returns:
      (the layer, report).

    Raises:
      ConversionError: something does not fit; nothing was changed.
    """
    if not torch.is_module(into):
        _check_arrays("to_torch", "into", into, "layer, or layer.state_dict()")
    read = torch.read_layer("to_torch", into) if torch.is_module(into) else torch.read_layer("to_torch", spec, into)
    return to_layer("to_torch", spec, params, state, _known("to_torch", into, read), cast)


def from_flax(layer: Any, variables: Any = None, *, cast: bool = False, **options: Any) -> Converted:
    """A norm of flax as (spec, params, state, report), as `from_torch`. Layers of jaxnorm are taken too, of any spec.

    Args:
      layer: a layer of nnx; a layer of linen or a spec, with its `variables`.
      variables: {"params": ..., "batch_stats": ...} of that layer alone.
    """
    if isinstance(layer, Spec):
        _check_arrays("from_flax", "variables", variables, '{"params": ...}')
    read = flax.read_layer("from_flax", layer, variables)
    return from_layer("from_flax", _known("from_flax", layer, read), options, cast)


def to_flax(spec: Spec, params: Any, state: Any, into: Any, *, cast: bool = False) -> tuple[Any, Report]:
    """Put a norm into a layer of nnx, in place; or into variables of a linen layer, of which new ones are returned."""
    if not flax.is_nnx(into):
        _check_arrays("to_flax", "into", into, "a layer of nnx, or variables of linen")
    read = flax.read_layer("to_flax", into) if flax.is_nnx(into) else flax.read_layer("to_flax", spec, into)
    return to_layer("to_flax", spec, params, state, _known("to_flax", into, read), cast)


def from_haiku(layer: Any, params: Any = None, state: Any = None, *, cast: bool = False, **options: Any) -> Converted:
    """A norm of haiku as (spec, params, state, report), as `from_torch`.

    Args:
      layer: a module of haiku, or a spec.
      params: haiku's parameters: the dict of the module, or a tree that has it by the module's name.
      state: haiku's state, the same; for a batch norm.
    """
    read = haiku.read_layer("from_haiku", layer, params, state)
    return from_layer("from_haiku", _known("from_haiku", layer, read), options, cast)


def to_haiku(spec: Spec, params: Any, state: Any, into: Any, *, cast: bool = False) -> tuple[Any, Report]:
    """Put a norm into haiku's (params, state), which hold one module; new ones are returned."""
    if not haiku.is_tree(into):
        raise TypeError(f"to_haiku: into must be haiku's (params, state), got {shown(into)}. Write (params, {{}}).")
    read = haiku.read_layer("to_haiku", spec, *into)
    new, report = to_layer("to_haiku", spec, params, state, _known("to_haiku", into, read), cast)
    return (haiku.like(new[0], into[0]), haiku.like(new[1], into[1])), report


def from_equinox(layer: Any, state: Any = None, *, cast: bool = False, **options: Any) -> Converted:
    """A norm of equinox as (spec, params, state, report), as `from_torch`. x has the batch in front, without vmap.

    Args:
      layer: a layer of equinox. Of batch norms mode="batch"; with mode="ema" write frozen=True, for inference.
      state: the `eqx.nn.State` of a batch norm.
    """
    read = equinox.read_layer("from_equinox", layer, state)
    return from_layer("from_equinox", _known("from_equinox", layer, read), options, cast)


def to_equinox(spec: Spec, params: Any, state: Any, into: Any, *, cast: bool = False) -> tuple[Any, Report]:
    """Put a norm into a layer of equinox or (layer, state); a new one is returned."""
    read = equinox.read_layer("to_equinox", *(into if type(into) is tuple else (into,)))
    return to_layer("to_equinox", spec, params, state, _known("to_equinox", into, read), cast)


def from_keras(layer: Any, *, cast: bool = False, **options: Any) -> Converted:
    """A norm of keras, built, as (spec, params, state, report), as `from_torch`."""
    read = keras.read_layer("from_keras", layer) if keras.is_layer(layer) else None
    return from_layer("from_keras", _known("from_keras", layer, read), options, cast)


def to_keras(spec: Spec, params: Any, state: Any, into: Any, *, cast: bool = False) -> tuple[Any, Report]:
    """Put a norm into a built layer of keras, in place."""
    read = keras.read_layer("to_keras", into) if keras.is_layer(into) else None
    return to_layer("to_keras", spec, params, state, _known("to_keras", into, read), cast)


def _check_arrays(name: str, argument: str, given: Any, write: str) -> None:
    if not isinstance(given, Mapping):
        raise TypeError(f"{name}: {argument} must be a mapping of arrays, got {shown(given)}. Write {write}.")


def _known(name: str, layer: Any, read: Read | None) -> Read:
    if read is None:
        raise TypeError(f"{name}: {shown(layer)} is no norm that jaxnorm has. Write the layer itself, or a spec.")
    return read
