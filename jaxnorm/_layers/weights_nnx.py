"""Flax nnx wrappers of any layer: its weights are reparametrized for the time of its call, and stay as they are."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes

from .weights_flax import check_spec, own_names, params_of, scale_of, with_spectral_norm, with_weight_norm

Array = jax.Array
_KERNELS = nnx.PathContains("kernel")
_WEIGHT_NORM: Any = getattr(nnx, "WeightNorm", nnx.Module)
_SPECTRAL_NORM: Any = getattr(nnx, "SpectralNorm", nnx.Module)


def _params(layer: nnx.Module, chosen: Callable[..., bool] = lambda path, param: True) -> dict[tuple, Any]:
    """The layer's own parameters, by path."""
    step = lambda at, key: (
        at[key] if isinstance(at, (Mapping, list, tuple)) or isinstance(key, int) else getattr(at, key)
    )
    paths = [path for path, param in nnx.to_flat_state(nnx.state(layer, nnx.Param)) if chosen(path, param)]
    return {path: functools.reduce(step, path, layer) for path in paths}


@contextlib.contextmanager
def _replaced(effective: list[tuple[Any, Array]]) -> Iterator[None]:
    """Within, these variables have other values."""
    stored = [(variable, variable[...]) for variable, _ in effective]
    try:
        for variable, value in effective:
            variable.set_value(value)
        yield
    finally:
        for variable, value in stored:
            variable.set_value(value)


