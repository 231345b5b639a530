"""Finite differences: how every backward method of this package is checked.

Central differences in float64: dL/dx_i = (L(x + h e_i) - L(x - h e_i)) / 2h + O(h^2).
`python -m minicrf.gradcheck` checks them all while you watch; `--break NAME` puts a bug into one.
"""
import argparse
import contextlib
import importlib
import inspect
import sys
import textwrap
import time

import numpy as np

TOLERANCE = 1e-6

# name: where, the right text there, and the wrong text that --break puts in its place
BUGS = {
    "conv-dw-sign": ("layers.Conv2d.backward", "dw_matrix +=", "dw_matrix -="),
    "conv-db-dropped": ("layers.Conv2d.backward", "cells_dy.sum(axis=(0, 2))", "0"),
    "conv-dx-not-turned": ("layers.Conv2d.backward", "w[:, :, ::-1, ::-1]", "w"),
    "relu-mask-dropped": ("layers.ReLU.backward", "y > 0", "y >= 0"),
    "pool-to-all-taps": ("layers.MaxPool2d.backward", "(winner[b] == number)", "1"),
    "dropout-scale-dropped": ("layers.Dropout.backward", "1 / (1 - self.rate)", "1"),
    "dropout-mask-dropped": ("layers.Dropout.backward", "dy *= kept", "pass"),
    "upsample-transposed": ("layers.BilinearUpsample.backward", "transpose(2, 0, 1)",
                            "transpose(2, 1, 0)"),
    "sequential-not-chained": ("layers.Sequential.backward", "dy = layer.backward(dy)",
                               "layer.backward(dy.copy())"),
    "loss-truth-dropped": ("losses.softmax_loss", "q[pixels, y] -= 1", "pass"),
    "loss-void-counted": ("losses.softmax_loss", "q *= weight[:, None]", "q *= weight.max()"),
    "crf-dq-not-through-softmax": ("densecrf.DenseCRF.backward",
                                   "_through_softmax(dq.reshape(q.shape), q)", "dq"),
    "crf-softmax-term-dropped": ("densecrf._through_softmax", "- _row_dots(dq, q)[:, None]", ""),
    "crf-dz-dropped": ("densecrf.DenseCRF.backward_logits", "df[rows] += dz[rows]", "pass"),
    "crf-dz0-dropped": ("densecrf.DenseCRF.backward_logits", "df += dz\n", "pass\n"),
    "crf-transpose-forgotten": ("densecrf.DenseCRF.backward_logits", "spread_transpose", "spread"),
    "crf-message-sign": ("densecrf.DenseCRF.backward_logits", "dq += w[m] * K_dz",
                         "dq -= w[m] * K_dz"),
    "crf-message-unweighted": ("densecrf.DenseCRF.backward_logits", "w[m] * K_dz", "K_dz"),
    "crf-self-forgotten": ("densecrf.DenseCRF.backward_logits", "dq = -self_weight[rows]",
                           "dq = 0"),
    "crf-dw-one-step": ("densecrf.DenseCRF.backward_logits", "forth[m, rows] +=",
                        "forth[m, rows] ="),
    "crf-dw-self-forgotten": ("densecrf.DenseCRF.backward_logits",
                              "forth[m] - kernel.self_weight * product", "forth[m]"),
    "crf-dsigma-back-dropped": ("densecrf.DenseCRF.backward_logits", "forth[m] + back[m]",
                                "forth[m]"),
    "crf-dsigma-cross-dropped": ("densecrf.DenseCRF.backward_logits", "cross[m] +=",
                                 "cross[m] = 0 *"),
    "crf-dsigma-unweighted": ("densecrf.DenseCRF.backward_logits", "w[m] * to_host(dsigma)",
                              "to_host(dsigma)"),
    "kernel-cross-sign": ("kernels.GaussianKernel.shape_gradient", "- 2 * cross", "+ 2 * cross"),
    "kernel-n-dropped": ("kernels.GaussianKernel.shape_gradient", "gradient += (", "0 * ("),
    "kernel-kappa-dropped": ("kernels.GaussianKernel.shape_gradient",
                             "self.self_weight * product - outer / 2", "-outer / 2"),
    "lattice-blurs-not-reversed": ("permutohedral.PermutohedralLattice.spread_transpose",
                                   "reversed(self.blurs)", "self.blurs"),
}


