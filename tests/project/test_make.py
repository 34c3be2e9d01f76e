"""Norms by name, and specs as plain values."""

import dataclasses
import json

import jax
import pytest
from catalogue import ROWS

import jaxnorm as jn


def test_the_catalogue_has_every_norm():
    kinds = jn.catalogue()
    assert len(kinds) == len(set(kinds.values())) >= 12
    for name, kind in kinds.items():
        assert getattr(jn, kind.__name__) is kind
        options = {"num_groups": 2} if "group" in name else {}
        spec = jn.make(name, **options)
        assert spec == jn.make(kind.__name__, **options) == jn.make(kind.function.__name__, **options)


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
