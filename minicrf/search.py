"""Parameters of a CRF by mean intersection over union, on a grid: how [3] chose theirs.

The likelihood of Eq. 6 and the intersection over union need not agree on the best parameters.
Legend: S the shape of an image, L labels; G points of the grid, I samples.
"""
import copy
import itertools

import numpy as np

from .arrays import for_each, to_host
from .inputs import check_labels
from .metrics import confusion_matrix, mean_iou

COARSE = {"w_bilateral": (2., 4., 7., 10.),
          "sigma_bilateral": ((20., 7.), (20., 13.), (40., 7.), (40., 13.), (80., 7.), (80., 13.))}
FINER = 2 ** 0.5        # the second grid: each value of the best point over, times 1 and times this


def search(crf, samples, grid=None, finer=True):
    """The parameters that give the highest mean IoU of the samples; leaves them in crf.

    crf: a DenseCRF or FeatureCRF with Potts weights, changed in place.
    samples: (scores, image, labels), as for `learn`; a list, or what can be gone through twice.
    grid: {name: values}: "w_KERNEL", numbers, and "sigma_KERNEL", widths, or for the bilateral
        kernel pairs (pixels, colour); parameters without an entry stay as they are.  The default
        is over the bilateral kernel.
    finer: search once more, around the best point.

    Returns ({name: value} of the best point, [({name: value}, counts (I, L, L))] of all points):
    counts of each sample's pixels, by true label and by label found, for `cross_fitted`.
    Costs an inference for each sample and point, less the lattices, which points of equal widths
    share: five seconds for each photograph of 500x375 pixels and seven labels (51 points).
    """
    from tqdm import tqdm        # only the bar needs it

    if crf.params["w"].ndim > 1:
        raise ValueError("search is for Potts weights, one number a kernel; this CRF has matrices")
    grid = grid or COARSE
    table = _measure(crf, samples, grid, tqdm)
    if finer:
        best = _best(table)
        around = {name: _around(value) for name, value in best.items()}
        table += _measure(crf, samples, around, tqdm)
    best = _best(table)
    for name, value in best.items():
        _set(crf, name, value)
    return best, table


def cross_fitted(table):
    """Counts (I, L, L) of each sample with parameters that were chosen without it.

    table: of `search` with finer=False, since the finer grid lies around what is best on all
    samples.  The even ones are measured with what is best on the odd ones, and the other way
    around.
    """
    counts = np.stack([each for _, each in table])                           # (G, I, L, L)
    fitted = np.empty_like(counts[0])
    for half in 0, 1:
        chosen = np.argmax([mean_iou(each[1 - half::2].sum(axis=0)) for each in counts])
        fitted[half::2] = counts[chosen, half::2]
    return fitted


def _measure(crf, samples, grid, tqdm):
    """[({name: value}, counts (I, L, L))] for each point of the grid."""
    widths = {name: values for name, values in grid.items() if name.startswith("sigma_")}
    weights = {name: values for name, values in grid.items() if name not in widths}
    counts = []
    for scores, image, labels in tqdm(samples, "search", unit="image", leave=False, disable=None):
        check_labels(labels, scores.shape[:-1], crf.n_labels)
        counts.append([])
        kernels = None
        for sigma in itertools.product(*widths.values()):
            for name, value in zip(widths, sigma):
                _set(crf, name, value)
            kernels = crf._kernels(image, scores, kernels)       # for all weights

            def counts_of(w):
                other = copy.copy(crf)                           # its own, as others go in threads
                other.params = crf.params | {"w": crf.params["w"].copy()}
                for name, value in zip(weights, w):
                    _set(other, name, value)
                q = other._infer(scores, kernels, train=False)
                return confusion_matrix(to_host(labels), to_host(q.argmax(axis=-1)), crf.n_labels)

            counts[-1] += for_each(counts_of, list(itertools.product(*weights.values())), scores)
    points = [dict(zip((*widths, *weights), values))
              for values in itertools.product(*widths.values(), *weights.values())]
    return [({name: point[name] for name in grid}, each)
            for point, each in zip(points, np.stack(counts, axis=1))]


def _best(table):
    return max(table, key=lambda row: mean_iou(row[1].sum(axis=0)))[0]


def _around(value):
    factors = 1 / FINER, 1., FINER
    if np.ndim(value) == 0:
        return sorted({factor * value for factor in factors})    # 0 stays 0
    return [tuple(x * factor for x, factor in zip(value, each))
            for each in itertools.product(factors, repeat=len(value))]


def _set(crf, name, value):
    kind, kernel = name.split("_", 1)
    names = [each[len("log_sigma_"):] for each in crf.params if each != "w"]
    if kind == "w":
        crf.params["w"][names.index(kernel)] = value
        return
    log_sigma = crf.params[f"log_sigma_{kernel}"]
    if kernel == "bilateral" and np.shape(value) == (2,):        # (pixels, colour)
        D = crf.dimensions
        value = [value[0]] * D + [value[1]] * (len(log_sigma) - D)
    log_sigma[...] = np.log(value)
