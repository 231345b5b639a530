"""The two training stages of the paper (Sec. 4.1) and evaluation.

Stage `unary` trains the network on its own scores; `joint` trains network and CRF on the marginals
of the last mean-field step; `piecewise` trains the CRF alone, the network frozen.
Legend: B images in a batch, L labels, h x w score cells, H x W original pixels, S input side.
"""
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import numpy as np

from . import checkpoints, figures, loading, metrics, vgg
from .arrays import array_module, to_device, to_host
from .densecrf import LARGEST_LOG_SIGMA
from .logs import Log, Progress, read_log
from .losses import softmax_loss
from .optim import SGD
from .vgg import seed_dropout


# Pixels have a root mean square of about 60.  A layer bears steps that fall with the square of its
# input, so a network that starts from scratch gets pixels over PIXEL_SCALE; ImageNet's has scale 1.
PIXEL_SCALE = 60
STAGES = ("unary", "piecewise", "joint")
BUILDER = ThreadPoolExecutor(1)         # of lattices: building them waits for a GPU, mean field not


class Model:
    """The network, how its weights expect pixels, and the CRF (None: unary scores alone).

    Network input is (BGR in 0-255, minus mean) / scale.
    """

    def __init__(self, net, mean, crf=None, device="cpu", scale=1.0):
        self.net, self.crf, self.device = net, crf, device
        self.mean, self.scale = np.asarray(mean, np.float64), float(scale)

    def resized(self, image):
        """A photograph (H, W, 3) uint8 of any size -> (3, S, S) float32: BGR minus mean."""
        return loading.network_input(image, self.net.input_size, self.mean)

    def inputs(self, resized):
        """B resized photographs, each (3, S, S) -> network input (B, 3, S, S) on the device."""
        dtype = self.net["fc8"].params["w"].dtype
        x = np.stack(resized).astype(dtype, copy=False)
        x /= dtype.type(self.scale)
        return to_device(x, self.device)

    def predict(self, image):
        """(unary, refined) labels (H, W) of a photograph (H, W, 3); refined is None without CRF."""
        scores = self.net.forward(self.inputs([self.resized(image)]))    # (1, L, h, w)
        f = self.net.upsample.forward(scores[0], image.shape[:2])        # (H, W, L)
        unary = to_host(f.argmax(axis=-1)).astype(np.uint8)
        if self.crf is None:
            return unary, None
        q = self.crf.forward(f, to_device(image, self.device), train=False)
        return unary, to_host(q.argmax(axis=-1)).astype(np.uint8)


def load_model(path, classes=None, device="cpu"):
    """(Model, arrays, info) from a checkpoint; the model's CRF is None after the unary stage.

    classes: the class names it must have been trained for (None: any).  Raises ValueError or
    OSError with one line.
    """
    arrays, info = checkpoints.read(path)
    if classes is not None and info["classes"] != classes:
        raise ValueError(f"{path}: found a network for {len(info['classes'])} classes "
                         f"({', '.join(info['classes'][:3])} ...), expected the data set's "
                         f"{len(classes)} ({', '.join(classes[:3])} ...)")
    if info["stage"] not in STAGES or ("crf_w" in arrays) != (info["stage"] != "unary"):
        crf = "a" if "crf_w" in arrays else "no"
        raise ValueError(f"{path}: found stage {info['stage']!r} and {crf} CRF, expected one of "
                         f"{', '.join(STAGES)}; a CRF in all but the first")
    net = checkpoints.load_net(path, arrays, info)
    crf = checkpoints.load_crf(path, arrays, info)
    vgg.move(net, device)
    return Model(net, arrays["mean"], crf, device, arrays["scale"]), arrays, info


