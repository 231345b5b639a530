"""The reader of .mat files: as scipy reads sound ones, one line for all others.

Sound files are scipy's; the bytes of others are put together here, from the format's description.
"""
import itertools
import struct
import zlib

import numpy as np
import pytest
import scipy.io
import scipy.sparse

from minicrf.data import voc
from minicrf.data.matfiles import read_mat
from minicrf.data.weights import read_matconvnet

HEADER = b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM"
CELL, STRUCT, OBJECT, CHAR, SPARSE, DOUBLE, UINT8, FUNCTION, OPAQUE = 1, 2, 3, 4, 5, 6, 9, 16, 17


# --- writers -------------------------------------------------------------------------------------

def cell(*values, shape=None):
    """A MATLAB cell array, 1 x n."""
    array = np.empty(len(values), object)
    array[:] = values
    return array.reshape(shape or (1, -1))


def weights_layout(old):
    rng = np.random.default_rng(0)
    w, b = rng.standard_normal((3, 3, 3, 2)).astype(np.float32), rng.standard_normal((1, 2))
    values = {"filters": w, "biases": b} if old else {"weights": cell(w, b)}
    layers = cell({"name": "conv1_1", "type": "conv", "stride": 1.0, **values},
                  {"name": "relu1_1", "type": "relu"})
    normalization = {"averageImage": rng.uniform(99, 130, (2, 3, 3)), "interpolation": "bicubic"}
    classes = {"name": cell("n01440764", "n01443537"), "description": cell("tench, Tinca", "")}
    rest = {"normalization": normalization, "classes": classes}
    return {"layers": layers, **(rest if old else {"meta": rest})}


def labels_layout():
    labels = np.random.default_rng(1).integers(0, 21, (5, 7)).astype(np.uint8)
    boundaries = cell(*[scipy.sparse.csc_matrix(labels == i) for i in range(20)], shape=(20, 1))
    return {"GTcls": {"Boundaries": boundaries, "Segmentation": labels,
                      "CategoriesPresent": np.unique(labels)[:, None]}}


LAYOUTS = {"weights": weights_layout(old=False), "weights of before 2015": weights_layout(old=True),
           "labels": labels_layout()}


def element(kind, content, size=None):
    size = len(content) if size is None else size
    return struct.pack("<II", kind, size) + content + bytes(-len(content) % 8)


def array(kind, *parts, shape=(1, 1), name=b""):
    """An array with these parts, whatever they are, after flags, shape and name."""
    shape = b"" if shape is None else element(5, np.array(shape, "<u4").tobytes())
    flags = element(6, struct.pack("<II", kind, 0))
    return element(14, b"".join([flags, shape, element(1, name), *parts]))


def doubles(*values, shape=None, name=b""):
    return array(DOUBLE, element(9, np.array(values, "<f8").tobytes()), name=name,
                 shape=shape or (1, len(values)))


def keys(*names, width=8):
    return (struct.pack("<HHI", 5, 4, width)
            + element(1, b"".join(name.ljust(width, b"\0") for name in names)))


def compressed(content):
    content = zlib.compress(content)
    return struct.pack("<II", 15, len(content)) + content


def write(path, *content):
    path.write_bytes(HEADER + b"".join(content))
    return path


def refused(path, *words):
    with pytest.raises(ValueError) as error:
        read_mat(path)
    message = str(error.value)
    assert message.startswith(f"{path}: found no sound .mat file: ") and "\n" not in message
    assert all(word in message for word in words), message


# --- sound files ---------------------------------------------------------------------------------

def plain(value):
    """What scipy makes of something, in read_mat's terms."""
    if scipy.sparse.issparse(value):
        return None
    if value.dtype.names:
        return {key: [plain(entry) for entry in value[key].ravel("F")] for key in value.dtype.names}
    if value.dtype == object:
        return [plain(entry) for entry in value.ravel("F")]
    return "".join(value) if value.dtype.kind == "U" else value


def assert_same(found, expected):
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for pair in zip(found, expected):
            assert_same(*pair)
    elif isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert np.array_equal(found, expected)
    else:
        assert found == expected


OTHERS = {
    "structs": np.array([(1.0, "a"), (cell(2.0, "b"), np.arange(6).reshape(2, 3))] * 2,
                        [("x", object), ("a_long_name_of_31_characters_xxx", object)])[:, None],
    "cells": cell("a", cell(), cell(cell(cell(1.0))), np.zeros((0, 3)), "", "\u00e9\u6f22",
                  shape=(3, 2)),
    "small": np.array([[1]], np.int16), "x": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    **{f"n_{np.dtype(t)}": np.arange(-3, 4).astype(t)[None] for t in "bBhHiIqQfd"}}


