"""Pictures of programs, of posteriors and of training.

Every function returns a matplotlib `Figure` that pyplot does not know: no window is opened, no
global state is touched, and the pictures come out the same on a machine without a display.
matplotlib is imported when the first one is drawn.

Example:
    >>> from langppl import LMString, infer, sample
    >>> from langppl.testing import tiny_lm
    >>> lm = tiny_lm()
    >>> def story():
    ...     middle = sample("middle", LMString(lm, "a", max_tokens=3))
    ...     sample("ending", LMString(lm, f"a{middle}"), obs=" b")
    >>> figure = plot_log_weights({g: infer(story, guide=g) for g in ("prior", "prompted")})
    >>> save_figure(figure, "weights.png")
"""

from __future__ import annotations

import importlib
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx as nx
import numpy as np

from langppl.diagnostics import Array
from langppl.posterior import ABSENT, Posterior
from langppl.tables import shown
from langppl.values import is_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from langppl.guides.schedules import RewardSchedule
    from langppl.inference.calibration import Calibration
    from langppl.program.graph import ProgramGraph

__all__ = [
    "plot_calibration",
    "plot_graph",
    "plot_log_weights",
    "plot_posterior",
    "plot_schedule",
    "plot_training",
    "save_figure",
]

_TOP_VALUES = 10
_LONGEST_LABEL = 48
_TRAINING_SERIES = {"log_reward": "mean log reward", "elbo": "mean log weight (ELBO)"}
_NODES = {
    "latent": (("latent",), "o", "white"),
    "observed": (("observed",), "o", "lightgray"),
    "computed or factor": (("deterministic", "factor"), "s", "white"),
}
_NODE_SIZE = 500.0
_SQUARED_SERIES = {"loss": "loss", "val_variance": "variance"}


