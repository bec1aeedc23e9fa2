"""Pictures: on given axes or new ones, headless, also of runs that diverged."""

import inspect
import itertools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import gdx
from gdx import plot


@pytest.fixture
def ax():
    return FigureCanvasAgg(Figure()).figure.subplots()  # the canvas of a bare figure draws nothing


@pytest.fixture(autouse=True)
def _close():
    yield
    pyplot.close("all")


def bowl(point: jax.Array) -> jax.Array:
    return jnp.sum(point**2) - 1


def labels(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_loss_curves_draws_on_the_axes_it_is_given(ax):
    assert plot.loss_curves({"adam": [1.0, 0.1, 0.01], "sgd": jnp.ones(2)}, ax) is ax
    assert labels(ax) == ["adam", "sgd"]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_yscale()) == ("step", "loss", "log")


def test_new_axes_without_a_change_of_backend():
    backend = pyplot.get_backend()
    assert isinstance(plot.loss_curves({"adam": [1.0, 0.5]}), Axes)
    assert isinstance(plot.paths(bowl, {"adam": np.ones((3, 2))}), Axes)
    assert pyplot.get_backend() == backend


def test_the_steps_of_the_losses(ax):
    plot.loss_curves({"adam": [1.0, 0.5]}, ax, steps={"adam": [0, 25]})
    assert ax.lines[0].get_xdata().tolist() == [0, 25]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_diverged_curve_ends_before_it(ax, bad):
    plot.loss_curves({"sgd": [1.0, 10.0, bad, 3.0]}, ax)
    assert labels(ax) == ["sgd (diverged)"]
    assert ax.lines[0].get_ydata().tolist() == [1.0, 10.0]
    ax.figure.canvas.draw()


@pytest.mark.parametrize("losses", [[], [np.nan], [0.0, 0.0], [-1.0, -2.0], [1.0, -0.5]])
def test_losses_without_a_logarithm(ax, losses):
    plot.loss_curves({"sgd": losses}, ax)
    assert ax.get_yscale() == "linear"
    ax.figure.canvas.draw()


@pytest.mark.parametrize(("last", "scale"), [(0.1, "log"), (0.0, "log"), (-1.0, "linear")])
def test_losses_are_on_a_logarithmic_scale_unless_one_is_negative(ax, last, scale):
    plot.loss_curves({"adam": [3.0, 1.0, last], "sgd": [2.0, 1.0, np.inf, -1.0]}, ax)
    assert ax.get_yscale() == scale


@pytest.mark.parametrize(
    ("draw", "dots"),
    [
        (lambda ax: plot.loss_curves({"sgd": [2.0]}, ax), [0]),
        (lambda ax: plot.loss_curves({"sgd": [2.0, 1.0]}, ax), None),
        (lambda ax: plot.sharpness({"sgd": [2.0]}, 4.0, ax), [0]),
        (lambda ax: plot.loss_line([0.5], {"loss": [2.0]}, ax), [0]),
        (lambda ax: plot.loss_line(np.arange(6), {"loss": [1.0, np.nan, 2.0, 3.0, np.nan, 4.0]}, ax), [0, 5]),
    ],
)
def test_points_without_a_neighbour_are_dots(ax, draw, dots):
    (line, *_) = draw(ax).lines
    assert line.get_marker() == ("None" if dots is None else "o")
    assert line.get_markevery() == dots
    ax.figure.canvas.draw()