def numerical_gradient(f, x, h=1e-5):
    """Gradient of the scalar function f at x, by central differences, one element at a time.

    f: called without arguments after x was changed in place, or with x; returns a scalar.
    x: float64 array of any shape; changed in place while checking, and restored.
    h: step, in units of x.  Returns an array of x's shape.
    Raises TypeError where x is not float64: in float32 the differences drown in rounding.
    """
    if x.dtype != np.float64:
        raise TypeError(f"x: found dtype {x.dtype}, expected float64")
    gradient = np.empty_like(x)
    for i in np.ndindex(x.shape):
        kept = x[i]
        x[i] = kept + h
        above = f(x)
        x[i] = kept - h
        below = f(x)
        x[i] = kept
        gradient[i] = (above - below) / (2 * h)
    return gradient


def relative_error(a, b):
    """Largest |a - b| / max(1e-8, |a| + |b|) over the elements of two arrays of one shape.

    Raises ValueError where the shapes differ.
    """
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape:
        raise ValueError(f"relative_error: found shapes {a.shape} and {b.shape}, expected equal ones")
    return float(np.max(np.abs(a - b) / np.maximum(1e-8, np.abs(a) + np.abs(b)), initial=0.0))


# What follows is the program.  It imports the rest of the package when it runs: this file comes
# before all others.  A check yields (name, gradient by backward, gradient by differences).

