"""The table of `benchmarks/peers.py` is made of measurements, and jaxnorm's own column keeps the laws."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


LAWS = {
    "layer_norm_1e2": 2e-6, "layer_norm_1e4": 2e-6, "batch_norm_1e2": 2e-6, "batch_norm_1e4": 2e-6, "sync_mean": 1e-6,
    "sync_var": 2e-6, "residuals": 2.1, "bfloat16": 0.51,
}  # fmt: skip


def test_jaxnorm_s_column_keeps_the_laws_and_no_number_is_made_up(tmp_path):
    """A run with jaxnorm and the peer that every jax brings along."""
    path = tmp_path / "peers.json"
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    command = [sys.executable, "benchmarks/peers.py", "--json", str(path), "--only", "jaxnorm", "jax.nn.standardize"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results, page = json.loads(path.read_text(encoding="utf-8")), done.stdout
    ours, peer = ({row["key"]: row["values"][name] for row in results["rows"]} for name in results["rows"][0]["values"])
    assert ours.keys() == LAWS.keys() | {"layer_norm_nan", "batch_norm_nan"}
    for key, limit in LAWS.items():
        assert type(ours[key]) is float, key
        assert 0.0 <= ours[key] <= limit, key
    assert ours["layer_norm_nan"] is ours["batch_norm_nan"] is False, "a masked NaN is in a gradient"
    assert peer["sync_mean"] is None, "a call that the peer lacks"
    assert isinstance(peer["layer_norm_1e4"], float)
    lines = page.split("\n\n")[0].splitlines()
    assert len(lines) == 3 + len(results["rows"])
    assert len({len(line) for line in lines}) == 1, "the page is aligned"
    assert results["versions"]["jaxnorm"] in lines[1]
