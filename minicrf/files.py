"""Files: written beside and renamed, one run to a folder."""
import contextlib
import glob
import os
import secrets
import shutil

import numpy as np

try:
    import fcntl
except ImportError:                     # Windows: no locks
    fcntl = None


@contextlib.contextmanager
def replacing(path, mode="w", newline=None):
    """A file to write into that takes the place of `path` once it is whole.

    It is a new one, of a name that nobody has.  Raises OSError, naming the file; an interrupted or
    failed write leaves the earlier file whole.
    """
    beside = os.path.join(os.path.dirname(path), f".minicrf-{secrets.token_hex(8)}.tmp")
    try:
        with open(beside, mode.replace("w", "x"), newline=newline) as file:
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
            return {key: np.asarray(archive[key]) for key in archive.files}
    except Exception as error:      # zipfile, zlib and numpy raise a dozen kinds for broken files
        raise ValueError(f"{path}: not a readable .npz file: {reason(error)}") from None


@contextlib.contextmanager
def locked(folder):
    """While this context lasts, no other run gets the output folder; made where there is none.

    However this one ends, the system lets the folder go.  Clears what killed runs were writing.
    Raises OSError where another run has it, or nothing can be written into it.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        file = open(os.path.join(folder, "lock"), "a")
    except OSError as error:
        raise OSError(f"--out: found {folder} ({error.strerror}), expected a folder to write "
                      "into") from None
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(f"--out: found another run at work in {folder}; expected another folder, or "
                      "to wait until it ends") from None
    except OSError:                                # a file system without locks
        pass
    with file:
        for place in ("", "panels"):
            for left in glob.glob(os.path.join(glob.escape(folder), place, ".minicrf-*")):
                shutil.rmtree(left) if os.path.isdir(left) else os.remove(left)
        yield


def reason(error):
    """The text of an exception on one line."""
    return " ".join(str(error).split()) or type(error).__name__
