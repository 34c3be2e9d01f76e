"""Build the site: `pip install -e ".[docs]" && python docs/build.py` writes build/site. A warning is an error.

The sources are gathered in build/docs: the pages of this folder, the notebooks with their stored outputs, the changelog
and CONTRIBUTING, and the API reference, which `reference.py` makes of the docstrings.
"""

import shutil
import sys
from pathlib import Path

import reference
from sphinx.cmd.build import main

DOCS = Path(__file__).parent
ROOT = DOCS.parent
SOURCES, SITE = ROOT / "build" / "docs", ROOT / "build" / "site"


def gather() -> None:
    for folder in (SOURCES, SITE):  # whole: Sphinx does not know what a page is made of
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(DOCS, SOURCES, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    shutil.copytree(ROOT / "notebooks", SOURCES / "notebooks")
    shutil.copy(ROOT / "CONTRIBUTING.md", SOURCES / "contributing.md")
    shutil.copy(ROOT / "CHANGELOG.md", SOURCES / "changelog.md")
    reference.write(SOURCES / "api")


if __name__ == "__main__":
    gather()
    options = ["--fail-on-warning", "--keep-going", "--quiet", "--jobs", "2", "-c", str(DOCS)]
    sys.exit(main([*options, *sys.argv[1:], str(SOURCES), str(SITE)]))
