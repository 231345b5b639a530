"""Each layer against sums over taps; its way back by what a function linear between ties obeys.

Finite differences of every layer are in gradcheck, plain.py's twins of them in test_plain.py.
"""
import numpy as np
import pytest
from helpers import random

from minicrf.gradcheck import relative_error
from minicrf.im2col import tiles
from minicrf.layers import BilinearUpsample, Conv2d, Dropout, Layer, MaxPool2d, ReLU, Sequential

# kernel, dilation, padding: conv1-4, conv5, fc6 of tiny, largefov and vgg16, fc7; then odd ones
CONVOLUTIONS = [(3, 1, 1), (3, 2, 2), (3, 3, 3), (3, 12, 12), (7, 4, 12), (1, 1, 0),
                (3, 1, 0), (2, 1, 1), (3, 2, 1), (5, 1, 2)]
# kernel, stride, dilation, (before, after): pool1-3, pool4, pool5; then odd ones
POOLS = [(2, 2, 1, (1, 1)), (2, 1, 1, (0, 1)), (2, 1, 2, (1, 1)),
         (2, 2, 1, (0, 0)), (3, 2, 1, (1, 0)), (2, 2, 2, (1, 1)), (3, 3, 1, (0, 1))]


def conv(*geometry):
    """A convolution in float64 whose bias is not zero."""
    layer = Conv2d(*geometry, dtype=np.float64)
    layer.params["b"] += random(*layer.params["b"].shape, seed=2)
    return layer


def taps(x, kernel, stride, dilation):
    """What each of the k * k taps sees of a padded x (B, C, H, W), for every output cell."""
    H, W = (n - (kernel - 1) * dilation for n in x.shape[2:])
    return [x[:, :, i * dilation:i * dilation + H:stride, j * dilation:j * dilation + W:stride]
            for i, j in np.ndindex(kernel, kernel)]


def naive_conv(x, w, b, dilation, padding):
    """y = b + sum over the taps of w_ij x_ij."""
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    y = b[:, None, None]
    for (i, j), x_ij in zip(np.ndindex(w.shape[2:]), taps(x, w.shape[2], 1, dilation)):
        y = y + np.einsum("oc,bchw->bohw", w[:, :, i, j], x_ij)
    return y


def naive_pool(x, kernel, stride, dilation, padding):
    """The largest of the taps."""
    x = np.pad(x, ((0, 0), (0, 0), padding, padding), constant_values=-np.inf)
    return np.max(taps(x, kernel, stride, dilation), axis=0)


def check_backward(layer, x):
    """<dx, x> + <db, b> = <dy, y> = <dw, w> + <db, b>: all layers are linear between ties."""
    y = layer.forward(x.copy(), train=True)
    dy = random(*y.shape, seed=7)
    dx = layer.backward(dy.copy())
    expected = (dy * y).sum()
    if layer.params:
        expected -= (layer.grads["b"] * layer.params["b"]).sum()
        assert relative_error((layer.grads["w"] * layer.params["w"]).sum(), expected) < 1e-10
        assert relative_error(layer.grads["b"], dy.sum(axis=(0, 2, 3))) < 1e-10
    assert dx.shape == x.shape and relative_error((dx * x).sum(), expected) < 1e-10


def cached_bytes(layer):
    """Bytes of the arrays that a layer holds besides its parameters and their gradients."""
    return sum(value.nbytes for value in vars(layer).values() if isinstance(value, np.ndarray))


# --- convolution ---------------------------------------------------------------------------------

@pytest.mark.parametrize("kernel, dilation, padding", CONVOLUTIONS)
def test_conv_forward(kernel, dilation, padding):
    layer, x = conv(3, 4, kernel, dilation, padding), random(2, 3, 8, 6)
    expected = naive_conv(x, layer.params["w"], layer.params["b"], dilation, padding)
    assert relative_error(layer.forward(x), expected) < 1e-10


@pytest.mark.parametrize("kernel, dilation, padding", CONVOLUTIONS)
def test_conv_backward(kernel, dilation, padding):
    check_backward(conv(2, 3, kernel, dilation, padding), random(2, 2, 5, 6, seed=3))


