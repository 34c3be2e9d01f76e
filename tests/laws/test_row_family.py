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


# --- others, each against its authors' code in torch, values and gradients --------------------------------------------


def prms(x, scale):
    """The official code of RMSNorm's paper: epsilon is added to the root."""
    k = int(x.shape[-1] * 0.25)
    rms = x[..., :k].norm(2, dim=-1, keepdim=True) * k ** (-1.0 / 2)
    return scale * (x / (rms + 1e-8))


def var_hidden_size(x, scale):
    """vLLM's RMSNorm(var_hidden_size=5)."""
    return x * torch.rsqrt(x[..., :5].pow(2).mean(dim=-1, keepdim=True) + 1e-6) * scale


def scale_norm(x, g):
    """Transformers without Tears."""
    return g * x / torch.norm(x, dim=-1, keepdim=True).clamp(min=1e-5)


def edm2(x):
    norm = torch.linalg.vector_norm(x, dim=[1, 2], keepdim=True, dtype=torch.float32)
    return x / torch.add(1e-4, norm, alpha=np.sqrt(norm.numel() / x.numel()))


def pono(x):
    """The paper's code, with the biased variance, and all that it returns as one array."""
    mean, std = x.mean(dim=1, keepdim=True), (x.var(dim=1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    return torch.cat([(x - mean) / std, mean, std], 1)


def curse_of_depth(x, scale, bias):
    """LayerNorm Scaling: the official code multiplies the norm's output by 1 / sqrt(layer_index)."""
    return F.layer_norm(x, (8,), scale[0], bias[0], 1e-6) * (1 / 7**0.5)


def torchscale(x, residual):
    """Its residual connection of DeepNorm, of 18 layers, and then the norm."""
    return F.layer_norm(residual * (2.0 * 18) ** 0.25 + x, (8,), eps=1e-6)


ALPHA = jn.deep_norm_alpha(18)
AUTHORS = {
    "layer norm scaling": (
        lambda x, s: jn.layer_norm(x, s[0], s[1], output_scale=7**-0.5),
        lambda x, s: curse_of_depth(x, s[:1], s[1:]), (2, 8)),
    "rms norm scaling": (
        lambda x, s: jn.rms_norm(x, s, scale_offset=1.0, output_scale=7**-0.5),
        lambda x, s: F.rms_norm(x, (8,), 1.0 + s, 1e-6) / 7**0.5, (8,)),
    "deep norm": (lambda x, r: jn.deep_norm(x, r, alpha=ALPHA), torchscale, (4, 6, 8)),
    "partial, official": (
        lambda x, s: jn.partial_rms_norm(x, s, fraction=0.25, epsilon=1e-8, epsilon_mode="outside"), prms, (8,)),
    "partial, vllm": (lambda x, s: jn.partial_rms_norm(x, s, size=5), var_hidden_size, (8,)),
    "scale norm": (jn.scale_norm, scale_norm, ()),
    "stylegan": (jn.pixel_norm, lambda x: x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-8), None),
    "edm2": (lambda x: jn.pixel_norm(x, axis=(1, 2), epsilon=1e-4, epsilon_mode="outside"), edm2, None),
    "positional": (lambda x: jnp.concatenate(jn.positional_norm(x, axis=1), 1), pono, None),
}  # fmt: skip


@pytest.mark.parametrize("name", AUTHORS)
def test_a_norm_is_that_of_its_authors_with_its_gradients(name, rng):
    ours, theirs, shape = AUTHORS[name]
    args = [draw(rng, (4, 6, 8), 1.0), *([] if shape is None else [draw(rng, shape or (1,), 1.0).reshape(shape)])]
    y, vjp = jax.vjp(jax.jit(ours), *args)
    tensors = [torch.tensor(a, requires_grad=True) for a in args]
    want = theirs(*tensors)
    g = draw(rng, y.shape)
    want.backward(torch.tensor(g))
    near(y, want.detach())
    for got, tensor in zip(vjp(jnp.asarray(g)), tensors, strict=True):
        np.testing.assert_allclose(got, tensor.grad, rtol=1e-5, atol=1e-5)


def test_deep_norm_keeps_the_sum_alone_and_rounds_it_to_the_residual_s_dtype(rng):
    x, r = (jnp.asarray(draw(rng, (4, 6, 8)), jnp.bfloat16) for _ in range(2))
    f = lambda x, r: jn.deep_norm(x, r, alpha=1.7)
    total = (1.7 * r.astype("f") + x.astype("f")).astype("bfloat16")
    np.testing.assert_array_equal(f(x, r), jn.layer_norm(total))
    kept = jax.tree.leaves(jax.eval_shape(lambda x, r: jax.vjp(f, x, r)[1], x, r))
    assert [(a.shape, a.dtype) for a in kept if a.size >= x.size] == [(x.shape, jnp.bfloat16)]
    wide = jax.eval_shape(f, x, r.astype("f"))
    assert wide.dtype == jnp.bfloat16
    y, variables = jnn.DeepNorm(alpha=1.7).init_with_output(KEY, x, r)
    assert sorted(variables["params"]) == ["bias", "scale"]
    np.testing.assert_array_equal(jnnx.DeepNorm(8, alpha=1.7, rngs=nnx.Rngs(0))(x, r), y)


def test_deep_norm_s_alpha_and_beta_are_those_of_the_paper_s_table():
    """torchscale's code, which has 1 / 1.15 for the 0.87 of the paper."""
    alpha, beta = jn.deep_norm_alpha, jn.deep_norm_beta
    for n, m in ((6, 6), (12, 3), (100, 40)):
        np.testing.assert_allclose(alpha(n, m, "encoder"), 0.81 * (n**4 * m) ** 0.0625)
        np.testing.assert_allclose(1 / beta(n, m, "encoder"), 1.15 * (n**4 * m) ** 0.0625, rtol=1e-3)
        np.testing.assert_allclose(alpha(n, m, "decoder"), (3.0 * m) ** 0.25)
        np.testing.assert_allclose(1 / beta(n, m, "decoder"), (12.0 * m) ** 0.25)
        assert alpha(n) == alpha(0, n) == (2.0 * n) ** 0.25
        np.testing.assert_allclose(1 / beta(n, side="encoder"), (8.0 * n) ** 0.25)
    for wrong in ((), (-1,), (6, 6), (6, 6, "both"), (6, 0, "decoder")):
        with pytest.raises(ValueError, match=r"deep_norm_alpha: .*Write deep_norm_alpha\("):
            alpha(*wrong)


def test_norms_that_are_views_of_others_are_theirs_to_the_bit(rng):
    """They are the same kernels, and no mathematics of their own."""
    x, equal = draw(rng, (4, 12, 5, 3), 2.0), np.testing.assert_array_equal
    equal(jn.pixel_norm(x, axis=1), jn.rms_norm(x, axis=1, epsilon=1e-8))
    equal(jn.positional_norm(x, axis=1)[0], jn.layer_norm(x, axis=1, epsilon=1e-5))
    equal(jn.scale_norm(x, np.float32(3.0)), jn.l2_norm(x, 3.0 * jnp.ones(()), epsilon=1e-5, epsilon_mode="max"))
    equal(jn.partial_rms_norm(x, size=3), jn.rms_norm(x))


def test_positional_norm_gives_back_what_it_took_out(rng):
    x, mask = draw(rng, (2, 5, 6), 30.0), np.arange(6) < 4
    y, mean, std = jn.positional_norm(x)
    np.testing.assert_allclose(y * std + mean, x, rtol=1e-6)
    holed = np.where(mask[None, None], x, np.float32(np.nan))
    masked = jn.positional_norm(holed, mask=np.broadcast_to(mask, x.shape))
    for a, b in zip(masked, jn.positional_norm(x[..., :4]), strict=True):
        near(a[..., :4], b)
    of_parts = jax.vmap(lambda x: jn.positional_norm(x, axis_name="c"), in_axes=-1, axis_name="c")
    for a, b in zip(of_parts(x.reshape(2, 5, 3, 2)), (y, mean, std), strict=True):
        near(a[0], b.reshape(2, 5, -1, 2)[..., 0] if b is y else b)


def test_a_pixel_of_zeros_has_the_slope_of_epsilon():
    slope = jax.grad(lambda x: jn.pixel_norm(x, epsilon=0.5, epsilon_mode="outside").sum())(np.zeros((2, 3), "f"))
    near(slope, np.full((2, 3), 2.0))


def test_layers_without_parameters_and_of_one_number(rng):
    x = draw(rng, (4, 6, 16))
    y, variables = jnn.PixelNorm().init_with_output(KEY, x)
    assert variables == {}
    near(y, jn.pixel_norm(x))
    near(jnnx.PixelNorm(16, rngs=nnx.Rngs(0))(x), y)
    near(jnn.PositionalNorm().apply({}, x)[1], x.mean(-1, keepdims=True))
    g = jnn.ScaleNorm().init(KEY, x)["params"]["g"]
    assert (g.shape, float(g)) == ((), 4.0)
    assert float(jnnx.ScaleNorm(16, scale_offset=1.0, rngs=nnx.Rngs(0)).g[...]) == 3.0
    assert jnn.ScaleNorm(use_scale=False).init(KEY, x) == {}
    assert jnn.PartialRMSNorm(size=4).init(KEY, x)["params"]["scale"].shape == (16,)


@pytest.mark.parametrize(("call", "message"), [
    (lambda x: jn.partial_rms_norm(x, size=9), r"partial_rms_norm: size=9 must be of 1 to 8 features.*Write size=4"),
    (lambda x: jn.partial_rms_norm(x, fraction=0.01), r"partial_rms_norm: fraction=0\.01 must be of 1 to 8 features"),
    (lambda x: jn.pixel_norm(x, epsilon_mode="max"), "pixel_norm: epsilon_mode must be \"inside\" or \"outside\""),
    (lambda x: jn.ScaleNorm(epsilon_mode="outside"), r'ScaleNorm: epsilon_mode must be "inside" or "max"'),
    (lambda x: jn.scale_norm(x, np.ones(7)), r"scale_norm: g of shape \(7,\) fits neither"),
    (lambda x: jn.layer_norm(x, output_scale=None), r"layer_norm: output_scale must be a finite number, got None"),
    (lambda x: jn.deep_norm(x, x[:1]), r"deep_norm: residual must have x's shape \(2, 8\), got \(1, 8\)"),
    (lambda x: jn.DeepNorm(alpha="deep"), r"DeepNorm: alpha must be a finite number, got 'deep'"),
    (lambda x: jn.positional_norm(x, axis=(0, 1)), r"positional_norm: axis must be one int"),
])  # fmt: skip
def test_row_norms_explain_a_wrong_call(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(np.ones((2, 8), "f"))
