"""Law 5: over devices as on one device with all the data, forward and backward. Eight real devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import EACH, by_name, draw
from helpers.devices import (
    MESHES,
    SHAPE,
    alone_step,
    case,
    check_all_reduces,
    close,
    collectives,
    mesh_of,
    placed,
    step,
    uneven_mask,
)
from helpers.jit import jit_unoptimized
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm as jn
from jaxnorm._core import collectives as merging

OPTIONS = [
    {},
    {"momentum": None},
    {"zero_debias": True, "momentum": 0.9},
    {"unbiased_running_var": True},
    {"axis": 1},
]


WHERES = ["shard_map-auto", "shard_map-explicit", "pmap", "vmap"]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("where", WHERES)
def test_synchronized_batch_norm_matches_one_device(where, options, rng):
    """With a mask in every other case: each way to run, and all options, have some of both kinds."""
    masked = (WHERES.index(where) + OPTIONS.index(options)) % 2
    norm = jn.BatchNorm(**options)
    channels = 5 if norm.axis == 1 else 6
    params, state = norm.init(channels)
    params = jax.tree.map(lambda p: p + jnp.asarray(rng.normal(size=p.shape), p.dtype), params)
    x, g = draw(rng, SHAPE, 3.0), draw(rng, SHAPE)
    mask = uneven_mask(rng) if masked else None
    want = alone_step(norm, params, state, x, g, mask)
    synced = dataclasses.replace(norm, axis_name="data")
    if where.startswith("shard_map"):
        mesh, data = mesh_of(where.split("-")[1]), P("data")
        run = jax.shard_map(
            lambda p, s, *args: step(synced, p, s, *args),
            mesh=mesh, in_specs=(P(), P(), data, data, data), out_specs=(data, P(), (P(), data)),
        )  # fmt: skip
        # check_vma is on: that out_specs P() is accepted proves that state and parameter gradients are replicated.
        args = placed(mesh, (params, P()), (state, P()), (x, data), (g, data), (mask, data))
        close(jit_unoptimized(run)(*args), want, atol=2e-5)
        return
    split = lambda a: None if a is None else a.reshape(8, 4, *a.shape[1:])
    wrap = jax.pmap if where == "pmap" else lambda f, **how: jit_unoptimized(jax.vmap(f, **how))
    run = wrap(lambda *args: step(synced, params, state, *args), axis_name="data")
    y, new, (dparams, dx) = run(split(x), split(g), split(mask))
    for i in (0, 7):
        close(jax.tree.map(lambda a, i=i: a[i], new), want[1])
    got = y.reshape(SHAPE), (jax.tree.map(lambda a: a.sum(0), dparams), dx.reshape(SHAPE))
    close(got, (want[0], want[2]), atol=2e-5)


@pytest.mark.versions
@pytest.mark.parametrize("kind", MESHES)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("row", EACH, ids=str)
def test_jit_over_a_sharded_batch_matches_one_device(row, masked, kind, kernels, rng):
    """Batch sharded: equal to one device, nothing gathered, nothing moved; collectives for batch norm alone."""
    shape = (16, *row.shape[1:])
    params, x, g = row.params(rng), draw(rng, shape, 2.0), draw(rng, shape)
    mask = rng.random((16, *(1,) * (len(shape) - 1))) < 0.7 if masked else None
    state = row.state()
    run = jit_unoptimized(lambda p, x, g, m: step(row.spec, p, state, x, g, m))
    want = run(params, x, g, mask)
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        args = placed(mesh, (params, P()), (x, P("data")), (g, P("data")), (mask, P("data")))
        got = run(*args)
        close(got, want, atol=2e-5)
        forward = jit_unoptimized(lambda p, x, m: row.spec.apply(p, state, x, train=True, mask=m))
        ops = collectives(forward, args[0], args[1], args[3])
        backward = collectives(run, *args)
    assert got[0].sharding.is_equivalent_to(NamedSharding(mesh, P("data")), len(shape))
    # XLA's formula has two rounds, of a mean that no device knows beforehand: a common shift, then the sums about it.
    # Kernels give each device its own shift, and merge once. Backward: one round.
    rounds = 1 if kernels else 2
    check_all_reduces(ops, rounds if row.batch else 0)
    check_all_reduces(backward, rounds + 1 if row.batch else 1)  # for the others: those of scale and bias


ANY = {
    "layer": jn.LayerNorm(),
    "rms": jn.RMSNorm(),
    "group": jn.GroupNorm(num_groups=8),
    "instance": jn.InstanceNorm(),
    "batch": jn.BatchNorm(),
}


@pytest.mark.parametrize("kind", MESHES)
@pytest.mark.parametrize("axis", [1, 2], ids=["positions", "features"])
@pytest.mark.parametrize("norm", ANY.values(), ids=ANY)
def test_jit_over_another_sharded_axis_matches_one_device(norm, axis, kind, rng):
    """What each device needs of the others are sums: nothing of x's size is ever gathered or moved."""
    x, g = draw(rng, (4, 16, 32), 3.0), draw(rng, (4, 16, 32))
    params, state = norm.init(32)
    run = jit_unoptimized(lambda p, s, x, g: step(norm, p, s, x, g, None))
    want = run(params, state, x, g)
    mesh, spec, feature = mesh_of(kind), P(*(None,) * axis, "data"), P("data" if axis == 2 else None)
    with jax.set_mesh(mesh):
        args = placed(mesh, (params, feature), (state, feature), (x, spec), (g, spec))
        got = run(*args)
        close(got, want, atol=2e-5)
        assert set(collectives(run, *args)) <= {"all-reduce"}
    assert got[0].sharding.is_equivalent_to(NamedSharding(mesh, spec), 3)


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("layers", [1, 3])
def test_each_layer_takes_one_all_reduce_forward_and_one_backward(layers, masked, rng):
    norm = jn.BatchNorm(axis_name="data")
    params, state, x, g = case(norm, rng)
    mask = uneven_mask(rng) if masked else None
    mesh, data = mesh_of("auto"), P("data")

    def network(params, x, mask, train):
        for _ in range(layers):
            x, _ = norm.apply(params, state, jnp.sin(x), train=train, mask=mask)
        return x

    mapped = lambda f, specs, outs: jit_unoptimized(jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=outs))
    forward = mapped(lambda p, x, m: network(p, x, m, True), (P(), data, data), data)
    assert collectives(forward, params, x, mask) == ["all-reduce"] * layers
    inference = mapped(lambda p, x, m: network(p, x, m, False), (P(), data, data), data)
    assert collectives(inference, params, x, mask) == []

    def gradients(params, x, mask, g):
        return jax.grad(lambda p, x: jnp.sum(network(p, x, mask, True) * g), (0, 1))(params, x)

    both = mapped(gradients, (P(), data, data, data), (P(), data))
    assert collectives(both, params, x, mask, g) == ["all-reduce"] * 2 * layers
    jaxpr = str(
        jax.make_jaxpr(jax.pmap(lambda x: network(params, x, None, False), axis_name="data"))(x.reshape(8, 4, 5, 6))
    )
    assert "psum" not in jaxpr


