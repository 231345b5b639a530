"""The same code on device arrays: each piece against NumPy, on CuPy where there is a GPU.

It always runs on a strict stand-in for CuPy too, which also counts what makes the host wait.
Pictures have even sides: on odd ones the middle pixel lies where simplices of the lattice meet, and
which of them it falls into is a matter of rounding.
"""
import pathlib
import re
import types

import numpy as np
import pytest
import run_voc
import strict_cupy

import minicrf
from minicrf import DenseCRF, arrays, layers, losses, training, vgg
from minicrf.results import checkpoints, evaluation
from minicrf.programs import gpu as probing
from minicrf.programs.gpu import gpu_available
from minicrf.arrays import array_module, to_device, to_host
from minicrf.kernels import GaussianKernel
from minicrf.inputs import VOID
from minicrf.optim import SGD
from minicrf.permutohedral import PermutohedralLattice
from minicrf.scores import scores_from_labels, scores_from_probabilities

REAL = gpu_available()
TOLERANCE = {np.dtype(np.float64): 1e-10, np.dtype(np.float32): 1e-4}
N_CLASSES = 4

dtypes = pytest.mark.parametrize("dtype", [np.float64, np.float32])


@pytest.fixture
def stand_in(monkeypatch):
    """The package finds the stand-in where it looks for CuPy."""
    monkeypatch.setattr(arrays, "cupy", strict_cupy.cupy)
    monkeypatch.setattr(arrays, "cupyx", strict_cupy.cupyx, raising=False)
    assert gpu_available()


@pytest.fixture(params=["stand-in", pytest.param("cupy", marks=pytest.mark.skipif(
    not REAL, reason="no CUDA device with cupy"))])
def xp(request):
    """Each module of device arrays that can be had."""
    if request.param == "stand-in":
        request.getfixturevalue("stand_in")
    return arrays.cupy


def gpu(x):
    return to_device(x, "gpu")


def match(found, expected):
    """A device array equals a NumPy array, relative to the largest value, in the same dtype."""
    assert array_module(found) is not np
    assert found.dtype == expected.dtype and found.shape == expected.shape
    close(to_host(found), expected)


