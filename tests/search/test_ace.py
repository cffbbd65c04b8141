"""ACE rounds: what moves, what is logged, when an exchange is taken back; the released procedure by hand."""

import pytest
import torch

from acefast.pruning import SCORES, Pattern, Score, SoftMasks, exchange_count, prune_count, standardise
from acefast.search import ace, released, run_search
from acefast.search.rounds import prepare
from acefast.search.state import State


def events(run, kind):
    return [event for event in run.history if event["event"] == kind]


def test_exchanges_keep_counts_and_log_what_they_did(tiny, tiny_config):
    config = tiny_config(tau=1.0, stop_overlap=1.0)
    run = run_search(tiny, config)
    for number, event in enumerate(run.rounds[1:], 1):
        candidates = [e for e in events(run, "candidate") if e["round"] == number]
        assert [e["candidate"] for e in candidates] == [0, 1, 2, 3]
        assert {e["edges_kept"] for e in candidates} == {event["edges_kept"]}
        assert {e["weights_kept"] for e in candidates} == {event["weights_kept"]}
        best = max(candidates, key=lambda e: (e["val"], -e["val_loss"], -e["candidate"]))
        assert event["candidate"] == best["candidate"]
        for ace_event in [e for e in events(run, "ace_round") if e["round"] == number]:
            for axis in ("edges", "weights"):
                kept, total = event[f"{axis}_kept"], event[f"{axis}_total"]
                assert ace_event[f"{axis}_exchanged"] == exchange_count(0.2, kept, total - kept) > 0
                assert 0 <= ace_event[f"{axis}_erased_rank"] <= 1
        if event["candidate"] == 0:
            assert event["exchanged"] == 0


def test_zero_temperature_takes_the_best_picks(tiny, tiny_config):
    run = run_search(tiny, tiny_config(tau=0.0, stop_overlap=1.0, rounds=1))
    for event in events(run, "ace_round"):
        kept, k = run.rounds[1]["weights_kept"], event["weights_exchanged"]
        assert event["weights_erased_rank"] == pytest.approx((k - 1) / 2 / (kept - 1), abs=1e-3)


@pytest.mark.parametrize("settings", [dict(), dict(axes="edges"), dict(axes="weights")])
def test_crossed_complement_trains_one_model_per_axis(tiny, tiny_config, settings):
    run = run_search(tiny, tiny_config(complement="crossed", rounds=1, **settings))
    axes = ["edges", "weights"] if not settings else [settings["axes"]]
    for event in events(run, "ace_round"):
        assert [a for a in ("edges", "weights") if f"complement_{a}_val" in event] == axes


@pytest.mark.parametrize("name", ["product", "gradient", "combined", "random"])
def test_every_score_serves_a_search(tiny, tiny_config, name):
    run = run_search(tiny, tiny_config(score=name, standardise="rank", rounds=1))
    assert run.rounds[1]["weights_kept"] == 212
    assert events(run, "imp")[0]["weights_spread"] > 0


def test_a_score_of_ones_own_serves_by_its_name(tiny, tiny_config, monkeypatch):
    monkeypatch.setitem(SCORES, "taylor", Score(lambda of: (of.product * of.gradient).abs(), ("weights", "gradients")))
    own, builtin = (run_search(tiny, tiny_config(score=name, rounds=1)) for name in ("taylor", "combined"))
    assert [e | {"seconds": 0} for e in own.history] == [e | {"seconds": 0} for e in builtin.history]


