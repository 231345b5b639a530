"""Checkpoints: single .npz files with parameters, momentum and what a run needs to resume.

Keys: the network's own (`conv1_1_w` ... `fc8_b`, `mean`), `crf_w`, `crf_log_sigma_...`, momentum as
`velocity_KEY`, and `info`, a JSON text.  Written beside and renamed; read without pickle.
"""
import json
import os

import numpy as np

from .. import __version__, vgg
from ..arrays import array_module, to_host
from ..data import weights
from ..densecrf import DenseCRF
from ..localcrf import LocalCRF
from ..meanfield import LARGEST_LOG_SIGMA
from ..saving import read_npz, replacing
from ..training import STAGES, Model


def save(path, model, info, optimiser=None):
    """Write everything a run needs to resume into one file.

    info: a dict for JSON (class names, seed, iteration ...); version and preset are added.
    Raises OSError, naming the file; an interrupted or failed write leaves the earlier file whole.
    """
    arrays = {key: to_host(p) for key, p in model.net.params.items()}
    if model.crf is not None:
        arrays |= {f"crf_{key}": to_host(p) for key, p in model.crf.params.items()}
    if optimiser is not None:
        arrays |= {f"velocity_{key}": to_host(v) for key, v in optimiser.velocity.items()}
    info = {**info, "version": __version__, "preset": model.net.preset}
    arrays |= {"mean": model.mean, "scale": np.array(model.scale),
               "info": np.array(json.dumps(info))}
    with replacing(path, "wb") as file:
        np.savez(file, **arrays)


def read(path):
    """(arrays, info) of a checkpoint.  Raises ValueError or OSError with one line."""
    arrays = read_npz(path)
    try:
        info = json.loads(str(arrays.pop("info")))
        sound = (info["preset"] in vgg.PRESETS and info["stage"] in STAGES
                 and {"mean", "scale"} <= arrays.keys() and info["iteration"] >= 0
                 and arrays["fc8_b"].shape == (len(info["classes"]),)
                 and ("crf_w" in arrays) == (info["stage"] != "unary"))
        version = info["version"].split(".")[0]
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise ValueError(f"{path}: found no training state, so not a checkpoint of this project; "
                         "--stage unary takes bare ImageNet weights")
    if version != __version__.split(".")[0]:
        raise ValueError(f"{path}: found version {info['version']}, but this is {__version__}")
    weights.check_numbers(path, arrays)
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
    restore(path, arrays, net.params)
    vgg.move(net, device)
    return Model(net, arrays["mean"], load_crf(path, arrays, info), device,
                 arrays["scale"]), arrays, info


def load_crf(path, arrays, info):
    """The CRF of a checkpoint, a DenseCRF or a LocalCRF; None where the unary stage left it.

    Raises ValueError where one of its parameters is missing, has another shape or is too large.
    """
    if info["stage"] == "unary":
        return None
    L = len(info["classes"])
    matrices = arrays["crf_w"].ndim == 3
    crf = (LocalCRF(L) if info["stage"] == "local" else
           DenseCRF(L, w=np.zeros((2, L, L)) if matrices else (0, 0)))
    restore(path, arrays, crf.params, "crf_")
    for key, p in crf.params.items():
        largest = 1e6 if key == "w" else LARGEST_LOG_SIGMA
        if abs(p).max() > largest:
            raise ValueError(f"{path}: crf_{key}: found {p.tolist()}, expected numbers from "
                             f"{-largest:g} to {largest:g}")
    return crf


def restore(path, arrays, params, prefix=""):
    """Fill params from arrays; ValueError where one is missing or has another shape."""
    for key, p in params.items():
        values = arrays.get(prefix + key)
        if values is None or values.shape != p.shape:
            found = "nothing" if values is None else f"shape {values.shape}"
            raise ValueError(f"{path}: {prefix + key}: found {found}, expected shape {p.shape}")
        p[...] = array_module(p).asarray(values)


def resume(path, classes, device, settings):
    """(Model, arrays, info) of the checkpoint from which a run resumes.

    settings: the run's, as a dict; those that the checkpoint has as well must be equal, and its
    stage.
    """
    model, arrays, info = load_model(path, classes, device)
    if not isinstance(info.get("settings"), dict) or not isinstance(info.get("fresh"), list):
        raise ValueError(f"{path}: found no settings of a run to resume")
    found = {"stage": info["stage"], **info["settings"]}
    for name, value in settings.items():
        if name in found and found[name] != value:
            raise ValueError(f"{path}: found a run with {name} {found[name]}, expected "
                             f"{value}: --resume goes on with the same settings")
    return model, arrays, info


def present(out):
    """The checkpoints in an output folder by stage, in the order of training."""
    paths = {stage: os.path.join(out, f"{stage}.npz") for stage in STAGES}
    return {stage: path for stage, path in paths.items() if os.path.exists(path)}
