"""Norms of a model replaced by others, by path, kind or predicate; frozen, and thawed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .._core.messages import shown
from .outcome import Outcome, Row
from .rules import Rules, difference
from .trees import kind_of


@dataclasses.dataclass(frozen=True)
class Swap:
    """A model in which norms were replaced: what `swap`, `freeze` and `unfreeze` return.

    Args:
      model: the new model, of the kind that was given.
      variables: its variables; of specs (params, state); None for nnx, whose model has them.
      outcome: what was replaced, what was kept of it, and what was left alone; it prints as a table.
      kept: the paths of the parameters that the model had before, and that mean the same.
    """

    model: Any
    variables: Any
    outcome: Outcome
    kept: frozenset[str] = dataclasses.field(repr=False)

    def mend(self, opt_state: Any, tx: Any = None) -> Any:
        """The state of an optimizer of the old model, for the new one.

        What belongs to parameters that were kept is kept, as are all counts; what belongs to new parameters starts as
        `tx.init` makes it. States within `optax.chain`, `masked`, `multi_transform` and others are found, because the
        structure is that of `tx.init` of the new parameters.

        Args:
          opt_state: of `tx`, for the old parameters: `variables["params"]` in linen, `nnx.state(model, nnx.Param)`, or
            the params of specs. Or an `nnx.Optimizer`, where tx is needed only if its own does not fit.
          tx: the optax transformation. Masks and labels in it must be functions of the parameters, or fit the new ones.

        Returns:
          The new state, or a new `nnx.Optimizer`. The old one is left as it was.

        Raises:
          ValueError: tx does not fit the new parameters, or the state is of another optimizer.

        >>> import jaxnorm as jn, numpy as np, optax
        >>> from jaxnorm import models
        >>> params, state = jn.LayerNorm().init(2)
        >>> tx = optax.adam(0.1)
        >>> new = models.swap(jn.LayerNorm(), {"**": jn.DynamicTanh}, (params, state))
        >>> new.mend(tx.init(params), tx)[0].mu.alpha.tolist()
        0.0
        """
        from .mend import mended

        return mended(self, opt_state, tx)


def swap(
    model: Any, rules: Mapping[Any, Any], variables: Any = None, *args: Any, in_place: bool = False, **kwargs: Any
) -> Swap:
    """Replace norms of a model by others, and keep what can be kept of their parameters and statistics.

    The first rule that fits a norm decides. Its key is one of

    - a pattern of paths: "encoder/**", where `*` is any part of one key and `**` any number of keys;
    - a kind: a class of specs, `jaxnorm.BatchNorm`, or of layers, `flax.linen.BatchNorm`;
    - a predicate, a function of the path and the spec that returns a bool.

    Its value is one of

    - a spec, `jaxnorm.GroupNorm(num_groups=8)`;
    - a class of specs, `jaxnorm.RMSNorm`: with the options of the old norm that both have, such as epsilon and axis;
    - a function of the old spec that returns the new one: `lambda old: dataclasses.replace(old, axis_name="data")`;
    - None: such a norm is left as it is.

    Flax's own norms count as the specs of the same name, with their options, and are replaced by jaxnorm's also where
    the spec is the same: `{flax.linen.LayerNorm: jaxnorm.LayerNorm}`. Parameters are kept that have the same
    name, shape and meaning: `scale` and `bias`, and all of a norm of the same kind. A scale is shifted where its
    `scale_offset` changes. Running statistics are kept between all norms with a mean and a variance; a domain batch
    norm has them for each domain. A count is kept where it counts the same. All other parameters start anew.

    - linen: the new model is of a subclass of the model's class, with its fields, methods, paths and transforms. It
      replaces layers when they are called. `variables` are converted by one abstract trace of `model.init(*args,
      **kwargs)`, so give the arguments of `init` after the key.
    - nnx: a copy of the model has new layers; or the model itself, with in_place=True.
    - specs: a tree of specs, such as a dict, and `variables=(params, state)`, trees with its paths.

    A norm in the place of another one is called as that one is: a group norm ignores `use_running_average`. What it
    needs beyond, such as a domain, comes from `models.passing`. Linen models with equal rules are equal, so that they
    share their programs: name a function once, since a fresh lambda triggers retracing.

    Args:
      model: a linen module, an nnx module, or a tree of specs.
      rules: a mapping from keys to values.
      variables: of a linen model, or (params, state) of specs. None for nnx.
      *args: of a linen model's call, arrays or shapes.
      in_place: whether to change an nnx model itself.
      **kwargs: of a linen model's call.

    Returns:
      A `Swap`: `model`, `variables`, `outcome`, and `mend` for the optimizer's state. The arguments stay as they were,
      but for in_place=True.

    Raises:
      ValueError: a key fits no norm; the variables are not those of the model.
      TypeError: a bad key or value; a model or variables of another kind.

    >>> import jax, jaxnorm as jn, numpy as np
    >>> from jaxnorm import linen as nn, models
    >>> model, x = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=True)]), np.ones((2, 3), "f")
    >>> variables = model.init(jax.random.key(0), x)
    >>> new = models.swap(model, {jn.BatchNorm: jn.GroupNorm(num_groups=2)}, variables, x)
    >>> print(new.outcome)
    swap: 1 changed, 0 left alone
      path      what                   why
    + layers_1  BatchNorm -> GroupNorm kept scale, bias; dropped mean, var
    >>> new.model.apply(new.variables, x).shape, sorted(new.variables)
    ((2, 4), ['params'])
    """
    return _swap("swap", model, Rules.of("swap", rules), variables, args, in_place, kwargs)


def freeze(model: Any, where: Any, variables: Any = None, *args: Any, in_place: bool = False, **kwargs: Any) -> Swap:
    """Freeze the statistics of norms: they normalize by their running statistics, and never update them.

    A frozen norm stays so in training: `model.train()`, `use_running_average=False` and mutable collections do not thaw
    it. Its scale and bias are trained as before; `models.label_params` and `optax.set_to_zero` stop that too.

    Args:
      model: a linen module, an nnx module, or a tree of specs.
      where: a pattern of paths, a kind or a predicate, as the keys of `swap`; or several, in a list.
      variables: as for `swap`.
      *args: as for `swap`.
      in_place: as for `swap`.
      **kwargs: as for `swap`.

    Returns:
      A `Swap`. Norms without running statistics are left alone, and its outcome says so.

    >>> from flax import nnx
    >>> from jaxnorm import models
    >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    >>> frozen = models.freeze(model, "**").model
    >>> frozen.train()
    >>> frozen.layers[1].spec.frozen
    True
    """
    return _swap("freeze", model, _freezing("freeze", where, True), variables, args, in_place, kwargs)


def unfreeze(model: Any, where: Any, variables: Any = None, *args: Any, in_place: bool = False, **kwargs: Any) -> Swap:
    """Undo `freeze`: the norms have batch statistics in training again, and update their running ones.

    Args:
      model: a linen module, an nnx module, or a tree of specs.
      where: as for `freeze`.
      variables: as for `swap`.
      *args: as for `swap`.
      in_place: as for `swap`.
      **kwargs: as for `swap`.

    Returns:
      A `Swap`.

    >>> import jaxnorm as jn
    >>> from jaxnorm import models
    >>> specs = {"norm": jn.BatchNorm(frozen=True)}
    >>> models.unfreeze(specs, "norm").model["norm"].frozen
    False
    """
    return _swap("unfreeze", model, _freezing("unfreeze", where, False), variables, args, in_place, kwargs)


@dataclasses.dataclass(frozen=True)
class _Frozen:
    """The old spec, frozen or not. It is compared by value, so that equal rules are equal."""

    frozen: bool

    def __call__(self, old: Any) -> Any:
        new = _frozen(old, self.frozen)
        return None if new == old else new


def _frozen(spec: Any, frozen: bool) -> Any:
    """The spec, or the one that it modulates, with `frozen`; None where there are no running statistics."""
    if hasattr(spec, "frozen"):
        return dataclasses.replace(spec, frozen=frozen)
    inner = _frozen(spec.inner, frozen) if getattr(spec, "inner", None) is not None else None
    return None if inner is None else dataclasses.replace(spec, inner=inner)


def _freezing(tool: str, where: Any, frozen: bool) -> Rules:
    keys = where if isinstance(where, (list, tuple)) else [where]
    if not keys or not all(isinstance(key, str) or callable(key) for key in keys):
        raise TypeError(f'{tool}: where must be a pattern, a kind or a predicate, got {shown(where)}. Write "**".')
    return Rules.of(tool, dict.fromkeys(keys, _Frozen(frozen)))


def _swap(tool: str, model: Any, rules: Rules, variables: Any, args: tuple, in_place: bool, kwargs: dict) -> Swap:
    kind = kind_of(tool, model)
    if in_place and kind != "nnx":
        raise TypeError(f"{tool}: in_place is for nnx modules; other models are values. Leave in_place out.")
    if (args or kwargs) and kind != "linen":
        raise TypeError(
            f"{tool}: only linen models take arguments of their call, got {shown([*args, *kwargs])}. Leave them out."
        )
    if kind == "linen":
        from .swap_linen import swap_linen

        return swap_linen(tool, model, rules, variables, args, kwargs)
    if kind == "nnx":
        from .swap_nnx import swap_nnx

        if variables is not None:
            raise TypeError(f"{tool}: an nnx model has its variables, got {shown(variables)}. Leave them out.")
        return swap_nnx(tool, model, rules, in_place)
    from .swap_specs import swap_specs

    return swap_specs(tool, model, rules, variables)


def Swapped(model: Any, rules: Mapping[Any, Any]) -> Any:
    """A linen model in which norms are replaced, to be initialized: `Swapped(model, rules).init(key, x)`.

    It is an instance of the model's class, with its fields, methods, paths and transforms. Rules as for `swap`, which
    converts variables that there are; here a key may fit nothing.

    Args:
      model: a linen module, as it was made.
      rules: as for `swap`.

    >>> import jax, jaxnorm as jn, numpy as np
    >>> from jaxnorm import linen as nn, models
    >>> model = models.Swapped(nn.Sequential([nn.Dense(4), nn.LayerNorm()]), {"**": jn.DynamicTanh})
    >>> sorted(model.init(jax.random.key(0), np.ones((2, 3), "f"))["params"]["layers_1"])
    ['alpha', 'bias', 'scale']
    """
    if kind_of("Swapped", model) != "linen":
        raise TypeError(
            f"Swapped: the model must be a linen module, got {shown(model)}. Write models.swap(model, rules)."
        )
    from .._layers.swapped import swapped

    return swapped(model, Rules.of("Swapped", rules))


def row_of(rules: Rules, path: str, old: Any, new: Any, why: str | None, layer: Any = None) -> Row:
    """The row of one norm. `why` is None where it was left alone."""
    if why is None:
        if rules.tool in ("freeze", "unfreeze") and _frozen(old, True) is None:
            return Row(path, type(old).__name__, "it has no running statistics", done=False)
        return Row(path, type(old).__name__, rules.reason(path, old, layer), done=False)
    return Row(path, difference(old, new), why)