@pytest.mark.parametrize("settings", [dict(), dict(axes="edges", complement="crossed", protect=1), dict(method="ugs")])
def test_tied_directions_stay_together_through_a_search(tiny, tiny_config, settings):
    run = run_search(tiny, tiny_config(tie_directions=True, tau=1.0, stop_overlap=0.3, **settings))
    reverse, total = tiny.graph.reverse_edges().long(), tiny.graph.num_edges
    assert bool((reverse != torch.arange(total)).all()), "every edge of an undirected graph has its reverse"
    expected = total
    for number in (1, 2):
        keep = run.ticket(number).edge_keep
        assert torch.equal(keep, keep[reverse])
        expected -= prune_count(expected, 0.05) // 2 * 2
        assert int(keep.sum()) == run.rounds[number]["edges_kept"] == expected
    for event in events(run, "ace_round"):
        kept = run.rounds[event["round"]]["edges_kept"]
        whole = 2 * exchange_count(0.2, kept // 2, (total - kept) // 2)
        assert event["edges_exchanged"] % 2 == 0 and 0 < event["edges_exchanged"] <= whole


def test_protected_elements_survive(tiny, tiny_config):
    settings = dict(tau=0.0, exchange_weights=0.5, exchange_edges=0.5, stop_overlap=1.0, rounds=4)
    run = run_search(tiny, tiny_config(protect=2, seed=4, **settings))
    survivals = [e["weights_survival"] for e in events(run, "imp") if e["weights_survival"] is not None]
    assert survivals and all(value == 1.0 for value in survivals)


def test_nothing_removed_means_nothing_exchanged(tiny, tiny_config):
    run = run_search(tiny, tiny_config(prune_edges=0.0, prune_weights=0.0, rounds=1))
    assert run.rounds[1]["exchanged"] == 0
    assert run.rounds[1]["weights_kept"] == run.rounds[1]["weights_total"]


class Scripted:
    """A Search whose trainings are scripted: scores of the edges come from a list."""

    def __init__(self, config):
        self.config, self.axes = config, ("edges",)

    def seed(self, *names):
        return 1


def test_stop_rule_takes_the_exchange_back_and_redraws_at_half_the_rate(tiny_config):
    config = tiny_config(axes="edges", tau=0.0, exchange_edges=0.5, stop_overlap=0.6)
    search = Scripted(config)
    state = State(round=1)
    keep = Pattern(torch.tensor([True] * 8 + [False] * 8), {})
    first = SoftMasks(torch.arange(16.0), {})  # the lowest kept are 0..3, the highest removed 12..15
    state.put("keep", keep)
    fields = ace.exchange_axis(search, state, 1, "edges", keep, first, first)
    after = state.get("keep")
    assert fields["edges_exchanged"] == 4 and not fields["edges_fired"] and fields["edges_overlap"] is None
    assert after.edges.nonzero().flatten().tolist() == [4, 5, 6, 7, 12, 13, 14, 15]

    # now what was just mined scores lowest: all four would be erased again
    second = SoftMasks(torch.tensor([0.0] * 4 + [5, 6, 7, 8] + [0.0] * 4 + [1, 2, 3, 4]), {})
    fields = ace.exchange_axis(search, state, 2, "edges", after, second, second)
    assert fields["edges_overlap"] == 1.0 and fields["edges_fired"]
    assert fields["edges_exchanged"] == 2 and fields["edges_rate"] == 0.25
    # redrawn from the first scores and the first pattern with two picks instead of four
    redrawn = state.get("keep")
    assert redrawn.edges.nonzero().flatten().tolist() == [2, 3, 4, 5, 6, 7, 14, 15]
    assert state.get("mined-edges").edges.nonzero().flatten().tolist() == [14, 15]

    # a later exchange goes on at the halved rate, and overlap is counted against the redraw
    third = SoftMasks(torch.arange(16.0), {})
    fields = ace.exchange_axis(search, state, 3, "edges", redrawn, third, third)
    assert fields["edges_exchanged"] == 2 and fields["edges_overlap"] == 0.0 and not fields["edges_fired"]
    assert state.get("keep").kept("edges") == 8


def test_overlap_at_the_threshold_does_not_fire(tiny_config):
    config = tiny_config(axes="edges", tau=0.0, exchange_edges=0.5, stop_overlap=0.5)
    search, state = Scripted(config), State(round=1)
    keep = Pattern(torch.tensor([True] * 8 + [False] * 8), {})
    state.put("keep", keep)
    scores = SoftMasks(torch.arange(16.0), {})
    ace.exchange_axis(search, state, 1, "edges", keep, scores, scores)
    now = state.get("keep")
    half = torch.full((16,), 9.0)
    half[torch.tensor([12, 13, 4, 5])] = torch.tensor([0.0, 1.0, 2.0, 3.0])
    fields = ace.exchange_axis(search, state, 2, "edges", now, SoftMasks(half, {}), SoftMasks(half, {}))
    assert fields["edges_overlap"] == 0.5 and not fields["edges_fired"]


def test_complements_are_what_was_removed(tiny, tiny_config):
    search = prepare(tiny, tiny_config(), None, lambda event: None)
    keep = search.full()
    keep = keep.map(lambda t: (torch.arange(t.numel()) % 3 > 0).view(t.shape))
    ((_, axes, joint),) = ace._complements(search, keep, ["edges", "weights"])
    assert axes == ["edges", "weights"]
    assert all(bool((a ^ b).all()) for axis in axes for a, b in zip(joint.axis(axis), keep.axis(axis), strict=True))
    search.config = tiny_config(complement="crossed")
    (_, _, edges), (_, _, weights) = ace._complements(search, keep, ["edges", "weights"])
    assert torch.equal(edges.edges, ~keep.edges) and edges.weights is keep.weights
    assert torch.equal(weights.edges, keep.edges)
    assert all(torch.equal(weights.weights[name], ~keep.weights[name]) for name in keep.weights)


# The released procedure.


def test_released_picks_by_hand():
    kept = {"a": torch.tensor([0.5, 0.1, 0.0, 0.4, 0.3]), "b": torch.tensor([0.2, 0.9])}
    lost = {"a": torch.tensor([0.0, 0.0, 0.7, 0.0, 0.0]), "b": torch.tensor([0.0, 0.0])}
    # one removed weight: entry int(1 * 0.5) = 0 is itself, and nothing is strictly above it
    important, useless = released.picks(kept, lost, 0.5)
    assert released.count(important) == 0 and released.count(useless) == 0

    lost = {"a": torch.tensor([0.0, 0.0, 0.7, 0.0, 0.0]), "b": torch.tensor([0.0, 0.0])}
    lost["c"], kept["c"] = torch.tensor([0.6, 0.1, 0.65]), torch.zeros(3)
    # sorted 0.1 0.6 0.65 0.7, rate 0.5: entry int(4 * 0.5) = 2 is 0.65, strictly above: 0.7 alone, so k = 1
    # sorted kept 0.1 0.2 0.3 0.4 0.5 0.9: entry 1 is 0.2, strictly below: 0.1 alone
    important, useless = released.picks(kept, lost, 0.5)
    assert important["a"].tolist() == [False, False, True, False, False] and released.count(important) == 1
    assert useless["a"].tolist() == [False, True, False, False, False] and released.count(useless) == 1
    retained, complement = released.regroup(kept, lost, important, useless)
    assert retained["a"].tolist() == [True, False, True, True, True]
    assert complement["a"].tolist() == [False, True, False, False, False]
    assert complement["c"].tolist() == [True, True, True]


def test_released_threshold_takes_all_ties():
    masks = {"a": torch.tensor([0.0, 0.3, 0.3, 0.3, 0.5, 0.6]), "b": torch.tensor([0.7, 0.8, 0.9, 1.0, 1.1])}
    # ten nonzero, entry int(0.2 * 10) = 2 is 0.3: the three of 0.3 all go
    threshold = released.entry(masks, int(0.2 * released.count_nonzero(masks)))
    assert sum(int((m > threshold).sum()) for m in masks.values()) == 7


def test_cosine_of_sets():
    a, b = torch.tensor([1, 1, 0, 0], dtype=torch.bool), torch.tensor([1, 0, 1, 0], dtype=torch.bool)
    assert released.cosine(a, b) == 0.5
    assert released.cosine(a, torch.zeros(4, dtype=torch.bool)) == 0.0


@pytest.mark.parametrize("axes", ["joint", "weights"])
def test_released_search_hands_on_the_unrefined_mask_and_all_edges(tiny, tiny_config, axes):
    run = run_search(tiny, tiny_config(preset="released", rounds=3, exchange_weights=0.1, axes=axes))
    imp = events(run, "imp")
    weights = [264, *(e["weights_kept"] for e in imp)]
    for before, after in zip(weights, weights[1:], strict=False):
        assert after <= before - int(0.2 * before) - 1
    assert all(e["edges_kept"] == tiny.graph.num_edges for e in (*imp, *run.rounds))
    assert all(1 <= r["candidate"] <= 3 for r in run.rounds[1:])
    for event in events(run, "ace_round"):
        if event["weights_fired"]:
            assert event["weights_overlap"] > 0.6


def test_two_draws_of_the_noise_are_compared_without_changing_the_search(tiny, tiny_config):
    plain = run_search(tiny, tiny_config(method="ugs"))
    checked = run_search(tiny, tiny_config(method="ugs", noise_check=1))
    first, second = (event for event in checked.history if event["event"] == "imp")
    assert 0 <= first["edges_agreement"] < 1 and 0 <= first["weights_agreement"] < 1
    assert "edges_agreement" not in second
    assert checked.rounds == plain.rounds
    silent = run_search(tiny, tiny_config(method="ugs", noise_check=1, mask_noise=0.0))
    assert [silent.history[1][f"{axis}_agreement"] for axis in ("edges", "weights")] == [1.0, 1.0]


def test_rounds_tell_homophily_and_degrees_of_what_is_kept_and_removed(tiny, tiny_config):
    run = run_search(tiny, tiny_config(method="ugs"))
    last, ticket = run.rounds[-1], run.ticket(2)
    src, dst = tiny.graph.edge_index().tolist()
    degree = [dst.count(node) for node in range(tiny.num_nodes)]
    for name, flag in (("kept", True), ("removed", False)):
        ends = [(s, d) for s, d, kept in zip(src, dst, ticket.edge_keep.tolist()) if kept == flag]
        alike = sum(int(tiny.y[s] == tiny.y[d]) for s, d in ends) / len(ends)
        mean_degree = sum(degree[s] + degree[d] for s, d in ends) / 2 / len(ends)
        assert last[f"edges_homophily_{name}"] == pytest.approx(alike)
        assert last[f"edges_degree_{name}"] == pytest.approx(mean_degree)
    assert "edges_degree_kept" not in run_search(tiny, tiny_config(method="ugs", axes="weights")).rounds[-1]


def test_carried_importance_is_the_moving_mean_of_standardised_scores(tiny, tiny_config):
    config = tiny_config(carry=0.25)
    search, state = prepare(tiny, config, None, lambda event: None), State(round=1)
    full = search.full()
    fit = search.train_masks(state, "imp", "imp", full, 2)
    first = search.scores(state, "imp", "imp", fit, full)
    second = search.scores(state, "imp", "imp", fit, full)
    plain = standardise(fit.masks.map(torch.Tensor.abs).axis("weights"), full.axis("weights"), "zscore")
    for z, one, two in zip(plain, first.axis("weights"), second.axis("weights"), strict=True):
        torch.testing.assert_close(one, 0.75 * z)
        torch.testing.assert_close(two, (0.25 * 0.75 + 0.75) * z)
    run = run_search(tiny, config)
    assert run.rounds != run_search(tiny, tiny_config()).rounds
    assert run.rounds == run_search(tiny, config).rounds
