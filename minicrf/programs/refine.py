"""python -m minicrf IMAGE SCORES OUT: refine any segmentation of a photograph with the dense CRF.

SCORES come from any network, as an array, or are drawn by hand, as a picture of labels.
Legend: H x W pixels, L labels.
"""
import argparse
import contextlib
import os
import sys
import warnings

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
from .gpu import gpu_available, gpu_failure
from .program import WEIGHT, WIDTH, Parser, number, run_program

CONFIDENCE = 0.7
MAX_LABELS = VOID                      # labels are 0..254
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
        "likelier; or a label picture: each value of a palette or grey picture (but not a "
        "palette's 255, VOC's void) and each colour of an RGB one is a label; or a folder of "
        "these, with the photographs' names")
    add("out", metavar="OUT", help="the .png to write: a label picture in the colours of SCORES "
        "or, for an array, label numbers in VOC's palette; or an .npy, for the marginals (H, W, L) "
        "in float32; or a folder, for a .png of each photograph")
    add("--overlay", action="store_true", help="also write OUT.overlay.png, to look at")
    add = parser.add_argument_group("what SCORES means").add_argument
    add("--probabilities", action="store_true", help="SCORES holds probabilities; one channel or "
        "a grey picture is that of the second of two labels, as a sigmoid gives it")
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


def note(path, text):
    print(f"note: {path}: {text}", file=sys.stderr)


def check_size(path, found, size):
    """Raises ValueError unless scores or labels of size found, (H, W), are of the photograph's."""
    if found != size:
        raise ValueError(f"{path}: found height and width {found}, expected {size} as the "
                         "photograph's, turned as its orientation tag says")


def open_array(path, size):
    """The array (H, W, L) in an .npy file, read when it is used; (H, W) has one channel."""
    try:
        values = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:      # NumPy raises half a dozen kinds for broken files
        raise ValueError(f"{path}: not a readable .npy file ({reason(error)})") from None
    values = values[:, :, None] if values.ndim == 2 else values
    if values.shape[1:] == size:
        raise ValueError(f"{path}: found the labels in front, (L, H, W), as PyTorch has them; "
                         "np.moveaxis(x, 0, -1) puts them last")
    if values.ndim != 3 or values.dtype.kind not in "fiu" or not 1 <= values.shape[2] <= MAX_LABELS:
        raise ValueError(f"{path}: found shape {values.shape} of {values.dtype}, expected "
                         f"(H, W, L) of real numbers, L at most {MAX_LABELS}")
    return values


def open_mask(path):
    """A grey picture as (H, W, 1), 0 to 1."""
    picture = ImageOps.exif_transpose(pictures.open_picture(path, "picture or .npy file"))
    if picture.mode not in ("1", "L"):
        raise ValueError(f"{path}: found a picture of mode {picture.mode}; probabilities are an "
                         ".npy file or a grey picture of 8 bits")
    return np.asarray(picture.convert("L"), np.float32)[:, :, None] / 255


def scores_of(path, values, size, probabilities):
    """The scores (H, W, L) float32 that an array of scores or probabilities stands for."""
    (H, W), (h, w, L) = size, values.shape
    if L == 1 and not probabilities:
        raise ValueError(f"{path}: found one channel; with --probabilities it is that of the "
                         "second of two labels, and scores z are np.dstack([0 * z, z])")
    if not (h < H and w < W):
        check_size(path, (h, w), size)               # before so much is read
    with np.errstate(over="ignore"):                 # found below
        values = np.array(values, np.float32)
    low, high = values.min(), values.max()
    if not (0 <= low <= high <= 1.001 if probabilities else high < np.inf):   # NaN is neither
        raise ValueError(f"{path}: found values from {low:g} to {high:g}, expected "
                         + ("probabilities, 0 to 1" if probabilities else "scores within float32"))
    for p, what in ((values, "probabilities; if so, --probabilities is missing"),
                    (np.exp(-values), "energies, -log p; if so, scores are their negative")):
        if not probabilities and low >= 0 and abs(p.sum(axis=2) - 1).max() < 0.01:
            note(path, f"these look like {what}")
    if L == 1:
        values = np.concatenate([1 - values.clip(0, 1), values], axis=2)
    if (h, w) != size:
        note(path, f"{w}x{h} scores are interpolated to the photograph's {W}x{H} pixels")
        channels = [Image.fromarray(channel) for channel in np.moveaxis(values, 2, 0)]
        values = np.dstack([np.asarray(channel.resize((W, H), Image.Resampling.BILINEAR))
                            for channel in channels])
    if not probabilities:
        return values
    with warnings.catch_warnings(record=True) as caught:
        scores = scores_from_probabilities(values)
    for each in caught:
        note(path, each.message)
    return scores


