"""PASCAL VOC 2012 and SBD as they lie on disk: lists, labels, colours (paper, Sec. 4).

Whatever is missing, unreadable or inconsistent raises ValueError or FileNotFoundError with one line
that names the file and says what is wrong.
Legend: H x W pixels; labels are 0..n_classes-1, or VOID (255) for pixels that are not scored.
"""
import collections
import os
import pathlib
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..inputs import VOID
from .matfiles import read_mat
from .pictures import open_picture, read_photograph, save_png

CLASS_NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor")

LISTS = "ImageSets/Segmentation"


def palette(n):
    """VOC's colour function: the RGB colours of labels 0..n-1, (n, 3) uint8; n at most 256."""
    bits = np.arange(n)[:, None] >> np.arange(24) & 1                    # (n, 24), lowest first
    # three at a time, one each for R, G and B, whose highest bits come first
    return np.packbits(bits.reshape(n, 8, 3), axis=1)[:, 0]


def class_names(root):
    """The class names of a data set, background first: VOC's 21, or those in its classes.txt.

    root: the folder that holds JPEGImages.  ImageSets/Segmentation/classes.txt, one name a line,
    replaces VOC's names.  Raises ValueError for repeated names, fewer than 2 or more than 255, and
    for a classes.txt one or two folders too high.
    """
    path = _folder(root) / LISTS / "classes.txt"
    for misplaced in (path.parents[1] / path.name, path.parents[2] / path.name):
        if misplaced.exists():
            raise ValueError(f"{misplaced}: class names are not read from here; move it to {path}")
    if not path.exists():
        return list(CLASS_NAMES)
    names = _lines(path)
    if not 2 <= len(names) <= VOID or len({*names}) < len(names):
        raise ValueError(f"{path}: found {len(names)} class names, {len({*names})} different ones, "
                         f"expected 2 to {VOID}, each once")
    return names


def image_list(root, split, sbd=None, problems=None):
    """The image ids of a split, "train" or "val", in a fixed order.

    With sbd the training list is (VOC train + SBD train + SBD val) minus VOC val: 10582 images on
    the full data.  sbd: SBD's benchmark_RELEASE folder or the dataset folder in it (labels as .mat
    files); or a SegmentationClassAug folder of label PNGs, or the folder that holds it.
    problems: a list that takes a line for each entry that makes no sense; otherwise they raise
    ValueError.  Raises FileNotFoundError for missing folders and lists.
    """
    found = [] if problems is None else problems
    lists = _folder(root) / LISTS
    ids = _ids(lists / f"{split}.txt", found)
    if sbd is not None and split == "train":
        folder = _sbd_folder(sbd)
        if folder.name == "cls":
            for name in ("train.txt", "val.txt"):
                ids += _ids(folder.parent / name, found)
        else:
            ids += sorted(path.stem for path in folder.glob("[!.]*.png"))
        val = {*_ids(lists / "val.txt", [])}
        ids = [image_id for image_id in dict.fromkeys(ids) if image_id not in val]
    if not ids:
        found.append(f"{lists / split}.txt: no images that could be used")
    if found and problems is None:
        raise ValueError(found[0])
    return ids


def load(root, image_id, sbd=None, n_classes=len(CLASS_NAMES), weak=None):
    """One image and its labels: (H, W, 3) uint8 RGB and (H, W) uint8.

    Labels come from VOC's SegmentationClass where they are there, otherwise from sbd; leave sbd out
    for validation, since SBD's labels have no void.  weak: a folder beside JPEGImages whose labels
    are taken instead.
    Raises FileNotFoundError or ValueError, naming the file, for anything that cannot be right.
    """
    image_path, label_path = _paths(root, image_id, sbd, weak)
    # not turned: labels go with the pixels as they are stored
    image = read_photograph(image_path, ("JPEG", "PNG"), upright=False)
    labels = _read_mat(label_path) if label_path.suffix == ".mat" else read_labels(label_path)
    if image.shape[:2] != labels.shape:
        (h, w), (lh, lw) = image.shape[:2], labels.shape
        raise ValueError(f"{label_path}: found {lw}x{lh} labels, expected {w}x{h} as {image_path}")
    wrong = labels[((labels < 0) | (labels >= n_classes)) & (labels != VOID)]
    if wrong.size:
        raise ValueError(f"{label_path}: found label {wrong[0]} ({wrong.size} pixels out of "
                         f"range), expected 0 to {n_classes - 1}, or {VOID} for void")
    return image, labels.astype(np.uint8)


