"""Reading pickles of plain data without giving the file any power.

A pickle is a program: it may name any importable function and have it called. Here the only names it may use are those
that NumPy writes for an array, and they lead to the stand-ins below, which accept arrays of unsigned bytes alone.
Even NumPy's own functions are kept out, since a forged dtype can make them misread memory.

Dictionaries have text or bytes as keys, and there are no sets: to hash tuples within tuples takes as long as a forged
file likes.

The unpickler is Python's own implementation in Python: the one in C allocates a table as long as the largest index in
the file, which a single damaged byte can make tens of gigabytes.
"""

import io
import pickle
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

__all__ = ["loads"]


class _Dtype:
    def __init__(self, code: str | bytes, *_: object) -> None:
        if code not in ("u1", "|u1", b"u1", b"|u1"):
            raise pickle.UnpicklingError(f"an array of dtype {code!r}; only unsigned bytes are allowed")

    def __setstate__(self, state: object) -> None:
        """Byte order and alignment, which mean nothing for single bytes."""


class _Array:
    """Stands in for numpy.ndarray; `value` is set once the state has been read."""

    value: np.ndarray | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, content = state
        self._set(content, dtype, shape, "F" if fortran else "C")

    def _set(self, content: Any, dtype: object, shape: Any, order: str) -> None:
        if not isinstance(dtype, _Dtype) or order not in ("C", "F"):
            raise pickle.UnpicklingError("a malformed array")
        if isinstance(content, str):
            content = content.encode("latin-1")
        flat = np.frombuffer(content, np.uint8)
        self.value = flat.reshape(shape) if order == "C" else flat.reshape(shape[::-1]).T


def _reconstruct(kind: object, shape: object, code: object) -> _Array:
    return _Array()


def _frombuffer(content: Any, dtype: object, shape: Any, order: str, *_: object) -> _Array:
    array = _Array()
    array._set(content, dtype, shape, order)
    return array


def _encode(text: str, encoding: str) -> bytes:
    # How Python 3 writes bytes in the protocols of Python 2.
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes encoded as {encoding!r}")
    return text.encode("latin-1")


_ALLOWED: tuple[tuple[tuple[str, ...], str, Any], ...] = (
    (("numpy",), "dtype", _Dtype),
    (("numpy",), "ndarray", _Array),
    (("numpy.core.multiarray", "numpy._core.multiarray"), "_reconstruct", _reconstruct),
    (("numpy.core.numeric", "numpy._core.numeric"), "_frombuffer", _frombuffer),
    (("_codecs",), "encode", _encode),
)


def _dictionary(items: list[Any]) -> dict[str | bytes, Any]:
    keys, values = items[::2], items[1::2]
    if not all(type(key) in (str, bytes) for key in keys):
        raise pickle.UnpicklingError("a dictionary's keys must be text")
    return dict(zip(keys, values, strict=True))


class _Unpickler(pickle._Unpickler):
    # The base class sets these in `load`.
    read: Callable[[int], bytes]
    append: Callable[[object], None]
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def _load_bytearray(self) -> None:
        # The inherited one allocates the announced length, however large, before it reads.
        announced_bytes = int.from_bytes(self.read(8), "little")
        content = self.read(min(announced_bytes, sys.maxsize))
        if len(content) != announced_bytes:
            raise pickle.UnpicklingError("truncated")
        self.append(bytearray(content))

    def _load_dict(self) -> None:
        # First: it also puts `append` back to the stack that was left at the mark.
        items = self.pop_mark()
        self.append(_dictionary(items))

    def _load_setitem(self) -> None:
        value = self.stack.pop()
        key = self.stack.pop()
        self._fill([key, value])

    def _load_setitems(self) -> None:
        self._fill(self.pop_mark())

    def _fill(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict):
            raise pickle.UnpicklingError("entries of what is no dictionary")
        self.stack[-1].update(_dictionary(items))

    def _refuse_set(self) -> None:
        raise pickle.UnpicklingError("the file has a set, which is not allowed")

    dispatch: ClassVar[dict[int, Any]] = pickle._Unpickler.dispatch | {
        pickle.BYTEARRAY8[0]: _load_bytearray,
        pickle.DICT[0]: _load_dict,
        pickle.SETITEM[0]: _load_setitem,
        pickle.SETITEMS[0]: _load_setitems,
        pickle.EMPTY_SET[0]: _refuse_set,
        pickle.FROZENSET[0]: _refuse_set,
    }

    def find_class(self, module: str, name: str) -> Any:
        for modules, allowed, stand_in in _ALLOWED:
            if module in modules and name == allowed:
                return stand_in
        raise pickle.UnpicklingError(f"the file asks for {module}.{name}, which is not allowed")


def loads(content: bytes) -> Any:
    """The object in `content`: builtin containers, numbers, text, bytes and uint8 arrays; text of Python 2 as bytes.

    Arrays at the top level of a dictionary are numpy arrays in the result. Raises whatever the unpickler raises.
    """
    loaded = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    if isinstance(loaded, dict):
        return {key: value.value if isinstance(value, _Array) else value for key, value in loaded.items()}
    return loaded