@pytest.mark.parametrize("layer", [conv(2, 3, 3, 1, 1), MaxPool2d()], ids=["conv", "pool"])
def test_conv_and_pool_leave_their_arguments_alone(layer):
    given = [random(1, 2, 6, 4), *layer.params.values()]
    kept = [a.copy() for a in given]
    dy = np.ones_like(layer.forward(given[0], train=True))
    layer.backward(dy)
    assert (dy == 1).all() and all(map(np.array_equal, given, kept))


def test_conv_takes_arrays_of_any_memory_order():
    x, dy, results = random(2, 3, 7, 5), random(2, 4, 7, 5, seed=4), []
    for order in "CF":
        layer = conv(3, 4, 3, 2, 2)
        y = layer.forward(np.array(x, order=order), train=True)
        results.append((y, layer.backward(np.array(dy, order=order)), layer.grads["w"]))
    for a, b in zip(*results):
        assert relative_error(a, b) < 1e-10


def test_conv_is_drawn_as_he_et_al():
    w = Conv2d(50, 80, 3, rng=np.random.default_rng(0)).params["w"]
    assert w.std() == pytest.approx(np.sqrt(2 / (50 * 9)), rel=0.02)
    assert abs(w.mean()) < 0.01 * w.std() * 5
    assert not Conv2d(50, 80, 3).params["b"].any()


BIG = (2, 540, 41, 43)       # columns this long come in tiles of a few rows, the last one smaller
MANY = (10, 3, 6, 5)         # maps this small come in tiles of a few images, the last one smaller


@pytest.mark.parametrize("shape", [BIG, MANY])
@pytest.mark.parametrize("kernel, dilation, padding",
                         [(3, 1, 1), (3, 2, 2), (3, 1, 0), (2, 3, 1), (1, 1, 0)])
def test_conv_over_several_tiles(kernel, dilation, padding, shape):
    layer, x = conv(shape[1], 3, kernel, dilation, padding), random(*shape)
    expected = naive_conv(x, layer.params["w"], layer.params["b"], dilation, padding)
    assert len(tiles(expected, shape[1] * kernel ** 2)) > 1
    assert np.abs(layer.forward(x) - expected).max() < 1e-11
    check_backward(layer, x)


# --- ReLU and pooling ----------------------------------------------------------------------------

def test_relu_forward_is_in_place():
    x = np.array([[-2.0, 0.0, 3.0]])
    y = ReLU().forward(x)
    assert y is x and np.array_equal(y, [[0, 0, 3]])


@pytest.mark.parametrize("kernel, stride, dilation, padding", POOLS)
def test_pool_forward(kernel, stride, dilation, padding):
    for H, W, train in ((8, 6, False), (7, 9, True)):
        x = random(2, 3, H, W) - 5                 # negative: padding must never win
        y = MaxPool2d(kernel, stride, dilation, padding).forward(x, train)
        assert np.array_equal(y, naive_pool(x, kernel, stride, dilation, padding))


@pytest.mark.parametrize("kernel, stride, dilation, padding", POOLS)
def test_pool_backward(kernel, stride, dilation, padding):
    check_backward(MaxPool2d(kernel, stride, dilation, padding), random(2, 2, 5, 6) - 3)


def test_pool_ties_go_to_the_first_tap():
    layer = MaxPool2d()
    dy = 1 + layer.forward(np.zeros((1, 2, 6, 4)), train=True)
    assert np.array_equal(layer.backward(dy), np.kron(dy, [[1, 0], [0, 0]]))


# --- dropout -------------------------------------------------------------------------------------