def check(root, sbd=None, notes=None, weak=None):
    """Every problem of a whole data set, as a list of lines; empty where all is well.

    weak: as in `load`, of the training list.
    notes: a list that takes what may well be meant: the classes of which a list has no pixel.
    """
    problems = []

    def attempt(function, *arguments):
        try:
            return function(*arguments)
        except (ValueError, OSError) as error:
            problems.append(str(error))

    names = attempt(class_names, root) or []
    train = attempt(image_list, root, "train", sbd, problems) or []
    val = attempt(image_list, root, "val", None, problems) or []
    problems += in_both_lists(root, train, val)

    def count(image_id, sbd, weak):
        loaded = attempt(load, root, image_id, sbd, len(names) or VOID, weak)
        return count_labels([loaded[1]] if loaded else [])

    # validation needs VOC's own labels: SBD's have no void
    for split, ids, *source in (("training", train, sbd, weak), ("validation", val, None, None)):
        with ThreadPoolExecutor() as pool:
            counts = pool.map(count, ids, *([each] * len(ids) for each in source))
            total = sum(tqdm(counts, f"check, {split}", len(ids), unit="image", disable=None),
                        count_labels([]))
        if total.any():
            where = f"{root}: the {split} list"
            problems += one_class(where, total)
            absent = [name for name, n in zip(names, total) if n == 0]
            if absent and notes is not None:
                notes.append(f"{where} has no pixel of {', '.join(absent)}")
    return sorted({*problems})


def count_labels(pictures):
    """The number of pixels of each value 0..255 in some label pictures, (256,)."""
    return sum((np.bincount(labels.ravel(), minlength=256) for labels in pictures),
               np.zeros(256, int))


def one_class(where, counts):
    """A line on labels from which nothing can be learned, as all are of one class or void.

    where: what the line begins with.  counts: as of `count_labels`.  Empty where all is well.
    """
    present = np.flatnonzero(counts[:VOID]).tolist()
    if len(present) > 1:
        return []
    if present == [0] and counts[VOID]:
        return [f"{where}: labels are 0 and 255 alone, but 255 is void, neither learned nor "
                "scored; save the masks of two classes as 0 and 1"]
    return [f"{where}: all labels are {present[0] if present else 'void'}, and nothing can be "
            "learned from one class"]


def in_both_lists(root, train, val):
    """A line for each id that is in both lists: its score would be that of a training image."""
    return [f"{root}: found {image_id} in both train.txt and val.txt, expected it in one"
            for image_id in sorted({*train} & {*val})]


def paint(labels):
    """Labels (H, W) uint8 as a Pillow image: its values are the labels, its palette VOC's."""
    picture = Image.fromarray(labels)                                    # mode L
    picture.putpalette(palette(256).tobytes())                           # mode P, values kept
    return picture


def save_labels(path, labels):
    """Write labels (H, W) uint8 as a palette PNG in VOC's colours; beside, then renamed."""
    save_png(path, paint(labels))


# What follows finds and reads single files.

def _folder(root):
    """root as a Path, after checking that VOC's three folders are in it."""
    root = pathlib.Path(root)
    missing = [name for name in ("JPEGImages", "SegmentationClass", LISTS)
               if not (root / name).is_dir()]
    if missing:
        below = [root / name for name in ("VOCdevkit/VOC2012", "VOC2012")
                 if (root / name / "JPEGImages").is_dir()]
        hint = f"; did you mean {below[0]}?" if below else ""
        raise FileNotFoundError(
            f"{root}: found no folder {' and no '.join(missing)}; a VOC folder has JPEGImages, "
            f"SegmentationClass and {LISTS}{hint}")
    return root