def plot_graph(graph: ProgramGraph, ax: Axes | None = None) -> Figure:
    """Draws what flows into what, from left to right.

    A site stands to the right of all that flow into it, those of one column in program order.
    Latents are open circles, observed sites filled ones, computed values and factors squares; below
    each stand its name and its family.

    Args:
        graph: what to draw.
        ax: where to draw; by default a new figure.

    Returns:
        The figure.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    columns = [list(column) for column in nx.topological_generations(graph)]
    tallest = max(map(len, columns), default=1)
    figure, ax = _target(ax, 1.8 * max(len(columns), 2) + 0.6, 1.2 * tallest + 1.2)
    order = {name: k for k, name in enumerate(graph)}
    places: dict[Any, tuple[float, float]] = {}
    for x, column in enumerate(columns):
        for k, name in enumerate(sorted(column, key=order.__getitem__)):
            places[name] = (float(x), (len(column) - 1) / 2 - k)
    for label, (kinds, shape, color) in _NODES.items():
        names = [name for name, data in graph.nodes(data=True) if data["kind"] in kinds]
        if names:
            nx.draw_networkx_nodes(
                graph,
                places,
                nodelist=names,
                ax=ax,
                node_shape=shape,
                node_color=color,
                edgecolors="black",
                node_size=_NODE_SIZE,
                label=label,
            )
    for a, b in graph.edges:
        # A straight edge over a column would run through what stands there. All rise alike: the
        # bend is relative to the length.
        length = places[b][0] - places[a][0]
        bend = 0.0 if length == 1.0 else -0.6 / length
        nx.draw_networkx_edges(
            graph,
            places,
            edgelist=[(a, b)],
            ax=ax,
            node_size=_NODE_SIZE,
            connectionstyle=f"arc3,rad={bend}",
        )
    for name, data in graph.nodes(data=True):
        ax.annotate(
            f"{name}\n{data['family']}",
            places[name],
            (0.0, -14.0),
            fontsize=9,
            textcoords="offset points",
            ha="center",
            va="top",
            parse_math=False,
        )
    # Room for the outermost nodes and the text below them, also where there is one node alone.
    ax.set_xlim(-0.6, max(len(columns) - 1, 0) + 0.6)
    ax.set_ylim(-(tallest - 1) / 2 - 0.8, (tallest - 1) / 2 + 0.6)
    ax.set_title("What flows into what")
    ax.set_axis_off()
    if columns:
        ax.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, 0.0),
            ncols=len(_NODES),
            markerscale=0.4,
            frameon=False,
        )
    return figure


def plot_posterior(posterior: Posterior, site: str | None = None) -> Figure:
    """Draws the posterior of one latent, or of each.

    Strings get a bar for each of the ten likeliest values, and one for the rest; a number with
    more than ten values gets a weighted histogram.

    Args:
        posterior: what to draw.
        site: the name of a latent or of a computed value, or `"_RETURN"`; by default all latents,
            below one another.

    Returns:
        The figure.

    Raises:
        ImportError: if matplotlib is not installed.
        UnknownSiteError: if there is no value of that name.
        TypeError: for values that are not hashable.
        ValueError: if no sample has weight, or the program has no latents.
    """
    sites = posterior.sites if site is None else (site,)
    if not sites:
        raise ValueError("the posterior has no latent sites to draw")
    tables = [posterior.probabilities(name) for name in sites]
    heights = [0.9 + 0.32 * min(len(table), _TOP_VALUES + 1) for table in tables]
    figure = _figure(8.0, max(sum(heights) + 0.4, 2.6))
    grid = figure.subplots(len(sites), 1, squeeze=False, height_ratios=heights)
    for ax, name, table in zip(grid[:, 0], sites, tables, strict=True):
        title = f"Posterior of {name}"
        numbers = {float(v): p for v, p in table.items() if is_number(v) and math.isfinite(v)}
        others = {v: p for v, p in table.items() if v not in numbers}
        if len(numbers) > _TOP_VALUES and others.keys() <= {ABSENT}:
            ax.hist(list(numbers), bins=30, weights=list(numbers.values()), color="tab:blue")
            ax.set_xlabel(name, parse_math=False)
            ax.set_ylabel("posterior probability")
            if others:
                title += f" (absent: {others[ABSENT]:.1%})"
        else:
            _bars(ax, table)
        ax.set_title(title, parse_math=False)
    return figure


def plot_log_weights(posteriors: Mapping[str, Posterior], ax: Axes | None = None) -> Figure:
    """Draws the log weights of several guides as histograms over the same bins.

    A good guide has a narrow one: with the exact posterior all weights equal the evidence.
    Impossible samples have no place on the axis; the legend gives their share.

    Args:
        posteriors: name → posterior, in the order of the legend.
        ax: where to draw; by default a new figure.

    Returns:
        The figure.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if there is no posterior, or one is of chains or of independent parts, whose
            samples are equally weighted.
    """
    if not posteriors:
        raise ValueError("plot_log_weights needs at least one posterior")
    for name, posterior in posteriors.items():
        if posterior.chains is not None or posterior.parts:
            raise ValueError(
                f"the samples of {name!r} (method {posterior.method}) are equally weighted, so "
                "there are no log weights to draw; leave it out"
            )
    figure, ax = _target(ax, 8.0, 4.5)
    finite = {
        name: posterior.log_weights[np.isfinite(posterior.log_weights)]
        for name, posterior in posteriors.items()
    }
    together = np.concatenate(list(finite.values()))
    edges = np.histogram_bin_edges(together if together.size else np.zeros(1), bins=40)
    bins = [float(edge) for edge in edges]
    for i, (name, posterior) in enumerate(posteriors.items()):
        label = name
        if posterior.impossible_share > 0.0:
            label += f" ({posterior.impossible_share:.1%} impossible)"
        # Counts are divided by all n draws, so that bars and impossible share add up to one.
        share = np.full(finite[name].size, 1.0 / posterior.num_samples)
        color = f"C{i}"
        ax.hist(finite[name], bins=bins, weights=share, color=color, alpha=0.35, label=label)
        ax.hist(finite[name], bins=bins, weights=share, color=color, histtype="step", lw=1.5)
    ax.set_title("Log weights of the samples")
    ax.set_xlabel("log weight (nats)")
    ax.set_ylabel("share of the samples")
    for text in ax.legend().get_texts():
        text.set_parse_math(False)
    return figure


def plot_training(history: Mapping[str, Sequence[float]], ax: Axes | None = None) -> Figure:
    """Draws how training went: log reward and ELBO in nats, the loss on an axis of its own.

    Each curve is drawn as it is, faintly, and as its running mean. Values that are not finite (an
    ELBO of −inf when a draw was impossible) leave gaps. What validation found is drawn as points
    joined by a line, at the steps where there was one: its ELBO in nats, and the variance of its
    log weights on the axis of the loss, which is in nats² too.

    Args:
        history: series of one length: any of `loss`, `log_reward`, `elbo`, `val_elbo` and
            `val_variance`, the last two NaN at steps without validation, with `step` for the
            horizontal axis where it is not 0, 1, 2, … Other series are ignored.
        ax: where to draw; by default a new figure.

    Returns:
        The figure.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if there is nothing to draw, or the lengths differ.
    """
    names = ("loss", *_TRAINING_SERIES, "val_elbo", "val_variance")
    series = {name: history[name] for name in names if name in history}
    if not series:
        quoted = ", ".join(f'"{name}"' for name in names)
        raise ValueError(f"history has none of {quoted}; it has: {sorted(history)}")
    lengths = {name: len(history[name]) for name in (*series, "step") if name in history}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the series of history differ in length: {lengths}")
    steps = np.asarray(history.get("step", range(next(iter(lengths.values())))), dtype=np.float64)
    figure, ax = _target(ax, 8.0, 4.5)
    handles: list[Any] = []
    top = ax
    for i, (name, label) in enumerate(_TRAINING_SERIES.items()):
        if name in series:
            handles.append(_curve(ax, steps, series[name], f"C{i}", label))
    if "val_elbo" in series:
        handles.append(_points(ax, steps, series["val_elbo"], "C2", "validation ELBO"))
    ax.set_ylabel("nats")
    squared = [name for name in _SQUARED_SERIES if name in series]
    if squared:
        top = ax.twinx() if handles else ax
        if "loss" in series:
            handles.append(_curve(top, steps, series["loss"], "tab:gray", "loss"))
        if "val_variance" in series:
            label = "validation variance"
            handles.append(_points(top, steps, series["val_variance"], "C3", label))
        top.set_ylabel(f"{', '.join(_SQUARED_SERIES[name] for name in squared)} (nats²)")
        # The loss decides where it is there: a negative one would vanish from a logarithmic axis.
        if any(math.isfinite(x) and x > 0.0 for x in series[squared[0]]):
            top.set_yscale("log", nonpositive="mask")
    ax.set_title("Training of the guide")
    ax.set_xlabel("step")
    # On the uppermost axes, or the loss would be drawn across the legend.
    top.legend(handles=handles, loc="best")
    return figure


def plot_schedule(schedule: RewardSchedule, steps: int, ax: Axes | None = None) -> Figure:
    """Draws how much of the reward counts at each step of a training.

    Args:
        schedule: what to draw.
        steps: how many steps the training has, at least 1.
        ax: where to draw; by default a new figure.

    Returns:
        The figure.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if there is no step.
    """
    powers = schedule.powers(steps)
    figure, ax = _target(ax, 8.0, 3.0)
    ax.plot(range(steps), powers, color="tab:blue", lw=1.8, marker=".")
    ax.set_ylim(0.0, 1.05 * max(1.0, *powers))
    ax.set_title("Reward schedule")
    ax.set_xlabel("step")
    ax.set_ylabel("power of the reward")
    return figure


def plot_calibration(calibration: Calibration, level: float = 0.01) -> Figure:
    """Draws the rank histogram of each summary, with the band in which a right method's lie.

    Under a calibrated method the count of each bin is binomial. The band holds it, in all bins of
    all pictures together, with a probability of at least 1 − `level` (Bonferroni). Ranks at both
    ends are of draws that are too narrow, in the middle of such that are too wide.

    Args:
        calibration: what to draw.
        level: probability with which a bar of a calibrated method leaves the band.

    Returns:
        The figure.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: unless the level is between 0 and 1.
    """
    from scipy.stats import binom

    if not 0.0 < level < 1.0:
        raise ValueError(f"level must be between 0 and 1, got {level!r}")
    tests = calibration.tests
    columns = min(len(tests), 3)
    rows = math.ceil(len(tests) / columns)
    figure = _figure(4.0 * columns, 2.8 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    number = sum(len(t.counts) for t in tests)
    for ax, test in zip(grid.flat, tests, strict=False):
        n, places = calibration.simulations, np.arange(len(test.counts))
        shares = np.array(test.expected) / n
        tail = level / 2 / number
        low, high = binom.ppf(tail, n, shares), binom.ppf(1.0 - tail, n, shares)
        # One step for each bin, edge to edge.
        edges = np.repeat(np.append(places, len(places)) - 0.5, 2)[1:-1]
        ax.fill_between(
            edges, np.repeat(low, 2), np.repeat(high, 2), color="lightgray", label="expected"
        )
        ax.bar(places, test.counts, width=0.8, color="tab:blue", alpha=0.8)
        ax.step(edges, np.repeat(test.expected, 2), color="black", lw=0.8)
        ax.set_title(f"{test.name} (p = {test.p_value:.2g})", fontsize=9, parse_math=False)
        ax.set_xlabel(f"rank among {calibration.draws} draws, in bins", fontsize=8)
        ax.set_xticks([])
        ax.set_ylabel("simulations", fontsize=8)
    for ax in grid.flat[len(tests) :]:
        ax.set_visible(False)
    title = f"Calibration of {calibration.method}, guide {calibration.guide}"
    figure.suptitle(title, parse_math=False)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes a figure at 150 dpi; the ending of the name decides the format.

    Args:
        figure: what to write.
        path: a file such as `weights.png`; missing folders are made.
    """
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        # Strings come in any script; what matplotlib's font lacks is drawn as a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure.savefig(path, dpi=150)


