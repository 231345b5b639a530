"""Layers with their backward methods written by hand: what the network of Sec. 4.1 is made of.

`forward(x, train)` keeps, when training, the least that backward needs; `backward(dy)` uses it up,
returns dx = dLoss/dx and adds into `grads`.  dtype and device follow the input.
Legend: B images, C input channels, O output channels, H x W pixels, k kernel size.
"""
import numpy as np

from .arrays import array_module, for_each, pieces, product
from .im2col import columns, read, sum_of, tiles, write


class Layer:
    """A layer that leaves its input as it is; the others differ from it where they must.

    kernel, stride, dilation and padding (before, after): the geometry of the output cells.
    """
    kernel, stride, dilation, padding = 1, 1, 1, (0, 0)

    def __init__(self):
        self.params, self.grads = {}, {}

    def forward(self, x, train=False):
        """x (B, C, H, W) -> y (B, O, H_out, W_out)."""
        return x

    def backward(self, dy):
        """dy, of y's shape -> dx, of x's; adds dLoss/dparams into grads."""
        # forward: y = x
        return dy

    def output_size(self, size):
        """Output height (or width) for an input height (or width) of `size` cells."""
        return (size + sum(self.padding) - (self.kernel - 1) * self.dilation - 1) // self.stride + 1


class Conv2d(Layer):
    """Convolution with holes (à trous), stride 1: kernel taps `dilation` cells apart.

    params: w (O, C, k, k), drawn as He et al. (2015), and b (O,), zero.
    """

    def __init__(self, channels_in, channels_out, kernel, dilation=1, padding=0, rng=None,
                 dtype=np.float32):
        super().__init__()
        self.kernel, self.dilation, self.padding = kernel, dilation, (padding, padding)
        rng = rng or np.random.default_rng(0)
        w = rng.standard_normal((channels_out, channels_in, kernel, kernel), dtype)
        w *= dtype(np.sqrt(2 / (channels_in * kernel * kernel)))
        self.params = {"w": w, "b": np.zeros(channels_out, dtype)}
        self.grads = {name: np.zeros_like(p) for name, p in self.params.items()}
        self.needs_dx = True     # False spares the first layer the gradient of the photograph

    def forward(self, x, train=False):
        """x (B, C, H, W) -> y (B, O, H_out, W_out)."""
        if train:
            self.x = x
        w, b = self.params["w"], self.params["b"]
        O, C, k, _ = w.shape
        y = array_module(x).empty((len(x), O, *map(self.output_size, x.shape[2:])), x.dtype)

        def multiply(tile):
            under = columns(x, tile, k, self.dilation, self.padding[0])          # (C*k*k, m*n*W)
            write(y, tile, w.reshape(O, -1) @ under + b[:, None])

        for_each(multiply, tiles(y, taps=C * k * k), y, products=True)
        return y

    def backward(self, dy):
        """dy (B, O, H_out, W_out) -> dx (B, C, H, W), or None where needs_dx is False."""
        x, self.x = self.x, None
        w, dw = self.params["w"], self.grads["w"]
        O, C, k, _ = w.shape

        # forward: y = w columns(x) + b
        self.grads["b"] += dy.reshape(len(dy), O, -1).sum(axis=2).sum(axis=0)
        if not self.needs_dx:
            def dw_of(tile):
                under = columns(x, tile, k, self.dilation, self.padding[0])      # (C*k*k, m*n*W)
                return under @ read(dy, tile).T                          # faster than dy under^T

            dw += sum_of(dw_of, tiles(dy, taps=C * k * k), dy).T.reshape(w.shape)
            return None

        # Input cell c reaches output cell c - tap: dx is dy correlated with the kernel turned by
        # 180 degrees, channels exchanged, padded so that sizes come out as they went in.  The same
        # columns of dy, times x, make the turned kernel's gradient.
        dx = array_module(x).empty_like(x)
        turned = w[:, :, ::-1, ::-1].transpose(1, 0, 2, 3).reshape(C, -1)        # (C, O*k*k)

        def dw_and_dx_of(tile):
            reached = columns(dy, tile, k, self.dilation,                # (O*k*k, m*n*W)
                              (k - 1) * self.dilation - self.padding[0])
            write(dx, tile, turned @ reached)
            return reached @ read(x, tile).T

        dturned = sum_of(dw_and_dx_of, tiles(dx, taps=O * k * k), dx).reshape(O, k, k, C)
        dw += dturned[:, ::-1, ::-1].transpose(0, 3, 1, 2)               # (O, C, k, k)
        return dx


