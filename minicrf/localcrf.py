"""Local factors and belief propagation: the system before the paper, that of [4] in Fig. 2.

    F(x, y) = sum_i f_i(y_i) + sum_e w_e [y_i = y_j],  e = (i, j) neighbours on the grid    (Eq. 3)
    m_(i->j)(l) = log sum_l' exp(z_i(l') - m_(j->i)(l') + (w_e / rho) [l = l'])
    z_i = f_i + sum_k rho m_(k->i),   b_i = softmax(z_i)
Legend: H x W pixels, C image channels, L labels; S lines, the rows or columns, of P pixels each.
"""
import numpy as np

from .arrays import array_module, to_device, to_host
from .inputs import VOID, check_image, check_labels, check_scores
from .losses import softmax
from .saving import load_crf, save_crf


class LocalCRF:
    """Potts rewards between each pixel and its four neighbours: message passing, and gradients.

    n_labels: L.
    w, sigma_contrast: w_e = w[0] + w[1] exp(-|I_i - I_j|^2 / (2 sigma_contrast^2)), in the units of
        the scores and of the image.
    rho: 1 is loopy belief propagation, exact on a chain.  0.5 is tree-reweighted: the mean of the
        rows alone and the columns alone, where each edge, in one of the two, counts double.
    iterations: rounds at most; each hands messages down, up, right and left through the whole
        picture.  On 11 photographs the defaults left residuals of 0.1 to 0.3, and gradients
        within 1 % (scores) and 2 % (w) of those after 150 rounds.

    params, grads: {"w": (2,) float64}.  backward adds into grads; keep w >= 0 when learning.
    log_partition: approximate log Z after forward, 0-d, float64; of messages that stand still it is
        exact on a chain for rho = 1, nowhere too small for rho = 0.5.
    residual: the largest change of a message in the last round of forward, 0-d.
    """

    def __init__(self, n_labels, *, w=(1., 1.), sigma_contrast=13., rho=0.5, iterations=10):
        w = np.array(w, dtype=np.float64).ravel()
        if len(w) != 2 or not np.isfinite(w).all():
            raise ValueError(f"w: found {w.tolist()}, expected two finite numbers")
        if n_labels < 1 or iterations < 1 or not sigma_contrast > 0 or not 0 < rho <= 1:
            raise ValueError(f"found n_labels {n_labels}, iterations {iterations}, sigma_contrast "
                             f"{sigma_contrast} and rho {rho}, expected 1, 1 or more, (0, 1]")
        self.n_labels, self.iterations = n_labels, iterations
        self.sigma_contrast, self.rho = float(sigma_contrast), float(rho)
        self.params, self.grads = {"w": w}, {"w": np.zeros_like(w)}

    def forward(self, scores, image, train=True):
        """Marginals b (H, W, L) of scores f (H, W, L) on an image (H, W, C): Fig. 2, step 2.

        scores: float32 or float64, larger is likelier; -inf forbids a label.
        image: uint8 or float, finite.  train: keep what loss and backward need.
        Raises as DenseCRF.forward does.  Neither array is written to.
        """
        check_scores(scores, self.n_labels)
        check_image(image, (*scores.shape[:2], "C"))
        # line after line, a GPU would be asked 450,000 things for a photograph: so on the host
        self._device, scores = "cpu" if array_module(scores) is np else "gpu", to_host(scores)
        xp, colour = np, to_host(image).astype(scores.dtype)
        self._scores, self._contrasts = scores, []       # of edges down, and of edges to the right
        for lines in colour, colour.transpose(1, 0, 2):                      # (S, P, C)
            squares = ((lines[1:] - lines[:-1]) ** 2).sum(axis=2)[:, None]   # (S-1, 1, P)
            self._contrasts.append(xp.exp(squares / (-2 * self.sigma_contrast ** 2)))
        b, same, self.log_partition, self.residual = self._infer(scores)
        self._b, self._same = (b, same) if train else (None, None)
        return to_device(b, self._device)

    def save(self, path):
        """Write w and options into an .npz file.  Raises OSError, naming it."""
        save_crf(path, self, ("n_labels", "sigma_contrast", "rho", "iterations"))

    @classmethod
    def load(cls, path):
        """The CRF that `save` wrote.  Raises ValueError or OSError with one line."""
        return load_crf(path, lambda options, params: cls(w=params["w"], **options))

    def _infer(self, f):
        """b (H, W, L); P(y_i = y_j) of edges down and to the right (S-1, 1, P); log Z; residual."""
        xp = array_module(f)
        w, limits = [float(w_k) for w_k in self.params["w"]], np.finfo(f.dtype)
        rewards = [w[0] + w[1] * contrast for contrast in self._contrasts]   # w_e (S-1, 1, P)
        # twice tiny: logs stay finite, for rewards that are as good as infinite
        fades = [xp.maximum(xp.exp(w_e / -self.rho), 2 * float(limits.tiny)) for w_e in rewards]

        # labels in the middle: sums over them then run along whole lines
        z = f.transpose(0, 2, 1).copy()                                      # (H, L, W)
        messages = [xp.zeros((2, *shape), f.dtype) for shape in (z.shape, z.shape[::-1])]
        for _ in range(self.iterations):
            residual = xp.zeros_like(z[0, 0, 0])
            for (forth, back), c in zip(messages, fades):                    # (S, L, P)
                for step in 1, -1:
                    change = _sweep(z[::step], forth[::step], back[::step], c[::step], self.rho)
                    residual = xp.maximum(residual, change)
                    forth, back = back, forth
                z = xp.ascontiguousarray(z.transpose(2, 1, 0))               # (S, L, P), turned
            if not bool(residual > 16 * float(limits.eps)):
                break

        # log Z = sum_i log Z_i + rho sum_e log(Z_e / (Z_i Z_j))
        b = softmax(z.transpose(0, 2, 1))                                    # (H, W, L)
        log_Z = (z.max(axis=1) - xp.log(b.max(axis=2))).sum(dtype=np.float64)
        same, axes = [], (b.transpose(0, 2, 1), b.transpose(1, 2, 0))        # (S, L, P)
        for lines, (forth, back), c, w_e in zip(axes, messages, fades, rewards):
            P, log_Z_e = _edges(lines, forth, back, c)
            same.append(P)
            log_Z = log_Z + (w_e + self.rho * log_Z_e).sum(dtype=np.float64)
        return xp.ascontiguousarray(b), same, log_Z, residual

    def project(self):
        self.params["w"].clip(0, out=self.params["w"])       # after an update: back to w >= 0

    def loss(self, labels):
        """-log p(y | x) over the number of labelled pixels, Eq. 2, after forward; a 0-d array.

        labels: (H, W) integers in 0..L-1, or VOID; also in a row, (H*W,).  Void pixels are summed
        over: p is Z_y / Z, where in Z_y they alone are free.  To take them out of the graph would
        be cheaper, but they lie where labels change, and without those edges w would learn to grow.
        """
        f, xp = self._scores, np
        y = to_host(labels)
        check_labels(y, (y.size,) if y.ndim == 1 else f.shape[:2], self.n_labels)
        y = y.reshape(*f.shape[:2], 1)                                       # (H, W, 1)
        labelled = y != VOID
        self._labelled = xp.maximum(labelled.sum(), 1).astype(f.dtype)
        # without void pixels log Z_y is F(x, y), found in two rounds
        f_y = xp.where(labelled & (y != xp.arange(self.n_labels)), -np.inf, f)
        self._b_y, self._same_y, log_Z_y, _ = self._infer(f_y)
        return (self.log_partition - log_Z_y) / self._labelled

    # forward: loss = (log Z - log Z_y) / labelled
    def backward(self):
        """Marginals minus truth: dL/dscores (H, W, L); adds dL/dw into grads.  Fig. 2, step 3.

        Messages stand still where log Z is stationary in them: nothing is to be tracked back
        through the rounds, and the gradient is as exact as they have converged.
        """
        dw = np.zeros(2)
        for P, P_y, contrast in zip(self._same, self._same_y, self._contrasts):
            d = P - P_y                                                      # (S-1, 1, P)
            dw += d.sum(dtype=np.float64), (contrast * d).sum(dtype=np.float64)
        self.grads["w"] += dw / self._labelled
        return to_device((self._b - self._b_y) / self._labelled, self._device)


