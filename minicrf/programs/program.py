"""What command lines share: options, errors in one line, how they stop, one run a folder."""
import argparse
import contextlib
import glob
import os
import shutil
import signal
import sys

from ..arrays import out_of_memory

try:
    import fcntl
except ImportError:                     # Windows: no locks
    fcntl = None

SIGNALS = (signal.SIGINT, signal.SIGTERM)          # Ctrl-C; what a scheduler sends


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, where argparse would print the usage as well."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists all options)\n")


def number(least, most, kind=float):
    """An argparse type for numbers in a range."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"found {text[:99]!r}, expected a {'whole ' * (kind is int)}number from {least:g} "
                f"to {most:g}")
        return value
    return parse


def path(text):
    """An argparse type for names of files and folders."""
    if not text:
        raise argparse.ArgumentTypeError("found an empty name, expected a file or folder")
    return text


WEIGHT, WIDTH = number(0, 1e6), number(0.001, 1e6)                           # of a kernel


def run_program(name, function, *arguments, too_little=None):
    """Run function(*arguments), which returns an exit code, and return that.

    A user's mistake ends in one line on stderr and code 2, Ctrl-C and SIGTERM in code 130.
    too_little: what to say when memory runs out.
    """
    for stream in (sys.stdout, sys.stderr):        # file names may hold what cannot be printed
        stream.reconfigure(errors="backslashreplace", line_buffering=True)   # logs tell at once
    for each in SIGNALS:
        signal.signal(each, signal.default_int_handler)
    code = 2
    try:
        return function(*arguments)
    except KeyboardInterrupt:
        error, code = "stopped; what was written before is kept", 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())   # Python flushes once more
        error = "stopped, as nobody reads its output; what was written before is kept"
    except (MemoryError, RuntimeError) as raised:
        if not out_of_memory(raised):
            raise
        error = too_little or f"found too little memory ({raised})"
    except (ValueError, OSError, FloatingPointError) as raised:
        error = raised
        if isinstance(raised, OSError) and raised.filename:      # as the system says it
            error = f"{raised.filename}: {raised.strerror}"
    print(f"{name}: {error}", file=sys.stderr)
    return code


@contextlib.contextmanager
def undisturbed():
    """Ctrl-C and SIGTERM wait until the block is done."""
    waiting = []
    before = {each: signal.signal(each, lambda *_: waiting.append(True)) for each in SIGNALS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    if waiting:
        raise KeyboardInterrupt


@contextlib.contextmanager
def locked(folder):
    """Keep other runs out of the output folder, which is made if need be, while the block runs.

    The lock ends with the process, however that ends.  What killed runs were writing is removed.
    Raises OSError if another run is at work there, or nothing can be written into the folder.
    """
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "lock"), "a") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"--out: found another run at work in {folder}; expected another "
                          "folder, or to wait until it ends") from None
        except OSError:                            # a file system without locks
            pass
        for place in ("", "panels"):
            for left in glob.glob(os.path.join(glob.escape(folder), place, ".minicrf-*")):
                shutil.rmtree(left) if os.path.isdir(left) else os.remove(left)
        yield
