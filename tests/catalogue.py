"""One row per norm and configuration. Every law runs over all of them; a new norm is one row."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from jax import Array

import jaxnorm as jn
from jaxnorm._ops.activation import NAMED


class Truth(NamedTuple):
    y: np.ndarray  # float64, x's shape
    n: np.ndarray  # x's shape: the count of each element's own statistic; infinite where a norm has none


def no_operands(shape: tuple[int, ...]) -> dict[str, Any]:
    return {}


def of_x(spec, params, state, x, **call) -> tuple[Array, Any]:
    return spec.apply(params, state, x, **call)


@dataclass(frozen=True)
class Row:
    name: str
    spec: Any
    shape: tuple[int, ...]  # of x
    param: tuple[int, ...]  # of the parameters, in x's rank; those that `init` makes as numbers stay numbers
    statistic: Callable[..., Any] | None  # coordinates of an element -> what names its statistic, e.g. (n, g)
    given: tuple[int, ...] | None = None  # the shape in which parameters are handed over, where it is not x's rank
    oracle: Callable[..., Any] = oracle.standardize  # the formula
    operands: Callable[[tuple[int, ...]], dict[str, Any]] = no_operands  # x's shape -> what else `apply` takes
    applied: Callable[..., tuple[Array, Any]] = of_x  # how `apply` is one function of x: a norm may take and return more
    calls: int = 1  # the norms in one call
    per_sample: bool = False  # whether each example has parameters of its own
    # Test function -> why it does not hold for this row. It is run and must fail: see conftest.
    exempt: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __str__(self):
        return self.name

    @property
    def centered(self) -> bool:
        """Whether the mean is taken out, so that a constant becomes the bias."""
        if self.oracle is oracle.modulated:
            return not isinstance(self.spec, (jn.AdaRMSNorm, jn.FiLM))
        return self.oracle in (oracle.standardize, oracle.like_style, oracle.batch_and_instance, oracle.switched)

    @property
    def stateful(self) -> bool:
        """Whether the norm keeps statistics between calls."""
        return bool(jax.tree.leaves(self.state()))

    @property
    def batch(self) -> bool:
        """Whether it has running statistics."""
        return self.spec.State is jn.RunningStats

    @property
    def ghost(self) -> int | None:
        """The size of the ghost batches."""
        return getattr(self.spec, "virtual_batch_size", None)

    @property
    def roundings(self) -> int:
        """How often the output is rounded: Llama's order is to round before the scale as well."""
        return 2 if getattr(self.spec, "cast", None) == "before_scale" else 1

    @property
    def features(self) -> tuple[int, ...]:
        return self.spec.features(self.shape)

    def with_shape(self, shape) -> tuple[np.ndarray, tuple[int, ...]]:
        """Labels for x of another shape of the same rank, and the shape of its parameters."""
        index = np.indices(shape)
        named = index if self.statistic is None else self.statistic(*index)
        names = np.stack([np.broadcast_to(a, shape).ravel() for a in named], -1)
        labels = np.unique(names, axis=0, return_inverse=True)[1].reshape(shape) if names.size else index[0]
        return labels, tuple(1 if p == 1 else s for p, s in zip(self.param, shape, strict=True))

    @property
    def labels(self) -> np.ndarray:
        return self.with_shape(self.shape)[0]

    def params(self, rng: np.random.Generator, dtype=np.float32, x_rank: bool = False) -> Any:
        """Random parameters, as they are handed to the norm (or in x's rank); None where the spec has none."""
        shape = self.param if x_rank or self.given is None else self.given
        made = self.spec.init(self.features)[0]
        of = lambda name, p: shape if p is None or not self._whole(name, p) else p.shape
        drawn = [rng.normal(size=of(name, p)) for name, p in made._asdict().items()]
        return type(made)(*(None if p is None else jnp.asarray(d, dtype) for p, d in zip(made, drawn, strict=True)))

    def _whole(self, name: str, p) -> bool:
        """Whether a parameter has a shape of its own, which is no feature shape."""
        return not p.ndim or (name in self.spec.whole and p.size != math.prod(self.param))

    def in_rank(self, params, xp=np) -> Any:
        """Parameters for the oracle, as a tuple of the same type: in x's rank, float64, scale_offset included."""
        offset = dict.fromkeys(self.spec.scales, getattr(self.spec, "scale_offset", 0.0))

        def one(name, p):
            p = oracle.wide(p) if xp is np else p
            return (p if self._whole(name, p) else p.reshape(self.param)) + offset.get(name, 0.0)

        return type(params)(*(None if p is None else one(name, p) for name, p in params._asdict().items()))

    def state(self):
        return self.spec.init(self.features)[1]

    def call(self, params, state, x, **call):
        """`spec.apply` with the operands of this row: the output, and the new state."""
        return self.applied(self.spec, params, state, x, **self.operands(x.shape), **call)

    def apply(self, params, x, **call) -> Array:
        """The norm in training, compiled once per row and shape whichever test asks."""
        return _apply(self, params, x, call)

    def truth(self, params, x, mask=None, weights=None) -> Truth:
        groups = oracle.Groups(self.labels, mask, weights)
        z = self._before_activation(oracle.wide(x), self.in_rank(params), groups)
        return Truth(self.activated(z), groups.count if self.statistic else np.full(self.shape, np.inf))

    def gradients(self, params, x, g, mask=None, weights=None):
        """The cotangents of x and of each parameter, in x's rank; None of a parameter that is None."""
        groups, params = oracle.Groups(self.labels, mask, weights), self.in_rank(params)
        if self._activation is not None:
            slope = oracle.ACTIVATIONS[self._activation][1]
            g = g * slope(self._before_activation(oracle.wide(x), params, groups))
        return oracle.gradients_of(self.oracle, x, params, g, groups, self.spec, **self.operands(self.shape))

    def activated(self, z):
        return z if self._activation is None else oracle.ACTIVATIONS[self._activation][0](oracle.wide(z))

    @property
    def _activation(self) -> str | None:
        return getattr(self.spec, "activation", None)

    def _before_activation(self, x, params, groups):
        return self.oracle(x, params, groups, self.spec, **self.operands(self.shape))

    def reference(self, params, x) -> Array:
        """The norm as plain differentiable jnp, for the transformations whose truth the oracle does not write out."""
        y = self._before_activation(x, self.in_rank(params, jnp), oracle.Groups(self.labels, xp=jnp))
        return y if self._activation is None else NAMED[self._activation](y)


