"""The dependency graph of a program."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import networkx as nx
from rich.text import Text

from langppl.tables import as_html, escaped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    _Graph = nx.DiGraph[str]
else:
    _Graph = nx.DiGraph

_SHAPES = {"latent": "ellipse", "observed": "ellipse", "factor": "box", "deterministic": "box"}


class ProgramGraph(_Graph):
    """Sites as nodes, "flows into" as edges; a networkx `DiGraph`.

    Node attributes: `kind` (`"latent"`, `"observed"`, `"factor"`, `"deterministic"`) and `family`
    (the distribution's name, else `"factor"`, `"call"` or `"deterministic"`).
    """

    def __str__(self) -> str:
        """One line for each site: its kind, its family, and what flows into it."""
        shown = {n: escaped(str(n)) for n in self.nodes}
        width = max(map(len, shown.values()), default=0)
        lines = []
        for name, data in self.nodes(data=True):
            parents = ", ".join(shown[p] for p in self.predecessors(name))
            line = f"{shown[name]:<{width}}  {data['kind']:<13}  {data['family']}"
            lines.append(line + (f"  <- {parents}" if parents else ""))
        return "\n".join(lines)

    def __repr__(self) -> str:
        """The same as `str`."""
        return str(self)

    def _repr_html_(self) -> str:
        """The same in a notebook."""
        return as_html(
            Text(str(self), no_wrap=True), width=max(map(len, str(self).split("\n"))) + 1
        )

    def show(self) -> None:
        """Prints the graph as text."""
        print(self)

    def to_dot(self) -> str:
        """The graph in Graphviz's language; observed sites are filled."""
        lines = ["digraph program {"]
        for name, data in self.nodes(data=True):
            style = ' style="filled"' if data["kind"] == "observed" else ""
            label = f"{_esc(name)}\\n{_esc(data['family'])}"
            lines.append(
                f'  "{_esc(name)}" [label="{label}" shape="{_SHAPES[data["kind"]]}"{style}];'
            )
        lines += [f'  "{_esc(a)}" -> "{_esc(b)}";' for a, b in self.edges]
        return "\n".join([*lines, "}"])

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draws the graph from left to right: see `langppl.plots.plot_graph`."""
        plots = importlib.import_module("langppl.plots")
        figure: Figure = plots.plot_graph(self, ax)
        return figure

    def below(self, site: str, kinds: Iterable[str]) -> list[str]:
        """Sites of some kinds that depend on a site, also through others, in program order."""
        wanted, reached = set(kinds), nx.descendants(self, site)
        return [n for n in self.nodes if n in reached and self.nodes[n]["kind"] in wanted]

    def latents_above(self, site: str) -> set[str]:
        """The latents that a site depends on, also through others."""
        return {n for n in nx.ancestors(self, site) if self.nodes[n]["kind"] == "latent"}

    def independent(self) -> list[set[str]]:
        """Latents in groups that are independent of one another given the observations.

        An observed value is fixed, so nothing flows out of it, and it joins all that flow into
        it: the groups are the connected parts of the graph. What is computed couples latents
        only if it is made of some and something random depends on it. In program order.
        """
        computed = [n for n, d in self.nodes(data=True) if d["kind"] == "deterministic"]
        idle = [
            n
            for n in computed
            if not self.latents_above(n) or not self.below(n, ("latent", "observed", "factor"))
        ]
        coupled = self.subgraph(set(self.nodes) - set(idle))
        groups = [
            {n for n in part if self.nodes[n]["kind"] == "latent"}
            for part in nx.weakly_connected_components(coupled)
        ]
        order = {n: k for k, n in enumerate(self.nodes)}
        return sorted((g for g in groups if g), key=lambda g: min(order[n] for n in g))


def _esc(text: Any) -> str:
    return str(text).replace("\\", "\\\\").replace('"', '\\"')
