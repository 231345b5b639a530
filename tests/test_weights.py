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


def npz(folder, arrays):
    np.savez(folder / "weights.npz", **arrays)
    return folder / "weights.npz"


def write_npz(folder, theirs):
    bgr = {**in_our_units(theirs), "mean": 255 * RGB_MEAN[::-1]}
    if "conv1_1_w" in bgr:
        bgr["conv1_1_w"] = bgr["conv1_1_w"][:, [2, 1, 0]]
    return npz(folder, bgr)


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


def write(folder, ending, content):
    path = folder / f"weights.{ending}"
    path.write_bytes(content)
    return path


def write_torchvision(folder, theirs):
    return write(folder, "safetensors", safetensors(torchvision_tensors(theirs)))


def cell(*values):
    """A MATLAB cell array, 1 x n."""
    array = np.empty((1, len(values)), object)
    array[0, :] = values
    return array


def matconvnet_layers(theirs):
    layers = []
    for name in [*CONVOLUTIONS, "fc6", "fc7", "fc8"]:
        if name == "fc8":
            w, b = np.ones((1, 1, FC, 1000)), np.ones(1000)
        elif f"{name}_w" not in theirs:
            continue
        else:
            w, b = theirs[f"{name}_w"].transpose(2, 3, 1, 0), theirs[f"{name}_b"]    # (k, k, C, O)
        layers += [{"name": name, "type": "conv", "pad": np.ones(4), "stride": 1.0,
                    "weights": cell(w, b[:, None])},
                   {"name": name.replace("conv", "relu").replace("fc", "relu"), "type": "relu"}]
    return cell(*layers)


def write_matconvnet(folder, theirs, compressed=False, picture=False):
    mean = 255 * RGB_MEAN
    mean = mean * np.ones((224, 224, 1)) if picture else mean[None, None]            # (1, 1, 3)
    normalization = {"averageImage": mean, "imageSize": [224.0, 224, 3], "interpolation": "bicubic"}
    content = {"layers": matconvnet_layers(in_our_units(theirs)),
               "meta": {"normalization": normalization}}
    scipy.io.savemat(folder / "weights.mat", content, do_compression=compressed)
    return folder / "weights.mat"


FORMATS = {
    "npz": write_npz,
    "safetensors": write_torchvision,
    "mat": write_matconvnet,
    "mat, compressed": lambda folder, theirs: write_matconvnet(folder, theirs, True, True)}


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
    missing, weights = load(net, FORMATS[kind](tmp_path, theirs))
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
        missing, _ = load(net, FORMATS[kind](tmp_path, convolutions))
        assert missing == ["fc6", "fc7", "fc8"]
        for key, p in build(preset).params.items():
            assert np.array_equal(net.params[key], p) == (not key.startswith("conv"))


def test_largefov_takes_every_third_channel_and_tap(theirs, tmp_path):
    net = build("largefov")
    missing, _ = load(net, write_npz(tmp_path, theirs))
    assert missing == ["fc8"]
    assert np.array_equal(net.params["fc6_w"], theirs["fc6_w"][::3, :, ::3, ::3])    # taps 0, 3, 6
    assert np.array_equal(net.params["fc6_b"], theirs["fc6_b"][::3])
    assert np.array_equal(net.params["fc7_w"], theirs["fc7_w"][::3, ::3])
    assert np.array_equal(net.params["fc7_b"], theirs["fc7_b"][::3])


@pytest.mark.parametrize("preset", ["vgg16", "largefov"])
def test_a_networks_own_npz_comes_back_whole_and_fills_in_place(preset, tmp_path):
    net, other = build(preset), vgg.build(preset, 3, seed=6, dtype=np.float64)
    params = other.params
    missing, weights = load(other, npz(tmp_path, {**net.params, "info": "a checkpoint's"}))
    assert missing == []
    assert np.array_equal(weights["mean"], MEAN) and MEAN == (103.939, 116.779, 123.68)
    assert all(np.array_equal(net.params[key], p) for key, p in params.items())


@pytest.mark.parametrize("kind, dtype", [("npz", np.float16), ("safetensors", np.float16),
                                         ("safetensors", np.float32), ("mat", np.float32)])
def test_single_and_half_precision(kind, dtype, theirs, tmp_path):
    rounded = {key: values.astype(dtype) for key, values in theirs.items()}
    net = vgg.build("vgg16", 3)
    load(net, FORMATS[kind](tmp_path, rounded))
    assert np.array_equal(net.params["conv5_3_w"], rounded["conv5_3_w"].astype(np.float32))
    assert all(p.dtype == np.float32 for p in net.params.values())


# --- what is refused -----------------------------------------------------------------------------

def refused(path, *words, preset="vgg16"):
    """Loading fails with one line that names the file."""
    with pytest.raises(ValueError) as error:
        load(build(preset), path)
    message = str(error.value)
    assert message.count(str(path)) == 1 and "\n" not in message, message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("key", ["conv1_1_w", "conv5_3_b", "fc6_w"])
