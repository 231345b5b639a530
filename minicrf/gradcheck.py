"""Finite differences: how every backward method of this package is checked.

Central differences in float64: dL/dx_i = (L(x + h e_i) - L(x - h e_i)) / 2h + O(h^2).
`python -m minicrf.gradcheck` checks them all while you watch; `--break NAME` puts a bug into one.
"""
import argparse
import contextlib
import functools
import sys
import time

import numpy as np

TOLERANCE = 1e-6


def numerical_gradient(f, x, h=1e-5):
    """Gradient of the scalar function f at x, by central differences, one element at a time.

    f: called with x after one of its elements was changed in place; returns a scalar.
    x: float64 array of any shape, restored in the end.  h: step, in units of x.
    Returns an array of x's shape.  Raises TypeError for another dtype: in float32 the differences
    drown in rounding.
    """
    if x.dtype != np.float64:
        raise TypeError(f"x: found dtype {x.dtype}, expected float64")
    gradient = np.empty_like(x)
    for i in np.ndindex(x.shape):
        kept = x[i]
        x[i] = kept + h
        above = f(x)
        x[i] = kept - h
        gradient[i] = (above - f(x)) / (2 * h)
        x[i] = kept
    return gradient


def relative_error(a, b):
    """Largest |a - b| / max(1e-8, |a| + |b|) over the elements; ValueError for unequal shapes."""
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape:
        raise ValueError(f"a, b: found shapes {a.shape} and {b.shape}, expected equal ones")
    return float(np.max(np.abs(a - b) / np.maximum(1e-8, np.abs(a) + np.abs(b)), initial=0.0))


# What follows is the program.  It imports the package when it runs, this file coming before the
# others.  A check yields (name, gradient by backward, gradient by differences).

