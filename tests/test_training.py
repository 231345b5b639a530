"""One training step: micro-batches, rates, numbers out of range; its gradient is in gradcheck."""
import gc
import os
import pathlib
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from helpers import refused

from minicrf import DenseCRF, arrays, training, vgg
from minicrf.data import loading, toy
from minicrf.inputs import VOID
from minicrf.learning import learn
from minicrf.results import evaluation

N_CLASSES = 4
ROOT = pathlib.Path(training.__file__).parents[1]


def small_model(dtype=np.float32, crf=True, seed=0, exact=False):
    """A tiny network without dropout, with a CRF as wide as small pictures need it."""
    net = vgg.build("tiny", N_CLASSES, seed=seed, dropout=0.0, dtype=dtype)
    refine = DenseCRF(N_CLASSES, w=(1.5, 2.0), sigma_position=(2.0, 2.5),
                      sigma_bilateral=(6.0, 7.0, 50.0, 60.0, 70.0), iterations=3, exact=exact)
    model = training.Model(net, (100.0, 110.0, 120.0), refine if crf else None, scale=60)
    layers = [name for name in net.layers if f"{name}_w" in net.params]
    vgg.scale_fresh(net, layers, model.inputs([resized for *_, resized in batch(model, 2)]))
    net["fc8"].params["w"] *= 30                    # scores that matter to the loss
    return model


def pairs(n, seed=0):
    """n random images of different sizes with labels, some of them void."""
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(n):
        size = 10 + i, 13 - i
        image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        labels = rng.integers(0, N_CLASSES, size).astype(np.uint8)
        labels[rng.random(size) < 0.1] = VOID
        samples.append((image, labels))
    return samples


def batch(model, n):
    """The same as a batch for training: (image, labels, resized image)."""
    return [(image, labels, model.resized(image)) for image, labels in pairs(n)]


def test_micro_batches_sum_to_the_whole_batch():
    results = []
    for micro_batch in (None, 2):
        model = small_model(np.float64)
        optimiser = training.optimizer(model, "joint", [])
        for iteration in (1, 2):
            training.train_step(model, optimiser, batch(model, 5), 0, iteration, micro_batch)
        results.append({key: p.copy() for key, p in optimiser.params.items()})
    for key, whole in results[0].items():
        assert np.linalg.norm(results[1][key] - whole) <= 1e-9 * np.linalg.norm(whole), key


def step(model, stage="joint", rate=0.1, iteration=1):
    optimiser = training.optimizer(model, stage, [], rate=rate)
    return training.train_step(model, optimiser, batch(model, 2), 0, iteration)


@pytest.mark.parametrize("stage, rate", [("joint", 1), ("piecewise", 1), ("joint", 0)])
def test_a_stage_changes_what_it_trains(stage, rate):
    model = small_model()
    params = model.net.params | model.crf.params
    before = {key: p.copy() for key, p in params.items()}
    step(model, stage, rate)
    for key, p in params.items():
        trained = rate and (stage == "joint" or key in model.crf.params)
        assert (p != before[key]).mean() > 0.5 if trained else np.array_equal(p, before[key]), key


def test_learning_rates_are_those_of_the_paper():
    optimiser = training.optimizer(small_model(), "joint", ["fc7"])
    assert optimiser.rates["fc8_w"] == optimiser.rates["fc7_w"] == 0.01
    assert optimiser.rates["conv1_1_w"] == optimiser.rates["fc6_b"] == 0.001
    assert optimiser.decays["conv1_1_w"] == 5e-4
    assert optimiser.decays["conv1_1_b"] == optimiser.decays["crf_w"] == 0
    assert optimiser.momentum == 0.9


def test_kernel_weights_never_turn_negative():
    model = small_model()
    optimiser = training.optimizer(model, "joint", [], rate_w=1e6)
    training.train_step(model, optimiser, batch(model, 2), 0, 1)
    assert (model.crf.params["w"] >= 0).all()


