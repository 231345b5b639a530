"""The experiment of the paper (Sec. 4): train a network, then the network together with its CRF.

    python run_voc.py                                    a drawn toy set, three minutes on a laptop
    python run_voc.py --voc PATH/TO/VOC2012 --weights FILE --net largefov
"""
import argparse
import os
import sys
import zlib

import numpy as np
from tqdm import tqdm

from minicrf import DenseCRF, training, vgg
from minicrf.__main__ import Parser
from minicrf.arrays import gpu_available, peak_memory, use_tf32
from minicrf.data import loading, pictures, toy, voc, weights
from minicrf.results import checkpoints, evaluation, figures, fitting, logs, metrics, reports

# Paper silent on iterations: as many as a laptop bears on the toy set, as DeepLab's on VOC.  What a
# pixel hears from all others makes its marginals steeper in the scores: joint training bears a
# fraction of the unary rate, and starts at weights under those that are best with nothing learned.
TOY = dict(net="tiny", iterations={"unary": 500, "piecewise": 40, "joint": 40}, batch_size=16,
           rate={"unary": 2.0, "piecewise": 0.05, "joint": 0.05},
           evaluate_every={"unary": 50, "piecewise": 10, "joint": 10})
VOC = dict(net="vgg16", iterations={"unary": 6000, "piecewise": 500, "joint": 2000}, batch_size=20,
           rate={"unary": 1.0, "piecewise": 0.1, "joint": 0.1},
           evaluate_every={"unary": 200, "piecewise": 50, "joint": 200})


