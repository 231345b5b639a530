"""Gaussian kernels of the dense CRF: filter, transpose, derivative by their widths (Sec. 4.1).

    k(i,j) = exp(-|F_i - F_j|^2 / 2),  F = p / sigma;  symmetric: K_hat = D^-1/2 K D^-1/2
plain.gaussian_kernel is the same with dense matrices; its K_hat is K_hat - diag(kappa) here.
Legend: N pixels, L labels, d feature dimensions, P lattice points, C columns of values.
"""
import copy
import itertools

import numpy as np

from .arrays import Rows, array_module, blocks, for_each, product, row_sums
from .permutohedral import PermutohedralLattice

TILE = 2**24     # entries of K that ExactFilter holds at a time: 128 MB
PIECE_COLUMNS = 32      # wide products are faster, until they leave a processor's cache


class GaussianKernel:
    """The kernel as mean field uses it: K_hat - diag(kappa), normalised, without i = j.

    features: (N, d) floats, in their own units; sigma: d widths in the same units.
    normalization: "symmetric", D^-1/2 K D^-1/2 with D = diag(K 1), or "none".
    exclude_self: subtract the filter's own diagonal, kappa_i (over n_i where normalised).
    exact: by brute force in O(N^2), instead of the permutohedral lattice.
    dtype: of the values that it filters; the features' own by default.

    Attributes: `sigma`, and `F` = features / sigma; `K`, the bare filter, and `n` = K 1 (N,), None
    without normalisation; `K_with_self`, normalised, still with i = j, and its `diagonal` (N,);
    `kappa` (N, 1), what is subtracted: the diagonal or, without exclude_self, zeros.
    """

    def __init__(self, features, sigma, normalization="symmetric", exclude_self=True, exact=False,
                 dtype=None):
        xp = array_module(features)
        dtype = dtype or features.dtype
        self.sigma = sigma
        self.F = F = features / xp.asarray(sigma, dtype=features.dtype)      # (N, d)
        self.K = ExactFilter(F, dtype) if exact else PermutohedralLattice(F, dtype)
        self.n, self.K_with_self, self.diagonal = None, self.K, self.K.diagonal
        if normalization == "symmetric":
            self.n = self.K.filter(xp.ones((len(F), 1), dtype))[:, 0]        # (N,)
            self.K_with_self = self.K.scaled(1 / xp.sqrt(self.n))
            # (N,): K_ii / n_i, at most 1 in a true kernel, more where neighbours are missing
            self.diagonal = xp.minimum(self.K_with_self.diagonal, 1)
        excluded = self.diagonal if exclude_self else xp.zeros_like(self.diagonal)
        self.kappa = excluded[:, None]                                       # (N, 1)

    def filter(self, b):
        """(K_hat - diag(kappa)) b: (N, C) -> (N, C); of many rows an arrays.Rows."""
        K = self.K_with_self
        return self._without_self(K.blur(K.splat(b)), b)

    def filter_transpose(self, a):
        """The same for the transpose."""
        K = self.K_with_self
        return self._without_self(K.blur_transpose(K.splat(a)), a)

    def _without_self(self, v, b):
        def of_rows(rows):
            K_b = self.K_with_self.slice(v, rows)
            K_b -= self.kappa[rows] * b[rows]
            return K_b

        several = len(blocks(len(b), b)) > 1
        return Rows(b.shape, of_rows) if several else of_rows(slice(None))

    # forward: z^t = ... + (K_hat - diag(kappa)) q^(t-1) W,  t = 1..T
    def backward(self, A, K_A, B, W):
        """dW, of W's shape, and dlog sigma (d,), in float64, from A = [dz^1 .. dz^T].

        A, B = [q^0 .. q^(T-1)]: (N, T L), as lists of their columns' pieces, (N, L) or several of
        these side by side, the steps in any one order.  K_A: for each piece the list of its steps'
        `filter_transpose`.
        W: the compatibility, () or symmetric (L, L).
        plain.gaussian_kernel's backward for dK_hat = A (B W)^T, which is never formed: the moment
        form,

            sum_ij dK_ij K_ij (F_ki - F_kj)^2
                = sum_i F_ki^2 sum_j (dK_ij K_ij + dK_ji K_ji)  -  2 <F_k A, K F_k B W>

        in which dK_hat K_hat can stand for dK K: for j != i they are equal.
        """
        pieces = for_each(lambda piece: self._sums(*piece, W), list(zip(A, K_A, B)), A[0])
        dW, sums, diagonal = (sum(each) for each in zip(*pieces))
        diagonal = self.kappa[:, 0] * diagonal

        # centred, since large squares are subtracted from each other
        F = (self.F - self.F.mean(axis=0)).astype(A[0].dtype)                # (N, d)
        crosses = self._crosses(F, A, B, W)
        # dK = dK_hat / sqrt(n n^T), for j != i, ...  Both terms hold i = j, where F_i - F_i = 0
        F = F.astype(np.float64)
        dlog_sigma = (sums + diagonal) @ F**2 - 2 * crosses
        if self.n is not None:
            # ... + dn 1^T, for all j, with dn = -(sums over rows and columns of dK_hat K_hat) / 2n
            dn = (diagonal - sums) / (2 * self.n)                            # (N,): without i = j
            xp, d = array_module(F), F.shape[1]
            one = xp.ones_like(F[:, :1])
            K_1, K_F, K_F2 = xp.split(self.K.filter(xp.concatenate([one, F, F**2], axis=1)),
                                      [1, 1 + d], axis=1)                    # (N, 1), (N, d) twice
            dlog_sigma += dn @ (F**2 * K_1 - 2 * F * K_F + K_F2)
        return dW, dlog_sigma

    def _sums(self, a, K_A, b, W):
        """dW; sums of dK_hat K_hat (N,); the diagonal of dK_hat (N,).

        The sums are those of rows, with i = j, plus those of columns, without.
        """
        xp, K = array_module(a), self.K_with_self
        v = K.blur(K.splat(b))

        def part(rows):
            a_i, b_i, K_b = a[rows], b[rows], K.slice(v, rows)
            K_a = side_by_side([K_dz[rows] for K_dz in K_A])
            return (compatible_backward(b_i, K_a, W),
                    reward(a_i, K_b, W) + reward(K_a, b_i, W), reward(a_i, b_i, W))

        dW, sums, diagonal = zip(*for_each(part, blocks(len(a), a), a))
        return sum(dW), xp.concatenate(sums), xp.concatenate(diagonal)

    def _crosses(self, F, A, B, W):
        """<F_k A, K_hat F_k B W>, with i = j, for each k: (d,).

        As slice is splat^T and W symmetric: <splat(F_k A) W, blur(splat(F_k B))>.
        """
        xp, K = array_module(A[0]), self.K_with_self
        scaled = for_each(K.scaled, list(F.T), F)                            # splat: of F_k v
        each = 1 if xp is np else len(scaled)        # a GPU blurs those of all k together
        groups = [scaled[k:k + each] for k in range(0, len(scaled), each)]

        def crosses(task):
            some, (a, b) = task
            blurred = K.blur(side_by_side([K_k.splat(b) for K_k in some]))
            return [(compatible(K_k.splat(a), W) * v).sum(dtype=np.float64)
                    for K_k, v in zip(some, xp.split(blurred, len(some), axis=1))]

        found = sum(for_each(crosses, list(itertools.product(groups, zip(A, B))), A[0]), [])
        found = xp.stack(found).reshape(len(groups), -1, each)               # pieces: of columns
        return found.sum(axis=1).ravel()                                     # (d,)