def close(found, expected, dtype=None):
    """dtype: what it was computed in, where it is not the array's own."""
    tolerance = TOLERANCE[np.dtype(dtype or expected.dtype)]
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def normal(*shape, dtype=np.float64, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


# The stand-in itself.

@pytest.mark.parametrize("slip", [
    lambda x: x + np.ones(3), lambda x: np.ones(3) + x, lambda x: x < np.ones(3),
    lambda x: x.__iadd__(np.ones(3)), lambda x: x @ np.ones(3), lambda x: x + [1, 2, 3],
    lambda x: x[np.array([0, 1])], lambda x: x[[0, 1]], lambda x: x[np.ones(3, bool)],
    lambda x: x.__setitem__(slice(None), np.ones(3)), lambda x: x + np.array(1.0),
    lambda x: np.asarray(x), lambda x: np.exp(x), lambda x: np.stack([x]), lambda x: np.sum(x),
    lambda x: x.max(initial=0), lambda x: x.sum(where=x > 0), hash, range,
    lambda x: setattr(x, "name", 1), lambda x: array_module(x).exp(np.ones(3)),
    lambda x: array_module(x).where(np.ones(3, bool), x, 0), lambda x: array_module(x).errstate(),
    lambda x: array_module(x).concatenate([x, np.ones(3)])])
def test_the_stand_in_refuses_what_belongs_to_numpy(stand_in, slip):
    x = gpu(np.ones(3))
    with pytest.raises((TypeError, AttributeError)):
        slip(x)


def test_the_stand_in_offers_only_what_cupy_has():
    cupy = pytest.importorskip("cupy")          # imports without a device
    sparse = pytest.importorskip("cupyx.scipy.sparse")
    assert [name for name in vars(strict_cupy.cupy) if not hasattr(cupy, name)] == []
    for mine, theirs in ((strict_cupy.ndarray, cupy.ndarray),
                         (strict_cupy.csr_matrix, sparse.csr_matrix),
                         (strict_cupy.Generator, cupy.random.Generator)):
        offered = {name for name in vars(mine) if not name.startswith("_")}
        assert {name for name in offered if not hasattr(theirs, name)} == set()
    assert issubclass(cupy.cuda.memory.OutOfMemoryError, MemoryError)


def test_the_package_uses_only_what_the_stand_in_offers():
    package = pathlib.Path(minicrf.__file__).parent
    text = "\n".join(file.read_text("utf-8") for file in package.rglob("*.py"))
    used = set(re.findall(r"\b(?:xp|array_module\(\w+\))\.([a-z]\w+)", text))
    assert {"maximum", "concatenate"} < used <= set(vars(strict_cupy.cupy))


def test_data_come_back_as_they_went(xp):
    x = normal(3, 4)
    there = gpu(x)
    assert array_module(there) is xp and gpu(there) is there
    x_before, x[:] = x.copy(), 0                # the device has a copy of its own
    assert np.array_equal(to_host(there), x_before)
    assert to_device([1, 2], "gpu").shape == (2,) and gpu_available()


# Whether a GPU can be used.

@pytest.mark.parametrize("name, error", [
    ("ones", ImportError("libcublas.so.12: cannot open shared object file\nand more")),
    ("arange", RuntimeError("CuPy failed to load libnvrtc.so.12"))])
def test_a_gpu_that_fails_is_one_line(stand_in, monkeypatch, capsys, tmp_path, name, error):
    def fail(*args, **kwargs):
        raise error

    broken = types.ModuleType("cupy")
    vars(broken).update(vars(strict_cupy.cupy), **{name: fail})
    monkeypatch.setattr(arrays, "cupy", broken)
    monkeypatch.setattr(run_voc, "choose_device", probing.choose_device)  # conftest.py hides it
    line = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    assert not gpu_available() and probing.gpu_failure() == line
    options = ["--stage", "predict", "--weights", "none.npz", "--image", str(tmp_path)]
    assert run_voc.main([*options, "--device", "gpu"]) == 2
    assert capsys.readouterr().err == (
        f"run_voc.py: --device: found gpu, but {line}; expected cpu or auto\n")
    run_voc.main(options)                       # --device auto
    assert capsys.readouterr().out.startswith(f"--device auto: on the cpu, as {line}\n")


def test_a_gpu_is_tried_without_settling_tf32(rounded_products):
    assert gpu_available()
    assert rounded_products == [False]          # CuPy reads CUPY_TF32 at a float32 product


# --tf32.

@pytest.fixture
def rounded_products(stand_in, monkeypatch):
    """Products of float32 matrices round their factors to 10 bits; which of all products did."""
    product, rounded = strict_cupy.ndarray.__matmul__, []

    def round_off(x):
        bits = x._host.astype(np.float32).view(np.uint32) + np.uint32(1 << 12)
        return strict_cupy.ndarray((bits & np.uint32(0xffffe000)).view(np.float32))

    def multiply(a, b):
        rounded.append(a.dtype == b.dtype == np.float32)
        return product(*map(round_off, (a, b)) if rounded[-1] else (a, b))

    monkeypatch.setattr(strict_cupy.ndarray, "__matmul__", multiply)
    return rounded


def test_tf32_rounds_convolutions_and_no_more(rounded_products):
    def both(function):
        """The error of function(device), beside the CPU's, relative to the largest value."""
        expected, found = function("cpu"), to_host(function("gpu"))
        return np.abs(found - expected).max() / np.abs(expected).max()

    def convolve(device):
        layer = conv(3, 1, 1, dtype=np.float32)
        vgg.move(layers.Sequential({"layer": layer}), device)
        return layer.forward(to_device(normal(2, 2, 5, 6, dtype=np.float32), device))

    def upsample(device, back=False):
        layer = layers.BilinearUpsample(8, 0.5, 24)
        scores, dy = normal(3, 3, 3, dtype=np.float32), normal(7, 5, 3, dtype=np.float32)
        y = layer.forward(to_device(scores, device), (7, 5), train=True)
        return layer.backward(to_device(dy, device)) if back else y

    def diagonal(device):
        return PermutohedralLattice(to_device(normal(60, 5, dtype=np.float32), device)).diagonal

    def marginals(device):
        return losses.softmax(to_device(normal(9, 4, dtype=np.float32), device))

    assert both(convolve) > 1e-4 and any(rounded_products)
    for function in (upsample, lambda device: upsample(device, back=True), diagonal, marginals):
        assert both(function) < 1e-6


# The network.

def conv(*args, dtype):
    return layers.Conv2d(2, 3, *args, rng=np.random.default_rng(0), dtype=dtype)


@dtypes
@pytest.mark.parametrize("make, shape, size", [
    (lambda dtype: conv(3, 1, 1, dtype=dtype), (2, 2, 5, 6), ()),
    (lambda dtype: conv(3, 2, 2, dtype=dtype), (2, 2, 5, 6), ()),
    (lambda dtype: conv(1, dtype=dtype), (2, 2, 5, 6), ()),
    (lambda _: layers.ReLU(), (2, 3, 4, 5), ()),
    (lambda _: layers.MaxPool2d(2, 2, 1, (1, 1)), (2, 2, 5, 6), ()),
    (lambda _: layers.MaxPool2d(2, 1, 2, (0, 1)), (2, 2, 5, 6), ()),
    (lambda _: layers.BilinearUpsample(8, 0.5, 24), (3, 3, 3), ((7, 5),))],
    ids=["conv", "conv with holes", "conv 1x1", "relu", "pool", "pool with holes", "upsample"])
def test_layer(xp, make, shape, size, dtype):
    results = []
    for device in ("cpu", "gpu"):
        layer = make(dtype)
        vgg.move(layers.Sequential({"layer": layer}), device)
        x = to_device(normal(*shape, dtype=dtype), device)
        y = layer.forward(x, *size, train=True)
        dx = layer.backward(to_device(normal(*y.shape, dtype=dtype, seed=1), device))
        results.append([y, dx, *layer.grads.values()])
    for expected, found in zip(*results, strict=True):
        match(found, expected)


def test_dropout(xp):
    """Masks differ between devices, and are the same for the same seed."""
    layer, ones = layers.Dropout(0.25), np.ones((40, 50), np.float32)
    layer.seed = 3, 1, 4
    y, again = (to_host(layer.forward(gpu(ones), train=True)) for _ in range(2))
    assert np.array_equal(y, again) and set(np.unique(y)) == {0, np.float32(4 / 3)}
    assert abs((y > 0).mean() - 0.75) < 0.05
    assert np.array_equal(to_host(layer.backward(gpu(ones))), y)
    layer.seed = 3, 1, 5
    assert not np.array_equal(to_host(layer.forward(gpu(ones), train=True)), y)


@dtypes
def test_losses(xp, dtype):
    z = 3 * normal(20, N_CLASSES, dtype=dtype)
    labels = np.random.default_rng(1).integers(0, N_CLASSES, 20).astype(np.uint8)
    labels[::7] = VOID
    for expected, found in zip(losses.softmax_loss(z, labels),
                               losses.softmax_loss(gpu(z), gpu(labels)), strict=True):
        match(found, np.asarray(expected))
    match(losses.softmax(gpu(z)), losses.softmax(z))


@dtypes
def test_sgd(xp, dtype):
    results = []
    for device in ("cpu", "gpu"):
        p, g = (to_device(normal(3, 4, dtype=dtype, seed=seed), device) for seed in (0, 1))
        optimiser = SGD({"p": p}, {"p": g}, {"p": 0.1}, {"p": 5e-4})
        optimiser.step()
        g += p
        optimiser.step()
        results.append([p, g, optimiser.velocity["p"]])
    for expected, found in zip(*results):
        match(found, expected)


# The CRF.

@dtypes
@pytest.mark.parametrize("d", [2, 5])
def test_lattice(xp, d, dtype):
    features, values = normal(60, d, dtype=dtype), normal(60, 3, dtype=dtype, seed=1)
    weights = (0.5 + np.random.default_rng(2).random(60)).astype(dtype)
    mine, theirs = PermutohedralLattice(gpu(features)), PermutohedralLattice(features)
    for mine, theirs in ((mine, theirs), (mine.scaled(gpu(weights)), theirs.scaled(weights))):
        for _ in range(2):                      # the second product finds the matrices sorted
            match(mine.filter(gpu(values)), theirs.filter(values))
            match(mine.filter_transpose(gpu(values)), theirs.filter_transpose(values))
        match(mine.diagonal, theirs.diagonal)


@dtypes
@pytest.mark.parametrize("exact", [False, True], ids=["lattice", "exact"])
@pytest.mark.parametrize("normalization", ["symmetric", "none"])
def test_kernel(xp, normalization, exact, dtype):
    features, sigma = 20 * normal(48, 5, dtype=dtype), np.array([11., 12., 30., 31., 32.])
    A, B = ([normal(48, 3, dtype=dtype, seed=seed + t) for t in range(2)] for seed in (1, 3))
    W = (np.eye(3) + 0.2).astype(dtype)
    results = []
    for device in ("cpu", "gpu"):
        a, b = ([to_device(x, device) for x in steps] for steps in (A, B))
        kernel = GaussianKernel(to_device(features, device), sigma, normalization, exact=exact)
        K_a = [kernel.filter_transpose(x) for x in a]
        dW, dlog_sigma = kernel.backward(a, [[x] for x in K_a], b, to_device(W, device))
        results.append((kernel.filter(b[0])[:], K_a[0][:], kernel.kappa, dW, dlog_sigma))
    expected, found = results
    for x, y in zip(found[:3], expected):
        match(x, y)
    for x, y in zip(found[3:], expected[3:]):   # in float64, of dtype's
        close(to_host(x), y, dtype)


MATRICES = np.eye(N_CLASSES) + 0.2 * np.ones((2, N_CLASSES, N_CLASSES))


@dtypes
@pytest.mark.parametrize("w, damping", [((1.5, 2.), 0), (MATRICES, 1.)], ids=["Potts", "matrices"])
@pytest.mark.parametrize("exact", [False, True], ids=["lattice", "exact"])
def test_dense_crf(xp, exact, w, damping, dtype):
    """Marginals, the scores' gradient by both ways back, all parameters' gradients, energy."""
    H, W = 8, 10
    f = normal(H, W, N_CLASSES, dtype=dtype)
    image = np.random.default_rng(1).integers(0, 256, (H, W, 3), dtype=np.uint8)
    dz, dq = (normal(H, W, N_CLASSES, dtype=dtype, seed=seed) for seed in (2, 3))
    results = []
    for device in ("cpu", "gpu"):
        crf = DenseCRF(N_CLASSES, w=w, damping=damping, sigma_position=(2., 2.5),
                       sigma_bilateral=(6., 7., 50., 60., 70.), exact=exact)
        scores, picture = to_device(f, device), to_device(image, device)
        q = crf.forward(scores, picture)
        back = crf.backward_logits(to_device(dz, device)), crf.backward(to_device(dq, device))
        numbers = crf.free_energy(q, scores, picture), crf.descent_damping(scores, picture)
        results.append(([q, crf.logits, *back], crf.grads, np.array(numbers)))
    (expected, expected_grads, expected_numbers), (found, grads, numbers) = results
    for a, b in zip(found, expected):
        match(a, b)
    for key, gradient in grads.items():         # they stay on the host, in float64
        close(gradient, expected_grads[key], dtype)
    close(numbers, expected_numbers, dtype)


def test_scores(xp):
    labels = np.random.default_rng(0).integers(0, N_CLASSES, (5, 6))
    scores = scores_from_labels(labels, N_CLASSES, 0.7, unknown=1)
    match(scores_from_labels(gpu(labels), N_CLASSES, 0.7, unknown=1), scores)
    p = losses.softmax(scores)
    match(scores_from_probabilities(gpu(p)), scores_from_probabilities(p))


# Training.

def model_and_batch(device, crf=True, size=(8, 10), n_classes=N_CLASSES, dtype=np.float32):
    """A tiny model, started from data as run_voc.py does, and three labelled random pictures."""
    rng = np.random.default_rng(0)
    batch = []
    for i in range(3):
        shape = size[0] + 2 * i, size[1]
        labels = rng.integers(0, n_classes, shape).astype(np.uint8)
        labels[rng.random(shape) < 0.1] = VOID
        batch.append((rng.integers(0, 256, (*shape, 3), dtype=np.uint8), labels))
    net = vgg.build("tiny", n_classes, dropout=0.0, dtype=dtype)
    refine = DenseCRF(n_classes, w=(1.5, 2.), sigma_position=(2., 2.5),
                      sigma_bilateral=(6., 7., 50., 60., 70.), iterations=3) if crf else None
    model = training.Model(net, (100., 110., 120.), refine, device, scale=60.)
    batch = [(image, labels, model.resized(image)) for image, labels in batch]
    vgg.move(net, device)
    names = [name for name in net.layers if f"{name}_w" in net.params]
    vgg.scale_fresh(net, names, model.inputs([resized for *_, resized in batch]))
    net["fc8"].params["w"] *= 30                # scores that matter to the loss
    return model, batch


@dtypes
@pytest.mark.parametrize("stage", ["unary", "joint", "piecewise"])
def test_training_steps(xp, stage, dtype):
    results = []
    for device in ("cpu", "gpu"):
        model, batch = model_and_batch(device, crf=stage != "unary", dtype=dtype)
        optimiser = training.optimizer(model, stage, list(model.net.layers), rate=0.1)
        each = [training.train_step(model, optimiser, batch, 0, iteration, micro_batch=2)
                for iteration in (1, 2)]
        results.append((np.array(each), optimiser))
    (expected_losses, expected), (found_losses, found) = results
    close(found_losses, expected_losses, dtype)
    for key, p in expected.params.items():
        close(to_host(found.params[key]), p, dtype)
        assert expected.velocity[key].any()
        if dtype is np.float64:                 # in float32 a ReLU near 0 may fall the other way
            close(to_host(found.velocity[key]), expected.velocity[key])


def test_evaluation(xp):
    results = []
    for device in ("cpu", "gpu"):
        model, batch = model_and_batch(device)
        results.append(evaluation.evaluate(model, [pair[:2] for pair in batch], N_CLASSES))
    expected, found = results
    assert expected.keys() == found.keys() == {"unary", "crf", "unary_band", "crf_band"}
    for key, counts in expected.items():        # one near tie may fall the other way
        assert np.abs(found[key] - counts).sum() <= 2, key


@pytest.mark.skipif(not REAL, reason="no CUDA device with cupy")
def test_the_whole_program_on_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_voc, "choose_device", probing.choose_device)  # conftest.py hides it
    arguments = ["--iterations", "2", "--batch-size", "2", "--evaluate-images", "2"]
    assert run_voc.main([*arguments, "--out", str(tmp_path)]) == 0      # --device auto
    printed = capsys.readouterr().out
    assert "on the gpu" in printed and "peak GPU memory" in printed


def test_checkpoints(xp, tmp_path):
    path = str(tmp_path / "joint.npz")
    model, batch = model_and_batch("gpu")
    optimiser = training.optimizer(model, "joint", [])
    training.train_step(model, optimiser, batch, 0, 1)
    checkpoints.save(path, model, dict(stage="joint", classes=list("abcd"), iteration=1), optimiser)
    again, content, _ = checkpoints.load_model(path, device="gpu")
    resumed = training.optimizer(again, "joint", [])
    checkpoints.restore(content, resumed.velocity, "velocity_")
    for key, p in optimiser.params.items():
        assert np.allclose(to_host(resumed.params[key]), to_host(p), rtol=1e-15), key
        assert np.array_equal(to_host(resumed.velocity[key]), to_host(optimiser.velocity[key]))
