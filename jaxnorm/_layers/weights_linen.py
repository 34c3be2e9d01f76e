"""Flax linen wrappers of any layer: its weights are reparametrized before its call, and stay as they are stored."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import field
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from .._core.paths import path_of
from .weights_flax import check_spec, own_names, params_of, scale_of, with_spectral_norm, with_weight_norm

Array = jax.Array


def _path(layer: nn.Module, keys) -> str:
    return f"{layer.name}/{path_of(keys[1:])}"  # the first key is the collection


def _chosen(path: str, variable_filter: Iterable | None) -> bool:
    return not variable_filter or any(part in path for part in variable_filter)


class WeightNorm(nn.WeightNorm):
    """Weight norm of a layer, with the arguments, names and variables of `flax.linen.WeightNorm`.

    `scale` starts at the norm of the weight, so that wrapping changes nothing. Flax's starts at 1: write
    scale_init=nn.initializers.ones.

    Args:
      layer_instance: the layer.
      epsilon: in the norm, inside of the root.
      dtype: of the effective weight; None promotes.
      param_dtype: of `scale`.
      use_scale: whether there is one.
      scale_init: None starts at the norm.
      feature_axes: the output axes; None is one norm for all of a weight.
      variable_filter: weights whose path has one of these parts. None is all.

    >>> import jax, numpy as np
    >>> from jaxnorm import linen as nn
    >>> x = np.ones((1, 3), "f")
    >>> y, variables = nn.WeightNorm(nn.Dense(2)).init_with_output(jax.random.key(0), x)
    >>> sorted(variables["params"])
    ['layer_instance', 'layer_instance/kernel/scale']
    >>> bool(abs(y - x @ variables["params"]["layer_instance"]["kernel"]).max() < 1e-6)
    True
    """

    scale_init: Any = None

    def _l2_normalize(self, path, vs):
        value, name = jnp.asarray(vs), _path(self.layer_instance, path)
        if not _chosen(name, self.variable_filter):
            return value
        scale = None
        if self.use_scale:
            start = lambda key: scale_of(value, self.feature_axes, self.scale_init, lambda: key, self.param_dtype)
            scale = self.param(f"{name}/scale", start)
        return with_weight_norm(value, scale, self.feature_axes, self.epsilon, self.dtype)


class SpectralNorm(nn.SpectralNorm):
    """Spectral norm of a layer, with the arguments, names and variables of `flax.linen.SpectralNorm`.

    Args:
      layer_instance: the layer.
      n_steps: power iterations at each call.
      epsilon: in the length of the vectors, inside of the root.
      dtype: of the effective weight; None promotes.
      param_dtype: of `u` and `sigma`.
      error_on_non_matrix: refuse a weight of rank above 2, which else is a matrix of its leading axes by its last.
      collection_name: where `u` and `sigma` are.
      bound: c divides by max(1, sigma / c): the norm is at most c. None divides by sigma.

    >>> import jax, numpy as np
    >>> from jaxnorm import linen as nn
    >>> norm, x = nn.SpectralNorm(nn.Dense(2)), np.ones((1, 3), "f")
    >>> variables = norm.init(jax.random.key(0), x, update_stats=False)
    >>> y, new = norm.apply(variables, x, update_stats=True, mutable=["batch_stats"])
    >>> {name: value.shape for name, value in new["batch_stats"].items()}
    {'layer_instance/kernel/u': (1, 2), 'layer_instance/kernel/sigma': ()}
    """

    bound: float | None = None

    def _spectral_normalize(self, path, vs, update_stats):
        value, name = jnp.asarray(vs), _path(self.layer_instance, path)
        if value.ndim <= 1 or self.n_steps < 1:
            return value
        if value.ndim > 2 and self.error_on_non_matrix:
            raise ValueError(f"Input is {value.ndim}D but error_on_non_matrix is True")
        kind, full = self.collection_name, f"{name}/u"
        key = None if self.has_variable(kind, full) else self.make_rng("params")
        u = self.variable(kind, full, jax.random.normal, key, (1, value.shape[-1]), self.param_dtype)
        sigma = self.variable(kind, f"{name}/sigma", jnp.ones, (), self.param_dtype)
        effective, *new = with_spectral_norm(value, u.value, self.n_steps, self.epsilon, self.bound, self.dtype)
        if update_stats:
            u.value, sigma.value = (a.astype(self.param_dtype) for a in new)
        return effective


class Reparametrized(nn.Module):
    """Any layer with any spec of `jaxnorm.weights` on its weights.

    The weight stays a parameter of the layer, under its own name. What the spec adds is in this module: parameters as
    "Dense_0/kernel/g", and the state in the collection `batch_stats`.

    Args:
      layer_instance: the layer.
      spec: such as `jaxnorm.weights.ScaledStandardize()`.
      variable_filter: weights whose path has one of these parts. None is all.
      collection_name: where the state is.

    >>> import jax, numpy as np
    >>> from jaxnorm import linen as nn, weights
    >>> layer = nn.Reparametrized(nn.Dense(2), weights.ScaledStandardize())
    >>> y, variables = layer.init_with_output(jax.random.key(0), np.ones((1, 3), "f"))
    >>> bool(abs(y).max() < 1e-6), sorted(variables["params"])
    (True, ['layer_instance', 'layer_instance/kernel/gain'])
    """

    layer_instance: nn.Module
    spec: Any
    variable_filter: Any = field(default_factory=lambda: {"kernel"})
    collection_name: str = "batch_stats"

    @nn.compact
    def __call__(self, *args, update_stats: bool = False, **kwargs):
        """Call the layer with its effective weights.

        Args:
          *args: of the layer.
          update_stats: whether this is training: the state is updated.
          **kwargs: of the layer.
        """
        check_spec(self.spec)
        effective = lambda path, vs: self._effective(path, vs, update_stats)
        return nn.map_variables(
            lambda layer: layer(*args, **kwargs),
            trans_in_fn=lambda variables: jax.tree_util.tree_map_with_path(effective, variables),
            init=self.is_initializing(),
            mutable=True,
        )(self.layer_instance)

    def _effective(self, path, vs, train: bool):
        value, name = jnp.asarray(vs), _path(self.layer_instance, path)
        if not _chosen(name, self.variable_filter):
            return value
        key = self.make_rng("params") if self.is_initializing() else None
        first, state = jax.eval_shape(self.spec.init, value, key)
        kept = state._fields if hasattr(state, "_fields") else ()
        made = self.spec.init(value, key) if self.is_initializing() else (first, state)
        params = {n: self.param(f"{name}/{n}", lambda _, n=n: getattr(made[0], n)) for n in own_names(self.spec)}
        stored = {n: self.variable(self.collection_name, f"{name}/{n}", lambda n=n: getattr(made[1], n)) for n in kept}
        old = type(state)(**{n: v.value for n, v in stored.items()}) if kept else ()
        effective, new = self.spec.apply(params_of(self.spec, value, params), old, train=train)
        if train and not self.is_initializing():
            for n, variable in stored.items():
                variable.value = getattr(new, n)
        return effective
