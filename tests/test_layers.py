"""Each layer against loops over pixels and taps, each backward against finite differences.

Loss of every gradient check: <dy, layer(x)> with a fixed random dy.  In any one element of x, w or
b it is linear between ties: a long step is exact there, and drowns nothing in rounding.
"""
import numpy as np
import pytest

from minicrf.gradcheck import numerical_gradient, relative_error
from minicrf.im2col import columns, read, tiles, write
from minicrf.layers import BilinearUpsample, Conv2d, Dropout, Layer, MaxPool2d, ReLU, Sequential

# kernel, dilation, padding: conv1-4, conv5, fc6 of tiny, largefov and vgg16, fc7; then odd ones
CONVOLUTIONS = [(3, 1, 1), (3, 2, 2), (3, 3, 3), (3, 12, 12), (7, 4, 12), (1, 1, 0),
                (3, 1, 0), (2, 1, 1), (3, 2, 1), (5, 1, 2)]
# kernel, stride, dilation, (before, after): pool1-3, pool4, pool5; then odd ones
POOLS = [(2, 2, 1, (1, 1)), (2, 1, 1, (0, 1)), (2, 1, 2, (1, 1)),
         (2, 2, 1, (0, 0)), (3, 2, 1, (1, 0)), (2, 2, 2, (1, 1)), (3, 3, 1, (0, 1))]


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def conv(channels_in, channels_out, kernel, dilation, padding, dtype=np.float64):
    """A convolution whose bias is not zero."""
    rng = np.random.default_rng(1)
    layer = Conv2d(channels_in, channels_out, kernel, dilation, padding, rng, dtype)
    layer.params["b"] += random(channels_out, seed=2).astype(dtype)
    return layer


def naive_conv(x, w, b, dilation, padding):
    """y[o, h, v] = b_o + sum of w[o, :, i, j] . x[:, tap] over the taps inside the image."""
    B, _, H, W = x.shape
    O, _, k, _ = w.shape
    y = np.zeros((B, O, H + 2 * padding - (k - 1) * dilation, W + 2 * padding - (k - 1) * dilation))
    for n, o, h, v in np.ndindex(y.shape):
        y[n, o, h, v] = b[o]
        for i, j in np.ndindex(k, k):
            row, column = h + i * dilation - padding, v + j * dilation - padding
            if 0 <= row < H and 0 <= column < W:
                y[n, o, h, v] += w[o, :, i, j] @ x[n, :, row, column]
    return y


