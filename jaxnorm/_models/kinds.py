"""The three kinds of models: linen with variables, nnx modules, and functions of a tree of parameters and states."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, MutableSequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._core.arrays import align_param, canonicalize_axes
from .._core.dtypes import accumulator, widest
from .._core.intercept import Call, alone
from .._core.loaded import is_a
from .calls import Watcher, watching


class Way(NamedTuple):
    """What stands in the place of a norm: itself without scale and bias ("bare"), or x ("same") plus a shift."""

    what: str
    dtype: Any
    shift: np.ndarray | None


@dataclasses.dataclass
class Kind:
    """A model as a function of its variables."""

    f: Callable[..., Any]
    variables: Any
    args: tuple[Any, ...]
    calls: list[str] | None = None  # the paths of all calls in order, if norms are known by their turn alone

    def run(self, watch: Watcher, variables: Any, args: Any, kwargs: Any) -> Any:
        with watching(watch, None, (variables,)):
            return self.f(variables, *args, **kwargs)

    def place(self, path: str, own: list[str]) -> str:
        """The path of a norm, from the one that was seen and those of its variables."""
        return path

    def refusal(self, path: str, layer: type) -> str:
        """Why the norm at a path cannot be taken out; "" if it can. `layer` is the type of what has called it."""
        return ""

    def can_make_bias(self, path: str) -> bool:
        """Whether the layer with the weights at a path can be given a bias."""
        return False

    def finish(
        self, variables: Any, ways: dict[str, Way], biases: dict[str, np.ndarray], defaults: dict[str, Any]
    ) -> tuple[Callable[..., Any], Any, Any]:
        """The function, the variables and the model without what was folded."""

        def apply(variables: Any, *args: Any, **kwargs: Any) -> Any:
            called: list[str] = []

            def look(path: str, call: Call, run: Callable[[], Any]) -> Any:
                called.append(path)
                return _in_place(ways, path, call, run)

            out = self.run(look, variables, args, {**defaults, **kwargs})
            if self.calls not in (None, called):
                raise ValueError(
                    f"fold: the function has called {len(called)} norms, and {len(self.calls or ())} when it was "
                    "folded, so that they are not known by their turn. Fold it without jax.jit, and apply specs to the "
                    "very parameters that the variables hold."
                )
            return out

        return apply, variables, None


def _in_place(ways: dict[str, Way], path: str, call: Call, run: Callable[[], Any]) -> Any:
    way = ways.get(path)
    if way is None:
        return run()
    if way.what == "bare":
        params = call.params
        absent = dict.fromkeys(("scale", "bias"))
        params = {**params, **absent} if isinstance(params, Mapping) else params._replace(**absent)
        return alone(call.spec.apply, params, call.state, call.x, *call.operands, **call.options)
    if normalizes_the_batch(call):
        raise ValueError(f"{path}: the norm was folded for inference. Write train=False.")
    x = jnp.asarray(call.x)
    dtype = call.spec.dtype or x.dtype
    if way.shift is not None:
        axes = canonicalize_axes("fold", x.ndim, call.spec.feature_axes())
        held: Any = {**_named(call.state), **{k: v for k, v in _named(call.params).items() if v is not None}}
        shift = held["bias"] if "bias" in held else -held["mean"]
        return _shifted(x, align_param("fold", "", shift, x.shape, axes), dtype), call.state
    return x.astype(dtype), call.state


def normalizes_the_batch(call: Call) -> bool:
    """Whether it takes statistics of the batch, not those of its state."""
    with_state = hasattr(call.spec, "as_affine") and not getattr(call.spec, "frozen", False)
    return with_state and call.options.get("train") is not False


def _named(tree: Any) -> dict[str, Any]:
    return dict(tree) if isinstance(tree, Mapping) else tree._asdict() if hasattr(tree, "_asdict") else {}


def _shifted(x: Any, shift: Any, dtype: Any) -> Any:
    wide = widest(accumulator(x), shift.dtype)
    return (x.astype(wide) + shift.astype(wide)).astype(dtype)


class Nnx(Kind):
    """An nnx module. The norms of the copy are replaced, and no hook is needed."""

    def __init__(self, model: Any, args: tuple[Any, ...]):
        from flax import nnx

        self.graphdef, state = nnx.split(model)
        self.model = model
        super().__init__(lambda state, *args, **kwargs: nnx.merge(self.graphdef, state)(*args, **kwargs), state, args)

    def run(self, watch: Watcher, variables: Any, args: Any, kwargs: Any) -> Any:
        from flax import nnx

        model = nnx.merge(self.graphdef, variables)
        with watching(watch, model):
            out = model(*args, **kwargs)
        given = {id(a) for a in jax.tree.leaves(variables)}
        return out, [a for a in jax.tree.leaves(nnx.state(model)) if id(a) not in given]  # also what it has written

    def place(self, path: str, own: list[str]) -> str:
        parents = {name.rpartition("/")[0] for name in own}
        return parents.pop() if len(parents) == 1 else path

    def refusal(self, path: str, layer: type) -> str:
        is_layer = type(_nodes(self.model).get(path)) is layer
        return "" if is_layer else "it is not a layer of jaxnorm.nnx, but applied by another module"

    def can_make_bias(self, path: str) -> bool:
        from flax import nnx

        layer = _nodes(self.model).get(path.removesuffix("/kernel"))
        known = type(layer) in (nnx.Conv, nnx.ConvTranspose, nnx.Linear, nnx.LinearGeneral)
        return known and getattr(layer, "bias", 0) is None and not getattr(layer, "batch_axis", None)

    def finish(
        self, variables: Any, ways: dict[str, Way], biases: dict[str, np.ndarray], defaults: dict[str, Any]
    ) -> tuple[Callable[..., Any], Any, Any]:
        from flax import nnx

        model: Any = nnx.merge(self.graphdef, variables)
        nodes = _nodes(model)
        for path, bias in biases.items():
            layer = nodes[path.removesuffix("/kernel")]
            features = layer.out_features if isinstance(layer.out_features, tuple) else (layer.out_features,)
            whole = np.broadcast_to(bias, (*(1,) * (bias.ndim - len(features)), *features))
            layer.bias, layer.use_bias = nnx.Param(jnp.asarray(whole.reshape(features))), True
        replaced = {}
        for path, way in ways.items():
            if way.what == "bare":
                for name in ("scale", "bias"):
                    if getattr(nodes[path], name, None) is not None:
                        setattr(nodes[path], name, nnx.data(None))
                        setattr(nodes[path], f"use_{name}", False)
            else:
                replaced[id(nodes[path])] = _stand_in()(way)
        for node in list(nodes.values()):
            _replace(node, replaced)
        left = [path for path, node in _nodes(model).items() if id(node) in replaced]
        if left:
            raise TypeError(
                f"fold: {left[0]} stands in a container that cannot be assigned to. Write nnx.List, or a dict."
            )
        graphdef, state = nnx.split(model)
        apply = lambda state, *args, **kwargs: nnx.merge(graphdef, state)(*args, **{**defaults, **kwargs})
        return apply, state, model


def _nodes(model: Any) -> dict[str, Any]:
    from flax import nnx

    return {"/".join(map(str, path)): node for path, node in nnx.iter_graph(model)}


def _replace(node: Any, by: dict[int, Any]) -> None:
    """Put others in the place of some of a node's children."""
    for name, child in list(getattr(node, "__dict__", {}).items()):
        if id(child) in by:
            setattr(node, name, by[id(child)])
    if isinstance(node, (dict, MutableSequence)) or type(node).__name__ == "List":
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            if id(node[key]) in by:
                node[key] = by[id(node[key])]


