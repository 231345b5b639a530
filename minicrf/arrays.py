"""NumPy or CuPy: the one file that imports CuPy.

Every function of the package asks `array_module(x)` for the module its argument belongs to, so the
same source runs on both and arrays of both kinds can live in one process.  No global switch.
"""
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import scipy.sparse

try:
    import cupy
    import cupyx.scipy.sparse
except ImportError:
    cupy = None

SMALL = 2 ** 16         # elements: for less, handing work to a thread takes longer than the work
PIECE_BYTES = 2 ** 21   # of what a thread pools or rectifies at a time: it stays in its cache
BLOCK = 2 ** 14         # rows that a thread works on at a time: few enough for its cache
THREADS = min(4, os.cpu_count() or 1)
WORKER = threading.local()              # tells a thread of the pool that it is one
# run_voc.py tells OpenBLAS, NumPy's matrix library, to use one: threads of ours are better placed
BLAS_HAS_THREADS = os.environ.get("OPENBLAS_NUM_THREADS") != "1"


def _begin_thread():
    WORKER.busy = True
    np.seterr(over="ignore", invalid="ignore")   # found by who uses the result


def _new_pool(threads=THREADS):
    global POOL
    POOL = ThreadPoolExecutor(threads, initializer=_begin_thread)


_new_pool()
if hasattr(os, "register_at_fork"):     # threads do not live on in a forked process
    os.register_at_fork(after_in_child=_new_pool)


def array_module(x):
    """The module, numpy or cupy, that made the array x."""
    return np if cupy is None else cupy.get_array_module(x)


def sparse_module(x):
    """The sparse matrices that go with the array x: scipy.sparse or cupyx.scipy.sparse."""
    return scipy.sparse if array_module(x) is np else cupyx.scipy.sparse


def for_each(function, items, x, work=None, products=False):
    """[function(item) for each item], where the work is on the array x: on the CPU in threads.

    work: elements to be worked on, those of x by default; a few are not worth a thread.
    products: the work is matrix products, which go one by one where the matrix library has threads
    of its own: theirs and ours would get in each other's way.

    No call may write what another one reads or writes: then the number of threads does not matter.
    A call of for_each within one of these threads does its work there.
    """
    alone = (array_module(x) is not np or (work or x.size) <= SMALL
             or products and BLAS_HAS_THREADS or getattr(WORKER, "busy", False) or len(items) == 1)
    return list(map(function, items) if alone else POOL.map(function, items))


def blocks(n, x):
    """Slices of n rows, one for each task of work on the array x: all at once on a GPU."""
    size = BLOCK if array_module(x) is np else n
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


class Rows:
    """An array whose rows are computed when they are read: [rows] for a slice of them, [:] for all.

    What is needed but once then never leaves a processor's cache, if `rowwise` reads it.
    """

    def __init__(self, shape, compute):
        self.shape, self.compute = shape, compute        # compute: a slice -> those rows

    def __getitem__(self, rows):
        return self.compute(rows)


def rowwise(function, out, *arrays):
    """function(*arrays), which treats each row by itself: (N, .) arrays -> (N, .), written to out.

    On the CPU by blocks of rows, in threads, and out may be one of the arrays; a GPU gives a new
    array.
    """
    if array_module(out) is not np:
        return function(*(x[:] for x in arrays))

    def one_block(rows):
        out[rows] = function(*(x[rows] for x in arrays))

    for_each(one_block, blocks(len(out), out), out, work=out.size * len(arrays))
    return out


def pieces(x):
    """Slices of x's first axis: megabytes each, to stay in the cache; all at once on a GPU."""
    each = len(x)
    if array_module(x) is np:
        each = max(1, PIECE_BYTES * len(x) // max(x.nbytes, 1))
    return [slice(start, start + each) for start in range(0, len(x), each)]


def row_sums(x):
    """Sums over the last axis, (..., L) -> (...)."""
    if array_module(x) is not np:        # --tf32 rounds the factors of a product
        return x.sum(axis=-1)
    return x @ np.ones(x.shape[-1], x.dtype)             # several times faster than .sum


def product(a, b):
    """a @ b, in b's dtype, where TF32 would do harm: --tf32 is meant for the network's layers.

    CuPy reads CUPY_TF32 once and then rounds the factors of every product of two float32 matrices;
    of float64 it rounds none.
    """
    if array_module(b) is np:
        return a @ b
    return (a.astype(np.float64) @ b).astype(b.dtype)


def row_maxima(x):
    """Maxima over the last axis, (..., L) -> (...): faster where that axis comes first."""
    xp = array_module(x)
    return xp.ascontiguousarray(xp.moveaxis(x, -1, 0)).max(axis=0)


def transposed(matrix):
    """A sparse matrix' transpose, ready for products with dense ones.

    SciPy's are fastest as they stand; CuPy's would add up in an order of their own each time.
    """
    if sparse_module(matrix.data) is scipy.sparse:
        return matrix.T
    matrix = matrix.T.tocsr()
    matrix.has_canonical_format = True      # as it is: else the first product would ask the device
    return matrix


def to_device(x, device):
    """The array x (or nested list) on `device`, "cpu" or "gpu"; no copy where it is there already.

    Raises ValueError for another device name, or for "gpu" without CuPy.
    """
    if device not in ("cpu", "gpu"):
        raise ValueError(f"device: found {device!r}, expected 'cpu' or 'gpu'")
    if device == "gpu" and cupy is None:
        raise ValueError("device: found 'gpu', but cupy is not installed")
    return to_host(x) if device == "cpu" else cupy.asarray(x)


def to_host(x):
    """The array x as a NumPy array; no copy where it is one already."""
    return np.asarray(x) if array_module(x) is np else cupy.asnumpy(x)


def out_of_memory(error):
    """Whether memory ran out: CUDA's libraries say so by RuntimeErrors of their own."""
    signs = "MemoryAllocation", "ALLOC_FAILED", "NOT_INITIALIZED", "INSUFFICIENT_RESOURCES"
    return isinstance(error, MemoryError) or (       # as is CuPy's OutOfMemoryError
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs))