def test_paths_draws_contours_and_one_line_for_each_run(ax):
    walk = np.linspace([2.0, 1.0], [0.0, 0.0], 10)
    assert plot.paths(bowl, {"adam": walk, "sgd": walk / 2}, ax, minimum=(0.0, 0.0)) is ax
    assert labels(ax) == ["adam", "sgd", "start", "minimum"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("x", "y")
    assert len(ax.collections) == 2  # filled contours, and lines
    assert ax.get_xlim()[0] < 0 and ax.get_xlim()[1] > 2


def test_paths_that_share_a_valley_differ_in_width(ax):
    plot.paths(bowl, dict.fromkeys("abcdef", np.ones((3, 2))), ax)
    widths = [line.get_linewidth() for line in ax.lines if line.get_label() in set("abcdef")]
    assert len(widths) == 6 and all(np.diff(widths) < -0.2)


def test_paths_without_a_legend_within_limits(ax):
    plot.paths(bowl, {"adam": np.ones((3, 2))}, ax, limits=((-1, 2), (-3, 4)), legend=False)
    assert labels(ax) == ["start"]  # what is no run is named anyway
    assert (ax.get_xlim(), ax.get_ylim()) == ((-1, 2), (-3, 4))


def test_a_diverged_path_does_not_decide_the_limits(ax):
    plot.paths(
        bowl, {"good": [[1.0, 1.0], [0.0, 0.0]], "bad": [[1.0, 1.0], [9.0, 9.0], [1e20, 0.0], [np.inf, 0.0]]}, ax
    )
    assert labels(ax) == ["good", "bad (diverged)", "start"]
    assert ax.get_xlim()[1] < 2
    assert ax.lines[3].get_xdata().tolist() == [1.0, 9.0]
    ax.figure.canvas.draw()


@pytest.mark.parametrize("points", [np.zeros((0, 2)), np.full((2, 2), np.nan)])
def test_a_path_without_points(ax, points):
    plot.paths(bowl, {"adam": points}, ax)
    ax.figure.canvas.draw()


def test_a_function_that_is_flat_or_not_finite(ax):
    plot.paths(lambda point: jnp.zeros_like(point[0]), {"adam": np.ones((2, 2))}, ax)
    plot.paths(lambda point: jnp.log(point[0]), {"adam": np.array([[1.0, 1.0], [-1.0, 0.0]])}, ax)
    ax.figure.canvas.draw()


def test_lines_differ_in_colour_and_in_style(ax):
    plot.loss_curves({str(index): [1.0, 0.5] for index in range(6)}, ax)
    assert len({line.get_color() for line in ax.lines}) == 6
    assert len({str(line._unscaled_dash_pattern) for line in ax.lines}) == 6


def grid(first: list[float], second: list[float]) -> list[dict[str, float]]:
    return [{"learning_rate": a, "weight_decay": b} for a in first for b in second]


def test_a_sweep_of_one_hyperparameter_is_a_curve(ax):
    points = [{"learning_rate": rate} for rate in (1e-3, 1e-2, 1e-1, 1.0)]
    assert plot.sweep(points, [3.0, 0.1, 1.0, np.nan], ax) is ax
    assert (ax.get_xlabel(), ax.get_xscale(), ax.get_yscale()) == ("learning rate", "log", "log")
    assert labels(ax) == ["best: 0.01", "diverged"]
    ax.figure.canvas.draw()


def test_a_sweep_over_seeds_is_its_mean_with_an_error(ax):
    points, scores = (
        [{"learning_rate": rate} for rate in (0.1, 0.2, 0.4)],
        np.array([[1, 3], [2.0, 2.5], [1.0, np.inf]]),
    )
    plot.sweep(points, scores, ax)
    np.testing.assert_allclose(ax.get_lines()[0].get_ydata(), [2, 2.25, np.nan])
    edges = ax.collections[0].get_paths()[0].vertices
    np.testing.assert_allclose(sorted({y for x, y in edges if x == 0.1}), [1, 3])  # 1.41 / root of 2 on each side
    assert labels(ax) == ["standard error of the mean", "best: 0.1, at the edge: try wider", "diverged"]
    with pytest.raises(
        ValueError, match=r"score has shape \(2, 2\); expected \(3, 2\), one number for each label and seed"
    ):
        plot.sweep(points, scores[:2], ax)


def test_a_sweep_of_two_is_a_heat_map(ax):
    plot.sweep(grid([1e-2, 1e-1], [0.0, 1.0, 2.0]), [1.0, 2.0, 3.0, 40.0, np.inf, 0.5], ax, name="error")
    np.testing.assert_array_equal(ax.images[0].get_array().filled(-1), [[1, 2, 3], [40, -1, 0.5]])
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("learning rate", "weight decay")
    assert ax.lines[1].get_xydata().tolist() == [[2.0, 1.0]]  # the best
    assert labels(ax) == ["diverged", "best, at the edge: try wider"] and len(ax.figure.axes) == 2
    ax.figure.canvas.draw()


def test_a_sweep_of_three_shows_the_least_over_the_third(ax):
    points = [{**point, "b1": b1} for point in grid([0.1, 0.2], [1.0, 2.0]) for b1 in (0.5, 0.9)]
    plot.sweep(points, [5, 1, 6, 2, 3, 7, np.nan, np.nan], ax)
    np.testing.assert_array_equal(ax.images[0].get_array().filled(-1), [[1, 2], [3, -1]])


def test_close_values_have_different_labels(ax):
    plot.sweep(grid([1e-3, 1e-2], [0.99, 0.999, 0.9999]), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], ax)
    assert [text.get_text() for text in ax.get_xticklabels()] == ["0.99", "0.999", "0.9999"]


def test_a_sweep_of_two_that_is_no_grid_is_a_scatter(ax):
    points = [{"learning_rate": 10.0**-i, "weight_decay": 0.5 * i} for i in range(4)]
    plot.sweep(points, [3.0, 0.1, np.nan, 1.0], ax)
    assert labels(ax) == ["best", "diverged"] and not ax.images
    assert (ax.get_ylabel(), ax.get_xlabel(), ax.get_yscale()) == ("learning rate", "weight decay", "log")
    assert len(ax.collections[0].get_offsets()) == 3
    best, diverged = (line.get_xydata().tolist() for line in ax.lines)
    assert best == [[0.5, 0.1]] and diverged == [[1.0, 0.01]]
    ax.figure.canvas.draw()


def numbers(axis) -> list[str]:
    axis.axes.figure.canvas.draw()
    low, high = axis.get_view_interval()
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    return [t.label1.get_text() or t.label2.get_text() for t in ticks if low <= t.get_loc() <= high]


@pytest.mark.parametrize(
    ("decades", "some", "least", "most"),
    [
        (1.2, {"0.5", "1", "2"}, 3, 6),
        (2.5, {"0.2", "1", "5"}, 6, 9),
        (7.5, {"0.01", "1", "100"}, 4, 9),
        (14, set(), 4, 9),
    ],
)
def test_the_numbers_of_logarithmic_axes_and_bars(decades, some, least, most):
    heights = np.geomspace(10 ** (-decades / 2), 10 ** (decades / 2), 20)
    line = plot.loss_line(np.arange(20), {"loss": heights})
    bar = plot.sweep(grid([1, 2, 3, 4], [1, 2, 3, 4, 5]), heights).figure.axes[1]
    for axis in (line.yaxis, bar.yaxis):
        shown = [text for text in numbers(axis) if text]
        assert some <= set(shown) and least <= len(shown) <= most and not any("$" in text for text in shown)


