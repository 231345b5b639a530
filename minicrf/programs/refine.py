"""python -m minicrf IMAGE SCORES OUT: refine any segmentation of a photograph with the dense CRF.

SCORES come from any network, as an array, or from any hand, as a picture of labels.
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
from .gpu import gpu_available
from .program import WEIGHT, WIDTH, Parser, number, run_program

CONFIDENCE = 0.7
MAX_LABELS = VOID                      # labels are 0..254
MODES = ("1", "L", "P", "RGB", "RGBA")
RGB_CODE = 1 << 16, 1 << 8, 1          # a colour as one number


def parse_arguments(arguments=None):
    parser = Parser(
        prog="python -m minicrf", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Refine a segmentation of a photograph with a fully connected CRF.",
        epilog="examples:\n"
        "  python -m minicrf photo.jpg scores.npy refined.png\n"
        "  python -m minicrf photo.jpg softmax.npy refined.png --probabilities\n"
        "  python -m minicrf photo.jpg scribbles.png refined.png --unknown black\n"
        "  python -m minicrf photo.jpg scores.npy refined.png --parameters runs/joint.npz")
    add = parser.add_argument
    add("image", metavar="IMAGE", help="the photograph, or a folder of them")
    add("scores", metavar="SCORES", help="an .npy array (H, W, L) of class scores, larger being "
        "likelier, or a label picture (palette, grey or RGB), each colour in it a label; or a "
        "folder of these, with the photographs' names")
    add("out", metavar="OUT", help="the .png to write: a label picture in the colours of SCORES "
        "or, for an array, label numbers in VOC's palette; or an .npy, for the marginals (H, W, L) "
        "in float32; or a folder, for a .png of each photograph")
    add("--overlay", action="store_true", help="also write OUT.overlay.png, to look at")
    add = parser.add_argument_group("what SCORES means").add_argument
    add("--probabilities", action="store_true", help="the array holds probabilities, not scores")
    add("--confidence", type=float, metavar="P",
        help=f"probability that a label of the picture is right (default: {CONFIDENCE})")
    add("--unknown", metavar="COLOUR", type=colour,
        help="colour of the pixels whose label is to be found: a name, R,G,B or RRGGBB")
    add = parser.add_argument_group("the CRF").add_argument
    add("--w", type=WEIGHT, nargs=2, metavar=("POSITION", "BILATERAL"),
        help="weights of the two kernels (default: 3 10)")
    add("--sigma-position", type=WIDTH, metavar="PIXELS", help="(default: 3)")
    add("--sigma-bilateral", type=WIDTH, nargs=2, metavar=("PIXELS", "COLOUR"),
        help="(default: 80 13)")
    add("--parameters", metavar="FILE",
        help="learned weights and sigmas instead: of DenseCRF.save, or a checkpoint of run_voc.py")
    add("--iterations", metavar="T", default=5, type=number("a whole number from 0 to 1e6",
        lambda x: 0 <= x <= 1e6, int), help="mean-field steps (default: 5)")
    add("--device", choices=("auto", "cpu", "gpu"), default="auto",
        help="(default: a GPU where there is one)")
    return parser.parse_args(arguments)


def colour(text):
    """(R, G, B) from a name such as black, from R,G,B or from RRGGBB."""
    for form in (text, f"#{text}", f"rgb({text})"):
        with contextlib.suppress(ValueError):
            return ImageColor.getrgb(form)[:3]
    raise argparse.ArgumentTypeError(f"found {text!r}, expected a name, R,G,B or RRGGBB")


def read_array(path, size, probabilities):
    """The scores (H, W, L) float32 in an .npy file of scores or probabilities; size: (H, W)."""
    try:
        values = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:      # NumPy raises half a dozen kinds for broken files
        raise ValueError(f"{path}: not a readable .npy file ({reason(error)})") from None
    if values.ndim != 3 or values.dtype.kind not in "fiu" or not 1 <= values.shape[2] <= MAX_LABELS:
        raise ValueError(f"{path}: found shape {values.shape} of {values.dtype}, expected "
                         f"(H, W, L) of real numbers, L at most {MAX_LABELS}")
    check_size(path, values.shape[:2], size)         # before so much is read
    try:
        with np.errstate(over="raise"):
            values = np.array(values, np.float32)
    except FloatingPointError:
        values = np.float32([np.nan])
    low, high = values.min(), values.max()
    if not (0 <= low <= high <= 1.001 if probabilities else high < np.inf):   # NaN is neither
        raise ValueError(f"{path}: found values from {low:g} to {high:g}, expected "
                         + ("probabilities, 0 to 1" if probabilities else "scores within float32"))
    if not probabilities and low >= 0 and abs(values.sum(axis=2) - 1).max() < 0.01:
        print(f"note: {path}: found numbers that add up to 1 at each pixel; if they are "
              "probabilities, --probabilities is missing", file=sys.stderr)
    return scores_from_probabilities(values) if probabilities else values


def check_size(path, found, size):
    """Raises ValueError unless scores or labels of size found, (H, W), are of the photograph's."""
    if found != size:
        raise ValueError(f"{path}: found height and width {found}, expected {size} as the "
                         "photograph's, turned as its orientation tag says")


