"""`em`, held to exact posteriors, exact likelihoods and plain training by hand."""

import functools
import itertools
import math
import warnings
from collections import Counter

import numpy as np
import pyro.distributions as dist
import pytest
import torch

import langppl as lp
from langppl.diagnostics import InferenceWarning
from langppl.distributions import Text
from langppl.learning import draws
from langppl.learning.draws import posteriors, weighted
from langppl.learning.likelihood import ascend, expected, factors, views_of
from langppl.lm.seeds import generator
from langppl.testing import tiny_lm

pytestmark = pytest.mark.filterwarnings("ignore::langppl.JoinWarning")

OPTIONS = ("a", "b", ".ba")
DATA = [("a", "a"), ("b", "b"), ("ab", "a"), ("b.", ".ba")]


def make_lm(seed: int = 0) -> lp.LM:
    return tiny_lm("ab.", seed=seed, merged=["ab", "b."], sharpness=0.3)


def shaken(view, seed=0, size=0.2):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in view.named_parameters.values():
            p.copy_(size * torch.randn(p.shape, generator=generator))
    return view


def state(view):
    return {n: p.detach().clone() for n, p in view.named_parameters.items()}


def rationales(lm, view):
    """A rationale is drawn, and the view says what follows from it."""

    def model(text, label):
        z = lp.sample("z", lp.LMString(lm, text, stop=".", max_tokens=2))
        lp.sample("label", lp.LMChoice(view, f"{text}{z}b", OPTIONS), obs=label)

    return model


def learned_rationales(lm, view):
    """The view makes the rationale too, of several actions, some masked; and a tempered factor."""

    def model(text, label):
        z = lp.sample("z", lp.Tempered(lp.LMString(view, text, max_tokens=1), 0.7))
        w = lp.sample(
            "w", lp.LMString(view, f"{text}{z}", stop=".", max_tokens=2, truncate="reject")
        )
        lp.sample("label", lp.LMChoice(view, f"{text}{z}{w}b", OPTIONS), obs=label)

    return model


def log_evidence(model, data=DATA):
    """Exactly, by enumeration: the mean over observations, nats."""
    return float(np.mean([lp.infer(model, *row, method="exact").log_evidence for row in data]))


# -- the gradient of the M step ------------------------------------------------------------------


def by_hand(lm, view, ids, steps, tokens, endings, temperature=1.0):
    """Log-probability of one string from a plain forward pass, no packing, with gradients."""
    prompt = len(ids) - len(tokens)
    logits = lm.model(input_ids=torch.tensor([ids])).logits[0].double() / temperature
    total = logits.new_zeros(())
    for t, step in enumerate(steps):
        legal = logits[prompt - 1 + t].masked_fill(~step.legal, -torch.inf).log_softmax(-1)
        total = total + (legal[tokens[t]] if t < len(tokens) else legal[endings].logsumexp(-1))
    return total


def path_by_hand(lm, view, request):
    path = request.path
    ids = list(request.prompt + path.tokens)
    return by_hand(lm, view, ids, path.steps, path.tokens, path.ending_ids)


def log_joint_by_hand(lm, view, program, row):
    """Log joint of the sites that stand on the view, one plain pass for each string."""
    (execution,) = program.executions([row], only=lambda site: False)
    total = torch.zeros((), dtype=torch.float64)
    with lm.adapter(view.adapter):
        for site in execution.sites.values():
            fn, value, power = site.fn, site.value, 1.0
            if site.kind == "factor":
                fn, value, power = fn.base, fn.value, fn.power
            if fn.adapter is None:
                continue
            if isinstance(fn, lp.LMChoice):
                each = torch.stack([path_by_hand(lm, view, r) for r in fn.requests()])
                own = each.log_softmax(0)[fn.options.index(value)]
            else:
                own = path_by_hand(lm, view, fn.request(value))
            total = total + power * own
    return total


