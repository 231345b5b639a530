"""plain.py against brute force, and every fast routine against its twin there, ways back included.

The fast ones are held to finite differences in gradcheck, the lattice to its twin in
tests/test_permutohedral.py.
"""
import ast
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from helpers import random
from reference import kl, mean_field

from minicrf import kernels, plain
from minicrf.data import toy
from minicrf.densecrf import DenseCRF
from minicrf.gradcheck import numerical_gradient, relative_error
from minicrf.kernels import GaussianKernel
from minicrf.layers import BilinearUpsample, Conv2d, MaxPool2d, ReLU, Sequential
from minicrf.losses import softmax, softmax_loss
from minicrf.metrics import confusion_matrix, mean_iou
from minicrf.optim import SGD

PATH = pathlib.Path(plain.__file__)
POOLS = [(2, 1, (1, 1)), (1, 1, (0, 1)), (1, 2, (1, 1)), (2, 1, (0, 0))]    # stride, hole, padding


def crf_example(N=7, L=3, M=2, seed=0):
    """f (N, L), symmetric K without diagonal (M, N, N), positive semi-definite W (M, L, L)."""
    f, K, W = (random(*shape, seed=seed + i)
               for i, shape in enumerate([(N, L), (M, N, N), (M, L, L)]))
    K = np.exp(-(K - K.transpose(0, 2, 1)) ** 2) * (1 - np.eye(N))
    return f, K, 0.1 * W @ W.transpose(0, 2, 1)


# --- The network ----------------------------------------------------------------------------------