@pytest.mark.parametrize("points", [grid([0.1, 0.2], [1.0, 2.0]), [{"a": i, "b": i} for i in range(4)]])
def test_limits_of_a_sweep_are_those_of_its_colours(points):
    for limits, extend in (((0.1, 3.0), "max"), ((0.3, 9e9), "min"), ((0.3, 3.0), "both"), ((0.1, 1e3), "neither")):
        ax = plot.sweep(points, [0.2, 0.5, 1.0, 900.0], limits=limits)
        (drawn,) = ax.images or ax.collections
        assert drawn.get_clim() == limits and drawn.colorbar.extend == extend
        if limits == (0.1, 3.0):
            assert {"0.1", "0.2", "0.5", "1", "2"} <= set(numbers(ax.figure.axes[1].yaxis))


def test_limits_of_a_sweep_of_one_hyperparameter_are_those_of_its_axis(ax):
    plot.sweep([{"b1": 0.0}, {"b1": 0.9}], [1.0, 900.0], ax, limits=(0.5, 2.0))
    assert ax.get_ylim() == (0.5, 2.0) and ax.get_yscale() == "linear"
    with pytest.raises(ValueError, match=r"limits is \(2, 1\); expected \(low, high\) with low < high"):
        plot.sweep([{"b1": 0.0}, {"b1": 0.9}], [1.0, 2.0], limits=(2, 1))


@pytest.mark.parametrize("score", [[np.nan, np.nan], [0.0, -1.0], [1.0, 1.0]])
def test_sweeps_without_a_logarithm(ax, score):
    plot.sweep([{"b1": 0.0}, {"b1": 0.9}], score, ax)
    ax.figure.canvas.draw()
    plot.sweep(grid([0.1, 0.2], [1.0]), score)
    plot.sweep(grid([0.1, 0.2], [1.0]), score, limits=(0.1, 3.0)).figure.canvas.draw()


def test_a_sweep_of_nothing():
    with pytest.raises(ValueError, match=r"differ in no hyperparameter; expected labels such as gdx\.labels gives"):
        plot.sweep([{}, {}], [1.0, 2.0])
    with pytest.raises(ValueError, match=r"score has shape \(1,\); expected \(2,\), one number for each label"):
        plot.sweep([{"b1": 0.1}, {"b1": 0.2}], [1.0])


@pytest.mark.parametrize("edge", [0.5, np.inf])
def test_a_range_test(ax, edge):
    from gdx import RangeTest

    result = RangeTest(np.geomspace(1e-3, 1, 4), np.array([1.0, 0.5, 0.2, np.inf]), 1.1, edge, 0.1)
    assert plot.range_test(result, ax) is ax
    assert labels(ax)[2:] == (["suggested: 0.1", "edge: 0.5"] if edge == 0.5 else ["suggested: 0.1"])
    ax.figure.canvas.draw()


def test_a_range_test_of_negative_losses(ax):
    from gdx import RangeTest

    plot.range_test(RangeTest(np.geomspace(1e-3, 1, 3), np.array([-1.0, -3.0, np.inf]), -0.5, 0.3, 0.03), ax)
    assert ax.get_yscale() == "linear" and np.isfinite(ax.lines[0].get_ydata()[:2]).all()
    ax.figure.canvas.draw()


def curved(scale=1.0):
    from gdx import curvature

    density = curvature.Density(jnp.array([[-0.1, 1.0], [0.0, 2.0]]) * scale, jnp.array([[0.9, 0.1], [0.5, 0.5]]))
    ends = [curvature.Edge(jnp.float32(x * scale), None, jnp.float32(0)) for x in (-0.2, 2.0)]
    return density, curvature.Edges(*ends, converged=jnp.bool_(True), products=jnp.int32(4))


def test_a_spectral_density_with_its_error_and_edges(ax):
    density, edges = curved()
    assert plot.spectral_density(density, ax, edges=edges) is ax
    assert labels(ax) == ["density", "± standard error", "smallest: -0.2", "largest: 2"]
    assert ax.get_xlim()[0] < -0.2 and ax.get_xlim()[1] > 2 and ax.get_yscale() == "log"
    assert "eigenvalue" in ax.get_xlabel() and "density" in ax.get_ylabel()
    ax.figure.canvas.draw()


@pytest.mark.parametrize("scale", [0.0, 1e-8, 1e8])
def test_a_density_of_one_probe_and_any_scale(ax, scale):
    density, _ = curved(scale)
    plot.spectral_density(jax.tree.map(lambda x: x[:1], density), ax)
    assert labels(ax) == ["density"]
    ax.figure.canvas.draw()


def test_sharpness_against_the_edge(ax):
    assert plot.sharpness({"sgd": [1.0, 3.9, 4.1]}, 4.0, ax, steps={"sgd": [0, 10, 20]}) is ax
    assert labels(ax) == ["sgd", "edge of stability: 4"]
    assert ax.lines[0].get_xdata().tolist() == [0, 10, 20] and ax.get_ylim()[0] == 0
    assert ax.get_xlabel() == "step" and "sharpness" in ax.get_ylabel()
    ax.figure.canvas.draw()


