"""Every backward pass broken on purpose, one bug at a time: finite differences notice, and where.

`exercises.BUGS` and PASSES list the bugs, `exercises.broken` applies one while a test runs.  Each
bug fails a row that belongs to the broken function; without bugs no row fails; no function that
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

# function: (the check that covers it, the rows that may fail, further bugs: right text, wrong one).
# A check stops at its first failure.
PASSES = {
    "layers.Conv2d.backward": (gradcheck.check_layers, "Conv2d", [
        ("dw += dturned", "dw -= dturned"),
        ("dy.reshape(len(dy), O, -1).sum(axis=2).sum(axis=0)", "0")]),
    "layers.ReLU.backward": (gradcheck.check_layers, "ReLU", []),
    "layers.MaxPool2d.backward": (gradcheck.check_layers, "MaxPool2d", [
        ("(winner[p] == number)", "1")]),
    "layers.Dropout.backward": (gradcheck.check_layers, "Dropout", [
        ("dy *= kept", "pass"),
        ("1 / (1 - self.rate)", "1")]),
    "layers.BilinearUpsample.backward": (gradcheck.check_layers, "BilinearUpsample", [
        ("transpose(2, 0, 1)", "transpose(2, 1, 0)")]),
    "layers.Sequential.backward": (gradcheck.check_layers, "Sequential", [
        ("dy = layer.backward(dy)", "layer.backward(dy.copy())")]),
    "losses.softmax_loss": (gradcheck.check_losses, "softmax_loss", [
        ("q *= weight[:, None]", "q *= weight.max()")]),
    "permutohedral.PermutohedralLattice.blur_transpose": (
        gradcheck.check_kernels, "PermutohedralLattice: transpose", [
        ("reversed(self.blurs)", "self.blurs")]),
    "kernels.GaussianKernel.filter_transpose": (gradcheck.check_kernels, ".*lattice: dq", []),
    "kernels.GaussianKernel._without_self": (gradcheck.check_crf, "DenseCRF", [
        ("K_b -= self.kappa[rows] * b[rows]", "pass")]),
    "kernels.GaussianKernel.backward": (gradcheck.check_kernels, ".*: d(W|log_sigma)", [
        ("- 2 * crosses", "+ 2 * crosses"),
        ("+ K_F2)", ")"),
        ("(sums + diagonal)", "sums")]),
    "kernels.GaussianKernel._sums": (gradcheck.check_kernels, "GaussianKernel, .*: dlog_sigma", [
        ("reward(a_i, K_b, W) + ", ""),
        (" + reward(K_a, b_i, W)", "")]),
    "kernels.GaussianKernel._crosses": (gradcheck.check_kernels, "GaussianKernel, .*: dlog_sigma", [
        ("self.K_with_self", "self.K"),
        ("compatible(K_k.splat(a), W)", "K_k.splat(a)")]),
    "kernels.compatible_backward": (gradcheck.check_kernels, "GaussianKernel, matrix: dW", [
        ("(dW + dW.T) / 2", "dW")]),
    "marginals.through_log_marginals": (gradcheck.check_crf, "DenseCRF", [
        ("du - q * row_sums(du)[:, None]", "du"),
        ("if c == 0", "if True"),
        ("/ row_sums(h))", ")")]),
    "meanfield.FeatureCRF.backward": (gradcheck.check_crf, "DenseCRF, .*: dscores from dq", [
        ("state.c if state.steps else 0", "0")]),
    "meanfield.FeatureCRF.backward_logits": (gradcheck.check_crf, "DenseCRF, damped: ", [
        ("if state.c and state.steps", "if False")]),
    "meanfield.FeatureCRF._back_track": (gradcheck.check_crf, "DenseCRF", [
        ("dz, *A)", "dz)"),
        ("c * dz if c else 0", "0"),
        ("add_messages(c * dz if c else 0, messages, W)",
         "2 * c * dz - add_messages(c * dz, messages, W)"),
        ("through_marginals(dq, q, c_q)", "dq")]),
    "learning.crf_gradients": (gradcheck.check_model, "joint training step", [
        ("loss, crf.backward_logits(dz), crf.grads",
         "loss, (crf.backward_logits(dz), dz)[1], crf.grads"),
        ("softmax_loss(crf.logits", "softmax_loss(f")]),
    "training.image_gradients": (gradcheck.check_model, "joint training step", [
        ("df *= df.dtype.type(share)", "pass"),
        ("share * g for", "g for"),
        ("backward(df.reshape(f.shape))", "backward(df.reshape(f.shape)[:, ::-1])")]),
    "training.accumulate_gradients": (gradcheck.check_model, "joint training step", [
        ("model.crf.grads[key] += g", "model.crf.grads[key][...] = g"),
        ("net.backward(array_module(scores).stack(dscores))", "pass")]),
    "localcrf.LocalCRF.backward": (gradcheck.check_local, "LocalCRF", [
        ("self._b - self._b_y", "self._b"),
        ("d = P - P_y", "d = P"),
        ("contrast * d", "d"),
        ("(self._b - self._b_y) / self._labelled", "self._b - self._b_y")]),
    "localcrf._sweep": (gradcheck.check_local, "LocalCRF", [
        ("z[i + 1] += rho * (m", "z[i + 1] += (m")]),
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

BUGS = [*exercises.BUGS.values(),
        *((path, *bug) for path, (_, _, bugs) in PASSES.items() for bug in bugs)]


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


@pytest.mark.parametrize("path, right, wrong", BUGS)
def test_a_bug_fails_its_check_and_the_right_code_passes(path, right, wrong):
    check, rows, _ = PASSES[path]
    assert passes(check)
    with exercises.broken(path, right, wrong):
        row = first_failure(check)
    assert row is not None, f"no row of {check.__name__} fails"
    assert re.match(rows, row), f"{row!r} fails, expected a row like {rows!r}"


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
    assert named - NO_BUG.keys() <= PASSES.keys() == {path for path, _, _ in BUGS}
    assert NO_BUG.keys() <= named and not NO_BUG.keys() & PASSES.keys()


def test_a_bug_reaches_those_who_imported_the_function_before():
    imported, kept = losses.softmax_loss, losses.softmax_loss.__code__
    z, y = np.zeros((2, 2)), np.array([0, 1])
    right = imported(z, y)[1]
    with exercises.broken(*exercises.BUGS["loss-truth-dropped"]):
        assert not np.array_equal(imported(z, y)[1], right)
    assert np.array_equal(imported(z, y)[1], right) and imported.__code__ is kept


def test_a_bug_whose_line_has_changed_is_refused():
    with pytest.raises(ValueError, match="found 'no such text' 0 times in losses.softmax_loss"):
        with exercises.broken("losses.softmax_loss", "no such text", ""):
            pass
