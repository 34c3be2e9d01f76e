"""The mutants of `python -m tests.mutants`, which takes minutes: here only whether they apply to the package's text."""

import pytest

from tests.mutants import MUTANTS, ROOT, planted


def test_every_mutant_applies_to_the_package():
    for mutant in MUTANTS:
        text = (ROOT / "jaxnorm" / mutant.file).read_text()
        assert planted(mutant, text) != text
        for word in mutant.tests.split():
            assert not word.endswith(".py") or (ROOT / "tests" / word).exists(), mutant
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


def test_a_mutant_that_no_longer_applies_is_an_error():
    with pytest.raises(ValueError, match=r"0 times\. Write it as it is there now"):
        planted(MUTANTS[0], "nothing of it")
