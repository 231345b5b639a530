"""Filters and marginals at random: bounded, of any order, over the whole range of floats."""
import numpy as np
import pytest

from minicrf.densecrf import DenseCRF
from minicrf.kernels import GaussianKernel
from minicrf.losses import softmax


def random_filters(cases, exact):
    """Kernels of random dimension, size, spread and normalisation, with values of their length."""
    for seed in range(cases):
        rng = np.random.default_rng(seed)
        d, n = int(rng.integers(1, 6)), int(rng.integers(1, 80))
        features = rng.standard_normal((n, d)) * 10 ** rng.uniform(-2, 2)
        features = features[rng.integers(0, n, n)]                    # some points twice
        kernel = GaussianKernel(features, np.exp(rng.standard_normal(d)),
                                normalization=["symmetric", "none"][seed % 2], exact=exact)
        yield kernel, rng.standard_normal((n, 3))


@pytest.mark.parametrize("exact", [False, True], ids=["lattice", "exact"])
def test_normalised_filters_keep_the_square_roots_of_their_sums(exact):
    """D^-1/2 K D^-1/2 sqrt(n) = sqrt(n), n = K 1: what a constant is to a kernel made symmetric."""
    for kernel, _ in random_filters(30, exact):
        if kernel.n is not None:
            root = np.sqrt(kernel.n)[:, None]
            np.testing.assert_allclose(kernel.K_with_self.filter(root), root, rtol=1e-10)


@pytest.mark.parametrize("exact", [False, True], ids=["lattice", "exact"])
def test_filters_over_their_sums_stay_between_least_and_greatest_input(exact):
    for kernel, x in random_filters(30, exact):
        for f in (kernel.K.filter, kernel.K.filter_transpose):
            mean = f(x) / f(np.ones((len(x), 1)))
            assert (mean <= x.max(axis=0) + 1e-9).all() and (mean >= x.min(axis=0) - 1e-9).all()


def test_the_order_of_points_and_of_columns_does_not_matter():
    for seed in range(30):
        rng = np.random.default_rng(seed)
        n, d = int(rng.integers(2, 80)), int(rng.integers(1, 6))
        features, x = rng.standard_normal((n, d)) * 3, rng.standard_normal((n, 4))
        points, columns, sigma = rng.permutation(n), rng.permutation(4), np.ones(d)
        given, turned = GaussianKernel(features, sigma), GaussianKernel(features[points], sigma)
        expected = given.K_with_self.filter(x)[points][:, columns]
        found = turned.K_with_self.filter(x[points][:, columns])
        np.testing.assert_allclose(found, expected, atol=1e-10)
        np.testing.assert_allclose(turned.kappa, given.kappa[points], atol=1e-10)


def test_the_order_of_labels_does_not_matter():
    for seed in range(10):
        rng = np.random.default_rng(seed)
        scores, image = rng.standard_normal((9, 11, 5)) * 3, rng.integers(0, 256, (9, 11, 3))
        order = rng.permutation(5)
        crf = DenseCRF(5, sigma_bilateral=(5, 5, 60, 60, 60))
        np.testing.assert_allclose(crf.forward(scores[:, :, order], image),
                                   crf.forward(scores, image)[:, :, order], atol=1e-9)


@pytest.mark.filterwarnings("ignore:overflow encountered in subtract")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_marginals_of_scores_over_the_whole_range(dtype):
    limits, image = np.finfo(dtype), np.random.default_rng(0).integers(0, 256, (8, 9, 3))
    for seed in range(20):
        rng = np.random.default_rng(seed)
        exponent = rng.uniform(np.log10(limits.smallest_subnormal), np.log10(limits.max), (8, 9, 4))
        scores = (rng.choice([-1, 1], exponent.shape) * 10.0 ** exponent).astype(dtype)
        special = rng.random(scores.shape) < 0.3
        scores[special] = rng.choice([0, limits.max, -limits.max, limits.tiny], special.sum())
        scores[~np.isfinite(scores)] = limits.max
        crf = DenseCRF(4, sigma_bilateral=(5, 5, 60, 60, 60))
        q = crf.forward(scores, image)
        assert np.isfinite(q).all() and (q >= 0).all()
        np.testing.assert_allclose(q.sum(axis=2), 1, atol=1e-5)
        df = crf.backward_logits(q - softmax(-q))
        assert np.isfinite(df).all() and all(np.isfinite(g).all() for g in crf.grads.values())


def test_kernels_much_narrower_than_a_pixel_say_nothing():
    rng = np.random.default_rng(0)
    scores, image = rng.standard_normal((10, 13, 4)), rng.integers(0, 256, (10, 13, 3))
    crf = DenseCRF(4)
    for key in ("log_sigma_position", "log_sigma_bilateral"):
        crf.params[key][...] = -12
    np.testing.assert_allclose(crf.forward(scores, image), softmax(scores), atol=1e-12)