@pytest.mark.parametrize("where", ["shard_map", "pmap", "vmap"])
@pytest.mark.parametrize(
    "groups", [[[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 7], [1, 6], [2, 5], [3, 4]], [[0], [1, 2, 3, 4, 5, 6, 7]]]
)
def test_axis_index_groups_share_statistics(where, groups, rng):
    norm = jn.BatchNorm(axis_name="data", axis_index_groups=groups)
    alone = jn.BatchNorm()
    params, state, x, g = case(norm, rng)
    mask = uneven_mask(rng)
    split = lambda a: a.reshape(8, 4, *a.shape[1:])
    if where == "shard_map":
        add = lambda tree: jax.tree.map(lambda a: a[None], tree)

        def body(params, x, g, m):
            return add(step(norm, params, state, x[0], g[0], m[0]))

        data = P("data")
        mapped = jax.shard_map(
            body, mesh=mesh_of("auto"), in_specs=(P(), data, data, data), out_specs=(data, data, (P(None), data))
        )
        y, new, (dparams, dx) = jit_unoptimized(mapped)(params, split(x), split(g), split(mask))
        dparams = jax.tree.map(lambda a: a[0], dparams)
    else:
        run = lambda x, g, m: step(norm, params, state, x, g, m)
        wrap = jax.pmap if where == "pmap" else lambda f, **how: jit_unoptimized(jax.vmap(f, **how))
        y, new, (dparams, dx) = wrap(run, axis_name="data")(split(x), split(g), split(mask))
        dparams = jax.tree.map(lambda a: a.sum(0), dparams)
    total = jax.tree.map(jnp.zeros_like, params)
    whole = alone_step(alone, params, state, x, g, mask)[1]
    for members in groups:
        part = lambda a, members=members: split(a)[np.array(members)].reshape(-1, *a.shape[1:])
        want_y, _, (want_dp, want_dx) = alone_step(alone, params, state, part(x), part(g), part(mask))
        pick = lambda a, members=members: a[np.array(members)]
        close(pick(y).reshape(want_y.shape), want_y)
        close(pick(dx).reshape(want_dx.shape), want_dx, atol=2e-5)
        for i in members:
            close(jax.tree.map(lambda a, i=i: a[i], new), whole)  # the running statistics are those of all devices
        total = jax.tree.map(jnp.add, total, want_dp)
    close(dparams, total, atol=5e-5)


