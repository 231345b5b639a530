"""NumPy or CuPy: chosen from the argument, in one file."""
import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import scipy.sparse

import minicrf
from minicrf import arrays
from minicrf.arrays import array_module, sparse_module, to_device, to_host
from minicrf.programs.gpu import gpu_available

needs_gpu = pytest.mark.skipif(not gpu_available(), reason="no CUDA device with cupy")


@pytest.mark.parametrize("x", [np.ones(3), np.float32(1), np.zeros((0, 2), np.uint8)])
def test_numpy_arrays_belong_to_numpy(x):
    assert array_module(x) is np
    assert sparse_module(x) is scipy.sparse


def test_everything_works_without_cupy(monkeypatch):
    monkeypatch.setattr(arrays, "cupy", None)
    x = np.arange(3.0)
    assert array_module(x) is np and sparse_module(x) is scipy.sparse
    assert gpu_available() is False
    with pytest.raises(ValueError, match="found 'gpu', but cupy is not installed"):
        to_device(x, "gpu")


def test_cpu_arrays_are_not_copied():
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert to_host(x) is x and to_device(x, "cpu") is x
    assert to_device([1, 2], "cpu").tolist() == [1, 2]                   # but lists become arrays


@pytest.mark.parametrize("device", ["cuda", "GPU", "", None, 0])
def test_unknown_device_is_named(device):
    with pytest.raises(ValueError) as error:
        to_device(np.ones(2), device)
    assert str(error.value) == f"device: found {device!r}, expected 'cpu' or 'gpu'"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_has_threads_of_its_own():
    """As workers of multiprocessing are on Linux: with the parent's they would wait for ever."""
    script = """
import os, sys, warnings
import numpy as np
from minicrf import DenseCRF
warnings.simplefilter("ignore")          # Python's own, that a process with threads forks
rng = np.random.default_rng(0)
image = rng.integers(0, 256, (160, 160, 3), dtype=np.uint8)
refine = lambda: DenseCRF(3).forward(rng.standard_normal(image.shape), image)
refine()
child = os.fork()
if child == 0:
    refine()
    os._exit(7)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    folder = pathlib.Path(minicrf.__file__).parent.parent
    process = subprocess.Popen([sys.executable, "-c", script], cwd=folder, start_new_session=True)
    try:
        assert process.wait(timeout=60) == 7
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)       # the child as well


def test_for_each_shares_out_large_work_alone_and_may_be_nested(monkeypatch):
    """A pool of two, both busy: what they hand out themselves nobody else is there to do."""
    monkeypatch.setattr(arrays, "POOL", arrays.POOL)                   # put back in the end
    arrays._new_pool(2)
    small, large = np.zeros(1), np.zeros(arrays.SMALL + 1)

    def thread(_):
        return threading.get_ident()

    def nested(_):
        return arrays.for_each(thread, range(3), large), thread(None)

    assert arrays.for_each(lambda i: i * i, range(5), large) == [0, 1, 4, 9, 16]
    assert set(arrays.for_each(thread, range(5), small)) == {thread(None)}
    for inner, outer in arrays.for_each(nested, range(4), large):
        assert set(inner) == {outer} and outer != thread(None)


def test_an_error_in_a_thread_is_raised():
    with pytest.raises(ZeroDivisionError):
        arrays.for_each(lambda i: 1 // i, range(3), np.zeros(arrays.SMALL + 1))


@pytest.mark.parametrize("n", [1, arrays.BLOCK - 1, arrays.BLOCK, arrays.BLOCK + 1])
def test_blocks_are_all_rows_once_and_none_is_too_large(n):
    rows = np.arange(n)
    found = [rows[block] for block in arrays.blocks(n, rows)]
    np.testing.assert_array_equal(np.concatenate(found), rows)
    assert max(map(len, found)) <= arrays.BLOCK


def test_row_sums():
    x = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)
    np.testing.assert_allclose(arrays.row_sums(x), x.sum(axis=-1), rtol=1e-5)
    assert arrays.row_sums(x).dtype == np.float32


@needs_gpu
def test_to_the_gpu_and_back():
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    there = to_device(x, "gpu")
    assert array_module(there) is not np and sparse_module(there) is not scipy.sparse
    assert there.dtype == x.dtype and to_device(there, "gpu") is there
    assert np.array_equal(to_host(there), x)
    assert np.array_equal(to_device(there, "cpu"), x)
