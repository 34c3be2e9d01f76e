"""Norms by name, and specs as plain values."""

import dataclasses
import json

import gallery
import jax
import pytest
import yaml
from catalogue import ROWS

import jaxnorm as jn


def takes_groups(name: str, kind) -> bool:
    return "group" in name and "num_groups" in kind.__dataclass_fields__


def test_the_catalogue_has_every_norm():
    kinds = jn.catalogue()
    assert len(kinds) == len(set(kinds.values())) >= 12
    for name, kind in kinds.items():
        assert getattr(jn, kind.__name__) is kind
        options = {"num_groups": 2} if takes_groups(name, kind) else {}
        spec = jn.make(name, **options)
        assert spec == jn.make(kind.__name__, **options) == jn.make(kind.function.__name__, **options)


@pytest.mark.parametrize("name", sorted(jn.catalogue()))
def test_the_documentation_of_a_norm_is_complete(name):
    text = " ".join(jn.catalogue()[name].function.__doc__.split())
    missing = [part for part in ("Args:", "Returns:", "Raises:", "sed by ", "Source: ", ">>> ") if part not in text]
    assert not missing


def test_the_page_of_all_norms_is_current():
    assert gallery.main(["--check"]) == 0, "run python -m tests.gallery"


# A value that is not the default, for each option that is no number and no bool; and what else must be given with it.
OTHER = {
    "activation": "relu", "axis": -2, "axis_index_groups": [[0, 1], [2, 3]], "axis_name": ["data", "model"],
    "cast": "before_scale", "condition_activation": "gelu", "condition_features": 3, "dtype": "bfloat16",
    "epsilon_mode": "max", "group_size": 4, "implementation": "xla", "init_k_heads": 2, "init_alpha": 0.25,
    "inner": jn.GroupNorm(num_groups=2, dtype="float16"), "kind": "l2", "min_count": 2.0, "num_classes": 5,
    "num_groups": 3, "num_segments": 4, "param_dtype": "float16", "parts": "gate scale shift",
    "reduction_axes": [1, 2], "running": jn.EMA(momentum=0.5), "share": jn.Devices("data", 2), "size": 7, "sync": 2,
    "virtual_batch_size": 8, "act.activation": None, "dish_ts.activation": None,
    "rev_in.activation": None, "running_rev_in.activation": None, "center": "last", "transform": "arcsinh",
    "init_length": 9, "rev_in.epsilon_mode": "if_zero", "running_rev_in.epsilon_mode": "inside",
    "partial_rms.epsilon_mode": "outside",
    "quantize": jn.Fp8(per="row", floor=1e-6),
    "time_axis": 2, "variance": "running", "variant": "S2", "evo_norm_b.variant": "B2",
    "init_groups": 3, "init_rank": 4, "init_order": 2,
    "num_heads": 2, "stored_rate": 0.5, "method": "eigh", "cumulative_group.activation": None,
    "gate_activation": "gelu", "steps": 3,
    "num_domains": 4, "spread": "rms", "track": "var", "r_max": jn.Ramp(1.0, 2.0, 3.0, 4.0), "d_max": 2.0, "fade": 0.5,
    "pixel.epsilon_mode": "outside", "scale.epsilon_mode": "inside", "segment.kind": "rms",
}  # fmt: skip
RUNNING = [name for name, kind in jn.catalogue().items() if "sync" in kind.__dataclass_fields__]
NEEDS = {
    "segment.num_groups": {"kind": "group"},
    "segment.group_size": {"kind": "group"},
    **{f"{name}.sync": {"axis_name": "d"} for name in RUNNING},
}


@pytest.mark.parametrize("name", sorted(jn.catalogue()))
def test_every_option_comes_back_from_yaml_and_json(name):
    kind = jn.catalogue()[name]
    for field in dataclasses.fields(kind):
        one = f"{name}.{field.name}"
        value = not field.default if isinstance(field.default, bool) else field.default
        value = value / 2 + 0.125 if isinstance(value, float) else value
        value = value if isinstance(value, bool) else OTHER.get(one, OTHER.get(field.name, value))
        needs = {"num_groups": 2} if takes_groups(name, kind) and field.name != "group_size" else {}
        spec = kind(**{**needs, **NEEDS.get(one, {}), field.name: value})
        config = jn.as_dict(spec)
        assert field.name in config or OTHER.get(one, "") is None  # it has no inverse: there is None alone
        assert jn.make(**json.loads(json.dumps(config))) == spec
        assert jn.make(**yaml.safe_load(yaml.safe_dump(config))) == spec


def test_numbers_as_people_write_them_in_yaml():
    assert jn.make(**yaml.safe_load("{norm: rms, epsilon: 1e-6}")) == jn.RMSNorm(epsilon=1e-6)
    assert jn.make(**yaml.safe_load("{norm: batch, momentum: null, axis_name: data}")).momentum is None
    with pytest.raises(ValueError, match=r"epsilon must be a number >= 0, got 'small'"):
        jn.make("rms", epsilon="small")


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_spec_comes_back_from_json(row):
    spec = row.spec
    if callable(spec.activation):
        with pytest.raises(TypeError, match=r"activation=.* is no plain value.*make\(\*\*config, activation="):
            jn.as_dict(spec)
        spec = dataclasses.replace(spec, activation=None)
    assert jn.make(**json.loads(json.dumps(jn.as_dict(spec)))) == spec


@pytest.mark.parametrize("spec", [
    jn.BatchNorm(), jn.BatchNorm(momentum=None, sync=[[0, 1], [2, 3]], axis_name=("host", "chip"), dtype="bfloat16"),
    jn.BatchNorm(running=jn.EMA(momentum=0.5, debias=True, min_count=2.0), share=jn.Devices("d", 2)),
    jn.BatchNorm(running=jn.Cumulative(unbiased=True), share=jn.Devices(("a", "b"), [[0, 1]])),
    jn.GatedRMSNorm(group_size=8, cast="before_scale"), jn.LayerNorm(axis=(-3, -1), param_dtype="float16"),
], ids=lambda spec: str(jn.as_dict(spec)))  # fmt: skip
def test_policies_and_dtypes_are_plain_values(spec):
    config = json.loads(json.dumps(jn.as_dict(spec)))
    assert jn.make(**config) == spec
    assert len(config) <= 6, "options at their default are left out"


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: jn.make("rsm"), ValueError, r'no norm \'rsm\'\. Write make\("rms"\)'),
    (lambda: jn.make("batchnorm2d"), ValueError, r'make\("batch"\)'),
    (lambda: jn.make("softmax"), ValueError, r"jaxnorm\.catalogue\(\) has all"),
    (lambda: jn.make(jn.RMSNorm), ValueError, "there is no norm"),
    (lambda: jn.make("rms", eps=1e-6), TypeError, "epsilon"),
    (lambda: jn.as_dict({}), TypeError, "must be a spec"),
])  # fmt: skip
def test_a_wrong_name_is_explained(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_traced_option_is_no_plain_value():
    with pytest.raises(TypeError, match=r"momentum=.*is no plain value"):
        jax.jit(lambda m: jn.as_dict(jn.BatchNorm(momentum=m)))(0.9)
