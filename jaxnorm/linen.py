"""Flax linen layers: those of `flax.linen`, by jaxnorm. Changing the import is enough, and checkpoints load either way.

Every layer takes the arguments of Flax's layer of the same name, in the same order, and has its variables: parameters
`scale` and `bias`, and for batch norm the collection `batch_stats` with `mean` and `var`, of the same names, shapes
and dtypes. The output's dtype is Flax's: `dtype`, else what x and the parameters promote to. `use_fast_variance` and
`force_float32_reductions` are accepted; statistics are accurate and in float32 or wider whatever they say (the latter
still says what dtype `batch_stats` have). While initializing, no axis name is touched and no statistic updated.

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

import contextlib
import dataclasses
import warnings
from dataclasses import field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers

from ._core.install import missing_flax

try:
    from flax import linen as nn
except ImportError as error:
    raise missing_flax("jaxnorm.linen", error) from error

from ._core.arrays import as_array
from ._core.checks import refuse_array
from ._core.explain import explained
from ._core.types import RunningStats
from ._layers import flax_rules
from ._layers.flax_rules import Axes, Initializer, Layout
from ._ops.activation import Activation

Array = jax.Array
Dtype = Any

__all__ = ["BatchNorm", "GatedRMSNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm"]


class _Norm(nn.Module):
    """What all layers have. Fields of Flax's come first, in each layer, in Flax's order; these are keyword only."""

    scale_offset: float = field(default=0.0, kw_only=True)
    activation: Activation | None = field(default=None, kw_only=True)
    implementation: str | None = field(default=None, kw_only=True)

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        cls.__init__ = explained("linen")(cls.__init__)

    def __post_init__(self):
        ours = next(cls for cls in type(self).__mro__ if cls.__module__ == __name__)
        for option in dataclasses.fields(ours):  # pyright: ignore[reportArgumentType]
            if isinstance(value := getattr(self, option.name), (np.ndarray, jax.Array)):
                refuse_array(type(self).__name__, option.name, value, option.default)
        super().__post_init__()

    @nn.nowrap
    def _parameters(self, shape: tuple[int, ...], features: tuple[int, ...], scale, bias) -> tuple[Any, Any]:
        """Flax's parameters, made in Flax's order, or those given in their place; with x's rank."""
        layer: Any = self
        flax_rules.check_not_both(self, scale=(layer.use_scale, scale), bias=(layer.use_bias, bias))
        width = tuple(shape[a] for a in features)
        if layer.use_scale:
            init = layer.scale_init or flax_rules.unit_scale(self.scale_offset)
            scale = self.param("scale", init, width, layer.param_dtype)
        if layer.use_bias:
            bias = self.param("bias", layer.bias_init, width, layer.param_dtype)
        return (
            flax_rules.broadcast_param(self, "scale", scale, shape, features, layer.use_scale),
            flax_rules.broadcast_param(self, "bias", bias, shape, features, layer.use_bias),
        )

    @nn.nowrap
    def _axis_name(self):
        return None if self.is_initializing() else self.axis_name  # pyright: ignore[reportAttributeAccessIssue]

    @nn.nowrap
    @contextlib.contextmanager
    def _initializing_quietly(self):
        """An example to initialize with may be a single element, of which there is nothing to warn."""
        with warnings.catch_warnings() if self.is_initializing() else contextlib.nullcontext():
            if self.is_initializing():
                warnings.filterwarnings("ignore", ".* has one element per ", UserWarning)
            yield


class _RowNorm(_Norm):
    """A norm without state."""

    @nn.nowrap
    def _layout(self, ndim: int) -> Layout:
        raise NotImplementedError

    @nn.compact
    @explained("call")
    def __call__(self, x, *, mask=None, scale=None, bias=None) -> Array:
        """The normalized x.

        Args:
          x: the input.
          mask: True where an element counts. Broadcasts to x, or covers its leading axes.
          scale: in place of a learned scale: of the feature shape, or of one that broadcasts against x.
          bias: the same.

        Raises:
          ValueError: scale or bias is given to a layer that has its own.
        """
        x = as_array(x)
        layout = self._layout(x.ndim)
        scale, bias = self._parameters(x.shape, layout.features, scale, bias)
        dtype = flax_rules.output_dtype(self, x, scale, bias)  # pyright: ignore[reportAttributeAccessIssue]
        with self._initializing_quietly():
            return flax_rules.normalized(
                self, layout, x, scale, bias, mask=mask, dtype=dtype, axis_name=self._axis_name()
            )


