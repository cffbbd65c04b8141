"""topk_mask, gumbel_topk and exchange: exactly k, the right ones, the same everywhere."""

import collections
import itertools

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from acefast import InputError, backend, ops
from acefast.ops import reference

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def by_sorting(scores, k, alive, largest, by):
    """The expected picks by a Python sort on (score, position)."""
    flat = torch.cat([s.reshape(-1) for s in scores]).double()
    flat = flat.abs() if by == "magnitude" else flat
    living = [True] * len(flat) if alive is None else torch.cat([a.reshape(-1) for a in alive]).tolist()
    order = sorted((i for i in range(len(flat)) if living[i]), key=lambda i: (-flat[i] if largest else flat[i], i))
    picked = torch.zeros(len(flat), dtype=torch.bool)
    picked[order[:k]] = True
    return picked


def by_threshold(scores, k, alive, largest, by):
    """The same of large inputs by numpy's partition, in order of position."""
    flat = torch.cat([s.reshape(-1) for s in scores]).double().numpy()
    value = np.abs(flat) if by == "magnitude" else flat
    value = value if largest else -value
    living = np.ones(len(flat), bool) if alive is None else torch.cat([a.reshape(-1) for a in alive]).numpy()
    picked = np.zeros(len(flat), bool)
    if k:
        threshold = -np.partition(-value[living], k - 1)[k - 1]
        picked |= living & (value > threshold)
        picked[np.flatnonzero(living & (value == threshold))[: k - picked.sum()]] = True
    return torch.from_numpy(picked)


def flat(masks):
    return torch.cat([m.reshape(-1) for m in masks])


def on_threads(threads, call, *arguments, **named):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return call(*arguments, **named)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("largest", "by"), list(itertools.product([True, False], ["magnitude", "value"])))
@pytest.mark.parametrize("kind", ["random", "fresh_mask", "equal", "special"])
def test_picks_are_those_of_a_sort(each_backend, dtype, largest, by, kind):
    generator = torch.Generator().manual_seed(5)
    shapes = [(7, 5), (0,), (64,), (1,), (3, 4, 5)]
    special = torch.tensor([0.0, -0.0, 1e-42, -1e-42, torch.inf, -torch.inf, 1.0, -1.0, 6e-8, 65504.0])
    scores = []
    for shape in shapes:
        s = {
            "random": torch.randn(shape, generator=generator),
            "fresh_mask": 1 + (torch.rand(shape, generator=generator) - 0.5) * 2e-5,
            "equal": torch.full(shape, -3.0),
            "special": special[torch.randint(0, len(special), shape, generator=generator)],
        }[kind]
        scores.append(s.to(dtype))
    alive = [torch.rand(shape, generator=generator) < 0.7 for shape in shapes]
    for living in (None, alive):
        total = int(flat(living).sum()) if living else sum(s.numel() for s in scores)
        for k in sorted({0, 1, total // 3, total - 1, total}):
            found = flat(ops.topk_mask(scores, k, living, largest, by))
            assert torch.equal(found, by_sorting(scores, k, living, largest, by)), f"k={k}"


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_property_exactly_k(data):
    sizes = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=5))
    values = st.floats(allow_nan=False, width=32)
    scores = [torch.tensor(data.draw(st.lists(values, min_size=n, max_size=n)), dtype=torch.float32) for n in sizes]
    alive = [torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)), dtype=torch.bool) for n in sizes]
    k = data.draw(st.integers(0, int(flat(alive).sum())))
    largest, by = data.draw(st.booleans()), data.draw(st.sampled_from(["magnitude", "value"]))
    expected = by_sorting(scores, k, alive, largest, by)
    for name in ("auto", "torch"):
        with backend(name):
            assert torch.equal(flat(ops.topk_mask(scores, k, alive, largest, by)), expected)


def sampled_places(size):
    """Where the CPU kernel's sample reads (csrc/cpu/selection.h); were it to read elsewhere, its bracket would just be good."""
    strata = int(size ** (2 / 3) / 2)
    jitter = reference.random_words(0, strata, 0, 0, "cpu").double() * 2.0**-32
    return ((torch.arange(strata).double() + jitter) * (size / strata)).long().clamp(max=size - 1)


