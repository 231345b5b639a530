"""GaussianKernel against dense matrices; finite differences of it are in gradcheck."""
import numpy as np
import pytest
from helpers import drawn, random, refused
from reference import dense

from minicrf import kernels
from minicrf.kernels import ExactFilter, GaussianKernel
from minicrf.losses import softmax
from minicrf.permutohedral import PermutohedralLattice

N, L, D = 12, 3, 3
SIGMA = np.array([1.5, 2.0, 0.8])
OPTIONS = [(normalization, exclude_self) for normalization in ("symmetric", "none")
           for exclude_self in (True, False)]


FEATURES, A, B = random(N, D, seed=0), random(N, L, seed=1), random(N, L, seed=2)


@pytest.mark.parametrize("normalization, exclude_self", OPTIONS)
def test_exact_kernel_is_the_dense_matrix(monkeypatch, normalization, exclude_self):
    monkeypatch.setattr(kernels, "TILE", 5 * N)                  # three tiles, the last one smaller
    kernel = GaussianKernel(FEATURES, SIGMA, normalization, exclude_self, exact=True)
    assert kernel.K.whole is None
    K = dense(FEATURES, SIGMA, normalization, exclude_self)
    np.testing.assert_allclose(kernel.filter(B), K @ B, atol=1e-12)
    np.testing.assert_allclose(kernel.filter_transpose(A), K.T @ A, atol=1e-12)


@pytest.mark.parametrize("normalization, exclude_self", OPTIONS)
@pytest.mark.parametrize("exact", [True, False])
def test_transpose_passes_the_dot_test(normalization, exclude_self, exact):
    kernel = GaussianKernel(FEATURES, SIGMA, normalization, exclude_self, exact)
    forth, back = (A * kernel.filter(B)[:]).sum(), (kernel.filter_transpose(A)[:] * B).sum()
    assert abs(forth - back) < 1e-10 * abs(forth), (forth, back)


def shape_gradient(kernel, a, b):
    """d<a, K^ b>/dlog sigma (d,)."""
    return kernel.backward([a], [[kernel.filter_transpose(a)]], [b], np.array(1.))[1]


def test_shape_gradient_in_float32_bears_features_far_from_zero():
    shifted = (FEATURES + np.array([1000, -2000, 500])).astype(np.float32)
    expected, got = (shape_gradient(GaussianKernel(f, SIGMA, exact=True), A, B)
                     for f in (FEATURES, shifted))
    np.testing.assert_allclose(got, expected, rtol=1e-2)


@pytest.mark.parametrize("width, tolerance", [(3, 1e-3), (0.4, 3e-2)])
def test_shape_gradient_in_float32_survives_cancellation(width, tolerance):
    """On a long strip squares of up to 10^5 cancel to next to nothing."""
    position = np.mgrid[:40, :300].reshape(2, -1)[::-1].T.astype(np.float64)     # (N, 2): x, y
    a, b = (abs(random(len(position), L, seed=seed)) for seed in (1, 2))
    expected, got = (shape_gradient(GaussianKernel(position.astype(dtype), [width, 3.]),
                                    a.astype(dtype), b.astype(dtype))
                     for dtype in (np.float64, np.float32))
    np.testing.assert_allclose(got, expected, rtol=tolerance)


@pytest.mark.parametrize("d, sigma, tolerance", [
    (2, (3, 3), 0.02), (2, (8, 5), 0.03), (5, (20, 20, 13, 13, 13), 0.06),
    (5, (40, 40, 30, 30, 30), 0.06), (5, (80, 80, 13, 13, 13), 0.06)])
def test_lattice_comes_close_to_the_exact_kernel(d, sigma, tolerance):
    scores, image, _ = drawn()
    y, x = np.indices(image.shape[:2])
    features = np.column_stack([x.ravel(), y.ravel(), image.reshape(-1, 3)])         # (N, 5)
    q = softmax(scores.reshape(-1, 3))
    exact, lattice = (GaussianKernel(features[:, :d], sigma, exact=exact).filter(q)[:]
                      for exact in (True, False))
    error = np.sqrt(((lattice - exact) ** 2).mean() / (exact**2).mean())
    assert error < tolerance, error


@pytest.mark.parametrize("kind", [ExactFilter, PermutohedralLattice])
def test_a_scaled_filter_is_what_it_says(kind):
    K, s = kind(FEATURES), random(N, seed=3)
    np.testing.assert_allclose(K.scaled(s).filter(B), s[:, None] * K.filter(s[:, None] * B))
    np.testing.assert_allclose(K.scaled(s).diagonal, s * s * K.diagonal)


@pytest.mark.parametrize("exact", [True, False])
def test_rows_of_a_filter_are_computed_when_they_are_read(exact):
    message = GaussianKernel(FEATURES, SIGMA, exact=exact).filter(B)
    np.testing.assert_allclose(message[slice(3, 8)], message[:][3:8], atol=1e-15)


def test_dtype_follows_the_features():
    for exact in (True, False):
        kernel = GaussianKernel(FEATURES.astype(np.float32), SIGMA, exact=exact)
        assert kernel.filter(B.astype(np.float32))[:].dtype == np.float32


@pytest.mark.parametrize("kind", [ExactFilter, PermutohedralLattice])
def test_values_of_another_shape_are_refused(kind):
    for wrong in B[:5], B[:, 0]:
        with refused(r"values: found shape \(.*, expected \(12, any\)"):
            kind(FEATURES).filter(wrong)