def number(expected, accept, kind=float):
    """An argparse type for finite numbers that accept(number) takes; expected: them in words."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not (value < float("inf") and accept(value)):
            raise argparse.ArgumentTypeError(f"found {text!r}, expected {expected}")
        return value
    return parse


COUNT = number("a whole number above 0", lambda x: x > 0, int)
FROM_0 = number("a number, 0 or more", lambda x: x >= 0)
WEIGHT = number("a number from 0 to 1e6", lambda x: 0 <= x <= 1e6)
WIDTH = number("a number from 0.001 to 1e6", lambda x: 0.001 <= x <= 1e6)
SHARE = number("a number from 0 to 1", lambda x: 0 <= x <= 1)
SEED = number("a whole number, 0 or more", lambda x: x >= 0, int)


def default(name):
    """What help says of an option that differs between the toy set and VOC."""
    def words(value):
        return (", ".join(f"{x:g} {stage}" for stage, x in value.items())
                if isinstance(value, dict) else str(value))

    return f"(default: {words(VOC[name])}; toy set: {words(TOY[name])})"


def build_parser():
    parser = Parser(
        prog="run_voc.py", usage="python run_voc.py [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train a network through a dense CRF. Without options: on a small drawn set.",
        epilog="examples:\n"
        "  python run_voc.py\n"
        "  python run_voc.py --voc VOCdevkit/VOC2012 --weights imagenet-vgg-verydeep-16.mat\n"
        "  python run_voc.py --voc VOCdevkit/VOC2012 --resume\n"
        "  python run_voc.py --voc VOCdevkit/VOC2012 --stage eval --train-list\n"
        "  python run_voc.py --stage predict --image photo.jpg")
    add = parser.add_argument_group("what to train on").add_argument
    add("--voc", metavar="DIR", help="the folder that holds JPEGImages (.../VOCdevkit/VOC2012); "
        "without it a toy set is drawn and used")
    add("--sbd", metavar="DIR", help="more training images: SBD's dataset folder (.mat files) or "
        "SegmentationClassAug (.png files)")
    add("--check", action="store_true", help="list every problem of the data set, and do no more")

    add = parser.add_argument_group("what to do").add_argument
    add("--stage", choices=(*training.STAGES, "eval", "predict"), help="unary: train the network "
        "alone; joint: network and CRF, from the unary checkpoint; piecewise: the CRF alone; eval: "
        "one table of what was trained; predict: label photographs (default: unary, then joint)")
    add("--weights", metavar="FILE", help="unary: ImageNet weights (.npz, .mat, .safetensors) or "
        "a checkpoint to train further (default: none); piecewise, joint: the checkpoint to start "
        "from (default: OUT/unary.npz); eval: the one to measure (default: all in OUT); predict: "
        "the one to use (default: the last stage in OUT)")
    add("--net", choices=vgg.PRESETS, help="vgg16: the paper's; largefov: takes less memory; "
        f"tiny: of the toy set {default('net')}")
    add("--image", metavar="PATH", help="predict: a photograph, or a folder of them")
    add("--out", metavar="DIR", default="runs", help="where everything is written (default: runs)")
    add("--resume", action="store_true", help="go on where OUT/STAGE.npz stopped")
    add("--device", choices=("auto", "cpu", "gpu"), default="auto",
        help="(default: a GPU where there is one)")
    add("--tf32", action="store_true", help="round the factors of matrix products to 10 bits, on a "
        "GPU that is faster so")

    add = parser.add_argument_group("how to train").add_argument
    add("--iterations", type=COUNT, metavar="N",
        help=f"updates in each stage that runs {default('iterations')}")
    add("--batch-size", type=COUNT, metavar="N",
        help=f"images in an update {default('batch_size')}")
    add("--micro-batch", type=COUNT, metavar="N",
        help="images that go through the network together (default: all); less takes less memory")
    add("--rate", type=FROM_0, metavar="X",
        help=f"multiplies every learning rate {default('rate')}")
    add("--drop", type=SHARE, metavar="X", default=0.75, help="share of the iterations after which "
        "learning rates fall to a tenth (default: 0.75; 1: never)")
    add("--evaluate-every", type=COUNT, metavar="N",
        help=f"iterations between evaluations {default('evaluate_every')}")
    add("--evaluate-images", type=COUNT, metavar="K",
        help="validation images for the curve, the first K (default: all); results are on all")
    add("--seed", type=SEED, default=0, metavar="N",
        help="of weights, order, dropout and the toy set (default: 0)")

    add = parser.add_argument_group("where the CRF starts").add_argument
    add("--w", type=WEIGHT, nargs=2, default=(1, 4), metavar=("POSITION", "BILATERAL"),
        help="kernel weights (default: 1 4, under those that are best with nothing learned)")
    add("--sigma-position", type=WIDTH, default=3, metavar="PIXELS",
        help="width of the kernel of position (default: 3)")
    add("--sigma-bilateral", type=WIDTH, nargs=2, default=(80, 13), metavar=("PIXELS", "COLOUR"),
        help="widths of the kernel of position and colour (default: 80 13)")

    add = parser.add_argument_group("what to measure").add_argument
    add("--also", metavar="DIR", nargs="+", default=[],
        help="more --out folders to compare with in the table, such as a control's")
    add("--train-list", action="store_true", help="evaluate on the training list as well")
    add("--save-predictions", action="store_true",
        help="eval: palette PNGs of the validation list, as VOC's server takes them")
    add("--band", type=COUNT, metavar="PIXELS", default=5,
        help="also IoU this near to class boundaries (default: 5)")
    return parser


def parse_arguments(arguments=None):
    """The options, with the defaults of the toy set or of VOC filled in."""
    args = build_parser().parse_args(arguments)
    defaults = VOC if args.voc else TOY
    args.net = args.net or defaults["net"]
    args.batch_size = args.batch_size or defaults["batch_size"]
    for name in ("iterations", "rate", "evaluate_every"):  # by stage; one given is for all
        given = getattr(args, name)
        setattr(args, name, {stage: value if given is None else given
                             for stage, value in defaults[name].items()})
    return args


def stages(args):
    """The stages to train, in order; none for eval and predict."""
    return [stage for stage in ([args.stage] if args.stage else ["unary", "joint"])
            if stage in training.STAGES]


def check_options(args):
    """Refuse what makes no sense together, before anything is done or written."""
    if args.device == "gpu" and not gpu_available():
        raise ValueError("--device: found gpu, but cupy finds no CUDA device; expected cpu or auto")
    if args.stage == "predict" and not args.image:
        raise ValueError("--image: found nothing, expected a photograph or a folder of them")
    for option, other, wrong in (("--image", "--stage predict", args.stage != "predict"),
                                 ("--save-predictions", "--stage eval", args.stage != "eval"),
                                 ("--sbd", "--voc", not args.voc)):
        if wrong and getattr(args, option[2:].replace("-", "_")):
            raise ValueError(f"{option}: found it without {other}, expected both or none")
    for folder in args.also:
        if not reports.read_results(folder):
            raise FileNotFoundError(f"--also: found no results.json in {folder}, expected the "
                                    "--out folder of another run")
    try:
        os.makedirs(args.out, exist_ok=True)
        if not os.access(args.out, os.W_OK):
            raise PermissionError(0, "no permission")
    except OSError as error:
        raise OSError(f"--out: found {args.out} ({error.strerror}), expected a folder to write "
                      "into") from None
    logs.read_log(os.path.join(args.out, "log.csv"))         # what is wrong there is said now
    reports.read_results(args.out)
    needs_one = args.stage == "predict" or args.stage == "eval" and not args.check
    if needs_one and not (args.weights or checkpoints_in(args.out)):
        raise FileNotFoundError(f"{args.out}: found no checkpoint, expected unary.npz, "
                                "piecewise.npz or joint.npz, or one named with --weights")
    written = [os.path.realpath(os.path.join(args.out, f"{stage}{kind}.npz"))
               for stage in stages(args) for kind in ("", "_best", "_previous")]
    if args.weights and not args.resume and os.path.realpath(args.weights) in written:
        raise ValueError(f"--weights: found {args.weights}, which this run would overwrite; "
                         "expected another --out, or --resume to go on")


class Data:
    """A VOC folder: class names, image lists, and the images with their labels."""

    def __init__(self, root, sbd):
        self.root, self.sbd = root, sbd
        self.classes = voc.class_names(root)
        self.train = voc.image_list(root, "train", sbd)
        self.val = voc.image_list(root, "val")
        for problem in voc.in_both_lists(root, self.train, self.val):
            raise ValueError(problem)

    def samples(self, ids, note):
        """(image, labels) of each; note: what they are for, shown with a bar on a terminal."""
        return tqdm(loading.ahead(self.load, zip(ids)), note, len(ids), unit="image", leave=False,
                    disable=None)

    def load(self, image_id):
        # VOC's own labels where an image is of its validation list: SBD's have no void
        sbd = None if image_id in self.val else self.sbd
        return voc.load(self.root, image_id, sbd, len(self.classes))


def unary_model(args, data, device):
    """(model, fresh layers) for the unary stage: from ImageNet, a checkpoint, or as drawn."""
    net = vgg.build(args.net, len(data.classes), seed=args.seed)
    every = [name for name in net.layers if f"{name}_w" in net.params]
    mean, scale, fresh = weights.MEAN, training.PIXEL_SCALE, every
    if args.weights:
        values = weights.read_weights(args.weights)
        fresh = weights.fill(net, values, args.weights)
        mean, scale = values["mean"], values["scale"]
    loaded = [name for name in every if name not in fresh]
    source = f"{', '.join(loaded)} loaded from {args.weights}" if loaded else "no weights given"
    drawn = (", ".join(fresh) or "none") if loaded else "all layers"
    print(f"--net {args.net}: {source}; freshly initialised: {drawn}")
    vgg.move(net, device)
    model = training.Model(net, mean, device=device, scale=scale)
    first = [model.resized(data.load(image_id)[0]) for image_id in data.train[:4]]
    vgg.scale_fresh(net, fresh, model.inputs(first))
    return model, fresh


def start_crf(args, n_classes):
    """The CRF as it is before it has learned anything: the options of its group."""
    spatial, colour = args.sigma_bilateral
    return DenseCRF(n_classes, w=args.w, sigma_position=(args.sigma_position,) * 2,
                    sigma_bilateral=(spatial,) * 2 + (colour,) * 3)


def start_model(args, data, stage, device):
    """(model, fresh layers, fingerprint of what it starts from) for a stage from its beginning."""
    if stage == "unary":
        return *unary_model(args, data, device), None
    start = args.weights or os.path.join(args.out, "unary.npz")
    if not os.path.exists(start):
        raise FileNotFoundError(f"{start}: found no such file, expected a checkpoint of the unary "
                                "stage; run --stage unary first, or name one with --weights")
    model, arrays, _ = checkpoints.load_model(start, data.classes, device)
    model.crf = start_crf(args, len(data.classes))
    return model, [], fingerprint(arrays)


def fingerprint(arrays):
    """A number that tells one trained network from another: a checksum of its top layer."""
    return zlib.crc32(np.ascontiguousarray(arrays["fc8_w"]).tobytes())


def resumed_model(args, data, stage, settings, device):
    """(model, arrays, info) of OUT/STAGE.npz, once it is certain that it fits this run."""
    path = os.path.join(args.out, f"{stage}.npz")
    model, arrays, info = checkpoints.load_model(path, data.classes, device)
    if not (isinstance(info.get("settings"), dict) and type(info.get("best", 0.0)) is float
            and isinstance(info.get("fresh"), list) and {*info["fresh"]} <= {*model.net.layers}):
        raise ValueError(f"{path}: found no settings of a run, expected what a training run left")
    found = {"stage": info["stage"], **info["settings"]}
    for name, value in {"stage": stage, **settings}.items():
        if name in found and found[name] != value:
            raise ValueError(f"{path}: found a run with {name} {found[name]}, expected "
                             f"{value}: --resume goes on with the same settings")
    start = args.weights or os.path.join(args.out, "unary.npz")
    if (info.get("start") and os.path.exists(start)
            and info["start"] != fingerprint(checkpoints.read(start)[0])):
        raise ValueError(f"{path}: found a run that started from another checkpoint than {start}; "
                         f"expected the same, or --stage {stage} without --resume to start anew")
    return model, arrays, info


def run_stage(args, data, stage, device):
    """Train one stage to its end; returns the model, or None when interrupted."""
    path = os.path.join(args.out, f"{stage}.npz")
    settings = {"seed": args.seed, "batch_size": args.batch_size, "micro_batch": args.micro_batch,
                "rate": args.rate[stage], "drop": args.drop,
                "evaluate_images": args.evaluate_images,
                "training list (its checksum)": zlib.crc32(" ".join(data.train).encode())}
    settings |= ({"net": args.net} if stage == "unary" else
                 {name: np.ravel(getattr(args, name)).tolist()
                  for name in ("w", "sigma_position", "sigma_bilateral")})
    if args.resume and os.path.exists(path):
        model, arrays, info = resumed_model(args, data, stage, settings, device)
    else:
        model, fresh, origin = start_model(args, data, stage, device)
        if os.path.exists(path):
            print(f"{path}: found that of an earlier run; it will be kept as {stage}_previous.npz")
        info = {"stage": stage, "classes": data.classes, "seed": args.seed, "fresh": fresh,
                "settings": settings, "start": origin, "arguments": vars(args), "iteration": 0}
    start = info["iteration"]
    optimiser = training.optimizer(model, stage, info["fresh"], rate=args.rate[stage])
    if start:
        checkpoints.load_velocity(path, arrays, optimiser)
        print(f"{stage}: going on after iteration {start} of {args.iterations[stage]}")

    batches = loading.batches(data.root, data.train, args.batch_size, args.seed,
                              model.resized, start * args.batch_size, data.sbd,
                              len(data.classes))
    shown = data.val[:args.evaluate_images]

    def validate():
        counts = evaluation.evaluate(model, data.samples(shown, "evaluation"), len(data.classes),
                                   band=0)
        return {method: metrics.mean_iou(each.sum(axis=0)) for method, each in counts.items()}

    done = fitting.fit(model, stage, optimiser, batches, validate, args.out, info, start=start,
                        iterations=args.iterations[stage], images=f"{len(shown)}/{len(data.val)}",
                        batch_size=args.batch_size, micro_batch=args.micro_batch, drop=args.drop,
                        evaluate_every=args.evaluate_every[stage])
    if not done:
        print(f"{stage}: stopped after iteration {info['iteration']} and saved to {path}; "
              "--resume goes on")
    return model if done else None


def evaluate_stage(args, data, stage, model):
    """Final figures of one stage into results.json; returns the truth's pixels, (images, L)."""
    def measure(ids, name):
        counts = evaluation.evaluate(model, data.samples(ids, f"{stage} on the {name} list"),
                                   len(data.classes), args.band)
        return counts, reports.summary(counts, stage, data.classes, args.band)

    counts, entry = measure(data.val, "validation")
    if args.train_list:
        entry["train"] = measure(data.train, "training")[1]
    if stage != "unary":
        print(f"{stage}: the CRF's parameters")
        print("  w:", ", ".join(f"{x:.3f}" for x in model.crf.params["w"]))
        for kernel in ("position", "bilateral"):
            sigmas = np.exp(model.crf.params[f"log_sigma_{kernel}"])
            print(f"  sigma_{kernel}:", ", ".join(f"{x:.2f}" for x in sigmas))
    reports.record(args.out, stage, entry, counts, data.val)
    return counts["unary"].sum(axis=-1)


