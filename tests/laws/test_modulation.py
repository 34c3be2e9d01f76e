"""Scale, shift and gate from a condition: against the models' own code, in one kernel call, wherever the batch is."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.devices import MESHES, close, mesh_of, placed
from helpers.jit import jit_unoptimized
from helpers.native import kernels_in
from jax.sharding import PartitionSpec as P

import jaxnorm as jn
from jaxnorm import linen as jnn
from jaxnorm import nnx as jnnx
from jaxnorm._backends import cpu

B, T, C, K = 3, 5, 24, 7


# --- the models' arithmetic, transcribed, in float64 ------------------------------------------------------------------


def silu(a):
    return a / (1.0 + np.exp(-a))


def layer(x, epsilon, axes=(-1,)):
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + epsilon)


def rms(x, epsilon):
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + epsilon)


def groups(x, number, epsilon):
    split = x.reshape(*x.shape[:-1], number, -1)
    return layer(split, epsilon, (*range(1, x.ndim - 1), -1)).reshape(x.shape)


def dit(x, c, kernel, bias):
    """DiTBlock: adaLN_modulation = SiLU, Linear; chunk(6): shift, scale, gate of attention, then of the MLP."""
    shift, scale, gate, *_ = np.split(silu(c) @ kernel + bias, 6, -1)
    return layer(x, 1e-6) * (1 + scale[:, None]) + shift[:, None], gate[:, None]


def diffusers_continuous(x, c, kernel, bias, weight, own):
    """AdaLayerNormContinuous: scale, shift = chunk(linear(silu(c)), 2); norm with weight and bias of its own."""
    scale, shift = np.split(silu(c) @ kernel + bias, 2, -1)
    return (layer(x, 1e-5) * weight + own) * (1 + scale)[:, None, :] + shift[:, None, :]


def diffusers_group(x, c, kernel, bias):
    """AdaGroupNorm (channels last): scale, shift = chunk(linear(c), 2); group_norm without parameters."""
    scale, shift = np.split(silu(c) @ kernel + bias, 2, -1)
    return groups(x, 4, 1e-5) * (1 + scale[:, None]) + shift[:, None]


def pixart(x, c, table):
    """PixArt: shift, scale, gate of the first branch = (table[None] + c.reshape(B, 6, C)).chunk(6, dim=1)[:3]."""
    shift, scale, gate, *_ = np.split(table[None] + c.reshape(B, 6, C), 6, 1)
    return layer(x, 1e-6) * (1 + scale) + shift, gate


def openpi(x, c, kernel, bias):
    """RMSNorm of pi0.5: scale, shift, gate = split(Dense(3 * width, zeros)(cond), 3)."""
    scale, shift, gate = np.split((c @ kernel + bias)[:, None], 3, -1)
    return rms(x, 1e-6) * (1 + scale) + shift, gate


def lumina(x, c, kernel, bias):
    """LuminaRMSNormZero: scale, gate = chunk(linear(silu(emb)), 4)[:2]."""
    scale, gate, *_ = np.split(silu(c) @ kernel + bias, 4, -1)
    return rms(x, 1e-5) * (1 + scale[:, None]), gate[:, None]


def film(x, c, kernel, bias):
    gamma, beta = np.split(c @ kernel + bias, 2, -1)
    return (1 + gamma)[:, None] * x + beta[:, None]


def spatial(x, c, kernel, bias, weight, own):
    """SpatialNorm: norm(f) * conv_y(zq) + conv_b(zq), both convolutions 1x1; norm with parameters."""
    y, b = np.split(c @ kernel + bias, 2, -1)
    return (groups(x, 4, 1e-6) * weight + own) * y + b


def draw(rng, *shape):
    return rng.normal(size=shape)


def cases():
    """Name: what the model computes of (x, c, parameters), the spec, and its parameters from those of the model."""
    dense = lambda parts: lambda rng: (draw(rng, K, parts * C), draw(rng, parts * C))
    own = lambda rng: (*dense(2)(rng), draw(rng, C), draw(rng, C))
    affine = lambda p: dict(condition_kernel=p[0], condition_bias=p[1])
    first = lambda parts: lambda p: dict(condition_kernel=p[0][:, : parts * C], condition_bias=p[1][: parts * C])
    with_own = lambda p: affine(p) | dict(scale=p[2], bias=p[3])
    condition, image = (B, K), (B, T, K)
    return {
        "DiT": (dit, jn.AdaLayerNormZero(condition_features=K), condition, dense(6), first(3)),
        "diffusers continuous": (diffusers_continuous, jn.AdaLayerNorm(condition_features=K, epsilon=1e-5,
            use_scale=True, use_bias=True), condition, own, with_own),
        "diffusers group": (diffusers_group, jn.AdaGroupNorm(num_groups=4, condition_features=K), condition, dense(2),
            affine),
        "PixArt": (pixart, jn.AdaLayerNormSingle(), (B, 6 * C), lambda rng: (draw(rng, 6, C),),
            lambda p: dict(table=p[0][:3])),
        "openpi": (openpi, jn.AdaRMSNorm(condition_features=K), condition, dense(3), affine),
        "Lumina": (lumina, jn.AdaRMSNorm(condition_features=K, parts="scale gate", condition_activation="silu",
            epsilon=1e-5), condition, dense(4), first(2)),
        "FiLM": (film, jn.FiLM(condition_features=K), condition, dense(2), affine),
        "SpatialNorm": (spatial, jn.SPADE(inner=jn.GroupNorm(num_groups=4), condition_features=K, modulation_offset=0.0,
            use_scale=True, use_bias=True), image, own, with_own),
    }  # fmt: skip


CASES = cases()


def condition_of(name, c):
    return c[:, : 3 * C] if name == "PixArt" else c  # of its six parts the three of one norm


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_the_model(name, rng):
    """In float32 against float64; gradients of x, the condition and every parameter, by central differences."""
    model, spec, of_condition, drawn, ours = CASES[name]
    x, c, given = draw(rng, B, T, C), draw(rng, *of_condition), drawn(rng)
    assert jax.tree.map(jnp.shape, spec.init(C)[0]) == spec.Params(**{
        field: np.shape(ours(given).get(field)) if field in ours(given) else None for field in spec.Params._fields
    })  # fmt: skip
    outputs = lambda y: y if isinstance(y, tuple) else (y,)

    @jax.jit
    def run(x, c, params):
        y, state = spec.apply(
            spec.Params(**{**dict.fromkeys(spec.Params._fields), **params}), (), x, condition_of(name, c)
        )
        assert state == ()
        return outputs(y)

    single = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (x, c, ours(given)))
    found, vjp = jax.vjp(run, *single)
    want = outputs(model(x, c, *given))
    for a, b in zip(found, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
    weights = [draw(rng, *a.shape) for a in found]
    dx, dc, dparams = vjp(tuple(jnp.asarray(w, jnp.float32) for w in weights))
    loss = lambda x, c, *given: sum((w * y).sum() for w, y in zip(weights, outputs(model(x, c, *given)), strict=True))
    for _ in range(3):  # along random directions
        tx, tc, *tp = (draw(rng, *a.shape) for a in (x, c, *given))
        step = lambda e: loss(x + e * tx, c + e * tc, *(p + e * t for p, t in zip(given, tp, strict=True)))  # noqa: B023
        slope = (step(1e-5) - step(-1e-5)) / 2e-5
        ours_slope = (dx * tx).sum() + (dc * tc).sum()
        ours_slope += sum(
            (d * t).sum() for d, t in zip(jax.tree.leaves(dparams), jax.tree.leaves(ours(tp)), strict=True)
        )
        size = np.abs(np.asarray(dx)).sum() + sum(np.abs(np.asarray(d)).sum() for d in jax.tree.leaves(dparams))
        np.testing.assert_allclose(ours_slope, slope, rtol=1e-3, atol=1e-5 * float(size))


@pytest.mark.parametrize("name", CASES)
def test_flax_layers_are_the_spec(name, rng):
    _, spec, of_condition, _, _ = CASES[name]
    x, c = (np.asarray(draw(rng, *s), np.float32) for s in ((B, T, C), of_condition))
    c = condition_of(name, c)
    options = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec) if getattr(spec, f.name) != f.default}
    init = {
        f"{p}_init": nn.initializers.normal(1.0) for p in spec.Params._fields if getattr(spec.init(C)[0], p) is not None
    }
    layer = getattr(jnn, type(spec).__name__)(**options, **init)
    y, variables = layer.init_with_output(jax.random.key(0), x, c)
    params = spec.Params(**{p: variables["params"].get(p) for p in spec.Params._fields})
    assert all(float(jnp.abs(p).max()) > 0 for p in jax.tree.leaves(params))
    want = spec.apply(params, (), x, c)[0]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), y, want)
    theirs = getattr(jnnx, type(spec).__name__)(C, **options, rngs=nnx.Rngs(0))
    for p in init:
        getattr(theirs, p.removesuffix("_init"))[...] = getattr(params, p.removesuffix("_init"))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), theirs(x, c), want)
    first = jnn.Norm(spec).init(jax.random.key(0), x, c)
    jax.tree.map(np.testing.assert_array_equal, first.get("params", {}), {
        p: v for p, v in spec.init(C)[0]._asdict().items() if v is not None
    })  # fmt: skip


def test_a_block_starts_as_the_identity_and_a_norm_as_the_plain_one(rng):
    x, c = jnp.asarray(draw(rng, B, T, C), jnp.float32), draw(rng, B, K).astype("f")
    first = lambda spec: spec.apply(*spec.init(C), x, c)[0]
    y, gate = first(jn.AdaLayerNormZero(condition_features=K))
    np.testing.assert_array_equal(gate, np.zeros((B, 1, C)))
    np.testing.assert_array_equal(y, jn.layer_norm(x))
    np.testing.assert_array_equal(
        first(jn.AdaGroupNorm(num_groups=4, condition_features=K)), jn.group_norm(x, num_groups=4, epsilon=1e-5)
    )
    np.testing.assert_array_equal(first(jn.AdaRMSNorm(condition_features=K))[0], jn.rms_norm(x))
    np.testing.assert_array_equal(first(jn.FiLM(condition_features=K, modulation_offset=0.0)), x)


# --- styles, classes, maps --------------------------------------------------------------------------------------------


def test_ada_in_has_the_statistics_of_the_style(rng):
    x, style = draw(rng, 2, 4, 3, 6), draw(rng, 2, 5, 6) * 3 + 1
    want = layer(x, 1e-5, (1, 2)) * np.sqrt(style.var(1) + 1e-5)[:, None, None] + style.mean(1)[:, None, None]
    f32 = lambda a: jnp.asarray(a, jnp.float32)
    np.testing.assert_allclose(jn.ada_instance_norm(f32(x), f32(style)), want, rtol=1e-5, atol=1e-5)
    first = jn.ada_instance_norm(f32(np.moveaxis(x, -1, 1)), f32(np.moveaxis(style, -1, 1)), axis=1)
    np.testing.assert_allclose(np.moveaxis(first, 1, -1), want, rtol=1e-5, atol=1e-5)
    padded = f32(np.concatenate([style, np.full((2, 3, 6), np.nan)], 1))
    keep = np.arange(8)[None, :, None] < 5
    of_style = lambda s: jn.ada_instance_norm(f32(x), s, style_mask=jnp.broadcast_to(keep, s.shape))
    np.testing.assert_allclose(of_style(padded), want, rtol=1e-5, atol=1e-5)
    d = jax.grad(lambda s: (of_style(s) * f32(x)).sum())(padded)
    np.testing.assert_array_equal(d[:, 5:], 0.0)
    # dL/dstyle = (sum(g) + (style - mean) / deviation sum(g xhat)) / n
    over = lambda a: a.sum((1, 2))[:, None]
    xhat, centered = layer(x, 1e-5, (1, 2)), style - style.mean(1, keepdims=True)
    truth = (over(x) + centered / np.sqrt(style.var(1, keepdims=True) + 1e-5) * over(x * xhat)) / 5
    np.testing.assert_allclose(d[:, :5], truth, rtol=1e-4, atol=1e-4)
    flat = jax.grad(lambda s: jn.ada_instance_norm(f32(x), s, epsilon=0.0).sum())(jnp.ones((2, 5, 6)))
    assert np.isfinite(flat).all()


@pytest.mark.parametrize(
    "inner",
    [jn.InstanceNorm(epsilon=1e-5), jn.BatchNorm(momentum=0.5), jn.GroupNorm(num_groups=2, axis=1)],
    ids=lambda s: type(s).__name__,
)
def test_a_class_has_its_own_scale_and_bias(inner, rng):
    """Example by example it is the norm with that row's parameters; weights mix the rows."""
    x, labels = jnp.asarray(draw(rng, 4, 6, 3, 6), jnp.float32), np.array([2, 0, 2, 1])
    tables = jn.Affine(*(jnp.asarray(draw(rng, 3, 6), jnp.float32) for _ in range(2)))
    norm = jn.ConditionalNorm(inner=inner, num_classes=3)
    assert jax.tree.map(jnp.shape, norm.init(6)[0]) == jn.Affine((3, 6), (3, 6))
    state = norm.init(6)[1]
    assert jax.tree.structure(state) == jax.tree.structure(inner.init(6)[1])
    y, new = norm.apply(tables, state, x, labels, train=True)
    for label in range(3):
        row = jn.Affine(tables.scale[label], tables.bias[label])
        want, of_inner = inner.apply(row, state, x, train=True)
        np.testing.assert_allclose(y[labels == label], want[labels == label], rtol=1e-5, atol=1e-5)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), new, of_inner)
    mixed, _ = norm.apply(tables, state, x, jax.nn.one_hot(labels, 3), train=True)
    np.testing.assert_allclose(mixed, y, rtol=1e-5, atol=1e-5)
    d = jax.grad(lambda t: norm.apply(t, state, x, labels, train=True)[0].sum())(tables)
    np.testing.assert_allclose(
        d.bias, np.bincount(labels, minlength=3)[:, None] * np.full((3, 6), x.size / 24), rtol=1e-5
    )
    traced = jax.jit(lambda labels: norm.apply(tables, state, x, labels, train=True)[0])(np.array([9, 0, -1, 1]))
    assert np.isnan(traced[0]).all(), "no row of the tables"
    assert np.isnan(traced[2]).all(), "no row of the tables"
    np.testing.assert_allclose(traced[3], y[3], rtol=1e-5, atol=1e-5)


