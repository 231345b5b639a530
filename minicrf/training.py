"""The two training stages of the paper (Sec. 4.1) and evaluation.

Stage `unary` trains the network on its own scores; `joint` trains network and CRF on the marginals
of the last mean-field step; `piecewise` trains the CRF alone, the network frozen.
Legend: B images in a batch, L labels, h x w score cells, H x W original pixels, S input side.
"""
import csv
import os
import signal

import numpy as np
from tqdm import tqdm

from . import checkpoints, metrics, voc
from .arrays import array_module, to_device, to_host
from .losses import softmax_loss
from .optim import SGD
from .vgg import seed_dropout


class Model:
    """The network, the mean colour its weights expect, and the CRF (None: unary scores alone)."""

    def __init__(self, net, mean, crf=None, device="cpu"):
        self.net, self.mean, self.crf, self.device = net, np.asarray(mean), crf, device

    def inputs(self, images):
        """Photographs, (H, W, 3) uint8 of any sizes -> network input (B, 3, S, S) on the device."""
        x = [voc.network_input(image, self.net.input_size, self.mean) for image in images]
        dtype = self.net["fc8"].params["w"].dtype
        return to_device(np.stack(x).astype(dtype, copy=False), self.device)

    def predict(self, image):
        """(unary, refined) labels (H, W) of a photograph (H, W, 3); refined is None without CRF."""
        scores = self.net.forward(self.inputs([image]))                  # (1, L, h, w)
        f = self.net.upsample.forward(scores[0], image.shape[:2])        # (H, W, L)
        unary = to_host(f.argmax(axis=-1)).astype(np.uint8)
        if self.crf is None:
            return unary, None
        q = self.crf.forward(f, to_device(image, self.device), train=False)
        return unary, to_host(q.argmax(axis=-1)).astype(np.uint8)


def accumulate_gradients(model, batch, share, train_net=True):
    """Forward and backward for one batch: adds into all gradients, returns the loss.

    batch: list of (image (H, W, 3), labels (H, W)); share: 1 / images in the whole batch, of which
    this may be a part.  The loss is a 0-d array on the device: nothing waits for it here.
    Paper, Fig. 3: network, upsampling, mean field; then back through all three.
    """
    images, truths = zip(*batch)
    net, crf = model.net, model.crf
    scores = net.forward(model.inputs(images), train=train_net)          # (B, L, h, w)
    dscores = array_module(scores).empty_like(scores)
    total = 0
    for i, (image, truth) in enumerate(zip(images, truths)):
        y = to_device(truth.reshape(-1), model.device)                   # (N,)
        f = net.upsample.forward(scores[i], truth.shape, train=True)     # (H, W, L)
        z = f
        if crf is not None:
            crf.forward(f, to_device(image, model.device))
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


def evaluate(model, samples, n_classes):
    """Confusion matrices of each image, int64 (images, L, L): {"unary": ..., "crf": ...}.

    samples: iterable of (image, labels).  "crf" is there where the model has one.
    """
    counts = {"unary": []} if model.crf is None else {"unary": [], "crf": []}
    for image, truth in samples:
        for method, prediction in zip(counts, model.predict(image)):
            counts[method].append(metrics.confusion_matrix(truth, prediction, n_classes))
    return {method: np.stack(each) for method, each in counts.items()}


