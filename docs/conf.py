"""Sphinx's settings of the site, which `python docs/build.py` builds.

The pages are plain Markdown that also reads on GitHub. What the site needs beyond them is here: the table of contents,
and links that lead to pages of the site.
"""

import os
import re
import tomllib
from pathlib import Path

import jaxnorm

DOCS = Path(__file__).parent
ROOT = DOCS.parent

REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]

project, author, copyright = "jaxnorm", "The jaxnorm authors", "The jaxnorm authors"
release = version = jaxnorm.__version__
extensions = ["myst_nb", "sphinx_copybutton"]
nb_execution_mode = "off"
myst_enable_extensions = ["fieldlist", "dollarmath"]
myst_heading_anchors = 3
python_maximum_signature_line_length = 100
suppress_warnings = ["myst.header"]  # pages of the reference begin a level deeper where a docstring has a heading
copybutton_prompt_text = ">>> |\\.\\.\\. |\\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = "jaxnorm"
html_static_path, html_css_files = ["static"], ["tables.css"]
html_use_index = False  # the reference has an index of its own
html_theme_options = {"source_repository": REPOSITORY, "source_branch": "main", "source_directory": "docs/"}

# The table of contents. A page that is in none of the groups is a warning, and a warning is an error.
CONTENTS = {
    "Start": ["tour", "choosing", "all-norms"],
    "Notebooks": [f"notebooks/{path.stem}" for path in sorted((ROOT / "notebooks").glob("*.ipynb"))],
    "Norms": ["norms", "running-statistics", "masks", "devices", "precision", "speed", "batch-invariance", "quantized",
              "weights", "export"],
    "Models": ["models", "convert", "recompute", "folding", "surgery", "diagnostics", "inputs"],
    "Moving": ["flax", "from-haiku", "from-equinox", "from-keras", "from-torch", "frameworks"],
    "Facts": ["performance", "accuracy", "guarantees", "backends"],
    "Reference": ["api/index"],
    "Project": ["design", "support", "contributing", "changelog"],
}  # fmt: skip
COPIED = {"contributing": ROOT / "CONTRIBUTING.md", "changelog": ROOT / "CHANGELOG.md"}


def setup(app):
    app.connect("source-read", as_page)


def as_page(app, name, source):
    """Links to files outside of docs/ lead to their pages, or to the repository; the start page has the contents."""
    text = re.sub(r"(?<=\]\()(?!https?:|#)([^)\s]+)(?=\))", lambda match: target(name, match[1]), source[0])
    if name == "index":
        trees = (f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(pages) + "\n```"
                 for caption, pages in CONTENTS.items())  # fmt: skip
        text += "\n" + "\n\n".join(trees) + "\n"
    source[0] = text


def target(page: str, link: str) -> str:
    """Where a link of a page leads on the site."""
    path, hash, anchor = link.partition("#")
    home = COPIED[page].parent if page in COPIED else DOCS
    if page.startswith(("api/", "notebooks/")) or not path:
        return link
    there = (home / path).resolve()
    for name, copied in COPIED.items():
        if there == copied:
            return f"{name}.md{hash}{anchor}"
    if there.parent == ROOT / "notebooks" and there.suffix == ".ipynb":
        return f"notebooks/{there.name}{hash}{anchor}"
    if there.is_relative_to(DOCS):
        return f"{there.relative_to(DOCS)}{hash}{anchor}"
    if there.suffix == ".png":
        return os.path.relpath(there, ROOT / "build" / "docs")  # where `build.py` puts the pages
    return f"{REPOSITORY}/blob/main/{there.relative_to(ROOT)}{hash}{anchor}"