def _bars(ax: Axes, table: Mapping[Any, float]) -> None:
    """Horizontal bars of a distribution's likeliest values, the likeliest on top."""
    top = list(table.items())[:_TOP_VALUES]
    labels = [_label(value) for value, _ in top]
    heights = [probability for _, probability in top]
    others = list(table.values())[_TOP_VALUES:]
    if others:
        labels.append(f"{len(others)} more")
        heights.append(math.fsum(others))
    colors = ["tab:blue"] * len(top) + ["lightgray"] * bool(others)
    places = range(len(labels))
    ax.barh(places, heights, color=colors)
    ax.set_yticks(places, labels, parse_math=False)
    ax.invert_yaxis()
    ax.set_xlabel("posterior probability")


def _curve(ax: Axes, steps: Array, values: Sequence[float], color: str, label: str) -> Any:
    """One series and its running mean; the handle for the legend."""
    array = np.asarray(values, dtype=np.float64)
    array = np.where(np.isfinite(array), array, np.nan)
    ax.plot(steps, array, color=color, alpha=0.3, lw=0.8)
    if not np.isfinite(array).any():
        label += ": no finite value"
    (line,) = ax.plot(steps, _running_mean(array), color=color, lw=1.8, label=label)
    return line


def _points(ax: Axes, steps: Array, values: Sequence[float], color: str, label: str) -> Any:
    """A series that is NaN at most steps, as points joined by a line; the handle for the legend."""
    array = np.asarray(values, dtype=np.float64)
    known = ~np.isnan(array)
    steps, array = steps[known], array[known]
    array = np.where(np.isfinite(array), array, np.nan)
    if not np.isfinite(array).any():
        label += ": no finite value"
    (line,) = ax.plot(steps, array, color=color, lw=1.2, marker="o", markersize=4.0, label=label)
    return line


def _running_mean(array: Array) -> Array:
    """The mean of the finite values in a centred window of a twentieth of the series."""
    half = len(array) // 40
    means = np.full(len(array), np.nan)
    for i in range(len(array)):
        window = array[max(i - half, 0) : i + half + 1]
        window = window[np.isfinite(window)]
        if window.size:
            means[i] = window.mean()
    return means


def _label(value: Any) -> str:
    """A value on an axis."""
    return shown(value, _LONGEST_LABEL)


def _figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that belongs to no window."""
    try:
        module = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'langppl[plots]'") from error
    figure: Figure = module.Figure(figsize=(width, height), layout="constrained")
    return figure


def _target(ax: Axes | None, width: float, height: float) -> tuple[Figure, Axes]:
    """The axes to draw on, and the figure that they belong to."""
    if ax is None:
        figure = _figure(width, height)
        return figure, figure.subplots()
    owner: Figure | None = ax.get_figure(root=True)
    if owner is None:
        raise ValueError("the given axes belong to no figure")
    return owner, ax
