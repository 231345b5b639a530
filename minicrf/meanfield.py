"""Mean-field inference in a fully connected CRF (Sec. 3.1), and back-tracking through it (Fig. 3).

    q^0 = softmax(f);   z^t = f + sum_m K_m q^(t-1) W_m;   q^t = softmax(z^t),   t = 1..T
Eq. 5 for all pixels at once; W_m is the compatibility mu^(m) as a score, w_m I for Potts (Eq. 9).
plain.mean_field is the same with dense matrices.
Legend: S the shape of the image, N its pixels; L labels; M kernels, the m-th one of d_m features;
T mean-field steps: q^T is after the last one, and K^T is K transposed.
"""
import functools
from typing import NamedTuple

import numpy as np

from .arrays import array_module, for_each, rowwise, to_host
from .inputs import check_array, check_scores
from .kernels import GaussianKernel, compatible, grouped, side_by_side
from .losses import softmax
from .marginals import marginals, through_log_marginals, through_marginals
from .saving import load_crf, save_crf

LARGEST_LOG_SIGMA = 50  # widths of e^50 pixels, or e^-50: learning has gone astray


class State(NamedTuple):
    """What a forward pass keeps for its way back."""
    kernels: list       # M GaussianKernels
    W: object           # M compatibilities, (M,) or (M, L, L), on the scores' device
    c: float            # damping
    steps: list         # q^0 .. q^(T-1), each (N, L)
    logits: object      # log q^T (*S, L), up to a constant a pixel: z^T where c = 0


