"""Links held out: nothing of them is left in the graph, and what counts as no link is none."""

from dataclasses import replace

import pytest
import torch

from acefast.data import load_dataset, load_planetoid, split_links
from acefast.data.links import NonEdges, code_pairs, pair_codes
from acefast.graph import Graph


def both_ways(pairs) -> set:
    return {(a, b) for i, j in pairs.tolist() for a, b in ((i, j), (j, i))}


@pytest.mark.parametrize("n", [2, 3, 4, 7, 8])
def test_pair_codes_number_all_pairs_once(n):
    pairs = torch.combinations(torch.arange(n))
    codes = pair_codes(*pairs.unbind(1), n)
    assert torch.equal(codes.sort().values, torch.arange(n * (n - 1) // 2))
    assert torch.equal(codes, pair_codes(*pairs.flip(1).unbind(1), n))
    assert both_ways(code_pairs(codes, n)) == both_ways(pairs)


@pytest.mark.parametrize("n", [6, 9])
def test_non_edges_are_drawn_uniformly_from_all_there_are(n):
    edges = torch.tensor([[0, 1], [1, 0], [2, 5], [4, 4], [3, 0], [3, 0]])
    others = NonEdges(edges, n)
    wanted = {(a, b) for a in range(n) for b in range(n) if a != b} - both_ways(edges)
    assert others.count == len(wanted) // 2
    drawn = others.draw(500 * others.count, torch.Generator().manual_seed(1))
    assert both_ways(drawn) == wanted
    counts = pair_codes(*drawn.unbind(1), n).bincount()
    counts = counts[counts > 0].double()
    assert float(((counts - 500) ** 2 / 500).sum()) < 3 * others.count, "chi squared, mean others.count - 1"
    for count in (3, others.count):  # fewer than half of them, all of them
        some = others.distinct(count, torch.Generator().manual_seed(1))
        assert len(both_ways(some)) == 2 * count and both_ways(some) <= wanted


def test_a_complete_graph_has_no_non_edges(refusal):
    others = NonEdges(torch.combinations(torch.arange(5)), 5)
    assert "every two nodes are joined" in refusal(others.draw, 1, torch.Generator())
    assert "1 pairs of nodes without an edge are needed, and the graph has 0" in refusal(others.distinct, 1, torch.Generator())


def messy(seed: int):
    """A graph with edges in one direction alone, repeated edges and self-loops."""
    data = load_dataset("synthetic-cora")
    edges = data.graph.edge_index()
    generator = torch.Generator().manual_seed(seed)
    extra = torch.stack((edges[0, :200], edges[0, :200])), edges[:, torch.randperm(10556, generator=generator)[:3000]]
    edges = torch.cat((edges[:, torch.rand(10556, generator=generator) < 0.8], *extra), 1)
    return replace(data, graph=Graph.from_edge_index(edges, num_nodes=data.num_nodes))


@pytest.mark.parametrize("make", [lambda: load_dataset("synthetic-cora"), lambda: messy(3)])
def test_what_is_held_out_is_nowhere_in_the_graph(make):
    data = make()
    split = split_links(data)
    parts = {name: both_ways(getattr(split, name)) for name in ("train", "val", "test", "val_neg", "test_neg")}
    whole = {(a, b) for a, b in data.graph.edge_index().T.tolist() if a != b}
    whole |= {(b, a) for a, b in whole}
    count = len(whole) // 2
    sizes = {"val": count // 20, "test": count // 10, "val_neg": count // 20, "test_neg": count // 10}
    sizes["train"] = count - sizes["val"] - sizes["test"]
    assert {name: len(pairs) // 2 for name, pairs in parts.items()} == sizes
    assert all(len(getattr(split, name)) == sizes[name] for name in sizes), "no pair twice"
    left = split.graph.edge_index().T.tolist()
    apart = {(a, b) for a, b in left if a != b}
    assert apart <= parts["train"] and parts["train"] == apart | {(b, a) for a, b in apart}
    assert not apart & (parts["val"] | parts["test"])
    assert parts["train"] | parts["val"] | parts["test"] == whole
    assert not parts["train"] & parts["val"] and not parts["val"] & parts["test"] and not parts["train"] & parts["test"]
    assert not (parts["val_neg"] | parts["test_neg"]) & whole and not parts["val_neg"] & parts["test_neg"]
    kept = [edge for edge in data.graph.edge_index().T.tolist() if edge[0] == edge[1] or tuple(edge) in parts["train"]]
    assert left == kept, "the training edges, as often as they were listed, in their order, and self-loops"


def test_the_split_is_the_seed_s():
    data = load_dataset("synthetic-cora")
    one, two, other = split_links(data), split_links(data), split_links(data, seed=1)
    assert one.fingerprint == two.fingerprint and one.graph.fingerprint() == two.graph.fingerprint()
    assert one.graph.fingerprint() != other.graph.fingerprint() and both_ways(one.test_neg) != both_ways(other.test_neg)


def test_cora_has_ugs_s_shares(planetoid):
    split = split_links(load_planetoid("cora", planetoid))
    assert [len(part) for part in (split.train, split.val, split.test)] == [4488, 263, 527]
    assert split.graph.num_edges == 2 * 4488


def test_what_cannot_be_split_is_refused(refusal):
    data = load_dataset("synthetic-cora")
    assert "comes with a split of its links" in refusal(split_links, split_links(data))
    assert "made of the whole graph" in refusal(split_links, load_dataset("synthetic-cora", features="fastrp"))
    few = replace(data, graph=Graph.from_edge_index(data.graph.edge_index()[:, :12], num_nodes=data.num_nodes))
    assert "expected at least 20" in refusal(split_links, few)
