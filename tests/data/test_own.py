"""Your own graph: arrays, a file NAME.npz, a PyG Data; what does not fit is refused in one sentence."""

import re
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from torch_geometric.data import Data

import acefast
from acefast import cli
from acefast.csr import CSR
from acefast.data import Dataset, load_dataset, load_npz, synthetic_citation

N, F = 12, 40


def arrays(**changes) -> dict:
    """Arrays of a valid file: a ring of 12 nodes with sparse features and 3 classes."""
    ring = np.arange(N)
    x = np.zeros((N, F), dtype=np.float64)
    x[ring, ring % F] = 1 + ring
    made = dict(
        edge_index=np.stack([np.r_[ring, (ring + 1) % N], np.r_[(ring + 1) % N, ring]]), x=x, y=ring % 3,
        train=np.arange(6), val=np.arange(N) == 7, test=np.array([9, 11], dtype=np.uint8),
    )  # fmt: skip
    return {key: value for key, value in (made | changes).items() if value is not None}


def in_parts(x) -> dict:
    m = scipy.sparse.csr_matrix(x)
    return dict(x=None, x_rowptr=m.indptr, x_col=m.indices, x_value=m.data, x_shape=np.array(m.shape))


@pytest.fixture
def save(tmp_path):
    def call(name="mine.npz", **changes) -> Path:
        np.savez_compressed(tmp_path / name, **arrays(**changes))
        return tmp_path / name

    return call


def test_a_file_becomes_a_dataset(save):
    data = load_npz(save())
    assert (data.name, data.num_nodes, data.num_features, data.num_classes, data.graph.num_edges) == ("mine", N, F, 3, 2 * N)
    assert torch.equal(data.graph.edge_index(), torch.from_numpy(arrays()["edge_index"]))
    assert [part.tolist() for part in (data.train, data.val, data.test)] == [[0, 1, 2, 3, 4, 5], [7], [9, 11]]
    assert isinstance(data.x, CSR) and data.x.dtype == torch.float32
    assert torch.equal(data.x.to_dense(), torch.from_numpy(arrays()["x"]).float())
    assert load_npz(save("parts.npz", **in_parts(arrays()["x"]))).fingerprint == data.fingerprint
    assert load_dataset("mine.npz", save().parent).fingerprint == data.fingerprint
    dense = load_npz(save(x=np.ones((N, F), dtype=np.int8)))
    assert isinstance(dense.x, torch.Tensor) and torch.equal(dense.x, torch.ones(N, F))


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(edge_index=None), "has no array edge_index"),
        (dict(x=None), "has no array x or x_rowptr"),
        (in_parts(np.eye(N)) | dict(x_value=None), "has no array x_value"),
        (dict(edge_index=np.zeros((2, 3))), "edge_index must hold integers, got float64"),
        (dict(edge_index=np.zeros((3, 2), int)), r"edge_index must have shape \[2, E\]"),
        (dict(edge_index=np.array([[0], [N]])), "destination index 12 is out of range"),
        (dict(edge_index=np.array([[-1], [0]])), "source index -1 is out of range"),
        (dict(x=np.full((N, F), np.nan)), "features must be finite"),
        (dict(x=np.full((N, F), 1e300)), "features must be finite"),
        (dict(x=np.ones(N)), "x must be a matrix of numbers"),
        (dict(x=np.ones((N - 1, F))), r"x must be \[12, at least 1\]"),
        (dict(x=np.array([["a"]])), "x must hold numbers"),
        (dict(x=np.array([[None]])), "cannot be read: Object arrays cannot be loaded"),
        (in_parts(np.eye(N)) | dict(x_shape=np.array([N])), "x_shape must be the two sizes"),
        (in_parts(np.eye(N)) | dict(x_col=np.full(N, N)), r"col must lie in \[0, 12\)"),
        (in_parts(np.eye(N)) | dict(x_rowptr=np.arange(N)), "rowptr must be"),
        (dict(y=np.zeros(N)), "y must hold integers"),
        (dict(y=np.zeros((N, 1), int)), "y must be a vector"),
        (dict(y=np.zeros(N, int)), "num_classes must be"),
        (dict(y=np.arange(N) - 1), "labels must lie in"),
        (dict(y=np.zeros(0, int)), "over the 0 nodes"),
        (dict(train=np.array([0.5])), "train must hold integers"),
        (dict(train=np.ones(3, bool)), "train must be a bool mask over the 12 nodes"),
        (dict(val=np.zeros(N, bool)), "the val split is empty"),
        (dict(val=np.array([0])), "the val split shares node 0"),
        (dict(test=np.array([N])), "the test split names node 12"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(save, refusal, changes, says):
    path = save(**changes)
    text = refusal(load_npz, path)
    assert re.search(says, text) and str(path) in text


def test_damaged_files_are_refused(save, refusal, tmp_path):
    assert "there is no file" in refusal(load_npz, tmp_path / "absent.npz")
    path = save()
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"text", b"\x80\x04N."):
        path.write_bytes(damaged)
        assert "is no .npz file" in refusal(load_npz, path)
    middle = len(whole) // 3
    path.write_bytes(whole[:middle] + bytes(byte ^ 0x55 for byte in whole[middle : middle + 200]) + whole[middle + 200 :])
    assert "mine.npz" in refusal(load_npz, path)
    np.save(tmp_path / "array.npy", np.ones(3))
    assert "is no .npz file" in refusal(load_npz, tmp_path / "array.npy")


