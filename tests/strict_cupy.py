"""A stand-in for CuPy over NumPy: `cupy` and `cupyx` for the package to find, without a GPU.

It refuses what CuPy refuses: implicit conversion, NumPy arrays among its own, names and keywords
that CuPy lacks.  It also refuses what CuPy does silently and slowly: NumPy arrays and lists as
indices or values, NumPy's functions on its arrays.  `counts`: how often the host would have waited
for the device ("wait"; a thread other than the main one: "wait aside"), sent data there ("send"),
sorted a sparse matrix there ("sort"), launched something ("launch") and multiplied a sparse matrix
("product"); and the bytes that launches read and write ("bytes").

A launch is an elementwise operation, a copy, a fill, a reduction or a product.  Views are none, nor
is `empty`.  What CuPy does in several steps counts as LAUNCHES says: by its sources, for sorts by
an estimate.  A product first copies operands of another dtype or in neither order; where one of
them is broadcast, three launches list addresses.  A sparse product first clears its result, and
copies what does not lie column by column.
Within `shapes.only` nothing is computed, and all of this is counted by shape.
"""
import collections
import operator
import threading
import types

import numpy as np
import scipy.sparse

import shapes

counts = collections.Counter()

# The names that the package may use.  test_devices.py compares them with the real cupy's.
FUNCTIONS = """
    arange argmax argsort ascontiguousarray asfortranarray bincount broadcast_to clip
    concatenate cumsum einsum empty empty_like exp flatnonzero full full_like log matmul maximum
    meshgrid minimum moveaxis multiply ones ones_like rint searchsorted split sqrt stack sum take
    take_along_axis unique vdot where zeros zeros_like""".split()
TYPES = "bool_ float32 float64 int16 int32 int64 uint8".split()
METHODS = """
    all any argmax argmin argsort astype clip copy cumsum dot max mean min prod ravel repeat reshape
    round squeeze std sum swapaxes take transpose var view""".split()
PROPERTIES = "T dtype flags itemsize nbytes ndim shape size strides".split()
KEYWORDS = {"axis", "copy", "ddof", "dtype", "indexing", "keepdims", "kind", "minlength", "out",
            "return_inverse"}
# functions that read sizes back from the device
WAITING = {"bincount": 2, "unique": 1}         # and flatnonzero, in _call
# a scan is two; then nonzero's own kernel; sorts go digit by digit
LAUNCHES = {"empty": 0, "empty_like": 0, "cumsum": 2, "flatnonzero": 3, "searchsorted": 2,
            "argsort": 12, "unique": 18, "bincount": 4, "std": 4, "var": 3}
SORT = LAUNCHES["argsort"]
recorded = None                         # a list, while what the host reads is to be kept
MAIN = threading.main_thread()
SCALARS = bool, int, float, complex, np.generic


def _wait(times):
    counts["wait" if threading.current_thread() is MAIN else "wait aside"] += times


def _read(value):
    """What the host gets to see of value, which it waits for."""
    _wait(1)
    value = next(shapes.reads) if shapes.reads else value
    if recorded is not None:
        recorded.append(value)
    return value


def _call(name, function, *args, **kwargs):
    """function, `name` in NumPy, of host arrays; what it would launch is counted."""
    if not shapes.reads:
        result = function(*args, **kwargs)
    elif name == "flatnonzero":
        result = shapes.window(_read(None), np.int64)
    else:
        result = shapes.result(name, function, args, kwargs)
    if name == "flatnonzero" and not shapes.reads:
        _read(result.shape)
    if name in shapes.VIEWS or result is args[0] and "out" not in kwargs:
        return result
    if name not in shapes.ORDERED and isinstance(result, np.ndarray):
        result = result.copy() if not result.flags.c_contiguous else result      # unlike NumPy's
    if name in shapes.REORDERED and not (shapes.is_window(result) if shapes.reads else
                                         not np.may_share_memory(result, args[0])):
        return result
    arrays = [x for arg in args
              for x in (arg if isinstance(arg, (tuple, list)) else [arg])
              if isinstance(x, np.ndarray)]
    times = LAUNCHES.get(name, 1)
    if name in ("concatenate", "meshgrid", "stack"):
        times = len(arrays)
    if name == "matmul":
        times += sum(not (x.flags.forc and x.dtype == result.dtype) for x in arrays)
        times += 3 if result.ndim > 2 and args[0].shape[:-2] != args[1].shape[:-2] else 0
    _launch(times, *arrays, *(result if isinstance(result, (tuple, list)) else [result]))
    return result