def test_a_wrong_shape(key, theirs, tmp_path):
    refused(write_npz(tmp_path, {**theirs, key: theirs[key][:-1]}), key, "vgg16")


@pytest.mark.parametrize("key, shape", [
    ("classifier.0.weight", (FC, 8 * 49 - 1)), ("classifier.0.weight", (FC, 7 * 49)),
    ("features.0.weight", (4, 5, 3, 3)), ("features.0.weight", ())])
def test_a_wrong_shape_in_torchvisions_layout(key, shape, theirs, tmp_path):
    tensors = {**torchvision_tensors(theirs), key: np.ones(shape)}
    refused(write(tmp_path, "safetensors", safetensors(tensors)), "shape")


def test_largefov_needs_as_many_channels_as_it_takes(theirs, tmp_path):
    n = FC // 3 - 1
    narrow = {**theirs, "fc6_w": theirs["fc6_w"][:n], "fc6_b": theirs["fc6_b"][:n]}
    refused(write_npz(tmp_path, narrow), "fc6_w", "largefov", preset="largefov")


def test_weights_of_another_width_do_not_fit(theirs, tmp_path):
    refused(write_npz(tmp_path, theirs), "conv1_1_w", "(16, 3, 3, 3)", "tiny", preset="tiny")


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", ["conv1_1", "conv4_2"])
def test_a_missing_convolution_is_named(kind, name, theirs, tmp_path):
    rest = {key: values for key, values in theirs.items() if not key.startswith(name)}
    refused(FORMATS[kind](tmp_path, rest), name)


@pytest.mark.parametrize("key", ["conv2_1_w", "conv2_1_b"])
def test_half_a_convolution_is_a_missing_one(key, theirs, tmp_path):
    rest = {k: values for k, values in theirs.items() if k != key}
    refused(write_npz(tmp_path, rest), "conv2_1")


@pytest.mark.parametrize("key, values", [
    ("fc7_b", np.full(FC, np.nan)), ("fc7_b", np.full(FC, -np.inf)), ("fc7_b", np.ones(FC, int)),
    ("fc7_b", np.full(FC, "1.0")), ("mean", np.ones(4)), ("mean", np.full(3, np.nan)),
    ("mean", np.array([1, 2, 3])), ("scale", np.array(0.0))])
def test_what_are_no_finite_floating_point_numbers(key, values, theirs, tmp_path):
    refused(npz(tmp_path, {**theirs, key: values}), key)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_truncated(kind, share, theirs, tmp_path):
    path = FORMATS[kind](tmp_path, theirs)
    whole = path.read_bytes()
    path.write_bytes(whole[:int(share * len(whole))])
    refused(path)


@pytest.mark.parametrize("ending, content", [
    ("npz", b"PK\x03\x04 not a zip file"), ("mat", b"\x89HDF\r\n\x1a\n" + bytes(100)),
    ("safetensors", struct.pack("<Q", 2) + b"{}"), ("safetensors", struct.pack("<Q", 2) + b"[]"),
    ("pth", b"\x80\x04\x95pickle")])
def test_files_of_another_kind(ending, content, tmp_path):
    refused(write(tmp_path, ending, content))


def test_tensors_of_other_kinds_are_passed_over(theirs, tmp_path):
    tensors = torchvision_tensors(theirs)
    more = tensors | {"batches_tracked": np.arange(3, dtype=np.int64)}
    found = read_weights(write(tmp_path, "safetensors", safetensors(more)))
    assert found.keys() == {*theirs, "mean", "scale"}


@pytest.mark.parametrize("ending", ["npz", "mat", "safetensors"])
def test_no_file(ending, tmp_path):
    with pytest.raises(ValueError, match="nowhere.* such file"):
        read_weights(tmp_path / f"nowhere.{ending}")


@pytest.mark.parametrize("entry", [
    {"data_offsets": [0, 10 ** 12]}, {"data_offsets": None}, {"shape": [4, 3, 3]},
    {"dtype": "BF16"}])
def test_a_safetensors_header_that_lies(entry, theirs, tmp_path):
    """The truth of conv1_1: {"dtype": "F64", "shape": [4, 3, 3, 3], "data_offsets": [0, 864]}."""
    content = safetensors(torchvision_tensors(theirs), **{"features.0.weight": entry})
    refused(write(tmp_path, "safetensors", content))


def test_pickled_objects_are_not_executed(theirs, tmp_path):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "sprung"), "w")

    refused(npz(tmp_path, {**theirs, "fc6_b": np.array([Trap()], object)}))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [
    {"layers": cell({"name": "conv1_1", "type": "conv"}), "meta": {}},
    {"layers": cell({"name": "conv1_1", "weights": cell("abc", "def")}), "meta": {}},
    {"layers": cell(1.0, 2.0)}, {"x": 1.0}])
def test_a_mat_file_of_something_else(content, tmp_path):
    scipy.io.savemat(tmp_path / "weights.mat", content)
    refused(tmp_path / "weights.mat")
