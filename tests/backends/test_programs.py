"""What a norm costs before it runs, in counts. `python -m benchmarks.compile_time` has seconds."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from catalogue import EACH, draw
from helpers.models import MODELS, PLATFORMS, lines


@pytest.mark.parametrize(
    ("model", "most"),
    [
        ("100 layer norms, linen, gradient", 0.3),
        ("100 layer norms, linen, forward", 0.35),
        ("ResNet-50, linen, gradient", 0.6),
        ("ResNet-50, linen, inference", 0.9),
    ],
)
def test_a_model_lowers_to_fewer_lines_than_with_flax(model, most):
    """On every platform. A norm is a function of the program, which its layers call."""
    made = MODELS[model]()
    for platform in PLATFORMS:
        ours, flax = (lines(*made[name], platform) for name in ("xla", "flax"))
        assert ours <= most * flax


@pytest.mark.parametrize("row", EACH, ids=str)
def test_a_norm_is_lowered_once_however_often_it_is_called(row, rng):
    params, x = row.params(rng), jnp.asarray(draw(rng, row.shape, 1.0))
    norm = lambda x: row.spec.apply(params, row.state(), x, train=True)[0]
    name = row.spec.function.__name__
    deep = lambda x: functools.reduce(lambda x, _: norm(x), range(10), x)
    for f, most in ((deep, 1), (jax.grad(lambda x: deep(x).sum()), 4)):  # forward and backward, the ends apart
        text = jax.jit(f).lower(x).as_text()
        assert len(re.findall(rf"call @{name}\w*\(", text)) >= 10
        assert len(re.findall(rf"func private @{name}\w*\(", text)) <= most