def _launch(times, *arrays):
    counts["launch"] += times
    counts["bytes"] += sum(x.nbytes for x in arrays) if times else 0


class ndarray:
    """An array "on the device": `_host` holds it, and nothing outside this file may touch that."""
    __slots__ = ("_host",)
    __hash__ = None

    def __init__(self, host):
        if host.dtype.kind not in "biufc":
            raise ValueError(f"Unsupported dtype {host.dtype}")
        self._host = host

    def __array__(self, dtype=None, copy=None):
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    def __array_function__(self, function, types, args, kwargs):
        return NotImplemented                # NumPy's function on a device array: TypeError

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        if method != "__call__" or kwargs or len(inputs) != 2:
            return NotImplemented
        # a NumPy scalar on the left arrives as an array without dimensions
        inputs = [x[()] if isinstance(x, np.ndarray) and x.ndim == 0 else x for x in inputs]
        return _wrap(_call("ufunc", ufunc, *map(_operand, inputs)))

    def __repr__(self):
        return f"device {self._host!r}"

    def __len__(self):
        return len(self._host)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index):
        index, arrays = _index(index)
        result = shapes.item(self._host, index) if shapes.reads else self._host[index]
        if arrays:
            _launch(2 * len(arrays) - 1, *arrays, result, result)
        return _wrap(result)

    def __setitem__(self, index, value):
        (index, arrays), value = _index(index), _operand(value)
        if not arrays and isinstance(value, np.ndarray) and _same(value, self._host[index]):
            return                           # the second half of x[i] += y: CuPy sees it, too
        moved = [x for x in (value, *arrays) if isinstance(x, np.ndarray)]
        _launch(max(1, 2 * len(arrays) - 1), *moved, arrays[0] if arrays else self._host[index])
        if shapes.reads:
            return
        if isinstance(index, np.ndarray) and index.ndim == 1 and index.dtype != bool:
            # which of several values for one place remains is undefined: here the first
            index = index[::-1]
            value = value[::-1] if isinstance(value, np.ndarray) and value.ndim else value
        self._host[index] = value

    # What follows waits for the device.
    def get(self):
        return _read(None if shapes.reads else self._host.copy())

    def item(self):
        return _read(None if shapes.reads else self._host.item())

    def tolist(self):
        return self.get().tolist()

    def __bool__(self):
        return bool(self.item())

    def __int__(self):
        return int(self.item())

    def __float__(self):
        return float(self.item())


def _wrap(result):
    """Device arrays from what a NumPy function returned."""
    if isinstance(result, (tuple, list)):
        return type(result)(map(_wrap, result))
    return ndarray(np.asarray(result))


def _same(a, b):
    """Whether two arrays are the same places of memory."""
    return shapes.owner(a) is shapes.owner(b) and a.strides == b.strides and (
        a.shape == b.shape and a.__array_interface__["data"] == b.__array_interface__["data"])


def _operand(x):
    """The NumPy array in a device array; scalars pass, all else is refused as CuPy refuses it."""
    if isinstance(x, ndarray):
        return x._host
    if isinstance(x, SCALARS):
        return x
    raise TypeError(f"Unsupported type {type(x)}")


def _argument(x):
    """The same for any argument of a function: shapes, names and dtypes pass too."""
    if isinstance(x, (tuple, list)):
        return type(x)(map(_argument, x))
    if x is None or isinstance(x, (str, type, np.dtype)):
        return x
    return _operand(x)


def _index(index):
    parts = index if isinstance(index, tuple) else (index,)
    masks = [p for p in parts if isinstance(p, ndarray) and p.dtype == bool]
    if len(masks) > 1:
        raise IndexError("CuPy supports one boolean array in an index")
    _wait(len(masks))                        # CuPy counts the trues, even to store a scalar
    basic = type(None), type(Ellipsis), slice, int, np.integer
    parts = tuple(p if isinstance(p, basic) else _operand(p) for p in parts)
    arrays = [p for p in parts if isinstance(p, np.ndarray)]
    return parts if isinstance(index, tuple) else parts[0], arrays


def _check_keywords(name, kwargs):
    if not kwargs.keys() <= KEYWORDS:
        raise TypeError(f"{name}: unexpected keyword among {', '.join(kwargs)}")
    if kwargs.get("kind") not in (None, "stable"):
        raise ValueError(f"{name}: CuPy knows stable sorting alone")