def optimizer(model, stage, fresh, momentum=0.9, weight_decay=5e-4, rate=1.0,
              rate_top=0.01, rate_loaded=0.001, rate_w=1.0, rate_sigma=0.1):
    """Momentum SGD with the paper's rates for a stage.

    rate_top: fc8 and the layers named in `fresh`; rate_loaded: all others (both of the paper).
    rate_w, rate_sigma: the CRF's weights and log sigmas (paper silent: chosen by trial).  Biases and
    CRF parameters do not decay.  rate multiplies all.
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


class Log:
    """log.csv: a row for each iteration, appended; a resumed run goes on behind its checkpoint."""

    def __init__(self, path, model, stage, start):
        """Drops the rows of `stage` after iteration `start`: they are about to be computed again."""
        self.path, self.model, self.stage = path, model, stage
        rows = read_log(path)
        columns = ["stage", "iteration", "loss", "rate", "miou", "miou_unary"] + [
            f"{key}_{i}" for key, p in (model.crf.params.items() if model.crf else ())
            for i in range(len(p))]
        self.columns = list(dict.fromkeys([*(rows[0] if rows else ()), *columns]))
        rows = [row for row in rows if row["stage"] != stage or int(row["iteration"]) <= start]
        with open(f"{path}.tmp", "w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(f"{path}.tmp", path)

    def append(self, iteration, loss, rate, **values):
        row = dict(stage=self.stage, iteration=iteration, loss=repr(loss), rate=rate, **values)
        if self.model.crf is not None:
            row |= {f"{key}_{i}": repr(float(value)) for key, p in self.model.crf.params.items()
                    for i, value in enumerate(p)}
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, self.columns, restval="").writerow(row)


def read_log(path):
    """The rows of a log.csv as dicts of strings; empty where there is none yet."""
    if not os.path.exists(path):
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def fit(model, stage, optimiser, batches, validate, out, info, *, start, iterations,
        micro_batch=None, drop=0.75, evaluate_every=50):
    """Train one stage from iteration `start` to `iterations`; True when it got there.

    batches: endless, as voc.batches; validate(): percent mean IoU by method, for the curve.
    out: folder of log.csv and of STAGE.npz, the last state, and STAGE_best.npz, that of the best
    mean IoU seen.  info: dict kept in the checkpoints: seed, class names, ... ; "iteration" and
    "best" are set here.  drop: share of the iterations after which rates fall to a tenth.
    Ctrl-C finishes the iteration, saves, and returns False.  Raises FloatingPointError where the
    loss is no longer finite; the last checkpoint then stands.
    """
    log = Log(os.path.join(out, "log.csv"), model, stage, start)
    path = os.path.join(out, stage)
    stop = []
    previous = signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    progress = tqdm(total=iterations, initial=start, desc=stage, unit="it", dynamic_ncols=True,
                    mininterval=0.5 if os.isatty(2) else 30)
    try:
        for iteration in range(start + 1, iterations + 1):
            batch = next(batches)
            optimiser.scale = 0.1 if iteration > drop * iterations else 1.0
            loss = float(train_step(model, optimiser, batch, info["seed"], iteration, micro_batch))
            if not np.isfinite(loss):
                raise FloatingPointError(
                    f"{stage}: iteration {iteration}: found loss {loss}, expected a finite one; "
                    f"what {path}.npz held before is kept; try a smaller --rate")
            progress.set_postfix(loss=f"{loss:.3f}", img_s=f"{images_per_second(progress, batch)}")
            progress.update()
            last = iteration == iterations or bool(stop)
            values, better = {}, False
            if iteration % evaluate_every == 0 or last and not stop:
                miou = validate()
                values = {"miou": miou.get("crf", miou["unary"]), "miou_unary": miou["unary"]}
                better = values["miou"] > info.get("best", -1)
                info["best"] = max(values["miou"], info.get("best", -1))
            log.append(iteration, loss, optimiser.scale, **values)
            info["iteration"] = iteration
            if values or last:
                checkpoints.save(f"{path}.npz", model, info, optimiser)
                if better:
                    checkpoints.save(f"{path}_best.npz", model, info)
            if stop:
                return False
        return True
    finally:
        progress.close()
        batches.close()
        signal.signal(signal.SIGINT, previous)


def images_per_second(progress, batch):
    """Speed for the progress bar, smoothed by tqdm."""
    rate = progress.format_dict["rate"]
    return f"{rate * len(batch):.2f}" if rate else "?"
