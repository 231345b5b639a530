"""NumPy or CuPy: the one file that imports CuPy.

Every function of the package asks `array_module(x)` for the module its argument belongs to, so the
same source runs on both and arrays of both kinds can live in one process.  No global switch.
"""
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import scipy.sparse

try:
    import cupy
    import cupyx.scipy.sparse
except ImportError:
    cupy = None

SMALL = 2 ** 16         # elements: for less, handing work to a thread takes longer than the work
THREADS = min(4, os.cpu_count() or 1)
POOL = ThreadPoolExecutor(THREADS)
# run_voc.py tells OpenBLAS, NumPy's matrix library, to use one: threads of ours are better placed
BLAS_HAS_THREADS = os.environ.get("OPENBLAS_NUM_THREADS") != "1"


def _new_pool():
    global POOL
    POOL = ThreadPoolExecutor(THREADS)


if hasattr(os, "register_at_fork"):     # threads do not live on in a forked process
    os.register_at_fork(after_in_child=_new_pool)


def array_module(x):
    """The module, numpy or cupy, that made the array x."""
    return np if cupy is None else cupy.get_array_module(x)


def sparse_module(x):
    """The sparse matrices that go with the array x: scipy.sparse or cupyx.scipy.sparse."""
    return scipy.sparse if array_module(x) is np else cupyx.scipy.sparse


def for_each(function, items, x, products=False):
    """[function(item) for each item], where the work is on the array x: on the CPU in threads.

    No call may write what another one reads or writes: then the number of threads does not matter.
    Nor may it call for_each itself.  products: the work is matrix products, which go one by one
    where the matrix library has threads of its own: theirs and ours would get in each other's way.
    """
    one_by_one = array_module(x) is not np or products and BLAS_HAS_THREADS
    if not one_by_one and len(items) > 1 and x.size > SMALL:
        return list(POOL.map(function, items))
    return [function(item) for item in items]


def gpu_available():
    """True where cupy is installed and finds at least one CUDA device."""
    try:
        return cupy is not None and cupy.cuda.runtime.getDeviceCount() > 0
    except cupy.cuda.runtime.CUDARuntimeError:   # the driver is missing or too old
        return False


def to_device(x, device):
    """The array x (or nested list) on `device`, "cpu" or "gpu"; no copy where it is there already.

    Raises ValueError for another device name, or for "gpu" where there is none.
    """
    if device not in ("cpu", "gpu"):
        raise ValueError(f"device: found {device!r}, expected 'cpu' or 'gpu'")
    if device == "gpu" and not gpu_available():
        raise ValueError("device: found 'gpu', but no CUDA device with cupy is available")
    return to_host(x) if device == "cpu" else cupy.asarray(x)


def to_host(x):
    """The array x as a NumPy array; no copy where it is one already."""
    return np.asarray(x) if array_module(x) is np else cupy.asnumpy(x)


def use_tf32(allowed):
    """Whether float32 matrix products on a GPU may round their factors to TF32, 10 bits.

    To be called before the first one, which is when CuPy looks.
    """
    os.environ["CUPY_TF32"] = "1" if allowed else "0"


def peak_memory():
    """The most bytes that CuPy's pool has held on the GPU, which it keeps; 0 without a GPU."""
    return cupy.get_default_memory_pool().total_bytes() if gpu_available() else 0
