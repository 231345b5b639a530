"""Training network and CRF together: Fig. 3, one step at a time, at the rates of Sec. 4.1.

Stage `unary` trains the network on its own scores; `joint` trains network and CRF on the marginals
of the last mean-field step; `piecewise` trains the CRF alone, the network frozen; `local` trains
the network and local factors, the system before (Fig. 2).
Legend: B images in a batch, L labels, h x w score cells, H x W original pixels, S input side.
"""
import copy

import numpy as np
from PIL import Image

from .arrays import array_module, for_each, to_device, to_host
from .learning import check_finite, crf_gradients
from .losses import softmax_loss
from .optim import SGD
from .vgg import seed_dropout

# Pixels have a root mean square of about 60, and the largest rate that a layer bears falls with the
# square of its input's: a network that starts from scratch gets pixels over PIXEL_SCALE.
# ImageNet's has scale 1.
PIXEL_SCALE = 60
STAGES = ("unary", "local", "piecewise", "joint")


class Model:
    """The network, how its weights expect pixels, and the CRF (None: unary scores alone).

    Network input is (BGR in 0-255, minus mean) / scale.
    """

    def __init__(self, net, mean, crf=None, device="cpu", scale=1.0):
        self.net, self.crf, self.device = net, crf, device
        self.mean, self.scale = np.asarray(mean, np.float64), float(scale)

    def resized(self, image):
        """A photograph (H, W, 3) uint8 RGB, aspect not kept -> (3, S, S) float32, BGR - mean."""
        size = self.net.input_size
        small = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)
        bgr = np.asarray(small, np.float32)[:, :, ::-1] - self.mean.astype(np.float32)
        return np.ascontiguousarray(bgr.transpose(2, 0, 1))              # (3, S, S)

    def inputs(self, resized):
        """B resized photographs, each (3, S, S) -> network input (B, 3, S, S) on the device."""
        dtype = self.net["fc8"].params["w"].dtype
        x = np.stack(resized).astype(dtype, copy=False)
        x /= dtype.type(self.scale)
        return to_device(x, self.device)

    def scores(self, image):
        """The network's scores (H, W, L) of a photograph (H, W, 3)."""
        scores = self.net.forward(self.inputs([self.resized(image)]))    # (1, L, h, w)
        return self.net.upsample.forward(scores[0], image.shape[:2])

    def predict(self, image):
        """(unary, refined) labels (H, W) of a photograph (H, W, 3); refined is None without CRF."""
        f = self.scores(image)
        unary = to_host(f.argmax(axis=-1)).astype(np.uint8)
        if self.crf is None:
            return unary, None
        q = self.crf.forward(f, to_device(image, self.device), train=False)
        return unary, to_host(q.argmax(axis=-1)).astype(np.uint8)


def accumulate_gradients(model, batch, share, train_net=True):
    """Steps 1 to 4 of Fig. 3 for one batch: adds into all gradients, returns the loss.

    batch: list of (image (H, W, 3), labels (H, W), the image resized (3, S, S)).
    share: 1 / images in the whole batch, of which this may be a part.  The loss is a 0-d array on
    the device: nothing waits for it here.
    """
    net = model.net
    images, truths, resized = zip(*batch)
    # Step 1: forward pass, scores f
    scores = net.forward(model.inputs(resized), train=train_net)         # (B, L, h, w)
    losses, dscores, grads = zip(*for_each(
        lambda each: image_gradients(model, *each, share), list(zip(scores, images, truths)),
        scores, work=sum(truth.size for truth in truths) * scores.shape[1]))
    for each in grads:
        for key, g in each.items():
            model.crf.grads[key] += g
    # Step 4: backward pass, the chain rule
    if train_net:
        net.backward(array_module(scores).stack(dscores))                # (B, L, h, w)
    return sum(losses)


def image_gradients(model, scores, image, truth, share):
    """Steps 2 and 3 of Fig. 3 for one image of a batch, and the upsampling around them.

    scores: (L, h, w), on the device; the rest as in `accumulate_gradients`.  Returns the loss times
    share, its gradient with respect to the scores, and a dict of those with respect to the CRF's
    parameters.  The layer is a copy, so that images can be worked on side by side.
    """
    upsample = copy.copy(model.net.upsample)
    f = upsample.forward(scores, truth.shape, train=True)                # (H, W, L)
    y = to_device(truth, model.device)
    if model.crf is None:
        loss, df = softmax_loss(f.reshape(-1, f.shape[-1]), y.ravel())   # (N, L)
        grads = {}
    else:
        loss, df, grads = crf_gradients(model.crf, f, to_device(image, model.device), y)
    df *= df.dtype.type(share)
    grads = {key: share * g for key, g in grads.items()}
    return share * loss, upsample.backward(df.reshape(f.shape)), grads


def optimizer(model, stage, fresh, momentum=0.9, weight_decay=5e-4, rate=1.0,
              rate_top=0.01, rate_loaded=0.001, rate_w=0.3, rate_sigma=0.1):
    """Momentum SGD with the paper's rates for a stage.

    rate_top: fc8 and the layers named in `fresh`; rate_loaded: all others (both of the paper).
    stage: "unary" (the network), "piecewise" (the CRF), "joint" or "local" (both).
    rate_w, rate_sigma: the CRF's weights and log sigmas (paper silent: chosen by trial).
    Biases and CRF parameters do not decay.  rate multiplies all.
    """
    params, grads, rates, decays = {}, {}, {}, {}
    if stage != "piecewise":
        params, grads = dict(model.net.params), dict(model.net.grads)
        for key in params:
            layer, kind = key.rsplit("_", 1)
            rates[key] = rate * (rate_top if layer in ("fc8", *fresh) else rate_loaded)
            decays[key] = weight_decay if kind == "w" else 0.0
    if stage != "unary":
        for key in model.crf.params:
            params[f"crf_{key}"], grads[f"crf_{key}"] = model.crf.params[key], model.crf.grads[key]
            rates[f"crf_{key}"] = rate * (rate_w if key == "w" else rate_sigma)
            decays[f"crf_{key}"] = 0.0
    return SGD(params, grads, rates, decays, momentum)


@np.errstate(over="ignore", invalid="ignore")        # found by check_finite
def train_step(model, optimiser, batch, seed, iteration, micro_batch=None):
    """One update from one batch; returns its loss, a float.

    batch: as in accumulate_gradients.  seed, iteration: name the dropout masks.
    micro_batch: images that go through the network together (None: all); gradients are summed.
    Raises FloatingPointError, with one line, where the step left numbers that no next step and no
    checkpoint can use.
    """
    train_net = "fc8_w" in optimiser.params
    size = micro_batch or len(batch)
    loss = 0
    try:
        for start in range(0, len(batch), size):
            seed_dropout(model.net, seed, iteration, start)
            loss += accumulate_gradients(model, batch[start:start + size], 1 / len(batch),
                                         train_net)
        # Step 5: parameter update
        optimiser.step()
        if model.crf is not None:
            model.crf.project()
        loss = float(loss)
        check_finite(loss, optimiser.params)
        return loss
    except ValueError as error:              # also from the CRF: its scores, its sigmas
        raise FloatingPointError(f"iteration {iteration}: {error}; checkpoints written before are "
                                 "kept; try a smaller --rate") from None
