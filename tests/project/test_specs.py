"""The specs: equal by value, hashable, picklable, one trace for equal ones; the package around them."""

import ast
import dataclasses
import inspect
import itertools
import pickle
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import EACH, ROWS, draw

import jaxnorm as jn

SPECS = {r.name: type(r.spec) for r in EACH}


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_equal_specs_are_equal_hash_equal_and_pickle(row):
    again = dataclasses.replace(row.spec)
    assert again == row.spec
    assert hash(again) == hash(row.spec)
    assert pickle.loads(pickle.dumps(row.spec)) == row.spec
    assert isinstance(row.spec, jn.Norm)
    assert dataclasses.replace(row.spec, scale_offset=0.5) != row.spec
    with pytest.raises(dataclasses.FrozenInstanceError):
        row.spec.scale_offset = 0.5


def test_spellings_of_one_spec_are_one_spec():
    assert jn.LayerNorm(dtype="bfloat16") == jn.LayerNorm(dtype=jnp.bfloat16)
    assert hash(jn.LayerNorm(param_dtype=np.float32)) == hash(jn.LayerNorm(param_dtype=jnp.float32))
    groups = [[0, 1], [2, 3]]
    listed = jn.BatchNorm(axis_name=["a", "b"], axis_index_groups=groups)
    assert listed == jn.BatchNorm(axis_name=("a", "b"), axis_index_groups=((0, 1), (2, 3)))
    assert hash(listed)


PLAIN = [  # in Python's own numbers
    (jn.GroupNorm, dict(num_groups=2, axis=1, reduction_axes=(1, 2), scale_offset=1.0)),
    (jn.GroupNorm, dict(group_size=2, epsilon=0.5)),
    (jn.LayerNorm, dict(axis=(1, 2), use_bias=False)),
    (jn.BatchNorm, dict(virtual_batch_size=4, axis=1, min_count=2.0, momentum=0.5, frozen=True)),
    (jn.BatchNorm, dict(sync=2, axis_name="data", zero_debias=True)),
    (jn.BatchNorm, dict(axis_index_groups=((0, 1), (2, 3)), axis_name="data")),
]


SPELLINGS = [np.asarray, jnp.asarray, lambda v: np.asarray(v)[()]]


@pytest.mark.parametrize("spell", SPELLINGS, ids=["numpy", "jax", "scalar"])
def test_specs_turn_numpy_numbers_into_python_numbers(spell):
    """Equal, with equal hashes, so that they share a trace: ints, floats, bools, and 0-d arrays."""
    for spec, options in PLAIN:
        spelt = {k: v if isinstance(v, str) else spell(v) for k, v in options.items()}
        assert spec(**spelt) == spec(**options)
        assert hash(spec(**spelt)) == hash(spec(**options))
        assert repr(spec(**spelt)) == repr(spec(**options))
    for features in (8, (6, 8)):
        norm = jn.LayerNorm(axis=(1, 2))
        assert jax.tree.map(jnp.shape, norm.init(spell(features))) == jax.tree.map(jnp.shape, norm.init(features))


def test_functions_take_numpy_numbers():
    """The programs are those of Python's own numbers."""
    state = jn.RunningStats(jnp.zeros(8), jnp.ones(8))
    train = lambda x, **options: jn.batch_norm(x, None, state, train=True, **options)
    mapped = lambda f: lambda x, **options: jax.vmap(lambda x: f(x, axis_name="d", **options), axis_name="d")(x)
    calls = [
        (jn.layer_norm, dict(axis=(1, 2), epsilon=0.5)),
        (jn.rms_norm, dict(axis=1, scale_offset=1)),
        (jn.group_norm, dict(num_groups=2, reduction_axes=(1, 2), axis=2)),
        (jn.group_norm, dict(group_size=4)),
        (jn.instance_norm, dict(axis=1)),
        (lambda x, **options: jn.gated_rms_norm(x, x, **options), dict(group_size=4, norm_before_gate=False)),
        (train, dict(virtual_batch_size=2, min_count=3, skip_nonfinite=True, update_stats=True)),
        (mapped(train), dict(sync=2)),
        (mapped(jn.layer_norm), dict(axis_index_groups=((0, 1), (2, 3)))),
        (jn.moments, dict(axes=(0, 1))),
    ]

    def program(f, options) -> str:
        made = jax.make_jaxpr(lambda x: f(x, **options))(np.ones((4, 6, 8), np.float32))
        return re.sub("0x[0-9a-f]+", "", str(made))

    for f, options in calls:
        for spell in SPELLINGS:
            assert program(f, {k: spell(v) for k, v in options.items()}) == program(f, options)


