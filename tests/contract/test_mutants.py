"""The list of wrong variants fits the code: each finds the text that it is to change."""

import pytest

from tests.contract.mutants import MUTANTS, ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant[0])
def test_finds_what_it_changes(mutant):
    _, file, right, wrong = mutant
    assert right != wrong
    assert right in (ROOT / "gdx" / file).read_text()
