"""Norms without statistics, against the code of the models that have them: determinants, inverses, starts by data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import draw
from flax import nnx

import jaxnorm as jn
from jaxnorm import linen as jnn
from jaxnorm import nnx as jnnx

near = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=3e-6)
KEY = jax.random.key(0)

# --- ActNorm ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift_first", [False, True], ids=["nflows", "glow"])
@pytest.mark.parametrize("axis", [1, -1])
def test_act_norm_is_invertible_and_its_log_det_is_that_of_its_jacobian(shift_first, axis, rng):
    x, log_scale, shift = draw(rng, (2, 3, 2, 3), 1.0), draw(rng, 3), draw(rng, 3)
    of = lambda inverse: lambda x: jn.act_norm(x, log_scale, shift, shift_first=shift_first, axis=axis, inverse=inverse)
    y, log_det = of(False)(x)
    again, minus = of(True)(y)
    near(again, x)
    np.testing.assert_array_equal(minus, -log_det)
    jacobian = jax.jacfwd(lambda a: of(False)(a[None])[0].ravel())(x[0]).reshape(18, 18)
    near(log_det, np.full(2, np.linalg.slogdet(jacobian)[1]))
    near(jax.grad(lambda s: jn.act_norm(x, s, shift, axis=axis)[1].sum())(log_scale), np.full(3, 12.0))


def test_act_norm_starts_from_data_as_nflows_and_glow_do(rng):
    """nflows and Glow, transcribed, with the biased deviation in both."""
    x = draw(rng, (16, 5, 4), 30.0) * np.array([1.0, 10.0, 0.1, 3.0], "f")
    flat, eps = np.float64(x).reshape(-1, 4), 1e-6
    mean, std = flat.mean(0), flat.std(0)
    for norm, shift in ((jn.ActNorm(), -mean / (std + eps)), (jn.ActNorm(shift_first=True), -mean)):
        params = norm.init_from(x)
        np.testing.assert_allclose(params.log_scale, -np.log(std + eps), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(params.shift, shift, rtol=1e-6)
        y = np.asarray(norm.apply(params, (), x)[0][0]).reshape(-1, 4)
        np.testing.assert_allclose(y.mean(0), 0, atol=2e-5)
        np.testing.assert_allclose(y.std(0), 1, rtol=2e-5)
    moved = jax.grad(lambda x: sum(jnp.sum(p) for p in jn.ActNorm().init_from(x)))(x)
    assert not np.any(moved)


def test_masked_positions_count_neither_in_the_start_nor_in_log_det(rng):
    x, mask = draw(rng, (4, 6, 3), 2.0), np.arange(6) < np.array([[6], [2], [0], [5]])
    holed = np.where(mask[..., None], x, np.float32(np.nan))
    norm = jn.ActNorm()
    params = norm.init_from(holed, mask=mask)
    kept = jax.tree.map(np.asarray, norm.init_from(x[mask]))
    jax.tree.map(near, params, kept)
    log_det = norm.apply(params, (), holed, mask=mask)[0][1]
    near(log_det, np.array([6, 2, 0, 5]) * kept.log_scale.sum())
    elements = rng.random(x.shape) < 0.5
    near(norm.apply(params, (), x, mask=elements)[0][1], (elements * kept.log_scale).sum((1, 2)))
    halves = lambda x, mask: norm.init_from(x, mask=mask, axis_name="data")
    over = jax.vmap(halves, axis_name="data")(holed.reshape(2, 2, 6, 3), mask.reshape(2, 2, 6))
    jax.tree.map(lambda a, b: near(a, np.stack([b, b])), over, params)


def test_layers_of_act_norm_go_both_ways(rng):
    x = draw(rng, (4, 6, 3), 2.0)
    params = jn.ActNorm().init_from(x)._asdict()
    (y, log_det) = jn.act_norm(x, **params)
    layer = jnn.ActNorm()
    assert sorted(layer.init(KEY, x)["params"]) == ["log_scale", "shift"]
    jax.tree.map(near, layer.apply({"params": params}, y, inverse=True), (x, -log_det))
    jax.tree.map(near, jnn.ActNorm(inverse=True).apply({"params": params}, y), (x, -log_det))
    model = jnnx.ActNorm(3, rngs=nnx.Rngs(0))
    model.log_scale[...], model.shift[...] = params["log_scale"], params["shift"]
    jax.tree.map(near, model(x), (y, log_det))
    jax.tree.map(near, model(y, inverse=True), (x, -log_det))


def test_act_norm_explains_a_wrong_call():
    x = np.ones((2, 3), "f")
    with pytest.raises(ValueError, match=r"act_norm: axis=0 is the batch axis.*Write axis=-1"):
        jn.act_norm(x, axis=0)
    with pytest.raises(ValueError, match=r"ActNorm: activation='relu' would .*Write activation=None"):
        jn.ActNorm(activation="relu")
    with pytest.raises(ValueError, match=r"act_norm: log_scale of shape \(2,\) fits neither"):
        jn.act_norm(x, np.ones(2))


# --- LayerScale -------------------------------------------------------------------------------------------------------


def test_layer_scale_is_timm_s_and_as_one_number_re_zero(rng):
    x, gamma = draw(rng, (4, 6, 8)), draw(rng, 8)
    np.testing.assert_array_equal(jn.layer_scale(x, gamma), x * gamma[None, None])  # timm: x * self.gamma
    variables = jnn.LayerScale().init(KEY, x)
    np.testing.assert_array_equal(variables["params"]["gamma"], np.full(8, 1e-5, "f"))
    layer = jnnx.LayerScale((), axis=(), init_gamma=0.0, rngs=nnx.Rngs(0))
    assert layer.gamma.shape == ()
    assert not np.any(layer(x))
    slope = nnx.grad(lambda layer: jnp.sum(layer(x)))(layer).gamma[...]
    np.testing.assert_allclose(slope, x.sum(), rtol=1e-5)
    y, variables = jnn.LayerScale(axis=(), init_gamma=0.5).init_with_output(KEY, x)
    assert variables["params"]["gamma"].shape == ()
    np.testing.assert_array_equal(y, 0.5 * x)


@pytest.mark.parametrize("norm", [jn.add_rms_norm, jn.add_layer_norm])
def test_a_branch_scale_is_layer_scale_and_the_sum_in_one_rounding(norm, rng):
    """As ConvNeXt and DINOv2 write it, residual + gamma * x, with gradients, and x and the stream alone kept."""
    x, r, gamma = draw(rng, (4, 6, 8)), draw(rng, (4, 6, 8)), draw(rng, 8)
    spread = lambda gamma: gamma[None, None]
    ours = lambda x, r, gamma: norm(x, r, branch_scale=gamma)
    theirs = lambda x, r, gamma: norm(x * spread(gamma), r)
    g = (draw(rng, x.shape), draw(rng, x.shape))
    (got, pull), (want, pull_theirs) = jax.vjp(ours, x, r, gamma), jax.vjp(theirs, x, r, gamma)
    jax.tree.map(near, got, want)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, pull(g), pull_theirs(g))
    v = (r, x, gamma)
    jax.tree.map(close, jax.jvp(ours, (x, r, gamma), v), jax.jvp(theirs, (x, r, gamma), v))
    second = lambda f: jax.grad(lambda a: jnp.vdot(jax.grad(lambda a: jnp.sin(f(x, r, a)[0]).sum())(a), gamma))(gamma)
    close(second(ours), second(theirs))
    half = [jnp.asarray(a, jnp.bfloat16) for a in (x, r, gamma)]
    stream = ours(*half)[1]
    wide = [a.astype("f") for a in half]
    np.testing.assert_array_equal(stream, (wide[0] * spread(wide[2]) + wide[1]).astype("bfloat16"))
    kept = jax.tree.leaves(jax.eval_shape(lambda *a: jax.vjp(ours, *a)[1], *half))
    assert [a.dtype for a in kept if a.size >= x.size] == [jnp.bfloat16] * 2
    layer = jnn.AddRMSNorm()
    made = layer.init(KEY, x, r)
    jax.tree.map(near, layer.apply(made, x, r, branch_scale=gamma), jn.add_rms_norm(x, r, branch_scale=gamma))
    with pytest.raises(ValueError, match=r"branch_scale of shape \(7,\) fits neither"):
        norm(x, r, branch_scale=np.ones(7))
