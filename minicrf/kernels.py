"""Gaussian kernels of the dense CRF, Eq. 9: filter, transpose, and derivative by the kernel's width.

    k(i,j) = exp(-|F_i - F_j|^2 / 2),  F = p / sigma,  for j != i;  symmetric: K^ = D^-1/2 K D^-1/2
Legend: N pixels, L labels, d feature dimensions.
"""
import copy

import numpy as np

from .arrays import array_module
from .permutohedral import PermutohedralLattice

TILE = 2**22     # kernel entries that ExactFilter holds at a time


class GaussianKernel:
    """K^, the kernel as Eq. 5 uses it: normalised, and without i = j where exclude_self is set.

    features: (N, d) floats, in their own units; sigma: d widths in the same units.
    normalization: "symmetric", D^-1/2 K D^-1/2 with D = diag(K 1), or "none".
    exclude_self: subtract the filter's own diagonal, kappa_i (over n_i, where normalised).
    exact: by brute force in O(N^2), instead of the permutohedral lattice.
    """

    def __init__(self, features, sigma, normalization="symmetric", exclude_self=True, exact=False):
        if normalization not in ("symmetric", "none"):
            raise ValueError(f"normalization: found {normalization!r}, expected 'symmetric' or 'none'")
        xp = array_module(features)
        features = features.T                                                # (d, N)
        # centred: the moment form subtracts large squares from each other
        features = features - features.mean(axis=1, keepdims=True)
        self.features = features / xp.asarray(sigma, dtype=features.dtype)[:, None]
        self.raw = (ExactFilter if exact else PermutohedralLattice)(self.features.T)
        self.filtered = self.raw                                             # K, or D^-1/2 K D^-1/2
        self.n = None
        if normalization == "symmetric":
            self.n = self.raw.filter(xp.ones_like(self.features[:1].T))[:, 0]    # (N,)
            self.filtered = self.raw.scaled(1 / xp.sqrt(self.n))
        self.self_weight = self.filtered.diagonal if exclude_self else None  # (N,): kappa or kappa/n

    def apply(self, b):
        """K^ b for b (N, L)."""
        out = self.filtered.filter(b)
        if self.self_weight is not None:
            out -= self.self_weight[:, None] * b
        return out

    # forward: out = K^ b
    def apply_transpose(self, a):
        """K^^T a for a (N, L)."""
        out = self.filtered.filter_transpose(a)
        if self.self_weight is not None:
            out -= self.self_weight[:, None] * a
        return out

    def moments(self, a, b, Kb, KTa):
        """What <a, K^ b> adds to the shape gradient; a, b, Kb = K^ b and KTa = K^^T a are (N, L).

        Returns (outer, cross): outer (N,) = sum_l a Kb + b KTa; cross (d,) = <F_k a, K^ (F_k b)>.
        Both are linear in <a, K^ b>: add them up over the mean-field steps, then call
        shape_gradient once.
        """
        xp = array_module(a)
        outer = _row_dots(a, Kb) + _row_dots(b, KTa)
        cross = xp.stack([self.filtered.scaled(f).inner(a, b) for f in self.features])
        if self.self_weight is not None:
            cross -= self.features**2 @ (self.self_weight * _row_dots(a, b))
        return outer, cross

    def shape_gradient(self, outer, cross):
        """d<a, K^ b>/dlog sigma (d,), from the sums of `moments`, by the moment form:

            sum_ij a_i K_ij b_j (F_i - F_j)^2 = sum_i F_i^2 outer_i - 2 cross    (for each feature)

        plus, where K is normalised, what it does through n = K 1: <c, dK 1>.  With K^ free of its
        diagonal, c_i = -outer_i / (2 n_i): the terms with kappa cancel.
        """
        gradient = self.features**2 @ outer - 2 * cross                      # (d,)
        if self.n is None:
            return gradient
        xp = array_module(outer)
        c = -outer / (2 * self.n)                                            # (N,)
        F = self.features.T                                                  # (N, d)
        n = self.n
        K_F = self.raw.filter(xp.concatenate([F, F**2], axis=1))             # (N, 2d)
        d = F.shape[1]
        dn = F**2 * n[:, None] + K_F[:, d:] - 2 * F * K_F[:, :d]             # (N, d): dK 1
        return gradient + c @ dn


def _row_dots(a, b):
    """sum_l a_il b_il: (N,)."""
    return array_module(a).einsum("il,il->i", a, b)


class ExactFilter:
    """K by brute force, O(N^2): the twin of PermutohedralLattice that the tests measure it by.

    features: (N, d), already divided by sigma.  Computes in float64, whatever the values' dtype; K is
    symmetric, its diagonal 1.
    """

    def __init__(self, features):
        xp = array_module(features)
        self.features = features.astype(np.float64)
        self.scale = xp.ones_like(self.features[:, 0])                       # (N,)
        self.diagonal = xp.ones_like(features[:, 0])

    def filter(self, values):
        """K @ values: (N, C) -> (N, C)."""
        xp = array_module(values)
        if values.ndim != 2 or len(values) != len(self.features):
            raise ValueError(f"values: found shape {values.shape}, "
                             f"expected ({len(self.features)}, any): one row for each feature")
        scaled_values = self.scale[:, None] * values                         # (N, C)
        out = xp.empty_like(values)
        rows = max(1, TILE // len(values))
        for start in range(0, len(values), rows):
            tile = slice(start, start + rows)
            out[tile] = self.scale[tile, None] * (self._kernel(tile) @ scaled_values)
        return out

    filter_transpose = filter

    def inner(self, a, b):
        """<a, K b>, summed over the columns, for a and b (N, C)."""
        return (a * self.filter(b)).sum()

    def scaled(self, s):
        """The filter of diag(s) K diag(s) for s (N,)."""
        other = copy.copy(self)
        other.scale = self.scale * s
        other.diagonal = self.diagonal * s * s
        return other

    def _kernel(self, tile):
        """Rows of K: (len(tile), N).  |x - y|^2 = x.x + y.y - 2 x.y, above 0 but for rounding."""
        xp = array_module(self.features)
        half_squares = (self.features**2).sum(axis=1) / 2                    # (N,)
        exponent = self.features[tile] @ self.features.T                     # (rows, N)
        exponent -= half_squares[tile, None]
        exponent -= half_squares
        return xp.exp(xp.minimum(exponent, 0))