def test_sharpness_below_zero_is_seen(ax):
    plot.sharpness({"sgd": [-3.0, 1.0]}, 4.0, ax)
    assert ax.get_ylim()[0] < -3


def test_sharpness_of_runs_with_edges_of_their_own(ax):
    runs = {"slow": [1.0, 2.0], "fast": [1.0, np.nan]}
    plot.sharpness(runs, {"slow": 20.0, "fast": jnp.float32(2.0)}, ax)
    assert labels(ax) == ["slow", "edge of slow: 20", "fast (diverged)", "edge of fast: 2"]
    with pytest.raises(ValueError, match="edge has no 'fast'; expected a number, or one for each run"):
        plot.sharpness(runs, {"slow": 20.0}, ax)


def test_a_loss_line_has_a_curve_for_each_loss_and_a_band_for_several_lines(ax):
    positions = np.linspace(-0.5, 1.5, 9)
    several = np.stack([1e-2 + positions**2, 2e-2 + positions**2])
    losses = {"training loss": several, "test loss": 1 + positions**2}
    assert plot.loss_line(positions, losses, ax, marks={"sgd": 0.0, "adam": 1.0}) is ax
    assert labels(ax) == ["training loss", "test loss"]
    np.testing.assert_allclose(ax.lines[0].get_ydata(), several.mean(axis=0))
    assert len(ax.collections) == 1 and [text.get_text() for text in ax.texts] == ["sgd", "adam"]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_yscale()) == ("position on the line", "loss", "log")
    ax.figure.canvas.draw()


@pytest.mark.parametrize("values", [[np.nan, np.inf], [1.0, np.nan], [0.0, -1.0], [2.0, 2.0]])
def test_loss_lines_without_a_logarithm(ax, values):
    plot.loss_line([0.0, 1.0], {"loss": values}, ax, name="accuracy")
    assert (ax.get_yscale(), ax.get_ylabel()) == ("linear", "accuracy")
    assert np.array_equal(np.isnan(ax.lines[0].get_ydata()), ~np.isfinite(values))
    ax.figure.canvas.draw()


def test_a_loss_plane_has_x_along_its_columns(ax):
    x, y = np.linspace(-1, 1, 5), np.linspace(0, 2, 4)
    heights = 0.1 + x[None] ** 2 + 10 * y[:, None] ** 2
    assert plot.loss_plane(x, y, heights, ax, points={"minimum": (0.0, 0.0)}) is ax
    assert (ax.get_xlim(), ax.get_ylim()) == ((-1.0, 1.0), (0.0, 2.0))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("first direction", "second direction")
    assert [text.get_text() for text in ax.texts] == ["minimum"]
    assert ax.figure.axes[1].get_ylabel() == "loss"
    np.testing.assert_allclose(ax.collections[0].levels[[0, -1]], [heights.min(), heights.max()])
    ax.figure.canvas.draw()


@pytest.mark.parametrize("heights", [np.full((3, 3), np.nan), np.ones((3, 3)), np.diag([np.inf, -1.0, 5.0])])
@pytest.mark.parametrize("levels", [None, [7.0, 8.0]])
def test_loss_planes_that_are_flat_or_not_finite(ax, heights, levels):
    plot.loss_plane(np.arange(3), np.arange(3), heights, ax, levels=levels)
    ax.figure.canvas.draw()


@pytest.mark.parametrize("height", [0.0, 0.7, -1e-9])
@pytest.mark.parametrize("rounding", [0, 1e-16])
def test_a_flat_loss_plane_has_its_colour(ax, height, rounding):
    plot.loss_plane(np.arange(3), np.arange(3), height * (1 + rounding * np.arange(9).reshape(3, 3)), ax)
    low, high = ax.collections[0].levels
    assert low < height < high
    ax.figure.canvas.draw()
    inside = ax.transAxes.transform([(0.3, 0.4)])[0].astype(int)
    assert np.asarray(ax.figure.canvas.buffer_rgba())[-inside[1], inside[0], :3].tolist() != [255, 255, 255]


def test_nearly_equal_losses_of_a_plane_have_different_labels(ax):
    plot.loss_plane(np.arange(4), np.arange(4), 2.3 + 1e-4 * np.arange(16).reshape(4, 4), ax)
    texts = [text.get_text() for text in ax.figure.axes[1].get_yticklabels()]
    assert len(set(texts)) == len(texts) == 10


@pytest.mark.parametrize(("rows", "columns", "shape"), [(1, 5, (1, 5)), (5, 1, (5, 1)), (4, 5, (5, 4)), (4, 5, (5,))])
def test_a_loss_plane_of_another_shape(rows, columns, shape):
    with pytest.raises(
        ValueError, match=r"plot\.loss_plane: losses has shape .* expected \(rows, columns\), one for each"
    ):
        plot.loss_plane(np.arange(columns), np.arange(rows), np.ones(shape))
    assert not pyplot.get_fignums()


def test_loss_planes_with_the_same_levels(ax):
    plot.loss_plane(np.arange(3), np.arange(3), np.eye(3), ax, levels=[0.1, 0.5, 2.0], name="error")
    assert ax.collections[0].levels.tolist() == [0.1, 0.5, 2.0]
    assert ax.figure.axes[1].get_ylabel() == "error"
    ax.figure.canvas.draw()


