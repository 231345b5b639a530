"""The fully connected CRF: mean-field inference (Sec. 3.1) and back-tracking through it (Fig. 3).

    q^0 = softmax(f);   z^t = f + sum_m K_m q^(t-1) W_m;   q^t = softmax(z^t),   t = 1..T
Eq. 5 for all pixels at once; W_m is the compatibility mu^(m) as a score, w_m I for Potts (Eq. 9).
Legend: S the shape of the image, N its pixels, C its channels, D its dimensions; L labels;
M kernels, the m-th one of d_m features; T mean-field steps.
"""
from typing import NamedTuple

import numpy as np

from .arrays import array_module, blocks, for_each, row_sums
from .kernels import GaussianKernel, KernelGradient, compatible
from .losses import softmax

LARGEST_LOG_SIGMA = 50  # widths of e^50 pixels, or e^-50: learning has gone astray
NEWTON_STEPS = 20       # 4 to 13 suffice for logits up to 100 and damping up to 20
NEWTON_ERROR = {"f": 1e-6, "d": 1e-14}           # of the sum of a row's marginals


class State(NamedTuple):
    """What a forward pass keeps for its way back."""
    kernels: list       # M GaussianKernels
    W: list             # M compatibilities: numbers, or matrices (L, L)
    c: float            # damping
    steps: list         # q^0 .. q^(T-1), each (N, L)
    q: object           # q^T (N, L)
    logits: object      # log q^T (*S, L), up to a constant a pixel: z^T where c = 0