LARGE = 1_300_003  # five times as many as the CPU kernel settles without another pass


def large_scores(kind, dtype):
    draw = torch.Generator().manual_seed(9)
    place = sampled_places(LARGE)
    if kind == "random":
        return torch.randn(LARGE, generator=draw).to(dtype)
    if kind == "fresh mask":
        return (1 + (torch.rand(LARGE, generator=draw, dtype=torch.float64) - 0.5) * 2e-5).to(dtype)
    if kind == "equal":
        return torch.full((LARGE,), -2.0, dtype=dtype)
    if kind == "few values":
        return (1 + torch.randint(0, 6, (LARGE,), generator=draw) * torch.finfo(dtype).eps).to(dtype)
    if kind == "one value among many":  # in the middle of neighbours, so many that it needs another pass
        steps = torch.randint(-60, 60, (LARGE,), generator=draw).double() * (torch.rand(LARGE, generator=draw) < 0.6)
        return (1.5 + steps * torch.finfo(dtype).eps).to(dtype)
    if kind == "ascending":
        return torch.arange(LARGE, dtype=torch.float64).to(dtype) / 2**5
    scores = torch.rand(LARGE, generator=draw, dtype=torch.float64)
    if kind == "sample of the lowest":
        scores[place] = 0.0
    elif kind == "sample of the highest":
        scores[place] = 1e4
    elif kind == "sample of one middle value":
        scores[place] = 0.5
    elif kind == "one middle value but for the sample":
        scores = torch.full_like(scores, 0.5).index_copy(0, place, scores[place])
    elif kind == "half zeros":
        scores *= torch.rand(LARGE, generator=draw) < 0.5
    return scores.to(dtype)