def _sweep(z, forth, back, c, rho):
    """Messages from each line to the next, forth (S, L, P), which z (S, L, P) takes in.

    back: those against them; c: exp(-w_e / rho) (S-1, 1, P).  The sum over l' is, for Potts, 1 +
    (1/c - 1) p(l); times c, which all labels share, a message neither grows nor overflows.  One
    line after the other: each message is heard to the far end.  Returns the largest change.
    """
    xp, before, rest = array_module(z), forth.copy(), 1 - c
    for i in range(len(z) - 1):
        p = z[i] - back[i]                                                   # (L, P)
        p -= p.max(axis=0)
        p = xp.exp(p)
        m = xp.log(c[i] + rest[i] * (p / p.sum(axis=0)))
        z[i + 1] += rho * (m - forth[i + 1])
        forth[i + 1] = m
    return abs(forth - before).max()


def _edges(b, forth, back, c):
    """P(y_i = y_j) (S-1, 1, P), and log(Z_e / (Z_i Z_j)) less w_e / rho, of one axis' edges.

    b_e(l, l') ~ p_i(l) p_j(l') exp((w_e / rho) [l = l']): in p_i, all but j have had their say.
    """
    xp = array_module(b)
    p_i, p_j = b[:-1] / xp.exp(back[:-1]), b[1:] / xp.exp(forth[1:])         # (S-1, L, P)
    n_i, n_j = p_i.sum(axis=1, keepdims=True), p_j.sum(axis=1, keepdims=True)
    same = (p_i / n_i * (p_j / n_j)).sum(axis=1, keepdims=True)              # (S-1, 1, P)
    total = c + (1 - c) * same
    return same / total, xp.log(n_i) + xp.log(n_j) + xp.log(total)
