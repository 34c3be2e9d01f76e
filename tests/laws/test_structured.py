"""Norms of windows and of graphs: inverses, streams, references and definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import draw
from flax import nnx
from helpers.devices import mesh_of, placed
from helpers.jit import jit_unoptimized
from jax.sharding import PartitionSpec as P

import jaxnorm as jn
from jaxnorm import nnx as jnnx

close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

# --- windows ----------------------------------------------------------------------------------------------------------

WINDOWS = [
    dict(),
    dict(center="last", scale_offset=1.0),
    dict(transform="arcsinh", epsilon_mode="if_zero"),
    dict(epsilon_mode="one_below", epsilon=1e-6),
]


@pytest.mark.parametrize("options", WINDOWS, ids=str)
def test_rev_in_is_inverted_to_rounding_also_where_values_are_missing(options, rng):
    """Missing values are NaN; one channel is constant, one is huge."""
    x = draw(rng, (2, 9, 4), 3.0) * np.array([1.0, 0.0, 1e15, 0.1], "f") + np.array([0.0, 7.0, 0.0, 0.0], "f")
    scale, bias = draw(rng, (2, 4))
    missing = rng.random(x.shape) < 0.3

    @jit_unoptimized
    def both(x):
        keep = ~jnp.isnan(x)
        y, stats = jn.rev_in(x, scale, bias, mask=keep, **options)
        again, same = jn.rev_in(x, scale, bias, mask=keep, stats=stats, **options)
        return y, again, jn.rev_in(y, scale, bias, stats=stats, inverse=True, **options)[0], stats, same

    y, again, back, stats, same = both(np.where(missing, np.nan, x))
    size = np.abs(x).max((0, 1))
    np.testing.assert_allclose(
        np.where(missing, 0, back - x) / size, 0.0, atol=2e-6 * max(1, np.abs(scale).min() ** -1)
    )
    np.testing.assert_allclose(np.where(missing, 0, again - y), 0.0, atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, stats, same)
    assert np.isfinite(y).all()
    wide = np.where(missing, np.nan, x.astype(np.float64))
    std = np.nanstd(wide, 1, keepdims=True)
    mode, epsilon = options.get("epsilon_mode", "inside"), options.get("epsilon", 1e-5)
    floor = {
        "inside": np.sqrt(std**2 + epsilon),
        "if_zero": np.where(std == 0, epsilon, std),
        "one_below": np.where(std < epsilon, 1.0, std),
    }
    np.testing.assert_allclose(stats.std, floor[mode], rtol=1e-5)


def test_layers_of_rev_in_put_a_forecast_back_and_stop_gradients(rng):
    x = draw(rng, (2, 6, 3), 5.0)
    layer = jnnx.RevIN(3, rngs=nnx.Rngs(0))
    _, stats = layer(x)
    forecast, _ = layer(jnp.ones((2, 4, 3)), stats=stats, inverse=True)
    close(forecast, np.broadcast_to(x.mean(1, keepdims=True) + np.sqrt(x.var(1, keepdims=True) + 1e-5), (2, 4, 3)))
    quantiles = jax.tree.map(lambda a: a[:, None], stats)
    assert layer(jnp.ones((2, 9, 4, 3)), stats=quantiles, inverse=True)[0].shape == (2, 9, 4, 3)
    slope = jax.grad(lambda x: jn.rev_in(x)[0].sum() + sum(a.sum() for a in jn.rev_in(x)[1]))(x)
    close(slope, np.broadcast_to(1 / stats.std, x.shape))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: jn.rev_in(x, inverse=True), ValueError, "needs stats. Write stats=stats"),
        (lambda x: jn.rev_in(x, stats=jn.WindowStats(x[0], x[0])), ValueError, "must have x's rank 3"),
        (lambda x: jn.rev_in(x, stats=x), TypeError, "must be a mean and a std"),
        (lambda x: jn.RevIN(center="first"), ValueError, 'Write center="mean"'),
        (lambda x: jn.rev_in(x, activation="relu"), ValueError, "would have to be inverted"),
        (lambda x: jn.rev_in(x, axis=0), ValueError, "batch axis"),
    ],
)
def test_a_wrong_call_of_a_window_norm_is_explained(call, error, message):
    with pytest.raises(error, match=message):
        call(jnp.ones((2, 3, 4)))


@pytest.mark.parametrize("center", ["mean", "last"])
def test_windows_that_devices_divide_are_whole_windows(center, rng):
    x, mask = draw(rng, (2, 16, 3), 4.0), rng.random((2, 16, 3)) < 0.6
    mask[:, -5:, 1] = False  # the last valid element lies on another device than the last one
    run = lambda x, mask, **call: jn.rev_in(x, mask=mask, center=center, **call)
    mesh = mesh_of("auto", (4,), ("t",))
    cut = P(None, "t")
    over = jax.shard_map(lambda *a: run(*a, axis_name="t"), mesh=mesh, in_specs=(cut, cut), out_specs=(cut, P()))
    with jax.set_mesh(mesh):
        got = jax.jit(over)(*placed(mesh, (x, cut), (mask, cut)))
    jax.tree.map(close, got, run(x, mask))


def test_patches_in_any_pieces_are_one_call_and_the_last_is_rev_in_of_all(rng):
    x, mask = draw(rng, (2, 6, 4, 3), 3.0), rng.random((2, 6, 4, 3)) < 0.7
    mask[0, :2] = False  # this series starts later

    @jit_unoptimized
    def ways(x):
        whole = jn.running_rev_in(x, mask=mask)
        carry, parts = jn.Moments.empty((2, 3)), []
        for a, b in ((0, 1), (1, 4), (4, 6)):
            *part, carry = jn.running_rev_in(x[:, a:b], mask=mask[:, a:b], carry=carry)
            parts.append(part)
        pieces = jax.tree.map(lambda *a: jnp.concatenate(a, 1), *parts)
        flat = jn.rev_in(x, mask=mask, epsilon=1e-6, epsilon_mode="one_below")
        back = jn.running_rev_in(whole[0], stats=whole[1], inverse=True)[0]
        return whole, (*pieces, carry), flat, back

    whole, pieces, (y, stats), back = ways(np.where(mask, x, np.nan))
    jax.tree.map(close, whole, pieces)
    close(whole[0][:, -1], y[:, -1])
    jax.tree.map(lambda a, b: close(a[:, -1], b[:, 0]), whole[1], stats)
    close(np.where(mask, back, x), x)
    np.testing.assert_array_equal(whole[1].std[0, :2], 1.0)


# --- graphs -----------------------------------------------------------------------------------------------------------

GRAPHS = {
    "graph": lambda x, ids, **call: jn.graph_norm(x, ids, mean_scale=jnp.full(x.shape[-1], 0.3), **call),
    "pair": jn.pair_norm,
    "pair each": lambda x, ids, **call: jn.pair_norm(x, ids, scale_individually=True, **call),
    "mean": jn.mean_subtraction_norm,
    "size": jn.graph_size_norm,
    "segments": functools.partial(jn.segment_norm, kind="instance"),
    "segments rms": functools.partial(jn.segment_norm, kind="rms"),
}


@pytest.mark.parametrize("kind", GRAPHS)
def test_graphs_that_straddle_devices_in_any_order_with_padding(kind, rng):
    """Permuted nodes, sorted ones under a promise, and nodes over eight devices, most of whose graphs are cut."""
    x, order = draw(rng, (40, 4), 2.0), rng.permutation(40)
    ids = np.sort(rng.integers(0, 4, 40))
    ids[-5:] = 9  # padding; and graph 4 is empty
    norm = functools.partial(GRAPHS[kind], num_segments=5)
    mesh = mesh_of("auto", (8,), ("d",))
    over = jax.shard_map(functools.partial(norm, axis_name="d"), mesh=mesh, in_specs=P("d"), out_specs=P("d"))

    def ways(x, ids):
        return norm(x, ids), norm(x, ids, indices_are_sorted=True), norm(x[order], ids[order])

    want, promised, permuted = jit_unoptimized(ways)(x, ids)
    with jax.set_mesh(mesh):
        devices, by_jit = jit_unoptimized(lambda x, ids: (over(x, ids), norm(x, ids)))(
            *placed(mesh, (x, P("d")), (ids, P("d")))
        )
    for got in (promised, devices, by_jit):
        close(got, want)
    close(permuted, want[order])
    np.testing.assert_array_equal(want[-5:], 0.0)
    one = norm(x[ids == 1], np.zeros((ids == 1).sum(), int))
    close(want[ids == 1], one)


def test_graph_norm_of_a_whole_mean_is_the_instance_norm_of_segments(rng):
    x, ids = draw(rng, (20, 4), 2.0), rng.integers(-1, 3, 20)
    want = jn.segment_norm(x, ids, num_segments=3, kind="instance")
    close(jn.graph_norm(x, ids, num_segments=3), want)
    close(jn.graph_norm(x, ids, mean_scale=np.ones(4), num_segments=3), want)


def test_norms_of_graphs_are_in_range_at_every_magnitude(rng):
    x, ids = draw(rng, (12, 4), 2.0), np.repeat([0, 1], 6)
    message = lambda x, ids, epsilon, num_segments: jn.message_norm(x, x, epsilon=epsilon) / x
    for norm in (GRAPHS["graph"], GRAPHS["pair"], GRAPHS["pair each"], message):
        norm = functools.partial(norm, epsilon=0.0, num_segments=2)
        want = norm(x, ids)
        for size in (1e-20, 1e20):
            np.testing.assert_allclose(norm(x * np.float32(size), ids), want, rtol=2e-5, atol=2e-5)


def test_the_length_of_features_has_a_gradient_of_0_at_0():
    message = np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)
    slope = jax.grad(lambda x, m: jn.message_norm(x, m).sum(), argnums=(0, 1))(np.zeros((2, 2), "f"), message)
    np.testing.assert_array_equal(slope, np.zeros((2, 2, 2)))
    with pytest.raises(ValueError, match="must have x's shape"):
        jn.message_norm(message, message[0])


def test_dish_ts_puts_a_forecast_back_by_its_second_level(rng):
    x, y = draw(rng, (2, 6, 3), 4.0), draw(rng, (2, 5, 3))
    scale, bias, weight = *draw(rng, (2, 3)), draw(rng, (3, 6, 2), 0.2)
    _, stats = jn.dish_ts(x, scale, bias, weight)
    phi = jax.nn.gelu(np.einsum("ntc,ctk->knc", x, weight), approximate=False)[1][:, None]
    xi = ((x - phi) ** 2).sum(1, keepdims=True) / 5
    got, _ = jn.dish_ts(y, scale, bias, stats=stats, inverse=True)
    np.testing.assert_allclose(got, (y - bias) / scale * np.sqrt(xi + 1e-8) + phi, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"weight must be of shape \(channels, time, 2\)"):
        jn.dish_ts(y, weight=weight)