def _distinct(rng, *shape):
    """Values at least 0.1 apart and 0.05 from zero: differences cross no tie of ReLU or max."""
    n = int(np.prod(shape))
    return (0.1 * (rng.permutation(n) - n // 2) + 0.05).reshape(shape)


def check_layers():
    """Every layer, by the loss <dy, forward(x)>: linear between ties, so a long step is exact."""
    from . import layers
    rng = np.random.default_rng(0)

    def conv(kernel, dilation, padding):
        return layers.Conv2d(2, 2, kernel, dilation, padding, rng, np.float64)

    for name, layer, shape, *size in (
            ("Conv2d 3x3", conv(3, 1, 1), (2, 2, 4, 5)),
            ("Conv2d 3x3 with holes", conv(3, 2, 2), (1, 2, 5, 6)),
            ("Conv2d 1x1", conv(1, 1, 0), (2, 2, 3, 3)),
            ("ReLU", layers.ReLU(), (2, 3, 4, 4)),
            ("MaxPool2d, stride 2", layers.MaxPool2d(2, 2, 1, (1, 1)), (2, 2, 5, 6)),
            ("MaxPool2d with holes", layers.MaxPool2d(2, 1, 2, (1, 1)), (1, 2, 5, 5)),
            ("Dropout", layers.Dropout(0.5, seed=1), (2, 3, 4, 4)),
            ("BilinearUpsample", layers.BilinearUpsample(8, 0.5, 24), (2, 3, 3), (7, 5)),
            ("Sequential", layers.Sequential({"a": conv(3, 1, 1), "b": conv(3, 1, 1)}),
             (1, 2, 4, 4))):
        x = _distinct(rng, *shape)

        def forward():
            return layer.forward(x.copy(), *size, train=True)

        dy = rng.standard_normal(forward().shape)
        dx = layer.backward(dy.copy())
        grads = {key: g.copy() for key, g in layer.grads.items()}
        yield f"{name}: dx", dx, numerical_gradient(lambda _: (dy * forward()).sum(), x, 1e-2)
        for key, p in layer.params.items():
            yield f"{name}: d{key}", grads[key], numerical_gradient(
                lambda _: (dy * forward()).sum(), p, 1e-2)


def check_losses():
    """Eq. 6, with a void pixel."""
    from .losses import VOID, softmax_loss
    z, y = np.random.default_rng(1).standard_normal((6, 4)), np.array([0, 3, VOID, 1, 1, 2])
    yield "softmax_loss: dz", softmax_loss(z, y)[1], numerical_gradient(
        lambda _: softmax_loss(z, y)[0], z)


def check_crf():
    """Unary scores and all nine parameters, through five mean-field steps.

    The exact kernel's in full.  The lattice is checked for the widths it has: as a function of sigma
    it jumps, its dsigma is the moment form, and the tests hold that against the exact kernel's.
    """
    from .densecrf import DenseCRF
    from .losses import softmax_loss
    from .permutohedral import PermutohedralLattice
    rng = np.random.default_rng(2)
    H, W, L = 4, 5, 3
    f, y = rng.standard_normal((H, W, L)), rng.integers(0, L, H * W)
    image, dq = rng.uniform(0, 255, (H, W, 3)), rng.standard_normal((H, W, L))

    for name, options in (("exact", dict(exact=True)), ("lattice", {}),
                          ("exact, not normalised", dict(exact=True, normalization="none"))):
        crf = DenseCRF(L, w=(1., 2.), sigma_position=(1.5, 2.),
                       sigma_bilateral=(2., 3., 100., 120., 90.), **options)

        def loss(_):
            crf.forward(f, image)
            return softmax_loss(crf.logits.reshape(-1, L), y)[0]

        loss(None)
        df = crf.backward_logits(softmax_loss(crf.logits.reshape(-1, L), y)[1])
        yield f"DenseCRF, {name}: dscores", df, numerical_gradient(loss, f)
        for key, p in crf.params.items():
            if name != "lattice" or key == "w":
                yield f"DenseCRF, {name}: d{key}", crf.grads[key].copy(), numerical_gradient(loss, p)
    crf.forward(f, image)
    yield "DenseCRF: dscores from dq", crf.backward(dq), numerical_gradient(
        lambda _: (dq * crf.forward(f, image)).sum(), f)

    lattice = PermutohedralLattice(rng.standard_normal((12, 3)))
    a, b = rng.standard_normal((2, 12, 2))
    yield "PermutohedralLattice: transpose", lattice.filter_transpose(a), numerical_gradient(
        lambda _: (a * lattice.filter(b)).sum(), b, 1e-2)


def check_model():
    """A joint training step: network, upsampling, CRF, loss; all parameters along random directions."""
    from . import training, vgg
    from .densecrf import DenseCRF
    rng = np.random.default_rng(3)
    net = vgg.build("tiny", 3, dtype=np.float64)
    crf = DenseCRF(3, w=(1., 2.), exact=True)
    model = training.Model(net, (104., 117., 124.), crf)
    batch = [(rng.integers(0, 255, (6, 8, 3)).astype(np.uint8), rng.integers(0, 3, (6, 8)))]
    for name, part in (("network", net), ("CRF", crf)):
        params, grads = part.params, part.grads
        for g in grads.values():
            g[...] = 0
        training.accumulate_gradients(model, batch, 1.0)
        directions = [{key: p.std() * rng.standard_normal(p.shape) + 1e-3 for key, p in params.items()}
                      for _ in range(3)]
        along = np.array([sum((grads[key] * v).sum() for key, v in direction.items())
                          for direction in directions])

        def loss(steps):
            for step, direction in zip(steps, directions):
                for key, v in direction.items():
                    params[key] += step * v
            value = training.accumulate_gradients(model, batch, 1.0)
            for step, direction in zip(steps, directions):
                for key, v in direction.items():
                    params[key] -= step * v
            return value

        # a short step, to cross few of the ties of so many ReLUs
        yield f"joint step: {name}, 3 directions", along, numerical_gradient(loss, np.zeros(3), 1e-7)


CHECKS = (check_layers, check_losses, check_crf, check_model)
