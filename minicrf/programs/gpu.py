"""What the programs ask about a GPU: whether it works, its memory, its rounding."""
import os

from .. import arrays
from ..arrays import sparse_module


def choose_device(wanted):
    """"cpu" or "gpu" for --device cpu, gpu or auto: a GPU where there is one.

    Raises ValueError where a GPU is wanted and none works.
    """
    if wanted == "cpu":
        return "cpu"
    failure = gpu_failure()
    if not failure:
        return "gpu"
    if wanted == "gpu":
        raise ValueError(f"--device: found gpu, but {failure}; expected cpu or auto")
    if arrays.cupy:                      # somebody wants to use it
        print(f"--device auto: on the cpu, as {failure}")
    return "cpu"


def gpu_available():
    return not gpu_failure()


def gpu_failure():
    """Why no GPU can be used, in one line; "" where one works."""
    if arrays.cupy is None:
        return "cupy is not installed"
    try:                                 # cupy imports without driver and libraries, too
        x = arrays.cupy.ones((2, 2))     # float64: for float32 CuPy would settle TF32 already
        place = arrays.cupy.arange(2), arrays.cupy.arange(3)
        one = sparse_module(x).csr_matrix((x[0], *place), shape=(2, 2))
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
    """The most bytes that CuPy has held on the GPU, as its pool keeps them."""
    return arrays.cupy.get_default_memory_pool().total_bytes()
