"""Programs that outlive their process: the persistent compilation cache, saved executables. Over devices as on one."""

import inspect
import itertools

import jax
import numpy as np
import pytest
from catalogue import draw
from helpers.devices import close, collectives, mesh_of, placed
from helpers.native import run_python
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm as jn
from jaxnorm._backends import partition


def step(params, x, g, epsilon=1e-5):
    """Statistics over examples, then over features: one of the two crosses devices, whichever axis is sharded."""

    def both(params, x):
        y, _ = jn.BatchNorm(epsilon=epsilon).apply(params, jn.BatchNorm().init(x.shape[-1])[1], x, train=True)
        return jn.layer_norm(y)

    y, vjp = jax.vjp(both, params, x)
    return y, vjp(g)


PROGRAMS = """
import collections, pathlib, pickle
import jax, jax.monitoring, jaxnorm as jn, numpy as np
from jax.experimental import serialize_executable
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

folder = pathlib.Path(FOLDER)
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_compilation_cache_dir", str(folder / "cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event.split("/")[-1]]))

x, g = np.random.default_rng(0).normal(size=(2, 32, 6, 128)).astype("f")
mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
data, whole = P(("b", "a")), NamedSharding(mesh, P())
params = jn.Affine(np.ones(128, "f"), np.zeros(128, "f"))
over_devices = (jax.device_put(params, whole), *jax.device_put((x, g), NamedSharding(mesh, data)))
local = jax.shard_map(step, mesh=mesh, in_specs=(P(), data, data), out_specs=(data, (P(), data)))
for name, f, args in (("one", step, (params, x, g)), ("jit", step, over_devices), ("shard_map", local, over_devices)):
    compiled = jax.jit(f).lower(*args).compile()
    assert ('custom_call_target="jaxnorm' in compiled.as_text()) == jn.backends()["native"].active
    out = jax.tree.leaves(compiled(*args))
    saved = folder / f"{name}.saved"
    if saved.exists():
        devices = jax.devices()[: 1 if name == "one" else 4]
        parts = pickle.loads(saved.read_bytes())
        loaded = serialize_executable.deserialize_and_load(*parts, execution_devices=devices)
        for a, b in zip(jax.tree.leaves(loaded(*args)), out, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)
    else:
        saved.write_bytes(pickle.dumps(serialize_executable.serialize(compiled)))
print(events["cache_hits"], events["cache_misses"])
"""


def test_programs_are_found_in_the_cache_and_loaded_by_another_process(tmp_path):
    code = inspect.getsource(step) + PROGRAMS.replace("FOLDER", repr(str(tmp_path)))
    first, second = (list(map(int, run_python(code).split())) for _ in range(2))
    assert first[0] == second[1] == 0
    assert first[1] == second[0] >= 3


def test_equal_programs_have_equal_text_and_others_do_not(rng):
    """What a norm is must stand in the text of the program: two norms are not to be taken for one by a cache."""
    mesh, x, g = mesh_of("auto"), draw(rng, (32, 6, 128)), draw(rng, (32, 6, 128))
    params = jn.BatchNorm().init(128)[0]
    args = placed(mesh, (params, P()), (x, P("data")), (g, P("data")))

    def text(epsilon):
        jax.clear_caches()
        return jax.jit(lambda *args: step(*args, epsilon)).lower(*args).as_text()

    assert text(1e-5) == text(1e-5) != text(1e-3)


@pytest.mark.parametrize("spec", [P("data"), P(None, None, "data")], ids=str)
def test_the_former_partitioner_gives_the_same_values(spec, rng):
    """JAX's former partitioner, as long as there is one."""
    if not hasattr(jax.config, "jax_use_shardy_partitioner"):
        pytest.skip("this jax has Shardy alone")
    mesh, x, g = mesh_of("auto"), draw(rng, (32, 6, 128), 3.0), draw(rng, (32, 6, 128))
    params = jn.BatchNorm().init(128)[0]
    want = jax.jit(step)(params, x, g)
    args = placed(mesh, (params, P()), (x, spec), (g, spec))
    jax.config.update("jax_use_shardy_partitioner", False)
    try:
        run = jax.jit(lambda *args: step(*args))
        got = run(*args)
        assert set(collectives(run, *args)) == {"all-reduce"}
    finally:
        jax.config.update("jax_use_shardy_partitioner", True)
    close(got, want, atol=2e-4)
    assert got[0].sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim)


MESHES = [((6,), "a"), ((3, 2), "ab"), ((2, 3), "ab"), ((2, 2, 2), "abc")]


@pytest.mark.parametrize(("sizes", "names"), MESHES, ids=str)
def test_the_layout_is_read_from_the_sharding_alone(sizes, names, rng):
    """Every order of every mesh axis along two axes of x, in a program over a mesh that it does not name."""
    mesh = jax.make_mesh(sizes, tuple(names), devices=jax.devices()[: int(np.prod(sizes))])
    orders = [p for k in range(len(names) + 1) for p in itertools.permutations(names, k)]
    for first, second in itertools.product(orders, orders):
        if {*first} & {*second}:
            continue
        shape = (24, 1, 48)
        sharding = NamedSharding(mesh, P(first or None, None, second or None))._to_xla_hlo_sharding(3)
        found, spec = partition._spread(shape, sharding, [])
        assert partition._hlo_sharding(found, shape, spec) == sharding
        # An axis that the devices do not divide is left whole, and one that they do not divide in a result.
        assert partition._spread((25, 1, 48), sharding, [])[1][0] == ()
        assert partition._spread(shape, sharding, [(24, 1, 7)])[1][2] == ()


def test_six_devices_in_another_order_give_the_same_values(rng):
    mesh = jax.make_mesh((3, 2), ("a", "b"), devices=jax.devices()[:6])
    spec = P(("b", "a"))
    params, x, g = jn.BatchNorm().init(128)[0], draw(rng, (24, 2, 128), 3.0), draw(rng, (24, 2, 128))
    args = placed(mesh, (params, P()), (x, spec), (g, spec))
    close(jax.jit(step)(*args), jax.jit(step)(params, x, g), atol=2e-4)
    assert set(collectives(jax.jit(step), *args)) == {"all-reduce"}
