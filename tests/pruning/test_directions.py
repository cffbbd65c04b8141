"""The two directions of an undirected edge are found and pruned together: held against a slow plain implementation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from acefast import Graph
from acefast.errors import InputError
from acefast.pruning import Pairs, Pattern, SoftMasks, lowest_tied, prune
from tests.inputs import graphs

edge_lists = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=24)


def graph_of(edges, num_nodes=5):
    return Graph.from_edge_index(torch.tensor(edges, dtype=torch.int64).view(-1, 2).t(), num_nodes)


def plain_reverse(edges):
    waiting, reverse = {}, list(range(len(edges)))
    for e, (i, j) in enumerate(edges):
        if i == j:
            continue
        if waiting.get((j, i)):
            other = waiting[j, i].pop(0)
            reverse[e], reverse[other] = other, e
        else:
            waiting.setdefault((i, j), []).append(e)
    return reverse


def plain_lowest(edges, scores, count, alive):
    reverse, units = plain_reverse(edges), []
    for e, other in enumerate(reverse):
        members = [m for m in sorted({e, other}) if alive[m]]
        if members and e == min(e, other):
            units.append((sum(scores[m] for m in members) / len(members), e, members))
    picked = set()
    for _, _, members in sorted(units, key=lambda unit: unit[:2]):
        if len(picked) + len(members) > count:
            break
        picked |= set(members)
    return [e in picked for e in range(len(edges))]


@settings(max_examples=200, deadline=None)
@given(edge_lists)
def test_reverse_edges_agrees_with_matching_one_by_one(edges):
    g = graph_of(edges)
    reverse = g.reverse_edges()
    assert reverse.tolist() == plain_reverse(edges)
    assert torch.equal(reverse[reverse.long()], torch.arange(len(edges), dtype=reverse.dtype))


@settings(max_examples=200, deadline=None)
@given(edge_lists, st.data())
def test_lowest_tied_agrees_with_taking_pairs_one_by_one(edges, data):
    size = len(edges)
    values = st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0, float("inf")])
    scores = data.draw(st.lists(values, min_size=size, max_size=size))
    alive = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    scores = [s if a else float("nan") for s, a in zip(scores, alive, strict=True)]  # removed ones are not read
    count = data.draw(st.integers(0, sum(alive)))
    picked = lowest_tied(graph_of(edges), torch.tensor(scores), count, torch.tensor(alive, dtype=torch.bool))
    assert picked.tolist() == plain_lowest(edges, scores, count, alive)
    assert count - 1 <= int(picked.sum()) <= count


def test_every_shape_of_graph_has_an_involution():
    for name, g in graphs().items():
        if name == "bipartite":
            with pytest.raises(InputError, match="bipartite"):
                g.reverse_edges()
            continue
        reverse = g.reverse_edges().long()
        src, dst = g.edge_index()
        tied = reverse != torch.arange(g.num_edges)
        assert torch.equal(reverse[reverse], torch.arange(g.num_edges))
        assert torch.equal(src[tied], dst[reverse][tied]) and torch.equal(dst[tied], src[reverse][tied])
        left = set(zip(src[~tied].tolist(), dst[~tied].tolist(), strict=True))
        assert not any(i != j and (j, i) in left for i, j in left), "no two that would be a pair are left"


def test_prune_ties_directions_and_counts_edges():
    edges = [(0, 1), (1, 0), (1, 2), (2, 1), (2, 3), (3, 2), (3, 4), (4, 3)]
    g = graph_of(edges)
    pattern = Pattern(torch.ones(8, dtype=torch.bool), {"w": torch.ones(4, dtype=torch.bool)})
    scores = SoftMasks(torch.tensor([0.0, 9, 1, 2, 3, 3, 5, 0]), {"w": torch.arange(4.0)})
    fractions = {"edges": 0.5, "weights": 0.5}
    after = prune(pattern, scores, fractions, tie_directions=True, graph=g)
    assert after.edges.tolist() == [True, True, False, False, True, True, False, False]  # means 4.5, 1.5, 3, 2.5
    assert after.weights["w"].tolist() == [False, False, True, True]
    assert prune(pattern, scores, fractions).edges.tolist() == [False, True, False, False, True, True, True, False]
    odd = prune(pattern, scores, {"edges": 0.4}, tie_directions=True, graph=g)
    assert odd.kept("edges") == 6, "three of eight would cut a pair"
    protected = Pattern(torch.arange(8) == 2, {"w": torch.zeros(4, dtype=torch.bool)})
    after = prune(pattern, scores, {"edges": 0.5}, protected, tie_directions=True, graph=g)
    assert after.edges.tolist() == [True] * 4 + [False] * 4
    with pytest.raises(InputError, match="needs the graph"):
        prune(pattern, scores, fractions, tie_directions=True)
    with pytest.raises(InputError, match="NaN"):
        lowest_tied(g, torch.full((8,), torch.nan), 2, pattern.edges)


def test_pairs_are_elements_of_their_own():
    pairs = Pairs(graph_of([(1, 0), (2, 2), (0, 1), (3, 4)]))
    assert pairs.first.tolist() == [0] and pairs.second.tolist() == [2]
    assert pairs.mean(torch.tensor([1.0, 7, 2, 7])).tolist() == [1.5]
    assert pairs.keep(torch.tensor([True, True, False, True])).tolist() == [False]
    put = pairs.put(torch.tensor([False, True, False, False]), torch.tensor([True]))
    assert put.tolist() == [True, True, True, False]
