"""The permutohedral lattice: Gaussian filtering in any number of dimensions in O(N) [Adams 2010].

Values are splatted onto the corners of the simplex around each feature, blurred along the lattice's
d+1 directions and sliced back: the messages of mean field (Sec. 3.1), and of its back-tracking.
plain.simplex and plain.lattice_filter are the same, one feature at a time.
Legend: N features, d their dimensions, s distinct simplices, P lattice points, C columns of values.
"""
import copy
import math

import numpy as np

from .arrays import array_module, blocks, for_each, product, sparse_module, to_host, transposed

LARGEST_KEY = 2**62         # int64 holds the keys of points up to it
LARGEST_COORDINATE = 2**28  # float64 holds floor(a), and 24 bits of the remainder
LARGEST_SIZE = 2**31        # of a sparse matrix: its places are int32


class PermutohedralLattice:
    """The linear map K ~ exp(-|F_i - F_j|^2 / 2) over N features F_i of d dimensions [Adams 2010].

    K = slice @ alpha B_d @ ... @ B_0 @ splat, with splat = slice^T, B_j the blur along axis j.

    features: (N, d) floats, already divided by sigma: the kernel has unit width in every direction.
    dtype: of the values to be filtered; the features' own by default.
    `diagonal` (N,) is K's own diagonal, kappa: exact where no neighbour is missing.
    Raises ValueError where features are not (N, d) or not finite, too far apart for their width, or
    too many.
    """

    def __init__(self, features, dtype=None):
        simplices, keys, steps, ranks, weights = _simplices(features, dtype)
        corners, points = _corners(simplices, keys, steps, ranks)            # (N, d+1), (P,)
        d = len(weights) - 1
        self.alpha = 1 / (1 + 2.0**-d)
        self.diagonal = self.alpha * _self_response(weights)                 # (N,)
        # on the CPU one axis per thread; on a GPU all at once, as the host waits for their sizes
        groups = steps[:, None] if array_module(features) is np else steps[None]
        self.blurs = sum(for_each(lambda s: _blurs(points, s, weights.dtype), groups, weights), [])
        starts = array_module(features).arange(0, corners.size + 1, d + 1, dtype=np.int32)
        self._set_slice(weights.T, corners, starts, len(points))

    def _set_slice(self, weights, corners, starts, P):
        """Sparse slice S (N, P) and splat, its transpose, from weights and corners (N, d+1)."""
        self.S = _sparse(weights.ravel(), corners.ravel(), starts, P)
        self.S_T = transposed(self.S)
        self.S_rows = {}                         # blocks of S, made on first use

    def filter(self, values):
        """K @ values: (N, C) -> (N, C), unnormalised.  Raises ValueError for another N."""
        return self.slice(self.blur(self.splat(values)))

    def filter_transpose(self, values):
        """K^T @ values: (N, C) -> (N, C)."""
        return self.slice(self.blur_transpose(self.splat(values)))

    def splat(self, values):
        """Each feature gives its value to the corners of its simplex: (N, C) -> (P, C)."""
        if values.ndim != 2 or len(values) != self.S.shape[0]:
            raise ValueError(f"values: found shape {values.shape}, "
                             f"expected ({self.S.shape[0]}, any): one row for each feature")
        return self.S_T @ values

    def blur(self, v):
        """Blur along axes 0, 1 .. d in turn: (P, C) -> (P, C)."""
        for B in self.blurs:
            v = B @ v
        v *= self.alpha
        return v

    def blur_transpose(self, v):
        """The same for K^T: (P, C) -> (P, C).  Each blur is symmetric, but their order is not."""
        for B in reversed(self.blurs):
            v = B @ v
        v *= self.alpha
        return v

    def slice(self, v, rows=slice(None)):
        """Interpolate between the corners again: (P, C) -> (N, C), or a block of these rows."""
        if rows in (slice(None), slice(0, self.S.shape[0])):
            return self.S @ v
        if rows.start not in self.S_rows:
            self.S_rows[rows.start] = _rows(self.S, rows)
        return self.S_rows[rows.start] @ v

    def scaled(self, s):
        """The lattice of diag(s) K diag(s) for s (N,)."""
        other = copy.copy(self)
        weights = self.S.data.reshape(len(s), -1) * s[:, None]               # (N, d+1)
        other._set_slice(weights, self.S.indices, self.S.indptr, self.S.shape[1])
        other.diagonal = self.diagonal * s * s
        return other