@pytest.mark.parametrize("k, hole", [(3, 1), (3, 2), (1, 1), (5, 2)])
def test_conv2d(k, hole):
    x, w, b, dy = random(2, 6, 5), random(3, 2, k, k), random(3), random(3, 6, 5, seed=1)
    y, backward = plain.conv2d(x, w, b, hole)
    layer = Conv2d(2, 3, k, hole, hole * (k - 1) // 2, dtype=np.float64)
    layer.params.update(w=w, b=b)
    np.testing.assert_allclose(layer.forward(x[None], train=True)[0], y, atol=1e-12)
    found = layer.backward(dy[None])[0], *layer.grads.values()
    for fast, twin in zip(found, backward(dy), strict=True):
        np.testing.assert_allclose(fast, twin, atol=1e-12)


def test_relu():
    x, dy, layer = random(2, 3, 4), random(2, 3, 4, seed=1), ReLU()
    y, backward = plain.relu(x)
    np.testing.assert_array_equal(layer.forward(x.copy(), train=True), y)
    np.testing.assert_array_equal(layer.backward(dy.copy()), backward(dy)[0])


@pytest.mark.parametrize("stride, hole, padding", POOLS)
def test_max_pool2d(stride, hole, padding):
    x = random(2, 6, 7) - 5                           # negative: the padding must not win
    y, backward = plain.max_pool2d(x, stride, hole, padding)
    layer, dy = MaxPool2d(2, stride, hole, padding), random(*y.shape, seed=1)
    np.testing.assert_array_equal(layer.forward(x[None], train=True)[0], y)
    np.testing.assert_allclose(layer.backward(dy[None])[0], backward(dy)[0])


def test_max_pool2d_gives_ties_to_the_first_tap():
    _, backward = plain.max_pool2d(np.zeros((1, 4, 4)), 2, 1, (0, 0))
    np.testing.assert_array_equal(backward(np.ones((1, 2, 2)))[0][0], [[1, 0, 1, 0], [0] * 4] * 2)


def test_upsampling():
    """On a square, the picture at its own size, by the alignment of the same pools."""
    pools = {str(i): MaxPool2d(2, *geometry) for i, (layer, geometry, _) in enumerate(plain.NET)
             if layer is plain.max_pool2d}
    S, dy = random(3, 5, 5), random(17 * 17, 3, seed=1)
    f, backward = plain.upsample(S, plain.interpolation(17, 5), plain.interpolation(17, 5))
    fast = BilinearUpsample(*Sequential(pools).alignment(), input_size=17)
    np.testing.assert_allclose(fast.forward(S, (17, 17), train=True).reshape(-1, 3), f, atol=1e-12)
    np.testing.assert_allclose(fast.backward(dy.reshape(17, 17, 3)), backward(dy), atol=1e-12)


def test_upsampling_of_a_picture_that_is_not_square():
    R_y, R_x = plain.interpolation(12, 4), plain.interpolation(8, 3)
    S = random(2, 4, 3)
    np.testing.assert_allclose(plain.upsample(S, R_y, R_x)[0].reshape(12, 8, 2),
                               np.einsum("yi,lij,xj->yxl", R_y, S, R_x))


# --- The loss and the update ----------------------------------------------------------------------

def test_softmax_loss():
    z, y = random(6, 4), np.array([0, 3, 255, 1, 1, 2])
    np.testing.assert_allclose(softmax(z), plain.softmax(z))
    for fast, twin in zip(softmax_loss(z, y), plain.softmax_loss(z, y), strict=True):
        np.testing.assert_allclose(fast, twin, atol=1e-15)


def test_sgd():
    start = {"w": random(2, 3, 1, 1), "b": random(3)}
    fast = SGD({key: p.copy() for key, p in start.items()},
               {key: np.zeros_like(p) for key, p in start.items()},
               {"w": 0.1, "b": 0.2}, {"w": 0.0005, "b": 0})
    params, velocity = [*start.values()], [np.zeros_like(p) for p in start.values()]
    for seed in range(3):
        grads = [random(*p.shape, seed=seed) for p in params]
        for g, gradient in zip(fast.grads.values(), grads):
            g += gradient
        fast.step()
        plain.sgd(params, grads, velocity, [0.1, 0.2])
    for p, twin in zip(fast.params.values(), params):
        np.testing.assert_allclose(p, twin, rtol=1e-12)


# --- The CRF --------------------------------------------------------------------------------------

def test_gaussian_kernel():
    p, log_sigma, a, b = random(9, 3), np.log([0.7, 1.5, 2]), random(9, 4, seed=2), random(9, 4)
    K, backward = plain.gaussian_kernel(p, log_sigma)
    fast = GaussianKernel(p, np.exp(log_sigma), exact=True)
    np.testing.assert_allclose(fast.filter(np.eye(9)), K, atol=1e-12)
    dW, dlog_sigma = fast.backward([a], [[fast.filter_transpose(a)]], [b], np.array(2.))
    np.testing.assert_allclose(dlog_sigma, backward(a @ (2 * b).T), atol=1e-12)
    np.testing.assert_allclose(dW, (a * (K @ b)).sum(), atol=1e-12)


def test_one_marginal_at_a_time_never_raises_kl_and_ends_where_the_parallel_update_rests():
    f, K, W = crf_example(5)
    kls = [kl(plain.mean_field_one_by_one(f, K, W, sweeps), f, K, W) for sweeps in range(5)]
    assert (np.diff(kls) < 1e-12).all() and kls[-1] < kls[0] - 0.01
    np.testing.assert_array_equal(plain.mean_field_one_by_one(f, K, W, 0), plain.softmax(f))
    q = plain.mean_field_one_by_one(f, K, W, 200)
    np.testing.assert_allclose(np.exp(plain.mean_field(f, K, W, T=200)[0]), q, atol=1e-10)
    for other in range(20):
        moved = plain.softmax(np.log(q) + 0.01 * random(*f.shape, seed=other))
        assert kl(moved, f, K, W) > kl(q, f, K, W)


@pytest.mark.parametrize("c", [0, 0.1, 3, 20])
def test_the_parallel_and_the_damped_update(c):
    for scale in (1, 100):
        f, K, W = crf_example(N=100)
        q = mean_field(scale * f, 0.1 * K, W, c=c)[-1]
        np.testing.assert_allclose(np.exp(plain.mean_field(scale * f, 0.1 * K, W, c=c)[0]), q,
                                   atol=1e-12)


@pytest.mark.parametrize("c", [0, 2])
def test_back_tracking(c):
    """By finite differences: of K itself the engine has no gradient."""
    f, K, W = crf_example()
    y = np.array([0, 1, 2, 255, 1, 0, 2])
    def loss(_=None):
        return plain.softmax_loss(plain.mean_field(f, K, W, c=c)[0], y)
    u, backward = plain.mean_field(f, K, W, c=c)
    for gradient, value in zip(backward(loss()[1]), (f, K, W), strict=True):
        assert relative_error(gradient, numerical_gradient(lambda _: loss()[0], value)) < 1e-6


def test_dense_crf(monkeypatch):
    """Marginals, and the gradients of scores, weights and widths."""
    monkeypatch.setattr(kernels, "PIECE_COLUMNS", 12)    # two of the five steps side by side
    h, w, L = 5, 6, 6
    rng = np.random.default_rng(0)
    f, image, y = random(h, w, L), rng.uniform(0, 255, (h, w, 3)), rng.integers(0, L, h * w)
    y[3] = 255
    crf = DenseCRF(L, w=(1., 2.), sigma_position=(1.5, 2.), exact=True,
                   sigma_bilateral=(3., 4., 60., 80., 100.))
    q = crf.forward(f, image)
    df = crf.backward_logits(softmax_loss(crf.logits.reshape(-1, L), y)[1])
    scores = f.reshape(-1, L)
    # a network that answers with the scores f
    monkeypatch.setattr(plain, "unary", lambda image, net: (scores, lambda df: [df]))
    u, backward = plain.joint(image, [], [*crf.params.values()])
    np.testing.assert_allclose(np.exp(u), q.reshape(-1, L), atol=1e-12)
    grads = backward(plain.softmax_loss(u, y)[1])
    for fast, twin in zip((df.reshape(-1, L), *crf.grads.values()), grads, strict=True):
        np.testing.assert_allclose(fast, twin, rtol=1e-9, atol=1e-12)


# --- Both stages ----------------------------------------------------------------------------------

def example_net():
    rng = np.random.default_rng(1)
    net = [[rng.normal(size=s) * 0.3, rng.normal(size=s[0])] if s else [] for *_, s in plain.NET]
    image, y = toy.picture(rng, 9, 10)
    crf = [np.array([1., 2.]), np.log([2., 2.]), np.log([8., 8., 40., 40., 40.])]
    return image, y.ravel(), net, crf


def test_the_program_checks_gradients_itself(monkeypatch):
    image, y, net, crf = example_net()
    kept, rng = [p.copy() for p in sum(net, []) + crf], np.random.default_rng(0)
    for _ in range(3):
        assert plain.gradient_error(image, y, net, crf, rng) < 1e-6
    for p, before in zip(sum(net, []) + crf, kept):
        np.testing.assert_allclose(p, before)
    monkeypatch.setattr(plain, "softmax_loss", lambda u, y, right=plain.softmax_loss: (
        right(u, y)[0], plain.softmax(u)))               # without the truth
    assert plain.gradient_error(image, y, net, crf, rng) > 1e-3


def test_evaluation(capsys):
    """Mean IoU by the confusion matrix of all pictures, void left out; the mean of their losses."""
    truths, scores = np.random.default_rng(0).integers(0, 6, (2, 40)), random(2, 40, 6)
    truths[:, :5] = 255
    iou = plain.evaluate("", lambda f, net, crf: (f, None), [], [], [*zip(scores, truths)])
    counts = confusion_matrix(truths, scores.argmax(axis=2), 6)
    assert relative_error(iou, mean_iou(counts)) < 1e-12
    loss = np.mean([softmax_loss(z, y)[0] for z, y in zip(scores, truths)])
    assert f"loss {loss:.3f}, IoU {iou:.1f}%" in capsys.readouterr().out


def test_the_fast_network_with_the_same_weights():
    image, _, net, _ = example_net()
    layers = {}
    x = image.transpose(2, 0, 1)[None] / 60 - 2
    for number, ((layer, geometry, shape), params) in enumerate(zip(plain.NET, net)):
        if layer is plain.conv2d:
            (hole,), k = geometry, shape[2]
            layers[str(number)] = conv = Conv2d(shape[1], shape[0], k, hole, hole * (k - 1) // 2,
                                                dtype=np.float64)
            conv.params.update(w=params[0], b=params[1])
        elif layer is plain.max_pool2d:
            layers[str(number)] = MaxPool2d(2, *geometry)
        else:
            layers[str(number)] = ReLU()
    np.testing.assert_allclose(plain.network(x[0], net)[0], Sequential(layers).forward(x)[0],
                               atol=1e-10)


@pytest.mark.slow
def test_the_program_ends_with_joint_above_unary():
    done = subprocess.run([sys.executable, "-m", "minicrf.plain"], capture_output=True, text=True,
                          cwd=PATH.parents[1])
    assert done.returncode == 0, done.stderr
    last = re.fullmatch(r"IoU: unary ([\d.]+)%, joint ([\d.]+)%", done.stdout.splitlines()[-1])
    assert float(last[2]) > float(last[1]) > 35       # chance and all background are far below


def test_plain_needs_numpy_alone():
    tree = ast.parse(PATH.read_text(encoding="utf-8"))
    imports = [ast.unparse(node) for node in ast.walk(tree)
               if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert sorted(imports) == ["from minicrf.data.toy import picture", "import numpy as np"]
