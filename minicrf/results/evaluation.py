"""Measuring and using trained models: lists of images (paper, Sec. 4.2), photographs.

Legend: H x W pixels, L labels.
"""
import collections
import os
import sys

import numpy as np

from .. import metrics
from ..arrays import out_of_memory, to_device
from ..data import pictures, voc
from ..inputs import VOID
from ..search import search
from . import checkpoints, figures


def evaluate(model, samples, n_classes, band=metrics.BAND):
    """Confusion matrices of each image (images, L, L), by method: "unary" and, with one, "crf".

    samples: (image, labels).  "unary_band" and "crf_band" count the pixels within `band` pixels of
    a class boundary alone (0: left out).
    """
    counts = collections.defaultdict(list)
    for image, truth in samples:
        truths = {"": truth}
        if band:
            truths["_band"] = np.where(metrics.boundary_band(truth, band), truth, VOID)
        for method, prediction in zip(("unary", "crf"), model.predict(image)):
            for kind, labels in truths.items() if prediction is not None else ():
                counts[method + kind].append(
                    metrics.confusion_matrix(labels, prediction, n_classes))
    return {method: np.stack(each) for method, each in counts.items()}


class Scored:
    """(scores, image, labels) of some images, computed anew each time they are gone through."""

    def __init__(self, model, data, ids):
        self.model, self.data, self.ids = model, data, ids

    def __len__(self):
        return len(self.ids)

    def __iter__(self):
        for image_id in self.ids:
            image, labels = self.data.load(image_id)
            yield self.model.scores(image), to_device(image, self.model.device), labels


def cross_fitted(model, data, crf):
    """Counts as of `evaluate` for the validation list, by CRFs that were chosen without the image.

    crf: a function that returns a CRF to start from.  One is searched for on the images with an
    even place in the list and measured on the others, then the other way around.  Where training
    labels are weak, all are measured with one that saw those labels alone, of as many images.
    """
    parts, counts = [(data.val[1::2], slice(0, None, 2)), (data.val[::2], slice(1, None, 2))], {}
    if data.weak is not None:
        parts = [(data.train[:len(data.val)], slice(None))]
    for chosen_on, measured in parts:
        model.crf = crf()
        best, _ = search(model.crf, Scored(model, data, chosen_on))
        print(f"searched: on {len(chosen_on)} images the best is", ", ".join(
            f"{name} {np.round(value, 2).tolist()}" for name, value in best.items()))
        samples = data.samples(data.val[measured], "searched on the validation list")
        for method, each in evaluate(model, samples, len(data.classes)).items():
            counts.setdefault(method, np.empty((len(data.val), *each.shape[1:]), each.dtype))
            counts[method][measured] = each
    return counts


def curve_point(model, data, n=None):
    """Mean IoU on the first n validation images (None: all), as a row of log.csv has it."""
    ids = data.val[:n]
    counts = evaluate(model, data.samples(ids, "evaluation"), len(data.classes), band=0)
    miou = [float(metrics.mean_iou(each.sum(axis=0))) for each in counts.values()]
    return {"miou": miou[-1], "miou_unary": miou[0], "images": f"{len(ids)}/{len(data.val)}"}


def label_photographs(checkpoint, path, folder, device):
    """Label PNG, overlay PNG and class summary for a photograph, or those of a folder; any size."""
    photographs = pictures.find_photographs(path)
    model, _, info = checkpoints.load_model(checkpoint, device=device)
    os.makedirs(folder, exist_ok=True)
    skipped = 0
    for each in photographs:
        try:
            image = pictures.read_photograph(each)
            small = pictures.shrink(image)   # a CRF variable a pixel: at most a million of them
            labels = [found for found in model.predict(small) if found is not None][-1]
            labels = pictures.enlarge(labels, image.shape[:2])
            name = os.path.join(folder, os.path.basename(each))
            voc.save_labels(f"{name}.labels.png", labels)
            pictures.save_png(f"{name}.overlay.png", figures.overlay(image, labels))
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            if not os.path.isdir(path) or type(error) is RuntimeError and not out_of_memory(error):
                raise
            print(f"skipped: {str(error) or f'{each}: too little memory'}", file=sys.stderr)
            skipped += 1
            continue
        share = np.bincount(labels.ravel(), minlength=len(info["classes"])) / labels.size
        print(f"{each}: " + ", ".join(f"{info['classes'][i]} {100 * share[i]:.1f}%"
                                      for i in np.argsort(-share) if share[i] >= 0.001))
    if skipped == len(photographs):
        raise ValueError(f"--image: found no readable photograph among {skipped} in {path}")
    print(f"wrote NAME.labels.png and NAME.overlay.png of {len(photographs) - skipped} photographs "
          f"to {folder}")