def read_labels(path, unknown=None):
    """A label picture as (labels (H, W) uint8, the L labels' names, paint).

    labels: 0..L-1, in the order of the picture's values, or of its colours if it is RGB; VOID where
    the colour is `unknown`, (R, G, B), or the value VOC's void.
    paint: turns labels (H, W) without VOID into a picture of the file's own mode and colours.
    """
    picture = ImageOps.exif_transpose(pictures.open_picture(path, "picture or .npy file"))
    if picture.mode not in ("1", "L", "P", "RGB", "RGBA"):
        raise ValueError(f"{path}: found a picture of mode {picture.mode}, expected labels as a "
                         "palette, grey (8 bits) or RGB picture")
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


def read_scores(args, size):
    """(scores (H, W, L) float32, labels (H, W) before the CRF, names if any, paint)."""
    path, is_array = args.scores, args.scores.lower().endswith(".npy")
    if is_array or args.probabilities:
        if args.confidence is not None or args.unknown is not None:
            raise ValueError(f"{path}: --confidence and --unknown are for label pictures, not for "
                             "arrays or probabilities")
        values = open_array(path, size) if is_array else open_mask(path)
        scores = scores_of(path, values, size, args.probabilities)
        paint = voc.paint if is_array else lambda labels: Image.fromarray(labels * np.uint8(255))
        return scores, scores.argmax(axis=2), [], paint
    labels, names, paint = read_labels(path, args.unknown)
    check_size(path, labels.shape, size)
    confidence = CONFIDENCE if args.confidence is None else args.confidence
    return scores_from_labels(labels, len(names), confidence), labels, names, paint


def build_crf(args, n_labels):
    """The CRF of the options, or of a checkpoint: its nine parameters fit any number of labels."""
    if args.parameters is None:
        return DenseCRF(n_labels, w=args.w or (3, 10), sigma_position=args.sigma_position or 3,
                        sigma_bilateral=args.sigma_bilateral or (80, 13),
                        iterations=args.iterations)
    if args.w or args.sigma_position or args.sigma_bilateral:
        raise ValueError("--parameters: found --w or a --sigma as well, expected one or the other")
    learned = (DenseCRF.load(args.parameters) if "options" in read_npz(args.parameters) else
               checkpoints.load_crf(*checkpoints.read(args.parameters)))
    if not isinstance(learned, DenseCRF):
        raise ValueError(f"{args.parameters}: found a network without such a CRF, expected a "
                         "checkpoint of the joint or the piecewise stage, or DenseCRF.save's")
    if learned.params["w"].ndim == 3 and learned.n_labels != n_labels:
        raise ValueError(f"{args.parameters}: found compatibilities of {learned.n_labels} "
                         f"labels, expected {n_labels} as in the scores")
    learned.iterations, learned.n_labels = args.iterations, n_labels
    return learned


def refine(args):
    """What the command line asks for; returns the exit code."""
    if args.device == "auto":
        args.device = "gpu" if gpu_available() else "cpu"
        if gpu_failure():
            print(f"--device auto: on the cpu, as {gpu_failure()}")
    if not os.path.isdir(args.image):
        print(f"wrote {args.out}: {refine_one(args)}")
        return 0
    if not os.path.isdir(args.scores):
        raise ValueError(f"{args.scores}: not a folder, though {args.image} is one")
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
        raise ValueError(f"{args.out}: the result needs a name that ends in .png or .npy and is "
                         "none of the inputs")
    image = pictures.read_photograph(args.image)
    scores, before, names, paint = read_scores(args, image.shape[:2])
    H, W, L = scores.shape
    scores, pixels = (to_device(x, args.device) for x in (scores, image))
    q = build_crf(args, L).forward(scores, pixels, train=False)
    labels = to_host(q.argmax(axis=2)).astype(np.uint8)
    if ending == ".png":
        pictures.save_png(args.out, paint(labels))
    else:
        with replacing(args.out, "wb") as file:
            np.save(file, to_host(q))
    if args.overlay:
        pictures.save_png(f"{args.out}.overlay.png", figures.overlay(image, labels))
    changed = np.mean((labels != before)[before != VOID])
    said = f"{W}x{H} pixels, {L} labels, {100 * changed:.1f}% of labels changed"
    channels = [f"{i} = {name}" for i, name in enumerate(names) if ending == ".npy"]
    return "; channel ".join([said, *channels])


def main(arguments=None):
    return run_program("python -m minicrf", refine, parse_arguments(arguments))
