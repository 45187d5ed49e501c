"""Pictures: what is drawn, read back from the figures."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure

from langppl.guides import RewardSchedule
from langppl.inference.calibration import Calibration
from langppl.plots import (
    plot_calibration,
    plot_graph,
    plot_log_weights,
    plot_posterior,
    plot_schedule,
    plot_training,
    save_figure,
)
from langppl.posterior import Posterior
from langppl.program.graph import ProgramGraph

INF = math.inf
PNG = b"\x89PNG\r\n\x1a\n"


def strings() -> Posterior:
    samples: list[dict[str, Any]] = [
        {"z": " $a$ and $b$", "n": torch.tensor(0.0)},
        {"z": "猫 [x]", "n": torch.tensor(1.0)},
    ]
    return Posterior(samples, [0.0, math.log(3.0)])


def bar_lengths(figure: Figure, index: int = 0) -> list[float]:
    return [float(bar.get_width()) for bar in figure.axes[index].patches]  # type: ignore[attr-defined]


def graph_of(kinds: dict[str, str], edges: list[tuple[str, str]]) -> ProgramGraph:
    graph = ProgramGraph()
    for name, kind in kinds.items():
        graph.add_node(
            name, kind=kind, family="LMString" if kind in ("latent", "observed") else kind
        )
    graph.add_edges_from(edges)
    return graph


def drawn_graph(ax: Any) -> tuple[dict[str, dict[str, tuple[float, float]]], set[tuple[str, str]]]:
    """Names and places by the legend's labels, and the edges, as the artists have them."""
    names = {tuple(map(float, text.xy)): text.get_text().split("\n")[0] for text in ax.texts}
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for collection in ax.collections:
        places = [(float(x), float(y)) for x, y in collection.get_offsets()]
        found[str(collection.get_label())] = {names[place]: place for place in places}
    ends = [[tuple(map(float, end)) for end in arrow._posA_posB] for arrow in ax.patches]
    return found, {(names[a], names[b]) for a, b in ends}


def test_a_graph(tmp_path: Path) -> None:
    kinds = {
        "$q$": "latent",
        "p": "latent",
        "why": "latent",
        "n": "deterministic",
        "answer": "observed",
        "short": "factor",
    }
    edges = [("$q$", "why"), ("why", "n"), ("n", "short"), ("$q$", "answer"), ("why", "answer")]
    figure = graph_of(kinds, edges).plot()
    (ax,) = figure.axes
    nodes, arrows = drawn_graph(ax)
    assert nodes == {
        "latent": {"$q$": (0.0, 0.5), "p": (0.0, -0.5), "why": (1.0, 0.0)},
        "observed": {"answer": (2.0, -0.5)},
        "computed or factor": {"n": (2.0, 0.5), "short": (3.0, 0.0)},
    }
    assert arrows == set(edges)
    assert [text.get_text() for text in ax.texts] == [
        f"{name}\n{'LMString' if kind in ('latent', 'observed') else kind}"
        for name, kind in kinds.items()
    ]
    latent, observed, others = ax.collections
    faces = [tuple(c.get_facecolor()[0]) for c in (latent, observed, others)]
    assert faces[0] == faces[2] != faces[1]
    # A circle is drawn in curves, a square has five points.
    corners = [len(c.get_paths()[0].vertices) for c in (latent, observed, others)]
    assert corners[0] == corners[1] > corners[2] == 5
    save_figure(figure, tmp_path / "g.png")
    assert (tmp_path / "g.png").read_bytes().startswith(PNG)


def test_an_edge_over_a_column_is_bent() -> None:
    graph = graph_of(dict.fromkeys("abc", "latent"), [("a", "b"), ("b", "c"), ("a", "c")])
    figure = plot_graph(graph)
    figure.canvas.draw()
    tops = {}
    for edge, arrow in zip(graph.edges, figure.axes[0].patches, strict=True):
        tops[edge] = float(np.asarray(arrow.get_path().vertices)[:, 1].max())
    # The node in the way has a radius of 0.15 or so in these units.
    assert tops["a", "c"] > 0.2 > tops["a", "b"]


def test_graphs_of_one_site_and_of_none(tmp_path: Path) -> None:
    figure = graph_of({"z": "latent"}, []).plot()
    assert drawn_graph(figure.axes[0]) == ({"latent": {"z": (0.0, 0.0)}}, set())
    save_figure(figure, tmp_path / "one.png")
    save_figure(ProgramGraph().plot(), tmp_path / "none.png")


def test_a_graph_on_given_axes_leaves_pyplot_alone() -> None:
    figure = Figure()
    left, _ = figure.subplots(1, 2)
    assert graph_of({"z": "observed"}, []).plot(left) is figure
    assert left.get_title() == "What flows into what"
    assert pyplot.get_fignums() == []