def test_groups_must_hold_every_index_once(rng):
    norm = jn.BatchNorm(axis_name="d", axis_index_groups=[[0, 1], [1, 2]])
    params, state = norm.init(6)
    with pytest.raises(
        ValueError, match=r"every index 0\.\.3 of the axis once.*axis_index_groups=\[\[0, 1\], \[2, 3\]\]"
    ):
        jax.vmap(lambda x: norm.apply(params, state, x, train=True)[0], axis_name="d")(draw(rng, (4, 5, 6)))


def test_two_axis_names_share_statistics(rng):
    norm = jn.BatchNorm(axis_name=("host", "chip"))
    params, state, x, g = case(norm, rng)
    want = alone_step(jn.BatchNorm(), params, state, x, g, None)
    mesh, both = mesh_of("auto", (2, 4), ("host", "chip")), P(("host", "chip"))
    run = jax.shard_map(
        lambda p, x, g: step(norm, p, state, x, g, None),
        mesh=mesh, in_specs=(P(), both, both), out_specs=(both, P(), (P(), both)),
    )  # fmt: skip
    close(jit_unoptimized(run)(params, x, g), want, atol=2e-5)


@pytest.mark.parametrize("name", ["scale", "bias", "x", "weights"])
def test_a_single_tangent_in_shard_map_matches_one_device(name, rng):
    """The tangent of y varies over devices as y does, also where that of a replicated parameter is all there is."""
    norm = jn.BatchNorm(axis_name="data")
    params, state, x, _ = case(norm, rng)
    at = dict(scale=params.scale, bias=params.bias, x=jnp.asarray(x), weights=jnp.asarray(rng.uniform(1, 2, SHAPE)))
    v = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), jnp.float32), at)

    def along(norm, at, v):
        def f(value):
            a = {**at, name: value}
            y, _ = norm.apply(jn.Affine(a["scale"], a["bias"]), state, a["x"], train=True, weights=a["weights"])
            return y

        return jax.jvp(f, (at[name],), (v[name],))

    specs = dict(scale=P(), bias=P(), x=P("data"), weights=P("data"))
    run = jax.shard_map(
        lambda at, v: along(norm, at, v),
        mesh=mesh_of("auto"),
        in_specs=(specs, specs),
        out_specs=(P("data"), P("data")),
    )
    close(jit_unoptimized(run)(at, v), jit_unoptimized(along, static_argnums=0)(jn.BatchNorm(), at, v), atol=2e-5)


@pytest.mark.versions
@pytest.mark.parametrize("kind", MESHES)
@pytest.mark.parametrize("name", ["layer", "rms", "group-nhwc", "instance-nhwc"])
def test_axis_name_merges_the_statistics_of_sharded_rows(name, kind, rng):
    """Features of a row, or the spatial axis of an image, over eight devices: axis_name for the norms of rows."""
    row = by_name[name]
    spatial = name in ("group-nhwc", "instance-nhwc")
    shape = (4, 16, 3, 12) if spatial else (4, 3, 40)
    params, x, g = row.params(rng), draw(rng, shape, 2.0), draw(rng, shape)
    synced = dataclasses.replace(row.spec, axis_name="model")
    data, feature = (P(None, "model"), P()) if spatial else (P(None, None, "model"), P("model"))

    def grads(norm, params, x, g):
        y, vjp = jax.vjp(lambda p, x: norm.apply(p, (), x)[0], params, x)
        return y, vjp(g)

    mesh = mesh_of(kind, names=("model",))
    run = jit_unoptimized(
        jax.shard_map(
            lambda p, x, g: grads(synced, p, x, g),
            mesh=mesh, in_specs=(feature, data, data), out_specs=(data, (feature, data)),
        )
    )  # fmt: skip
    args = placed(mesh, (params, feature), (x, data), (g, data))
    close(run(*args), jit_unoptimized(grads, static_argnums=0)(row.spec, params, x, g), atol=2e-5)
    check_all_reduces(collectives(run, *args), 2)


