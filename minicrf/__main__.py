"""python -m minicrf IMAGE SCORES OUT: refine any segmentation of a photograph with the dense CRF.

SCORES come from any network, as an array, or from any hand, as a picture of labels.
Legend: H x W pixels, L labels.
"""
import argparse
import contextlib
import os
import sys

import numpy as np
from PIL import Image, ImageColor

from . import checkpoints, pictures, voc
from .arrays import gpu_available, to_device, to_host
from .densecrf import DenseCRF, scores_from_labels, scores_from_probabilities
from .losses import VOID

CONFIDENCE = 0.7
MAX_LABELS = VOID                      # labels are 0..254
MODES = ("1", "L", "P", "RGB", "RGBA")
RGB_CODE = 1 << 16, 1 << 8, 1          # a colour as one number


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, where argparse would print the usage as well."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists all options)\n")


def parse_arguments(arguments=None):
    parser = Parser(
        prog="python -m minicrf", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Refine a segmentation of a photograph with a fully connected CRF.",
        epilog="examples:\n"
        "  python -m minicrf photo.jpg scores.npy refined.png\n"
        "  python -m minicrf photo.jpg softmax.npy refined.png --probabilities\n"
        "  python -m minicrf photo.jpg scribbles.png refined.png --unknown black\n"
        "  python -m minicrf photo.jpg scores.npy refined.png --parameters runs/joint.npz")
    parser.add_argument("image", metavar="IMAGE", help="the photograph")
    parser.add_argument("scores", metavar="SCORES",
                        help="an .npy array (H, W, L) of class scores, larger being likelier, or a "
                        "label picture (palette, grey or RGB), each colour in it a label")
    parser.add_argument("out", metavar="OUT",
                        help="the .png to write: a label picture in the colours of SCORES or, for "
                        "an array, label numbers in VOC's palette")
    add = parser.add_argument_group("what SCORES means").add_argument
    add("--probabilities", action="store_true", help="the array holds probabilities, not scores")
    add("--confidence", type=float, metavar="P",
        help=f"probability that a label of the picture is right (default: {CONFIDENCE})")
    add("--unknown", metavar="COLOUR", type=colour,
        help="colour of the pixels whose label is to be found: a name, R,G,B or RRGGBB")
    add = parser.add_argument_group("the CRF").add_argument
    add("--w", type=float, nargs=2, metavar=("POSITION", "BILATERAL"),
        help="weights of the two kernels (default: 3 10)")
    add("--sigma-position", type=float, metavar="PIXELS", help="(default: 3)")
    add("--sigma-bilateral", type=float, nargs=2, metavar=("PIXELS", "COLOUR"),
        help="(default: 80 13)")
    add("--parameters", metavar="FILE",
        help="learned weights and sigmas instead: a checkpoint of run_voc.py, such as joint.npz")
    add("--iterations", type=steps, metavar="T", default=5, help="mean-field steps (default: 5)")
    add("--device", choices=("auto", "cpu", "gpu"), default="auto",
        help="(default: a GPU where there is one)")
    return parser.parse_args(arguments)


def steps(text):
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number, 0 or more")
    return int(text)


def colour(text):
    """(R, G, B) from a name such as black, from R,G,B or from RRGGBB."""
    for form in (text, f"#{text}", f"rgb({text})"):
        with contextlib.suppress(ValueError):
            return ImageColor.getrgb(form)[:3]
    raise argparse.ArgumentTypeError(f"found {text!r}, expected a name, R,G,B or RRGGBB")


def is_array(path):
    """Whether a file begins as .npy files do; False where it cannot be read."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read(6) == b"\x93NUMPY"
    return False


def read_array(path, probabilities=False):
    """The scores (H, W, L) float32 in an .npy file of scores or probabilities."""
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:      # NumPy raises half a dozen kinds for broken files
        raise ValueError(f"{path}: not a readable .npy file ({one_line(error, path)})") from None
    if values.ndim != 3 or values.dtype.kind not in "fiu" or not 1 <= values.shape[2] <= MAX_LABELS:
        raise ValueError(f"{path}: found shape {values.shape} of {values.dtype}, expected "
                         f"(H, W, L) of real numbers, L at most {MAX_LABELS}")
    values = np.array(values, np.float32)
    if not probabilities:
        return values
    if not (values.min() >= 0 and values.max() <= 1.001):                # NaN is neither
        raise ValueError(f"{path}: found values from {values.min():g} to {values.max():g}, "
                         "expected probabilities, 0 to 1")
    return scores_from_probabilities(values)


def read_labels(path, unknown=None):
    """A label picture as (labels (H, W) uint8, number of labels L, paint).

    labels: 0..L-1, numbered by colour; VOID where the colour is `unknown`, (R, G, B).
    paint: turns labels (H, W) without VOID into a picture of the file's own mode and colours.
    """
    try:
        picture = Image.open(path, formats=pictures.FORMATS)
        if picture.width * picture.height > pictures.MAX_PIXELS:
            raise ValueError(f"found {picture.width}x{picture.height} pixels, "
                             f"expected at most {pictures.MAX_PIXELS}")
        rgb = np.asarray(picture.convert("RGB"), np.int32)               # (H, W, 3)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: found no such file, expected scores or labels") from None
    except Exception as error:      # Pillow raises half a dozen kinds for broken files
        raise ValueError(f"{path}: neither an .npy file nor a readable picture "
                         f"({one_line(error, path)})") from None
    if picture.mode not in MODES:
        raise ValueError(f"{path}: found a picture of mode {picture.mode}, expected labels in one "
                         f"of the modes {', '.join(MODES)}")
    codes, first, labels = np.unique(rgb @ RGB_CODE, return_index=True, return_inverse=True)
    known = np.ones_like(codes, bool) if unknown is None else codes != np.dot(unknown, RGB_CODE)
    if not 1 <= known.sum() <= MAX_LABELS:
        raise ValueError(f"{path}: found {known.sum()} colours besides unknown, expected 1 to "
                         f"{MAX_LABELS}, each a label (JPEG and smoothing add colours)")
    if unknown is not None and known.all():
        print(f"note: {path}: found no pixel in the unknown colour {unknown}", file=sys.stderr)
    number = np.where(known, np.cumsum(known) - 1, VOID).astype(np.uint8)    # of each colour
    values = np.asarray(picture)
    values = values.reshape(labels.size, *values.shape[2:])[first[known]]    # (L,) or (L, channels)

    def paint(labels):
        painted = Image.fromarray(values[labels])
        if picture.mode == "P":
            painted.putpalette(picture.getpalette())
        return painted

    return number[labels].reshape(rgb.shape[:2]), len(values), paint


def one_line(error, path):
    return " ".join(str(error).replace(str(path), "this file").split()) or type(error).__name__


def paint_voc(labels):
    """Labels (H, W) as a picture in VOC's palette."""
    painted = Image.fromarray(labels.astype(np.uint8))
    painted.putpalette(voc.palette(256).tobytes())
    return painted


