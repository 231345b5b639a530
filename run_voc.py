"""The experiment of the paper (Sec. 4): train a network, then the network together with its CRF.

    python run_voc.py                                    a drawn toy set, three minutes on a laptop
    python run_voc.py --voc PATH/TO/VOC2012 --weights FILE --net largefov
"""
import argparse
import json
import os
import sys

import numpy as np

from minicrf import (DenseCRF, checkpoints, figures, metrics, pictures, toy, training, vgg, voc,
                     weights)
from minicrf.arrays import gpu_available, peak_memory, use_tf32

STAGES = ("unary", "piecewise", "joint")
# Paper silent on iterations: as many as a laptop bears on the toy set, as DeepLab's on VOC.  What a
# pixel hears from all others makes its marginals steeper in the scores: joint training bears a
# twentieth of the unary rate, and starts at weights under those that are best with nothing learned.
TOY = dict(iterations={"unary": 500, "piecewise": 40, "joint": 40}, batch_size=16,
           rate={"unary": 2.0, "piecewise": 0.05, "joint": 0.05}, evaluate_every=50)
VOC = dict(iterations={"unary": 6000, "piecewise": 500, "joint": 2000}, batch_size=20,
           rate={"unary": 1.0, "piecewise": 0.05, "joint": 0.05}, evaluate_every=200)


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(
        description="Train a network through a dense CRF. Without arguments: on a small drawn set.")
    data = parser.add_argument_group("what to train on")
    add = data.add_argument
    add("--voc", metavar="DIR", help="the folder that holds JPEGImages (.../VOCdevkit/VOC2012); "
        "without it a toy set is drawn and used")
    add("--sbd", metavar="DIR", help="more training images: SBD's dataset folder (.mat files) or "
        "SegmentationClassAug (.png files)")
    add("--check", action="store_true", help="list every problem of the data set, and do no more")

    add = parser.add_argument_group("what to do").add_argument
    add("--stage", choices=(*STAGES, "eval", "predict"),
        help="unary: the network alone; joint: network and CRF, from the unary checkpoint; "
        "piecewise: the CRF alone; eval: Table 1; predict: --image (default: unary, then joint)")
    add("--weights", metavar="FILE", help="unary: ImageNet weights (.npz, .mat, .safetensors) or "
        "a checkpoint to train further; other stages: the checkpoint to start from "
        "(default: OUT/unary.npz; eval and predict: the last stage in OUT)")
    add("--net", choices=vgg.PRESETS, help="(default: vgg16 with --voc, otherwise tiny)")
    add("--image", metavar="PATH", help="predict: a photograph, or a folder of them")
    add("--out", metavar="DIR", default="runs", help="where everything is written (default: runs)")
    add("--resume", action="store_true", help="go on where OUT/STAGE.npz stopped")
    add("--device", choices=("auto", "cpu", "gpu"), default="auto",
        help="(default: a GPU where there is one)")

    add("--tf32", action="store_true", help="round the factors of matrix products to 10 bits, on a "
        "GPU that is faster so")

    add = parser.add_argument_group("how to train").add_argument
    add("--iterations", type=positive, metavar="N", help="updates in each stage that runs "
        f"(default: toy {TOY['iterations']}, VOC {VOC['iterations']})".replace("'", ""))
    add("--batch-size", type=positive, metavar="N", help="images in an update (default: "
        f"{VOC['batch_size']}; toy {TOY['batch_size']})")
    add("--micro-batch", type=positive, metavar="N",
        help="images that go through the network together (default: all); less takes less memory")
    add("--rate", type=float, metavar="X", help="multiplies every learning rate "
        f"(default: toy {TOY['rate']}, VOC {VOC['rate']})".replace("'", ""))
    add("--drop", type=float, metavar="X", default=0.75,
        help="share of the iterations after which learning rates fall to a tenth (default: 0.75)")
    add("--evaluate-every", type=positive, metavar="N", help="iterations between evaluations")
    add("--evaluate-images", type=positive, metavar="K",
        help="validation images for the curve (default: all; results are always on all)")
    add("--seed", type=int, default=0, help="of weights, order, dropout, toy set (default: 0)")

    add = parser.add_argument_group("where the CRF starts").add_argument
    add("--w", type=float, nargs=2, default=(1, 4), metavar=("POSITION", "BILATERAL"),
        help="kernel weights (default: 1 4)")
    add("--sigma-position", type=float, default=3, metavar="PIXELS", help="(default: 3)")
    add("--sigma-bilateral", type=float, nargs=2, default=(80, 13), metavar=("PIXELS", "COLOUR"),
        help="(default: 80 13)")

    add = parser.add_argument_group("eval").add_argument
    add("--also", metavar="DIR", nargs="+", default=[],
        help="more --out folders to compare with in the table, such as a control's")
    add("--train-list", action="store_true", help="evaluate on the training list as well")
    add("--save-predictions", action="store_true", help="palette PNGs, as VOC's server takes them")
    add("--band", type=positive, metavar="PIXELS", default=5,
        help="also IoU this near to class boundaries (default: 5)")
    args = parser.parse_args(arguments)
    args.net = args.net or ("vgg16" if args.voc else "tiny")
    defaults = VOC if args.voc else TOY
    for name in ("batch_size", "evaluate_every"):
        if getattr(args, name) is None:
            setattr(args, name, defaults[name])
    for name in ("iterations", "rate"):      # one for each stage, unless one was given for all
        given = getattr(args, name)
        setattr(args, name, {stage: default if given is None else given
                             for stage, default in defaults[name].items()})
    return args