def _simplices(features, dtype=None):
    """plain.simplex for all features: simplices and keys (N,), steps (d+1,), ranks and weights
    (d+1, N).

    floor(a + lambda) visits the corners of a feature's simplex while lambda runs from 0 to 1.  It
    begins at n = floor(a).  ranks: in which order its coordinates move on, the one with the largest
    remainder first: corner r is n + [rank < r].  weights: how long it stays at each corner.

    n and n + (1, .., 1) are one point, so n_j - n_0, j = 1..d, identify it.  Its key is one
    integer, linear in them: n_j + 1 adds steps[j] to the key, whatever n is.  A simplex' own
    integer has d ranks as further, lower digits.
    Raises ValueError as the class does.
    """
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"features: found shape {features.shape}, expected (N, d), neither 0")
    xp = array_module(features)
    N, d = features.shape
    if N * (d + 1) >= LARGEST_SIZE:
        raise ValueError(f"features: found {N} of {d} dimensions, too many for one lattice: "
                         f"N (d + 1) must stay under {LARGEST_SIZE}; filter parts of the image")
    reach = to_host(xp.stack([abs(F_k).max() for F_k in features.T]))    # (d,)
    if not reach.max() < LARGEST_COORDINATE:
        raise ValueError(f"features: found magnitude {reach.max():g}, expected finite values under "
                         f"{LARGEST_COORDINATE:g} kernel widths")
    # float32 leaves too few digits for the place within the cell when there are many cells
    dtype_of_a = features.dtype if reach.max() < 2**12 else np.dtype(np.float64)
    elevation = _elevate(np.eye(d))                                      # (d+1, d)
    # |n_j - n_0| < most + 3, at corners and their neighbours too
    spans = [2 * int(most) + 9 for most in abs(elevation[1:] - elevation[0]) @ reach]
    rank_units, units = np.split(_units([d + 1] * d + spans), 2)
    steps = np.append(-units.sum(), units)                               # they sum to 0
    keys, simplices = xp.empty(N, np.int64), xp.empty(N, np.int64)
    ranks = xp.empty((d + 1, N), np.int8)
    weights = xp.empty((d + 1, N), dtype or features.dtype)

    def locate(rows):
        a = _elevate(features[rows].T.astype(dtype_of_a))                    # (d+1, rows)
        n = xp.floor(a)
        remainders = a - n
        ranks[:, rows] = rank = _ranks(remainders)
        weights[:, rows] = _barycentric(remainders)
        keys[rows] = key = sum(n_j.astype(np.int64) * step for n_j, step in zip(n, steps))
        simplices[rows] = key + sum(r.astype(np.int64) * u for r, u in zip(rank, rank_units))

    for_each(locate, blocks(N, features), features)
    return simplices, keys, steps, ranks, weights


def _elevate(features):
    """(d, N) features -> a (d+1, N), coordinates in the plane where they sum to 0.

    Scaled so that splat, blur and slice together have unit variance [Adams 2010, Sec. 3.1].
    """
    xp = array_module(features)
    d = len(features)
    a = xp.empty((d + 1, features.shape[1]), dtype=features.dtype)
    running = xp.zeros_like(a[0])
    for j in range(d, 0, -1):                    # axis j of the plane: (1, .., 1, -j, 0, .., 0)
        step = features[j - 1] * float(np.sqrt(2 / 3) / np.sqrt(j * (j + 1)))
        a[j] = running - j * step
        running += step
    a[0] = running
    return a


def _ranks(remainders):
    """How many remainders are larger, or equal and before it: (d+1, N) int8, each of 0..d once.

    The order of plain.simplex' sort(moves).
    """
    xp = array_module(remainders)
    d = len(remainders) - 1
    ranks = xp.zeros(remainders.shape, np.int8) + xp.arange(d + 1, dtype=np.int8)[:, None]
    for i in range(d + 1):
        for j in range(i + 1, d + 1):
            smaller = remainders[i] < remainders[j]
            ranks[i] += smaller
            ranks[j] -= smaller
    return ranks


def _barycentric(remainders):
    """Weights of corners 0..d: how long floor(a + lambda) stays there, (d+1, N).

    A coordinate moves on at lambda = 1 - its remainder.  Corner 0 is that of lambda = 0, and again
    of the end, when all have moved on: n + (1, .., 1).
    """
    xp = array_module(remainders)
    d = len(remainders) - 1
    ordered = list(remainders)                    # largest first, by odd-even transposition sort
    for i in range(d + 1):
        for j in range(i % 2, d, 2):
            above, below = ordered[j], ordered[j + 1]
            ordered[j], ordered[j + 1] = xp.maximum(above, below), xp.minimum(above, below)
    return xp.stack([1 - ordered[0] + ordered[d],
                     *(ordered[r - 1] - ordered[r] for r in range(1, d + 1))])


def _corners(simplices, keys, steps, ranks):
    """The lattice points at the simplices' corners: numbers (N, d+1), and their keys (P,).

    Points are numbered in the order of their keys.
    """
    xp = array_module(keys)
    # pixels share simplices: the corners of each are needed only once
    _, numbers, example = _distinct(simplices)                               # (N,), (s,)
    ranks = xp.take(ranks, example, axis=1)                                  # (d+1, s)
    r = xp.arange(len(ranks), dtype=ranks.dtype)[:, None]
    at = keys[example] + sum((rank < r) * step for rank, step in zip(ranks, steps))      # (d+1, s)
    points, corners, _ = _distinct(at.ravel())                               # (P,), ((d+1) s,)
    corners = xp.ascontiguousarray(corners.reshape(at.shape).T)              # (s, d+1)
    return xp.take(corners, numbers, axis=0), points