def test_bars_of_a_string(tmp_path: Path) -> None:
    figure = plot_posterior(strings(), "z")
    (ax,) = figure.axes
    assert bar_lengths(figure) == pytest.approx([0.75, 0.25])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["'猫 [x]'", "' $a$ and $b$'"]
    assert (ax.get_title(), ax.get_xlabel()) == ("Posterior of z", "posterior probability")
    save_figure(figure, tmp_path / "new" / "z.png")
    assert (tmp_path / "new" / "z.png").read_bytes().startswith(PNG)


def test_computed_and_returned_values_are_drawn_by_name() -> None:
    computed = [{"n": 1}, {"n": 2}]
    posterior = Posterior([{"z": "a"}] * 2, [0.0, math.log(3.0)], computed=computed, returns="xy")
    assert bar_lengths(posterior.plot("n")) == pytest.approx([0.75, 0.25])
    (ax,) = posterior.plot("_RETURN").axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["'y'", "'x'"]
    assert [ax.get_title() for ax in posterior.plot().axes] == ["Posterior of z"]


def test_all_sites_through_the_posterior() -> None:
    figure = strings().plot()
    assert [ax.get_title() for ax in figure.axes] == ["Posterior of z", "Posterior of n"]


def test_the_rest_is_one_bar() -> None:
    figure = plot_posterior(Posterior([{"z": str(i)} for i in range(16)], [0.0] * 16))
    assert bar_lengths(figure) == pytest.approx([1 / 16] * 10 + [6 / 16])
    assert figure.axes[0].get_yticklabels()[-1].get_text() == "6 more"


def test_a_number_gets_a_histogram_that_sums_to_its_mass() -> None:
    values = np.random.default_rng(0).normal(size=90)
    samples: list[dict[str, Any]] = [{"x": float(value)} for value in values] + [{}] * 10
    figure = plot_posterior(Posterior(samples, [0.0] * 100))
    (ax,) = figure.axes
    assert sum(bar.get_height() for bar in ax.patches) == pytest.approx(0.9)  # type: ignore[attr-defined]
    assert (ax.get_xlabel(), ax.get_title()) == ("x", "Posterior of x (absent: 10.0%)")


def test_log_weights_share_bins_and_say_what_is_impossible(tmp_path: Path) -> None:
    wide = Posterior([{"z": "a"}] * 4, [-4.0, -2.0, 0.0, -INF])
    close = Posterior([{"z": "a"}] * 2, [-1.0, -1.0])
    figure = plot_log_weights({"prior": wide, "guide": close})
    (ax,) = figure.axes
    legend = ax.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["prior (25.0% impossible)", "guide"]
    assert ax.get_xlabel() == "log weight (nats)"
    first, second = ax.containers[0], ax.containers[1]
    assert [bar.get_x() for bar in first] == [bar.get_x() for bar in second]
    assert sum(bar.get_height() for bar in first) == pytest.approx(0.75)
    assert sum(bar.get_height() for bar in second) == pytest.approx(1.0)
    save_figure(figure, tmp_path / "w.svg")
    assert "<svg" in (tmp_path / "w.svg").read_text()


@pytest.mark.filterwarnings("ignore:no sample explains")
def test_log_weights_that_are_all_impossible() -> None:
    figure = plot_log_weights({"prior": Posterior([{"z": "a"}], [-INF])})
    legend = figure.axes[0].get_legend()
    assert legend is not None
    assert legend.get_texts()[0].get_text() == "prior (100.0% impossible)"


def test_training(tmp_path: Path) -> None:
    history = {
        "step": [10, 20, 30],
        "loss": [9.0, 3.0, 0.0],
        "log_reward": [-9.0, -8.0, -7.0],
        "elbo": [-INF, -9.0, -8.0],
        "learning_rate": [1.0, 1.0, 1.0],
    }
    figure = plot_training(history)
    nats, loss = figure.axes
    assert (nats.get_xlabel(), nats.get_ylabel()) == ("step", "nats")
    assert (loss.get_ylabel(), loss.get_yscale()) == ("loss (nats²)", "log")
    assert [len(ax.lines) for ax in (nats, loss)] == [4, 2]
    np.testing.assert_array_equal(nats.lines[0].get_xdata(), [10, 20, 30])
    np.testing.assert_array_equal(nats.lines[2].get_ydata(), [math.nan, -9.0, -8.0])
    save_figure(figure, tmp_path / "t.png")
    assert (tmp_path / "t.png").stat().st_size > 1_000


def test_the_running_mean() -> None:
    series = [float(i % 2) for i in range(80)]  # a window of 80 // 40 = 2 steps to each side
    figure = plot_training({"loss": series})
    raw, mean = figure.axes[0].lines
    np.testing.assert_array_equal(raw.get_ydata(), series)
    middle = np.asarray(mean.get_ydata(), dtype=float)[10:12]
    np.testing.assert_allclose(middle, [0.4, 0.6])  # 0 1 0 1 0 and 1 0 1 0 1


def test_training_without_a_finite_value() -> None:
    figure = plot_training({"elbo": [-INF, -INF]})
    legend = figure.axes[0].get_legend()
    assert legend is not None
    assert legend.get_texts()[0].get_text().endswith("no finite value")