def positive(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number above 0")
    return int(text)


class Data:
    """A VOC folder's class names and image lists."""

    def __init__(self, root, sbd):
        self.root, self.sbd = root, sbd
        self.classes = voc.class_names(root)
        self.train = voc.image_list(root, "train", sbd)
        self.val = voc.image_list(root, "val")

    def samples(self, ids):
        for image_id in ids:
            yield self.load(image_id)

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
    print(f"--net {args.net}: " + (f"{', '.join(loaded)} loaded from {args.weights}; " if loaded
                                   else "no weights given; ")
          + f"freshly initialised: {(', '.join(fresh) or 'none') if loaded else 'all layers'}")
    vgg.move(net, device)
    model = training.Model(net, mean, device=device, scale=scale)
    vgg.scale_fresh(net, fresh, model.inputs([image for image, _ in data.samples(data.train[:4])]))
    return model, fresh


def start_crf(args, n_classes):
    """The CRF as it is before it has learned anything."""
    spatial, colour = args.sigma_bilateral
    return DenseCRF(n_classes, w=args.w, sigma_position=(args.sigma_position,) * 2,
                    sigma_bilateral=(spatial,) * 2 + (colour,) * 3)


def load_model(path, classes, device):
    """(model, arrays, info) from a checkpoint of this project; its CRF is None after unary.

    classes: the class names it must have been trained for (None: any).
    """
    arrays, info = checkpoints.read(path)
    if classes is not None and info["classes"] != classes:
        raise ValueError(f"{path}: found a network for {len(info['classes'])} classes "
                         f"({', '.join(info['classes'][:3])} ...), expected the data set's "
                         f"{len(classes)} ({', '.join(classes[:3])} ...)")
    net = checkpoints.load_net(path, arrays, info)
    crf = checkpoints.load_crf(path, arrays, info)
    vgg.move(net, device)
    return training.Model(net, arrays["mean"], crf, device, arrays["scale"]), arrays, info


def unary_checkpoint(args):
    path = args.weights or os.path.join(args.out, "unary.npz")
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: found no such file, expected a checkpoint of the unary "
                                "stage; run --stage unary first, or name one with --weights")
    return path


