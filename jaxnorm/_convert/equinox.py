"""equinox: a module, or (module, state) as `eqx.nn.make_with_state` makes them. A new one is returned.

A batch norm with mode="batch" keeps hidden and a counter; its mean is hidden / (1 - momentum**counter), which is
jaxnorm's state with `zero_debias`. With mode="ema" it normalizes by the running statistics in training too.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._core.loaded import is_a
from .._core.paths import path_of
from .._norms.base import Spec
from .leaf import Leaf, Specs, as_jax, as_numpy
from .norm import Read, add_spec, read_arrays, refuse

LIBRARY = "equinox"
MANY = 2**30


def is_module(tree: Any) -> bool:
    return is_a(tree, "equinox")


def is_tree(tree: Any) -> bool:
    return is_module(tree) or (type(tree) is tuple and len(tree) == 2 and is_module(tree[0]))


class Tree:
    library = LIBRARY

    def __init__(self, model: Any, state: Any = None):
        import equinox as eqx

        self.model, self.state = model, state
        self.specs: Specs = {}
        self.kinds: dict[tuple[str, ...], str] = {}
        self.batch_norms: dict[tuple[str, ...], Any] = {}
        self.sequential: set[tuple[str, ...]] = set()
        self._walk((), model)
        flat, self.structure = jax.tree_util.tree_flatten_with_path(model)
        self.values = [value for _, value in flat]
        self.paths = [path_of(keys) for keys, _ in flat]
        self.leaves = [
            Leaf(path, keys := self._short(tuple(path.split("/"))), value, self.kinds.get(keys[:-1]), LIBRARY)
            for path, value in zip(self.paths, self.values, strict=True)
            if eqx.is_array(value)
        ]
        if state is not None:
            self.leaves += [leaf for keys, norm in self.batch_norms.items() for leaf in self._statistics(keys, norm)]

    def _walk(self, keys: tuple[str, ...], node: Any) -> None:
        """Note the layers under a node, by their keys."""
        import equinox as eqx

        if isinstance(node, eqx.nn.Sequential):
            self.sequential.add(keys)
        if isinstance(node, eqx.Module):
            if kind := _kind(node):
                self.kinds[keys] = kind
            if isinstance(node, eqx.nn.BatchNorm):
                self.batch_norms[keys] = node
            add_spec(self.specs, keys, node, lambda layer: read(layer, arrays=False))
            inside = [(name, getattr(node, name, None)) for name in node.__dataclass_fields__]
        elif isinstance(node, (tuple, list)):
            inside = [(str(place), part) for place, part in enumerate(node)]
        elif isinstance(node, dict):
            inside = [(str(name), part) for name, part in node.items()]
        else:
            return
        for name, part in inside:
            self._walk(self._short((*keys, name)), part)

    def _short(self, keys: tuple[str, ...]) -> tuple[str, ...]:
        """The keys without those that `eqx.nn.Sequential` adds to torch's."""
        made: tuple[str, ...] = ()
        for key in keys:
            made = made if key == "layers" and made in self.sequential else (*made, key)
        return made

    def _statistics(self, keys: tuple[str, ...], norm: Any) -> list[Leaf]:
        path = "/".join((*keys, "state"))
        if norm.mode == "batch":
            counter = self.state.get(norm.batch_counter)
            hidden = self.state.get(norm.batch_state_index)
            mean, var = (as_numpy(a) / _share(norm.momentum, int(counter)) for a in hidden)
            counted = (("count", lambda n: int(n.max(initial=0)), "the updates"), ("", lambda _: MANY, "fully counted"))
            more = [Leaf(f"{path}/counter", (*keys, "counter"), counter, otherwise=counted)]
        else:
            mean, var = self.state.get(norm.ema_state_index)
            more = []
        of = lambda role, value: Leaf(f"{path}/{role}", (*keys, role), value, "vector")
        return [of("mean", mean), of("var", var), *more]

    def write(self, values: dict[str, np.ndarray]) -> Any:
        old = zip(self.paths, self.values, strict=True)
        model = jax.tree.unflatten(self.structure, [as_jax(values[p], a) if p in values else a for p, a in old])
        if self.state is None:
            return model
        leaves, structure = jax.tree.flatten(self.state)
        state: Any = jax.tree.unflatten(structure, leaves)  # `set` uses a state up: that of a copy
        for keys, norm in self.batch_norms.items():
            path = "/".join((*keys, "state"))
            if f"{path}/mean" not in values or f"{path}/var" not in values:
                continue
            mean, var = values[f"{path}/mean"], values[f"{path}/var"]
            if norm.mode == "batch":
                counter = values.get(f"{path}/counter", np.asarray(MANY))
                share = _share(norm.momentum, int(counter))
                like, (a, b) = state.get(norm.batch_counter), state.get(norm.batch_state_index)
                state = state.set(norm.batch_counter, like * 0 + int(counter))  # weakly typed as it is
                state = state.set(norm.batch_state_index, (as_jax(mean * share, a), as_jax(var * share, b)))
            else:
                a, b = state.get(norm.ema_state_index)
                first = state.get(norm.ema_first_time_index)
                state = state.set(norm.ema_first_time_index, as_jax(np.asarray(False), first))
                state = state.set(norm.ema_state_index, (as_jax(mean, a), as_jax(var, b)))
        return model, state


