"""What training reported."""

from __future__ import annotations

import copy
import json
import math
import pickle
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from langppl.guides import History

NAN = math.nan


def three_steps() -> History:
    history = History()
    history.add({"step": 0, "loss": 4.0})
    history.add({"step": 1, "loss": 2.0, "val_elbo": -7.5})
    history.add({"step": 2, "elbo": -math.inf})
    return history


def test_rows_that_lack_a_figure_have_nan() -> None:
    history = three_steps()
    assert list(history) == ["step", "loss", "val_elbo", "elbo"]
    np.testing.assert_array_equal(history["step"], [0.0, 1.0, 2.0])
    np.testing.assert_array_equal(history["loss"], [4.0, 2.0, NAN])
    np.testing.assert_array_equal(history["val_elbo"], [NAN, -7.5, NAN])
    np.testing.assert_array_equal(history["elbo"], [NAN, NAN, -math.inf])
    assert (len(history), history.rows) == (4, 3)


def test_an_empty_one() -> None:
    history = History()
    assert (history, len(history), history.rows) == ({}, 0, 0)
    history.add({"loss": 1.0})
    history.add({})
    np.testing.assert_array_equal(history["loss"], [1.0, NAN])


def test_figures_become_plain_floats() -> None:
    history = History({"a": np.array([1, 2])})
    assert repr(history) == "History(2 rows: a)" and repr(History()) == "History()"
    history.add({"a": np.float32(0.5), "b": torch.tensor(3.0)})  # type: ignore[dict-item]
    assert history["a"] == [1.0, 2.0, 0.5] and history["b"][-1] == 3.0
    assert {type(v) for values in history.values() for v in values} == {float}


def test_a_bad_figure_leaves_no_row_half_written() -> None:
    history = three_steps()
    before = copy.deepcopy(history)
    with pytest.raises(ValueError, match="could not convert"):
        history.add({"step": 3, "new": 1.0, "loss": "low"})  # type: ignore[dict-item]
    assert history == before


def test_the_latest() -> None:
    history = three_steps()
    assert history.latest("step") == 2.0
    assert history.latest("loss") == 2.0
    assert history.latest("val_elbo") == -7.5
    assert history.latest("elbo") == -math.inf
    assert math.isnan(history.latest("never reported"))
    assert math.isnan(History({"loss": [NAN, NAN]}).latest("loss"))


def test_the_values_given_are_copied_and_of_one_length() -> None:
    values = [1.0]
    history = History({"loss": values})
    history.add({"loss": 2.0})
    assert (values, history["loss"]) == ([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match=r"differ in length: \{'step': 2, 'loss': 1\}"):
        History({"step": [0, 1], "loss": [1.0]})


def test_json_and_copies_make_equal_histories() -> None:
    history = three_steps()
    again = History(json.loads(json.dumps(history)))
    assert again == history  # in spite of its NaNs
    assert list(again) == list(history)
    again.add({"step": 3, "loss": 1.0})
    assert again != history and again.rows == 4
    for same in (copy.copy(history), copy.deepcopy(history), pickle.loads(pickle.dumps(history))):
        assert isinstance(same, History) and History(same) == history


def test_to_pandas() -> None:
    frame = three_steps().to_pandas()
    assert (frame.index.name, list(frame.index)) == ("step", [0.0, 1.0, 2.0])
    assert list(frame.columns) == ["loss", "val_elbo", "elbo"]
    assert frame["val_elbo"][1] == -7.5 and frame["loss"].isna().tolist() == [False, False, True]
    plain = History({"loss": [3.0, 1.0]}).to_pandas()
    assert (list(plain.columns), list(plain.index)) == (["loss"], [0, 1])


def test_to_pandas_without_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"History.to_pandas .* pip install 'langppl\[plots\]'"):
        three_steps().to_pandas()


def test_its_picture() -> None:
    figure = three_steps().plot()
    nats, loss = figure.axes
    assert (nats.get_title(), loss.get_ylabel()) == ("Training of the guide", "loss (nats²)")
    np.testing.assert_array_equal(nats.lines[-1].get_ydata(), [-7.5])
    np.testing.assert_array_equal(nats.lines[-1].get_xdata(), [1.0])
    given = Figure()
    assert History({"loss": [1.0]}).plot(given.subplots()) is given
    with pytest.raises(ValueError, match="history has none of"):
        History().plot()
