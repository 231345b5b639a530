"""What callers hand in: labels, images, weights; what they do with what they get back."""
import pickle

import numpy as np
import pytest

from minicrf import DenseCRF, FeatureCRF, LocalCRF, learn, permutohedral, scores_from_labels
from minicrf.losses import softmax, softmax_loss
from minicrf.scores import scores_from_probabilities

rng = np.random.default_rng(0)
image = np.zeros((40, 60, 3), np.uint8)
image[:, 30:] = 200
y = np.zeros((40, 60), int)
y[:, 30:] = 1
f = 2 * np.eye(3)[y] + rng.standard_normal((40, 60, 3))
VOID_HERE = rng.random(y.shape) < .3


@pytest.mark.parametrize("labels, message", [
    (np.where(VOID_HERE, -1, y), "labels: found -1, expected 0 to 2, or 255"),
    (y + 2, "labels: found 3, expected 0 to 2"), (y.T, r"labels: found shape \(60, 40\)"),
    (y / 2, "labels: found float64, expected whole numbers")])
def test_labels_are_checked_before_anything_is_learned(labels, message):
    crf = DenseCRF(3)
    with pytest.raises(ValueError, match=message):
        learn(crf, [(f, image, y), (f, image, labels)], epochs=1)
    assert crf.params["w"].tolist() == [3, 10]


@pytest.mark.parametrize("labels, message", [
    (np.where(VOID_HERE, 7, y), "labels: found 7"),
    (y.T, r"labels: found shape \(60, 40\)")])
def test_labels_of_the_loss_of_local_factors_are_checked(labels, message):
    crf = LocalCRF(3)
    crf.forward(f, image)
    assert crf.loss(y.ravel()) == crf.loss(y)
    with pytest.raises(ValueError, match=message):
        crf.loss(labels)


@pytest.mark.parametrize("wrong", [-1, 3])
def test_labels_of_the_loss_are_checked(wrong):
    with pytest.raises(ValueError, match=f"labels: found {wrong}, expected 0 to 2"):
        softmax_loss(f.reshape(-1, 3), np.where(VOID_HERE, wrong, y).ravel())


def test_255_cannot_be_void_and_a_class():
    scores, labels = np.zeros((2, 2, 300)), np.zeros((2, 2), int)
    with pytest.raises(ValueError, match="n_labels: found 300, more than 255"):
        learn(DenseCRF(300), [(scores, image[:2, :2], labels)])
    with pytest.raises(ValueError, match="unknown: found 255"):
        scores_from_labels(labels, 300, 0.7)
    assert scores_from_labels(labels + 255, 300, 0.7, unknown=None)[0, 0].argmax() == 255


def test_an_image_with_nan_is_refused_by_both_crfs():
    bad = image.astype(float)
    bad[3, 4] = np.nan
    for crf in DenseCRF(3), LocalCRF(3):
        with pytest.raises(ValueError, match="image: found NaN"):
            crf.forward(f, bad)


def test_fractions_are_no_labels_and_any_name_of_a_dtype_will_do():
    with pytest.raises(ValueError, match="labels: found float64, expected whole numbers"):
        scores_from_labels(y * 0.5, 3, 0.7)
    assert scores_from_labels(y, 3, 0.7, dtype=f.dtype).dtype == np.float64
    above = (y + 1).astype(np.uint8)                                     # 0 would be unsure
    np.testing.assert_array_equal(scores_from_labels(above.astype(int) - 1, 3, 0.7, unknown=-1),
                                  scores_from_labels(y, 3, 0.7))


def test_neighbours_that_agree_overcome_a_wrong_one_hot_row():
    wrong = y.copy()
    wrong[20, 15] = 1
    for dtype in np.float32, np.float64:
        q = DenseCRF(2).forward(scores_from_probabilities(np.eye(2, dtype=dtype)[wrong]), image)
        assert q[20, 15].argmax() == 0


@pytest.mark.parametrize("n_labels", [np.int64(3), np.uint8(3)])
def test_every_crf_comes_back_from_its_file(tmp_path, n_labels):
    path = str(tmp_path / "crf.npz")
    for crf, data in ((DenseCRF(n_labels, damping=np.float32(1), iterations=np.int16(3)), image),
                      (FeatureCRF(n_labels, w=[2.], sigmas=[[30., 7., 9.]]), [image]),
                      (LocalCRF(n_labels, w=(0.3, 2.), rho=np.float32(1)), image)):
        crf.save(path)
        np.testing.assert_array_equal(type(crf).load(path).forward(f, data), crf.forward(f, data))
    with pytest.raises(ValueError, match="no CRF of this class in it"):
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
    with pytest.raises(ValueError, match="features: found 2400 of 5 dimensions, too many"):
        DenseCRF(3, sigma_position=None, w=(5.,)).forward(f, image)


@pytest.mark.parametrize("options, message", [
    (dict(w=3), "w: found .3.0., expected a finite number for each kernel"),
    (dict(w=[np.eye(2), 10]), "w: found numbers and matrices")])
def test_weights_of_a_wrong_kind_are_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        DenseCRF(2, **options)


def test_one_label_and_half_precision_are_told_what_to_do():
    with pytest.raises(ValueError, match=r"n_labels: found 1, .* stack \[1 - p, p\]"):
        DenseCRF(1)
    with pytest.raises(ValueError, match="scores: found 7200 numbers of float16"):
        DenseCRF(3).forward(f.astype(np.float16), image)


def test_pickles_leave_the_state_out():
    crf = DenseCRF(3)
    crf.forward(f, image)
    assert len(pickle.dumps(crf)) < 2000 and pickle.loads(pickle.dumps(crf)).state is None


def test_the_steps_of_one_pass_are_those_of_shorter_ones():
    crf = DenseCRF(3, iterations=3)
    q = crf.forward(f, image)
    for t, step in enumerate([*crf.state.steps, q.reshape(-1, 3)]):
        expected = DenseCRF(3, iterations=t).forward(f, image)
        np.testing.assert_allclose(step, expected.reshape(-1, 3), rtol=1e-12)
    np.testing.assert_allclose(crf.state.steps[0], softmax(f).reshape(-1, 3))
