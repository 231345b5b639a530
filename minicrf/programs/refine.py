"""python -m minicrf IMAGE SCORES OUT: refine any segmentation of a photograph with the dense CRF.

SCORES come from any network, as an array, or are drawn by hand, as a picture of labels.
Legend: H x W pixels, L labels.
"""
import argparse
import contextlib
import os
import sys

import numpy as np
from PIL import Image, ImageColor, ImageOps
from tqdm import tqdm

from ..arrays import to_device, to_host
from ..data import pictures, voc
from ..densecrf import DenseCRF
from ..inputs import VOID
from ..results import checkpoints, figures
from ..saving import read_npz, reason, replacing
from ..scores import scores_from_labels, scores_from_probabilities
from .gpu import choose_device
from .program import WEIGHT, WIDTH, Parser, number, run_program

MAX_LABELS = VOID                      # labels are 0..254
RGB_CODE = 1 << 16, 1 << 8, 1          # a colour as one number


def parse_arguments(arguments=None):
    parser = Parser(
        prog="python -m minicrf", usage="python -m minicrf [options] IMAGE SCORES OUT",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Refine a segmentation of a photograph with a fully connected CRF.",
        epilog="examples:\n"
        "  python -m minicrf photo.jpg scores.npy refined.png\n"
        "  python -m minicrf photo.jpg softmax.npy refined.png --probabilities\n"
        "  python -m minicrf photo.jpg scribbles.png refined.png --unknown black\n"
        "  python -m minicrf photo.jpg scores.npy refined.png --parameters runs/joint.npz")
    add = parser.add_argument
    add("image", metavar="IMAGE", help="the photograph, or a folder of them")
    add("scores", metavar="SCORES", help="an .npy array (H, W, L) of class scores, larger being "
        "likelier; or a label picture, in which each colour is a label (but not 255 of a palette, "
        "VOC's void); or a folder of these, named as the photographs")
    add("out", metavar="OUT", help="what to write: a .png of labels, in the colours of SCORES or, "
        "for an array, VOC's; an .npy of marginals (H, W, L), float32; or a folder, for a .png "
        "of each photograph")
    add("--overlay", action="store_true", help="also write OUT.overlay.png, to look at")
    add = parser.add_argument_group("what SCORES means").add_argument
    add("--probabilities", action="store_true", help="SCORES holds probabilities; one channel or "
        "a grey picture is that of the second of two labels, as a sigmoid gives it")
    add("--confidence", type=float, default=0.7, metavar="P",
        help="probability that a label of the picture is right (default: 0.7)")
    add("--unknown", metavar="COLOUR", type=colour,
        help="colour of the pixels whose label is to be found: a name, R,G,B or RRGGBB")
    add = parser.add_argument_group("the CRF").add_argument
    add("--w", type=WEIGHT, nargs=2, metavar=("POSITION", "BILATERAL"),
        help="weights of its two kernels (default: 3 10)")
    add("--sigma-position", type=WIDTH, metavar="PIXELS",
        help="width of the kernel of position (default: 3)")
    add("--sigma-bilateral", type=WIDTH, nargs=2, metavar=("PIXELS", "COLOUR"),
        help="widths of the kernel of position and colour (default: 80 13)")
    add("--parameters", metavar="FILE",
        help="learned ones instead: of DenseCRF.save, or a checkpoint of run_voc.py")
    add("--iterations", type=number(0, 1e6, int), default=5, metavar="T",
        help="mean-field steps (default: 5)")
    add("--device", choices=("auto", "cpu", "gpu"), default="auto",
        help="(default: a GPU where there is one)")
    return parser.parse_args(arguments)


def colour(text):
    """(R, G, B) from a name such as black, from R,G,B or from RRGGBB."""
    for form in (text, f"#{text}", f"rgb({text})"):
        with contextlib.suppress(ValueError):
            return ImageColor.getrgb(form)[:3]
    raise argparse.ArgumentTypeError(f"found {text!r}, expected a name, R,G,B or RRGGBB")


def note(path, text):
    print(f"note: {path}: {text}", file=sys.stderr)


def open_picture(path, modes, expected):
    """The picture of scores or labels, turned as its orientation tag says."""
    picture = ImageOps.exif_transpose(pictures.open_picture(path, "picture or .npy file"))
    if picture.mode not in modes:
        raise ValueError(f"{path}: found a picture of mode {picture.mode}, expected {expected}")
    return picture