def test_layers_of_a_nested_norm_have_its_state(rng):
    x, labels = jnp.asarray(draw(rng, 4, 5, 6), jnp.float32), np.array([2, 0, 2, 1])
    inner = jn.BatchNorm(momentum=0.5, axis_name="data")  # which is not bound while initializing
    layer = jnn.ConditionalNorm(inner=inner, num_classes=3)
    variables = layer.init(jax.random.key(0), x, labels, use_running_average=False)
    alone = layer.clone(inner=jn.BatchNorm(momentum=0.5))
    _, new = alone.apply(variables, x, labels, use_running_average=False, mutable=["batch_stats"])
    np.testing.assert_allclose(new["batch_stats"]["mean"], 0.5 * x.mean((0, 1)), rtol=1e-5, atol=1e-6)
    theirs = jnnx.SPADE(6, inner=jn.BatchNorm(momentum=0.5), rngs=nnx.Rngs(0))
    m = draw(rng, 4, 5, 12).astype("f")
    y = theirs(x, m)
    np.testing.assert_allclose(theirs.mean[...], new["batch_stats"]["mean"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(y, layer_of_columns(x) * (1 + m[..., :6]) + m[..., 6:], rtol=1e-4, atol=1e-5)
    plain = jnn.ConditionalNorm(num_classes=3)  # instance norm: no state, and no use_running_average
    assert set(plain.init(jax.random.key(0), x, labels)) == {"params"}


def layer_of_columns(x):
    return layer(np.asarray(x, np.float64), 1e-5, (0, 1))


# --- one kernel call, any place of the batch --------------------------------------------------------------------------

MODULATED = {
    "layer": jn.ada_layer_norm,
    "rms": functools.partial(jn.ada_rms_norm, parts="scale shift"),
    "group": functools.partial(jn.ada_group_norm, num_groups=4),
    "layer with its own": lambda x, m: jn.ada_layer_norm(x, m, jnp.full(x.shape[-1:], 2.0), jnp.ones(x.shape[-1:])),
}


@pytest.mark.skipif(not cpu.library().loaded, reason=cpu.library().reason)
@pytest.mark.parametrize("name", MODULATED)
def test_a_modulated_norm_is_one_kernel_call_with_all_of_its_gradients(name, rng):
    x, m = (jnp.asarray(draw(rng, *s), jnp.bfloat16) for s in ((4, 64, 128), (4, 256)))
    f = MODULATED[name]
    assert kernels_in(f, x, m.astype(jnp.float32)) == ["forward"]
    loss = lambda x, m: (f(x, m).astype(jnp.float32) ** 2).sum()
    assert kernels_in(jax.grad(loss, (0, 1)), x, m.astype(jnp.float32)) == ["forward", "backward"]


@pytest.mark.parametrize("kind", MESHES)
@pytest.mark.parametrize("name", MODULATED)
def test_a_sharded_batch_is_not_gathered(name, kind, rng):
    x, m = (jnp.asarray(draw(rng, *s), jnp.float32) for s in ((8, 16, 32), (8, 64)))
    both = jit_unoptimized(jax.value_and_grad(lambda *a: jnp.sin(MODULATED[name](*a)).sum(), (0, 1)))
    want, args = both(x, m), placed(mesh_of(kind), (x, P("data")), (m, P("data")))
    assert "all-gather" not in both.lower(*args).compile().as_text()
    close(both(*args), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODULATED)
def test_vmap_and_half_precision_agree(name, rng):
    x, m = (jnp.asarray(draw(rng, *s), jnp.float32) for s in ((8, 16, 32), (8, 64)))
    f = MODULATED[name]
    both = lambda x, m: jax.value_and_grad(lambda *a: jnp.sin(f(*a)).sum(), (0, 1))(x, m)
    want = jit_unoptimized(both)(x, m)
    each = jit_unoptimized(jax.vmap(lambda x, m: both(x[None], m[None])))(x, m)
    close(each[0].sum(), want[0], rtol=1e-4)
    close(jax.tree.map(lambda a: a[:, 0], each[1]), want[1], rtol=1e-4, atol=1e-4)
    half = x.astype(jnp.bfloat16)
    y = f(half, m)  # the modulation stays in float32, and is rounded once with y
    assert y.dtype == jnp.bfloat16
    truth = np.asarray(f(half.astype(jnp.float32), m), np.float64)
    assert np.all(np.abs(np.asarray(y, np.float64) - truth) <= 2.0**-8 * np.abs(truth) + 1e-5)
    assert jax.grad(lambda m: f(half, m).astype(jnp.float32).sum())(m).dtype == jnp.float32


# --- parts, and what is wrong -----------------------------------------------------------------------------------------


def test_parts_are_named_in_the_order_of_the_model():
    c = jnp.arange(12.0)[None]
    attention, mlp = jn.modulation(c, 6, "shift scale gate")
    assert {k: v.tolist() for k, v in attention.items()} == {"shift": [[0, 1]], "scale": [[2, 3]], "gate": [[4, 5]]}
    assert mlp["shift"].tolist() == [[6, 7]]
    assert jn.modulation(c, 3, ["a", "b", "c"])["c"].tolist() == [[8, 9, 10, 11]]
    x = jnp.arange(6.0).reshape(1, 3, 2)
    y, gate = jn.ada_layer_norm_zero(x, c[:, :6])
    np.testing.assert_array_equal(y, jn.ada_layer_norm_zero(x, attention)[0])
    assert gate.shape == (1, 1, 2)
    assert jn.AdaLayerNorm(parts=("scale", "shift")) == jn.AdaLayerNorm()


def test_a_modulation_is_put_at_x_s_leading_axes(rng):
    """(B, C), also where B is the number of tokens; per token; of x's rank; channels first."""
    x = jnp.asarray(draw(rng, 4, 4, 6), jnp.float32)
    m = {"scale": jnp.asarray(draw(rng, 4, 6), jnp.float32)}
    want = jn.layer_norm(x) * (1 + m["scale"][:, None])
    for part in (m["scale"], m["scale"][:, None], jnp.broadcast_to(m["scale"][:, None], x.shape)):
        np.testing.assert_allclose(jn.ada_layer_norm(x, {"scale": part}), want, rtol=1e-5, atol=1e-6)
    first = jn.ada_layer_norm(jnp.moveaxis(x, -1, 1), m, axis=1)
    np.testing.assert_allclose(jnp.moveaxis(first, 1, -1), want, rtol=1e-5, atol=1e-6)


X = np.ones((2, 3, 4), np.float32)
TABLES = jn.ConditionalNorm(num_classes=3).init(4)[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jn.ada_layer_norm(X, {"scale": np.ones((3, 4))}),
            r"scale of shape \(3, 4\) .*scale\.reshape\(\(1, 3, 4\)\)"),
        (lambda: jn.ada_layer_norm(X, {"shift": np.ones((2, 8))}), r"jaxnorm\.modulation\(shift, 2, "),
        (lambda: jn.ada_layer_norm(X.reshape(6, 4), {"scale": np.ones((2, 4))}), r"Write x\.reshape\(\(2, 3, 4\)\)"),
        (lambda: jn.ada_layer_norm(X, {"scael": np.ones((2, 4))}), "parts scale, shift, gate, got scael"),
        (lambda: jn.ada_layer_norm(X, np.ones((2, 24))), r"modulation\(c, 6, 'scale shift'\)"),
        (lambda: jn.AdaLayerNorm().apply(None, (), X, np.ones((2, 5))), "condition_features=5"),
        (lambda: jn.AdaLayerNorm(condition_features=3).apply(jn.AdaLayerNorm(condition_features=3).init(4)[0], (), X,
            np.ones((2, 5))), r"must have the 3 features .*condition_features=5"),
        (lambda: jn.ada_layer_norm_zero(X, {}), "has no gate"),
        (lambda: jn.AdaLayerNorm(parts="shift sclae"), "each once; got 'shift sclae'"),
        (lambda: jn.AdaLayerNorm(condition_features=0), "condition_features must be an int >= 1"),
        (lambda: jn.modulation(X, 3, "shift scale"), r"multiple of the 2 names .*modulation\(c, 2,"),
        (lambda: jn.modulation(X, 6, "shift scale"), r"parts=6 does not divide .*Dense\(6 \* channels\)"),
        (lambda: jn.modulation(X, 2, "shift shift"), "each once"),
        (lambda: jn.ada_layer_norm_single(X, np.ones((2, 12)), np.ones((6, 4))),
            r"a row for each .*jnp\.split\(table, 2\)"),
        (lambda: jn.ada_instance_norm(X, np.ones((2, 3, 5))), "x's 4 channels"),
        (lambda: jn.ConditionalNorm().init(4), r"ConditionalNorm\(num_classes=10\)"),
        (lambda: jn.conditional_norm(X, np.array([0, 3]), TABLES), "num_classes=4"),
        (lambda: jn.conditional_norm(X, np.array([0]), TABLES), r"reshape\(2\)"),
        (lambda: jn.conditional_norm(X, np.ones((2, 2)), TABLES), r"one_hot\(labels, 3\)"),
        (lambda: jn.spade(X, np.ones((2, 3, 12)), parts="shift scale gate"), "a gate has no place"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "inner", [jn.DynamicTanh(), jn.RMSNorm(scale_offset=1.0), jn.ConditionalNorm(), "batch"], ids=str
)
def test_only_a_norm_with_a_scale_and_a_bias_is_modulated(inner):
    for spec in (jn.SPADE, jn.ConditionalNorm):
        with pytest.raises(TypeError, match=r"must be a spec with a scale and a bias alone.*inner=jaxnorm\.BatchNorm"):
            spec(inner=inner)
