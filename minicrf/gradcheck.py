"""Finite differences: how every backward method of this package is checked.

Central differences in float64: dL/dx_i = (L(x + h e_i) - L(x - h e_i)) / 2h + O(h^2).
`python -m minicrf.gradcheck` checks them all while you watch; `--break NAME` puts a bug into one.
"""
import argparse
import contextlib
import functools
import inspect
import pkgutil
import sys
import textwrap
import time

import numpy as np

TOLERANCE = 1e-6

# function: {name: (right text, the wrong one that --break puts in its place)}
BUGS = {
    "layers.Conv2d.backward": {
        "conv-dw-sign": ("dw += dturned", "dw -= dturned"),
        "conv-db-dropped": ("dy.reshape(len(dy), O, -1).sum(axis=2).sum(axis=0)", "0"),
        "conv-dx-not-turned": ("w[:, :, ::-1, ::-1]", "w")},
    "layers.ReLU.backward": {"relu-mask-dropped": ("y[p] > 0", "y[p] >= 0")},
    "layers.MaxPool2d.backward": {"pool-to-all-taps": ("(winner[p] == number)", "1")},
    "layers.Dropout.backward": {
        "dropout-mask-dropped": ("dy *= kept", "pass"),
        "dropout-scale-dropped": ("1 / (1 - self.rate)", "1")},
    "layers.BilinearUpsample.backward": {
        "upsample-transposed": ("transpose(2, 0, 1)", "transpose(2, 1, 0)")},
    "layers.Sequential.backward": {
        "sequential-not-chained": ("dy = layer.backward(dy)", "layer.backward(dy.copy())")},
    "losses.softmax_loss": {
        "loss-truth-dropped": ("q[pixels, y] -= 1", "pass"),
        "loss-void-counted": ("q *= weight[:, None]", "q *= weight.max()")},
    "densecrf.DenseCRF.backward": {
        "crf-softmax-forgotten": ("_through_softmax(dq.reshape(q.shape), q)", "dq")},
    "densecrf._through_softmax": {"crf-softmax-term-dropped": ("- _row_dots(dq, q)[:, None]", "")},
    "densecrf.DenseCRF.backward_logits": {
        "crf-dz-dropped": ("df[rows] += dz[rows]", "pass"),
        "crf-dz0-dropped": ("df += dz\n", "pass\n"),
        "crf-transpose-forgotten": ("spread_transpose", "spread"),
        "crf-message-sign": ("dq += w[m] * K_dz", "dq -= w[m] * K_dz"),
        "crf-message-unweighted": ("w[m] * K_dz", "K_dz"),
        "crf-self-forgotten": ("dq = -self_weight[rows]", "dq = 0"),
        "crf-softmax-skipped": ("dz[rows] = _through_softmax(dq, q[rows])", "dz[rows] = dq"),
        "crf-dw-one-step": ("forth[m, rows] +=", "forth[m, rows] ="),
        "crf-dsigma-back-one-step": ("back[m, rows] +=", "back[m, rows] ="),
        "crf-product-one-step": ("product[rows] +=", "product[rows] ="),
        "crf-dsigma-cross-dropped": ("cross[m] +=", "cross[m] = 0 *")},
    "densecrf.DenseCRF._add_parameter_gradients": {
        "crf-dw-self-forgotten": ("forth[m] - kernel.self_weight * product", "forth[m]"),
        "crf-dsigma-forth-dropped": ("forth[m] + back[m]", "back[m]"),
        "crf-dsigma-back-dropped": ("forth[m] + back[m]", "forth[m]"),
        "crf-dsigma-unweighted": ('self.params["w"][m] * dsigma', "dsigma")},
    "kernels.GaussianKernel.shape_gradient": {
        "kernel-cross-sign": ("- 2 * cross", "+ 2 * cross"),
        "kernel-n-dropped": ("gradient += (", "0 * ("),
        "kernel-n-squares-dropped": ("+ K_squares", ""),
        "kernel-kappa-dropped": ("self.self_weight * product - outer / 2", "-outer / 2")},
    "permutohedral.PermutohedralLattice.spread_transpose": {
        "lattice-blurs-not-reversed": ("reversed(self.blurs)", "self.blurs")},
    "permutohedral.PermutohedralLattice.inner": {
        "lattice-inner-not-blurred": ("self.spread(b)", "self._splat(b)")},
    "training.accumulate_gradients": {
        # "truth minus marginals" alone, back-tracking left out
        "joint-crf-skipped": ("df = crf.backward_logits(df)", "crf.backward_logits(df)"),
        "joint-loss-of-unary-scores": ("z = crf.logits", "z = f.copy()"),
        "joint-share-dropped": ("dz *= dz.dtype.type(share)", "pass"),
        "joint-upsampling-turned": ("upsample.backward(df)", "upsample.backward(df)[:, ::-1]"),
        "joint-net-dropped": ("net.backward(dscores)", "pass")},
}


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
    from .losses import VOID, softmax_loss
    z, y = np.random.default_rng(1).standard_normal((6, 4)), np.array([0, 3, VOID, 1, 1, 2])
    yield "softmax_loss: dz", softmax_loss(z, y)[1], numerical_gradient(
        lambda _: softmax_loss(z, y)[0], z)


