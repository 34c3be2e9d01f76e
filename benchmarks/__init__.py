"""Benchmarks: `python -m benchmarks.NAME`, with NAME such as accuracy, cpu, gpu, training, compiled, scale, weights.

`peers` has one class per library, `harness` the timing loop, the truth and the tables. Run from a checkout, because
the truth is `tests/oracle.py`. Of the files here a newcomer needs only the one whose command they run.
"""

import sys
from pathlib import Path

_tests = str(Path(__file__).parents[1] / "tests")
if _tests not in sys.path:
    sys.path.append(_tests)