def check_size(path, found, size):
    """Raises ValueError unless scores or labels of size found, (H, W), are of the photograph's."""
    if found != size:
        raise ValueError(f"{path}: found height and width {found}, expected {size} as the "
                         "photograph's, turned as its orientation tag says")


def read_array(path, size):
    """An .npy file, or a grey picture as numbers from 0 to 1: (H, W, L); (H, W) has one channel."""
    if path.lower().endswith(".npy"):
        try:
            values = np.lib.format.open_memmap(path, mode="r")
        except Exception as error:      # NumPy raises half a dozen kinds for broken files
            raise ValueError(f"{path}: not a readable .npy file ({reason(error)})") from None
    else:
        picture = open_picture(path, ("1", "L"), "probabilities, a grey picture of 8 bits")
        values = np.asarray(picture.convert("L"), np.float32) / 255
    values = values[:, :, None] if values.ndim == 2 else values
    sound = values.ndim == 3 and values.dtype.kind in "fiu" and 1 <= values.shape[2] <= MAX_LABELS
    if not sound or values.shape[1:] == size:
        raise ValueError(f"{path}: found shape {values.shape} of {values.dtype}, expected "
                         f"(H, W, L) of real numbers, L at most {MAX_LABELS}; np.moveaxis(x, 0, "
                         "-1) puts labels last that PyTorch has first")
    return values.astype(np.float32)


def scores_of(path, values, size, probabilities):
    """The scores (H, W, L) float32 that an array of scores or probabilities stands for."""
    (H, W), (h, w, L) = size, values.shape
    if L == 1 and not probabilities:
        raise ValueError(f"{path}: found one channel; with --probabilities it is that of the "
                         "second of two labels, and scores z are np.dstack([0 * z, z])")
    low, high = values.min(), values.max()
    if not (0 <= low <= high <= 1.001 if probabilities else high < np.inf):   # NaN is neither
        raise ValueError(f"{path}: found values from {low:g} to {high:g}, expected "
                         + ("probabilities, 0 to 1" if probabilities else "finite scores"))
    for p, advice in ((values, "probabilities; if so, --probabilities is missing"),
                      (np.exp(-values), "energies, -log p; if so, scores are their negative")):
        if not probabilities and low >= 0 and abs(p.sum(axis=2) - 1).max() < 0.01:
            note(path, f"these look like {advice}")
    if L == 1:
        values = np.concatenate([1 - values.clip(0, 1), values], axis=2)
    if h < H and w < W:
        note(path, f"{w}x{h} scores are interpolated to the photograph's {W}x{H} pixels")
        channels = [Image.fromarray(channel) for channel in np.moveaxis(values, 2, 0)]
        values = np.dstack([np.asarray(channel.resize((W, H), Image.Resampling.BILINEAR))
                            for channel in channels])
    check_size(path, values.shape[:2], size)
    return scores_from_probabilities(values) if probabilities else values


def read_labels(path, unknown=None):
    """A label picture as (labels (H, W) uint8, the L labels' names, paint).

    labels: 0..L-1, in the order of the picture's values, or of its colours if it is RGB; VOID where
    the colour is `unknown`, (R, G, B), or the value VOC's void.
    paint: turns labels (H, W) without VOID into a picture of the file's own mode and colours.
    """
    picture = open_picture(path, ("1", "L", "P", "RGB", "RGBA"),
                           "labels as a palette, grey (8 bits) or RGB picture")
    pixels, rgb = np.asarray(picture), np.asarray(picture.convert("RGB"))
    codes = pixels if pixels.ndim == 2 else rgb.astype(np.int32) @ RGB_CODE          # (H, W)
    values, first, index = np.unique(codes, return_index=True, return_inverse=True)
    first = np.unravel_index(first, codes.shape)                             # a pixel of each value
    known = np.ones(len(values), bool) if unknown is None else (rgb[first] != unknown).any(axis=1)
    if unknown is not None and known.all():
        note(path, f"no pixel has the unknown colour {unknown}")
    if picture.mode == "P" and known.sum() > 2:
        known &= values != VOID
    L = int(known.sum())
    if not 2 <= L <= MAX_LABELS:
        raise ValueError(f"{path}: found {L} colours besides unknown, expected 2 to {MAX_LABELS}, "
                         "each a label (JPEG and smoothing add colours)")
    if L >= 100:
        note(path, f"found {L} labels; if this is a soft mask, --probabilities is missing")
    number = np.where(known, np.cumsum(known) - 1, VOID).astype(np.uint8)    # of each value
    named = rgb[first] if pixels.ndim == 3 else values.astype(int)[:, None]
    names = [",".join(map(str, each)) for each in named[known].tolist()]
    of_label = pixels[first][known]                                          # (L,), (L, 3 or 4)

    def paint(labels):
        painted = Image.fromarray(of_label[labels])
        if picture.mode == "P":
            painted.putpalette(picture.getpalette())
        return painted

    return number[index].reshape(codes.shape), names, paint


