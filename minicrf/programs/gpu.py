"""What the programs ask of a GPU: whether there is one, its memory, its rounding."""
import functools
import os

from .. import arrays
from ..arrays import sparse_module


def gpu_available():
    """True where cupy is installed and finds a CUDA device that does what it is asked for."""
    return arrays.cupy is not None and not gpu_failure()


def gpu_failure():
    """What keeps cupy from using a GPU, in one line; "" where nothing does, or there is no cupy."""
    return _failure(arrays.cupy) if arrays.cupy else ""


@functools.cache
def _failure(cupy):
    """Tries each kind of work once: cupy, once imported, may find neither driver nor libraries."""
    try:
        x = cupy.ones((2, 2))            # float64: for float32 CuPy would settle TF32 already
        one = sparse_module(x).csr_matrix((x[0], cupy.arange(2), cupy.arange(3)), shape=(2, 2))
        float((one @ x + x @ x).sum())
        return ""
    except Exception as error:           # of any of CUDA's libraries
        return f"{type(error).__name__}: {error}".splitlines()[0]


def use_tf32(allowed):
    """Whether float32 matrix products on a GPU may round their factors to TF32, 10 bits.

    To be called before the first one, which is when CuPy looks.  `product` never does.
    """
    os.environ["CUPY_TF32"] = "1" if allowed else "0"


def peak_memory():
    """The most bytes that CuPy's pool has held on the GPU, which it keeps; 0 without a GPU."""
    return arrays.cupy.get_default_memory_pool().total_bytes() if gpu_available() else 0
