"""A generated citation graph with the size, degree law, homophily and sparse bag-of-words features of Cora."""

import numpy as np
import torch

from acefast.csr import CSR
from acefast.data.dataset import Dataset
from acefast.errors import InputError
from acefast.graph import Graph
from acefast.random import named_seed

CORA_CLASSES = (818, 426, 418, 351, 298, 217, 180)  # nodes of each class, falling
MAX_WORDS = 30


def synthetic_citation(
    num_nodes: int = 2708,
    num_features: int = 1433,
    num_classes: int = 7,
    seed: int = 0,
    *,
    num_edges: int | None = None,
    homophily: float = 0.81,
    words: float = 18.2,
    strays: float = 0.4,
    topicality: float = 2.8,
    train_per_class: int = 20,
    num_val: int = 500,
    num_test: int = 1000,
    name: str = "synthetic-cora",
) -> Dataset:
    """A degree-corrected planted partition with documents drawn from class topics; the same for the same arguments.

    Classes: sizes in Cora's proportions.
    Edges: `num_edges` undirected ones (default Cora's 5,278 per 2,708 nodes), each listed in both directions, sorted by
    (destination, source), without self-loops and repeats, no node isolated.
    Degrees: P(d ≥ k) = 1 / (1 + ((k-1)/s)²), which is Cora's law (the density falls as d⁻³; largest degree about 160,
    Cora's is 168), s set by the mean.
    Homophily: about a share `homophily` of the edges joins nodes of one class. A share `strays` of the nodes with one
    or two edges cites the community of another class, so that not every error averages out over neighbours.
    Features: about `words` of `num_features` words in each document, at most 30, without repeats; word v is drawn by
    weight 1 / (v + 10), times 1 + `topicality` if it belongs to the document's class.
    Split: as Planetoid's, at random.

    Raises InputError where the sizes allow no such graph or split.
    """
    num_edges = round(num_nodes * 5278 / 2708) if num_edges is None else num_edges
    _check(num_nodes, num_features, num_classes, num_edges, homophily, strays, words, topicality)

    def stream(*names):
        return np.random.Generator(np.random.PCG64(named_seed(seed, "synthetic", *names)))

    y = _labels(num_nodes, num_classes, stream("labels"))
    split = _split(y, num_classes, train_per_class, num_val, num_test, stream("split"))
    degrees = _degrees(num_nodes, num_edges, stream("degrees"))
    community = _communities(y, degrees, num_classes, strays, stream("strays"))
    within = _within_community(y, community, num_classes, degrees, homophily)
    a, b = _edges(community, degrees, within, stream("edges"))
    dst, src = np.divmod(np.sort(np.concatenate((a * num_nodes + b, b * num_nodes + a))), num_nodes)
    return Dataset(
        name=name,
        graph=Graph.from_edge_index(torch.from_numpy(np.stack((src, dst))), num_nodes=num_nodes),
        x=_documents(y, num_classes, num_features, words, topicality, stream("topics"), stream("words")),
        y=torch.from_numpy(y),
        train=split[0],
        val=split[1],
        test=split[2],
        num_classes=num_classes,
    )


