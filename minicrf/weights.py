"""ImageNet weights of the 16-layer VGG net, from three formats into the network's one convention.

Convention: keys `conv1_1_w` (O, C, k, k), `conv1_1_b` (O,), ... `fc8_b`; input BGR, 0-255, minus
`mean` (3,), BGR.  What a file is, its content says; nothing in it is executed.
"""
import itertools
import json
import math
import os
import zipfile
import zlib

import numpy as np

from .files import reason

MEAN = (103.939, 116.779, 123.68)             # BGR, of the ImageNet training images
LIMIT = 2 ** 31                               # bytes: no VGG checkpoint comes near it
EXPANSION = 20                                # floats shrink by less; zip bombs by a thousand
NAMES = [f"conv{b}_{i}" for b, n in zip(range(1, 6), (2, 2, 3, 3, 3)) for i in range(1, n + 1)]
FULLY_CONNECTED = ["fc6", "fc7"]              # the 1000-class fc8 is of no use here
MAT_LEVELS, MAT_ARRAYS = 8, 2 ** 16           # VGG's .mat: 5 levels, less than 4000 arrays
MAT_TYPES = dict(zip((1, 2, 3, 4, 5, 6, 7, 9, 12, 13, 16, 17), "bBhHiIfdqQBH"))   # NumPy's


def read_weights(path):
    """Weights from a .npz, .mat (MatConvNet) or .safetensors (torchvision's layout) file.

    Returns a dict of float arrays in the convention above, `mean` among them.  Raises ValueError
    or OSError with one line that names the file, what was found and what was expected.
    """
    with open(path, "rb") as file:
        start = file.read(16)
    if start[:2] == b"PK":
        weights = read_npz(path)
    elif start.startswith(b"MATLAB 5.0"):
        weights = read_matconvnet(path)
    elif start[8:9] == b"{":
        weights = read_torchvision(path)
    else:
        raise ValueError(f"{path}: found neither .npz, .mat (version 5) nor .safetensors content")
    weights.setdefault("mean", np.array(MEAN))
    weights.setdefault("scale", np.array(1.0))
    if "conv1_1_w" not in weights:
        raise ValueError(f"{path}: found no conv1_1_w, expected the layers of a 16-layer VGG net")
    check_numbers(path, {key: array for key, array in weights.items()
                         if key in ("mean", "scale") or key[-2:] in ("_w", "_b")})
    return weights


def check_numbers(path, arrays):
    """Raises ValueError unless all arrays hold finite floats, `mean` three and `scale` one."""
    for key, array in arrays.items():
        largest = array.dtype.kind == "f" and max(array.max(initial=0), -array.min(initial=0))
        if array.dtype.kind != "f" or not float(largest) < 1e30:             # NaN is not
            raise ValueError(f"{path}: {key}: found {array.dtype} with values that are not "
                             "floating-point numbers under 1e30")
    if arrays["mean"].shape != (3,):
        raise ValueError(f"{path}: mean: found shape {arrays['mean'].shape}, expected (3,)")
    if arrays["scale"].shape != () or not arrays["scale"] > 1e-30:
        raise ValueError(f"{path}: scale: found {arrays['scale'].tolist()}, expected one number "
                         "above 1e-30")


def read_npz(path):
    """All arrays of a .npz file, checked in size before any is read.  Raises ValueError."""
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            entries = archive.infolist()
            size = sum(entry.file_size for entry in entries)
            for limit in (LIMIT, max(2 ** 26, EXPANSION * os.path.getsize(path))):
                if size > limit:
                    raise ValueError(f"found {size} bytes unpacked, expected at most {limit}")
            # zipfile stops at a damaged entry of the directory without a word
            file.seek(-22, os.SEEK_END)
            end = file.read()
            count = int.from_bytes(end[10:12], "little")
            if end.startswith(b"PK\5\6") and count != len(entries):
                raise ValueError(f"found {len(entries)} arrays, expected {count}")
            content = {}
            for entry in entries:
                with archive.open(entry) as member:
                    array = np.lib.format.read_array(member, allow_pickle=False)
                    if member.read(1):         # only at a member's end is its checksum compared
                        raise ValueError(f"found {entry.filename} longer than its array")
                content[entry.filename.removesuffix(".npy")] = array
            return content
    except Exception as error:      # zipfile, zlib and numpy raise a dozen kinds for broken files
        raise ValueError(f"{path}: not a readable .npz file: {reason(error)}") from None