def checkpoints_in(out):
    """The checkpoints in a folder by stage, in the order of training."""
    paths = {stage: os.path.join(out, f"{stage}.npz") for stage in training.STAGES}
    return {stage: path for stage, path in paths.items() if os.path.exists(path)}


def evaluate_checkpoints(args, data, device):
    """Stage eval: measure --weights, or every checkpoint in OUT; returns (paths by stage, truth).

    After unary training also with a CRF that has learned nothing.
    """
    there = checkpoints_in(args.out)
    for path in [args.weights] if args.weights else list(there.values()):
        model, _, info = checkpoints.load_model(path, data.classes, device)
        stage = info["stage"]
        if not args.weights and path != there.get(stage):
            raise ValueError(f"{path}: found a checkpoint of stage {stage}, expected "
                             f"{os.path.basename(path)[:-4]}")
        if stage in there and not os.path.samefile(path, there[stage]):
            raise ValueError(f"--out: found {there[stage]}, whose results those of {path} would "
                             "replace; expected another folder")
        there[stage] = path
        if model.crf is None:
            model.crf = start_crf(args, len(data.classes))
        truth = evaluate_stage(args, data, stage, model)
        if args.save_predictions:
            folder = os.path.join(args.out, "predictions", stage)
            os.makedirs(folder, exist_ok=True)
            for image_id, (image, _) in zip(data.val, data.samples(data.val, "label pictures")):
                labels = model.predict(image)[stage != "unary"]
                voc.save_labels(os.path.join(folder, f"{image_id}.png"), labels)
            print(f"wrote {len(data.val)} label pictures to {folder}")
    return there, truth


