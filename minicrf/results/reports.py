"""What runs leave to look at: results.json, the paper's Table 1, Figures 5 and 6 (Sec. 4.2).

An output folder holds for each stage STAGE.npz, an entry of results.json, and in STAGE_val.npz the
confusion matrices behind that entry.  `data` has the class names (classes), the validation ids
(val) and load(id) -> (image, labels).  Legend: H x W pixels, L labels; IoU in percent.
"""
import json
import os

import numpy as np

from .. import training
from ..data import weights
from ..files import replacing
from . import checkpoints, figures, metrics

# {column of the table: (key in STAGE_val.npz, method of evaluation.evaluate)}: a stage's own figures
# under "confusion"; the other ones are of a CRF that has learned nothing, and of no CRF
COLUMNS = {"unary": {"unary": ("confusion", "unary"), "unary + CRF": ("fixed_crf", "crf")},
           **{stage: {f"{stage} without CRF": ("before_crf", "unary"), stage: ("confusion", "crf")}
              for stage in ("piecewise", "joint")}}


def summary(counts, stage, classes, band):
    """The entry of results.json for counts, as evaluation.evaluate returns them for one list."""
    def percent(x):
        return None if np.isnan(x) else round(float(x), 4)               # None: not in the truth

    entries = {}
    for key, method in COLUMNS[stage].values():
        if method in counts:
            whole, near = counts[method].sum(axis=0), counts[f"{method}_band"].sum(axis=0)  # (L, L)
            iou = {name: percent(x) for name, x in zip(classes, metrics.iou(whole))}
            entries[key] = {"miou": percent(metrics.mean_iou(whole)), "iou": iou,
                            "miou_band": percent(metrics.mean_iou(near)), "band": band}
    return entries.pop("confusion") | entries


def record(out, stage, entry, counts, ids):
    """Put a stage's entry into results.json, beside those of other stages, and keep its counts."""
    results = read_results(out)
    kept = {key: counts[method] for key, method in COLUMNS[stage].values() if method in counts}
    with replacing(os.path.join(out, f"{stage}_val.npz"), "wb") as file:
        np.savez_compressed(file, ids=np.array(ids), **kept)
    with replacing(os.path.join(out, "results.json")) as file:
        json.dump({**results, stage: entry}, file, indent=1)


def read_results(out):
    """The entries of a folder's results.json by stage; {} where there is none.

    Raises ValueError for a file of another kind.
    """
    path = os.path.join(out, "results.json")
    try:
        with open(path, encoding="utf-8") as file:
            results = json.load(file)
        for entry in results.values():
            _check(entry)
        return results
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: found no results ({error}), expected those of an earlier run; "
                         "move it away to start anew") from None


def table(out, also, data, truth):
    """Table 1: each stage in `out` and in the folders `also`, and how sure the differences are.

    truth: pixels of each class in each validation image, (images, L); what was measured on other
    pictures is left out, and said so.  Returns the text, and leaves it in out/table.txt.
    """
    columns, confusions, notes = _columns(out, also, data, truth)
    text = f"Validation list, {len(data.val)} images\n" + figures.table(columns, data.classes)
    for band in sorted({entry["band"] for entry in columns.values() if "band" in entry}):
        text += (f"within {band} px: mean IoU of the pixels no further than that from another "
                 "class\n")
    last = [stage for stage in training.STAGES if stage in columns][-1]
    others = [name for name in columns if name != last and {name, last} <= confusions.keys()]
    if others:
        text += "\nDifference of mean IoU, its 95% interval by paired bootstrap over images\n"
    for name in others:
        gain, (low, high), share = metrics.bootstrap_difference(confusions[last], confusions[name])
        text += (f"{last} against {name:{max(map(len, others))}}  {gain:+.2f} ({low:+.2f} to "
                 f"{high:+.2f}), above 0 in {100 * share:.1f}%\n")
    train = {name: entry["train"] for name, entry in columns.items() if "train" in entry}
    if train:
        text += f"\nTraining list, {len(data.train)} images\n" + figures.table(train, data.classes)
    text += "".join(notes)
    with replacing(os.path.join(out, "table.txt"), "wb") as file:
        file.write(text.encode())
    return text


