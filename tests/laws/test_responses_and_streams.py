"""Row norms of formulas of their own, against torch and their definitions; streams of frames with a carry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import draw
from flax import nnx
from helpers.devices import mesh_of, placed
from helpers.jit import jit_unoptimized
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxnorm as jn
from jaxnorm import linen as jnn
from jaxnorm import nnx as jnnx

near = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=3e-6)
close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

# --- streams ----------------------------------------------------------------------------------------------------------

STREAM = dict(num_groups=2, epsilon=1e-5)


@pytest.mark.parametrize("variance", ["prefix", "running"])
def test_any_split_of_the_frames_is_one_call_with_its_gradients(variance, rng):
    """To rounding; the count to the bit. Also frame by frame inside of a scan, with padded frames."""
    x, mask = draw(rng, (2, 5, 3, 8), 2.0), rng.random((2, 5)) < 0.7
    mask[0, :2] = False  # this stream starts later
    weigh = draw(rng, x.shape)

    def norm(x, mask, carry):
        return jn.cumulative_group_norm(x, variance=variance, mask=mask, carry=carry, **STREAM)

    def loss(pieces):
        def of(x):
            y, carry = pieces(x)
            return jnp.sum(jnp.sin(y) * weigh) + jnp.sum(carry.mean * carry.m2), (y, carry)

        return jax.value_and_grad(of, has_aux=True)

    def in_pieces(x):
        carry, parts = None, []
        for a, b in ((0, 2), (2, 5)):
            y, carry = norm(x[:, a:b], mask[:, a:b], carry)
            parts.append(y)
        return jnp.concatenate(parts, 1), carry

    def frame_by_frame(x):
        step = lambda carry, at: norm(at[0][:, None], at[1][:, None], carry)[::-1]
        carry, y = lax.scan(step, jn.Moments.empty((2, 2)), (x.swapaxes(0, 1), mask.swapaxes(0, 1)))
        return y[:, :, 0].swapaxes(0, 1), carry

    ways = (lambda x: norm(x, mask, None), in_pieces, frame_by_frame)
    ((_, (y, carry)), dx), *others = jit_unoptimized(lambda x: [loss(way)(x) for way in ways])(x)
    for (_, (z, after)), dz in others:
        np.testing.assert_array_equal(after.count, carry.count)
        close(z, y)
        close(after.mean, carry.mean)
        np.testing.assert_allclose(after.m2, carry.m2, rtol=1e-5)
        np.testing.assert_allclose(dz, dx, rtol=1e-4, atol=1e-4 * np.abs(dx).max())


def test_the_last_frame_has_the_statistics_of_group_norm_and_the_carry_is_its_moments(rng):
    x = draw(rng, (2, 3, 3, 8), 4.0)
    y, carry = jit_unoptimized(lambda x: jn.cumulative_group_norm(x, **STREAM))(x)
    near(y[:, -1], jn.group_norm(x, **STREAM)[:, -1])
    want = jn.moments(x.reshape(2, 3, 3, 2, 4), (1, 2, 4))
    jax.tree.map(close, carry, want)
    of_running = jit_unoptimized(lambda x: jn.cumulative_group_norm(x, variance="running", **STREAM))
    running, after = of_running(x)
    assert np.abs(running - y)[:, 1:].max() > 0.01  # the two definitions differ
    assert np.all(after.m2 != carry.m2)
    near(running[:, :1], y[:, :1])


def test_layers_take_and_return_the_carry_and_keep_no_variable(rng):
    x = draw(rng, (2, 2, 8), 1.0)
    made = lambda x: jnn.CumulativeGroupNorm(**STREAM).init_with_output(jax.random.key(0), x)
    (y, carry), variables = jit_unoptimized(made)(x)
    assert {k: sorted(v) for k, v in variables.items()} == {"params": ["bias", "scale"]}
    assert carry.count.tolist() == [[8.0, 8.0]] * 2
    layer = jnnx.CumulativeGroupNorm(8, **STREAM, rngs=nnx.Rngs(0))
    first, carry = layer(x[:, :1])
    close(jnp.concatenate([first, layer(x[:, 1:], carry=carry)[0]], 1), y)


# --- others -----------------------------------------------------------------------------------------------------------


def test_local_response_norm_is_torch_s_for_odd_and_even_windows(rng):
    torch = pytest.importorskip("torch")
    x, g = draw(rng, (2, 9, 4)), draw(rng, (2, 9, 4))
    for size in (4, 5):
        tensor = torch.tensor(x, requires_grad=True)
        want = torch.nn.LocalResponseNorm(size, alpha=0.5, beta=0.6, k=2.0)(tensor)
        want.backward(torch.tensor(g))
        norm = lambda x, n=size: jn.local_response_norm(x, size=n, alpha=0.5, beta=0.6, k=2.0, axis=1)
        y, dx = jit_unoptimized(lambda x, g, f=norm: (f(x), jax.vjp(f, x)[1](g)[0]))(x, g)
        near(y, want.detach())
        close(dx, tensor.grad)
    summed = jn.local_response_norm(x, size=4, alpha=0.5, divide=False, axis=1)  # TensorFlow, the paper
    near(summed, jn.local_response_norm(x, size=4, alpha=2.0, axis=1))


def test_a_dead_channel_has_finite_gradients_and_large_values_stay_in_range(rng):
    x = draw(rng, (2, 4, 6))
    x[..., 2] = 0.0
    dx = jax.grad(lambda x: jnp.sum(jn.global_response_norm(x) ** 2))(x)
    assert np.all(np.isfinite(dx))
    assert np.all(dx[..., 2] == 0.0)
    weight = np.ones(3, "f")
    for size in (1e-20, 1e20):
        big = x * np.float32(size)
        near(jn.global_response_norm(big, epsilon=0.0) / np.float32(size), jn.global_response_norm(x, epsilon=0.0))
        near(jn.poly_norm(big, weight, epsilon=0.0), jn.poly_norm(x, weight, epsilon=0.0))
        near(jn.crms_norm(big, epsilon=0.0), jn.crms_norm(x, epsilon=0.0))
        assert np.all(np.isfinite(jn.local_response_norm(big)))


def test_crms_norm_is_layer_norm_without_the_element_that_is_not_stored(rng):
    x, scale = draw(rng, (4, 7), 3.0), draw(rng, 7)
    whole = np.concatenate([x, -x.sum(-1, keepdims=True)], -1)
    near(jn.crms_norm(x, scale), jn.layer_norm(whole, epsilon=1e-6)[:, :-1] * scale[None])


def test_norms_that_start_as_another_are_that_one(rng):
    x, residual = draw(rng, (4, 6, 12), 1.0), draw(rng, (4, 6, 12))
    first = lambda norm, *more: norm.apply(*norm.init(12), x, *more)[0]
    near(first(jn.SeeDNorm(num_heads=4)), jn.rms_norm(x))
    near(first(jn.GatedNorm(gate_scale=2.0)), jn.rms_norm(x))
    near(first(jn.GlobalResponseNorm(scale_offset=1.0)), x)
    unit = lambda a: a / np.linalg.norm(a, axis=-1, keepdims=True)
    near(first(jn.HypersphereUpdate(rate=0.25), residual), unit(0.75 * unit(residual) + 0.25 * unit(x)))
    simba = jn.HypersphereUpdate(rate=0.25, absolute=False, normalize_residual=False, epsilon=1e-8)
    near(first(simba, residual), unit(0.75 * residual + 0.25 * unit(x)))


def test_layers_have_the_parameters_of_their_own_shape(rng):
    x = draw(rng, (4, 6, 12))
    shapes = lambda layer, *more: jax.tree.map(jnp.shape, layer.init(jax.random.key(0), x, *more)["params"])
    assert shapes(jnn.GatedNorm(init_rank=5)) == {"scale": (12,), "down": (12, 5), "up": (5, 12)}
    assert not np.allclose(*(jnn.GatedNorm().init(jax.random.key(k), x)["params"]["down"] for k in (0, 1)))
    assert shapes(jnn.PolyNorm()) == {"weight": (3,), "bias": ()}
    assert shapes(jnn.HypersphereUpdate(), x) == {"alpha": (12,)}
    assert shapes(jnn.SeeDNorm()) == {"scale": (12,), "alpha": (12,), "beta": (12,)}
    near(jnnx.GatedNorm(12, gate_scale=2.0, rngs=nnx.Rngs(0))(x), jn.rms_norm(x))
    near(jnnx.PolyNorm(12, rngs=nnx.Rngs(0))(x), jn.poly_norm(x, np.full(3, 1 / 3, "f")))


@pytest.mark.parametrize(("call", "message"), [
    (lambda x: jn.cumulative_group_norm(x, time_axis=2), r"axis=-1 and time_axis=2 must be two others"),
    (lambda x: jn.cumulative_group_norm(x, variance="whole"), r"variance must be one of .*Write \"prefix\""),
    (lambda x: jn.cumulative_group_norm(x, carry=jn.Moments.empty((2, 3))), r"Write carry=jaxnorm\.Moments\.empty"),
    (lambda x: jn.cumulative_group_norm(x, carry=np.zeros((2, 1))), r"carry must be jaxnorm\.Moments"),
    (lambda x: jn.cumulative_group_norm(x, num_groups=3), r"num_groups=3 does not divide the 8 channels"),
    (lambda x: jn.seednorm(x, None, np.ones(8), np.ones(8), num_heads=3), r"num_heads=3 does not divide"),
    (lambda x: jn.seednorm(x, None, None, np.ones(8)), r"alpha must be an array, got None"),
    (lambda x: jn.gated_norm(x, None, np.ones((8, 2)), np.ones((8, 2))), r"shapes \(8, R\) and \(R, 8\)"),
    (lambda x: jn.poly_norm(x, np.ones((3, 1))), r"weight must be of shape \(K,\)"),
    (lambda x: jn.poly_norm(x + 1j, np.ones(3)), r"poly_norm: x must be real"),
    (lambda x: jn.local_response_norm(x, size=0), r"size must be an int >= 1, got 0"),
    (lambda x: jn.local_response_norm(x, k=0.0), r"k must be > 0"),
    (lambda x: jn.global_response_norm(x, axis=0), r"axis=0 is the batch axis"),
    (lambda x: jn.hypersphere_update(x, x[:1], 0.1), r"residual must have x's shape"),
    (lambda x: jn.hypersphere_update(x, x, None), r"alpha must be an array or a number, got None"),
])  # fmt: skip
def test_these_norms_explain_a_wrong_call(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(np.ones((2, 4, 8), "f"))


@pytest.mark.parametrize("spec", [P(None, None, "d"), P(None, "d")], ids=["features", "times"])
def test_axes_that_jit_spreads_over_devices_are_whole_to_these_norms(spec, rng):
    """Also where a norm reduces over that axis, or its windows and prefixes cross from one device to the next."""
    x, weight = draw(rng, (2, 8, 16), 1.0), draw(rng, (16, 3))
    by_channel, (down, up), g = draw(rng, (3, 16)), (weight, weight.T), draw(rng, (6, *x.shape))

    def both(x):
        def all_of_them(x):
            return jnp.stack([
                jn.gated_norm(x, by_channel[0], down, up),
                jn.seednorm(x, *by_channel, num_heads=2),
                jn.poly_norm(x, by_channel[0, :3], np.float32(0.5)),
                jn.global_response_norm(x, *by_channel[:2]),
                jn.local_response_norm(x, size=5),
                jn.cumulative_group_norm(x, *by_channel[:2], num_groups=2, epsilon=1e-3)[0],
            ])  # fmt: skip

        y, vjp = jax.vjp(all_of_them, x)
        return y, vjp(jnp.asarray(g))[0]

    mesh = mesh_of("auto", (8,), ("d",))
    with jax.set_mesh(mesh):
        got = jit_unoptimized(both)(*placed(mesh, (x, spec)))
    jax.tree.map(close, got, jit_unoptimized(both)(x))
