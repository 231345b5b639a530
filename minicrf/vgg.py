"""The 16-layer VGG net made fully convolutional with holes (paper, Sec. 4.1; DeepLab's geometry).

Three presets share one builder: `vgg16` is the paper's; `largefov` has a small fc6 with larger
holes (Chen et al., 2015); `tiny` has a few channels and a small input, for the demo and the tests.
"""
import math

import numpy as np

from .arrays import THREADS, array_module, to_device
from .layers import (BilinearUpsample, Conv2d, Dropout, MaxPool2d, ReLU, Sequential,
                     PLANE_BYTES, block_rows)

# input_size in pixels; channels of conv1..conv5; fc6: kernel and dilation; fc: channels of fc6, fc7
PRESETS = {
    "vgg16": dict(input_size=306, channels=(64, 128, 256, 512, 512), fc6=(7, 4), fc=4096,
                  dropout=0.5),
    "largefov": dict(input_size=306, channels=(64, 128, 256, 512, 512), fc6=(3, 12), fc=1024,
                     dropout=0.5),
    "tiny": dict(input_size=98, channels=(16, 24, 32, 48, 48), fc6=(3, 3), fc=96, dropout=0),
}
CONVOLUTIONS = (2, 2, 3, 3, 3)                # convolutions in each of the five blocks
POOLS = (dict(padding=(1, 1)), dict(padding=(1, 1)), dict(padding=(1, 1)),
         dict(stride=1, padding=(0, 1)),      # pool4 and pool5 no longer downsample;
         dict(stride=1, dilation=2, padding=(1, 1)))   # what follows them has holes instead


def build(preset, n_classes, seed=0, dropout=None, dtype=np.float32):
    """The network of that preset, freshly initialised: (B, 3, S, S) -> (B, n_classes, h, w) scores.

    preset: a name in PRESETS.  n_classes: L.  dropout: rate behind fc6 and fc7, the preset's own by
    default.  With S = 306, `vgg16` and `largefov` give h = w = 40.  The network carries `preset`,
    `input_size` (S) and `upsample`, aligned with its cells.
    Raises ValueError for an unknown preset.
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

    for block in range(5):
        for i in range(CONVOLUTIONS[block]):
            name = f"{block + 1}_{i + 1}"
            convolution(f"conv{name}", sizes["channels"][block], 3, dilation=2 if block == 4 else 1)
            layers[f"relu{name}"] = ReLU()
        layers[f"pool{block + 1}"] = MaxPool2d(**POOLS[block])
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


def training_bytes(net, batch_size):
    """Bytes that a training step of `batch_size` images holds at its peak, momentum included.

    Follows one step: what each layer keeps for backward, and its working set.  Scores at original
    size and the CRF, a few images' worth, come on top.
    """
    p = net["fc8"].params["w"]
    xp, item = array_module(p), p.itemsize
    parameters = sum(q.nbytes for q in net.params.values())
    shape, kept, peak = (3, net.input_size, net.input_size), [], 0
    held = batch_size * math.prod(shape) * item
    for layer in net.layers.values():
        size = layer.output_size(shape[1])
        shape_in, shape = shape, (shape[0], size, size)
        working = new = 0
        if isinstance(layer, Conv2d):
            shape = (len(layer.params["b"]), size, size)
            new = batch_size * math.prod(shape) * item
            working = column_bytes(shape_in, layer, item, xp)
        elif isinstance(layer, MaxPool2d):          # its output, and the winning taps
            new = batch_size * math.prod(shape) * (item + 1)
        elif isinstance(layer, Dropout) and layer.rate:     # which values are kept, and the draw
            new, working = batch_size * math.prod(shape), 4 * batch_size * math.prod(shape)
        held += new
        peak = max(peak, held + working)
        kept.append((layer, shape_in, shape, new))

    for layer, shape_in, shape_out, new in reversed(kept):
        dy, dx = (batch_size * math.prod(s) * item for s in (shape_out, shape_in))
        held -= new                                 # the layers above have freed what they shared
        working = 0
        if isinstance(layer, Conv2d):               # dx needs the kernel turned, dw is summed up
            w = layer.params["w"].nbytes
            columns = column_bytes(shape_in, layer, item, xp)
            working = max(w + columns, dx + w + column_bytes(shape_out, layer, item, xp))
        elif isinstance(layer, MaxPool2d):
            in_flight = dx if xp is not np else min(dx, THREADS * PLANE_BYTES)
            working = dx + 3 * in_flight            # padded, compared with, multiplied
        peak = max(peak, held + dy + working)
    return 3 * parameters + peak


def column_bytes(shape, layer, itemsize, xp):
    """Bytes of the buffer of layers.column_blocks for an input (C, H, W) of a convolution."""
    if layer.kernel == 1:
        return 0
    C, H, W = shape
    column = C * layer.kernel ** 2 * itemsize
    return column * W * block_rows(column, H, W, xp) + C * (H + 2) * (W + 2) * itemsize
