"""Pickles of plain arrays, read without running anything that they name.

`pickle.Unpickler` with a restricted `find_class` still executes what it allows: it calls numpy's constructors with the
file's arguments, sets attributes on what it built, hashes nested keys until the stack overflows and grows its memo to
whatever index is named. So the opcodes are only disassembled (`pickletools`) and interpreted here: they can make
numbers, strings, lists, tuples and dictionaries, plus inert records that stand for the array constructors.
"""

import math
import pickletools
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from acefast.errors import InputError


@dataclass(eq=False)
class Matrix:
    """A pickled scipy csr_matrix: its attributes, unchecked."""

    state: dict = field(default_factory=dict)


@dataclass(eq=False)
class _Name:
    """A global that the file names; `role` says which constructor it stands for."""

    role: str


@dataclass(eq=False)
class _Array:
    value: np.ndarray | None = None


@dataclass(eq=False)
class _DType:
    code: str
    order: str = "="


# Every global that is understood: those of the Planetoid files (Python 2, numpy 1, scipy 0.1x) and the names under
# which later versions of numpy, scipy and Python write the same objects.
_ALLOWED = {
    "numpy.core.multiarray _reconstruct": "reconstruct",
    "numpy._core.multiarray _reconstruct": "reconstruct",
    "numpy._core.numeric _frombuffer": "frombuffer",
    "numpy.core.numeric _frombuffer": "frombuffer",
    "numpy ndarray": "ndarray",
    "numpy dtype": "dtype",
    "scipy.sparse.csr csr_matrix": "csr_matrix",
    "scipy.sparse._csr csr_matrix": "csr_matrix",
    "collections defaultdict": "defaultdict",
    "__builtin__ list": "list",
    "builtins list": "list",
    "_codecs encode": "encode",
    "__builtin__ bytes": "bytes",
}


class _Refused(Exception):
    """Why a pickle is not read: the end of a sentence that begins with the file."""


def read_pickle(data: bytes, what: str) -> Any:
    """The object in the pickle `data`: numbers, strings, lists, tuples, dictionaries (keys int or str) or, outermost,
    a numpy array of numbers (at most two dimensions) or a `Matrix` of such arrays.

    Nothing is imported, called or executed, and memory is bounded by a multiple of len(data). Raises InputError, in one
    sentence that begins with `what`, for a file that is cut short, names any other global, or is no such pickle.
    """
    try:
        return _Machine().run(data)
    except _Refused as refusal:
        raise InputError(f"{what} {refusal}") from None
    except Exception:
        # Whatever a damaged file provokes in the disassembler or on the stack is the file's fault.
        raise InputError(f"{what} is damaged or not a pickle of arrays, fetch it anew") from None


