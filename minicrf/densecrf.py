"""The fully connected CRF: mean-field inference (Eq. 5) and back-tracking through it (Fig. 3).

    q^0 = softmax(f);   z^t = f + sum_m w_m K_m q^(t-1);   q^t = softmax(z^t),   t = 1..T
Legend: H x W pixels, N = H*W, C image channels, L labels, M kernels, T mean-field steps.
"""
from collections import OrderedDict
from functools import partial

import numpy as np

from .arrays import array_module, for_each, to_host
from .kernels import GaussianKernel
from .losses import softmax

BLOCK = 2**13           # pixels that one thread updates at a time: small enough for its cache
CACHED_KERNELS = 4      # position kernels kept: they depend on the image's size and sigma alone
LARGEST_LOG_SIGMA = 50  # widths of e^50 pixels, or e^-50: learning has gone astray


class DenseCRF:
    """Mean-field inference in a fully connected CRF with Potts labels, and its gradients.

    n_labels: L.
    w: weights of the position kernel and of the bilateral one, in the units of the scores.
    sigma_position: widths (x, y) in pixels; None leaves this kernel out, and its entry of w.
    sigma_bilateral: widths (x, y, colour...), pixels and colour units, one for each channel of the
        images; None leaves this kernel out, and its entry of w.
    iterations: T.
    normalization: "symmetric" or "none".
    exclude_self: j != i as in Eq. 5.  False gives what public dense-CRF libraries compute.
    exact: brute-force kernels, O(N^2), instead of the permutohedral lattice.

    params, grads: dicts of float64 NumPy arrays "w" (M,), "log_sigma_position" (2,),
        "log_sigma_bilateral" (2+C,).  backward adds into grads; keep w >= 0 when learning.
    logits: z^T (H, W, L) after forward, for losses.softmax_loss.
    Raises ValueError where an option has the wrong length, sign or name.
    """

    def __init__(self, n_labels, *, w=(3., 10.), sigma_position=(3., 3.),
                 sigma_bilateral=(80., 80., 13., 13., 13.), iterations=5,
                 normalization="symmetric", exclude_self=True, exact=False):
        if normalization not in ("symmetric", "none"):
            raise ValueError(f"normalization: found {normalization!r}, "
                             "expected 'symmetric' or 'none'")
        if n_labels < 1 or iterations < 0:
            raise ValueError(f"found n_labels {n_labels} and iterations {iterations}, "
                             "expected at least 1 and at least 0")
        self.n_labels = n_labels
        self.iterations = iterations
        self.normalization = normalization
        self.exclude_self = exclude_self
        self.exact = exact

        sigmas = {"sigma_position": sigma_position, "sigma_bilateral": sigma_bilateral}
        used = [name for name in sigmas if sigmas[name] is not None]
        w = np.array(w, dtype=np.float64).ravel()
        if len(w) == 2:
            w = w[[name in used for name in sigmas]]
        if len(w) != len(used) or not np.isfinite(w).all():
            raise ValueError(f"w: found {w.tolist()}, expected a finite number for each kernel")
        self.params = {"w": w}
        for name in used:
            sigma = np.array(sigmas[name], dtype=np.float64).ravel()
            right_length = len(sigma) == 2 if name == "sigma_position" else len(sigma) > 2
            if not right_length or not (np.isfinite(sigma) & (sigma > 0)).all():
                channels = " and each channel" if name == "sigma_bilateral" else ""
                raise ValueError(f"{name}: found {sigma.tolist()}, "
                                 f"expected positive widths for x, y{channels}")
            self.params["log_" + name] = np.log(sigma)
        self.grads = {name: np.zeros_like(value) for name, value in self.params.items()}
        self._position_kernels = OrderedDict()
        self._saved = None

    def forward(self, scores, image, train=True, kernels=None):
        """Marginals q (H, W, L) of scores f (H, W, L) on an image (H, W, C): Eq. 5.

        scores: float32 or float64, larger is likelier; -inf forbids a label.
        image: uint8 or float, channels in the order of sigma_bilateral; RGB 0-255 for the defaults.
        train: keep what backward needs.  False saves memory and gives the same result.
        kernels: self.kernels(image, scores.dtype), built ahead with the parameters as they are now.
        Raises ValueError for NaN or +inf, a pixel with every label forbidden, or shapes that
        disagree.  Neither array is written to.
        """
        xp = array_module(scores)
        _check(scores, image, self.n_labels)
        f = xp.ascontiguousarray(scores).reshape(-1, self.n_labels)          # (N, L)
        if kernels is None:
            kernels = self.kernels(xp.asarray(image), f.dtype)
        expected = [(f.dtype, len(f))] * len(self.params["w"])
        if [(kernel.features.dtype, kernel.features.shape[1]) for kernel in kernels] != expected:
            raise ValueError("kernels: found those of another image, dtype or CRF, expected "
                             "self.kernels(image, scores.dtype)")
        w = [float(w_m) for w_m in self.params["w"]]
        self_weight = _self_weight(w, kernels, f)                            # (N, 1)
        blocks = _blocks(f)

        logits, q = xp.empty_like(f), xp.zeros_like(f)                       # (N, L)
        steps = []                                                           # q^0 .. q^(T-1)
        spread = []                           # of q by each kernel; none at first: z^0 = f

        def update(rows):
            z = f[rows] - self_weight[rows] * q[rows]
            for w_m, kernel, v in zip(w, kernels, spread):
                z += w_m * kernel.K_hat.gather(v, rows)
            if t == self.iterations:
                logits[rows] = z
            q[rows] = _softmax(z)

        for t in range(self.iterations + 1):
            if t > 0:
                spread = for_each(lambda kernel: kernel.K_hat.spread(q), kernels, q)
                steps += [q.copy()] if train else []
            for_each(update, blocks, q)

        self.logits = logits.reshape(scores.shape)                           # (H, W, L)
        self._saved = (kernels, steps, q) if train else None
        return q.reshape(scores.shape)                                       # (H, W, L)

    # forward: q^T = softmax(z^T)
    def backward(self, dq):
        """dL/dq (H, W, L) -> dL/dscores (H, W, L); adds dL/dparams into grads."""
        q = self._kept()[2]
        return self.backward_logits(_through_softmax(dq.reshape(q.shape), q))

    def backward_logits(self, dz):
        """The same from dL/dz^T, (H, W, L) or (N, L): q - onehot(y) for Eq. 6, with no 1/q in it.

        Needs the forward pass before it, with train=True.  Back-tracking, Fig. 3 steps 3-4: T steps
        whatever the number of parameters.
        """
        kernels, steps, q = self._kept()
        dz = dz.reshape(q.shape).copy()                                      # (N, L)
        xp = array_module(dz)
        w = [float(w_m) for w_m in self.params["w"]]
        blocks = _blocks(dz)
        self_weight = _self_weight(w, kernels, dz)                           # (N, 1)
        weighted = [kernel.weighted() for kernel in kernels]
        # what the gradients of w and sigma are linear in, summed over steps and labels
        forth = xp.zeros((len(kernels), len(dz)), dtype=np.float64)          # (M, N): dz K_hat q
        back = xp.zeros_like(forth)                                          # (M, N): q K_hat^T dz
        product = xp.zeros_like(forth[0])                                    # (N,): dz q
        cross = [0] * len(kernels)                                           # M times (d,)
        df = xp.zeros_like(dz)

        for q in reversed(steps):                                            # q^(t-1), t = T..1
            # forward: z^t = f + sum_m w_m K_m q^(t-1)
            tasks = []
            for kernel, filters in zip(kernels, weighted):
                tasks.append(partial(kernel.K_hat.spread, q))
                tasks.append(partial(kernel.K_hat.spread_transpose, dz))
                tasks += [partial(G.inner, dz, q) for G in filters]
            results = iter(for_each(lambda task: task(), tasks, dz))
            spread, spread_back = [], []
            for m, filters in enumerate(weighted):
                spread.append(next(results))
                spread_back.append(next(results))
                cross[m] += xp.stack([next(results) for _ in filters])

            def update(rows):
                df[rows] += dz[rows]
                dq = -self_weight[rows] * dz[rows]
                for m, kernel in enumerate(kernels):
                    forth[m, rows] += _row_dots(dz[rows], kernel.K_hat.gather(spread[m], rows))
                    K_dz = kernel.K_hat.gather(spread_back[m], rows)
                    back[m, rows] += _row_dots(q[rows], K_dz)
                    dq += w[m] * K_dz
                product[rows] += _row_dots(dz[rows], q[rows])
                # forward: q^(t-1) = softmax(z^(t-1))
                dz[rows] = _through_softmax(dq, q[rows])
            for_each(update, blocks, dz)
        # forward: z^0 = f
        df += dz
        self._add_parameter_gradients(kernels, forth, back, cross, product)
        return df.reshape(self.logits.shape)                                 # (H, W, L)

    def _add_parameter_gradients(self, kernels, forth, back, cross, product):
        """The last part of `backward_logits`: from what w and sigma are linear in, into grads."""
        for m, (name, kernel) in enumerate(zip(self._sigma_names(), kernels)):
            dw = (forth[m] - kernel.self_weight * product).sum()
            dsigma = kernel.shape_gradient(forth[m] + back[m], cross[m], product)
            xp = array_module(dsigma)
            dw, dsigma = np.split(to_host(xp.concatenate([dw[None], dsigma])), [1])
            self.grads["w"][m] += dw[0]
            self.grads[name] += self.params["w"][m] * dsigma

    def free_energy(self, q, scores, image):
        """KL(q || P) of marginals q (H, W, L), less the constant log Z: what mean field lowers.

            sum_il q (log q - f)  -  1/2 sum_m w_m sum_(i != j) k_m(i,j) <q_i, q_j>

        A float, to watch convergence by.  The parallel update of Eq. 5 does not promise to lower it
        at each step: it can swing between two states.  j != i, whatever exclude_self says.
        """
        _check(scores, image, self.n_labels)
        xp = array_module(scores)
        f, q = (a.reshape(-1, self.n_labels) for a in (scores, q))           # (N, L)
        possible = q > 0                                                     # 0 log 0 = 0
        log_q, f_q = xp.log(xp.where(possible, q, 1)), xp.where(possible, f, 0)
        energy = (q * (log_q - f_q)).sum(dtype=np.float64)
        for w_m, kernel in zip(self.params["w"], self.kernels(xp.asarray(image), f.dtype)):
            Kq = kernel.K_hat.filter(q) - kernel.diagonal[:, None] * q
            energy = energy - w_m / 2 * (q * Kq).sum(dtype=np.float64)
        return float(energy)

    def kernels(self, image, dtype):
        """The M GaussianKernels of an image (H, W, C), in the order of w; of N = H*W features each.

        They do not depend on the scores: another thread may build them ahead of `forward`.
        dtype: of the scores.  Raises ValueError for NaN, or channels that sigma_bilateral has not.
        """
        xp = array_module(image)
        if image.dtype.kind == "f" and not bool((abs(image) < np.inf).all()):
            raise ValueError("image: found NaN or infinite values, expected finite ones")
        shape = image.shape[:2]
        y, x = xp.meshgrid(*(xp.arange(n, dtype=dtype) for n in shape), indexing="ij")
        position = xp.stack([x.ravel(), y.ravel()])                          # (2, N)
        options = self.normalization, self.exclude_self, self.exact
        with np.errstate(over="ignore"):     # astray: found when the step is checked
            sigmas = {name: np.exp(self.params[name]) for name in self._sigma_names()}

        def position_kernel(sigma):
            key = shape, sigma.tobytes(), options, position.dtype.char, xp.__name__
            cache = self._position_kernels
            kernel = cache[key] = cache.pop(key, None) or GaussianKernel(position, sigma, *options)
            while len(cache) > CACHED_KERNELS:           # the latest is last
                cache.popitem(last=False)
            return kernel

        def bilateral_kernel(sigma):
            colour = image.astype(dtype).reshape(position.shape[1], -1).T           # (C, N)
            if len(sigma) != 2 + len(colour):
                raise ValueError(f"image: found {len(colour)} channels, expected "
                                 f"{len(sigma) - 2} for sigma_bilateral of length {len(sigma)}")
            return GaussianKernel(xp.concatenate([position, colour]), sigma, *options)

        build = {"log_sigma_position": position_kernel, "log_sigma_bilateral": bilateral_kernel}
        return for_each(lambda name: build[name](sigmas[name]), [*sigmas], position)

    def _sigma_names(self):
        return [name for name in self.params if name != "w"]

    def _kept(self):
        if self._saved is None:
            raise ValueError("backward: found no forward pass with train=True before it")
        return self._saved


