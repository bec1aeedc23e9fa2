"""`python -m gdx curvature`, from its options to its tables and its picture."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

import gdx
from gdx.__main__ import main
from gdx.compat import enable_x64
from gdx.demo import curvature, problems, terminal


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(text, name):
    """The cells of the rows of this problem in both tables."""
    return [cells[1:] for cells in map(str.split, text.splitlines()) if cells[:1] == [name] and "100%" not in cells]


def test_functions_of_the_plane(capsys, folder, monkeypatch):
    figures, save = [], terminal.save
    monkeypatch.setattr(terminal, "save", lambda *arguments: figures.append(arguments[1]) or save(*arguments))
    assert main(["curvature", "--data", "quadratic", "rosenbrock", "quadratic", "--steps", "200"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    expected = {"quadratic": (1, 10, ["68", "26", "35"]), "rosenbrock": (0.39936, 1001.6, ["200"] * 3)}
    for name, (smallest, largest, steps) in expected.items():
        (edges, *rates) = rows(text, name)
        assert edges[0] == "2"
        np.testing.assert_allclose([float(edges[1]), float(edges[3])], [smallest, largest], rtol=1e-3)
        assert [cells[0] for cells in rates] == ["gradient_descent", "momentum", "nesterov"]
        for *_, factor, _, predicted, measured in rates:
            assert 0 < float(factor) < 1
            np.testing.assert_allclose(float(measured), float(predicted), rtol=0.01)
        assert [cells[-3] for cells in rates] == steps
    assert (folder / "gdx-curvature.png").read_bytes().startswith(b"\x89PNG")
    for axes in figures[0].axes[2:]:
        measured, predicted = ([line for line in axes.lines if (line.get_linestyle() == ":") == is_] for is_ in (0, 1))
        assert len(measured) == len(predicted) == 3
        for one, other in zip(measured, predicted):
            np.testing.assert_allclose(one.get_ydata(), other.get_ydata(), rtol=0.01)


@pytest.fixture
def few_digits(monkeypatch):
    """A smaller network on fewer of the images: what is shown of it is the same."""
    digits = problems.digits()
    small = dataclasses.replace(
        digits, start=lambda key: problems.network(key, (64, 6, 10)), train=tuple(x[:100] for x in digits.train)
    )
    monkeypatch.setattr(curvature, "load", lambda name: small)


@pytest.mark.usefixtures("few_digits")
def test_without_a_minimum_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(curvature, "TRAINING_STEPS", 5)
    monkeypatch.setattr(curvature, "PENALTY", 0)
    assert main(["curvature", "--data", "digits", "--steps", "20", "--output", "some.pdf"]) == 0
    text = capsys.readouterr().out
    edges, *rates = rows(text, "digits")
    assert edges[0] == "460" and float(edges[1]) < 0 < float(edges[3])
    assert len(rates) == 1 and rates[0][0] == "gradient_descent" and float(rates[0][3]) > 1
    assert "digits: the smallest eigenvalue is not positive: there is no minimum" in text


@pytest.mark.soak
def test_the_trained_digits_network_grows_by_its_smallest_eigenvalue(capsys):
    assert main(["curvature", "--data", "digits"]) == 0
    edges, (_, *cells) = rows(capsys.readouterr().out, "digits")
    assert -0.01 < float(edges[1]) < 0 < float(edges[3])
    np.testing.assert_allclose(float(cells[-1]), float(cells[-2]), rtol=0.05)


def distances(curvatures, rate, steps):
    """Predicted and measured, of gradient descent on a quadratic with these curvatures."""
    ends = [gdx.curvature.Edge(value, vector, 0.0) for value, vector in zip(curvatures, jnp.eye(2))]
    edges = gdx.curvature.Edges(*ends, True, 2)

    def loss(x, _):
        return 0.5 * jnp.sum(jnp.array(curvatures) * x**2)

    return curvature.distances_of(gdx.gradient_descent(rate), loss, jnp.zeros(2), edges, steps)


def test_distances_go_on_along_both_edges():
    half = curvature.DISTANCE / np.sqrt(2)
    with enable_x64(True):
        predicted, measured = distances((1.0, 10.0), 2 / 11, 30)  # 9/11 a step, along both
        np.testing.assert_allclose(measured, curvature.DISTANCE * (9 / 11) ** np.arange(31), rtol=1e-7)
        np.testing.assert_allclose(predicted, measured, rtol=1e-7)
        # a saddle: at the rate of 1 / largest the half along the steepest is gone at once, and the other grows
        predicted, measured = distances((-0.5, 2.0), 0.5, 30)
        np.testing.assert_allclose(measured[1:], half * 1.25 ** np.arange(1, 31), rtol=1e-7)
        np.testing.assert_allclose(predicted, measured, rtol=1e-7)
        # where rounding begins they end
        predicted, measured = distances((1.0, 1.0), 0.5, 100)
        assert len(predicted) == len(measured) == 20 and measured[-1] > curvature.EXACT > measured[-1] / 2


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ("--data mnist", "argument --data: invalid choice: 'mnist' (choose from "),
        ("--steps 0", "--steps: it is 0; expected more than 0"),
        ("--output x.gif", "ends in .png, .pdf, .svg"),
    ],
)
def test_a_wrong_option_says_what_is_allowed(options, allowed, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["curvature", *options.split()])
    assert exit_.value.code == 2
    output = capsys.readouterr()
    assert allowed in " ".join(output.err.split()) and output.out == ""
