"""haiku: (params, state) of a transformed function. Statistics are averages that are corrected for their start.

haiku keeps three arrays for each: hidden, average = hidden / (1 - decay**counter), and counter. jaxnorm's state with
`zero_debias` is the average, and `count` the counter. Statistics without a count weigh as many updates as there can be.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._core.messages import shown
from .._norms.base import Spec
from .leaf import Leaf, Specs, as_jax
from .norm import Read, read_arrays, refuse
from .plan import Misfit

LIBRARY = "haiku"
MANY = 2**30  # updates, after which decay**counter is 0
_EMAS = {"mean_ema": "mean", "var_ema": "var"}


def is_tree(tree: Any) -> bool:
    """(params, state) as `hk.transform_with_state` makes them."""
    return type(tree) is tuple and len(tree) == 2 and all(isinstance(part, Mapping) for part in tree)


class Tree:
    """(params, state); a new pair is returned. `decay` is that of a batch norm where it is known."""

    library = LIBRARY

    def __init__(self, params: Mapping[str, Any], state: Mapping[str, Any], decay: float | None = None):
        self.specs: Specs = {}
        self.parts, self.decay = (params, state), decay
        self.leaves = [leaf for part in self.parts for module in part for leaf in self._leaves(module, part[module])]

    def _leaves(self, module: str, arrays: Mapping[str, Any]) -> list[Leaf]:
        *outside, last = keys = [key for key in module.split("/") if key not in ("", "~")] or [""]
        if last not in _EMAS or "average" not in arrays:
            kind = "transposed" if "transpose" in last else None
            return [Leaf(f"{module}/{n}", (*keys, n), a, kind, LIBRARY) for n, a in arrays.items()]
        role, counted = _EMAS[last], (("count", self._counted, "the updates"), ("", lambda _: MANY, "fully counted"))
        made = [
            Leaf(f"{module}/average", (*outside, role), arrays["average"], "vector", role=role),
            Leaf(f"{module}/hidden", (*outside, f"{role}_hidden"), arrays["hidden"], "vector",
                 otherwise=(("", None, "from the average"),)),
            Leaf(f"{module}/counter", (*outside, f"{role}_counter" if role == "var" else "counter"), arrays["counter"],
                 otherwise=counted),
        ]  # fmt: skip
        return made

    def _counted(self, count: np.ndarray) -> int:
        if self.decay is None:
            raise Misfit("updates are counted, and haiku's decay is not known here. Convert the norms by to_haiku.")
        if count.size and count.min() != count.max():
            raise Misfit("the channels have seen different numbers of updates; haiku has one counter.")
        return int(count.max(initial=0))

    def write(self, values: dict[str, np.ndarray]) -> Any:
        values = dict(values)
        for path in [p for p in values if p.endswith("_ema/average")]:
            module = path.removesuffix("average")
            average, counter = values[path], values.get(f"{module}counter", np.int32(MANY))
            if f"{module}hidden" not in values:
                share = np.ones((), np.float32) if self.decay is None else _share(self.decay, int(counter))
                values[f"{module}hidden"] = average * share.astype(average.dtype)
        fill = lambda module, name, old: as_jax(values[p], old) if (p := f"{module}/{name}") in values else old
        params, state = (
            {module: {name: fill(module, name, old) for name, old in arrays.items()} for module, arrays in part.items()}
            for part in self.parts
        )
        return params, state


def _share(decay: float, counter: int) -> np.ndarray:
    """1 - decay**counter as haiku rounds it; 1 where nothing was counted."""
    with jax.numpy_dtype_promotion("standard"):
        return np.asarray(1.0 - jnp.power(jnp.float32(decay), jnp.int32(counter)) if counter else jnp.float32(1.0))


def read_layer(name: str, layer: Any, params: Any = None, state: Any = None) -> Read | None:
    """The norm of (layer or spec, params, state): the dicts of its module, or whole trees that hold it."""
    own = getattr(layer, "module_name", None)
    if not (params is None or isinstance(params, Mapping)) or not (state is None or isinstance(state, Mapping)):
        refuse(name, shown(layer), f"params and state must be dicts, got {shown(params)} and {shown(state)}.")
    params, state = _of_module(name, own, params or {}), _of_module(name, own, state or {})
    if isinstance(layer, Spec):
        policy = layer._running() if hasattr(layer, "_running") else None  # pyright: ignore[reportAttributeAccessIssue]
        return read_arrays(name, layer, Tree(params, state, policy.momentum if policy is not None else None))
    found = read(layer)
    if found is not None:
        found.store = Tree(params, state, found.options.get("momentum"))
        given = read_arrays(name, found.spec(), found.store)
        found.features = given.features
    return found


def _of_module(name: str, own: str | None, tree: Mapping[str, Any]) -> dict[str, Any]:
    """What belongs to one module, as a tree of paths from it."""
    if not any(isinstance(value, Mapping) for value in tree.values()):
        return {"": dict(tree)} if tree else {}
    modules = {path.removesuffix("/~/mean_ema").removesuffix("/~/var_ema") for path in tree} - {"mean_ema", "var_ema"}
    if own not in modules and len(modules) > 1:
        refuse(
            name, own or "params", f"there are {shown(sorted(modules))}. Write {{path: params[path]}} of the one meant."
        )
    own = own if own in modules else next(iter(modules), "")
    mine = lambda path: path == own or path.startswith(f"{own}/~/") or not modules
    return {path[len(own) :]: arrays for path, arrays in tree.items() if mine(path)}


def read(layer: Any) -> Read | None:
    """The norm that a module of haiku is, without its arrays; None if it is none."""
    import haiku as hk

    kinds = {"BatchNorm": hk.BatchNorm, "InstanceNorm": hk.InstanceNorm, "LayerNorm": hk.LayerNorm,
             "GroupNorm": hk.GroupNorm, "RMSNorm": hk.RMSNorm}  # fmt: skip
    kind = next((name for name, of in kinds.items() if isinstance(layer, of)), None)
    if kind is None:
        return None
    options: dict[str, Any] = {"epsilon": layer.eps, "use_scale": layer.create_scale}
    caveats = {}
    if kind != "RMSNorm":
        options["use_bias"] = layer.create_offset
    if kind == "BatchNorm":
        options |= {"momentum": layer.mean_ema.decay, "axis": layer.channel_index}
        options |= {"axis_name": layer.cross_replica_axis, "axis_index_groups": layer.cross_replica_axis_index_groups}
        if layer.axis is not None:
            caveats[("axis",)] = f"it reduces axis={shown(layer.axis)}. Write axis= for the ones that are left."
    elif kind == "GroupNorm":
        options |= {"num_groups": layer.groups, "axis": layer.channel_index}
        if isinstance(layer.axis, slice) and layer.axis != slice(1, None):
            caveats[("reduction_axes",)] = f"it reduces axis={layer.axis}. Write reduction_axes= for these."
    elif kind == "InstanceNorm":
        options["axis"] = layer.param_axis
    else:
        options["axis"] = layer.axis
        axes = layer.axis if not isinstance(layer.axis, slice) else ()
        if tuple(axes) != tuple(layer.param_axis):
            caveats[("axis",)] = (
                f"it normalizes over {shown(layer.axis)} with parameters over {shown(layer.param_axis)}, which is no "
                "spec. Write axis= if they are the same here."
            )
    return Read(LIBRARY, kind, options, (), None, caveats)  # pyright: ignore[reportArgumentType]


def like(new: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of one module under the names that it came with."""
    if not any(isinstance(value, Mapping) for value in old.values()):
        return dict(new.get("", {}))
    inside = lambda path: next((key for key in new if key and path.endswith(key)), "")
    return {path: new[inside(path)] for path in old}