def report(args, data, paths, truth, device):
    """Table 1, printed and in table.txt, curves.png and panels/."""
    print(reports.table(args.out, args.also, data, truth), end="")
    names = [*map(os.path.basename, checkpoints_in(args.out).values()), "results.json", "table.txt"]
    log = logs.read_log(os.path.join(args.out, "log.csv"))
    if log:
        names += ["log.csv", "curves.png"]
        figures.curves(os.path.join(args.out, "curves.png"), log)
    names += reports.panels(args.out, paths, data, truth, device)
    print(f"in {args.out}: {', '.join(names)}")


def predict(args, device):
    """Stage predict: label PNG, overlay PNG and class summary for photographs of any size."""
    checkpoint = args.weights or [*checkpoints_in(args.out).values()][-1]
    photographs = pictures.find_photographs(args.image)
    model, _, info = checkpoints.load_model(checkpoint, device=device)
    folder = os.path.join(args.out, "predictions")
    os.makedirs(folder, exist_ok=True)
    skipped = 0
    for path in photographs:
        try:
            image = pictures.read_photograph(path)
            small = pictures.shrink(image)   # a CRF variable a pixel: at most a million of them
            labels = [found for found in model.predict(small) if found is not None][-1]
            labels = pictures.enlarge(labels, image.shape[:2])
            name = os.path.join(folder, os.path.basename(path))
            voc.save_labels(f"{name}.labels.png", labels)
            pictures.save_png(f"{name}.overlay.png", figures.overlay(image, labels))
        except (ValueError, OSError, MemoryError) as error:
            if not os.path.isdir(args.image):
                raise
            print(f"skipped: {error or f'{path}: too little memory'}", file=sys.stderr)
            skipped += 1
            continue
        share = np.bincount(labels.ravel(), minlength=len(info["classes"])) / labels.size
        print(f"{path}: " + ", ".join(f"{info['classes'][i]} {100 * share[i]:.1f}%"
                                      for i in np.argsort(-share) if share[i] >= 0.001))
    if skipped == len(photographs):
        raise ValueError(f"--image: found no readable photograph among {skipped} in {args.image}")
    print(f"wrote NAME.labels.png and NAME.overlay.png of {len(photographs) - skipped} photographs "
          f"to {folder}")


