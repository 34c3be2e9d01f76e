"""The table of `benchmarks/peers.py` is made of measurements, and jaxnorm's own column keeps the laws."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> tuple[dict, str]:
    """The numbers and the printed page of a run with jaxnorm and the peer that every jax brings along."""
    path = tmp_path_factory.mktemp("peers") / "peers.json"
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    command = [sys.executable, "benchmarks/peers.py", "--json", str(path), "--only", "jaxnorm", "jax.nn.standardize"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text(encoding="utf-8")), done.stdout


@pytest.fixture(scope="module")
def ours(report) -> dict:
    return {row["key"]: row["values"]["jaxnorm"] for row in report[0]["rows"]}


@pytest.mark.parametrize(
    ("key", "limit"),
    [
        ("layer_norm_1e2", 2e-6),
        ("layer_norm_1e4", 2e-6),
        ("batch_norm_1e2", 2e-6),
        ("batch_norm_1e4", 2e-6),
        ("sync_mean", 1e-6),
        ("sync_var", 2e-6),
        ("residuals", 2.1),
        ("bfloat16", 0.51),
    ],
)
def test_jaxnorm_is_within_its_law(ours, key, limit):
    assert type(ours[key]) is float
    assert 0.0 <= ours[key] <= limit


@pytest.mark.parametrize("key", ["layer_norm_nan", "batch_norm_nan"])
def test_masked_nan_stays_out_of_the_gradient(ours, key):
    assert ours[key] is False


def test_every_row_of_jaxnorm_is_measured(report, ours):
    assert len(ours) == len(report[0]["rows"]) == 10
    assert not [key for key, value in ours.items() if value is None or isinstance(value, str)]


def test_a_call_that_a_peer_lacks_is_left_out_and_no_number_is_made_up(report):
    values = {row["key"]: row["values"]["jax.nn.standardize"] for row in report[0]["rows"]}
    assert values["sync_mean"] is None
    assert isinstance(values["layer_norm_1e4"], float)


def test_the_page_is_aligned_and_names_the_versions(report):
    results, page = report
    lines = page.split("\n\n")[0].splitlines()
    assert len(lines) == 3 + len(results["rows"])
    assert len({len(line) for line in lines}) == 1
    assert results["versions"]["jaxnorm"] in lines[1]
