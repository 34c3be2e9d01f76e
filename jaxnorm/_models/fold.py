"""Folding: norms that are affine at inference, and the scales and biases of others, go into the weights beside them.

The model is traced with each norm as one opaque step. What feeds what is read off the program; names decide nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .._core.intercept import Call
from .._core.paths import path_of
from .folded_norm import MARK, Norm, Work
from .graph import Graph
from .kinds import as_model
from .outcome import Outcome, Row
from .pairs import Left


@dataclasses.dataclass(frozen=True)
class Folded:
    """A model without the norms that were folded.

    Args:
      apply: `apply(variables, *args, **kwargs)` runs it. Keyword arguments default to those given to `fold`.
      variables: of the same tree, shapes and dtypes as before, in which each folded norm is the identity. They give
        the same outputs in the model as it was, whose norms then compute nothing of use.
      outcome: a row for each norm: what it was folded into, or why it was left. It prints as a table.
      model: of an nnx model, the folded copy; else None.
    """

    apply: Callable[..., Any]
    variables: Any
    outcome: Outcome
    model: Any = None


def fold(model: Any, *args: Any, **kwargs: Any) -> Folded:
    """Fold the norms of a model into the convolutions and dense layers beside them, for inference.

    A norm with running statistics (batch norm, batch renormalization, RepBN) and LayerScale go into the layer that
    makes their input, or into all layers that read their output. The scale and bias of layer, RMS, group and instance
    norm, of dynamic tanh and of dynamic erf go into all layers that read their output. Call it as the model is called:

        folded = fold(model, variables, x, train=False)              # a linen model
        folded = fold(model, x)                                      # an nnx model, after model.eval()
        folded = fold(f, variables, x)                               # a function of specs; variables: any tree
        y = jax.jit(folded.apply)(folded.variables, x)

    Args:
      model: a linen module, an nnx module, or a function whose first argument is a tree of parameters and states.
      *args: the variables, unless the model is an nnx module, and then examples of its inputs, or their
        `jax.ShapeDtypeStruct`s. No values of theirs are used.
      **kwargs: keyword arguments of the call.

    Returns:
      `Folded(apply, variables, outcome, model)`. Neither the model nor the variables are changed. Weights are computed
      in float64 and rounded once. `outcome` has a row for each norm, and its reason if it was left: an activation or a
      mask in the norm, another reader, weights or a norm that are used twice, a zero-padded convolution that reads a
      shift, a missing bias, a loop. An nnx layer without a bias gets one where it is needed; elsewhere a shift for
      which no bias is found after the weights stays in the place of the norm, as one addition.

    Raises:
      TypeError: the model is none of these; variables hold no arrays of known values.
      ValueError: the model calls no norm of jaxnorm; variables are spread over several processes.

    >>> import jax, jax.numpy as jnp, jaxnorm as jn
    >>> from jaxnorm import models
    >>> norm = jn.BatchNorm(epsilon=0.)
    >>> params, state = norm.init(2)
    >>> variables = {"w": jnp.ones((3, 2)), "norm": params, "stats": state._replace(var=jnp.full(2, 4.))}
    >>> f = lambda v, x: norm.apply(v["norm"], v["stats"], x @ v["w"], train=False)[0]
    >>> folded = models.fold(f, variables, jnp.ones((1, 3)))
    >>> print(folded.outcome)
    fold: 1 changed, 0 left alone
      path  what          why
    + norm  folded into w
    >>> folded.variables["w"][0].tolist(), folded.apply(folded.variables, jnp.ones((1, 3))).tolist()
    ([0.5, 0.5], [[1.5, 1.5]])
    """
    kind = as_model(model, args)
    leaves, paths = _leaves(kind.variables)
    norms: list[Norm] = []

    def run(leaves: list[Any], inputs: list[Any]) -> Any:
        norms.clear()
        args, kwargs = _with_arrays(called, inputs)
        look = lambda path, call, run: _mark(norms, path, call, run)
        out = kind.run(look, _with_arrays(kind.variables, leaves), args, kwargs)
        return [a for a in jax.tree.leaves(out) if _is_array(a)]

    called = kind.args, kwargs
    inputs = [a for a in jax.tree.leaves(called) if _is_array(a)]
    work = Work(Graph(run, leaves, inputs, MARK), leaves, paths, kind)
    if not norms:
        raise ValueError(
            "fold: the model calls no norm of jaxnorm. Flax's own are not seen: write jaxnorm.linen.BatchNorm or "
            "jaxnorm.nnx.BatchNorm, which have the same variables."
        )
    rows, ways = [], {}
    seen = work.seen(norms)
    for number, norm in seen:
        path = work.place(number, norm)
        try:
            ways[path], what = work.fold(norm, work.step_of(number, seen))
            rows.append(Row(path, what))
        except Left as reason:
            rows.append(Row(path, "left alone", str(reason), done=False))
    places = {path.rpartition("/")[0] for path in paths}
    if any(norm.by_turn and norm.path in ways and norm.path not in places for norm in norms):
        kind.calls = [norm.path for norm in norms]
    static = {name: value for name, value in kwargs.items() if not any(map(_is_array, jax.tree.leaves(value)))}
    variables = _with_arrays(kind.variables, work.finished())
    apply, variables, made = kind.finish(variables, ways, work.biases(), static)
    return Folded(apply, variables, Outcome("fold", rows), made)


def _is_array(a: Any) -> bool:
    return isinstance(a, (jax.Array, np.ndarray, jax.ShapeDtypeStruct))


def _with_arrays(tree: Any, arrays: list[Any]) -> Any:
    """The tree with other arrays, and all else as it is."""
    others = iter(arrays)
    return jax.tree.map(lambda a: next(others) if _is_array(a) else a, tree)


def _leaves(variables: Any) -> tuple[list[Any], list[str]]:
    """The arrays of the variables, whose values must be known, and their paths."""
    found = [(keys, a) for keys, a in jax.tree_util.tree_flatten_with_path(variables)[0] if _is_array(a)]
    for keys, leaf in found:
        path = path_of(keys)
        if not isinstance(leaf, (jax.Array, np.ndarray)) or isinstance(leaf, Tracer):
            raise TypeError(
                f"fold: variables must hold arrays whose values are known, got {type(leaf).__name__} at {path!r}. "
                "Write fold(model, variables, x) outside of jax.jit, with the variables first, then the inputs."
            )
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            raise ValueError(
                f"fold: {path!r} is spread over several processes. Write jax.device_get or fold where one process has "
                "the whole of it."
            )
    if not found:
        raise TypeError("fold: variables hold no arrays. Write fold(model, variables, x), or fold(nnx_model, x).")
    return [leaf for _, leaf in found], [path_of(keys) for keys, _ in found]


def _mark(norms: list[Norm], path: str, call: Call, run: Callable[[], Any]) -> Any:
    """In the place of a norm's call: one step of the program that takes x, the parameters and the state."""
    y, state = jax.eval_shape(run)
    x, held = jnp.asarray(call.x), (call.params, call.state)
    norm = Norm.of(path, call, y)
    norms.append(norm)
    if norm.returns is None or jax.tree.structure(state) != jax.tree.structure(call.state):
        return run()

    def step(x: Any, *_: Any) -> Any:
        return (x + 1).astype(norm.returns)

    step.__name__ = step.__qualname__ = f"{MARK}{len(norms) - 1}_"
    y = jax.jit(step)(x, *jax.tree.leaves(held))
    return y, jax.tree.map(lambda a, like: jnp.asarray(a).astype(like.dtype), call.state, state)
