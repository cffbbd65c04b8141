import gzip
import io
import pickle
import warnings
import zipfile

import numpy as np
import pytest
import torch

from acefast.data import raw
from acefast.data.raw import read_csv, read_npz, read_pt


def write(path, text: bytes):
    with gzip.open(path, "wb") as file:
        file.write(text)
    return path


@pytest.fixture
def csv(tmp_path):
    return lambda text: write(tmp_path / "a.csv.gz", text)


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 64, 2**24])
@pytest.mark.parametrize("end", [b"\n", b""])
@pytest.mark.parametrize("rows", [3, None])
def test_csv_in_pieces_of_any_size(csv, monkeypatch, piece, end, rows):
    monkeypatch.setattr(raw, "PIECE", piece)
    found = read_csv(csv(b"1,-22\r\n333,4\n5,6" + end), rows, np.int32)
    assert found.dtype == np.int32 and found.tolist() == [[1, -22], [333, 4], [5, 6]]
    floats = read_csv(csv(b"0.5,-1e-3\n1,2.25\n3,nan"), rows, np.float32)
    assert floats.dtype == np.float32 and np.array_equal(
        floats, np.float32([[0.5, -1e-3], [1, 2.25], [3, np.nan]]), equal_nan=True
    )


@pytest.mark.parametrize(
    "text, dtype, said",
    [
        (b"1,2\n3,4\n", np.int32, "has 2 rows, expected 3"),
        (b"1\n" * 4, np.int32, "more than the expected 3 rows"),
        (b"", np.int32, "has 0 rows, expected 3"),
        (b"1,2\n3\n4,5\n", np.int32, "must have 2 numbers in each row, and has not in rows 1 to 3"),
        (b"1,2\n3,4,5\n6\n", np.int32, "must have 2 numbers in each row"),
        (b"1\n\n2\n", np.int32, "must hold integers, and has something else in rows 1 to 3"),
        (b"1,2\n3,\n4,5\n", np.int32, "must hold integers"),
        (b"1\n2.5\n3\n", np.int32, "must hold integers"),
        (b"1\nx\n3\n", np.float32, "must hold numbers"),
        (b"1\n0x10\n3\n", np.int32, "must hold integers"),
        (b"1\n3000000000\n3\n", np.int32, "numbers in [1, 3000000000], which do not fit int32"),
        (b"1\n99999999999999999999\n3\n", np.int32, "do not fit int32"),
    ],
)
def test_csv_refused(csv, refusal, text, dtype, said):
    assert said in refusal(read_csv, csv(text), 3, dtype)


def test_damaged_csv_is_refused(csv, refusal):
    path = csv(b"1,2\n" * 1000)
    whole = path.read_bytes()
    for damaged, said in [
        (whole[:-12], "is cut short"),
        (b"plain", "is damaged"),
        (whole[:20] + b"\x00" * 9 + whole[29:], "is damaged"),
    ]:
        path.write_bytes(damaged)
        assert said in refusal(read_csv, path, 1000, np.int32)
    assert "cannot be read: No such file" in refusal(read_csv, path.with_name("b"), 3, np.int32)


@pytest.mark.parametrize("piece", [8, 40, 2**24])
def test_npz(tmp_path, monkeypatch, refusal, piece):
    monkeypatch.setattr(raw, "PIECE", piece)
    path, a = tmp_path / "a.npz", np.arange(12).reshape(3, 4)
    np.savez_compressed(
        path, a=a, fortran=np.asfortranarray(a), big=a + 2**40, object=np.array([{}], dtype=object), half=np.float16(a)
    )
    assert np.array_equal(read_npz(path, "a", np.int32), a) and read_npz(path, "a", np.int32).dtype == np.int32
    assert np.array_equal(read_npz(path, "fortran", np.int32), a)
    assert np.array_equal(read_npz(path, "half", np.float32), a)
    assert "has no array b" in refusal(read_npz, path, "b", np.int32)
    assert "do not fit int32" in refusal(read_npz, path, "big", np.int32)
    assert "must hold numbers as object" in refusal(read_npz, path, "object", np.int32)
    whole = path.read_bytes()
    for damaged in (whole[:100], b"", whole[:60] + b"\xff" * 8 + whole[68:]):
        path.write_bytes(damaged)
        assert "damaged" in refusal(read_npz, path, "a", np.int32)
    assert "cannot be read" in refusal(read_npz, tmp_path / "none.npz", "a", np.int32)


def test_npz_cut_short_inside(tmp_path, refusal):
    """The archive is whole, the array in it is not."""
    path, array = tmp_path / "a.npz", io.BytesIO()
    np.save(array, np.arange(100))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", array.getvalue()[:-8])
    assert "damaged" in refusal(read_npz, path, "a", np.int64)


def test_pt(tmp_path):
    path, edges = tmp_path / "a.pt", np.arange(6).reshape(3, 2)
    content = {"edge": edges, "weight": torch.ones(3), "year": np.int32([1, 2, 3]), "names": ["x"]}
    for new in (True, False):
        torch.save(content, path, _use_new_zipfile_serialization=new)
        found = read_pt(path)
        assert list(found) == ["edge", "weight", "year"] and np.array_equal(found["edge"], edges)


class Runs:
    ran = []

    def __reduce__(self):
        return exec, ("from tests.data.test_raw import Runs; Runs.ran.append(1)",)


def test_pt_runs_nothing(tmp_path, refusal):
    path = tmp_path / "a.pt"
    for content in ({"edge": Runs()}, {"edge": np.array([Runs()], dtype=object)}):
        torch.save(content, path)
        assert "naming more than arrays" in refusal(read_pt, path)
    path.write_bytes(pickle.dumps({"edge": Runs()}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "a pickle protocol above 2" in refusal(read_pt, path)
    torch.save([1], path)
    assert "must hold a dictionary of arrays, got list" in refusal(read_pt, path)
    assert "cannot be read" in refusal(read_pt, tmp_path / "b.pt")
    assert not Runs.ran