def test_validation_is_drawn_where_there_was_one(tmp_path: Path) -> None:
    history = {
        "step": [10, 20, 30, 40],
        "loss": [9.0, 3.0, 1.0, 1.0],
        "elbo": [-9.0, -8.0, -8.0, -7.0],
        "val_elbo": [math.nan, -8.5, math.nan, -7.5],
        "val_variance": [math.nan, 4.0, math.nan, 2.0],
    }
    figure = plot_training(history)
    nats, squares = figure.axes
    assert (nats.get_ylabel(), squares.get_ylabel()) == ("nats", "loss, variance (nats²)")
    assert squares.get_yscale() == "log"
    for ax, values in ((nats, [-8.5, -7.5]), (squares, [4.0, 2.0])):
        assert len(ax.lines) == 3
        points = ax.lines[-1]
        np.testing.assert_array_equal(points.get_xdata(), [20.0, 40.0])
        np.testing.assert_array_equal(points.get_ydata(), values)
        assert (points.get_marker(), points.get_linestyle()) == ("o", "-")
    legend = squares.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [
        "mean log weight (ELBO)",
        "validation ELBO",
        "loss",
        "validation variance",
    ]
    save_figure(figure, tmp_path / "v.png")
    assert (tmp_path / "v.png").read_bytes().startswith(PNG)


def test_validation_alone() -> None:
    (ax,) = plot_training({"val_elbo": [-2.0, -INF, math.nan, -1.0]}).axes
    (points,) = ax.lines
    np.testing.assert_array_equal(points.get_xdata(), [0.0, 1.0, 3.0])
    np.testing.assert_array_equal(points.get_ydata(), [-2.0, math.nan, -1.0])  # a gap
    (ax,) = plot_training({"val_variance": [math.nan, 0.0]}).axes
    assert (ax.get_ylabel(), ax.get_yscale()) == ("variance (nats²)", "linear")
    (ax,) = plot_training({"val_variance": [math.nan, 2.0]}).axes
    assert ax.get_yscale() == "log"
    (ax,) = plot_training({"val_elbo": [math.nan]}).axes
    legend = ax.get_legend()
    assert legend is not None
    assert legend.get_texts()[0].get_text() == "validation ELBO: no finite value"


def test_a_negative_loss_stays_on_the_axis_beside_a_variance() -> None:
    (ax,) = plot_training({"loss": [-2.0, -3.0], "val_variance": [math.nan, 1.0]}).axes
    assert ax.get_yscale() == "linear"


def test_a_schedule(tmp_path: Path) -> None:
    figure = plot_schedule(RewardSchedule(0.5, 0.5), 4)
    (line,) = figure.axes[0].lines
    assert list(line.get_ydata()) == [0.5, 0.75, 1.0, 1.0]
    save_figure(figure, tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("start", "end", "top"), [(0.2, 1.0, 1.05), (1.0, 4.0, 4.2), (2.0, 0.5, 2.1)]
)
def test_all_powers_of_a_schedule_are_in_its_picture(start: float, end: float, top: float) -> None:
    schedule = RewardSchedule(start, 0.5, end)
    low, high = plot_schedule(schedule, 4).axes[0].get_ylim()
    assert (low, high) == pytest.approx((0.0, top))
    assert high >= max(schedule.powers(4))


def test_drawing_on_given_axes(tmp_path: Path) -> None:
    figure = Figure(figsize=(10, 4))
    left, right = figure.subplots(1, 2)
    assert plot_training({"loss": [1.0]}, ax=left) is figure
    assert plot_log_weights({"prior": strings()}, ax=right) is figure
    assert (left.get_title(), right.get_title()) == (
        "Training of the guide",
        "Log weights of the samples",
    )
    save_figure(figure, tmp_path / "both.png")


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="at least one posterior"):
        plot_log_weights({})
    with pytest.raises(ValueError, match=r"has none of .* it has: \['a'\]"):
        plot_training({"a": [1.0]})
    with pytest.raises(ValueError, match=r"differ in length: \{'loss': 2, 'step': 1\}"):
        plot_training({"step": [1], "loss": [1.0, 2.0]})
    with pytest.raises(KeyError, match="has met a latent site 'y'"):
        plot_posterior(strings(), "y")
    with pytest.raises(ValueError, match="no latent sites"):
        plot_posterior(Posterior([{}], [0.0]))


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'langppl\[plots\]'"):
        plot_posterior(strings())
    with pytest.raises(ImportError, match=r"pip install 'langppl\[plots\]'"):
        ProgramGraph().plot()


def test_names_are_no_formulae(tmp_path: Path) -> None:
    name = "$\\frac{$"
    save_figure(plot_log_weights({name: strings()}), tmp_path / "weights.png")
    calibration = Calibration(name, "importance", 80, 3, 1, {"s": (0, 1, 2, 3) * 20}, None)
    save_figure(plot_calibration(calibration), tmp_path / "ranks.png")
