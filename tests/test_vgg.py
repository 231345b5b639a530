"""The network's table, where its cells lie, and what its holes stand in for."""
import numpy as np
import pytest
from PIL import Image
from helpers import random

from minicrf import vgg
from minicrf.gradcheck import relative_error
from minicrf.layers import Conv2d, Dropout, MaxPool2d, ReLU, Sequential

TABLE = {"conv1_1": 306, "conv1_2": 306, "pool1": 154, "conv2_1": 154, "conv2_2": 154, "pool2": 78,
         "conv3_1": 78, "conv3_2": 78, "conv3_3": 78, "pool3": 40,
         "conv4_1": 40, "conv4_2": 40, "conv4_3": 40, "pool4": 40,
         "conv5_1": 40, "conv5_2": 40, "conv5_3": 40, "pool5": 40, "fc6": 40, "fc7": 40, "fc8": 40}


@pytest.fixture
def thin(monkeypatch):
    """Shrinks every preset to a few channels; the geometry stays."""
    def shrink(channels, fc):
        for preset, sizes in vgg.PRESETS.items():
            monkeypatch.setitem(vgg.PRESETS, preset, {**sizes, "channels": channels, "fc": fc})
    return shrink


# --- the table -----------------------------------------------------------------------------------

@pytest.mark.parametrize("preset", ["vgg16", "largefov"])
def test_306_pixels_give_40_cells(preset, thin):
    thin((1, 1, 1, 1, 1), 1)
    net, size, sizes = vgg.build(preset, 21), 306, {}
    for name, layer in net.layers.items():
        size = layer.output_size(size)
        if isinstance(layer, (Conv2d, MaxPool2d)):
            sizes[name] = size
    assert sizes == TABLE
    assert net.output_size(306) == 40 and net.input_size == 306
    assert net.forward(random(1, 3, 306, 306).astype(np.float32)).shape == (1, 21, 40, 40)


@pytest.mark.parametrize("preset, fc6, fc", [("vgg16", (7, 4), 4096), ("largefov", (3, 12), 1024)])
def test_channels_kernels_and_dropout_are_the_papers(preset, fc6, fc):
    sizes = vgg.PRESETS[preset]
    assert sizes["channels"] == (64, 128, 256, 512, 512)
    assert (sizes["input_size"], sizes["fc6"], sizes["fc"]) == (306, fc6, fc)
    assert sizes["dropout"] == 0.5


def test_layers_of_vgg16(thin):
    thin((2, 3, 4, 5, 6), 7)
    net = vgg.build("vgg16", 21)
    shapes = [net[name].params["w"].shape for name in TABLE if name.startswith(("conv", "fc"))]
    assert shapes == [(2, 3, 3, 3), (2, 2, 3, 3), (3, 2, 3, 3), (3, 3, 3, 3), (4, 3, 3, 3),
                      (4, 4, 3, 3), (4, 4, 3, 3), (5, 4, 3, 3), (5, 5, 3, 3), (5, 5, 3, 3),
                      (6, 5, 3, 3), (6, 6, 3, 3), (6, 6, 3, 3), (7, 6, 7, 7), (7, 7, 1, 1),
                      (21, 7, 1, 1)]
    geometry = {name: (layer.kernel, layer.stride, layer.dilation, layer.padding)
                for name, layer in net.layers.items() if isinstance(layer, (Conv2d, MaxPool2d))}
    assert {geometry[name] for name in geometry if name < "conv5"} == {(3, 1, 1, (1, 1))}
    assert {geometry[f"conv5_{i}"] for i in (1, 2, 3)} == {(3, 1, 2, (2, 2))}
    assert {geometry[f"pool{i}"] for i in (1, 2, 3)} == {(2, 2, 1, (1, 1))}
    assert geometry["pool4"] == (2, 1, 1, (0, 1)) and geometry["pool5"] == (2, 1, 2, (1, 1))
    assert geometry["fc6"] == (7, 1, 4, (12, 12))
    assert vgg.build("largefov", 21)["fc6"].padding == (12, 12)