def _function(name):
    def function(*args, **kwargs):
        _check_keywords(name, kwargs)
        if name == "meshgrid" or name in ("stack", "concatenate"):
            if not all(isinstance(x, ndarray) for x in (args if name == "meshgrid" else args[0])):
                raise TypeError(f"{name}: expected device arrays")
        _wait(WAITING.get(name, 0))
        result = _call(name, getattr(np, name), *map(_argument, args),
                       **{key: _argument(x) for key, x in kwargs.items()})
        return kwargs["out"] if kwargs.get("out") is not None else _wrap(result)
    return function


def _method(name):
    def method(self, *args, **kwargs):
        _check_keywords(name, kwargs)
        return _wrap(_call(name, getattr(np.ndarray, name), self._host, *map(_argument, args),
                           **{key: _argument(x) for key, x in kwargs.items()}))
    return method


def _operator(function, reflected=False):
    def apply(self, other):
        a, b = self._host, _operand(other)
        return _wrap(_call(function.__name__, function, *((b, a) if reflected else (a, b))))
    return apply


def _inplace(function):
    def apply(self, other):
        other = _operand(other)
        _launch(1, self._host, self._host, *([other] if isinstance(other, np.ndarray) else []))
        if not shapes.reads:
            function(self._host, other)
        return self
    return apply


for _name in METHODS:
    setattr(ndarray, _name, _method(_name))
for _name in PROPERTIES:
    setattr(ndarray, _name, property(
        lambda self, name=_name: _wrap(self._host.T) if name == "T" else getattr(self._host, name)))
for _name in "add sub mul truediv floordiv mod pow and or xor lshift rshift matmul".split():
    _apply = getattr(operator, f"__{_name}__")
    setattr(ndarray, f"__{_name}__", _operator(_apply))
    setattr(ndarray, f"__r{_name}__", _operator(_apply, reflected=True))
    if _name != "matmul":
        setattr(ndarray, f"__i{_name}__", _inplace(getattr(operator, f"__i{_name}__")))
for _name in "lt le eq ne gt ge".split():
    setattr(ndarray, f"__{_name}__", _operator(getattr(operator, f"__{_name}__")))
for _name in "neg pos abs invert".split():
    setattr(ndarray, f"__{_name}__",
            lambda self, apply=getattr(operator, f"__{_name}__"): _wrap(
                _call("ufunc", apply, self._host)))


def asarray(x, dtype=None):
    """x on the device; the same object where it is there already."""
    if isinstance(x, ndarray):
        return x if dtype in (None, x.dtype) else x.astype(dtype)
    counts["send"] += 1
    if shapes.reads:
        x = np.asarray(x)
        return ndarray(shapes.window(x.shape, dtype or x.dtype))
    return ndarray(np.array(x, dtype=dtype))


def asnumpy(x):
    return x.get() if isinstance(x, ndarray) else np.asarray(x)


def copyto(dst, src, where=None):
    _launch(1, dst._host)
    if not shapes.reads:
        np.copyto(dst._host, _operand(src), where=True if where is None else where._host)


def get_array_module(*args):
    return cupy if any(isinstance(x, (ndarray, csr_matrix)) for x in args) else np


def as_strided(x, shape=None, strides=None):
    return _wrap(np.lib.stride_tricks.as_strided(x._host, shape, strides))


class Philox4x3210:
    """Of cupy.random: another stream of numbers than any of NumPy's."""

    def __init__(self, seed=None, *, size=-1):
        _launch(1)
        self._host = np.random.Philox(seed)


class Generator:
    def __init__(self, bit_generator):
        self._host = np.random.Generator(bit_generator._host)

    def random(self, size=None, dtype=np.float64):
        draw = shapes.window if shapes.reads else self._host.random
        result = draw(size, dtype)
        _launch(1, result)
        return _wrap(result)


