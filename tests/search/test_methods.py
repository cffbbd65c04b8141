"""The other methods: random tickets, early birds, the controls, and one of your own by the documented recipe."""

import inspect

import pytest
import torch

from acefast.errors import InputError
from acefast.pruning import Pattern, SoftMasks, ladder, prune_to
from acefast import report
from acefast.search import METHODS, find_ticket, gebt, resolve_config, run_search
from acefast.search.stages import imp, log, retrain
from tests.stopping import Stop, stop_after


def epochs_of(run) -> list[int]:
    """Trained epochs by round."""
    rounds = max(line["round"] for line in run.timings) + 1
    return [sum(line["epochs"] for line in run.timings if line["round"] == k) for k in range(rounds)]


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"dense"}))
@pytest.mark.parametrize("axes", ["joint", "edges", "weights"])
def test_every_method_stands_on_the_ladder(tiny, tiny_config, method, axes):
    run = run_search(tiny, tiny_config(method=method, axes=axes))
    counts = {"edges": ladder(tiny.graph.num_edges, 0.05, 2), "weights": ladder(8 * (30 + 3), 0.2, 2)}
    for axis, expected in counts.items():
        swept = axes in (axis, "joint")
        assert [r[f"{axis}_kept"] for r in run.rounds] == (expected if swept else expected[:1] * 3)
    again = run_search(tiny, tiny_config(method=method, axes=axes))
    assert again.history == run.history, "the seed decides everything"


@pytest.mark.parametrize("method", ["gebt", "ugs-best", "ace-random"])
def test_a_stopped_search_goes_on_to_the_same_history(tiny, tiny_config, tmp_path, method):
    config = tiny_config(method=method, carry=0.5)
    whole = run_search(tiny, config)
    for count in (2, 1, 1):
        with pytest.raises(Stop):
            run_search(tiny, config, tmp_path, stop_after(count, "stage_end"))
    assert run_search(tiny, config, tmp_path).history == whole.history


def test_random_tickets_are_fresh_choices_at_each_rung(tiny, tiny_config):
    config = tiny_config(method="random", prune_edges=0.5, prune_weights=0.5)
    run = run_search(tiny, config)
    one, two = (ticket.edge_keep for ticket in run.tickets)
    kept_again = int((one & two).sum()) / int(two.sum())
    assert 0.3 < kept_again < 0.7, "not a part of the rung before"
    assert epochs_of(run) == [4, 4, 4]


@pytest.mark.parametrize("complement, models", [("joint", 1), ("crossed", 2), ("none", 0)])
def test_controls_have_the_epochs_of_ace(tiny, tiny_config, complement, models):
    budget = epochs_of(run_search(tiny, tiny_config(method="ace", complement=complement)))
    assert epochs_of(run_search(tiny, tiny_config(method="ugs-epochs", complement=complement))) == budget
    assert epochs_of(run_search(tiny, tiny_config(method="ugs-best", complement=complement))) == budget
    without_complements = [budget[0], *(epochs - 3 * 2 * models for epochs in budget[1:])]
    assert epochs_of(run_search(tiny, tiny_config(method="ace-random", complement=complement))) == without_complements


def test_best_of_n_takes_the_best_candidate_and_draws_around_the_pruning(tiny, tiny_config):
    run = run_search(tiny, tiny_config(method="ugs-best", tau=1.0, prune_edges=0.3, prune_weights=0.3))
    for number, event in enumerate(run.rounds[1:], 1):
        candidates = [e for e in run.history if e["event"] == "candidate" and e["round"] == number]
        assert [e["candidate"] for e in candidates] == [0, 1, 2, 3]
        best = max(candidates, key=lambda e: (e["val"], -e["val_loss"], -e["candidate"]))
        assert event["candidate"] == best["candidate"]
        assert (event["exchanged"] == 0) == (best["candidate"] == 0)
    plain = run_search(tiny, tiny_config(method="ugs-best", tau=0.0))
    assert all(r["exchanged"] in (0, None) for r in plain.rounds), "without temperature all candidates are the first one"


def test_random_exchange_moves_as_much_as_ace_and_picks_without_preference(tiny, tiny_config):
    settings = dict(prune_edges=0.3, prune_weights=0.3, ace_rounds=6, stop_overlap=1.0)
    counts = {}
    for method in ("ace", "ace-random"):
        run = run_search(tiny, tiny_config(method=method, **settings))
        moves = [e for e in run.history if e["event"] == "ace_round"]
        counts[method] = [(e["edges_exchanged"], e["weights_exchanged"]) for e in moves]
        assert "complement_val" not in moves[0] or method == "ace"
    assert counts["ace"] == counts["ace-random"]