def test_network_input_is_bgr_minus_mean_and_square():
    image = np.zeros((6, 9, 3), np.uint8)
    image[:, 3:6] = (10, 20, 30)                                         # RGB
    model = training.Model(vgg.build("tiny", 2), (1.0, 2.0, 3.0), scale=10)
    x = model.resized(image)
    S = model.net.input_size
    assert x.shape == (3, S, S) and x.dtype == np.float32 and x.flags.c_contiguous
    assert np.allclose(x[:, 5, S // 2], [29, 18, 7])                     # the middle third stays
    assert np.allclose(x[:, :, [0, -1]].mean(axis=1), [[-1, -1], [-2, -2], [-3, -3]])
    assert np.allclose(model.inputs([x])[0], x / 10)


def test_dropout_masks_are_named_by_seed_iteration_and_first_image(monkeypatch):
    """So that a resumed run draws the same ones, and no two steps or micro-batches do."""
    model, masks = small_model(), []
    monkeypatch.setattr(training, "seed_dropout", lambda net, *seed: masks.append(seed))
    optimiser = training.optimizer(model, "joint", [])
    for iteration in (5, 6):
        training.train_step(model, optimiser, batch(model, 3), 7, iteration, micro_batch=2)
    assert masks == [(7, 5, 0), (7, 5, 2), (7, 6, 0), (7, 6, 2)]


@pytest.mark.parametrize("rate", [1e9, 1e30])
@pytest.mark.parametrize("stage", ["unary", "joint", "piecewise"])
def test_a_huge_learning_rate_ends_in_one_line(stage, rate):
    model = small_model(crf=stage != "unary")
    with refused(r"iteration \d: found .*expected .*smaller --rat", FloatingPointError):
        for iteration in range(1, 5):
            step(model, stage, rate, iteration)


@pytest.mark.parametrize("log_sigma", [-60, -25, 60, 800])
@pytest.mark.parametrize("kernel", ["log_sigma_position", "log_sigma_bilateral"])
def test_a_kernel_width_without_bounds_ends_in_one_line(kernel, log_sigma):
    model = small_model()
    model.crf.params[kernel][0] = log_sigma
    with refused("iteration 1: .*found .*smaller", FloatingPointError):
        step(model)


def test_a_kernel_much_wider_than_the_picture_is_fine():
    """Each pixel hears all others alike: the width no longer matters, and stays."""
    model = small_model()
    model.crf.params["log_sigma_position"][...] = 25
    step(model)
    np.testing.assert_allclose(model.crf.params["log_sigma_position"], 25, atol=1e-6)


def test_weights_of_0_leave_the_unary_scores_and_can_grow_again():
    model, unary = small_model(np.float64), small_model(np.float64, crf=False)
    model.crf.params["w"][...] = 0
    losses = [float(training.accumulate_gradients(m, batch(m, 2), 0.5)) for m in (model, unary)]
    assert losses[0] == losses[1]
    for key, g in unary.net.grads.items():
        np.testing.assert_allclose(model.net.grads[key], g, rtol=1e-9, atol=1e-12)
    assert (model.crf.grads["w"] != 0).all() and (model.crf.grads["log_sigma_position"] == 0).all()


# --- memory, threads -----------------------------------------------------------------------------

def train_on_changing_sizes(steps, model):
    """That many steps, each on a picture of another size; the same ones at every call."""
    optimiser, rng = training.optimizer(model, "joint", [], rate=0.01), np.random.default_rng(0)
    for iteration in range(steps):
        size = tuple(rng.integers(8, 32, 2))
        image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        labels = rng.integers(0, N_CLASSES, size).astype(np.uint8)
        training.train_step(model, optimiser, [(image, labels, model.resized(image))], 0, iteration)
        evaluation.evaluate(model, [(image, labels)], N_CLASSES)


def test_a_few_steps_on_changing_sizes_keep_memory_level():
    model, levels = small_model(), []
    tracemalloc.start()
    for steps in (8, 8, 24):                       # the first fills what libraries keep
        train_on_changing_sizes(steps, model)
        gc.collect()                               # SciPy's arrays leave cycles
        levels.append(tracemalloc.get_traced_memory()[0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert levels[2] - levels[1] < 0.05 * peak, (levels, peak)


RESIDENT = """
import ctypes, gc, sys
from minicrf import DenseCRF, training, vgg
from minicrf.data import loading, toy
model = training.Model(vgg.build("tiny", 6), (0, 0, 0), DenseCRF(6), scale=60)
optimiser = training.optimizer(model, "joint", [], rate=0.01)
batches = loading.batches(loading.DataSet(toy.draw(sys.argv[1])), 16, 0, model.resized)
for i, batch in zip(range(300), batches):
    training.train_step(model, optimiser, batch, 0, i)
    if i % 10 == 9:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)       # freed, but kept by the allocator for next time
        print(open("/proc/self/statm").read().split()[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_resident_memory_after_300_iterations_is_that_after_100(tmp_path):
    """On the default run's pictures, of many sizes, in its batches of 16.

    Pictures read ahead make it go up and down: medians of ten readings.  One arena for all threads:
    each thread's own keeps freed blocks, some 60 MB that come and go.
    """
    done = subprocess.run([sys.executable, "-c", RESIDENT, tmp_path / "set"], text=True,
                          capture_output=True, timeout=1800, cwd=ROOT,
                          env={**os.environ, "MALLOC_ARENA_MAX": "1"})
    assert done.returncode == 0, done.stderr
    pages = [int(line) for line in done.stdout.splitlines()]
    after_100, after_300 = np.median(pages[:10]), np.median(pages[-10:])
    assert after_300 < 1.05 * after_100, (after_100, after_300)


def test_any_number_of_threads_trains_the_same_network(toy_set, monkeypatch):
    monkeypatch.setattr(arrays, "BLOCK", 100)      # so that small pictures use threads at all
    data, results = loading.DataSet(toy_set), []
    for threads in (1, 2, 4):
        arrays._new_pool(threads)
        monkeypatch.setattr(arrays, "SMALL", 0 if threads > 1 else 2 ** 60)
        model = training.Model(vgg.build("tiny", 6), (100., 110., 120.), DenseCRF(6), scale=60)
        optimiser = training.optimizer(model, "joint", [], rate=0.1)
        batches = loading.batches(data, 2, 0, model.resized)
        losses = [training.train_step(model, optimiser, next(batches), 0, i)
                  for i in (1, 2, 3)]
        batches.close()
        results.append((losses, {key: p.copy() for key, p in optimiser.params.items()}))
    arrays._new_pool()
    for losses, params in results[1:]:
        assert losses == results[0][0]
        assert all(np.array_equal(p, results[0][1][key]) for key, p in params.items())


def test_learn_lowers_the_loss_and_keeps_w_in_range():
    rng, samples = np.random.default_rng(0), []
    for _ in range(4):
        image, labels = toy.picture(rng, 24, 32)
        scores = np.eye(6)[np.where(labels == 255, 0, labels)] + rng.standard_normal((24, 32, 6))
        samples.append((scores, image, labels))
    for w in ((0., 1.), np.array([0., 1.])[:, None, None] * np.eye(6)):
        crf = DenseCRF(6, w=w)
        losses = learn(crf, samples, epochs=6, rate=0.3)
        assert losses.shape == (6, 4) and losses[-1].mean() < 0.8 * losses[0].mean()
        w = crf.params["w"]
        assert (w if w.ndim == 1 else np.linalg.eigvalsh(w)).min() >= -1e-9
        assert not any(g.any() for g in crf.grads.values())
