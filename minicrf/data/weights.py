"""ImageNet weights of the 16-layer VGG net, from three formats into the network's one convention.

Convention: keys `conv1_1_w` (O, C, k, k), `conv1_1_b` (O,), ... `fc8_b`; input BGR, 0-255, minus
`mean` (3,), BGR.  Nothing in a file is executed.
"""
import json
import pathlib

import numpy as np

from ..saving import read_npz, reason
from .matfiles import read_mat

MEAN = (103.939, 116.779, 123.68)             # BGR, of the ImageNet training images
NAMES = [f"conv{b}_{i}" for b, n in zip(range(1, 6), (2, 2, 3, 3, 3)) for i in range(1, n + 1)]
FULLY_CONNECTED = ["fc6", "fc7"]              # the 1000-class fc8 is of no use here


def read_weights(path):
    """Weights from a .npz, .mat (MatConvNet) or .safetensors (torchvision's layout) file.

    Returns a dict of float arrays in the convention above, `mean` among them.  Raises ValueError
    with one line that names the file.
    """
    readers = {".npz": read_npz, ".mat": read_matconvnet, ".safetensors": read_torchvision}
    ending = pathlib.Path(path).suffix
    if ending not in readers:
        raise ValueError(f"{path}: found neither .npz, .mat nor .safetensors")
    try:
        weights = readers[ending](path)
    except Exception as error:                # broken files raise a dozen kinds
        why = reason(error).removeprefix(f"{path}: ")
        raise ValueError(f"{path}: no weights of a 16-layer VGG net in it ({why})") from None
    defaults = {"mean": np.array(MEAN), "scale": np.array(1.0)}
    weights = defaults | {key: array for key, array in weights.items()   # a checkpoint has more
                          if key[-2:] in ("_w", "_b") or key in defaults}
    check_numbers(path, weights)
    return weights


def check_numbers(path, arrays):
    """Raises ValueError unless all arrays hold finite floats, `mean` three and `scale` one."""
    for key, array in arrays.items():
        if array.dtype.kind != "f" or not float(abs(array).max(initial=0)) < 1e30:
            raise ValueError(f"{path}: {key}: found {array.dtype} with values that are not "
                             "floating-point numbers under 1e30")
    if arrays["mean"].shape != (3,) or arrays["scale"].shape != () or not arrays["scale"] > 1e-30:
        raise ValueError(f"{path}: found mean {arrays['mean'].tolist()} and scale "
                         f"{arrays['scale'].tolist()}, expected three numbers and one above 1e-30")


def read_torchvision(path):
    """A .safetensors file with torchvision's VGG-16: RGB, scaled to [0, 1] and standardised."""
    tensors = read_safetensors(path)
    layers = [f"features.{i}" for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)]
    layers += ["classifier.0", "classifier.3"]
    weights = {f"{name}_{ours}": tensors[f"{layer}.{theirs}"]
               for name, layer in zip(NAMES + FULLY_CONNECTED, layers)
               for ours, theirs in (("w", "weight"), ("b", "bias"))
               if f"{layer}.{theirs}" in tensors}
    for key, taps in (("fc6_w", 7), ("fc7_w", 1)):                       # matrices -> kernels
        if key in weights:
            weights[key] = weights[key].reshape(len(weights[key]), -1, taps, taps)
    # Theirs: w ((x / 255 - mean) / std).  Ours: (w / (255 std)) (x - 255 mean).  The mean stays
    # outside: folded into the bias, it would be wrong where zeros pad the border.
    std = np.array([0.229, 0.224, 0.225])                                # RGB
    weights["conv1_1_w"] = (weights["conv1_1_w"] / (255 * std)[:, None, None])[:, ::-1]  # -> BGR
    weights["mean"] = 255 * np.array([0.485, 0.456, 0.406])[::-1]
    return weights


def read_safetensors(path):
    """Tensors of a .safetensors file: 8 bytes header length, a JSON header, then raw values."""
    types = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
    content, tensors = np.memmap(path, np.uint8, "r"), {}
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start].tobytes())
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] in types:          # others are no weights
            begin, end = entry["data_offsets"]
            raw = content[start + begin:start + end].tobytes()
            tensors[name] = np.frombuffer(raw, types[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def read_matconvnet(path):
    """MatConvNet's imagenet-vgg-verydeep-16.mat: kernels (k, k, C, O), input RGB."""
    content, weights = read_mat(path), {}
    for layer in content["layers"][0]:                                   # (1, 1) structs
        [name] = layer["name"][0, 0]
        if name in NAMES + FULLY_CONNECTED:
            w, b = layer["weights"][0, 0][0, :2]
            weights[f"{name}_w"] = w.transpose(3, 2, 0, 1)
            weights[f"{name}_b"] = b.ravel()
    meta = content["meta"][0, 0]
    mean = meta["normalization"]["averageImage"][0, 0].astype(np.float64)    # (1, 1, 3), a picture
    weights["mean"] = mean.reshape(-1, 3).mean(axis=0)[::-1]             # RGB -> BGR
    weights["conv1_1_w"] = weights["conv1_1_w"][:, ::-1]
    return weights


def fill(net, weights, path):
    """Copy weights into the layers of net that they name; returns the names of those left as drawn.

    net: on the CPU.  weights: as read_weights returns them; path: for messages.  A fully connected
    layer that is absent stays as drawn; a convolution must be there, and every shape must fit.
    `largefov` takes the original fc6 and fc7 by sub-sampling taps and channels evenly, as DeepLab
    did.  Raises ValueError.
    """
    missing = list(dict.fromkeys(key[:-2] for key in net.params if key not in weights))
    convolutions = [name for name in missing if name.startswith("conv")]
    if convolutions:
        raise ValueError(f"{path}: {', '.join(convolutions)} missing, but all convolutions of a "
                         "16-layer VGG net are needed")
    for key, p in net.params.items():
        if key[:-2] in missing:
            continue
        values = weights[key]
        if net.preset == "largefov" and key[:-2] in FULLY_CONNECTED:
            values = subsample(values, p.shape)
        if values.shape != p.shape:
            raise ValueError(f"{path}: {key}: shape {values.shape} does not fit --net "
                             f"{net.preset}, which has {p.shape}")
        p[...] = values
    return missing


def subsample(values, shape):
    """Every n-th channel and kernel tap, as many as `shape` asks for, both ends of a kernel kept.

    An array that is too small for that is returned as it is.
    """
    if any(a < b for a, b in zip(values.shape, shape)):
        return values
    for axis, (a, b) in enumerate(zip(values.shape, shape)):
        taps = np.arange(b) * (a // b) if axis < 2 else np.linspace(0, a - 1, b).astype(int)
        values = values.take(taps, axis=axis)
    return values
