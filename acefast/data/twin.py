"""Generated twins of large data sets: their counts, degree law, feature sizes, tasks and splits, with planted communities.

Everything is drawn in pieces of bounded size, each from a stream of its own, by as many threads as torch has: the same for
any number of threads.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from acefast.data import edges
from acefast.data.dataset import Dataset
from acefast.data.ogb import edge_sums_and_groups
from acefast.errors import InputError
from acefast.random import named_seed

DRAWS = 2**20  # of ends of edges in one piece
ROWS = 2**14  # of features in one piece


@dataclass(frozen=True)
class Twin:
    """What a data set is like. `pairs` are undirected edges, in link prediction those of the training graph; the degrees fall as
    rank^-exponent, which gives about the real largest degree, or, where the exponent is negative, as (1 - rank/nodes)^-exponent.
    A share `homophily` of the edges stays within one of `communities` (fewer where those would be too small), and a share
    `noise` of the nodes has a label drawn at random."""

    task: str
    metric: str
    nodes: int
    pairs: int
    exponent: float
    split: tuple[int, int, int]
    classes: int = 0
    columns: int = 0  # of x
    edge_columns: int = 0
    communities: int = 64
    homophily: float = 0.6
    noise: float = 0.0
    negatives: tuple[int, int] = (0, 0)  # of val and test
    self_loops: bool = False


TWINS = {
    "ogbn-arxiv": Twin(
        "node", "accuracy", nodes=169_343, pairs=1_157_799, exponent=0.65, split=(90_941, 29_799, 48_603),
        classes=40, columns=128, communities=80, noise=0.25, self_loops=True,
    ),
    "ogbn-proteins": Twin(
        "multilabel", "rocauc", nodes=132_534, pairs=39_561_252, exponent=0.25, split=(86_619, 21_236, 24_679),
        classes=112, edge_columns=8,
    ),
    "ogbn-products": Twin(
        "node", "accuracy", nodes=2_449_029, pairs=61_859_140, exponent=0.45, split=(196_615, 39_323, 2_213_091),
        classes=47, columns=100, communities=94, noise=0.15,
    ),
    "reddit": Twin(
        "node", "accuracy", nodes=232_965, pairs=57_307_946, exponent=0.35, split=(153_431, 23_831, 55_703),
        classes=41, columns=602, communities=82, noise=0.04,
    ),
    "ogbl-collab": Twin(
        "link", "hits@50", nodes=235_868, pairs=1_179_052, exponent=0.38, split=(1_179_052, 60_084, 46_329),
        columns=128, edge_columns=1, communities=512, homophily=0.8, negatives=(100_000, 100_000),
    ),
    "ogbl-ddi": Twin(
        "link", "hits@20", nodes=4_267, pairs=1_067_911, exponent=-1.5, split=(1_067_911, 133_489, 133_489),
        communities=16, negatives=(101_882, 95_599),
    ),
}  # fmt: skip
PREFIX = "twin:"
SPECIES = 8


def load_twin(name: str, seed: int = 0, *, add_self_loops: bool | None = None) -> Dataset:
    """The twin `name`, "twin:DATASET" or "twin:DATASET:SCALE" with a data set of TWINS; SCALE (default 1) multiplies nodes,
    edges and split, so that the mean degree stays, up to half of all pairs. The same for the same `seed`.

    Graph        undirected, each edge once, in CSR order; no node is isolated (but by edges held out); with a self-loop at each
                 node for ogbn-arxiv unless `add_self_loops` is False
    node         y: the community's class, or noise; x: standard normal around a centre for each community
    multilabel   y: each label by a probability that its community has; edge_attr in [0, 1), larger within communities in a
                 pattern of their own; x: their sums over a node's edges, and its species one-hot; split by species
    link         val and test are edges held out, val_neg and test_neg other pairs, uniformly drawn; x as for nodes, or None

    Raises InputError for a name that is none of these.
    """
    twin, scale = parsed(name)
    if add_self_loops and not twin.self_loops:
        raise InputError(f"{name}: self-loops are added to the twin of ogbn-arxiv alone, leave add_self_loops out")
    n = max(16, round(twin.nodes * scale))

    def stream(*names):
        return _stream(seed, name, *names)

    split = [max(1, round(count * scale)) for count in twin.split]
    pairs = sum(split) if twin.task == "link" else round(twin.pairs * scale)
    # Communities large enough that a quarter of the pairs within them are edges, at most.
    communities = max(2, min(twin.communities, int(n * n / (8 * twin.homophily * pairs))))
    low, high, community = draw_pairs(
        n, pairs, twin.exponent, named_seed(seed, "twin", name), communities=communities, homophily=twin.homophily
    )
    fields, number = {"y": None, "num_classes": twin.classes, "edge_attr": None}, None
    if twin.task == "link":
        held = _held_out(low, high, n, twin, [count * scale for count in twin.negatives], split, stream)
        low, high = (np.ascontiguousarray(held["train"][:, side]).astype(np.int32) for side in (0, 1))
        fields |= {field: torch.from_numpy(value) for field, value in held.items()}
    else:
        order = stream("split").permutation(n)
        ends = np.cumsum([0, *split])
        parts = [order[a:b] for a, b in zip(ends, [*ends[1:-1], min(ends[-1], n)])]
        fields |= {field: torch.from_numpy(np.sort(part)) for field, part in zip(("train", "val", "test"), parts)}
    if twin.edge_columns:
        number = np.arange(len(low), dtype=np.int32)
        edge_attr = _edge_attr(twin, low, high, community, communities, stream)
    loops = twin.self_loops if add_self_loops is None else add_self_loops
    arrays = (
        edges.undirected_simple(low, high, n, add_self_loops=True)
        if loops
        else edges.undirected(low, high, n, number=number)
    )
    del low, high
    if twin.edge_columns:
        fields["edge_attr"] = torch.from_numpy(edges.of_raw(edge_attr, arrays.pop("raw")))
        del edge_attr
    graph = edges.to_graph(arrays)

    if twin.task == "node":
        noise = stream("labels").integers(0, twin.classes, n)
        y = np.where(stream("noise").random(n) < twin.noise, noise, community % twin.classes)
        fields["y"] = torch.from_numpy(y.astype(np.int64))
    if twin.task == "multilabel":
        chance = stream("chance").random((communities, twin.classes), dtype=np.float32) ** 2
        drawn = stream("labels").random((n, twin.classes), dtype=np.float32)
        fields["y"] = torch.from_numpy((drawn < chance[community]).astype(np.float32))
        species = torch.from_numpy(stream("species").integers(0, SPECIES - 2, n))
        species[fields["val"]], species[fields["test"]] = SPECIES - 2, SPECIES - 1
        x = edge_sums_and_groups(fields["edge_attr"], graph.rowptr, species)
    else:
        x = _features(n, twin.columns, community, communities, stream) if twin.columns else None
    return Dataset(
        name=name,
        graph=graph,
        x=x,
        task=twin.task,
        metric=twin.metric,
        features="none" if x is None else "generated",
        **fields,
    )


def twin_of(name: str) -> str:
    """The data set that `name` is a twin of, `name` itself where it is none."""
    return name.split(":")[1] if name.startswith(PREFIX) else name


def parsed(name: str) -> tuple[Twin, float]:
    """What "twin:DATASET[:SCALE]" names; raises InputError for another name."""
    _, dataset, *scale = name.split(":")
    try:
        twin, scale = TWINS[dataset], float(*scale) if scale else 1.0
        if 0 < scale <= 16:
            return twin, scale
    except (KeyError, TypeError, ValueError):
        pass
    expected = f"{PREFIX}NAME or {PREFIX}NAME:SCALE with NAME of {', '.join(TWINS)} and SCALE in (0, 16]"
    raise InputError(f"dataset {name!r} is not known, expected {expected}")


def _stream(seed: int, *names) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(named_seed(seed, "twin", *names)))


def _in_pieces(function, count: int, size: int) -> list:
    """function(i, start, stop) for each piece of `size` of range(count), by torch's number of threads, in order."""
    starts = range(0, count, size)
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        return list(threads.map(lambda i: function(i, starts[i], min(starts[i] + size, count)), range(len(starts))))