def _check(num_nodes, num_features, num_classes, num_edges, homophily, strays, words, topicality) -> None:
    sizes = ("num_nodes", num_nodes, 2), ("num_classes", num_classes, 2), ("num_features", num_features, 1)
    for what, value, low in sizes:
        if value < low:
            raise InputError(f"synthetic graph: {what} must be at least {low}, got {value}")
    least, most = -(-num_nodes // 2), num_nodes * _largest_degree(num_nodes) // 4
    if not least <= num_edges <= most:
        raise InputError(f"synthetic graph: num_edges must lie in [{least}, {most}], got {num_edges}")
    for what, value, low, high in (
        ("homophily", homophily, 0, 1),
        ("strays", strays, 0, 1),
        ("words", words, 1, min(MAX_WORDS, num_features)),
        ("topicality", topicality, 0, 1e6),
    ):
        if not low <= value <= high:
            raise InputError(f"synthetic graph: {what} must lie in [{low}, {high}], got {value}")


def _permutation(n: int, stream) -> np.ndarray:
    return np.argsort(stream.random(n), kind="stable")


def _labels(num_nodes: int, num_classes: int, stream) -> np.ndarray:
    """Class of each node, int64 [N]; sizes in the proportions of Cora's, interpolated to `num_classes`."""
    share = np.interp(np.linspace(0, 1, num_classes), np.linspace(0, 1, len(CORA_CLASSES)), CORA_CLASSES)
    ends = np.rint(np.cumsum(share) / share.sum() * num_nodes).astype(np.int64)
    y = np.searchsorted(ends, np.arange(num_nodes), side="right").astype(np.int64)
    return y[_permutation(num_nodes, stream)]


def _split(y, num_classes, train_per_class, num_val, num_test, stream) -> list[torch.Tensor]:
    order = _permutation(len(y), stream)
    train = []
    for label in range(num_classes):
        members = order[y[order] == label]
        if len(members) < train_per_class:
            expected = f"{train_per_class} to train on"
            raise InputError(f"synthetic graph: class {label} has {len(members)} nodes, expected {expected}")
        train.append(members[:train_per_class])
    train = np.concatenate(train)
    rest = order[~np.isin(order, train)]
    if len(rest) < num_val + num_test:
        expected = f"{num_val} to validate and {num_test} to test on"
        raise InputError(f"synthetic graph: {len(rest)} nodes remain beside those to train on, expected {expected}")
    parts = train, rest[:num_val], rest[num_val : num_val + num_test]
    return [torch.from_numpy(np.sort(part)) for part in parts]


def _largest_degree(num_nodes: int) -> int:
    return min(max(num_nodes // 8, 8), num_nodes - 1)


def _degrees(num_nodes: int, num_edges: int, stream) -> np.ndarray:
    """Degrees int64 [N], each at least 1, that sum to 2 num_edges: quantiles of the law, dealt out at random."""
    odds = np.sqrt(num_nodes / (np.arange(num_nodes) + 0.5) - 1)
    most = _largest_degree(num_nodes)

    def law(scale):
        return np.minimum(1 + np.floor(scale * odds), most)

    low, high = 0.0, float(num_nodes)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if law(middle).sum() <= 2 * num_edges else (low, middle)
    degrees = law(low).astype(np.int64)
    order = _permutation(num_nodes, stream)
    short = 2 * num_edges - int(degrees.sum())
    np.add.at(degrees, num_nodes - 1 - np.arange(short) % num_nodes, 1)
    return degrees[order]


def _communities(y, degrees, num_classes, strays, stream) -> np.ndarray:
    """Class whose community each node cites, int64 [N]: its own, or for strays of degree 1 and 2 another one."""
    stray = (degrees <= 2) & (stream.random(len(y)) < strays)
    shift = 1 + np.floor(stream.random(len(y)) * (num_classes - 1)).astype(np.int64)
    return np.where(stray, (y + shift) % num_classes, y)


def _within_community(y, community, num_classes, degrees, homophily) -> float:
    """Share of edges to draw within communities, and not anywhere, for the expected homophily to be `homophily`."""
    table = np.zeros((num_classes, num_classes))  # half-edges by community and class
    np.add.at(table, (community, y), degrees)
    size = table.sum(1)
    inside = (table**2 / size[:, None].clip(1)).sum() / size.sum()
    anywhere = (table.sum(0) ** 2).sum() / size.sum() ** 2
    if not anywhere <= homophily <= inside:
        reach = f"{anywhere:.2f} to {inside:.2f} with these strays"
        raise InputError(f"synthetic graph: homophily {homophily} is out of reach, expected {reach}")
    return (homophily - anywhere) / max(inside - anywhere, 1e-12)


def _edges(community: np.ndarray, degrees: np.ndarray, share: float, stream) -> tuple[np.ndarray, np.ndarray]:
    """End points (a, b) of the undirected edges, each int64 [num_edges], with the given degrees.

    Half-edges are paired at random, a `share` of them within their community, the others anywhere. Pairs that are
    self-loops or repeats are mixed with some good ones and paired again until none is left.
    """
    n, anywhere = len(community), community.max() + 1
    ends = np.repeat(np.arange(n), degrees)[_permutation(degrees.sum(), stream)]
    within = np.arange(len(ends)) < round(share * len(ends))
    # A hub in a small community has more half-edges than that has nodes: those beyond half of them go anywhere.
    slot = np.flatnonzero(within)
    slot = slot[np.argsort(ends[slot], kind="stable")]
    rank = np.arange(len(slot)) - np.searchsorted(ends[slot], ends[slot])
    within[slot[2 * rank >= np.bincount(community)[community[ends[slot]]]]] = False
    for label in np.unique(community):
        mine = np.flatnonzero(within & (community[ends] == label))
        if len(mine) % 2:
            within[mine[0]] = False
    group = np.where(within, community[ends], anywhere)

    def paired(ends, group):
        order = np.lexsort((stream.random(len(ends)), group))
        return ends[order].reshape(-1, 2), group[order][::2]

    edges, kind = paired(ends, group)
    for attempt in range(2000):
        a, b = edges.min(1), edges.max(1)
        _, first = np.unique(a * n + b, return_index=True)
        bad = np.ones(len(edges), dtype=bool)
        bad[first] = False
        bad |= a == b
        if not bad.any():
            return a, b
        if attempt == 100:  # a community too small and too dense for its edges: give some of them away
            kind[:] = anywhere
        again = bad | (stream.random(len(edges)) < max(bad.mean(), 8 / len(edges)))
        edges[again], kind[again] = paired(edges[again].ravel(), np.repeat(kind[again], 2))
    raise InputError(
        f"synthetic graph: no simple graph of {n} nodes and {len(edges)} edges was found, ask for fewer edges"
    )


def _documents(y, num_classes, num_features, words, topicality, topics, stream) -> CSR:
    """Binary features [N, num_features]: words drawn without repeats by the weights of the node's class."""
    weight = 1 / (np.arange(num_features) + 10.0)
    topic = np.floor(topics.random(num_features) * num_classes).astype(np.int64)
    weight = weight * (1 + topicality * (topic == np.arange(num_classes)[:, None]))
    normal = stream.random((len(y), 12)).sum(1) - 6
    count = np.clip(np.rint(words * (1 + 0.32 * normal)), 1, min(MAX_WORDS, num_features)).astype(np.int64)

    # An exponential race: word v arrives at time -log(1 - u) / weight_v, and the first `count` are taken.
    most, chosen = int(count.max()), []
    for start in range(0, len(y), 1024):
        rows = slice(start, start + 1024)
        time = np.log1p(-stream.random((len(y[rows]), num_features))) / -weight[y[rows]]
        first = np.argpartition(time, most - 1, axis=1)[:, :most]
        first = np.take_along_axis(first, np.argsort(np.take_along_axis(time, first, 1), axis=1), 1)
        late = np.arange(most) >= count[rows, None]
        chosen.append(np.sort(np.where(late, num_features, first), axis=1))
    chosen = np.concatenate(chosen)
    col = chosen[chosen < num_features]
    rowptr = np.concatenate(([0], np.cumsum(count)))
    return CSR(
        torch.from_numpy(rowptr),
        torch.from_numpy(col.astype(np.int32)),
        torch.ones(len(col)),
        (len(y), num_features),
    )
