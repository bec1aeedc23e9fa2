"""`python -m gdx sweep` and `python -m gdx learn`, from their options to their tables and pictures."""

import argparse
import os
import re
import signal

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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.5", [0.5]),
        ("1,2,4", [1, 2, 4]),
        ("1e-3:1:4", [1e-3, 1e-2, 1e-1, 1]),
        ("0:3:4", [0, 1, 2, 3]),
        ("1:100:3:linear", [1, 50.5, 100]),
        ("1:4:3:log", [1, 2, 4]),
    ],
)
def test_forms_of_values(text, expected):
    assert values(text) == expected
    assert len(values("0:1")) == 12


@pytest.mark.parametrize(
    "text", ["x", "1:", "2:1", "1:inf", "1:2:1", "1:2:4097", "1:2:3:4:5", "-1:1:5:log", "1:2:3:cubic", ""]
)
def test_what_is_no_form_of_values(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is none of X, A,B,C, LOW:HIGH"):
        values(text)


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("sweep --learning-rate 0.01,0.1", "training loss"),
        ("sweep --data quadratic --optimizer sgd --learning-rate 0.01,0.1", "loss"),
        ("--optimizers sgd", "training loss"),
    ],
)
def test_the_picture_says_of_what_the_loss_is(command, kind, monkeypatch):
    labels = []
    monkeypatch.setattr(terminal, "save", lambda console, figure, output: labels.append(figure.axes[0].get_ylabel()))
    assert main([*command.split(), "--steps", "2"]) == 0
    assert labels == [kind]


def test_a_grid_of_two_on_a_function(capsys, folder):
    options = "sweep --data quadratic --optimizer nesterov --learning-rate 1e-3:10:9 --momentum 0,0.5,0.9 --steps 50"
    assert main(options.split()) == 0
    text = capsys.readouterr().out
    assert "nesterov, 27 points, 50 steps" in text and "100%, least loss" in text
    table = ranks(text)
    assert len(table) == 10 and table == sorted(table, key=lambda cells: float(cells[2]))
    assert int(re.search(r"(\d+) of 27 points diverged", text).group(1)) >= 3
    assert (folder / "gdx-sweep.png").read_bytes().startswith(b"\x89PNG")


def test_digits_in_chunks_give_the_same_points(capsys):
    options = ["sweep", "--learning-rate", "1e-3,1e-2,3e-2", "--steps", "20"]
    assert main(options) == 0
    whole = ranks(capsys.readouterr().out)
    assert main([*options, "--chunk-size", "2", "--output", "other.pdf"]) == 0
    assert ranks(capsys.readouterr().out) == whole
    assert whole[0][0] in ("0.01", "0.03") and float(whole[0][2].rstrip("%")) > 50


def test_where_everything_diverges(capsys):
    options = "sweep --data quadratic --optimizer gradient_descent --learning-rate 10,20 --steps 100"
    assert main(options.split()) == 1
    assert "2 of 2 points diverged" in capsys.readouterr().out


@pytest.mark.parametrize("options", ["sweep --data rosenbrock --steps 20", "learn --steps 10 --rounds 2"])
def test_a_terminal_shows_a_bar(options, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    assert main(options.split()) == 0
    assert "\x1b[" in capsys.readouterr().out


def test_tables_fit_80_columns(capsys):
    options = "sweep --b1 0.8,0.9 --b2 0.9,0.999 --weight-decay 0.1,0.2 --learning-rate 0.00012345,0.01 --steps 2"
    assert main(options.split()) == 0
    lines = capsys.readouterr().out.split("points, 2 steps")[1].partition("points diverged")[0].splitlines()
    assert len(lines) > 12 and max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ("sweep --optimizer adagrad", "(choose from "),
        ("sweep --momentum 0:0.9", "adamw.replace: 'momentum' is unknown; choose from learning_rate, b1, b2"),
        ("sweep --learning-rate 1:0", "is none of X, A,B,C"),
        ("sweep --learning-rate 0.1,-1", "expected a finite number >= 0"),
        ("sweep --learning-rate 0.1", "give one of them several, as in --learning-rate 1e-4:1:16"),
        ("sweep --learning-rate 0.1,0.1", "give one of them several, as in --learning-rate 1e-4:1:16"),
        ("sweep --b1 0:1:3", "expected a finite number in [0, 1)"),
        ("sweep --learning-rate 1e-4:1e-1:100000000", "2 to 4096 points"),
        ("sweep --learning-rate 1e-4:1e-1:1000 --b1 0:0.9:1000", "give 1000000 points; expected at most 4096"),
        ("sweep --chunk-size 0", "--chunk-size: it is 0; expected at least 1"),
        ("sweep --data quadratic --batch-size 8", "which has no data; use it with digits"),
        ("sweep --output x.gif", "ends in .png, .pdf, .svg"),
        ("learn --momentum 1", "expected a finite number in [0, 1)"),
        ("learn --learning-rate 0", "--learning-rate: it is 0.0; expected at least 1e-09"),
        ("learn --rounds 0", "--rounds: it is 0; expected at least 1"),
        ("learn --batch-size 1200", "expected 1 to 1149"),
    ],
)
def test_a_wrong_option_says_what_is_allowed(options, allowed, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(options.split())
    assert exit_.value.code == 2
    output = capsys.readouterr()
    assert allowed in " ".join(output.err.split()) and output.out == ""


def test_learning_beats_its_own_start(capsys, folder):
    assert main(["learn", "--steps", "60", "--rounds", "12"]) == 0
    table = ranks(capsys.readouterr().out)
    first, best = table[0], table[-1]
    assert float(best[3]) < 0.7 * float(first[3]) and float(best[4].rstrip("%")) > float(first[4].rstrip("%"))
    assert (folder / "gdx-learn.png").read_bytes().startswith(b"\x89PNG")


def test_learning_says_how_far_it_is(capsys, monkeypatch):
    monkeypatch.setattr("gdx.demo.terminal.PAUSE", 0)
    assert main(["learn", "--steps", "10", "--rounds", "3"]) == 0
    assert re.findall(r"step (\d), validation loss [\d.]+", capsys.readouterr().out) == ["0", "1", "2", "3"]


def test_learning_keeps_what_there_is_after_ctrl_c(capsys, monkeypatch, folder):
    rounds = learn.learn

    def interrupted(arguments):
        for number, measured in enumerate(rounds(arguments)):
            if number == 2:
                os.kill(os.getpid(), signal.SIGTERM)  # as Ctrl-C
                assert terminal.interrupted.wait(5)
            yield measured

    monkeypatch.setattr(learn, "learn", interrupted)
    assert main(["learn", "--steps", "10"]) == 130
    assert "ended after 2 of 40 rounds: interrupted" in capsys.readouterr().out
    assert (folder / "gdx-learn.png").exists()


def test_learning_ends_where_a_slope_is_not_finite(capsys, folder):
    assert main(["learn", "--learning-rate", "1e6", "--momentum", "0.9", "--steps", "50", "--rounds", "3"]) == 0
    assert "ended after 0 of 3 rounds: the loss or a slope is not finite any more" in capsys.readouterr().out
    assert (folder / "gdx-learn.png").read_bytes().startswith(b"\x89PNG")


def test_points_and_optimizers_are_the_same():
    tx = learn.optimizer(0.05, 0.9, 1e-3)
    found = learn.from_point(learn.to_point(tx)).hyperparams
    assert {name: pytest.approx(value, rel=1e-5) for name, value in tx.hyperparams.items()} == dict(found)
