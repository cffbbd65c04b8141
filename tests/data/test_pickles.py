"""A pickle is a program. None of these may run, whatever file they hide in, and each is refused in one sentence."""

import builtins
import collections
import os
import pickle
import subprocess
import sys
from struct import pack

import numpy as np
import pytest
import scipy.sparse

from acefast.data import load_planetoid
from acefast.data.pickles import Matrix, read_pickle


class Call:
    """Pickles as the call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def hidden(payload):
    """The payload in places where a reader that checks only the outermost object would not look."""
    array = np.arange(3)
    matrix = scipy.sparse.csr_matrix(np.eye(2))
    matrix.__dict__["extra"] = payload
    return {
        "plain": payload,
        "list": [1, [2, payload]],
        "tuple": (1, payload),
        "value": {0: [1], 1: payload},
        "neighbour": collections.defaultdict(list, {0: [payload]}),
        "beside an array": [array, payload],
        "attribute of a matrix": matrix,
    }


def calls(marker):
    command = f"touch {marker}"
    return {
        "os.system": Call(os.system, command),
        "eval": Call(eval, f"open({str(marker)!r}, 'w')"),
        "exec": Call(exec, f"open({str(marker)!r}, 'w')"),
        "open": Call(open, str(marker), "w"),
        "subprocess": Call(subprocess.check_output, ["touch", str(marker)]),
        "getattr": Call(getattr, 1, "real"),
        "import": Call(builtins.__import__, "this"),
        "ndarray.tofile": Call(np.ndarray.tofile, np.zeros(1), str(marker)),
        "numpy.save": Call(np.save, str(marker), np.zeros(1)),
        "numpy.load": Call(np.load, str(marker)),
        "loads": Call(pickle.loads, pickle.dumps(Call(os.system, command))),
    }


@pytest.fixture
def marker(tmp_path):
    path = tmp_path / "executed"
    yield path
    assert not path.exists() and not path.with_suffix(".npy").exists(), "the pickle was executed"
    assert "this" not in sys.modules, "the pickle imported a module"


@pytest.mark.parametrize("place", hidden(None))
@pytest.mark.parametrize("name", calls("m"))
def test_calls_are_named_and_not_run(marker, refusal, name, place):
    for protocol in range(2, 6):
        text = refusal(read_pickle, pickle.dumps(hidden(calls(marker)[name])[place], protocol=protocol), "file")
        assert "names " in text and "nothing was run" in text


ASSEMBLED = {
    "posix system": b"cposix\nsystem\n(S'touch MARKER'\ntR.",
    "eval of Python 2": b"\x80\x02c__builtin__\neval\n(S'open(\"MARKER\", \"w\")'\ntR.",
    "instance": b"(S'touch MARKER'\nios\nsystem\n.",
    "object": b"(cos\nsystem\nS'touch MARKER'\no.",
    "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch MARKER\x85R.",
    "dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
    "dotted module": b"cnumpy.f2py.crackfortran\nmyeval\n(S'1'\ntR.",
    "numpy test helper": b"cnumpy.testing._private.utils\nrunstring\n.",
    "memoised parts of a name": b"\x80\x04\x8c\x02os\x94\x8c\x06system\x940h\x00h\x01\x93)R.",
    "name that is no text": b"\x80\x04K\x01K\x02\x93.",
    "name with a newline": b"\x80\x04\x8c\x03o\ns\x8c\x06system\x93.",
    "name with terminal codes": b"\x80\x04\x8c\x05\x1b[2Jos\x8c\x06system\x93.",
    "long name": b"c" + b"a" * 10000 + b"\nb\n.",
    "module import only": b"cthis\ns\n.",
    "persistent id": b"Pthis\n.",
    "binary persistent id": b"K\x01Q.",
    "extension": b"\x80\x02\x82\x01.",
    "call of a list": b"]K\x01\x85R.",
    "call of a number": b"K\x01)R.",
    "call of text": b"S'os.system'\n(S'touch MARKER'\ntR.",
    "call of ndarray": b"cnumpy\nndarray\n(I10\ntR.",
    "huge ndarray": b"cnumpy\nndarray\n(L1000000000000L\ntR.",
    "call of a matrix": b"cscipy.sparse.csr\ncsr_matrix\n(I10\ntR.",
    "matrix with arguments": b"\x80\x02cscipy.sparse.csr\ncsr_matrix\nK\x01\x85\x81.",
    "new object of text": b"\x80\x02S'os'\n)\x81.",
    "new object with keywords": b"\x80\x04cscipy.sparse.csr\ncsr_matrix\n)}\x92.",
    "state of a constructor": b"cnumpy\nndarray\n}S'__setstate__'\nI1\nsb.",
    "state with slots": b"cscipy.sparse.csr\ncsr_matrix\n(N}S'x'\nI1\nstb.",
    "state of a number": b"K\x01}b.",
    "dtype of an object": b"cnumpy\ndtype\n(]tR.",
    "defaultdict of a call": b"ccollections\ndefaultdict\n(cnumpy\nndarray\ntR.",
    "defaultdict with items": b"ccollections\ndefaultdict\n(c__builtin__\nlist\n}tR.",
    "list of text": b"c__builtin__\nlist\n(S'abc'\ntR.",
    "other codec": b"c_codecs\nencode\n(S'touch'\nS'rot13'\ntR.",
    "append to a tuple": b")K\x01a.",
    "append to nothing": b"K\x01a.",
    "item of a list": b"]K\x01K\x02s.",
    "key that is a list": b"}]K\x01s.",
    "key that is a tuple": b"})K\x01s.",
    "deep key": b"}" + b")" + b"\x85" * 200000 + b"K\x01s.",
    "odd items": b"}(K\x01u.",
    "unknown memo": b"h\x05.",
    "huge memo": b"K\x01r\xff\xff\xff\x7f0.",
    "huge text": b"\x80\x04\x8d" + pack("<Q", 2**62) + b"a.",
    "huge bytes": b"\x80\x04\x8e" + pack("<Q", 2**40) + b"a.",
    "huge buffer": b"\x80\x05\x96" + pack("<Q", 2**50) + b"a.",
    "negative length": b"T\xff\xff\xff\xffa.",
    "huge integer": b"L" + b"9" * 100000 + b"L\n.",
    "out-of-band buffer": b"\x80\x05\x97.",
    "pop of nothing": b"0.",
    "mark only": b"(.",
    "marked constructor": b"cnumpy\ndtype\n(R.",
    "two objects": b"K\x01K\x02.",
    "nothing": b".",
    "trailing bytes": b"K\x01.K\x01.",
    "later protocol": b"\x80\x09K\x01\xfe.",
    "array never filled": b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR.",
}


@pytest.mark.parametrize("name", ASSEMBLED)
def test_assembled_programs_are_refused(marker, refusal, name):
    text = refusal(read_pickle, ASSEMBLED[name].replace(b"MARKER", str(marker).encode()), "file")
    assert text.startswith("file ") and text.isascii() and text.isprintable()


ARRAY = (
    b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01%s"
    b"cnumpy\ndtype\nU%s%sK\x00K\x01\x87R(K\x03U\x01%sNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    b"\x89U%s%stb."
)


def array(shape=b"K\x02\x85", dtype=b"i4", order=b"<", data=bytes(8)):
    return ARRAY % (shape, bytes([len(dtype)]), dtype, order, bytes([len(data)]), data)


def test_array():
    value = read_pickle(array(data=pack("<ii", 5, -7)), "file")
    assert value.dtype == np.int32 and value.tolist() == [5, -7]
    assert read_pickle(array(order=b">", data=pack(">ii", 5, -7)), "file").tolist() == [5, -7]
    assert read_pickle(array(shape=b"K\x00\x85", data=b""), "file").shape == (0,)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(dtype=b"O8"), "an array of type 'O8'"),
        (dict(dtype=b"V4"), "an array of type 'V4'"),
        (dict(dtype=b"i4,i4"), "an array of type 'i4,i4'"),
        (dict(dtype=b"M8"), "an array of type 'M8'"),
        (dict(dtype=b"i3"), "an array of type 'i3'"),
        (dict(order=b"x"), "state of what is no array"),
        (dict(data=bytes(7)), "an array [2] of int32 with 7 bytes, expected 8"),
        (dict(shape=b"K\x03\x85"), "with 8 bytes, expected 12"),
        (dict(shape=b"\x8a\x08" + pack("<q", 2**60) + b"\x85"), "without a valid shape"),
        (dict(shape=b"\x8a\x08" + pack("<q", -1) + b"\x85"), "without a valid shape"),
        (dict(shape=b"K\x02K\x01K\x01\x87"), "of one or two dimensions"),
        (dict(shape=b"\x88\x85"), "without a valid shape"),
        (dict(shape=b"K\x02"), "without a valid shape"),
    ],
)
def test_arrays_that_do_not_fit(changes, said, refusal):
    assert said in refusal(read_pickle, array(**changes), "file")


def test_many_arrays_over_one_text_cannot_fill_the_memory(refusal):
    text = b"\x80\x02(T" + pack("<i", 10**6) + bytes(10**6) + b"q\x01"
    one = array(shape=b"J" + pack("<i", 250000) + b"\x85", data=b"")[2:-1].replace(b"U\x00tb", b"h\x01tb")
    assert len(read_pickle(text + one + b"t.", "file")) == 2
    assert "larger than the file" in refusal(read_pickle, text + one * 100 + b"t.", "file")


def test_plain_values():
    value = {"a": [1, -2, 2**40, 1.5, None, True], 3: ("b", b"c", {})}
    for protocol in range(2, 6):
        assert read_pickle(pickle.dumps(value, protocol=protocol), "file") == value
    matrix = scipy.sparse.csr_matrix(np.eye(3, dtype=np.float32))
    for protocol in range(2, 6):
        read = read_pickle(pickle.dumps(matrix, protocol=protocol), "file")
        assert isinstance(read, Matrix) and read.state["_shape"] == (3, 3) and read.state["data"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("part", ["x", "tx", "allx", "y", "ty", "ally", "graph"])
def test_in_the_place_of_each_file(cora, marker, refusal, part):
    for name, call in calls(marker).items():
        (cora / f"ind.cora.{part}").write_bytes(pickle.dumps(call, protocol=2))
        text = refusal(load_planetoid, "cora", cora)
        assert f"ind.cora.{part} names " in text and "nothing was run" in text, name
