"""Files are written beside and renamed, so that no failed write loses what was there before."""
import contextlib
import os


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


def reason(error):
    """The text of an exception on one line."""
    return " ".join(str(error).split()) or type(error).__name__
