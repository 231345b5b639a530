"""Intersection over union, VOC's measure of segmentation (paper, Sec. 4.2 and Table 1).

One confusion matrix summed over a whole list of images, not an average over images.  Classes absent
from the truth have no IoU (NaN) and are left out of means.  Arrays are NumPy's.
Legend: H x W pixels, L labels.
"""
import numpy as np

from .inputs import VOID

BAND = 5        # pixels on either side of a class boundary, where a CRF has most to do


def confusion_matrix(labels, predictions, n_classes):
    """Pixel counts (L, L): rows the true label, columns the predicted one, void left out.

    labels: 0..n_classes-1, or VOID; predictions: 0..n_classes-1; integers, of equal, any shape.
    """
    scored = labels != VOID
    pairs = labels[scored].astype(np.int64) * n_classes + predictions[scored]
    return np.bincount(pairs, minlength=n_classes ** 2).reshape(n_classes, n_classes)    # (L, L)


def iou(confusion):
    """IoU of each class in percent, (..., L, L) -> (..., L); NaN for classes without truth."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    truth, predicted = confusion.sum(-1), confusion.sum(-2)
    return np.where(truth > 0, 100 * hits / np.maximum(truth + predicted - hits, 1), np.nan)


def mean_iou(confusion):
    """Mean IoU in percent over the classes in the truth, (..., L, L) -> (...); NaN without any."""
    values = iou(confusion)
    with np.errstate(invalid="ignore"):
        return np.nansum(values, axis=-1) / np.isfinite(values).sum(axis=-1)


def boundary_band(labels, width):
    """The pixels within `width` pixels of a class boundary of the truth, (H, W) bool.

    A pixel is in the band where another label lies no further than width from it, centre to centre.
    Void counts as a label of its own: VOC draws it as a rim over the boundary itself, so the band
    is the pixels on either side, as in the trimaps of Chen et al. (2015), and the rim.
    """
    from scipy.ndimage import maximum_filter, minimum_filter         # only the band needs them

    reach = np.arange(-int(width), int(width) + 1) ** 2
    disc = dict(footprint=np.add.outer(reach, reach) <= width ** 2, mode="nearest")
    return maximum_filter(labels, **disc) != minimum_filter(labels, **disc)


def bootstrap_difference(a, b, samples=2000, seed=0):
    """How certain a difference of two mean IoUs is: paired bootstrap over images.

    a, b: (images, L, L) confusion matrices of the same images under two methods.  Images are drawn
    with replacement, the same for both.  Returns (difference, (low, high), share): mean IoU of a
    minus that of b on all images, in points; the interval that holds 95% of the samples'
    differences; the share of samples in which a is better.
    """
    # (samples, images): how often each image is drawn
    drawn = np.random.default_rng(seed).multinomial(len(a), np.full(len(a), 1 / len(a)), samples)
    of_a, of_b = (mean_iou(np.tensordot(drawn, x.astype(np.float64), 1)) for x in (a, b))
    low, high = np.nanpercentile(of_a - of_b, (2.5, 97.5)).tolist()
    difference = float(mean_iou(a.sum(0)) - mean_iou(b.sum(0)))
    return difference, (low, high), float(np.mean(of_a > of_b))
