"""A stand-in for CuPy over NumPy: `cupy` and `cupyx` for the package to find, without a GPU.

It refuses what CuPy refuses: implicit conversion, NumPy arrays among its own, names and keywords
that CuPy lacks.  It also refuses what CuPy does silently and slowly: NumPy arrays and lists as
indices or values, NumPy's functions on its arrays, operands that overlap `out` as another object.
New memory holds NaN, as it may on a device.
"""
import operator
import types

import numpy as np
import scipy.sparse

# The names that the package may use.  test_devices.py compares them with the real cupy's.
FUNCTIONS = """
    arange argmax argsort ascontiguousarray bincount broadcast_to clip concatenate cumsum einsum exp
    flatnonzero floor full full_like log matmul maximum meshgrid minimum moveaxis multiply ones
    ones_like pad searchsorted split sqrt stack sum take take_along_axis unique where zeros
    zeros_like""".split()
TYPES = "bool_ float32 float64 int8 int16 int32 int64 uint8".split()
METHODS = """
    all any argmax argmin argsort astype clip copy cumsum dot max mean min prod ravel repeat reshape
    round squeeze std sum swapaxes take transpose var view""".split()
PROPERTIES = "T dtype flags itemsize nbytes ndim shape size strides".split()
KEYWORDS = {"axis", "constant_values", "copy", "ddof", "dtype", "indexing", "keepdims", "kind",
            "minlength", "out", "return_inverse"}
LISTS = {"meshgrid", "stack", "concatenate"}             # functions of several device arrays
SCALARS = bool, int, float, complex, np.generic


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
        self._host[_index(index)] = _operand(value)

    def get(self):
        return self._host.copy()

    def item(self):
        return self._host.item()

    def tolist(self):
        return self._host.tolist()

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
    basic = type(None), type(Ellipsis), slice, int, np.integer
    parts = tuple(p if isinstance(p, basic) else _operand(p) for p in parts)
    return parts if isinstance(index, tuple) else parts[0]


def _arguments(name, args, kwargs):
    if not kwargs.keys() <= KEYWORDS:
        raise TypeError(f"{name}: unexpected keyword among {', '.join(kwargs)}")
    if name in LISTS:
        if not all(isinstance(x, ndarray) for x in (args if name == "meshgrid" else args[0])):
            raise TypeError(f"{name}: expected device arrays")
    return list(map(_argument, args)), {key: _argument(x) for key, x in kwargs.items()}


def _function(name):
    def function(*args, **kwargs):
        given, named = _arguments(name, args, kwargs)
        out = kwargs.get("out")
        if any(x is not out and isinstance(x, ndarray) and np.may_share_memory(x._host, out._host)
               for x in args if out is not None):
            raise ValueError(f"{name}: an operand overlaps out; CuPy would copy it")
        result = getattr(np, name)(*given, **named)
        return _wrap(result) if out is None else out
    return function


def _method(name):
    def method(self, *args, **kwargs):
        given, named = _arguments(name, args, kwargs)
        return _wrap(getattr(self._host, name)(*given, **named))
    return method


def _operator(function, reflected=False):
    def apply(self, other):
        a, b = self._host, _operand(other)
        return _wrap(function(*((b, a) if reflected else (a, b))))
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


def empty(shape, dtype=np.float64):
    new = np.empty(shape, dtype)
    new.fill(np.nan if new.dtype.kind == "f" else 1)
    return ndarray(new)


def empty_like(x):
    return empty(x.shape, x.dtype)


def asarray(x, dtype=None):
    """x on the device; the same object where it is there already."""
    if isinstance(x, ndarray):
        return x if dtype in (None, x.dtype) else x.astype(dtype)
    return ndarray(np.array(x, dtype=dtype))


def asnumpy(x):
    return x.get() if isinstance(x, ndarray) else np.asarray(x)


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
    """Compressed rows as in cupyx: products with dense arrays, and transposition."""

    def __init__(self, arrays, shape=None, dtype=None):
        if shape is None:
            shape = arrays
            arrays = empty(0, dtype), empty(0, np.int32), cupy.zeros(shape[0] + 1, np.int32)
        self.data, self.indices, self.indptr = arrays
        self.shape, self.has_canonical_format = shape, False

    def _host(self):
        arrays = tuple(x._host for x in (self.data, self.indices, self.indptr))
        return scipy.sparse.csr_matrix(arrays, shape=self.shape)

    @property
    def T(self):
        return csc_matrix(self)

    @property
    def dtype(self):
        return self.data.dtype

    def __matmul__(self, dense):
        return _wrap(self._host() @ dense._host)


class csc_matrix:
    """Compressed columns: what csr_matrix.T gives."""

    def __init__(self, transposed):
        self.transposed = transposed

    def tocsr(self):
        matrix = self.transposed._host().T.tocsr()
        return csr_matrix(tuple(map(_wrap, (matrix.data, matrix.indices, matrix.indptr))),
                          matrix.shape)


cupy = types.ModuleType("cupy")
vars(cupy).update({name: _function(name) for name in FUNCTIONS},
                  **{name: getattr(np, name) for name in TYPES},
                  ndarray=ndarray, asarray=asarray, asnumpy=asnumpy, empty=empty,
                  empty_like=empty_like, get_array_module=get_array_module,
                  random=types.SimpleNamespace(Generator=Generator, Philox4x3210=Philox4x3210),
                  lib=types.SimpleNamespace(stride_tricks=types.SimpleNamespace(
                      as_strided=as_strided)))
cupyx = types.SimpleNamespace(scipy=types.SimpleNamespace(sparse=types.SimpleNamespace(
    csr_matrix=csr_matrix, csc_matrix=csc_matrix)))
