"""Gaussian kernels of the dense CRF: filter, transpose, derivative by their widths (Sec. 4.1).

    k(i,j) = exp(-|F_i - F_j|^2 / 2),  F = p / sigma;  symmetric: K_hat = D^-1/2 K D^-1/2
Legend: N pixels, L labels, d feature dimensions, P lattice points.
"""
import copy

import numpy as np

from .arrays import BLOCK, array_module, row_sums, to_host
from .permutohedral import PermutohedralLattice

TILE = 2**24     # entries of K that ExactFilter holds at a time: 128 MB


class GaussianKernel:
    """The kernel as mean field uses it: K_hat - diag(self_weight), normalised, without i = j.

    features: (d, N) floats, in their own units; sigma: d widths in the same units.
    normalization: "symmetric", D^-1/2 K D^-1/2 with D = diag(K 1), or "none".
    exclude_self: subtract the filter's own diagonal, kappa_i (over n_i where normalised).
    exact: by brute force in O(N^2), instead of the permutohedral lattice.

    Attributes: `K`, the bare filter; `K_hat`, the same normalised, still with i = j; its `diagonal`
    (N,); `self_weight` (N, 1), what to subtract: the diagonal or, without exclude_self, zeros.
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
        self.n, self.K_hat, self.diagonal = None, self.K, self.K.diagonal
        if normalization == "symmetric":
            self.n = self.K.filter(xp.ones_like(self.features[:1].T))[:, 0]  # (N,)
            self.K_hat = self.K.scaled(1 / xp.sqrt(self.n))
            # (N,): kappa / n; n = kappa + others, but kappa > n where neighbours are missing
            self.diagonal = xp.minimum(self.K_hat.diagonal, 1)
        excluded = self.diagonal if exclude_self else xp.zeros_like(self.diagonal)
        self.self_weight = excluded[:, None]                                 # (N, 1)

    def filter(self, b):
        """(K_hat - diag(self_weight)) b: (N, L) -> (N, L)."""
        return self.K_hat.filter(b) - self.self_weight * b

    def filter_transpose(self, a):
        """The same for the transpose."""
        return self.K_hat.filter_transpose(a) - self.self_weight * a

    # `filter` in two halves: all pixels at once, then block by block.
    def spread(self, b):
        """Splat and blur b (N, L) -> (P, L)."""
        return self.K_hat.blur(self.K_hat.splat(b))

    def gather(self, v, q, W, rows):
        """Slice what was spread of q W, (P, L), at a block of rows, without i = j: (rows, L).

        q: those rows of q, (rows, L).
        """
        message = self.K_hat.slice(v, rows)
        message -= compatible(q, W, self.self_weight[rows])
        return message

    def shape_gradient(self, outer, cross, product):
        """d<a, (K_hat - diag(self_weight)) b>/dlog sigma (d,) by the moment form, for unit width:

            sum_ij a_i K_hat_ij b_j (F_ki - F_kj)^2 = sum_i F_ki^2 outer_i - 2 cross_k

        outer: (N,), a (K_hat b) + b (K_hat^T a); cross: (d,), <F_k a, K_hat F_k b>;
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
            c = (self.self_weight[:, 0] * product - outer / 2) / self.n      # (N,)
            # <c F_k^2, K 1> + <c, K F_k^2> - 2 <c F_k, K F_k>, each summed up at lattice points
            moments = xp.concatenate([xp.ones_like(squares[:1]), features, squares])     # (1+2d, N)
            d = len(features)
            v = self.K.splat(xp.concatenate([moments, c * moments]).T)               # (P, 2+4d)
            n, K_F, K_squares = xp.split(self.K.blur(v[:, :1 + 2 * d]).T, [1, 1 + d])    # (., P)
            c_1, c_F, c_squares = xp.split(v[:, 1 + 2 * d:].T, [1, 1 + d])               # (., P)
            gradient += (c_squares * n + K_squares * c_1 - 2 * c_F * K_F).sum(axis=1)
        return gradient