class WeightNorm(_WEIGHT_NORM):
    """Weight norm of a layer, with the arguments of `flax.nnx.WeightNorm`.

    `scales` are `nnx.Param`s, and start at the norm of the weights, so that wrapping changes nothing. Flax's start at
    1: write scale_init=nnx.initializers.ones. The stored weights are not overwritten.

    Args:
      layer_instance: the layer.
      feature_axes: the output axes; None is one norm for all of a weight.
      use_scale: whether there are scales.
      scale_init: None starts at the norm.
      epsilon: in the norm, inside of the root.
      dtype: of the effective weight; None promotes.
      param_dtype: of the scales.
      variable_filter: which parameters, as a filter of nnx.
      promote_dtype: accepted as Flax has it.
      rngs: for `scale_init`.

    >>> import numpy as np
    >>> from jaxnorm import nnx
    >>> layer = nnx.WeightNorm(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    >>> x = np.ones((1, 3), "f")
    >>> bool(abs(layer(x) - layer.layer_instance(x)).max() < 1e-6), layer.scales[("kernel",)].shape
    (True, (2,))
    """

    def __init__(
        self, layer_instance: nnx.Module, *, feature_axes: Any = -1, use_scale: bool = True,
        scale_init: Callable[..., Any] | None = None, epsilon: float = 1e-12, dtype: Any = None,
        param_dtype: Any = jnp.float32, variable_filter: Any = _KERNELS, promote_dtype: Any = dtypes.promote_dtype,
        rngs: nnx.Rngs | None = None,
    ):  # fmt: skip
        self.layer_instance = layer_instance
        self.feature_axes = feature_axes
        self.use_scale, self.scale_init, self.epsilon = use_scale, scale_init, epsilon
        self.dtype, self.param_dtype, self.promote_dtype = dtype, param_dtype, promote_dtype
        self.variable_filter = nnx.filterlib.to_predicate(variable_filter)
        self.scales: Any = nnx.data(None)
        if use_scale:
            key = lambda: rngs["params"]()  # type: ignore[index]
            start = lambda value: nnx.Param(scale_of(value, feature_axes, scale_init, key, param_dtype))
            self.scales = nnx.data({path: start(param[...]) for path, param in self._chosen().items()})

    def _chosen(self) -> dict[tuple, Any]:
        return _params(self.layer_instance, self.variable_filter)

    def _effective(self, path: tuple, param: Any) -> Array:
        value, scale = param[...], None
        if self.use_scale:
            if path not in self.scales:
                raise RuntimeError(f"WeightNorm: the layer has a parameter {path} that it had not when it was wrapped.")
            scale = self.scales[path][...]
        return with_weight_norm(value, scale, self.feature_axes, self.epsilon, self.dtype)

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the layer with its effective weights."""
        with _replaced([(param, self._effective(path, param)) for path, param in self._chosen().items()]):
            return self.layer_instance(x, *args, **kwargs)


class SpectralNorm(_SPECTRAL_NORM):
    """Spectral norm of a layer, with the arguments and variables of `flax.nnx.SpectralNorm`.

    The stored weights are not overwritten.

    Args:
      layer_instance: the layer.
      n_steps: power iterations at each call.
      epsilon: in the length of the vectors, inside of the root.
      dtype: of the effective weight; None promotes.
      param_dtype: of `u` and `sigma`.
      error_on_non_matrix: refuse a weight of rank above 2, which else is a matrix of its leading axes by its last.
      update_stats: whether a call stores `u` and `sigma`. `train()` and `eval()` set it.
      bound: c divides by max(1, sigma / c): the norm is at most c. None divides by sigma.
      rngs: for the first `u`.

    >>> import numpy as np
    >>> from jaxnorm import nnx
    >>> layer = nnx.SpectralNorm(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), n_steps=20, rngs=nnx.Rngs(0))
    >>> y = layer(np.ones((1, 3), "f"))
    >>> sigma = layer.batch_stats[("kernel", "sigma")][...]
    >>> bool(abs(sigma - np.linalg.norm(layer.layer_instance.kernel[...], 2)) < 1e-5)
    True
    """

    def __init__(
        self, layer_instance: nnx.Module, *, n_steps: int = 1, epsilon: float = 1e-12, dtype: Any = None,
        param_dtype: Any = jnp.float32, error_on_non_matrix: bool = False, update_stats: bool = True,
        bound: float | None = None, rngs: nnx.Rngs,
    ):  # fmt: skip
        self.layer_instance, self.n_steps, self.epsilon, self.bound = layer_instance, n_steps, epsilon, bound
        self.dtype, self.param_dtype, self.error_on_non_matrix = dtype, param_dtype, error_on_non_matrix
        self.use_running_average = not update_stats  # the name that train() and eval() set
        stats: dict[tuple, nnx.BatchStat] = {}
        for path, param in self._chosen().items():
            key = rngs.params()
            first = nnx.initializers.normal()(key, (1, param.shape[-1]), param_dtype)
            stats[(*path, "u")] = nnx.BatchStat(first)
            stats[(*path, "sigma")] = nnx.BatchStat(jnp.ones((), param_dtype))
        self.batch_stats = nnx.data(stats)

    def _chosen(self) -> dict[tuple, Any]:
        found = {path: p for path, p in _params(self.layer_instance).items() if p.ndim > 1 and self.n_steps >= 1}
        for param in found.values():
            if param.ndim > 2 and self.error_on_non_matrix:
                raise ValueError(f"Layer instance parameter is {param.ndim}D but error_on_non_matrix is True")
        return found

    def __call__(self, x: Any, *args: Any, update_stats: bool | None = None, **kwargs: Any) -> Any:
        """Call the layer with its effective weights.

        Args:
          x: the layer's input.
          *args: of the layer.
          update_stats: whether to store `u` and `sigma`; None is the module's own.
          **kwargs: of the layer.
        """
        update = not self.use_running_average if update_stats is None else update_stats
        effective = [(param, self._effective(path, param, update)) for path, param in self._chosen().items()]
        with _replaced(effective):
            return self.layer_instance(x, *args, **kwargs)

    def _effective(self, path: tuple, param: Any, update: bool) -> Array:
        if (*path, "u") not in self.batch_stats:
            raise RuntimeError(f"SpectralNorm: the layer has a parameter {path} that it had not when it was wrapped.")
        value, u, sigma = param[...], self.batch_stats[(*path, "u")], self.batch_stats[(*path, "sigma")]
        effective, *new = with_spectral_norm(value, u[...], self.n_steps, self.epsilon, self.bound, self.dtype)
        if update:
            u[...], sigma[...] = new
        return effective


class Reparametrized(nnx.Module):
    """Any layer with any spec of `jaxnorm.weights` on its weights.

    The weight stays a parameter of the layer, under its own name. What the spec adds is in `added`, as `nnx.Param`s,
    and its state in `stats`, as `nnx.BatchStat`s.

    Args:
      layer_instance: the layer.
      spec: such as `jaxnorm.weights.ScaledStandardize()`.
      variable_filter: which parameters, as a filter of nnx.
      update_stats: whether a call is training: the state is updated. `train()` and `eval()` set it.
      rngs: for what starts at random.

    >>> import numpy as np
    >>> from jaxnorm import nnx, weights
    >>> linear = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    >>> layer = nnx.Reparametrized(linear, weights.ScaledStandardize(), rngs=nnx.Rngs(0))
    >>> bool(abs(layer(np.ones((1, 3), "f"))).max() < 1e-6), list(layer.added)
    (True, [('kernel', 'gain')])
    """

    def __init__(
        self, layer_instance: nnx.Module, spec: Any, *, variable_filter: Any = _KERNELS, update_stats: bool = True,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        check_spec(spec)
        self.layer_instance, self.spec = layer_instance, spec
        self.variable_filter = nnx.filterlib.to_predicate(variable_filter)
        self.use_running_average = not update_stats
        added, stats = {}, {}
        self._state: Any = tuple
        for path, param in _params(layer_instance, self.variable_filter).items():
            params, state = spec.init(param[...], rngs.params())
            for name in own_names(spec):
                added[(*path, name)] = nnx.Param(getattr(params, name))
            if state != ():
                self._state = type(state)
                for name, value in state._asdict().items():
                    stats[(*path, name)] = nnx.BatchStat(value)
        self.added, self.stats = nnx.data(added), nnx.data(stats)

    def __call__(self, *args: Any, update_stats: bool | None = None, **kwargs: Any) -> Any:
        """Call the layer with its effective weights.

        Args:
          *args: of the layer.
          update_stats: whether this is training; None is the module's own.
          **kwargs: of the layer.
        """
        train = not self.use_running_average if update_stats is None else update_stats
        chosen = _params(self.layer_instance, self.variable_filter)
        effective = [(param, self._effective(path, param[...], train)) for path, param in chosen.items()]
        with _replaced(effective):
            return self.layer_instance(*args, **kwargs)

    def _effective(self, path: tuple, value: Array, train: bool) -> Array:
        spec = self.spec
        params = params_of(spec, value, {n: self.added[(*path, n)][...] for n in own_names(spec)})
        kept = getattr(self._state, "_fields", ())
        state = self._state(*(self.stats[(*path, n)][...] for n in kept)) if kept else ()
        w, new = spec.apply(params, state, train=train)
        if train:
            for n in kept:
                self.stats[(*path, n)][...] = getattr(new, n)
        return w
