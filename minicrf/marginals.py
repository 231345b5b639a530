"""Marginals of logits: the softmax, or the damped update, which converges (Sec. 3.1: CCCP).

Legend: N pixels, L labels.
"""
import numpy as np

from .arrays import array_module, row_maxima, row_sums
from .losses import softmax

NEWTON_STEPS = 20       # 4 to 13 suffice for logits up to 100 and damping up to 20
NEWTON_ERROR = {"f": 1e-6, "d": 1e-14}           # of the sum of a row's marginals


def marginals(z, c):
    """q (N, L): log q + c q = z - lambda, its rows sum to 1.  c = 0: softmax(z).

    "A non-linear system of equations independently for each marginal" (Sec. 3.1), in u = log q and
    lambda, by Newton's method: plain.log_marginals.
    """
    if c == 0:
        return _softmax(z)
    xp = array_module(z)
    z = z - row_maxima(z)[:, None]
    z = xp.maximum(z, -1000 * (1 + c))           # also -inf: there exp(u) is 0
    u = z / (1 + c)                              # u = log softmax(z / (1 + c)) to start with
    u -= xp.log(row_sums(xp.exp(u)))[:, None]
    q = xp.exp(u)
    lam, excess = row_sums(q * (z - u - c * q)), 0                           # lambda: (N,)
    for _ in range(NEWTON_STEPS):
        slope = 1 + c * q                                                    # (N, L)
        r = z - u                                # what is left of the first equation,
        r -= slope                               # z - u - c q - lambda
        r -= (lam - 1)[:, None]
        h = q / slope
        dlam = (row_sums(h * r) + excess) / row_sums(h)                      # (N,)
        lam += dlam
        r -= dlam[:, None]
        r /= slope
        u += r
        q = xp.exp(u)
        excess = row_sums(q) - 1                 # what is left of sum_l q = 1
        if bool(abs(excess).max() < NEWTON_ERROR[z.dtype.char]):
            break
    return q / (1 + excess)[:, None]


def _softmax(z):
    """losses.softmax of (N, L), where it can without the maxima: they take a tenth of inference."""
    if array_module(z) is np:                    # a GPU should not be asked how large z is
        with np.errstate(over="ignore"):
            q = np.exp(z)
            total = row_sums(q)                  # (N,)
        if 1e-20 < total.min() and total.max() < 1e20:                   # NaN compares as false
            q *= (1 / total)[:, None]
            return q
    return softmax(z)


def through_log_marginals(du, q, c):
    """dL/dz from dL/du, u = log q, q = marginals(z, c), all (N, L).

    (1 + c q) du = dz - dlambda and sum_l q du = 0: the backward of plain.log_marginals.
    """
    if c == 0:
        return du - q * row_sums(du)[:, None]
    g, h = du / (1 + c * q), q / (1 + c * q)
    return g - h * (row_sums(g) / row_sums(h))[:, None]


def through_marginals(dq, q, c):
    """dL/dz from dL/dq, all (N, L): q = exp u."""
    return through_log_marginals(q * dq, q, c)