@pytest.mark.parametrize("make", [rationales, learned_rationales])
def test_the_gradient_is_that_of_the_exact_log_evidence(make):
    """Fisher's identity: ∇ log Z = E[∇ log R | x], and log Z by summing over all latents."""
    lm = make_lm()
    view = shaken(lm.trainable("v", rank=2))
    program = lp.compile(make(lm, view), "ab", "a")
    exact = lp.infer(program, method="exact")
    draws = weighted(exact, "importance", None, ())
    assert sum(draws.weights) == pytest.approx(1.0, abs=1e-9)
    views = views_of(program.sites)
    assert list(views.values()) == [view]

    named = view.named_parameters
    ascend(factors(program, draws.rows, draws.weights, views), 1.0)
    found = {n: p.grad.clone() for n, p in named.items()}

    for p in named.values():
        p.grad = None
    terms = []
    for row, joint in zip(exact.samples, exact.log_joint, strict=True):
        if joint > -math.inf:
            own = log_joint_by_hand(lm, view, program, row)
            # What does not stand on the view is a number.
            terms.append(own + (joint - float(own.detach())))
    log_z = torch.stack(terms).logsumexp(0)
    assert float(log_z.detach()) == pytest.approx(exact.log_evidence, abs=1e-4)
    (-log_z).backward()
    # In float32: the largest numbers of the gradient are about 1.
    largest = max(float(p.grad.abs().max()) for p in named.values())
    assert largest > 0.01
    for n, p in named.items():
        torch.testing.assert_close(found[n], p.grad, atol=2e-4 * largest, rtol=2e-3)


def test_weighted_draws_give_the_gradient_of_the_estimated_log_evidence():
    """At fixed draws, ∇ log (1/n Σ w) is the self-normalised expectation; the ELBO's is uniform."""
    lm = make_lm()
    view = shaken(lm.trainable("v", rank=2))
    program = lp.compile(rationales(lm, view), "ab", "a")
    (posterior,) = posteriors(
        [program], lp.PriorGuide(), "importance", 40, ("k",), lambda n: None, {}
    )
    views = views_of(program.sites)
    for how in ("importance", "guide"):
        draws = weighted(posterior, how, None, ())
        for p in view.named_parameters.values():
            p.grad = None
        ascend(factors(program, draws.rows, draws.weights, views), 1.0)
        found = {n: p.grad.clone() for n, p in view.named_parameters.items()}
        for p in view.named_parameters.values():
            p.grad = None
        gaps = []
        for row, weight in zip(posterior.samples, posterior.log_weights, strict=True):
            own = log_joint_by_hand(lm, view, program, row)
            gaps.append(own + (float(weight) - float(own.detach())))
        every = torch.stack(gaps)
        bound = every.logsumexp(0) - math.log(40) if how == "importance" else every.mean()
        (-bound).backward()
        for n, p in view.named_parameters.items():
            torch.testing.assert_close(found[n], p.grad, atol=1e-4, rtol=2e-3)


def test_pyro_s_scale_and_mask_count():
    import pyro

    lm = make_lm()
    view = shaken(lm.trainable("v", rank=2))

    def model(scale, mask):
        with pyro.poutine.scale(scale=scale), pyro.poutine.mask(mask=mask):
            lp.sample("label", lp.LMChoice(view, "ab", OPTIONS), obs="a")

    def value(*args):
        program = lp.compile(model, *args)
        found = factors(program, [{}], [1.0], views_of(program.sites))
        return expected(found) if found else 0.0

    assert value(3.0, True) == pytest.approx(3 * value(1.0, True), abs=1e-5)
    assert value(3.0, False) == 0.0
    assert value(2.0, True) == pytest.approx(
        float(lp.compile(model, 2.0, True).log_joint({})), abs=1e-5
    )


# -- the rounds ----------------------------------------------------------------------------------


def test_with_exact_posteriors_the_likelihood_never_falls():
    lm = make_lm()
    view = lm.trainable("v", rank=2)
    model = rationales(lm, view)
    start = log_evidence(model)
    # A learning rate that overshoots in single steps: the rounds are cut back.
    result = lp.em(model, DATA, method="exact", rounds=8, steps=4, learning_rate=0.1, clip=10.0)
    found = result.history["log_evidence"]
    assert len(found) == 9 and found[0] == pytest.approx(start, abs=1e-5)
    assert found[-1] == pytest.approx(log_evidence(model), abs=1e-5)
    assert all(b >= a - 2e-5 for a, b in itertools.pairwise(found)), found
    assert found[-1] > found[0] + 0.3
    assert min(result.history["kept"][:-1]) < 1.0  # the safeguard was needed
    assert result.guide is None and result.trainables == (view,)


