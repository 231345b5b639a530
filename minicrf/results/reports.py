"""What runs leave to look at: results.json, the paper's Table 1, Figures 5 and 6 (Sec. 4.2).

An output folder holds for each stage STAGE.npz and, in STAGE_val.npz, the confusion matrices that
everything here is computed from.  Legend: L labels; IoU in percent.
"""
import json
import os

import numpy as np

from .. import metrics
from ..saving import read_npz, replacing
from ..training import STAGES
from . import checkpoints, figures
from .evaluation import evaluate

MEASURED = *STAGES[:-1], "searched", STAGES[-1]      # joint is last: what others are held against


def columns(stage):
    """{column of the table: method of evaluation.evaluate}.

    After unary training the CRF is an untrained one.
    """
    if stage == "unary":
        return {"unary": "unary", "unary + untrained CRF": "crf"}
    return {f"{stage} without CRF": "unary", stage: "crf"}


def measure(out, data, stage, model, train_list=False):
    """Final figures of a stage, into STAGE_val.npz and results.json; train_list: also on that."""
    def measured(ids, name):
        return evaluate(model, data.samples(ids, f"{stage} on the {name} list"), len(data.classes))

    if stage != "unary":
        print(f"{stage}: the CRF's parameters")
        for key, p in model.crf.params.items():
            if p.ndim == 3:
                path = os.path.join(out, f"{stage}_compatibility.png")
                figures.compatibility(path, p, data.classes)
                print(f"  w: matrices, in {path}")
            else:
                values = p if key == "w" else np.exp(p)
                print(f"  {key.removeprefix('log_')}:", ", ".join(f"{x:.3f}" for x in values))
    arrays = {"ids": data.val, "classes": data.classes, **measured(data.val, "validation")}
    if train_list:
        arrays |= {f"train_{method}": each.sum(axis=0)                   # (L, L)
                   for method, each in measured(data.train, "training").items()}
    write(out, stage, arrays)


def write(out, stage, arrays):
    """Leaves what was measured of a stage in STAGE_val.npz, and its figures in results.json."""
    with replacing(os.path.join(out, f"{stage}_val.npz"), "wb") as file:
        np.savez_compressed(file, **arrays)
    results = {stage: _entry(stage, read) for stage in MEASURED if (read := counts(out, stage))}
    with replacing(os.path.join(out, "results.json")) as file:
        json.dump(results, file, indent=1)


def counts(out, stage):
    """The arrays of STAGE_val.npz; {} where there is none."""
    path = os.path.join(out, f"{stage}_val.npz")
    return read_npz(path) if os.path.exists(path) else {}


def report(out, also, data, stage, paths, device):
    """Table 1, printed and in table.txt, and panels/; then the names of all files.

    stage: the last one measured; the other arguments as in `table` and `panels`.
    """
    print(table(out, also, data, stage), end="")
    names = [*map(os.path.basename, checkpoints.present(out).values()), "results.json", "table.txt"]
    if stage in paths:                   # a stage without a checkpoint predicts nothing to show
        names += panels(out, stage, paths, data, device)
    names += [name for name in ("log.csv", "curves.png")
              if os.path.exists(os.path.join(out, name))]
    print(f"in {out}: {', '.join(names)}")


