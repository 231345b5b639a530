"""The paper's comparison in one call: is joint training worth it?

    python tests/evidence/experiment.py drawn --seeds 0 1 2 3 4
    python tests/evidence/experiment.py PATH/TO/VOC2012 --sbd PATH/TO/SBD --weights vgg16_conv.npz

Trains unary; then, all from that checkpoint, unary again (the control), joint, piecewise (from the
control, too) and, slowest and last, local; searches for the CRF of the control and of the joint
network by IoU; measures each on the whole validation list, and prints the differences that matter,
over all seeds.  `drawn`: 2,400 drawn images to train on, 400 to measure on, others for each
seed.  --labels scribbles or clicks: trains on those of the drawn images alone; then without
piecewise, local and the search on the joint network.  Called again it resumes where it stopped.
What the paper says to look for: joint 2.5 points above unary (61.5 to 64.1), above the control and
above piecewise, and the gain there within the first 20 joint iterations.
"""
import argparse
import os
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import run_voc   # noqa: E402, before NumPy: it settles the threads of the matrix library
import numpy as np   # noqa: E402

from minicrf.data import toy   # noqa: E402
from minicrf.metrics import mean_iou   # noqa: E402

# column: where its counts lie in a seed's folder, and by which method
COLUMNS = {
    "unary": ("unary", "unary"), "+ untrained CRF": ("unary", "crf"),
    "control": ("control/unary", "unary"), "control + untrained CRF": ("control/unary", "crf"),
    "control searched": ("control/searched", "crf"),
    "piecewise": ("piecewise", "crf"), "control piecewise": ("control/piecewise", "crf"),
    "local": ("local", "crf"), "joint": ("joint", "crf"),
    "joint searched": ("joint_searched/searched", "crf")}
PAIRS = [("joint", "control + untrained CRF"), ("joint", "control searched"),
         ("joint searched", "control searched"), ("joint", "piecewise")]


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("voc", metavar="drawn|PATH/TO/VOC2012", help="the folder that holds JPEGImages")
    add("--sbd", metavar="DIR", help="more training images, as for run_voc.py")
    add("--weights", metavar="FILE", help="ImageNet weights, or a unary checkpoint to start from")
    add("--out", default="runs/experiment", metavar="DIR", help="a folder SEED in it for each seed")
    add("--net", metavar="NET", help="(default: largefov; drawn: tiny)")
    add("--device", default="auto")
    add("--batch-size", metavar="N", help="(default: 4; drawn: 16)")
    add("--iterations", default="1500", metavar="N",
        help="of the unary stage; enough where its curve in curves.png is flat (default: 1500)")
    add("--further", default="400", metavar="N",
        help="of control, local and joint after it; piecewise: at most 60 (default: 400)")
    add("--rate", type=float, default=1., metavar="X",
        help="of the same; piecewise: a fifth (default: 1)")
    add("--evaluate-images", default="40", metavar="K", help="for the curves (default: 40)")
    add("--labels", choices=("scribbles", "clicks"), help="drawn: training labels (default: full)")
    add("--seeds", type=int, nargs="+", default=[0], metavar="S")
    return parser.parse_args(arguments)


def commands(args, seed):
    """(what a command leaves when it is done, its arguments for run_voc.py), in order."""
    out = os.path.join(args.out, str(seed))
    control = os.path.join(out, "control")
    drawn = args.voc == "drawn"
    voc = os.path.join(args.out, f"drawn_{seed}") if drawn else args.voc
    common = ["--voc", voc, "--net", args.net or ("tiny" if drawn else "largefov"), "--device",
              args.device, "--seed", str(seed), "--batch-size",
              args.batch_size or ("16" if drawn else "4"),
              "--evaluate-images", args.evaluate_images]
    common += ["--sbd", args.sbd] if args.sbd else []
    common += ["--labels", args.labels.capitalize()] if args.labels else []

    def train(stage, folder, iterations, rate, *more):
        # as often over the whole run, and right after 20 iterations of further training
        every = iterations // 20 if iterations > 400 else 20
        return (os.path.join(folder, f"{stage}_val.npz"),
                [*common, "--stage", stage, "--iterations", str(iterations), "--rate", str(rate),
                 "--evaluate-every", str(every), *more, "--out", folder, "--resume"])

    def search(start, folder):
        return (os.path.join(folder, "searched_val.npz"),
                [*common, "--stage", "search", "--weights", start, "--out", folder, "--resume"])

    further = int(args.further)
    yield train("unary", out, int(args.iterations), 2 if drawn else 1,
                *(["--weights", args.weights] if args.weights else []))
    yield train("unary", control, further, args.rate,
                "--weights", os.path.join(out, "unary.npz"))
    yield train("joint", out, further, args.rate, "--also", control)
    yield search(os.path.join(control, "unary.npz"), control)
    if not args.labels:
        yield train("piecewise", out, min(60, further), args.rate / 5, "--also", control)
        yield train("piecewise", control, min(60, further), args.rate / 5)
        yield search(os.path.join(out, "joint.npz"), os.path.join(out, "joint_searched"))
        yield train("local", out, further, args.rate, "--also", control)


def difference(tables, a, b, draws=1000):
    """The mean over tables of IoU a - b; 95% interval by paired bootstrap over images."""
    rng, drawn = np.random.default_rng(0), []
    for table in tables:
        chosen = rng.integers(0, len(table[a]), (draws, len(table[a])))
        drawn.append([mean_iou(table[a][i].sum(axis=0)) - mean_iou(table[b][i].sum(axis=0))
                      for i in chosen])
    found = np.mean([mean_iou(table[a].sum(axis=0)) - mean_iou(table[b].sum(axis=0))
                     for table in tables])
    low, high = np.percentile(np.mean(drawn, axis=0), [2.5, 97.5])
    return f"{a} against {b}: {found:+.1f} ({low:+.1f} to {high:+.1f})"


def report(out, seeds):
    """All columns of each seed, and differences with 95% intervals, for each seed and over all."""
    tables = []
    for seed in seeds:
        table = {}
        for name, (stage, method) in COLUMNS.items():
            path = os.path.join(out, str(seed), f"{stage}_val.npz")
            if os.path.exists(path):
                with np.load(path) as counts:
                    table[name] = counts[method]
        tables.append(table)
        print(f"seed {seed}:", ", ".join(f"{name} {mean_iou(each.sum(axis=0)):.1f}"
                                         for name, each in table.items()))
    for a, b in PAIRS:
        there = {seed: table for seed, table in zip(seeds, tables) if {a, b} <= table.keys()}
        for seed, table in there.items():
            print(f"seed {seed}: {difference([table], a, b)}")
        if there:
            print(f"{len(there)} seeds: {difference([*there.values()], a, b)}")


def main(arguments=None):
    args = parse_arguments(arguments)
    began = time.monotonic()
    left = []
    for seed in args.seeds:
        if args.voc == "drawn":
            toy.draw(os.path.join(args.out, f"drawn_{seed}"), n_train=2400, n_val=400,
                     seed=100 + seed)
        left += [each for path, each in commands(args, seed)
                 if not os.path.exists(path)]
    print("left to do:", *(f"python run_voc.py {' '.join(each)}" for each in left), sep="\n  ")
    for command in left:
        print(f"\n[{time.monotonic() - began:.0f} s] python run_voc.py {' '.join(command)}",
              flush=True)
        code = run_voc.main(command)
        if code:
            return code
    report(args.out, args.seeds)
    print(f"[{time.monotonic() - began:.0f} s] done: see table.txt, curves.png and panels in "
          f"{', '.join(os.path.join(args.out, str(seed)) for seed in args.seeds)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