AMBIGUOUS = [("a", "a"), ("a", "b"), ("b", "b"), ("b", ".ba")]
"""Each text has two labels, evenly: no model gets beyond −log 2, and this one can get there."""


@pytest.mark.parametrize("guide", ["prior", "gflownet"])
def test_with_guides_the_likelihood_goes_up_to_near_the_optimum(guide):
    lm = make_lm()
    view = lm.trainable("v", rank=2)
    model = rationales(lm, view)
    start = log_evidence(model, AMBIGUOUS)
    options = {"fit": {"steps": 10, "batch": 8}} if guide == "gflownet" else {}
    result = lp.em(
        model, AMBIGUOUS, guide, rounds=6, steps=20, num_samples=64, learning_rate=2e-2, **options
    )
    end = log_evidence(model, AMBIGUOUS)
    assert start < -1.2 and -math.log(2) - 0.04 < end < -math.log(2) + 1e-4, (start, end)
    # The estimate of the last row is of the model as it ended, within 5 of its errors.
    error = result.history["error"][-1]
    assert abs(result.history["log_evidence"][-1] - end) < 5 * error + 1e-4
    assert result.history["elbo"][-1] <= result.history["log_evidence"][-1] + 1e-9


def test_a_guide_s_own_draws_and_resampled_ones_learn_too():
    ends = {}
    for name, options in {
        "weighted": {},
        "resampled": {"resample": 8},
        "guide": {"weights": "guide"},
        "smc": {"method": "smc"},
    }.items():
        lm = make_lm()
        view = lm.trainable("v", rank=2)
        model = rationales(lm, view)
        result = lp.em(
            model, DATA, "prior", rounds=3, steps=10, num_samples=32, learning_rate=1e-2, **options
        )
        ends[name] = log_evidence(model)
        assert ends[name] > result.history["log_evidence"][0] + 0.3, ends
    # The ELBO's optimum is no other here than the evidence's, but the way differs.
    assert len({round(v, 4) for v in ends.values()}) == 4


def test_resampling_keeps_the_expectation():
    """Systematic copies: each draw as often as its weight says, within one."""
    lm = make_lm()
    view = shaken(lm.trainable("v", rank=2))
    program = lp.compile(rationales(lm, view), "ab", "a")
    posterior = lp.infer(program, num_samples=50)
    whole = weighted(posterior, "importance", None, ())
    some = weighted(posterior, "importance", 20, ("k",))
    shares = {r["z"].ids: w for r, w in zip(some.rows, some.weights, strict=True)}
    for row, weight in zip(whole.rows, whole.weights, strict=True):
        copies = sum(r["z"].ids == row["z"].ids for r in posterior.samples)
        assert abs(20 * shares.get(row["z"].ids, 0.0) - 20 * weight) < copies + 1
    assert sum(shares.values()) == pytest.approx(1.0)


