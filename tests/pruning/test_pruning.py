import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from acefast.errors import InputError
from acefast.pruning import (
    AXES,
    SCORES,
    Pattern,
    Score,
    SoftMasks,
    cubic,
    exchange,
    exchange_count,
    ladder,
    mean_rank_of_picks,
    one_shot,
    prune,
    prune_count,
    score,
    spread,
    standardise,
)


def generators(seed):
    return lambda name: torch.Generator().manual_seed(seed + len(name))


def random_pattern(seed=0, edges=50, shapes=((6, 7), (3, 6))):
    g = torch.Generator().manual_seed(seed)
    weights = {f"w{i}": torch.rand(shape, generator=g) < 0.6 for i, shape in enumerate(shapes)}
    return Pattern(torch.rand(edges, generator=g) < 0.7, weights)


def test_ladder_removes_the_floor_exactly():
    kept = ladder(737_280, 0.2, 20)
    assert kept[:3] == [737_280, 589_824, 471_860]
    edges = ladder(10_556, 0.05, 20)
    for series, p in ((kept, 0.2), (edges, 0.05)):
        assert all(after == before - math.floor(p * before) for before, after in zip(series, series[1:], strict=False))
    assert prune_count(100, 0.29) == 29  # 0.29 * 100 is 28.999... in binary floating point
    assert ladder(1, 0.2, 3) == [1, 1, 1, 1]


fractions = st.decimals(0, 1, places=3).map(float)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**12), fractions, st.integers(1, 12))
def test_schedules_never_rise_and_end_where_they_say(total, sparsity, rounds):
    for schedule in (ladder, one_shot, cubic):
        kept = schedule(total, sparsity, rounds)
        assert len(kept) == rounds + 1 and kept[0] == total and all(type(count) is int for count in kept)
        assert all(before >= after >= 0 for before, after in zip(kept, kept[1:], strict=False))
    assert one_shot(total, sparsity, rounds)[1:] == [total - prune_count(total, sparsity)] * rounds
    assert cubic(total, sparsity, rounds)[-1] == total - prune_count(total, sparsity)
    assert cubic(total, sparsity, 1) == one_shot(total, sparsity) == ladder(total, sparsity, 1)


def test_cubic_follows_its_formula():
    assert cubic(1000, 0.8, 4) == [1000, 538, 300, 213, 200]  # 0.8 (1 - (1 - t/4)^3) = 0, 0.4625, 0.7, 0.7875, 0.8
    assert cubic(1000, 0.8, 2, initial=0.5) == [500, 238, 200]
    for wrong in (dict(sparsity=1.2), dict(sparsity=0.2, initial=0.3), dict(sparsity=0.2, rounds=0)):
        with pytest.raises(InputError, match="cubic"):
            cubic(**{"total": 10, "rounds": 3, **wrong})


def test_exchange_count():
    assert exchange_count(0.02, 900, 100) == 2
    assert exchange_count(0.02, 900, 10) == 1
    assert exchange_count(0.02, 900, 0) == exchange_count(0.0, 900, 100) == 0


@pytest.mark.parametrize("ties", [False, True])
def test_prune_takes_exactly_the_lowest_kept_ties_by_position(ties):
    for seed in range(20):
        pattern = random_pattern(seed)
        g = torch.Generator().manual_seed(seed)
        drawn = [torch.rand(k.shape, generator=g) for k in (pattern.edges, *pattern.weights.values())]
        drawn = [(3 * values).floor() if ties else values for values in drawn]
        scores = SoftMasks(drawn[0], dict(zip(pattern.weights, drawn[1:], strict=True)))
        after = prune(pattern, scores, {"edges": 0.05, "weights": 0.2})
        for axis, p in (("edges", 0.05), ("weights", 0.2)):
            kept = torch.cat([t.flatten() for t in pattern.axis(axis)])
            flat = torch.cat([t.flatten() for t in scores.axis(axis)])
            count = math.floor(p * int(kept.sum()))
            index = kept.nonzero().flatten()
            lowest = index[torch.sort(flat[index], stable=True).indices[:count]]
            expected = kept.clone()
            expected[lowest] = False
            assert torch.equal(torch.cat([t.flatten() for t in after.axis(axis)]), expected)