@pytest.mark.parametrize("row", EACH, ids=str)
def test_params_and_state_may_be_dicts(row, rng):
    """As Flax has them, and as a checkpoint restored without a template does. The state out is a dict as well."""
    params, x = row.params(rng), draw(rng, row.shape)
    state = row.state()
    restored = restored_from_bytes({"params": params, "state": state})
    assert row.batch == (set(restored["state"]) == {"mean", "var", "count"})
    step = jax.jit(lambda params, state, train: row.spec.apply(params, state, x, train=train))
    for train in (True, False) if row.batch else (True,):
        y, new = step(params, state, train)
        y_of_dicts, new_of_dicts = step(restored["params"], restored["state"], train)
        np.testing.assert_array_equal(y_of_dicts, y)
        assert jax.tree.structure(new_of_dicts) == jax.tree.structure(restored["state"])
        assert type(new_of_dicts) is dict  # of a row norm, {} as flax.serialization makes of ()
        jax.tree.map(np.testing.assert_array_equal, new_of_dicts, getattr(new, "_asdict", dict)())
    alone = step({"bias": params.bias}, state, True)[0]
    np.testing.assert_array_equal(alone, step(jn.Affine(None, params.bias), state, True)[0])


def restored_from_bytes(tree):
    """Through flax.serialization, without a template: NamedTuples come back as dicts."""
    from flax import serialization

    return serialization.msgpack_restore(serialization.msgpack_serialize(serialization.to_state_dict(tree)))


def test_a_restored_state_continues_training():
    """Through a scan, at inference, folded, gathered over micro-batches."""
    norm, batches = jn.BatchNorm(momentum=0.5), np.arange(24.0, dtype=np.float32).reshape(3, 4, 2)
    params, state = norm.init(2)
    step = lambda state, x: norm.apply(params, state, x, train=True)[::-1]
    restored = restored_from_bytes(state)
    want, got = (jax.lax.scan(step, s, batches)[0] for s in (state, restored))
    jax.tree.map(np.testing.assert_array_equal, got, want._asdict())
    eager = norm.apply(params, restored, batches[0], train=False)
    np.testing.assert_array_equal(eager[0], norm.apply(params, state, batches[0], train=False)[0])
    assert jax.tree.structure(eager[1]) == jax.tree.structure(restored)
    folded = norm.as_affine(restored_from_bytes(params), got)
    jax.tree.map(np.testing.assert_array_equal, folded, norm.as_affine(params, want))
    seen = jn.moments(batches, (0, 1))
    updated = norm.update_state(restored, restored_from_bytes(seen))
    jax.tree.map(np.testing.assert_array_equal, updated, norm.update_state(state, seen)._asdict())


def test_functions_and_specs_show_their_signatures_and_pickle():
    """Though each explains a wrong call: what does so is not seen."""
    for name in jn.__all__:
        thing = getattr(jn, name)
        if inspect.isfunction(thing) or hasattr(thing, "apply"):
            kinds = {p.kind for p in inspect.signature(thing).parameters.values()}
            variadic = kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
            assert not variadic or name in ("Norm", "make", "tabulate"), name
            assert pickle.loads(pickle.dumps(thing)) is thing
    assert jax.jit(jn.layer_norm, static_argnames=("axis", "epsilon"))(np.ones((2, 3)), axis=0, epsilon=1.0).ndim == 2


