"""What a joint training step asks of a GPU, counted on any machine: see strict_cupy.py.

Only the lattices of one picture are built, for the sizes that depend on its colours; all else is
counted by shape, as if every picture of the batch were that one.
"""
import collections
import contextlib
from unittest import mock

import numpy as np
import shapes
import strict_cupy

from minicrf import DenseCRF, arrays, training, vgg
from minicrf.data import toy, weights
from minicrf.programs import gpu
from minicrf.layers import Sequential
from minicrf.inputs import VOID
from minicrf.optim import SGD

REST = "upsampling, loss, transfers"
PARTS = {(Sequential, "forward"): "network forward", (Sequential, "backward"): "network backward",
         (DenseCRF, "_kernels"): "CRF lattices", (DenseCRF, "forward"): "CRF forward",
         (DenseCRF, "backward_logits"): "CRF backward", (SGD, "step"): "update"}


class NoNumbers:
    """In place of a random generator: arrays of one number, which take no memory."""

    @staticmethod
    def standard_normal(shape, dtype):
        return np.lib.stride_tricks.as_strided(np.ones(1, dtype), shape, (0,) * len(shape))


def joint_step(preset="vgg16", batch_size=20, size=(500, 375), n_labels=21, compute=False):
    """({part: counts}, the most bytes in use) of one step with pictures of size (W, H).

    counts: "launch", "product", "wait", "send" and "bytes", as in strict_cupy.py.
    compute: compute it all, not only shapes; bytes in use are not known then.
    """
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch.object(arrays, "cupy", strict_cupy.cupy))
        enter(mock.patch.object(arrays, "cupyx", strict_cupy.cupyx, create=True))
        gpu.gpu_available()                   # which tries the device, once
        image, y = toy.picture(np.random.default_rng(3), *size[::-1])
        y = np.where(y < n_labels, y, VOID).astype(np.uint8)
        if not compute:
            enter(shapes.only(what_is_read(image)))
            enter(mock.patch.object(np.random, "default_rng", lambda *_: NoNumbers))
            enter(np.errstate(divide="ignore", invalid="ignore"))
        net = vgg.build(preset, n_labels)
        vgg.move(net, "gpu")
        model = training.Model(net, weights.MEAN, DenseCRF(n_labels), "gpu")
        optimiser = training.optimizer(model, "joint", [])
        batch = [(image, y, model.resized(image))] * batch_size
        shapes.memory["peak"] = shapes.memory["held"]
        table = enter(by_part())
        training.train_step(model, optimiser, batch, 0, 1)
        return table, shapes.memory["peak"]


def what_is_read(image):
    """What the host reads while a CRF is trained on the picture.

    It depends neither on the number of labels nor on that of mean-field steps: here 2 and 1.
    """
    f, y = np.zeros((*image.shape[:2], 2), np.float32), np.zeros(image.shape[:2], np.uint8)
    with mock.patch.object(strict_cupy, "recorded", []):
        training.crf_gradients(DenseCRF(2, iterations=1),
                               *(arrays.to_device(x, "gpu") for x in (f, image, y)))
        return strict_cupy.recorded


@contextlib.contextmanager
def by_part():
    """Counts of what runs within, {part: counts}: those of a part are without parts inside it."""
    table = {part: collections.Counter() for part in [*PARTS.values(), REST]}
    running, before = [REST], collections.Counter(strict_cupy.counts)

    def settle():
        table[running[-1]].update(strict_cupy.counts - before)
        before.update(strict_cupy.counts - before)

    def watched(part, method):
        def call(*args, **kwargs):
            settle()
            running.append(part)
            try:
                return method(*args, **kwargs)
            finally:
                settle()
                running.pop()
        return call

    with contextlib.ExitStack() as stack:
        for (owner, name), part in PARTS.items():
            stack.enter_context(mock.patch.object(owner, name, watched(part, getattr(owner, name))))
        yield table
    settle()
