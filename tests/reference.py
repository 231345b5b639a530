"""The CRF in dense matrices, no more than Eq. 5 and 9 say: what tests measure the engine by."""
import itertools

import numpy as np
from scipy.special import wrightomega, xlogy

from minicrf.losses import softmax


def dense(features, sigma, normalization, exclude_self):
    """A kernel of Eq. 9 as an (N, N) matrix, straight from the formulas; features (N, d)."""
    F = features / sigma
    K = np.exp(-((F[:, None] - F) ** 2).sum(axis=2) / 2)
    n = K.sum(axis=1)
    if exclude_self:
        K -= np.eye(len(F))
    return K / np.sqrt(n[:, None] * n) if normalization == "symmetric" else K


def damped_marginals(z, c):
    """q (N, L) of log q + c q = z - lambda, sum_l q = 1: lambda by halving an interval."""
    if c == 0:
        return softmax(z)
    low = z.max(axis=1, keepdims=True) - c                       # here some q = 1 or more
    high = low + c + np.log(z.shape[1])                          # here all q <= 1 / L
    for _ in range(100):
        middle = (low + high) / 2
        q = wrightomega(z - middle + np.log(c)) / c              # v + log v = x, v = c q
        too_much = q.sum(axis=1, keepdims=True) > 1
        low, high = np.where(too_much, middle, low), np.where(too_much, high, middle)
    return q


def mean_field(f, K, W, T=5, c=0.):
    """q^0 .. q^T of scores (N, L), kernels (M, N, N) and compatibilities (M, L, L)."""
    q = [softmax(f)]
    for _ in range(T):
        z = f + sum(K_m @ q[-1] @ W_m for K_m, W_m in zip(K, W)) + c * q[-1]
        q.append(damped_marginals(z, c))
    return q


def free_energy(q, f, K, W):
    """KL(q || p) less log Z; W (M, L, L)."""
    return (xlogy(q, q) - q * f).sum() - sum((q * (K_m @ q @ W_m)).sum()
                                             for K_m, W_m in zip(K, W)) / 2


def kl(q, f, K, W):
    """KL(q || P) of Eq. 4 by all L^N labellings, up to log Z."""
    N, L = f.shape
    y = np.array(list(itertools.product(range(L), repeat=N)))            # (L^N, N)
    log_P = f[range(N), y].sum(axis=1)
    for i, j in itertools.combinations(range(N), 2):
        log_P += sum(K_m[i, j] * W_m[y[:, i], y[:, j]] for K_m, W_m in zip(K, W))
    Q = q[range(N), y].prod(axis=1)
    return (Q * (np.log(Q) - log_P)).sum()


def as_matrices(w, n_labels):
    """Compatibilities (M, L, L) of Potts weights (M,); matrices as they are."""
    return w[:, None, None] * np.eye(n_labels) if w.ndim == 1 else w