def _share(place: np.ndarray, exponent: float) -> np.ndarray:
    """Share of the ends at nodes whose rank, as a fraction of n, is below `place`."""
    return place ** (1 - exponent) if exponent >= 0 else 1 - (1 - place) ** (1 - exponent)


def _place(share: np.ndarray, exponent: float) -> np.ndarray:
    """The inverse of `_share`."""
    return share ** (1 / (1 - exponent)) if exponent >= 0 else 1 - (1 - share) ** (1 / (1 - exponent))


def draw_pairs(
    n: int, pairs: int, exponent: float, seed: int, *, communities: int = 1, homophily: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(low, high, community): `pairs` distinct pairs of n nodes, int32, low < high, sorted by (low, high), at least one at each
    node, and each node's community, int64 [n].

    Node ranks are a random permutation. The ends of a pair are drawn with probability ~ rank^-exponent, or, where the exponent is
    negative, ~ (1 - rank/n)^-exponent; with probability `homophily` the second end comes from the community of the first. Rank
    r belongs to community r mod `communities`, so that all have the same degrees, and the nodes of each are joined in a chain.
    There are no more pairs than half of all that n nodes have, and no fewer than the chains have.
    """
    pairs = min(pairs, n * (n - 1) // 4)
    node = _stream(seed, "ranks").permutation(n).astype(np.int32)  # of each rank
    rank = np.empty(n, dtype=np.int64)
    rank[node] = np.arange(n)
    community = rank % communities
    size = (n - 1 - np.arange(communities)) // communities + 1  # of each community
    share = np.diff(_share(np.arange(n + 1) / n, exponent))[rank]  # of each node in the ends
    nodes_in_piece = max(1, n * DRAWS // (2 * pairs + 1))

    # A pair is a key (low n + high) 2, plus 1 where it was drawn, and is found at its low end. A drawn one comes from either end
    # with about the same probability: twice as many are drawn, and those with the low end second are dropped.
    def chain(i, start, stop):
        low = np.tile(np.arange(start, stop), 2)
        other = rank[low] + np.repeat([communities, -communities], stop - start)
        inside = (0 <= other) & (other < n)
        low, high = low[inside], node[other[inside]]
        return np.sort((low * n + high)[low < high] * 2)

    def more(i, start, stop):
        stream = _stream(seed, "pairs", attempt, i)
        low = np.repeat(np.arange(start, stop), stream.poisson(2 * wanted * share[start:stop]))
        place = _place(stream.random(len(low)), exponent)
        other = (n * place).astype(np.int64)
        if communities > 1:
            within = stream.random(len(low), dtype=np.float32) < homophily
            group = community[low[within]]
            other[within] = (size[group] * place[within]).astype(np.int64) * communities + group
        high = node[other]
        keys = np.sort(np.concatenate((pieces[i], ((low * n + high) * 2 + 1)[low < high])))
        return keys[np.diff(keys >> 1, prepend=-1) > 0]

    pieces, attempt = _in_pieces(chain, n, nodes_in_piece), 0
    while (missing := pairs - sum(map(len, pieces))) > 0:
        wanted = (1.1 + attempt / 2) * missing + 16
        pieces = _in_pieces(more, n, nodes_in_piece)
        attempt += 1
    drawn = [np.flatnonzero(keys & 1) for keys in pieces]
    ends = np.cumsum([0, *map(len, drawn)])
    if missing < 0:  # too many, some of those drawn go
        surplus = min(-missing, ends[-1])
        excess = np.sort(_stream(seed, "excess").choice(ends[-1], surplus, replace=False, shuffle=False))
        for i, part in enumerate(np.split(excess, np.searchsorted(excess, ends[1:-1]))):
            pieces[i] = np.delete(pieces[i], drawn[i][part - ends[i]])
    low = np.concatenate([(keys >> 1) // n for keys in pieces], dtype=np.int32, casting="unsafe")
    high = np.concatenate([(keys >> 1) % n for keys in pieces], dtype=np.int32, casting="unsafe")
    return low, high, community


def _held_out(low, high, n: int, twin: Twin, negatives: list, split: list, stream) -> dict[str, np.ndarray]:
    """train, val, test, val_neg and test_neg, int64 [n, 2]; the first three share out the pairs in proportion to `split`."""
    part = np.zeros(len(low), dtype=np.int8)
    counts = [max(1, len(low) * count // sum(split)) for count in split[1:]]
    held = stream("split").permutation(len(low))[: sum(counts)]
    part[held[: counts[0]]], part[held[counts[0] :]] = 1, 2
    pairs = np.stack((low, high), 1).astype(np.int64)
    fields = {field: pairs[part == i] for i, field in enumerate(("train", "val", "test"))}
    taken = pairs @ [n, 1]
    count = [max(1, round(number)) for number in negatives]
    count = [min(number, (n * (n - 1) // 2 - len(low)) // 3) for number in count]
    found, draws = taken[:0], stream("negatives")
    while len(found) < sum(count):
        ends = np.sort(draws.integers(0, n, (2 * sum(count), 2)), 1)
        keys = np.unique((ends @ [n, 1])[ends[:, 0] < ends[:, 1]])
        found = np.union1d(found, keys[~np.isin(keys, taken)])
    found = np.stack(np.divmod(draws.permutation(found), n), 1)
    return fields | {"val_neg": found[: count[0]], "test_neg": found[count[0] : sum(count)]}


def _edge_attr(twin: Twin, low, high, community, communities: int, stream) -> np.ndarray:
    """float32 [P, edge_columns]: uniform in [0, 1) times 0.3, or times a pattern of the community where both ends are in one; of
    one column: whole numbers from 1 on."""
    pattern = stream("patterns").random((communities, twin.edge_columns), dtype=np.float32)
    attr = np.empty((len(low), twin.edge_columns), dtype=np.float32)

    def fill(i, start, stop):
        rows, group = attr[start:stop], community[low[start:stop]]
        stream("edge features", i).random(out=rows, dtype=np.float32)
        rows *= np.where((group == community[high[start:stop]])[:, None], pattern[group], np.float32(0.3))
        if twin.edge_columns == 1:
            np.floor(1 + 4 * rows, out=rows)

    _in_pieces(fill, len(low), DRAWS)
    return attr


def _features(n: int, columns: int, community, communities: int, stream) -> torch.Tensor:
    """float32 [N, columns]: standard normal around a centre for each community, itself normal with length about 2.5."""
    centre = stream("centres").standard_normal((communities, columns), dtype=np.float32) * np.float32(
        2.5 / columns**0.5
    )
    x = np.empty((n, columns), dtype=np.float32)

    def fill(i, start, stop):
        stream("features", i).standard_normal(out=x[start:stop], dtype=np.float32)
        x[start:stop] += centre[community[start:stop]]

    _in_pieces(fill, n, ROWS)
    return torch.from_numpy(x)
