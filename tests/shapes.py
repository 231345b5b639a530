"""What calls of NumPy would return, by shape and dtype alone: nothing is computed.

Every array is a window on the same bytes, which nobody reads or writes; views are NumPy's own, so
that strides are true.  Where values matter, the host reads them: `reads` are the answers, taken
from a run that did compute.
"""
import contextlib
import itertools
import math
import mmap
import weakref

import numpy as np

BYTES = mmap.mmap(-1, 2**31)                 # lent by the system only where it is touched
VIEWS = {"T", "broadcast_to", "moveaxis", "split", "squeeze", "swapaxes", "transpose", "view"}
REORDERED = {"ascontiguousarray", "asfortranarray", "ravel", "reshape"}     # views or copies
ORDERED = VIEWS | REORDERED | {"astype", "empty_like", "full_like", "ones_like", "zeros_like"}
REDUCTIONS = {"all", "any", "argmax", "argmin", "max", "mean", "min", "prod", "std", "sum", "var"}
memory = {"held": 0, "peak": 0}             # bytes of all windows that are in use
reads = None                                # an iterator while nothing is computed


@contextlib.contextmanager
def only(answers):
    """Within, nothing is computed.  answers: what the host reads, in turn, again and again."""
    global reads
    reads = itertools.cycle(answers)
    try:
        yield
    finally:
        reads = None


def window(shape, dtype, order="C"):
    """An array that is nothing but shape, strides and dtype; its bytes count while it is used."""
    x = np.ndarray(shape, dtype, BYTES, order=order)
    memory["held"] += x.nbytes
    memory["peak"] = max(memory.values())
    weakref.finalize(x, _release, x.nbytes).atexit = False
    return x


def _release(n):
    memory["held"] -= n


def is_window(x):
    """Whether x has memory of its own, or is a view of what has."""
    return x.base is BYTES


def owner(x):
    """The array whose memory x shows: x itself unless it is a view."""
    while isinstance(x.base, np.ndarray):
        x = x.base
    return x


def result(name, function, args, kwargs):
    """What function, `name` in NumPy, would return: windows, or views of its arguments."""
    x = args[0]
    if "out" in kwargs:
        return kwargs["out"]
    if name in VIEWS:
        return function(*args, **kwargs)
    if name in REORDERED:
        return _reordered(name, x, args[1:])
    if name == "astype" and not kwargs.get("copy", True) and x.dtype == np.dtype(args[1]):
        return x
    if name == "arange":
        return window(*_of(function(*args, **kwargs)))
    if name in ("empty", "full", "ones", "zeros"):
        return window(x, function(0, *args[1:], **kwargs).dtype)
    if name == "meshgrid":
        return [window(tuple(len(a) for a in args), a.dtype) for a in args]
    if name in ("concatenate", "stack"):
        x, axis = x[0], kwargs.get("axis", 0)
        dtype, shape = np.result_type(*args[0]), list(x.shape)
        if name == "stack":
            shape.insert(axis % (x.ndim + 1), len(args[0]))
        else:
            shape[axis] = sum(a.shape[axis] for a in args[0])
        return window(tuple(shape), dtype)
    if name == "matmul":
        return window(_product_shape(x.shape, args[1].shape), np.result_type(x, args[1]))
    if name in REDUCTIONS:
        return window(_reduced(x.shape, *args[1:], **kwargs), _dtype(function, args, kwargs))
    if name in ("argsort", "searchsorted"):
        return window(args[-1].shape, np.int64)
    if name == "vdot":
        return window((), x.dtype)
    if name == "take":
        axis = kwargs["axis"]
        return window(x.shape[:axis] + args[1].shape + x.shape[axis + 1:], x.dtype)
    arrays = [a.shape for a in (*args, *kwargs.values()) if isinstance(a, np.ndarray)]
    order = "F" if name in ORDERED and x.flags.fnc else "C"
    shape = np.broadcast_shapes(*arrays)                             # of what works by elements
    return window(shape, _dtype(function, args, kwargs), order)


def item(x, index):
    """x[index]: a view, or a window where arrays are among the indices."""
    parts = index if isinstance(index, tuple) else (index,)
    arrays = [p for p in parts if isinstance(p, np.ndarray)]
    if not arrays:
        return x[index]
    if any(a.dtype == bool for a in arrays):
        raise NotImplementedError("a mask: how many are true is not known")
    places = np.broadcast_shapes(*(a.shape for a in arrays))
    rest = x[tuple(0 if isinstance(p, np.ndarray) else p for p in parts)].shape
    before = parts.index(arrays[0]) if len(parts) == 1 else 0    # arrays come first here
    return window(rest[:before] + places + rest[before:], x.dtype)


def _of(x):
    return x.shape, x.dtype


def _dtype(function, args, kwargs):
    """The dtype of an elementwise function or a reduction: that of one element."""
    args = [np.ones((1,) * a.ndim, a.dtype) if isinstance(a, np.ndarray) else a for a in args]
    kwargs = {key: a for key, a in kwargs.items() if key != "out"}
    return np.asarray(function(*args, **kwargs)).dtype


def _reordered(name, x, shape):
    """The same elements in another shape or order: a view where the strides allow it."""
    if name[:2] == "as":
        order = "F" if name == "asfortranarray" else "C"
        return x if x.flags[f"{order}_CONTIGUOUS"] else window(x.shape, x.dtype, order)
    shape = (-1,) if name == "ravel" else shape[0] if isinstance(shape[0], tuple) else shape
    try:
        return np.reshape(x, shape, copy=False)
    except ValueError:                                       # a copy is needed
        rest = x.size // abs(math.prod(shape))                   # what -1 stands for
        return window(tuple(rest if n == -1 else n for n in shape), x.dtype)


def _reduced(shape, axis=None, dtype=None, keepdims=False, **_):
    axes = range(len(shape)) if axis is None else np.atleast_1d(axis) % len(shape)
    return tuple(1 if i in axes else n for i, n in enumerate(shape) if keepdims or i not in axes)


def _product_shape(a, b):
    rows, columns = a[-2:-1], b[-1:] if len(b) > 1 else ()
    return np.broadcast_shapes(a[:-2], b[:-2]) + rows + columns
