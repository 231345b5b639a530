"""Checkpoints: single .npz files with parameters, momentum and what a run needs to go on.

Keys: the network's own (`conv1_1_w` ... `fc8_b`, `mean`), `crf_w`, `crf_log_sigma_...`, momentum as
`velocity_KEY`, and `info`, a JSON text.  Written beside and renamed; read without pickle.
"""
import contextlib
import json
import os

import numpy as np

from . import __version__, vgg, weights
from .arrays import array_module, to_host
from .densecrf import DenseCRF

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


@contextlib.contextmanager
def replacing(path, mode="w", newline=None):
    """A file to write into that takes the place of `path` once it is whole.

    Raises OSError, naming the file; an interrupted or failed write leaves the earlier file whole.
    """
    try:
        with open(f"{path}.tmp", mode, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(f"{path}.tmp")               # a full disk needs the space
        raise OSError(f"{path}: could not be written ({error.strerror}); what it held before is "
                      "untouched") from None


def read(path):
    """(arrays, info) of a checkpoint.  Raises ValueError or OSError with one line."""
    arrays = weights.read_npz(path)
    try:
        info = json.loads(str(arrays.pop("info")))
        sound = all(isinstance(info[key], kind) for key, kind in INFO.items()) and "mean" in arrays
    except (KeyError, ValueError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise ValueError(f"{path}: found no training state, expected a checkpoint of this "
                         "project (for bare ImageNet weights use --stage unary)")
    if info["version"].split(".")[0] != __version__.split(".")[0]:
        raise ValueError(f"{path}: found version {info['version']}, expected {__version__}")
    arrays.setdefault("scale", np.array(1.0))
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

    Raises ValueError where its parameters are no finite vectors.
    """
    if "crf_w" not in arrays:
        return None
    for key in [key for key in arrays if key.startswith("crf_")]:
        if not (arrays[key].dtype == np.float64 and arrays[key].ndim == 1
                and np.isfinite(arrays[key]).all()):
            raise ValueError(f"{path}: {key}: found {arrays[key].dtype} of shape "
                             f"{arrays[key].shape}, expected finite float64 in one dimension")
    sigmas = {f"sigma_{kernel}": np.exp(arrays[f"crf_log_sigma_{kernel}"])
              if f"crf_log_sigma_{kernel}" in arrays else None
              for kernel in ("position", "bilateral")}
    try:
        crf = DenseCRF(len(info["classes"]), w=arrays["crf_w"], **sigmas)
        for key, p in crf.params.items():
            p[...] = arrays[f"crf_{key}"]          # to the bit: log(exp(x)) may differ from x
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return crf


def load_velocity(path, arrays, optimiser):
    """Restore the optimiser's momentum.  Raises ValueError where the checkpoint has none."""
    for key, v in optimiser.velocity.items():
        values = arrays.get(f"velocity_{key}")
        if values is None or values.shape != v.shape:
            raise ValueError(f"{path}: found no momentum for {key} of shape {v.shape}, expected a "
                             "checkpoint that a training run left")
        v[...] = array_module(v).asarray(values)
