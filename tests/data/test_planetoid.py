import pickle
import random
import shutil

import numpy as np
import pytest
import scipy.sparse
import torch

from acefast.data import load_dataset, load_planetoid
from acefast.data.planetoid import PARTS, PUBLISHED

NAMES = tuple(PUBLISHED)


@pytest.mark.parametrize("keep_self_loops", [False, True])
@pytest.mark.parametrize(
    ("name", "nodes", "undirected", "loops", "features", "classes", "train"),
    [
        ("cora", 2708, 5278, 0, 1433, 7, 140),
        ("citeseer", 3327, 4552, 124, 3703, 6, 120),
        ("pubmed", 19717, 44324, 3, 500, 3, 60),
    ],
)
def test_counts(planetoid, name, nodes, undirected, loops, features, classes, train, keep_self_loops):
    data = load_dataset(name, planetoid, keep_self_loops=keep_self_loops)
    assert (data.num_nodes, data.num_features, data.num_classes) == (nodes, features, classes)
    assert data.graph.num_edges == 2 * undirected + (loops if keep_self_loops else 0)
    assert [index.numel() for index in (data.train, data.val, data.test)] == [train, 500, 1000]
    assert torch.bincount(data.y[data.train]).tolist() == [20] * classes
    src, dst = data.graph.edge_index()
    assert int((src == dst).sum()) == (loops if keep_self_loops else 0)
    key = dst * nodes + src
    assert bool((key[1:] > key[:-1]).all()) and data.graph.eid is None
    assert torch.equal(torch.sort(src * nodes + dst).values, key)


