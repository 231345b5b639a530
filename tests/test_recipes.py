"""What the READMEs promise to those who come from PyTorch and from pydensecrf."""
import pathlib
import re

import numpy as np
import pytest

from minicrf import (DenseCRF, FeatureCRF, scores_from_labels, scores_from_probabilities)
from minicrf.data import toy
from minicrf.losses import softmax

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text("utf-8")
H, W, L = 24, 32, 6


def picture(seed=0):
    """An image, its labels, and noisy scores (H, W, L) float32."""
    rng = np.random.default_rng(seed)
    image, labels = toy.picture(rng, H, W)
    scores = 2 * np.eye(L)[np.where(labels == 255, 0, labels)] + rng.standard_normal((H, W, L))
    return image, labels, scores.astype(np.float32)


# PyTorch

@pytest.fixture
def recipe():
    """The names that the README's recipe defines."""
    pytest.importorskip("torch")
    [code] = re.findall(r"```python\n(import torch\n.*?)```", README, flags=re.S)
    names = {}
    exec(code, names)
    assert len([line for line in code.splitlines() if line.strip()]) <= 25
    return names


def test_the_recipe_has_the_right_gradients(recipe):
    torch = recipe["torch"]
    rng = np.random.default_rng(0)
    crf = recipe["CRF"](3, w=(0.5, 1.), sigma_position=(1.5, 2.), exact=True,
                        sigma_bilateral=(3., 4., 60., 80., 100.))
    scores = torch.tensor(rng.standard_normal((2, 3, 4, 5)), requires_grad=True)
    images = torch.tensor(rng.uniform(0, 255, (2, 3, 4, 5)))

    def two_forwards_before_their_way_back(scores, *values):
        return torch.stack([recipe["MeanField"].apply(crf.crf, *each, *values)
                            for each in zip(scores, images)])

    assert torch.autograd.gradcheck(two_forwards_before_their_way_back, (scores, *crf.values))
    assert torch.equal(crf(scores, images),
                       two_forwards_before_their_way_back(scores, *crf.values))


def test_the_recipe_trains_a_network_through_the_crf(recipe):
    torch = recipe["torch"]
    torch.manual_seed(0)
    pictures = [picture(seed) for seed in range(4)]
    images = torch.stack([torch.tensor(image).movedim(-1, 0) for image, _, _ in pictures])
    labels = torch.stack([torch.tensor(y, dtype=torch.long) for _, y, _ in pictures])
    net = torch.nn.Conv2d(3, L, 5, padding=2)
    crf = recipe["CRF"](L, w=(1., 2.), sigma_bilateral=(9., 20.))
    before = [value.detach().clone() for value in crf.values]
    optimiser = torch.optim.SGD([*net.parameters(), *crf.parameters()], lr=0.05, momentum=0.9)
    losses = []
    for _ in range(12):
        optimiser.zero_grad()
        logits = crf(net(images / 60. - 2), images)
        loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=255)
        loss.backward()
        optimiser.step()
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0], losses
    assert all((value != old).any() for value, old in zip(crf.values, before))


# pydensecrf

def theirs(scores, steps=5, *add):
    """Marginals (H, W, L) by pydensecrf of scores; add: functions that add a kernel each."""
    densecrf = pytest.importorskip("pydensecrf.densecrf")
    crf = densecrf.DenseCRF2D(W, H, L)
    crf.setUnaryEnergy(np.ascontiguousarray(-scores.reshape(-1, L).T))
    for each in add:
        each(crf, densecrf)
    return np.array(crf.inference(steps)).T.reshape(H, W, L), crf


@pytest.mark.parametrize("normalization", ["symmetric", "none"])
def test_inference_is_pydensecrfs(normalization):
    image, _, scores = picture()
    w = (3, 10) if normalization == "symmetric" else (0.05, 0.1)

    def kernels(crf, densecrf):
        kind = {"symmetric": densecrf.NORMALIZE_SYMMETRIC, "none": densecrf.NO_NORMALIZATION}
        options = dict(normalization=kind[normalization])
        crf.addPairwiseGaussian(sxy=3, compat=w[0], **options)
        crf.addPairwiseBilateral(sxy=80, srgb=13, rgbim=image, compat=w[1], **options)
    expected, _ = theirs(scores, 5, kernels)
    crf = DenseCRF(L, w=w, sigma_position=3, sigma_bilateral=(80, 13), iterations=5,
                   exclude_self=False, normalization=normalization)
    assert abs(crf.forward(scores, image) - expected).mean() < 1e-7
    # stepInference
    crf.iterations = 2
    assert abs(crf.forward(scores, image) - theirs(scores, 2, kernels)[0]).mean() < 1e-7


def test_a_matrix_of_energies_is_the_negative_of_ours():
    image, _, scores = picture()
    matrix = np.random.default_rng(1).uniform(0, 3, (L, L))
    matrix = (matrix + matrix.T).astype(np.float32)
    expected, _ = theirs(scores, 5, lambda crf, _: crf.addPairwiseGaussian(
        sxy=3, compat=-matrix))
    crf = DenseCRF(L, w=[matrix], sigma_position=3, sigma_bilateral=None, exclude_self=False)
    assert abs(crf.forward(scores, image) - expected).mean() < 1e-6


def test_features_of_ones_own():
    pytest.importorskip("pydensecrf")
    from pydensecrf.utils import create_pairwise_bilateral
    image, _, scores = picture()
    features = create_pairwise_bilateral((9, 7), (20, 20, 20), image, chdim=2)       # (5, N)
    expected, _ = theirs(scores, 5, lambda crf, _: crf.addPairwiseEnergy(features, compat=4))
    crf = FeatureCRF(L, w=(4.,), sigmas=[[1.] * 5], exclude_self=False)
    got = crf.forward(scores.reshape(-1, L), [np.ascontiguousarray(features.T)])
    # their features come y first: another order is another lattice
    y_first = expected.reshape(-1, L)
    assert abs(got - y_first).mean() < 1e-6


def test_their_unary_helpers():
    utils = pytest.importorskip("pydensecrf.utils")
    rng = np.random.default_rng(0)
    p = softmax(5 * rng.standard_normal((H, W, L))).astype(np.float32)
    energy = utils.unary_from_softmax(p.reshape(-1, L).T, clip=1e-5)
    np.testing.assert_allclose(scores_from_probabilities(p, floor=1e-5).reshape(-1, L).T, -energy,
                               rtol=1e-5)
    y = rng.integers(0, L + 1, (H, W))                                   # 0: unsure
    for ours, unsure in ((scores_from_labels(y - 1, L, 0.7, unknown=-1), True),
                         (scores_from_labels(y % L, L, 0.7, unknown=None), False)):
        energy = utils.unary_from_labels(y if unsure else y % L, L, 0.7, zero_unsure=unsure)
        np.testing.assert_allclose(softmax(ours).reshape(-1, L).T, softmax(-energy.T).T, atol=1e-6)
