"""What the programs ask about a GPU: whether it works, its memory, its rounding."""
import functools
import os

from .. import arrays
from ..arrays import sparse_module


def gpu_available():
    """Whether cupy is installed and finds a GPU on which it works."""
    return arrays.cupy is not None and not gpu_failure()


def gpu_failure():
    """Why cupy cannot use a GPU, in one line; "" if it can, and where cupy is not installed."""
    return _failure(arrays.cupy) if arrays.cupy else ""


@functools.cache
def _failure(cupy):
    """Tries each kind of work once, as cupy imports without driver and libraries, too."""
    try:
        x = cupy.ones((2, 2))            # float64: for float32 CuPy would settle TF32 already
        one = sparse_module(x).csr_matrix((x[0], cupy.arange(2), cupy.arange(3)), shape=(2, 2))
        float((one @ x + x @ x).sum())
        return ""
    except Exception as error:           # of any of CUDA's libraries
        return f"{type(error).__name__}: {error}".splitlines()[0]


def use_tf32(allowed):
    """Let float32 matrix products on a GPU round their factors to TF32, 10 bits, or not.

    Call it before the first product, when CuPy looks.  `arrays.product` never rounds so.
    """
    os.environ["CUPY_TF32"] = "1" if allowed else "0"


def peak_memory():
    """The most bytes that CuPy has held on the GPU, as its pool keeps them; 0 without a GPU."""
    return arrays.cupy.get_default_memory_pool().total_bytes() if gpu_available() else 0
