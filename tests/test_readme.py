"""The README keeps its word: its code runs when pasted, its files exist, its commands are those of .ci/run."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
README = (ROOT / "README.md").read_text()


def test_the_code_runs_when_pasted():
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    check = "\nassert y.shape == x.shape and bool(jax.numpy.isfinite(y).all()) and jnn.LayerNorm and jnnx.LayerNorm"
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code + check], check=True)


def test_what_it_points_at_is_there():
    """On the page of an index too, where a relative link leads nowhere: every link has the repository's address."""
    targets = re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", README)
    assert [image for image, _ in targets].count("!") >= 3
    for image, target in targets:
        assert target.startswith("https://"), target
        name = REPOSITORY.removeprefix("https://github.com/")
        of_this = f"https://raw.githubusercontent.com/{name}/main/" if image else f"{REPOSITORY}/blob/main/"
        if name in target:
            assert (ROOT / target.removeprefix(of_this)).is_file(), target
    for part in re.findall(r"`((?:tests|benchmarks|notebooks|jaxnorm)/[\w./]+)`", README):
        assert (ROOT / part).exists(), part


def test_ci_runs_the_command_of_the_readme():
    command = 'pip install -e ".[test]" && pytest'
    assert command in README
    assert f"\n{command}\n" in (ROOT / ".ci" / "run").read_text()
