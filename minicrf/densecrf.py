"""The fully connected CRF: mean-field inference (Eq. 5) and back-tracking through it (Fig. 3).

    q^0 = softmax(f);   z^t = f + sum_m w_m K_m q^(t-1);   q^t = softmax(z^t),   t = 1..T
Legend: H x W pixels, N = H*W, C image channels, L labels, M kernels, T mean-field steps.
"""
import numpy as np

from .arrays import array_module
from .kernels import GaussianKernel
from .losses import softmax


class DenseCRF:
    def __init__(self, n_labels, *, w=(3., 10.), sigma_position=(3., 3.),
                 sigma_bilateral=(80., 80., 13., 13., 13.), iterations=5,
                 normalization="symmetric", exclude_self=True, exact=False):
        self.n_labels = n_labels
        self.iterations = iterations
        self.normalization = normalization
        self.exclude_self = exclude_self
        self.exact = exact
        self.params = {"w": np.array(w, dtype=np.float64)}
        if sigma_position is not None:
            self.params["log_sigma_position"] = np.log(np.array(sigma_position, dtype=np.float64))
        if sigma_bilateral is not None:
            self.params["log_sigma_bilateral"] = np.log(np.array(sigma_bilateral, dtype=np.float64))
        self.names = [name for name in self.params if name != "w"]
        self.grads = {name: np.zeros_like(value) for name, value in self.params.items()}
        self.saved = None

    def forward(self, scores, image, train=True):
        self._check(scores, image)
        self.shape = scores.shape
        f = scores.reshape(-1, self.n_labels)                                # (N, L)
        kernels = self._kernels(scores, image)
        z, q = f, softmax(f)
        saved = []
        w = [float(x) for x in self.params["w"]]
        for t in range(self.iterations):
            if train:
                saved.append(q)
            z = f.copy()                                                     # (N, L)
            for weight, kernel in zip(w, kernels):
                z += weight * kernel.apply(q)
            q = softmax(z)
        self.saved = (kernels, saved, q) if train else None
        self.logits = z.reshape(self.shape)                                  # (H, W, L)
        return q.reshape(self.shape)

    # forward: q^T = softmax(z^T)
    def backward(self, dq):
        q = self.saved[2]
        dq = dq.reshape(q.shape)
        return self.backward_logits(q * (dq - (dq * q).sum(axis=1, keepdims=True)))

    def backward_logits(self, dz):
        xp = array_module(dz)
        kernels, saved, _ = self.saved
        dz = dz.reshape(-1, self.n_labels)
        df = xp.zeros_like(dz)
        outers = [0] * len(kernels)
        crosses = [0] * len(kernels)
        for q in reversed(saved):
            # forward: z^t = f + sum_m w_m K_m q^(t-1)
            df += dz
            dq = xp.zeros_like(q)
            for m, kernel in enumerate(kernels):
                message = kernel.apply(q)
                back = kernel.apply_transpose(dz)
                self.grads["w"][m] += float((dz * message).sum())
                dq += float(self.params["w"][m]) * back
                outer, cross = kernel.moments(dz, q, message, back)
                outers[m] += outer
                crosses[m] += cross
            # forward: q^(t-1) = softmax(z^(t-1))
            dz = q * (dq - (dq * q).sum(axis=1, keepdims=True))
        df += dz
        for m, (name, kernel) in enumerate(zip(self.names, kernels)):
            g = kernel.shape_gradient(outers[m], crosses[m])
            g = g if xp is np else xp.asnumpy(g)
            self.grads[name] += self.params["w"][m] * g
        return df.reshape(self.shape)

    def _check(self, scores, image):
        if scores.ndim != 3 or scores.shape[2] != self.n_labels or scores.dtype.kind != "f":
            raise ValueError(f"scores: found shape {scores.shape} of {scores.dtype}, "
                             f"expected floats of shape (H, W, {self.n_labels})")
        if image.ndim != 3 or image.shape[:2] != scores.shape[:2]:
            raise ValueError(f"image: found shape {image.shape}, "
                             f"expected (H, W, C) to match the scores' {scores.shape}")
        best = scores.max(axis=2)
        if not bool((abs(best) < np.inf).all()):
            raise ValueError("scores: found NaN, +inf, or a pixel with -inf for every label")

    def _kernels(self, scores, image):
        xp = array_module(scores)
        h, w = image.shape[:2]
        y, x = xp.mgrid[:h, :w].astype(scores.dtype)
        position = xp.stack([x.ravel(), y.ravel()], axis=1)
        features = {"log_sigma_position": position}
        colour = xp.asarray(image).reshape(h * w, -1).astype(scores.dtype)
        features["log_sigma_bilateral"] = xp.concatenate([position, colour], axis=1)
        return [GaussianKernel(features[name], np.exp(self.params[name]), self.normalization,
                               self.exclude_self, self.exact) for name in self.names]
