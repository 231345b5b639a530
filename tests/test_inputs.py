"""What callers hand in: labels, images, weights; what they do with what they get back."""
import pickle

import numpy as np
import pytest
from helpers import refused

from minicrf import DenseCRF, FeatureCRF, LocalCRF, learn, permutohedral, scores_from_labels
from minicrf.losses import softmax, softmax_loss
from minicrf.scores import scores_from_probabilities

rng = np.random.default_rng(0)
image = np.zeros((40, 60, 3), np.uint8)
image[:, 30:] = 200
y = np.zeros((40, 60), int)
y[:, 30:] = 1
f = 2 * np.eye(3)[y] + rng.standard_normal((40, 60, 3))
SIGNAL = image[0]
VOID_HERE = rng.random(y.shape) < .3


@pytest.mark.parametrize("labels, message", [
    (np.where(VOID_HERE, -1, y), "labels: found -1, expected 0 to 2, or 255"),
    (y + 2, "labels: found 3, expected 0 to 2"), (y.T, r"labels: found shape \(60, 40\)"),
    (y / 2, "labels: found float64, expected whole numbers")])
def test_labels_are_checked_before_anything_is_learned(labels, message):
    crf = DenseCRF(3)
    with refused(message):
        learn(crf, [(f, image, y), (f, image, labels)], epochs=1)
    assert crf.params["w"].tolist() == [3, 10]


@pytest.mark.parametrize("labels, message", [
    (np.where(VOID_HERE, 7, y), "labels: found 7"),
    (y.T, r"labels: found shape \(60, 40\)")])
def test_labels_of_the_loss_of_local_factors_are_checked(labels, message):
    crf = LocalCRF(3)
    crf.forward(f, image)
    assert crf.loss(y.ravel()) == crf.loss(y)
    with refused(message):
        crf.loss(labels)


@pytest.mark.parametrize("wrong", [-1, 3])
def test_labels_of_the_loss_are_checked(wrong):
    with refused(f"labels: found {wrong}, expected 0 to 2"):
        softmax_loss(f.reshape(-1, 3), np.where(VOID_HERE, wrong, y).ravel())


def test_255_cannot_be_void_and_a_class():
    scores, labels = np.zeros((2, 2, 300)), np.zeros((2, 2), int)
    with refused("n_labels: found 300, more than 255"):
        learn(DenseCRF(300), [(scores, image[:2, :2], labels)])
    with refused("unknown: found 255"):
        scores_from_labels(labels, 300, 0.7)
    assert scores_from_labels(labels + 255, 300, 0.7, unknown=None)[0, 0].argmax() == 255


def test_scores_from_probabilities_are_logarithms():
    p = np.array([[[0.25, 0.75, 0]]], dtype=np.float32)
    scores = scores_from_probabilities(p)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(softmax(scores), p, atol=2e-4)            # the floor, 1e-4
    assert scores_from_probabilities(p, floor=0)[0, 0, 2] == -np.inf
    for wrong in (-p, p * np.nan, np.ones((1, 1, 2), dtype=int)):
        with refused("p: found"):
            scores_from_probabilities(wrong)


def test_scores_from_labels_give_the_stated_confidence():
    labels = np.array([[0, 2, 255]], dtype=np.uint8)
    expected = [[[0.7, 0.1, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1], [0.25] * 4]]
    np.testing.assert_allclose(softmax(scores_from_labels(labels, 4, 0.7)), expected, rtol=1e-6)
    signed = np.array([[0, 2, -1]])
    np.testing.assert_allclose(softmax(scores_from_labels(signed, 4, 0.7, -1, float)), expected)
    assert scores_from_labels(np.zeros((2, 2), dtype=int), 1, 0.7).shape == (2, 2, 1)
    for wrong, confidence, message in ((labels, 0.7, "labels: found 255, expected 0 to 3"),
                                       (labels / 2, 0.7, "labels: found float64, expected whole"),
                                       (labels, 1, "confidence: found 1, expected")):
        with refused(message):
            scores_from_labels(wrong, 4, confidence, unknown=None)


