"""A convolution as one matrix product: the values under the kernel, laid out in columns (im2col).

Block by block: the columns of a whole photograph would not fit into a processor's cache.
Legend: B images, C input channels, O output channels, H x W pixels, k kernel size.
"""
import numpy as np

from .arrays import array_module, for_each


def pad(x, before, after, value=0):
    """x (..., H, W) with `before` and `after` rows and columns of `value` around it."""
    if before == after == 0:
        return x
    xp = array_module(x)
    *leading, H, W = x.shape
    padded = xp.full((*leading, H + before + after, W + before + after), value, x.dtype)
    padded[..., before:before + H, before:before + W] = x
    return padded


def block_rows(column_bytes, H_out, W_out, xp):
    """Output rows of a block: 256 MB on a GPU; on the CPU 8 MB, but 800 cells for the product."""
    cells = 2 ** 28 // column_bytes
    if xp is np:
        cells = min(cells, max(800, 2 ** 23 // column_bytes))
    return min(H_out, max(1, cells // W_out))


def column_blocks(x, kernel, dilation, padding):
    """Yield (b, cells, columns): the input values under the kernel, for a block of output cells.

    x: (B, C, H, W).  b: image; cells: slice of its flattened output map; columns: (C*k*k, n), whose
    column i holds the C x k x k values that output cell i is computed from.  A block is a few rows;
    all blocks share one buffer, so each is valid until the next one is asked for.
    """
    xp = array_module(x)
    B, C, H, W = x.shape
    if kernel == 1 and padding == 0:                                     # nothing to gather
        for b in range(B):
            yield b, slice(0, H * W), x[b].reshape(C, H * W)             # (C, n)
        return
    reach = (kernel - 1) * dilation
    H_out, W_out = H + 2 * padding - reach, W + 2 * padding - reach
    taps = C * kernel * kernel
    rows = block_rows(taps * x.itemsize, H_out, W_out, xp)
    buffer = xp.empty(taps * rows * W_out, x.dtype)
    for b in range(B):
        image = pad(x[b], padding, padding)                              # (C, H+2p, W+2p)
        for top in range(0, H_out, rows):
            n = min(rows, H_out - top)
            columns = buffer[:taps * n * W_out].reshape(C, kernel, kernel, n, W_out)

            def gather(c):
                for i in range(kernel):
                    for j in range(kernel):
                        y0, x0 = top + i * dilation, j * dilation
                        columns[c, i, j] = image[c, y0:y0 + n, x0:x0 + W_out]

            for_each(gather, [slice(0, C // 2), slice(C // 2, C)], columns)
            yield b, slice(top * W_out, (top + n) * W_out), columns.reshape(taps, n * W_out)


def correlate(x, w, dilation, padding, b=None):
    """y[., o, h, v] = b_o + sum over c, i, j of w[o, c, i, j] x[., c, h + i*delta, v + j*delta].

    x: (B, C, H, W), padded with `padding` zeros on every side; w: (O, C, k, k); delta: dilation;
    b: (O,) or None.  Returns y (B, O, H_out, W_out), H_out = H + 2 padding - (k - 1) dilation.
    """
    xp = array_module(x)
    O, _, kernel, _ = w.shape
    shrink = (kernel - 1) * dilation - 2 * padding
    y = xp.empty((len(x), O, x.shape[2] - shrink, x.shape[3] - shrink), x.dtype)
    flat = y.reshape(len(x), O, -1)                                      # a view
    for image, cells, columns in column_blocks(x, kernel, dilation, padding):
        block = flat[image, :, cells]                                    # (O, n), a view
        xp.matmul(w.reshape(O, -1), columns, out=block)                  # (O, C*k*k) @ (C*k*k, n)
        if b is not None:
            block += b[:, None]
    return y
