"""The state of an optimizer after surgery."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

from .._core.messages import shown
from .._core.paths import path_of


def mended(swap: Any, opt_state: Any, tx: Any) -> Any:
    """See `Swap.mend`."""
    of_nnx = hasattr(opt_state, "opt_state") and hasattr(opt_state, "wrt")
    if tx is None and not of_nnx:
        raise TypeError(
            f"Swap.mend: give the state and the transformation, or an nnx.Optimizer; got {shown(opt_state)} alone. "
            "Write new.mend(opt_state, tx)."
        )
    if tx is not None and not hasattr(tx, "init"):
        raise TypeError(f"Swap.mend: tx must be an optax transformation, got {shown(tx)}. Write optax.adamw(1e-3).")
    return _of_nnx(swap, opt_state, tx or opt_state.tx) if of_nnx else _mended(opt_state, tx, _params(swap), swap.kept)


def _params(swap: Any) -> Any:
    if swap.variables is None:
        from flax import nnx

        return nnx.state(swap.model, nnx.Param)
    return swap.variables[0] if isinstance(swap.variables, tuple) else swap.variables["params"]


def _of_nnx(swap: Any, old: Any, tx: Any) -> Any:
    from flax import nnx

    with _explained():
        new = nnx.Optimizer(swap.model, tx, wrt=old.wrt)
    params = nnx.state(swap.model, old.wrt)
    new.step.set_value(old.step[...])
    new.opt_state = nnx.data(_mended(old.opt_state, tx, params, swap.kept, new.opt_state))
    return new


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            "Swap.mend: tx.init does not take the new parameters. Masks and labels in tx must be functions of the "
            f"parameters, or trees of the new ones: write new.mend(opt_state, tx) with such a tx. ({error})"
        ) from error


def _mended(opt_state: Any, tx: Any, params: Any, kept: frozenset[str], fresh: Any = None) -> Any:
    """`tx.init(params)`, with the leaves of the old state that belong to what was kept."""
    paths = [keys for keys, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    at = {keys: path_of(keys) in kept for keys in paths}
    longest = max(map(len, paths), default=0)
    old = dict(jax.tree_util.tree_flatten_with_path(opt_state)[0])
    with _explained():
        shapes = jax.eval_shape(tx.init, params) if fresh is None else fresh
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    made: list[Any] = []
    for keys, like in leaves:
        owner = next((keys[-n:] for n in range(min(longest, len(keys)), -1, -1) if keys[len(keys) - n :] in at), None)
        keep = owner is None or at[owner]
        found = old.get(keys)
        if keep and found is None:
            raise ValueError(
                f"Swap.mend: the state has no {jax.tree_util.keystr(keys)}, which tx.init makes. Write the state and "
                "the transformation that belong together: new.mend(opt_state, tx), with opt_state = tx.init(params)."
            )
        made.append(found if keep and found is not None and found.shape == like.shape else None)
    if fresh is not None:
        first = [leaf for _, leaf in leaves]
    elif any(leaf is None for leaf in made):
        lacking = [place for place, leaf in enumerate(made) if leaf is None]
        first = dict(
            zip(lacking, jax.jit(lambda p: [jax.tree.leaves(tx.init(p))[i] for i in lacking])(params), strict=True)
        )
    else:
        first = {}
    return jax.tree.unflatten(tree, [first[place] if leaf is None else leaf for place, leaf in enumerate(made)])
