"""The unary network beside its twin in PyTorch, trained alike: losses and mean IoU side by side.

    python tests/evidence/twin.py PATH/TO/VOC2012 --net tiny --batch-size 16 --iterations 200

Both start from the same numbers and see the same batches; the twin has PyTorch's convolutions,
pools, bilinear upsampling, cross entropy, automatic differentiation and SGD.  Rounding apart, they
should do the same.  (Dropout draws other masks: `--net tiny` has none.)
"""
import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import run_voc   # noqa: E402, before NumPy: it settles the threads of the matrix library
import numpy as np   # noqa: E402
import torch   # noqa: E402
from benchmark import peer_output   # noqa: E402
from minicrf import training   # noqa: E402
from minicrf.data import loading   # noqa: E402
from minicrf.losses import VOID   # noqa: E402
from minicrf.results import evaluation   # noqa: E402

F = torch.nn.functional


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("voc", metavar="PATH/TO/VOC2012")
    add("--sbd")
    add("--net", default="tiny")
    add("--weights", help="ImageNet weights")
    add("--batch-size", type=int, default=16)
    add("--rate", type=float, default=1.)
    add("--iterations", type=int, default=200)
    add("--evaluate-images", type=int, help="of the validation list, the first (default: all)")
    add("--seed", type=int, default=0)
    return parser.parse_args()


def twin_loss(net, params, images, truths):
    """Eq. 6 as training takes it: each image's mean over its labelled pixels, their mean."""
    scores, losses = peer_output(net, params, images, True), []
    for f, truth in zip(scores, truths):
        places = []                              # x, then y, of the pixels in grid_sample's units
        for pixels, cells in zip(truth.shape[::-1], scores.shape[:1:-1]):
            x = (np.arange(pixels) + 0.5) * net.input_size / pixels - 0.5
            places.append(2 * (x - net.upsample.centre) / net.upsample.step / (cells - 1) - 1)
        grid = np.stack(np.meshgrid(*places), axis=-1).astype(np.float32)                # (H, W, 2)
        f = F.grid_sample(f[None], torch.from_numpy(grid[None]), padding_mode="border",
                          align_corners=True)                            # (1, L, H, W)
        losses.append(F.cross_entropy(f, torch.from_numpy(truth[None].astype(np.int64)),
                                      ignore_index=VOID))
    return sum(losses) / len(losses)


def main():
    args = parse_arguments()
    data = loading.DataSet(args.voc, args.sbd)
    model, fresh = run_voc.start_model(args, data, args.weights, "unary", "cpu")
    ours = training.optimizer(model, "unary", fresh, rate=args.rate)
    params = {key: torch.tensor(p, requires_grad=True) for key, p in model.net.params.items()}
    theirs = torch.optim.SGD([{"params": [p], "lr": ours.rates[key],
                               "weight_decay": ours.decays[key]}
                              for key, p in params.items()], momentum=0.9)
    batches = loading.batches(data, args.batch_size, args.seed, model.resized)
    recent = []
    for iteration in range(1, args.iterations + 1):
        batch = next(batches)
        theirs.zero_grad()
        loss = twin_loss(model.net, params, torch.from_numpy(model.inputs([b[2] for b in batch])),
                         [b[1] for b in batch])
        loss.backward()
        theirs.step()
        recent.append((training.train_step(model, ours, batch, args.seed, iteration), loss.item()))
        if iteration in (1, 2, 5) or iteration % 20 == 0:
            mean = np.mean(recent, axis=0)
            print(f"{iteration}: loss since the last line {mean[0]:.5f}, PyTorch {mean[1]:.5f}")
            recent = []
    batches.close()
    mious = [evaluation.curve_point(model, data, args.evaluate_images)["miou"]]
    for key, p in model.net.params.items():
        p[...] = params[key].detach().numpy()
    mious.append(evaluation.curve_point(model, data, args.evaluate_images)["miou"])
    print(f"mean IoU {mious[0]:.2f}, PyTorch {mious[1]:.2f}")


if __name__ == "__main__":
    main()