def test_the_noise_scale_over_training(ax):
    scales = {"micro-batches": [10.0, np.inf, 40.0], "each example": jnp.array(20.0)}
    steps = {"micro-batches": [0, 1, 2], "each example": 1}
    assert plot.noise_scale(scales, ax, steps=steps, batch_size=64, examples=1437) is ax
    assert labels(ax) == ["micro-batches", "each example"]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_yscale()) == ("step", "noise scale (examples)", "log")
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [10, np.nan, 40])
    assert ax.lines[1].get_xdata().tolist() == [1]
    assert [text.get_text() for text in ax.texts] == ["batch size: 64", "examples: 1437"]
    ax.figure.canvas.draw()


@pytest.mark.parametrize("scales", [{}, {"sgd": []}, {"sgd": [np.inf, np.nan]}, {"sgd": [0.0]}])
def test_noise_scales_that_are_not_there(ax, scales):
    plot.noise_scale(scales, ax)
    ax.figure.canvas.draw()


def test_what_was_watched_has_a_panel_for_each_quantity_and_a_line_for_each_group(ax):
    assert plot.watched(gdx.Trained(None, None, np.ones(20), WATCHED), ax) is ax and labels(ax) == ["a", "b"]
    panels = {panel.get_title(): panel for panel in ax.child_axes}
    assert list(panels)[3:] == ["update over parameter", "cosine", "unmoved", "learning rate"]
    drawn = {title: [line.get_xydata().tolist() for line in panel.lines] for title, panel in panels.items()}
    np.testing.assert_array_equal(drawn["gradient norm"], [[[0, 1], [10, np.nan]], [[0, np.nan], [10, 2]]])
    np.testing.assert_array_equal(drawn["cosine"], [[[0, 1], [10, np.nan]], [[0, 0], [10, 2]]])
    np.testing.assert_array_equal(drawn["learning rate"], [[[0, 0.1], [10, np.nan]]])
    assert [panels[title].get_yscale() for title in ("update over parameter", "cosine")] == ["log", "linear"]
    ax.figure.canvas.draw()


@pytest.mark.parametrize("per", ["all", "leaf"])
@pytest.mark.parametrize("params", [{}, {"w": np.ones(2)}])
@pytest.mark.parametrize("made", [0, 2])
def test_what_was_watched_may_be_nothing(ax, per, params, made):
    watched = gdx.read_watch(gdx.watch(gdx.sgd(0.1), per=per).init(params))
    curves = jax.tree.map(lambda x: np.zeros((made, *x.shape), x.dtype), watched)  # as a run on has them in other steps
    plot.watched(curves, ax)
    ax.figure.canvas.draw()


def test_the_new_pictures_make_their_own_axes():
    assert isinstance(plot.loss_line([0.0, 1.0], {"loss": [1.0, 2.0]}), Axes)
    assert isinstance(plot.loss_plane([0.0, 1.0], [0.0, 1.0], np.eye(2)), Axes)
    assert isinstance(plot.noise_scale({"sgd": [1.0, 2.0]}), Axes)


def test_a_plain_figure_has_room_for_the_legend():
    figure, ax = pyplot.subplots()
    plot.sweep(grid([0.1, 0.2, 0.4], [0.0, 0.5, 0.9]), np.arange(9.0), ax)
    figure.draw_without_rendering()
    legend = ax.get_legend().get_window_extent()
    assert legend.x0 >= 0 and legend.y0 >= 0 and legend.x1 <= figure.bbox.x1 and legend.y1 <= figure.bbox.y1


def test_ticks_stand_at_both_ends():
    rates = np.geomspace(1e-3, 1, 13).tolist()
    ax = plot.sweep(grid(rates, np.linspace(0, 0.9, 10).tolist()), np.arange(130.0))
    for axis, ends in ((ax.yaxis, ("0.001", "1")), (ax.xaxis, ("0", "0.9"))):
        names = [tick.get_text() for tick in axis.get_ticklabels()]
        assert (names[0], names[-1]) == ends


@pytest.mark.parametrize("offset", [0.0, -5.0])  # drawn by the logarithm, and not
def test_one_bad_point_leaves_the_others_their_colours(offset):
    score = np.linspace(1.0, 2.0, 25) + offset
    score[7] = 1e6
    ax = plot.sweep(grid([1.0, 2, 3, 4, 5], [0.1, 0.2, 0.3, 0.4, 0.5]), score)
    low, high = ax.images[0].get_clim()
    assert low == pytest.approx(1 + offset) and 1.7 + offset < high < 2.1 + offset


