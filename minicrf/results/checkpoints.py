"""Checkpoints: single .npz files with parameters, momentum and what a run needs to go on.

Keys: the network's own (`conv1_1_w` ... `fc8_b`, `mean`), `crf_w`, `crf_log_sigma_...`, momentum as
`velocity_KEY`, and `info`, a JSON text.  Written beside and renamed; read without pickle.
"""
import json

import numpy as np

from .. import __version__, vgg
from ..arrays import array_module, to_host
from ..data import weights
from ..densecrf import DenseCRF
from ..meanfield import LARGEST_LOG_SIGMA
from ..files import replacing
from ..training import STAGES, Model

INFO = {"version": str, "preset": str, "stage": str, "iteration": int, "classes": list}


def save(path, model, info, optimiser=None):
    """Write everything a run needs to go on into one file.

    info: dict that JSON can hold (class names, seed, iteration ...); version and preset are added.
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
    arrays = weights.read_npz(path)
    try:
        info = json.loads(str(arrays.pop("info")))
        sound = (all(isinstance(info[key], kind) for key, kind in INFO.items())
                 and {"mean", "scale", "fc8_w"} <= arrays.keys() and info["iteration"] >= 0
                 and info["classes"] and all(isinstance(name, str) for name in info["classes"]))
    except (KeyError, ValueError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise ValueError(f"{path}: found no training state, expected a checkpoint of this "
                         "project (for bare ImageNet weights use --stage unary)")
    if info["version"].split(".")[0] != __version__.split(".")[0]:
        raise ValueError(f"{path}: found version {info['version']}, expected {__version__}")
    weights.check_numbers(path, arrays)
    return arrays, info


def load_net(path, arrays, info):
    """A network with a checkpoint's preset, classes and parameters.

    arrays, info: from read(path).  Raises ValueError where a layer is missing or has another shape.
    """
    if info["preset"] not in vgg.PRESETS:
        raise ValueError(f"{path}: found preset {info['preset']!r}, expected one of "
                         f"{', '.join(vgg.PRESETS)}")
    net = vgg.build(info["preset"], len(info["classes"]))
    missing = weights.fill(net, arrays, path)
    if missing:
        raise ValueError(f"{path}: found no {', '.join(missing)}, expected all layers")
    return net


def load_crf(path, arrays, info):
    """The DenseCRF of a checkpoint, or None where it was left by the unary stage.

    Raises ValueError where one of its parameters is missing, has another shape or is too large.
    """
    if "crf_w" not in arrays:
        return None
    crf = DenseCRF(len(info["classes"]))
    for key, p in crf.params.items():
        values = arrays.get(f"crf_{key}", np.zeros(0, np.int8))
        if (values.dtype, values.shape) != (p.dtype, p.shape):
            raise ValueError(f"{path}: crf_{key}: found {values.dtype} of shape {values.shape}, "
                             f"expected {p.dtype} of shape {p.shape}")
        largest = 1e30 if key == "w" else LARGEST_LOG_SIGMA
        if not abs(values).max() <= largest:
            raise ValueError(f"{path}: crf_{key}: found {values.tolist()}, expected numbers from "
                             f"{-largest:g} to {largest:g}")
        p[...] = values
    return crf


def load_velocity(path, arrays, optimiser):
    """Restore the optimiser's momentum.  Raises ValueError where the checkpoint has none."""
    for key, v in optimiser.velocity.items():
        values = arrays.get(f"velocity_{key}")
        if values is None or values.shape != v.shape:
            raise ValueError(f"{path}: found no momentum for {key} of shape {v.shape}, expected a "
                             "checkpoint that a training run left")
        v[...] = array_module(v).asarray(values)


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
    if info["stage"] not in STAGES or ("crf_w" in arrays) != (info["stage"] != "unary"):
        crf = "a" if "crf_w" in arrays else "no"
        raise ValueError(f"{path}: found stage {info['stage']!r} and {crf} CRF, expected one of "
                         f"{', '.join(STAGES)}; a CRF in all but the first")
    net = load_net(path, arrays, info)
    crf = load_crf(path, arrays, info)
    vgg.move(net, device)
    return Model(net, arrays["mean"], crf, device, arrays["scale"]), arrays, info
