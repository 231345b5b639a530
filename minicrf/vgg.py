"""The 16-layer VGG net made fully convolutional with holes (paper, Sec. 4.1; DeepLab's geometry).

    conv1  pool1  conv2  pool2  conv3  pool3  conv4  pool4  conv5  pool5  fc6-8   block
     306    154    154     78     78     40     40     40     40     40     40    cells a side
       1      2      1      2      1      2      1      1      1      1      1    stride
       1      1      1      1      1      1      1      1      2      2    4, 1    dilation: holes
Three presets share one builder: `vgg16` is the paper's; `largefov` has a small fc6 with larger
holes (Chen et al., 2015); `tiny` has a few channels and a small input, for the demo and the tests.
"""
import numpy as np

from .arrays import array_module, to_device
from .layers import BilinearUpsample, Conv2d, Dropout, MaxPool2d, ReLU, Sequential

# input_size in pixels; channels of conv1..conv5; fc6: kernel and dilation; fc: channels of fc6, fc7
PAPER = dict(input_size=306, channels=(64, 128, 256, 512, 512), dropout=0.5)
PRESETS = {
    "vgg16": dict(PAPER, fc6=(7, 4), fc=4096),
    "largefov": dict(PAPER, fc6=(3, 12), fc=1024),
    "tiny": dict(input_size=98, channels=(16, 24, 32, 48, 48), fc6=(3, 3), fc=96, dropout=0),
}
CONVOLUTIONS = (2, 2, 3, 3, 3)                # convolutions in each of the five blocks
POOLS = [dict(padding=(1, 1))] * 3 + [
    dict(stride=1, padding=(0, 1)),           # pool4 and pool5 no longer downsample;
    dict(stride=1, dilation=2, padding=(1, 1))]   # what follows them has holes instead


def build(preset, n_classes, seed=0, dropout=None, dtype=np.float32):
    """The network of that preset, freshly initialised: (B, 3, S, S) -> (B, n_classes, h, w) scores.

    preset: a name in PRESETS.  n_classes: L.  dropout: rate behind fc6 and fc7, None for the
    preset's own.  S = 306 gives h = w = 40.  The network carries `preset`, `input_size` (S) and
    `upsample`, aligned with its cells.  Raises ValueError for an unknown preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"net: found {preset!r}, expected one of {', '.join(PRESETS)}")
    sizes = PRESETS[preset]
    dropout = sizes["dropout"] if dropout is None else dropout
    rng = np.random.default_rng([seed, 0])
    layers, channels = {}, 3

    def convolution(name, channels_out, kernel, dilation):
        nonlocal channels
        layers[name] = Conv2d(channels, channels_out, kernel, dilation,
                              padding=(kernel - 1) * dilation // 2, rng=rng, dtype=dtype)
        channels = channels_out

    for block, (n, channels_out, pool) in enumerate(zip(CONVOLUTIONS, sizes["channels"], POOLS), 1):
        for i in range(1, n + 1):
            convolution(f"conv{block}_{i}", channels_out, 3, dilation=2 if block == 5 else 1)
            layers[f"relu{block}_{i}"] = ReLU()
        layers[f"pool{block}"] = MaxPool2d(**pool)
    convolution("fc6", sizes["fc"], *sizes["fc6"])
    layers |= {"relu6": ReLU(), "drop6": Dropout(dropout)}
    convolution("fc7", sizes["fc"], 1, 1)
    layers |= {"relu7": ReLU(), "drop7": Dropout(dropout)}
    convolution("fc8", n_classes, 1, 1)
    layers["fc8"].params["w"] *= 0.01 / layers["fc8"].params["w"].std()   # scores start near zero
    layers["conv1_1"].needs_dx = False

    net = Sequential(layers)
    net.preset, net.input_size = preset, sizes["input_size"]
    net.upsample = BilinearUpsample(*net.alignment(), net.input_size)
    return net


def move(net, device):
    """Put the network's parameters and gradients on `device` ("cpu" or "gpu")."""
    for layer in net.layers.values():
        layer.params = {key: to_device(p, device) for key, p in layer.params.items()}
        layer.grads = {key: to_device(g, device) for key, g in layer.grads.items()}


def scale_fresh(net, names, x):
    """Shift and scale each channel of freshly drawn layers to mean 0, variance 1 on a batch x.

    names: the fresh layers (fc8 is left alone: its small start is meant).  x: (B, 3, S, S).
    Paper silent: features after pool5 have a root mean square near 14, where He initialisation
    diverged at learning rate 0.01; starting from the data is as Kraehenbuehl et al. (2016) do.
    """
    xp = array_module(x)
    for name, layer in net.layers.items():
        x = layer.forward(x)
        if name in names and name != "fc8":
            mean = x.mean(axis=(0, 2, 3))                                # (O,)
            std = xp.sqrt(x.var(axis=(0, 2, 3)) + x.dtype.type(1e-6))
            layer.params["w"] /= std[:, None, None, None]
            layer.params["b"] -= mean
            layer.params["b"] /= std
            x -= mean[:, None, None]
            x /= std[:, None, None]


def seed_dropout(net, *seed):
    """Make the dropout masks of the next training step a function of these integers alone."""
    for number, layer in enumerate(net.layers.values()):
        if isinstance(layer, Dropout):
            layer.seed = (*seed, number)