class FeatureCRF:
    """Mean field in a CRF that M kernels of any features connect fully, and its gradients.

    n_labels: L.
    w: (M,), a weight for each kernel in the units of the scores (Potts), or (M, L, L), symmetric
        matrices of compatibility: the reward for label l at a pixel and l' at another one.
    sigmas: M lists of widths, one for each dimension of a kernel's features; or a dict of them.
    iterations: T.
    normalization: "symmetric" or "none".
    exclude_self: j != i as in Eq. 5.  False gives what public dense-CRF libraries compute.
    damping: c >= 0.  0 is the parallel update, which may swap labels for ever; from
        `descent_damping` on the free energy falls (Sec. 3.1: CCCP, by Newton's method).
    exact: brute-force kernels, O(N^2), instead of the permutohedral lattice.

    params, grads: dicts of float64 NumPy arrays "w" and "log_sigma_NAME", NAME being 0 .. M-1 or a
        key of sigmas.  backward adds into grads; `project` keeps w in range when learning.
    state: what the last forward kept for backward; pickles leave it out.  `state.steps` is
        q^0 .. q^(T-1), each (N, L), to watch convergence by.
    Raises ValueError where an option has the wrong length, sign or name.
    """
    OPTIONS = "n_labels", "iterations", "normalization", "exclude_self", "damping", "exact"
    __slots__ = *OPTIONS, "params", "grads", "state"         # a misspelt option raises

    def __init__(self, n_labels, *, w, sigmas, iterations=5, normalization="symmetric",
                 exclude_self=True, damping=0., exact=False):
        if normalization not in ("symmetric", "none"):
            raise ValueError(f"normalization: found {normalization!r}, "
                             "expected 'symmetric' or 'none'")
        M, L = len(sigmas), n_labels
        if L < 2:
            raise ValueError(f"n_labels: found {L}, expected 2 or more; for one class' probability "
                             "p, as of a sigmoid, stack [1 - p, p] as two labels")
        if not (iterations >= 0 and 0 <= damping < np.inf and M):
            raise ValueError(f"found {M} kernels, iterations {iterations} and damping {damping}, "
                             "expected 1, 0 and 0 or more")
        self.n_labels, self.iterations, self.normalization = n_labels, iterations, normalization
        self.exclude_self, self.damping, self.exact = exclude_self, damping, exact
        self.state = None
        try:
            w = np.array(w, dtype=np.float64)
        except (TypeError, ValueError):
            raise ValueError("w: found numbers and matrices, or matrices of several sizes; give "
                             "each kernel a number, or each an (L, L) matrix") from None
        if (w.shape not in ((M,), (M, L, L)) or not np.isfinite(w).all()
                or w.ndim == 3 and not np.allclose(w, w.swapaxes(1, 2))):
            raise ValueError(f"w: found {w.tolist()}, expected a finite number for each kernel, "
                             f"({M},), or symmetric matrices, ({M}, {L}, {L})")
        self.params = {"w": w}
        for name, sigma in (sigmas.items() if isinstance(sigmas, dict) else enumerate(sigmas)):
            sigma = np.array(sigma, dtype=np.float64)
            if sigma.ndim != 1 or not sigma.size or not (np.isfinite(sigma) & (sigma > 0)).all():
                raise ValueError(f"sigma_{name}: found {sigma.tolist()}, expected positive widths")
            self.params[f"log_sigma_{name}"] = np.log(sigma)
        self.grads = {name: np.zeros_like(value) for name, value in self.params.items()}

    def __repr__(self):
        shown = {"w": self.params["w"]}
        shown |= {name[4:]: np.exp(self.params[name]) for name in self._widths()}
        shown = {name: value.round(4).tolist() for name, value in shown.items()}
        shown |= {name: getattr(self, name) for name in FeatureCRF.OPTIONS[1:]}
        text = ", ".join(f"{name}={value!r}" for name, value in shown.items())
        return f"{type(self).__name__}({self.n_labels}, {text})"

    def __getstate__(self):
        return None, {name: getattr(self, name) for name in (*self.OPTIONS, "params", "grads")
                      } | {"state": None}

    def save(self, path):
        """Write parameters and options into an .npz file.  Raises OSError, naming it."""
        save_crf(path, self, self.OPTIONS)

    @classmethod
    def load(cls, path):
        """The CRF that `save` wrote.  Raises ValueError or OSError with one line."""
        return load_crf(path, cls._build)

    @classmethod
    def _build(cls, options, params):
        sigmas = {name[len("log_sigma_"):]: np.exp(p) for name, p in params.items() if name != "w"}
        return cls(w=params["w"], sigmas=sigmas, **options)

    def forward(self, scores, features, train=True):
        """Marginals q (*S, L) of scores f (*S, L): Eq. 5, T times, for all pixels at once.

        scores: float32 or float64, larger is likelier; -inf forbids a label.
        features: M arrays (*S, d_m), in the units of sigmas.
        train: keep what backward needs in `state`.  False saves memory and gives the same result.
        Raises TypeError for other kinds of arrays; ValueError for NaN or +inf, a pixel with every
        label forbidden, weights too large for the dtype, or shapes that disagree.  No argument is
        written to.
        """
        check_scores(scores, self.n_labels)
        return self._infer(scores, self._kernels(features, scores), train)

    def _infer(self, scores, kernels, train):
        xp, c = array_module(scores), self.damping
        f = xp.ascontiguousarray(scores).reshape(-1, self.n_labels)          # (N, L)
        W = self._compatibility(f)

        def z_of(f, q, *messages):               # of a block of rows
            return add_messages(f + c * q if c else f, messages, W)

        def q_of(f, q, *messages):
            return marginals(z_of(f, q, *messages), c)

        steps = []
        q = rowwise(lambda f: marginals(f, 0), xp.empty_like(f), f)          # q^0 = softmax(f)
        for _ in range(self.iterations):
            if train:
                steps.append(q)
            # z^t = f + sum_m K_m q^(t-1) W_m + c q^(t-1);  q^t = marginals(z^t)
            messages = filtered(kernels, q)
            q = rowwise(q_of, xp.empty_like(f), f, q, *messages)

        if not bool(abs(q.sum()) < np.inf):                                  # NaN compares as false
            raise ValueError(f"w: found {self.params['w'].tolist()}, too large for marginals in "
                             f"{f.dtype}; expected smaller weights")
        if train:                                                            # z^T, for the loss
            z = rowwise(z_of, xp.empty_like(f), f, steps[-1], *messages) if steps else f
            logits = z - c * q if c and steps else z                         # log q^T + lambda
            self.state = State(kernels, W, c, steps, logits.reshape(scores.shape))
        return q.reshape(scores.shape)                                       # (*S, L)

    @property
    def logits(self):
        """Of the last forward pass: state.logits, (*S, L), for losses.softmax_loss."""
        return self._kept(None).logits

    # forward: q^T = marginals(z^T)
    def backward(self, dq, state=None):
        """dL/dq (*S, L) -> dL/dscores (*S, L); adds dL/dparams into grads.

        state: `crf.state` as the forward pass in question left it; None is that of the last one.
        """
        state = self._kept(state)
        dq = _checked_gradient("dq", dq, state)
        q = softmax(state.logits.reshape(dq.shape))
        return self._back_track(through_marginals(dq, q, state.c if state.steps else 0), state)

    # forward: logits = log q^T
    def backward_logits(self, dz, state=None):
        """The same from dL/dlogits, (*S, L) or (N, L): q - onehot(y) for Eq. 6, without 1/q.

        With damping dz must sum to 0 over the labels of a pixel, as it does for any loss of q.
        """
        state = self._kept(state)
        dz = _checked_gradient("dz", dz, state)
        if state.c and state.steps:
            dz = through_log_marginals(dz, softmax(state.logits.reshape(dz.shape)), state.c)
        return self._back_track(dz, state)

    def _back_track(self, dz, state):
        """Fig. 3, step 3: from dL/dz^T (N, L) through T steps, however many the parameters."""
        kernels, W, c, q, _ = state
        xp, A, K_A = array_module(dz), [], []                    # dz^t, and all K_m^T dz^t

        def turn_back(dz, q, *messages, c_q):    # of a block of rows
            # forward: z^t = f + sum_m K_m q^(t-1) W_m + c q^(t-1),  W_m^T = W_m
            dq = add_messages(c * dz if c else 0, messages, W)
            # forward: q^(t-1) = marginals(z^(t-1))
            return through_marginals(dq, q, c_q)

        for t in range(len(q), 0, -1):
            messages = filtered_back(kernels, dz)
            A.append(dz)
            K_A.append(messages)
            update = functools.partial(turn_back, c_q=c if t > 1 else 0)     # q^0 is not damped
            dz = rowwise(update, xp.empty_like(dz), dz, q[t - 1], *messages)

        # forward: f enters each z^t, and z^0 = f
        df = rowwise(lambda *all_dz: sum(all_dz), xp.empty_like(dz), dz, *A)
        if q:                    # forward: K_m and W_m enter each z^t, too: all steps at once
            on_cpu = xp is np
            A, B = ([side_by_side(group) for group in grouped(x, on_cpu)] for x in (A, q[::-1]))
            for m, (name, K_m_A) in enumerate(zip(self._widths(), zip(*K_A))):
                dW, dlog_sigma = kernels[m].backward(A, grouped(K_m_A, on_cpu), B, W[m])
                flat = to_host(xp.concatenate([dW.ravel(), dlog_sigma]))     # one wait for a GPU
                self.grads["w"][m] += flat[:dW.size].reshape(dW.shape)
                self.grads[name] += flat[dW.size:]
        return df.reshape(state.logits.shape)                                # (*S, L)

    def project(self):
        """After an update of w: to the nearest w >= 0, or positive semi-definite matrices.

        That is mu^(m) negative semi-definite as an energy, which convergence asks for (Sec. 3.1).
        """
        w = self.params["w"]
        if w.ndim == 1:
            w[...] = w.clip(0)
        else:
            values, vectors = np.linalg.eigh((w + w.swapaxes(1, 2)) / 2)     # (M, L), (M, L, L)
            w[...] = vectors * values.clip(0)[:, None] @ vectors.swapaxes(1, 2)

    def descent_damping(self, scores, features):
        """The damping from which on no step raises the free energy (with exact kernels): a float.

        c >= sum_m kappa_m,i lambda_max(W_m) for every pixel i: the diagonals that j != i leaves out
        would have made the kernels positive semi-definite (Sec. 3.1).  Out of the range in which
        `project` keeps w, c also covers -lambda_min(W_m) times what pixel i hears of all others.
        """
        xp, w = array_module(scores), self.params["w"]
        one = xp.ones_like(scores[..., :1]).reshape(-1, 1)                   # (N, 1)
        c, of_W = 0, w[:, None] if w.ndim == 1 else np.linalg.eigvalsh(w)    # eigenvalues (M, L)
        for kernel, low, high in zip(self._kernels(features, scores), of_W.min(1), of_W.max(1)):
            c = c + xp.maximum(kernel.kappa * max(0., float(high)),
                               kernel.filter(one)[:] * max(0., float(-low)))
        return float(c.max())

    def free_energy(self, q, scores, features):
        """KL(q || p) of marginals q (*S, L), less the constant log Z: what Eq. 4 minimises.

            sum_il q (log q - f)  -  1/2 sum_m sum_(i != j) k_m(i,j) q_i W_m q_j

        A float, to watch convergence by.  The parallel update does not promise to lower it at each
        step: it can swap between two states.  j != i, whatever exclude_self says.
        """
        xp = array_module(scores)
        check_scores(scores, self.n_labels)
        kernels = self._kernels(features, scores)
        f, q = (a.reshape(-1, self.n_labels) for a in (scores, q))           # (N, L)
        possible = q > 0                                                     # 0 log 0 = 0
        log_q, f_q = xp.log(xp.where(possible, q, 1)), xp.where(possible, f, 0)
        energy = (q * (log_q - f_q)).sum(dtype=np.float64)
        for kernel, W_m in zip(kernels, self._compatibility(f)):
            Kq = kernel.K_with_self.filter(q) - kernel.diagonal[:, None] * q
            energy = energy - (q * compatible(Kq, W_m)).sum(dtype=np.float64) / 2
        return float(energy)

    def _widths(self):
        return [name for name in self.params if name != "w"]

    def _compatibility(self, f):
        """W: numbers (M,) or matrices (M, L, L), where f is and in its dtype."""
        w = self.params["w"]
        return array_module(f).asarray(w.astype(f.dtype))

    def _kernels(self, features, scores, earlier=None):
        """The M GaussianKernels of features, M arrays (*S, d_m), in the dtype of the scores.

        earlier: those of the same features and scores; where widths are as they were, they stay.
        """
        names = self._widths()
        if len(features) != len(names):
            raise ValueError(f"features: found {len(features)} arrays, expected {len(names)}, "
                             "one for each kernel")

        def kernel(name, F, kept):
            d = self.params[name].size
            check_array("features", F, (*scores.shape[:-1], d))
            with np.errstate(over="ignore"):     # astray: found when the step is checked
                sigma = np.exp(self.params[name])
            if kept and np.array_equal(kept.sigma, sigma):
                return kept
            F = array_module(scores).asarray(F).reshape(-1, d)               # (N, d)
            if F.dtype != scores.dtype:          # large offsets want all of their digits
                F = F.astype(np.float64)
            return GaussianKernel(F, sigma, self.normalization, self.exclude_self, self.exact,
                                  scores.dtype)

        each = list(zip(names, features, earlier or [None] * len(names)))
        return for_each(lambda one: kernel(*one), each, scores)

    def _kept(self, state):
        state = state or self.state
        if state is None:
            raise ValueError("backward: found no forward pass with train=True before it")
        return state


def filtered(kernels, q):
    """K_m q for each kernel, in threads: M of (N, L), their rows computed when read."""
    return for_each(lambda kernel: kernel.filter(q), kernels, q)


def filtered_back(kernels, dz):
    """K_m^T dz, likewise."""
    return for_each(lambda kernel: kernel.filter_transpose(dz), kernels, dz)


def add_messages(z, messages, W):
    """z + sum_m (K_m q) W_m, for a block of rows: z and each of M messages (rows, L)."""
    for K_q, W_m in zip(messages, W):
        z = z + compatible(K_q, W_m)
    return z


def _checked_gradient(name, gradient, state):
    """dL/dq or dL/dlogits as (N, L), in the dtype of the marginals."""
    flat = getattr(gradient, "ndim", 0) == 2
    L = state.logits.shape[-1]
    shape = (state.logits.size // L, L)                                      # (N, L)
    check_array(name, gradient, shape if flat else state.logits.shape)
    return gradient.reshape(shape).astype(state.logits.dtype, copy=False)
