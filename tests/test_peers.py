"""The network beside PyTorch's, same weights, float64: output and every gradient."""
import numpy as np
import pytest

from minicrf import vgg
from minicrf.layers import Conv2d, Dropout, MaxPool2d, ReLU

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