def table(out, also, data, stage):
    """Table 1: each stage in `out` and in the folders `also`, and how sure the differences are.

    stage: one measured on `data`; what was measured on other pictures is left out, and said so.
    Returns the text, and leaves it in out/table.txt.
    """
    like, confusions, results, train, notes = counts(out, stage), {}, {}, {}, ""
    names = [os.path.basename(os.path.abspath(folder)) for folder in also]
    where = ["", *(f" ({name if names.count(name) == 1 else folder})"
                   for name, folder in zip(names, also))]
    for stage in MEASURED:
        for folder, place in zip([out, *also], where):
            read = counts(folder, stage)
            if not read:
                continue
            if not _same_images(read, like):
                notes += f"not in this table: {stage}{place}, measured on another data set\n"
                continue
            for name, method in columns(stage).items():
                # piecewise without CRF is unary, searched in a control its unary
                repeats = method == "unary" != stage and np.array_equal(
                    read[method], confusions.get("unary" + place))
                if method in read and not repeats:
                    confusions[name + place] = read[method]
                    results[name + place] = _figures(read, method)
                    if f"train_{method}" in read:
                        train[name + place] = _figures(read, method, "train_")
    text = (f"Validation list, {len(data.val)} images\n" + figures.table(results, data.classes)
            + f"within {metrics.BAND} px: mean IoU of the pixels no further than that from another "
            "class\n")
    # of this folder's columns, without a place behind the name
    last = [name for name in confusions if not name.endswith(tuple(where[1:]))][-1]
    others = [name for name in confusions if name != last]
    if others:
        text += "\nDifference of mean IoU, its 95% interval by paired bootstrap over images\n"
    for name in others:
        gain, (low, high), share = metrics.bootstrap_difference(confusions[last], confusions[name])
        text += (f"{last} against {name:{max(map(len, others))}}  {gain:+.2f} ({low:+.2f} to "
                 f"{high:+.2f}), above 0 in {100 * share:.1f}%\n")
    if train:
        text += f"\nTraining list, {len(data.train)} images\n" + figures.table(train, data.classes)
    with replacing(os.path.join(out, "table.txt"), "wb") as file:
        file.write((text + notes).encode())
    return text + notes


def panels(out, stage, paths, data, device):
    """Figures 5 and 6, panels/best.png and worst.png, by a stage; returns what it wrote.

    paths: checkpoints by stage.  The unary one is shown beside where it was measured on `data`.
    """
    read, unary = counts(out, stage), counts(out, "unary")
    beside = "unary" in paths and unary and _same_images(unary, read)
    models = {each: checkpoints.load_model(paths[each], data.classes, device)[0]
              for each in (["unary", stage] if beside else [stage])}

    def row(i):
        image, labels = data.load(data.val[i])
        found = {}
        for name, model in models.items():
            unary, refined = model.predict(image)
            if not beside:
                found["without CRF"] = unary
            found[name] = unary if refined is None else refined
        for name, each in found.items():
            confusion = metrics.confusion_matrix(labels, each, len(data.classes))
            found[name] = each, f"mean IoU {metrics.mean_iou(confusion):.1f}%"
        return dict(image=image, labels=labels, name=data.val[i], predictions=found)

    score = metrics.mean_iou(read[columns(stage)[stage]])                # (images,)
    order = np.argsort(-score)[:np.isfinite(score).sum()]                # NaN, all void, is last
    os.makedirs(os.path.join(out, "panels"), exist_ok=True)
    for name, indices in (("best", order[:4]), ("worst", order[::-1][:4])):
        figures.panel(os.path.join(out, "panels", f"{name}.png"), [row(i) for i in indices],
                      data.classes, f"Validation images on which {stage} does {name}")
    return ["panels/best.png", "panels/worst.png"]


def _same_images(one, other):
    """Whether counts are of the same pixels of the same classes in the same images."""
    return all(np.array_equal(a, b) for a, b in (
        (one["ids"], other["ids"]), (one["classes"], other["classes"]),
        (one["unary"].sum(axis=-1), other["unary"].sum(axis=-1))))


def _entry(stage, read):
    """The entry of results.json for a stage: its own figures, and those of the other method."""
    method, key, other = (("unary", "fixed_crf", "crf") if stage == "unary" else
                          ("crf", "before_crf", "unary"))

    def part(prefix):
        entry = _figures(read, method, prefix)
        return entry | ({key: _figures(read, other, prefix)} if other in read else {})

    return part("") | ({"train": part("train_")} if "train_unary" in read else {})


def _figures(read, method, prefix=""):
    """{"miou", "iou", "miou_band"} of a method, from the arrays of STAGE_val.npz."""
    def percent(x):
        return None if np.isnan(x) else round(float(x), 4)

    L = len(read["classes"])
    whole, near = (read[prefix + method + kind].reshape(-1, L, L).sum(axis=0)        # (L, L)
                   for kind in ("", "_band"))
    return {"miou": percent(metrics.mean_iou(whole)),
            "iou": {str(name): percent(x) for name, x in zip(read["classes"], metrics.iou(whole))},
            "miou_band": percent(metrics.mean_iou(near)), "band": metrics.BAND}
