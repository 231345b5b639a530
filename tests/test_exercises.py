"""Every backward pass broken on purpose, one bug at a time: finite differences notice, and where.

`exercises.BUGS` and MORE list the bugs, `exercises.broken` applies one while a test runs.  Each bug
fails a row that belongs to the broken function; without bugs no row fails; no function that
computes a gradient is missing from the list.
"""
import ast
import functools
import pathlib
import re

import numpy as np
import pytest

from minicrf import gradcheck, losses
from minicrf.programs import exercises

PACKAGE = pathlib.Path(gradcheck.__file__).parent

# function: (the check that covers it, the rows it may fail).  A check stops at its first failure.
CRF = gradcheck.check_crf, "DenseCRF"
MODEL = gradcheck.check_model, "joint training step"
KERNEL = gradcheck.check_kernels, "GaussianKernel"
SIGMA = gradcheck.check_kernels, "GaussianKernel, .*: dlog_sigma"
COVERED_BY = {
    "layers.Conv2d.backward": (gradcheck.check_layers, "Conv2d"),
    "layers.ReLU.backward": (gradcheck.check_layers, "ReLU"),
    "layers.MaxPool2d.backward": (gradcheck.check_layers, "MaxPool2d"),
    "layers.Dropout.backward": (gradcheck.check_layers, "Dropout"),
    "layers.BilinearUpsample.backward": (gradcheck.check_layers, "BilinearUpsample"),
    "layers.Sequential.backward": (gradcheck.check_layers, "Sequential"),
    "losses.softmax_loss": (gradcheck.check_losses, "softmax_loss"),
    "permutohedral.PermutohedralLattice.blur_transpose": (
        gradcheck.check_kernels, "PermutohedralLattice: transpose"),
    "kernels.GaussianKernel.filter_transpose": (gradcheck.check_kernels, ".*lattice: dq"),
    "kernels.GaussianKernel._without_self": (gradcheck.check_crf, "DenseCRF"),
    "kernels.GaussianKernel.backward": (gradcheck.check_kernels, ".*: d(W|log_sigma)"),
    "kernels.GaussianKernel._sums": SIGMA,
    "kernels.GaussianKernel._crosses": SIGMA,
    "kernels.compatible_backward": (gradcheck.check_kernels, "GaussianKernel, matrix: dW"),
    "marginals.through_log_marginals": CRF,
    "meanfield.FeatureCRF.backward": (gradcheck.check_crf, "DenseCRF, .*: dscores from dq"),
    "meanfield.FeatureCRF.backward_logits": (gradcheck.check_crf, "DenseCRF, damped: "),
    "meanfield.FeatureCRF._back_track": CRF,
    "learning.crf_gradients": MODEL,
    "training.image_gradients": MODEL,
    "training.accumulate_gradients": MODEL,
    "localcrf.LocalCRF.backward": (gradcheck.check_local, "LocalCRF"),
    "localcrf._sweep": (gradcheck.check_local, "LocalCRF"),
}

# Further bugs.  function: {name: (right text, the wrong one)}
MORE = {
    "layers.Conv2d.backward": {
        "conv-dw-sign": ("dw += dturned", "dw -= dturned"),
        "conv-db-dropped": ("dy.reshape(len(dy), O, -1).sum(axis=2).sum(axis=0)", "0"),
    },
    "layers.MaxPool2d.backward": {
        "pool-to-all-taps": ("(winner[p] == number)", "1"),
    },
    "layers.Dropout.backward": {
        "dropout-mask-dropped": ("dy *= kept", "pass"),
        "dropout-scale-dropped": ("1 / (1 - self.rate)", "1"),
    },
    "layers.BilinearUpsample.backward": {
        "upsample-transposed": ("transpose(2, 0, 1)", "transpose(2, 1, 0)"),
    },
    "layers.Sequential.backward": {
        "sequential-not-chained": ("dy = layer.backward(dy)", "layer.backward(dy.copy())"),
    },
    "losses.softmax_loss": {
        "loss-void-counted": ("q *= weight[:, None]", "q *= weight.max()"),
    },
    "permutohedral.PermutohedralLattice.blur_transpose": {
        "lattice-blurs-not-reversed": ("reversed(self.blurs)", "self.blurs"),
    },
    "kernels.GaussianKernel._without_self": {
        "kernel-self-forgotten": ("K_b -= self.kappa[rows] * b[rows]", "pass"),
    },
    "kernels.GaussianKernel.backward": {
        "kernel-cross-sign": ("- 2 * self._crosses", "+ 2 * self._crosses"),
        "kernel-n-squares-dropped": ("+ K_F2)", ")"),
        "kernel-kappa-dropped": ("(both + same)", "both"),
    },
    "kernels.GaussianKernel._sums": {
        "kernel-sums-forth-dropped": ("reward(a_i, K_b, W) + ", ""),
        "kernel-sums-back-dropped": (" + reward(K_a, b_i, W)", ""),
    },
    "kernels.GaussianKernel._crosses": {
        "kernel-moments-unnormalised": ("self.K_with_self.scaled", "self.K.scaled"),
        "kernel-moments-unmixed": ("compatible(K.splat(a), W)", "K.splat(a)"),
    },
    "kernels.compatible_backward": {
        "kernel-dw-lopsided": ("(dW + dW.T) / 2", "dW"),
    },
    "marginals.through_log_marginals": {
        "marginals-sum-forgotten": ("du - q * row_sums(du)[:, None]", "du"),
        "marginals-undamped": ("if c == 0", "if True"),
        "marginals-mean-of-more-than-one": ("/ row_sums(h))", ")"),
    },
    "meanfield.FeatureCRF.backward": {
        "crf-last-step-undamped": ("state.c if state.steps else 0", "0"),
    },
    "meanfield.FeatureCRF.backward_logits": {
        "crf-logits-undamped": ("if state.c and state.steps", "if False"),
    },
    "meanfield.FeatureCRF._back_track": {
        "crf-dz-dropped": ("dz, *A)", "dz)"),
        "crf-damping-dropped": ("add_messages(c * dz", "add_messages(0 * dz"),
        "crf-message-sign": (
            "add_messages(c * dz, messages, W)",
            "2 * c * dz - add_messages(c * dz, messages, W)"),
        "crf-softmax-skipped": ("dz = rowwise(through, dq, dq, steps[t - 1])", "dz = dq"),
    },
    "learning.crf_gradients": {
        "joint-crf-skipped": (
            "loss, crf.backward_logits(dz), crf.grads",
            "loss, (crf.backward_logits(dz), dz)[1], crf.grads"),
        "joint-loss-of-unary-scores": ("softmax_loss(crf.logits", "softmax_loss(f"),
    },
    "training.image_gradients": {
        "joint-share-dropped": ("df *= df.dtype.type(share)", "pass"),
        "joint-crf-share-dropped": ("share * g for", "g for"),
        "joint-upsampling-turned": (
            "backward(df.reshape(f.shape))",
            "backward(df.reshape(f.shape)[:, ::-1])"),
    },
    "training.accumulate_gradients": {
        "joint-crf-one-image": ("model.crf.grads[key] += g", "model.crf.grads[key][...] = g"),
        "joint-net-dropped": ("net.backward(array_module(scores).stack(dscores))", "pass"),
    },
    "localcrf.LocalCRF.backward": {
        "local-truth-dropped": ("self._b - self._b_y", "self._b"),
        "local-dw-truth-dropped": ("d = P - P_y", "d = P"),
        "local-dw-contrast-dropped": ("contrast * d", "d"),
        "local-labelled-forgotten": ("(self._b - self._b_y) / self._labelled", "self._b - self._b_y"),
    },
    "localcrf._sweep": {
        "local-rho-forgotten": ("z[i + 1] += rho * (m", "z[i + 1] += (m"),
    },
}

