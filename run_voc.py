"""The experiment of the paper (Sec. 4): train a network, then the network together with its CRF.

    python run_voc.py                                    a drawn toy set, two minutes on a laptop
"""
# flake8: noqa: E402
import os

if (os.cpu_count() or 1) <= 4:       # threads of ours serve few cores better than OpenBLAS' own
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")               # NumPy's import looks here

import argparse
import sys
import time
import zlib

import numpy as np
from tqdm import tqdm

from minicrf import DenseCRF, LocalCRF, training, vgg
from minicrf.data import loading, toy, voc, weights
from minicrf.programs.gpu import choose_device, peak_memory, use_tf32
from minicrf.programs.program import (WEIGHT, WIDTH, Parser, locked, number, path, run_program,
                                      undisturbed)
from minicrf.results import checkpoints, evaluation, figures, logs, reports

# The paper peaks near 4000 unary iterations and 20 joint ones; its joint rates it leaves open.
# Joint training starts at weights under the best of an untrained CRF.
def by_stage(unary, joint, piecewise):
    return {"unary": unary, "joint": joint, "local": joint, "piecewise": piecewise}


TOY = dict(net="tiny", batch_size=16, iterations=by_stage(320, 30, 40),
           rate=by_stage(2.0, 0.1, 0.2), evaluate_every=by_stage(40, 10, 20))
VOC = dict(net="vgg16", batch_size=20, iterations=by_stage(6000, 2000, 500),
           rate=by_stage(1.0, 0.1, 0.1), evaluate_every=by_stage(200, 200, 50))
SAVE_EVERY = 300                                         # seconds, at most, between checkpoints

COUNT = number(1, 1e9, int)
PREDICTS = {"stage", "weights", "image", "out", "device", "tf32"}        # what predict uses

HELP = """\
stages (default: unary, then joint):
  unary      trains the network alone
  joint      trains network and CRF together, from the unary checkpoint
  local      trains network and local factors, likewise (the paper's Fig. 2)
  piecewise  trains the CRF alone, the network of the unary checkpoint frozen
  search     chooses the CRF's parameters by IoU, on one half of the validation
             images, and measures them on the other
  eval       measures what was trained, again, in one table
  predict    labels photographs of your own

examples:
  python run_voc.py --voc VOCdevkit/VOC2012 --weights imagenet-vgg-verydeep-16.mat
  python run_voc.py --voc VOCdevkit/VOC2012 --resume
  python run_voc.py --stage predict --image photo.jpg"""


def default(name):
    """What help says of an option that differs between VOC and the toy set."""
    texts = [", ".join(f"{stage} {x:g}" for stage, x in value.items())
             if isinstance(value, dict) else value for value in (VOC[name], TOY[name])]
    return f"(default: {texts[0]}; toy set: {texts[1]})"


