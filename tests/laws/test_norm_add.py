"""The norm of a part, added to the residual stream, with a gate and with the next norm: against models' code."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from catalogue import draw
from flax import nnx
from helpers.devices import mesh_of
from helpers.native import kernels_in
from helpers.transforms import ESSENTIAL, compare
from jax.sharding import PartitionSpec as P

import jaxnorm as jn
from jaxnorm import linen as jnn
from jaxnorm import nnx as jnnx

torch = pytest.importorskip("torch")
F = torch.nn.functional
KEY = jax.random.key(0)
ADDED = {"rms": jn.rms_norm_add, "layer": jn.layer_norm_add}
SHAPE, C = (3, 5, 16), 16
equal = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)


def drawn(rng):
    """x, residual, gate, and the parameters of both norms: scale, bias, and those of the next."""
    x, r = draw(rng, SHAPE, 1.0), draw(rng, SHAPE, -1.0)
    return x, r, draw(rng, (3, 1, C)), *(draw(rng, C, 1.0) for _ in range(4))


def ours(kind, x, r, gate, scale, bias, next_scale, next_bias, **options):
    y, stream = ADDED[kind](x, r, scale, bias, gate=gate, next=jn.Affine(next_scale, next_bias), **options)
    return jnp.concatenate([y, stream])


def theirs(kind, x, r, gate, scale, bias, next_scale, next_bias):
    """OLMo-core's PeriNorm block, with Lumina's gate."""
    norm = lambda x, s, b: F.layer_norm(x, (C,), s, b, 1e-6) if kind == "layer" else F.rms_norm(x, (C,), s, 1e-6) + b
    stream = r + gate * norm(x, scale, bias)
    return torch.cat([norm(stream, next_scale, next_bias), stream])


@pytest.mark.parametrize("kind", ADDED)
def test_peri_ln_with_a_gate_is_torch_s_with_all_gradients(kind, rng):
    args = drawn(rng)
    y, vjp = jax.vjp(jax.jit(functools.partial(ours, kind)), *args)
    tensors = [torch.tensor(a, requires_grad=True) for a in args]
    want, g = theirs(kind, *tensors), draw(rng, (6, *SHAPE[1:]))
    want.backward(torch.tensor(g))
    np.testing.assert_allclose(y, want.detach(), rtol=2e-6, atol=3e-6)
    for got, tensor in zip(vjp(jnp.asarray(g)), tensors, strict=True):
        np.testing.assert_allclose(got, tensor.grad, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ADDED)
def test_every_transformation_of_it_matches_a_plain_formula(kind, rng):
    """With the gate and all parameters as `params`, in float64."""

    def plain(params, x):
        r, gate, *affine = params

        def norm(x, s, b):
            d = x - x.mean(-1, keepdims=True) if kind == "layer" else x
            return d / jnp.sqrt((d * d).mean(-1, keepdims=True) + 1e-6) * s + b

        stream = r + gate * norm(x, *affine[:2])
        return jnp.concatenate([norm(stream, *affine[2:]), stream])

    with jax.enable_x64(True):
        x, v, *params = (rng.normal(size=s) for s in [(2, 1, 3)] * 3 + [(2, 1, 1)] + [(1, 1, 3)] * 4)
        dp, g = [rng.normal(size=np.shape(p)) for p in params], rng.normal(size=(4, 1, 3))
        f = lambda params, x: ours(kind, x, *params)
        names = [name for name in ESSENTIAL if "vmap" not in name]
        compare(f, plain, names, params, x, v, dp, g, rtol=1e-6, atol=1e-8)


def olmo2(h, x, w):
    """Hugging Face: the norm is rounded, then added."""
    n = x.float()
    n = n * torch.rsqrt(n.pow(2).mean(-1, keepdim=True) + 1e-6)
    return h + (w * n).to(x.dtype)


def glm4(h, x, w):
    """Its norm is Llama's, which rounds before the scale as well."""
    n = x.float()
    n = n * torch.rsqrt(n.pow(2).mean(-1, keepdim=True) + 1e-6)
    return h + w.to(x.dtype) * n.to(x.dtype)