def check_crf():
    """Unary scores and all nine parameters, through five mean-field steps.

    The exact kernel's in full.  The lattice with its widths fixed: as a function of sigma it jumps;
    its dsigma is the moment form, and the tests hold that against the exact kernel's.
    """
    from .densecrf import DenseCRF
    from .losses import softmax_loss
    from .permutohedral import PermutohedralLattice
    rng = np.random.default_rng(2)
    H, W, L = 3, 4, 3
    f, y = rng.standard_normal((H, W, L)), rng.integers(0, L, H * W)
    image, dq = rng.uniform(0, 255, (H, W, 3)), rng.standard_normal((H, W, L))

    for name, w, options in (("exact", (1., 2.), dict(exact=True)), ("lattice", (1., 2.), {}),
                             ("unnormalised", (.2, .4), dict(exact=True, normalization="none"))):
        crf = DenseCRF(L, w=w, sigma_position=(1.5, 2.),
                       sigma_bilateral=(2., 3., 100., 120., 90.), **options)

        def loss_and_dz():
            crf.forward(f, image)
            return softmax_loss(crf.logits.reshape(-1, L), y)

        grads = {"scores": crf.backward_logits(loss_and_dz()[1]), **crf.grads}
        for key, value in {"scores": f, **crf.params}.items():
            if name != "lattice" or key in ("scores", "w"):
                yield f"DenseCRF, {name}: d{key}", grads[key], numerical_gradient(
                    lambda _: loss_and_dz()[0], value)
    crf.forward(f, image)
    yield "DenseCRF: dscores from dq", crf.backward(dq), numerical_gradient(
        lambda _: (dq * crf.forward(f, image)).sum(), f)

    lattice = PermutohedralLattice(rng.standard_normal((12, 3)))
    a, b = rng.standard_normal((2, 12, 2))
    yield "PermutohedralLattice: transpose", lattice.filter_transpose(a), numerical_gradient(
        lambda _: (a * lattice.filter(b)).sum(), b, 1e-2)
    yield "PermutohedralLattice: inner", lattice.filter(b), numerical_gradient(
        lambda _: lattice.inner(a, b), a, 1e-2)


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


@contextlib.contextmanager
def broken(name):
    """While this context lasts, one function of the package runs with the bug of that name.

    Its code object is exchanged, so that whoever has imported it sees the bug; files stay as they
    are.  Raises ValueError where the right text is not there exactly once.
    """
    path, right, wrong = next((path, *bugs[name]) for path, bugs in BUGS.items() if name in bugs)
    function = pkgutil.resolve_name("minicrf." + path)
    source, namespace, kept = textwrap.dedent(inspect.getsource(function)), {}, function.__code__
    if source.count(right) != 1:
        raise ValueError(f"{name}: found {right!r} {source.count(right)} times in {path}, "
                         "expected once")
    exec(source.replace(right, wrong), namespace)
    function.__code__ = namespace[function.__name__].__code__
    try:
        yield
    finally:
        function.__code__ = kept


def run(checks=(check_layers, check_losses, check_crf, check_model)):
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
    changes = {name: f"{path}: {right.strip()} -> {wrong.strip() or '(nothing)'}"
               for path, bugs in BUGS.items() for name, (right, wrong) in bugs.items()}
    parser = argparse.ArgumentParser(
        prog="python -m minicrf.gradcheck", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Check every layer, loss and CRF parameter against finite differences, in "
                    f"float64.\nRows pass under {TOLERANCE:g}; exit code 1 where one fails.",
        epilog="names for --break, and what each changes:\n"
               + "\n".join(f"  {name:28}{change}" for name, change in changes.items()))
    parser.add_argument("--break", dest="bug", choices=changes, metavar="NAME",
                        help="put a bug into one function, for this run only, to see what fails")
    bug = parser.parse_args(arguments).bug
    started = time.monotonic()
    if bug:
        print(f"broken: {changes[bug]}\n")
    with broken(bug) if bug else contextlib.nullcontext():
        failed = run()
    print(f"\n{len(failed)} failed, {time.monotonic() - started:.1f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
