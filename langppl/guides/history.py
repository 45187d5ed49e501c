"""What a training reported, step by step."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from langppl.tables import pandas_for

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class History(dict[str, list[float]]):
    """What training reported, one list for each figure, all of one length.

    A figure has NaN in the rows where it was not reported. Since it is a dict of lists,
    `json.dumps` writes it, and what `json.loads` reads makes an equal history.

    Args:
        figures: figure → its values; they are copied.

    Raises:
        ValueError: if the lists differ in length.

    Example:
        >>> history = History()
        >>> history.add({"step": 0, "loss": 3.5})
        >>> history.add({"step": 1, "loss": 2.5, "val_elbo": -7.0})
        >>> history["val_elbo"]
        [nan, -7.0]
    """

    def __init__(self, figures: Mapping[str, Iterable[float]] | None = None) -> None:
        super().__init__({k: [_number(v) for v in values] for k, values in (figures or {}).items()})
        lengths = {k: len(values) for k, values in self.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the figures of a history differ in length: {lengths}")

    @property
    def rows(self) -> int:
        """How many rows were added; `len` is the number of figures, as for any dict."""
        return len(next(iter(self.values()), ()))

    def __repr__(self) -> str:
        """Its size and its figures' names: the lists of a long training would fill the screen."""
        return f"History({self.rows} rows: {', '.join(self)})" if self else "History()"

    def add(self, figures: Mapping[str, float]) -> None:
        """Appends one row.

        Args:
            figures: figure → value. One that is new has NaN in the earlier rows, and one that is
                missing has NaN in this row.
        """
        # All are converted before any is stored, so that a bad one leaves no row half written.
        row = {k: _number(v) for k, v in figures.items()}
        rows = self.rows
        for k in row:
            self.setdefault(k, [math.nan] * rows)
        for k, values in self.items():
            values.append(row.get(k, math.nan))

    def amend(self, figures: Mapping[str, float]) -> None:
        """Puts further figures into the last row.

        Args:
            figures: figure → value; see `add`.

        Raises:
            ValueError: if there is no row.
        """
        if not self.rows:
            raise ValueError("there is no row to amend; add one first")
        row = {k: _number(v) for k, v in figures.items()}
        rows = self.rows
        for k, value in row.items():
            self.setdefault(k, [math.nan] * rows)[-1] = value

    def latest(self, figure: str) -> float:
        """The last value of a figure that is not NaN; NaN if it has none, or is not known yet."""
        known = (v for v in reversed(self.get(figure, ())) if not math.isnan(v))
        return next(known, math.nan)

    def to_pandas(self) -> pandas.DataFrame:
        """The history as a table, one row each.

        Returns:
            A column for each figure; `step`, if it is there, is the index instead.

        Raises:
            ImportError: if pandas is not installed.
        """
        pd = pandas_for("History.to_pandas")
        frame: pandas.DataFrame = pd.DataFrame(dict(self))
        return frame.set_index("step") if "step" in self else frame

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draws the training curves: see `langppl.plots.plot_training`."""
        plots = importlib.import_module("langppl.plots")
        figure: Figure = plots.plot_training(self, ax)
        return figure


def _number(value: float) -> float:
    """A plain float, NaN always the same one: lists compare equal where their NaNs are one object.

    Without it a history with gaps would differ from itself once it is written as JSON and read.
    """
    value = float(value)
    return math.nan if math.isnan(value) else value