def test_dropout_does_nothing_but_in_training():
    x = random(2, 3, 4, 4)
    assert np.array_equal(Dropout(0.5).forward(x.copy()), x)
    assert np.array_equal(Dropout(0.0).forward(x.copy(), train=True), x)
    assert np.array_equal(Dropout(0.0).backward(x.copy()), x)


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.75])
def test_dropout_keeps_the_expected_value(rate):
    y = Dropout(rate, seed=3).forward(np.ones((4, 50, 40, 25)), train=True)
    assert set(np.unique(y)) == {0.0, 1 / (1 - rate)}
    assert (y == 0).mean() == pytest.approx(rate, abs=0.005)
    assert y.mean() == pytest.approx(1, abs=0.01)


def test_dropout_mask_is_a_function_of_its_seed():
    def mask(seed):
        return Dropout(0.5, seed).forward(np.ones((1, 4, 20, 20)), train=True) > 0

    assert np.array_equal(mask(5), mask(5))
    assert np.array_equal(mask((5, 1)), mask((5, 1)))
    for other in (6, (5, 1), (5, 2), (1, 5)):
        assert 0.4 < (mask(5) != mask(other)).mean() < 0.6
    layer = Dropout(0.5, seed=5)                   # and not of what was drawn before
    layer.forward(np.ones((1, 4, 20, 20)), train=True)
    assert np.array_equal(layer.forward(np.ones((1, 4, 20, 20)), train=True) > 0, mask(5))


def test_dropout_backward_uses_the_same_mask():
    layer = Dropout(0.3, seed=1)
    y = layer.forward(np.ones((2, 3, 10, 10)), train=True)
    layer.seed = 2                                 # the next step's
    assert np.array_equal(layer.backward(np.ones_like(y)), y)


def test_dropout_over_relu():
    """Dropout overwrites what the ReLU below keeps; the gradient must not notice."""
    check_backward(Sequential({"relu": ReLU(), "drop": Dropout(0.5, 3)}), random(2, 3, 4, 5))


# --- upsampling ----------------------------------------------------------------------------------

GRIDS = [((5, 4), (13, 9)), ((4, 6), (50, 31)), ((3, 3), (2, 3)),       # cells, size
         ((1, 4), (6, 7)), ((4, 1), (3, 5))]


def upsample():
    return BilinearUpsample(step=8, centre=0.5, input_size=34)


@pytest.mark.parametrize("cells, size", GRIDS)
def test_upsample_forward(cells, size):
    """Along either axis: the line through two cells' centres, flat beyond the last."""
    expected = scores = random(3, *cells)
    for axis, n in enumerate(size, 1):
        pixels = (np.arange(n) + 0.5) * 34 / n - 0.5
        expected = np.apply_along_axis(
            lambda line: np.interp(pixels, 8 * np.arange(len(line)) + 0.5, line), axis, expected)
    y = upsample().forward(scores, size)
    assert y.shape == (*size, 3) and np.abs(y - expected.transpose(1, 2, 0)).max() < 1e-13


@pytest.mark.parametrize("cells, size", GRIDS)
def test_upsample_backward_is_the_transpose(cells, size):
    layer, scores, dy = upsample(), random(3, *cells), random(*size, 3, seed=1)
    y = layer.forward(scores, size, train=True)
    dscores = layer.backward(dy)
    assert dscores.shape == scores.shape
    assert relative_error((dy * y).sum(), (dscores * scores).sum()) < 1e-12


# --- what all layers share -----------------------------------------------------------------------

def layers():
    return {"conv": conv(3, 4, 3, 2, 2), "conv1x1": conv(3, 4, 1, 1, 0),
            "relu": ReLU(), "pool": MaxPool2d(2, 2, 1, (1, 1)), "pool5": MaxPool2d(2, 1, 2, (1, 1)),
            "dropout": Dropout(0.5), "upsample": upsample(), "layer": Layer()}


def forward(layer, x, train=False):
    """Upsampling takes the scores of one image, and its size."""
    if isinstance(layer, BilinearUpsample):
        return layer.forward(x[0], (9, 7), train)
    return layer.forward(x, train)


