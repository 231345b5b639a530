"""The damped update against its two equations; its way back is in gradcheck."""
import numpy as np
import pytest
from reference import damped_marginals

from minicrf.losses import softmax
from minicrf.marginals import marginals


def example(n_labels, scale, seed=0):
    """Logits z and earlier marginals, (20, L)."""
    rng = np.random.default_rng(seed)
    return scale * rng.standard_normal((20, n_labels)), softmax(rng.standard_normal((20, n_labels)))


@pytest.mark.parametrize("n_labels", [1, 2, 21, 150])
@pytest.mark.parametrize("scale", [0, 1, 100])
@pytest.mark.parametrize("c", [1e-3, 1, 20])
def test_both_equations_hold(n_labels, scale, c):
    z, q_old = example(n_labels, scale)
    kept = z.copy(), q_old.copy()
    q = marginals(z + c * q_old, c)
    np.testing.assert_allclose(q, damped_marginals(z + c * q_old, c), atol=1e-12)
    np.testing.assert_allclose(q.sum(axis=1), 1, rtol=1e-14)
    with np.errstate(divide="ignore"):
        shift = z + c * q_old - np.log(q) - c * q                        # lambda, for each label
    for row, seen in zip(shift, q > 1e-300):
        assert np.ptp(row[seen]) < 1e-9
    np.testing.assert_array_equal(z, kept[0])
    np.testing.assert_array_equal(q_old, kept[1])


def test_no_damping_is_the_softmax():
    for scale in (3, 300):                       # 300: exp alone would overflow
        z, q_old = example(5, scale)
        np.testing.assert_allclose(marginals(z, 0), softmax(z), rtol=1e-13)


@pytest.mark.parametrize("c", [1, 20])
def test_float32_comes_close(c):
    z, q_old = example(21, 10)
    q = marginals((z + c * q_old).astype(np.float32), c)
    assert q.dtype == np.float32
    np.testing.assert_allclose(q, marginals(z + c * q_old, c), atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("largest", [1e6, 1e30])
@pytest.mark.parametrize("c", [0., 2.])
def test_extreme_and_forbidden_logits(largest, c, dtype):
    z = np.array([[largest, 0, -largest], [-np.inf, 0, 0], [-largest] * 3, [-np.inf, -np.inf, 5]])
    with np.errstate(all="raise", under="ignore"):
        q = marginals(z.astype(dtype), c)
    np.testing.assert_allclose(q, [[1, 0, 0], [0, .5, .5], [1 / 3] * 3, [0, 0, 1]], atol=1e-6)
    assert (q[np.isinf(z)] == 0).all()
