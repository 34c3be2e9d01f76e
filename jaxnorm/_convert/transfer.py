"""Whole trees: the arrays of one library's model into another's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .._core.messages import shown
from . import equinox, flax, haiku, keras, torch
from .leaf import Store
from .plan import Layouts, Options, Rename, check_options, move
from .report import Report

_OPENERS: tuple[tuple[Callable[[Any], bool], Callable[[Any], Store]], ...] = (
    (torch.is_module, lambda tree: torch.Tree(tree, True)),
    (flax.is_nnx, flax.NNX),
    (keras.is_layer, keras.Tree),
    (equinox.is_tree, lambda tree: equinox.Tree(*tree) if type(tree) is tuple else equinox.Tree(tree)),
    (haiku.is_tree, lambda tree: haiku.Tree(*tree)),
    (torch.is_state_dict, lambda tree: torch.Tree(tree, False)),
    (lambda tree: isinstance(tree, Mapping), flax.Tree),
)


def transfer(
    source: Any, target: Any, *, rename: Rename | None = None, skip: Sequence[str] = (), layouts: Layouts | None = None,
    cast: bool = False,
) -> tuple[Any, Report]:  # fmt: skip
    """Put the parameters and running statistics of one model into another of the same architecture.

    Both are one of: a torch module or state dict (any flat dict of arrays with torch's layouts; those called kernel or
    embedding have Flax's), variables of linen, a module or state of nnx, haiku's `(params, state)`, an equinox module
    or `(module, state)`, a keras model.

    Arrays belong together if module and role are the same: "layer1.0.bn.weight" is "layer1_0/bn/scale". A path of
    torch is written with "/", and the collections of linen are no part of a path.

    Args:
      source: the model to read.
      target: the model to fill. A module of torch, nnx or keras is filled in place, after everything has been checked.
        Of all others a new tree is returned, with the dtypes and shardings of the target. Leaves of variables may be
        `jax.ShapeDtypeStruct`.
      rename: from a pattern of paths in the source to the path in the target, with the same wildcards: `*` is any part
        of one key, `**` any number of keys, as in `jaxnorm.weights.Tree`. A pattern is of an array or of its module.
        The first that matches decides; None leaves it out. For the way back swap the two. The key "layers" of
        `nnx.Sequential` and `eqx.nn.Sequential` is no part of a path, because torch's has none.
      skip: patterns of what is left out of the source, or stays as it is in the target.
      layouts: from a pattern of paths on either side to the kind of a kernel, where the objects do not say it: "dense",
        "conv", "depthwise", "transposed", "transposed_flipped" (Flax's `transpose_kernel=True`), "embedding" or
        "as_it_is".
      cast: whether floats may be rounded to the target's dtype. Without it only to a dtype that holds all values.

    Returns:
      (the target with the arrays, a `Report`).

    Raises:
      ConversionError: something is missing, has no place, or does not fit in shape, dtype, kind or (where both objects
        say it) epsilon, momentum, sense of the variance or number of groups. It lists all paths; nothing was changed.
      TypeError: a tree of no known library; a pattern that is none.

    >>> import numpy as np
    >>> from jaxnorm import convert
    >>> state_dict = {"head.weight": np.ones((10, 4), "f"), "head.bias": np.ones(10, "f")}
    >>> params = {"params": {"head": {"kernel": np.zeros((4, 10), "f"), "bias": np.zeros(10, "f")}}}
    >>> params, report = convert.transfer(state_dict, params)
    >>> print(report)
    from         to                  shape    how
    head.bias    params/head/bias    (10,)    as it is
    head.weight  params/head/kernel  (4, 10)  OI -> IO
    """
    options = Options("transfer", rename or {}, skip, layouts or {}, cast)
    check_options(options)
    stores = open_tree(source), open_tree(target)
    values, report = move(*stores, options)
    return stores[1].write(values), report


def open_tree(tree: Any) -> Store:
    for fits, opened in _OPENERS:
        if fits(tree):
            return opened(tree)
    raise TypeError(
        f"transfer: {shown(tree)} is no model. Write model.state_dict(), variables of linen, an nnx module, haiku's "
        "(params, state), an equinox module, or a built keras model."
    )
