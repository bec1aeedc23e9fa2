"""`python -m gdx curvature`, from its options to its tables and its picture."""

import re

import numpy as np
import pytest

pytest.importorskip("matfree")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from gdx.__main__ import main
from gdx.demo import curvature


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(text, name):
    """The cells of the rows of this problem."""
    return [cells[1:] for cells in map(str.split, text.splitlines()) if cells and cells[0] == name and len(cells) > 5]


def test_functions_of_the_plane(capsys, folder):
    assert main(["curvature", "--data", "quadratic,rosenbrock", "--steps", "1000"]) == 0
    text = capsys.readouterr().out
    for name, smallest, largest in (("quadratic", 1, 10), ("rosenbrock", 0.39936, 1001.6)):
        (edges, *rates) = rows(text, name)
        assert edges[0] == "2"
        np.testing.assert_allclose([float(edges[1]), float(edges[3])], [smallest, largest], rtol=1e-3)
        assert [cells[0] for cells in rates] == ["gradient_descent", "momentum", "nesterov"]
        for cells in rates:
            predicted, measured = map(float, cells[-2:])
            assert 0 < predicted < 1
            np.testing.assert_allclose(measured, predicted, atol=4e-3)
    assert (folder / "gdx-curvature.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_minimum_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(curvature, "TRAINING_STEPS", 5)
    assert main(["curvature", "--data", "digits", "--penalty", "0", "--steps", "20", "--output", "some.pdf"]) == 0
    text = capsys.readouterr().out
    edges, *rates = rows(text, "digits")
    assert edges[0] == "9610" and float(edges[1]) < 0 < float(edges[3])
    assert len(rates) == 1 and float(rates[0][-2]) > 1
    assert re.search(r"digits: the smallest eigenvalue is not positive: there is no minimum", text)


@pytest.mark.soak
def test_the_trained_digits_network_grows_by_its_smallest_eigenvalue(capsys):
    assert main(["curvature", "--data", "digits"]) == 0
    edges, (_, *cells) = rows(capsys.readouterr().out, "digits")
    assert -0.01 < float(edges[1]) < 0 < float(edges[3])
    np.testing.assert_allclose(float(cells[-1]), float(cells[-2]), atol=1e-3)


def test_a_terminal_shows_a_bar(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["curvature", "--data", "quadratic", "--steps", "20"]) == 0
    assert "\x1b[" in capsys.readouterr().out


def test_contraction_of_distances():
    steps = np.arange(400)
    assert curvature.contraction(0.9**steps, 0) == pytest.approx(0.9)
    assert curvature.contraction((1 + steps) * 0.99**steps, 1) == pytest.approx(0.99, rel=1e-4)
    assert curvature.contraction(np.array([1e-4, 1e-5, 0.0]), 0) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ("--data mnist", "--data has 'mnist'; choose from quadratic, rosenbrock, digits"),
        ("--penalty -1", "--penalty is -1.0; expected a finite number >= 0"),
        ("--penalty nan", "--penalty is nan; expected a finite number >= 0"),
        ("--steps 1", "--steps is 1; expected at least 2"),
        ("--steps 0", "--steps is 0; expected at least 1"),
        ("--seed -1", "--seed is -1; expected 0 to"),
        ("--output x.gif", "ends in .png, .pdf or .svg"),
    ],
)
def test_a_wrong_option_says_what_is_allowed(options, allowed, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["curvature", *options.split()])
    assert exit_.value.code == 2
    output = capsys.readouterr()
    assert allowed in " ".join(output.err.split()) and output.out == ""
