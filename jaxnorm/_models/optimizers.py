"""What optimizers need to know of norms: labels and masks of parameters, and averages of them with their statistics."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from .._core.dtypes import accumulator, widest
from .._core.messages import shown
from .._core.paths import path_of
from .labels import DECAYED, Owner, owners
from .rules import fits

Array = jax.Array


def label_params(model: Any, params: Any = None, *args: Any, **kwargs: Any) -> Any:
    """The kind of each parameter, for `optax.multi_transform`: exact, because the layers say it, not the names.

    | label | parameters | weight decay |
    | --- | --- | --- |
    | "norm" | of a norm: scales, biases, slopes, temperatures, gates | no |
    | "norm_weight" | of a norm whose paper decays them: matrices, and alpha and beta of SeeDNorm | yes |
    | "gain" | the lengths of reparametrized weights: g, gain, gamma, magnitude | no |
    | "undecayed" | weights whose paper does not decay them: those of `SigmaReparam` | no |
    | "fixed" | weights that are not trained: those of `DoRA` | no |
    | "other" | all others: kernels, embeddings, biases, a parameter of your own called scale | yes |

    - linen: `label_params(model, variables, x)` traces `model.init(*args, **kwargs)`, abstractly, and sees which layer
      makes which parameter. Flax's own norms count as well.
    - nnx: `label_params(model)`; the tree is that of `nnx.state(model, nnx.Param)`.
    - specs: `label_params(specs, params)`; or `label_params(params)` alone, where the parameters of norms are in their
      NamedTuples, such as `Affine`.

    Args:
      model: a linen module, an nnx module, a tree of specs, or parameters with NamedTuples.
      params: the variables or parameters of a linen model; the params of specs; None for nnx.
      *args: of a linen model's call, arrays or shapes.
      **kwargs: of a linen model's call.

    Returns:
      A tree of strings, of the structure of the parameters.

    Raises:
      ValueError: parameters in plain dicts without a model; a parameter that the traced call does not reach.

    >>> import jaxnorm as jn, numpy as np
    >>> from jaxnorm import models
    >>> params = {"norm": jn.LayerNorm().init(2)[0], "own": {"scale": np.ones(2)}}
    >>> models.label_params(params)
    {'norm': Affine(scale='norm', bias='norm'), 'own': {'scale': 'other'}}
    """
    return _labelled("label_params", model, params, args, kwargs, lambda owner: owner.label)


def decay_mask(model: Any, params: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Which parameters decay, for `optax.adamw(mask=)`: all but those of norms and gains, as `label_params` says.

    Biases of other layers count as "other", so they decay. Where only matrices are to decay, write
    `jax.tree.map(lambda decays, p: decays and p.ndim > 1, decay_mask(...), params)`.

    Args:
      model: as for `label_params`.
      params: as for `label_params`.
      *args: as for `label_params`.
      **kwargs: as for `label_params`.

    Returns:
      A tree of bools, of the structure of the parameters.

    >>> from flax import nnx
    >>> from jaxnorm import models
    >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.LayerNorm(4, rngs=nnx.Rngs(0)))
    >>> mask = nnx.to_pure_dict(models.decay_mask(model))
    >>> mask["layers"][0]["kernel"], mask["layers"][1]["scale"]
    (True, False)
    """
    return _labelled("decay_mask", model, params, args, kwargs, lambda owner: owner.label in DECAYED)


def norm_mask(model: Any, where: Any, params: Any = None, *args: Any, **kwargs: Any) -> Any:
    """The parameters of some norms: True for those of each norm that a pattern, a kind or a predicate fits.

    With `where=lambda path, spec: getattr(spec, "frozen", False)` they are those of frozen norms: hand the mask to
    `optax.masked(optax.set_to_zero(), mask)`.

    Args:
      model: as for `label_params`; not parameters alone.
      where: a pattern of paths, a kind or a predicate, as the keys of `swap`.
      params: as for `label_params`.
      *args: as for `label_params`.
      **kwargs: as for `label_params`.

    Returns:
      A tree of bools, of the structure of the parameters.

    Raises:
      ValueError: no norm with parameters fits.

    >>> import jaxnorm as jn
    >>> from jaxnorm import models
    >>> specs = {"a": jn.BatchNorm(use_bias=False), "b": jn.LayerNorm(use_bias=False)}
    >>> models.norm_mask(specs, jn.BatchNorm, {name: spec.init(2)[0] for name, spec in specs.items()})
    {'a': Affine(scale=True, bias=None), 'b': Affine(scale=False, bias=None)}
    """
    if not (isinstance(where, str) or callable(where)):
        raise TypeError(f'norm_mask: where must be a pattern, a kind or a predicate, got {shown(where)}. Write "**".')
    of = lambda o: o.path is not None and fits("norm_mask", where, o.path, o.spec, o.layer)
    mask = _labelled("norm_mask", model, params, args, kwargs, of)
    if not any(jax.tree.leaves(mask)):
        raise ValueError(
            f'norm_mask: {shown(where)} fits no norm with parameters. Write "**" to see that there are any.'
        )
    return mask


