"""Draws a small set of pictures in VOC's format, for the default run and the tests.

What it is: five kinds of objects, each with its shape, its texture and a wide range of colours that
overlaps with those of other kinds and of backgrounds; shaded, overlapping, cut off by the border,
noisy, compressed as JPEG.  What it is not: photographs, or evidence for what a CRF gains on them.
Legend: H x W pixels; u, v an object's own coordinates, in which its outline has a radius near 1.
"""
import colorsys
import pathlib
import tempfile

import numpy as np
import scipy.ndimage
from PIL import Image

from ..inputs import VOID
from .scribbles import weaken
from .voc import LISTS, save_labels

CLASS_NAMES = ("background", "disc", "box", "triangle", "ring", "cross")
DRAWING = 2        # to be raised with every change of the pictures: no older set is taken for it


def draw(directory, n_train=240, n_val=40, seed=0, width=(96, 140), height=(72, 110),
         easy=False):
    """Draws a set in VOC's format, byte for byte the same for the same arguments.

    directory: becomes the folder that holds JPEGImages, SegmentationClass, Scribbles and Clicks
    (the same labels, weakened) and ImageSets; written beside and renamed. A set drawn with the same
    arguments stays as it is.  width, height: ranges (least, greatest) in pixels.  easy: kinds keep
    to their colours and objects are larger, for short training.  A longer list begins with the
    images of a shorter one.
    Returns directory as a Path.  Raises FileExistsError where it holds anything else.
    """
    directory = pathlib.Path(directory)
    about = (f"drawn by minicrf, drawing {DRAWING}: {n_train} + {n_val} images, seed {seed}, "
             f"width {width[0]} to {width[1]}, height {height[0]} to {height[1]}"
             + ", easy" * easy + "\n")
    marker = directory / "toy.txt"
    if marker.is_file() and marker.read_text() == about:
        return directory
    if directory.exists():
        raise FileExistsError(f"{directory}: found something else than a set {about.strip()}; "
                              "expected that or no such folder")

    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".minicrf-", dir=directory.parent) as folder:
        beside = pathlib.Path(folder) / "set"
        for name in ("JPEGImages", "SegmentationClass", "Scribbles", "Clicks", LISTS):
            (beside / name).mkdir(parents=True)
        (beside / LISTS / "classes.txt").write_text("\n".join(CLASS_NAMES) + "\n")
        for split, (name, n) in enumerate((("train", n_train), ("val", n_val))):
            ids = [f"{name}_{i:04d}" for i in range(n)]
            (beside / LISTS / f"{name}.txt").write_text("\n".join(ids) + "\n")
            for i, image_id in enumerate(ids):
                rng = np.random.default_rng([seed, split, i])
                image, labels = picture(rng, rng.integers(*height, endpoint=True),
                                        rng.integers(*width, endpoint=True), easy)
                Image.fromarray(image).save(beside / "JPEGImages" / f"{image_id}.jpg",
                                            quality=int(rng.integers(70, 95)))
                save_labels(beside / "SegmentationClass" / f"{image_id}.png", labels)
                save_labels(beside / "Scribbles" / f"{image_id}.png", weaken(labels))
                save_labels(beside / "Clicks" / f"{image_id}.png", weaken(labels, clicks=True))
        (beside / marker.name).write_text(about)
        beside.replace(directory)
    return directory


def picture(rng, h, w, easy=False):
    """One image (h, w, 3) uint8 RGB and its labels (h, w) uint8, with void rims around objects."""
    spread, anywhere, clash, radii = ((0.02, 0.02, 0.05, (0.3, 0.55)) if easy else
                                      (0.08, 0.15, 0.3, (0.22, 0.5)))
    kinds = rng.integers(1, len(CLASS_NAMES), size=rng.integers(2, 6))
    colours = [_colour(rng, kind, spread, anywhere) for kind in kinds]
    # a background in an object's colour now and then: colour alone must not give objects away
    hue, saturation, value = colours[0] if rng.random() < clash else rng.uniform(0.1, 0.9, 3)
    canvas = _paint(_blotches(rng, h, w, 6) * 0.6 + _blotches(rng, h, w, 2) * 0.4,
                    (hue, saturation * 0.5, value), rng)
    owner = np.zeros((h, w), int)                        # which object a pixel shows; 0: none
    for number, (kind, colour) in enumerate(zip(kinds, colours), 1):
        radius = rng.uniform(*radii) * min(h, w)
        u, v = _coordinates(rng, h, w, radius)
        outside = _outline(kind, u, v) * radius          # in pixels, negative inside
        texture = _texture(kind, u * radius, v * radius, rng)
        cover = np.clip(0.5 - outside, 0, 1)[:, :, None]                 # (h, w, 1)
        canvas += cover * (_paint(texture, colour, rng) - canvas)
        owner[outside < 0] = number
    image = canvas * 255 + rng.normal(0, rng.uniform(4, 12), (h, w, 3))  # camera noise
    labels = np.concatenate([[0], kinds])[owner].astype(np.uint8)
    labels[scipy.ndimage.morphological_gradient(owner, 3) > 0] = VOID    # where owners meet
    return np.clip(image, 0, 255).astype(np.uint8), labels