class LayerNorm(_RowNorm):
    """Layer normalization: `flax.linen.LayerNorm`.

        y = (x - mean) / sqrt(var + epsilon) * (scale + scale_offset) + bias,   mean and var over `reduction_axes`

    `scale` and `bias` have the shape of x's `feature_axes`. For what jaxnorm adds see `jaxnorm.linen`.

    Source: Ba, Kiros, Hinton, "Layer Normalization" (2016), arXiv:1607.06450.

    >>> import jax, numpy as np
    >>> from jaxnorm import linen as jnn
    >>> x = np.array([[1., 3.], [5., 5.]], "f")
    >>> y, variables = jnn.LayerNorm().init_with_output(jax.random.key(0), x)
    >>> y.round(3).tolist(), sorted(variables["params"])
    ([[-1.0, 1.0], [0.0, 0.0]], ['bias', 'scale'])
    """

    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer | None = None
    reduction_axes: Axes = -1
    feature_axes: Axes = -1
    axis_name: str | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True

    @nn.nowrap
    def _layout(self, ndim: int) -> Layout:
        return flax_rules.layer_norm_layout(self, ndim)


class RMSNorm(_RowNorm):
    """Root mean square layer normalization: `flax.linen.RMSNorm`.

        y = x / sqrt(mean(|x|^2) + epsilon) * (scale + scale_offset) + bias,   mean over `reduction_axes`

    jaxnorm adds, beside what `jaxnorm.linen` says:
      use_bias: learn a bias too, in a parameter `bias`. Flax's layer has none.
      bias_init: its initializer.
      cast: "after_scale" rounds once, at the end (Gemma); "before_scale" also before the scale (Llama).

    Source: Zhang, Sennrich, "Root Mean Square Layer Normalization" (2019), arXiv:1910.07467.

    >>> import jax, numpy as np
    >>> from jaxnorm import linen as jnn
    >>> y, variables = jnn.RMSNorm(epsilon=0.).init_with_output(jax.random.key(0), np.array([[3., 3., 0., 0.]], "f"))
    >>> (y**2).round(3).tolist(), sorted(variables["params"])
    ([[2.0, 2.0, 0.0, 0.0]], ['scale'])
    """

    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_scale: bool = True
    scale_init: Initializer | None = None
    reduction_axes: Axes = -1
    feature_axes: Axes = -1
    axis_name: str | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    use_bias: bool = field(default=False, kw_only=True)
    bias_init: Initializer = field(default=initializers.zeros, kw_only=True)
    cast: str = field(default="after_scale", kw_only=True)

    @nn.nowrap
    def _layout(self, ndim: int) -> Layout:
        return flax_rules.rms_norm_layout(self, ndim)


class GatedRMSNorm(_Norm):
    """RMS norm and a gate, as Mamba-2 and gated DeltaNet have it: `jaxnorm.gated_rms_norm`. Flax has no such layer.

        y = rms_norm(x) * (scale + scale_offset) * f(gate),   or   rms_norm(x * f(gate)) * (scale + scale_offset)

    The first with `norm_before_gate=True`, the second, Mamba-2's, with False; f is `activation`. The one parameter is
    `scale`, of the shape of x's `axis`; `group_size` channels at a time are normalized, None is all.

    >>> import jax, numpy as np
    >>> from jaxnorm import linen as jnn
    >>> x, gate = np.array([[3., -3.]], "f"), np.array([[0., 1.]], "f")
    >>> norm = jnn.GatedRMSNorm(epsilon=0., activation="sigmoid")
    >>> y, variables = norm.init_with_output(jax.random.key(0), x, gate)
    >>> y.round(3).tolist(), sorted(variables["params"])
    ([[0.5, -0.7310000061988831]], ['scale'])
    """

    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_scale: bool = True
    scale_init: Initializer | None = None
    axis: int = -1
    group_size: int | None = None
    norm_before_gate: bool = True
    axis_name: str | None = None
    axis_index_groups: Any = None
    activation: Activation | None = field(default="silu", kw_only=True)
    cast: str = field(default="after_scale", kw_only=True)

    use_bias = False

    @nn.compact
    @explained("call")
    def __call__(self, x, gate, *, mask=None, scale=None) -> Array:
        """The normalized and gated x.

        Args:
          x: the input.
          gate: of x's shape, or of one that broadcasts to it.
          mask: True where an element counts. Broadcasts to x, or covers its leading axes.
          scale: in place of a learned scale: of the feature shape, or of one that broadcasts against x.

        Raises:
          ValueError: scale is given to a layer that has its own.
        """
        x = as_array(x)
        features = flax_rules.canonical(self, "axis", x.ndim, self.axis)
        scale, _ = self._parameters(x.shape, features, scale, None)
        dtype = flax_rules.output_dtype(self, x, scale)
        return flax_rules.apply_gated_rms_norm(
            self, x, gate, scale, mask=mask, dtype=dtype, axis_name=self._axis_name()
        )