KINDS = [
    "random", "fresh mask", "equal", "few values", "one value among many", "ascending", "half zeros", "sample of the lowest",
    "sample of the highest", "sample of one middle value", "one middle value but for the sample",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_inputs_take_the_right_picks_on_any_number_of_threads(kind, dtype):
    """Whatever the sample of the scores promises: brackets that miss to either side, that hold too many, that hold one value."""
    scores = list(large_scores(kind, dtype).split([500_001, 0, 7, LARGE - 500_008]))
    draw = torch.Generator().manual_seed(2)
    alive = [torch.rand(s.shape, generator=draw) < 0.8 for s in scores] if dtype in (torch.float32, torch.bfloat16) else None
    total = int(flat(alive).sum()) if alive else LARGE
    for k, largest, by in (
        (total // 5, False, "magnitude"), (total // 2, True, "value"), (total - 3, True, "magnitude"), (total, False, "value"),
    ):  # fmt: skip
        expected = by_threshold(scores, k, alive, largest, by)
        for threads in (1, 2):
            found = on_threads(threads, ops.topk_mask, scores, k, alive, largest, by)
            assert torch.equal(flat(found), expected), (k, largest, by, threads)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_property_of_lists_that_are_sampled(data):
    sizes = data.draw(st.lists(st.integers(0, 40_000), min_size=1, max_size=4)) + [16_384]
    levels = data.draw(st.sampled_from([1, 2, 40, 3_000, 10**9]))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    dtype = data.draw(st.sampled_from(DTYPES))
    scale = data.draw(st.sampled_from([1e-42, 1.0, 1e30]))
    scores = [((torch.randint(0, levels, (n,), generator=draw) - levels // 2) / levels * scale).to(dtype) for n in sizes]
    alive = [torch.rand(n, generator=draw) < data.draw(st.sampled_from([0.01, 0.5, 1.0])) for n in sizes]
    total = int(flat(alive).sum())
    k = data.draw(st.integers(0, total) | st.integers(max(0, total - 3), total))
    largest, by = data.draw(st.booleans()), data.draw(st.sampled_from(["magnitude", "value"]))
    expected = by_threshold(scores, k, alive, largest, by)
    for name in ("auto", "torch"):
        with backend(name):
            assert torch.equal(flat(ops.topk_mask(scores, k, alive, largest, by)), expected)


def test_the_two_ways_of_expecting_agree():
    draw = torch.Generator().manual_seed(6)
    for levels in (3, 1000):
        scores = [torch.randint(-levels, levels, (n,), generator=draw).float() for n in (500, 0, 300)]
        alive = [torch.rand(s.shape, generator=draw) < 0.5 for s in scores]
        for k, largest, by in itertools.product((0, 1, 77, int(flat(alive).sum())), (True, False), ("magnitude", "value")):
            arguments = scores, k, alive, largest, by
            assert torch.equal(by_threshold(*arguments), by_sorting(*arguments))


def test_large_inputs_are_refused_whole(each_backend):
    scores = [torch.rand(20_000), torch.rand(30_000)]
    alive = [torch.ones(20_000, dtype=torch.bool), torch.arange(30_000) < 10_000]
    for k in (30_001, 50_000):
        with pytest.raises(InputError, match=f"selectable elements, got {k}"):
            ops.topk_mask(scores, k, alive)
        assert not flat(ops.topk_mask(scores, k, alive, check=False)).any()
    scores[1][20_000] = torch.nan
    assert int(flat(ops.topk_mask(scores, 30_000, alive)).sum()) == 30_000  # a NaN that is not alive
    for k in (0, 5, 50_000):
        with pytest.raises(InputError, match="NaN"):
            ops.topk_mask(scores, k)
        assert not flat(ops.topk_mask(scores, k, check=False)).any()


def test_out_receives_the_picks(each_backend):
    draw = torch.Generator().manual_seed(8)
    scores = [torch.randn(40, 500, generator=draw), torch.randn(0), torch.randn(7_001, generator=draw)]
    alive = [torch.rand(s.shape, generator=draw) < 0.6 for s in scores]
    expected = ops.topk_mask(scores, 9_000, alive)
    buffer = torch.ones(30_000, dtype=torch.bool)
    cuts = [buffer[:20_000].view(40, 500), buffer[:0], buffer[20_000:27_001]]  # side by side in one storage
    assert ops.topk_mask(scores, 9_000, alive, out=cuts) is cuts
    assert torch.equal(flat(cuts), flat(expected)) and bool(buffer[27_001:].all())
    given = [a.clone() for a in alive]
    assert ops.topk_mask(scores, 9_000, given, out=given) is given
    assert torch.equal(flat(given), flat(expected))
    flags = alive[2].clone()  # what is read overlaps what is written, one place on
    found = ops.topk_mask([scores[2][1:]], 2_000, [flags[:-1]], out=[flags[1:]])
    assert torch.equal(found[0], by_threshold([scores[2][1:]], 2_000, [alive[2][:-1]], True, "magnitude"))
    with pytest.raises(InputError, match="NaN"):
        ops.topk_mask([torch.full((3,), torch.nan)], 1, out=[given[2][:3]])
    assert not given[2][:3].any()
    for out, words in (
        ([torch.ones(3, 2, dtype=torch.bool).t(), buffer[:4]], r"out\[0\] must be contiguous, got strides"),
        ([buffer[:6].view(2, 3), buffer[5:9]], "out must be tensors that do not overlap each other"),
        ([buffer[:6].view(2, 3), buffer[:4]], "out must be tensors that do not overlap each other"),
        ([buffer[:6].view(2, 3)], "out must be a list of 2 bool tensors"),
        ([buffer[:6], buffer[6:10]], r"out\[0\] must have shape \[2, 3\]"),
        ([torch.ones(2, 3), buffer[:4]], r"out\[0\] must be torch.bool"),
    ):
        with pytest.raises(InputError, match=words):
            ops.topk_mask([torch.randn(2, 3), torch.randn(4)], 2, out=out)


def test_refusals(each_backend):
    s = [torch.randn(5), torch.randn(2, 3)]
    nan = [torch.tensor([1.0, torch.nan])]
    for arguments, words in (
        ((torch.randn(5), 1), "scores must be a non-empty list"),
        (([], 0), "scores must be a non-empty list"),
        (([torch.ones(3, dtype=torch.int64)], 1), "scores must be float32"),
        (([s[0], s[1].double()], 1), "share dtype and device"),
        ((s, 12), r"k must lie in \[0, 11\], got 12"),
        ((s, -1), r"k must lie in \[0, 11\], got -1"),
        ((s, 2.0), "k must be an integer"),
        ((s, 1, [torch.ones(5, dtype=torch.bool)]), "alive must be a list of 2"),
        ((s, 1, [torch.ones(5), torch.ones(2, 3)]), r"alive\[0\] must be torch.bool"),
        ((s, 5, [torch.zeros(5, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.bool)]), "number of selectable"),
        ((nan, 1), "NaN"),
    ):
        with pytest.raises(InputError, match=words):
            ops.topk_mask(*arguments)
    with pytest.raises(InputError, match="by must be one of"):
        ops.topk_mask(s, 1, by="size")
    dead_nan = ops.topk_mask(nan, 1, [torch.tensor([True, False])])
    assert dead_nan[0].tolist() == [True, False]


def test_unread_status_selects_nothing(each_backend):
    (keep,) = ops.topk_mask([torch.tensor([1.0, torch.nan, 2.0])], 2, check=False)
    assert not keep.any()


def test_opcheck(each_backend):
    scores = [torch.randn(4, 3), torch.randn(5)]
    alive = [torch.rand(4, 3) < 0.8, torch.rand(5) < 0.8]
    torch.library.opcheck(torch.ops.acefast.topk_mask, (scores, 3, alive, True, True))
    torch.library.opcheck(torch.ops.acefast.topk_mask, (scores, 3, None, False, False))
    out = [torch.zeros_like(a) for a in alive]
    torch.library.opcheck(torch.ops.acefast.topk_mask_out, (scores, 3, alive, True, True, out))
    torch.library.opcheck(torch.ops.acefast.gumbel_topk, (scores, 3, 0.5, 7, alive, True))
    torch.library.opcheck(torch.ops.acefast.exchange, (alive, scores, scores, 1, 0.5, 7))


def probabilities_of_sets(logits, k):
    """{picks: exact probability} of every set of k successive draws without replacement from softmax(logits)."""
    weight = torch.softmax(logits.double(), 0).tolist()
    sets = dict.fromkeys(itertools.combinations(range(len(weight)), k), 0.0)
    for order in itertools.permutations(range(len(weight)), k):
        probability, left = 1.0, 1.0
        for i in order:
            probability *= weight[i] / left
            left -= weight[i]
        sets[tuple(sorted(order))] += probability
    return sets


@pytest.mark.parametrize("largest", [True, False])
def test_gumbel_picks_follow_the_exact_distribution_of_sets(largest):
    """Chi-square of the counts of all ten sets of two of five, an element that is not alive apart."""
    scores, tau, k, draws = torch.tensor([0.0, 0.4, -0.7, 9.0, 1.1, 0.2]), 0.6, 2, 4000
    alive = torch.tensor([True, True, True, False, True, True])
    logits = scores[alive] / tau
    expected = probabilities_of_sets(logits if largest else -logits, k)
    seen = collections.Counter(
        tuple(ops.gumbel_topk([scores], k, tau, seed=seed, alive=[alive], largest=largest)[0][alive].nonzero().flatten().tolist())
        for seed in range(draws)
    )
    assert seen.keys() <= expected.keys() and min(expected.values()) * draws > 5
    square = sum((seen[picks] - draws * p) ** 2 / (draws * p) for picks, p in expected.items())
    assert scipy.stats.chi2.sf(square, len(expected) - 1) > 0.01, square


def test_noise_is_standard_gumbel_and_addressed_by_element():
    noise = reference.gumbel_noise(0, 400_000, 99, 0, "cpu").double()
    assert abs(float(noise.mean()) - 0.5772156649) < 5 * 1.2825 / 400_000**0.5
    assert abs(float(noise.var()) - 1.6449340668) < 0.02
    part = reference.gumbel_noise(12_345, 777, 99, 0, "cpu").double()
    assert torch.equal(part, noise[12_345 : 12_345 + 777])
    exact = -torch.log(-torch.log((reference.random_words(0, 1000, 99, 0, "cpu").double() + 0.5) / 2**32))
    assert torch.allclose(noise[:1000], exact, rtol=1e-5, atol=1e-6)


def test_noise_does_not_change_between_releases():
    """Histories depend on these bits."""
    noise = reference.gumbel_noise(0, 6, 2023, 0, "cpu")
    assert noise.view(torch.int32).tolist() == NOISE_BITS


NOISE_BITS = [1070126394, 1058906296, -1090619290, 1060942955, 1054541589, 1058281920]


def test_gumbel_tau_zero_is_topk_and_lists_equal_concatenation(each_backend):
    scores = [torch.randn(6, 5), torch.randn(31)]
    assert torch.equal(flat(ops.gumbel_topk(scores, 9, 0.0, seed=3)), flat(ops.topk_mask(scores, 9, by="value")))
    whole = ops.gumbel_topk([torch.cat([s.reshape(-1) for s in scores])], 9, 0.3, seed=3)
    assert torch.equal(flat(ops.gumbel_topk(scores, 9, 0.3, seed=3)), whole[0])


def test_exchange_invariants(each_backend):
    generator = torch.Generator().manual_seed(0)
    shapes = [(20, 30), (77,)]
    keep = [torch.rand(shape, generator=generator) < 0.8 for shape in shapes]
    count = int(flat(keep).sum())
    for round_ in range(100):
        kept = [torch.randn(shape, generator=generator) for shape in shapes]
        pruned = [torch.randn(shape, generator=generator) for shape in shapes]
        new, erased, mined = ops.exchange(keep, kept, pruned, 11, 0.1, seed=round_)
        old_flat, new_flat, out, into = map(flat, (keep, new, erased, mined))
        assert int(new_flat.sum()) == count and int(out.sum()) == int(into.sum()) == 11
        assert bool((out & ~old_flat).sum() == 0) and bool((into & old_flat).sum() == 0)
        assert torch.equal(new_flat, (old_flat & ~out) | into)
        keep = new


def test_exchange_at_tau_zero_takes_the_extremes():
    keep = [torch.tensor([True, True, True, False, False, False])]
    kept, pruned = [torch.tensor([3.0, 1.0, 2.0, -9, -9, -9])], [torch.tensor([9.0, 9, 9, 5.0, 7.0, 6.0])]
    new, erased, mined = ops.exchange(keep, kept, pruned, 1, 0.0, seed=0)
    assert erased[0].nonzero().item() == 1 and mined[0].nonzero().item() == 4
    assert new[0].tolist() == [True, False, True, False, True, False]
    with pytest.raises(InputError, match="k must not exceed"):
        ops.exchange(keep, kept, pruned, 4, 0.0, seed=0)
    with pytest.raises(InputError, match="tau must be"):
        ops.exchange(keep, kept, pruned, 1, -1.0, seed=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_backends_draw_the_same_noise(dtype):
    """The order of the perturbed scores, cut at many k, is the reference's: one differing bit in the noise would show."""
    generator = torch.Generator().manual_seed(4)
    sizes = (70_001, 0, 3, 29_999)
    scores = [(1 + 1e-3 * torch.rand(n, generator=generator)).to(dtype) for n in sizes]
    alive = [torch.rand(n, generator=generator) < 0.9 for n in sizes]
    other = [torch.rand(n, generator=generator).to(dtype) for n in sizes]
    before = torch.get_num_threads()
    for k in range(1, 80_000, 4_001):
        picks = []
        for name, threads in (("torch", before), ("auto", 1), ("auto", 2)):
            torch.set_num_threads(threads)
            with backend(name):
                largest = k % 2 == 0
                picks.append(flat(ops.gumbel_topk(scores, k, 0.5, seed=k, alive=alive, largest=largest)))
                if k < 8_000:
                    picks[-1] = torch.cat((picks[-1], *map(flat, ops.exchange(alive, scores, other, k, 0.2, seed=2**40 + k))))
        torch.set_num_threads(before)
        assert torch.equal(picks[0], picks[1]) and torch.equal(picks[0], picks[2]), f"k={k}"