@pytest.mark.parametrize(
    ("settings", "score", "says"),
    [
        ({"a": [1, 2, 3]}, [0.1, 0.2, 0.3], True),
        ({"a": [1, 2, 3]}, [0.2, 0.1, 0.3], False),
        ({"a": [1, 2, 3], "b": [1, 2, 3]}, [9, 9, 9, 9, 9, 1, 9, 9, 9], True),
        ({"a": [1, 2, 3], "b": [1, 2, 3]}, [9, 9, 9, 9, 1, 9, 9, 9, 9], False),
        ({"a": [1, 2], "b": [1, 2, 3]}, [9, 1, 9, 9, 9, 9], False),  # of two there is no inside
        ({"a": [0, 1, 2]}, [0.1, 0.2, 0.3], False),  # nothing is wider than 0
        ({"a": [-2, -1, 0]}, [0.3, 0.2, 0.1], True),
        ({"a": [1, 2, 3]}, [0.5, 0.5, 0.5], False),
        ({"a": [1, 2, 3]}, [0.1, 0.1, 0.5], False),  # as good further in
        ({"a": [1, 2, 3]}, [0.5, np.nan, np.nan], True),
        ({"a": [1, 2, 3]}, [0.5, 0.5, np.nan], False),
        ({"a": [0, 1, 2], "b": [1, 2, 3]}, [9, 1, 9, 9, 9, 9, 9, 9, 9], False),
        ({"a": [0, 1, 2], "b": [1, 2, 3]}, [9, 9, 1, 9, 9, 9, 9, 9, 9], True),
        ({"a": [1, 2, 3], "b": [1, 2, 3]}, [5] * 9, False),
        ({"a": [1, 2, 3], "b": [1, 2, 3]}, [9, 9, 1, 9, 9, 1, 9, 9, 1], True),  # along b, whatever a is
    ],
)
def test_the_best_at_the_edge_says_so(settings, score, says):
    points = [dict(zip(settings, values)) for values in itertools.product(*settings.values())]
    texts = [text.get_text() for text in plot.sweep(points, score).get_legend().get_texts()]
    assert any("at the edge" in text for text in texts) == says


def test_a_scatter_says_that_its_best_is_at_the_edge():
    points = [{"a": a, "b": b} for a, b in ((1.0, 1.0), (2.0, 3.0), (3.0, 2.0), (2.5, 2.5))]
    for score, says in (([1, 2, 3, 4], True), ([4, 3, 2, 1], False), ([1, 1, 1, 1], False)):
        texts = [text.get_text() for text in plot.sweep(points, score).get_legend().get_texts()]
        assert any("at the edge" in text for text in texts) == says


GRID = gdx.grid(gdx.sgd, learning_rate=[0.1, 0.2, 0.4])
LABELS, SCORE = gdx.labels(GRID), [0.5, 0.3, 0.6]


@pytest.mark.parametrize(
    "labels",
    [
        GRID,
        np.array(SCORE),
        SCORE,
        "abc",
        [*LABELS[:2], {"momentum": 0.5}],
    ],
    ids=["a batch", "the score", "the score as a list", "text", "other names"],
)
def test_what_is_no_labels(labels):
    with pytest.raises(
        TypeError, match=r"plot\.sweep: labels is .*; expected a list, .* plot\.sweep\(gdx\.labels\(batch"
    ):
        plot.sweep(labels, SCORE if labels is GRID else LABELS)


RATES, MOMENTA = [0.01, 0.02, 0.1, 1e30], [0.0, 0.5, 0.1, 0.2]
HALVED = {  # points, of which one or two diverge
    "curve": [{"learning_rate": rate} for rate in RATES],
    "grid": [{"learning_rate": x, "momentum": y} for x, y in itertools.product(RATES, MOMENTA[:2])],
    "scatter": [{"learning_rate": x, "momentum": y} for x, y in zip(RATES, MOMENTA)],
}


@pytest.mark.parametrize("points", HALVED)
def test_what_halving_dropped_did_not_diverge(points, ax):
    grid, count = gdx.stack(gdx.sgd(**{"momentum": 0.0} | point) for point in HALVED[points]), len(HALVED[points])
    swept = gdx.sweep(lambda theta, batch: jnp.sum(theta**2), grid, jnp.ones(2), jnp.zeros(6), halve=1)
    plot.sweep(swept, swept.losses[:, 2], ax)
    lines = {str(line.get_label()).partition(":")[0]: line.get_xydata() for line in ax.get_lines()}
    lost = count // 4
    assert len(lines["diverged"]) == lost and len(lines["unfinished"]) == count // 2 - lost
    assert lines["best"][0, 0] == {"curve": 0.1, "grid": 1, "scatter": 0.1}[points]


def test_axes_in_the_place_of_the_labels():
    with pytest.raises(TypeError, match=r"plot\.sweep: labels is .*Axes.*; expected a list.*, score, ax\)"):
        plot.sweep(pyplot.subplots()[1], LABELS, SCORE)


@pytest.mark.parametrize("score", [np.ones(3) * 1j, list("abc"), {"loss": SCORE}, None, [True] * 3], ids=repr)
def test_a_score_that_is_no_number(score):
    with pytest.raises(TypeError, match=r"plot\.sweep: score is .*; expected real numbers, one for each label"):
        plot.sweep(LABELS, score)


@pytest.mark.parametrize(
    "limits", [(1, 2, 3), (1,), 5, "ab", (0, np.inf), (np.nan, 1), (1, 2j), {1: 2, 3: 4}, (2, 1), (1, 1)], ids=repr
)
@pytest.mark.parametrize("points", [LABELS, [{**point, "b": 1 / (1 + i)} for i, point in enumerate(LABELS)]])
def test_limits_that_are_none(limits, points):
    with pytest.raises(
        ValueError, match=rf"limits is {re.escape(repr(limits))}; expected \(low, high\) with low < high"
    ):
        plot.sweep(points, SCORE, limits=limits)


DRAWINGS = {
    "loss_curves": lambda ax: plot.loss_curves({"sgd": SCORE}, ax),
    "sweep": lambda ax: plot.sweep(LABELS, SCORE, ax),
    "paths": lambda ax: plot.paths(bowl, {"sgd": np.ones((3, 2))}, ax),
    "loss_line": lambda ax: plot.loss_line([0, 1], {"loss": [1.0, 2.0]}, ax),
    "noise_scale": lambda ax: plot.noise_scale({"sgd": [1.0, 2.0]}, ax),
    "sharpness": lambda ax: plot.sharpness({"sgd": [1.0, 2.0]}, 20, ax),
}


