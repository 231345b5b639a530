"""The permutohedral lattice: Gaussian filtering in any number of dimensions in O(N) [Adams 2010].

Values are splatted onto the corners of the simplex around each feature, blurred along the lattice's
d+1 directions and sliced back: the messages of mean field (Sec. 3.1), and of its back-tracking.
Legend: N features, d their dimensions, s distinct simplices, P lattice points, C columns of values.
"""
import copy
import math

import numpy as np

from .arrays import array_module, blocks, for_each, product, sparse_module, to_host, transposed

LARGEST_WORD = 2**62        # packed coordinates stay below, so that int64 holds them
LARGEST_COORDINATE = 2**28  # int32 holds the cells' numbers, float64 the places within them


class PermutohedralLattice:
    """The linear map K ~ exp(-|F_i - F_j|^2 / 2) over N features F_i of d dimensions [Adams 2010].

    K = slice @ alpha B_d @ ... @ B_0 @ splat, with splat = slice^T, B_j the blur along axis j.
    features: (N, d) floats, already divided by sigma: the kernel has unit width in every direction.
    `diagonal` (N,) is K's own diagonal, kappa: exact where no neighbour is missing.
    Everything is in the features' dtype.  Raises ValueError where features are not (N, d) or not
    finite, or too far apart for their width.
    """

    def __init__(self, features):
        cells, ranks, weights = _simplices(features)                         # each (d+1, N)
        corners, points, steps = _corners(cells, ranks)               # (N, d+1), (P,), (d+1,)
        d = len(weights) - 1
        self.alpha = 1 / (1 + 2.0**-d)
        self.diagonal = self.alpha * _self_response(weights)                 # (N,)
        # on the CPU an axis a thread; on a GPU all at once, as the host waits for their sizes
        axes = steps[:, None] if array_module(features) is np else steps[None]
        self.blurs = sum(for_each(lambda s: _blurs(points, s, weights.dtype), axes, weights), [])
        starts = array_module(features).arange(0, corners.size + 1, d + 1, dtype=np.int32)
        self._interpolate(_sparse(weights.T.ravel(), corners.ravel(), starts, len(points)))

    def _interpolate(self, S):
        """Set slice S (N, P), whole and in blocks of rows, and splat, its transpose."""
        self.S, self.S_T = S, transposed(S)
        each = S.nnz // S.shape[0]                                           # entries of a row
        self.S_rows = {rows.start: _sparse(S.data[each * rows.start:each * rows.stop],
                                           S.indices[each * rows.start:each * rows.stop],
                                           S.indptr[:rows.stop - rows.start + 1], S.shape[1])
                       for rows in blocks(S.shape[0], S.data)}

    def filter(self, values):
        """K @ values: (N, C) -> (N, C), unnormalised.  Raises ValueError for another N."""
        return self.S @ self.blur(self.splat(values))

    def filter_transpose(self, values):
        """K^T @ values: (N, C) -> (N, C)."""
        return self.S @ self.blur_transpose(self.splat(values))

    # The three parts of a filter, for those who share out the work.
    def splat(self, values):
        """Each feature gives its value to the corners of its simplex: (N, C) -> (P, C)."""
        if values.ndim != 2 or len(values) != self.S.shape[0]:
            raise ValueError(f"values: found shape {values.shape}, "
                             f"expected ({self.S.shape[0]}, any): one row for each feature")
        return (self.S_T @ values).reshape(self.S.shape[1], -1)

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

    def slice(self, v, rows):
        """Interpolate between the corners again, for a block of features: (P, C) -> (rows, C)."""
        return self.S_rows[rows.start] @ v

    def scaled(self, s):
        """The lattice of diag(s) K diag(s) for s (N,): normalises K."""
        other = copy.copy(self)
        S = copy.copy(self.S)                            # the same places
        S.data = (self.S.data.reshape(len(s), -1) * s[:, None]).ravel()      # (N, d+1)
        other._interpolate(S)
        other.diagonal = self.diagonal * s * s
        return other

    def side_by_side(self, weights):
        """The lattice whose splat gives weights_k * values for each row of weights (K, N).

        (N, C) -> (P, K*C), in one product; its blurs then take all K together.
        """
        xp = array_module(weights)
        K, N = weights.shape
        S, other = self.S, copy.copy(self)
        data = S.data.reshape(N, -1, 1) * weights.T[:, None]                 # (N, d+1, K)
        places = K * S.indices.reshape(N, -1, 1) + xp.arange(K, dtype=np.int32)
        other.S_T = transposed(_sparse(data.ravel(), places.ravel(), K * S.indptr, K * S.shape[1]))
        return other


