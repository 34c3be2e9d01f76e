"""Norms that are calls of other norms, against the code of the models that have them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import draw
from flax import nnx

import jaxnorm as jn
from jaxnorm import linen as jnn
from jaxnorm import nnx as jnnx

torch = pytest.importorskip("torch")
F = torch.nn.functional
KEY = jax.random.key(0)
near = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=3e-6)
of_torch = lambda f, *arrays: f(*map(torch.tensor, arrays)).numpy()

# --- QK norm ----------------------------------------------------------------------------------------------------------

B, T, H, K, D = 2, 5, 6, 2, 8  # K heads of k


def queries_keys(rng):
    return draw(rng, (B, T, H, D), 1.0), draw(rng, (B, T + 2, K, D), -2.0)


def test_qk_norm_over_all_heads_is_olmo_2_s_norm_of_the_flat_array(rng):
    """Before heads are split: its scales are flat, and fewer heads of k have a shorter one."""
    q, k = queries_keys(rng)
    scales = draw(rng, H * D), draw(rng, K * D)
    got = jn.qk_norm(q, k, *scales, axis=(-2, -1))
    for y, x, scale in zip(got, (q, k), scales, strict=True):
        flat = x.reshape(*x.shape[:2], -1)
        near(y.reshape(flat.shape), of_torch(lambda x, s: F.rms_norm(x, s.shape, s, 1e-6), flat, scale))
    swapped = jn.qk_norm(*(a.swapaxes(1, 2) for a in (q, k)), *scales, axis=(1, 3))  # (B, H, T, D)
    jax.tree.map(lambda a, b: near(a.swapaxes(1, 2), b), swapped, got)


def test_qk_norm_of_each_head_is_qwen_3_s_to_the_bit_and_vit_22b_s(rng):
    q, k = queries_keys(rng)
    scale = draw(rng, D, 1.0)

    def qwen(x, weight):
        x = x.to(torch.bfloat16)
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (weight.to(torch.bfloat16) * h.to(torch.bfloat16)).float()

    half = [jnp.asarray(a, jnp.bfloat16) for a in (q, k, scale)]
    got = jn.qk_norm(*half, half[2], cast="before_scale", implementation="xla")
    for y, x in zip(got, (q, k), strict=True):
        np.testing.assert_array_equal(np.asarray(y, "f"), of_torch(qwen, x, scale))
    bias = draw(rng, D)
    got = jn.qk_norm(q, k, scale, 2 * scale, bias, 3 * bias, kind="layer")
    for y, x, s, b in zip(got, (q, k), (scale, 2 * scale), (bias, 3 * bias), strict=True):
        near(y, of_torch(lambda x, s, b: F.layer_norm(x, (D,), s, b, 1e-6), x, s, b))


def test_qk_norm_of_unit_length_has_a_temperature_in_place_of_the_softmax_scale(rng):
    q, k = queries_keys(rng)
    norm = jn.QKNorm(kind="l2", epsilon=0.0, use_scale=False, use_temperature=True, init_temperature=20.0)
    params, state = norm.init(D)
    assert [p is not None for p in params] == [False] * 4 + [True]
    loss = lambda params: jnp.sum(norm.apply(params, state, q, k)[0][0][..., 0])
    (y, z), _ = norm.apply(params, state, q, k)
    near(y / 20.0, of_torch(lambda x: F.normalize(x, dim=-1), q))
    near(z, of_torch(lambda x: F.normalize(x, dim=-1), k))
    near(jax.grad(loss)(params).temperature, np.sum(y[..., 0] / 20.0, dtype="f"))


def test_layers_of_qk_norm_have_the_names_and_shapes_of_models(rng):
    """`q_norm/scale` and `k_norm/scale`: a checkpoint with these loads, in a spec as well."""
    q, k = queries_keys(rng)
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    with jax.numpy_rank_promotion("allow"):
        olmo = jnn.QKNorm(axis=(-2, -1), init_k_heads=K)
        variables = olmo.init(KEY, q, k)
    assert shapes(variables["params"]) == {"q_norm": {"scale": (H * D,)}, "k_norm": {"scale": (K * D,)}}
    stored = {"q_norm": {"scale": draw(rng, H * D)}, "k_norm": {"scale": draw(rng, K * D)}}
    want = jn.qk_norm(q, k, stored["q_norm"]["scale"], stored["k_norm"]["scale"], axis=(-2, -1))
    equal = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)
    equal(olmo.apply({"params": stored}, q, k), want)
    equal(jn.QKNorm(axis=(-2, -1)).apply(stored, (), q, k)[0], want)
    layer = jnnx.QKNorm((H, D), axis=(-2, -1), init_k_heads=K, rngs=nnx.Rngs(0))
    layer.q_norm.scale[...], layer.k_norm.scale[...] = stored["q_norm"]["scale"], stored["k_norm"]["scale"]
    equal(layer(q, k), want)
    graphdef, leaves = nnx.split(layer)
    equal(nnx.merge(graphdef, leaves)(q, k), want)
    each = jnnx.QKNorm((H, D), init_k_heads=K, use_bias=True, rngs=nnx.Rngs(0))
    assert (each.q_norm.scale.shape, each.k_norm.bias.shape) == ((H, D), (K, D))
    renamed = jnn.QKNorm(param_names={"q_scale": "query/weight", "k_scale": "weight"}).init(KEY, q, k)["params"]
    assert shapes(renamed) == {"query": {"weight": (D,)}, "weight": (D,)}
    wrapped = jnn.Norm(jn.QKNorm(scale_offset=1.0)).init(KEY, q, k)["params"]
    assert not np.any(wrapped["k_norm"]["scale"])
    equal(jnn.QKNorm(scale_offset=1.0, cast_params=True).apply({"params": wrapped}, q, k), jn.qk_norm(q, k))
    mask = np.arange(T) < 3
    holed = q.copy()
    holed[:, 3:] = np.nan
    y, z = jnn.QKNorm().apply({"params": {"q_norm": {"scale": np.ones(D, "f")}, "k_norm": {"scale": np.ones(D, "f")}}},
                              holed, k, mask=mask[None], k_mask=np.ones((B, T + 2)))  # fmt: skip
    near(y[:, :3], jn.rms_norm(q[:, :3]))
    near(z, jn.rms_norm(k))


@pytest.mark.parametrize(("call", "message"), [
    (lambda q, k: jn.qk_norm(q, k, kind="batch"), r"qk_norm: kind must be one of .* got 'batch'\. Write kind=\"rms\""),
    (lambda q, k: jn.QKNorm(kind="l2", cast="before_scale"), r"QKNorm: cast=\"before_scale\" is for kind=\"rms\""),
    (lambda q, k: jn.qk_norm(q, k, k_scale=np.ones(7)), r"qk_norm: k_scale of shape \(7,\) fits neither"),
    (lambda q, k: jn.qk_norm(q, k, q_bias=np.ones(D), kind="l2"), r"qk_norm: q_bias is for .*Write q_bias=None"),
    (lambda q, k: jn.qk_norm(q, "k"), r"qk_norm: k must be an array, got str"),
    (lambda q, k: jn.qk_norm(q, k, mask=np.ones((B, T))), r"qk_norm: mask of shape \(2, 5\) neither"),
    (lambda q, k: jnn.QKNorm().init(KEY, q, k, k_scale=np.ones(D, "f")), r"Write QKNorm\(\.\.\., use_scale=False\)"),
])  # fmt: skip
def test_qk_norm_explains_a_wrong_call(call, message, rng):
    with pytest.raises((ValueError, TypeError), match=message):
        call(*queries_keys(rng))