def test_large_statistics_merge_in_two_rounds(rng, monkeypatch):
    """Beyond a slot for every device: a common shift first, then the sums about it. The same numbers."""
    norm = jn.BatchNorm(axis_name="data", momentum=0.9)
    params, state, x, g = case(norm, rng, mean=1e4)
    x, mask, data = x + 50 * np.arange(32, dtype=np.float32)[:, None, None], uneven_mask(rng), P("data")
    run = lambda: jax.shard_map(
        lambda p, x, g, m: step(norm, p, state, x, g, m),
        mesh=mesh_of("auto"), in_specs=(P(), data, data, data), out_specs=(data, P(), (P(), data)),
    )  # fmt: skip
    slots = jit_unoptimized(run())(params, x, g, mask)
    want = alone_step(dataclasses.replace(norm, axis_name=None), params, state, x, g, mask)
    close(slots, want, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(merging, "SLOT_BYTES", 0)
    jax.clear_caches()
    mapped = jit_unoptimized(run())
    close(mapped(params, x, g, mask), want, rtol=1e-4, atol=1e-4)
    assert collectives(mapped, params, x, g, mask) == ["all-reduce"] * 3
    norm = dataclasses.replace(norm, axis_index_groups=[[0, 1, 2, 3, 4, 5, 6, 7]])
    split = lambda a: a.reshape(8, 4, *a.shape[1:])
    each = jax.vmap(lambda x, g, m: step(norm, params, state, x, g, m), axis_name="data")
    y, new, _ = jit_unoptimized(each)(*map(split, (x, g, mask)))
    close((y.reshape(SHAPE), jax.tree.map(lambda a: a[0], new)), want[:2], rtol=1e-4, atol=1e-4)
    jax.clear_caches()


@pytest.mark.versions
@pytest.mark.parametrize("where", ["shard_map", "pmap", "vmap"])
def test_merge_across_matches_the_moments_of_all_data(where, rng):
    x = draw(rng, (8, 7, 3), 1e3)
    mask = rng.random((8, 7, 1)) < np.arange(8)[:, None, None] / 7
    merged = lambda x, m: jn.merge_across(jn.moments(x, 0, mask=m), "d")
    if where == "shard_map":
        one = lambda x, m: merged(x[0], m[0])
        mesh = mesh_of("auto", names=("d",))
        got = jit_unoptimized(jax.shard_map(one, mesh=mesh, in_specs=(P("d"), P("d")), out_specs=P()))(x, mask)
    else:
        wrap = jax.pmap if where == "pmap" else jax.vmap
        got = jax.tree.map(lambda a: a[5], wrap(merged, axis_name="d")(x, mask))
    valid = x.reshape(-1, 3)[mask.ravel()].astype(np.float64)
    np.testing.assert_array_equal(got.count, [len(valid)] * 3)
    np.testing.assert_allclose(got.mean, valid.mean(0), rtol=1e-7)
    np.testing.assert_allclose(got.var, valid.var(0), rtol=1e-4)


def test_ghost_batches_stay_on_their_device_and_the_state_merges(rng):
    norm = jn.BatchNorm(axis_name="data", virtual_batch_size=3, momentum=0.5)
    params, state, x, _ = case(norm, rng)
    data = P("data")
    mapped = jax.shard_map(
        lambda x: norm.apply(params, state, x, train=True), mesh=mesh_of("auto"), in_specs=data, out_specs=(data, P())
    )
    y, new = jit_unoptimized(mapped)(x)
    local = dataclasses.replace(norm, axis_name=None)
    for d in range(8):
        close(y[4 * d : 4 * d + 4], local.apply(params, state, x[4 * d : 4 * d + 4], train=True)[0])
    whole = dataclasses.replace(local, virtual_batch_size=None)
    close(new, whole.apply(params, state, x, train=True)[1])


def test_no_axis_name_is_touched_at_init_and_at_inference(rng):
    norm = jn.BatchNorm(axis_name="nowhere")
    params, state = norm.init(6)
    norm.apply(params, state, draw(rng, SHAPE), train=False)
    dataclasses.replace(norm, frozen=True).apply(params, state, draw(rng, SHAPE), train=True)
    with pytest.raises(
        NameError, match=r"batch_norm: axis_name='nowhere' is not bound here: call it inside jax\.shard_map"
    ):
        norm.apply(params, state, draw(rng, SHAPE), train=True)
    with pytest.raises(NameError, match="layer_norm: axis_name='nowhere' is not bound"):
        jn.layer_norm(draw(rng, SHAPE), axis_name="nowhere")
