"""What the command lines share: numbers of options, exit codes, one line on stderr, signals."""
import argparse
import signal
import subprocess
import sys

import pytest

from minicrf.programs import gpu, program


@pytest.mark.parametrize("kind, text", [
    *((int, text) for text in ("0", "10", "1.5", "x", "", "9" * 5000)),
    *((float, text) for text in ("0.9", "x", "nan", "inf", "1e999"))])
def test_a_number_out_of_range_is_named_shortened(kind, text):
    expected = f"expected a {'whole number' if kind is int else 'number'} from 1 to 9"
    with pytest.raises(argparse.ArgumentTypeError, match=expected) as error:
        program.number(1, 9, kind)(text)
    assert len(str(error.value)) < 200
    assert program.number(1, 9, kind)("9") == 9


@pytest.mark.parametrize("error, code, words", [
    (None, 0, ""), (ValueError("a.png: found x"), 2, "a.png: found x"),
    (FloatingPointError("found loss nan"), 2, "found loss nan"),
    (MemoryError("8 EiB"), 2, "found too little memory (8 EiB)"),
    (PermissionError(13, "Permission denied", "a.png"), 2, "a.png: Permission denied"),
    (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), 2, "found too little memory (CUBLAS_STATUS"),
    (RuntimeError("CUSPARSE_STATUS_INSUFFICIENT_RESOURCES"), 2, "found too little memory (CUSP"),
    (KeyboardInterrupt(), 130, "stopped")])
def test_errors_end_in_one_line_and_a_code(capsys, error, code, words):
    def function():
        if error:
            raise error
        return 0

    assert program.run_program("name", function) == code
    shown = capsys.readouterr().err
    assert shown.startswith(f"name: {words}") and shown.count("\n") == 1 if error else shown == ""


def test_an_error_of_the_programs_own_is_not_hidden():
    with pytest.raises(RuntimeError, match="a bug"):
        program.run_program("name", lambda: (_ for _ in ()).throw(RuntimeError("a bug")))


RUN = """
import os, signal, sys
from minicrf.programs.program import run_program, undisturbed
def main():
    with undisturbed():
        os.kill(os.getpid(), signal.NAME)
        print("done")
    print("not reached")
sys.exit(run_program("name", main))
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_waits_until_the_step_is_done(name):
    done = subprocess.run([sys.executable, "-c", RUN.replace("NAME", name)], capture_output=True,
                          text=True, timeout=60)
    assert done.stdout == "done\n" and done.returncode == 130
    assert done.stderr == "name: stopped; what was written before is kept\n"


def test_handlers_are_as_before_after_a_step():
    before = signal.getsignal(signal.SIGINT)
    with program.undisturbed():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


def test_a_gpu_where_there_is_none_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr(gpu.arrays, "cupy", None)
    assert gpu.choose_device("auto") == gpu.choose_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="--device: found gpu, but cupy is not installed; expec"):
        gpu.choose_device("gpu")
