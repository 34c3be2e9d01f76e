"""The API reference of the site has every public name, once."""

import re
import sys
from pathlib import Path

import pytest

import jaxnorm as jn

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def reference(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    import reference

    yield reference
    sys.modules.pop("reference")


def test_every_public_name_is_in_the_reference_once(reference):
    pages = reference.pages()  # raises for a name that has no page
    text = "\n".join(pages.values())
    named = re.findall(r"\{py:(?:function|class)\} (\w+).*\n:module: ([\w.]+)", text)
    assert len(named) == len({*named})
    assert {name for name, module in named if module == "jaxnorm"} == {*jn.__all__}
    assert {module for _, module in named} >= {"jaxnorm.linen", "jaxnorm.nnx", "jaxnorm.weights"}
    assert text.count("```pycon") > 150, "examples come with their names"


def test_a_public_name_without_a_page_is_an_error(reference, monkeypatch):
    monkeypatch.setitem(reference.PAGES, "Statistics", ["Moments"])
    with pytest.raises(LookupError, match=r"jaxnorm\.moments.*PAGES"):
        reference.pages()
