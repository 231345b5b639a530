"""What may end a run: signals, kills, full disks, broken files, a second run; what is left then.

Whatever it is, a run that resumes ends as if undisturbed, to the bit.
"""
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

import run_voc
from minicrf.results import checkpoints, logs
from minicrf.saving import read_npz

resource = pytest.importorskip("resource", reason="signals and limits of a process are Unix's")
PROGRAM = pathlib.Path(run_voc.__file__)
OPTIONS = ["--net", "tiny", "--batch-size", "2", "--iterations", "4", "--evaluate-every", "2",
           "--rate", "0.1", "--device", "cpu"]


def options(toy_set, out, *more):
    return ["--voc", str(toy_set), "--out", str(out), *OPTIONS, *more]


@pytest.fixture(scope="module")
def whole(toy_set, tmp_path_factory):
    """The output folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    assert run_voc.main(options(toy_set, out)) == 0
    return out


def assert_as_if_undisturbed(out, whole):
    """Every array of every checkpoint to the bit, the log and the results to the letter."""
    assert not list(out.glob("**/.minicrf-*"))
    for path in whole.glob("*.npz"):
        expected, found = read_npz(path), read_npz(out / path.name)
        assert expected.keys() == found.keys()
        for key in expected:
            if key != "info":                      # tells the command line, --resume in it
                assert np.array_equal(expected[key], found[key]), (path.name, key)
    for name in ("log.csv", "results.json", "table.txt"):
        assert (out / name).read_text() == (whole / name).read_text(), name


def run(arguments, **more):
    return subprocess.run([sys.executable, PROGRAM, *arguments], text=True, timeout=300,
                          **{"capture_output": True, **more})


def resume(toy_set, out, whole):
    done = run(options(toy_set, out, "--resume"))
    assert done.returncode == 0, done.stderr
    assert_as_if_undisturbed(out, whole)


def one_line(error, *words):
    assert error.count("\n") == 1 and error.startswith("run_voc.py: "), error
    assert all(word in error for word in words), error


# The program, with a signal to itself before or after the n-th call of os.fsync or os.replace
SUICIDE = """
import os, signal, sys
import run_voc
name, number, when, signum = sys.argv[1:5]
real, calls = getattr(os, name), 0
def call(*arguments):
    global calls
    calls += 1
    if when == "after":
        real(*arguments)
    if calls == int(number):
        os.kill(os.getpid(), int(signum))
    if when == "before":
        real(*arguments)