def test_isolated_test_nodes_of_citeseer(planetoid):
    data = load_planetoid("citeseer", planetoid)
    words = data.x.rowptr[1:] - data.x.rowptr[:-1]
    isolated = (words == 0).nonzero().squeeze(1)
    assert isolated.numel() == 15 and bool((isolated >= 2312).all())
    assert not bool(torch.isin(isolated, torch.cat((data.train, data.val, data.test))).any())
    assert bool((data.y[isolated] == 0).all())
    normalised = data.with_row_normalized_features().x.to_dense().sum(1)
    assert torch.allclose(normalised, (words > 0).float(), atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_equals_torch_geometric(planetoid, tmp_path, name):
    """The same edges in the same order, features, labels and split as PyG's own reader makes of these files."""
    read = pytest.importorskip("torch_geometric.io").read_planetoid_data
    for file in planetoid.glob(f"ind.{name}.*"):
        shutil.copyfile(file, tmp_path / file.name)
    theirs, ours = read(str(tmp_path), name), load_planetoid(name, planetoid)
    assert torch.equal(ours.graph.edge_index(), theirs.edge_index)
    assert torch.equal(ours.x.to_dense(), theirs.x)
    assert torch.equal(ours.y, theirs.y)
    for field in ("train", "val", "test"):
        assert torch.equal(getattr(ours, field), theirs[f"{field}_mask"].nonzero().squeeze(1))


@pytest.mark.parametrize("name", NAMES)
def test_row_normalisation(planetoid, name):
    data = load_planetoid(name, planetoid)
    dense = data.x.to_dense().double()
    total = dense.sum(1, keepdim=True)
    expected = torch.where(total > 0, dense / total, 0)
    assert torch.allclose(data.with_row_normalized_features().x.to_dense().double(), expected, rtol=1e-6, atol=0)


def test_folders(cora, refusal):
    nested, raw = cora / "a" / "planetoid", cora / "b" / "Cora" / "raw"
    for folder in (nested, raw):
        folder.mkdir(parents=True)
        for part in PARTS:
            shutil.copyfile(cora / f"ind.cora.{part}", folder / f"ind.cora.{part}")
    expected = load_planetoid("cora", cora).fingerprint
    assert load_planetoid("cora", str(cora / "a")).fingerprint == expected
    assert load_planetoid("cora", cora / "b").fingerprint == expected
    absent = refusal(load_planetoid, "cora", cora / "absent")
    assert str(cora / "absent") in absent and "ind.cora.{x,tx,allx,y,ty,ally,graph,test.index}" in absent
    assert "is not a folder" in refusal(load_planetoid, "cora", cora / "ind.cora.x")
    assert "no file of citeseer" in refusal(load_planetoid, "citeseer", cora)
    assert "'nell'" in refusal(load_planetoid, "nell", cora)


@pytest.mark.parametrize("part", PARTS)
def test_missing_empty_or_other_file(cora, refusal, part):
    file = cora / f"ind.cora.{part}"
    file.unlink()
    assert f"lacks ind.cora.{part}" in refusal(load_planetoid, "cora", cora)
    file.write_bytes(b"")
    assert file.name in refusal(load_planetoid, "cora", cora)
    file.write_bytes(b"<!DOCTYPE html>\n<html>404: Not Found</html>\n")
    assert file.name in refusal(load_planetoid, "cora", cora)
    file.unlink()
    file.mkdir()
    assert f"lacks ind.cora.{part}" in refusal(load_planetoid, "cora", cora)


@pytest.mark.parametrize("part", PARTS)
def test_cut_short(cora, refusal, part):
    file = cora / f"ind.cora.{part}"
    whole = file.read_bytes()
    seed = random.randrange(2**32)
    offsets = {1, 2, 3, len(whole) // 2, len(whole) - 5, *random.Random(seed).sample(range(len(whole) - 5), 12)}
    for offset in offsets:
        file.write_bytes(whole[:offset])
        assert file.name in refusal(load_planetoid, "cora", cora), f"seed {seed}, offset {offset}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", ("x", "graph", "ty", "test.index"))
def test_damaged_bytes_never_escape_as_another_error(cora, refusal, part):
    """Either the damage is noticed, in one sentence, or the record is valid (a changed value, say)."""
    file = cora / f"ind.cora.{part}"
    whole = file.read_bytes()
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    for attempt in range(25):
        damaged = bytearray(whole)
        for _ in range(chance.choice((1, 10, 100))):
            damaged[chance.randrange(min(len(whole), chance.choice((300, len(whole)))))] = chance.randrange(256)
        file.write_bytes(damaged)
        try:
            load_planetoid("cora", cora)
        except Exception:
            try:
                refusal(load_planetoid, "cora", cora)
            except Exception as error:
                raise AssertionError(f"seed {seed}, attempt {attempt}") from error


def load(file):
    return pickle.loads(file.read_bytes(), encoding="latin1")


def rewrite(cora, part, change, protocol=2):
    file = cora / f"ind.cora.{part}"
    if part == "test.index":
        file.write_text(change(file.read_text()))
    else:
        file.write_bytes(pickle.dumps(change(load(file)), protocol=protocol))
    return file


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_files_written_anew_by_a_later_python(cora, protocol):
    expected = load_planetoid("cora", cora).fingerprint
    for part in PARTS[:-1]:
        rewrite(cora, part, lambda value: value, protocol)
    assert load_planetoid("cora", cora).fingerprint == expected


def set_item(index, value):
    def change(array):
        array = array.copy()
        array[index] = value
        return array

    return change


def set_component(key, index, value):
    def change(matrix):
        matrix = matrix.copy()
        getattr(matrix, key)[index] = value
        return matrix

    return change


def attribute(key, value):
    def change(matrix):
        matrix.__dict__[key] = value
        return matrix

    return change


def neighbour(node, value):
    def change(graph):
        graph[node] = value
        return graph

    return change


def drop_node(graph):
    del graph[5]
    return graph


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("graph", neighbour(0, [1, 2708]), "node 0 has neighbour 2708, which is out of range for 2708 nodes"),
        ("graph", neighbour(7, [-1]), "node 7 has neighbour -1"),
        ("graph", neighbour(7, [10**30]), "out of range"),
        ("graph", neighbour(7, [1.5]), "a neighbour that is not an integer"),
        ("graph", neighbour(7, [True]), "a neighbour that is not an integer"),
        ("graph", neighbour(7, 3), "a list of neighbours for each node"),
        ("graph", neighbour(2709, []), "has 2709 nodes but not node 2708"),
        ("graph", neighbour(2708, []), "lists nodes 1708 to 2707, expected 1708 to 2708"),
        ("graph", neighbour("a", []), "has 2709 nodes but not node 2708"),
        ("graph", drop_node, "not node 5"),
        ("graph", neighbour(0, [633, 1862, 2582, 1]), "10558 edges where 10556 were published"),
        ("graph", neighbour(0, [0, 633, 1862, 2582]), "1 self loops where 0 were published"),
        ("graph", lambda graph: [], "must hold a dictionary"),
        ("graph", lambda graph: {}, "must hold a dictionary"),
        ("graph", lambda graph: dict.fromkeys(range(2708), list(range(2708))), "more neighbours than it has bytes"),
        ("allx", set_component("data", 5, np.nan), "1 features that are NaN or infinite"),
        ("tx", set_component("data", 5, np.inf), "1 features that are NaN or infinite"),
        ("tx", set_component("indices", 5, 1433), "feature index out of range: [0, 1433] in 1433 columns"),
        ("tx", set_component("indices", 5, -1), "feature index out of range: [-1, 1432]"),
        ("tx", set_component("indptr", 5, 10**6), "indptr does not rise"),
        ("tx", set_component("indptr", -1, 10), "indptr does not rise"),
        ("tx", set_component("indptr", 0, -1), "indptr does not rise"),
        ("tx", attribute("data", np.ones(3, dtype=np.float32)), "3 values for"),
        ("tx", attribute("data", np.ones((2, 2))), "data is not a vector"),
        ("tx", attribute("indices", np.ones(3)), "indices is not a vector of integers"),
        ("tx", attribute("indptr", None), "indptr is not a vector of integers"),
        ("tx", attribute("_shape", (10**12, 3)), "without a valid shape"),
        ("tx", attribute("_shape", [1000, 1433]), "without a valid shape"),
        ("tx", lambda x: x[:, :-1], "has 1432 columns, expected 1433 as in ind.cora.allx"),
        ("tx", lambda x: x[:-1], "ind.cora.ty has 1000 rows, expected 999"),
        ("tx", lambda x: x.toarray(), "must hold a scipy csr_matrix, got ndarray"),
        ("x", set_component("indices", 0, 18), "must hold the first rows of allx and ally"),
        ("x", lambda x: {"a": 1}, "must hold a scipy csr_matrix, got dict"),
        ("y", lambda y: y[:0], "holds no labels"),
        ("y", lambda y: y[1:], "has 139 rows, expected 140 as in ind.cora.x"),
        ("y", lambda y: y[:, 1:], "row 3 is not a one-hot label"),
        ("ty", set_item((3, slice(None)), 0), "row 3 is not a one-hot label"),
        ("ty", set_item((3, slice(None)), 1), "row 3 is not a one-hot label"),
        ("ty", lambda y: np.where(y == 1, np.nan, 0), "row 0 is not a one-hot label"),
        ("ty", lambda y: y.argmax(1), "two-dimensional numpy array of numbers, got int64 [1000]"),
        ("ty", lambda y: y.tolist(), "two-dimensional numpy array of numbers, got list"),
        ("ty", lambda y: y.astype(object), "an array of type 'O8', expected numbers"),
        ("ty", lambda y: y.astype("S1"), "an array of type 'S1'"),
        ("ally", lambda y: np.pad(y, ((0, 0), (0, 1))), "expected 8 as in ind.cora.ally"),
        ("test.index", lambda text: text + "2708\n", "lists 1001 nodes, expected 1000"),
        ("test.index", lambda text: text.replace("2692", "2708"), "lists nodes 1708 to 2708, expected 1708 to 2707"),
        ("test.index", lambda text: text.replace("2692", "2691"), "lists node 2691 twice"),
        ("test.index", lambda text: text.replace("2692", "1000"), "lists nodes 1000 to 2707"),
        ("test.index", lambda text: text.replace("2692", "-692"), "one node number a line, got '-692'"),
        ("test.index", lambda text: text.replace("2692", "9" * 5000), "one node number a line"),
        ("test.index", lambda text: text.replace("2692", "nan"), "one node number a line, got 'nan' as number 1"),
        ("test.index", lambda text: text.replace("2692", "26\u0662"), "one node number a line"),
    ],
)
def test_refused(cora, refusal, part, change, said):
    file = rewrite(cora, part, change)
    text = refusal(load_planetoid, "cora", cora)
    assert said in text
    assert "ind.cora." in text or text.startswith("cora: ")


