"""A reader of MATLAB's .mat files of version 5 (MathWorks, "MAT-File Format").

SBD's labels and MatConvNet's weights come so.  Not scipy.io.loadmat: its compiled reader crashes
on damaged types and on deep nesting.
"""
import itertools
import zlib

import numpy as np

from ..saving import reason

TYPES = dict(zip((1, 2, 3, 4, 5, 6, 7, 9, 12, 13, 16, 17), "bBhHiIfdqQBH"))      # NumPy's
LEVELS = 8                                         # of nesting; VGG's .mat has 5


def read_mat(path):
    """The variables {name: value} of a .mat file.

    Numbers are arrays of the type they are stored in; char arrays str, cell arrays lists, struct
    arrays dicts of lists, all in MATLAB's order; [] can be None, and objects, functions and sparse
    matrices, which nobody needs, are.  Raises ValueError, OSError.
    """
    variables = {}
    with open(path, "rb") as file:
        content = memoryview(file.read())
    try:
        if content[124:128] != b"\0\1IM":
            raise ValueError(f"found {bytes(content[124:128])}, expected a little-endian version 5")
        for kind, data in elements(content[128:]):
            if kind == 15:                                               # compressed
                [(kind, data)] = elements(memoryview(zlib.decompress(data)))
            name, variables[name] = array(kind, data)
    except Exception as error:      # a file may lie in a dozen ways
        raise ValueError(f"{path}: found no sound .mat file: {reason(error)}") from None
    return variables


def elements(data):
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


def array(kind, data, levels=LEVELS):
    """Name and value of one array, whose type is 14."""
    if kind != 14 or not levels:
        raise ValueError(f"found type {kind} in level {LEVELS - levels + 1}, expected arrays (14) "
                         f"in {LEVELS} levels")
    if not data:
        return "", None
    parts = elements(data)
    (_, flags), (_, shape), (_, name) = itertools.islice(parts, 3)
    kind, name = flags[0], str(name, "latin-1")
    if kind in (3, 5, 16, 17):                         # objects, sparse matrices, functions
        return name, None
    shape = np.frombuffer(shape, "<u4").tolist()
    if kind in (1, 2):                                                   # cells, structs
        keys = [""]
        if kind == 2:
            _, (_, text) = itertools.islice(parts, 2)
            keys = [key for key in str(text, "latin-1").split("\0") if key]
        values = [array(*part, levels - 1)[1] for part in parts]
        if len(values) != np.prod(shape, dtype=object) * len(keys):
            raise ValueError(f"found {len(values)} values, expected {shape} x {len(keys)}")
        structs = {key: values[i::len(keys)] for i, key in enumerate(keys)}
        return name, structs if kind == 2 else values
    [(stored, data)] = parts                                             # complex ones have two
    if kind not in (4, *range(6, 16)):
        raise ValueError(f"found an array of class {kind}, expected real numbers or text")
    if kind == 4:
        return name, str(data, "utf-16-le" if stored in (4, 17) else "utf-8", "replace")
    return name, np.frombuffer(data, "<" + TYPES[stored]).reshape(shape, order="F")