def _colour(rng, kind, spread, anywhere):
    """Hue, saturation, value: around the kind's own hue, and for a share of objects anywhere."""
    hue = rng.random() if rng.random() < anywhere else (kind / 5 + rng.normal(0, spread)) % 1
    return hue, rng.uniform(0.5, 0.9), rng.uniform(0.4, 0.95)


def _coordinates(rng, h, w, radius):
    """u, v (h, w) of an object of that radius at a random place, turned and stretched at random."""
    y, x = np.mgrid[:h, :w].astype(float)
    x, y = (x - rng.uniform(0.1, 0.9) * w) / radius, (y - rng.uniform(0.1, 0.9) * h) / radius
    angle, stretch = rng.uniform(0, 2 * np.pi), rng.uniform(0.8, 1.25)
    return ((np.cos(angle) * x + np.sin(angle) * y) * stretch,
            (np.cos(angle) * y - np.sin(angle) * x) / stretch)


def _outline(kind, u, v):
    """About the distance to an object's outline, in radii, negative inside."""
    r, a, b = np.hypot(u, v), abs(u), abs(v)
    return {"disc": r - 0.9,
            "box": np.maximum(a, b) - 0.8,
            "triangle": np.maximum(-v, v / 2 + a * 0.87) - 0.6,
            "ring": abs(r - 0.75) - 0.25,
            "cross": np.minimum(np.maximum(a - 1, b - 0.3), np.maximum(a - 0.3, b - 1)),
            }[CLASS_NAMES[kind]]


def _texture(kind, x, y, rng):
    """The pattern of a kind, values in 0..1; x, y in pixels along the object's axes."""
    k = 2 * np.pi / rng.uniform(6, 11)                   # one period is 6 to 11 pixels
    if CLASS_NAMES[kind] == "ring":
        return _blotches(rng, *x.shape, 1)               # grain
    return {"disc": 0.5 + 0.5 * np.sin(k * x),                                   # stripes
            "box": 0.5 + 0.5 * np.tanh(3 * np.sin(k * x) * np.sin(k * y)),       # checks
            "triangle": 1 / (1 + np.exp(4 * (np.cos(k * x) + np.cos(k * y) - 0.8))),    # dots
            "cross": 0.5 + 0.1 * np.sin(k * x / 4),                              # nearly plain
            }[CLASS_NAMES[kind]]


def _blotches(rng, h, w, size):
    """Smooth noise (h, w) of a grain of `size` pixels, values mostly in 0..1."""
    noise = scipy.ndimage.gaussian_filter(rng.normal(size=(h, w)), size, mode="wrap")
    return np.clip(0.5 + 0.25 * noise / noise.std(), 0, 1)


def _paint(pattern, colour, rng):
    """(h, w, 3) in 0..1: a pattern between two shades of a colour, lit from a random side."""
    h, w = pattern.shape
    hue, saturation, value = colour
    light = np.array(colorsys.hsv_to_rgb(hue, saturation, value))
    dark = np.array(colorsys.hsv_to_rgb((hue + rng.normal(0, 0.04)) % 1, saturation,
                                        value * rng.uniform(0.35, 0.65)))
    slope_y, slope_x = rng.uniform(-0.4, 0.4, 2)
    y, x = np.linspace(-1, 1, h)[:, None], np.linspace(-1, 1, w)
    shade = np.clip(1 + slope_y * y + slope_x * x, 0.3, 1.5)[:, :, None]   # (h, w, 1)
    return shade * (dark + pattern[:, :, None] * (light - dark))
