"""The training loop."""
import os
import signal

import numpy as np

from ..training import check_step, train_step
from . import checkpoints, figures
from .logs import Log, Progress, read_log


@np.errstate(over="ignore", invalid="ignore")        # what is not finite is found in the loss
def fit(model, stage, optimiser, batches, validate, out, info, *, start, iterations, batch_size,
        micro_batch=None, drop=0.75, evaluate_every=50, images=""):
    """Train one stage from iteration `start` to `iterations`; True when it got there.

    batches: endless, as loading.batches; validate(): percent mean IoU by method, for the curve, on
    the validation images that `images` tells, such as "20/110".
    out: folder of log.csv, curves.png, STAGE.npz, the last state, and STAGE_best.npz, that of the
    best mean IoU seen; STAGE.npz of an earlier run becomes STAGE_previous.npz.
    info: dict kept in checkpoints, "seed" among it; sets "iteration", "best".
    drop: share of the iterations after which rates fall to a tenth.  Ctrl-C finishes the
    iteration, saves, and returns False.  Raises FloatingPointError where a step cannot be computed
    or its loss is not finite, with one line.
    """
    path = os.path.join(out, stage)
    earlier = start == 0 and os.path.exists(f"{path}.npz")
    log = Log(os.path.join(out, "log.csv"), model, stage, start)
    progress = Progress(stage, start, iterations, batch_size)
    stop = []
    previous = signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    try:
        for iteration in range(start + 1, iterations + 1):
            optimiser.scale = 0.1 if iteration > drop * iterations else 1.0
            batch = next(batches)
            try:
                loss = float(train_step(model, optimiser, batch, info["seed"], iteration,
                                        micro_batch))
                check_step(loss, optimiser.params)
            except ValueError as error:                  # also from the CRF: its scores, its sigmas
                raise FloatingPointError(
                    f"{stage}: iteration {iteration}: {error}; checkpoints written before are "
                    "kept; try a smaller --rate") from None
            miou = validate() if iteration % evaluate_every == 0 or iteration == iterations else {}
            curve = {"miou": list(miou.values())[-1], "miou_unary": miou["unary"],
                     "images": images} if miou else {}
            log.append(iteration, loss, optimiser.scale, **curve)
            note = ", ".join(f"{method} mean IoU {value:.2f}" for method, value in miou.items())
            progress.update(iteration, loss, note)
            info["iteration"] = iteration
            if miou or stop:
                if earlier:
                    os.replace(f"{path}.npz", f"{path}_previous.npz")
                    earlier = False
                if curve.get("miou", -1) > info.get("best", -1):
                    # the best state first: killed in between, a resumed run writes it again
                    info["best"] = curve["miou"]
                    checkpoints.save(f"{path}_best.npz", model, info)
                checkpoints.save(f"{path}.npz", model, info, optimiser)
            if miou:
                figures.curves(os.path.join(out, "curves.png"), read_log(log.path))
            if stop:
                return False
        return True
    finally:
        progress.bar.close()
        batches.close()
        signal.signal(signal.SIGINT, previous)
