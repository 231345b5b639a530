import pathlib
import sys

import pytest

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "evidence")]                # run_voc.py, scripts

import run_voc   # noqa: E402, F401  before NumPy: it says how many threads products have
from minicrf.data import toy   # noqa: E402


@pytest.fixture(autouse=True, scope="session")
def programs_run_on_the_cpu():
    """What tests compare to the bit a GPU adds up in another order each time."""
    with pytest.MonkeyPatch.context() as patch:
        for program in ("run_voc", "minicrf.programs.refine"):
            patch.setattr(f"{program}.choose_device", lambda wanted: "cpu")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")           # of processes that tests start
        yield


@pytest.fixture(scope="session")
def toy_set(tmp_path_factory):
    """Four training and two validation pictures, small ones."""
    root = tmp_path_factory.mktemp("toy") / "set"
    return toy.draw(root, n_train=4, n_val=2, width=(30, 40), height=(24, 32))