def grouped(steps, on_cpu):
    """T arrays (N, L) in lists of a few, whose columns together stay in a processor's cache.

    All together on a GPU.
    """
    each = max(1, PIECE_COLUMNS // steps[0].shape[1]) if on_cpu else len(steps)
    return [steps[t:t + each] for t in range(0, len(steps), each)]


def side_by_side(steps):
    """T arrays (N, L) -> (N, T L)."""
    return array_module(steps[0]).concatenate(steps, axis=1) if len(steps) > 1 else steps[0]


# z = x W, the labels of each pixel mixed by their compatibility, and the way back to W.
def compatible(x, W):
    """x W: rows of labels (n, L), or several of them side by side, for W () (Potts) or (L, L)."""
    if W.ndim == 0:
        return W * x
    return product(x.reshape(-1, len(W)), W).reshape(x.shape)


# forward: z = x W
def compatible_backward(x, dz, W):
    """dL/dW from x and dL/dz, in float64; the symmetric part of it."""
    if W.ndim == 0:
        return row_sums(x * dz).sum(dtype=np.float64)
    dW = product(x.reshape(-1, len(W)).T, dz.reshape(-1, len(W))).astype(np.float64)
    return (dW + dW.T) / 2


def reward(x, y, W):
    """x W y^T for each row: (n,)."""
    if W.ndim == 0:
        return W * row_sums(x * y)
    return row_sums(x * compatible(y, W))


class ExactFilter:
    """K by brute force, O(N^2): the twin of PermutohedralLattice that the tests measure it by.

    features: (N, d), already divided by sigma.  Computes in float64, returns `dtype`.
    K is symmetric, its diagonal 1.  Splat and slice do next to nothing; all is in the blur.
    Raises ValueError where features are not finite.
    """

    def __init__(self, features, dtype=None):
        xp = array_module(features)
        if not bool((abs(features) < np.inf).all()):                         # NaN compares as false
            raise ValueError("features: found NaN or infinite values, expected finite ones")
        self.dtype = dtype or features.dtype
        self.features = features - features.mean(axis=0, dtype=np.float64)
        self.scale = xp.ones_like(self.features[:, :1])                      # (N, 1)
        self.diagonal = xp.ones_like(self.features[:, 0], dtype=self.dtype)
        n = len(features)
        self.whole = self._kernel(slice(0, n)) if n * n <= TILE else None    # K, where it fits

    def filter(self, values):
        """K @ values: (N, C) -> (N, C).  Raises ValueError for another N."""
        return self.slice(self.blur(self.splat(values)))

    def splat(self, values):
        """(N, C) -> (N, C), float64."""
        if values.ndim != 2 or len(values) != len(self.features):
            raise ValueError(f"values: found shape {values.shape}, "
                             f"expected ({len(self.features)}, any): one row for each feature")
        return self.scale * values

    def blur(self, v):
        """All of K: (N, C) -> (N, C)."""
        if self.whole is not None:
            return self.whole @ v
        step = max(1, TILE // len(v))
        return array_module(v).concatenate([self._kernel(slice(first, first + step)) @ v
                                            for first in range(0, len(v), step)])

    filter_transpose, blur_transpose = filter, blur                          # K is symmetric

    def slice(self, v, rows=slice(None)):
        """(N, C) -> (N, C), or a block of these rows."""
        return (self.scale[rows] * v[rows]).astype(self.dtype)

    def scaled(self, s):
        """The filter of diag(s) K diag(s) for s (N,)."""
        other = copy.copy(self)
        other.scale = self.scale * s[:, None]
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