@pytest.mark.parametrize("compression", [False, True])
@pytest.mark.parametrize("content", [*LAYOUTS.values(), OTHERS], ids=[*LAYOUTS, "others"])
def test_what_scipy_writes_is_read_as_scipy_reads_it(content, compression, tmp_path):
    scipy.io.savemat(tmp_path / "x.mat", content, do_compression=compression, long_field_names=True)
    expected = scipy.io.loadmat(tmp_path / "x.mat")
    expected = {key: plain(value) for key, value in expected.items() if key[:2] != "__"}
    assert_same(read_mat(tmp_path / "x.mat"), expected)


def test_a_struct_without_fields_and_a_cell_without_content(tmp_path):
    scipy.io.savemat(tmp_path / "x.mat", {"x": {}, "y": cell(np.zeros((0, 3)))})
    assert read_mat(tmp_path / "x.mat")["x"] == {}
    assert read_mat(tmp_path / "x.mat")["y"][0].shape == (0, 3)
    path = write(tmp_path / "x.mat", array(CELL, element(14, b""), doubles(1, 2), shape=(1, 2)))
    nothing, numbers = read_mat(path)[""]
    assert nothing is None and numbers.tolist() == [[1, 2]]
    path = write(tmp_path / "x.mat", array(STRUCT, keys(b"x\xe9"), doubles(1), name=b"y\xe9"))
    [(name, values)] = read_mat(path).items()
    assert name == "y\u00e9" and list(values) == ["x\u00e9"]


def test_integers_that_matlab_stores_for_doubles_and_its_sixteen_bit_text(tmp_path):
    path = write(tmp_path / "x.mat", compressed(array(DOUBLE, element(2, b"\1\2"), shape=(1, 2))),
                 compressed(array(CHAR, element(4, "h\u00e9".encode("utf-16-le")), shape=(1, 2),
                                  name=b"t")),
                 doubles(3, name=b"after an element without padding"),
                 array(CHAR, element(16, b"x\xff"), shape=(1, 2), name=b"not UTF-8"))
    found = read_mat(path)
    assert found[""].tolist() == [[1, 2]] and found["t"] == "h\u00e9" and len(found) == 4
    assert found["not UTF-8"] == "x\ufffd"


def test_objects_functions_and_sparse_matrices_are_passed_over(tmp_path):
    """MATLAB leaves them in files beside what matters; nothing of them is read."""
    path = write(tmp_path / "x.mat", array(OBJECT, element(1, b"inline"), keys(b"x"), doubles(1)),
                 array(FUNCTION, doubles(1), name=b"f"), doubles(7, name=b"number"),
                 array(OPAQUE, element(1, b"MCOS"), element(1, b"string"), shape=None, name=b"o"),
                 array(SPARSE, doubles(1), name=b"s"))
    found = read_mat(path)
    assert found.pop("number") == 7 and set(found.values()) == {None}


# --- all others ----------------------------------------------------------------------------------

@pytest.mark.parametrize("start, words", [
    (b"", "found b''"), (HEADER[:-2] + b"MI", "MI"), (HEADER[:-4] + b"\0\2IM", "x02IM"),
    (struct.pack("<5I", 0, 1, 20, 0, 2) + b"x\0" + bytes(160), "version 5"),         # version 4
    (b"\x89HDF\r\n\x1a\n" + bytes(200), "version 5")])