def run_stage(args, data, stage, device):
    """Train one stage and evaluate it on the whole validation list; False when interrupted."""
    path = os.path.join(args.out, f"{stage}.npz")
    settings = {"batch_size": args.batch_size, "micro_batch": args.micro_batch,
                "rate": args.rate[stage], "drop": args.drop}
    start = 0
    if args.resume and os.path.exists(path):
        model, arrays, info = load_model(path, data.classes, device)
        if (info["stage"], info["seed"], info["settings"]) != (stage, args.seed, settings):
            raise ValueError(f"{path}: found a {info['stage']} run with seed {info['seed']} and "
                             f"{info['settings']}, expected {stage}, {args.seed} and {settings}: "
                             "--resume goes on with the same settings")
        start = info["iteration"]
    else:
        if stage == "unary":
            model, fresh = unary_model(args, data, device)
        else:
            model, _, _ = load_model(unary_checkpoint(args), data.classes, device)
            model.crf, fresh = start_crf(args, len(data.classes)), []
        info = {"stage": stage, "classes": data.classes, "seed": args.seed, "fresh": fresh,
                "settings": settings, "arguments": vars(args)}
    optimiser = training.optimizer(model, stage, info["fresh"], rate=args.rate[stage])
    if start:
        checkpoints.load_velocity(path, arrays, optimiser)
        print(f"{stage}: going on after iteration {start}")

    batches = voc.batches(data.root, data.train, args.batch_size, args.seed,
                          start * args.batch_size, data.sbd, len(data.classes))
    shown = data.val[:args.evaluate_images]

    def validate():
        counts = training.evaluate(model, data.samples(shown), len(data.classes), band=0)
        return {method: metrics.mean_iou(each.sum(axis=0)) for method, each in counts.items()}

    done = training.fit(model, stage, optimiser, batches, validate, args.out, info, start=start,
                        iterations=args.iterations[stage], batch_size=args.batch_size,
                        micro_batch=args.micro_batch, drop=args.drop,
                        evaluate_every=args.evaluate_every)
    if not done:
        print(f"{stage}: stopped after iteration {info['iteration']} and saved to {path}; "
              "--resume goes on")
        return False
    evaluate_stage(args, data, stage, model)
    return True


def print_crf(crf):
    """The nine parameters, as one would write them."""
    values = ", ".join(f"{x:.3f}" for x in crf.params["w"])
    print(f"  w: {values}")
    for key in ("log_sigma_position", "log_sigma_bilateral"):
        if key in crf.params:
            print(f"  {key[4:]}: {', '.join(f'{x:.2f}' for x in np.exp(crf.params[key]))}")


def evaluate_stage(args, data, stage, model):
    """Final figures of one stage on the validation list, into results.json and confusions."""
    counts = training.evaluate(model, data.samples(data.val), len(data.classes), args.band)
    final = "crf" if model.crf is not None else "unary"
    results = read_results(args.out)
    entry = summary(counts[final], counts[f"{final}_band"], data.classes)
    if final == "crf":
        entry["miou_before_crf"] = metrics.mean_iou(counts["unary"].sum(axis=0))
        print(f"{stage}: the CRF's parameters")
        print_crf(model.crf)
    if args.train_list:
        train = training.evaluate(model, data.samples(data.train), len(data.classes), args.band)
        entry["train"] = summary(train[final], train[f"{final}_band"], data.classes)
    results[stage] = entry
    write(os.path.join(args.out, "results.json"), json.dumps(results, indent=1))
    with open(os.path.join(args.out, f"{stage}_val.npz.tmp"), "wb") as file:
        np.savez_compressed(file, confusion=counts[final], ids=np.array(data.val))
    os.replace(file.name, file.name[:-len(".tmp")])


def summary(confusion, band, classes):
    """What results.json holds of a stage: percent, null for classes absent from the truth."""
    def finite(x):
        return None if np.isnan(x) else round(float(x), 4)

    each = metrics.iou(confusion.sum(axis=0))
    return {"miou": finite(metrics.mean_iou(confusion.sum(axis=0))),
            "iou": {name: finite(x) for name, x in zip(classes, each)},
            "miou_band": finite(metrics.mean_iou(band.sum(axis=0)))}


