"""PASCAL VOC 2012 and SBD as they lie on disk: lists, labels, colours (paper, Sec. 4).

Whatever is missing or cannot be right raises ValueError or OSError with one line that names it.
Legend: H x W pixels; labels are 0..n_classes-1, or VOID (255) for pixels that are not scored.
"""
import os
import pathlib

import numpy as np
from PIL import Image

from ..inputs import VOID, check_labels
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

    root: the folder that holds JPEGImages.  classes.txt lies beside the lists, one name a line.
    """
    path = pathlib.Path(root) / LISTS / "classes.txt"
    for wrong in (path.parents[1] / path.name, path.parents[2] / path.name):
        if wrong.exists():
            raise ValueError(f"{wrong}: found class names here, expected them at {path}")
    if not path.exists():
        return list(CLASS_NAMES)
    names = _lines(path)
    if not 2 <= len(names) <= VOID or len({*names}) < len(names):
        raise ValueError(f"{path}: found {len(names)} names, expected 2 to {VOID}, each once")
    return names


def image_list(root, split, sbd=None):
    """The image ids of a split, "train" or "val", each once, in a fixed order.

    With sbd the training list is (VOC train + SBD train + SBD val) minus VOC val: 10582 images on
    the full data.  sbd: SBD's benchmark_RELEASE or dataset folder (labels as .mat files), or
    SegmentationClassAug (as PNGs) or the folder that holds it.
    """
    lists = pathlib.Path(root) / LISTS
    ids = _lines(lists / f"{split}.txt")
    if sbd is not None and split == "train":
        folder = _sbd_labels(sbd)
        if folder.name == "cls":
            more = _lines(folder.parent / "train.txt") + _lines(folder.parent / "val.txt")
        else:
            more = sorted(path.stem for path in folder.glob("[!.]*.png"))
        val = {*_lines(lists / "val.txt")}
        ids = [image_id for image_id in ids + more if image_id not in val]
    for image_id in ids:
        if os.path.basename(image_id) != image_id:           # files are written under these names
            raise ValueError(f"{lists / split}.txt: {image_id!r} is no image id, such as "
                             "2007_000032, without folder")
    return list(dict.fromkeys(ids))


def load(root, image_id, sbd=None, n_classes=len(CLASS_NAMES), weak=None):
    """One image and its labels: (H, W, 3) uint8 RGB and (H, W) uint8.

    Labels come from VOC's SegmentationClass where they are there, otherwise from sbd; leave sbd out
    for validation, since SBD's labels have no void.  weak: a folder beside JPEGImages whose labels
    are taken instead.
    """
    root = pathlib.Path(root)
    images = [root / "JPEGImages" / f"{image_id}{ending}" for ending in (".jpg", ".png")]
    paths = [root / (weak or "SegmentationClass") / f"{image_id}.png"]
    if sbd is not None and weak is None:
        folder = _sbd_labels(sbd)
        images.append(folder.parent / "img" / f"{image_id}.jpg")
        paths.append(folder / f"{image_id}{'.mat' if folder.name == 'cls' else '.png'}")
    # not turned: labels go with the pixels as they are stored
    image = read_photograph(_first(images), upright=False)
    path = _first(paths)
    labels = read_labels(path)
    try:
        check_labels(labels, image.shape[:2], n_classes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return image, labels.astype(np.uint8)


def read_labels(path):
    """Labels (H, W): the values, not the colours, of a PNG; or GTcls.Segmentation of SBD's .mat."""
    if path.suffix == ".mat":
        try:
            return read_mat(path)["GTcls"]["Segmentation"][0, 0]
        except (KeyError, IndexError):
            raise ValueError(f"{path}: no GTcls.Segmentation in it, as in SBD's files") from None
    picture = open_picture(path, "label picture")
    if picture.mode not in ("P", "L"):
        raise ValueError(
            f"{path}: a picture of mode {picture.mode}, but labels are the values of a palette PNG "
            "or of a grey one of 8 bits; VOC's colours become labels by Image.open(path).convert("
            "'RGB').quantize(palette=voc.paint(np.zeros((1, 1), np.uint8)), dither=0)")
    return np.array(picture)


def one_class(where, present):
    """A line on labels from which nothing can be learned; empty where all is well.

    where: what the line begins with.  present: the set of values in the labels.
    """
    if len(present - {VOID}) > 1:
        return []
    return [f"{where}: labels are {' and '.join(map(str, sorted(present)))} alone, one class, from "
            f"which nothing can be learned ({VOID} is void; save masks of two classes as 0 and 1)"]


def paint(labels):
    """Labels (H, W) uint8 as a Pillow image: its values are the labels, its palette VOC's."""
    picture = Image.fromarray(labels)                                    # mode L
    picture.putpalette(palette(256).tobytes())                           # mode P, values kept
    return picture


def save_labels(path, labels):
    """Write labels (H, W) uint8 as a palette PNG in VOC's colours; beside, then renamed."""
    save_png(path, paint(labels))


def _lines(path):
    """The lines of a text file, stripped, none empty; any line endings, with or without BOM."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: found no such list of names; --voc is the folder that "
                                "holds JPEGImages, .../VOCdevkit/VOC2012") from None
    except UnicodeDecodeError:               # such as the UTF-16 of a Windows shell
        lines = []
    lines = [line.strip() for line in lines if line.strip()]
    if not lines:
        raise ValueError(f"{path}: empty, or no UTF-8 text; a list holds one name a line")
    return lines


def _sbd_labels(sbd):
    """The folder of SBD's labels: cls with .mat files, or one with PNGs."""
    sbd = pathlib.Path(sbd)
    for folder in (sbd / "dataset" / "cls", sbd / "cls", sbd / "SegmentationClassAug", sbd):
        if folder.is_dir() and (folder.name == "cls" or any(folder.glob("[!.]*.png"))):
            return folder
    raise FileNotFoundError(f"{sbd}: neither SBD's dataset folder (cls, img, train.txt, val.txt) "
                            "nor SegmentationClassAug with label PNGs")


def _first(paths):
    """The first of some files that is there."""
    for path in paths:
        if path.exists():
            return path
    raise FileNotFoundError(f"{' and '.join(map(str, paths))}: found no such file")
