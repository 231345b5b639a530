"""What several test files share: random arrays, pictures, and the errors that callers get."""
import contextlib

import numpy as np
import pytest

from minicrf.inputs import VOID


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def example(h=4, w=5, n_labels=3, channels=3, seed=0):
    """Scores (h, w, L), an image (h, w, C) and labels (h, w), the first and the last void."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n_labels, (h, w))
    labels.flat[[0, -1]] = VOID
    scores = rng.standard_normal((h, w, n_labels))
    return scores, rng.uniform(0, 255, (h, w, channels)), labels


def drawn(h=48, w=64):
    """Noisy scores (h, w, 3), an image of shaded discs (h, w, 3) and the true labels (h, w)."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:h, :w]
    labels = np.zeros((h, w), dtype=int)
    labels[(x - 20) ** 2 + (y - 20) ** 2 < 150] = 1
    labels[(x - 44) ** 2 + (y - 30) ** 2 < 130] = 2
    colours = np.array([[70, 110, 60], [160, 100, 80], [110, 120, 150]])
    image = colours[labels] + (0.5 * x + 0.3 * y)[..., None] + rng.normal(0, 12, (h, w, 3))
    return np.eye(3)[labels] + rng.standard_normal((h, w, 3)), image, labels


@contextlib.contextmanager
def refused(message, error=ValueError):
    """An error of that kind and text, in one line."""
    with pytest.raises(error, match=message) as raised:
        yield
    assert "\n" not in str(raised.value)
