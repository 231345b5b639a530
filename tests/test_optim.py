"""Momentum SGD against steps worked out by hand."""
import numpy as np
import pytest

from minicrf.gradcheck import relative_error
from minicrf.optim import SGD


def optimiser(momentum=0.5, dtype=np.float64):
    """One weight that decays and one bias that does not."""
    params = {"w": np.array([1.0, -2.0], dtype), "b": np.array([4.0], dtype)}
    grads = {key: np.zeros_like(p) for key, p in params.items()}
    return SGD(params, grads, {"w": 0.1, "b": 0.2}, {"w": 0.5, "b": 0}, momentum)


def step(sgd, w, b):
    sgd.grads["w"] += np.array(w, sgd.grads["w"].dtype)
    sgd.grads["b"] += np.array(b, sgd.grads["b"].dtype)
    sgd.step()


def test_three_steps_by_hand():
    sgd = optimiser()
    step(sgd, [1, 0], [1])
    # w: v = -0.1 ([1, 0] + 0.5 [1, -2]) = [-0.15, 0.1];    b: v = -0.2
    assert relative_error(sgd.params["w"], [0.85, -1.9]) < 1e-14
    assert relative_error(sgd.params["b"], [3.8]) < 1e-14
    step(sgd, [0, 0], [0])
    # w: v = 0.5 v - 0.1 * 0.5 [0.85, -1.9] = [-0.1175, 0.145];    b: v = -0.1
    assert relative_error(sgd.params["w"], [0.7325, -1.755]) < 1e-14
    assert relative_error(sgd.params["b"], [3.7]) < 1e-14
    step(sgd, [-1, 2], [-1])
    # w: v = 0.5 v - 0.1 ([-1, 2] + 0.5 [0.7325, -1.755]) = [0.004625, -0.03975];    b: v = 0.15
    assert relative_error(sgd.velocity["w"], [0.004625, -0.03975]) < 1e-12
    assert relative_error(sgd.params["w"], [0.737125, -1.79475]) < 1e-14
    assert relative_error(sgd.params["b"], [3.85]) < 1e-14


def test_updates_in_place_and_zeroes_gradients():
    sgd = optimiser()
    arrays = [each[key] for each in (sgd.params, sgd.grads, sgd.velocity) for key in ("w", "b")]
    step(sgd, [1, 2], [3])
    after = [each[key] for each in (sgd.params, sgd.grads, sgd.velocity) for key in ("w", "b")]
    assert all(a is b for a, b in zip(arrays, after))
    assert not sgd.grads["w"].any() and not sgd.grads["b"].any()         # for the next sum


def test_scale_multiplies_every_rate_and_leaves_the_momentum_already_gathered():
    sgd = optimiser()
    step(sgd, [1, 0], [1])                         # w: v = [-0.15, 0.1];    b: v = -0.2
    sgd.scale = 0.1
    step(sgd, [1, 0], [1])                         # w: v = 0.5 v - 0.01 ([1, 0] + 0.5 w)
    assert relative_error(sgd.velocity["w"], [-0.08925, 0.0595]) < 1e-12
    assert relative_error(sgd.velocity["b"], [-0.12]) < 1e-14


def test_momentum_is_the_papers_by_default():
    assert SGD({}, {}, {}, {}).momentum == 0.9 and SGD({}, {}, {}, {}).scale == 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtype_stays(dtype):
    sgd = optimiser(dtype=dtype)
    step(sgd, [1, 2], [3])
    for arrays in (sgd.params, sgd.grads, sgd.velocity):
        assert all(a.dtype == dtype for a in arrays.values())
