"""Reads a pickled dict of arrays, lists, numbers and strings, and runs nothing that the file names.

A pickle is a program: it may call whatever ``find_class`` returns. Here the few names that numpy arrays
need are not looked up but answered with objects of this file, which only keep checked numbers and bytes.
That also makes files of numpy 1 and 2 (``numpy.core`` and ``numpy._core``) and Python 2 read alike.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np

from spanwise.core.errors import InputError

_ENCODINGS = ("latin1", "latin-1", "iso-8859-1")
_NUMBER = re.compile("[<>|=]?[biuf][0-9]*")


def read_pickled(path: Path, content: bytes) -> dict[str, Any]:
    """The dict in a pickle, with text keys and ``numpy.ndarray`` values where arrays were pickled.

    Args:
        path: only for messages.
        content: the whole file. Strings of Python 2 become ``bytes``, except keys.

    Returns:
        The dict; arrays below its first level are not converted.

    Raises:
        InputError: the file is no such pickle, or names a class or function that is not part of an array.
    """
    try:
        value: Any = _Reader(io.BytesIO(content), path).load()
    except InputError:
        raise
    except Exception as error:  # a broken pickle can raise nearly anything
        raise InputError(
            f"file '{path}': not a readable pickle ({type(error).__name__}: {error}); get the file again"
        ) from error
    if not isinstance(value, dict):
        raise InputError(
            f"file '{path}': holds a {type(value).__name__}, expected a dict of arrays and lists"
        )
    return {_text(key): _plain(item) for key, item in cast("dict[Any, Any]", value).items()}


class _Reader(pickle.Unpickler):
    """An unpickler in which only the names of :data:`_KNOWN` exist."""

    def __init__(self, file: io.BytesIO, path: Path) -> None:
        super().__init__(file, encoding="bytes")
        self._path = path

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """Answers a name with this file's stand-in, or refuses it."""
        name = f"{module_name}.{global_name}"
        if name not in _KNOWN:
            raise InputError(
                f"file '{self._path}': refers to '{name}', but only arrays, lists, dicts, numbers and "
                "strings may be in it; nothing was run. Get the file from the data set's own page"
            )
        return _Name(_KNOWN[name])


class _Name:
    """A callable whose attributes a pickle cannot set."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *args: Any) -> Any:
        return self._make(*args)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("state for a function")


class _DType:
    """What ``numpy.dtype`` stands for: a boolean, integer or floating-point type, in either byte order."""

    __slots__ = ("dtype",)

    def __init__(self, code: bytes | str, *_flags: object) -> None:
        self.dtype = _number(_text(code))

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = _number(_text(state[1]) + self.dtype.lstrip("<>|="))


def _number(code: str) -> str:
    if not _NUMBER.fullmatch(code):
        raise pickle.UnpicklingError(f"array of type '{code}', expected numbers")
    return code


class _Array:
    """An array that is made empty and then given (version, shape, type, Fortran order, bytes)."""

    __slots__ = ("array",)

    def __init__(self, *_args: object) -> None:
        self.array: np.ndarray[Any, Any] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, shape, of, fortran, raw = state
        self.array = _fill(raw, of, shape, "F" if fortran else "C")


def _from_buffer(raw: Any, of: Any, shape: Any, order: Any) -> _Array:
    made = _Array()
    made.array = _fill(raw, of, shape, _text(order))
    return made


def _fill(raw: Any, of: Any, shape: Any, order: str) -> np.ndarray[Any, Any]:
    if not isinstance(of, _DType) or not isinstance(raw, (bytes, bytearray)):
        raise pickle.UnpicklingError("array without a type and bytes")
    flat: np.ndarray[Any, Any] = np.frombuffer(bytes(raw), dtype=of.dtype)
    return np.reshape(flat, tuple(shape), order="F" if order == "F" else "C")


def _encode(text: str, encoding: str) -> bytes:
    """Python 3 writes bytes so in the old protocols."""
    if _text(encoding).lower() not in _ENCODINGS:
        raise pickle.UnpicklingError(f"bytes in encoding '{encoding}', expected latin1")
    return text.encode("latin1")


def _empty() -> bytes:
    """Python 3 writes b"" so in the old protocols."""
    return b""


# Every name a pickle of arrays and bytes may use; numpy.ndarray only says which class, nothing calls it.
_KNOWN: dict[str, Callable[..., Any]] = {
    "numpy.ndarray": _Array,
    "numpy.dtype": _DType,
    "numpy.core.multiarray._reconstruct": _Array,
    "numpy._core.multiarray._reconstruct": _Array,
    "numpy.core.numeric._frombuffer": _from_buffer,
    "numpy._core.numeric._frombuffer": _from_buffer,
    "_codecs.encode": _encode,
    "__builtin__.bytes": _empty,
}


def _text(value: Any) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def _plain(value: Any) -> Any:
    if not isinstance(value, _Array):
        return value
    return value.array
