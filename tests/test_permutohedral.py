"""The lattice against plain.py's, kept in a dictionary; how close it comes: test_kernels.py."""
import numpy as np
import pytest
from helpers import random, refused

from minicrf import arrays, permutohedral
from minicrf.permutohedral import PermutohedralLattice
from minicrf.plain import lattice_filter


def features(n, d, width=0.5, seed=0):
    return width * random(n, d, seed=seed)


@pytest.mark.parametrize("d", [1, 2, 3, 5, 9])
def test_filter_equals_a_lattice_kept_in_a_dictionary(d):
    F = features(60, d, width=1.5)
    values = features(60, 3, seed=1)
    np.testing.assert_allclose(PermutohedralLattice(F).filter(values), lattice_filter(F, values),
                               rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("largest_word", [2, 500])
def test_keys_too_long_for_one_word_change_nothing(monkeypatch, largest_word):
    F, values = features(60, 5, width=2), features(60, 2, seed=1)
    expected = PermutohedralLattice(F).filter(values)
    monkeypatch.setattr(permutohedral, "LARGEST_WORD", largest_word)
    np.testing.assert_array_equal(PermutohedralLattice(F).filter(values), expected)


@pytest.mark.parametrize("largest_word", [2**62, 2])
def test_other_digits_other_word(monkeypatch, largest_word):
    """Certainly where one integer has room for all digits, elsewhere by chance, as here."""
    monkeypatch.setattr(permutohedral, "LARGEST_WORD", largest_word)
    digits = np.stack(np.meshgrid(*map(np.arange, (9, 2, 14, 7)), indexing="ij")).reshape(4, -1)
    words, numbers, places = permutohedral._distinct(permutohedral._units([9, 2, 14, 7]) @ digits)
    assert len(words) == digits.shape[1] and (np.diff(words) > 0).all()
    np.testing.assert_array_equal(places[numbers], np.arange(len(words)))


@pytest.mark.parametrize("offset", [0, 2**26])
def test_steps_lead_from_point_to_point_and_around_the_simplex(offset):
    F = features(50, 3, width=2) + offset
    simplices, words, steps, ranks, _ = permutohedral._simplices(F)
    corners, points = permutohedral._corners(simplices, words, steps, ranks)
    assert steps.sum() == 0 and len(set(steps.tolist())) == 4 and (np.diff(points) > 0).all()
    axes = np.argsort(ranks, axis=0)                         # from corner r to r + 1 along axes[r]
    for r in range(4):
        np.testing.assert_array_equal(points[corners[:, r]] + steps[axes[r]],
                                      points[corners[:, (r + 1) % 4]])


def test_many_dimensions_need_and_get_long_keys():
    F, values = features(40, 14, width=300), features(40, 2, seed=1)
    # so far apart that each point meets itself only
    lattice = PermutohedralLattice(F)
    assert lattice.S.shape == (40, 40 * 15)
    np.testing.assert_allclose(lattice.filter(values), lattice.filter(np.ones((40, 1))) * values)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_diagonal_is_exact_where_no_neighbour_is_missing(d):
    rng = np.random.default_rng(0)
    F = rng.uniform(-2.5, 2.5, (20000 * d, d))
    inner = np.flatnonzero((abs(F) < 0.2).all(axis=1))[:10]
    one = np.zeros((len(F), len(inner)))
    one[inner, np.arange(len(inner))] = 1
    lattice = PermutohedralLattice(F)
    K = lattice.filter(one)                                              # columns `inner` of K
    assert len(inner) > 1
    np.testing.assert_allclose(lattice.diagonal[inner], K[inner, np.arange(len(inner))], rtol=1e-12)


def test_the_parts_of_a_filter_make_the_whole(monkeypatch):
    monkeypatch.setattr(arrays, "BLOCK", 30)                             # the last one smaller
    lattice, b = PermutohedralLattice(features(100, 3)), features(100, 4)
    for blur, whole in ((lattice.blur, lattice.filter),
                        (lattice.blur_transpose, lattice.filter_transpose)):
        v = blur(lattice.splat(b))
        for rows in reversed(arrays.blocks(100, b)):
            np.testing.assert_array_equal(lattice.slice(v, rows), whole(b)[rows])


def test_simplices_in_blocks_and_threads_are_the_same(monkeypatch):
    F, values = features(500, 5, width=2), features(500, 2, seed=1)
    expected = PermutohedralLattice(F).filter(values)
    monkeypatch.setattr(arrays, "BLOCK", 64)
    monkeypatch.setattr(arrays, "SMALL", 0)
    np.testing.assert_array_equal(PermutohedralLattice(F).filter(values), expected)


def test_float32_stays_float32_and_close_to_float64():
    F, values = features(300, 5, width=3), features(300, 2, seed=1)
    lattice = PermutohedralLattice(F.astype(np.float32))
    got = lattice.filter(values.astype(np.float32))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, PermutohedralLattice(F).filter(values), atol=1e-4)


def test_float32_features_far_apart_keep_their_weights():
    F = (features(300, 3) * 1e5).astype(np.float32)
    weights = PermutohedralLattice(F).S
    assert weights.data.min() >= -1e-6 and weights.data.max() <= 1 + 1e-6


def test_the_same_simplices_and_points_are_shared():
    F = np.repeat(features(10, 5), 30, axis=0)
    assert PermutohedralLattice(F).S.shape[1] <= 10 * 6


@pytest.mark.parametrize("bad, message", [
    (np.zeros(5), r"features: found shape \(5,\), expected \(N, d\)"),
    (np.zeros((0, 2)), "features: found shape"),
    (np.full((3, 2), np.nan), "features: found magnitude nan"),
    (np.full((3, 2), 1e12), r"features: found magnitude 1e\+12"),
])
def test_bad_features_are_refused(bad, message):
    with refused(message):
        PermutohedralLattice(bad)