@pytest.mark.parametrize(("cast", "model"), [("before_add", olmo2), ("before_scale", glm4)])
def test_casts_before_the_sum_are_hugging_face_s_to_the_bit(cast, model, rng):
    x, r = (draw(rng, (64, 32), dtype=ml_dtypes.bfloat16) for _ in range(2))
    w = draw(rng, 32, 1.0, ml_dtypes.bfloat16).astype("f")
    for wrap in (lambda f: f, jax.jit):
        stream = wrap(lambda x, r: jn.rms_norm_add(x, r, w, cast=cast, implementation="xla"))(x, r)
        half = lambda a: torch.tensor(a.astype("f")).to(torch.bfloat16)
        np.testing.assert_array_equal(np.asarray(stream, "f"), model(half(r), half(x), torch.tensor(w)).float())


def test_by_default_the_sum_is_rounded_once_to_the_stream_s_dtype(rng):
    x, r = (draw(rng, (64, 32), dtype=ml_dtypes.bfloat16) for _ in range(2))
    once = np.asarray(jn.rms_norm(x.astype("f")) + r.astype("f"), ml_dtypes.bfloat16)
    stream = np.asarray(jn.rms_norm_add(x, r))
    assert np.mean(stream != once) < 1e-3  # a float32 rounding that is a tie
    assert np.mean(np.asarray(jn.rms_norm_add(x, r, cast="before_add")) != once) > 0.01
    y, stream = jn.rms_norm_add(x, r.astype("f"), next=jn.Affine(None, None))
    assert (y.dtype, stream.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("kind", ADDED)
def test_the_next_norm_is_that_of_the_stream_as_returned(kind, rng):
    x, r, _, *affine = (jnp.asarray(a, jnp.bfloat16) for a in drawn(rng))
    y, stream = ADDED[kind](x, r, *affine[:2], next=jn.Affine(*affine[2:]), activation="silu")
    equal(stream, ADDED[kind](x, r, *affine[:2]))
    norm = {"rms": jn.rms_norm, "layer": jn.layer_norm}[kind]
    equal(y, norm(stream, *affine[2:], activation="silu"))
    equal(ADDED[kind](x, r, *affine[:2], next={"scale": affine[2]})[0], norm(stream, affine[2]))


def test_x_the_gate_and_the_stream_of_the_next_norm_are_kept_and_no_more(rng):
    x, r, _, scale, *_ = (jnp.asarray(a, jnp.bfloat16) for a in drawn(rng))
    full = jnp.ones(SHAPE, jnp.bfloat16)

    def kept(f, *args):
        leaves = jax.tree.leaves(jax.eval_shape(lambda *args: jax.vjp(f, *args)[1], *args))
        return [a.dtype for a in leaves if a.size >= x.size]

    following = jn.Affine(scale, None)
    assert kept(lambda x, r, s: jn.rms_norm_add(x, r, s), x, r, scale) == [jnp.bfloat16]
    assert kept(lambda x, r, s: jn.rms_norm_add(x, r, s, next=following), x, r, scale) == [jnp.bfloat16] * 2
    assert kept(lambda x, r, g: jn.rms_norm_add(x, r, gate=g), x, r, full) == [jnp.bfloat16] * 2


def test_both_norms_run_as_kernels(kernels, rng):
    if not kernels:
        pytest.skip("for the native backend")
    x, r, gate, *affine = drawn(rng)
    f = lambda x, r: jn.layer_norm_add(x, r, *affine[:2], next=jn.Affine(*affine[2:]))
    assert kernels_in(f, x, r) == ["forward"] * 2
    assert kernels_in(lambda x, r: jn.rms_norm_add(x, r, affine[0], gate=gate), x, r) == ["forward"]


def test_poison_in_x_reaches_no_valid_output_and_no_gradient(rng):
    x, r, gate, *affine = drawn(rng)
    mask = np.arange(5) < np.array([[5], [2], [3]])
    bad, g = (np.where(mask[..., None], a, np.float32(b)) for a, b in ((x, np.nan), (draw(rng, SHAPE), 0)))

    def gradients(x):
        f = lambda *args: ADDED["rms"](*args, gate=gate, next=jn.Affine(*affine[2:]), mask=mask)
        out, vjp = jax.vjp(f, x, r, affine[0])
        return out, vjp((g, g))

    (out, found), (clean, want) = gradients(bad), gradients(x)
    for got, true in zip(out, clean, strict=True):
        equal(got[mask], true[mask])
        assert np.isfinite(got).all()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), found, want)


