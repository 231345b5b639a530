"""The columns of the comparison on drawn images, from the checkpoints that experiment.py leaves.

    python tests/evidence/experiment.py drawn --seeds 0 1 2 3 4
    python tests/evidence/columns.py --seeds 0 1 2 3 4 [--search]

An untrained CRF on the unary network and on its control, too; differences with 95% intervals, by
paired bootstrap over images, for each seed and over all.  --search: the CRF on the control and on
the joint network chosen on a grid, cross-fitted: 24 points, some minutes a seed.
"""
import argparse
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np   # noqa: E402

from minicrf import DenseCRF, cross_fitted, search   # noqa: E402
from minicrf.data import loading   # noqa: E402
from minicrf.metrics import confusion_matrix, mean_iou   # noqa: E402
from minicrf.results import checkpoints   # noqa: E402

PAIRS = [("joint", "control + untrained CRF"), ("joint", "+ untrained CRF"), ("joint", "piecewise")]


def scores_of(path, data):
    """[(scores, image, labels)] of the validation list, and the CRF in the checkpoint."""
    model, _, _ = checkpoints.load_model(path, data.classes)
    samples = []
    for image_id in data.val:
        image, y = data.load(image_id)[:2]
        cells = model.net.forward(model.inputs([model.resized(image)]))
        samples.append((model.net.upsample.forward(cells[0], image.shape[:2]), image, y))
    return samples, model.crf


def counts(samples, crf=None):
    """(images, L, L): true labels by labels found."""
    found = [(y, (crf.forward(f, image, train=False) if crf else f).argmax(axis=2))
             for f, image, y in samples]
    L = samples[0][0].shape[2]
    return np.stack([confusion_matrix(y, q, L) for y, q in found])


def columns(folder, voc, searched):
    data = loading.DataSet(voc, None)

    def start():
        return DenseCRF(len(data.classes), w=(1., 4.))

    unary, _ = scores_of(os.path.join(folder, "unary.npz"), data)
    control, _ = scores_of(os.path.join(folder, "control", "unary.npz"), data)
    _, piecewise = scores_of(os.path.join(folder, "piecewise.npz"), data)
    joint, learned = scores_of(os.path.join(folder, "joint.npz"), data)
    table = {"unary": counts(unary), "+ untrained CRF": counts(unary, start()),
             "control": counts(control), "control + untrained CRF": counts(control, start()),
             "piecewise": counts(unary, piecewise), "joint": counts(joint, learned)}
    for name, samples in (("control", control), ("joint", joint)) if searched else ():
        table[f"{name} searched"] = cross_fitted(search(start(), samples, finer=False)[1])
    return table


def difference(tables, a, b, draws=1000):
    """The mean over tables of IoU a - b, and its interval."""
    rng, drawn = np.random.default_rng(0), []
    for table in tables:
        chosen = rng.integers(0, len(table[a]), (draws, len(table[a])))
        drawn.append([mean_iou(table[a][i].sum(axis=0)) - mean_iou(table[b][i].sum(axis=0))
                      for i in chosen])
    found = np.mean([mean_iou(table[a].sum(axis=0)) - mean_iou(table[b].sum(axis=0))
                     for table in tables])
    low, high = np.percentile(np.mean(drawn, axis=0), [2.5, 97.5])
    return f"{a} against {b}: {found:+.1f} ({low:+.1f} to {high:+.1f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/experiment", metavar="DIR")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="S")
    parser.add_argument("--search", action="store_true")
    args = parser.parse_args()
    tables = []
    for seed in args.seeds:
        tables.append(columns(os.path.join(args.out, str(seed)),
                              os.path.join(args.out, f"drawn_{seed}"), args.search))
        print(f"seed {seed}:", ", ".join(f"{name} {mean_iou(each.sum(axis=0)):.1f}"
                                         for name, each in tables[-1].items()))
        print(*("  " + difference(tables[-1:], a, b) for a, b in PAIRS), sep="\n")
    print(*(difference(tables, a, b) for a, b in PAIRS), sep="\n")


if __name__ == "__main__":
    main()
