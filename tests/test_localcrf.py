"""Local factors against enumeration of all labellings; finite differences are in gradcheck."""
import functools
import itertools

import numpy as np
import pytest
import strict_cupy
from helpers import example, refused

from minicrf import arrays
from minicrf.arrays import to_device, to_host
from minicrf.localcrf import LocalCRF
from minicrf.inputs import VOID
from minicrf.losses import softmax

SIGMA = 60.
RHO = pytest.mark.parametrize("rho", [1., 0.5])


def converged(L=3, w=(0.4, 0.8), rho=1.):
    return LocalCRF(L, w=w, sigma_contrast=SIGMA, rho=rho, iterations=1000)


def edges(H, W):
    """The 4-connected grid: pairs of pixels."""
    for y, x in itertools.product(range(H), range(W)):
        if y + 1 < H:
            yield (y, x), (y + 1, x)
        if x + 1 < W:
            yield (y, x), (y, x + 1)


def contrast(image, i, j):
    return np.exp(-((image[i] - image[j]) ** 2).sum() / (2 * SIGMA ** 2))


@functools.lru_cache(maxsize=3)
def all_labellings(H, W, L):
    """Every labelling, (L^N, H, W), as one-hot rows too, (L^N, H*W*L)."""
    labellings = np.array(list(itertools.product(range(L), repeat=H * W))).reshape(-1, H, W)
    return labellings, np.eye(L)[labellings].reshape(len(labellings), -1)


def enumerated(f, image, w, truth=None):
    """log Z (), marginals (H, W, L) and d log Z / dw (2,), over all labellings that fit `truth`."""
    labellings, onehot = all_labellings(*f.shape)
    if truth is not None:
        fits = ((labellings == truth) | (truth == VOID)).all(axis=(1, 2))
        labellings, onehot = labellings[fits], onehot[fits]
    features = np.zeros((len(labellings), 2))          # dF/dw: agreeing edges, and their contrast
    for i, j in edges(*f.shape[:2]):
        agree = labellings[:, i[0], i[1]] == labellings[:, j[0], j[1]]
        features += agree[:, None] * [1, contrast(image, i, j)]
    F = onehot @ f.ravel() + features @ w
    p = softmax(F)
    return F.max() - np.log(p.max()), (p @ onehot).reshape(f.shape), p @ features


def loss_and_gradients(crf, f, image, y):
    """The loss, dscores and dw (2,); grads are left at zero."""
    crf.forward(f, image)
    loss, df, dw = float(crf.loss(y)), crf.backward(), crf.grads["w"].copy()
    crf.grads["w"][...] = 0
    return loss, df, dw


@pytest.mark.parametrize("H, W", [(1, 7), (7, 1), (1, 2), (1, 1)])
def test_loopy_is_exact_on_chains_after_one_round(H, W):
    f, image, y = example(H, W)
    crf = LocalCRF(3, w=(0.5, 2.), sigma_contrast=SIGMA, rho=1., iterations=1)
    b = crf.forward(f, image)
    log_Z, marginals, _ = enumerated(f, image, crf.params["w"])
    np.testing.assert_allclose(b, marginals, rtol=0, atol=1e-9)
    assert abs(crf.log_partition - log_Z) < 1e-9

    loss, df, dw = loss_and_gradients(crf, f, image, y)
    log_Z, marginals, features = enumerated(f, image, crf.params["w"])
    log_Z_y, marginals_y, features_y = enumerated(f, image, crf.params["w"], truth=y)
    labelled = max((y != VOID).sum(), 1)
    assert abs(loss - (log_Z - log_Z_y) / labelled) < 1e-9
    np.testing.assert_allclose(df, (marginals - marginals_y) / labelled, rtol=0, atol=1e-9)
    np.testing.assert_allclose(dw, (features - features_y) / labelled, rtol=0, atol=1e-9)


