"""Whole trees of parameters: which weight is reparametrized how, by its path."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from .._core.messages import shown
from .._core.paths import matches, path_of
from .base import Reparametrization

Array = jax.Array


@dataclasses.dataclass(frozen=True, init=False)
class Tree:
    """Reparametrize weights of a tree of parameters, such as Flax's, by path.

    A path is the keys from the root, joined by "/". In a pattern `*` is any part of one key and `**` any number of
    keys. The first pattern that matches decides; None leaves a weight as it is. What no pattern matches stays.

    The parameters are a tree of the same form, with the `Params` of a spec in the place of a weight that has several.
    The state is a dict from path to state. Both are pytrees, for optimizers and checkpoints. Restored checkpoints may
    have dicts in place of the `Params`.

    Args:
      specs: a mapping from pattern to spec.

    Raises:
      ValueError: a pattern matches nothing. The message has the paths that there are.

    >>> import jax, numpy as np
    >>> from jaxnorm import weights
    >>> tree = weights.Tree({"**/head/kernel": None, "**/kernel": weights.WeightNorm()})
    >>> layer = lambda n: {"kernel": np.ones((3, n), "f"), "bias": np.zeros(n, "f")}
    >>> params, state = tree.init({"body": layer(2), "head": layer(1)}, jax.random.key(0))
    >>> (params["body"]["kernel"].g ** 2).round().tolist(), params["head"]["kernel"].shape
    ([3.0, 3.0], (3, 1))
    >>> effective, state = tree.apply(params, state, train=True)
    >>> jax.tree.map(np.shape, effective)["body"]
    {'bias': (2,), 'kernel': (3, 2)}
    """

    specs: tuple[tuple[str, Reparametrization | None], ...]

    def __init__(self, specs: Mapping[str, Reparametrization | None]):
        if not isinstance(specs, Mapping) or not specs:
            raise TypeError(
                f'Tree: specs must map patterns to specs, got {shown(specs)}. Write {{"**/kernel": WeightNorm()}}.'
            )
        for pattern, spec in specs.items():
            if not isinstance(pattern, str) or not (spec is None or isinstance(spec, Reparametrization)):
                raise TypeError(
                    f"Tree: {shown(pattern)} must be a pattern and its value a spec or None, got {shown(spec)}. "
                    'Write {"**/kernel": WeightNorm()}.'
                )
        object.__setattr__(self, "specs", tuple(specs.items()))

    def init(self, params: Any, key: Array | None = None) -> tuple[Any, dict[str, Any]]:
        """Return (params, state) from a tree of weights. Each weight has its own key, by its place among the paths."""
        key = jax.random.key(0) if key is None else key
        leaves, structure = jax.tree_util.tree_flatten_with_path(params)
        self._check_patterns([path_of(keys) for keys, _ in leaves])
        made, state = [], {}
        for place, (keys, w) in enumerate(leaves):
            path = path_of(keys)
            spec = self.spec(path)
            own = ()
            if spec is not None:
                try:
                    w, own = spec.init(w, jax.random.fold_in(key, place))
                except (TypeError, ValueError) as error:
                    raise type(error)(f"Tree: at {path!r}: {error}") from error
            made.append(w)
            if own != ():
                state[path] = own
        return jax.tree.unflatten(structure, made), state

    def apply(self, params: Any, state: Mapping[str, Any] | None = None, *, train: bool = False) -> tuple[Any, Any]:
        """Return (tree of effective weights, next state)."""
        state = {} if state is None else state
        new = dict(state)

        def effective(path: str, spec: Reparametrization, own: Any) -> Array:
            w, after = spec.apply(own, state.get(path, ()), train=train)
            if path in new:
                new[path] = after
            return w

        return self._map(effective, params), new

    def bake(self, params: Any, state: Mapping[str, Any] | None = None) -> Any:
        """Return the tree of effective weights of inference, of the form that `init` was given."""
        return self.apply(params, state, train=False)[0]

    def project(self, params: Any) -> Any:
        """Return the parameters with each spec's `project`: call it after each step of the optimizer."""
        return self._map(lambda path, spec, own: spec.project(own), params)

    def spec(self, path: str) -> Reparametrization | None:
        """The spec of a path, None if it stays as it is."""
        return next((spec for pattern, spec in self.specs if matches(pattern, path)), None)

    def _map(self, f, params: Any) -> Any:
        kinds = {spec.Params for _, spec in self.specs if spec is not None and spec.Params is not None}
        fields = {frozenset(kind._fields) for kind in kinds}
        whole = lambda a: type(a) in kinds or (isinstance(a, Mapping) and frozenset(a) in fields)
        leaves, structure = jax.tree_util.tree_flatten_with_path(params, is_leaf=whole)
        self._check_patterns([path_of(keys) for keys, _ in leaves])
        made = []
        for keys, own in leaves:
            path = path_of(keys)
            spec = self.spec(path)
            made.append(own if spec is None else f(path, spec, own))
        return jax.tree.unflatten(structure, made)

    def _check_patterns(self, paths: list[str]) -> None:
        for pattern, _ in self.specs:
            if not any(matches(pattern, path) for path in paths):
                there = ", ".join(paths[:12]) + (f", and {len(paths) - 12} more" if len(paths) > 12 else "")
                raise ValueError(
                    f'Tree: the pattern "{pattern}" matches no path. There are {there or "none"}. Write "**/kernel".'
                )
