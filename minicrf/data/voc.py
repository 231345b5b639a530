"""PASCAL VOC 2012 and SBD as they lie on disk: lists, labels, colours (paper, Sec. 4).

Nothing is trusted: whatever is missing, unreadable or inconsistent ends in one line that names the
file, what was found and what was expected, raised as ValueError or FileNotFoundError.
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
    if not path.exists():
        for folder in (path.parents[1], path.parents[2]):
            if (folder / path.name).exists():
                raise ValueError(f"{folder / path.name}: found class names where they are not "
                                 f"read, expected them in {path}")
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
        found.append(f"{lists / split}.txt: found no images of its own, expected one at least")
    if found and problems is None:
        raise ValueError(found[0])
    return ids


def load(root, image_id, sbd=None, n_classes=len(CLASS_NAMES)):
    """One image and its labels: (H, W, 3) uint8 RGB and (H, W) uint8.

    Labels come from VOC's SegmentationClass where they are there, otherwise from sbd; leave sbd out
    for validation, since SBD's labels have no void.
    Raises FileNotFoundError or ValueError, naming the file, for anything that cannot be right.
    """
    image_path, label_path = _paths(root, image_id, sbd)
    # not turned: labels go with the pixels as they are stored
    image = read_photograph(image_path, ("JPEG", "PNG"), upright=False)
    labels = _read_mat(label_path) if label_path.suffix == ".mat" else _read_png(label_path)
    if image.shape[:2] != labels.shape:
        (h, w), (lh, lw) = image.shape[:2], labels.shape
        raise ValueError(f"{label_path}: found {lw}x{lh} labels, expected {w}x{h} as {image_path}")
    wrong = labels[((labels < 0) | (labels >= n_classes)) & (labels != VOID)]
    if wrong.size:
        raise ValueError(f"{label_path}: found label {wrong[0]} ({wrong.size} pixels out of "
                         f"range), expected 0 to {n_classes - 1}, or {VOID} for void")
    return image, labels.astype(np.uint8)


def check(root, sbd=None):
    """Every problem of a whole data set, as a list of lines; empty where all is well."""
    problems = []

    def attempt(function, *arguments):
        try:
            return function(*arguments)
        except (ValueError, OSError) as error:
            problems.append(str(error))

    n_classes = len(attempt(class_names, root) or range(VOID))
    train = attempt(image_list, root, "train", sbd, problems) or []
    val = attempt(image_list, root, "val", None, problems) or []
    problems += in_both_lists(root, train, val)
    # validation needs VOC's own labels: SBD's have no void
    images = [(i, sbd) for i in train] + [(i, None) for i in val]
    with ThreadPoolExecutor() as pool:
        done = pool.map(lambda image: attempt(load, root, *image, n_classes), images)
        for _ in tqdm(done, "check", len(images), unit="image", disable=None):
            pass
    return sorted({*problems})


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
            f"{root}: found no folder {' and no '.join(missing)}, expected a VOC folder with "
            f"JPEGImages, SegmentationClass and {LISTS}{hint}")
    return root


def _sbd_folder(sbd):
    """The folder of SBD's labels: .../cls with .mat files, otherwise one with label PNGs."""
    sbd = pathlib.Path(sbd)
    for folder in (sbd / "dataset" / "cls", sbd / "cls", sbd / "SegmentationClassAug", sbd):
        if folder.is_dir() and (folder.name == "cls" or any(folder.glob("[!.]*.png"))):
            return folder
    raise FileNotFoundError(f"{sbd}: found no such folder, or no label PNGs in it, expected SBD's "
                            "dataset folder (cls, img, train.txt, val.txt) or SegmentationClassAug")


def _lines(path):
    """The lines of a text file, stripped, none empty; any line endings, with or without BOM."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: found no such file, expected a list, one name a "
                                "line") from None
    except (UnicodeDecodeError, IsADirectoryError):
        lines = []
    if not lines:
        raise ValueError(f"{path}: found an empty list, or no UTF-8 text, expected one name a line")
    return lines


def _ids(path, problems):
    """The ids in an image list, each once; what else is in it goes to `problems`, as lines."""
    counts = collections.Counter(_lines(path))
    problems += [f"{path}: found {name[:100]!r} {count} times, expected each image once"
                 for name, count in counts.items() if count > 1]
    # an id is a bare file name: no folder, no drive, no '..', nothing hidden
    odd = {name for name in counts if not re.fullmatch(r"\w[\w .+()-]{0,99}", name)}
    problems += [f"{path}: found {name[:100]!r}, expected an image id such as 2007_000032, "
                 "without folder" for name in odd]
    return [name for name in counts if name not in odd]


def _paths(root, image_id, sbd):
    """The files (image, labels) of an id."""
    root = pathlib.Path(root)
    images = [root / "JPEGImages" / f"{image_id}{ending}" for ending in (".jpg", ".png")]
    labels = [root / "SegmentationClass" / f"{image_id}.png"]
    if sbd is not None:
        folder = _sbd_folder(sbd)
        images.append(folder.parent / "img" / f"{image_id}.jpg")
        labels.append(folder / f"{image_id}{'.mat' if folder.name == 'cls' else '.png'}")
    for kind, places in (("image", images), ("labels", labels)):
        try:
            yield next(filter(os.path.exists, places))
        except StopIteration:
            raise FileNotFoundError(f"{' and '.join(map(str, places))}: found no such file, "
                                    f"expected the {kind} of image id {image_id}") from None


def _read_png(path):
    """Labels (H, W) from a PNG whose pixel values, not colours, are the labels."""
    picture = open_picture(path, "label picture", ("PNG",))
    with open(path, "rb") as file:
        depth, colour = file.read(26)[24:]         # of PNG's header: 0 is grey, 3 a palette
    if colour != 3 and (depth, colour) != (8, 0):  # Pillow stretches grey of fewer bits
        raise ValueError(f"{path}: found {depth} bits a pixel (mode {picture.mode}), expected "
                         "labels as the values of a palette PNG or a grey one of 8 bits, not as "
                         "colours")
    return np.array(picture)


def _read_mat(path):
    """Labels (H, W) from one of SBD's .mat files: GTcls.Segmentation."""
    content = read_mat(path)
    try:
        labels = content["GTcls"]["Segmentation"][0]
    except (KeyError, TypeError, IndexError):
        labels = None
    if not (isinstance(labels, np.ndarray) and labels.ndim == 2 and labels.dtype.kind in "ui"):
        raise ValueError(f"{path}: found no GTcls.Segmentation of integers, height x width, "
                         "expected labels in SBD's layout")
    return labels
