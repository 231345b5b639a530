"""Confusion matrices, IoU, the boundary band and the bootstrap against what they mean."""
import numpy as np
import pytest

from minicrf import metrics
from minicrf.inputs import VOID


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_confusion_has_the_truth_in_rows_and_leaves_void_out():
    labels = np.array([[0, 1, 1], [2, VOID, 1]], np.uint8)
    predictions = np.array([[0, 2, 1], [0, 2, 2]])
    confusion = metrics.confusion_matrix(labels, predictions, 3)
    assert confusion.tolist() == [[1, 0, 0], [0, 1, 2], [1, 0, 0]]


def test_iou_is_intersection_over_union_of_all_images_together(rng):
    confusion, hits, unions = 0, np.zeros(4), np.zeros(4)
    for _ in range(3):
        labels, predictions = rng.integers(0, 4, (2, 20, 30))
        labels[rng.random((20, 30)) < 0.2] = VOID
        confusion = confusion + metrics.confusion_matrix(labels, predictions, 4)
        for c in range(4):
            truth, predicted = labels == c, (predictions == c) & (labels != VOID)
            hits[c] += (truth & predicted).sum()
            unions[c] += (truth | predicted).sum()
    assert np.allclose(metrics.iou(confusion), 100 * hits / unions)
    assert np.isclose(metrics.mean_iou(confusion), (100 * hits / unions).mean())


def test_classes_absent_from_the_truth_are_left_out_of_the_mean():
    confusion = np.array([[8, 0, 2], [0, 0, 0], [0, 0, 0]])
    assert np.allclose(metrics.iou(confusion), [80, np.nan, np.nan], equal_nan=True)
    assert metrics.mean_iou(confusion) == 80
    assert np.isnan(metrics.mean_iou(np.zeros((3, 3), int)))
    present_but_missed = np.array([[8, 0], [2, 0]])
    assert metrics.iou(present_but_missed).tolist() == [80, 0]


@pytest.mark.parametrize("width", [1, 2, 3.5])
def test_band_is_what_has_another_label_within_reach(rng, width):
    labels = np.zeros((14, 17), np.uint8)
    labels[3:8, 5:12] = 3
    labels[6:11, 9:] = 1
    labels[12:, :4] = VOID
    y, x = np.indices(labels.shape).reshape(2, -1)                       # (N,)
    near = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2 <= width ** 2   # (N, N)
    other = labels.ravel()[:, None] != labels.ravel()
    expected = (near & other).any(axis=1).reshape(labels.shape)
    band = metrics.boundary_band(labels, width)
    assert band.dtype == bool and (band == expected).all()
    assert 0 < band.mean() < 0.9
    assert not metrics.boundary_band(np.full((5, 6), 2, np.uint8), 100).any()      # one label


def confusions(rng, hit_rates):
    """(images, L, L) of random truths, predicted right with each image's own rate."""
    result = []
    for rate in hit_rates:
        labels = rng.integers(0, 3, 400)
        right = rng.random(400) < rate
        result.append(metrics.confusion_matrix(labels, np.where(right, labels, 0), 3))
    return np.array(result)


def test_bootstrap_of_equal_methods_is_zero(rng):
    a = confusions(rng, rng.random(20))
    assert metrics.bootstrap_difference(a, a) == (0.0, (0.0, 0.0), 0.0)


def test_bootstrap_is_paired(rng):
    """A small gain on every image is sure, however much the images differ among themselves."""
    rates = rng.uniform(0.1, 0.9, 30)
    a, b = confusions(rng, rates + 0.1), confusions(rng, rates)
    difference, (low, high), share = metrics.bootstrap_difference(a, b)
    assert np.isclose(difference, metrics.mean_iou(a.sum(0)) - metrics.mean_iou(b.sum(0)))
    assert 0 < low < difference < high and share == 1
    _, unpaired, _ = metrics.bootstrap_difference(a, b[::-1])
    assert high - low < 0.6 * (unpaired[1] - unpaired[0])
    turned = metrics.bootstrap_difference(b, a)
    assert np.allclose([turned[0], *turned[1], turned[2]], [-difference, -high, -low, 0])


def test_bootstrap_resamples_images_as_a_loop_would(rng):
    a, b = confusions(rng, rng.random(6)), confusions(rng, rng.random(6))
    drawn = np.random.default_rng(3).multinomial(6, [1 / 6] * 6, 50)
    values = [metrics.mean_iou(sum(n * x for n, x in zip(counts, a)))
              - metrics.mean_iou(sum(n * x for n, x in zip(counts, b))) for counts in drawn]
    _, interval, share = metrics.bootstrap_difference(a, b, samples=50, seed=3)
    assert np.allclose(interval, np.percentile(values, (2.5, 97.5)))
    assert share == np.mean(np.array(values) > 0)
