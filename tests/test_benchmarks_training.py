"""`benchmarks/training.py` compares the same training: equal parameter trees, close losses, every variant measured."""

import json
import os
import subprocess
import sys
import types
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

pytest.importorskip("optax")

from benchmarks import training

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True, scope="module")
def _climate_of_flax():
    """Flax's layers promote. And what is compiled here need not be fast, but it must not be left to other tests."""
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()


@pytest.mark.parametrize("name", ["transformer-rms", "resnet-batch"])
def test_both_start_from_the_same_variables_and_only_identity_lacks_the_norms(name):
    task = training.TASKS[name]
    x, _ = task.batch(training.TINY)
    models = {k: task.model(norms, task.norm, jnp.float32, training.TINY) for k, norms in training.VARIANTS.items()}
    flax, jaxnorm, identity = (
        flatten_dict(jax.jit(model.init)(jax.random.key(0), x), sep="/") for model in models.values()
    )
    jax.tree.map(np.testing.assert_array_equal, flax, jaxnorm)
    assert set(flax) - set(identity) == {path for path in flax if f"{task.norm}_" in path} != set()
    assert set(identity) < set(flax)


def test_another_training_is_refused(monkeypatch):
    monkeypatch.setitem(training.VARIANTS, "jaxnorm", types.SimpleNamespace(RMSNorm=partial(nn.RMSNorm, epsilon=9.0)))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        training.measure("transformer-rms", "float32", training.TINY, 1)


def test_every_variant_is_trained_and_measured():
    name, dtype = "resnet-batch", "bfloat16"
    result = training.measure(name, dtype, training.TINY, 2)
    losses = result["losses"]
    assert losses["jaxnorm"] == pytest.approx(losses["flax"], rel=training.TOLERANCE[dtype])
    assert list(losses) == list(result["seconds"]) == ["flax", "jaxnorm", "identity"]
    for first, *_, last in losses.values():
        assert last < first
    for low, median, high in [*result["seconds"].values(), *result["ratios"].values()]:
        assert 0 < low <= median <= high
    assert list(result["ratios"]) == list(training.RATIOS)


def test_the_command_prints_a_line_for_each_model_and_writes_json(tmp_path):
    path = tmp_path / "training.json"
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")} | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-m", "benchmarks.training", "--tiny", "--rounds", "2", "--models", "transformer-rms"]
    command += ["--dtypes", "float32", "--markdown", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    header, rule, line = done.stdout.split("\n\n")[0].splitlines()
    assert header.count("|") == rule.count("|") == line.count("|") == 3 + len(training.RATIOS)
    assert line.startswith("| transformer-rms | float32 | ")
    (result,) = json.loads(path.read_text(encoding="utf-8"))["results"]
    assert set(result["seconds"]) == set(result["losses"]) == set(training.VARIANTS)
