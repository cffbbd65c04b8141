import json
import warnings

import numpy as np
import pytest
import torch

from acefast.data.cache import cached

ARRAYS = {"a": np.arange(12, dtype=np.int32).reshape(3, 4), "b": np.zeros(0, dtype=np.float32)}


class Make:
    calls = 0

    def __call__(self):
        self.calls += 1
        return {name: array.copy() for name, array in ARRAYS.items()}


def check(found):
    assert list(found) == list(ARRAYS)
    assert all(
        torch.equal(found[name], torch.from_numpy(array)) and found[name].dtype for name, array in ARRAYS.items()
    )


def test_made_once_and_mapped(tmp_path):
    make = Make()
    for _ in range(3):
        found = cached(tmp_path / "new" / "folder", "entry", "key", make)
        check(found)
        found["a"][0] = 7  # changes this process's copy and no file
    assert make.calls == 1
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["entry"]
    check(cached(None, "entry", "key", make))
    assert make.calls == 2


def damage_array(entry):
    data = bytearray((entry / "a.npy").read_bytes())
    data[-5] ^= 1
    (entry / "a.npy").write_bytes(data)


def change_meta(**fields):
    def change(entry):
        meta = json.loads((entry / "meta.json").read_text())
        (entry / "meta.json").write_text(json.dumps({**meta, **fields}))

    return change


@pytest.mark.parametrize(
    "damage",
    [
        damage_array,
        lambda entry: (entry / "a.npy").write_bytes((entry / "a.npy").read_bytes()[:-4]),
        lambda entry: (entry / "a.npy").write_bytes(b""),
        lambda entry: (entry / "a.npy").unlink(),
        lambda entry: np.save(entry / "a.npy", np.array([{}], dtype=object)),
        lambda entry: np.save(entry / "a.npy", ARRAYS["a"].astype(np.int64)),
        lambda entry: np.save(entry / "a.npy", ARRAYS["a"].reshape(4, 3)),
        lambda entry: (entry / "meta.json").unlink(),
        lambda entry: (entry / "meta.json").write_text("{"),
        lambda entry: (entry / "meta.json").write_bytes(b"\xff\xfe"),
        lambda entry: (entry / "meta.json").write_text("[]"),
        change_meta(key="other"),
        change_meta(arrays=["a"]),
        change_meta(arrays={"a": None}),
    ],
)
def test_damaged_or_foreign_entries_are_made_anew(tmp_path, damage):
    make = Make()
    cached(tmp_path, "entry", "key", make)
    damage(tmp_path / "entry")
    check(cached(tmp_path, "entry", "key", make))
    assert make.calls == 2
    check(cached(tmp_path, "entry", "key", make))
    assert make.calls == 2


def test_another_key_replaces_the_entry(tmp_path):
    make = Make()
    for key in ("one", "two", "two", "one"):
        check(cached(tmp_path, "entry", key, make))
    assert make.calls == 3 and [path.name for path in tmp_path.iterdir()] == ["entry"]


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot be written .*, so entry will be made anew at each start"):
        check(cached(tmp_path / "file" / "folder", "entry", "key", Make()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(cached(tmp_path, "entry", "key", Make()))
