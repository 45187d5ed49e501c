"""What is read piece by piece, gradients included, is what plain operations on all logits give."""

import pytest
import torch

from langppl.lm import reading
from langppl.lm.reading import Wanted
from langppl.testing import tiny_lm

LM = tiny_lm(["a", "b", ".", " "], seed=5, merged=["ab", "b.", ".a"])


def case(seed: int, slots: int = 23, rows: int = 11) -> tuple[torch.Tensor, Wanted]:
    rng = torch.Generator().manual_seed(seed)
    size = LM.vocabulary.size
    width = LM.model.get_output_embeddings().weight.shape[1]
    states = torch.randn(rows, width, generator=rng)

    def pick(most: int, count: int) -> torch.Tensor:
        return torch.randint(most, (count,), generator=rng)

    legal = torch.rand(3, size, generator=rng) < 0.7
    legal[:, :2] = True
    wanted = Wanted(
        rows=pick(rows, slots),
        legal=legal,
        kinds=pick(3, slots),
        temperatures=torch.tensor([1.0, 0.5, 2.0])[pick(3, slots)],
        token_slots=pick(slots, 30),
        tokens=pick(2, 30),
        sets=[(torch.tensor([0, 1, 4]), pick(slots, 7)), (torch.tensor([1]), pick(slots, 3))],
    )
    return states, wanted


@pytest.mark.parametrize("rows_at_once", [1, 4, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_pieces_are_the_whole(
    seed: int, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "LOGIT_BYTES", rows_at_once * 4 * LM.vocabulary.size)
    states, wanted = case(seed)
    with torch.no_grad():
        expected, expected_sets = reading.plain(LM.logits_of(states), wanted)
        found, sets = reading.log_probs(LM, states, wanted)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(sets, expected_sets)

    leaf = states.clone().requires_grad_()
    weights = torch.randn(40, generator=torch.Generator().manual_seed(seed))

    def loss(found: torch.Tensor, sets: list[torch.Tensor]) -> torch.Tensor:
        return (torch.cat([found, *sets]) * weights).sum()

    (expected_gradient,) = torch.autograd.grad(
        loss(*reading.plain(LM.logits_of(leaf), wanted)), leaf
    )
    read = reading.log_probs(LM, leaf, wanted)
    assert all(type(t.grad_fn).__name__ == "_ReadBackward" for t in (read[0], *read[1]))
    torch.testing.assert_close(read[0], expected)
    (gradient,) = torch.autograd.grad(loss(*read), leaf)
    assert float(expected_gradient.abs().max()) > 0.1
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


def test_logits_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "LOGIT_BYTES", 3 * 4 * LM.vocabulary.size)
    rows = []
    LM.model.get_output_embeddings().register_forward_hook(
        lambda _module, args, _out: rows.append(len(args[0]))
    )
    states, wanted = case(0)
    reading.log_probs(LM, states.requires_grad_(), wanted)
    assert len(rows) >= 8 and max(rows) <= 3


def test_rows_whose_actions_are_all_forced_need_no_logits() -> None:
    states, wanted = case(1)
    none = torch.zeros(0, dtype=torch.long)
    empty = Wanted(none, wanted.legal, none, torch.zeros(0), none, none, [])
    found, sets = reading.log_probs(LM, states, empty)
    assert found.shape == (0,) and sets == []
