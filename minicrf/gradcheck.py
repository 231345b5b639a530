"""Finite differences: how every backward method of this package is checked.

Central differences in float64: dL/dx_i = (L(x + h e_i) - L(x - h e_i)) / 2h + O(h^2).
"""
import numpy as np


def numerical_gradient(f, x, h=1e-5):
    """Gradient of the scalar function f at x, by central differences, one element at a time.

    f: called without arguments after x was changed in place, or with x; returns a scalar.
    x: float64 array of any shape; changed in place while checking, and restored.
    h: step, in units of x.  Returns an array of x's shape.
    Raises TypeError where x is not float64: in float32 the differences drown in rounding.
    """
    if x.dtype != np.float64:
        raise TypeError(f"x: found dtype {x.dtype}, expected float64")
    gradient = np.empty_like(x)
    for i in np.ndindex(x.shape):
        kept = x[i]
        x[i] = kept + h
        above = f(x)
        x[i] = kept - h
        below = f(x)
        x[i] = kept
        gradient[i] = (above - below) / (2 * h)
    return gradient


def relative_error(a, b):
    """Largest |a - b| / max(1e-8, |a| + |b|) over the elements of two arrays of one shape.

    Raises ValueError where the shapes differ.
    """
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape:
        raise ValueError(f"relative_error: found shapes {a.shape} and {b.shape}, expected equal ones")
    return float(np.max(np.abs(a - b) / np.maximum(1e-8, np.abs(a) + np.abs(b)), initial=0.0))
