"""Norms by the statistics of the batch and of examples, and whitening: variants, states, devices, equal eigenvalues."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from catalogue import Row, draw
from helpers.devices import mesh_of
from helpers.jit import jit_unoptimized

import jaxnorm as jn

f64 = np.float64
MIXTURES = [jn.EvoNormB(momentum=0.5), jn.BatchInstanceNorm(momentum=0.5), jn.SwitchableNorm(momentum=0.5)]
WHITENING = [jn.IterNorm(group_size=3, momentum=0.5), jn.IterNorm(method="eigh", group_size=3, momentum=0.5)]
ids = lambda spec: type(spec).__name__ + getattr(spec, "method", getattr(spec, "variant", ""))


def near(a, b, atol=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol), a, b)


@pytest.mark.parametrize("variant", ["B1", "B2", "S1"])
def test_other_variants_of_evo_norm_match_the_formula(variant, rng):
    spec = jn.EvoNormS(variant=variant, num_groups=2) if variant[0] == "S" else jn.EvoNormB(variant=variant)
    label = (lambda n, t, c: (n, c // 2)) if variant[0] == "S" else (lambda n, t, c: (c,))
    row = Row(variant, spec, (4, 6, 4), (1, 1, 4), label, (4,), oracle=oracle.evolved)
    params, x, g = row.params(rng), draw(rng, row.shape), draw(rng, row.shape)
    y, vjp = jax.vjp(row.apply, params, x)
    near(y, row.truth(params, x).y)
    dparams, dx = vjp(jnp.asarray(g))
    true, *_ = row.gradients(params, x, g)
    near(dx, true)
    assert params.u is dparams.u is None


@pytest.mark.parametrize("norm", [*MIXTURES, jn.InstanceBatchNorm(momentum=0.5), *WHITENING], ids=ids)
def test_the_state_follows_the_batch_and_rules_at_inference(norm, rng):
    x, (params, state) = draw(rng, (5, 7, 6), 2.0), norm.init(6)
    y, new = norm.apply(params, state, x, train=True)
    for call in ({"mask": np.zeros(x.shape, bool)}, {"update_stats": False}):
        jax.tree.map(np.testing.assert_array_equal, norm.apply(params, state, x, train=True, **call)[1], state)
    width = new.mean.size  # of instance-batch norm the last channels
    near(new.mean, 0.5 * x[..., -width:].mean((0, 1), f64))
    if isinstance(new, jn.RunningStats):
        near(new.var, 0.5 + 0.5 * x[..., -width:].var((0, 1), f64))
        whole = jn.RunningStats(x[..., -width:].mean((0, 1)), x[..., -width:].var((0, 1)))
        near(norm.apply(params, whole, x, train=False)[0], y)  # the batch's own statistics, given as the running ones
    else:
        z = (x - np.asarray(new.mean)).reshape(5, 7, 2, 3)
        near(norm.apply(params, new, x, train=False)[0].reshape(z.shape), np.einsum("gij,ntgj->ntgi", new.matrix, z))
    traced = jax.jit(lambda train: norm.apply(params, state, x, train=train))
    near(traced(True), (y, new))
    near(traced(False), norm.apply(params, state, x, train=False))


@pytest.mark.parametrize("norm", [*MIXTURES, *WHITENING], ids=ids)
def test_devices_share_with_one_all_reduce_each_way(norm, rng):
    """On 8 of them, two of which have nothing that counts, y, dx and the state are those of one device."""
    x, mask, g = draw(rng, (8, 7, 6), 3.0), np.ones((8, 1, 1), bool), draw(rng, (8, 7, 6))
    mask[2:4] = False
    params, state = norm.init(6)
    over = dataclasses.replace(norm, axis_name="d")

    def run(norm, x, mask):
        return norm.apply(params, state, x, train=True, mask=mask)

    def gradient(norm, x, mask, g):
        (y, state), vjp = jax.vjp(lambda x: run(norm, x, mask), x)
        return y, state, vjp((g, jax.tree.map(jnp.zeros_like, state)))[0]

    mesh, spec = mesh_of("auto", names=("d",)), jax.sharding.PartitionSpec("d")
    whole = jax.sharding.PartitionSpec()
    options = dict(mesh=mesh, in_specs=(spec, spec, spec), out_specs=(spec, whole, spec))
    each = jit_unoptimized(jax.shard_map(functools.partial(gradient, over), **options)).lower(x, mask, g).compile()
    y, new, dx = each(x, mask, g)
    want, state_of_all, dx_of_all = jit_unoptimized(functools.partial(gradient, norm))(x, mask, g)
    near(y, want)
    near(dx, dx_of_all)
    near(new, state_of_all)
    assert each.as_text().count(" all-reduce(") == 2


def covariance(x, axes, epsilon):
    z = x - x.mean(axes, keepdims=True)
    return z, np.einsum("ntd,nte->de", z, z) / np.prod([x.shape[a] for a in axes]) + epsilon * np.eye(x.shape[-1])


def test_iter_norm_whitens_channels_at_any_axis(rng):
    x, params = draw(rng, (5, 4, 3), 1e4), jn.IterNorm().init(3)
    last = jn.IterNorm().apply(*params, x, train=True)[0]
    first = jn.IterNorm(axis=1).apply(*params, np.moveaxis(x, -1, 1), train=True)[0]
    near(np.moveaxis(first, 1, -1), last, 1e-4)


@pytest.mark.parametrize("equal", [False, True], ids=["", "equal eigenvalues"])
def test_zca_matches_scipy_and_its_derivatives_are_those_of_differences(equal, rng):
    """With a covariance that is a multiple of I, where the derivative of eigh itself divides by 0."""
    from scipy.linalg import inv, sqrtm

    with jax.enable_x64(True):
        x = rng.normal(size=(5, 4, 3)) @ rng.normal(size=(3, 3))
        if equal:
            z, s = covariance(x, (0, 1), 0.0)
            x = z @ inv(sqrtm(s)).real
        norm = jn.IterNorm(method="eigh", epsilon=1e-3)
        params, state = norm.init(3)
        params, v, g = jax.tree.map(lambda a: a.astype(f64), params), rng.normal(size=x.shape), rng.normal(size=x.shape)
        ours = jax.jit(lambda x: norm.apply(params, state, x, train=True)[0])

        def scipy(x):
            z, s = covariance(x, (0, 1), 1e-3)
            return z @ inv(sqrtm(s)).real

        np.testing.assert_allclose(ours(x), scipy(x), rtol=1e-8, atol=1e-9)
        h = 1e-4
        slope = (scipy(x + h * v) - scipy(x - h * v)) / (2 * h)
        np.testing.assert_allclose(jax.jvp(ours, (x,), (v,))[1], slope, rtol=1e-5, atol=1e-6)
        loss = lambda x: jnp.vdot(jnp.sin(ours(x)), g)
        np.testing.assert_allclose(jnp.vdot(jax.grad(loss)(x), v), jnp.vdot(jnp.cos(scipy(x)) * g, slope), rtol=1e-5)
        curve = (jax.grad(loss)(x + h * v) - jax.grad(loss)(x - h * v)) / (2 * h)
        for second in (jax.jvp(jax.grad(loss), (x,), (v,))[1], jax.grad(lambda x: jnp.vdot(jax.grad(loss)(x), v))(x)):
            np.testing.assert_allclose(second, curve, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", WHITENING[1:], ids=ids)
def test_whitening_of_constants_and_of_poisoned_padding(norm, rng):
    params, state = norm.init(6)
    run = jax.jit(lambda x, mask, weights: norm.apply(params, state, x, train=True, mask=mask, weights=weights)[0])
    for constant in (0.0, 1e4 / 3, 1e20, 1e-20):
        near(run(np.full((4, 5, 6), constant, np.float32), None, None), np.zeros((4, 5, 6)))
    x, mask = draw(rng, (4, 5, 6), 1.0), rng.random((4, 5)) < 0.7
    clean = jax.grad(lambda x: jnp.where(mask[..., None], run(x, mask, None) ** 3, 0.0).sum())
    holed = np.where(mask[..., None], x, np.float32(np.nan))
    near(clean(holed), clean(np.where(mask[..., None], x, np.float32(7.0))))
    near(run(x, mask, None)[mask], run(x, None, mask[..., None].astype(np.float32))[mask])
    near(run(x, mask, None)[mask], norm.apply(params, state, x[mask], train=True)[0])
    kept = jax.tree.leaves(
        jax.eval_shape(lambda x: jax.vjp(lambda x: run(x, None, None), x)[1], x.astype(jnp.bfloat16))
    )
    assert [a.dtype for a in kept if a.size >= x.size] == [jnp.bfloat16]