def naive_pool(x, kernel, stride, dilation, padding):
    """y[h, v] = the largest of the taps that fall into the image."""
    B, C, H, W = x.shape
    before, after = padding
    reach = (kernel - 1) * dilation + 1
    y = np.zeros((B, C, (H + before + after - reach) // stride + 1,
                  (W + before + after - reach) // stride + 1))
    for n, c, h, v in np.ndindex(y.shape):
        y[n, c, h, v] = max(x[n, c, row, column]
                            for row in stride * h - before + dilation * np.arange(kernel)
                            for column in stride * v - before + dilation * np.arange(kernel)
                            if 0 <= row < H and 0 <= column < W)
    return y


def naive_upsample(scores, size, step, centre, side):
    """Each pixel's place on the grid of cells, then the four cells around it."""
    L, h, w = scores.shape
    H, W = size
    y = np.zeros((H, W, L))
    for row, column in np.ndindex(H, W):
        v = min(max((((row + 0.5) * side / H - 0.5) - centre) / step, 0), h - 1)
        u = min(max((((column + 0.5) * side / W - 0.5) - centre) / step, 0), w - 1)
        for i in range(h):
            for j in range(w):                      # a tent of half-width 1 around each cell
                y[row, column] += max(0, 1 - abs(v - i)) * max(0, 1 - abs(u - j)) * scores[:, i, j]
    return y


def distinct(*shape, seed=0):
    """Values at least 0.1 apart and 0.05 from zero: finite differences cross no tie."""
    n = int(np.prod(shape))
    return (0.1 * (np.random.default_rng(seed).permutation(n) - n // 2) + 0.05).reshape(shape)


def check_gradients(layer, x, h=0.01):
    """backward of <dy, layer(x)> with respect to x and every parameter, every element."""
    dy = random(*layer.forward(x.copy(), train=True).shape, seed=7)

    def loss(_):
        return (dy * layer.forward(x.copy(), train=True)).sum()

    numeric = {key: numerical_gradient(loss, p, h) for key, p in layer.params.items()}
    numeric_dx = numerical_gradient(loss, x, h)
    layer.forward(x.copy(), train=True)            # the cache of x itself, not of x - h
    dx = layer.backward(dy.copy())
    assert relative_error(dx, numeric_dx) < 1e-6
    for key, expected in numeric.items():
        assert relative_error(layer.grads[key], expected) < 1e-6, key


def cached_bytes(layer):
    """Bytes of the arrays that a layer holds besides its parameters and their gradients."""
    return sum(value.nbytes for value in vars(layer).values() if isinstance(value, np.ndarray))


# --- convolution ---------------------------------------------------------------------------------

@pytest.mark.parametrize("kernel, dilation, padding", CONVOLUTIONS)
def test_conv_forward(kernel, dilation, padding):
    layer, x = conv(3, 4, kernel, dilation, padding), random(2, 3, 8, 6)
    expected = naive_conv(x, layer.params["w"], layer.params["b"], dilation, padding)
    y = layer.forward(x.copy())
    assert y.shape == expected.shape
    assert relative_error(y, expected) < 1e-10


@pytest.mark.parametrize("kernel, dilation, padding", CONVOLUTIONS)
def test_conv_backward(kernel, dilation, padding):
    check_gradients(conv(2, 3, kernel, dilation, padding), random(2, 2, 5, 6, seed=3))


def test_conv_leaves_its_arguments_alone():
    layer, x = conv(2, 3, 3, 1, 1), random(1, 2, 5, 4)
    w, b, kept = layer.params["w"].copy(), layer.params["b"].copy(), x.copy()
    y = layer.forward(x, train=True)
    dy = np.ones_like(y)
    layer.backward(dy)
    assert np.array_equal(x, kept) and (dy == 1).all()
    assert np.array_equal(layer.params["w"], w) and np.array_equal(layer.params["b"], b)


def test_conv_takes_arrays_of_any_memory_order():
    layer, x = conv(3, 4, 3, 2, 2), random(2, 3, 7, 5)
    turned = np.ascontiguousarray(x.transpose(2, 3, 0, 1)).transpose(2, 3, 0, 1)
    y = layer.forward(x, train=True)
    dy = random(*y.shape, seed=4)
    dx, dw = layer.backward(dy), layer.grads["w"].copy()
    layer.grads["w"][...] = 0
    assert relative_error(layer.forward(turned, train=True), y) < 1e-10
    dy = np.ascontiguousarray(dy.transpose(3, 2, 1, 0)).transpose(3, 2, 1, 0)
    assert relative_error(layer.backward(dy), dx) < 1e-10
    assert relative_error(layer.grads["w"], dw) < 1e-10


def test_conv_without_dx_gives_none_and_the_same_dw():
    x, grads = random(2, 3, 6, 5), []
    for needs_dx in (True, False):
        layer = conv(3, 4, 3, 1, 1)
        layer.needs_dx = needs_dx
        dx = layer.backward(random(*layer.forward(x, train=True).shape, seed=5))
        assert (dx is not None) == needs_dx
        grads.append(layer.grads)
    assert relative_error(grads[0]["w"], grads[1]["w"]) < 1e-10 and grads[0]["w"].any()
    assert np.array_equal(grads[0]["b"], grads[1]["b"]) and grads[0]["b"].any()


def test_conv_is_drawn_as_he_et_al():
    w = Conv2d(50, 80, 3, rng=np.random.default_rng(0)).params["w"]
    assert w.std() == pytest.approx(np.sqrt(2 / (50 * 9)), rel=0.02)
    assert abs(w.mean()) < 0.01 * w.std() * 5
    assert not Conv2d(50, 80, 3).params["b"].any()


# --- tiles of columns ----------------------------------------------------------------------------

BIG = (2, 540, 41, 43)       # columns this long come in tiles of a few rows, the last one shorter
MANY = (10, 3, 6, 5)         # maps this small come in tiles of a few images, the last one smaller


@pytest.mark.parametrize("shape", [BIG, MANY])
@pytest.mark.parametrize("kernel, dilation, padding",
                         [(3, 1, 1), (3, 2, 2), (3, 1, 0), (2, 3, 1), (1, 1, 1), (1, 1, 0)])
def test_tiles_cover_every_output_cell_once_with_its_taps(kernel, dilation, padding, shape):
    x = random(*shape).astype(np.float32)
    B, C, H, W = shape
    reach = (kernel - 1) * dilation
    around = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    y = np.zeros((B, 1, H + 2 * padding - reach, W + 2 * padding - reach), np.float32)
    sizes = set()
    for tile in tiles(y, C * kernel * kernel):
        images, rows = tile
        under = columns(x, tile, kernel, dilation, padding)
        write(y, tile, read(y, tile) + 1)
        sizes.add(under.shape[1])
        assert under.dtype == x.dtype
        cells = [(b, h, v) for b in range(B)[images] for h in range(y.shape[2])[rows]
                 for v in range(y.shape[3])]
        assert under.shape == (C * kernel * kernel, len(cells))
        for column in (0, len(cells) // 3, len(cells) // 2, len(cells) - 1):
            b, h, v = cells[column]
            taps = around[b, :, h:h + reach + 1:dilation, v:v + reach + 1:dilation]
            assert np.array_equal(under[:, column], taps.ravel())
    assert (y == 1).all()
    assert len(sizes) > 1 or kernel == 1, "the last tile should be smaller than the others"


def test_read_and_write_agree_on_the_order_of_cells():
    y, copy = random(*MANY), np.zeros(MANY)
    for tile in tiles(y, 27):
        write(copy, tile, read(y, tile))
    assert np.array_equal(copy, y)


@pytest.mark.parametrize("kernel, dilation, padding", [(3, 1, 1), (3, 2, 2), (2, 3, 1)])
def test_conv_over_several_tiles(kernel, dilation, padding):
    """The convolution is linear in x and in w: dot tests tell everything about its backward."""
    layer, x = conv(BIG[1], 3, kernel, dilation, padding), random(*BIG)
    w = layer.params["w"]
    y = layer.forward(x, train=True)
    around = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    expected = layer.params["b"][:, None, None] + sum(
        np.einsum("oc,bchv->bohv", w[:, :, i, j],
                  around[:, :, i * dilation:i * dilation + y.shape[2],
                         j * dilation:j * dilation + y.shape[3]])
        for i, j in np.ndindex(kernel, kernel))
    assert np.abs(y - expected).max() < 1e-11

    dy, v, u = random(*y.shape, seed=5), random(*x.shape, seed=6), random(*w.shape, seed=7)
    dx = layer.backward(dy)
    layer.params["b"][...] = 0
    assert relative_error((dx * v).sum(), (dy * layer.forward(v)).sum()) < 1e-10
    assert relative_error(layer.grads["b"], dy.sum(axis=(0, 2, 3))) < 1e-10
    w[...] = u
    assert relative_error((layer.grads["w"] * u).sum(), (dy * layer.forward(x)).sum()) < 1e-10


# --- ReLU and pooling ----------------------------------------------------------------------------

def test_relu_forward_is_in_place():
    x = np.array([[-2.0, 0.0, 3.0]])
    y = ReLU().forward(x)
    assert y is x and np.array_equal(y, [[0, 0, 3]])


def test_relu_backward():
    check_gradients(ReLU(), distinct(2, 3, 4, 5))


@pytest.mark.parametrize("kernel, stride, dilation, padding", POOLS)
def test_pool_forward(kernel, stride, dilation, padding):
    for H, W in ((8, 6), (7, 9)):
        x = random(2, 3, H, W) - 5                 # negative: padding must never win
        y = MaxPool2d(kernel, stride, dilation, padding).forward(x)
        assert np.array_equal(y, naive_pool(x, kernel, stride, dilation, padding))


@pytest.mark.parametrize("train", [False, True])
def test_pool_gives_the_same_with_and_without_training(train):
    x = random(2, 3, 7, 6)
    layer = MaxPool2d(padding=(1, 1))
    assert np.array_equal(layer.forward(x, train), naive_pool(x, 2, 2, 1, (1, 1)))


@pytest.mark.parametrize("kernel, stride, dilation, padding", POOLS)
def test_pool_backward(kernel, stride, dilation, padding):
    check_gradients(MaxPool2d(kernel, stride, dilation, padding), distinct(2, 2, 5, 6) - 3)


def test_pool_leaves_its_input_alone():
    x = random(1, 2, 6, 6)
    kept = x.copy()
    layer = MaxPool2d()
    dy = np.ones_like(layer.forward(x, train=True))
    layer.backward(dy)
    assert np.array_equal(x, kept) and (dy == 1).all()


def test_pool_ties_have_one_winner():
    layer = MaxPool2d(padding=(1, 1))
    y = layer.forward(np.zeros((1, 2, 6, 4)), train=True)
    dy = random(*y.shape)
    dx = layer.backward(dy)
    assert relative_error(dx.sum(axis=(2, 3)), dy.sum(axis=(2, 3))) < 1e-12
    assert np.count_nonzero(dx) == dy.size


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


def test_dropout_backward():
    check_gradients(Dropout(0.5, seed=1), random(2, 3, 4, 5))


def test_dropout_over_relu():
    """Dropout overwrites what the ReLU below keeps; the gradient must not notice."""
    check_gradients(Sequential({"relu": ReLU(), "drop": Dropout(0.5, 3)}), distinct(2, 3, 4, 5))


# --- upsampling ----------------------------------------------------------------------------------

GRIDS = [((5, 4), (13, 9)), ((4, 6), (50, 31)), ((3, 3), (2, 3)),       # cells, size
         ((1, 4), (6, 7)), ((4, 1), (3, 5))]


def upsample(side=34):
    return BilinearUpsample(step=8, centre=0.5, input_size=side)


@pytest.mark.parametrize("cells, size", GRIDS)
def test_upsample_forward(cells, size):
    scores = random(3, *cells)
    y = upsample().forward(scores, size)
    assert y.shape == (*size, 3)
    assert np.abs(y - naive_upsample(scores, size, 8, 0.5, 34)).max() < 1e-13


@pytest.mark.parametrize("cells, size", GRIDS)
def test_upsample_backward_is_the_transpose(cells, size):
    layer, scores, dy = upsample(), random(3, *cells), random(*size, 3, seed=1)
    y = layer.forward(scores, size, train=True)
    dscores = layer.backward(dy)
    assert dscores.shape == scores.shape
    assert relative_error((dy * y).sum(), (dscores * scores).sum()) < 1e-12


@pytest.mark.parametrize("cells, size", GRIDS)
def test_upsample_backward(cells, size):
    layer, scores, dy = upsample(), random(2, *cells), random(*size, 2, seed=1)
    numeric = numerical_gradient(lambda s: (dy * layer.forward(s, size)).sum(), scores)
    layer.forward(scores, size, train=True)
    assert relative_error(layer.backward(dy), numeric) < 1e-6


@pytest.mark.parametrize("cells, size", GRIDS)
def test_upsample_preserves_constants(cells, size):
    y = upsample().forward(np.full((2, *cells), 3.7), size)
    assert np.abs(y - 3.7).max() < 1e-14


@pytest.mark.parametrize("side, H, W", [(306, 281, 500), (306, 375, 306), (98, 64, 48)])
def test_upsampled_cell_centres_are_pixel_coordinates(side, H, W):
    """Scores that hold their own cell's centre come out as each pixel's place in the input."""
    centres = 8 * np.arange(-(-side // 8) + 1) + 0.5
    row, column = np.meshgrid(centres, centres, indexing="ij")
    y = upsample(side).forward(np.stack([row, column]), (H, W))
    input_row = (np.arange(H) + 0.5) * side / H - 0.5
    input_column = (np.arange(W) + 0.5) * side / W - 0.5
    assert np.abs(y[..., 0] - input_row.clip(0.5, centres[-1])[:, None]).max() < 1e-11
    assert np.abs(y[..., 1] - input_column.clip(0.5, centres[-1])).max() < 1e-11


# --- what all layers share -----------------------------------------------------------------------

def layers(dtype=np.float64):
    return {"conv": conv(3, 4, 3, 2, 2, dtype), "conv1x1": conv(3, 4, 1, 1, 0, dtype),
            "relu": ReLU(), "pool": MaxPool2d(2, 2, 1, (1, 1)), "pool5": MaxPool2d(2, 1, 2, (1, 1)),
            "dropout": Dropout(0.5), "layer": Layer()}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", layers())
def test_dtype_follows_the_input(name, dtype):
    layer = layers(dtype)[name]
    for train in (False, True):
        y = layer.forward(random(2, 3, 6, 5).astype(dtype), train)
        assert y.dtype == dtype
    assert layer.backward(np.ones_like(y)).dtype == dtype
    for arrays in (layer.params, layer.grads):
        assert all(a.dtype == dtype for a in arrays.values())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtype_of_upsampling_follows_the_input(dtype):
    layer = upsample()
    y = layer.forward(random(3, 5, 4).astype(dtype), (9, 7), train=True)
    assert y.dtype == layer.backward(np.ones_like(y)).dtype == dtype


@pytest.mark.parametrize("name", layers())
def test_float32_is_float64_rounded(name):
    x, results = random(2, 3, 6, 5), []
    for dtype in (np.float32, np.float64):
        layer = layers()[name]
        for key in layer.params:
            layer.params[key] = layer.params[key].astype(dtype)
            layer.grads[key] = np.zeros_like(layer.params[key])
        y = layer.forward(x.astype(dtype), train=True)
        results.append((y.copy(), layer.backward(np.ones_like(y)), *layer.grads.values()))
    for single, double in zip(*results):
        assert np.abs(single - double).max() < 1e-5 * max(1, np.abs(double).max())


@pytest.mark.parametrize("name", layers())
def test_evaluating_keeps_nothing_and_backward_gives_back(name):
    layer = layers()[name]
    layer.forward(random(2, 3, 6, 5))
    assert cached_bytes(layer) == 0
    y = layer.forward(random(2, 3, 6, 5), train=True)
    assert (cached_bytes(layer) > 0) == (name != "layer")
    layer.backward(np.ones_like(y))
    assert cached_bytes(layer) == 0


def test_upsampling_keeps_nothing_when_evaluating_and_gives_back():
    layer = upsample()
    layer.forward(random(3, 5, 4), (9, 7))
    assert cached_bytes(layer) == 0
    y = layer.forward(random(3, 5, 4), (9, 7), train=True)
    assert cached_bytes(layer) > 0
    layer.backward(y)
    assert cached_bytes(layer) == 0


def test_pool_keeps_one_byte_a_cell():
    layer = MaxPool2d(padding=(1, 1))
    y = layer.forward(random(2, 3, 6, 5), train=True)
    assert cached_bytes(layer) == y.size


@pytest.mark.parametrize("name", ["conv", "conv1x1"])
def test_gradients_accumulate(name):
    layer, (x1, x2) = layers()[name], random(2, 2, 3, 6, 5)
    sums = {key: np.zeros_like(g) for key, g in layer.grads.items()}
    for x in (x1, x2):
        fresh = layers()[name]
        fresh.backward(random(*fresh.forward(x, train=True).shape, seed=8))
        sums = {key: total + fresh.grads[key] for key, total in sums.items()}
    grads = dict(layer.grads)
    for x in (x1, x2):
        layer.backward(random(*layer.forward(x, train=True).shape, seed=8))
    for key, total in sums.items():
        assert layer.grads[key] is grads[key]      # added in place: the optimiser holds this array
        assert relative_error(grads[key], total) < 1e-10


@pytest.mark.parametrize("name", ["conv", "conv1x1"])
def test_a_batch_is_its_images_one_by_one(name):
    x = random(3, 3, 6, 5)
    whole = layers()[name].forward(x)
    for b in range(3):
        assert relative_error(whole[b:b + 1], layers()[name].forward(x[b:b + 1])) < 1e-10


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


def test_sequential_backward():
    net, x = sequence(), random(1, 2, 6, 5)
    h = 1e-4                                       # shorter than the way to the nearest tie
    assert np.abs(net["conv1"].forward(x)).min() > 2 * h * np.abs(x).max()
    check_gradients(net, x, h)


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


@pytest.mark.parametrize("kernel, stride, dilation, padding", POOLS)
def test_alignment_is_the_middle_of_what_a_cell_sees(kernel, stride, dilation, padding):
    pool = MaxPool2d(kernel, stride, dilation, padding)
    net = Sequential({"conv": conv(1, 1, 3, 1, 1), "pool": pool})
    net["conv"].params["w"][...] = 1
    step, centre = net.alignment()
    for i in range(2, 4):                          # cells that see nothing of the border
        seen = [pixel for pixel in range(20)
                if net.forward(np.eye(1, 20, pixel)[None, None] * np.ones((20, 1)))[0, 0, 3, i]
                != net["conv"].params["b"][0]]
        assert (min(seen) + max(seen)) / 2 == step * i + centre