def _simplices(features):
    """The simplex around each feature: (cells, ranks, weights), each (d+1, N).

    Coordinates are in units of d+1.  cells: the simplex' corner of remainder 0, whole numbers that
    sum to 0.  ranks: the order of what is left of the feature's coordinates, 0 for the largest; it
    tells which of the simplices at that corner.  weights: barycentric, of its d+1 corners.
    Raises ValueError where features are not (N, d) or not finite.
    """
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"features: found shape {features.shape}, expected (N, d), neither 0")
    xp = array_module(features)
    N, d = features.shape
    reach = float(abs(features).max())
    if not reach < LARGEST_COORDINATE:
        raise ValueError(f"features: found magnitude {reach:g}, expected finite values under "
                         f"{LARGEST_COORDINATE:g} kernel widths")
    # float32 leaves too few digits for the place within the cell when there are many cells
    dtype = features.dtype if reach < 2**12 else np.dtype(np.float64)
    cells = xp.empty((d + 1, N), np.int32)
    ranks = xp.empty((d + 1, N), np.int16)
    weights = xp.empty((d + 1, N), features.dtype)

    def locate(rows):
        elevated = _elevate(features[rows].T.astype(dtype))                  # (d+1, rows)
        cells[:, rows], ranks[:, rows] = cell, rank = _nearest(elevated)
        weights[:, rows] = _barycentric(elevated - cell)

    for_each(locate, blocks(N, features), features)
    return cells, ranks, weights


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


def _nearest(elevated):
    """(cells, ranks), as in `_simplices`, of points (d+1, N) in the plane.

    Rounding finds the nearest whole numbers, but each coordinate by itself: their sum may miss 0 by
    some m.  Then the m coordinates that were rounded down (or up) the most go the other way.
    """
    xp = array_module(elevated)
    d = len(elevated) - 1
    cells = xp.rint(elevated)
    offsets = elevated - cells
    # a coordinate's rank is the number of larger ones
    ranks = xp.zeros(cells.shape, np.int16) + xp.arange(d + 1, dtype=np.int16)[:, None]
    for i in range(d + 1):
        for j in range(i + 1, d + 1):
            smaller = offsets[i] < offsets[j]
            ranks[i] += smaller
            ranks[j] -= smaller
    ranks += cells.sum(axis=0).astype(np.int16)
    # those beyond either end are to move; having moved they are at the other end of the order
    moved = (ranks < 0).astype(np.int16) - (ranks > d).astype(np.int16)      # (d+1, N): -1, 0 or 1
    ranks += (d + 1) * moved
    cells += moved
    return cells, ranks


def _barycentric(offsets):
    """Weights of the simplex' corners of remainder 0..d, from offsets: both (d+1, N)."""
    xp = array_module(offsets)
    d = len(offsets) - 1
    ordered = list(offsets)                       # largest first, by odd-even transposition sort
    for i in range(d + 1):
        for j in range(i % 2, d, 2):
            above, below = ordered[j], ordered[j + 1]
            ordered[j], ordered[j + 1] = xp.maximum(above, below), xp.minimum(above, below)
    return xp.stack([1 + ordered[d] - ordered[0],
                     *(ordered[d - r] - ordered[d + 1 - r] for r in range(1, d + 1))])


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


