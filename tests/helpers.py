"""What several test files share: random arrays, and the errors that callers get."""
import contextlib

import numpy as np
import pytest


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


@contextlib.contextmanager
def refused(message, error=ValueError):
    """An error of that kind and text, in one line."""
    with pytest.raises(error, match=message) as raised:
        yield
    assert "\n" not in str(raised.value)