def test_without_latents_it_is_plain_cross_entropy_training():
    lm = make_lm()
    view = lm.trainable("v", rank=2, seed=5)

    def model(text, label):
        lp.sample("label", lp.LMChoice(view, f"{text}b", OPTIONS), obs=label)

    start = state(view)
    result = lp.em(model, DATA, rounds=3, steps=4, learning_rate=5e-3)
    found = state(view)
    # The first row is the data's log-likelihood, with no error.
    view_losses = result.history["log_evidence"]
    assert result.history["error"] == [0.0] * 4
    assert view_losses[-1] > view_losses[0]

    named = view.named_parameters
    with torch.no_grad():
        for n, p in named.items():
            p.copy_(start[n])
    optimiser = torch.optim.AdamW(list(named.values()), lr=5e-3, weight_decay=0.0)
    losses = []
    for _ in range(12):
        optimiser.zero_grad()
        logits = []
        with lm.adapter(view.adapter):
            for text, _ in DATA:
                requests = lp.LMChoice(view, f"{text}b", OPTIONS).requests()
                logits.append(torch.stack([path_by_hand(lm, view, r) for r in requests]))
        labels = torch.tensor([OPTIONS.index(label) for _, label in DATA])
        loss = torch.nn.functional.cross_entropy(torch.stack(logits), labels)
        losses.append(float(loss.detach()))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        optimiser.step()
    assert [-losses[0], -losses[4], -losses[8]] == pytest.approx(view_losses[:3], abs=1e-4)
    for n, p in named.items():
        # Adam divides by a gradient's own size, so rounding moves a weight by some of a step.
        torch.testing.assert_close(found[n], p.detach(), atol=2e-3, rtol=0)
    moved = sum(float((found[n] - start[n]).norm()) for n in found)
    apart = sum(float((found[n] - p.detach()).norm()) for n, p in named.items())
    assert apart < 0.01 * moved


def test_steps_take_every_observation_as_often(monkeypatch):
    from langppl.learning.maximiser import Maximiser
    from langppl.learning.settings import Settings

    lm = make_lm()
    view = lm.trainable("v", rank=2)
    settings = Settings(
        rounds=1,
        method="exact",
        num_samples=1,
        weights="importance",
        resample=None,
        steps=1,
        observations=2,
        learning_rate=1e-3,
        betas=(0.9, 0.999),
        weight_decay=0.0,
        clip=1.0,
    )
    maximiser = Maximiser({(id(lm), view.adapter): view}, settings, seed=0)
    made = Counter()

    def noting(key):
        made[key] += 1
        return generator(key)

    monkeypatch.setattr("langppl.learning.maximiser.generator", noting)
    taken = []
    for maximiser.done in range(10):
        taken += maximiser._chosen(5)
    assert all(taken.count(k) == 4 for k in range(5))
    # Each turn has an order, which is made once; a round with other rows has one of its own.
    assert list(made.values()) == [1] * 4
    for count in (5, 3):
        places = [divmod(at, count) for at in (2, 3)]
        orders = [generator((0, "em", "order", turn)).permutation(count) for turn, _ in places]
        maximiser.done = 1
        found = sorted(int(o[place]) for o, (_, place) in zip(orders, places, strict=True))
        assert maximiser._chosen(count) == found


def test_guide_and_view_learn_each_its_own_adapter():
    lm = make_lm()
    view, other = shaken(lm.trainable("v", rank=2)), shaken(lm.trainable("other", rank=2), 1)
    model = rationales(lm, view)
    guide = lp.GFlowNetGuide(lm, rank=2)

    def own(mark):
        named = lm.model.named_parameters()
        return {n: p.detach().clone() for n, p in named if f".{mark}." in n}

    before = {m: own(m) for m in (guide.adapter, view.adapter, other.adapter)}
    base = lm.weights_fingerprint

    def changed():
        now = {m: own(m) for m in before}
        return {m for m in before if any(not torch.equal(before[m][n], now[m][n]) for n in now[m])}

    guide.fit(model, DATA, steps=3)
    assert changed() == {guide.adapter}
    before[guide.adapter] = own(guide.adapter)
    lp.em(model, DATA, guide, fit=False, rounds=1, steps=2)
    assert changed() == {view.adapter}
    assert lm.weights_fingerprint == base and lm.active_adapter is None
    result = lp.em(model, DATA, guide, fit={"steps": 2}, rounds=1, steps=2)
    assert changed() == {guide.adapter, view.adapter}
    # The guide learned in the round and after it.
    assert guide.history.rows == 3 + 2 * 2 and result.guide is guide