def test_early_birds_stop_when_their_draws_agree(tiny, tiny_config):
    calm = run_search(tiny, tiny_config(method="gebt", rounds=1, mask_epochs=9, prune_weights=0.04))
    assert epochs_of(calm) == [4, gebt.WINDOW + 4], "draws that leave away 5 % and 4 % cannot differ in 10 %"
    event = next(e for e in calm.history if e["event"] == "early_bird")
    assert event["distance"] < gebt.DISTANCE and event["best_epoch"] == gebt.WINDOW - 1
    short = run_search(tiny, tiny_config(method="gebt", rounds=1, mask_epochs=gebt.WINDOW - 1))
    event = next(e for e in short.history if e["event"] == "early_bird")
    assert event["best_epoch"] == gebt.WINDOW - 2, "too few draws: the last epoch's"


def test_distance_is_the_largest_normalised_hamming_distance():
    def pattern(edges, weights):
        return Pattern(torch.tensor(edges) > 0, {"w": torch.tensor(weights) > 0})

    draws = [pattern([1, 1, 0, 0], [1, 1]), pattern([1, 0, 1, 0], [1, 1]), pattern([0, 0, 1, 1], [1, 1])]
    assert gebt.distance(draws, ("edges", "weights")) == 1.0
    assert gebt.distance(draws[:2], ("edges",)) == 0.5
    assert gebt.distance(draws, ("weights",)) == 0.0


def test_the_early_bird_is_drawn_from_the_masks_of_the_epoch_at_which_training_ended(tiny, tiny_config):
    """The recipe's hook: `until` sees the masks of each epoch, the last of which the fit holds."""
    seen = []

    def watch(search, state):
        def until(masks):
            seen.append(masks.map(torch.clone))
            return len(seen) == 3

        fit = search.train_masks(state, "watch", "watch", search.full(), 9, until=until)
        assert fit.best_epoch == 2
        for one, two in zip(fit.masks.axis("weights") + fit.masks.axis("edges"), seen[-1].axis("weights") + seen[-1].axis("edges")):
            assert torch.equal(one, two)

    run_search(tiny, tiny_config(method="ugs", rounds=1), method=lambda config: [("watch", watch), ("imp", imp), ("retrain", retrain)])
    assert len(seen) == 3


# A method by the recipe, from here ...
def from_both_ends(config):
    """Edges by how many neighbours their ends have, weights by their first size: nothing is trained to find them."""
    return [("prune", prune_by_size), ("retrain", retrain)]


def prune_by_size(search, state):
    src, dst = search.data.graph.edge_index()
    degree = search.data.graph.in_degrees().float()
    kept = state.get("keep")
    scores = SoftMasks(-(degree[src] + degree[dst]), {name: search.start[name].abs() for name in kept.weights})
    counts = {axis: int(0.7 * kept.kept(axis)) for axis in search.axes}
    after = prune_to(kept, scores, counts)
    state.put("keep", after)
    log(search, state, "pruned", **after.counts())
# ... to here


def test_the_recipe_adds_a_method_in_under_40_lines(tiny, tmp_path, monkeypatch):
    lines = sum(len(inspect.getsource(f).splitlines()) for f in (from_both_ends, prune_by_size))
    assert lines < 40
    monkeypatch.setitem(METHODS, "by-size", from_both_ends)
    run = find_ticket(tiny, method="by-size", rounds=3, hidden=8, fix_epochs=3, threads=1, out=tmp_path)
    total = tiny.graph.num_edges
    assert [r["edges_kept"] for r in run.rounds] == [total, int(0.7 * total), int(0.7 * int(0.7 * total)), run.rounds[3]["edges_kept"]]
    ticket = run.ticket(3)
    first = torch.cat([ticket.rewind[name].abs().flatten() for name in ticket.weight_keep])
    keep = torch.cat([kept.flatten() for kept in ticket.weight_keep.values()])
    assert first[keep].min() >= first[~keep].max()
    groups = report.read_groups([tmp_path])
    report.write(groups)
    assert "by-size" in (tmp_path / "report.md").read_text()


def test_unknown_methods_are_refused_with_their_names():
    with pytest.raises(InputError, match="method must be one of dense, random, ugs, gebt, ace, .*, got 'other'"):
        resolve_config(method="other")
    with pytest.raises(InputError, match="must be ace or dense, got 'gebt'"):
        resolve_config(method="gebt", preset="released")
