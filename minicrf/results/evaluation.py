"""Evaluation on lists of images (paper, Sec. 4.2)."""
import numpy as np

from . import metrics


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