_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING"),
    *("SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE", "BINUNICODE"),
    *("SHORT_BINUNICODE", "BINUNICODE8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_PUT = {"PUT", "BINPUT", "LONG_BINPUT"}
_GET = {"GET", "BINGET", "LONG_BINGET"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()


class _Machine:
    def __init__(self):
        self.stack: list = []
        self.memo: dict[int, Any] = {}
        self.budget = 0  # bytes that may still be copied: no more than the file has, however often it refers to them

    def run(self, data: bytes) -> Any:
        self.budget = len(data)
        try:
            for opcode, argument, position in pickletools.genops(data):
                if opcode.name != "STOP":
                    self.step(opcode.name, argument)
        except ValueError as error:
            if re.search("exhausted|not enough|remain|no newline", str(error)):
                raise _Refused(f"is cut short after {len(data)} bytes, fetch it anew") from None
            raise
        if position != len(data) - 1:
            raise _Refused(f"goes on for {len(data) - 1 - position} bytes after its end, fetch it anew")
        result = self.pop()
        if self.stack:
            raise _Refused("is damaged: it holds more than one object")
        if isinstance(result, Matrix):
            return Matrix({key: _finished(value) for key, value in result.state.items()})
        return _finished(result)

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _PUT:
            self.memo[argument] = stack[-1]
        elif name in _GET:
            stack.append(self.memo[argument])
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("EMPTY_LIST", "EMPTY_DICT"):
            stack.append([] if name == "EMPTY_LIST" else {})
        elif name == "APPEND":
            self.append([self.pop()])
        elif name == "APPENDS":
            self.append(self.to_mark())
        elif name == "SETITEM":
            value, key = self.pop(), self.pop()
            self.set([key, value])
        elif name == "SETITEMS":
            self.set(self.to_mark())
        elif name in _TUPLES:
            stack.append(tuple(reversed([self.pop() for _ in range(_TUPLES[name])])))
        elif name == "TUPLE":
            stack.append(tuple(self.to_mark()))
        elif name == "LIST":
            stack.append(self.to_mark())
        elif name == "DICT":
            items = self.to_mark()
            stack.append({})
            self.set(items)
        elif name in ("GLOBAL", "INST"):
            stack.append(self.name(argument))
            if name == "INST":
                raise _Refused("makes an object by INST, which no array needs")
        elif name == "STACK_GLOBAL":
            attribute, module = self.pop(), self.pop()
            stack.append(self.name(f"{_text(module)} {_text(attribute)}"))
        elif name == "REDUCE":
            arguments, constructor = self.pop(), self.pop()
            stack.append(self.construct(constructor, arguments))
        elif name == "NEWOBJ":
            arguments, constructor = self.pop(), self.pop()
            if not isinstance(constructor, _Name) or constructor.role != "csr_matrix" or arguments != ():
                raise _Refused("makes an object that is not an array")
            stack.append(Matrix())
        elif name == "BUILD":
            state = self.pop()
            self.build(stack[-1], state)
        elif name not in ("PROTO", "FRAME"):
            raise _Refused(f"uses the pickle instruction {name}, which no array needs")

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise _Refused("is damaged: a mark stands in place of an object")
        return value

    def to_mark(self) -> list:
        items = []
        while (value := self.stack.pop()) is not _MARK:
            items.append(value)
        return items[::-1]

    def append(self, items: list) -> None:
        if type(self.stack[-1]) is not list:
            raise _Refused("is damaged: it appends to what is not a list")
        self.stack[-1].extend(items)

    def set(self, items: list) -> None:
        target, keys, values = self.stack[-1], items[::2], items[1::2]
        # Only plain keys: hashing a deeply nested tuple would overflow the stack.
        if type(target) is not dict or len(keys) != len(values) or not all(type(key) in (int, str) for key in keys):
            raise _Refused("is damaged: it sets items of what is no dictionary or by keys that are no integers or text")
        target.update(zip(keys, values))

    @staticmethod
    def name(text: str) -> _Name:
        if text not in _ALLOWED:
            shown = ascii(text.replace(" ", ".", 1))[1:-1]
            raise _Refused(
                f"names {shown[:80]}, which is no array constructor: nothing was run, do not trust this file"
            )
        return _Name(_ALLOWED[text])

    def construct(self, constructor: Any, arguments: Any) -> Any:
        role = constructor.role if isinstance(constructor, _Name) else None
        if type(arguments) is tuple:
            if role == "reconstruct" and len(arguments) == 3 and getattr(arguments[0], "role", None) == "ndarray":
                return _Array()
            if role == "frombuffer" and len(arguments) == 4:
                buffer, dtype, shape, order = arguments
                return _Array(_array(buffer, dtype, shape, order == "F"))
            if role == "dtype" and arguments and type(arguments[0]) is str:
                return _DType(arguments[0])
            if role == "defaultdict" and len(arguments) == 1 and getattr(arguments[0], "role", None) == "list":
                return {}
            if role == "encode" and len(arguments) == 2 and type(arguments[0]) is str and arguments[1] == "latin1":
                return self.encode(arguments[0])
            if role == "bytes" and not arguments:
                return b""
        raise _Refused("is damaged: it calls what is no array constructor or with other arguments than an array has")

    def build(self, target: Any, state: Any) -> None:
        if isinstance(target, Matrix) and type(state) is dict:
            target.state.update(state)
        elif isinstance(target, _DType) and _is_tuple(state, 2) and state[1] in ("<", ">", "|", "="):
            target.order = state[1]
        elif isinstance(target, _Array) and _is_tuple(state, 5):
            _, shape, dtype, fortran, buffer = state[:5]
            if isinstance(buffer, str):
                buffer = self.encode(buffer)  # a Python 2 string
            target.value = _array(buffer, dtype, shape, bool(fortran))
        else:
            raise _Refused("is damaged: it sets the state of what is no array")

    def encode(self, text: str) -> bytes:
        self.budget -= len(text)
        if self.budget < 0:
            raise _Refused("is damaged: its arrays are larger than the file")
        return text.encode("latin1")


def _is_tuple(value: Any, length: int) -> bool:
    return type(value) is tuple and len(value) >= length


def _finished(value: Any) -> Any:
    if not isinstance(value, _Array):
        return value
    if value.value is None:
        raise _Refused("is damaged: it holds an array that was never filled")
    return value.value


def _text(value: Any) -> str:
    return value if type(value) is str else f"<{type(value).__name__}>"


def _array(buffer: Any, dtype: Any, shape: Any, fortran: bool) -> np.ndarray:
    """Array over `buffer`, not copied; the buffer's length must be that of `shape` and `dtype`."""
    if not isinstance(dtype, _DType) or not re.fullmatch("[<>|=]?([iu][1248]|f[248]|b1)", dtype.code):
        code = dtype.code[:20] if isinstance(dtype, _DType) else type(dtype).__name__
        raise _Refused(f"holds an array of type {ascii(code)}, expected numbers")
    kind = np.dtype(dtype.order + dtype.code.lstrip("<>|="))
    if type(shape) is not tuple or len(shape) > 2 or not all(type(n) is int and 0 <= n < 2**31 for n in shape):
        raise _Refused("holds an array without a valid shape of one or two dimensions")
    size = math.prod(shape) * kind.itemsize
    if not isinstance(buffer, bytes | bytearray) or len(buffer) != size:
        got = len(buffer) if isinstance(buffer, bytes | bytearray) else type(buffer).__name__
        raise _Refused(f"holds an array {list(shape)} of {kind} with {got} bytes, expected {size}")
    return np.ndarray(shape, kind, buffer, order="F" if fortran else "C")