def test_every_hidden_layer_is_rectified_and_only_fc6_and_fc7_drop(thin):
    thin((1, 1, 1, 1, 1), 1)
    assert vgg.build("vgg16", 21)["drop7"].rate == 0.5                   # the preset's
    order = list(vgg.build("vgg16", 21, dropout=0.3).layers.values())
    for layer, following in zip(order, order[1:]):
        if isinstance(layer, Conv2d):
            assert isinstance(following, ReLU)
    assert isinstance(order[-1], Conv2d)           # the scores are not
    dropouts = [i for i, layer in enumerate(order) if isinstance(layer, Dropout)]
    assert [order[i].rate for i in dropouts] == [0.3, 0.3]
    assert [order[i - 1] for i in dropouts] == [order[-6], order[-3]]    # over relu6 and relu7


def test_tiny_forward():
    net = vgg.build("tiny", 5)
    assert net.output_size(98) == 14 and net.input_size == 98 and net.preset == "tiny"
    scores = net.forward(random(2, 3, 98, 98).astype(np.float32))
    assert scores.shape == (2, 5, 14, 14) and scores.dtype == np.float32
    image = net.upsample.forward(scores[0], (61, 83))
    assert image.shape == (61, 83, 5) and image.dtype == np.float32
    assert net.forward(random(1, 3, 50, 66).astype(np.float32)).shape == (1, 5, 8, 10)


def test_unknown_preset_is_refused():
    with pytest.raises(ValueError) as error:
        vgg.build("vgg19", 21)
    assert str(error.value) == "net: found 'vgg19', expected one of vgg16, largefov, tiny"


# --- how it starts -------------------------------------------------------------------------------

def test_a_seed_is_a_network():
    first, again, other = (vgg.build("tiny", 4, seed=seed).params for seed in (3, 3, 4))
    assert all(np.array_equal(first[key], again[key]) for key in first)
    assert not any(np.array_equal(first[key], other[key]) for key in first if key.endswith("_w"))


def test_scores_start_near_zero():
    net = vgg.build("tiny", 21)
    assert net["fc8"].params["w"].std() == pytest.approx(0.01, rel=1e-3)
    assert net["conv1_1"].needs_dx is False


def test_fresh_layers_start_at_zero_mean_and_unit_scale():
    """Each channel of a fresh layer on the batch it saw; loaded layers and fc8 stay as they are."""
    net, x = vgg.build("tiny", 5, dtype=np.float64), 60 * random(2, 3, 50, 50)
    fresh = ["conv4_2", "fc6", "fc7", "fc8"]
    before, kept = {key: p.copy() for key, p in net.params.items()}, x.copy()
    vgg.scale_fresh(net, fresh, x)
    assert np.array_equal(x, kept)
    y = x.copy()
    for name, layer in net.layers.items():
        y = layer.forward(y)
        if name in ("conv4_2", "fc6", "fc7"):
            assert np.abs(y.mean(axis=(0, 2, 3))).max() < 1e-8, name
            assert np.abs(y.var(axis=(0, 2, 3)) - 1).max() < 1e-2, name
            ratio = layer.params["w"] / before[f"{name}_w"]          # one scale for each channel
            assert np.allclose(ratio, ratio[:, :1, :1, :1], rtol=1e-9) and (ratio > 0).all()
            assert np.abs(ratio - 1).max() > 1e-3
        elif isinstance(layer, Conv2d):
            for key, p in layer.params.items():
                assert np.array_equal(p, before[f"{name}_{key}"])


def test_dropout_seeds_make_a_step_reproducible():
    net, x = vgg.build("tiny", 4, dropout=0.5), random(1, 3, 34, 34).astype(np.float32)

    def scores(*seed):
        vgg.seed_dropout(net, *seed)
        return net.forward(x.copy(), train=True)

    first = scores(0, 17)
    assert not np.array_equal(scores(0, 18), first)
    assert not np.array_equal(scores(1, 17), first)
    assert np.array_equal(scores(0, 17), first)
    assert net["drop6"].seed != net["drop7"].seed


# --- alignment -----------------------------------------------------------------------------------

@pytest.mark.parametrize("preset", vgg.PRESETS)
def test_cell_i_lies_at_pixel_8i_and_a_half(preset, thin):
    thin((1, 1, 1, 1, 1), 1)
    net = vgg.build(preset, 2)
    assert net.alignment() == (8, 0.5)
    assert (net.upsample.step, net.upsample.centre) == (8, 0.5)
    assert net.upsample.input_size == net.input_size


