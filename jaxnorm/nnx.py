"""Flax nnx layers: those of `flax.nnx`, by jaxnorm. Changing the import is enough, and checkpoints load either way.

Every layer takes the arguments of Flax's layer of the same name, in the same order, and has its variables: `nnx.Param`s
`scale` and `bias` (with `scale_metadata` and `bias_metadata`), and for batch norm `nnx.BatchStat`s `mean` and `var`, so
`nnx.update` works between the two. `num_features` may be a tuple where the feature axes are several.
`use_fast_variance` is accepted; statistics are accurate whatever it says. `promote_dtype` is asked for dtypes only: the
output's is what Flax's would be, while the statistics are always those of x as it came, in float32 or wider.

What jaxnorm adds, keyword only, is said once for all layers here and for each in its own docstring.

  scale_offset: added to scale in float32; 1.0 makes a zero-centred gamma. Without a `scale_init` of your own the
    effective scale starts at 1.
  activation: of the output, before it is rounded: "relu", "silu", "gelu", ..., or an elementwise function; the backward
    pass keeps x alone. See `jaxnorm.layer_norm`.
  implementation: a backend listed by `jaxnorm.backends()`. None picks the fastest one that supports the call.
  scale, bias (at the call): in place of the learned ones, per sample too, as (N, 1, 1, C). Such a layer has
    `use_scale=False`, `use_bias=False`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers

from ._core.install import missing_flax

try:
    from flax import nnx
    from flax.nnx.nn import dtypes
except ImportError as error:
    raise missing_flax("jaxnorm.nnx", error) from error

from ._core.arrays import as_array
from ._core.channels import canonicalize_group_count
from ._core.checks import refuse_array
from ._core.explain import explained
from ._core.messages import shown, to_python
from ._core.types import RunningStats
from ._layers import flax_rules
from ._layers.flax_rules import Axes, Initializer, Layout
from ._ops.activation import Activation

Array = jax.Array
Dtype = Any
Features = int | tuple[int, ...]
Metadata = Mapping[str, Any]
Promote = Callable[..., Any]

__all__ = ["BatchNorm", "GatedRMSNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm"]

_NONE: Metadata = MappingProxyType({})
_NOT_KEPT = ("self", "__class__", "rngs", "scale_init", "bias_init", "scale_metadata", "bias_metadata")


class _Norm(nnx.Module):
    """What all layers have."""

    num_features: Features
    dtype: Dtype | None
    axis_name: str | None
    promote_dtype: Promote
    scale: nnx.Param | None
    bias: nnx.Param | None

    def _build(self, given: dict[str, Any]) -> tuple[int, ...]:
        """Hyperparameters and parameters, from the constructor's `locals()`. Keys are drawn in Flax's order."""
        for name, value in given.items():
            if isinstance(value, (np.ndarray, jax.Array)):
                parameter = inspect.signature(type(self).__init__).parameters.get(name)
                refuse_array(type(self).__name__, name, value, parameter and parameter.default)
            if name not in _NOT_KEPT:
                setattr(self, name, to_python(value))
        features = self.num_features
        shape = features if isinstance(features, tuple) else (features,)
        if not all(isinstance(n, int) and n >= 0 for n in shape):
            name = type(self).__name__
            raise ValueError(
                f"{name}: num_features must be an int >= 0, or several; got {shown(given['num_features'])}. "
                f"Write {name}(64, rngs=nnx.Rngs(0))."
            )
        makers = dict(
            scale=given["scale_init"] or flax_rules.unit_scale(given["scale_offset"]), bias=given["bias_init"]
        )
        for name, make in makers.items():
            param = nnx.data(None)
            if given[f"use_{name}"]:
                value = make(given["rngs"].params(), shape, given["param_dtype"])
                param = nnx.Param(value, **given[f"{name}_metadata"])
            setattr(self, name, param)
        return shape

    def _parameters(self, shape: tuple[int, ...], features: tuple[int, ...], scale, bias) -> tuple[Any, Any]:
        """The parameters, or those given in their place; with x's rank."""
        flax_rules.check_not_both(self, scale=(self.scale is not None, scale), bias=(self.bias is not None, bias))
        scale = scale if self.scale is None else self.scale[...]
        bias = bias if self.bias is None else self.bias[...]
        return (
            flax_rules.broadcast_param(self, "scale", scale, shape, features, self.scale is not None),
            flax_rules.broadcast_param(self, "bias", bias, shape, features, self.bias is not None),
        )

    def _output_dtype(self, args: tuple):
        """What Flax would return for (x, ..., scale, bias), of which `promote_dtype` sees the shapes and dtypes."""
        if self.promote_dtype is dtypes.promote_dtype:
            return flax_rules.output_dtype(self, *args)

        def output(*args):
            with jax.numpy_dtype_promotion("standard"):
                x, *others = self.promote_dtype(args, dtype=self.dtype)
            return jnp.zeros((), flax_rules.output_dtype(self, x, *others[2 * isinstance(self, BatchNorm) :]))

        return jax.eval_shape(output, *args).dtype