def run(args):
    """What the command line asks for; returns the exit code."""
    check_options(args)
    device = args.device if args.device != "auto" else "gpu" if gpu_available() else "cpu"
    use_tf32(args.tf32)
    if args.stage == "predict":
        predict(args, device)
        return 0
    if args.voc is None:
        args.voc = os.path.join(args.out, f"toy_seed{args.seed}")
        print(f"no --voc given: training --net {args.net} on a drawn toy set, {args.voc}")
        toy.draw(args.voc, seed=args.seed)
    if args.check:
        problems = voc.check(args.voc, args.sbd)
        print("\n".join(problems) or f"{args.voc}: no problem found")
        return 2 if problems else 0
    data = Data(args.voc, args.sbd)
    print(f"{args.voc}: {len(data.train)} training and {len(data.val)} validation images, "
          f"{len(data.classes)} classes; on the {device}")
    if args.stage == "eval":
        paths, truth = evaluate_checkpoints(args, data, device)
    else:
        for stage in stages(args):
            model = run_stage(args, data, stage, device)
            if model is None:
                return 130
            truth = evaluate_stage(args, data, stage, model)
            del model                        # the next one needs its memory
            if not args.stage:
                args.weights = None          # named where unary starts; joint starts from OUT
        paths = checkpoints_in(args.out)
    report(args, data, paths, truth, device)
    if device == "gpu":
        print(f"peak GPU memory: {peak_memory() / 2 ** 30:.2f} GiB")
    return 0


def main(arguments=None):
    args = parse_arguments(arguments)
    for stream in (sys.stdout, sys.stderr):  # file names may hold what cannot be printed
        stream.reconfigure(errors="backslashreplace")
    try:
        return run(args)
    except KeyboardInterrupt:                # outside training, which saves before it stops
        print("run_voc.py: stopped; checkpoints written before are kept", file=sys.stderr)
        return 130
    except MemoryError:                      # CuPy's OutOfMemoryError is one
        size = 1 if args.stage in ("eval", "predict") else args.micro_batch or args.batch_size
        smaller = f"--micro-batch {size // 2}" if size > 1 else "--net largefov or --device cpu"
        error = f"found too little memory for {size} images at a time; try {smaller}"
    except (ValueError, OSError, FloatingPointError) as raised:
        error = raised
        if isinstance(raised, OSError) and raised.filename:      # as the system says it
            error = f"{raised.filename}: found {raised.strerror}, expected a file to read or write"
    print(f"run_voc.py: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
