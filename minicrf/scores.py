"""Scores for the CRF, larger is likelier, from what other programs give: probabilities or labels.

Legend: H x W pixels, L labels.
"""
import warnings

import numpy as np

from .arrays import array_module
from .inputs import VOID


def scores_from_probabilities(p, floor=1e-4):
    """Scores log p for DenseCRF from class probabilities p (..., L), floats, in p's dtype.

    floor: smaller probabilities are raised to it, since a 0, from rounding or in a one-hot array,
        would forbid a label for good; floor=0 keeps it as -inf.  log 1e-4 is -9.2, which the CRF's
        default weights, 3 + 10, can overcome where all neighbours agree.
    Warns where most pixels are one-hot.  Raises ValueError where p is negative, NaN or no float.
    """
    xp = array_module(p)
    if p.dtype.kind != "f" or not bool((p >= 0).all()):
        raise ValueError(f"p: found {p.dtype} with minimum {float(p.min()):g}, "
                         "expected floats, at least 0")
    if bool(((p == 0) | (p == 1)).all(axis=-1).mean() > 0.5):
        warnings.warn("most pixels are one-hot, as if their labels were certain; labels that may "
                      "be wrong are better given as labels, with a confidence", stacklevel=2)
    with np.errstate(divide="ignore"):
        return xp.log(xp.maximum(p, p.dtype.type(floor)))


def scores_from_labels(labels, n_labels, confidence, unknown=VOID, dtype=np.float32):
    """Scores (H, W, L) for DenseCRF from a label map (H, W) of integers in 0..L-1.

    confidence: probability, 0 < confidence < 1, that a pixel's given label is the right one; the
    others share the rest evenly.
    unknown: the value of pixels with no label, for which all are alike; None if there are none.
    Raises ValueError where confidence or a label is out of range, or labels are no whole numbers.
    """
    xp, dtype = array_module(labels), np.dtype(dtype)
    if unknown == VOID and n_labels > VOID:
        raise ValueError(f"unknown: found {VOID}, which is one of {n_labels} labels; give another "
                         "value, or None")
    if labels.dtype.kind not in "iub":
        raise ValueError(f"labels: found {labels.dtype}, expected whole numbers, as of an integer "
                         "dtype; resize label maps without interpolation")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: found {confidence}, expected a probability between 0 and 1")
    known = xp.ones(labels.shape, dtype=bool) if unknown is None else labels != unknown
    wrong = known & ((labels < 0) | (labels >= n_labels))
    if bool(wrong.any()):
        raise ValueError(f"labels: found {int(labels[wrong][0])}, expected 0 to {n_labels - 1}"
                         + ("" if unknown is None else f", or {unknown} for unknown"))
    given = known[..., None] & (labels[..., None] == xp.arange(n_labels))    # (H, W, L)
    log_odds = np.log(confidence) - np.log((1 - confidence) / max(n_labels - 1, 1))
    return given.astype(dtype) * dtype.type(log_odds)