def panels(out, paths, data, truth, device):
    """Figures 5 and 6, panels/best.png and worst.png, by the last stage; returns what it wrote.

    paths: checkpoints by stage; drawn are those evaluated on the data set as it is.
    """
    measured = {stage: read["confusion"] for stage in training.STAGES if stage in paths
                and (read := _read_confusions(out, stage)) and _same_images(read, data, truth)}
    last = [*measured][-1]
    models = {stage: checkpoints.load_model(paths[stage], data.classes, device)[0]
              for stage in measured if stage in ("unary", last)}

    def row(i):
        image, labels = data.load(data.val[i])
        predictions = {}
        for stage, model in models.items():
            unary, refined = model.predict(image)
            if "unary" not in models:
                predictions[f"{stage} without CRF"] = unary
            predictions[stage] = unary if refined is None else refined
        for method, found in predictions.items():
            confusion = metrics.confusion_matrix(labels, found, len(data.classes))
            predictions[method] = found, metrics.mean_iou(confusion)
        return dict(image=image, labels=labels, name=data.val[i], predictions=predictions)

    score = metrics.mean_iou(measured[last])                             # (images,)
    order = [i for i in np.argsort(-score) if not np.isnan(score[i])]    # NaN: all void
    os.makedirs(os.path.join(out, "panels"), exist_ok=True)
    written = []
    for name, indices in (("best", order[:4]), ("worst", order[::-1][:4])):
        if indices:
            written.append(f"panels/{name}.png")
            figures.panel(os.path.join(out, written[-1]), [row(i) for i in indices], data.classes,
                          f"Validation images on which {last} does {name}")
    return written


def _check(entry):
    """Raises ValueError, KeyError, TypeError or AttributeError unless it is as `summary` gives."""
    numbers = [entry["miou"], *entry["iou"].values()]
    if "band" in entry:
        numbers += [entry["band"], entry["miou_band"]]
    if not all(x is None or 0 <= x <= 1e6 for x in numbers):
        raise ValueError("no percentages")
    for other in entry.values():
        if isinstance(other, dict) and other is not entry["iou"]:
            _check(other)


def _columns(out, also, data, truth):
    """(entries, confusions (images, L, L), notes): the first two by column of the table."""
    folders = [out, *(f for f in dict.fromkeys(also) if not os.path.samefile(f, out))]
    bases = [os.path.basename(os.path.abspath(folder)) for folder in folders]
    columns, confusions, notes = {}, {}, []
    for stage in training.STAGES:
        for folder, base in zip(folders, bases):
            results, read = read_results(folder), _read_confusions(folder, stage)
            if stage not in results:
                continue
            entry, unary = results[stage], results.get("unary", {}).get("iou")
            where = "" if folder == out else f" ({base if bases.count(base) == 1 else folder})"
            if list(entry["iou"]) != data.classes or read and not _same_images(read, data, truth):
                notes.append(f"not in this table: {stage}{where}, measured on another data set\n")
                continue
            for name, (key, _) in COLUMNS[stage].items():
                if key == "confusion":
                    columns[name + where] = entry
                elif key in entry and entry[key]["iou"] != unary:    # as piecewise without CRF is
                    train = {"train": entry["train"][key]} if "train" in entry else {}
                    columns[name + where] = entry[key] | train
                if key in read:
                    confusions[name + where] = read[key]
    return columns, confusions, notes


def _read_confusions(out, stage):
    """The arrays of STAGE_val.npz; {} where there is none."""
    path = os.path.join(out, f"{stage}_val.npz")
    read = weights.read_npz(path) if os.path.exists(path) else {}
    if read and not ({"ids", "confusion"} <= read.keys() and read["ids"].ndim == 1
                     and read["confusion"].ndim == 3):
        raise ValueError(f"{path}: found {', '.join(read)}, expected the ids and confusion of an "
                         "evaluation; move it away and evaluate anew")
    return read


def _same_images(read, data, truth):
    """Whether confusion matrices are of the validation images as they are now."""
    counts = read["confusion"].sum(axis=-1)                              # (images, L)
    return list(read["ids"]) == data.val and np.array_equal(counts, truth)