@pytest.mark.parametrize("name", layers())
def test_dtype_follows_the_input_and_float32_is_float64_rounded(name):
    results = []
    for dtype in (np.float32, np.float64):
        layer, x = layers()[name], random(2, 3, 6, 5).astype(dtype)
        for key, p in layer.params.items():
            layer.params[key], layer.grads[key] = p.astype(dtype), np.zeros(p.shape, dtype)
        assert forward(layer, x.copy()).dtype == dtype
        y = forward(layer, x, train=True)
        results.append((y.copy(), layer.backward(np.ones_like(y)), *layer.grads.values()))
        assert all(a.dtype == dtype for a in results[-1])
    for single, double in zip(*results):
        assert np.abs(single - double).max() < 1e-5 * max(1, np.abs(double).max())


@pytest.mark.parametrize("name", layers())
def test_evaluating_keeps_nothing_and_backward_gives_back(name):
    layer = layers()[name]
    forward(layer, random(2, 3, 6, 5))
    assert cached_bytes(layer) == 0
    y = forward(layer, random(2, 3, 6, 5), train=True)
    assert (cached_bytes(layer) > 0) == (name != "layer")
    layer.backward(np.ones_like(y))
    assert cached_bytes(layer) == 0


def test_pool_keeps_one_byte_a_cell():
    layer = MaxPool2d(padding=(1, 1))
    y = layer.forward(random(2, 3, 6, 5), train=True)
    assert cached_bytes(layer) == y.size


@pytest.mark.parametrize("name", ["conv", "conv1x1"])
def test_gradients_accumulate(name):
    layer, x = layers()[name], random(2, 3, 6, 5)
    grads, once = dict(layer.grads), {}
    for _ in range(2):
        layer.backward(random(*layer.forward(x, train=True).shape, seed=8))
        once = once or {key: g.copy() for key, g in grads.items()}
    for key, g in grads.items():
        assert layer.grads[key] is g               # added in place: the optimiser holds this array
        assert once[key].any() and relative_error(g, 2 * once[key]) < 1e-10


@pytest.mark.parametrize("size", range(5, 13))
def test_output_size_is_what_comes_out(size):
    every = [conv(1, 1, *geometry) for geometry in CONVOLUTIONS if geometry != (3, 12, 12)]
    every += [MaxPool2d(*geometry) for geometry in POOLS] + [ReLU(), Dropout(), Layer()]
    for layer in every:
        y = layer.forward(random(1, 1, size, size + 2))
        assert y.shape[2:] == (layer.output_size(size), layer.output_size(size + 2))


# --- layers in sequence --------------------------------------------------------------------------

def sequence():
    return Sequential({"conv1": conv(2, 3, 3, 1, 1), "relu1": ReLU(),
                       "pool1": MaxPool2d(2, 2, 1, (1, 1)), "conv2": conv(3, 2, 3, 2, 2)})


def test_sequential_goes_forward_in_order():
    net, x = sequence(), random(1, 2, 7, 6)
    y = naive_conv(x, net["conv1"].params["w"], net["conv1"].params["b"], 1, 1)
    y = naive_pool(np.maximum(y, 0), 2, 2, 1, (1, 1))
    y = naive_conv(y, net["conv2"].params["w"], net["conv2"].params["b"], 2, 2)
    assert relative_error(net.forward(x), y) < 1e-9
    assert y.shape[2:] == (net.output_size(7), net.output_size(6))


def test_sequential_shares_its_layers_arrays():
    net = sequence()
    assert list(net.params) == list(net.grads) == ["conv1_w", "conv1_b", "conv2_w", "conv2_b"]
    assert net.params["conv2_w"] is net["conv2"].params["w"]
    assert net.grads["conv1_b"] is net["conv1"].grads["b"]


def test_alignment_by_hand():
    net = sequence()                               # conv: 0.  pool: 1/2 - 1, then step 2.  conv: 0
    assert net.alignment() == (2, -0.5)
    net.layers["pool2"] = MaxPool2d(2, 2, 1, (0, 1))                     # 2 * 1/2 = 1, then step 4
    assert net.alignment() == (4, 0.5)
    net.layers["valid"] = conv(2, 2, 3, 1, 0)                            # 4 * (3-1)/2 = 4
    assert net.alignment() == (4, 4.5)
