"""`python -m gdx sweep` and `python -m gdx learn`, from their options to their tables and pictures."""

import argparse
import os
import re
import signal

import jax.numpy as jnp
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from gdx.__main__ import main
from gdx.demo import learn, terminal
from gdx.demo.sweep import values


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ranks(text):
    """The table's cells after the rank."""
    rows = (line.replace(" %", "%").split() for line in text.splitlines())
    return [cells[1:] for cells in rows if cells and all(re.fullmatch(r"[\d.e+-]+%?", c) for c in cells)]


@pytest.fixture
def pictures(monkeypatch):
    """The axes of the pictures that are saved."""
    found, save = [], terminal.save
    monkeypatch.setattr(terminal, "save", lambda *given: found.append(given[1].axes[0]) or save(*given))
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.5", [0.5]),
        ("1,2,4,2", [1, 2, 4]),
        ("1e-3:1:4", [1e-3, 1e-2, 1e-1, 1]),
        ("0:3:4", [0, 1, 2, 3]),
        ("1:4:4", [1, 2, 3, 4]),
    ],
)
def test_forms_of_values(text, expected):
    assert values(text) == expected


@pytest.mark.parametrize(
    "text", ["x", "1:", "1:2", "2:1:4", "1:inf:3", "1:2:1", "1:2:4097", "1:2:3:4:5", "1:2:3.5", ""]
)
def test_what_is_no_form_of_values(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is neither A,B,C nor LOW:HIGH:POINTS"):
        values(text)


def test_a_grid_of_two_on_a_function(capsys, folder, pictures):
    options = "sweep --data quadratic --optimizer nesterov --learning-rate 1e-3:10:9 --momentum 0,0.5,0.9 --steps 50"
    assert main(options.split()) == 0
    text = capsys.readouterr().out
    assert "nesterov, 27 points, 50 steps" in text and "100% least loss" in text
    table = ranks(text)
    assert len(table) == 10 and table == sorted(table, key=lambda cells: float(cells[2]))
    assert int(re.search(r"(\d+) of 27 points diverged", text).group(1)) >= 3
    assert (folder / "gdx-sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "loss" in [axes.get_ylabel() for axes in pictures[0].figure.axes]


def test_digits_in_a_table_that_fits_80_columns(capsys, pictures):
    options = "sweep --b1 0.8,0.9 --weight-decay 0.1,0.2 --b2 0.9 --learning-rate 0.00012345,0.01 --steps 20"
    assert main([*options.split(), "--output", "other.pdf"]) == 0
    text = capsys.readouterr().out
    lines = text.split("points, 20 steps")[1].partition("points diverged")[0].splitlines()
    assert len(lines) > 10 and max(map(len, lines)) <= 80
    assert [cells[0] for cells in ranks(text)] == ["0.01"] * 4 + ["0.0001234"] * 4
    assert float(ranks(text)[0][4].rstrip("%")) > 50
    assert "training loss" in [axes.get_ylabel() for axes in pictures[0].figure.axes]


def test_where_everything_diverges(capsys):
    options = "sweep --data quadratic --optimizer gradient_descent --learning-rate 10,20 --steps 100"
    assert main(options.split()) == 1
    assert "2 of 2 points diverged" in capsys.readouterr().out


def terminal_of_100_columns(monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")


def test_a_terminal_shows_a_bar_and_16_learning_rates(capsys, monkeypatch):
    terminal_of_100_columns(monkeypatch)
    assert main(["sweep", "--data", "rosenbrock", "--steps", "20"]) == 0
    text = capsys.readouterr().out
    assert "\x1b[" in text and "100%" in text and "16 points" in text


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ("sweep --optimizer adagrad", "(choose from "),
        ("sweep --momentum 0:0.9:2", "adamw.replace: 'momentum' is unknown; choose from learning_rate, b1, b2"),
        ("sweep --learning-rate 1:0:9", "is neither A,B,C"),
        ("sweep --learning-rate 0.1,-1", "expected a finite number >= 0"),
        ("sweep --learning-rate 0.1", "there are 1 points; expected 2 to 4096, as in --learning-rate 1e-4:1:16"),
        ("sweep --learning-rate 0.1,0.1", "there are 1 points; expected 2 to 4096, as in --learning-rate 1e-4:1:16"),
        ("sweep --b1 0:1:3", "expected a finite number in [0, 1)"),
        ("sweep --learning-rate 1e-4:1e-1:100000000", "2 to 4096 points"),
        ("sweep --learning-rate 1e-4:1e-1:1000 --b1 0:0.9:1000", "there are 1000000 points; expected 2 to 4096"),
        ("sweep --output x.gif", "ends in .png, .pdf, .svg"),
        ("learn --momentum 1", "expected a finite number in [0, 1)"),
        ("learn --learning-rate 0", "--learning-rate: it is 0; expected more than 0"),
        ("learn --learning-rate nan", "--learning-rate: it is nan; expected more than 0"),
        ("learn --rounds 0", "--rounds: it is 0; expected more than 0"),
    ],
)
def test_a_wrong_option_says_what_is_allowed(options, allowed, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(options.split())
    assert exit_.value.code == 2
    output = capsys.readouterr()
    assert allowed in " ".join(output.err.split()) and output.out == ""


def test_learning_beats_its_own_start_and_says_how_far_it_is(capsys, folder):
    assert main(["learn", "--steps", "60", "--rounds", "12"]) == 0
    text = capsys.readouterr().out
    table = ranks(text)
    first, best = table[0], table[-1]
    assert float(best[3]) < 0.7 * float(first[3]) and float(best[4].rstrip("%")) > float(first[4].rstrip("%"))
    assert (folder / "gdx-learn.png").read_bytes().startswith(b"\x89PNG")
    assert re.search(r"^learning .* 100% validation loss [\d.]+", text, re.MULTILINE)
    said = " ".join(text.split()).partition("metasmoothness at the best")[2]
    agreement = re.search(r"weight decay (\S+), learning rate (\S+), momentum (\S+)", said)
    assert all(-1 <= float(x) <= 1 for x in agreement.groups())


def test_learning_keeps_what_there_is_after_ctrl_c(capsys, monkeypatch, folder):
    from rich.progress import Progress

    terminal_of_100_columns(monkeypatch)
    update = Progress.update

    def interrupted(bars, task, *, completed, **fields):
        if completed == 2:
            os.kill(os.getpid(), signal.SIGTERM)  # as Ctrl-C
            assert terminal.interrupted.wait(5)
        update(bars, task, completed=completed, **fields)

    monkeypatch.setattr(Progress, "update", interrupted)
    assert main(["learn", "--steps", "10"]) == 130
    text = capsys.readouterr().out
    assert "ended after 2 of 40 rounds: interrupted" in text
    assert "\x1b[" in text and "validation loss" in text
    assert (folder / "gdx-learn.png").exists()


def test_learning_ends_where_a_slope_is_not_finite(capsys, folder):
    assert main(["learn", "--learning-rate", "1e6", "--momentum", "0.9", "--steps", "50", "--rounds", "3"]) == 0
    assert "ended after 0 of 3 rounds: the loss or a slope is not finite any more" in capsys.readouterr().out
    assert (folder / "gdx-learn.png").read_bytes().startswith(b"\x89PNG")


def test_every_point_is_an_optimizer():
    found = learn.optimizer(jnp.log(jnp.array([0.05, 0.9 / (1 - 0.9), 1e-3]))).hyperparams
    assert dict(found) == pytest.approx({"weight_decay": 1e-3, "learning_rate": 0.05, "momentum": 0.9}, rel=1e-5)