# Functions with such names that are no backward pass of their own, each with the reason.
NO_BUG = {
    "layers.Layer.backward": "hands dy on unchanged",
    "gradcheck.numerical_gradient": "the checker itself: tests/test_gradcheck.py",
    "plain.gradient_error": "a checker too; plain.py's own passes: tests/test_plain.py",
    "permutohedral.PermutohedralLattice.filter_transpose": "blur_transpose, then slice",
    "marginals.through_marginals": "through_log_marginals, of q dq",
    "meanfield._checked_gradient": "changes no number",
    "arrays.transposed": "a matrix, ready for use",
}

BUGS = {name: bug for name, bug in exercises.BUGS.items()} | {
    name: (path, *texts) for path, bugs in MORE.items() for name, texts in bugs.items()}
BROKEN = {path for path, _, _ in BUGS.values()}


def first_failure(check):
    """The name of the first row of a check that fails, or None."""
    for name, by_backward, by_differences in check():
        try:
            if not gradcheck.relative_error(by_backward, by_differences) < gradcheck.TOLERANCE:
                return name
        except ValueError:                               # a gradient of the wrong shape
            return name
    return None


@functools.cache
def passes(check):
    return first_failure(check) is None


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_fails_its_check_and_the_right_code_passes(name):
    path, right, wrong = BUGS[name]
    check, rows = COVERED_BY[path]
    assert passes(check)
    with exercises.broken(path, right, wrong):
        row = first_failure(check)
    assert row is not None, f"{path} runs with {name}, and no row of {check.__name__} fails"
    assert re.match(rows, row), f"{name} of {path} fails {row!r}, expected a row like {rows!r}"


def functions(tree, prefix):
    """The qualified names of the functions and methods that a module or class defines."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield from functions(node, f"{prefix}.{node.name}")
        elif isinstance(node, ast.FunctionDef):
            yield f"{prefix}.{node.name}"


def test_every_function_that_computes_a_gradient_is_in_the_list():
    named = {name for path in PACKAGE.glob("*.py")
             for name in functions(ast.parse(path.read_text(encoding="utf-8")), path.stem)
             if re.search("backward|back_track|[Gg]radient|transpose|through_", name)}
    assert named - NO_BUG.keys() <= BROKEN
    assert NO_BUG.keys() <= named and not NO_BUG.keys() & BROKEN
    assert BROKEN == COVERED_BY.keys()


def test_a_bug_reaches_those_who_imported_the_function_before():
    imported, kept = losses.softmax_loss, losses.softmax_loss.__code__
    z, y = np.zeros((2, 2)), np.array([0, 1])
    right = imported(z, y)[1]
    with exercises.broken(*BUGS["loss-truth-dropped"]):
        assert not np.array_equal(imported(z, y)[1], right)
    assert np.array_equal(imported(z, y)[1], right) and imported.__code__ is kept


def test_a_bug_whose_line_has_changed_is_refused():
    with pytest.raises(ValueError, match="found 'no such text' 0 times in losses.softmax_loss"):
        with exercises.broken("losses.softmax_loss", "no such text", ""):
            pass
