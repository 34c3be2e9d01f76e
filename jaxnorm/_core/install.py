"""How this copy of jaxnorm was installed, for messages that say what to install and how."""

from __future__ import annotations

import json
import shlex
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit

_PIP = "pip install --force-reinstall --no-deps"


def reinstall() -> str:
    """The command that builds and installs jaxnorm again, from where this copy came from."""
    if checkout := _checkout():
        return f"{_PIP} -e {shlex.quote(checkout)}"
    installed = _installed()
    source = installed and _source(installed)
    return f"{_PIP} {shlex.quote(source)}" if source else f"{_PIP} .   # in a checkout of jaxnorm"


def extra(name: str) -> str:
    """The command that installs what an optional part of jaxnorm needs."""
    if _installed() is None and (checkout := _checkout()):
        return f"pip install -e {shlex.quote(f'{checkout}[{name}]')}"
    return f'pip install "jaxnorm[{name}]"'  # jaxnorm is there already: pip asks no index for it


def missing_flax(module: str, error: ImportError) -> ImportError:
    """What to raise where `module` cannot import Flax."""
    return ImportError(f"{module} needs Flax: {error}. Write: {extra('flax')}", name=error.name)


def _checkout() -> str | None:
    folder = Path(__file__).parents[2]
    return str(folder) if (folder / "pyproject.toml").exists() else None


def _installed() -> metadata.Distribution | None:
    try:
        return metadata.distribution("jaxnorm")
    except metadata.PackageNotFoundError:
        return None


def _source(installed: metadata.Distribution) -> str | None:
    """What pip built `installed` from, as pip recorded it (PEP 610), or the project's repository."""
    record = json.loads(installed.read_text("direct_url.json") or "{}")
    url, vcs = record.get("url", ""), record.get("vcs_info")
    if vcs:
        revision = vcs.get("requested_revision")
        return f"{vcs['vcs']}+{url}" + (f"@{revision}" if revision else "")
    folder = unquote(urlsplit(url).path)
    if "dir_info" in record and Path(folder).exists():
        return folder
    # The repository's address is kept in pyproject.toml alone, under [project.urls].
    urls = dict(line.split(", ", 1) for line in installed.metadata.get_all("Project-URL") or ())
    return f"git+{urls['Repository']}" if "Repository" in urls else None
