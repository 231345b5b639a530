"""Three file formats, one network function; and files that are not what they should be.

One set of parameters, in torchvision's convention, is written in all three formats by the functions
below, which are written from the formats' descriptions and not from the code that reads them.
"""
import json
import struct

import numpy as np
import pytest
import scipy.io

from minicrf import vgg
from minicrf.data.weights import MEAN, fill, read_weights

CONVOLUTIONS = ["conv1_1", "conv1_2", "conv2_1", "conv2_2", "conv3_1", "conv3_2", "conv3_3",
                "conv4_1", "conv4_2", "conv4_3", "conv5_1", "conv5_2", "conv5_3"]
FEATURES = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]              # torchvision's numbering
RGB_MEAN, RGB_STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
CHANNELS, FC = (4, 5, 6, 7, 8), 12


@pytest.fixture(autouse=True)
def thin(monkeypatch):
    """A few channels for both presets; `largefov` has a third of `vgg16`'s in fc6 and fc7."""
    for preset, fc in (("vgg16", FC), ("largefov", FC // 3)):
        sizes = {**vgg.PRESETS[preset], "channels": CHANNELS, "fc": fc}
        monkeypatch.setitem(vgg.PRESETS, preset, sizes)


@pytest.fixture(scope="module")
def theirs():
    """Parameters for RGB input, scaled to [0, 1] and standardised."""
    rng = np.random.default_rng(0)
    inputs = [3, 4, 4, 5, 5, 6, 6, 6, 7, 7, 7, 8, 8]
    outputs = [4, 4, 5, 5, 6, 6, 6, 7, 7, 7, 8, 8, 8]
    shapes = {name: (O, C, 3, 3) for name, C, O in zip(CONVOLUTIONS, inputs, outputs)}
    shapes |= {"fc6": (FC, 8, 7, 7), "fc7": (FC, FC, 1, 1)}
    params = {}
    for name, shape in shapes.items():
        params[f"{name}_w"] = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        params[f"{name}_b"] = rng.standard_normal(shape[0]) * 0.1
    return params


# --- writers -------------------------------------------------------------------------------------

def in_our_units(theirs):
    """conv1_1 for RGB in 0-255 minus 255 RGB_MEAN: the scale folded in, the mean left outside."""
    if "conv1_1_w" not in theirs:
        return theirs
    return {**theirs, "conv1_1_w": theirs["conv1_1_w"] / (255 * RGB_STD[:, None, None])}


def write_npz(path, theirs):
    bgr = {**in_our_units(theirs), "mean": 255 * RGB_MEAN[::-1]}
    if "conv1_1_w" in bgr:
        bgr["conv1_1_w"] = bgr["conv1_1_w"][:, [2, 1, 0]]
    with open(path, "wb") as file:
        np.savez(file, **bgr)
    return path


def safetensors(tensors, **overwritten):
    """The bytes of a .safetensors file; `overwritten` replaces entries of the header."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, values in tensors.items():
        types = {"float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64"}
        raw = np.ascontiguousarray(values).tobytes()
        header[name] = {"dtype": types[str(values.dtype)], "shape": list(values.shape),
                        "data_offsets": [len(data), len(data) + len(raw)]}
        header[name] |= overwritten.get(name, {})
        data += raw
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def torchvision_tensors(theirs):
    tensors = {}
    numbers = [f"features.{number}" for number in FEATURES] + ["classifier.0", "classifier.3"]
    for name, number in zip(CONVOLUTIONS + ["fc6", "fc7"], numbers):
        if f"{name}_w" in theirs:
            w = theirs[f"{name}_w"]
            tensors[f"{number}.weight"] = w.reshape(len(w), -1) if name[:2] == "fc" else w
            tensors[f"{number}.bias"] = theirs[f"{name}_b"]
    top = {"classifier.6.weight": np.ones((1000, FC)), "classifier.6.bias": np.ones(1000)}
    return {**tensors, **top}                      # ImageNet's classes: of no use here


def write_torchvision(path, theirs):
    path.write_bytes(safetensors(torchvision_tensors(theirs)))
    return path


def cell(*values):
    """A MATLAB cell array, 1 x n."""
    array = np.empty((1, len(values)), object)
    array[0, :] = values
    return array


def matconvnet_layers(theirs, old):
    layers = []
    for name in [*CONVOLUTIONS, "fc6", "fc7", "fc8"]:
        if name == "fc8":
            w, b = np.ones((1, 1, FC, 1000)), np.ones(1000)
        elif f"{name}_w" not in theirs:
            continue
        else:
            w, b = theirs[f"{name}_w"].transpose(2, 3, 1, 0), theirs[f"{name}_b"]    # (k, k, C, O)
        values = {"filters": w, "biases": b[None]} if old else {"weights": cell(w, b[:, None])}
        layers += [{"name": name, "type": "conv", "pad": np.ones(4), "stride": 1.0, **values},
                   {"name": name.replace("conv", "relu").replace("fc", "relu"), "type": "relu"}]
    return cell(*layers)


def write_matconvnet(path, theirs, old=False, compressed=False, picture=False):
    mean = 255 * RGB_MEAN
    mean = mean * np.ones((224, 224, 1)) if picture else mean[None, None]            # (1, 1, 3)
    normalization = {"averageImage": mean, "imageSize": [224.0, 224, 3], "interpolation": "bicubic"}
    meta = {"normalization": normalization}
    content = {"layers": matconvnet_layers(in_our_units(theirs), old)}
    content |= meta if old else {"meta": meta}
    scipy.io.savemat(path, content, do_compression=compressed)
    return path


FORMATS = {
    "npz": lambda path, theirs: write_npz(path, theirs),
    "safetensors": lambda path, theirs: write_torchvision(path, theirs),
    "mat": lambda path, theirs: write_matconvnet(path, theirs),
    "mat, compressed": lambda path, theirs: write_matconvnet(path, theirs, compressed=True),
    "mat, before 2015": lambda path, theirs: write_matconvnet(path, theirs, old=True, picture=True),
}


def load(net, path):
    weights = read_weights(path)
    return fill(net, weights, path), weights


def build(preset):
    return vgg.build(preset, 3, seed=5, dtype=np.float64)


# --- what is read --------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_function_of_a_photograph(kind, theirs, tmp_path):
    photograph = np.random.default_rng(1).integers(0, 256, (34, 34, 3)).astype(np.uint8)     # RGB
    net = build("vgg16")
    missing, weights = load(net, FORMATS[kind](tmp_path / "weights", theirs))
    assert missing == ["fc8"]
    bgr = photograph[:, :, ::-1] - weights["mean"]
    found = net.forward(bgr.transpose(2, 0, 1)[None].copy())

    twin = build("vgg16")                          # their parameters as they are, their input
    for key, values in theirs.items():
        twin.params[key][...] = values
    rgb = (photograph / 255 - RGB_MEAN) / RGB_STD
    expected = twin.forward(rgb.transpose(2, 0, 1)[None].copy())
    assert expected.std() > 0
    assert np.abs(found - expected).max() < 1e-9 * np.abs(expected).max()


@pytest.mark.parametrize("kind", FORMATS)
def test_convolutions_alone_leave_fc6_and_fc7_as_drawn(kind, theirs, tmp_path):
    convolutions = {key: values for key, values in theirs.items() if key.startswith("conv")}
    for preset in ("vgg16", "largefov"):
        net = build(preset)
        missing, _ = load(net, FORMATS[kind](tmp_path / "weights", convolutions))
        assert missing == ["fc6", "fc7", "fc8"]
        for key, p in build(preset).params.items():
            assert np.array_equal(net.params[key], p) == (not key.startswith("conv"))


@pytest.mark.parametrize("kind", FORMATS)
def test_largefov_takes_every_third_channel_and_tap(kind, theirs, tmp_path):
    net = build("largefov")
    missing, _ = load(net, FORMATS[kind](tmp_path / "weights", theirs))
    assert missing == ["fc8"]
    assert np.array_equal(net.params["fc6_w"], theirs["fc6_w"][::3, :, ::3, ::3])    # taps 0, 3, 6
    assert np.array_equal(net.params["fc6_b"], theirs["fc6_b"][::3])
    assert np.array_equal(net.params["fc7_w"], theirs["fc7_w"][::3, ::3])
    assert np.array_equal(net.params["fc7_b"], theirs["fc7_b"][::3])


@pytest.mark.parametrize("preset", ["vgg16", "largefov"])
def test_a_networks_own_npz_comes_back_whole(preset, tmp_path):
    net, other = build(preset), vgg.build(preset, 3, seed=6, dtype=np.float64)
    with open(tmp_path / "weights", "wb") as file:
        np.savez(file, **net.params)
    missing, weights = load(other, tmp_path / "weights")
    assert missing == []
    assert np.array_equal(weights["mean"], MEAN) and MEAN == (103.939, 116.779, 123.68)
    assert all(np.array_equal(net.params[key], p) for key, p in other.params.items())


@pytest.mark.parametrize("kind, dtype", [("npz", np.float16), ("safetensors", np.float16),
                                         ("npz", np.float32), ("safetensors", np.float32),
                                         ("mat", np.float32)])
def test_single_and_half_precision(kind, dtype, theirs, tmp_path):
    rounded = {key: values.astype(dtype) for key, values in theirs.items()}
    net = vgg.build("vgg16", 3)
    load(net, FORMATS[kind](tmp_path / "weights", rounded))
    assert np.array_equal(net.params["conv5_3_w"], rounded["conv5_3_w"].astype(np.float32))
    assert all(p.dtype == np.float32 for p in net.params.values())


def test_parameters_are_filled_in_place(theirs, tmp_path):
    net = build("vgg16")
    params = net.params
    load(net, write_npz(tmp_path / "weights", theirs))
    assert all(p is params[key] for key, p in net.params.items())


# --- what is refused -----------------------------------------------------------------------------

def refused(path, *words, preset="vgg16"):
    """Loading fails with one line that names the file, and nothing of it was copied."""
    net = build(preset)
    with pytest.raises((ValueError, OSError)) as error:
        load(net, path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message, message
    for word in words:
        assert word in message, message
    for key, p in build(preset).params.items():
        assert np.array_equal(net.params[key], p), key


def npz(path, **arrays):
    with open(path, "wb") as file:
        np.savez(file, **arrays)
    return path


@pytest.mark.parametrize("kind", FORMATS)
def test_a_wrong_shape(kind, theirs, tmp_path):
    for key in ("conv1_1_w", "conv5_3_b", "fc6_w"):
        short = {**theirs, key: theirs[key][:-1]}
        refused(FORMATS[kind](tmp_path / "weights", short), key, "vgg16")


@pytest.mark.parametrize("key, shape", [
    ("classifier.0.weight", (FC, 8 * 49 - 1)), ("classifier.0.weight", (FC, 7 * 49)),
    ("classifier.0.weight", (FC,)), ("classifier.0.weight", (0, 0)),
    ("features.0.weight", (4, 5, 3, 3)), ("features.0.weight", ())])
def test_a_wrong_shape_in_torchvisions_layout(key, shape, theirs, tmp_path):
    tensors = {**torchvision_tensors(theirs), key: np.ones(shape)}
    (tmp_path / "weights").write_bytes(safetensors(tensors))
    refused(tmp_path / "weights", "fc6_w" if key.startswith("classifier") else "conv1_1_w")


def test_largefov_needs_as_many_channels_as_it_takes(theirs, tmp_path):
    n = FC // 3 - 1
    narrow = {**theirs, "fc6_w": theirs["fc6_w"][:n], "fc6_b": theirs["fc6_b"][:n]}
    refused(write_npz(tmp_path / "weights", narrow), "fc6_w", "largefov", preset="largefov")


def test_weights_of_another_width_do_not_fit(theirs, tmp_path):
    refused(write_npz(tmp_path / "weights", theirs), "conv1_1_w", "(16, 3, 3, 3)", "tiny",
            preset="tiny")


@pytest.mark.parametrize("kind", FORMATS)
def test_a_missing_convolution_is_named(kind, theirs, tmp_path):
    for name in ("conv1_1", "conv4_2"):
        rest = {key: values for key, values in theirs.items() if not key.startswith(name)}
        refused(FORMATS[kind](tmp_path / "weights", rest), name)


@pytest.mark.parametrize("key", ["conv2_1_w", "conv2_1_b"])
def test_half_a_convolution_is_a_missing_one(key, theirs, tmp_path):
    rest = {k: values for k, values in theirs.items() if k != key}
    refused(write_npz(tmp_path / "weights", rest), "conv2_1")


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
@pytest.mark.parametrize("kind", FORMATS)
def test_numbers_that_are_not_finite(kind, bad, theirs, tmp_path):
    broken = {**theirs, "fc7_b": theirs["fc7_b"].copy()}
    broken["fc7_b"][-1] = bad
    refused(FORMATS[kind](tmp_path / "weights", broken), "fc7_b")


@pytest.mark.parametrize("mean", [np.ones(4), np.full(3, np.nan), np.array([1, 2, 3])])
def test_a_mean_that_is_none(mean, theirs, tmp_path):
    refused(npz(tmp_path / "weights", **theirs, mean=mean), "mean")


@pytest.mark.parametrize("dtype", [np.uint8, complex, "U8"])
def test_weights_of_another_type(dtype, theirs, tmp_path):
    wrong = np.zeros_like(theirs["conv3_1_w"]).astype(dtype)
    refused(npz(tmp_path / "weights", **{**theirs, "conv3_1_w": wrong}), "conv3_1_w")


@pytest.mark.parametrize("content", [
    b"", b"PK", b"PK\x03\x04 not a zip file", b"MATLAB 5.0 MAT-file", bytes(8) + b"{",
    b"\x02" + bytes(7) + b"{}", b"\x89HDF\r\n\x1a\n" + bytes(100), b"\x80\x04\x95pickle"])
def test_not_a_weights_file(content, tmp_path):
    (tmp_path / "weights").write_bytes(content)
    refused(tmp_path / "weights")


def test_no_file_and_a_folder(tmp_path):
    refused(tmp_path / "nowhere")
    refused(tmp_path)


@pytest.mark.parametrize("kind", FORMATS)
def test_truncated(kind, theirs, tmp_path):
    path = FORMATS[kind](tmp_path / "weights", theirs)
    whole = path.read_bytes()
    for share in (0.01, 0.5, 0.999):
        path.write_bytes(whole[:int(share * len(whole))])
        refused(path)


@pytest.mark.parametrize("entry", [
    {"data_offsets": [0, 10 ** 12]}, {"data_offsets": [864, 0]}, {"data_offsets": None},
    {"shape": [4, 3, 3]}, {"shape": [-4, -3, 3, 3]}, {"shape": None}, {"dtype": "BF16"},
    {"dtype": ["F64"]}])
def test_a_safetensors_header_that_lies(entry, theirs, tmp_path):
    """The truth of conv1_1: {"dtype": "F64", "shape": [4, 3, 3, 3], "data_offsets": [0, 864]}."""
    overwritten = {"features.0.weight": entry}
    (tmp_path / "weights").write_bytes(safetensors(torchvision_tensors(theirs), **overwritten))
    refused(tmp_path / "weights")


@pytest.mark.parametrize("header", [b"{", b"{}", b'{"a":' * 9000, b'{"\xff": 1}', b"{null}"])
def test_a_safetensors_header_of_another_kind(header, tmp_path):
    (tmp_path / "weights").write_bytes(struct.pack("<Q", len(header)) + header)
    refused(tmp_path / "weights")


def test_pickled_objects_are_not_executed(theirs, tmp_path):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "sprung"), "w")

    refused(npz(tmp_path / "weights", **{**theirs, "fc6_b": np.array([Trap()], object)}))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [
    {"layers": cell({"name": "conv1_1", "type": "conv"}), "meta": {}},
    {"layers": cell({"name": "conv1_1", "weights": cell(np.ones((3, 3)))}), "meta": {}},
    {"layers": cell({"name": "conv1_1", "weights": cell("abc", "def")}), "meta": {}},
    {"layers": 5.0}, {"layers": "text"}, {"layers": cell(1.0, 2.0)}, {"x": 1.0},
    {"layers": cell(), "meta": {"normalization": {"averageImage": 3.0}}}])
def test_a_mat_file_of_something_else(content, tmp_path):
    scipy.io.savemat(tmp_path / "weights", content)
    refused(tmp_path / "weights")


@pytest.mark.parametrize("kind", ["npz", "safetensors", "mat, compressed"])
def test_damaged_bytes_end_in_one_line_or_in_numbers(kind, theirs, tmp_path):
    """Either a refusal or finite weights, never another exception."""
    path = FORMATS[kind](tmp_path / "weights", theirs)
    whole, rng = path.read_bytes(), np.random.default_rng(2)
    for trial in range(20):
        content = bytearray(whole)
        start = max(0, len(whole) - 3000) * (trial % 2)                  # where the structure is
        for at in start + rng.integers(0, min(3000, len(whole)), rng.integers(1, 6)):
            content[at] = rng.integers(0, 256)
        path.write_bytes(bytes(content))
        net = build("vgg16")
        try:
            load(net, path)
        except (ValueError, OSError) as error:
            assert str(path) in str(error) and "\n" not in str(error)
        assert all(np.isfinite(p).all() for p in net.params.values())
