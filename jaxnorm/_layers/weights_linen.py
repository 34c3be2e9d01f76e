"""Flax linen wrappers of any layer: its weights are reparametrized before its call, and stay as they are stored."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import field
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import dtypes

from .._core.messages import shown
from .._core.paths import path_of
from .._weights.base import Reparametrization, divided, length, split_axes
from .._weights.operator import Matrix
from .._weights.spectral_norm import SpectralNormState, bounded, iterate
from .._weights.weight_norm import weight_norm

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
        axes = self.feature_axes
        kept, reduced = split_axes("WeightNorm", value, axes)
        shape = tuple(value.shape[a] for a in kept)
        scale = None
        if self.use_scale:
            start = lambda key, shape, dtype: length(value, reduced).reshape(shape).astype(dtype)
            scale = self.param(f"{name}/scale", self.scale_init or start, shape, self.param_dtype)
        dtype = dtypes.canonicalize_dtype(*[a for a in (value, scale) if a is not None], dtype=self.dtype)
        return weight_norm(value, scale, axis=kept, epsilon=self.epsilon, dtype=dtype)


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
        of = Matrix.of("SpectralNorm", value, -1, None, None)
        kind, full = self.collection_name, f"{name}/u"
        key = None if self.has_variable(kind, full) else self.make_rng("params")
        u = self.variable(kind, full, jax.random.normal, key, (1, value.shape[-1]), self.param_dtype)
        sigma = self.variable(kind, f"{name}/sigma", jnp.ones, (), self.param_dtype)
        old = SpectralNormState(u.value[0], jnp.zeros(value.shape[:-1], u.value.dtype))
        new, found = iterate(of, value, old, self.n_steps, "v", self.epsilon, "inside")
        dtype = dtypes.canonicalize_dtype(value, u.value, dtype=self.dtype)
        if update_stats:
            u.value = new.u[None].astype(self.param_dtype)
            sigma.value = jax.lax.stop_gradient(found).astype(self.param_dtype)
        return divided(value, bounded(found, self.bound), dtype)


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
        if not isinstance(self.spec, Reparametrization):
            raise TypeError(
                f"Reparametrized: spec must be of jaxnorm.weights, got {shown(self.spec)}. Write weights.Standardize()."
            )
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
        own = first._fields[1:] if self.spec.Params else ()
        kept = state._fields if hasattr(state, "_fields") else ()
        made = self.spec.init(value, key) if self.is_initializing() else (first, state)
        params = {n: self.param(f"{name}/{n}", lambda _, n=n: getattr(made[0], n)) for n in own}
        stored = {n: self.variable(self.collection_name, f"{name}/{n}", lambda n=n: getattr(made[1], n)) for n in kept}
        params = self.spec.Params(value, **params) if self.spec.Params else value
        old = type(state)(**{n: v.value for n, v in stored.items()}) if kept else ()
        effective, new = self.spec.apply(params, old, train=train)
        if train and not self.is_initializing():
            for n, variable in stored.items():
                variable.value = getattr(new, n)
        return effective