def test_the_first_training_of_a_guide_alone_is_tempered(monkeypatch):
    lm = make_lm()
    model = rationales(lm, lm.trainable("view", rank=2))
    fit, powers = lp.GFlowNetGuide.fit, []

    @functools.wraps(fit)
    def watched(guide, data, **options):
        powers.append((options["schedule"] or lp.RewardSchedule()).powers(4))
        return fit(guide, data, **options)

    monkeypatch.setattr(lp.GFlowNetGuide, "fit", watched)
    lp.em(model, DATA, lp.GFlowNetGuide(lm), fit={"steps": 2}, rounds=2, steps=1)
    assert powers[0][0] == 0.5 and powers[1:] == [[1.0] * 4] * 2
    schedule = lp.RewardSchedule(start=2.0)
    given = {"steps": 2, "schedule": schedule}
    lp.em(model, DATA, lp.GFlowNetGuide(lm), fit=given, rounds=1, steps=1)
    assert powers[3:] == [schedule.powers(4)] * 2


def test_only_the_views_that_are_named_are_fitted():
    lm = make_lm()
    first, second = lm.trainable("first", rank=2), lm.trainable("second", rank=2)

    def model(text, label):
        z = lp.sample("z", lp.LMString(first, text, max_tokens=1))
        lp.sample("label", lp.LMChoice(second, f"{text}{z}", OPTIONS), obs=label)

    before = state(first)
    result = lp.em(model, DATA, "prior", trainable=[second], rounds=1, steps=2, num_samples=8)
    assert result.trainables == (second,)
    assert all(torch.equal(before[n], p) for n, p in state(first).items())
    result = lp.em(model, DATA, "prior", rounds=1, steps=2, num_samples=8)
    assert result.trainables == (first, second)
    assert not all(torch.equal(before[n], p) for n, p in state(first).items())


def test_equal_seeds_give_equal_rounds():
    found = []
    for seed in (0, 0, 1):
        lm = make_lm()
        view = lm.trainable("v", rank=2)
        result = lp.em(
            rationales(lm, view),
            DATA,
            "prior",
            rounds=2,
            steps=3,
            num_samples=8,
            observations=2,
            seed=seed,
        )
        found.append((result.history, state(view)))
    # NaN in the last row: a history's NaNs are one object, so that equal ones are equal.
    assert found[0][0] == found[1][0] != found[2][0]
    assert all(torch.equal(found[0][1][n], p) for n, p in found[1][1].items())


def test_some_observations_may_lack_the_label():
    lm = make_lm()
    view = lm.trainable("v", rank=2)
    model = rationales(lm, view)
    data = [*DATA, ("bb", None)]
    result = lp.em(model, data, method="exact", rounds=3, steps=5, learning_rate=1e-2)
    assert result.history["log_evidence"][-1] > result.history["log_evidence"][0] + 0.1
    # What is not observed has evidence 1, whatever the view.
    last = lp.infer(model, "bb", None, method="exact").log_evidence
    assert last == pytest.approx(0.0, abs=1e-4)


def test_held_out_data_are_measured():
    lm = make_lm()
    view = lm.trainable("v", rank=2)
    model = rationales(lm, view)
    result = lp.em(model, DATA, method="exact", rounds=2, steps=5, validation=[("a.", "a")])
    assert result.history["val_log_evidence"][-1] == pytest.approx(
        log_evidence(model, [("a.", "a")]), abs=1e-5
    )
    shown = str(result)
    assert "log evidence" in shown and "val log evidence" in shown
    assert result.history.to_pandas().shape == (3, len(result.history))


def test_data_and_held_out_data_may_be_tables_and_iterators():
    pd = pytest.importorskip("pandas")
    found = []
    for data, held_out in [
        (DATA, [("a.", "a")]),
        (pd.DataFrame(DATA, columns=["text", "label"]), iter([("a.", "a")])),
    ]:
        lm = make_lm()
        model = rationales(lm, lm.trainable("v", rank=2))
        guide = lp.GFlowNetGuide(lm, rank=2)
        options = {"rounds": 2, "steps": 2, "fit": {"steps": 1, "batch": 2}, "num_samples": 4}
        result = lp.em(model, data, guide, validation=held_out, **options)
        found.append(result.history)
    assert found[0] == found[1]


# -- what goes wrong -----------------------------------------------------------------------------