def _corners(cells, ranks):
    """The lattice points at the simplices' corners: numbers (N, d+1), words (P,), steps (d+1,).

    A point is known by its word, one integer, linear in the coordinates: a step along axis j, which
    is 1 - (d+1) e_j, adds steps[j] wherever it starts.  Points are numbered in the order of words.
    """
    xp = array_module(cells)
    d = len(cells) - 1
    # The point (d+1) m + r, of whole m and remainder r, lies in the plane: its coordinates sum to
    # 0.  So d digits tell it: (d+1) m_0 + r, and m_j - m_0 for j = 1..d-1.  Here those of cells:
    digits = cells[:d] - cells[0]
    digits[0] = cells[0]
    low, high = to_host(xp.stack([digits.min(axis=1), digits.max(axis=1)])).tolist()
    spans = [high + 5 - low for low, high in zip(low, high)]    # corners, and steps from them
    spans[0] *= d + 1
    # a simplex' word has d ranks as further digits
    rank_units, units = np.split(_units([d + 1] * d + spans), 2)
    # by these digits, words are linear in m and r, with r counting units[0]
    m_units = np.append((d + 1) * units[:1] - units[1:].sum(), units[1:])    # (d,)
    steps = units[0] - np.append(m_units, 0)                                 # (d+1,): they sum to 0
    words = sum(m.astype(np.int64) * unit for m, unit in zip(cells, m_units))            # (N,)
    simplices = words + sum(rank.astype(np.int64) * unit for rank, unit in zip(ranks, rank_units))

    # pixels share simplices: the corners of each are needed only once
    _, numbers, member = _distinct(simplices)                                # (N,), (S,)
    ranks = xp.take(ranks, member, axis=1)                                   # (d+1, S)
    left = xp.arange(d, -1, -1, dtype=ranks.dtype)[:, None]
    # corner r is r steps away from corner 0, along the axes of the r highest ranks
    corners = words[member] + sum((rank > left) * step for rank, step in zip(ranks, steps))
    points, corners, _ = _distinct(corners.ravel())                          # (P,), ((d+1)*S,)
    corners = xp.ascontiguousarray(corners.reshape(d + 1, -1).T)             # (S, d+1)
    return xp.take(corners, numbers, axis=0), points, steps


def _units(spans):
    """int64 multipliers that make words of digits: different digits, within spans, different words.

    Where 64 bits are too few they are random; then, among a million, two agree once in 10^7 cases.
    """
    if math.prod(spans) < LARGEST_WORD:
        return np.cumprod([1] + spans[:-1], dtype=np.int64)
    return np.random.default_rng(0).integers(2**63, size=len(spans)) | 1


def _distinct(words):
    """The distinct words, sorted (P,); the number among them of each word (n,); where they are."""
    xp = array_module(words)
    order = xp.argsort(words, kind="stable")     # quick where they come in sorted runs: (n,)
    words = words[order]
    new = xp.ones(len(words), dtype=bool)
    new[1:] = words[1:] != words[:-1]
    numbers = xp.empty(len(words), dtype=np.int32)
    numbers[order] = xp.cumsum(new, dtype=np.int32) - 1
    first = xp.flatnonzero(new)                           # (P,)
    return words[first], numbers, order[first]


def _blurs(points, steps, dtype):
    """The sparse (P, P) matrices of v_p + (v_p+ + v_p-) / 2, p+ = p + step, for each of steps (K,).

    Neighbours that hold no pixel are missing and count as zero.  The matrices are made as one, one
    below the other: row p of the k-th is row k*P + p.
    """
    xp = array_module(points)
    K, P = len(steps), len(points)
    wanted = points + xp.asarray(steps)[:, None]          # (K, P): p+, wherever it is
    after = xp.minimum(xp.searchsorted(points, wanted), P - 1).astype(np.int32)
    rows = xp.flatnonzero(points[after] == wanted)        # (E,): those for which p+ is there
    below = after + xp.arange(0, K * P, P, dtype=np.int32)[:, None]
    after, below = after.ravel()[rows], below.ravel()[rows]      # (E,): p+ as a column, as a row
    starts = xp.ones(K * P + 1, dtype=np.int32)           # of the rows, which hold p, p+, p-
    starts[0] = 0
    starts[rows + 1] += 1
    starts[below + 1] += 1
    starts = xp.cumsum(starts, dtype=np.int32)
    columns = xp.empty(K * P + 2 * len(rows), dtype=np.int32)
    columns[starts[:-1].reshape(K, P)] = xp.arange(P, dtype=np.int32)
    columns[starts[rows] + 1] = after
    columns[starts[below + 1] - 1] = rows - (below - after)
    weights = xp.full(columns.shape, 0.5, dtype=dtype)
    weights[starts[:-1]] = 1
    ends = to_host(starts[::P]).tolist()                  # of the matrices: (K+1,)
    return [_sparse(weights[first:last], columns[first:last], starts[top:top + P + 1] - first, P)
            for top, first, last in zip(range(0, K * P, P), ends, ends[1:])]


def _sparse(weights, columns, starts, width):
    """The sparse matrix with `width` columns whose row i holds entries starts[i] to starts[i+1]."""
    # CuPy would look at arrays that a matrix is made of, and before its first product look whether
    # numbers in a row are distinct, as they are, and in order, which products do not need: and sort
    matrix = sparse_module(weights).csr_matrix((len(starts) - 1, width), dtype=weights.dtype)
    matrix.data, matrix.indices, matrix.indptr = weights, columns, starts
    matrix.has_canonical_format = True
    return matrix
