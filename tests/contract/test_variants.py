"""The wrong variants fit the code, and a broken process is one that fails."""

import inspect
import subprocess
import sys

import pytest

from tests.contract.variants import ROOT, VARIANTS, Instead, caught_by, function_of, put, right_one

every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.what)


@every_variant
def test_finds_what_it_replaces(variant, monkeypatch):
    owner, name, right = right_one(variant)
    if not isinstance(variant.wrong, Instead):
        function, wrong = (inspect.signature(f).parameters for f in (function_of(right), variant.wrong))
        _, *given = wrong.values()
        named = [p.name for p in given if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        takes_the_rest = len(named) < len(given)
        assert {*named} <= {*function} if takes_the_rest else named == [*function]
    put(variant, monkeypatch.setattr)
    assert inspect.getattr_static(owner, name) is not right


@every_variant
def test_its_test_is_there(variant):
    file, _, test = variant.test.partition("::")
    assert f"def {test.split('[')[0]}(" in (ROOT / "tests" / file).read_text()


def test_their_tests_are_collected_with_these_settings():
    command = [sys.executable, "-m", "pytest", "--collect-only", "-qq", "-p", "no:cacheprovider"]
    tests = sorted({f"tests/{variant.test}" for variant in VARIANTS})
    done = subprocess.run([*command, *tests], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_has_a_name_of_its_own():
    assert len({variant.what for variant in VARIANTS}) == len(VARIANTS) > 100


@pytest.mark.parametrize("what", ["ascent", "names not qualified"])
def test_is_caught(what):
    (variant,) = (variant for variant in VARIANTS if variant.what == what)
    assert caught_by(variant) == f"tests/{variant.test}"