def accumulate_gradients(model, batch, share, train_net=True):
    """Forward and backward for one batch: adds into all gradients, returns the loss.

    batch: list of (image (H, W, 3), labels (H, W), the image resized (3, S, S)), as loading.batches
    gives; share: 1 / images in the whole batch, of which this may be a part.  The loss is a 0-d
    array on the device: nothing waits for it here.
    Paper, Fig. 3: network, upsampling, mean field; then back through all three.
    """
    images, truths, resized = zip(*batch)
    net, crf = model.net, model.crf
    scores = net.forward(model.inputs(resized), train=train_net)         # (B, L, h, w)
    dscores = array_module(scores).empty_like(scores)
    if crf is not None:
        images = [to_device(image, model.device) for image in images]
        kernels = loading.ahead(crf.kernels, zip(images, repeat(scores.dtype)), BUILDER, depth=2)
    total = 0
    for i, (image, truth) in enumerate(zip(images, truths)):
        y = to_device(truth.reshape(-1), model.device)                   # (N,)
        f = net.upsample.forward(scores[i], truth.shape, train=True)     # (H, W, L)
        z = f
        if crf is not None:
            crf.forward(f, image, kernels=next(kernels))
            z = crf.logits                                               # (H, W, L)
        loss, dz = softmax_loss(z.reshape(-1, z.shape[-1]), y)           # (N, L)
        total += share * loss
        dz *= dz.dtype.type(share)
        # forward: q = softmax(z), z = CRF(f), f = upsample(scores)
        df = dz.reshape(z.shape)
        if crf is not None:
            df = crf.backward_logits(df)
        dscores[i] = net.upsample.backward(df)
    if train_net:
        net.backward(dscores)
    return total


def evaluate(model, samples, n_classes, band=5):
    """Confusion matrices of each image, int64 (images, L, L), by method: "unary" and "crf".

    Sec. 4.2: sum them over the images, then metrics.mean_iou.

    samples: iterable of (image, labels); "crf" is there where the model has one.  "unary_band" and
    "crf_band" count the pixels within `band` pixels of a class boundary alone (0: left out).
    """
    counts = {}
    for image, truth in samples:
        near = metrics.boundary_band(truth, band) if band else None
        for method, prediction in zip(("unary", "crf"), model.predict(image)):
            if prediction is None:
                continue
            counts.setdefault(method, []).append(
                metrics.confusion_matrix(truth, prediction, n_classes))
            if band:
                counts.setdefault(f"{method}_band", []).append(
                    metrics.confusion_matrix(truth[near], prediction[near], n_classes))
    return {method: np.stack(each) for method, each in counts.items()}


def optimizer(model, stage, fresh, momentum=0.9, weight_decay=5e-4, rate=1.0,
              rate_top=0.01, rate_loaded=0.001, rate_w=0.3, rate_sigma=0.1):
    """Momentum SGD with the paper's rates for a stage.

    rate_top: fc8 and the layers named in `fresh`; rate_loaded: all others (both of the paper).
    stage: "unary" (the network), "piecewise" (the CRF) or "joint" (both).
    rate_w, rate_sigma: the CRF's weights and log sigmas (paper silent: chosen by trial).
    Biases and CRF parameters do not decay.  rate multiplies all.
    """
    params, grads, rates, decays = {}, {}, {}, {}
    if stage != "piecewise":
        params, grads = dict(model.net.params), dict(model.net.grads)
        for key in params:
            layer, kind = key.rsplit("_", 1)
            rates[key] = rate * (rate_top if layer in {"fc8", *fresh} else rate_loaded)
            decays[key] = weight_decay if kind == "w" else 0.0
    if stage != "unary":
        for key in model.crf.params:
            params[f"crf_{key}"], grads[f"crf_{key}"] = model.crf.params[key], model.crf.grads[key]
            rates[f"crf_{key}"] = rate * (rate_w if key == "w" else rate_sigma)
            decays[f"crf_{key}"] = 0.0
    return SGD(params, grads, rates, decays, momentum)