def test_neighbours_that_agree_overcome_a_wrong_one_hot_row():
    wrong = y.copy()
    wrong[20, 15] = 1
    for dtype in np.float32, np.float64:
        q = DenseCRF(2).forward(scores_from_probabilities(np.eye(2, dtype=dtype)[wrong]), image)
        assert q[20, 15].argmax() == 0


@pytest.mark.parametrize("crf, data", [
    (DenseCRF(np.int64(3), damping=np.float32(1), iterations=np.int16(3)), image),
    (DenseCRF(np.uint8(3), w=(2.,), sigma_position=None), image),
    (DenseCRF(3, w=np.ones((2, 3, 3)), normalization="none", exclude_self=False), image),
    (DenseCRF(3, dimensions=1, sigma_position=1.5), SIGNAL),
    (FeatureCRF(3, w=[2.], sigmas=[[30., 7., 9.]], exact=True), [image]),
    (LocalCRF(np.uint8(3), w=(0.3, 2.), rho=np.float32(1)), image)],
    ids=["NumPy's numbers", "one kernel", "matrices", "a signal", "features", "local"])
def test_every_crf_comes_back_from_its_file(tmp_path, crf, data):
    path = tmp_path / "crf.npz"
    for p in crf.params.values():
        p *= 0.1                                                         # comes back to the bit
    crf.save(path)
    again = type(crf).load(path)
    assert all(np.array_equal(again.params[key], p) for key, p in crf.params.items())
    scores = f[0] if data is SIGNAL else f
    np.testing.assert_array_equal(again.forward(scores, data), crf.forward(scores, data))


def test_other_files_are_no_crf(tmp_path):
    path = tmp_path / "crf.npz"
    LocalCRF(3).save(path)
    with refused("no CRF of this class in it"):
        DenseCRF.load(path)
    path.write_bytes(b"no")
    with refused("not a readable .npz"):
        DenseCRF.load(path)


def test_features_with_large_offsets_keep_their_digits():
    """Points in metres, far from the origin, with scores in float32."""
    points = rng.uniform(0, 10, (500, 3))
    scores = rng.standard_normal((500, 2)).astype(np.float32)
    q = [FeatureCRF(2, w=[5.], sigmas=[[.5] * 3], exact=True).forward(scores, [points + offset])
         for offset in (0, np.array([500000, 4649776, 180.]))]
    np.testing.assert_allclose(q[0], q[1], atol=1e-5)
    assert q[0].dtype == np.float32


@pytest.mark.parametrize("damping", [0., 2.])
def test_the_marginals_that_forward_returns_may_be_written_to(damping):
    crf, onehot = DenseCRF(3, w=(1., 2.), damping=damping), np.eye(3)[y]
    q = crf.forward(f, image)
    expected = crf.backward_logits(q - onehot)
    q -= onehot
    np.testing.assert_array_equal(crf.backward_logits(q), expected)


def test_too_many_pixels_for_one_lattice_are_one_line(monkeypatch):
    monkeypatch.setattr(permutohedral, "LARGEST_SIZE", 10_000)
    with refused("features: found 2400 of 5 dimensions, too many"):
        DenseCRF(3, sigma_position=None, w=(5.,)).forward(f, image)


@pytest.mark.parametrize("options, message", [
    (dict(w=3), "w: found .3.0., expected a finite number for each kernel"),
    (dict(w=[np.eye(2), 10]), "w: found numbers and matrices")])
def test_weights_of_a_wrong_kind_are_one_line(options, message):
    with refused(message):
        DenseCRF(2, **options)


def test_one_label_is_told_what_to_do():
    with refused(r"n_labels: found 1, .* stack \[1 - p, p\]"):
        DenseCRF(1)


def test_pickles_leave_the_state_out():
    crf = DenseCRF(3)
    crf.forward(f, image)
    assert len(pickle.dumps(crf)) < 2000 and pickle.loads(pickle.dumps(crf)).state is None
