"""A stand-in for CuPy over NumPy: `cupy` and `cupyx` for the package to find, without a GPU.

It refuses what CuPy refuses: implicit conversion, NumPy arrays among its own, names and keywords
that CuPy lacks.  It also refuses what CuPy does silently and slowly: NumPy arrays and lists as
indices or values, NumPy's functions on its arrays.  `counts`: how often the host would have waited
for the device ("wait"; a thread other than the main one: "wait aside"), sent data there ("send"),
and sorted a sparse matrix there ("sort").
"""
import collections
import operator
import threading
import types

import numpy as np
import scipy.sparse

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
WAITING = {"bincount": 2, "flatnonzero": 1, "unique": 1}
MAIN = threading.main_thread()
SCALARS = bool, int, float, complex, np.generic


def _wait(times):
    counts["wait" if threading.current_thread() is MAIN else "wait aside"] += times


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
        return _wrap(ufunc(*map(_operand, inputs)))

    def __repr__(self):
        return f"device {self._host!r}"

    def __len__(self):
        return len(self._host)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index):
        return _wrap(self._host[_index(index)])

    def __setitem__(self, index, value):
        index, value = _index(index), _operand(value)
        if isinstance(index, np.ndarray) and index.ndim == 1 and index.dtype != bool:
            # which of several values for one place remains is undefined: here the first
            index = index[::-1]
            value = value[::-1] if isinstance(value, np.ndarray) and value.ndim else value
        self._host[index] = value

    # What follows waits for the device.
    def get(self):
        _wait(1)
        return self._host.copy()

    def item(self):
        _wait(1)
        return self._host.item()

    def tolist(self):
        return self.get().tolist()

    def __bool__(self):
        return bool(self.get())

    def __int__(self):
        return int(self.item())

    def __float__(self):
        return float(self.item())


def _wrap(result):
    """Device arrays from what a NumPy function returned."""
    if isinstance(result, (tuple, list)):
        return type(result)(map(_wrap, result))
    return ndarray(np.asarray(result))


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
    return parts if isinstance(index, tuple) else parts[0]


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
        result = getattr(np, name)(*map(_argument, args),
                                   **{key: _argument(x) for key, x in kwargs.items()})
        return kwargs["out"] if kwargs.get("out") is not None else _wrap(result)
    return function


def _method(name):
    def method(self, *args, **kwargs):
        _check_keywords(name, kwargs)
        return _wrap(getattr(self._host, name)(*map(_argument, args), **kwargs))
    return method


def _operator(function, reflected=False):
    def apply(self, other):
        a, b = self._host, _operand(other)
        return _wrap(function(b, a) if reflected else function(a, b))
    return apply


def _inplace(function):
    def apply(self, other):
        function(self._host, _operand(other))
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
            lambda self, apply=getattr(operator, f"__{_name}__"): _wrap(apply(self._host)))


def asarray(x, dtype=None):
    """x on the device; the same object where it is there already."""
    if isinstance(x, ndarray):
        return x if dtype in (None, x.dtype) else x.astype(dtype)
    counts["send"] += 1
    return ndarray(np.array(x, dtype=dtype))


def asnumpy(x):
    return x.get() if isinstance(x, ndarray) else np.asarray(x)


def copyto(dst, src, where=None):
    np.copyto(dst._host, _operand(src), where=True if where is None else where._host)


def get_array_module(*args):
    return cupy if any(isinstance(x, (ndarray, csr_matrix)) for x in args) else np


def as_strided(x, shape=None, strides=None):
    return _wrap(np.lib.stride_tricks.as_strided(x._host, shape, strides))


class Philox4x3210:
    """Of cupy.random: another stream of numbers than any of NumPy's."""

    def __init__(self, seed=None, *, size=-1):
        self._host = np.random.Philox(seed)


class Generator:
    def __init__(self, bit_generator):
        self._host = np.random.Generator(bit_generator._host)

    def random(self, size=None, dtype=np.float64):
        return _wrap(self._host.random(size, dtype))


class csr_matrix:
    """Compressed rows as in cupyx: only products with dense arrays, and transposition.

    Making one waits for the device: CuPy looks at both ends of indptr.  A product first makes sure that the column numbers of each row are in order and distinct: it
    asks the device, unless has_canonical_format was set, and sorts in place where they are not.
    """

    def __init__(self, arrays, shape=None, dtype=None, copy=False):
        data, indices, indptr = arrays
        if not all(isinstance(x, ndarray) and x.ndim == 1 for x in arrays):
            raise ValueError("data, indices, and indptr should be 1-D")
        if len(data) != len(indices):
            raise ValueError("indices and data should have the same size")
        if len(indptr) != self._rows(shape) + 1:
            raise ValueError("index pointer size")
        if data.dtype.char not in "?fdFD":
            raise ValueError("Only bool, float32, float64, complex64 and complex128 are supported")
        self.data, self.shape, self.dtype = data, shape, data.dtype
        self.indices = indices.astype(np.int32, copy=False)
        self.indptr = indptr.astype(np.int32, copy=False)
        self._canonical = None
        _wait(1)

    @classmethod
    def _from_parts(cls, data, indices, indptr, shape):
        """Without a look at them."""
        self = object.__new__(cls)
        self.data, self.indices, self.indptr = data, indices, indptr
        self.shape, self.dtype, self._canonical = shape, data.dtype, None
        return self

    def _rows(self, shape):
        return shape[0]

    def _host(self):
        """The stored rows as SciPy has them."""
        rows = self._rows(self.shape)
        arrays = (x._host for x in (self.data, self.indices, self.indptr))
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
    def nnz(self):
        return self.data.size

    def __matmul__(self, dense):
        if not isinstance(dense, ndarray):
            return NotImplemented
        self.sum_duplicates()
        return _wrap(np.asfortranarray(self._product(dense._host)))

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
        matrix = self._host().T.tocsr()
        return csr_matrix._from_parts(*map(_wrap, (matrix.data, matrix.indices, matrix.indptr)),
                                      matrix.shape)


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