def _share(momentum: float, counter: int) -> np.ndarray:
    """1 - momentum**counter as equinox rounds it; 1 where nothing was counted."""
    with jax.numpy_dtype_promotion("standard"):
        return np.asarray(1 - momentum ** jnp.int32(counter) if counter else jnp.float32(1.0))


def _rms(nn: Any) -> tuple[Any, ...]:
    """equinox has an RMS norm since 0.11.3."""
    return (nn.RMSNorm,) if hasattr(nn, "RMSNorm") else ()


def _kind(layer: Any) -> str | None:
    from equinox import nn

    kinds = {
        "dense": (nn.Linear,),
        "transposed": (nn.ConvTranspose,),
        "conv": (nn.Conv,),
        "embedding": (nn.Embedding,),
        "vector": (nn.BatchNorm, nn.LayerNorm, *_rms(nn), nn.GroupNorm),
    }
    return next((kind for kind, types in kinds.items() if isinstance(layer, types)), None)


def read_layer(name: str, layer: Any, state: Any = None) -> Read | None:
    """The norm of a layer and its state, or of (spec, layer)."""
    if isinstance(layer, Spec):
        return read_arrays(name, layer, Tree(state))
    found = read(layer)
    if found is None or found.kind != "BatchNorm":
        return found
    if state is None:
        refuse(name, "BatchNorm", f"its running statistics are in the state. Write {name}(layer, state).")
    found.store = Tree(layer, state)
    if layer.mode == "ema":
        found.caveats = {
            ("frozen",): 'mode="ema" normalizes by running statistics in training too, which no norm of jaxnorm does. '
            "Write frozen=True for inference."
        }
        if bool(state.get(layer.ema_first_time_index)):
            found.caveats = {(): 'mode="ema" has seen no batch, so its statistics are not set.'}
    return found


def read(layer: Any, arrays: bool = True) -> Read | None:
    """The norm that a layer of equinox is, without running statistics; None if it is none."""
    from equinox import nn

    store: Any = Tree(layer) if arrays else None
    if isinstance(layer, nn.BatchNorm):
        affine = layer.channelwise_affine
        options: dict[str, Any] = {"epsilon": layer.eps, "momentum": layer.momentum}
        options |= {"use_scale": affine, "use_bias": affine, "zero_debias": layer.mode == "batch"}
        return Read(LIBRARY, "BatchNorm", options, (layer.input_size,), store)
    if isinstance(layer, nn.GroupNorm):
        affine = layer.channelwise_affine
        options = {"num_groups": layer.groups, "epsilon": layer.eps, "use_scale": affine, "use_bias": affine}
        return Read(LIBRARY, "GroupNorm", options, (layer.channels or layer.groups,), store)
    if isinstance(layer, (nn.LayerNorm, *_rms(nn))):
        axes = tuple(range(-len(layer.shape), 0))
        options = {"epsilon": layer.eps, "use_scale": layer.use_weight, "use_bias": layer.use_bias}
        options["axis"] = axes if len(axes) > 1 else -1
        kind = "LayerNorm" if isinstance(layer, nn.LayerNorm) else "RMSNorm"
        return Read(LIBRARY, kind, options, tuple(layer.shape), store)
    return None