def build_parser():
    parser = Parser(
        prog="run_voc.py", usage="python run_voc.py [options]", epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train a network through a dense CRF. Without options: on a small drawn set.")
    add = parser.add_argument_group("what to train on").add_argument
    add("--voc", type=path, metavar="DIR", help="the folder that holds JPEGImages, "
        ".../VOCdevkit/VOC2012 (default: a toy set, drawn into OUT)")
    add("--sbd", type=path, metavar="DIR",
        help="more training images: the folder of SBD or of SegmentationClassAug")
    add("--labels", metavar="FOLDER", help="training labels from this folder beside JPEGImages, "
        "such as Scribbles; 255 is unknown (default: SegmentationClass)")
    add("--check", action="store_true", help="list what is wrong with the images, and stop")

    add = parser.add_argument_group("what to do").add_argument
    add("--stage", choices=(*training.STAGES, "search", "eval", "predict"), help="see below")
    add("--weights", type=path, metavar="FILE", help="unary: ImageNet weights or a checkpoint to "
        "start from (default: none); others: the checkpoint (default: OUT/unary.npz; eval: all in "
        "OUT; predict: the last stage in OUT)")
    add("--net", choices=vgg.PRESETS, help="vgg16: the paper's; largefov: needs less memory; "
        f"tiny: for the toy set {default('net')}")
    add("--image", type=path, metavar="PATH", help="predict: a photograph, or a folder of them")
    add("--out", type=path, metavar="DIR", default="runs",
        help="where everything is written (default: runs)")
    add("--resume", action="store_true", help="continue the run whose checkpoints are in OUT")
    add("--device", choices=("auto", "cpu", "gpu"), default="auto",
        help="(default: a GPU where there is one)")
    add("--tf32", action="store_true", help="faster, less precise matrix products on a GPU")

    add = parser.add_argument_group("how to train").add_argument
    add("--iterations", type=COUNT, metavar="N",
        help=f"updates in each stage that runs {default('iterations')}")
    add("--batch-size", type=COUNT, metavar="N",
        help=f"images in an update {default('batch_size')}")
    add("--micro-batch", type=COUNT, metavar="N",
        help="images that go through the network at once; fewer need less memory (default: all)")
    add("--rate", type=number(0, 1e9), metavar="X",
        help=f"multiplies every learning rate {default('rate')}")
    add("--drop", type=number(0, 1), metavar="X", default=0.75,
        help="share of the iterations after which learning rates fall to a tenth (default: 0.75)")
    add("--evaluate-every", type=COUNT, metavar="N",
        help=f"iterations between points of the curve {default('evaluate_every')}")
    add("--evaluate-images", type=COUNT, metavar="K",
        help="validation images for the curve, the first K (default: all); tables are on all")
    add("--seed", type=number(0, 1e9, int), default=0, metavar="N",
        help="of weights, order, dropout and the toy set (default: 0)")

    add = parser.add_argument_group("where the CRF starts").add_argument
    add("--w", type=WEIGHT, nargs=2, default=(1, 4), metavar=("POSITION", "BILATERAL"),
        help="weights of its two kernels (default: 1 4)")
    add("--compatibility", choices=("potts", "matrix"), default="potts",
        help="matrix: learn which labels go together (default: potts)")
    add("--sigma-position", type=WIDTH, default=3, metavar="PIXELS",
        help="width of the kernel of position (default: 3)")
    add("--sigma-bilateral", type=WIDTH, nargs=2, default=(80, 13), metavar=("PIXELS", "COLOUR"),
        help="widths of the kernel of position and colour (default: 80 13)")

    add = parser.add_argument_group("what the table shows").add_argument
    add("--also", metavar="DIR", type=path, nargs="+", default=[],
        help="other --out folders beside this one, such as a control's")
    add("--train-list", action="store_true", help="IoU on the training list as well")
    return parser


def parse_arguments(arguments=None):
    """The options, with the defaults of the toy set or of VOC filled in."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    for name in sorted(given - PREDICTS) if args.stage == "predict" else ():
        parser.error(f"--{name.replace('_', '-')}: found it with --stage predict, which does not "
                     "use it")
    for name, value in (VOC if args.voc else TOY).items():
        if name not in given:
            setattr(args, name, value)
        elif isinstance(value, dict):                      # by stage; one given is for all
            setattr(args, name, dict.fromkeys(value, getattr(args, name)))
    args.stages = [args.stage] if args.stage else ["unary", "joint"]
    return args


def check_options(args):
    """Refuse what makes no sense together, before anything is done or written."""
    if bool(args.image) != (args.stage == "predict"):
        raise ValueError("--image, --stage predict: found only one of them, expected both or none")
    for name in ("sbd", "check"):
        if getattr(args, name) and not args.voc:
            raise ValueError(f"--{name}: found it without --voc, which it needs")
    for folder in args.also:
        if not os.path.exists(os.path.join(folder, "results.json")):
            raise FileNotFoundError(f"--also: found no results.json in {folder}, expected another "
                                    "run's --out")
    there = args.weights or checkpoints.present(args.out)
    if args.stage in ("eval", "predict") and not there:
        raise FileNotFoundError(f"{args.out}: found no checkpoint; run another --stage first, or "
                                "name one with --weights")
    written = [os.path.realpath(os.path.join(args.out, f"{stage}.npz")) for stage in args.stages]
    if args.weights and not args.resume and os.path.realpath(args.weights) in written:
        raise ValueError(f"--weights: found {args.weights}, which this run would overwrite; "
                         "expected another --out, or --resume to continue")


def start_crf(args, n_classes, stage):
    """The CRF as it is before it has learned anything: the options of its group."""
    if stage == "local":
        return LocalCRF(n_classes)
    w = np.array(args.w, float)
    if args.compatibility == "matrix":
        w = w[:, None, None] * np.eye(n_classes)
    return DenseCRF(n_classes, w=w, sigma_position=args.sigma_position,
                    sigma_bilateral=args.sigma_bilateral)


def start_model(args, data, start, stage, device):
    """(model, names of its fresh layers) for a stage from its beginning; start: from which file."""
    if stage != "unary":
        if not os.path.exists(start):
            raise FileNotFoundError(f"{start}: found no such file; run --stage unary first, or "
                                    "name a checkpoint with --weights")
        model, _, _ = checkpoints.load_model(start, data.classes, device)
        model.crf = start_crf(args, len(data.classes), stage)
        return model, []
    net = vgg.build(args.net, len(data.classes), seed=args.seed)
    fresh = [name for name in net.layers if f"{name}_w" in net.params]
    mean, scale, origin = weights.MEAN, training.PIXEL_SCALE, "all weights are random"
    if start:
        values = weights.read_weights(start)
        fresh = weights.fill(net, values, start)
        mean, scale = values["mean"], values["scale"]
        origin = f"weights from {start}; random ones in {', '.join(fresh) or 'no layer'}"
    print(f"--net {args.net}: {origin}")
    vgg.move(net, device)
    model = training.Model(net, mean, device=device, scale=scale)
    images, labels = zip(*map(data.load, data.train[:4]))
    present = {*np.unique(np.concatenate([each.ravel() for each in labels])).tolist()}
    for line in voc.one_class(f"{args.voc}: the first training images", present):
        print(f"warning: {line}; --check looks at all")
    vgg.scale_fresh(net, fresh, model.inputs([model.resized(image) for image in images]))
    return model, fresh


def begin(args, data, stage, device):
    """(model, optimiser, info) as a stage starts, or as --resume finds them in OUT/STAGE.npz."""
    path, start = os.path.join(args.out, f"{stage}.npz"), args.weights
    if stage != "unary":
        start = start or os.path.join(args.out, "unary.npz")
    lists = " ".join([*data.train, "and", *data.val]).encode()
    settings = {"stage": stage, "seed": args.seed, "batch_size": args.batch_size,
                "micro_batch": args.micro_batch, "rate": args.rate[stage], "drop": args.drop,
                "evaluate_images": args.evaluate_images,
                "labels": args.labels, "image lists (their checksum)": zlib.crc32(lists)}
    settings |= ({"net": args.net} if stage == "unary" else
                 {name: np.ravel(getattr(args, name)).tolist()
                  for name in ("w", "sigma_position", "sigma_bilateral", "compatibility")})
    if start and os.path.isfile(start):
        with open(start, "rb") as file:
            settings["checkpoint to start from (its checksum)"] = zlib.crc32(file.read())
    if args.resume and os.path.exists(path):
        model, arrays, info = checkpoints.resume(path, data.classes, device, settings)
        print(f"{stage}: resumes after iteration {info['iteration']} of {args.iterations[stage]}")
    else:
        model, fresh = start_model(args, data, start, stage, device)
        arrays, info = None, {"stage": stage, "classes": data.classes, "fresh": fresh,
                              "settings": settings, "arguments": vars(args), "iteration": 0}
    optimiser = training.optimizer(model, stage, info["fresh"], rate=args.rate[stage])
    if arrays:
        checkpoints.restore(arrays, optimiser.velocity, "velocity_")
    return model, optimiser, info


def train(args, data, stage, device):
    """Train one stage to its end; returns the model.  Whatever ends it early, its state is saved.

    The joint curve starts with iteration 0: the untrained CRF.
    """
    model, optimiser, info = begin(args, data, stage, device)
    start, end, every = info["iteration"], args.iterations[stage], args.evaluate_every[stage]
    log = logs.Log(os.path.join(args.out, "log.csv"), stage, start)
    batches = loading.batches(data, args.batch_size, args.seed, model.resized,
                              start * args.batch_size)
    bar = tqdm(None, stage, end, initial=start, unit="it", dynamic_ncols=True, disable=None)
    began, unsaved, saved = time.monotonic(), False, time.monotonic()

    def save():
        log.write()
        checkpoints.save(os.path.join(args.out, f"{stage}.npz"), model, info, optimiser)

    try:
        if model.crf and not start:
            log.add(0, model.crf)
        if log.waiting(start) and (start % every == 0 or start == end):
            tqdm.write(f"{stage} {start}/{end}: {evaluate(args, data, model, log)}")
        for iteration in range(start + 1, end + 1):
            batch = next(batches)
            optimiser.scale = 0.1 if iteration > args.drop * end else 1.0
            with undisturbed():
                unsaved = False                                          # no half steps
                loss = training.train_step(model, optimiser, batch, args.seed, iteration,
                                           args.micro_batch)
                info["iteration"], unsaved = iteration, True
                log.add(iteration, model.crf, loss=loss, rate=optimiser.scale)
            bar.set_postfix_str(f"loss {loss:.3f}")
            bar.update()
            due = iteration % every == 0 or iteration == end
            if due or time.monotonic() - saved > SAVE_EVERY:
                save()
                unsaved, saved = False, time.monotonic()
                speed = args.batch_size * (iteration - start) / (saved - began)
                note = f", {evaluate(args, data, model, log)}" if due else ""
                tqdm.write(f"{stage} {iteration}/{end}: loss {loss:.3f}, {speed:.2f} images/s"
                           f"{note}")
        return model
    finally:
        if unsaved:
            save()
            print(f"{stage}: saved after iteration {info['iteration']}; --resume continues")
        bar.close()
        batches.close()


def evaluate(args, data, model, log):
    """A point of the curve, into log.csv and curves.png; returns it in words."""
    row = log.rows[-1]
    row |= evaluation.curve_point(model, data, args.evaluate_images)
    if int(row["iteration"]):                # at 0 an earlier run's rows are all there is
        figures.curves(os.path.join(args.out, "curves.png"), log.rows)
        log.write()                          # last: without it --resume does all of this again
    return f"mean IoU {row['miou']:.2f}" + (
        f" ({row['miou_unary']:.2f} without CRF)" if model.crf else "")


def measure_checkpoints(args, data, device):
    """Stage eval: --weights, or every checkpoint in OUT; returns (paths by stage, the last stage).

    After unary training also with an untrained CRF.
    """
    there = checkpoints.present(args.out)
    for start in [args.weights] if args.weights else [*there.values()]:
        model, _, info = checkpoints.load_model(start, data.classes, device)
        stage = info["stage"]
        if not os.path.samefile(there.setdefault(stage, start), start):
            raise ValueError(f"{start}: found a checkpoint of stage {stage}, whose results would "
                             f"replace those of another in {args.out}; expected another --out")
        model.crf = model.crf or start_crf(args, len(data.classes), stage)
        reports.measure(args.out, data, stage, model, args.train_list)
    return there, stage


def search_parameters(args, data, device):
    """Stage search: figures of a CRF whose parameters were chosen by IoU; returns their name."""
    start = args.weights or os.path.join(args.out, "unary.npz")
    model, _, _ = checkpoints.load_model(start, data.classes, device)
    with open(start, "rb") as file:
        settings = zlib.crc32(repr((args.w, args.sigma_position, args.sigma_bilateral, args.labels,
                                    data.train, data.val, zlib.crc32(file.read()))).encode())
    if args.resume and reports.counts(args.out, "searched").get("settings") == settings:
        print("searched: done before, nothing to resume")
    else:
        counts = evaluation.cross_fitted(
            model, data, lambda: start_crf(args, len(data.classes), "search"))
        reports.write(args.out, "searched", {"ids": data.val, "classes": data.classes,
                                             "settings": settings, **counts})
    return "searched"


def run(args):
    """What the command line asks for; returns the exit code."""
    check_options(args)
    if args.check:
        problems, notes = loading.DataSet(args.voc, args.sbd, args.labels).check()
        print(*notes, *(problems or [f"{args.voc}: no problem found"]), sep="\n")
        return 2 if problems else 0
    device = choose_device(args.device)
    use_tf32(args.tf32)
    if args.stage == "predict":
        checkpoint = args.weights or [*checkpoints.present(args.out).values()][-1]
        evaluation.label_photographs(checkpoint, args.image, os.path.join(args.out, "predictions"),
                                     device)
        return 0
    with locked(args.out):
        if args.voc is None:
            args.voc = os.path.join(args.out, f"toy_seed{args.seed}")
            print(f"no --voc given: --net {args.net} on a drawn toy set, {args.voc}")
            toy.draw(args.voc, n_train=480, n_val=100, seed=args.seed, easy=True)
        train_or_measure(args, device)
    if device == "gpu":
        print(f"peak GPU memory: {peak_memory() / 2 ** 30:.2f} GiB")
    return 0


def train_or_measure(args, device):
    """The stages that the command line asks for, then the table and pictures of what is there."""
    data = loading.DataSet(args.voc, args.sbd, args.labels)
    print(f"{args.voc}: {len(data.train)} training and {len(data.val)} validation images, "
          f"{len(data.classes)} classes ({', '.join(data.classes)}); on the {device}")
    if args.stage == "eval":
        paths, stage = measure_checkpoints(args, data, device)
    elif args.stage == "search":
        paths, stage = {}, search_parameters(args, data, device)
    else:
        for stage in args.stages:
            model = train(args, data, stage, device)
            model.crf = model.crf or start_crf(args, len(data.classes), stage)
            reports.measure(args.out, data, stage, model, args.train_list)
            del model                        # the next one needs its memory
            args.weights = None              # was for the first; joint follows unary
        paths = checkpoints.present(args.out)
    reports.report(args.out, args.also, data, stage, paths, device)


def main(arguments=None):
    return run_program("run_voc.py", run, parse_arguments(arguments), too_little=(
        "found too little memory; try --device cpu or, to train, --micro-batch 1, --net largefov"))


if __name__ == "__main__":
    sys.exit(main())
