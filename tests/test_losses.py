"""Eq. 6 against its definition, and the logits that break a careless logarithm."""
import numpy as np
import pytest

from minicrf.gradcheck import relative_error
from minicrf.inputs import VOID
from minicrf.losses import softmax, softmax_loss


def example(N=12, L=5, void=(2, 7), seed=3):
    """Random logits (N, L) and labels (N,), some of them void."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, L, N).astype(np.uint8)
    labels[list(void)] = VOID
    return rng.standard_normal((N, L)), labels


def naive_loss(z, labels):
    """- mean over labelled pixels of log(exp(z_y) / sum exp(z)), one pixel at a time."""
    logs = [np.log(np.exp(z[i, y]) / sum(np.exp(z[i]))) for i, y in enumerate(labels) if y != VOID]
    return -sum(logs) / len(logs)


def test_softmax_by_its_definition():
    z = np.random.default_rng(0).standard_normal((4, 3, 5))
    q = softmax(z)
    assert relative_error(q, np.exp(z) / np.exp(z).sum(axis=2)[:, :, None]) < 1e-14
    assert np.allclose(q.sum(axis=-1), 1, rtol=1e-15)


def test_softmax_leaves_its_argument_alone_and_ignores_a_shift():
    z, _ = example()
    kept = z.copy()
    assert relative_error(softmax(z), softmax(z + 1e3)) < 1e-10
    assert np.array_equal(z, kept)


def test_softmax_of_extreme_logits():
    q = softmax(np.array([[1e6, -1e6, 0], [-1e6, -1e6, -1e6], [-np.inf, 0, -np.inf]]))
    assert relative_error(q, [[1, 0, 0], [1 / 3, 1 / 3, 1 / 3], [0, 1, 0]]) < 1e-15


def test_loss_is_minus_the_mean_log_likelihood():
    z, labels = example()
    kept = z.copy()
    loss, _ = softmax_loss(z, labels)
    assert relative_error(loss, naive_loss(z, labels)) < 1e-14
    assert np.array_equal(z, kept)


def test_gradient_is_marginals_minus_truth():
    z, labels = example(void=())
    _, dz = softmax_loss(z, labels)
    assert relative_error(dz * len(z), softmax(z) - np.eye(5)[labels]) < 1e-12


def test_void_pixels_are_left_out():
    z, labels = example()
    loss, dz = softmax_loss(z, labels)
    void = labels == VOID
    alone, dz_alone = softmax_loss(z[~void], labels[~void])
    assert relative_error(loss, alone) < 1e-14
    assert relative_error(dz[~void], dz_alone) < 1e-14
    assert not dz[void].any()


def test_all_void_gives_zeros():
    z, labels = example()
    loss, dz = softmax_loss(z, np.full_like(labels, VOID))
    assert loss == 0 and dz.shape == z.shape and not dz.any()


def test_extreme_logits_stay_finite():
    z = np.array([[1e6, 0.0, -1e6], [1e6, 0.0, -1e6], [-1e6, -1e6, -1e6]])
    loss, dz = softmax_loss(z, np.array([0, 2, 1]))
    assert relative_error(loss, (0 + 2e6 + np.log(3)) / 3) < 1e-14
    assert relative_error(dz * 3, [[0, 0, 0], [1, 0, -1], [1 / 3, -2 / 3, 1 / 3]]) < 1e-14


@pytest.mark.parametrize("y", [0, VOID])
def test_a_forbidden_label_stays_finite(y):
    """-inf forbids a label other than the true one, the first label of a void pixel included."""
    z = np.array([[0.5, -np.inf, 0.0], [-np.inf, 1.0, 2.0]])
    loss, dz = softmax_loss(z, np.array([y, VOID if y == 0 else 2]))
    first, second = np.log(1 + np.exp(-0.5)), np.log(1 + np.exp(-1))
    assert relative_error(loss, first if y == 0 else second) < 1e-14
    assert np.isfinite(dz).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtype_follows(dtype):
    z, labels = example(N=1000)
    z = z.astype(dtype)
    loss, dz = softmax_loss(z, labels)
    assert loss.dtype == dz.dtype == softmax(z).dtype == dtype
    assert loss.shape == () and loss == softmax_loss(z, labels.astype(np.int64))[0]
    assert relative_error(loss, naive_loss(z.astype(np.float64), labels)) < 1e-5
