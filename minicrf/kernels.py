"""Gaussian kernels of the dense CRF, Eq. 9: filter, transpose, derivative by the kernel's width.

    k(i,j) = exp(-|F_i - F_j|^2 / 2),  F = p / sigma;  symmetric: K_hat = D^-1/2 K D^-1/2
Legend: N pixels, L labels, d feature dimensions.
"""
import copy

import numpy as np

from .arrays import array_module
from .permutohedral import PermutohedralLattice

TILE = 2**24     # entries of K that ExactFilter holds at a time: 128 MB


class GaussianKernel:
    """The kernel as Eq. 5 uses it: K_hat - diag(self_weight), normalised and without i = j.

    features: (d, N) floats, in their own units; sigma: d widths in the same units.
    normalization: "symmetric", D^-1/2 K D^-1/2 with D = diag(K 1), or "none".
    exclude_self: subtract the filter's own diagonal, kappa_i (over n_i where normalised).
    exact: by brute force in O(N^2), instead of the permutohedral lattice.

    Attributes: `K`, the bare filter; `K_hat`, the same normalised, still with i = j; its `diagonal`
    (N,); `self_weight` (N,), what to subtract: the diagonal or, without exclude_self, zeros.
    """

    def __init__(self, features, sigma, normalization="symmetric", exclude_self=True, exact=False):
        xp = array_module(features)
        sigma = xp.asarray(sigma, dtype=features.dtype)
        # centred, since the moment form subtracts large squares from each other; but not for the
        # lattice: its cells lie where those of other libraries do
        centred = features - features.mean(axis=1, keepdims=True)
        self.features = centred / sigma[:, None]                             # (d, N)
        self.K = (ExactFilter(self.features.T) if exact
                  else PermutohedralLattice((features / sigma[:, None]).T))
        if normalization == "symmetric":
            self.n = self.K.filter(xp.ones_like(self.features[:1].T))[:, 0]  # (N,)
            self.K_hat = self.K.scaled(1 / xp.sqrt(self.n))
            # (N,): kappa / n; n = kappa + others, but kappa > n where neighbours are missing
            self.diagonal = xp.minimum(self.K_hat.diagonal, 1)
        elif normalization == "none":
            self.n, self.K_hat, self.diagonal = None, self.K, self.K.diagonal
        else:
            raise ValueError(f"normalization: found {normalization!r}, "
                             "expected 'symmetric' or 'none'")
        self.self_weight = self.diagonal if exclude_self else xp.zeros_like(self.diagonal)

    def weighted(self):
        """For each feature F_k the filter diag(F_k) K_hat diag(F_k): a list of d."""
        return [self.K_hat.scaled(f) for f in self.features]

    def shape_gradient(self, outer, cross, product):
        """d<a, (K_hat - diag(self_weight)) b>/dlog sigma (d,) by the moment form, for unit width:

            sum_ij a_i K_hat_ij b_j (F_ki - F_kj)^2 = sum_i F_ki^2 outer_i - 2 cross_k

        outer: (N,), a (K_hat b) + b (K_hat^T a); cross: (d,), <a, G_k b> for G_k of `weighted`;
        product: (N,), a b; all summed over the labels.  The gradient is linear in them: a sum of
        such terms, over mean-field steps, needs this once.

        Where K is normalised, sigma acts through n = K 1 too: + <c, dK 1>, with
        c_i = (-outer_i / 2 + kappa_i / n_i product_i) / n_i.
        """
        xp = array_module(outer)
        # float64, as large terms cancel, the more so the narrower the kernel
        features = self.features.astype(np.float64)                          # (d, N)
        squares = features**2                                                # (d, N)
        gradient = squares @ outer - 2 * cross                               # (d,)
        if self.n is not None:
            c = (self.self_weight * product - outer / 2) / self.n            # (N,)
            moments = xp.concatenate([xp.ones_like(squares[:1]), features, squares]).T   # (N, 1+2d)
            n, K_F, K_squares = xp.split(self.K.filter(moments).T, [1, 1 + len(features)])
            gradient += (squares * n + K_squares - 2 * features * K_F) @ c
        return gradient


class ExactFilter:
    """K by brute force, O(N^2): the twin of PermutohedralLattice that the tests measure it by.

    features: (N, d), already divided by sigma.  Computes in float64, returns the features' dtype.
    K is symmetric, its diagonal 1.
    """

    def __init__(self, features):
        xp = array_module(features)
        self.dtype = features.dtype
        self.features = features.astype(np.float64)
        self.scale = xp.ones_like(self.features[:, 0])                       # (N,)
        self.diagonal = xp.ones_like(features[:, 0])
        n = len(features)
        self.whole = self._kernel(slice(0, n)) if n * n <= TILE else None    # K, where it fits

    def filter(self, values):
        """K @ values: (N, C) -> (N, C).  Raises ValueError for another N."""
        return self.gather(self.spread(values))

    def spread(self, values):
        """The first half of the filter, here next to nothing: (N, C) -> (N, C)."""
        if values.ndim != 2 or len(values) != len(self.features):
            raise ValueError(f"values: found shape {values.shape}, "
                             f"expected ({len(self.features)}, any): one row for each feature")
        return self.scale[:, None] * values

    filter_transpose, spread_transpose = filter, spread                  # K is symmetric

    def gather(self, v, rows=None):
        """The second half, at all of the points or at a slice of them: (N, C) -> (rows, C)."""
        start, stop = (rows.start, rows.stop) if rows else (0, len(v))
        step = max(1, TILE // len(v))
        out = []
        for first in range(start, stop, step):
            tile = slice(first, min(first + step, stop))
            K = self._kernel(tile) if self.whole is None else self.whole[tile]         # (tile, N)
            out.append(self.scale[tile, None] * (K @ v))
        return array_module(v).concatenate(out).astype(self.dtype, copy=False)

    def inner(self, a, b):
        """<a, K b>, summed over the columns, for a and b (N, C): 0-d, float64."""
        return (a * self.filter(b)).sum(dtype=np.float64)

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
