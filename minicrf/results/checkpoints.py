"""Checkpoints: single .npz files with parameters, momentum and what a run needs to resume.

Keys: the network's own (`conv1_1_w` ... `fc8_b`, `mean`), `crf_w`, `crf_log_sigma_...`, momentum as
`velocity_KEY`, and `info`, a JSON text.  Written beside and renamed; read without pickle.
"""
import json
import os

import numpy as np

from .. import __version__, vgg
from ..arrays import array_module, to_host
from ..densecrf import DenseCRF
from ..localcrf import LocalCRF
from ..saving import read_npz, replacing
from ..training import STAGES, Model


def save(path, model, info, optimiser=None):
    """Write everything a run needs to resume into one file.

    info: a dict for JSON (class names, seed, iteration ...); version and preset are added.
    Raises OSError, as `replacing` does.
    """
    arrays = {key: to_host(p) for key, p in model.net.params.items()}
    if model.crf is not None:
        arrays |= {f"crf_{key}": to_host(p) for key, p in model.crf.params.items()}
    if optimiser is not None:
        arrays |= {f"velocity_{key}": to_host(v) for key, v in optimiser.velocity.items()}
    info = {**info, "version": __version__, "preset": model.net.preset}
    with replacing(path, "wb") as file:
        np.savez(file, mean=model.mean, scale=model.scale, info=json.dumps(info), **arrays)


def read(path):
    """(arrays, info) of a checkpoint.  Raises ValueError or OSError with one line."""
    arrays = read_npz(path)
    if "info" not in arrays:
        raise ValueError(f"{path}: found no training state, so not a checkpoint of this project; "
                         "--stage unary takes bare ImageNet weights")
    info = json.loads(str(arrays.pop("info")))
    if info["version"].split(".")[0] != __version__.split(".")[0]:
        raise ValueError(f"{path}: found version {info['version']}, but this is {__version__}")
    return arrays, info


def load_model(path, classes=None, device="cpu"):
    """(Model, arrays, info) from a checkpoint; the model's CRF is None after the unary stage.

    classes: the class names it must have been trained for (None: any).  Raises ValueError or
    OSError with one line.
    """
    arrays, info = read(path)
    if classes is not None and info["classes"] != classes:
        raise ValueError(f"{path}: found a network for {len(info['classes'])} classes "
                         f"({', '.join(info['classes'][:3])} ...), expected the data set's "
                         f"{len(classes)} ({', '.join(classes[:3])} ...)")
    net = vgg.build(info["preset"], len(info["classes"]))
    restore(arrays, net.params)
    vgg.move(net, device)
    return Model(net, arrays["mean"], load_crf(arrays, info), device,
                 arrays["scale"]), arrays, info


def load_crf(arrays, info):
    """The CRF of a checkpoint, a DenseCRF or a LocalCRF; None where the unary stage left it."""
    if info["stage"] == "unary":
        return None
    kind = LocalCRF if info["stage"] == "local" else DenseCRF
    crf = kind(len(info["classes"]), w=arrays["crf_w"])
    restore(arrays, crf.params, "crf_")
    return crf


def restore(arrays, params, prefix=""):
    """Fill params from arrays."""
    for key, p in params.items():
        p[...] = array_module(p).asarray(arrays[prefix + key])


def resume(path, classes, device, settings):
    """(Model, arrays, info) of the checkpoint from which a run resumes.

    settings: the run's, as a dict; those that the checkpoint has as well must be equal.
    """
    model, arrays, info = load_model(path, classes, device)
    for name, value in info["settings"].items():
        if settings.get(name, value) != value:
            raise ValueError(f"{path}: found a run with {name} {value}, expected "
                             f"{settings[name]}: --resume needs the same settings")
    return model, arrays, info


def present(out):
    """The checkpoints in an output folder by stage, in the order of training."""
    paths = {stage: os.path.join(out, f"{stage}.npz") for stage in STAGES}
    return {stage: path for stage, path in paths.items() if os.path.exists(path)}