class _RowNorm(_Norm):
    """A norm without state."""

    def _layout(self, shape: tuple[int, ...]) -> Layout:
        raise NotImplementedError

    @explained("call")
    def __call__(self, x, mask=None, *, scale=None, bias=None) -> Array:
        """The normalized x.

        Args:
          x: the input.
          mask: True where an element counts. Broadcasts to x, or covers its leading axes.
          scale: in place of a learned scale: of the feature shape, or of one that broadcasts against x.
          bias: the same.

        Raises:
          ValueError: scale or bias is given to a layer that has its own.
          TypeError: x has not as many features as the layer.
        """
        x = as_array(x)
        layout = self._layout(x.shape)
        scale, bias = self._parameters(x.shape, layout.features, scale, bias)
        args = (x, scale) if isinstance(self, RMSNorm) and bias is None else (x, scale, bias)
        return flax_rules.normalized(
            self, layout, x, scale, bias, mask=mask, dtype=self._output_dtype(args), axis_name=self.axis_name
        )


class LayerNorm(_RowNorm):
    """Layer normalization: `flax.nnx.LayerNorm`.

        y = (x - mean) / sqrt(var + epsilon) * (scale + scale_offset) + bias,   mean and var over `reduction_axes`

    `scale` and `bias`, of shape `num_features`, belong to x's `feature_axes`. For what jaxnorm adds see `jaxnorm.nnx`.

    Source: Ba, Kiros, Hinton, "Layer Normalization" (2016), arXiv:1607.06450.

    >>> import numpy as np
    >>> from flax import nnx
    >>> from jaxnorm import nnx as jnnx
    >>> jnnx.LayerNorm(2, rngs=nnx.Rngs(0))(np.array([[1., 3.], [5., 5.]], "f")).round(3).tolist()
    [[-1.0, 1.0], [0.0, 0.0]]
    """

    @explained("nnx")
    def __init__(
        self, num_features: Features, *, epsilon: float = 1e-6, dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32, use_bias: bool = True, use_scale: bool = True,
        bias_init: Initializer = initializers.zeros, scale_init: Initializer | None = None,
        reduction_axes: Axes = -1, feature_axes: Axes = -1, axis_name: str | None = None,
        axis_index_groups: Any = None, use_fast_variance: bool = True,
        promote_dtype: Promote = dtypes.promote_dtype, rngs: nnx.Rngs,
        bias_metadata: Metadata = _NONE, scale_metadata: Metadata = _NONE,
        scale_offset: float = 0.0, activation: Activation | None = None,
        implementation: str | None = None,
    ):  # fmt: skip
        self._build(locals())

    def _layout(self, shape: tuple[int, ...]) -> Layout:
        return flax_rules.layer_norm_layout(self, len(shape))


class RMSNorm(_RowNorm):
    """Root mean square layer normalization: `flax.nnx.RMSNorm`.

        y = x / sqrt(mean(|x|^2) + epsilon) * (scale + scale_offset) + bias,   mean over `reduction_axes`

    jaxnorm adds, beside what `jaxnorm.nnx` says:
      use_bias: learn a bias too, in `bias`, made by `bias_init` with `bias_metadata`. Flax's layer has none.
      cast: "after_scale" rounds once, at the end (Gemma); "before_scale" also before the scale (Llama).

    Source: Zhang, Sennrich, "Root Mean Square Layer Normalization" (2019), arXiv:1910.07467.

    >>> import numpy as np
    >>> from flax import nnx
    >>> from jaxnorm import nnx as jnnx
    >>> y = jnnx.RMSNorm(4, epsilon=0., rngs=nnx.Rngs(0))(np.array([[3., 3., 0., 0.]], "f"))
    >>> (y**2).round(3).tolist()
    [[2.0, 2.0, 0.0, 0.0]]
    """

    @explained("nnx")
    def __init__(
        self, num_features: Features, *, epsilon: float = 1e-6, dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32, use_scale: bool = True, scale_init: Initializer | None = None,
        reduction_axes: Axes = -1, feature_axes: Axes = -1, axis_name: str | None = None,
        axis_index_groups: Any = None, use_fast_variance: bool = True,
        promote_dtype: Promote = dtypes.promote_dtype, rngs: nnx.Rngs, scale_metadata: Metadata = _NONE,
        use_bias: bool = False, bias_init: Initializer = initializers.zeros, bias_metadata: Metadata = _NONE,
        cast: str = "after_scale", scale_offset: float = 0.0, activation: Activation | None = None,
        implementation: str | None = None,
    ):  # fmt: skip
        self._build(locals())

    def _layout(self, shape: tuple[int, ...]) -> Layout:
        return flax_rules.rms_norm_layout(self, len(shape))