class GroupNorm(_RowNorm):
    """Group normalization: `flax.linen.GroupNorm`.

        y = (x - mean) / sqrt(var + epsilon) * (scale + scale_offset) + bias

    with mean and var over each of `num_groups` groups of neighbouring channels (or groups of `group_size`, with
    `num_groups=None`) and over the other `reduction_axes`; None is all but the batch axis 0.

    jaxnorm adds, beside what `jaxnorm.linen` says:
      axis: the channel axis, at any position.

    Raises:
      ValueError: groups that do not divide the channels, both num_groups and group_size or neither, or reduction_axes
        without the channel axis.

    Source: Wu, He, "Group Normalization" (2018), arXiv:1803.08494.

    >>> import jax, numpy as np
    >>> from jaxnorm import linen as jnn
    >>> norm = jnn.GroupNorm(num_groups=2)
    >>> norm.init_with_output(jax.random.key(0), np.array([[1., 3., 10., 30.]], "f"))[0].round(3).tolist()
    [[-1.0, 1.0, -1.0, 1.0]]
    """

    num_groups: int | None = 32
    group_size: int | None = None
    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer | None = None
    reduction_axes: Axes | None = None
    axis_name: str | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    axis: int = field(default=-1, kw_only=True)

    @nn.nowrap
    def _layout(self, ndim: int) -> Layout:
        return flax_rules.group_norm_layout(self, ndim, self.num_groups, self.group_size)


class InstanceNorm(_RowNorm):
    """Instance normalization: `flax.linen.InstanceNorm`.

        y = (x - mean) / sqrt(var + epsilon) * (scale + scale_offset) + bias

    with mean and var over every axis but the batch axis 0 and the `feature_axes`, whose shape `scale` and `bias` have.

    jaxnorm adds, beside what `jaxnorm.linen` says:
      axis: the same as feature_axes, by the name that `jaxnorm.instance_norm` has for it.

    Raises:
      ValueError: the batch axis among the feature axes.

    Source: Ulyanov, Vedaldi, Lempitsky, "Instance Normalization" (2016), arXiv:1607.08022.

    >>> import jax, numpy as np
    >>> from jaxnorm import linen as jnn
    >>> x = np.array([[[1., 10.], [3., 30.]]], "f")
    >>> jnn.InstanceNorm().init_with_output(jax.random.key(0), x)[0].round(3).tolist()
    [[[-1.0, -1.0], [1.0, 1.0]]]
    """

    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer | None = None
    feature_axes: Axes = -1
    axis_name: str | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    axis: Axes | None = field(default=None, kw_only=True)

    @nn.nowrap
    def _layout(self, ndim: int) -> Layout:
        return flax_rules.instance_norm_layout(self, ndim)