def read_results(out):
    path = os.path.join(out, "results.json")
    if not os.path.exists(path):
        return {}
    try:
        with open(path) as file:
            results = json.load(file)
        if not isinstance(results, dict):
            raise ValueError("not an object")
        return results
    except ValueError as error:
        raise ValueError(f"{path}: found no JSON object ({error}), expected results of an earlier "
                         "run; move it away to start anew") from None


def write(path, text):
    """Write a text file beside and rename it."""
    with open(f"{path}.tmp", "w") as file:
        file.write(text)
    os.replace(f"{path}.tmp", path)


def report(args, data):
    """table.txt, curves.png, and how sure the differences are (paired bootstrap over images)."""
    columns, confusions = {}, {}
    for out in [args.out, *args.also]:
        for stage, entry in read_results(out).items():
            name = stage
            if out != args.out:
                name += f" ({os.path.basename(os.path.normpath(out))})"
            columns[name] = entry
            path = os.path.join(out, f"{stage}_val.npz")
            if os.path.exists(path):
                arrays = weights.read_npz(path)
                if list(arrays["ids"]) == data.val:
                    confusions[name] = arrays["confusion"]
    order = [name for stage in STAGES for name in columns if name.split()[0] == stage]
    text = f"Validation list, {len(data.val)} images\n"
    text += figures.table({name: columns[name] for name in order}, data.classes)
    band = {name: columns[name]["miou_band"] for name in order}          # None: no boundaries
    text += f"near boundaries ({args.band} pixels): " + ", ".join(
        f"{name} {'-' if x is None else format(x, '.1f')}" for name, x in band.items()) + "\n"
    best = order[-1]
    for name in order[:-1]:
        if {name, best} <= confusions.keys():
            difference, (low, high), share = metrics.bootstrap_difference(
                confusions[best], confusions[name])
            text += (f"{best} - {name}: {difference:+.2f} points, 95% interval {low:+.2f} to "
                     f"{high:+.2f}, above 0 in {100 * share:.1f}% of bootstrap samples\n")
    with_train = {name: columns[name]["train"] for name in order if "train" in columns[name]}
    if with_train:
        text += f"\nTraining list, {len(data.train)} images\n"
        text += figures.table(with_train, data.classes)
    write(os.path.join(args.out, "table.txt"), text)
    print(text, end="")
    figures.curves(os.path.join(args.out, "curves.png"),
                   training.read_log(os.path.join(args.out, "log.csv")))


def draw_panels(args, data, device, rows=4):
    """panels/best.png and worst.png: the validation images the last stage did best and worst."""
    stages = [stage for stage in STAGES if os.path.exists(os.path.join(args.out, f"{stage}.npz"))
              and os.path.exists(os.path.join(args.out, f"{stage}_val.npz"))]
    if not stages:
        return
    each = weights.read_npz(os.path.join(args.out, f"{stages[-1]}_val.npz"))["confusion"]
    score = np.array([metrics.mean_iou(c) for c in each])
    order = np.argsort(-score)
    chosen = {"best": order[:rows], "worst": order[::-1][:rows]}
    drawn = {}
    for stage in stages:
        if stage == "piecewise" and "joint" in stages:
            continue
        model, _, _ = load_model(os.path.join(args.out, f"{stage}.npz"), data.classes, device)
        for i in {*chosen["best"], *chosen["worst"]}:
            image, truth = data.load(data.val[i])
            row = drawn.setdefault(i, {"image": image, "labels": truth, "name": data.val[i],
                                       "predictions": {}})
            labels = [p for p in model.predict(image) if p is not None][-1]
            iou = metrics.mean_iou(metrics.confusion_matrix(truth, labels, len(data.classes)))
            row["predictions"][stage] = labels, iou
    os.makedirs(os.path.join(args.out, "panels"), exist_ok=True)
    for name, indices in chosen.items():
        path = os.path.join(args.out, "panels", f"{name}.png")
        figures.panel(path, [drawn[i] for i in indices], data.classes,
                      title=f"The {len(indices)} {name} validation images")
        print(f"wrote {path}")