class ReLU(Layer):
    """y = max(x, 0), in place: the layer before needs its input for backward, never its output."""

    def forward(self, x, train=False):
        """x -> y, any shape; overwrites x."""
        def rectify(piece):
            array_module(x).maximum(piece, 0, out=piece)

        for_each(lambda p: rectify(x[p]), pieces(x), x)
        if train:
            self.y = x           # the next layer keeps the same array: no memory of its own
        return x

    def backward(self, dy):
        """dy -> dx, any shape; overwrites dy."""
        y, self.y = self.y, None

        # forward: y = max(x, 0)
        def pass_on(dy, y):
            array_module(dy).multiply(dy, y > 0, out=dy)

        for_each(lambda p: pass_on(dy[p], y[p]), pieces(dy), dy)
        return dy


class MaxPool2d(Layer):
    """Maximum over k x k taps, `dilation` cells apart; `padding` (before, after) counts as -inf."""

    def __init__(self, kernel=2, stride=2, dilation=1, padding=(0, 0)):
        super().__init__()
        self.kernel, self.stride, self.dilation, self.padding = kernel, stride, dilation, padding

    def taps(self, padded, H_out, W_out):
        """Each tap's view (..., H_out, W_out) of padded (..., H+p, W+p)."""
        for i in range(self.kernel):
            for j in range(self.kernel):
                y0, x0 = i * self.dilation, j * self.dilation
                yield padded[..., y0:y0 + self.stride * (H_out - 1) + 1:self.stride,
                             x0:x0 + self.stride * (W_out - 1) + 1:self.stride]

    def forward(self, x, train=False):
        """x (B, C, H, W) -> y (B, C, H_out, W_out)."""
        xp = array_module(x)
        H_out, W_out = map(self.output_size, x.shape[2:])
        planes = x.reshape(-1, *x.shape[2:])                             # (B*C, H, W)
        y = xp.empty((len(planes), H_out, W_out), x.dtype)
        winner = xp.zeros(y.shape, xp.uint8) if train else None
        around = ((0, 0), self.padding, self.padding)

        def pool(p):
            padded = xp.pad(planes[p], around, constant_values=-np.inf)
            taps = self.taps(padded, H_out, W_out)
            best, won = y[p], winner[p] if train else None               # views
            best[...] = next(taps)
            for number, tap in enumerate(taps, start=1):
                tap = xp.ascontiguousarray(tap)     # strided as it is, read it only once
                if train:                           # the last to exceed: ties go to the first tap
                    xp.maximum(won, (tap > best) * xp.uint8(number), out=won)
                xp.maximum(best, tap, out=best)

        for_each(pool, pieces(planes), planes)
        if train:
            self.winner, self.shape_in = winner, x.shape
        return y.reshape(*x.shape[:2], H_out, W_out)

    def backward(self, dy):
        """dy (B, C, H_out, W_out) -> dx (B, C, H, W)."""
        xp = array_module(dy)
        winner, self.winner = self.winner, None
        _, _, H, W = self.shape_in
        before, after = self.padding
        dy = dy.reshape(winner.shape)                                    # (B*C, H_out, W_out)
        dx = xp.empty((len(dy), H, W), dy.dtype)

        def scatter(p):
            padded = xp.zeros((len(dx[p]), before + H + after, before + W + after), dy.dtype)
            # forward: y = x at the winning tap
            for number, tap in enumerate(self.taps(padded, *dy.shape[1:])):
                tap += dy[p] * (winner[p] == number)
            dx[p] = padded[:, before:before + H, before:before + W]

        for_each(scatter, pieces(dx), dx)
        return dx.reshape(self.shape_in)


