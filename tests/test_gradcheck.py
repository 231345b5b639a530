"""The checker itself: it must accept right backward methods and reject wrong ones; its program."""
import re
import subprocess
import sys

import numpy as np
import pytest

from minicrf import gradcheck
from minicrf.programs import exercises
from minicrf.gradcheck import numerical_gradient, relative_error

rng = np.random.default_rng(1)
X, W, B, G = (rng.standard_normal(shape) for shape in ((5, 4), (4, 4), (4,), (5, 4)))


def loss(x, w, b):
    """<G, tanh(x W + b)>: smooth, with a square W so that a forgotten transpose keeps its shape."""
    return (G * np.tanh(x @ w + b)).sum()


def backward(x, w, b):
    """The right gradients, by name."""
    dz = G * (1 - np.tanh(x @ w + b) ** 2)                               # (5, 4)
    return {"x": dz @ w.T, "w": x.T @ dz, "b": dz.sum(axis=0)}


def errors(gradients):
    """Relative error of each claimed gradient against finite differences."""
    return {"x": relative_error(gradients["x"], numerical_gradient(lambda x: loss(x, W, B), X)),
            "w": relative_error(gradients["w"], numerical_gradient(lambda w: loss(X, w, B), W)),
            "b": relative_error(gradients["b"], numerical_gradient(lambda b: loss(X, W, b), B))}


DZ = G * (1 - np.tanh(X @ W + B) ** 2)
WRONG = {
    "sign flipped": ("x", -DZ @ W.T),
    "transpose forgotten": ("x", DZ @ W),
    "derivative of tanh dropped": ("w", X.T @ G),
    "term dropped": ("w", X[1:].T @ DZ[1:]),
    "summed over the wrong axis": ("b", DZ[:4].sum(axis=1)),
    "one element off by a thousandth": ("w", X.T @ DZ * (1 + 1e-3 * np.eye(4))),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_wrong_backward_fails(mistake):
    name, wrong = WRONG[mistake]
    found = errors({**backward(X, W, B), name: wrong})
    assert found.pop(name) > 1e-4
    assert max(found.values()) < 1e-6              # and the other two are not blamed


def test_differences_are_central():
    x = np.array([3.0, -1.0])                      # (x+h)^2 - (x-h)^2 = 4xh: no error but rounding
    assert relative_error(numerical_gradient(lambda x: (x ** 2).sum(), x, h=0.1), 2 * x) < 1e-12
    cubic = numerical_gradient(lambda x: (x ** 3).sum(), x, h=0.1)       # 3 x^2 + h^2
    assert relative_error(cubic, 3 * x ** 2 + 0.01) < 1e-12


def test_x_is_restored_to_the_last_bit_and_changed_in_place():
    x = np.random.default_rng(2).standard_normal((3, 2, 2))
    before, seen = x.copy(), []

    def f(argument):
        seen.append(argument is x)
        return (x ** 2).sum()                      # reads the array that is changed in place

    assert relative_error(numerical_gradient(f, x), 2 * before) < 1e-6
    assert np.array_equal(x, before) and all(seen) and len(seen) == 2 * x.size


def test_every_shape():
    for shape in ((), (1,), (2, 0), (2, 1, 3)):
        x = np.full(shape, 0.5)
        gradient = numerical_gradient(lambda x: np.sin(x).sum(), x)
        assert gradient.shape == shape and gradient.dtype == np.float64
        assert relative_error(gradient, np.cos(x)) < 1e-6


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64, bool])
def test_anything_but_float64_is_refused(dtype):
    with pytest.raises(TypeError, match=f"found dtype {np.dtype(dtype)}, expected float64"):
        numerical_gradient(lambda x: x.sum(), np.ones(3, dtype))


def test_relative_error_takes_the_worst_element():
    a, b = np.array([1.0, 2.0, 4.0]), np.array([1.0, 2.0, 5.0])
    assert relative_error(a, b) == relative_error(b, a) == pytest.approx(1 / 9)
    assert relative_error(a, -a) == 1
    assert relative_error(a, a) == relative_error(np.empty(0), np.empty(0)) == 0
    assert relative_error(np.zeros(2), np.full(2, 1e-16)) == pytest.approx(1e-8)   # floor of 1e-8


@pytest.mark.filterwarnings("ignore:invalid value")
def test_relative_error_lets_no_nan_through():
    assert not relative_error(np.array([1.0, np.nan]), np.ones(2)) < 1e-6
    assert not relative_error(np.array([np.inf]), np.array([np.inf])) < 1e-6


def test_relative_error_refuses_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match=r"found shapes \(3,\) and \(1, 3\)"):
        relative_error(np.ones(3), np.ones((1, 3)))


# --- the program ----------------------------------------------------------------------------------

def test_everything_passes_and_every_parameter_is_in_the_table(capsys):
    assert gradcheck.main([]) == 0
    table = capsys.readouterr().out
    assert "FAIL" not in table and "0 failed" in table
    for name in ("Conv2d 3x3: dx", "Conv2d 3x3: dw", "Conv2d 3x3: db", "ReLU: dx", "Dropout: dx",
                 "BilinearUpsample: dx", "softmax_loss: dz", "exact: dscores", "exact: dw",
                 "exact: dlog_sigma_position", "exact: dlog_sigma_bilateral",
                 "joint training"):
        assert re.search(rf"{name}.*\d+ .*e-\d\d +pass", table), name


def test_break_shows_which_row_fails(capsys, monkeypatch):
    monkeypatch.setattr(gradcheck.run, "__defaults__", ((gradcheck.check_losses,),))
    assert gradcheck.main(["--break", "loss-truth-dropped"]) == 1
    shown = capsys.readouterr().out
    assert re.search(r"softmax_loss: dz +24 .*FAIL", shown) and "1 failed" in shown
    assert "q[pixels, y] -= 1 -> pass" in shown


def test_a_row_of_nan_fails(capsys):
    nan = np.full(3, float("nan"))
    assert gradcheck.run([lambda: iter([("row", nan, nan)])]) == ["row"]


def test_help_lists_the_bugs_and_runs_without_a_warning():
    command = [sys.executable, "-W", "error", "-m", "minicrf.gradcheck", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert all(name in done.stdout for name in exercises.BUGS)