def test_bad_arguments_say_what_to_do():
    lm = make_lm()
    view = lm.trainable("v", rank=2)
    model = rationales(lm, view)

    def plain(text, label):
        lp.sample("label", lp.LMChoice(lm, text, OPTIONS), obs=label)

    def supervised(text, label):
        lp.sample("label", lp.LMChoice(view, text, OPTIONS), obs=label)

    for call, message in [
        (lambda: lp.em(plain, DATA), "no trainable view.*lm.trainable"),
        (lambda: lp.em(model, DATA), r"has the latents z: say what proposes them"),
        (lambda: lp.em(supervised, DATA, "prior"), "no latents.*leave the guide out"),
        (lambda: lp.em(model, DATA, "prior", method="exact"), "takes no guide"),
        (lambda: lp.em(model, DATA, "nobody"), "unknown guide 'nobody'"),
        (lambda: lp.em(model, DATA, "prior", rounds=0), "rounds must be .* at least 1, got 0"),
        (lambda: lp.em(model, DATA, "prior", resample=0), "resample must be"),
        (lambda: lp.em(model, DATA, "prior", weights="all"), "unknown weights 'all'"),
        (lambda: lp.em(model, DATA, "prior", method="all"), "unknown method 'all'"),
        (lambda: lp.em(model, DATA, "prior", method="mh", weights="guide"), "guide's own draws"),
        (lambda: lp.em(model, DATA, "prior", fit={"steps": 3}), "the guide is 'prior'"),
        (lambda: lp.em(model, DATA, "gflownet", fit={"given": []}), "fit takes no given"),
        (lambda: lp.em(model, DATA, "prior", learning_rate=0.0), "learning_rate must be above 0"),
        (lambda: lp.em(model, DATA, "prior", clip=0.0), "clip must be above 0"),
        (lambda: lp.em(model, DATA, "prior", betas=(1.0, 0.9)), "betas must be"),
        (lambda: lp.em(model, DATA, "prior", betas=0.9), "betas must be two numbers, got 0.9"),
        (lambda: lp.em(model, DATA, "prior", clip="a"), "clip must be a number, got 'a'"),
        (lambda: lp.em(model, DATA, "prior", weight_decay=-1.0), "weight_decay must be"),
        (lambda: lp.em(model, DATA, "prior", trainable=[]), "trainable is empty"),
        (lambda: lp.em(model, [], "prior"), "data is empty"),
        (lambda: lp.em(model, DATA, lp.GFlowNetGuide(make_lm())), "this guide was made for"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    for call, message in [
        (lambda: lp.em(model, DATA, 3), "a guide is a name, a Guide or a function, got 3"),
        (lambda: lp.em(model, DATA, "prior", trainable=[lm]), "views made by lm.trainable"),
        (lambda: lp.em(model, DATA, "gflownet", fit=3), "fit is True, False or a mapping"),
    ]:
        with pytest.raises(TypeError, match=message):
            call()


def test_a_probability_outside_of_a_site_is_an_error_not_a_lost_gradient():
    lm = make_lm()
    view = lm.trainable("v", rank=2)

    def model(label):
        z = lp.sample("z", lp.LMChoice(lm, "a", ["a", "b"]))
        lp.sample("label", lp.LMChoice(view, f"b{z}", OPTIONS), obs=label)
        lp.factor("fluent", float(lp.LMString(view, "a").log_prob(str(z))))

    with pytest.raises(ValueError, match="trainable 'v' outside of its sample statements"):
        lp.em(model, [("a",)], "prior", rounds=1)


def test_a_view_that_no_earlier_run_met_is_an_error():
    lm = make_lm()
    first, second = lm.trainable("first", rank=2), lm.trainable("second", rank=2)

    def model(label):
        z = lp.sample("z", lp.LMString(lm, "a", max_tokens=3))
        view = second if "".join(list(z)) == "bab." else first
        lp.sample("label", lp.LMChoice(view, f"b{z}", OPTIONS), obs=label)

    with pytest.raises(ValueError, match="met the trainable 'second', which no earlier run"):
        lp.em(model, [("a",)], method="exact", rounds=1)
    result = lp.em(model, [("a",)], method="exact", rounds=1, steps=1, trainable=[first, second])
    assert result.trainables == (first, second)


def test_observations_without_a_possible_draw_are_left_out_and_counted():
    lm = make_lm()
    view = lm.trainable("v", rank=2)

    def model(label, possible):
        z = lp.sample("z", lp.LMString(lm, "a", max_tokens=2))
        lp.sample("label", lp.LMChoice(view, f"b{z}", OPTIONS), obs=label)
        lp.factor("gate", 0.0 if possible else -math.inf)

    data = [("a", True), ("b", False)]
    with pytest.warns(InferenceWarning, match="gate"):
        result = lp.em(model, data, "prior", rounds=1, steps=2, num_samples=4)
    assert result.history["failed"] == [1.0, 1.0]
    assert result.history["log_evidence"][0] == -math.inf
    assert math.isfinite(result.history["objective"][0])
    with (
        pytest.raises(ValueError, match="in round 1 no observation has a possible draw"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", InferenceWarning)
        lp.em(model, data[1:], "prior", rounds=1, steps=2, num_samples=4)


def test_a_gradient_that_is_no_number_changes_nothing(monkeypatch):
    from langppl.learning import maximiser

    lm = make_lm()
    view = shaken(lm.trainable("v", rank=2))
    before = state(view)

    def spoiled(every, share):
        for p in view.named_parameters.values():
            p.grad = torch.full_like(p, math.nan)
        return 0.0

    monkeypatch.setattr(maximiser, "ascend", spoiled)
    with pytest.raises(FloatingPointError, match="gradient of the M step is nan after 0 steps"):
        lp.em(rationales(lm, view), DATA, "prior", rounds=1, num_samples=4)
    assert all(torch.equal(before[n], p) for n, p in state(view).items())


def test_draws_that_print_alike_are_not_the_same():
    lm = tiny_lm("ab.", sharpness=0.3)

    def model(y):
        n = lp.sample("n", dist.Normal(0.5, 1e-5))
        lp.sample("y", lp.LMChoice(lm, "a" if n > 0.5 else "bb", ["a", "b"]), obs=y)

    posterior = lp.infer(model, "a", guide="prior", num_samples=200, seed=0, progress=False)
    found = weighted(posterior, "importance", None, ())

    def share(rows, weights):
        return sum(w for r, w in zip(rows, weights, strict=True) if r["n"] > 0.5)

    expected = share(posterior.samples, posterior.weights)
    assert 0.1 < expected < 0.9
    assert share(found.rows, found.weights) == pytest.approx(expected)


def test_spellings_of_one_text_are_kept_apart():
    texts = [Text("ab", ids, "t") for ids in ((3, 4), (5,), (3, 4))]
    posterior = lp.Posterior([{"z": t} for t in texts], np.log([1.0, 4.0, 3.0]))
    found = weighted(posterior, "importance", None, ())
    # The first and the third are one draw.
    assert [row["z"].ids for row in found.rows] == [(3, 4), (5,)]
    assert found.weights == pytest.approx([0.5, 0.5])


def test_figures_by_hand():
    samples = [{"z": "a"}, {"z": "b"}]
    one = lp.Posterior(samples, [0.0, 1.0], log_evidence=-1.0, log_evidence_error=0.3)
    two = lp.Posterior(samples, [-math.inf, -2.0], log_evidence=-3.0, log_evidence_error=0.4)
    found = draws.figures([one, two])
    assert found["log_evidence"] == pytest.approx(-2.0)
    # Of a mean of two: √(0.3² + 0.4²) / 2.
    assert found["error"] == pytest.approx(0.25)
    # Of the second, the possible half has −2 and the log of its share is added.
    assert found["elbo"] == pytest.approx((0.5 - 2.0 + math.log(0.5)) / 2)
    assert found["impossible"] == pytest.approx(0.25)


@pytest.mark.parametrize("way", ["asks", "infers"])
def test_a_tool_that_asks_a_view_is_refused_wherever_it_is_remembered(way):
    lm = tiny_lm("ab.", merged=["ab", "b."], sharpness=0.3)
    view = lm.trainable("v", rank=2)

    def inner(z):
        lp.sample("x", lp.LMChoice(view, f"{z}", ["a", "b"]), obs="a")

    def judge(z):
        if way == "infers":
            return float(lp.infer(inner, z, method="exact").log_evidence)
        return float(lp.LMChoice(view, f"{z}", ["a", "b"]).log_prob("a"))

    def model(y):
        z = lp.sample("z", lp.LMString(lm, "a", stop=".", max_tokens=2))
        lp.factor("f", lp.call("judge", judge, z))
        lp.sample("y", lp.LMChoice(view, f"{z}", ["a", "b"]), obs=y)

    with pytest.raises(ValueError, match="outside"):
        lp.em(model, [("b",)], method="exact", rounds=2, steps=2, progress=False)
    program = lp.compile(model, "b")
    before = lp.infer(program, method="exact").log_evidence
    with torch.no_grad():
        for p in view.named_parameters.values():
            p.copy_(0.5 * torch.randn(p.shape, generator=torch.manual_seed(1)))
    after = lp.infer(program, method="exact").log_evidence
    assert after == pytest.approx(lp.infer(model, "b", method="exact").log_evidence)
    assert abs(after - before) > 0.01


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("smc", {"twist": "lookahead", "every": 1, "rejuvenation": 1}),
        ("mh", {"chains": 2, "warmup": 3}),
        ("exact", {"limit": 1000}),
        ("importance", {}),
    ],
)
def test_draws_of_a_method_are_those_of_inference_alone(method, options):
    lm = make_lm()
    view = shaken(lm.trainable("v", rank=2))
    programs = [lp.compile(rationales(lm, view), *row) for row in (("ab", "a"), ("ba", "b"))] * 3
    done = []
    guide = None if method == "exact" else lp.PriorGuide()
    found = posteriors(programs, guide, method, 16, ("k",), done.append, options)
    assert sum(done) == 6
    if method == "importance":
        return
    for k, (program, posterior) in enumerate(zip(programs, found, strict=True)):
        seed = int(generator(("k", k)).integers(2**62))
        alone = lp.infer(
            program, method=method, num_samples=16, seed=seed, progress=False, **options
        )
        assert posterior.samples == alone.samples
        np.testing.assert_allclose(posterior.log_weights, alone.log_weights, atol=2e-5)


def test_options_are_the_method_s_own():
    lm = make_lm()
    model = rationales(lm, shaken(lm.trainable("v", rank=2)))
    with pytest.raises(TypeError, match="method 'importance' has no option 'twist'"):
        lp.em(model, DATA, "prior", twist="lookahead")
    with pytest.raises(ValueError, match="every must be an integer of at least 1, got 0"):
        lp.em(model, DATA, "prior", method="smc", every=0)
    options = {"rounds": 1, "steps": 1, "num_samples": 4, "progress": False}
    result = lp.em(model, DATA, "prior", method="smc", twist="lookahead", every=1, **options)
    assert math.isfinite(result.history["log_evidence"][-1])


def test_an_interrupted_chain_ends_the_round(monkeypatch):
    lm = make_lm()
    view = lm.trainable("v", rank=2)
    before = state(view)
    calls = []
    infer = draws.infer

    def short(*args, **kwargs):
        calls.append(1)
        kwargs["num_samples"] = 4 if len(calls) == 2 else kwargs["num_samples"]
        return infer(*args, **kwargs)

    monkeypatch.setattr(draws, "infer", short)
    with pytest.warns(UserWarning, match="interrupted after 0 of 2 rounds"):
        lp.em(rationales(lm, view), DATA, "prior", method="mh", chains=4, rounds=2, progress=False)
    assert len(calls) >= 2
    assert all(torch.equal(before[n], p) for n, p in state(view).items())


def test_a_list_of_programs_is_data():
    histories = []
    for k in range(2):
        lm = make_lm()
        model = rationales(lm, lm.trainable("v", rank=2))
        options = {"rounds": 1, "steps": 2, "num_samples": 4, "progress": False}
        data = ([lp.compile(model, *row) for row in DATA],) if k else (model, DATA)
        histories.append(lp.em(*data, guide="prior", **options).history)
    assert histories[0] == histories[1]
