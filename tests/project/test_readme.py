"""README and docs/ keep their word: their code runs when pasted, their links lead somewhere, CI runs their command."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers.jit import FLAGS

ROOT = Path(__file__).parents[2]
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
README, CONTRIBUTING, INDEX = ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs" / "index.md"
PAGES = [README, CONTRIBUTING, *sorted(INDEX.parent.rglob("*.md"))]
TEXT = {page: page.read_text() for page in PAGES}

# The blocks of a page are one program. All other lines become blank, so that a traceback has the page's line numbers.
RUN = """
import re, sys, types
for path in sys.argv[1:]:
    code, inside = [], False
    for line in open(path, encoding="utf-8"):
        fence = line.startswith("```")
        code.append(line if inside and not fence else "\\n")
        inside = line == "```python\\n" or inside and not fence
    page = sys.modules["page"] = types.ModuleType("page")
    names = vars(page)
    names["__package__"] = "jaxnorm._norms" if path.endswith("CONTRIBUTING.md") else ""  # where its example belongs
    exec(compile("".join(code), path, "exec"), names)
    if path.endswith("CONTRIBUTING.md"):
        params, state = names["DynamicSoftsign"](activation="relu").init(3)
        y, _ = names["DynamicSoftsign"](activation="relu").apply(params, state, [[2.0, 0.0, -2.0]])
        assert y.tolist() == [[0.5, 0.0, 0.0]]
    if path.endswith("README.md"):
        import jax
        y, loss = names["y"], names["loss"]
        assert y.shape == (32, 14, 14, 64) and bool(jax.numpy.isfinite(y).all()) and 0 < float(loss) < 10
        assert names["nn"].LayerNorm and names["nnx"].LayerNorm
"""


def test_the_code_of_every_page_runs_when_pasted(tmp_path):
    """Outside the checkout, in one process, each page with names of its own."""
    pages = [str(page) for page in PAGES if "```python\n" in TEXT[page]]
    assert len(pages) >= 7
    env = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {FLAGS}"}
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", RUN, *pages], check=True, cwd=tmp_path, env=env)


def links(page: Path) -> list[tuple[str, str]]:
    """("!" for an image, target) of each link."""
    return re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", TEXT[page], flags=re.DOTALL))


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings."""
    titles = re.findall(r"^#+ (.*)$", TEXT[page], re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_of_the_readme_work_on_a_package_index():
    """A relative link leads nowhere there, so every link has the repository's address."""
    assert "!" in [image for image, _ in links(README)]
    name = REPOSITORY.removeprefix("https://github.com/")
    for image, target in links(README):
        assert target.startswith("https://"), target
        of_this = f"https://raw.githubusercontent.com/{name}/main/" if image else f"{REPOSITORY}/blob/main/"
        if name in target:
            assert (ROOT / target.removeprefix(of_this)).is_file(), target


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for _, target in links(page):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            there = (page.parent / path).resolve() if path else page
            assert there.is_file(), target
            assert not anchor or anchor in headings(there), target


def test_every_page_is_in_the_index_and_every_path_that_a_page_names_exists():
    named = {(INDEX.parent / target.partition("#")[0]).resolve() for _, target in links(INDEX)}
    assert {*PAGES} - {INDEX} <= named
    for page in PAGES:
        for part in re.findall(r"`((?:tests|benchmarks|notebooks|examples|docs|jaxnorm)/[\w./]+)`", TEXT[page]):
            assert (ROOT / part).exists(), (page.name, part)


def test_the_readme_is_short():
    assert len(TEXT[README].splitlines()) <= 110


def test_ci_runs_the_command_of_the_readme():
    command = 'pip install -e ".[test]" && pytest'
    assert command in TEXT[README]
    assert f"\n{command}\n" in (ROOT / ".ci" / "run").read_text()


def test_the_version_is_the_same_everywhere():
    """In the package, the newest heading of the changelog, the citation, and the page that shows it."""
    version = re.search(r'^__version__ = "(.+)"$', (ROOT / "jaxnorm/__init__.py").read_text(), re.M)
    assert version is not None
    changelog = re.search(r"^## (\S+) - (unreleased|\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert changelog is not None
    assert changelog[1] == version[1]
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {version[1]}\n" in citation
    assert f"\nrepository-code: {REPOSITORY}\n" in citation
    assert f"version = {{{version[1]}}}" in TEXT[INDEX.parent / "support.md"]
    released = f"\ndate-released: {changelog[2]}\n" in citation
    assert released == (changelog[2] != "unreleased"), "a release has its date in CITATION.cff"


def test_the_table_of_contents_of_the_site_has_every_page():
    contents = (INDEX.parent / "conf.py").read_text().partition("CONTENTS = {")[2].partition("\n}")[0]
    named = set(re.findall(r'"([\w/-]+)"', contents)) | {"index"}
    assert {str(page.relative_to(INDEX.parent).with_suffix("")) for page in PAGES[2:]} <= named