class GatedRMSNorm(_Norm):
    """RMS norm and a gate, as Mamba-2 and gated DeltaNet have it: `jaxnorm.gated_rms_norm`. Flax has no such layer.

        y = rms_norm(x) * (scale + scale_offset) * f(gate),   or   rms_norm(x * f(gate)) * (scale + scale_offset)

    The first with `norm_before_gate=True`, the second, Mamba-2's, with False; f is `activation`. The one parameter is
    `scale`, of shape `num_features`, at x's `axis`; `group_size` channels at a time are normalized, None is all.

    >>> import numpy as np
    >>> from flax import nnx
    >>> from jaxnorm import nnx as jnnx
    >>> x, gate = np.array([[3., -3.]], "f"), np.array([[0., 1.]], "f")
    >>> jnnx.GatedRMSNorm(2, epsilon=0., activation="sigmoid", rngs=nnx.Rngs(0))(x, gate).round(3).tolist()
    [[0.5, -0.7310000061988831]]
    """

    axis: int

    @explained("nnx")
    def __init__(
        self, num_features: int, *, epsilon: float = 1e-6, dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32, use_scale: bool = True, scale_init: Initializer | None = None,
        axis: int = -1, group_size: int | None = None, norm_before_gate: bool = True,
        axis_name: str | None = None, axis_index_groups: Any = None,
        promote_dtype: Promote = dtypes.promote_dtype, rngs: nnx.Rngs, scale_metadata: Metadata = _NONE,
        cast: str = "after_scale", scale_offset: float = 0.0, activation: Activation = "silu",
        implementation: str | None = None,
    ):  # fmt: skip
        self._build(dict(locals(), use_bias=False, bias_init=None))

    @explained("call")
    def __call__(self, x, gate, mask=None, *, scale=None) -> Array:
        """The normalized and gated x.

        Args:
          x: the input.
          gate: of x's shape, or of one that broadcasts to it.
          mask: True where an element counts. Broadcasts to x, or covers its leading axes.
          scale: in place of a learned scale: of the feature shape, or of one that broadcasts against x.

        Raises:
          ValueError: scale is given to a layer that has its own.
          TypeError: x has not as many features as the layer.
        """
        x = as_array(x)
        features = flax_rules.canonical(self, "axis", x.ndim, self.axis)
        scale, _ = self._parameters(x.shape, features, scale, None)
        dtype = self._output_dtype((x, scale))
        return flax_rules.apply_gated_rms_norm(self, x, gate, scale, mask=mask, dtype=dtype, axis_name=self.axis_name)