def read_scores(args):
    """(scores (H, W, L) float32, labels (H, W) before the CRF, paint) as args.scores gives them."""
    if is_array(args.scores):
        if args.confidence is not None or args.unknown is not None:
            raise ValueError(f"{args.scores}: found an array, expected a label picture for "
                             "--confidence and --unknown")
        scores = read_array(args.scores, args.probabilities)
        return scores, scores.argmax(axis=2), paint_voc
    labels, n_labels, paint = read_labels(args.scores, args.unknown)
    if args.probabilities:
        raise ValueError(f"{args.scores}: found a picture, expected an .npy for --probabilities")
    confidence = CONFIDENCE if args.confidence is None else args.confidence
    return scores_from_labels(labels, n_labels, confidence), labels, paint


def build_crf(args, n_labels):
    """The CRF of the options, or of a checkpoint: its nine parameters fit any number of labels."""
    given = {name: getattr(args, name) for name in ("w", "sigma_position", "sigma_bilateral")
             if getattr(args, name) is not None}
    if args.parameters:
        if given:
            found = next(iter(given)).replace("_", "-")
            raise ValueError(f"--parameters: found --{found} as well, expected one or the other")
        crf = checkpoints.load_crf(args.parameters, *checkpoints.read(args.parameters))
        if crf is None:
            raise ValueError(f"{args.parameters}: found a network without CRF, expected a "
                             "checkpoint of the joint or the piecewise stage")
        crf.n_labels, crf.iterations = n_labels, args.iterations
        return crf
    if "sigma_position" in given:
        given["sigma_position"] = (args.sigma_position,) * 2
    if "sigma_bilateral" in given:
        spatial, tone = args.sigma_bilateral
        given["sigma_bilateral"] = (spatial,) * 2 + (tone,) * 3
    return DenseCRF(n_labels, iterations=args.iterations, **given)


def check_out(args):
    """Refuse, before the work is done, an OUT that cannot be written or is one of the inputs."""
    folder = os.path.dirname(os.path.abspath(args.out))
    if (not args.out.lower().endswith(".png") or os.path.isdir(args.out)
            or not os.path.isdir(folder)):
        raise ValueError(f"{args.out}: found no place for a picture, expected a name ending in "
                         ".png, in a folder that exists")
    if os.path.realpath(args.out) in map(os.path.realpath, (args.image, args.scores)):
        raise ValueError(f"{args.out}: found an input, expected another file for the result")


def save(picture, path):
    """Write a picture beside and rename it: an interrupted write leaves what was there."""
    try:
        picture.save(f"{path}.tmp", format="PNG")
        os.replace(f"{path}.tmp", path)
    except OSError as error:
        raise OSError(f"{path}: could not be written ({error.strerror})") from None


def main(arguments=None):
    args = parse_arguments(arguments)
    check_out(args)
    image = pictures.read_photograph(args.image)
    scores, before, paint = read_scores(args)
    (H, W, L), size = scores.shape, image.shape[:2]
    if (H, W) != size:
        raise ValueError(f"{args.scores}: found shape ({H}, {W}, {L}), expected ({size[0]}, "
                         f"{size[1]}, L) as {args.image}, turned as its orientation tag says")
    device = args.device if args.device != "auto" else "gpu" if gpu_available() else "cpu"
    q = build_crf(args, L).forward(to_device(scores, device), to_device(image, device), train=False)
    labels = to_host(q.argmax(axis=2))
    save(paint(labels), args.out)
    changed = np.mean((labels != before)[before != VOID])
    print(f"wrote {args.out}: {W}x{H} pixels, {L} labels, {100 * changed:.1f}% of labels changed")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, MemoryError) as error:
        print(f"python -m minicrf: {error or 'not enough memory'}", file=sys.stderr)
        sys.exit(2)
