"""The CIFAR reader on generated files, and what a hostile pickle can do to it: nothing."""

from __future__ import annotations

import hashlib
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spanwise.core.errors import InputError
from spanwise.zoo import cifar10, cifar100
from spanwise.zoo.data.pickled import read_pickled

FILES10 = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def images(rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, 3072), dtype=np.uint8)


def write_cifar10(root: Path, rows: int = 4, protocol: int = 2, **other: Any) -> Path:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for index, name in enumerate(FILES10):
        entries = {
            b"batch_label": b"generated",
            b"labels": [(index + row) % 10 for row in range(rows)],
            b"data": images(rows, index),
            b"filenames": [b"a.png"] * rows,
        }
        entries |= {key.encode(): value for key, value in other.items()}
        (folder / name).write_bytes(pickle.dumps(entries, protocol=protocol))
    return folder


def python2_batch(data: np.ndarray, labels: list[int]) -> bytes:
    """A batch as Python 2 wrote it: protocol 2, byte strings by SHORT_BINSTRING and BINSTRING, numpy 1."""

    def text(value: bytes) -> bytes:
        size = b"U" + bytes([len(value)]) if len(value) < 256 else b"T" + struct.pack("<i", len(value))
        return size + value

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
    array += b"(" + number(0) + b"t" + text(b"b") + b"\x87R"  # TUPLE3, REDUCE
    shape = number(data.shape[0]) + number(data.shape[1]) + b"\x86"
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + number(0) + number(1) + b"\x87R"
    dtype += b"(" + number(3) + text(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    array += b"(" + number(1) + shape + dtype + b"\x89" + text(data.tobytes()) + b"tb"
    listed = b"](" + b"".join(number(label) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + listed + b"u."


@pytest.mark.parametrize("protocol", range(2, 6))
def test_cifar10_rows_labels_and_statistics(tmp_path: Path, protocol: int) -> None:
    write_cifar10(tmp_path, protocol=protocol)
    train, test = cifar10(tmp_path, verify=False)
    x, y = train.tensors
    assert x.shape == (20, 3, 32, 32)
    assert test.tensors[0].shape == (4, 3, 32, 32)
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert y.tolist() == [(index + row) % 10 for index in range(5) for row in range(4)]
    raw = np.concatenate([images(4, i) for i in range(5)]).reshape(-1, 3, 32, 32).astype(np.float64)
    mean, std = raw.mean((0, 2, 3), keepdims=True), raw.std((0, 2, 3), keepdims=True)
    np.testing.assert_allclose(x.numpy(), (raw - mean) / std, atol=1e-5)
    held_out = images(4, 5).reshape(-1, 3, 32, 32)
    np.testing.assert_allclose(test.tensors[0].numpy(), (held_out - mean) / std, atol=1e-5)


def test_the_folder_itself_may_be_the_root(tmp_path: Path) -> None:
    folder = write_cifar10(tmp_path)
    assert len(cifar10(str(folder), verify=False)[0]) == 20


def test_files_of_python_2_and_numpy_1(tmp_path: Path) -> None:
    data = images(3, 7)
    content = python2_batch(data, [1, 2, 9])
    assert pickle.loads(content, encoding="bytes")[b"labels"] == [1, 2, 9]  # a pickle like any other
    entries = read_pickled(tmp_path / "batch", content)
    np.testing.assert_array_equal(entries["data"], data)
    assert entries["labels"] == [1, 2, 9]


@pytest.mark.parametrize("module", [b"numpy.core", b"numpy._core"])
def test_module_names_of_numpy_1_and_2(module: bytes, tmp_path: Path) -> None:
    content = pickle.dumps({"data": images(2, 0)}, protocol=2)
    written = b"numpy._core" if b"numpy._core" in content else b"numpy.core"
    entries = read_pickled(tmp_path, content.replace(written + b".multiarray", module + b".multiarray"))
    np.testing.assert_array_equal(entries["data"], images(2, 0))


@pytest.mark.parametrize("dtype", ["u1", ">i4", "<f8", "?"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("protocol", [2, 5])
def test_arrays_of_numbers_read_back(dtype: str, order: Any, protocol: int, tmp_path: Path) -> None:
    array = np.asarray(np.arange(6).reshape(2, 3), dtype=dtype, order=order)
    found = read_pickled(tmp_path, pickle.dumps({"a": array}, protocol=protocol))["a"]
    np.testing.assert_array_equal(found, array)
    assert found.dtype == array.dtype


@pytest.mark.parametrize(("coarse", "key"), [(False, "fine_labels"), (True, "coarse_labels")])
def test_cifar100(tmp_path: Path, coarse: bool, key: str) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    entries = {b"data": images(3, 0), b"fine_labels": [0, 50, 99], b"coarse_labels": [0, 7, 19]}
    for name in ("train", "test"):
        (folder / name).write_bytes(pickle.dumps(entries, protocol=2))
    train, _ = cifar100(tmp_path, verify=False, coarse=coarse)
    assert train.tensors[1].tolist() == entries[key.encode()]


def test_missing_folder_and_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no folder '.*batches-py'.*unpack cifar-10-python\.tar\.gz"):
        cifar10(tmp_path)
    folder = write_cifar10(tmp_path)
    (folder / "data_batch_3").unlink()
    with pytest.raises(InputError, match=r"no file '.*data_batch_3'.*unpack cifar-10-python\.tar\.gz"):
        cifar10(tmp_path, verify=False)
    with pytest.raises(InputError, match=r"cifar-100-python'.*cifar-100-python\.tar\.gz"):
        cifar100(tmp_path)


def test_altered_files_are_refused_unless_asked(tmp_path: Path) -> None:
    folder = write_cifar10(tmp_path)
    found = hashlib.md5((folder / "data_batch_1").read_bytes(), usedforsecurity=False).hexdigest()
    with pytest.raises(InputError) as caught:
        cifar10(tmp_path)
    for word in (found, "c99cafc152244af753f735de768cd75f", "verify=False", "data_batch_1"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"data": images(4, 0)[:, :3000]}, r"uint8 \(4, 3000\), expected uint8 \(rows, 3072\)"),
        ({"data": images(4, 0).astype(np.float32)}, "float32"),
        ({"data": [1, 2]}, "'data' is list"),
        ({"labels": [0, 1, 2]}, "4 images but 3 entries"),
        ({"labels": [0, 1, 2, 10]}, "values 0 to 10, expected 0 to 9"),
        ({"labels": [0, 1, 2, -1]}, "values -1 to 2"),
        ({"labels": [0, 1, 2, 0.5]}, "whole numbers"),
        ({"labels": [[0], [1, 2]]}, "whole numbers"),
        ({"labels": [True] * 4}, "whole numbers"),
        ({"labels": [0, 1, 2, 2**80]}, "whole numbers"),
        ({"labels": b"0123"}, "whole numbers"),
        ({"labels": [], "data": images(0, 0)}, "empty"),
    ],
)
def test_wrong_contents_are_named(tmp_path: Path, entries: dict[str, Any], words: str) -> None:
    write_cifar10(tmp_path, **entries)
    with pytest.raises(InputError, match=words) as caught:
        cifar10(tmp_path, verify=False)
    assert "data_batch_1" in str(caught.value)


def test_missing_entry_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    (folder / "train").write_bytes(pickle.dumps({b"data": images(1, 0)}, protocol=2))
    (folder / "test").write_bytes((folder / "train").read_bytes())
    with pytest.raises(InputError, match="no entry 'fine_labels', found: data"):
        cifar100(tmp_path, verify=False)


class Calls:
    """Unpickles to the call of a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def test_a_hostile_pickle_runs_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    folder = write_cifar10(tmp_path)
    hostile = pickle.dumps({b"data": Calls(os.mkdir, str(mark))}, protocol=2)
    (folder / "data_batch_2").write_bytes(hostile)
    with pytest.raises(InputError, match=r"data_batch_2'.*'(posix|nt)\.mkdir'"):
        cifar10(tmp_path, verify=False)
    assert not mark.exists()
    pickle.loads(hostile)  # negative control: the plain unpickler does run it
    assert mark.exists()


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", "os.system"),
        (b"cbuiltins\neval\n(S'1'\ntR.", "builtins.eval"),
        (b"cbuiltins\ngetattr\n.", "builtins.getattr"),
        (b"c__builtin__\ngetattr\n.", "__builtin__.getattr"),
        (b"cnumpy\nload\n(S'x'\ntR.", "numpy.load"),
        (b"cnumpy.core.multiarray\nscalar\n.", "numpy.core.multiarray.scalar"),
        (b"(S'true'\nios\nsystem\n.", "os.system"),
        (b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__init__\x93.", "numpy.dtype.__init__"),
        (b"\x80\x02cspanwise.zoo.data.pickled\n_Reader\n.", "spanwise.zoo.data.pickled._Reader"),
    ],
)
def test_every_other_name_is_refused(content: bytes, name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_pickled(tmp_path / "batch", content)
    assert f"'{name}'" in str(caught.value)
    assert "nothing was run" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a pickle",
        pickle.dumps({"data": images(2, 0)}, protocol=2)[:-200],
        pickle.dumps({"data": np.array([None, "x"], dtype=object)}, protocol=2),
        b"cnumpy\ndtype\n(S'O'\ntR.",
        b"cnumpy\ndtype\n(S'u1,u1'\ntR.",
        b"cnumpy\ndtype\n}S'_make'\nI1\nsb.",  # tries to overwrite an attribute of an allowed name
        b"\x80\x02cnumpy\ndtype\nN}U\x05_makeI1\ns\x86b.",
        b"c__builtin__\nbytes\n(I1000000000\ntR.",
        b"c_codecs\nencode\n(S'eJw'\nS'zip'\ntR.",
        b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
    ],
)
def test_broken_pickles_are_input_errors(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="batch': not a readable pickle") as caught:
        read_pickled(tmp_path / "batch", content)
    assert "\n" not in str(caught.value)


def test_not_a_dict(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds a list"):
        read_pickled(tmp_path, pickle.dumps([1]))