@functools.cache
def _stand_in() -> Any:
    from flax import nnx

    class Folded(nnx.Module):
        """What is left of a norm that was folded: the dtype of its output, and the shift that found no other place."""

        def __init__(self, way: Way):
            self.dtype = way.dtype
            self.shift = nnx.data(None) if way.shift is None else nnx.Param(jnp.asarray(way.shift, jnp.float32))

        def __call__(self, x: Any, *_: Any, **options: Any) -> Any:
            if options.get("use_running_average") is False:
                raise ValueError("the norm was folded for inference. Write model.eval().")
            y = jnp.asarray(x)
            return y.astype(self.dtype) if self.shift is None else _shifted(y, self.shift[...], self.dtype)

    return Folded


def as_model(model: Any, args: tuple[Any, ...]) -> Kind:
    """A model, and what it is called with.

    Raises:
      TypeError: it is no model, or the variables are missing.
    """
    if is_a(model, "flax.nnx"):
        return Nnx(model, args)
    f = model.apply if is_a(model, "flax.linen") else model
    if not callable(f) or isinstance(model, type):
        raise TypeError(
            f"fold: model must be a linen module, an nnx module or a function, got {type(model).__name__}. Write "
            "fold(model, variables, x), fold(nnx_model, x) or fold(f, variables, x)."
        )
    if not args:
        raise TypeError("fold: the variables are missing. Write fold(model, variables, x).")
    return Kind(f, args[0], args[1:])