def pass_through(preset):
    """The preset with one channel that every convolution hands on as it is: a detector of blobs."""
    net = vgg.build(preset, 2, dtype=np.float64)
    for layer in net.layers.values():
        if isinstance(layer, Conv2d):
            w = layer.params["w"]
            w[...] = 0
            w[0, 0, layer.kernel // 2, layer.kernel // 2] = 1
    return net


@pytest.mark.parametrize("shape", [(1, 1), (1.25, 1.6), (0.9, 0.6)])
@pytest.mark.parametrize("preset", vgg.PRESETS)
def test_a_blob_comes_out_where_it_went_in(preset, shape, thin):
    """Photograph, resized, through the network and back to the photograph's own size.

    Half a pixel is the claim; what is left here is a blob sampled by cells of eight pixels.
    """
    thin((1, 1, 1, 1, 1), 1)
    net = pass_through(preset)
    S = net.input_size
    H, W = (int(S * side) for side in shape)
    sigma = 16.0 if S > 200 else 6.0               # in input pixels: smooth beside cells of 8
    for at in ((0.5, 0.5), (0.4, 0.6), (0.613, 0.437), (0.55, 0.62)):
        centre = np.array(at) * (H, W)
        rows, columns = np.ogrid[:H, :W]
        blob = np.exp(-(((rows - centre[0]) * S / H) ** 2 + ((columns - centre[1]) * S / W) ** 2)
                      / (2 * sigma ** 2))
        x = np.asarray(Image.fromarray(blob.astype(np.float32)).resize(
            (S, S), Image.Resampling.BILINEAR), np.float64)
        scores = net.forward(np.stack([x, 0 * x, 0 * x])[None])
        y = net.upsample.forward(scores[0], (H, W))[..., 0]
        found = np.array([(y * rows).sum(), (y * columns).sum()]) / y.sum()
        assert np.abs(found - centre).max() < 0.25, (found, centre)


# --- the à-trous identity ------------------------------------------------------------------------

def striding(net):
    """The same weights as pools that stride would have them: what the holes stand in for."""
    layers, step = {}, 1                           # step: the strides that `net` skipped so far
    for name, layer in net.layers.items():
        if isinstance(layer, Conv2d) and layer.kernel > 1:
            assert layer.dilation % step == 0 and layer.padding[0] % step == 0
            twin = Conv2d(1, 1, layer.kernel, layer.dilation // step, layer.padding[0] // step)
            twin.params = layer.params
            layer = twin
        if name in ("pool4", "pool5"):
            layer, step = MaxPool2d(2, 2), 2 * step
        layers[name] = layer
    return Sequential(layers)


@pytest.mark.parametrize("preset, fc6_dilation", [("vgg16", 1), ("largefov", 3)])
def test_holes_give_the_cells_of_striding_pools_and_those_between(preset, fc6_dilation, thin):
    thin((3, 3, 4, 4, 4), 5)
    dense = vgg.build(preset, 3, seed=1, dtype=np.float64)
    for key, p in dense.params.items():
        if key.endswith("_b"):
            p += 0.1 + 0.1 * random(*p.shape)
    sparse = striding(dense)
    assert sparse["conv5_1"].dilation == 1 and sparse["fc6"].dilation == fc6_dilation
    x = random(1, 3, 306, 306)
    outputs = {}
    for net in (dense, sparse):
        y = x.copy()
        for name, layer in net.layers.items():
            y = layer.forward(y)
            outputs.setdefault(name, []).append(y.copy())
    assert outputs["pool5"][0].shape[2:] == (40, 40) and outputs["pool5"][1].shape[2:] == (10, 10)
    for name, every, start in (("conv5_1", 2, 0), ("relu5_3", 2, 0), ("pool5", 4, 1),
                               ("relu6", 4, 1), ("fc8", 4, 1)):
        whole, part = outputs[name]
        whole = whole[:, :, start::every, start::every]
        margin = 3 if every == 4 else 6            # cells that see padding, counted in `part`
        assert whole.shape == part.shape
        inner = (..., slice(margin, -margin), slice(margin, -margin))
        assert whole[inner].size and whole[inner].std() > 0
        assert relative_error(whole[inner], part[inner]) < 1e-13, name