def _sbd_folder(sbd):
    """The folder of SBD's labels: .../cls with .mat files, otherwise one with label PNGs."""
    sbd = pathlib.Path(sbd)
    for folder in (sbd / "dataset" / "cls", sbd / "cls", sbd / "SegmentationClassAug", sbd):
        if folder.is_dir() and (folder.name == "cls" or any(folder.glob("[!.]*.png"))):
            return folder
    raise FileNotFoundError(f"{sbd}: neither SBD's dataset folder (cls, img, train.txt, val.txt) "
                            "nor SegmentationClassAug with label PNGs")


def _lines(path):
    """The lines of a text file, stripped, none empty; any line endings, with or without BOM."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such list; it holds one name a line") from None
    except (UnicodeDecodeError, IsADirectoryError):
        text = ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path}: empty, or no UTF-8 text; a list holds one name a line")
    return lines


def _ids(path, problems):
    """The ids in an image list, each once; what else is in it goes to `problems`, as lines."""
    counts = collections.Counter(_lines(path))
    problems += [f"{path}: {name[:100]!r} is listed {count} times"
                 for name, count in counts.items() if count > 1]
    # an id is a bare file name: no folder, no drive, no '..', nothing hidden
    odd = {name for name in counts if not re.fullmatch(r"\w[\w .+()-]{0,99}", name)}
    problems += [f"{path}: {name[:100]!r} is no image id; one is such as 2007_000032, without "
                 "folder or ending" for name in odd]
    return [name for name in counts if name not in odd]


def _paths(root, image_id, sbd, weak=None):
    """The files (image, labels) of an id."""
    root = pathlib.Path(root)
    images = [root / "JPEGImages" / f"{image_id}{ending}" for ending in (".jpg", ".png")]
    labels = [root / "SegmentationClass" / f"{image_id}.png"]
    if sbd is not None:
        folder = _sbd_folder(sbd)
        images.append(folder.parent / "img" / f"{image_id}.jpg")
        labels.append(folder / f"{image_id}{'.mat' if folder.name == 'cls' else '.png'}")
    if weak is not None:
        labels = [root / weak / f"{image_id}.png"]
    return _first("image", images), _first("labels", labels)


def _first(kind, paths):
    """The first of some files that is there."""
    for path in paths:
        if os.path.exists(path):             # False, too, for names too long for a file
            return path
    raise FileNotFoundError(f"{' and '.join(map(str, paths))}: no such file for the {kind}")


def read_labels(path):
    """Labels (H, W) from a PNG whose pixel values, not colours, are the labels."""
    picture = open_picture(path, "label picture", ("PNG",))
    if picture.mode in ("RGB", "RGBA"):
        raise ValueError(
            f"{path}: an RGB picture, but labels are the values of a palette PNG or a grey one; "
            "VOC's colours become labels by Image.open(path).convert('RGB').quantize("
            "palette=voc.paint(np.zeros((1, 1), np.uint8)), dither=0)")
    with open(path, "rb") as file:
        depth, colour = file.read(26)[24:]         # of PNG's header: 0 is grey, 3 a palette
    if colour != 3 and (depth, colour) != (8, 0):  # Pillow stretches grey of fewer bits
        raise ValueError(f"{path}: {depth} bits a pixel (mode {picture.mode}), but labels are the "
                         "values of a palette PNG or of a grey one of 8 bits")
    return np.array(picture)


def _read_mat(path):
    """Labels (H, W) from one of SBD's .mat files: GTcls.Segmentation."""
    try:
        labels = read_mat(path)["GTcls"]["Segmentation"][0, 0]
    except (KeyError, IndexError):
        labels = None
    if not (isinstance(labels, np.ndarray) and labels.ndim == 2 and labels.dtype.kind in "ui"):
        raise ValueError(f"{path}: no GTcls.Segmentation of integers, height x width, as SBD's "
                         "files have")
    return labels
