"""`python -m minicrf.gradcheck`: its table, its bugs; that each is caught: test_mutations.py."""
import re
import subprocess
import sys

import numpy as np
import pytest

from minicrf import exercises, gradcheck, losses


NAMES = [name for bugs in exercises.BUGS.values() for name in bugs]


def test_everything_passes_and_every_parameter_is_in_the_table(capsys):
    assert gradcheck.main([]) == 0
    table = capsys.readouterr().out
    assert "FAIL" not in table and "0 failed" in table
    for name in ("Conv2d 3x3: dx", "Conv2d 3x3: dw", "Conv2d 3x3: db", "ReLU: dx", "Dropout: dx",
                 "BilinearUpsample: dx", "softmax_loss: dz", "exact: dscores", "exact: dw",
                 "exact: dlog_sigma_position", "exact: dlog_sigma_bilateral", "matrices: dw",
                 "matrices: dlog_sigma_position", "damped: dscores", "damped: dw",
                 "damped: dlog_sigma_bilateral", "damped: dscores from dq", "KernelGradient, matrix: dW",
                 "joint training"):
        assert re.search(rf"{name}.*\d+ .*e-\d\d +pass", table), name


def test_bug_names_are_unique():
    assert len(set(NAMES)) == len(NAMES) >= 20


def test_break_shows_which_row_fails(capsys, monkeypatch):
    monkeypatch.setattr(gradcheck.run, "__defaults__", ((gradcheck.check_losses,),))
    assert gradcheck.main(["--break", "loss-truth-dropped"]) == 1
    shown = capsys.readouterr().out
    assert re.search(r"softmax_loss: dz +24 .*FAIL", shown) and "1 failed" in shown
    assert "q[pixels, y] -= 1 -> pass" in shown


def test_a_row_of_nan_fails(capsys):
    nan = np.full(3, float("nan"))
    assert gradcheck.run([lambda: iter([("row", nan, nan)])]) == ["row"]


def test_a_bug_reaches_those_who_imported_the_function_before():
    imported, kept = losses.softmax_loss, losses.softmax_loss.__code__
    z, y = np.zeros((2, 2)), np.array([0, 1])
    right = imported(z, y)[1]
    with exercises.broken("loss-truth-dropped"):
        assert not np.array_equal(imported(z, y)[1], right)
    assert np.array_equal(imported(z, y)[1], right) and imported.__code__ is kept


def test_a_bug_whose_line_has_changed_is_refused(monkeypatch):
    monkeypatch.setitem(exercises.BUGS, "losses.softmax_loss", {"stale": ("no such text", "")})
    with pytest.raises(ValueError, match="found 'no such text' 0 times in losses.softmax_loss"):
        with exercises.broken("stale"):
            pass


def test_help_lists_the_bugs_and_runs_without_a_warning():
    command = [sys.executable, "-W", "error", "-m", "minicrf.gradcheck", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert all(name in done.stdout for name in NAMES)
