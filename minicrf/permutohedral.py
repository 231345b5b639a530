"""The permutohedral lattice: Gaussian filtering in any number of dimensions in O(N) [Adams 2010].

Values are splatted onto the corners of the simplex around each feature, blurred along the lattice's
d+1 directions and sliced back: the messages of the paper's Eq. 5, and of its back-tracking.
Legend: N points, d feature dimensions, S distinct simplices, P lattice points, C columns of values.
"""
import copy

import numpy as np

from .arrays import array_module, sparse_module, to_host

LARGEST_WORD = 2**62        # packed coordinates stay below, so that int64 holds them
LARGEST_COORDINATE = 2**28  # int32 holds the cells' numbers, float64 the places within them


class PermutohedralLattice:
    """The linear map K ~ exp(-|F_i - F_j|^2 / 2) over N features F_i of d dimensions [Adams 2010].

    K = alpha * slice @ B_d @ ... @ B_0 @ splat, with splat = slice^T and B_j the blur along axis j.
    features: (N, d) floats, already divided by sigma: the kernel has unit width in every direction.
    `diagonal` (N,) is K's own diagonal, the DESIGN's kappa: exact where no neighbour is missing.
    Everything is in the features' dtype.  Raises ValueError where features are not (N, d) or not
    finite, or too far apart for their width.
    """

    def __init__(self, features):
        cells, ranks, offsets = _enclosing_simplices(features)               # each (d+1, N)
        weights = _barycentric(offsets)                               # (d+1, N)
        corners, points = _corners(cells, ranks)                             # (N, d+1)
        d = len(weights) - 1
        self.alpha = 1 / (1 + 2.0**-d)
        self.diagonal = self.alpha * _self_response(weights)                 # (N,)
        self.slice = _sparse_rows(weights.T, corners, len(points))           # (N, P)
        self.blurs = [_blur(points, axis, weights.dtype) for axis in range(d + 1)]
        self._row_slices = {}

    def filter(self, values):
        """K @ values: (N, C) -> (N, C), unnormalised.  Raises ValueError for another N."""
        return self.gather(self.spread(values))

    def filter_transpose(self, values):
        """K^T @ values: (N, C) -> (N, C)."""
        return self.gather(self.spread_transpose(values))

    # The two halves of a filter, for those who split the work: spread in one go, gather by rows.
    def spread(self, values):
        """Splat and blur: (N, C) -> (P, C)."""
        v = self._splat(values)                                              # (P, C)
        for blur in self.blurs:
            v = blur @ v
        v *= self.alpha
        return v

    def spread_transpose(self, values):
        """The same for K^T: (N, C) -> (P, C).  Each blur is symmetric, but their order is not."""
        v = self._splat(values)                                              # (P, C)
        for blur in reversed(self.blurs):
            v = blur @ v
        v *= self.alpha
        return v

    def gather(self, v, rows=None):
        """Slice what was spread, (P, C), at all N points or at a slice of them: (rows, C)."""
        if rows is None:
            return self.slice @ v
        key = rows.start, rows.stop
        if key not in self._row_slices:      # kept, since mean field comes back for the same rows
            self._row_slices[key] = self.slice[rows]
        return self._row_slices[key] @ v

    def inner(self, a, b):
        """<a, K b>, summed over the columns, for a and b (N, C): no need to slice.  A 0-d array."""
        xp = array_module(a)
        return xp.vdot(self._splat(a), self.spread(b))

    def scaled(self, s):
        """The lattice of diag(s) K diag(s) for s (N,): normalises K, or weights it by a feature."""
        other = copy.copy(self)
        corners = self.slice.indices.reshape(len(s), -1).copy()              # (N, d+1)
        weights = self.slice.data.reshape(corners.shape) * s[:, None]
        other.slice = _sparse_rows(weights, corners, self.slice.shape[1])
        other.diagonal = self.diagonal * s * s
        other._row_slices = {}
        return other

    def _splat(self, values):
        if values.ndim != 2 or len(values) != self.slice.shape[0]:
            raise ValueError(f"values: found shape {values.shape}, "
                             f"expected ({self.slice.shape[0]}, any): one row for each feature")
        return self.slice.T @ values