def _check(scores, image, n_labels):
    if (scores.ndim != 3 or scores.shape[2] != n_labels or scores.dtype.char not in "fd"
            or not scores.size):
        raise ValueError(f"scores: found shape {scores.shape} of {scores.dtype}, "
                         f"expected (H, W, {n_labels}) of float32 or float64")
    if image.ndim != 3 or image.shape[:2] != scores.shape[:2]:
        raise ValueError(f"image: found shape {image.shape}, "
                         f"expected (H, W, C) with the H and W of the scores, {scores.shape}")
    # NumPy finds one maximum ten times faster than one a pixel; a GPU should be asked but once
    per_pixel = array_module(scores) is not np or scores.min() == -np.inf
    best = scores.max(axis=2) if per_pixel else scores.max()
    if not bool((abs(best) < np.inf).all()):     # NaN compares as false
        raise ValueError("scores: found NaN, +inf, or a pixel with -inf for every label")


def _self_weight(w, kernels, values):
    """sum_m w_m (what kernel m adds for i = j): (N, 1)."""
    total = array_module(values).zeros_like(values[:, :1])
    for w_m, kernel in zip(w, kernels):
        total += w_m * kernel.self_weight[:, None]
    return total


def _softmax(z):
    """losses.softmax of logits z (N, L), where it can without the maximum, which takes longest."""
    xp = array_module(z)
    if xp is not np:                     # asking whether exp stays in range would wait for a GPU
        return softmax(z)
    with np.errstate(over="ignore"):
        q = np.exp(z)
        total = np.einsum("il->i", q)                                        # (N,)
    if not ((total > 1e-20) & (total < 1e20)).all():
        return softmax(z)
    q *= (1 / total)[:, None]
    return q


def _through_softmax(dq, q):
    """dL/dz from dL/dq, q = softmax(z), all (N, L)."""
    return q * (dq - _row_dots(dq, q)[:, None])


def _row_dots(a, b):
    """sum_l a_il b_il: (N,)."""
    xp = array_module(a)
    if xp is not np:                     # CuPy's einsum would make N matrix products of it
        return (a * b).sum(axis=1)
    return xp.einsum("il,il->i", a, b)


def _blocks(values):
    """Slices of rows that can be updated one by one; a GPU does best with all at once."""
    size = BLOCK if array_module(values) is np else len(values)
    return [slice(start, min(start + size, len(values))) for start in range(0, len(values), size)]