def test_layers_keep_the_next_norm_under_its_own_name(rng):
    x, r, gate, scale, _, next_scale, _ = drawn(rng)
    variables = {"params": {"scale": scale, "next": {"scale": next_scale}}}
    want = jn.rms_norm_add(x, r, scale, next=jn.Affine(next_scale, None), gate=gate)
    layer = jnn.RMSNormAdd(use_next=True)
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    assert shapes(layer.init(KEY, x, r)) == shapes(variables)
    equal(layer.apply(variables, x, r, gate=gate), want)
    model = jnnx.RMSNormAdd(C, use_next=True, rngs=nnx.Rngs(0))
    model.scale[...], model.next.scale[...] = scale, next_scale
    equal(model(x, r, gate=gate), want)
    equal(jn.RMSNormAdd(use_next=True).apply(variables["params"], (), x, r, gate=gate)[0], want)
    names = {"scale": "post_attention_layernorm/weight", "next_scale": "pre_feedforward_layernorm/weight"}
    params = jnn.RMSNormAdd(use_next=True, param_names=names, scale_offset=1.0).init(KEY, x, r)["params"]
    assert sorted(params) == ["post_attention_layernorm", "pre_feedforward_layernorm"]
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(params))
    plain = jnn.LayerNormAdd().init(KEY, x, r)["params"]
    assert sorted(plain) == ["bias", "scale"]
    equal(jnn.LayerNormAdd().apply({"params": plain}, x, r), jn.layer_norm_add(x, r, **plain))


def test_sharded_and_mapped_it_is_that_of_one_device(rng):
    x, r = draw(rng, (16, C), 1.0), draw(rng, (1, C))
    f = lambda x, r: jn.rms_norm_add(x, jnp.broadcast_to(r, x.shape), next=jn.Affine(None, None))
    want, close = f(x, r), lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    mesh = mesh_of("auto")
    mapped = jax.shard_map(f, mesh=mesh, in_specs=(P("data"), P()), out_specs=(P("data"), P("data")))
    jax.tree.map(close, jax.jit(mapped)(x, r), want)
    over = jax.vmap(lambda x, r: jn.rms_norm_add(x, r, axis_name="c"), in_axes=-1, out_axes=-1, axis_name="c")
    split = lambda a: np.broadcast_to(a, x.shape).reshape(16, 8, 2)
    close(np.asarray(over(split(x), split(r))).reshape(x.shape), want[1])


@pytest.mark.parametrize(("call", "message"), [
    (lambda x: jn.rms_norm_add(x, x[:1]), r"rms_norm_add: residual must have x's shape"),
    (lambda x: jn.layer_norm_add(x, x, gate=np.ones(7)), r"layer_norm_add: gate of shape \(7,\) does not broadcast"),
    (lambda x: jn.rms_norm_add(x, x, cast="after_scale"), "rms_norm_add: cast must be one of"),
    (lambda x: jn.LayerNormAdd(cast=1), r"LayerNormAdd: cast must be one of .* got 1"),
    (lambda x: jn.rms_norm_add(x, x, activation="silu"), r"rms_norm_add: activation='silu' is of the next norm"),
    (lambda x: jn.rms_norm_add(x, x, next=np.ones(8)), r"rms_norm_add: params must be jaxnorm\.Affine\(scale, bias\)"),
])  # fmt: skip
def test_a_wrong_call_is_explained(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(np.ones((2, 8), "f"))
