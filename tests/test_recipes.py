"""What the lesson promises to those who come from PyTorch and from pydensecrf."""
import pathlib
import re

import numpy as np
import pytest

from minicrf import DenseCRF, FeatureCRF, scores_from_labels, scores_from_probabilities
from minicrf.data import toy
from minicrf.losses import softmax

ROOT = pathlib.Path(__file__).parents[1]
LESSON = (ROOT / "minicrf/README.md").read_text("utf-8")
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
    """The names that the lesson's recipe defines."""
    pytest.importorskip("torch")
    [code] = re.findall(r"```py\n(import torch\n.*?)```", LESSON, flags=re.S)
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
    expected = two_forwards_before_their_way_back(scores.float(), *crf.values)
    assert torch.equal(crf(scores, images), expected)


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
        crf.values[0].data.clamp_(min=0)
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses
    assert all((value != old).any() for value, old in zip(crf.values, before))


def test_the_binary_example():
    [code] = re.findall(r"```python\n(scores = .*?)```", (ROOT / "README.md").read_text(), re.S)
    image = np.full((20, 30, 3), 40, np.uint8)
    image[:, 15:] = 200
    p = np.where(image[:, :, 0] > 99, 0.7, 0.3).astype(np.float32)
    p[8:12, 20:23] = 0.2
    names = {**globals(), "p": p, "image": image}
    exec(code, names)
    assert np.array_equal(names["mask"], image[:, :, 0] > 99)


def test_the_recipe_takes_what_autocast_gives(recipe):
    torch = recipe["torch"]
    torch.manual_seed(0)
    net, crf = torch.nn.Conv2d(3, 2, 3, padding=1), recipe["CRF"](2)
    images = torch.rand(2, 3, 8, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = net(images)
        loss = torch.nn.functional.cross_entropy(crf(scores, 255 * images),
                                                 torch.zeros(2, 8, 9, dtype=torch.long))
    loss.backward()
    assert scores.dtype == torch.bfloat16 and net.weight.grad.abs().max() > 0


# pydensecrf: the rows of the table that ends minicrf/README.md

def test_every_name_in_the_table_is_used_here():
    here = pathlib.Path(__file__)
    table = LESSON.partition("## 16.")[2].partition("## ")[0]
    names = {name for code in re.findall("`([^`]+)`", table)
             for name in re.findall("[A-Za-z_]{3,}", code)}
    assert len(names) > 30
    assert names <= {*re.findall(r"\w+", here.read_text("utf-8"))}


def theirs(scores, *kernels):
    """Their CRF of scores (H, W, L); kernels: functions that add one each."""
    densecrf = pytest.importorskip("pydensecrf.densecrf")
    crf = densecrf.DenseCRF2D(W, H, L)
    crf.setUnaryEnergy(np.ascontiguousarray(-scores.reshape(-1, L).T))
    for add in kernels:
        add(crf)
    return crf


def both_kernels(image, **options):
    """What adds their two kernels, with widths that differ by direction and channel."""
    return (lambda crf: crf.addPairwiseGaussian(sxy=(3, 5), compat=3, **options),
            lambda crf: crf.addPairwiseBilateral(sxy=(20, 10), srgb=(13, 20, 7), rgbim=image,
                                                 compat=10, **options))


def ours(**options):
    return DenseCRF(L, **{"w": (3, 10), "sigma_position": (3, 5), "exclude_self": False,
                          "sigma_bilateral": (20, 10, 13, 20, 7), **options})


def as_image(Q):
    return np.array(Q).T.reshape(H, W, L)


def assert_same(q, Q):
    assert abs(q - as_image(Q)).mean() < 1e-7


@pytest.mark.parametrize("ours, theirs_", [("symmetric", "NORMALIZE_SYMMETRIC"),
                                           ("none", "NO_NORMALIZATION")])
def test_inference_and_normalisations(ours, theirs_):
    densecrf = pytest.importorskip("pydensecrf.densecrf")
    image, _, scores = picture()
    options = dict(normalization=getattr(densecrf, theirs_))
    w = (3, 10) if ours == "symmetric" else (0.05, 0.1)
    crf = theirs(scores,
                 lambda crf: crf.addPairwiseGaussian(sxy=3, compat=w[0], **options),
                 lambda crf: crf.addPairwiseBilateral(sxy=80, srgb=13, rgbim=image, compat=w[1],
                                                      **options))
    q = DenseCRF(L, w=w, sigma_position=3, sigma_bilateral=(80, 13), iterations=5,
                 exclude_self=False, normalization=ours).forward(scores, image)
    assert_same(q, crf.inference(5))


def test_widths_of_each_direction_and_channel_step_by_step():
    image, _, scores = picture()
    crf, mine = theirs(scores, *both_kernels(image)), ours()
    Q, *scratch = crf.startInference()
    for mine.iterations in range(4):
        assert_same(mine.forward(scores, image), Q)
        crf.stepInference(Q, *scratch)


def test_their_divergence_counts_pairs_twice_and_pixels_with_themselves():
    image, _, scores = picture()
    crf, mine = theirs(scores, *both_kernels(image)), ours(iterations=2)
    Q, *scratch = crf.startInference()
    for _ in range(2):
        crf.stepInference(Q, *scratch)
    q = mine.forward(scores, image)
    alone = (q * (np.log(q) - scores)).sum(dtype=float)
    itself = sum(w_m * float((kernel.diagonal[:, None] * q.reshape(-1, L)**2).sum())
                 for w_m, kernel in zip((3, 10), mine.state.kernels))
    expected = alone + 2 * (mine.free_energy(q, scores, image) - alone) - itself
    np.testing.assert_allclose(crf.klDivergence(Q), expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(L,), (L, L)], ids=["vector", "matrix"])
