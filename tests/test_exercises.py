"""Every backward pass broken on purpose, one bug at a time: finite differences notice, and where.

`exercises.BUGS` lists the bugs, `exercises.broken` applies one while a test runs.  Here: each bug
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
SIGMA = "KernelGradient, .*: dlog_sigma"
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
    "kernels.GaussianKernel.shape_gradient": (gradcheck.check_kernels, SIGMA),
    "kernels.KernelGradient.__init__": (gradcheck.check_kernels, "KernelGradient"),
    "kernels.KernelGradient.spread": (
        gradcheck.check_kernels, f"{SIGMA}|KernelGradient, lattice: dq"),
    "kernels.KernelGradient.gather": (gradcheck.check_kernels, "KernelGradient"),
    "kernels.KernelGradient.result": (gradcheck.check_kernels, "KernelGradient, .*: d(W|log_sigma)"),
    "marginals.through_marginals": CRF,
    "meanfield.FeatureCRF.backward": (gradcheck.check_crf, "DenseCRF, .*: dscores from dq"),
    "meanfield.FeatureCRF.backward_logits": (gradcheck.check_crf, "DenseCRF, damped: "),
    "meanfield.FeatureCRF._back_track": CRF,
    "training.crf_gradients": MODEL,
    "training.image_gradients": MODEL,
    "training.accumulate_gradients": MODEL,
    "localcrf.LocalCRF.backward": (gradcheck.check_local, "LocalCRF"),
    "localcrf._sweep": (gradcheck.check_local, "LocalCRF"),
}

# Functions with such names that are no backward pass of their own, each with the reason.
NO_BUG = {
    "kernels.KernelGradient.mixed": "a factor; spread and gather have bugs that leave it out",
    "layers.Layer.backward": "hands dy on unchanged",
    "gradcheck.numerical_gradient": "the checker itself: tests/test_gradcheck.py",
    "plain.gradient_error": "a checker too; plain.py's own passes: tests/test_plain.py",
    "permutohedral.PermutohedralLattice.filter_transpose": "blur_transpose, then slice",
    "kernels.GaussianKernel.filter_transpose": "that of its lattice, less the diagonal",
    "meanfield._checked_gradient": "changes no number",
    "arrays.transposed": "a matrix, ready for use",
}

BUGS = [(path, name) for path, bugs in exercises.BUGS.items() for name in bugs]


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


@pytest.mark.parametrize("path, bug", BUGS, ids=[name for _, name in BUGS])
def test_a_bug_fails_its_check_and_the_right_code_passes(path, bug):
    check, rows = COVERED_BY[path]
    assert passes(check)
    with exercises.broken(bug):
        row = first_failure(check)
    assert row is not None, f"{path} runs with {bug}, and no row of {check.__name__} fails"
    assert re.match(rows, row), f"{bug} of {path} fails {row!r}, expected a row like {rows!r}"


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
    assert named - NO_BUG.keys() <= exercises.BUGS.keys()
    assert NO_BUG.keys() <= named and not NO_BUG.keys() & exercises.BUGS.keys()
    assert exercises.BUGS.keys() == COVERED_BY.keys()


def test_every_term_of_the_back_tracking_loop_has_a_bug():
    """df += dz in the loop and behind it, dq with its factors; dW and dsigma's three sums."""
    broken = {right for path, bugs in exercises.BUGS.items() for right, _ in bugs.values()
              if "KernelGradient" in path or "_back_track" in path}
    for term in ("df[", "df += dz", "dq = c", "dq +=", "through_marginals", "if t > 1", "transpose",
                 "outer[", "product[", "self_weight", "cross[", "+ dW", "compatible(K_dz"):
        assert any(term in right for right in broken), term


def test_a_bug_reaches_those_who_imported_the_function_before():
    imported, kept = losses.softmax_loss, losses.softmax_loss.__code__
    z, y = np.zeros((2, 2)), np.array([0, 1])
    right = imported(z, y)[1]
    with exercises.broken("loss-truth-dropped"):
        assert not np.array_equal(imported(z, y)[1], right)
    assert np.array_equal(imported(z, y)[1], right) and imported.__code__ is kept


def test_a_bug_whose_line_has_changed_is_refused(monkeypatch):
    monkeypatch.setitem(exercises.BUGS, "losses.softmax_loss", {"stale": ("no such text", "")})
    with pytest.raises(ValueError, match="found 'no such text' 0 times in losses.softmax_loss"):
        with exercises.broken("stale"):
            pass
