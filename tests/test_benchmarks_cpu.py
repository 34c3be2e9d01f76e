"""`benchmarks/cpu.py` reports what it measured, of each case asked for, and nothing else. No time is judged."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
MEASURED = {"jaxnorm", "jax.nn.standardize"}
COMMAND = """
    -m benchmarks.cpu --norms rms --shapes 8x16 --dtypes bfloat16 --rounds 4 --seconds 0 --allocators warm
    --only jaxnorm jax.nn.standardize tokamax equinox
"""


def test_a_result_is_complete_and_what_is_absent_or_wrong_has_no_number(tmp_path):
    """A run in which tokamax returns its input and equinox is not there."""
    (tmp_path / "tokamax.py").write_text("def layer_norm(x, *args, **options):\n    return x\n", encoding="utf-8")
    (tmp_path / "equinox.py").write_text("raise ImportError\n", encoding="utf-8")
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")} | {"PYTHONPATH": str(tmp_path)}
    out = ["--json", str(tmp_path / "cpu.json"), "--chart", str(tmp_path / "cpu.png")]
    done = subprocess.run(
        [sys.executable, *COMMAND.split(), *out], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    report, page = json.loads((tmp_path / "cpu.json").read_text(encoding="utf-8")), done.stdout
    found = [(r["allocator"], r["norm"], r["shape"], r["dtype"], r["pass"]) for r in report["results"]]
    assert found == [("warm", "rms", [8, 16], "bfloat16", which) for which in ("forward", "forward+backward")]
    for result in report["results"]:
        assert set(result["contestants"]) == MEASURED
        assert list(result["failures"]) == ["tokamax"]
        assert result["rounds"] == 3  # of four, as the time was over, without the first
        assert result["copy"] in result["copy_seconds"]
        for value in result["contestants"].values():
            for low, middle, high in (value["copies"], value["seconds"]):
                assert 0 < low <= middle <= high
            assert value["page_faults"] >= 0
            assert len(value["errors"]) == 3
    assert report["missing"] == ["equinox"]
    assert "Not installed, left out: equinox." in page
    assert sum(line.startswith("8x16 bfloat16") for line in page.splitlines()) == len(found)
    assert {"date", "command", "cpu", "platform", "python", "jax", "jaxlib", "backends"} <= set(report)
    assert set(report["versions"]) == MEASURED | {"tokamax"}
    assert report["threads"] == len(os.sched_getaffinity(0))
    assert report["devices"] == 1  # although the tests' own environment asks for eight
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")
