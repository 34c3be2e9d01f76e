"""Norms are folded into the layers beside them: the same outputs, and programs in which they compute nothing."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from helpers.jit import jit_unoptimized
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm as jn
from jaxnorm import linen as jnn
from jaxnorm import models
from jaxnorm import nnx as jnnx

OF_NORMS = ("rsqrt", "sqrt", "subtract", "multiply", "divide")


def random_values(tree, rng):
    """Parameters and statistics as if trained: variances are positive, and nothing is 0 or 1."""

    def value(keys, a):
        v = rng.normal(size=a.shape)
        name = str(keys[-2] if hasattr(keys[-1], "name") and keys[-1].name == "value" else keys[-1])
        v = 0.4 + np.abs(v) if "var" in name else 1.0 + 0.3 * v if "scale" in name or "gamma" in name else 0.4 * v
        return jnp.asarray(v, a.dtype)

    return jax.tree_util.tree_map_with_path(value, tree)


def compiled(f, *args):
    """The program for these arguments, and how often it has each operation that norms are made of."""
    program = jit_unoptimized(f).lower(*args).compile()
    text = program.as_text()
    return program, {op: len(re.findall(rf" {op}\(", text)) for op in OF_NORMS}


def against_float64(model, variables, x, **kwargs):
    """Folded: as near to float64 as the model itself. The operations of norms before and after."""
    folded = models.fold(model, variables, x, **kwargs)
    apply = model.apply if isinstance(model, nn.Module) else model
    plain, before = compiled(lambda v, x: apply(v, x, **kwargs), variables, x)
    without, after = compiled(folded.apply, folded.variables, x)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: np.asarray(a, np.float64), (variables, x))
        truth = jax.tree.map(np.asarray, jit_unoptimized(lambda v, x: apply(v, x, **kwargs))(*wide))
    alike = jax.tree.map(lambda a: (a.shape, a.dtype), variables)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), folded.variables) == alike
    for y in (without(folded.variables, x), plain(folded.variables, x)):  # these also serve the model as it was
        jax.tree.map(lambda y, z, t: _near(y, z, t), y, plain(variables, x), truth)
    return folded, before, after


def _near(y, plain, truth):
    assert y.dtype == plain.dtype
    scale = np.abs(truth).max()
    assert np.abs(y - truth).max() <= 3 * np.abs(plain - truth).max() + 2e-6 * scale


class ConvNet(nn.Module):
    """A ResNet block with a strided shortcut, then grouped, transposed, depthwise and wrapped convolutions."""

    @nn.compact
    def __call__(self, x, train):
        norm = lambda name: jnn.BatchNorm(use_running_average=not train, name=name)
        y = nn.relu(norm("no_bias")(nn.Conv(4, (3, 3), use_bias=False)(x)))
        y = norm("strided")(nn.Conv(8, (3, 3), strides=2)(y))
        x = nn.relu(y + norm("shortcut")(nn.Conv(8, (1, 1), strides=2, name="short")(x)))
        grouped = nn.remat(nn.Conv)(8, (3, 3), padding="VALID", feature_group_count=2, name="grouped")
        x = grouped(norm("into_grouped")(x))
        x = nn.ConvTranspose(8, (2, 2), strides=(2, 2), name="transposed")(nn.relu(x))
        x = nn.relu(norm("after_transposed")(x))
        x = norm("after_wrapped")(nn.Conv(8, (3, 3), padding="CIRCULAR", feature_group_count=8, name="wrapped")(x))
        x = nn.Conv(4, (3, 3), padding="CIRCULAR", name="wraps")(norm("into_wrapped")(nn.relu(x)))
        return nn.Dense(5, name="head")(norm("into_head")(nn.relu(x)).mean((1, 2)))


def test_batch_norms_of_a_linen_network_leave_one_addition_at_most(rng):
    x = rng.normal(size=(2, 8, 8, 3)).astype("f")
    model = ConvNet()
    variables = random_values(jax.eval_shape(lambda: model.init(jax.random.key(0), x, False)), rng)
    folded, before, after = against_float64(model, variables, x, train=False)
    assert min(before["rsqrt"], before["subtract"]) >= 8
    assert after == dict.fromkeys(OF_NORMS, 0) | {"multiply": 1}  # that of the mean over the image
    whats = {row.path: row.what for row in folded.outcome.rows}
    assert len(whats) == 8
    assert whats["no_bias"] == "folded into params/Conv_0/kernel; its shift stays"
    assert whats["shortcut"] == "folded into params/short/bias, params/short/kernel"
    assert whats["into_grouped"] == "folded into params/grouped/kernel, params/grouped/bias"
    assert whats["into_wrapped"] == "folded into params/wraps/kernel, params/wraps/bias"
    assert whats["into_head"] == "folded into params/head/kernel, params/head/bias"
    with pytest.raises(ValueError, match=r"no_bias: the norm was folded for inference. Write train=False"):
        folded.apply(folded.variables, x, train=True, mutable="batch_stats")


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = jnn.RMSNorm(scale_offset=1.0, name="before_attention")(x)
        q, k, v = (nn.DenseGeneral((2, 4), use_bias=False, name=name)(h) for name in "qkv")
        x = x + nn.DenseGeneral(8, axis=(-2, -1), name="out")(nn.dot_product_attention(q, k, v))
        h = nn.Dense(12, name="up")(jnn.LayerNorm(output_scale=0.5, name="before_mlp")(x))
        x = x + jnn.LayerScale(name="layer_scale")(nn.Dense(8, name="down")(nn.tanh(h)))
        return nn.Dense(3, name="head")(jnn.DynamicTanh(name="last")(x)[:, 0])


def test_scales_and_biases_of_a_transformer_go_into_all_that_read_them(rng):
    x = rng.normal(size=(2, 4, 8)).astype("f")
    model = Transformer()
    variables = random_values(jax.eval_shape(lambda: model.init(jax.random.key(0), x)), rng)
    folded, before, after = against_float64(model, variables, x)
    assert {row.path: row.what for row in folded.outcome.rows} == {
        "before_attention": "folded into params/q/kernel, params/k/kernel, params/v/kernel",
        "before_mlp": "folded into params/up/kernel, params/up/bias",
        "layer_scale": "folded into params/down/bias, params/down/kernel",
        "last": "folded into params/head/kernel, params/head/bias",
    }
    assert before["multiply"] - after["multiply"] >= 4  # one for each scale


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=rngs)
        self.norm = jnnx.BatchNorm(4, rngs=rngs)
        self.rest = nnx.List([jnnx.LayerNorm(4, rngs=rngs), jnnx.BatchNorm(6, rngs=rngs)])
        self.dense = nnx.Linear(4, 6, use_bias=False, rngs=rngs)
        self.heads = nnx.LinearGeneral(6, (2, 3), use_bias=False, rngs=rngs)
        self.left = jnnx.BatchNorm(3, activation="relu", rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(nnx.jit(lambda norm, x: norm(x))(self.norm, self.conv(x)))
        x = self.rest[1](self.dense(self.rest[0](x)))
        return self.left(self.heads(x))


def test_an_nnx_model_is_copied_without_its_norms_and_with_new_biases(rng):
    x = rng.normal(size=(2, 4, 4, 3)).astype("f")
    model = nnx.eval_shape(lambda: NnxNet(nnx.Rngs(0)))
    nnx.update(model, random_values(nnx.state(model), rng))
    assert "model.eval()" in models.fold(model, x).outcome["norm"].why
    model.eval()
    before = jax.tree.map(np.asarray, nnx.state(model))
    folded = models.fold(model, x)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model))
    graphdef, state = nnx.split(model)
    plain, at_first = compiled(lambda state, x: nnx.merge(graphdef, state)(x), state, x)
    without, after = compiled(folded.apply, folded.variables, x)
    assert at_first["rsqrt"] - after["rsqrt"] == 2  # the layer norm and the one that is left have theirs
    np.testing.assert_allclose(without(folded.variables, x), plain(state, x), rtol=2e-5, atol=2e-5)
    shape_of = lambda model: nnx.eval_shape(lambda model, x: model(x), model, x)
    assert shape_of(folded.model) == shape_of(model)
    assert (folded.model.conv.bias.shape, folded.model.dense.bias.shape) == ((4,), (6,))
    assert [jax.tree.leaves(nnx.state(norm)) for norm in (folded.model.norm, *folded.model.rest)] == [[], [], []]
    assert [(row.path, row.why) for row in folded.outcome.left] == [("left", "it has an activation")]
    assert folded.outcome["rest/0"].what == "folded into dense/kernel, dense/bias (new)"
    with pytest.raises(ValueError, match=r"folded for inference. Write model.eval\(\)"):
        folded.model.norm(x, use_running_average=False)

    class Applies(nnx.Module):
        def __init__(self):
            self.scale, self.kernel = nnx.Param(jnp.ones(3)), nnx.Param(jnp.ones((3, 2)))

        def __call__(self, x):
            return jn.LayerNorm().apply({"scale": self.scale[...]}, (), x)[0] @ self.kernel[...]

    assert "not a layer of jaxnorm.nnx" in models.fold(Applies(), x).outcome.left[0].why


NCHW, NHWC = ("NCHW", "OIHW", "NCHW"), ("NHWC", "HWIO", "NHWC")
same = lambda v, y: y
first = lambda x: jnp.moveaxis(x, -1, 1)
dense = lambda v, y: y @ v["w"]
with_bias = lambda v, y: (y.reshape(-1, y.shape[-1]) @ v["w"]) + v["b"][None]


def conv(layout, padding="VALID", strides=(1, 1), **options):
    options |= dict(window_strides=strides, padding=padding, dimension_numbers=layout)
    return lambda v, y: lax.conv_general_dilated(y, v["w"], **options)


# spec, what makes its input from x of (2, 5, 5, 4), what reads its output, and the shape of the weights
BN = jn.BatchNorm
FOLDED = {
    "nchw": (BN(axis=1), lambda v, x: conv(NCHW)(v, first(x)), same, (3, 4, 2, 2)),
    "transposed": (BN(), lambda v, x: conv(("NHWC", "HWIO", "NCHW"))(v, x).swapaxes(1, 3), same, (2, 2, 4, 3)),
    "cropped": (BN(), lambda v, x: dense(v, x)[:, 1:4], same, (4, 3)),
    "weights_first": (BN(axis=1), lambda v, x: jnp.einsum("oi,nhwi->nohw", v["w"], x), same, (3, 4)),
    "per_head": (BN(axis=(-2, -1)), lambda v, x: jnp.einsum("nhwi,iab->nhab", x, v["w"]), same, (4, 2, 3)),
    "zero_centred": (BN(scale_offset=1.0, epsilon=1e-2), dense, same, (4, 3)),
    "no_scale": (BN(use_scale=False, use_bias=False), dense, same, (4, 3)),
    "l1": (BN(spread="l1"), dense, same, (4, 3)),
    "rms": (BN(spread="rms"), dense, same, (4, 3)),
    "mean_only": (BN(spread="none"), dense, same, (4, 3)),
    "renorm": (jn.BatchRenorm(), dense, same, (4, 3)),
    "rep": (jn.RepBatchNorm(), dense, same, (4, 3)),
    "layer_scale": (jn.LayerScale(axis=()), dense, same, (4, 3)),
    "flattened": (BN(), same, lambda v, y: y.reshape(2, -1) @ v["w"] + v["b"][None], (100, 3)),
    "grouped": (BN(), same, lambda v, y: conv(NHWC, feature_group_count=2)(v, y) + v["b"][None, None, None],
                (3, 3, 2, 6)),
    "depthwise": (jn.LayerScale(axis=1), lambda v, x: first(x), conv(NCHW, feature_group_count=4), (4, 1, 3, 3)),
    "padded": (jn.RMSNorm(), same, conv(NHWC, "SAME", strides=(2, 2)), (3, 3, 4, 2)),
    "layer": (jn.LayerNorm(output_scale=0.5), same, with_bias, (4, 3)),
    "rms_row": (jn.RMSNorm(cast="before_scale", use_bias=True), same, with_bias, (4, 3)),
    "group": (jn.GroupNorm(num_groups=2), same, with_bias, (4, 3)),
    "instance": (jn.InstanceNorm(scale_offset=1.0), same, with_bias, (4, 3)),
    "tanh": (jn.DynamicTanh(), same, with_bias, (4, 3)),
    "erf": (jn.DynamicErf(), same, with_bias, (4, 3)),
}  # fmt: skip


def function_of(cases, rng):
    """A function of specs that returns the output of each case, and its variables."""

    def f(variables, x):
        y = {}
        for name, (spec, before, after, _) in cases.items():
            v = variables[name]
            y[name] = after(v, spec.apply(v["params"], v["state"], before(v, x), train=False)[0])
        return y

    variables = {}
    for name, (spec, before, _, shape) in cases.items():
        v: dict = {"w": jnp.zeros(shape), "b": jnp.zeros(shape[-1])}
        features = spec.features(jax.eval_shape(before, v, jnp.zeros((2, 5, 5, 4))).shape)
        variables[name] = v | dict(zip(("params", "state"), spec.init(features), strict=True))
    return f, random_values(variables, rng)


def test_layouts_siblings_and_rows_as_functions_of_specs(rng):
    f, variables = function_of(FOLDED, rng)
    x = rng.normal(size=(2, 5, 5, 4)).astype("f")
    folded, before, after = against_float64(f, variables, x)
    assert [row.path for row in folded.outcome.rows if f"{row.path.split('/')[0]}/w" not in row.what] == []
    assert after["rsqrt"] < before["rsqrt"]
    assert after["subtract"] < before["subtract"]


def test_a_function_may_return_the_state_and_read_plain_numbers(rng):
    norm, x = BN(), rng.normal(size=(2, 3)).astype("f")
    params, state = norm.init(4)
    variables = random_values({"w": jnp.zeros((3, 4)), "n": params, "s": state}, rng) | {"times": 2}

    def f(v, x):
        return norm.apply(v["n"], v["s"], sum([x] * v["times"]) @ v["w"], train=False)

    folded = models.fold(f, variables, x)
    assert folded.outcome["n"].done
    y, after = jax.jit(lambda x: folded.apply(folded.variables, x))(x)
    np.testing.assert_allclose(y, f(variables, x)[0], rtol=2e-6, atol=2e-6)
    jax.tree.map(np.testing.assert_array_equal, after, folded.variables["s"])


def test_norms_that_are_known_by_their_turn_must_come_in_the_same_turns(rng):
    norm = BN()
    v = random_values({"a": norm.init(3), "w": jnp.zeros((3, 3))}, rng)
    again = False

    @jax.jit
    def f(v, x):
        if again:
            norm.apply(*norm.init(3), x, train=False)
        return norm.apply(*v["a"], x @ v["w"], train=False)[0]

    x = rng.normal(size=(2, 3)).astype("f")
    folded = models.fold(f, v, x)
    assert folded.outcome["BatchNorm_0"].done
    np.testing.assert_allclose(folded.apply(folded.variables, x), f(v, x), rtol=2e-6, atol=2e-6)
    again = True
    with pytest.raises(ValueError, match=r"has called 2 norms, and 1 when it was folded.*Fold it without jax.jit"):
        folded.apply(folded.variables, x)


def test_folding_where_it_would_be_wrong_is_left_with_the_reason(rng):
    x = rng.normal(size=(2, 5, 5, 4)).astype("f")
    spec, params, state = BN(), *BN().init(4)
    v = {"w": jnp.ones((4, 4)), "k": jnp.ones((3, 3, 4, 4)), "n": params, "s": state, "one": jnp.zeros(())}
    v = random_values(v, rng)
    norm = lambda v, x, spec=spec, **o: spec.apply(v["n"], v["s"], x, train=False, **o)[0]
    layer = lambda v, x: jn.LayerNorm().apply(v["n"], (), x)[0]
    why = {
        "its input is that of the model; the model returns its output": norm,
        "its input comes from `tanh`; its output is read by `tanh`": lambda v, x: jnp.tanh(norm(v, jnp.tanh(x))),
        "has other readers; the model returns": lambda v, x: [y := x @ v["w"], norm(v, y)],
        "its input is a sum that adds no bias": lambda v, x: norm(v, x @ v["w"] + x),
        "are not those that a dense layer makes": lambda v, x: norm(v, (x[:, :4] @ v["w"]).swapaxes(3, 1)),
        "padded with zeros": lambda v, x: conv(NHWC, "SAME")({"w": v["k"]}, norm(v, x)),
        "its output is padded": lambda v, x: jnp.pad(norm(v, x), ((0, 0), (1, 1), (0, 0), (0, 0))) @ v["w"],
        "a dense layer has no bias to take its shift": lambda v, x: norm(v, x) @ v["w"],
        "used once": lambda v, x: norm(v, x @ v["w"]) @ v["w"],
        "its scale is not a variable that it alone reads": lambda v, x: layer(v, x) @ v["w"] + v["n"].scale.sum(),
        "the bias before it is not one of its channels": lambda v, x: norm(v, x @ v["w"] + v["one"]),
        "it has an activation": lambda v, x: norm(v, x @ v["w"], BN(activation="relu")),
        "it has a mask": lambda v, x: norm(v, x @ v["w"], mask=x[..., :1] > 0),
        "write train=False": lambda v, x: spec.apply(v["n"], v["s"], x @ v["w"], train=True)[0],
        "it is called more than once": lambda v, x: norm(v, norm(v, x @ v["w"])),
        "inside of `scan`": lambda v, x: lax.scan(lambda x, _: (norm(v, x @ v["w"]), None), x, None, 2)[0],
        "inside of `vmap`": lambda v, x: jax.vmap(lambda x: norm(v, x @ v["w"]))(x),
        "L2Norm does not end with": lambda v, x: jn.L2Norm().apply({"scale": v["n"].scale}, (), x)[0] @ v["w"],
        "its output is read by another norm": lambda v, x: layer(v, norm({**v, "n": None}, x)),
        "its scale does not come from": lambda v, x: layer({"n": jn.Affine(x[0, 0, 0], None)}, x) @ v["w"],
    }
    for reason, f in why.items():
        folded = models.fold(f, v, x)
        assert reason in folded.outcome.rows[0].why, (reason, str(folded.outcome))
        assert all(a is b for a, b in zip(jax.tree.leaves(v), jax.tree.leaves(folded.variables), strict=True))


def test_variables_stay_where_they_are_and_are_rounded_once(rng):
    mesh = Mesh(np.array(jax.devices()[:4]), "d")
    columns, whole = NamedSharding(mesh, P(None, "d")), NamedSharding(mesh, P())
    norm = BN(epsilon=0.0)
    params, state = norm.init(8)
    v = random_values({"w": jnp.zeros((4, 8), jnp.bfloat16), "n": params, "s": state, "half": jnp.zeros((8, 8))}, rng)
    v["half"] = v["half"].astype("float16")
    v = jax.device_put(v, {"w": columns, "n": whole, "s": whole, "half": whole})
    second = lambda v, x: norm.apply(v["n"], v["s"], x @ v["half"], train=False)[0]
    f = lambda v, x: norm.apply(v["n"], v["s"], x @ v["w"].astype("f"), train=False)[0]
    x = rng.normal(size=(3, 4)).astype("f")
    with jax.set_mesh(mesh):
        folded = models.fold(f, v, jax.ShapeDtypeStruct(x.shape, x.dtype))
        np.testing.assert_allclose(jax.jit(folded.apply)(folded.variables, x), f(v, x), rtol=0.02, atol=0.02)
    w = folded.variables["w"]
    assert (w.sharding, folded.variables["n"].bias.sharding) == (columns, whole)
    exact = np.float64(v["n"].scale) / np.sqrt(np.float64(v["s"].var))
    np.testing.assert_array_equal(w, (np.float64(v["w"]) * exact).astype(w.dtype))
    v["s"] = v["s"]._replace(var=v["s"].var * 1e-14)
    assert "half would overflow or vanish in float16" in models.fold(second, v, np.ones((2, 8), "f2")).outcome["n"].why
    v["s"] = v["s"]._replace(var=v["s"].var * np.nan)
    assert "not finite" in models.fold(second, v, np.ones((2, 8), "f2")).outcome["n"].why


def test_what_cannot_be_folded_at_all_is_refused():
    x, spec = jnp.ones((2, 3)), BN()
    f = lambda v, x: spec.apply(*v, x, train=False)[0]
    init = spec.init(3)
    with pytest.raises(TypeError, match=r"model must be a linen module.* got str. Write fold\(model, variables"):
        models.fold("net", x)
    with pytest.raises(TypeError, match=r"the variables are missing. Write fold\(model, variables, x\)"):
        models.fold(f)
    with pytest.raises(TypeError, match="variables hold no arrays"):
        models.fold(f, (), x)
    with pytest.raises(TypeError, match=r"got ShapeDtypeStruct at '0/scale'.*outside of jax.jit"):
        models.fold(f, jax.eval_shape(lambda: init), x)
    with pytest.raises(TypeError, match=r"whose values are known.*outside of jax.jit"):
        jax.jit(lambda v: models.fold(f, v, x).variables)(init)
    model = nn.LayerNorm()
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"the model calls no norm of jaxnorm. Flax's own are not seen: write jaxnorm"):
        models.fold(model, variables, x)
    with pytest.raises(KeyError, match=r"fold: no row of the path 'b'. There are \['0'\]"):
        models.fold(f, init, x).outcome["b"]