@pytest.mark.filterwarnings("ignore")
def test_no_room_for_a_validation_split(cora, refusal):
    for part in ("allx", "ally"):
        rewrite(cora, part, lambda value: value[:600])
    said = "has 600 rows, expected at least 140 to train and 500 to validate on"
    assert said in refusal(load_planetoid, "cora", cora)


@pytest.mark.filterwarnings("ignore")
def test_no_training_nodes(cora, refusal):
    rewrite(cora, "x", lambda x: scipy.sparse.csr_matrix((0, x.shape[1]), dtype=np.float32))
    rewrite(cora, "y", lambda y: y[:0])
    assert "ind.cora.x" in refusal(load_planetoid, "cora", cora)


@pytest.mark.filterwarnings("ignore")
def test_repeated_and_unsorted_entries_are_put_in_order(cora):
    expected = load_planetoid("cora", cora)

    def shuffle(matrix):
        matrix = matrix.copy()
        for low, high in zip(matrix.indptr[:-1], matrix.indptr[1:]):
            matrix.indices[low:high] = matrix.indices[low:high][::-1]
        return matrix

    rewrite(cora, "tx", shuffle)
    rewrite(cora, "graph", lambda graph: {node: entry + entry[:1] for node, entry in graph.items()})
    assert load_planetoid("cora", cora).fingerprint == expected.fingerprint


def test_nothing_is_written_to_the_data_folder(cora):
    before = {file.name: file.stat().st_mtime_ns for file in cora.iterdir()}
    load_planetoid("cora", cora)
    assert {file.name: file.stat().st_mtime_ns for file in cora.iterdir()} == before