def test_another_version_or_byte_order(start, words, tmp_path):
    (tmp_path / "x.mat").write_bytes(start)
    refused(tmp_path / "x.mat", words)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("content, words", [
    (element(14, b"", size=8), "8 bytes, expected at most 0"), (b"\1\2\3", "buffer size"),
    (array(CELL, element(14, b"", size=4000)), "4000 bytes, expected at most 0"),
    (array(UINT8, struct.pack("<HH", 2, 5) + bytes(12), shape=(1, 5)), "expected at most 4"),
    (element(2, b"12345678"), "type 2"), (array(CELL, element(9, bytes(8))), "type 9"),
    (array(CELL, compressed(doubles(1))), "type 15"),
    (compressed(compressed(doubles(1))), "type 15"),
    (compressed(doubles(1) + doubles(2)), "too many values"),
    (compressed(b"") + compressed(doubles(1)), "not enough values"),
    (element(15, zlib.compress(doubles(1))[:-1]), "incomplete or truncated"),
    (element(15, zlib.compress(doubles(1))[:-1] + b"?"), "incorrect data check"),
    (array(DOUBLE, element(8, bytes(8))), "8"),
    (array(DOUBLE, element(99, bytes(8))), "99"),
    (array(DOUBLE), "not enough values"), (element(14, bytes(16)), "not enough values"),
    (array(DOUBLE, element(9, bytes(8)), element(9, bytes(8))), "too many values"),    # complex
    (array(0, element(9, bytes(8))), "class 0"), (array(99, element(9, bytes(8))), "class 99"),
    (doubles(1, 2, 3, shape=(2, 2)), "size 3"), (doubles(shape=(2 ** 31, 2 ** 31)), "size 0"),
    (doubles(1, shape=[2 ** 32 - 1] * 9), "size 1"), (doubles(1, shape=[1] * 99), "dimension"),
    (array(DOUBLE, element(9, bytes(12)), shape=(1, 1)), "buffer size"),
    (array(CELL, doubles(1), shape=(1, 2)), "found 1 values"),
    (array(STRUCT, keys(*b"a b c d e".split()), shape=(2 ** 31, 2 ** 31)), "found 0 values"),
    (array(CELL, doubles(1), shape=(1, 0)), "found 1 values"),
    (array(STRUCT, keys(b"a", b"b"), doubles(1), doubles(1), doubles(1)), "found 3 values"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_an_element_that_cannot_be(content, words, tmp_path):
    refused(write(tmp_path / "x.mat", content), words)
    if content[:1] == b"\x0e":
        refused(write(tmp_path / "x.mat", doubles(1), compressed(content)), words)


def test_what_is_empty_may_have_any_shape(tmp_path):
    path = write(tmp_path / "x.mat", doubles(shape=(0, 1, 2 ** 32 - 1)),
                 array(STRUCT, keys(), shape=(2 ** 31, 2 ** 31), name=b"s"))
    found = read_mat(path)
    assert found[""].shape == (0, 1, 2 ** 32 - 1) and found["s"] == {}


@pytest.mark.parametrize("kind", [CELL, STRUCT])
def test_deep_nesting(kind, tmp_path):
    def nested(levels):
        content = doubles(1)
        for _ in range(levels):
            content = array(kind, content) if kind == CELL else array(kind, keys(b"a"), content)
        return content

    assert len(read_mat(write(tmp_path / "x.mat", nested(7)))) == 1
    refused(write(tmp_path / "x.mat", nested(8)), "in 8 levels")
    if kind == CELL:
        start = array(CELL)[8:]
        sizes = 8 + len(start) + (8 + len(start)) * np.arange(10000)[::-1]       # outermost first
        content = b"".join(struct.pack("<II", 14, size) + start for size in sizes.tolist())
        refused(write(tmp_path / "x.mat", content, element(14, b"")), "in 8 levels")


# --- damage --------------------------------------------------------------------------------------

@pytest.mark.parametrize("layout, read", [
    ("labels", voc._read_mat), ("weights", read_matconvnet),
    ("weights of before 2015", read_matconvnet)])
@pytest.mark.parametrize("compression", ["none", "outside", "inside"])
@pytest.mark.parametrize("trials", [40, pytest.param(2000, marks=pytest.mark.slow)])
def test_damage_ends_in_one_line_or_in_arrays(layout, read, compression, trials, tmp_path):
    """Flipped bits, changed bytes, cuts; with `inside`, compressed after the damage."""
    path, rng = tmp_path / "x.mat", np.random.default_rng(4)
    scipy.io.savemat(path, LAYOUTS[layout], do_compression=compression == "outside")
    whole, loaded = path.read_bytes(), 0
    variables = [128]                                                    # where they start and end
    while variables[-1] < len(whole):
        size = int.from_bytes(whole[variables[-1] + 4:variables[-1] + 8], "little")
        variables.append(variables[-1] + 8 + size)
    for trial in range(trials):
        content = bytearray(whole)
        for at in 128 + rng.integers(0, len(whole) - 128, rng.integers(1, 4)):
            content[at] = content[at] ^ (1 << rng.integers(8)) if trial % 2 else rng.integers(256)
        if trial % 5 == 0:
            del content[rng.integers(0, len(content)):]
        if compression == "inside":
            parts = [content[start:end] for start, end in itertools.pairwise(variables)]
            content = HEADER + b"".join(compressed(bytes(part)) for part in parts)
        path.write_bytes(content)
        try:
            loaded += read(path) is not None
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
    assert compression == "outside" or 0 < loaded < trials


@pytest.mark.parametrize("content", [5.0, "text", cell("a"), cell(), {}, np.zeros((1, 0), "O, O"),
                                     {"Segmentation": scipy.sparse.csc_matrix(np.eye(3))}])
def test_a_sound_file_without_labels(content, tmp_path):
    for name in ("GTcls", "GTinst"):
        scipy.io.savemat(tmp_path / "x.mat", {name: content})
        with pytest.raises(ValueError, match="x.mat: found no GTcls.Segmentation of integers"):
            voc._read_mat(tmp_path / "x.mat")


def test_a_sound_file_without_a_mean_is_refused_without_a_warning(tmp_path, recwarn):
    content = {**weights_layout(old=True), "normalization": {"averageImage": np.zeros((0, 3))}}
    scipy.io.savemat(tmp_path / "x.mat", content)
    with pytest.raises(ValueError, match="x.mat: not MatConvNet's"):
        read_matconvnet(tmp_path / "x.mat")
    assert not recwarn.list