@pytest.mark.parametrize("name", DRAWINGS)
@pytest.mark.parametrize("make", [pyplot.figure, pyplot.subplots, lambda: pyplot.subplots(1, 2)[1], lambda: "left"])
def test_what_is_no_axes(name, make):
    said = rf"(?s)^plot\.{name}: ax is .*; expected the axes of one picture, such as figure\.subplots"
    with pytest.raises(TypeError, match=said):
        DRAWINGS[name](make())


def test_a_range_test_shows_the_loss_of_training(ax):
    found = gdx.range_test(
        lambda theta, batch: jnp.sum(theta**2), gdx.sgd(0.1), jnp.ones(2), jnp.zeros((9, 1)), points=9
    )
    assert plot.range_test(found, ax).get_ylabel() == "training loss"


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=re.escape("pip install 'gdx-jax[plot]'")):
        plot.loss_curves({"sgd": [1.0, 0.5]})


def test_what_train_returns_is_drawn():
    trained = gdx.train(lambda theta, batch: theta**2, gdx.sgd(0.1), jnp.ones(()), jnp.zeros(9))
    for history, label in ((trained, "training loss"), ({"sgd": trained}, "sgd")):
        (line,) = plot.loss_curves(history, pyplot.figure().subplots()).get_lines()
        np.testing.assert_allclose(line.get_ydata(), trained.losses)
        assert line.get_label() == label


@pytest.mark.parametrize("history", [3.0, {"sweep": np.ones((2, 3))}])
def test_losses_have_one_axis(history):
    with pytest.raises(ValueError, match=r"plot\.loss_curves: .* has shape \(.*\); expected one loss for each step"):
        plot.loss_curves(history)


WATCHED = gdx.Watched(
    np.array([0, 10, -1]),
    *np.array([[[1.0, 0.0], [np.inf, 2.0], [0.0, 0.0]]] * 6),
    {"learning_rate": np.array([0.1, 0.0, 0.0]), "b1": np.zeros(3)},
    ({"a": None}, {"b": None}),
)
FOUND = gdx.RangeTest(np.geomspace(1e-3, 1, 4), np.array([1.0, 0.5, 0.2, np.inf]), 1.1, 0.5, 0.1)
MOVED = {"hidden": np.array([[0.0, 0.1], [0.0, 0.2]]), "logits": np.zeros((2, 2))}
CHECK = gdx.width.CoordinateCheck(np.array([64, 256]), MOVED, MOVED, np.ones((2, 2)))
TWO, DENSITY_AND_EDGES = [0.0, 1.0], curved()
# every function with arguments that it takes, all of them
CALLS = {
    "loss_curves": {"history": {"sgd": SCORE}, "steps": {"sgd": [0, 1, 2]}},
    "sweep": {"labels": LABELS, "score": SCORE, "name": "loss", "limits": (0.1, 1.0)},
    "range_test": {"result": FOUND},
    "paths": {
        "function": bowl,
        "paths": {"sgd": np.ones((3, 2))},
        "limits": ((-1, 2), (-3, 4)),
        "minimum": (0, 0),
        "legend": True,
    },
    "loss_line": {"positions": TWO, "losses": {"loss": [1.0, 2.0]}, "marks": {"end": 1.0}, "name": "loss"},
    "loss_plane": {
        "x": TWO,
        "y": TWO,
        "losses": np.eye(2),
        "points": {"minimum": (0.0, 0.0)},
        "levels": [0.1, 0.5],
        "name": "loss",
    },
    "noise_scale": {"scales": {"sgd": SCORE}, "steps": {"sgd": [0, 1, 2]}, "batch_size": 64, "examples": 1437},
    "sharpness": {"history": {"sgd": SCORE}, "edge": 20.0, "steps": {"sgd": [0, 1, 2]}},
    "watched": {"watched": WATCHED},
    "coordinate_check": {"check": CHECK},
    "spectral_density": {"density": DENSITY_AND_EDGES[0], "edges": DENSITY_AND_EDGES[1], "width": 0.1},
}
KINDS = [
    "a",
    3,
    -1.0,
    None,
    True,
    object(),
    {"a": "b"},
    np.ones(3) * 1j,
    [[1.0], [1.0, 2.0]],
    np.ones((2, 2, 2)),
    {1: None},
]
# what is no mistake
LEGAL = {
    "a": ["name"],
    3: ["edge", "width", "batch_size", "examples"],
    -1.0: ["edge"],
    True: ["legend"],
    None: ["ax", "steps", "limits", "minimum", "marks", "points", "levels", "edges", "width", "batch_size", "examples"],
}
ARGUMENTS = [(name, argument) for name, given in CALLS.items() for argument in [*given, "ax"]]