def _distinct(rng, *shape):
    """Values at least 0.1 apart and 0.05 from zero: differences cross no tie of ReLU or max."""
    n = int(np.prod(shape))
    return (0.1 * (rng.permutation(n) - n // 2) + 0.05).reshape(shape)


def check_layers():
    """Every layer, by the loss <dy, forward(x)>: linear between ties, so a long step is exact."""
    from . import layers
    rng = np.random.default_rng(0)
    conv = functools.partial(layers.Conv2d, 2, 2, rng=rng, dtype=np.float64)
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
        grads = {"x": layer.backward(dy.copy()), **layer.grads}
        for key, value in {"x": x, **layer.params}.items():
            yield f"{name}: d{key}", grads[key], numerical_gradient(
                lambda _: (dy * forward()).sum(), value, 1e-2)


def check_losses():
    """Eq. 6, with a void pixel."""
    from .inputs import VOID
    from .losses import softmax_loss
    z, y = np.random.default_rng(1).standard_normal((6, 4)), np.array([0, 3, VOID, 1, 1, 2])
    yield "softmax_loss: dz", softmax_loss(z, y)[1], numerical_gradient(
        lambda _: softmax_loss(z, y)[0], z)


def check_kernels():
    """What back-tracking asks of a kernel, by the loss sum_t <dz^t, K q^(t-1) W>, for two steps t.

    The lattice with its widths fixed: as a function of sigma it jumps; its dsigma is the moment
    form, and the tests hold that against the exact kernel's.
    """
    from .kernels import GaussianKernel, compatible
    from .permutohedral import PermutohedralLattice
    rng = np.random.default_rng(4)
    lattice = PermutohedralLattice(rng.standard_normal((12, 3)))
    a, b = rng.standard_normal((2, 12, 2))
    yield "PermutohedralLattice: transpose", lattice.filter_transpose(a), numerical_gradient(
        lambda _: (a * lattice.filter(b)).sum(), b, 1e-2)

    N, L = 9, 3
    features, log_sigma = rng.standard_normal((N, 2)), np.log([1.2, 0.8])
    A, B = list(rng.standard_normal((2, N, L))), list(rng.standard_normal((2, N, L)))
    W_0 = rng.standard_normal((L, L))
    for name, W, exact in (("Potts", np.array(0.7), True), ("matrix", W_0 + W_0.T, True),
                           ("lattice", W_0 + W_0.T, False)):
        def kernel():
            return GaussianKernel(features, np.exp(log_sigma), exact=exact)

        def loss(_):
            return sum((dz * compatible(kernel().filter(q)[:], W)).sum() for dz, q in zip(A, B))

        fixed = kernel()
        K_A = [fixed.filter_transpose(dz) for dz in A]
        dW, dlog_sigma = fixed.backward(A, [[K_dz] for K_dz in K_A], B, W)
        yield f"GaussianKernel, {name}: dq", compatible(K_A[1][:], W), numerical_gradient(
            loss, B[1], 1e-2)
        by_differences = numerical_gradient(loss, W, 1e-2)
        yield f"GaussianKernel, {name}: dW", dW, (by_differences + by_differences.T) / 2
        if exact:
            yield f"GaussianKernel, {name}: dlog_sigma", dlog_sigma, numerical_gradient(
                loss, log_sigma)


def check_crf():
    """Unary scores and all parameters, through five mean-field steps.

    The exact kernel's in full.  The lattice with its widths fixed, as in check_kernels.
    """
    from .densecrf import DenseCRF
    from .losses import softmax_loss
    rng = np.random.default_rng(2)
    H, W, L = 3, 4, 3
    f, y = rng.standard_normal((H, W, L)), rng.integers(0, L, H * W)
    image, dq = rng.uniform(0, 255, (H, W, 3)), rng.standard_normal((H, W, L))
    A = np.array([[1., .3, -.2], [.3, .8, .1], [-.2, .1, .5]])           # a compatibility

    for name, w, options in (("exact", (1., 2.), dict(exact=True)), ("lattice", (1., 2.), {}),
                             ("unnormalised", (.2, .4), dict(exact=True, normalization="none")),
                             ("with i = j", (1., 2.), dict(exact=True, exclude_self=False)),
                             ("matrices", (A, 2 * A), dict(exact=True)),
                             ("damped", (A, 2 * A), dict(exact=True, damping=1.5))):
        crf = DenseCRF(L, w=w, sigma_position=(1.5, 2.),
                       sigma_bilateral=(2., 3., 100., 120., 90.), **options)

        def loss_and_dz():
            crf.forward(f, image)
            return softmax_loss(crf.logits.reshape(-1, L), y)

        grads = {"scores": crf.backward_logits(loss_and_dz()[1]), **crf.grads}
        for key, value in {"scores": f, **crf.params}.items():
            if name != "lattice" or key in ("scores", "w"):
                by_differences = numerical_gradient(lambda _: loss_and_dz()[0], value)
                if key == "w" and value.ndim == 3:                       # its symmetric part
                    by_differences = (by_differences + by_differences.swapaxes(1, 2)) / 2
                yield f"DenseCRF, {name}: d{key}", grads[key], by_differences
        crf.forward(f, image)
        yield f"DenseCRF, {name}: dscores from dq", crf.backward(dq), numerical_gradient(
            lambda _: (dq * crf.forward(f, image)).sum(), f)


def check_local():
    """Fig. 2: minus the approximate log-likelihood, with a void pixel, by converged messages."""
    from .localcrf import LocalCRF
    from .inputs import VOID
    rng = np.random.default_rng(4)
    f, image = rng.standard_normal((3, 4, 3)), rng.uniform(0, 255, (3, 4, 3))
    y = rng.integers(0, 3, (3, 4))
    y[1, 1] = VOID
    for name, rho in ("loopy", 1.), ("tree-reweighted", 0.5):
        crf = LocalCRF(3, w=(0.3, 0.6), sigma_contrast=100., rho=rho, iterations=200)

        def loss(_=None):
            crf.forward(f, image)
            return float(crf.loss(y))

        loss()
        grads = {"scores": crf.backward(), **crf.grads}
        for key, value in {"scores": f, **crf.params}.items():
            yield f"LocalCRF, {name}: d{key}", grads[key], numerical_gradient(loss, value)


def check_model():
    """A joint training step, network to loss: all parameters at once, along random directions."""
    from . import densecrf, training, vgg
    rng = np.random.default_rng(3)
    net, crf = vgg.build("tiny", 3, dtype=np.float64), densecrf.DenseCRF(3, w=(1., 2.), exact=True)
    model = training.Model(net, (104., 117., 124.), crf)
    batch = []
    for H, W in ((6, 8), (5, 7)):
        image, labels = rng.integers(0, 256, (H, W, 3)).astype(np.uint8), rng.integers(0, 3, (H, W))
        batch.append((image, labels, model.resized(image)))
    params, grads = net.params | crf.params, net.grads | crf.grads
    start = {key: p.copy() for key, p in params.items()}
    directions = [{key: (p.std() + 0.01) * rng.standard_normal(p.shape)
                   for key, p in params.items()} for _ in range(3)]

    def loss(steps):
        for key, p in params.items():
            p[...] = start[key] + sum(step * v[key] for step, v in zip(steps, directions))
        return training.accumulate_gradients(model, batch, 1 / len(batch))

    steps = np.zeros(3)
    loss(steps)
    along = np.array([sum((grads[key] * v[key]).sum() for key in v) for v in directions])
    # short steps, to cross few of the ties of so many ReLUs
    yield "joint training step: 3 directions", along, numerical_gradient(loss, steps, 1e-7)


def run(checks=(check_layers, check_losses, check_kernels, check_crf, check_local, check_model)):
    """Print the table; returns the names of the rows that failed."""
    print(f"{'name':45}{'elements':>8}{'largest relative error':>25}")
    failed = []
    for check in checks:
        try:
            for name, by_backward, by_differences in check():
                error = relative_error(by_backward, by_differences)
                verdict = "pass" if error < TOLERANCE else "FAIL"        # NaN fails
                failed += [name] * (verdict == "FAIL")
                print(f"{name:45}{by_backward.size:8}{error:25.1e}   {verdict}", flush=True)
        except Exception as error:       # a broken backward may not even get its shapes right
            failed.append(check.__name__)
            print(f"{check.__name__}: {type(error).__name__}: {error}   FAIL")
    return failed


def main(arguments=None):
    from .programs.exercises import BUGS, broken
    changes = {name: f"{path}: {right.strip()} -> {wrong.strip() or '(nothing)'}"
               for name, (path, right, wrong) in BUGS.items()}
    parser = argparse.ArgumentParser(
        prog="python -m minicrf.gradcheck", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Check every layer, loss and CRF parameter against finite differences, in "
                    f"float64, on the CPU.\nRows pass under {TOLERANCE:g}; exit code 1 where one "
                    "fails.",
        epilog="names for --break, and what each changes:\n"
               + "\n".join(f"  {name:28}{change}" for name, change in changes.items()))
    parser.add_argument("--break", dest="bug", choices=changes, metavar="NAME",
                        help="put a bug into one function, for this run only, to see what fails")
    bug = parser.parse_args(arguments).bug
    started = time.monotonic()
    if bug:
        print(f"broken: {changes[bug]}\n")
    with broken(*BUGS[bug]) if bug else contextlib.nullcontext():
        failed = run()
    print(f"\n{len(failed)} failed, {time.monotonic() - started:.1f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