def _enclosing_simplices(features):
    """Where each feature lies in the lattice: (cells, ranks, offsets), each (d+1, N).

    Coordinates are in units of d+1, so that cells, the nearest remainder-0 point, are whole numbers
    that sum to 0; offsets are what is left; ranks sort them, 0 for the largest.
    """
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"features: found shape {features.shape}, expected (N, d), neither 0")
    xp = array_module(features)
    d = features.shape[1]
    reach = float(abs(features).max())
    if not reach < LARGEST_COORDINATE:
        raise ValueError(f"features: found magnitude {reach:g}, expected finite values under "
                         f"{LARGEST_COORDINATE:g} kernel widths")
    # float32 leaves too few digits for the place within the cell when there are many cells
    elevated = _elevate(features.T if reach < 2**12 else features.T.astype(np.float64))

    cells = xp.rint(elevated)
    offsets = elevated - cells
    ranks = xp.empty(cells.shape, dtype=np.int16)
    ranks[:] = xp.arange(d + 1)[:, None]
    for i in range(d + 1):
        for j in range(i + 1, d + 1):
            smaller = offsets[i] < offsets[j]
            ranks[i] += smaller
            ranks[j] -= smaller

    # rounding each coordinate by itself may leave the plane: put those with the most extreme
    # offsets right, which turns the order around
    ranks += cells.sum(axis=0).astype(np.int16)
    up = (ranks < 0).astype(np.int16) - (ranks > d).astype(np.int16)         # (d+1, N): -1, 0 or 1
    ranks += (d + 1) * up
    cells += up
    return cells.astype(np.int32), ranks, (elevated - cells).astype(features.dtype)


def _elevate(features):
    """(d, N) features -> (d+1, N) coordinates in the plane where they sum to 0, in units of d+1.

    Scaled so that splat, blur and slice together have unit variance [Adams 2010, Sec. 3.1].
    """
    xp = array_module(features)
    d = len(features)
    elevated = xp.empty((d + 1, features.shape[1]), dtype=features.dtype)
    running = xp.zeros_like(elevated[0])
    for j in range(d, 0, -1):
        step = features[j - 1] * float(np.sqrt(2 / 3) / np.sqrt(j * (j + 1)))
        elevated[j] = running - j * step
        running += step
    elevated[0] = running
    return elevated


def _barycentric(offsets):
    """Weights of the simplex' corners of remainder 0..d, from offsets: both (d+1, N)."""
    xp = array_module(offsets)
    d = len(offsets) - 1
    ordered = list(offsets)                       # largest first, by odd-even transposition sort
    for i in range(d + 1):
        for j in range(i % 2, d, 2):
            above, below = ordered[j], ordered[j + 1]
            ordered[j], ordered[j + 1] = xp.maximum(above, below), xp.minimum(above, below)
    weights = xp.empty_like(offsets)
    weights[0] = 1 + ordered[d] - ordered[0]
    for r in range(1, d + 1):
        weights[r] = ordered[d - r] - ordered[d + 1 - r]
    return weights


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
    return (weights * (beta @ weights)).sum(axis=0)


def _corners(cells, ranks):
    """The lattice points at the simplices' corners: numbers (N, d+1), and an index of the points.

    A point of remainder r has the coordinates r + (d+1) m in the elevated plane, for whole m; its
    column in the index is (m_0, ..., m_d-1, r): they sum to 0, so the last m is known.
    """
    xp = array_module(cells)
    d = len(cells) - 1
    # pixels share simplices: find those first, and the corners of each only once
    simplices = _Index(xp.concatenate([cells[:d], ranks[:d]]))
    cells, ranks = simplices.columns[:d], simplices.columns[d:]              # (d, S) each
    corners = xp.empty((d + 1, d + 1, len(simplices)), dtype=cells.dtype)    # (column, r, S)
    for r in range(d + 1):
        corners[:d, r] = cells - (ranks > d - r)
        corners[d, r] = r
    points = _Index(corners.reshape(d + 1, -1))
    numbers = points.numbers.reshape(d + 1, -1).T                            # (S, d+1)
    return xp.take(xp.ascontiguousarray(numbers), simplices.numbers, axis=0), points


