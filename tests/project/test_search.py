"""The random search of tests/search: a short run, what longer runs have found, and whether it would find a fault.

A longer run: python -m tests.search --cases 5000 --seed 0
"""

import dataclasses

import jax
import numpy as np
import pytest
from search import devices, run, truth
from search.case import MOMENTS, Case, drawn, operands
from search.devices import Layout
from search.expected import expected

import jaxnorm as jn
from jaxnorm._ops import formula


@pytest.mark.parametrize("start", range(0, 72, 12))
def test_a_short_search_finds_no_fault(start):
    """Six runs of three programs, each with four sets of data."""
    for index in range(start, start + 12):
        run.check(drawn(1, index))


@pytest.mark.parametrize("start", range(0, 12, 4))
def test_a_short_search_over_devices_finds_no_fault(start):
    for index in range(start, start + 4):
        devices.check(devices.drawn(1, index))


FOUND = {
    "gradient of weights that broadcast, beside inf": Case(
        "batch", (9, 6), (1,), mask=(9, 6), weights=(9, 1), transform="vjp", wrt=("x", "weights"), poison="inf"
    ),
    "tangent of the count of weights that broadcast": Case(
        "moments", (5, 33, 8), (2,), mask=(1, 1, 8), weights=(5, 1, 1), transform="jvp", wrt=("x", "weights")
    ),
    "gradient of 16-bit weights": Case(
        "batch", (2, 3, 5, 2, 8), (4,), scale=(1, 1, 1, 1, 8), mask=(2, 1, 1, 1, 1), weights=(2, 3, 5, 1, 1),
        x_dtype="float16", param_dtype="bfloat16", epsilon=0.0, ghosts=2, transform="vmap-vjp",
        wrt=("x", "scale", "weights"), seed=5,
    ),
    "gradient of a 16-bit gate that rows share, under a mask": Case(
        "gated", (48, 7), (1,), mask=(48, 1), gate=(1, 7), activation="silu", param_dtype="bfloat16",
        transform="vjp", wrt=("gate",),
    ),
    "inf in padding where train is traced": Case(
        "batch", (48, 7), (1,), scale=(1, 7), mask=(48, 1), train="traced", transform="vjp", wrt=("x", "scale"),
        poison="inf",
    ),
    "inf that counts, beside padding with an activation": Case(
        "batch", (9, 6), (1,), mask=(9, 6), weights=(9, 6), activation="relu", poison="!inf"
    ),
    "float64 beside a float32 gate": Case(
        "gated", (9, 6), (1,), gate=(9, 6), activation="silu", x_dtype="float64", x64=True, transform="vjp",
        wrt=("x", "gate"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOUND.values(), ids=FOUND)
def test_faults_found_before_stay_fixed(case):
    for seed in range(case.seed, case.seed + 3):
        run.check(dataclasses.replace(case, seed=seed))


_pair = Case(
    "batch", (4, 2), (1,), scale=(1, 2), mask=(4, 2), transform="vjp", wrt=("x", "scale"), mean=30.0, density=0.97
)
_gated = Case("gated", (24, 40), (1,), gate=(24, 40), groups=4, activation="silu", transform="vjp", wrt=("x", "gate"))
FOUND_OVER_DEVICES = {
    "one example and one channel a device": Layout(_pair, (2, 4), (("b",), ("a",)), "explicit", sync=2, named=True),
    "the same on an Auto mesh": Layout(_pair, (2, 4), (("b",), ("a",)), "auto", sync=2, named=True),
    "one example on each device": Layout(
        dataclasses.replace(_pair, shape=(8, 1), scale=(1, 1), mask=(8, 1)), (2, 4), (("a", "b"), ()), "explicit",
        sync=2, named=True,
    ),
    "gated groups on several devices": Layout(_gated, (8,), ((), ("a",)), "explicit"),
}  # fmt: skip


@pytest.mark.parametrize("layout", FOUND_OVER_DEVICES.values(), ids=FOUND_OVER_DEVICES)
def test_faults_found_before_over_devices_stay_fixed(layout):
    devices.check(layout)


# --- the search itself ------------------------------------------------------------------------------------------------

FORMULAS = [
    Case("layer", (3, 5), (1,), scale=(1, 5), bias=(3, 5), activation="gelu"),
    Case("batch", (6, 4), (1,), scale=(1, 1), mask=(6, 4), weights=(6, 4), activation="sigmoid", epsilon=0.1),
    Case("gated", (3, 4), (1,), scale=(1, 4), gate=(3, 4), activation="silu", groups=2),
    Case("gated", (3, 4), (1,), scale=(1, 4), mask=(3, 4), gate=(1, 4), activation="silu", norm_before_gate=False),
    Case("normalize", (3, 4), (1,), scale=(1, 4), activation="tanh"),
]


@pytest.mark.parametrize("case", FORMULAS, ids=lambda c: c.norm)
def test_the_closed_gradients_match_complex_steps(case, rng):
    """Two roads to the truth: <gradient, t> = <g, derivative along t>, for each operand alone."""
    o, mask = operands(case)
    o, how, g = {k: np.float64(a) for k, a in o.items()}, case.setting(mask), rng.normal(size=case.shape)
    gradients = truth.gradients(how, o, g)
    for name in o:
        t = rng.normal(size=o[name].shape)
        slope = truth.along(lambda o: truth.forward(how, o)["y"], o, {name: t})
        np.testing.assert_allclose(np.vdot(gradients[name], t), np.vdot(g, slope), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("norm", ["add_rms", "add_layer", "layer"])
def test_every_result_has_a_tolerance_beside_padding(norm):
    """One that is NaN would compare with nothing."""
    case = Case(norm, (4, 6), (1,), bias=(4, 6), mask=(4, 6), activation="tanh", transform="vjp", wrt=("x", "bias"),
                poison="nan")  # fmt: skip
    for name, (true, tolerance) in expected(case, run._data(case)).items():
        assert not np.isnan(np.where(np.isnan(true), 0.0, tolerance)).any(), name


def test_the_closed_gradients_of_moments_match_complex_steps(rng):
    case = Case("moments", (4, 3), (0,), mask=(4, 3), weights=(4, 3))
    o, mask = operands(case)
    o, how = {k: np.float64(a) for k, a in o.items()}, case.setting(mask)
    g = {k: np.broadcast_to(rng.normal(size=(1, 3)), (4, 3)) for k in MOMENTS}
    for name, gradient in truth.moments_gradients(how, o, g).items():
        t = rng.normal(size=(4, 3))
        slope = truth.along(lambda o: truth.moments(how, o), o, {name: t})
        np.testing.assert_allclose(np.vdot(gradient, t), sum(np.vdot(g[k][0], slope[k][0]) for k in g), rtol=1e-10)


def test_an_error_of_a_few_units_is_found_and_made_simple(monkeypatch):
    """1 / sqrt(var) off by 2e-6 of itself, in programs of a size that nothing else here has."""

    for name in ("rsqrt", "fused_on_cpu"):
        right = getattr(formula, name)
        monkeypatch.setattr(formula, name, lambda *args, right=right: right(*args) * np.float32(1 + 5e-6))
    case = Case("layer", (5, 31), (1,), scale=(1, 31), mask=(5, 1), epsilon=1.5e-5, activation="tanh", seed=3)
    wrong = run.failures(case, ("xla",))
    assert wrong
    assert "y" in wrong[0]
    simple = run.shrunk(case, attempts=12)
    assert simple.scale is simple.mask is simple.activation is None
    jax.clear_caches()  # nobody else may have these programs


def test_a_case_prints_as_the_line_that_makes_it():
    for index in range(0, 40, 4):
        case, layout = drawn(0, index), devices.drawn(0, index)
        assert eval(repr(case)) == case
        assert eval(repr(layout)) == layout
    assert jn.__all__
