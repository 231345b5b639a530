"""A CRF's parameters chosen by IoU on given scores, cross-fitted, and what that costs.

    python tests/evidence/search_scores.py SCORES.npz PATH/TO/VOC2012 [IMAGES]

SCORES.npz: for each image id the scores (L, h, w) of a network's cells.  Its L labels are those of
the pictures' own, in order; other labels are void.  Each half of the images is measured with what
`search` finds on the other half.  Prints mean IoU, and the time beside as many single inferences.
IMAGES: the first so many alone, to measure the time in a minute or two.
"""
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np   # noqa: E402
from experiment import difference   # noqa: E402

from minicrf import DenseCRF, search   # noqa: E402
from minicrf.data import voc   # noqa: E402
from minicrf.layers import BilinearUpsample   # noqa: E402
from minicrf.metrics import confusion_matrix, mean_iou   # noqa: E402


def read(path, root):
    """[(scores (H, W, L), image, labels)] of all images, labels from 0 to L - 1."""
    pairs, cells, pictures = [], [], []
    upsample = BilinearUpsample(8, -3.5, 306)        # where the centres of the cells lie
    with np.load(path) as file:
        for image_id in file.files:
            cells.append(file[image_id].astype(np.float32))
            pictures.append(voc.load(root, image_id))
    present = np.unique(np.concatenate([np.unique(y) for _, y in pictures]))[:len(cells[0])]
    number = np.full(256, 255, np.uint8)
    number[present] = np.arange(len(present))
    for scores, (image, y) in zip(cells, pictures):
        pairs.append((upsample.forward(scores, y.shape), image, number[y]))
    return pairs


def counts(samples, crf=None):
    """(images, L, L): true labels by labels found."""
    L = samples[0][0].shape[2]
    found = [(crf.forward(f, image, train=False) if crf else f).argmax(axis=2)
             for f, image, _ in samples]
    return np.stack([confusion_matrix(y, each, L) for (_, _, y), each in zip(samples, found)])


def main(path, root, images=None):
    samples = read(path, root)[:images and int(images)]
    L = samples[0][0].shape[2]

    def start():
        return DenseCRF(L, w=(1., 4.))

    began = time.perf_counter()
    table = {"untrained": counts(samples, start())}
    single = time.perf_counter() - began                         # and a little counting
    table["unary"] = counts(samples)
    table["searched"] = np.empty_like(table["unary"])
    points, seconds = 0, 0.
    for half in 0, 1:
        crf, began = start(), time.perf_counter()
        best, rows = search(crf, samples[1 - half::2])
        points, seconds = len(rows), seconds + time.perf_counter() - began
        table["searched"][half::2] = counts(samples[half::2], crf)
        inside = max(mean_iou(each.sum(axis=0)) for _, each in rows)
        print(f"best of {points} points on half {1 - half}: {best}, {inside:.1f} there", flush=True)
    for name, each in table.items():
        iou = mean_iou(each.sum(axis=0))
        print(f"{name}: {iou:.1f}")
    print(difference([table], "searched", "untrained"), difference([table], "searched", "unary"),
          sep="\n")
    print(f"search: {seconds:.0f} s for {len(samples)} images and {points} points; as many single "
          f"inferences: {points * single:.0f} s ({single:.1f} s once over the images)")


if __name__ == "__main__":
    main(*sys.argv[1:])