def train_step(model, optimiser, batch, seed, iteration, micro_batch=None):
    """One update from one batch; returns its loss as a 0-d array.

    batch: as in accumulate_gradients.  seed, iteration: name the dropout masks.
    micro_batch: images that go through the network together (None: all); gradients are summed.
    """
    train_net = "fc8_w" in optimiser.params
    size = micro_batch or len(batch)
    loss = 0
    for start in range(0, len(batch), size):
        seed_dropout(model.net, seed, iteration, start)
        loss += accumulate_gradients(model, batch[start:start + size], 1 / len(batch), train_net)
    optimiser.step()
    if model.crf is not None:
        # Potts energies stay negative semi-definite only for w >= 0
        w = model.crf.params["w"]
        w[...] = w.clip(0)
    return loss


def check_step(loss, params):
    """Raises ValueError where a step left numbers that no next step and no checkpoint can use."""
    if not np.isfinite(loss):
        raise ValueError(f"found loss {loss}, expected a finite one")
    for key, p in params.items():
        if not np.isfinite(float(p.sum())):
            raise ValueError(f"found {key} not finite after the step, expected finite values")
        if "log_sigma" in key and abs(p).max() > LARGEST_LOG_SIGMA:
            raise ValueError(f"found {key} {p.round(2).tolist()} after the step, expected "
                             f"-{LARGEST_LOG_SIGMA} to {LARGEST_LOG_SIGMA}")


@np.errstate(over="ignore", invalid="ignore")        # what is not finite is found in the loss
def fit(model, stage, optimiser, batches, validate, out, info, *, start, iterations, batch_size,
        micro_batch=None, drop=0.75, evaluate_every=50, images=""):
    """Train one stage from iteration `start` to `iterations`; True when it got there.

    batches: endless, as loading.batches; validate(): percent mean IoU by method, for the curve, on
    the validation images that `images` tells, such as "20/110".
    out: folder of log.csv, curves.png, STAGE.npz, the last state, and STAGE_best.npz, that of the
    best mean IoU seen; STAGE.npz of an earlier run becomes STAGE_previous.npz.
    info: dict kept in checkpoints, "seed" among it; sets "iteration", "best".
    drop: share of the iterations after which rates fall to a tenth.  Ctrl-C finishes the
    iteration, saves, and returns False.  Raises FloatingPointError where a step cannot be computed
    or its loss is not finite, with one line.
    """
    path = os.path.join(out, stage)
    earlier = start == 0 and os.path.exists(f"{path}.npz")
    log = Log(os.path.join(out, "log.csv"), model, stage, start)
    progress = Progress(stage, start, iterations, batch_size)
    stop = []
    previous = signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    try:
        for iteration in range(start + 1, iterations + 1):
            optimiser.scale = 0.1 if iteration > drop * iterations else 1.0
            batch = next(batches)
            try:
                loss = float(train_step(model, optimiser, batch, info["seed"], iteration,
                                        micro_batch))
                check_step(loss, optimiser.params)
            except ValueError as error:                  # also from the CRF: its scores, its sigmas
                raise FloatingPointError(
                    f"{stage}: iteration {iteration}: {error}; checkpoints written before are "
                    "kept; try a smaller --rate") from None
            miou = validate() if iteration % evaluate_every == 0 or iteration == iterations else {}
            curve = {"miou": list(miou.values())[-1], "miou_unary": miou["unary"],
                     "images": images} if miou else {}
            log.append(iteration, loss, optimiser.scale, **curve)
            note = ", ".join(f"{method} mean IoU {value:.2f}" for method, value in miou.items())
            progress.update(iteration, loss, note)
            info["iteration"] = iteration
            if miou or stop:
                if earlier:
                    os.replace(f"{path}.npz", f"{path}_previous.npz")
                    earlier = False
                if curve.get("miou", -1) > info.get("best", -1):
                    # the best state first: killed in between, a resumed run writes it again
                    info["best"] = curve["miou"]
                    checkpoints.save(f"{path}_best.npz", model, info)
                checkpoints.save(f"{path}.npz", model, info, optimiser)
            if miou:
                figures.curves(os.path.join(out, "curves.png"), read_log(log.path))
            if stop:
                return False
        return True
    finally:
        progress.bar.close()
        batches.close()
        signal.signal(signal.SIGINT, previous)
