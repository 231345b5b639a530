"""A convolution as one matrix product: the values under the kernel, laid out in columns (im2col).

Tile by tile: the columns of a whole photograph would not fit into a processor's cache.
Legend: B images, C channels, H x W pixels, k kernel size; a tile is n rows of m images, n*W cells
of each, and its matrices have these m*n*W cells side by side.
"""
import numpy as np

from .arrays import array_module, for_each

GPU_BYTES, CPU_BYTES = 2 ** 30, 2 ** 22     # of a tile's columns
CPU_CELLS = 800                             # at least: a product wants width


def tiles(y, taps):
    """[(images, rows)], slices: a few rows of a large map or several small maps, each cell once.

    y: (B, C, H, W); taps: the length of a column.  On the CPU no tile has more than a quarter of
    the images, to keep threads busy.
    """
    B, _, H, W = y.shape
    if array_module(y) is np:
        cells, most = max(CPU_CELLS, CPU_BYTES // (taps * y.itemsize)), -(-B // 4)
    else:
        cells, most = GPU_BYTES // (taps * y.itemsize), B
    n = min(H, max(1, cells // W))
    m = min(most, max(1, cells // (H * W)))
    return [(slice(b, min(b + m, B)), slice(top, min(top + n, H)))
            for b in range(0, B, m) for top in range(0, H, n)]


def columns(x, tile, kernel, dilation, padding):
    """The values of x that the kernel sees from each output cell of the tile: (C*k*k, m*n*W_out).

    x: (B, C, H, W), padded with `padding` zeros on every side.  One copy, from a view in which a
    value stands as often as the kernel sees it.
    """
    xp = array_module(x)
    images, rows = tile
    reach = (kernel - 1) * dilation
    first, last = rows.start - padding, rows.stop - padding + reach      # input rows, or beyond
    seen = x[images, :, max(first, 0):max(last, 0)]
    if padding:
        m, C, inside, W = seen.shape
        above = max(-first, 0)
        padded = xp.zeros((m, C, last - first, W + 2 * padding), x.dtype)
        padded[:, :, above:above + inside, padding:padding + W] = seen
        seen = padded
    m, C, height, width = seen.shape
    image, channel, row, cell = seen.strides
    view = xp.lib.stride_tricks.as_strided(
        seen, (C, kernel, kernel, m, height - reach, width - reach),
        (channel, dilation * row, dilation * cell, image, row, cell))
    return view.reshape(C * kernel * kernel, -1)                         # (C*k*k, m*n*W_out)


def read(y, tile):
    """The tile's cells of y (B, C, H, W): a matrix (C, m*n*W)."""
    images, rows = tile
    return y[images, :, rows].swapaxes(0, 1).reshape(y.shape[1], -1)     # (C, m*n*W)


def write(y, tile, values):
    """Put the matrix `values` (C, m*n*W) into the tile's cells of y (B, C, H, W)."""
    images, rows = tile
    cells = y[images, :, rows].swapaxes(0, 1)                            # (C, m, n, W), a view
    cells[...] = values.reshape(cells.shape)                             # (C, m, n, W)


def sum_of(function, tiles, x):
    """The sum of function(tile), an array, over all tiles; the work is on the array x.

    On the CPU in four threads' worth of parts, however many threads there are: the order in which
    floats are added stays the same.
    """
    def part(some):
        total = function(some[0])
        for tile in some[1:]:
            total += function(tile)
        return total

    parts = min(4 if array_module(x) is np else 1, len(tiles))
    return sum(for_each(part, [tiles[i::parts] for i in range(parts)], x, products=True))
