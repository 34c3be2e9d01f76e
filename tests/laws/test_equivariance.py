"""Law 8: what must be equal is equal."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import EACH, ROWS, draw
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxnorm as jn

near = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=3e-6)


@pytest.mark.parametrize("row", EACH, ids=str)
def test_jit_changes_nothing(row, rng):
    params, x = row.params(rng), draw(rng, row.shape, 1.0)
    near(row.apply(params, x), row.spec.apply(params, row.state(), x, train=True)[0])


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_permuting_the_batch_permutes_the_output(row, rng):
    params, x = row.params(rng), draw(rng, row.shape, 1.0)
    order = np.roll(np.arange(row.shape[0]), 1)  # no example stays
    near(row.apply(params, x[order]), row.apply(params, x)[order])


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_shifting_and_scaling_x_changes_nothing(row, rng):
    params, x = row.params(rng), draw(rng, row.shape)
    spec = dataclasses.replace(row, spec=dataclasses.replace(row.spec, epsilon=0.0))
    np.testing.assert_allclose(spec.apply(params, 8.0 * x + 4.0), spec.apply(params, x), rtol=1e-5, atol=1e-5)


def test_one_group_is_layer_norm_and_c_groups_are_instance_norm(rng):
    x, scale, bias = draw(rng, (4, 5, 6, 8), 2.0), draw(rng, 8), draw(rng, 8)
    rank = lambda p: p.reshape(1, 1, 1, 8)
    near(
        jn.group_norm(x, scale, bias, num_groups=1),
        jn.layer_norm(x, rank(scale), rank(bias), axis=(1, 2, 3)),
    )
    near(jn.group_norm(x, scale, bias, num_groups=8), jn.instance_norm(x, scale, bias))
    near(jn.group_norm(x, scale, bias, group_size=1), jn.instance_norm(x, scale, bias))
    near(jn.group_norm(x, num_groups=1, reduction_axes=-1), jn.layer_norm(x))


def test_batch_norm_of_one_example_is_instance_norm(rng):
    norm = jn.BatchNorm(epsilon=1e-6)
    params, state = norm.init(8)
    x = draw(rng, (1, 5, 6, 8), 2.0)
    near(norm.apply(params, state, x, train=True)[0], jn.instance_norm(x))
    ghosts = dataclasses.replace(norm, virtual_batch_size=1)
    x = draw(rng, (3, 5, 6, 8), 2.0)
    near(ghosts.apply(params, state, x, train=True)[0], jn.instance_norm(x))


def test_layer_norm_of_centred_rows_is_rms_norm(rng):
    x = draw(rng, (6, 32))
    x -= x.mean(-1, keepdims=True)
    near(jn.layer_norm(x), jn.rms_norm(x))


def test_layouts_agree_without_a_transpose_in_the_jaxpr(rng):
    nhwc = draw(rng, (4, 5, 6, 8), 1.0)
    nchw = np.moveaxis(nhwc, -1, 1)
    scale = draw(rng, 8)
    state = jn.BatchNorm().init(8)[1]
    for f in (
        lambda x, axis: jn.group_norm(x, scale, num_groups=2, axis=axis),
        lambda x, axis: jn.instance_norm(x, scale, axis=axis),
        lambda x, axis: jn.layer_norm(x, scale, axis=axis),
        lambda x, axis: jn.rms_norm(x, scale, axis=axis),
        lambda x, axis: jn.batch_norm(x, jn.Affine(scale, None), state, train=True, axis=axis)[0],
    ):
        near(np.moveaxis(f(nchw, 1), 1, -1), f(nhwc, -1))
        both = jax.make_jaxpr(lambda x, f=f: jax.vjp(lambda x: f(x, 1), x)[1](x))(jnp.asarray(nchw))
        assert "transpose[" not in str(both)


numbers = st.floats(-1e4, 1e4, width=32)
sets = st.lists(numbers, min_size=0, max_size=12).map(lambda v: np.array(v, np.float32))


@settings(max_examples=60, deadline=None)
@given(sets, sets, sets)
def test_merge_is_associative_commutative_and_equal_to_counting_together(a, b, c):
    same = lambda p, q: jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-3), p, q)
    identity = jn.Moments(np.float32(0), np.float32(0), np.float32(0))
    A, B, C = (jn.moments(s) if s.size else identity for s in (a, b, c))
    same(jn.merge(A, B), jn.merge(B, A))
    same(jn.merge(jn.merge(A, B), C), jn.merge(A, jn.merge(B, C)))
    same(jn.merge(A, identity), A)
    if a.size + b.size:
        same(jn.merge(A, B), jn.moments(np.concatenate([a, b])))


def test_merge_is_exact_far_from_zero(rng):
    parts = [draw(rng, (n, 4), 1e4) for n in (7, 1, 30)]
    merged = jn.moments(parts[0], 0)
    for part in parts[1:]:
        merged = jn.merge(merged, jn.moments(part, 0))
    true = np.concatenate(parts).astype(np.float64)
    np.testing.assert_allclose(merged.mean, true.mean(0), rtol=1e-7)
    np.testing.assert_allclose(merged.var, true.var(0), rtol=1e-3)  # the means are float32: 1e-3 is their last place
    assert merged.count.tolist() == [38.0] * 4


def test_moments_and_merge_are_differentiable(rng):
    with jax.enable_x64(True):
        x, y = jnp.asarray(rng.normal(size=(6, 3))), jnp.asarray(rng.normal(size=(4, 3)) + 2)
        merged = lambda x, y: jn.merge(jn.moments(x, 0), jn.moments(y, 0))
        plain = lambda x, y: (lambda z: (z.mean(0), jnp.square(z - z.mean(0, keepdims=True)).sum(0)))(
            jnp.concatenate([x, y])
        )
        both = jax.jit(lambda f: (jax.jacrev(f, (0, 1))(x, y), jax.jvp(f, (x, y), (x, y))[1]), static_argnums=0)
        got, want = both(lambda *a: merged(*a)[1:]), both(plain)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), got, want)
