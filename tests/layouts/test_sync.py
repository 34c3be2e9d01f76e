"""Which devices share statistics: all, groups of them, each alone; one argument in every way to run on eight devices.

Whatever it says, the output and gradients of a group are those of one device with the group's data, and the running
statistics those of one device with all of it, the same on all.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import draw
from helpers.compiled import hlo
from helpers.devices import SHAPE, alone_step, case, close, collectives, mesh_of, placed, step, uneven_mask
from helpers.jit import jit_unoptimized
from jax.sharding import PartitionSpec as P

import jaxnorm as jn
import jaxnorm.linen as jnn
import jaxnorm.nnx as jnnx

EACH = [[d] for d in range(8)]
RUNS = {k: [list(range(d, d + k)) for d in range(0, 8, k)] for k in (1, 2, 4, 8)}
CROSSED, UNEVEN = [[0, 7], [1, 6], [2, 5], [3, 4]], [[0], [1, 2, 3, 4, 5, 6, 7]]
SYNCS = {  # what is said, and the groups that it means
    "global": ("global", RUNS[8]),
    "local": ("local", EACH),
    "pairs": (2, RUNS[2]),
    "fours": (4, RUNS[4]),
    "eight": (8, RUNS[8]),
    "crossed": (CROSSED, CROSSED),
    "uneven": (UNEVEN, UNEVEN),
}


def by_groups(norm, groups, params, state, x, g, mask):
    """What `step` gives of each group on its own, and the state of one device with everything."""
    alone = dataclasses.replace(norm, axis_name=None, sync="global", axis_index_groups=None)
    y, dx, dparams = np.zeros_like(x), np.zeros_like(x), jax.tree.map(jnp.zeros_like, params)
    for members in groups:
        rows = np.concatenate([np.arange(4 * d, 4 * d + 4) for d in members])
        part = None if mask is None else mask[rows]
        y[rows], _, (dp, dx[rows]) = alone_step(alone, params, state, x[rows], g[rows], part)
        dparams = jax.tree.map(jnp.add, dparams, dp)
    return y, alone_step(alone, params, state, x, g, mask)[1], (dparams, dx)


def on_devices(where, norm, params, state, x, g, mask):
    """`step` in one of the ways to run on eight devices, each with four of the examples."""
    run, data = lambda p, s, x, g, m: step(norm, p, s, x, g, m), P("data")
    way, _, kind = where.partition("-")
    if way in ("shard_map", "jit"):
        mesh = mesh_of(kind)
        args = placed(mesh, (params, P()), (state, P()), (x, data), (g, data), (mask, data))
        if way == "shard_map":  # with check_vma: that out_specs P() is accepted proves that the state is replicated
            run = jax.shard_map(
                run, mesh=mesh, in_specs=(P(), P(), data, data, data), out_specs=(data, P(), (P(), data))
            )
        with jax.set_mesh(mesh):
            return jit_unoptimized(run)(*args)
    split = lambda a: None if a is None else a.reshape(8, 4, *a.shape[1:])
    each = lambda x, g, m: run(params, state, x, g, m)
    mapped = jax.pmap(each, axis_name="data") if way == "pmap" else jit_unoptimized(jax.vmap(each, axis_name="data"))
    y, new, (dp, dx) = mapped(*map(split, (x, g, mask)))
    for leaf in jax.tree.leaves(new):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    first, total = lambda a: a[0], lambda a: a.sum(0)
    return y.reshape(SHAPE), jax.tree.map(first, new), (jax.tree.map(total, dp), dx.reshape(SHAPE))


WHERES = ["shard_map-auto", "shard_map-explicit", "pmap", "vmap", "jit-auto", "jit-explicit"]


@pytest.mark.parametrize("sync", SYNCS)
@pytest.mark.parametrize("where", WHERES)
def test_each_group_matches_one_device_with_its_data(where, sync, rng):
    """With a mask in every other case: each way to run, and each sync, has some of both kinds."""
    said, groups = SYNCS[sync]
    masked = (WHERES.index(where) + list(SYNCS).index(sync)) % 2
    norm = jn.BatchNorm(axis_name="data", sync=said, momentum=0.9)
    args = (*case(norm, rng), uneven_mask(rng) if masked else None)
    close(on_devices(where, norm, *args), by_groups(norm, groups, *args), atol=5e-5)


@pytest.mark.parametrize("options", [{"momentum": None}, {"axis": 1}, {"unbiased_running_var": True}], ids=str)
@pytest.mark.parametrize("where", ["shard_map-auto", "jit-auto", "jit-explicit"])
def test_local_sync_works_with_every_option(where, options, rng):
    norm = jn.BatchNorm(axis_name="data", sync="local", **options)
    channels = 5 if norm.axis == 1 else 6
    params, state = norm.init(channels)
    args = (params, state, draw(rng, SHAPE, 3.0), draw(rng, SHAPE), None)
    close(on_devices(where, norm, *args), by_groups(norm, EACH, *args), atol=5e-5)


@pytest.mark.parametrize("where", ["shard_map-auto", "shard_map-explicit", "jit-auto", "jit-explicit"])
def test_groups_take_parameters_per_example(where, rng):
    """They are divided among the devices as x is."""
    norm = jn.BatchNorm(axis_name="data", sync=2)
    state, x, g = norm.init(6)[1], draw(rng, SHAPE, 1.0), draw(rng, SHAPE)
    params = jn.Affine(*(jnp.asarray(p, jnp.float32) for p in rng.normal(size=(2, 32, 1, 6))))
    way, _, kind = where.partition("-")
    mesh, data = mesh_of(kind), P("data")
    run = lambda p, x, g: step(norm, p, state, x, g, None)
    if way == "shard_map":
        run = jax.shard_map(run, mesh=mesh, in_specs=(data, data, data), out_specs=(data, P(), (data, data)))
    with jax.set_mesh(mesh):
        y, new, (dparams, dx) = jit_unoptimized(run)(*placed(mesh, (params, data), (x, data), (g, data)))
    alone = jn.BatchNorm()
    y, params, dparams, dx = jax.tree.map(np.asarray, (y, params, dparams, dx))
    close(new, alone_step(alone, params, state, x, g, None)[1])
    for start in range(0, 32, 8):
        rows = slice(start, start + 8)
        pick = lambda tree, rows=rows: jax.tree.map(lambda a: a[rows], tree)
        want = alone_step(alone, pick(params), state, x[rows], g[rows], None)
        close((y[rows], pick((dparams, dx))), (want[0], want[2]), atol=5e-5)


NESTED = {"hosts' chips": (4, RUNS[4]), "pairs of chips": (2, RUNS[2]), "local": ("local", EACH),
          "global": ("global", RUNS[8])}  # fmt: skip


IN_TURN = ("shard_map-explicit", "jit-auto"), ("shard_map-auto", "jit-explicit")


@pytest.mark.parametrize(("sync", "where"), [(s, w) for i, s in enumerate(NESTED) for w in IN_TURN[i % 2]])
def test_groups_of_neighbours_follow_the_last_axis_first(sync, where, rng):
    """Of two axes the last runs fastest: four neighbours are the chips of one host."""
    said, groups = NESTED[sync]
    names = ("host", "chip")
    norm = jn.BatchNorm(axis_name=names, sync=said)
    params, state, x, g = case(norm, rng)
    mask = uneven_mask(rng)
    way, _, kind = where.partition("-")
    mesh, both = mesh_of(kind, (2, 4), names), P(names)
    run = lambda p, x, g, m: step(norm, p, state, x, g, m)
    if way == "shard_map":
        run = jax.shard_map(run, mesh=mesh, in_specs=(P(), both, both, both), out_specs=(both, P(), (P(), both)))
    with jax.set_mesh(mesh):
        args = placed(mesh, (params, P()), (x, both), (g, both), (mask, both))
        compiled = jit_unoptimized(run).lower(*args).compile()
        got, text = compiled(*args), compiled.as_text()
    close(got, by_groups(norm, groups, params, state, x, g, mask), atol=5e-5)
    assert not re.search("all-gather|all-to-all|collective-permute", text)
    if sync == "hosts' chips":  # what the layer waits for never leaves the host
        spread = [c.groups for c in hlo.collectives(text)]
        within = [groups for groups in spread if groups == ((0, 1, 2, 3), (4, 5, 6, 7))]
        # Forward and backward of the layer; between hosts go the running statistics, and those of the parameters.
        assert len(within) == 2, spread


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("where", ["shard_map-auto", "jit-auto", "jit-explicit"])
def test_local_sync_takes_one_all_reduce_for_the_running_statistics(where, masked, rng):
    norm = jn.BatchNorm(axis_name="data", sync="local")
    params, state, x, g = case(norm, rng)
    mask = uneven_mask(rng) if masked else None
    way, _, kind = where.partition("-")
    mesh, data = mesh_of(kind), P("data")

    def compiled(f, outs):
        if way == "shard_map":
            f = jax.shard_map(f, mesh=mesh, in_specs=(P(), data, data, data), out_specs=outs)
        with jax.set_mesh(mesh):
            args = placed(mesh, (params, P()), (x, data), (g, data), (mask, data))
            return collectives(jit_unoptimized(f), *args)

    forward = lambda p, x, g, m: norm.apply(p, state, x, train=True, mask=m)
    still = lambda p, x, g, m: norm.apply(p, state, x, train=True, mask=m, update_stats=False)[0]
    grad = lambda p, x, g, m: jax.vjp(lambda x: still(p, x, g, m), x)[1](g)[0]
    assert compiled(forward, (data, P())) == ["all-reduce"]
    assert compiled(still, data) == []
    assert compiled(grad, data) == []


@pytest.mark.parametrize("sync", ["pairs", "crossed"])
@pytest.mark.parametrize("where", ["shard_map-auto", "jit-auto", "jit-explicit"])
def test_groups_gather_nothing(where, sync, rng):
    norm = jn.BatchNorm(axis_name="data", sync=SYNCS[sync][0])
    params, state, x, g = case(norm, rng)
    way, _, kind = where.partition("-")
    mesh, data = mesh_of(kind), P("data")
    f, outs = lambda p, x, g: step(norm, p, state, x, g, None), (data, P(), (P(), data))
    if way == "shard_map":
        f = jax.shard_map(f, mesh=mesh, in_specs=(P(), data, data), out_specs=outs)
    with jax.set_mesh(mesh):
        ops = collectives(jit_unoptimized(f), *placed(mesh, (params, P()), (x, data), (g, data)))
    # The layer's forward and backward, the running statistics, and the parameters' gradients; some come combined.
    assert set(ops) == {"all-reduce"}
    assert len(ops) <= 4


def test_ghost_batches_under_every_sync_stay_on_their_device(rng):
    norm = jn.BatchNorm(axis_name="data", sync="local", virtual_batch_size=2)
    params, state, x, g = case(norm, rng)
    ghosts = jn.BatchNorm(virtual_batch_size=2)
    want = alone_step(ghosts, params, state, x, g, None)
    for where in ("shard_map-auto", "jit-auto", "jit-explicit", "pmap"):
        close(on_devices(where, norm, params, state, x, g, None), want, atol=5e-5)


def test_jit_ignores_the_name_of_an_automatic_mesh_axis(rng):
    """One spec runs in shard_map and under jit: there arrays are whole along the axis, for row norms as well."""
    mesh = mesh_of("auto")
    x = draw(rng, SHAPE, 3.0)
    with jax.set_mesh(mesh):
        for spec in (jn.BatchNorm(), jn.LayerNorm(), jn.RMSNorm(), jn.GroupNorm(num_groups=2), jn.InstanceNorm()):
            params, state = spec.init(6)
            named = dataclasses.replace(spec, axis_name="data")
            apply = lambda spec, x, p=params, s=state: spec.apply(p, s, x, train=True)
            close(jit_unoptimized(apply, static_argnums=0)(named, x), apply(spec, x))
        with pytest.raises(NameError, match="axis_name='model' is not bound here"):
            jn.layer_norm(x, axis_name="model")
        with pytest.raises(NameError, match="axis_name='data' is not bound here"):
            jn.layer_norm(x, axis_name="data", axis_index_groups=EACH)


BAD = [
    (dict(sync="all"), r"sync must be \"global\", \"local\", a number .*got 'all'\. Write sync=\"local\""),
    (dict(sync=0), "sync must be .*got 0"),
    (dict(sync=True), "sync must be .*got True"),
    (dict(sync="local"), r"divides the devices of axis_name, which is None\. Write axis_name=\"data\""),
    (dict(sync=2, axis_name="d", axis_index_groups=[[0], [1]]), r"both say which devices.*Write sync=.*0.*1.* alone"),
    (dict(sync=2, axis_name="d", virtual_batch_size=4), r"virtual_batch_size=4 already says .*Write sync=\"global\""),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda v: str(v)[:40])
def test_a_wrong_sync_is_explained(options, message):
    with pytest.raises(ValueError, match=f"(?s)BatchNorm: .*{message}"):
        jn.BatchNorm(**options)
    x, state = np.ones((4, 6), np.float32), jn.BatchNorm().init(6)[1]
    with pytest.raises(ValueError, match=f"(?s)batch_norm: .*{message}"):
        jn.batch_norm(x, None, state, train=True, **options)


def test_a_sync_that_does_not_fit_the_devices_is_explained(rng):
    norm = jn.BatchNorm(axis_name="data", sync=3)
    params, state, x, _ = case(norm, rng)
    run = lambda norm, x: norm.apply(params, state, x, train=True)[0]
    with pytest.raises(ValueError, match=r"sync=3 does not divide the 8 devices .*Write sync=2"):
        jax.vmap(lambda x: run(norm, x), axis_name="data")(x.reshape(8, 4, 5, 6))
    with jax.set_mesh(mesh_of("auto")):
        with pytest.raises(ValueError, match=r"sync=3 does not divide the 8 devices"):
            run(norm, x)
        with pytest.raises(ValueError, match=r"the 30 examples of x .* do not divide among the 8 devices"):
            run(dataclasses.replace(norm, sync=2), x[:30])


# --- Flax -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sync", ["local", 2, CROSSED], ids=str)
def test_flax_layers_pass_sync_on(sync, rng):
    x, data, mesh = draw(rng, (32, 6), 2.0), P("data"), mesh_of("auto")
    spec = jn.BatchNorm(axis_name="data", sync=sync)
    params, state = spec.init(6)
    mapped = lambda f, *specs, outs: jit_unoptimized(jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=outs))
    y, new = mapped(lambda x: spec.apply(params, state, x, train=True), data, outs=(data, P()))(x)

    layer = jnn.BatchNorm(axis_name="data", sync=sync, use_running_average=False)
    variables = layer.init(jax.random.key(0), x[:4])
    run = lambda v, x: layer.apply(v, x, mutable=["batch_stats"])
    y_linen, updates = mapped(run, P(), data, outs=(data, P()))(variables, x)
    close((y_linen, updates["batch_stats"]), (y, dict(mean=new.mean, var=new.var)))

    nnx = pytest.importorskip("flax.nnx")
    graph, variables = nnx.split(jnnx.BatchNorm(6, axis_name="data", sync=sync, rngs=nnx.Rngs(0)))

    def run_nnx(variables, x):
        layer = nnx.merge(graph, variables)
        return layer(x), (layer.mean[...], layer.var[...])

    close(mapped(run_nnx, P(), data, outs=(data, P()))(variables, x), (y, (new.mean, new.var)))


def test_flax_layers_refuse_statistics_that_differ_between_devices(rng):
    nnx = pytest.importorskip("flax.nnx")
    x, data, mesh = draw(rng, (32, 6), 2.0), P("data"), mesh_of("auto")
    layer = jnn.BatchNorm(use_running_average=False)
    variables = layer.init(jax.random.key(0), x[:4])
    run = lambda v, x: layer.apply(v, x, mutable=["batch_stats"])
    mapped = lambda f, *specs, outs=data, **how: jit_unoptimized(
        jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=outs, **how)
    )
    message = r"BatchNorm: the running statistics would differ .*Write axis_name='data'.*sync=\"local\".*sync_state"
    with pytest.raises(ValueError, match=message):
        mapped(run, P(), data)(variables, x)
    graph, state = nnx.split(jnnx.BatchNorm(6, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=message):
        mapped(lambda s, x: nnx.merge(graph, s)(x), P(), data)(state, x)

    # Not refused: one set of statistics for each device, no update, inference, and where JAX does not know.
    stacked = jax.tree.map(lambda a: jnp.stack([a] * 8), variables)
    own = lambda v, x: run(jax.tree.map(lambda a: a[0], v), x)
    _, updates = mapped(lambda v, x: jax.tree.map(lambda a: a[None], own(v, x)), data, data)(stacked, x)
    whole = jn.BatchNorm().apply(*jn.BatchNorm().init(6), x, train=True)[1]
    close(updates["batch_stats"]["mean"].mean(0), whole.mean)
    mapped(lambda v, x: layer.apply(v, x, update_stats=False), P(), data)(variables, x)
    mapped(lambda v, x: layer.clone(use_running_average=True).apply(v, x), P(), data)(variables, x)
    mapped(lambda v, x: run(v, x)[0], P(), data, check_vma=False)(variables, x)
    jax.pmap(run, axis_name="data", in_axes=(None, 0))(variables, x.reshape(8, 4, 6))