class GroupNorm(_RowNorm):
    """Group normalization: `flax.nnx.GroupNorm`.

        y = (x - mean) / sqrt(var + epsilon) * (scale + scale_offset) + bias

    with mean and var over each of `num_groups` groups of neighbouring channels (or groups of `group_size`, with
    `num_groups=None`) and over the other `reduction_axes`; None is all but the batch axis 0.

    jaxnorm adds, beside what `jaxnorm.nnx` says:
      axis: the channel axis, at any position.

    Raises:
      ValueError: groups that do not divide the features, both num_groups and group_size or neither, or reduction_axes
        without the channel axis.

    Source: Wu, He, "Group Normalization" (2018), arXiv:1803.08494.

    >>> import numpy as np
    >>> from flax import nnx
    >>> from jaxnorm import nnx as jnnx
    >>> jnnx.GroupNorm(4, num_groups=2, rngs=nnx.Rngs(0))(np.array([[1., 3., 10., 30.]], "f")).round(3).tolist()
    [[-1.0, 1.0, -1.0, 1.0]]
    """

    num_groups: int
    group_size: int

    @explained("nnx")
    def __init__(
        self, num_features: int, num_groups: int | None = 32, group_size: int | None = None, *,
        epsilon: float = 1e-6, dtype: Dtype | None = None, param_dtype: Dtype = jnp.float32,
        use_bias: bool = True, use_scale: bool = True,
        bias_init: Initializer = initializers.zeros, scale_init: Initializer | None = None,
        reduction_axes: Axes | None = None, axis_name: str | None = None,
        axis_index_groups: Any = None, use_fast_variance: bool = True,
        promote_dtype: Promote = dtypes.promote_dtype, rngs: nnx.Rngs,
        bias_metadata: Metadata = _NONE, scale_metadata: Metadata = _NONE,
        axis: int = -1, scale_offset: float = 0.0, activation: Activation | None = None,
        implementation: str | None = None,
    ):  # fmt: skip
        flax_rules.check_groups(num_groups, group_size)
        num_features = to_python(num_features)
        if not isinstance(num_features, int):
            raise ValueError(
                f"GroupNorm: num_features must be an int, got {shown(num_features)}. "
                "Write GroupNorm(64, num_groups=32, rngs=nnx.Rngs(0))."
            )
        num_groups = canonicalize_group_count("GroupNorm", num_features, num_groups, group_size)
        group_size = num_features // num_groups
        self._build(locals())

    def _layout(self, shape: tuple[int, ...]) -> Layout:
        layout = flax_rules.group_norm_layout(self, len(shape), self.num_groups, None)
        flax_rules.check_width(self, "num_features", (self.num_groups * self.group_size,), shape, layout.features)
        return layout


class InstanceNorm(_RowNorm):
    """Instance normalization: `flax.nnx.InstanceNorm`.

        y = (x - mean) / sqrt(var + epsilon) * (scale + scale_offset) + bias

    with mean and var over every axis but the batch axis 0 and the `feature_axes`, to which `scale` and `bias` belong.

    jaxnorm adds, beside what `jaxnorm.nnx` says:
      axis: the same as feature_axes, by the name that `jaxnorm.instance_norm` has for it.

    Raises:
      ValueError: the batch axis among the feature axes.

    Source: Ulyanov, Vedaldi, Lempitsky, "Instance Normalization" (2016), arXiv:1607.08022.

    >>> import numpy as np
    >>> from flax import nnx
    >>> from jaxnorm import nnx as jnnx
    >>> jnnx.InstanceNorm(2, rngs=nnx.Rngs(0))(np.array([[[1., 10.], [3., 30.]]], "f")).round(3).tolist()
    [[[-1.0, -1.0], [1.0, 1.0]]]
    """

    @explained("nnx")
    def __init__(
        self, num_features: Features, *, epsilon: float = 1e-6, dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32, use_bias: bool = True, use_scale: bool = True,
        bias_init: Initializer = initializers.zeros, scale_init: Initializer | None = None,
        feature_axes: Axes = -1, axis_name: str | None = None,
        axis_index_groups: Any = None, use_fast_variance: bool = True,
        promote_dtype: Promote = dtypes.promote_dtype, rngs: nnx.Rngs,
        bias_metadata: Metadata = _NONE, scale_metadata: Metadata = _NONE,
        axis: Axes | None = None, scale_offset: float = 0.0, activation: Activation | None = None,
        implementation: str | None = None,
    ):  # fmt: skip
        self._build(locals())

    def _layout(self, shape: tuple[int, ...]) -> Layout:
        return flax_rules.instance_norm_layout(self, len(shape))