setattr(os, name, call)
sys.exit(run_voc.main(sys.argv[5:]))
"""


def signalled(arguments, name, number, when, signum=signal.SIGKILL):
    """Runs the program, with a signal to itself; returns the finished process."""
    command = [sys.executable, "-c", SUICIDE, name, str(number), when, str(int(signum)), *arguments]
    return subprocess.run(command, cwd=PROGRAM.parent, capture_output=True, text=True, timeout=300)


def test_a_run_killed_in_three_writes_ends_as_if_undisturbed(toy_set, whole, tmp_path):
    arguments = options(toy_set, tmp_path, "--resume")
    for name, number, when in (("fsync", 3, "before"), ("replace", 2, "before"),
                               ("replace", 6, "after")):
        done = signalled(arguments, name, number, when)
        assert done.returncode == -signal.SIGKILL, done.stderr
    resume(toy_set, tmp_path, whole)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_end_in_one_line_and_130(toy_set, whole, tmp_path, signum):
    """In the first write of a checkpoint: the second attempt, on the way out, is the one kept."""
    stopped = signalled(options(toy_set, tmp_path), "fsync", 2, "before", signum)
    assert stopped.returncode == 130
    one_line(stopped.stderr, "stopped")
    assert "unary: saved after iteration 2; --resume continues" in stopped.stdout
    assert checkpoints.read(tmp_path / "unary.npz")[1]["iteration"] == 2
    resume(toy_set, tmp_path, whole)


def test_ctrl_c_in_a_step_saves_that_step(toy_set, whole, tmp_path, monkeypatch, capsys):
    real = run_voc.training.train_step

    def step(model, optimiser, batch, seed, iteration, *more):
        if iteration == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return real(model, optimiser, batch, seed, iteration, *more)

    with monkeypatch.context() as patch:
        patch.setattr(run_voc.training, "train_step", step)
        assert run_voc.main(options(toy_set, tmp_path)) == 130
    assert "unary: saved after iteration 3" in capsys.readouterr().out
    assert len(logs.read_log(tmp_path / "log.csv")) == 3
    resume(toy_set, tmp_path, whole)


def test_a_broken_picture_on_the_way_loses_no_iteration(toy_set, whole, tmp_path, monkeypatch,
                                                        capsys):
    real = run_voc.training.train_step
    root, out = shutil.copytree(toy_set, tmp_path / "set"), tmp_path / "out"
    picture = root / "SegmentationClass" / "val_0001.png"
    kept = picture.read_bytes()

    def step(*arguments):
        picture.write_bytes(b"broken")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run_voc.training, "train_step", step)
        assert run_voc.main(options(root, out)) == 2
    one_line(capsys.readouterr().err, picture.name)
    saved = checkpoints.read(out / "unary.npz")[1]["iteration"]
    assert saved == len(logs.read_log(out / "log.csv")) == 2
    picture.write_bytes(kept)
    resume(root, out, whole)


def test_a_checkpoint_is_written_every_few_minutes_whatever_evaluate_every_says(
        toy_set, tmp_path, monkeypatch):
    assert 60 <= run_voc.SAVE_EVERY <= 600
    written = []
    monkeypatch.setattr(run_voc, "SAVE_EVERY", 0)
    monkeypatch.setattr(run_voc.checkpoints, "save",
                        lambda path, model, info, optimiser: written.append(info["iteration"]))
    arguments = options(toy_set, tmp_path, "--stage", "unary", "--evaluate-every", "9")
    assert run_voc.main(arguments) == 0
    assert written == [1, 2, 3, 4]


def test_a_run_whose_output_nobody_reads_is_saved(toy_set, whole, tmp_path):
    reader, writer = os.pipe()
    process = subprocess.Popen([sys.executable, PROGRAM, *options(toy_set, tmp_path)],
                               stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    os.read(reader, 10)
    os.close(reader)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 2
    one_line(error, "stopped, as nobody reads its output")
    resume(toy_set, tmp_path, whole)


def limited(size):
    """No file of this process may become larger: a write fails in the middle, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_run_out_of_space_keeps_the_earlier_checkpoint(toy_set, whole, tmp_path):
    earlier = (whole / "unary.npz").read_bytes()
    (tmp_path / "unary.npz").write_bytes(earlier)
    arguments = options(toy_set, tmp_path, "--resume", "--stage", "unary", "--iterations", "6")
    failed = run(arguments, preexec_fn=lambda: limited(len(earlier) - 1000))
    assert failed.returncode == 2
    one_line(failed.stderr, f"{tmp_path / 'unary.npz'}: could not be written (File too large)")
    assert (tmp_path / "unary.npz").read_bytes() == earlier
    assert not list(tmp_path.glob(".minicrf-*"))


def test_of_two_runs_in_one_folder_the_second_says_why_it_stops(toy_set, whole, tmp_path):
    first = subprocess.Popen([sys.executable, PROGRAM, *options(toy_set, tmp_path)],
                             stdout=subprocess.PIPE, text=True)
    first.stdout.readline()                        # it is at work
    second = run(options(toy_set, tmp_path))
    assert second.returncode == 2 and second.stdout == ""
    one_line(second.stderr, f"--out: found another run at work in {tmp_path}; expected another")
    first.communicate(timeout=300)
    assert first.returncode == 0
    assert_as_if_undisturbed(tmp_path, whole)