@pytest.mark.parametrize("row", EACH, ids=str)
def test_equal_specs_share_a_trace(row, rng):
    traces = []

    def apply(spec, params, x):
        traces.append(spec)
        return spec.apply(params, row.state(), x, train=True)[0]

    run = jax.jit(apply, static_argnums=0)
    for _ in range(3):
        run(dataclasses.replace(row.spec), row.params(rng), draw(rng, row.shape))
    assert len(traces) == 1


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_init_makes_identity_parameters_without_data(row):
    params, state = row.spec.init(row.features)
    # The parameters that a norm declares, with the names and options that all norms share for the two they may have.
    assert type(params) is row.spec.Params
    assert type(state) is row.spec.State if row.stateful else state == ()
    scale = 0.0 if isinstance(row.spec, jn.GlobalResponseNorm) else 1.0  # it adds to x
    for name, first in (("scale", scale - getattr(row.spec, "scale_offset", 0.0)), ("bias", 0.0)):
        if name in params._fields:
            assert (getattr(params, name) is None) != getattr(row.spec, f"use_{name}", True)
        if getattr(params, name, None) is not None:
            np.testing.assert_array_equal(getattr(params, name), first)
    assert all(p.dtype == np.float32 for p in jax.tree.leaves(params))
    features = (12, 5) if isinstance(getattr(row.spec, "axis", -1), tuple) else (12,)
    shaped = jax.eval_shape(lambda: row.spec.init(features))
    of_features = lambda shape: shape in (features, ()) or shape[row.spec.state_axes :] == features
    # Without those of a shape of their own.
    own = shaped[0]._replace(**dict.fromkeys({*row.spec.whole} & {*params._fields}))
    kept = () if row.spec.own_state_shape else shaped[1]
    assert all(of_features(leaf.shape) for leaf in jax.tree.leaves((own, kept)))
    half = dataclasses.replace(row.spec, param_dtype=jnp.bfloat16).init(row.features)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(half[0]))
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(half[1]))


@pytest.mark.parametrize("row", [r for r in ROWS if not r.stateful], ids=str)
def test_a_norm_without_state_ignores_train(row, rng):
    params, x = row.params(rng), draw(rng, row.shape)
    for train in (True, False, jnp.array(True)):
        y, state = row.call(params, (), x, train=train)
        assert state == ()
        np.testing.assert_allclose(y, row.apply(params, x), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", SPECS)
def test_a_spec_says_what_its_function_says(name):
    """Every field is a keyword of the function with the same default, and the function has no others but the call's."""
    spec = SPECS[name]
    function = getattr(jn, {"layer": "layer_norm", "rms": "rms_norm"}.get(name, name.split("-")[0] + "_norm"))
    keywords = {k: p.default for k, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}
    fields = spec().options()
    call = {"mask", "weights", "train", "update_stats", "quantize_scale"}
    assert set(fields) == set(keywords) - call
    if spec is jn.GroupNorm:
        fields["num_groups"] = None  # the function wants one of two; the spec has the paper's 32
    assert fields == {k: v for k, v in keywords.items() if k not in call}


def test_params_and_state_pass_through_jax_trees_by_name():
    params, state = jn.BatchNorm(momentum=None).init(3)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path((params, state))]
    assert paths == ["[0].scale", "[0].bias", "[1].mean", "[1].var", "[1].count"]


# --- the package ----------------------------------------------------------------------------------------------------

PACKAGE = Path(jn.__file__).parent


def test_every_public_name_is_listed_documented_and_shown():
    assert set(jn.__all__) == {n for n in vars(jn) if not n.startswith("_") and not inspect.ismodule(getattr(jn, n))}
    for name in jn.__all__:
        thing = getattr(jn, name)
        assert inspect.getdoc(thing), name
        if inspect.isfunction(thing):
            assert ">>> " in thing.__doc__, name
            for argument in inspect.signature(thing).parameters:
                mentioned = f"{argument}:" in thing.__doc__ or f"`{argument}`" in thing.__doc__
                assert mentioned or name in ("as_affine", "merge"), (name, argument)