class Dropout(Layer):
    """Zeroes each value with probability `rate` in training, and scales up the others to make up.

    The mask is drawn from `seed` alone, which training sets anew at each step: a resumed run draws
    the masks of one that never stopped.  The output that a ReLU below has kept is overwritten: what
    it then takes for inactive is what was dropped, whose gradient is zero.
    """

    def __init__(self, rate=0.5, seed=0):
        super().__init__()
        self.rate, self.seed = rate, seed

    def forward(self, x, train=False):
        """x -> y, any shape; overwrites x when training."""
        if train and self.rate > 0:
            xp = array_module(x)
            rng = (np.random.default_rng(self.seed) if xp is np else      # the same on every GPU:
                   xp.random.Generator(xp.random.Philox4x3210(self.seed, size=2 ** 16)))
            self.kept = rng.random(x.shape, dtype=xp.float32) >= self.rate
            x *= self.kept
            x *= x.dtype.type(1 / (1 - self.rate))
        return x

    def backward(self, dy):
        """dy -> dx, any shape; overwrites dy."""
        if self.rate > 0:
            kept, self.kept = self.kept, None
            # forward: y = x kept / (1 - rate)
            dy *= kept
            dy *= dy.dtype.type(1 / (1 - self.rate))
        return dy


class BilinearUpsample(Layer):
    """Scores on the network's cells -> scores at every pixel of the original image.

    step, centre: cell i lies at input pixel step * i + centre (Sequential.alignment).
    input_size: side of the square that the image was resized to, in pixels.
    """

    def __init__(self, step, centre, input_size):
        super().__init__()
        self.step, self.centre, self.input_size = step, centre, input_size

    def matrix(self, pixels, cells, like):
        """R (pixels, cells), two entries a row: the interpolation weights along one direction.

        like: an array whose dtype and device R shall have.  Beyond the outermost cells the border's
        score holds.
        """
        x = (np.arange(pixels) + 0.5) * self.input_size / pixels - 0.5   # original to input pixel
        at = np.clip((x - self.centre) / self.step, 0, cells - 1)        # input pixel to cell
        R = np.maximum(0, 1 - abs(at[:, None] - np.arange(cells)))       # a tent around each cell
        return array_module(like).asarray(R.astype(like.dtype))

    def forward(self, scores, size, train=False):
        """scores (L, h, w), size (H, W) -> (H, W, L): labels last, as the CRF has them."""
        L, h, w = scores.shape
        H, W = size
        R_y, R_x = self.matrix(H, h, scores), self.matrix(W, w, scores)
        S = scores.transpose(1, 2, 0).reshape(h, w * L)                  # (h, w*L)
        if train:
            self.R_y, self.R_x = R_y, R_x
        return product(R_x, product(R_y, S).reshape(H, w, L))            # (W, w) @ (H, w, L)

    def backward(self, dy):
        """dy (H, W, L) -> dscores (L, h, w)."""
        H, _, L = dy.shape
        R_y, R_x, self.R_y, self.R_x = self.R_y, self.R_x, None, None
        # forward: Y = R_y S R_x^T
        dS = product(R_y.T, product(R_x.T, dy).reshape(H, -1))           # (h, w*L)
        return dS.reshape(R_y.shape[1], R_x.shape[1], L).transpose(2, 0, 1)


class Sequential(Layer):
    """Layers by name, one after the other; params and grads are theirs, under "name_key"."""

    def __init__(self, layers):
        self.layers = dict(layers)

    def __getitem__(self, name):
        return self.layers[name]

    @property
    def params(self):
        return {f"{name}_{key}": p for name, layer in self.layers.items()
                for key, p in layer.params.items()}

    @property
    def grads(self):
        return {f"{name}_{key}": g for name, layer in self.layers.items()
                for key, g in layer.grads.items()}

    def forward(self, x, train=False):
        """x (B, C, H, W) -> y (B, O, h, w): each layer's output is the next one's input."""
        for layer in self.layers.values():
            x = layer.forward(x, train)
        return x

    def backward(self, dy):
        """dy (B, O, h, w) -> dx (B, C, H, W), or None where the first layer needs no dx."""
        # forward: y = last(... second(first(x)))
        for layer in reversed(self.layers.values()):
            dy = layer.backward(dy)
        return dy

    def output_size(self, size):
        for layer in self.layers.values():
            size = layer.output_size(size)
        return size

    def alignment(self):
        """(step, centre), in input pixels: output cell i is centred at step * i + centre.

        A layer's output cell i: amid inputs stride * i - padding + dilation * (0 .. kernel - 1).
        """
        step, centre = 1, 0.0
        for layer in self.layers.values():
            centre += step * ((layer.kernel - 1) * layer.dilation / 2 - layer.padding[0])
            step *= layer.stride
        return step, centre