def test_every_picture_is_in_the_table():
    assert CALLS.keys() == set(plot.__all__)
    for name, given in CALLS.items():
        parameters = inspect.signature(getattr(plot, name)).parameters
        assert parameters.keys() == {*given, "ax"}
        getattr(plot, name)(**given).figure.canvas.draw()


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_another_kind_of_argument_is_refused_before_anything_is_drawn(ax, name, argument):
    for wrong in KINDS:
        if any(type(wrong) is type(x) and wrong == x and argument in names for x, names in LEGAL.items()):
            continue
        for given in {argument: wrong}, {argument: wrong, "ax": ax}:
            if argument == "ax" and given["ax"] is ax:
                continue
            with pytest.raises((TypeError, ValueError), match=rf"(?s)^plot\.{name}: .*; expected .") as caught:
                getattr(plot, name)(**{**CALLS[name], **given})
            assert type(caught.value) in (TypeError, ValueError)
    assert not pyplot.get_fignums() and not ax.has_data() and not ax.get_xlabel()


SHAPES = {
    "loss_curves: sgd has shape (1, 3); expected one loss for each step": (
        "loss_curves",
        {"history": {"sgd": [SCORE]}},
    ),
    "loss_curves: steps of sgd has shape (2,); expected (3,), one for each loss": (
        "loss_curves",
        {"steps": {"sgd": [0, 1]}},
    ),
    "loss_curves: steps has no 'sgd'; expected the step of each loss": ("loss_curves", {"steps": {"adam": [0, 1, 2]}}),
    "loss_curves: sgd is array([0.+1.j": ("loss_curves", {"history": {"sgd": np.ones(3) * 1j}}),
    "noise_scale: sgd has shape (2, 2); expected one scale for each step": (
        "noise_scale",
        {"scales": {"sgd": np.ones((2, 2))}},
    ),
    "noise_scale: steps of sgd has shape (); expected (3,), one for each scale": ("noise_scale", {"steps": {"sgd": 1}}),
    "noise_scale: batch_size is 0; expected a number > 0": ("noise_scale", {"batch_size": 0}),
    "sharpness: sgd has shape (1, 3); expected one largest eigenvalue": ("sharpness", {"history": {"sgd": [SCORE]}}),
    "sharpness: steps of sgd has shape (4,); expected (3,), one for": ("sharpness", {"steps": {"sgd": [0, 1, 2, 3]}}),
    "loss_line: marks: a is 'b'; expected a number": ("loss_line", {"marks": {"a": "b"}}),
    "loss_line: loss has shape (3,); expected (2,), one for each position, or (lines, 2)": (
        "loss_line",
        {"losses": {"loss": SCORE}},
    ),
    "loss_line: positions has shape (1, 2); expected (points,)": ("loss_line", {"positions": [TWO]}),
    "loss_plane: points: a has shape (3,); expected (x, y)": ("loss_plane", {"points": {"a": (1, 2, 3)}}),
    "loss_plane: levels is [2.0, 1.0]; expected at least 2 ascending heights": ("loss_plane", {"levels": [2.0, 1.0]}),
    "loss_plane: levels is [2.0]; expected at least 2 ascending heights": ("loss_plane", {"levels": [2.0]}),
    "paths: sgd has shape (4, 3); expected (steps, 2), one point": ("paths", {"paths": {"sgd": np.ones((4, 3))}}),
    "paths: sgd has shape (4,); expected (steps, 2), one point": ("paths", {"paths": {"sgd": np.ones(4)}}),
    "paths: a is 'b'; expected real numbers, (steps, 2)": ("paths", {"paths": {"a": "b"}}),
    "paths: limits is ((2, -1), (-3, 4)); expected ((left, right)": ("paths", {"limits": ((2, -1), (-3, 4))}),
    "paths: minimum has shape (3,); expected a point (x, y)": ("paths", {"minimum": (0, 0, 0)}),
    "paths: function of 40000 points has shape (40000, 2); expected a scalar of each": (
        "paths",
        {"function": lambda point: point},
    ),
    "sweep: labels is [{'learning_rate': 'a'}": ("sweep", {"labels": [{"learning_rate": "a"}] * 3}),
    "watched: step has shape (); expected one for each measurement, as gdx.train collects them": (
        "watched",
        {"watched": jax.tree.map(lambda x: x[0], WATCHED)},
    ),
    "watched: cosine has shape (2, 2); expected (3, 2)": (
        "watched",
        {"watched": WATCHED._replace(cosine=np.ones((2, 2)))},
    ),
    "watched: watched is None; expected what gdx.train returned for an optimizer with gdx.watch around it": (
        "watched",
        {"watched": gdx.Trained(None, None, np.ones(3))},
    ),
    "spectral_density: width is 0.0; expected a number > 0": ("spectral_density", {"width": 0.0}),
    "spectral_density: the eigenvalues go from nan to nan; expected finite ones": (
        "spectral_density",
        {"density": jax.tree.map(lambda x: x * np.nan, DENSITY_AND_EDGES[0])},
    ),
}


@pytest.mark.parametrize("words", SHAPES)
def test_other_shapes_are_refused_before_anything_is_drawn(ax, words):
    name, given = SHAPES[words]
    with pytest.raises((TypeError, ValueError), match=rf"^plot\.{re.escape(words)}"):
        getattr(plot, name)(**{**CALLS[name], **given, "ax": ax})
    assert not pyplot.get_fignums() and not ax.has_data() and not ax.get_xlabel()


def test_a_slope_of_nearly_nothing_has_one_sign_on_every_machine():
    for change in (0.1, 0.0999999):
        moved = {"hidden": np.array([[0.0, 0.1], [0.0, change]])}
        check = gdx.width.CoordinateCheck(np.array([64, 256]), moved, moved, np.ones((2, 2)))
        assert labels(plot.coordinate_check(check))[-1] == "hidden: slope +0.00"