def _labelled(tool: str, model: Any, params: Any, args: tuple, kwargs: dict[str, Any], of: Any) -> Any:
    tree, found = owners(tool, model, params, args, kwargs)
    other = Owner("other")
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    return jax.tree.unflatten(structure, [of(found.get(path_of(keys), other)) for keys, _ in leaves])


# --- averages ---------------------------------------------------------------------------------------------------------


def ema_init(variables: Any) -> Any:
    """The first average of `ema_update`: a copy of the variables, in which floats are float32 or wider.

    An average in bfloat16 would lose each step that is smaller than its rounding.

    Args:
      variables: parameters and statistics, a tree: linen's variables, `nnx.state(model, (nnx.Param, nnx.BatchStat))`,
        or (params, state).

    >>> import jax.numpy as jnp
    >>> from jaxnorm import models
    >>> models.ema_init({"w": jnp.ones(2, jnp.bfloat16), "step": jnp.int32(3)})["w"].dtype
    dtype('float32')
    """

    def wide(leaf: Any) -> Any:
        leaf = jnp.asarray(leaf)
        return jnp.array(leaf, accumulator(leaf) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf.dtype)

    return jax.tree.map(wide, variables)


def ema_update(average: Any, variables: Any, decay: ArrayLike) -> Any:
    """One step of an exponential moving average of a model: of its parameters and its statistics together.

        average = decay * average + (1 - decay) * variables

    Running means and variances are averages themselves, so theirs is the same with a longer memory. The latest is taken
    of what has no average: counts of updates or elements beside a mean and a variance, the vectors and sigma of
    spectral norm, integers, bools and keys. The averaged parameters have other activations than any of the models had:
    where accuracy counts, recompute the statistics over the training set.

    Args:
      average: of the structure of `variables`; `ema_init` makes the first.
      variables: the model after a step.
      decay: from 0 to 1, such as 0.999; a number or a scalar array, so it may be traced: `jnp.minimum(0.999, (1 + step)
        / (10 + step))`.

    Returns:
      The new average, in the dtypes of the old one. Arithmetic is in float32 or wider.

    Raises:
      ValueError: the trees differ, or a decay outside 0 to 1.

    >>> import jaxnorm as jn
    >>> from jaxnorm import models
    >>> state = lambda mean, count: {"bn": jn.RunningStats(mean, 1.0, count)}
    >>> average = models.ema_update(models.ema_init(state(0.0, 1.0)), state(4.0, 2.0), 0.75)
    >>> float(average["bn"].mean), float(average["bn"].count)
    (1.0, 2.0)
    """
    old, structure = jax.tree_util.tree_flatten_with_path(average)
    new, other = jax.tree_util.tree_flatten_with_path(variables)
    if structure != other:
        differ = {path_of(keys) for keys, _ in old} ^ {path_of(keys) for keys, _ in new}
        raise ValueError(
            f"ema_update: the average and the variables differ in structure, at {sorted(differ)[:4] or 'their types'}. "
            "Write average = models.ema_init(variables), and the same collections at each step."
        )
    if not isinstance(decay, Tracer) and (jnp.ndim(decay) or not 0.0 <= np.asarray(decay) <= 1.0):
        raise ValueError(f"ema_update: decay must be one number from 0 to 1, got {shown(decay)}. Write decay=0.999.")
    names = [_name(keys) for keys, _ in new]
    beside: dict[Any, set[str]] = {}
    for parent, name in names:
        beside.setdefault(parent, set()).add(name)
    made = []
    for (_, a), (_, b), (parent, name) in zip(old, new, names, strict=True):
        b = jnp.asarray(b)
        if not jnp.issubdtype(b.dtype, jnp.inexact) or _is_latest(name, beside[parent]):
            made.append(b.astype(jnp.asarray(a).dtype) if jnp.issubdtype(b.dtype, jnp.inexact) else b)
            continue
        a = jnp.asarray(a)
        wide = widest(a.dtype, b.dtype, jnp.float32)
        d = jnp.asarray(decay, jnp.finfo(wide).dtype)
        made.append((d * a.astype(wide) + (1 - d) * b.astype(wide)).astype(a.dtype))
    return jax.tree.unflatten(structure, made)


def _name(keys: tuple[Any, ...]) -> tuple[str, str]:
    """What a leaf belongs to, and its own name. Wrappers of weights keep several in one dict: "Dense_0/kernel/u"."""
    if keys and isinstance(keys[-1], jax.tree_util.GetAttrKey) and keys[-1].name == "value":
        keys = keys[:-1]  # of an nnx variable
    if keys and isinstance(inside := getattr(keys[-1], "key", None), tuple):
        return path_of((*keys[:-1], *map(jax.tree_util.DictKey, inside[:-1]))), str(inside[-1])
    parent, _, name = path_of(keys).rpartition("/")
    return parent, name


def _is_latest(name: str, beside: set[str]) -> bool:
    """Whether a float is no quantity that has an average, by what is beside it."""
    if name == "count":
        return {"mean", "var"} <= beside
    return name in ("u", "v", "sigma") and beside <= {"u", "v", "sigma"} and "u" in beside