def _blur(points, axis, dtype):
    """The sparse (P, P) matrix of v_p + (v_p+ + v_p-) / 2, p+ and p- the neighbours along the axis.

    Neighbours that hold no pixel are missing and count as zero.
    """
    xp = array_module(points.columns)
    d = len(points.columns) - 1
    # p+ = p + 1 - (d+1) e_axis: the remainder grows by one, and d+1 carries into every m
    after = points.columns.copy()                                            # (d+1, P)
    after[d] += 1
    carry = after[d] > d
    after[:d] += carry
    after[d] -= (d + 1) * carry
    if axis < d:
        after[axis] -= 1
    after = points.find(after).astype(np.int32)                             # (P,), -1 if missing

    p = xp.arange(len(points), dtype=np.int32)
    before = xp.full(len(p) + 1, -1, dtype=np.int32)
    before[after] = p                    # where it is missing, -1, this fills the place at the end
    before = before[:-1]
    columns = xp.stack([p, after, before], axis=1)                           # (P, 3)
    weights = xp.full(columns.shape, 0.5, dtype=dtype)
    weights[:, 0] = 1
    return _sparse_rows(weights, columns, len(p), missing=True)


def _sparse_rows(weights, columns, width, missing=False):
    """The sparse (n, width) matrix of weights (n, k) at columns (n, k).

    missing: some columns are -1, and left out.
    """
    xp = array_module(weights)
    n, k = columns.shape
    starts = xp.arange(0, n * k + 1, k, dtype=np.int32)                      # (n+1,)
    weights, columns = weights.ravel(), columns.ravel()
    if missing:
        present = columns >= 0
        starts[1:] = xp.cumsum(present.reshape(n, k).sum(axis=1))
        kept = xp.flatnonzero(present)                # the one place that waits for a GPU
        weights, columns = weights[kept], columns[kept]
    matrix = sparse_module(weights).csr_matrix((weights, columns, starts), shape=(n, width))
    # No number comes twice in a row.  Nor need they be in order: products do not mind, but CuPy
    # would look first, and sort.
    matrix.has_canonical_format = True
    return matrix


class _Index:
    """The distinct columns of an integer (k, n) array, in sorted order, and a way to look them up.

    `columns` (k, len) are the distinct ones; `numbers` (n,) says which each of the n columns is.
    """

    def __init__(self, columns):
        xp = array_module(columns)
        # in one go: a GPU is asked once
        self.low, high = to_host(xp.stack([columns.min(axis=1), columns.max(axis=1)])).tolist()
        self.span = [high + 1 - low for low, high in zip(self.low, high)]
        self.prefixes = {}
        self.words, numbers = xp.unique(self._pack(columns), return_inverse=True)
        self.numbers = numbers.astype(np.int32)                              # (n,)
        member = xp.empty(len(self.words), dtype=np.int32)
        member[numbers] = xp.arange(len(numbers), dtype=np.int32)
        self.columns = columns[:, member]

    def __len__(self):
        return len(self.words)

    def find(self, columns):
        """The numbers (n,) of columns (k, n); -1 for those that are not in the index."""
        xp = array_module(columns)
        numbers = _look_up(self.words, self._pack(columns))
        for digit, low, span in zip(columns, self.low, self.span):
            numbers = xp.where((digit < low) | (digit >= low + span), -1, numbers)
        return numbers

    def _pack(self, columns):
        """Each column as one integer, digit by digit: equal if and only if the columns are equal.

        Where 64 bits are too few, the digits so far are replaced by their number among those that
        the index holds, from `prefixes`; by -1 if it holds no such column: the word stays negative.
        """
        xp = array_module(columns)
        words, size = xp.zeros(columns.shape[1], dtype=np.int64), 1
        for k, (digit, low, span) in enumerate(zip(columns, self.low, self.span)):
            if size * span >= LARGEST_WORD:
                if k not in self.prefixes:
                    self.prefixes[k] = xp.unique(words)
                words, size = _look_up(self.prefixes[k], words), len(self.prefixes[k])
            words *= span
            words += digit - low
            size *= span
        return words


def _look_up(table, words):
    """The places of words in the sorted table; -1 for those that it does not hold."""
    xp = array_module(table)
    place = xp.minimum(xp.searchsorted(table, words), len(table) - 1)
    return xp.where(table[place] == words, place, -1)