def _units(spans):
    """int64 factors that make keys of digits: sum_j unit_j digit_j differs where digits differ.

    Places in a number system with a base for each digit; where 64 bits are too few for that, as
    with many dimensions, a hash, modulo 2^64, by random factors: among a million points, two agree
    once in 10^7 cases.
    """
    if math.prod(spans) < LARGEST_KEY:
        return np.cumprod([1] + spans[:-1], dtype=np.int64)
    return np.random.default_rng(0).integers(2**63, size=len(spans)) | 1


def _distinct(keys):
    """The distinct keys, sorted (P,); each key's number among them (n,); an index of each (P,).

    np.unique would do the same in up to twice the time, and on a GPU wait more often.
    """
    xp = array_module(keys)
    order = xp.argsort(keys, kind="stable")               # (n,): they come in sorted runs
    keys = keys[order]
    new = xp.ones(len(keys), dtype=bool)
    new[1:] = keys[1:] != keys[:-1]
    numbers = xp.empty(len(keys), dtype=np.int32)
    numbers[order] = xp.cumsum(new, dtype=np.int32) - 1
    first = xp.flatnonzero(new)                           # (P,)
    return keys[first], numbers, order[first]


def _self_response(weights):
    """sum_rs b_r b_s beta(|r - s|): what a point gets back of its own value, over alpha: (N,).

    Corners r and s of one simplex meet by m = |r - s| of the d+1 blurs, or by the other d+1-m.
    """
    xp = array_module(weights)
    d = len(weights) - 1
    r = np.arange(d + 1)
    m = abs(r[:, None] - r)                                                  # (d+1, d+1)
    beta = 2.0**-m + 2.0**-(d + 1 - m)
    beta[m == 0] = 1 + 2.0**-d                    # not moved, or all the way around in either sense
    beta = xp.asarray(beta, dtype=weights.dtype)
    return (weights * product(beta, weights)).sum(axis=0)


def _blurs(points, steps, dtype):
    """The sparse (P, P) matrices of v_p + (v_p+ + v_p-) / 2, p+ = p + step, for each of steps (J,).

    Neighbours that hold no pixel are missing and count as zero.  The matrices are made as one, one
    below the other: row p of the j-th is row j P + p.  plain's steps have the other sign: p+ and
    p- exchanged.
    """
    xp = array_module(points)
    J, P = len(steps), len(points)
    if 3 * J * P >= LARGEST_SIZE:
        raise ValueError(f"features: found {P} lattice points, too many for one lattice; wider "
                         "sigmas need fewer")
    wanted = points + xp.asarray(steps)[:, None]          # (J, P): p+, wherever it is
    after = xp.minimum(xp.searchsorted(points, wanted), P - 1).astype(np.int32)
    rows = xp.flatnonzero(points[after] == wanted)        # (E,): those for which p+ is there
    below = after + xp.arange(0, J * P, P, dtype=np.int32)[:, None]
    after, below = after.ravel()[rows], below.ravel()[rows]      # (E,): p+ as a column, as a row
    starts = xp.ones(J * P + 1, dtype=np.int32)           # of the rows, which hold p, p+, p-
    starts[0] = 0
    starts[rows + 1] += 1                                 # counts right: no row comes twice
    starts[below + 1] += 1
    starts = xp.cumsum(starts, dtype=np.int32)
    columns = xp.empty(J * P + 2 * len(rows), dtype=np.int32)
    columns[starts[:-1].reshape(J, P)] = xp.arange(P, dtype=np.int32)
    columns[starts[rows] + 1] = after
    columns[starts[below + 1] - 1] = rows - (below - after)      # p: below - after is j P
    weights = xp.full(columns.shape, 0.5, dtype=dtype)
    weights[starts[:-1]] = 1
    ends = to_host(starts[::P]).tolist()                  # of the matrices: (J+1,)
    return [_sparse(weights[first:last], columns[first:last], starts[top:top + P + 1] - first, P)
            for top, first, last in zip(range(0, J * P, P), ends, ends[1:])]


def _sparse(weights, columns, starts, width):
    """The sparse matrix with `width` columns whose row i holds entries starts[i] to starts[i+1]."""
    # set directly: csr_matrix((...)) would check its arrays, and CuPy sort each row before a first
    # product.  Columns in a row are distinct, and products do not need them in order
    matrix = sparse_module(weights).csr_matrix((len(starts) - 1, width), dtype=weights.dtype)
    matrix.data, matrix.indices, matrix.indptr = weights, columns, starts
    matrix.has_canonical_format = True
    return matrix


def _rows(matrix, rows):
    """A block of a sparse matrix' rows, a view."""
    first, last = matrix.indptr[[rows.start, rows.stop]]
    return _sparse(matrix.data[first:last], matrix.indices[first:last],
                   matrix.indptr[rows.start:rows.stop + 1] - first, matrix.shape[1])