def read_labels(path, unknown=None):
    """A label picture as (labels (H, W) uint8, number of labels L, paint).

    labels: 0..L-1, numbered by colour; VOID where the colour is `unknown`, (R, G, B).
    paint: turns labels (H, W) without VOID into a picture of the file's own mode and colours.
    """
    picture = ImageOps.exif_transpose(pictures.open_picture(path, "picture or .npy file"))
    if picture.mode not in MODES:
        raise ValueError(f"{path}: found a picture of mode {picture.mode}, expected labels in one "
                         f"of the modes {', '.join(MODES)}")
    codes = np.asarray(picture.convert("RGB"), np.int32) @ RGB_CODE                  # (H, W)
    colours, first, index = np.unique(codes, return_index=True, return_inverse=True)
    known = colours != (-1 if unknown is None else np.dot(unknown, RGB_CODE))
    L = int(known.sum())
    if not 1 <= L <= MAX_LABELS:
        raise ValueError(f"{path}: found {L} colours besides unknown, expected 1 to {MAX_LABELS}, "
                         "each a label (JPEG and smoothing add colours)")
    if L >= 100:
        print(f"note: {path}: found {L} labels; a soft mask, of shades of grey, is none of labels",
              file=sys.stderr)
    if unknown is not None and known.all():
        print(f"note: {path}: found no pixel in the unknown colour {unknown}", file=sys.stderr)
    number = np.where(known, np.cumsum(known) - 1, VOID).astype(np.uint8)    # of each colour
    values = np.asarray(picture)[np.unravel_index(first[known], codes.shape)]    # (L,), (L, 3 or 4)

    def paint(labels):
        painted = Image.fromarray(values[labels])
        if picture.mode == "P":
            painted.putpalette(picture.getpalette())
        return painted

    return number[index].reshape(codes.shape), L, paint


def read_scores(args, size):
    """(scores (H, W, L) float32, labels (H, W) before the CRF, paint) as args.scores gives them."""
    if args.scores.lower().endswith(".npy"):
        if args.confidence is not None or args.unknown is not None:
            raise ValueError(f"{args.scores}: found an array, expected a label picture for "
                             "--confidence and --unknown")
        scores = read_array(args.scores, size, args.probabilities)
        return scores, scores.argmax(axis=2), voc.paint
    if args.probabilities:
        raise ValueError(f"{args.scores}: found a picture, expected an .npy for --probabilities")
    labels, L, paint = read_labels(args.scores, args.unknown)
    check_size(args.scores, labels.shape, size)
    confidence = CONFIDENCE if args.confidence is None else args.confidence
    return scores_from_labels(labels, L, confidence), labels, paint