def read_torchvision(path):
    """A .safetensors file with torchvision's VGG-16: RGB, scaled to [0, 1] and standardised."""
    tensors = read_safetensors(path)
    layers = [f"features.{i}" for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)]
    layers += ["classifier.0", "classifier.3"]
    weights = {}
    for name, theirs in zip(NAMES + FULLY_CONNECTED, layers):
        for ours, key in ((f"{name}_w", f"{theirs}.weight"), (f"{name}_b", f"{theirs}.bias")):
            if key in tensors:
                weights[ours] = tensors[key]
    for name, taps in (("fc6", 7), ("fc7", 1)):                          # matrices -> kernels
        w = weights.get(f"{name}_w")
        if w is not None and w.ndim == 2 and w.shape[1] % taps ** 2 == 0:
            weights[f"{name}_w"] = w.reshape(len(w), w.shape[1] // taps ** 2, taps, taps)
    if "conv1_1_w" in weights and weights["conv1_1_w"].shape[1:] == (3, 3, 3):
        # Theirs: w ((x / 255 - mean) / std).  Ours: (w / (255 std)) (x - 255 mean).  The mean stays
        # outside: folded into the bias, it would be wrong where the border is padded with zeros.
        std = np.array([0.229, 0.224, 0.225])                            # RGB
        w = weights["conv1_1_w"] / (255 * std)[:, None, None]
        weights["conv1_1_w"] = w[:, ::-1]                                # RGB -> BGR
    weights["mean"] = 255 * np.array([0.485, 0.456, 0.406])[::-1]
    return weights


def read_safetensors(path):
    """Tensors of a .safetensors file: 8 bytes header length, a JSON header, then raw values."""
    types = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
    size = os.path.getsize(path)
    left = min(size, LIMIT)
    tensors = {}
    with open(path, "rb") as file:
        try:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, 2 ** 24):
                raise ValueError(f"found a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
            for name, entry in header.items():
                if not name.startswith(("features.", "classifier.")) or entry["dtype"] not in types:
                    continue                       # what is missing is named when layers are filled
                begin, end = entry["data_offsets"]
                dtype, shape = np.dtype(types[entry["dtype"]]), [int(n) for n in entry["shape"]]
                if not (0 <= begin <= end <= size - 8 - length and min(shape, default=1) >= 0
                        and math.prod(shape) * dtype.itemsize == end - begin):
                    raise ValueError(f"{name}: found offsets {begin}..{end} for shape {shape}")
                left -= end - begin
                if left < 0:
                    raise ValueError(f"{name}: found tensors that overlap, or too many")
                file.seek(8 + length + begin)
                tensors[name] = np.frombuffer(file.read(end - begin), dtype).reshape(shape)
        except Exception as error:  # a header may lie in a dozen ways
            raise ValueError(f"{path}: not a readable .safetensors file: {reason(error)}") from None
    return tensors


def read_matconvnet(path):
    """MatConvNet's imagenet-vgg-verydeep-16.mat: kernels (k, k, C, O), input RGB."""
    content = read_mat(path, min(LIMIT, max(2 ** 26, EXPANSION * os.path.getsize(path))))
    try:
        weights = {}
        for layer in content["layers"]:
            [name] = layer["name"]
            if name in NAMES + FULLY_CONNECTED:
                old = "weights" not in layer                             # of before 2015
                w, b = layer["filters"] + layer["biases"] if old else layer["weights"][0][:2]
                weights[f"{name}_w"] = w.transpose(3, 2, 0, 1)
                weights[f"{name}_b"] = b.ravel()
        meta = content.get("meta", {"normalization": [content.get("normalization")]})
        mean = np.asarray(meta["normalization"][0]["averageImage"][0], dtype=np.float64)
        weights["mean"] = mean.reshape(-1, 3).sum(axis=0)[::-1] * (3 / mean.size)    # RGB -> BGR
        if "conv1_1_w" in weights:
            weights["conv1_1_w"] = weights["conv1_1_w"][:, ::-1]
        return weights
    except Exception as error:      # a sound file of anything else
        raise ValueError(f"{path}: not MatConvNet's imagenet-vgg-verydeep-16.mat: "
                         f"{reason(error)}") from None


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


def fill(net, weights, path):
    """Copy weights into the layers of net that they name; returns the names of those left as drawn.

    net: on the CPU.  weights: as read_weights returns them; path: for messages.  A fully connected
    layer that is absent stays as drawn; a convolution must be there, and every shape must fit.
    `largefov` takes the original fc6 and fc7 by sub-sampling taps and channels evenly, as DeepLab
    did.  Raises ValueError before anything is copied.
    """
    # a layer without its w or its b counts as missing, named once
    missing = list(dict.fromkeys(key[:-2] for key in net.params if key not in weights))
    convolutions = [name for name in missing if name.startswith("conv")]
    if convolutions:
        raise ValueError(f"{path}: found no {', '.join(convolutions)}, expected all convolutions "
                         "of a 16-layer VGG net")
    chosen = []
    for key, p in net.params.items():
        name = key[:-2]
        if name in missing:
            continue
        values = weights[key]
        if net.preset == "largefov" and name in FULLY_CONNECTED:
            values = subsample(values, p.shape)
        if values.shape != p.shape:
            raise ValueError(f"{path}: {key}: found shape {values.shape}, expected {p.shape} for "
                             f"--net {net.preset}")
        chosen.append((p, values))
    for p, values in chosen:
        p[...] = values
    return missing


def subsample(values, shape):
    """Every n-th channel and kernel tap of a larger array, as many as `shape` asks for; both ends
    of a kernel are kept.  Returned unchanged where the shape is no larger one in each direction."""
    if len(values.shape) != len(shape) or any(a < b for a, b in zip(values.shape, shape)):
        return values
    for axis, (a, b) in enumerate(zip(values.shape, shape)):
        taps = np.arange(b) * (a // b) if axis < 2 else np.linspace(0, a - 1, b).astype(int)
        values = values.take(taps, axis=axis)
    return values