def test_protected_elements_go_last():
    pattern = Pattern(torch.ones(10, dtype=torch.bool), {})
    protected = Pattern(torch.arange(10) < 4, {})
    after = prune(pattern, SoftMasks(torch.arange(10.0), {}), {"edges": 0.5}, protected)
    assert after.edges.tolist() == [True] * 4 + [False] * 5 + [True]
    after = prune(pattern, SoftMasks(torch.arange(10.0), {}), {"edges": 0.8}, protected)
    assert after.kept("edges") == 2 and bool((after.edges <= protected.edges).all())


@pytest.mark.parametrize("tau", [0.0, 0.1, 1.0])
def test_exchanges_keep_counts_and_complements(tau):
    pattern = random_pattern(1)
    for number in range(100):
        for axis in AXES:
            g = torch.Generator().manual_seed(number)
            keep = pattern.axis(axis)
            scores = [torch.randn(k.shape, generator=g) for k in keep]
            new, erased, mined = exchange(keep, scores, 3, tau, number)
            after = pattern.with_axis(axis, new)
            assert after.kept(axis) == pattern.kept(axis)
            assert sum(int(e.sum()) for e in erased) == sum(int(m.sum()) for m in mined) == 3
            for k, n, e, m in zip(keep, new, erased, mined, strict=True):
                assert not bool((e & ~k).any()) and not bool((m & k).any()) and torch.equal(n, (k & ~e) | m)
            pattern = after
            complement = pattern.complement()
            assert all(bool((a ^ b).all()) for a, b in zip(pattern.axis(axis), complement.axis(axis), strict=True))


def test_complement_of_one_axis_leaves_the_other_whole():
    pattern = random_pattern(2)
    one = pattern.complement(("edges",))
    assert torch.equal(one.edges, ~pattern.edges)
    assert one.kept("weights") == one.total("weights")


def test_soft_masks_start_near_one_on_kept_elements_only():
    pattern = random_pattern(3)
    masks = SoftMasks.init(pattern, 1e-5, generators(0))
    for keep, mask in zip(
        [pattern.edges, *pattern.weights.values()], [masks.edges, *masks.weights.values()], strict=True
    ):
        assert bool((mask[~keep] == 0).all())
        assert bool(((mask[keep] - 1).abs() <= 1.01e-5).all()) and len(mask[keep].unique()) > 1
    alone = SoftMasks.init(pattern, 0.0, generators(0), ("weights",))
    assert alone.edges is None
    assert all(torch.equal(m, k.float()) for m, k in zip(alone.weights.values(), pattern.weights.values(), strict=True))


def test_scores():
    masks = SoftMasks(torch.tensor([-2.0, 1.0]), {"w": torch.tensor([[3.0, -1.0]])})
    weights = {"w": torch.tensor([[-0.5, 4.0]])}
    gradients = SoftMasks(torch.tensor([0.1, -0.2]), {"w": torch.tensor([[2.0, -3.0]])})
    expected = {
        "magnitude": ([2, 1], [[3, 1]]),
        "product": ([2, 1], [[1.5, 4]]),
        "gradient": ([0.1, 0.2], [[2, 3]]),
        "combined": ([0.2, 0.2], [[3, 12]]),
    }
    for name, (edges, w) in expected.items():
        result = score(name, masks, weights, gradients)
        assert torch.allclose(result.edges, torch.tensor(edges, dtype=torch.float32))
        assert torch.allclose(result.weights["w"], torch.tensor(w, dtype=torch.float32))
    drawn = [score("random", masks, make=generators(5)) for _ in range(2)]
    assert torch.equal(drawn[0].edges, drawn[1].edges) and drawn[0].weights["w"].shape == (1, 2)


def test_scores_are_named_or_given_and_checked(monkeypatch):
    masks = SoftMasks(torch.tensor([-2.0, 1.0]), {"w": torch.tensor([[3.0, -1.0]])})
    square = Score(lambda of: of.mask.square())
    monkeypatch.setitem(SCORES, "square", square)
    for name in ("square", square):
        assert score(name, masks).edges.tolist() == [4, 1]
    with pytest.raises(InputError, match="score must be one of magnitude, .*square, got 'size'"):
        score("size", masks)
    for name, words in (("product", "weights"), ("combined", "weights and gradients"), ("random", "generators")):
        with pytest.raises(InputError, match=f"needs {words}, which"):
            score(name, masks)
    assert score("product", SoftMasks(masks.edges, {})).edges.tolist() == [2, 1]
    with pytest.raises(InputError, match="needs must be of weights"):
        Score(lambda of: of.mask, ("gradient",))


