"""The experiment of the paper (Sec. 4): train a network, then the network together with its CRF.

    python run_voc.py                                    a drawn toy set, three minutes on a laptop
    python run_voc.py --voc PATH/TO/VOC2012 --weights FILE --net largefov
"""
import argparse
import json
import os
import sys

from minicrf import DenseCRF, checkpoints, metrics, toy, training, vgg, voc, weights
from minicrf.arrays import gpu_available, to_device

STAGES = ("unary", "piecewise", "joint")


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description="Train a network through a dense CRF on PASCAL VOC 2012.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--stage", choices=STAGES, help="what to train (default: unary, then joint)")
    add("--voc", metavar="DIR", help="the folder that holds JPEGImages; without it, a toy set is drawn")
    add("--sbd", metavar="DIR", help="SBD's dataset folder or SegmentationClassAug: more training images")
    add("--weights", metavar="FILE", help="unary: ImageNet weights (.npz, .mat, .safetensors) or a "
        "checkpoint to go on from; piecewise, joint: the unary checkpoint (default OUT/unary.npz)")
    add("--net", choices=vgg.PRESETS, help="(default: largefov with --voc, otherwise tiny)")
    add("--device", choices=("auto", "cpu", "gpu"), default="auto", help="auto: a GPU where there is one")
    add("--out", metavar="DIR", default="runs", help="where everything is written")
    add("--iterations", type=int, metavar="N", help="of each stage that runs")
    add("--batch-size", type=int, metavar="N", help="images in an update")
    add("--micro-batch", type=int, metavar="N", help="images that go through the network together")
    add("--rate", type=float, metavar="X", default=1.0, help="multiplies every learning rate")
    add("--drop", type=float, metavar="X", default=0.75,
        help="share of the iterations after which learning rates fall to a tenth")
    add("--evaluate-every", type=int, metavar="N", default=50, help="iterations between evaluations")
    add("--evaluate-images", type=int, metavar="K", help="evaluate on the first K images while training")
    add("--resume", action="store_true", help="go on from OUT/STAGE.npz")
    add("--seed", type=int, default=0)
    return parser.parse_args(arguments)


class Data:
    """A VOC folder's class names and image lists."""

    def __init__(self, root, sbd=None):
        self.root, self.sbd = root, sbd
        self.classes = voc.class_names(root)
        self.train = voc.image_list(root, "train", sbd)
        self.val = voc.image_list(root, "val")

    def samples(self, ids):
        for image_id in ids:
            yield voc.load(self.root, image_id, self.sbd, len(self.classes))


def unary_model(args, data, device):
    """A network for the unary stage: from ImageNet weights, from a checkpoint, or as drawn."""
    net = vgg.build(args.net, len(data.classes), seed=args.seed)
    every = [name for name in net.layers if f"{name}_w" in net.params]
    mean, fresh = weights.MEAN, every
    if args.weights:
        values = weights.read_weights(args.weights)
        fresh, mean = weights.fill(net, values, args.weights), values["mean"]
    loaded = [name for name in every if name not in fresh]
    print(f"{args.net}: {len(loaded)} layers loaded from {args.weights}" if loaded else
          f"{args.net}: no weights given", "-", f"freshly initialised: {', '.join(fresh) or 'none'}")
    vgg.move(net, device)
    model = training.Model(net, mean, device=device)
    images = [image for image, _ in data.samples(data.train[:4])]
    vgg.scale_fresh(net, fresh, model.inputs(images))
    return model, fresh


def run_stage(args, data, stage, device):
    os.makedirs(args.out, exist_ok=True)
    model, fresh = unary_model(args, data, device)
    optimiser = training.optimizer(model, stage, fresh, rate=args.rate)
    info = {"stage": stage, "classes": data.classes, "seed": args.seed, "fresh": fresh,
            "arguments": vars(args)}
    start = 0
    batches = voc.batches(data.root, data.train, args.batch_size, args.seed, start * args.batch_size,
                          data.sbd, len(data.classes))
    shown = data.val[:args.evaluate_images]

    def validate():
        counts = training.evaluate(model, data.samples(shown), len(data.classes))
        return {method: metrics.mean_iou(each.sum(axis=0)) for method, each in counts.items()}

    training.fit(model, stage, optimiser, batches, validate, args.out, info, start=start,
                 iterations=args.iterations, micro_batch=args.micro_batch, drop=args.drop,
                 evaluate_every=args.evaluate_every)
    counts = training.evaluate(model, data.samples(data.val), len(data.classes))
    for method, each in counts.items():
        print(stage, method, metrics.mean_iou(each.sum(axis=0)), metrics.iou(each.sum(axis=0)))


if __name__ == "__main__":
    args = parse_arguments()
    data = Data(args.voc, args.sbd)
    run_stage(args, data, args.stage, "cpu")