class BatchNorm(_Norm):
    """Batch normalization: `flax.linen.BatchNorm`.

        y = (x - mean) / sqrt(var + epsilon) * (scale + scale_offset) + bias

    with mean and var those of the batch, or the running ones of `batch_stats` where `use_running_average`. Training
    needs `mutable=["batch_stats"]`. `axis` holds the features, an int or several.

    jaxnorm adds, beside what `jaxnorm.linen` says:
      momentum: None is the exact cumulative statistics of all elements seen (`batch_stats` then has a `count`).
      zero_debias: correct the running statistics for their start, as Adam does (with a `count` too).
      unbiased_running_var: the running variance divides by n - 1, as torch's does.
      frozen: normalize by the running statistics and never update them, whatever `use_running_average` says.
      skip_nonfinite: a channel whose batch statistics are not finite keeps its old ones.
      sync: which devices along axis_name share statistics: "global" (all), "local" (none), an int n (groups of n
        neighbouring devices), or lists of indices. The running statistics always use all devices.
      virtual_batch_size: ghost batch norm: normalize each block of this many examples by its own statistics.
      min_count: a channel with fewer elements than this leaves its running statistics as they were.

    Raises:
      ValueError: use_running_average is given nowhere, or twice; under shard_map with check_vma, running statistics
        that came in the same on all devices would come out different.
      ModifyScopeVariableError: training with `batch_stats` immutable.

    Source: Ioffe, Szegedy, "Batch Normalization" (2015), arXiv:1502.03167.

    >>> import jax, numpy as np
    >>> from jaxnorm import linen as jnn
    >>> norm, x = jnn.BatchNorm(momentum=0.9), np.array([[1.], [3.]], "f")
    >>> variables = norm.init(jax.random.key(0), x, use_running_average=False)
    >>> y, new = norm.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
    >>> y.round(3).tolist(), new["batch_stats"]["mean"].round(3).tolist()
    ([[-1.0], [1.0]], [0.20000000298023224])
    """

    use_running_average: bool | None = None
    axis: Axes = -1
    momentum: float | None = 0.99
    epsilon: float = 1e-5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer | None = None
    axis_name: str | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    zero_debias: bool = field(default=False, kw_only=True)
    unbiased_running_var: bool = field(default=False, kw_only=True)
    frozen: bool = field(default=False, kw_only=True)
    skip_nonfinite: bool = field(default=False, kw_only=True)
    virtual_batch_size: int | None = field(default=None, kw_only=True)
    min_count: float | None = field(default=None, kw_only=True)
    sync: Any = field(default="global", kw_only=True)

    @nn.compact
    @explained("call")
    def __call__(
        self, x, use_running_average=None, *, mask=None, weights=None, update_stats: bool = True, scale=None, bias=None
    ) -> Array:
        """The normalized x. Updates `batch_stats` in training, but not while initializing.

        Args:
          x: the input.
          use_running_average: normalize by `batch_stats`. Here or at construction. A bool, or a traced bool.
          mask: True where an element counts. Broadcasts to x, or covers its leading axes.
          weights: a float weight >= 0 for each element, shaped as a mask may be.
          update_stats: False leaves `batch_stats` as they were, which then need not be mutable.
          scale: in place of a learned scale: of the feature shape, or of one that broadcasts against x.
          bias: the same.
        """
        unsaid = self.use_running_average is None and use_running_average is None
        if not (self.frozen and unsaid):
            use_running_average = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        train = False if self.frozen else flax_rules.training(use_running_average)
        x = as_array(x)
        features = flax_rules.batch_features(self, x)
        shape = tuple(x.shape[a] for a in features)
        dtype = jnp.float32 if self.force_float32_reductions else self.param_dtype
        stored = {
            "mean": self.variable("batch_stats", "mean", jnp.zeros, shape, dtype),
            "var": self.variable("batch_stats", "var", jnp.ones, shape, dtype),
        }
        if flax_rules.needs_count(self):
            stored["count"] = self.variable("batch_stats", "count", jnp.zeros, shape, jnp.float32)
        stats = RunningStats(**{name: variable.value for name, variable in stored.items()})
        flax_rules.check_width(self, "batch_stats", stats.mean.shape, x.shape, features)
        scale, bias = self._parameters(x.shape, features, scale, bias)
        update_stats = update_stats and not self.is_initializing()
        with self._initializing_quietly():
            y, stats = flax_rules.apply_batch_norm(
                self, x, scale, bias, stats, train=train, mask=mask, weights=weights, update_stats=update_stats,
                dtype=flax_rules.output_dtype(self, x, scale, bias), axis_name=self._axis_name(),
            )  # fmt: skip
        if train is not False and update_stats:
            for name, variable in stored.items():
                variable.value = getattr(stats, name)
        return y
