"""Files: written beside and renamed, read without running anything in them."""
import contextlib
import json
import os
import secrets

import numpy as np


@contextlib.contextmanager
def replacing(path, mode="w"):
    """A file to write into, under a random name, that takes the place of `path` once it is whole.

    Raises OSError, naming the file; an interrupted or failed write leaves the earlier file whole.
    """
    beside = os.path.join(os.path.dirname(path), f".minicrf-{secrets.token_hex(8)}.tmp")
    try:
        with open(beside, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise OSError(f"{path}: could not be written ({error.strerror}); what it held before is "
                      "untouched") from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(beside)                      # a full disk needs the space


def read_npz(path):
    """All arrays of a .npz file.  Raises ValueError with one line."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    except Exception as error:      # zipfile, zlib and numpy raise a dozen kinds for broken files
        raise ValueError(f"{path}: not a readable .npz file: {reason(error)}") from None


def save_crf(path, crf, options):
    """Write crf.params and the options so named into an .npz file.  Raises OSError, naming it."""
    options = {name: getattr(crf, name) for name in options}
    text = json.dumps(options, default=lambda number: number.item())         # of NumPy
    with replacing(path, "wb") as file:
        np.savez(file, options=text, **crf.params)


def load_crf(path, build):
    """The CRF in a file of `save_crf`, as build(options, params) makes it, with just these params.

    Raises ValueError or OSError with one line.
    """
    params = read_npz(path)
    try:
        crf = build(json.loads(str(params.pop("options"))), params)
        for name, p in crf.params.items():
            p[...] = params[name]                # not what exp and log have rounded
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: no CRF of this class in it ({reason(error)}); load reads what "
                         "the same class' save wrote") from None
    return crf


def reason(error):
    """The text of an exception on one line."""
    return " ".join(str(error).split()) or type(error).__name__