@pytest.mark.parametrize("how", ["zscore", "rank"])
def test_standardised_scores_have_mean_0_and_deviation_1_over_the_set(how):
    pattern = random_pattern(4)
    g = torch.Generator().manual_seed(0)
    raw = [1 + 1e-5 * torch.rand(k.shape, generator=g) for k in pattern.axis("weights")]
    result = standardise(raw, pattern.axis("weights"), how)
    values = torch.cat([r[k] for r, k in zip(result, pattern.axis("weights"), strict=True)])
    assert abs(float(values.mean())) < 1e-5 and float(values.std(correction=0)) == pytest.approx(1, abs=1e-4)
    flat = torch.cat([r[k] for r, k in zip(raw, pattern.axis("weights"), strict=True)])
    assert torch.equal(values.argsort(stable=True), flat.argsort(stable=True))
    assert all(bool((r[~k] == 0).all()) for r, k in zip(result, pattern.axis("weights"), strict=True))


def test_standardising_equal_scores_gives_zeros():
    alive = [torch.ones(5, dtype=torch.bool)]
    for how in ("zscore", "rank"):
        assert standardise([torch.full((5,), 0.1)], alive, how)[0].tolist() == [0.0] * 5
        assert standardise([torch.rand(5)], [~alive[0]], how)[0].tolist() == [0.0] * 5


def test_mean_rank_of_picks():
    scores, alive = [torch.arange(10.0), torch.arange(10.0, 20.0)], [torch.ones(10, dtype=torch.bool)] * 2
    picked = [torch.arange(10) < 0, torch.arange(10) >= 8]  # the two largest of 20
    assert mean_rank_of_picks(scores, alive, picked, largest=True) == pytest.approx(0.5 / 19)
    assert mean_rank_of_picks(scores, alive, picked, largest=False) == pytest.approx(18.5 / 19)
    assert mean_rank_of_picks(scores, alive, alive, largest=True) == pytest.approx(0.5)
    equal = [torch.zeros(10), torch.zeros(10)]
    assert mean_rank_of_picks(equal, alive, picked, largest=True) == pytest.approx(0.5)
    assert mean_rank_of_picks(scores, alive, [~a for a in alive], largest=True) is None


def test_mean_rank_agrees_with_sorting():
    g = torch.Generator().manual_seed(1)
    values = torch.randint(0, 50, (400,), generator=g).float()
    alive, picked = torch.rand(400, generator=g) < 0.7, torch.rand(400, generator=g) < 0.1
    picked &= alive
    pool = values[alive]
    midranks = [(float((pool < v).sum()) + float((pool <= v).sum()) - 1) / 2 for v in values[picked]]
    expected = sum(midranks) / len(midranks) / (pool.numel() - 1)
    assert mean_rank_of_picks([values], [alive], [picked], largest=False) == pytest.approx(expected)


def test_spread():
    assert spread([torch.tensor([1.0, 3.0, 100.0])], [torch.tensor([True, True, False])]) == 1.0
    assert spread([torch.ones(3)], [torch.zeros(3, dtype=torch.bool)]) == 0.0


def test_flat_round_trip():
    pattern = random_pattern(6)
    again = Pattern.from_flat("keep", {**pattern.flat("keep"), **pattern.flat("other")})
    assert torch.equal(again.edges, pattern.edges) and list(again.weights) == list(pattern.weights)
    assert all(torch.equal(again.weights[name], pattern.weights[name]) for name in pattern.weights)


def test_scores_of_edges_by_predictions():
    masks = SoftMasks(torch.ones(3), {"w": torch.tensor([[0.5, -2.0]])})
    agreement, degrees = torch.tensor([0.9, 0.5, 0.1]), (torch.tensor([3.0, 0.0, 1.0]), torch.tensor([0.0, 1.0, 4.0]))
    for name, expected in {
        "agreement": agreement,
        "influence": torch.tensor([0.9 / 2, 0.5 / 2**0.5, 0.1 / 10**0.5]),
        "share": torch.tensor([0.9, 0.25, 0.02]),
    }.items():
        found = score("magnitude", masks, predictions=(agreement, degrees), edges=name)
        torch.testing.assert_close(found.edges, expected)
        assert torch.equal(found.weights["w"], masks.weights["w"].abs())
    with pytest.raises(InputError, match="needs predictions"):
        score("magnitude", masks, edges="share")
