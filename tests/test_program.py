"""What the command lines share: numbers of options, exit codes, one line on stderr, signals."""
import argparse
import os
import signal
import subprocess
import sys

import pytest

from minicrf.programs import program

whole = program.number("a whole number from 1 to 9", lambda x: 1 <= x <= 9, int)


@pytest.mark.parametrize("text", ["0", "10", "1.5", "x", "", "nan", "9" * 5000])
def test_a_number_out_of_range_is_named_shortened(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected a whole number from") as error:
        whole(text)
    assert len(str(error.value)) < 200
    assert whole("9") == 9


@pytest.mark.parametrize("error, code, words", [
    (None, 0, ""), (ValueError("a.png: found x"), 2, "a.png: found x"),
    (FloatingPointError("found loss nan"), 2, "found loss nan"),
    (MemoryError("8 EiB"), 2, "found too little memory (8 EiB)"),
    (PermissionError(13, "Permission denied", "a.png"), 2, "a.png: found Permission denied"),
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
import os, signal, sys, time
from minicrf.programs.program import run_program, undisturbed
def main():
    {}
sys.exit(run_program("name", main))
"""


def run(body, **options):
    return subprocess.run([sys.executable, "-c", RUN.format(body)], stderr=subprocess.PIPE,
                          text=True, timeout=60, **options)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_waits_until_the_step_is_done(name):
    done = run(f"""
    with undisturbed():
        os.kill(os.getpid(), signal.{name})
        print("done", flush=True)
    print("not reached", flush=True)""", stdout=subprocess.PIPE)
    assert done.stdout == "done\n" and done.returncode == 130
    assert done.stderr == "name: stopped; what was written before is kept\n"


@pytest.mark.parametrize("flush", [True, False])
def test_a_reader_of_the_output_that_is_gone_ends_in_one_line(flush):
    reader, writer = os.pipe()
    os.close(reader)
    done = run(f"print('x', flush={flush})", stdout=writer)
    os.close(writer)
    assert done.returncode == 2
    assert done.stderr == ("name: stopped, as nobody reads its output; what was written before is "
                           "kept\n")


def test_handlers_are_as_before_after_a_step():
    before = signal.getsignal(signal.SIGINT)
    with program.undisturbed():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