def test_half_is_never_under_log_Z():
    """200 random models, weak and strong, some with rewards for unlike neighbours."""
    rng = np.random.default_rng(1)
    gaps = []
    for seed in range(200):
        f, image, _ = example(3, 3, n_labels=2 + seed % 2, seed=seed)
        f *= rng.uniform(0, 3)
        w = rng.uniform(-0.5, 2, 2)
        crf = LocalCRF(f.shape[2], w=w, sigma_contrast=SIGMA, rho=0.5, iterations=100)
        crf.forward(f, image)
        assert crf.residual < 1e-2
        gaps.append(crf.log_partition - enumerated(f, image, w)[0])
    assert min(gaps) > -1e-9 and max(gaps) > 0.1


@RHO
def test_log_partition_is_energy_and_entropies_of_the_beliefs(rho):
    """<b, f> + <b_e, w_e> + sum H(b_i) - rho sum I(b_e), on an edge and by hand."""
    f, image, _ = example(1, 2)
    crf = converged(rho=rho)
    b = crf.forward(f, image)[0]
    features = np.array([1, contrast(image, (0, 0), (0, 1))])
    w_e = crf.params["w"] @ features
    # b_e has the rows and columns of b: alternate scaling finds it
    b_e = np.exp(w_e / rho * np.eye(3))
    for _ in range(1000):
        b_e *= (b[0] / b_e.sum(axis=1))[:, None]
        b_e *= b[1] / b_e.sum(axis=0)
    information = (b_e * np.log(b_e / np.outer(b[0], b[1]))).sum()
    log_Z = ((b * f[0]).sum() + w_e * np.trace(b_e) - (b * np.log(b)).sum() - rho * information)
    assert abs(crf.log_partition - log_Z) < 1e-9
    dw = loss_and_gradients(crf, f, image, np.array([[0, 0]]))[2]
    np.testing.assert_allclose(dw, (np.trace(b_e) - 1) * features / 2, atol=1e-9)


@RHO
def test_without_void_the_gradient_is_marginals_minus_truth(rho):
    f, image, _ = example(4, 5)
    y = np.random.default_rng(2).integers(0, 3, (4, 5))
    crf = converged(rho=rho)
    b = crf.forward(f, image)
    score = (f * np.eye(3)[y]).sum()                   # F(x, y)
    for i, j in edges(*y.shape):
        score += (y[i] == y[j]) * (crf.params["w"] @ [1, contrast(image, i, j)])
    loss, df, _ = loss_and_gradients(crf, f, image, y.ravel())       # of any shape
    assert abs(loss - (crf.log_partition - score) / y.size) < 1e-12
    np.testing.assert_allclose(df, (b - np.eye(3)[y]) / y.size, atol=1e-15)


def test_void_pixels_may_have_any_label_and_none_labelled_is_no_loss():
    f, image, y = example(3, 3)
    crf = converged()
    given = [np.where(y == VOID, [[a, 0, 0], [0, 0, 0], [0, 0, c]], y)
             for a in range(3) for c in range(3)]
    # p(y) = sum of p over what may stand there; the ends of a 3 x 3 grid share no edge
    losses = [loss_and_gradients(crf, f, image, each)[0] for each in given]
    expected = -np.log(np.exp(-9 * np.array(losses)).sum()) / 7
    assert abs(loss_and_gradients(crf, f, image, y)[0] - expected) < 1e-9

    loss, df, dw = loss_and_gradients(crf, f, image, np.full((3, 3), VOID, np.uint8))
    assert loss == 0 and not df.any() and not dw.any()


def test_one_round_carries_a_message_across_the_picture():
    f, image = np.zeros((40, 60, 2)), np.zeros((40, 60, 3))
    f[0, 0, 1] = 5
    b = LocalCRF(2, w=(3., 0.), rho=1., iterations=1).forward(f, image)
    assert (b[..., 1] > 0.5).all() and b[-1, -1, 1] < b[0, 0, 1]


def test_a_picture_turned_over_gives_the_same_turned_over():
    f, image, y = example(4, 6)
    crf = converged(rho=0.5)
    loss, df, dw = loss_and_gradients(crf, f, image, y)
    for turn in (lambda a: a[::-1], lambda a: a[:, ::-1], lambda a: a.swapaxes(0, 1)):
        found = loss_and_gradients(crf, turn(f), turn(image), turn(y))
        for a, e in zip(found, (loss, turn(df), dw)):
            np.testing.assert_allclose(a, e, atol=1e-12)


