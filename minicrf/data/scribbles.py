"""Weak labels made of full ones: a line in each region, or a dot; all other pixels are void.

Legend: H x W pixels; a region is a connected set of pixels of one label.
"""
import numpy as np
import scipy.ndimage

from ..inputs import VOID

ANGLES = np.pi * np.arange(32) / 16
DIRECTIONS = np.stack([np.sin(ANGLES), np.cos(ANGLES)])          # (2, 32)


def weaken(labels, clicks=False):
    """Labels (H, W) uint8 with one scribble in each region, or one click; VOID everywhere else."""
    weak = np.full_like(labels, VOID)
    for label in np.setdiff1d(labels, VOID):
        regions, _ = scipy.ndimage.label(labels == label)
        for number, box in enumerate(scipy.ndimage.find_objects(regions), 1):
            inside = np.pad(regions[box] == number, 1)           # a picture's border is one too
            depth = scipy.ndimage.distance_transform_edt(inside)[1:-1, 1:-1]
            weak[box][_dot(depth) if clicks else _line(depth)] = label
    return weak


def _dot(depth):
    """A region's deepest pixel and its neighbours in it; depth: distances to its outside."""
    dot = np.zeros(depth.shape, bool)
    dot[np.unravel_index(depth.argmax(), depth.shape)] = True
    return scipy.ndimage.binary_dilation(dot) & (depth > 0)


def _line(depth):
    """The middle half of the longest straight line through a region's deepest pixel: (y, x)."""
    deepest = np.unravel_index(depth.argmax(), depth.shape)
    padded = np.pad(depth, 1)                                    # a frame of zeros, to end at
    steps = np.arange(1, sum(depth.shape))
    ways = np.rint(np.reshape(deepest, (2, 1, 1)) + steps * DIRECTIONS[:, :, None]).astype(int)
    last = np.reshape(padded.shape, (2, 1, 1)) - 1
    clear = padded[tuple(np.clip(ways + 1, 0, last))] > 1        # off the region's outline
    reach = np.logical_and.accumulate(clear, axis=1).sum(axis=1)
    back = np.roll(reach, len(reach) // 2)                       # the opposite direction's
    best = (reach + back).argmax()
    steps = np.arange(-(back[best] // 2), reach[best] // 2 + 1)
    line = np.reshape(deepest, (2, 1)) + steps * DIRECTIONS[:, best, None]
    return tuple(np.rint(line).astype(int))