@functools.partial(jax.jit, static_argnums=0)
def _apply(row: Row, params, x, call):
    return row.call(params, row.state(), x, train=True, **call)[0]


def ghosts(size: int) -> Callable[..., Any]:
    """The statistics of ghost batches of that size, of an x of three axes."""
    return lambda n, t, c: (n // size, c)


# Exemptions: a law of this row -> why it does not hold.
UNCENTERED = {"test_shifting_and_scaling_x_changes_nothing": "the mean stays in x"}
PER_SAMPLE = {"test_permuting_the_batch_permutes_the_output": "each example's parameters stay where they are"}
GHOSTS = {"test_permuting_the_batch_permutes_the_output": "an example moves into another ghost batch"}
NOT_NATIVE = "test_the_native_backend_runs_every_row"
SEGMENTS = {
    "test_permuting_the_batch_permutes_the_output": "the ids stay where they are",
    NOT_NATIVE: "segments have kernels of their own, which only implementation=None runs",
}
FUSED = UNCENTERED | {NOT_NATIVE: "XLA fuses elementwise functions"}
rms = dict(oracle=oracle.root_mean_square, exempt=UNCENTERED)
length = dict(oracle=oracle.unit_length, exempt=UNCENTERED)
squash = dict(oracle=oracle.dynamic_tanh, exempt=FUSED)

response = dict(oracle=oracle.filter_response, exempt=FUSED)
evolved = dict(oracle=oracle.evolved, exempt=FUSED)
MIXED = {NOT_NATIVE: "XLA fuses elementwise functions"}

def segment_ids(m):
    """Of row m: 0, 1 or 4, in no order, of 1, 2 and 2 in 5 rows."""
    return m * m % 5


def packed(kind: str, **options) -> Any:
    return jn.SegmentNorm(num_segments=5, kind=kind, **options)


def condition(parts: int, axis: int = -1, tokens: bool = False):
    """Of x's shape: a modulation for each example, or for each token."""

    def of(shape):
        lead = shape[:-1] if tokens else shape[:1]
        return {"condition": np.random.default_rng(7).normal(size=(*lead, parts * shape[axis])).astype(np.float32)}

    return of


def residual(shape):
    return {"residual": np.random.default_rng(7).normal(size=shape).astype(np.float32)}


def window_stats(shape):
    mean, std = np.random.default_rng(7).normal(size=(2, shape[0], 1, shape[-1])).astype(np.float32)
    return mean, np.exp(std)


def modulated(*condition_of, **exempt) -> dict[str, Any]:
    return dict(operands=condition(*condition_of), oracle=oracle.modulated, exempt=PER_SAMPLE | exempt)


def first_alone(spec, params, state, x, **call):
    """y, of a norm that returns more with it."""
    (y, *_), state = spec.apply(params, state, x, **call)
    return y, state


def x_as_residual(spec, params, state, x, **call):
    return spec.apply(params, state, x, x, **call)


def queries_and_keys(spec, params, state, x, mask=None, **call):
    """x of shape (B, T, heads, D) is q and k together."""
    at = oracle.first_key(x.shape[2])
    split = lambda a: (a[:, :, :at], a[:, :, at:])
    if mask is not None:
        mask = mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
        call["mask"], call["k_mask"] = split(jnp.broadcast_to(mask, x.shape))
    (q, k), state = spec.apply(params, state, *split(x), **call)
    return jnp.concatenate([q, k], 2), state


def of_token(n, t, h, d):
    return n, t, h >= oracle.first_key(h.max() + 1)


pair = dict(applied=queries_and_keys, calls=2, oracle=oracle.query_key, exempt=UNCENTERED)
segments = dict(operands=lambda shape: {"segment_ids": segment_ids(np.arange(shape[0]))}, exempt=SEGMENTS)
so_far = dict(applied=first_alone, oracle=oracle.cumulative_group, exempt={NOT_NATIVE: FUSED[NOT_NATIVE]})
window = dict(applied=first_alone, oracle=oracle.rev_in, exempt={NOT_NATIVE: "XLA fuses elementwise functions"})
_image, _planes, _tokens = (6, 5, 4, 12), (6, 12, 5, 4), (4, 6, 40)

ROWS = [
    Row("layer", jn.LayerNorm(), _tokens, (1, 1, 40), lambda n, t, c: (n, t), (40,)),
    Row("layer-two-axes", jn.LayerNorm(axis=(-2, -1)), _tokens, (1, 6, 40), lambda n, t, c: (n,), (6, 40)),
    Row("layer-nchw", jn.LayerNorm(axis=1), _planes, (1, 12, 1, 1), lambda n, c, h, w: (n, h, w), (12,),
        exempt={NOT_NATIVE: "without transposing"}),
    Row("layer-no-params", jn.LayerNorm(use_scale=False, use_bias=False), _tokens, (1, 1, 40), lambda n, t, c: (n, t)),
    Row("layer-zero-centred", jn.LayerNorm(scale_offset=1.0), _tokens, (1, 1, 40), lambda n, t, c: (n, t), (40,)),
    Row("layer-adaptive", jn.LayerNorm(), _tokens, (4, 1, 40), lambda n, t, c: (n, t), per_sample=True, exempt=PER_SAMPLE),
    Row("layer-gelu", jn.LayerNorm(activation="gelu"), _tokens, (1, 1, 40), lambda n, t, c: (n, t), (40,)),
    Row("rms", jn.RMSNorm(), _tokens, (1, 1, 40), lambda n, t, c: (n, t), (40,), **rms),
    Row("rms-bias", jn.RMSNorm(use_bias=True, scale_offset=1.0), _tokens, (1, 1, 40), lambda n, t, c: (n, t), (40,), **rms),
    Row("rms-no-scale", jn.RMSNorm(use_scale=False), _tokens, (1, 1, 40), lambda n, t, c: (n, t), **rms),
    Row("rms-per-head", jn.RMSNorm(), (3, 4, 5, 16), (1, 1, 5, 16), lambda n, t, h, d: (n, t, h), (5, 16), **rms),
    Row("rms-two-axes", jn.RMSNorm(axis=(1, 2)), _tokens, (1, 6, 40), lambda n, t, c: (n,), (6, 40), **rms),
    Row("rms-before-scale", jn.RMSNorm(cast="before_scale"), _tokens, (1, 1, 40), lambda n, t, c: (n, t), (40,), **rms),
    Row("rms-silu", jn.RMSNorm(activation="silu"), _tokens, (1, 1, 40), lambda n, t, c: (n, t), (40,), **rms),
    Row("rms-output-scale", jn.RMSNorm(use_bias=True, scale_offset=1.0, output_scale=0.3), _tokens, (1, 1, 40),
        lambda n, t, c: (n, t), (40,), oracle=oracle.scaled_output, exempt=UNCENTERED),
    Row("deep", jn.DeepNorm(alpha=3.0), _tokens, (1, 1, 40), lambda n, t, c: (n, t), (40,), applied=x_as_residual,
        oracle=oracle.of_alpha_times_x_and_x),
    Row("rms-add", jn.RMSNormAdd(use_bias=True), _tokens, (1, 1, 40), lambda n, t, c: (n, t), (40,), applied=x_as_residual,
        oracle=oracle.x_and_its_norm, exempt=UNCENTERED | {
            "test_poison_in_the_padding_reaches_no_output_and_no_gradient": "poison in the residual stays in the stream"}),
    Row("group-rms", jn.GroupRMSNorm(num_groups=3), (4, 6, 12), (1, 1, 12), lambda n, t, c: (n, t, c // 4), (12,), **rms),
    Row("group-rms-nchw-centered", jn.GroupRMSNorm(group_size=4, centered=True, axis=1, use_bias=True, scale_offset=1.0), _planes,
        (1, 12, 1, 1), lambda n, c, h, w: (n, c // 4, h, w), (12,), exempt={NOT_NATIVE: "without transposing"}),
    Row("qk", jn.QKNorm(scale_offset=1.0), (3, 4, 6, 12), (1, 1, 1, 12), lambda n, t, h, d: (n, t, h), (12,),
        **pair),
    Row("qk-all-heads", jn.QKNorm(kind="layer", axis=(-2, -1), use_scale=False), (3, 4, 6, 12), (1, 1, 1, 12), of_token,
        **pair | dict(exempt={})),
    Row("l2", jn.L2Norm(use_scale=True), _tokens, (1, 1, 40), lambda n, t, c: (n, t), (40,), **length),
    Row("l2-max", jn.L2Norm(epsilon_mode="max", epsilon=1e-12), _tokens, (1, 1, 40), lambda n, t, c: (n, t),
        **length | dict(exempt=FUSED)),
    Row("scale-norm", jn.ScaleNorm(epsilon_mode="inside"), _tokens, (1, 1, 40), lambda n, t, c: (n, t), **length),
    Row("pixel-outside", jn.PixelNorm(axis=1, epsilon_mode="outside", epsilon=1e-4), _planes, (1, 12, 1, 1),
        lambda n, c, h, w: (n, h, w), oracle=oracle.over_rms, exempt=FUSED),
    Row("partial-rms", jn.PartialRMSNorm(fraction=0.5), _tokens, (1, 1, 40), lambda n, t, c: (n, t), (40,),
        oracle=oracle.partial_root_mean_square, exempt=UNCENTERED),
    Row("dynamic-tanh", jn.DynamicTanh(), _tokens, (1, 1, 40), None, (40,), **squash),
    Row("dynamic-tanh-nchw", jn.DynamicTanh(axis=1, use_bias=False, scale_offset=1.0, activation="silu"), _planes,
        (1, 12, 1, 1), None, (12,), **squash),
    Row("response", jn.FilterResponseNorm(), _image, (1, 1, 1, 12), lambda n, h, w, c: (n, c), (12,), **response),
    Row("response-nchw", jn.FilterResponseNorm(axis=1, use_learned_epsilon=True, scale_offset=1.0), _planes,
        (1, 12, 1, 1), lambda n, c, h, w: (n, c), (12,), **response),
    Row("response-silu", jn.FilterResponseNorm(use_threshold=False, activation="silu"), (5, 30, 4), (1, 1, 4),
        lambda n, t, c: (n, c), (4,), **response),
    Row("crms", jn.CRMSNorm(), _tokens, (1, 1, 40), lambda n, t, c: (n, t), (40,), oracle=oracle.compressed, exempt=FUSED),
    Row("gated-norm", jn.GatedNorm(init_rank=3, gate_scale=2.0, scale_offset=1.0, use_pre_scale=True), (4, 10, 8), (1, 1, 8),
        lambda n, t, c: (n, t), (8,), oracle=oracle.gated_norm, exempt=FUSED),
    Row("seednorm-heads", jn.SeeDNorm(num_heads=3), (4, 6, 12), (1, 1, 12), lambda n, t, c: (n, t), (12,),
        oracle=oracle.seednorm, exempt=FUSED),
    Row("poly", jn.PolyNorm(activation="silu"), _tokens, (1, 1, 40), lambda n, t, c: (n, t), oracle=oracle.poly_norm, exempt=FUSED),
    Row("hypersphere", jn.HypersphereUpdate(), _tokens, (1, 1, 40), lambda n, t, c: (n, t), (40,),
        operands=residual, oracle=oracle.hypersphere_update, exempt=FUSED | PER_SAMPLE | {
            "test_only_x_is_saved_at_full_size": "the residual is kept as well"}),
    Row("global-response", jn.GlobalResponseNorm(), (4, 3, 2, 12), (1, 1, 1, 12), lambda n, h, w, c: (n,), (12,),
        oracle=oracle.global_response, exempt=FUSED),
    Row("local-response", jn.LocalResponseNorm(size=4, alpha=0.5), _tokens, (1, 1, 40), lambda n, t, c: (n, t),
        oracle=oracle.local_response, exempt=FUSED),
    Row("cumulative", jn.CumulativeGroupNorm(num_groups=3, epsilon=1e-3), (3, 5, 12), (1, 1, 12), lambda n, t, c: (n, c // 4), (12,), **so_far),
    Row("cumulative-running-nct", jn.CumulativeGroupNorm(axis=1, time_axis=-1, variance="running", epsilon=1e-3, activation="tanh"),
        (3, 12, 5), (1, 12, 1), lambda n, c, t: (n,), (12,), **so_far),
    Row("segments", packed("layer"), (48, 8), (1, 8), lambda m, c: (segment_ids(m),), (8,), **segments),
    Row("segments-group", packed("group", num_groups=2, activation="gelu"), (48, 12), (1, 12),
        lambda m, c: (segment_ids(m), c // 6), (12,), **segments),
    Row("segments-instance", packed("instance"), (20, 3, 4), (1, 1, 4), lambda m, t, c: (segment_ids(m), c), (4,), **segments),
    Row("segments-rms", packed("rms", scale_offset=1.0), (48, 8), (1, 8), lambda m, c: (segment_ids(m),), (8,),
        **segments | rms | dict(exempt=SEGMENTS | UNCENTERED)),
    Row("graph", jn.GraphNorm(num_segments=5), (20, 4), (1, 4), lambda m, c: (segment_ids(m), c), (4,),
        **segments | dict(oracle=oracle.graph_norm, exempt=SEGMENTS | FUSED)),
    Row("pair", jn.PairNorm(num_segments=5, output_scale=2.0), (20, 4), (1, 4), lambda m, c: (segment_ids(m),),
        **segments | dict(oracle=oracle.pair_norm, exempt=SEGMENTS | {NOT_NATIVE: FUSED[NOT_NATIVE]})),
    Row("pair-each", jn.PairNorm(num_segments=5, scale_individually=True), (20, 4), (1, 4), lambda m, c: (segment_ids(m),),
        **segments | dict(oracle=oracle.pair_norm, exempt=SEGMENTS | {NOT_NATIVE: FUSED[NOT_NATIVE]})),
    Row("mean-subtraction", jn.MeanSubtractionNorm(num_segments=5), (20, 4), (1, 4), lambda m, c: (segment_ids(m), c),
        **segments | dict(oracle=oracle.without_mean, exempt=SEGMENTS | FUSED)),
    Row("graph-size", jn.GraphSizeNorm(num_segments=5), (20, 4), (1, 4), lambda m, c: (segment_ids(m), c),
        **segments | dict(oracle=oracle.by_size, exempt=SEGMENTS | FUSED)),
    Row("diff-group", jn.DiffGroupNorm(init_groups=2, rate=0.5, scale_offset=1.0), (8, 3), (1, 3), lambda m, c: (0 * m,),
        oracle=oracle.diff_group, exempt=FUSED),
    Row("message", jn.MessageNorm(scale_offset=1.0), (20, 6), (1, 6), lambda m, c: (m,), oracle=oracle.message_norm,
        operands=lambda shape: {"message": residual(shape)["residual"]}, exempt=FUSED | PER_SAMPLE | {
            "test_only_x_is_saved_at_full_size": "the message is kept as well"}),
    Row("rev-in", jn.RevIN(), (5, 20, 4), (1, 1, 4), lambda n, t, c: (n, c), (4,), **window),
    Row("rev-in-last-nct", jn.RevIN(center="last", transform="arcsinh", stop_gradient=False, axis=1), (4, 3, 10), (1, 3, 1),
        lambda n, c, t: (n, c), (3,), **window),
    Row("rev-in-inverse", jn.RevIN(inverse=True, scale_offset=5.0), (4, 6, 3), (1, 1, 3), None, (3,),
        operands=lambda shape: {"stats": window_stats(shape)}, **window | dict(exempt=FUSED | PER_SAMPLE)),
    Row("running-rev-in", jn.RunningRevIN(), (2, 5, 4, 3), (1, 1, 1, 3), lambda n, p, t, c: (n, c),
        **window | dict(oracle=oracle.running_rev_in)),
    Row("dish-ts", jn.DishTS(init_length=2, epsilon=1e-4), (3, 2, 3), (1, 1, 3), lambda n, t, c: (n, c), (3,),
        **window | dict(oracle=oracle.dish_ts, exempt=FUSED)),
    Row("ada-layer", jn.AdaLayerNorm(use_scale=True, use_bias=True, scale_offset=1.0), _tokens, (1, 1, 40), lambda n, t, c: (n, t), (40,), **modulated(2)),
    Row("ada-rms-tokens", jn.AdaRMSNorm(parts="scale", modulation_offset=0.0, activation="silu"), _tokens, (1, 1, 40), lambda n, t, c: (n, t),
        **modulated(1, -1, True, **UNCENTERED, test_only_x_is_saved_at_full_size="the modulation of each token is of x's size")),
    Row("ada-group-nchw", jn.AdaGroupNorm(num_groups=3, axis=1, parts="shift scale"), _planes, (1, 12, 1, 1), lambda n, c, h, w: (n, c // 4),
        **modulated(2, 1)),
    Row("film", jn.FiLM(use_scale=True, axis=1, activation="tanh"), _planes, (1, 12, 1, 1), None, (12,),
        **modulated(2, 1, **UNCENTERED, **{NOT_NATIVE: "XLA fuses elementwise functions"})),
    Row("ada-instance", jn.AdaIN(), _image, (1, 1, 1, 12), lambda n, h, w, c: (n, c), oracle=oracle.like_style, exempt=PER_SAMPLE,
        operands=lambda shape: {"style": np.random.default_rng(7).normal(size=(*shape[:1], 7, *shape[-1:])).astype(np.float32) + 2}),
    Row("spade", jn.SPADE(inner=jn.GroupNorm(num_groups=3)), _image, (1, 1, 1, 12), lambda n, h, w, c: (n, c // 4),
        **modulated(2, -1, True, test_only_x_is_saved_at_full_size="the modulation of each pixel is of x's size",
        **{NOT_NATIVE: "without transposing"}, test_shifting_and_scaling_x_changes_nothing="epsilon is the inner norm's")),
    Row("dynamic-erf", jn.DynamicErf(), _tokens, (1, 1, 40), None, (40,), **squash | dict(oracle=oracle.dynamic_erf)),
    Row("layer-scale", jn.LayerScale(scale_offset=1.0), _tokens, (1, 1, 40), None, (40,), **squash | dict(oracle=oracle.layer_scale)),
    Row("act", jn.ActNorm(), _tokens, (1, 1, 40), None, (40,), applied=first_alone, **squash | dict(oracle=oracle.act_norm)),
    Row("act-inverse-nchw", jn.ActNorm(axis=1, shift_first=True, inverse=True), _planes, (1, 12, 1, 1), None, (12,),
        applied=first_alone, **squash | dict(oracle=oracle.act_norm)),
    Row("group-nhwc", jn.GroupNorm(num_groups=3), _image, (1, 1, 1, 12), lambda n, h, w, c: (n, c // 4), (12,)),
    Row("group-nchw", jn.GroupNorm(num_groups=3, axis=1), _planes, (1, 12, 1, 1), lambda n, c, h, w: (n, c // 4), (12,)),
    Row("group-size", jn.GroupNorm(group_size=6), (5, 7, 12), (1, 1, 12), lambda n, t, c: (n, c // 6), (12,)),
    Row("group-some-axes", jn.GroupNorm(num_groups=2, reduction_axes=(2, 3)), _image, (1, 1, 1, 12),
        lambda n, h, w, c: (n, h, c // 6), (12,)),
    Row("group-adaptive", jn.GroupNorm(num_groups=3), _image, (6, 1, 1, 12), lambda n, h, w, c: (n, c // 4),
        per_sample=True, exempt=PER_SAMPLE),
    Row("group-gelu-tanh", jn.GroupNorm(num_groups=3, axis=1, activation="gelu_tanh"), _planes, (1, 12, 1, 1),
        lambda n, c, h, w: (n, c // 4), (12,)),
    Row("instance-nhwc", jn.InstanceNorm(), _image, (1, 1, 1, 12), lambda n, h, w, c: (n, c), (12,)),
    Row("instance-nchw", jn.InstanceNorm(axis=1), _planes, (1, 12, 1, 1), lambda n, c, h, w: (n, c), (12,)),
    Row("instance-sequence", jn.InstanceNorm(scale_offset=1.0), (5, 30, 4), (1, 1, 4), lambda n, t, c: (n, c), (4,)),
    Row("batch-nhwc", jn.BatchNorm(), (16, 5, 4, 6), (1, 1, 1, 6), lambda n, h, w, c: (c,), (6,)),
    Row("batch-relu", jn.BatchNorm(activation="relu"), (16, 5, 4, 6), (1, 1, 1, 6), lambda n, h, w, c: (c,), (6,)),
    Row("batch-nchw", jn.BatchNorm(axis=1), (16, 6, 5, 4), (1, 6, 1, 1), lambda n, c, h, w: (c,), (6,)),
    Row("batch-flat", jn.BatchNorm(momentum=0.9, scale_offset=1.0), (48, 7), (1, 7), lambda n, c: (c,), (7,)),
    Row("batch-no-params", jn.BatchNorm(use_scale=False, use_bias=False), (48, 7), (1, 7), lambda n, c: (c,)),
    Row("batch-conditional", jn.BatchNorm(), (16, 5, 4, 6), (16, 1, 1, 6), lambda n, h, w, c: (c,),
        per_sample=True, exempt=PER_SAMPLE | {NOT_NATIVE: "without transposing"}),
    Row("batch-ghost", jn.BatchNorm(virtual_batch_size=8), (16, 9, 6), (1, 1, 6), ghosts(8), (6,), exempt=GHOSTS),
    Row("renorm", jn.BatchRenorm(r_max=1.5, d_max=0.5, axis=1, activation="relu"), (6, 4, 3), (1, 4, 1), lambda n, c, t: (c,), (4,),
        oracle=oracle.renormalize, exempt=FUSED),
    Row("domain", jn.DomainBatchNorm(num_domains=3), (9, 3, 6), (1, 1, 6), lambda n, t, c: (n * n % 3, c), (6,),
        exempt=SEGMENTS | {NOT_NATIVE: FUSED[NOT_NATIVE]}, operands=lambda shape: {"domain": np.arange(shape[0]) ** 2 % 3}),
    Row("rep", jn.RepBatchNorm(fade=0.25, scale_offset=1.0, activation="tanh"), (7, 4), (1, 4), lambda n, c: (0 * n,), (4,),
        oracle=oracle.rep_batch, exempt=FUSED | {"test_only_x_is_saved_at_full_size": "with an activation the sum is kept as well"}),
    Row("iter", jn.IterNorm(epsilon=0.5), (7, 3), (1, 3), lambda n, c: (0 * n,), (3,), oracle=oracle.whitened,
        exempt={NOT_NATIVE: FUSED[NOT_NATIVE]}),
    Row("batch-l1", jn.BatchNorm(spread="l1"), (8, 3, 6), (1, 1, 6), lambda n, t, c: (c,), (6,), oracle=oracle.over_absolute,
        exempt={NOT_NATIVE: FUSED[NOT_NATIVE]}),
    Row("batch-ghost-remainder", jn.BatchNorm(virtual_batch_size=6), (16, 9, 6), (1, 1, 6), ghosts(6), (6,),
        exempt=GHOSTS),
    Row("evo-s0", jn.EvoNormS(num_groups=3), (5, 4, 12), (1, 1, 12), lambda n, t, c: (n, c // 4), (12,), **evolved),
    Row("evo-s2-nchw", jn.EvoNormS(variant="S2", group_size=4, axis=1, scale_offset=1.0), (4, 12, 5), (1, 12, 1),
        lambda n, c, t: (n, c // 4), (12,), **evolved),
    Row("evo-b0", jn.EvoNormB(), (5, 9, 4), (1, 1, 4), lambda n, t, c: (c,), (4,), **evolved),
    Row("batch-instance", jn.BatchInstanceNorm(activation="silu"), (5, 9, 4), (1, 1, 4), lambda n, t, c: (c,), (4,),
        oracle=oracle.batch_and_instance, exempt=MIXED),
    Row("instance-batch", jn.InstanceBatchNorm(), (6, 9, 4), (1, 1, 4), lambda n, t, c: (np.where(c < 2, n, -1), c), (4,), calls=2),
    Row("switchable", jn.SwitchableNorm(axis=1), (3, 4, 9), (1, 4, 1), lambda n, c, t: (0 * n,), (4,), oracle=oracle.switched, exempt=MIXED),
]  # fmt: skip

BATCH_NORMS = [r for r in ROWS if isinstance(r.spec, jn.BatchNorm) and r.spec.spread == "std"]
by_name = {r.name: r for r in ROWS}
# One row for each mechanism of axes, parameters, statistics and roundings: for laws that cost much of each row.
MECHANISMS = {
    "layer": "the last axis", "layer-two-axes": "several axes", "layer-nchw": "an axis that kernels do not take",
    "layer-adaptive": "parameters per example", "layer-gelu": "an activation", "rms": "no mean",
    "dynamic-tanh": "no statistics", "response": "a formula of its own", "segments": "segments",
    "rms-per-head": "parameters of two axes", "rms-before-scale": "two roundings", "group-nhwc": "groups",
    "group-some-axes": "groups, with an axis kept", "instance-nhwc": "planes", "batch-nhwc": "columns",
    "batch-nchw": "columns that are planes", "batch-conditional": "columns, and parameters per example",
    "batch-ghost-remainder": "ghost batches, the last of them smaller",
}  # fmt: skip
EACH = [by_name[n] for n in ("layer", "rms", "group-nhwc", "instance-nhwc", "batch-nhwc")]  # one of each norm


def draw(rng: np.random.Generator, shape, mean=0.0, dtype=np.float32) -> np.ndarray:
    return (rng.normal(size=shape) + mean).astype(dtype)