def read_scores(args, path, size):
    """(scores (H, W, L), labels (H, W) before the CRF, their names if any, paint)."""
    is_array = path.lower().endswith(".npy")
    if is_array or args.probabilities:
        if args.unknown is not None:
            raise ValueError("--unknown: is for label pictures, whose colours are the labels")
        scores = scores_of(path, read_array(path, size), size, args.probabilities)
        paint = voc.paint if is_array else lambda labels: Image.fromarray(labels * np.uint8(255))
        return scores, scores.argmax(axis=2), [], paint
    labels, names, paint = read_labels(path, args.unknown)
    check_size(path, labels.shape, size)
    return scores_from_labels(labels, len(names), args.confidence), labels, names, paint


def build_crf(args, n_labels):
    """The CRF of the options, or of a checkpoint: its nine parameters fit any number of labels."""
    given = {name: getattr(args, name) for name in ("w", "sigma_position", "sigma_bilateral")
             if getattr(args, name) is not None}
    if args.parameters is None:
        return DenseCRF(n_labels, iterations=args.iterations, **given)
    if given:
        raise ValueError("--parameters: found --w or a --sigma as well, expected one or the other")
    crf = (DenseCRF.load(args.parameters) if "options" in read_npz(args.parameters) else
           checkpoints.load_crf(*checkpoints.read(args.parameters)))
    if not isinstance(crf, DenseCRF):
        raise ValueError(f"{args.parameters}: found a network without such a CRF, expected a "
                         "checkpoint of the joint or the piecewise stage, or DenseCRF.save's")
    crf.iterations = args.iterations
    if crf.params["w"].ndim == 1:
        crf.n_labels = n_labels
    return crf


def refine(args):
    """What the command line asks for; returns the exit code."""
    args.device = choose_device(args.device)
    if not os.path.isdir(args.image):
        refine_one(args, args.image, args.scores, args.out)
        return 0
    if not os.path.isdir(args.scores):
        raise ValueError(f"{args.scores}: not a folder, though {args.image} is one")
    os.makedirs(args.out, exist_ok=True)
    code = 0
    for image in tqdm(pictures.find_photographs(args.image), "refine", unit="image", disable=None):
        stem = os.path.splitext(os.path.basename(image))[0]
        paths = [os.path.join(args.scores, stem + ending) for ending in (".npy", ".png")]
        path = next(filter(os.path.isfile, paths), paths[0])
        try:
            refine_one(args, image, path, os.path.join(args.out, f"{stem}.png"))
        except (ValueError, OSError) as error:
            print(f"skipped: {error}", file=sys.stderr)
            code = 2
    return code


def refine_one(args, photograph, path, out):
    """Refine the scores of one photograph, write the result, and say so."""
    ending = os.path.splitext(out)[1].lower()
    if ending not in (".png", ".npy") or os.path.realpath(out) in map(
            os.path.realpath, (photograph, path)):
        raise ValueError(f"{out}: the result needs a name that ends in .png or .npy and is none of "
                         "the inputs")
    image = pictures.read_photograph(photograph)
    scores, before, names, paint = read_scores(args, path, image.shape[:2])
    H, W, L = scores.shape
    q = build_crf(args, L).forward(
        to_device(scores, args.device), to_device(image, args.device), train=False)
    labels = to_host(q.argmax(axis=2)).astype(np.uint8)
    if ending == ".png":
        pictures.save_png(out, paint(labels))
    else:
        with replacing(out, "wb") as file:
            np.save(file, to_host(q))
    if args.overlay:
        pictures.save_png(f"{out}.overlay.png", figures.overlay(image, labels))
    changed = np.mean((labels != before)[before != VOID])
    said = f"wrote {out}: {W}x{H} pixels, {L} labels, {100 * changed:.1f}% of labels changed"
    for i, name in enumerate(names if ending == ".npy" else ()):
        said += f"; channel {i} is label {name}"
    tqdm.write(said)


def main(arguments=None):
    return run_program("python -m minicrf", refine, parse_arguments(arguments))
