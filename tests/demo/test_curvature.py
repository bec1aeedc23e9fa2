"""`python -m gdx curvature`, from its options to its tables and its picture."""

import argparse
import dataclasses
import re

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from matplotlib.figure import Figure

from gdx.__main__ import main
from gdx.compat import enable_x64
from gdx.demo import curvature
from gdx.demo.problems import SURFACES


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


def investigate(name):
    return curvature.investigate(name, argparse.Namespace(penalty=0.0, steps=30, seed=0), lambda *_: None)


@pytest.fixture
def float64():
    with enable_x64(True):
        yield


@pytest.mark.usefixtures("float64")
def test_the_predicted_distances_are_those_of_a_quadratic():
    found = investigate("quadratic")
    assert list(found.distances) == ["gradient_descent", "momentum", "nesterov"]
    for optimizer, distances in found.distances.items():
        np.testing.assert_allclose(curvature.predicted(found, optimizer, 30), distances, rtol=1e-6, atol=1e-13)
    both = curvature.DISTANCE / np.sqrt(2) * 0.81818182 ** np.arange(31)  # along both edges: 9/11 a step
    np.testing.assert_allclose(found.distances["gradient_descent"], both * np.sqrt(2), rtol=1e-5)


@pytest.mark.usefixtures("float64")
def test_without_a_minimum_the_steepest_half_of_the_predicted_distance_is_gone_at_once(monkeypatch):
    # a saddle in place of the quadratic: growth of 1.25 along its first axis, at the rate of 1 / largest
    saddle = dataclasses.replace(
        SURFACES["quadratic"], function=lambda point: 0.5 * (2 * point[1] ** 2 - 0.5 * point[0] ** 2)
    )
    monkeypatch.setitem(SURFACES, "quadratic", saddle)
    found = investigate("quadratic")
    assert not found.best["gradient_descent"].convex
    distances = found.distances["gradient_descent"]
    np.testing.assert_allclose(distances[1:], curvature.DISTANCE / np.sqrt(2) * 1.25 ** np.arange(1, 31), rtol=1e-6)
    ax = Figure().subplots()
    curvature._draw_distances(ax, found)
    measured, predicted = (line.get_ydata() for line in ax.lines)
    np.testing.assert_array_equal(measured, distances)
    np.testing.assert_allclose(predicted, distances, rtol=1e-6)


def test_a_contraction_is_shown_from_the_steps_on_that_it_needs(capsys):
    for steps, missing in ((2, ["momentum", "nesterov"]), (13, ["nesterov"]), (17, [])):
        assert main(["curvature", "--data", "quadratic", "--steps", str(steps)]) == 0
        _, *rates = rows(capsys.readouterr().out.replace(" steps", "-steps").replace("needs ", "needs-"), "quadratic")
        assert [cells[0] for cells in rates if cells[-1].startswith("needs-")] == missing
        for cells in rates:
            if cells[0] in missing:
                assert cells[-1] == {"momentum": "needs-13-steps", "nesterov": "needs-17-steps"}[cells[0]]
            else:
                predicted, measured = map(float, cells[-2:])
                np.testing.assert_allclose(1 - measured, 1 - predicted, rtol=0.05)


def test_tables_fit_80_columns(capsys):
    assert main(["curvature", "--data", "rosenbrock", "--steps", "10"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"needs 26\d steps", text) and max(map(len, text.splitlines())) <= 80


def test_contraction_of_distances():
    steps = np.arange(400)
    assert curvature.contraction(0.9**steps, 0) == pytest.approx(0.9)
    assert curvature.contraction((1 + steps) * 0.99**steps, 1) == pytest.approx(0.99, rel=1e-4)
    assert curvature.contraction(np.array([1e-4, 1e-5, 0.0]), 0) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ("--data mnist", "--data: it has 'mnist'; choose from quadratic, rosenbrock, digits"),
        ("--penalty -1", "--penalty: it is -1.0; expected 0 to 1000000"),
        ("--penalty 0 --data quadratic,rosenbrock", "does not apply to quadratic and rosenbrock; use it with digits"),
        ("--steps 1", "--steps: it is 1; expected at least 2"),
        ("--output x.gif", "ends in .png, .pdf, .svg"),
    ],
)
def test_a_wrong_option_says_what_is_allowed(options, allowed, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["curvature", *options.split()])
    assert exit_.value.code == 2
    output = capsys.readouterr()
    assert allowed in " ".join(output.err.split()) and output.out == ""
