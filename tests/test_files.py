"""Files are replaced whole or not at all; a folder is for one run."""
import os
import subprocess
import sys

import pytest

from minicrf import saving
from minicrf.programs import program


def test_a_file_is_replaced_once_it_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")
    with saving.replacing(path) as file:
        file.write("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after" and os.listdir(tmp_path) == ["a.txt"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_is_cut_short_leaves_the_earlier_file(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("before")
    with pytest.raises(type(error)) as raised:
        with saving.replacing(path) as file:
            file.write("half of ")
            raise error
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["a.txt"]
    if isinstance(error, OSError):
        assert str(raised.value) == (f"{path}: could not be written (No space left on device); "
                                     "what it held before is untouched")


LOCK = """
import sys
from minicrf.programs.program import locked
with locked(sys.argv[1]):
    pass
"""


def test_a_folder_is_for_one_run_at_a_time(tmp_path):
    out = tmp_path / "new" / "out"
    (out / "panels").mkdir(parents=True)
    for left in (out, out / "panels"):
        (left / ".minicrf-left.tmp").write_text("by a run that was killed")
        (left / ".minicrf-set").mkdir()
    with program.locked(out):
        assert not list(out.glob("**/.minicrf-*"))
        command = [sys.executable, "-c", LOCK, out]
        second = subprocess.run(command, capture_output=True, text=True)
        assert f"found another run at work in {out}; expected another folder" in second.stderr
    assert subprocess.run(command).returncode == 0
    assert sorted(os.listdir(out)) == ["lock", "panels"]


def test_a_folder_that_cannot_be_written_into_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", "/dev/null/runs"):
        with pytest.raises(OSError, match=str(out)):
            with program.locked(out):
                pass