def test_stubs_are_current():
    """As `python -m tests.stubs` writes them, for the Flax that is installed."""
    run = [sys.executable, "-m", "tests.stubs", "--check"]
    found = subprocess.run(run, cwd=PACKAGE.parent, text=True, capture_output=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_jaxnorm_needs_no_flax_and_costs_little_beside_jax():
    """Counted, not timed: beyond `import jax` and `jax.numpy` come jax.extend, where Primitive is, and our own few."""
    code = (
        "import sys, jax, jax.numpy; before = set(sys.modules); import jaxnorm;"
        "print(sorted(m for m in set(sys.modules) - before if not m.startswith('jaxnorm')))"
    )
    loaded = ast.literal_eval(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    )
    expected = ("jax", "jaxlib", "contextlib", "dataclasses", "shlex")
    assert not [m for m in loaded if m.split(".")[0] not in expected], loaded
    of_extend = ("jax.extend", "jax._src.extend", "jax._src.pallas", "jax._src.checkify", "jax._src.xla_transform")
    assert len([m for m in loaded if not m.startswith(of_extend)]) < 10, loaded
    assert len(loaded) < 40, loaded


# What the files of a folder may import from, beside their own folder. `_core` imports nothing of the package.
SHARED_BY_NORMS = ("_norms", "_norms.base", "_norms.declare", "_norms.modulated", "_norms.running")
MAY_IMPORT = {
    "_core": (),
    "_backends": ("_core",),
    "_ops": ("_core", "_backends"),
    "_norms": ("_core", "_ops"),
    "_weights": ("_core", "_ops"),
    "_layers": ("_core", "_ops", "_norms", "_weights"),
    "_convert": ("_core", "_ops", "_norms"),
    "_inputs": ("_core", "_ops", "_norms"),
    "_models": ("_core", "_ops", "_norms"),
    "": (  # the faces: __init__, linen, nnx, weights, convert, inputs, models
        "_core", "_backends", "_ops", "_norms", "_weights", "_layers", "_convert", "_inputs", "_models",
    ),
}


PEERS = ("flax", "optax", "torch", "haiku", "equinox", "keras", "safetensors")


def of_function(folder: str, node: ast.AST, tree: ast.Module) -> bool:
    """Whether an import of these folders is within a function, so that it happens when that is called."""
    return folder in ("_convert", "_models") and node not in tree.body


def test_arrows_point_down():
    """Every file imports from the folders below its own, a norm from no other norm, and Flax is for layers alone."""
    for path in PACKAGE.rglob("*.py"):
        module = path.relative_to(PACKAGE).with_suffix("").parts
        folder = module[0] if len(module) > 1 else ""
        assert folder in MAY_IMPORT, f"{path}: say in MAY_IMPORT what this folder may import"
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                outside = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                outside = [node.module or ""]
            elif isinstance(node, ast.ImportFrom):
                base = module[: len(module) - node.level] if path.stem != "__init__" else module[: -node.level]
                for alias in node.names:
                    target = [*base, *(node.module.split(".") if node.module else []), alias.name]
                    name = ".".join(target[:-1]) or target[0]
                    own = target[0] == folder and (folder not in ("", "_norms") or path.name == "__init__.py")
                    own = own or (name in SHARED_BY_NORMS and folder == "_norms")
                    may = MAY_IMPORT[folder] + (("_layers", "_weights") if of_function(folder, node, tree) else ())
                    assert own or (name.startswith(may) and may), (str(path), name)
                continue
            else:
                continue
            for name in outside:
                inside = of_function(folder, node, tree)
                flax_may = folder == "_layers" or path.stem in ("linen", "nnx", "demo") or inside
                assert flax_may or name.split(".")[0] not in PEERS, (str(path), name)


def test_the_only_collectives_are_in_one_file():
    for path in PACKAGE.rglob("*.py"):
        if path.name != "collectives.py" and "demo" not in str(path):
            text = path.read_text()
            for name in ("psum", "pmean", "pmax", "all_gather", "ppermute", "all_to_all"):
                assert f"lax.{name}(" not in text, (path.name, name)


def test_every_backend_gives_a_reason():
    backends = jn.backends()
    assert backends["xla"].active
    assert all(isinstance(backend.reason, str) and backend.reason for backend in backends.values())
    backends.clear()
    assert jn.backends()  # a copy was handed out
    x = np.arange(6.0, dtype=np.float32).reshape(2, 3)
    np.testing.assert_allclose(jn.layer_norm(x, implementation="xla"), jn.layer_norm(x), rtol=3e-7)


def entered(f) -> list[str]:
    """The files of the package whose functions a call of f enters, one for each of their calls."""
    files = []

    def note(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            files.append(frame.f_code.co_filename)

    f()  # caches are warm, as in all calls but the first
    sys.setprofile(note)
    try:
        f()
    finally:
        sys.setprofile(None)
    return files


def test_an_eager_call_makes_few_python_calls():
    """Counted, not timed: calls, files, and moves from one file to another. A norm runs as one compiled program."""
    from flax import nnx

    from jaxnorm import nnx as jnnx

    x = jnp.ones((8, 16, 16, 32))
    layer = jnnx.BatchNorm(32, rngs=nnx.Rngs(0))
    for f, calls, most, moves in ((lambda: jn.layer_norm(x), 10, 4, 5), (lambda: layer(x), 80, 12, 35)):
        files = entered(f)
        assert len(files) <= calls
        assert len({*files}) <= most
        assert sum(a != b for a, b in itertools.pairwise(files)) <= moves


def test_a_function_is_traced_once_for_calls_that_are_alike():
    """Under jit, for layers of one shape, and outside of it."""
    traces = []

    def activation(u):
        traces.append(u)
        return u * 2

    norm = lambda x: jn.layer_norm(x, activation=activation)
    x = jnp.ones((4, 8))
    jax.jit(lambda x: norm(norm(norm(x))))(x)
    once = len(traces)
    jax.jit(lambda x: norm(x) + 1)(x)
    assert len(traces) == once
    norm(x)
    eager = len(traces)
    norm(x + 1)
    assert len(traces) == eager


def test_what_a_call_says_it_says_at_every_call():
    """Warnings, and errors of values, are not those of a trace that is made once."""
    x = jnp.ones((1, 4))
    state = jn.RunningStats(jnp.zeros(4), jnp.ones(4))
    train = lambda: jn.batch_norm(x, None, state, train=True)
    for call in (train, train, lambda: jax.jit(lambda x: jn.batch_norm(x, None, state, train=True))(x)):
        with pytest.warns(UserWarning, match="one element per channel"):
            call()
    weigh = lambda x, weights: jn.batch_norm(x, None, state, train=True, weights=weights)[0]
    x, bad = jnp.ones((2, 4)), jnp.full((2, 1), -1.0)
    jax.jit(weigh)(x, bad)  # traced, so that it cannot be seen
    jax.jit(weigh)(x, jnp.ones((2, 1)))
    for call in (weigh, weigh, lambda x, w: jax.jit(lambda x: weigh(x, bad))(x)):
        with pytest.raises(ValueError, match="weights must be >= 0"):
            call(x, bad)


def test_a_program_tells_kinds_of_numbers_apart():
    """1 and True are equal and hash alike; one of them is refused, also after the other has made a program."""
    state = jn.RunningStats(jnp.zeros(4), jnp.ones(4))
    norm = lambda x, sync: jn.batch_norm(x, None, state, train=True, axis_name="d", sync=sync)[0]
    over = lambda sync: jax.vmap(lambda x: norm(x, sync), axis_name="d")(jnp.ones((2, 3, 4)))
    assert over(1).shape == (2, 3, 4)
    with pytest.raises(ValueError, match="sync must be"):
        over(True)