def build_crf(args, n_labels):
    """The CRF of the options, or of a checkpoint: its nine parameters fit any number of labels."""
    given = [name for name in ("w", "sigma_position", "sigma_bilateral") if getattr(args, name)]
    (spatial, tone), position = args.sigma_bilateral or (80, 13), args.sigma_position or 3
    crf = DenseCRF(n_labels, w=args.w or (3, 10), sigma_position=(position,) * 2,
                   sigma_bilateral=(spatial,) * 2 + (tone,) * 3, iterations=args.iterations)
    if args.parameters is not None:
        if given:
            raise ValueError(f"--parameters: found --{given[0].replace('_', '-')} as well, "
                             "expected one or the other")
        learned = (DenseCRF.load(args.parameters) if "options" in read_npz(args.parameters) else
                   checkpoints.load_crf(args.parameters, *checkpoints.read(args.parameters)))
        if not isinstance(learned, DenseCRF):
            raise ValueError(f"{args.parameters}: found a network without such a CRF, expected a "
                             "checkpoint of the joint or the piecewise stage, or DenseCRF.save's")
        if learned.params["w"].ndim == 3 and learned.n_labels != n_labels:
            raise ValueError(f"{args.parameters}: found compatibilities of {learned.n_labels} "
                             f"labels, expected {n_labels} as in the scores")
        learned.iterations, learned.n_labels = args.iterations, n_labels
        return learned
    return crf


def refine(args):
    """What the command line asks for; returns the exit code."""
    if not os.path.isdir(args.image):
        print(f"wrote {args.out}: {refine_one(args)}")
        return 0
    if not os.path.isdir(args.scores):
        raise ValueError(f"{args.scores}: found no folder, expected one, as {args.image} is")
    os.makedirs(args.out, exist_ok=True)
    photographs, done = pictures.find_photographs(args.image), 0
    for image in tqdm(photographs, "refine", unit="image", disable=None):
        stem = os.path.splitext(os.path.basename(image))[0]
        names = [os.path.join(args.scores, stem + ending) for ending in (".npy", ".png")]
        found = next(filter(os.path.isfile, names), names[0])
        one = argparse.Namespace(**{**vars(args), "image": image, "scores": found,
                                    "out": os.path.join(args.out, f"{stem}.png")})
        try:
            tqdm.write(f"wrote {one.out}: {refine_one(one)}")
            done += 1
        except (ValueError, OSError) as error:
            print(f"skipped: {error}", file=sys.stderr)
    return 0 if done == len(photographs) else 2


def refine_one(args):
    """Refine the scores of one photograph, and write the result; returns what there is to say."""
    inputs = map(os.path.realpath, (args.image, args.scores))
    ending = os.path.splitext(args.out)[1].lower()
    if ending not in (".png", ".npy") or os.path.realpath(args.out) in inputs:
        raise ValueError(f"{args.out}: found no place for the result, expected a name ending in "
                         ".png or .npy that is none of the inputs")
    image = pictures.read_photograph(args.image)
    scores, before, paint = read_scores(args, image.shape[:2])
    H, W, L = scores.shape
    device = args.device if args.device != "auto" else "gpu" if gpu_available() else "cpu"
    q = build_crf(args, L).forward(to_device(scores, device), to_device(image, device), train=False)
    labels = to_host(q.argmax(axis=2)).astype(np.uint8)
    if ending == ".png":
        pictures.save_png(args.out, paint(labels))
    else:
        with replacing(args.out, "wb") as file:
            np.save(file, to_host(q))
    if args.overlay:
        pictures.save_png(f"{args.out}.overlay.png", figures.overlay(image, labels))
    changed = np.mean((labels != before)[before != VOID])
    return f"{W}x{H} pixels, {L} labels, {100 * changed:.1f}% of labels changed"


def main(arguments=None):
    return run_program("python -m minicrf", refine, parse_arguments(arguments))