class KernelGradient:
    """A kernel's part in back-tracking (Fig. 3, step 3): K^T dz W, dL/dW and dL/dlog sigma.

    kernel: a GaussianKernel; W: its compatibility, a number or a matrix (L, L).  In each mean-field
    step `spread` for each of `parts`, in any order; then `gather` for each block of rows.  Both
    gradients are linear in <dz, K q W>, so its parts are summed over the steps.
    """

    def __init__(self, kernel, W):
        xp, self.kernel, self.W = array_module(kernel.features), kernel, W
        one = xp.ones_like(kernel.features[:1])                              # (1, N)
        weights = xp.concatenate([one, kernel.features])                     # (1+d, N)
        # all side by side in one product; one by one where that would leave a processor's cache
        each = 1 if xp is np and one.size > BLOCK else len(weights)
        self.moments = [kernel.K_hat.side_by_side(weights[first:first + each])
                        for first in range(0, len(weights), each)]
        self.parts = range(len(self.moments))
        self.outer, self.product = xp.zeros((2, one.size), dtype=np.float64)             # (N,)
        self.cross, self.dW_of_rows = [xp.zeros(each) for _ in self.parts], {}             # (k,)

    def spread(self, part, q_dz):
        """cross_k += <F_k dz, K_hat F_k q W> for a few k; part 0: K q, K^T dz, unsliced.

        q_dz: (N, 2L), q and dz side by side, which go through one splat and one slice.
        """
        K, L = self.moments[part], q_dz.shape[1] // 2
        both = K.splat(q_dz).reshape(-1, len(self.cross[part]), 2 * L)       # (P, k, 2L)
        q_k, dz_k = both[:, :, :L], both[:, :, L:]
        q_k = K.blur(q_k.reshape(len(q_k), -1)).reshape(dz_k.shape)          # (P, k, L)
        if part == 0:
            K_dz = self.kernel.K_hat.blur_transpose(dz_k[:, 0])              # (P, L)
            self.both = array_module(q_dz).concatenate([self.mixed(q_k[:, 0]), K_dz], axis=1)
        products = dz_k * self.mixed(q_k)
        self.cross[part] += products.sum(axis=0, dtype=np.float64).sum(axis=1)           # (k,)

    def gather(self, q, dz, rows):
        """K^T dz W at a block of rows: (rows, L).  q, dz: those rows of both."""
        both = self.kernel.K_hat.slice(self.both, rows)                      # (rows, 2L)
        K_q, K_dz = both[:, :q.shape[1]], both[:, q.shape[1]:]
        # for the widths, still with i = j
        self.outer[rows] += row_sums(dz * K_q) + row_sums(q * self.mixed(K_dz))
        self.product[rows] += row_sums(q * self.mixed(dz))
        K_dz -= self.kernel.self_weight[rows] * dz
        # dw += <dz, K q> = <q, K^T dz>; a matrix' is (K q)^T dz = q^T (K^T dz)
        dW = array_module(q).vdot(q, K_dz) if isinstance(self.W, float) else q.T @ K_dz
        self.dW_of_rows[rows.start] = self.dW_of_rows.get(rows.start, 0) + dW
        return compatible(K_dz, self.W)

    def mixed(self, x):
        """x W (..., L) for a matrix W; x for a number, which is a factor of it all in the end."""
        return x if isinstance(self.W, float) else x @ self.W

    def result(self):
        """dL/dW, () or (L, L), and dL/dlog sigma (d,), on the host."""
        xp = array_module(self.outer)
        cross = xp.concatenate(self.cross)[1:]                               # (d,)
        dsigma = self.kernel.shape_gradient(self.outer, cross, self.product)
        dW = sum(self.dW_of_rows[start] for start in sorted(self.dW_of_rows))
        dW = xp.asarray(dW, dtype=np.float64)
        both = to_host(xp.concatenate([dW.ravel(), dsigma]))         # a GPU is waited for but once
        dW, dsigma = both[:dW.size].reshape(dW.shape), both[dW.size:]        # () or (L, L), (d,)
        return (dW + dW.T) / 2, dsigma * (self.W if isinstance(self.W, float) else 1)


def compatible(x, W, weight=1.):
    """x W, of rows of labels (..., L): the compatibility W is a number (Potts) or (L, L).

    weight: of the rows, (rows, 1).
    """
    return x * (weight * W) if isinstance(W, float) else weight * (x @ W)


class ExactFilter:
    """K by brute force, O(N^2): the twin of PermutohedralLattice that the tests measure it by.

    features: (N, d), already divided by sigma.  Computes in float64, returns the features' dtype.
    K is symmetric, its diagonal 1.  Splat and slice do next to nothing; all is in the blur.
    Raises ValueError where features are not finite.
    """

    def __init__(self, features):
        xp = array_module(features)
        if not bool((abs(features) < np.inf).all()):                         # NaN compares as false
            raise ValueError("features: found NaN or infinite values, expected finite ones")
        self.dtype = features.dtype
        self.features = features.astype(np.float64)
        self.scale = xp.ones_like(self.features[:, 0])                       # (N,)
        self.weights = self.scale[:, None]                                   # (N, K)
        self.diagonal = xp.ones_like(features[:, 0])
        n = len(features)
        self.whole = self._kernel(slice(0, n)) if n * n <= TILE else None    # K, where it fits

    def filter(self, values):
        """K @ values: (N, C) -> (N, C).  Raises ValueError for another N."""
        return self.slice(self.blur(self.splat(values)), slice(0, len(values)))

    def splat(self, values):
        """(N, C) -> (N, K*C), K being 1 but after `side_by_side`."""
        if values.ndim != 2 or len(values) != len(self.features):
            raise ValueError(f"values: found shape {values.shape}, "
                             f"expected ({len(self.features)}, any): one row for each feature")
        return (self.weights[:, :, None] * values[:, None]).reshape(len(values), -1)

    def blur(self, v):
        """All of K: (N, C) -> (N, C), float64."""
        if self.whole is not None:
            return self.whole @ v
        step = max(1, TILE // len(v))
        return array_module(v).concatenate([self._kernel(slice(first, first + step)) @ v
                                            for first in range(0, len(v), step)])

    filter_transpose, blur_transpose = filter, blur                          # K is symmetric

    def slice(self, v, rows):
        """A block of rows of what was blurred: (N, C) -> (rows, C)."""
        return (self.scale[rows, None] * v[rows]).astype(self.dtype)

    def scaled(self, s):
        """The filter of diag(s) K diag(s) for s (N,)."""
        other = copy.copy(self)
        other.scale = self.scale * s
        other.weights = self.weights * s[:, None]
        other.diagonal = self.diagonal * s * s
        return other

    def side_by_side(self, weights):
        """The filter whose splat gives weights_k * values for each row of weights (K, N)."""
        other = copy.copy(self)
        other.weights = self.weights * weights.T
        return other

    def _kernel(self, tile):
        """Rows of K: (len(tile), N).  |x - y|^2 = x.x + y.y - 2 x.y, above 0 but for rounding."""
        xp = array_module(self.features)
        half_squares = (self.features**2).sum(axis=1) / 2                    # (N,)
        exponent = self.features[tile] @ self.features.T                     # (rows, N)
        exponent -= half_squares[tile, None]
        exponent -= half_squares
        return xp.exp(xp.minimum(exponent, 0))