class FeatureCRF:
    """Mean-field inference in a CRF that M kernels of any features connect fully, and its gradients.

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
    state: what the last forward kept for backward.
    Raises ValueError where an option has the wrong length, sign or name.
    """
    __slots__ = ("n_labels", "iterations", "normalization", "exclude_self", "damping", "exact",
                 "params", "grads", "state")

    def __init__(self, n_labels, *, w, sigmas, iterations=5, normalization="symmetric",
                 exclude_self=True, damping=0., exact=False):
        if normalization not in ("symmetric", "none"):
            raise ValueError(f"normalization: found {normalization!r}, "
                             "expected 'symmetric' or 'none'")
        M, L = len(sigmas), n_labels
        if not (L >= 1 and iterations >= 0 and 0 <= damping < np.inf and M):
            raise ValueError(f"found {M} kernels, n_labels {L}, iterations {iterations} and "
                             f"damping {damping}, expected 1, 1, 0 and 0 or more")
        self.n_labels, self.iterations, self.normalization = n_labels, iterations, normalization
        self.exclude_self, self.damping, self.exact = exclude_self, damping, exact
        self.state = None
        w = np.array(w, dtype=np.float64)
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
        shown |= {name: getattr(self, name) for name in FeatureCRF.__slots__[1:6]}
        text = ", ".join(f"{name}={value!r}" for name, value in shown.items())
        return f"{type(self).__name__}({self.n_labels}, {text})"

    def forward(self, scores, features, train=True):
        """Marginals q (*S, L) of scores f (*S, L): Eq. 5, T times, for all pixels at once.

        scores: float32 or float64, larger is likelier; -inf forbids a label.
        features: M arrays (*S, d_m), in the units of sigmas.
        train: keep what backward needs in `state`.  False saves memory and gives the same result.
        Raises TypeError for other kinds of arrays; ValueError for NaN or +inf, a pixel with every
        label forbidden, weights too large for the dtype, or shapes that disagree.  No argument is
        written to.
        """
        xp = array_module(scores)
        _check_scores(scores, self.n_labels)
        f = xp.ascontiguousarray(scores).reshape(-1, self.n_labels)          # (N, L)
        kernels, W = self._kernels(features, scores), self._compatibility(f)
        q, logits = xp.zeros_like(f), xp.empty_like(f) if train else None    # (N, L)
        steps = []                                                           # q^0 .. q^(T-1)

        def update(rows):
            z = f[rows].copy()                                               # z^0 = f
            for kernel, W_m, v in zip(kernels, W, spread):                   # + K_m q^(t-1) W_m
                z += kernel.gather(v, compatible(q_old[rows], W_m), rows)
            new = marginals(z, q_old[rows], c)
            if train and t == self.iterations:
                logits[rows] = z + c * (q_old[rows] - new) if c else z
            q[rows] = new

        for t in range(self.iterations + 1):
            c = self.damping if t > 0 else 0
            q_old, q = q, xp.empty_like(f) if train else q
            spread = for_each(lambda m: compatible(kernels[m].spread(q_old), W[m]),
                              range(len(kernels) if t > 0 else 0), f)
            for_each(update, blocks(len(f), f), f)
            steps += [q_old] if train and t > 0 else []

        if not bool(abs(q.sum()) < np.inf):                                  # NaN compares as false
            raise ValueError(f"w: found {self.params['w'].tolist()}, too large for marginals in "
                             f"{f.dtype}; expected smaller weights")
        if train:
            self.state = State(kernels, W, self.damping, steps, q, logits.reshape(scores.shape))
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
        return self._back_track(through_marginals(dq, state.q, state.c), state)

    def backward_logits(self, dz, state=None):
        """The same from dL/dlogits, (*S, L) or (N, L): q - onehot(y) for Eq. 6, no 1/q in it."""
        state = self._kept(state)
        dz = _checked_gradient("dz", dz, state)
        if state.c and state.steps:
            # forward: logits = z^T + c q^(T-1) - c q^T, q^T = marginals(z^T + c q^(T-1))
            weight = 1 / (1 + state.c * state.q)                             # (N, L)
            h = state.q * weight
            dz = weight * dz
            dz -= h * (row_sums(dz) / row_sums(h))[:, None]
        return self._back_track(dz, state)

    def _back_track(self, dz, state):
        """Fig. 3, step 3: from dL/dz^T (N, L) through T steps, whatever the number of parameters."""
        df, dz, c = array_module(dz).zeros_like(dz), dz.copy(), state.c      # (N, L)
        kernels = [KernelGradient(*each) for each in zip(state.kernels, state.W)]

        def turn_back(rows):
            df[rows] += dz[rows]
            dq = c * dz[rows]
            for kernel in kernels:                                           # + K_m^T dz^t W_m
                dq += kernel.gather(q[rows], dz[rows], rows)
            # forward: q^(t-1) = marginals(z^(t-1)), undamped for t = 1
            dz[rows] = through_marginals(dq, q[rows], c if t > 1 else 0)

        for t in range(len(state.steps), 0, -1):
            # forward: z^t = f + sum_m K_m q^(t-1) W_m + c q^(t-1)
            q = state.steps[t - 1]
            for_each(lambda spread: spread(q, dz), [spread for kernel in kernels for spread in
                                                    (kernel.spread, kernel.spread_back)], dz)
            for_each(turn_back, blocks(len(dz), dz), dz)
            for_each(lambda kernel: kernel.add_up(), kernels, dz)
        # forward: z^0 = f
        df += dz
        for m, (name, kernel) in enumerate(zip(self._widths(), kernels)):
            dW, dsigma = kernel.result()
            self.grads["w"][m] += dW
            self.grads[name] += dsigma
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
        would have made the kernels positive semi-definite (Sec. 3.1).
        """
        w = self.params["w"]
        largest = abs(w) if w.ndim == 1 else abs(np.linalg.eigvalsh(w)).max(axis=1)          # (M,)
        kernels = self._kernels(features, scores)
        return float(sum(k.self_weight * float(x) for k, x in zip(kernels, largest)).max())

    def free_energy(self, q, scores, features):
        """KL(q || p) of marginals q (*S, L), less the constant log Z: what Eq. 4 minimises.

            sum_il q (log q - f)  -  1/2 sum_m sum_(i != j) k_m(i,j) q_i W_m q_j

        A float, to watch convergence by.  The parallel update does not promise to lower it at each
        step: it can swap between two states.  j != i, whatever exclude_self says.
        """
        xp = array_module(scores)
        _check_scores(scores, self.n_labels)
        kernels = self._kernels(features, scores)
        f, q = (a.reshape(-1, self.n_labels) for a in (scores, q))           # (N, L)
        possible = q > 0                                                     # 0 log 0 = 0
        log_q, f_q = xp.log(xp.where(possible, q, 1)), xp.where(possible, f, 0)
        energy = (q * (log_q - f_q)).sum(dtype=np.float64)
        for kernel, W_m in zip(kernels, self._compatibility(f)):
            Kq = kernel.K_hat.filter(q) - kernel.diagonal[:, None] * q
            energy = energy - (q * compatible(Kq, W_m)).sum(dtype=np.float64) / 2
        return float(energy)

    def _widths(self):
        return [name for name in self.params if name != "w"]

    def _compatibility(self, f):
        """W_m, m = 1..M: numbers, or matrices (L, L) where f is and in its dtype."""
        w = self.params["w"]
        return w.tolist() if w.ndim == 1 else list(array_module(f).asarray(w.astype(f.dtype)))

    def _kernels(self, features, scores):
        """The M GaussianKernels of features, M arrays (*S, d_m), in the dtype of the scores."""
        names = self._widths()
        if len(features) != len(names):
            raise ValueError(f"features: found {len(features)} arrays, expected {len(names)}, "
                             "one for each kernel")
        kernels = []
        for name, F in zip(names, features):
            d = self.params[name].size
            _check_array("features", F, (*scores.shape[:-1], d))
            with np.errstate(over="ignore"):     # astray: found when the step is checked
                sigma = np.exp(self.params[name])
            xp = array_module(scores)
            F = xp.ascontiguousarray(xp.asarray(F).reshape(-1, d).T.astype(scores.dtype))    # (d, N)
            kernels.append(GaussianKernel(F, sigma, self.normalization, self.exclude_self,
                                          self.exact))
        return kernels

    def _kept(self, state):
        state = state or self.state
        if state is None:
            raise ValueError("backward: found no forward pass with train=True before it")
        return state


class DenseCRF(FeatureCRF):
    """The fully connected CRF of an image: a kernel of position, and one of position and colour.

    forward, backward and all else as in FeatureCRF, with an image (*S, C) for the features: uint8
    or float, in the order of sigma_bilateral; RGB in 0-255 for the default widths.

    sigma_position: widths (x, y) in pixels, or one for all; None leaves this kernel out, and its
        entry of w.
    sigma_bilateral: widths (x, y, colour...), pixels and colour units, one for each channel of the
        images; or a pair (pixels, colour) for `channels` of them.  None leaves this kernel out.
    dimensions: 2 for photographs (H, W, C), 1 for signals (W, C), 3 for volumes (Z, H, W, C), whose
        widths are in the order (x, y, z, colour...).

    params, grads: "w" (M,) or (M, L, L), "log_sigma_position" (D,), "log_sigma_bilateral" (D+C,).
    """
    __slots__ = ("dimensions",)

    def __init__(self, n_labels, *, w=(3., 10.), sigma_position=3., sigma_bilateral=(80., 13.),
                 iterations=5, normalization="symmetric", exclude_self=True, damping=0.,
                 exact=False, dimensions=2, channels=3):
        self.dimensions = D = dimensions
        sigmas = {"position": sigma_position, "bilateral": sigma_bilateral}
        if np.ndim(sigma_position) == 0 and sigma_position is not None:
            sigmas["position"] = [sigma_position] * D
        if np.shape(sigma_bilateral) == (2,):
            sigmas["bilateral"] = [sigma_bilateral[0]] * D + [sigma_bilateral[1]] * channels
        used = [name for name in sigmas if sigmas[name] is not None]
        for name in used:
            length = np.size(sigmas[name])
            if length <= D if name == "bilateral" else length != D:
                more = " and each channel" if name == "bilateral" else ""
                raise ValueError(f"sigma_{name}: found {length} widths, expected one for each of "
                                 f"{D} dimensions{more}")
        if len(w) == 2:
            w = [w_m for w_m, name in zip(w, sigmas) if name in used]
        super().__init__(n_labels, w=w, sigmas={name: sigmas[name] for name in used},
                         iterations=iterations, normalization=normalization, damping=damping,
                         exclude_self=exclude_self, exact=exact)

    def _kernels(self, image, scores):
        xp, shape = array_module(scores), scores.shape[:-1]
        if len(shape) != self.dimensions:
            raise ValueError(f"scores: found shape {scores.shape}, expected {self.dimensions} "
                             "dimensions and labels")
        channels = self.params.get("log_sigma_bilateral", np.zeros(0)).size - len(shape)
        _check_array("image", image, (*shape, channels if channels > 0 else "C"))
        image = xp.asarray(image)
        if image.dtype.kind == "f" and not bool((abs(image) < np.inf).all()):
            raise ValueError("image: found NaN or infinite values, expected finite ones")
        grid = xp.meshgrid(*(xp.arange(n, dtype=scores.dtype) for n in shape), indexing="ij")
        position = xp.stack(grid[::-1], axis=-1)                             # (*S, D): x first
        features = {"log_sigma_position": position, "log_sigma_bilateral": xp.concatenate(
            [position, image.astype(scores.dtype)], axis=-1)}                # (*S, D+C)
        return super()._kernels([features[name] for name in self._widths()], scores)


def marginals(z, q_old, c):
    """q (N, L): log q + c q = z + c q_old - lambda, its rows sum to 1.  c = 0: softmax(z).

    "A non-linear system of equations independently for each marginal" (Sec. 3.1), in u = log q and
    lambda, by Newton's method.
    """
    if c == 0:
        return softmax(z)
    xp = array_module(z)
    z = z + c * q_old
    z -= z.max(axis=-1, keepdims=True)
    z = xp.maximum(z, -1000 * (1 + c))           # also -inf: there exp(u) is 0
    u = z / (1 + c)                              # u = log softmax(z / (1 + c)) to start with
    u -= xp.log(row_sums(xp.exp(u)))[:, None]
    q = xp.exp(u)
    shift, excess = row_sums(q * (z - u - c * q)), 0                         # lambda: (N,)
    for _ in range(NEWTON_STEPS):
        slope = 1 + c * q                                                    # (N, L)
        r = z - u - c * q - shift[:, None]       # what is left of the first equation
        h = q / slope
        step = (row_sums(h * r) + excess) / row_sums(h)                      # (N,)
        shift += step
        u += (r - step[:, None]) / slope
        q = xp.exp(u)
        excess = row_sums(q) - 1                 # of the second one, half the square of the step
        if bool(abs(excess).max() < NEWTON_ERROR[z.dtype.char]):
            break
    return q / (1 + excess)[:, None]


def through_marginals(dq, q, c):
    """dL/dz from dL/dq, q = marginals(z, ...), all (N, L)."""
    h = q / (1 + c * q) if c else q
    mean = row_sums(h * dq) / row_sums(h) if c else row_sums(h * dq)         # sum_l q = 1
    return h * (dq - mean[:, None])


def _check_array(name, x, shape):
    """Raises unless x is an array of that shape, in which a word stands for any number."""
    if not isinstance(x, array_module(x).ndarray):
        raise TypeError(f"{name}: found {type(x).__module__}.{type(x).__name__}, expected a NumPy "
                        "or CuPy array")
    if len(x.shape) != len(shape) or any(n != expected for n, expected in zip(x.shape, shape)
                                         if not isinstance(expected, str)):
        raise ValueError(f"{name}: found shape {x.shape}, expected "
                         f"({', '.join(map(str, shape))})")


def _check_scores(scores, n_labels):
    _check_array("scores", scores, ("...",) * max(getattr(scores, "ndim", 2) - 1, 1) + (n_labels,))
    if scores.dtype.str[1:] not in ("f4", "f8") or not scores.dtype.isnative or not scores.size:
        raise ValueError(f"scores: found {scores.size} of {scores.dtype.str}, expected float32 or "
                         "float64 in the machine's byte order")
    # NumPy finds one maximum ten times faster than one a pixel; a GPU should be asked but once
    per_pixel = array_module(scores) is not np or scores.min() == -np.inf
    best = scores.max(axis=-1) if per_pixel else scores.max()
    if not bool((abs(best) < np.inf).all()):     # NaN compares as false
        raise ValueError("scores: found NaN, +inf, or a pixel with -inf for every label")


def _checked_gradient(name, gradient, state):
    """dL/dq or dL/dlogits as (N, L), in a dtype of its own."""
    flat = getattr(gradient, "ndim", 0) == 2
    _check_array(name, gradient, state.q.shape if flat else state.logits.shape)
    return gradient.reshape(state.q.shape)
