"""The network beside PyTorch's, same weights, float64: output and every gradient."""
import numpy as np
import pytest

from minicrf import vgg
from minicrf.layers import Conv2d, Dropout, MaxPool2d, ReLU
from minicrf.inputs import VOID
from minicrf.losses import softmax_loss
from minicrf.optim import SGD

torch = pytest.importorskip("torch")
F = torch.nn.functional


def peer(net, params, x):
    """PyTorch's version of the network, built from each layer's geometry."""
    for name, layer in net.layers.items():
        if isinstance(layer, Conv2d):
            x = F.conv2d(x, params[f"{name}_w"], params[f"{name}_b"],
                         padding=layer.padding[0], dilation=layer.dilation)
        elif isinstance(layer, ReLU):
            x = F.relu(x)
        elif isinstance(layer, MaxPool2d):
            before, after = layer.padding
            x = F.pad(x, (before, after, before, after), value=-np.inf)
            x = F.max_pool2d(x, layer.kernel, layer.stride, 0, layer.dilation)
        else:
            assert isinstance(layer, Dropout) and layer.rate == 0
    return x


def difference(ours, theirs):
    """Norm of the difference relative to the norm."""
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape and np.linalg.norm(theirs) > 0
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@pytest.mark.parametrize("preset, shape", [("tiny", (2, 3, 66, 58)), ("largefov", (1, 3, 50, 34))])
def test_output_and_every_gradient(preset, shape):
    rng = np.random.default_rng(0)
    net = vgg.build(preset, 21, seed=1, dropout=0.0, dtype=np.float64)
    net["conv1_1"].needs_dx = True
    for key, p in net.params.items():
        if key.endswith("_b"):
            p += 0.1 * rng.standard_normal(p.shape)
    params = {key: torch.tensor(p, requires_grad=True) for key, p in net.params.items()}
    x = rng.standard_normal(shape)
    x_peer = torch.tensor(x, requires_grad=True)

    y, y_peer = net.forward(x.copy(), train=True), peer(net, params, x_peer)
    assert difference(y, y_peer) < 1e-9
    dy = rng.standard_normal(y.shape)
    y_peer.backward(torch.tensor(dy))
    assert difference(net.backward(dy), x_peer.grad) < 1e-9
    for key, gradient in net.grads.items():
        assert difference(gradient, params[key].grad) < 1e-9, key


@pytest.mark.parametrize("size, out", [((14, 11), (11, 14)), ((10, 13), (50, 39))])
def test_upsampling_beside_grid_sample(size, out):
    """grid_sample takes places in [-1, 1] from the first cell's centre to the last one's."""
    upsample = vgg.build("tiny", 2).upsample
    scores = np.random.default_rng(2).standard_normal((3, *size))
    grid = [((np.arange(n) + 0.5) * upsample.input_size / n - 0.5 - 0.5) / 8 * 2 / (cells - 1) - 1
            for n, cells in zip(out, size)]
    grid = np.stack(np.meshgrid(*grid, indexing="ij")[::-1], axis=-1)[None]          # (1, H, W, xy)
    peers = torch.tensor(scores[None], requires_grad=True)
    theirs = F.grid_sample(peers, torch.tensor(grid), padding_mode="border", align_corners=True)
    ours = upsample.forward(scores, out, train=True)
    assert difference(ours.transpose(2, 0, 1), theirs[0]) < 1e-9
    dy = np.random.default_rng(3).standard_normal(ours.shape)
    theirs[0].backward(torch.tensor(dy.transpose(2, 0, 1).copy()))
    assert difference(upsample.backward(dy), peers.grad[0]) < 1e-9


def test_loss_beside_cross_entropy():
    rng = np.random.default_rng(4)
    z, labels = 5 * rng.standard_normal((200, 21)), rng.integers(0, 21, 200)
    labels[::7] = VOID
    logits = torch.tensor(z, requires_grad=True)
    theirs = F.cross_entropy(logits, torch.tensor(labels), ignore_index=VOID)
    theirs.backward()
    ours, dz = softmax_loss(z, labels)
    assert difference(ours, theirs) < 1e-12
    assert difference(dz, logits.grad) < 1e-9


def test_updates_beside_torch_sgd():
    """The same rule while the rate stays; PyTorch multiplies the rate in after the momentum."""
    rng = np.random.default_rng(5)
    p = rng.standard_normal(10)
    theirs = torch.nn.Parameter(torch.tensor(p))
    peers = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, weight_decay=5e-4)
    ours = SGD({"p": p}, {"p": np.zeros(10)}, {"p": 0.1}, {"p": 5e-4})
    for _ in range(10):
        g = rng.standard_normal(10)
        ours.grads["p"] += g
        ours.step()
        theirs.grad = torch.tensor(g)
        peers.step()
    assert difference(p, theirs) < 1e-12