def evaluate_checkpoints(args, data, device):
    """Stage eval: Table 1 for --weights, or for every checkpoint in OUT."""
    paths = [args.weights] if args.weights else [
        path for stage in STAGES if os.path.exists(path := os.path.join(args.out, f"{stage}.npz"))]
    if not paths:
        raise FileNotFoundError(f"{args.out}: found no checkpoint, expected unary.npz, "
                                "piecewise.npz or joint.npz, or one named with --weights")
    for path in paths:
        model, _, info = load_model(path, data.classes, device)
        evaluate_stage(args, data, info["stage"], model)
        if args.save_predictions:
            folder = os.path.join(args.out, "predictions", info["stage"])
            os.makedirs(folder, exist_ok=True)
            for image_id, (image, _) in zip(data.val, data.samples(data.val)):
                labels = [p for p in model.predict(image) if p is not None][-1]
                voc.save_labels(os.path.join(folder, f"{image_id}.png"), labels)
            print(f"wrote {len(data.val)} label pictures to {folder}")


def predict(args, device):
    """Stage predict: label PNG, overlay PNG and class summary for photographs."""
    if not args.image:
        raise ValueError("--image: found nothing, expected a photograph or a folder of them")
    paths = [args.weights] if args.weights else [
        path for stage in reversed(STAGES)
        if os.path.exists(path := os.path.join(args.out, f"{stage}.npz"))]
    if not paths:
        raise FileNotFoundError(f"{args.out}: found no checkpoint, expected one, or --weights")
    model, _, info = load_model(paths[0], None, device)
    folder = os.path.join(args.out, "predictions")
    os.makedirs(folder, exist_ok=True)
    photographs = pictures.find_photographs(args.image)
    failed = 0
    for path in photographs:
        try:
            image = pictures.read_photograph(path)
        except (ValueError, OSError) as error:
            print(f"skipped: {error}", file=sys.stderr)
            failed += 1
            continue
        small = pictures.shrink(image)       # a CRF variable a pixel: at most a million of them
        labels = [p for p in model.predict(small) if p is not None][-1]
        labels = pictures.enlarge(labels, image.shape[:2])
        name = os.path.join(folder, os.path.basename(path))
        voc.save_labels(f"{name}.labels.png", labels)
        figures.save(figures.overlay(image, labels), f"{name}.overlay.png")
        share = np.bincount(labels.ravel(), minlength=len(info["classes"])) / labels.size
        print(f"{path}: " + ", ".join(f"{info['classes'][i]} {100 * share[i]:.1f}%"
                                      for i in np.argsort(-share) if share[i] > 0.001))
    print(f"wrote {len(photographs) - failed} label pictures and overlays to {folder}")
    if failed == len(photographs):
        raise ValueError(f"{args.image}: found no readable photograph among {failed}")


def run(args):
    """What the command line asks for; returns the exit code."""
    if args.device == "gpu" and not gpu_available():
        raise ValueError("--device: found gpu, but cupy finds no CUDA device; expected cpu or auto")
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
    os.makedirs(args.out, exist_ok=True)
    if args.stage == "eval":
        evaluate_checkpoints(args, data, device)
    else:
        for stage in [args.stage] if args.stage else ["unary", "joint"]:
            if not run_stage(args, data, stage, device):
                return 130
            if not args.stage:
                args.weights = None          # named where unary starts; joint starts from OUT
    report(args, data)
    draw_panels(args, data, device)
    if device == "gpu":
        print(f"peak GPU memory: {peak_memory() / 2 ** 30:.2f} GiB")
    return 0


def main(arguments=None):
    args = parse_arguments(arguments)
    try:
        return run(args)
    except MemoryError:                      # CuPy's OutOfMemoryError is one
        size = args.micro_batch or args.batch_size
        smaller = f"--micro-batch {size // 2}" if size > 1 else "--net largefov or --device cpu"
        error = f"found too little memory for {size} images at a time; try {smaller}"
    except (ValueError, OSError, FloatingPointError) as raised:
        error = raised
    print(f"run_voc.py: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