def test_search_on_a_file(save, tmp_path, capsys):
    save()
    args = "search --dataset mine.npz --method ugs --rounds 1 --hidden 4 --threads 1 --mask-epochs 2 --fix-epochs 2".split()
    args += ["--data-root", str(tmp_path), "--out"]
    assert cli.main([*args, str(tmp_path / "run")]) == 0
    assert "mine.npz with 12 nodes and 24 edges" in capsys.readouterr().out
    assert cli.main(["search", "--dataset", "absent.npz", "--out", str(tmp_path / "other")]) == 2
    assert "there is no file absent.npz" in capsys.readouterr().err


def pyg(**changes) -> Data:
    made = {key: torch.from_numpy(np.asarray(value)) for key, value in arrays().items()}
    masks = {}
    for part in ("train", "val", "test"):
        index = made.pop(part)
        masks[f"{part}_mask"] = index if index.dtype == torch.bool else torch.isin(torch.arange(N), index.long())
    return Data(**(made | masks | changes))


def test_a_pyg_data_is_the_same_dataset(save, refusal):
    data = Dataset.from_pyg(pyg(), name="ring")
    assert data.name == "ring" and data.fingerprint == load_npz(save()).fingerprint
    assert Dataset.from_pyg(pyg(y=pyg().y[:, None], x=pyg().x.to_sparse())).fingerprint == data.fingerprint
    assert "has no val_mask" in refusal(Dataset.from_pyg, pyg(val_mask=None))
    assert "train must be a vector" in refusal(Dataset.from_pyg, pyg(train_mask=torch.ones(N, 10, dtype=torch.bool)))
    assert "y must be a vector of integers" in refusal(Dataset.from_pyg, pyg(y=torch.rand(N)))
    assert "x must be" in refusal(Dataset.from_pyg, pyg(x=torch.ones(N, F, dtype=torch.complex64)))


def test_the_readme_searches_a_pyg_data(monkeypatch, tmp_path, capsys):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", readme, re.S) if "from_pyg" in block]
    assert len(block.splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        exec(block, {})
    finally:
        torch.set_num_threads(threads)
    assert "edges" in capsys.readouterr().out


def test_own_arrays_search_in_memory():
    data = synthetic_citation(80, 30, 3, seed=1, num_edges=160, words=6.0, train_per_class=6, num_val=20, num_test=24)
    x = data.x.to_dense()
    own = Dataset.from_arrays(data.graph.edge_index(), x, data.y, data.train, data.val, data.test)
    run = acefast.find_ticket(own, "gcn", "ugs", rounds=1, hidden=4, mask_epochs=2, fix_epochs=2, threads=1)
    assert run.tickets[0].metadata["dataset"] == "own" and len(run.tickets[0].graph(data.graph).edge_index()) == 2