class BatchNorm(_Norm):
    """Batch normalization: `flax.nnx.BatchNorm`.

        y = (x - mean) / sqrt(var + epsilon) * (scale + scale_offset) + bias

    with mean and var those of the batch after `train()`, which also updates the running ones in the `nnx.BatchStat`s
    `mean` and `var`, and the running ones after `eval()`. `axis` holds the features, an int or several.

    jaxnorm adds, beside what `jaxnorm.nnx` says:
      momentum: None is the exact cumulative statistics of all elements seen (there is then a BatchStat `count`).
      zero_debias: correct the running statistics for their start, as Adam does (with a `count` too).
      unbiased_running_var: the running variance divides by n - 1, as torch's does.
      frozen: normalize by the running statistics and never update them, after `train()` too.
      skip_nonfinite: a channel whose batch statistics are not finite keeps its old ones.
      sync: which devices along axis_name share statistics: "global" (all), "local" (none), an int n (groups of n
        neighbouring devices), or lists of indices. The running statistics always use all devices.
      virtual_batch_size: ghost batch norm: normalize each block of this many examples by its own statistics.
      min_count: a channel with fewer elements than this leaves its running statistics as they were.

    Raises:
      ValueError: use_running_average is said nowhere; under shard_map with check_vma, running statistics that came in
        the same on all devices would come out different.

    Source: Ioffe, Szegedy, "Batch Normalization" (2015), arXiv:1502.03167.

    >>> import numpy as np
    >>> from flax import nnx
    >>> from jaxnorm import nnx as jnnx
    >>> norm = jnnx.BatchNorm(1, momentum=0.9, rngs=nnx.Rngs(0))
    >>> norm(np.array([[1.], [3.]], "f")).round(3).tolist(), norm.mean[...].round(3).tolist()
    ([[-1.0], [1.0]], [0.20000000298023224])
    """

    use_running_average: bool | None
    frozen: bool

    @explained("nnx")
    def __init__(
        self, num_features: Features, *, use_running_average: bool | None = False, axis: Axes = -1,
        momentum: float | None = 0.99, epsilon: float = 1e-5, dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32, use_bias: bool = True, use_scale: bool = True,
        bias_init: Initializer = initializers.zeros, scale_init: Initializer | None = None,
        axis_name: str | None = None, axis_index_groups: Any = None, use_fast_variance: bool = True,
        promote_dtype: Promote = dtypes.promote_dtype, rngs: nnx.Rngs,
        bias_metadata: Metadata = _NONE, scale_metadata: Metadata = _NONE,
        zero_debias: bool = False, unbiased_running_var: bool = False, frozen: bool = False,
        skip_nonfinite: bool = False, virtual_batch_size: int | None = None, min_count: float | None = None,
        sync: Any = "global", scale_offset: float = 0.0, activation: Activation | None = None,
        implementation: str | None = None,
    ):  # fmt: skip
        shape = self._build(locals())
        self.mean = nnx.BatchStat(jnp.zeros(shape, jnp.float32))
        self.var = nnx.BatchStat(jnp.ones(shape, jnp.float32))
        self.count = nnx.BatchStat(jnp.zeros(shape, jnp.float32)) if flax_rules.needs_count(self) else nnx.data(None)

    @explained("call")
    def __call__(
        self, x, use_running_average=None, *, mask=None, weights=None, update_stats: bool = True, scale=None, bias=None
    ) -> Array:
        """The normalized x. Updates the running statistics in training.

        Args:
          x: the input.
          use_running_average: normalize by the running statistics; overrides the layer's. A bool, or a traced bool.
          mask: True where an element counts. Broadcasts to x, or covers its leading axes.
          weights: a float weight >= 0 for each element, shaped as a mask may be.
          update_stats: False leaves the running statistics as they were.
          scale: in place of a learned scale: of the feature shape, or of one that broadcasts against x.
          bias: the same.

        Raises:
          ValueError: scale or bias is given to a layer that has its own.
          TypeError: x has not as many features as the layer.
        """
        use = self.use_running_average if use_running_average is None else use_running_average
        if use is None and not self.frozen:
            raise ValueError(
                "BatchNorm: use_running_average is neither the layer's nor the call's. Write model.train() or "
                "model.eval(), nnx.view(model, use_running_average=False), or norm(x, use_running_average=False)."
            )
        x = as_array(x)
        features = flax_rules.batch_features(self, x)
        stored = (self.mean, self.var) if self.count is None else (self.mean, self.var, self.count)
        stats = RunningStats(*(variable[...] for variable in stored))
        scale, bias = self._parameters(x.shape, features, scale, bias)
        train = False if self.frozen else flax_rules.training(use)
        y, stats = flax_rules.apply_batch_norm(
            self, x, scale, bias, stats, train=train, mask=mask, weights=weights, update_stats=update_stats,
            dtype=self._output_dtype((x, stats.mean, stats.var, scale, bias)), axis_name=self.axis_name,
        )  # fmt: skip
        if train is not False and update_stats:
            for variable, new in zip(stored, (a for a in stats if a is not None), strict=True):
                if new.dtype == variable.dtype:
                    variable[...] = new
                else:  # the mean of a complex x, which in `variable[...] = ` would lose its imaginary part
                    variable.set_value(new)
        return y

    def set_view(self, use_running_average: bool | None = None):
        """Used by `nnx.view`.

        Args:
          use_running_average: normalize by the running statistics.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average