class csr_matrix:
    """Compressed rows as in cupyx: only products with dense arrays, and transposition.

    Making one of three arrays waits for the device: CuPy looks at both ends of indptr.  An empty
    one, given its shape, waits for nothing, nor does what then takes its arrays' place.  A product
    first makes sure that the column numbers of each row are in order and distinct: it asks the
    device, unless has_canonical_format was set, and sorts in place where they are not.
    """

    def __init__(self, arrays, shape=None, dtype=None, copy=False):
        if shape is None:
            shape, size = arrays, self._rows(arrays) + 1
            arrays = cupy.empty(0, dtype), cupy.empty(0, np.int32), cupy.zeros(size, np.int32)
        else:
            _wait(1)
        data, indices, indptr = arrays
        if not all(isinstance(x, ndarray) and x.ndim == 1 for x in arrays):
            raise ValueError("data, indices, and indptr should be 1-D")
        if len(data) != len(indices):
            raise ValueError("indices and data should have the same size")
        if len(indptr) != self._rows(shape) + 1:
            raise ValueError("index pointer size")
        if data.dtype.char not in "?fdFD":
            raise ValueError("Only bool, float32, float64, complex64 and complex128 are supported")
        self.data, self.shape = data, shape
        self.indices = indices.astype(np.int32, copy=False)
        self.indptr = indptr.astype(np.int32, copy=False)
        self._canonical = None

    @classmethod
    def _from_parts(cls, data, indices, indptr, shape):
        """Without a look at them."""
        self = object.__new__(cls)
        self.data, self.indices, self.indptr = data, indices, indptr
        self.shape, self._canonical = shape, None
        return self

    def _rows(self, shape):
        return shape[0]

    def _arrays(self):
        arrays = self.data, self.indices, self.indptr
        if [x.dtype for x in arrays[1:]] != [np.int32, np.int32]:
            raise ValueError("column numbers and starts of rows should be int32")
        return arrays

    def _host(self):
        """The stored rows as SciPy has them."""
        rows = self._rows(self.shape)
        arrays = (x._host for x in self._arrays())
        return scipy.sparse.csr_matrix(tuple(arrays), shape=(rows, sum(self.shape) - rows))

    @property
    def has_canonical_format(self):
        if self._canonical is None:
            _wait(1)
            self._canonical = bool(self._host().has_canonical_format)
        return self._canonical

    @has_canonical_format.setter
    def has_canonical_format(self, value):
        self._canonical = bool(value)

    def sum_duplicates(self):
        if not self.has_canonical_format:
            counts["sort"] += 1
            matrix = self._host().copy()
            matrix.sum_duplicates()
            self.data, self.indices, self.indptr = map(
                _wrap, (matrix.data, matrix.indices, matrix.indptr))
            self._canonical = True

    @property
    def T(self):
        other = {csr_matrix: csc_matrix, csc_matrix: csr_matrix}[type(self)]
        other = other._from_parts(self.data, self.indices, self.indptr, self.shape[::-1])
        other.has_canonical_format = self.has_canonical_format
        return other

    @property
    def dtype(self):
        return self.data.dtype

    @property
    def nnz(self):
        return self.data.size

    def __matmul__(self, dense):
        if not isinstance(dense, ndarray):
            return NotImplemented
        self.sum_duplicates()
        counts["product"] += 1
        if shapes.reads:
            shape = self.shape[:1] + dense.shape[1:]
            result = shapes.window(shape, np.result_type(self.dtype, dense.dtype), "F")
        else:
            result = np.asfortranarray(self._product(dense._host))
        arrays = [x._host for x in self._arrays()]
        _launch(2 if dense.flags.f_contiguous else 3, *arrays, dense._host, result)
        return _wrap(result)

    def _product(self, dense):
        return self._host() @ dense


class csc_matrix(csr_matrix):
    """Compressed columns: what csr_matrix.T gives."""

    def _rows(self, shape):
        return shape[1]

    def _product(self, dense):
        return self._host().T @ dense

    def tocsr(self):
        """On the device, with nothing told about the order of what comes out."""
        arrays = [x._host for x in self._arrays()]
        if shapes.reads:
            arrays[2] = shapes.window(self.shape[0] + 1, np.int32)
            arrays[:2] = [shapes.window(x.shape, x.dtype) for x in arrays[:2]]
        else:
            matrix = self._host().T.tocsr()
            arrays = matrix.data, matrix.indices, matrix.indptr
        _launch(SORT, *arrays, *arrays)
        return csr_matrix._from_parts(*map(_wrap, arrays), self.shape)


cupy = types.ModuleType("cupy")
vars(cupy).update({name: _function(name) for name in FUNCTIONS},
                  **{name: getattr(np, name) for name in TYPES},
                  ndarray=ndarray, asarray=asarray, asnumpy=asnumpy,
                  copyto=copyto,
                  get_array_module=get_array_module,
                  random=types.SimpleNamespace(Generator=Generator, Philox4x3210=Philox4x3210),
                  lib=types.SimpleNamespace(stride_tricks=types.SimpleNamespace(
                      as_strided=as_strided)),
                  cuda=types.SimpleNamespace(runtime=types.SimpleNamespace(
                      getDeviceCount=lambda: 1, CUDARuntimeError=RuntimeError)))
cupyx = types.SimpleNamespace(scipy=types.SimpleNamespace(sparse=types.SimpleNamespace(
    csr_matrix=csr_matrix, csc_matrix=csc_matrix)))