def test_gradients_accumulate():
    f, image, y = example(3, 4)
    crf = converged(rho=0.5)
    _, df, dw = loss_and_gradients(crf, f, image, y)
    for _ in range(2):
        np.testing.assert_allclose(crf.backward(), df, rtol=1e-15)
    np.testing.assert_allclose(crf.grads["w"], 2 * dw, rtol=1e-15)


def test_forbidden_labels_and_rewards_beyond_measure_stay_finite():
    f, image, y = example(4, 5)
    f[..., 0] = -np.inf
    y[y == 0] = 1
    for w in ((0.4, 0.8), (500., 500.)):
        for dtype in np.float32, np.float64:
            crf = LocalCRF(3, w=w, sigma_contrast=SIGMA)
            loss, df, dw = loss_and_gradients(crf, f.astype(dtype), image, y)
            assert np.isfinite(loss) and np.isfinite(df).all() and np.isfinite(dw).all()
            assert not crf.forward(f, image)[..., 0].any() and not df[..., 0].any()


def test_float32_follows_float64_and_input_is_left_alone():
    f, image, y = example(20, 30, n_labels=5)
    image, kept = image.astype(np.uint8), f.copy()
    found, expected = [], []
    for results, dtype in ((found, np.float32), (expected, np.float64)):
        crf = LocalCRF(5)
        scores = f.astype(dtype)
        b = crf.forward(scores, image)
        loss, df, dw = loss_and_gradients(crf, scores, image, y)
        assert b.dtype == df.dtype == dtype and b.shape == df.shape == f.shape
        assert dw.dtype == np.float64 and b.flags.c_contiguous
        assert np.array_equal(scores, kept.astype(dtype))
        results += [b, df * y.size, dw, loss]
    for a, e in zip(found, expected):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5)


def test_device_arrays_give_the_same(monkeypatch):
    monkeypatch.setattr(arrays, "cupy", strict_cupy.cupy)
    f, image, y = example(6, 8)
    image, there = image.astype(np.uint8), functools.partial(to_device, device="gpu")
    for dtype, atol in ((np.float64, 1e-12), (np.float32, 1e-6)):
        crf = LocalCRF(3, iterations=4)
        scores = f.astype(dtype)
        b = crf.forward(scores, image)
        expected = loss_and_gradients(crf, scores, image, y)
        found = loss_and_gradients(crf, there(scores), there(image), there(y))
        assert found[1].dtype == dtype
        np.testing.assert_allclose(to_host(crf.forward(there(scores), there(image))), b, atol=atol)
        for a, e in zip(found, expected):
            np.testing.assert_allclose(to_host(a), e, atol=atol)


def test_it_stops_where_messages_stand_still():
    f, image, _ = example(6, 7)
    long, longer = converged(), converged()
    longer.iterations = 100_000_000
    assert np.array_equal(long.forward(f, image), longer.forward(f, image))
    residuals = []
    for n in (1, 2, 4, 8):
        crf = LocalCRF(3, iterations=n)
        crf.forward(f, image)
        residuals.append(float(crf.residual))
    assert residuals == sorted(residuals, reverse=True) and residuals[-1] < residuals[0] / 10


@pytest.mark.parametrize("options, message", [
    ({"w": (1.,)}, r"w: found \[1.0\], expected two finite"), ({"w": (1., np.nan)}, "two finite"),
    *(({name: value}, f"{name} {value}") for name, value in (
        ("iterations", 0), ("n_labels", 0), ("rho", 0), ("rho", 1.5), ("sigma_contrast", 0)))])
def test_options_are_checked(options, message):
    with refused(message):
        LocalCRF(**{"n_labels": 2, **options})


def test_scores_and_images_are_checked():
    f, image, _ = example(3, 4)
    for scores, picture, message in ((f * np.nan, image, "scores: found NaN"),
                                     (f, image * np.nan, "image: found NaN"),
                                     (f, image[:, :3], r"image: found shape \(3, 3, 3\)")):
        with refused(message):
            LocalCRF(3).forward(scores, picture)
