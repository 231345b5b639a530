"""The memory of a training step, as computed from the layers' caches and as measured."""
import tracemalloc

import numpy as np
import pytest
import strict_cupy

from minicrf import arrays, optim, vgg
from minicrf.arrays import BLAS_HAS_THREADS, PIECE_BYTES, SMALL, THREADS, array_module
from minicrf.im2col import tiles
from minicrf.layers import Conv2d, Dropout, MaxPool2d


def training_bytes(net, batch_size):
    """Bytes that a training step of `batch_size` images holds at its peak, momentum included.

    That is on the way back, at one of the layers: what those below it have kept, its dy, and what
    it works with.  Scores at original size and the CRF, a few images' worth, come on top.
    """
    fc8 = net["fc8"].params["w"]
    xp, item = array_module(fc8), fc8.itemsize

    def products(C_out, C_in, S, layer):
        """Bytes of the tiles in work, each with columns, what they are of and a result; sums."""
        y = xp.broadcast_to(fc8[:1, :1, :1, :1], (batch_size, C_out, S, S))
        every = tiles(y, C_in * layer.kernel ** 2)
        images, rows = every[0]
        cells = (images.stop - images.start) * S * (rows.stop - rows.start)
        parts = min(4 if xp is np else 1, len(every))
        in_threads = xp is np and not BLAS_HAS_THREADS and y.size > SMALL
        at_once = min(THREADS, parts) if in_threads else 1
        block = (C_in * (layer.kernel ** 2 + 1) + C_out) * cells * item
        return at_once * block, parts + at_once

    C, S = 3, net.input_size
    held, peak = batch_size * C * S ** 2 * item, 0
    for layer in net.layers.values():
        C_in, S_in, S = C, S, layer.output_size(S)
        C = len(layer.params["b"]) if isinstance(layer, Conv2d) else C
        dx, dy = batch_size * C_in * S_in ** 2 * item, batch_size * C * S ** 2 * item
        kept = working = 0
        if isinstance(layer, Conv2d):               # dw is summed up in parts, w turned for dx
            kept = dy
            block, sums = products(C_in, C, S_in, layer)
            working = (sums + 1) * layer.params["w"].nbytes + block + dx
        elif isinstance(layer, MaxPool2d):          # kept: its output, and the winning taps
            kept = dy + dy // item                  # in work: padded, compared with, multiplied
            working = dx + 3 * (min(dx, THREADS * PIECE_BYTES) if xp is np else dx)
        elif isinstance(layer, Dropout) and layer.rate:
            kept = working = dy // item             # as large as dy: the draw, on the way there
        peak = max(peak, held + dy + working)
        held += kept
    return 3 * sum(p.nbytes for p in net.params.values()) + peak


@pytest.mark.parametrize("preset, batch_size", [("tiny", 16), ("fewer channels, large input", 6),
                                                ("fewer channels, large input", 12)])
def test_computed_memory_is_what_a_step_allocates(preset, batch_size, monkeypatch):
    monkeypatch.setitem(vgg.PRESETS, "fewer channels, large input",
                        dict(input_size=162, channels=(8, 8, 16, 16, 16), fc6=(7, 4), fc=64,
                             dropout=0.5))
    tracemalloc.start()
    net = vgg.build(preset, 5)
    optimiser = optim.SGD(net.params, net.grads, dict.fromkeys(net.params, 0.1),
                          dict.fromkeys(net.params, 0.0))
    x = np.ones((batch_size, 3, net.input_size, net.input_size), np.float32)
    net.backward(net.forward(x, train=True) * 0)
    measured = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert optimiser and training_bytes(net, batch_size) == pytest.approx(measured, rel=0.1)


def test_the_papers_step_fits_the_papers_card(monkeypatch):
    """vgg16, batch of 20, 12 GB, on the CPU and on a GPU."""
    monkeypatch.setattr(arrays, "cupy", strict_cupy.cupy)
    net = vgg.build("vgg16", 21)
    assert training_bytes(net, 20) < 9.5e9
    fc8 = net["fc8"]
    fc8.params = {key: strict_cupy.ndarray(p) for key, p in fc8.params.items()}
    assert training_bytes(net, 20) < 8e9
