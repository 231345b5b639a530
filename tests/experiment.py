"""The paper's comparison on a VOC folder, in one call: is joint training worth it?

    python tests/experiment.py PATH/TO/VOC2012 --weights vgg16_conv.npz --out runs/voc

Trains unary; then, all from that checkpoint and for equally many further iterations, unary again
(the control), piecewise and joint; then measures all of them on the whole validation list.
What the paper says to look for: joint 2.5 points above unary (61.5 to 64.1), above the control and
above piecewise, and the gain there within the first 20 joint iterations.
"""
import argparse
import os
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import run_voc   # noqa: E402
from minicrf.results import logs   # noqa: E402


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("voc", metavar="PATH/TO/VOC2012", help="the folder that holds JPEGImages")
    add("--weights", metavar="FILE", help="ImageNet weights, or a unary checkpoint to go on from")
    add("--out", default="runs/experiment", metavar="DIR", help="a folder SEED in it for each seed")
    add("--net", default="largefov")
    add("--device", default="auto")
    add("--batch-size", default="4", metavar="N")
    add("--iterations", default="2000", metavar="N",
        help="of the unary stage; enough where its curve in curves.png is flat (default: 2000)")
    add("--further", default="40", metavar="N", help="of each stage after it (default: 40)")
    add("--rate", default="0.1", metavar="X", help="of the stages after it (default: 0.1)")
    add("--evaluate-images", default="40", metavar="K", help="for the curves (default: 40)")
    add("--seeds", type=int, nargs="+", default=[0], metavar="S")
    return parser.parse_args(arguments)


def commands(args, out, seed):
    """The command lines of run_voc.py, in order."""
    common = ["--voc", args.voc, "--net", args.net, "--device", args.device, "--seed", str(seed),
              "--batch-size", args.batch_size, "--evaluate-images", args.evaluate_images]
    # as often over the whole run, and right after 20 iterations of joint training
    every = ["--evaluate-every", str(max(1, int(args.iterations) // 20))]
    further = ["--rate", args.rate, "--iterations", args.further, "--evaluate-every", "20"]
    weights = ["--weights", args.weights] if args.weights else []
    yield [*common, "--stage", "unary", "--iterations", args.iterations, *every, *weights,
           "--out", out]
    control = os.path.join(out, "control")
    yield [*common, "--stage", "unary", *further, "--weights", os.path.join(out, "unary.npz"),
           "--out", control]
    yield [*common, "--stage", "piecewise", *further, "--out", out]
    yield [*common, "--stage", "joint", *further, "--out", out]
    yield [*common, "--stage", "eval", "--out", out, "--also", control]


def main(arguments=None):
    args = parse_arguments(arguments)
    began = time.monotonic()
    for seed in args.seeds:
        out = os.path.join(args.out, str(seed))
        for command in commands(args, out, seed):
            print(f"\n[{time.monotonic() - began:.0f} s] python run_voc.py {' '.join(command)}")
            code = run_voc.main(command)
            if code:
                return code
        print(f"mean IoU on the first {args.evaluate_images} validation images as it trained:")
        for row in logs.read_log(os.path.join(out, "log.csv")):
            if row["miou"]:
                print(f"  {row['stage']} {row['iteration']}: {float(row['miou']):.1f}")
    print(f"[{time.monotonic() - began:.0f} s] done: see table.txt, curves.png and panels in "
          f"{', '.join(os.path.join(args.out, str(seed)) for seed in args.seeds)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