def test_compatibilities_are_energies_there_and_scores_here(shape):
    image, _, scores = picture()
    compat = -np.random.default_rng(1).uniform(0, 3, shape).astype(np.float32)
    if len(shape) == 2:
        compat += compat.T
    crf = theirs(scores, lambda crf: crf.addPairwiseGaussian(sxy=3, compat=compat))
    w = [-np.diag(compat) if len(shape) == 1 else -compat]
    mine = DenseCRF(L, w=w, sigma_position=3, sigma_bilateral=None, exclude_self=False)
    assert_same(mine.forward(scores, image), crf.inference(5))


def test_features_of_ones_own():
    utils = pytest.importorskip("pydensecrf.utils")
    image, _, scores = picture()
    position = utils.create_pairwise_gaussian((5, 3), (H, W))                        # (2, N)
    features = utils.create_pairwise_bilateral((10, 20), (13, 20, 7), image, chdim=2)    # (5, N)
    crf = theirs(scores, lambda crf: crf.addPairwiseEnergy(position, compat=3),
                 lambda crf: crf.addPairwiseEnergy(features, compat=10))
    mine = FeatureCRF(L, w=(3, 10), sigmas=[[1.] * 2, [1.] * 5], exclude_self=False)
    q = mine.forward(scores.reshape(-1, L), [position.T, features.T])
    Q = crf.inference(5)
    assert_same(q.reshape(H, W, L), Q)
    assert abs(ours().forward(scores, image) - as_image(Q)).mean() > 1e-4    # x first


def test_their_unary_helpers():
    utils = pytest.importorskip("pydensecrf.utils")
    rng = np.random.default_rng(0)
    p = softmax(5 * rng.standard_normal((H, W, L))).astype(np.float32)
    for scale, mixed in ((None, p), (0.7, 0.7 * p + (1 - 0.7) / L)):
        energy = utils.unary_from_softmax(p.reshape(-1, L).T, scale)
        mine = scores_from_probabilities(mixed, floor=1e-5)
        np.testing.assert_allclose(mine.reshape(-1, L).T, -energy, rtol=1e-5, atol=1e-6)
    y = rng.integers(0, L + 1, (H, W)).astype(np.uint8)                  # 0: unsure
    for mine, energy in (
            (scores_from_labels(y.astype(int) - 1, L, 0.7, unknown=-1),
             utils.unary_from_labels(y.astype(int), L, gt_prob=0.7)),
            (scores_from_labels(y % L, L, 0.7, unknown=None),
             utils.unary_from_labels(y % L, L, 0.7, zero_unsure=False))):
        np.testing.assert_allclose(softmax(mine).reshape(-1, L), softmax(-energy.T), atol=1e-6)
