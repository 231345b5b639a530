"""A reader of MATLAB's .mat files of version 5 (MathWorks, "MAT-File Format").

SBD's labels and MatConvNet's weights come so.  Not scipy.io.loadmat: its compiled reader crashes
on damaged types and on deep nesting.
"""
import itertools
import os
import zlib

import numpy as np

from ..files import reason

MAT_LEVELS, MAT_ARRAYS = 8, 2 ** 16           # VGG's .mat: 5 levels, less than 4000 arrays
MAT_TYPES = dict(zip((1, 2, 3, 4, 5, 6, 7, 9, 12, 13, 16, 17), "bBhHiIfdqQBH"))   # NumPy's


def read_mat(path, limit):
    """The variables {name: value} of a .mat file of version 5 (MathWorks, "MAT-File Format").

    Numbers are arrays of the type they are stored in; char arrays str, cell arrays lists, struct
    arrays dicts of lists, all in MATLAB's order; [] can be None, and objects, functions and sparse
    matrices, which nobody needs, are.  limit: bytes, of the file and of all it inflates to.
    Raises ValueError, OSError.  Not scipy.io.loadmat: its compiled reader crashes on damaged types
    and on deep nesting.
    """
    variables, ration = {}, iter(range(MAT_ARRAYS))
    with open(path, "rb") as file:                     # one beyond the limit looks cut off
        content = memoryview(file.read(min(limit, os.path.getsize(path))))
    try:
        if content[124:128] != b"\0\1IM":
            raise ValueError(f"found {bytes(content[124:128])}, expected a little-endian version 5")
        for kind, data in mat_elements(content[128:]):
            if kind == 15:                                               # compressed
                stream = zlib.decompressobj()
                data = memoryview(stream.decompress(data, limit + 1))
                limit -= len(data)
                if limit < 0 or not stream.eof:
                    raise ValueError("found compressed data cut off, or larger than allowed")
                [(kind, data)] = mat_elements(data)
            name, variables[name] = mat_array(kind, data, ration)
    except Exception as error:      # a file may lie in a dozen ways
        raise ValueError(f"{path}: found no sound .mat file: {reason(error)}") from None
    return variables


def mat_elements(data):
    """Yields (type, content) of the elements that follow each other in data; contents are views."""
    at = 0
    while at < len(data):
        kind, size = np.frombuffer(data[at:at + 8], "<u4").tolist()
        start, room = at + 8, len(data) - at - 8
        if kind >> 16:                             # short form: size and type in 4 bytes, data in 4
            kind, size, start, room = kind & 0xffff, kind >> 16, at + 4, 4
        if size > room:
            raise ValueError(f"found an element of {size} bytes, expected at most {room}")
        yield kind, data[start:start + size]
        at = start + size + (-(start + size - at) % 8 if kind != 15 else 0)


def mat_array(kind, data, ration, levels=MAT_LEVELS):
    """Name and value of one array.  ration: an iterator with one item for each array allowed."""
    if kind != 14 or not levels or next(ration, None) is None:
        raise ValueError(f"found type {kind} in level {MAT_LEVELS - levels + 1}, expected at most "
                         f"{MAT_ARRAYS} arrays (14) in {MAT_LEVELS} levels")
    if not data:
        return "", None
    parts = mat_elements(data)
    (_, flags), (_, shape), (_, name) = itertools.islice(parts, 3)
    kind, name = flags[0], str(name, "latin-1")
    if kind in (3, 5, 16, 17):                         # objects, sparse matrices, functions
        return name, None
    shape = np.frombuffer(shape, "<u4", len(shape) // 4)
    if kind in (1, 2):                                                   # cells, structs
        keys = [""]
        if kind == 2:
            _, (_, text) = itertools.islice(parts, 2)
            keys = [key for key in str(text[:2 ** 16], "latin-1").split("\0") if key]
        values = [mat_array(*part, ration, levels - 1)[1] for part in parts]
        if len(values) != int(shape.prod()) * len(keys):
            raise ValueError(f"found {len(values)} values, expected {len(keys)} x {shape[:9]}")
        structs = {key: values[i::len(keys)] for i, key in enumerate(keys)}
        return name, structs if kind == 2 else values
    (stored, data), *more = itertools.islice(parts, 2)
    if more or kind not in (4, *range(6, 16)) or stored not in MAT_TYPES:
        raise ValueError(f"found an array of class {kind} in {len(more) + 1} parts, the first of "
                         f"type {stored}, expected real numbers or text in one")
    if kind == 4:
        return name, str(data, "utf-16-le" if stored in (4, 17) else "utf-8", "replace")
    return name, np.frombuffer(data, "<" + MAT_TYPES[stored]).reshape(shape, order="F")
