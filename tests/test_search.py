"""search: a grid, its best point, and counts that no image gets from parameters chosen on it."""
import itertools

import numpy as np
import pytest

from minicrf import DenseCRF, cross_fitted, search
from minicrf.metrics import mean_iou


def noisy(n, seed=0):
    """n pictures of two halves, and scores that are wrong here and there."""
    rng = np.random.default_rng(seed)
    for _ in range(n):
        image, y = np.zeros((20, 24, 3), np.uint8), np.zeros((20, 24), int)
        image[:, 12:], y[:, 12:] = 200, 1
        yield np.eye(2)[y] + rng.standard_normal((20, 24, 2)), image, y


GRID = {"w_bilateral": (0., 4.), "sigma_bilateral": ((10., 1000.), (10., 20.)), "w_position": (0.,)}


def test_search_finds_planted_parameters_and_leaves_them_in_the_crf():
    """Colours tell the halves apart: the kernel that sees them wins over none and a blind one."""
    crf = DenseCRF(2, w=(1., 1.))
    best, table = search(crf, list(noisy(4)), GRID, finer=False)
    assert best == {"w_bilateral": 4., "sigma_bilateral": (10., 20.), "w_position": 0.}
    assert crf.params["w"].tolist() == [0, 4]
    np.testing.assert_allclose(np.exp(crf.params["log_sigma_bilateral"]), [10, 10, 20, 20, 20])
    assert len(table) == 4


def test_each_point_is_what_the_crf_gives_there():
    """Kernels are shared between weights, and nothing is left over from other points."""
    samples = list(noisy(2))
    samples[1][2][:3] = 255
    for point, counts in search(DenseCRF(2), samples, GRID, finer=False)[1]:
        (w, sigma, _), (f, image, y) = point.values(), samples[1]
        q = DenseCRF(2, w=(0., w), sigma_bilateral=sigma).forward(f, image, train=False)
        found = q.argmax(axis=2)
        for l, m in itertools.product(range(2), repeat=2):
            assert counts[1][l, m] == ((y == l) & (found == m)).sum()


def test_weights_are_tried_on_copies_since_they_go_in_threads():
    crf, seen = DenseCRF(2, w=(1., 1.)), []

    class Watched(list):
        def __iter__(self):
            for sample in super().__iter__():
                yield sample
                seen.append(crf.params["w"].tolist())

    search(crf, Watched(noisy(2)), GRID, finer=False)
    assert seen == [[1, 1], [1, 1]]


def test_the_finer_grid_goes_on_around_the_best_point():
    _, table = search(DenseCRF(2), list(noisy(2)), {"w_bilateral": (1., 4.)})
    weights = sorted(point["w_bilateral"] for point, _ in table)
    best = max((1., 4.), key=lambda w: mean_iou(next(
        counts for point, counts in table if point["w_bilateral"] == w).sum(axis=0)))
    np.testing.assert_allclose(weights, sorted([1, 4, best / 2**.5, best, best * 2**.5]))


@pytest.mark.parametrize("liar", [0, 1])
def test_cross_fitting_never_measures_an_image_with_parameters_chosen_on_it(liar):
    """At point A all pictures of one half are perfect, at B those of the other half."""
    perfect, poor = np.diag([9, 9]), np.array([[5, 4], [4, 5]])
    at_a = np.array([perfect if i % 2 == liar else poor for i in range(6)])
    at_b = np.array([poor if i % 2 == liar else perfect for i in range(6)])
    fitted = cross_fitted([({"w": "A"}, at_a), ({"w": "B"}, at_b)])
    np.testing.assert_array_equal(fitted, [poor] * 6)


def test_matrices_are_refused():
    with pytest.raises(ValueError, match="Potts"):
        search(DenseCRF(2, w=np.ones((2, 2, 2))), list(noisy(1)))
