"""One training step: gradients of the whole model, micro-batches, rates, numbers out of range."""
import gc
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from minicrf import DenseCRF, arrays, training, vgg
from minicrf.data import loading, toy
from minicrf.gradcheck import relative_error
from minicrf.inputs import VOID
from minicrf.learning import learn
from minicrf.results import evaluation

N_CLASSES = 4


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


@pytest.mark.parametrize("crf", [False, True], ids=["unary", "joint"])
def test_gradient_from_image_to_loss_to_every_parameter(crf):
    """<dL/dp, v> equals the loss's derivative along a random direction v, for each parameter array."""
    model = small_model(np.float64, crf=crf, exact=True)
    two = batch(model, 2)
    parameters = dict(model.net.params)
    gradients = dict(model.net.grads)
    if crf:
        parameters |= {f"crf_{key}": p for key, p in model.crf.params.items()}
        gradients |= {f"crf_{key}": g for key, g in model.crf.grads.items()}
    training.accumulate_gradients(model, two, 1 / len(two))
    exact = {key: g.copy() for key, g in gradients.items()}

    def loss():
        return float(training.accumulate_gradients(model, two, 1 / len(two), train_net=False))

    rng = np.random.default_rng(1)
    for key, p in parameters.items():
        direction = rng.standard_normal(p.shape)
        direction /= np.linalg.norm(direction)
        # leaning towards the gradient, so that the loss's change is far above rounding
        direction += exact[key] / np.linalg.norm(exact[key])
        found = float((exact[key] * direction).sum())
        h = 1e-8 / max(0.1, abs(found))    # no ReLU or maximum changes sides on so short a way
        kept = p.copy()
        p[...] = kept + h * direction
        above = loss()
        p[...] = kept - h * direction
        below = loss()
        p[...] = kept
        assert relative_error((above - below) / (2 * h), found) < 1e-6, key


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


def test_joint_training_changes_network_and_crf():
    model = small_model()
    optimiser = training.optimizer(model, "joint", [])
    before = {key: p.copy() for key, p in (model.net.params | model.crf.params).items()}
    training.train_step(model, optimiser, batch(model, 2), 0, 1)
    for key, p in (model.net.params | model.crf.params).items():
        assert (p != before[key]).mean() > 0.5, key


def test_piecewise_changes_the_crf_alone():
    model = small_model()
    before = {key: p.copy() for key, p in model.net.params.items()}
    crf_before = {key: p.copy() for key, p in model.crf.params.items()}
    optimiser = training.optimizer(model, "piecewise", [])
    training.train_step(model, optimiser, batch(model, 2), 0, 1)
    assert all(np.array_equal(before[key], p) for key, p in model.net.params.items())
    assert all((crf_before[key] != p).all() for key, p in model.crf.params.items())


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


def step(model, stage="joint", rate=0.1, iteration=1):
    optimiser = training.optimizer(model, stage, [], rate=rate)
    return training.train_step(model, optimiser, batch(model, 2), 0, iteration)


def test_learning_rate_0_changes_nothing():
    model = small_model()
    before = {key: p.copy() for key, p in (model.net.params | model.crf.params).items()}
    step(model, rate=0)
    for key, p in (model.net.params | model.crf.params).items():
        assert np.array_equal(p, before[key]), key


@pytest.mark.parametrize("rate", [1e9, 1e30])
@pytest.mark.parametrize("stage", ["unary", "joint", "piecewise"])
def test_a_huge_learning_rate_ends_in_one_line(stage, rate):
    model = small_model(crf=stage != "unary")
    with pytest.raises(FloatingPointError, match=r"iteration \d: found .*expected .*smaller --rat"):
        for iteration in range(1, 5):
            step(model, stage, rate, iteration)


@pytest.mark.parametrize("log_sigma", [-60, -25, 60, 800])
@pytest.mark.parametrize("kernel", ["log_sigma_position", "log_sigma_bilateral"])
def test_a_kernel_width_without_bounds_ends_in_one_line(kernel, log_sigma):
    model = small_model()
    model.crf.params[kernel][0] = log_sigma
    with pytest.raises(FloatingPointError, match="iteration 1: .*found .*smaller") as error:
        step(model)
    assert "\n" not in str(error.value)


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
sys.path[:0] = sys.argv[1:3]
import test_training as t
def pages():
    gc.collect()
    # freed, but kept by the allocator for next time
    ctypes.CDLL(None).malloc_trim(0)
    return int(open("/proc/self/statm").read().split()[1])
if sys.argv[3] == "changing sizes":
    model = t.small_model()
    for steps in (100, 200):
        t.train_on_changing_sizes(steps, model)
        print(pages())
else:
    from minicrf.data import toy
    data = t.loading.DataSet(toy.draw(sys.argv[4] + "/set"))
    crf = t.DenseCRF(6) if sys.argv[3] == "joint" else None
    model = t.training.Model(t.vgg.build("tiny", 6), (0, 0, 0), crf, scale=60)
    optimiser = t.training.optimizer(model, sys.argv[3], [], rate=0.01)
    for i, batch in zip(range(300), t.loading.batches(data, 16, 0, model.resized)):
        t.training.train_step(model, optimiser, batch, 0, i)
        if i % 10 == 9:
            print(pages())
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("kind", ["unary", "joint", "changing sizes"])
def test_resident_memory_after_300_iterations_is_that_after_100(tmp_path, kind):
    """On the default run's pictures, in its batches of 16; and on pictures of ever other sizes.

    Pictures read ahead make it go up and down: medians of ten readings.  One arena for all threads:
    each thread's own keeps freed blocks, some 60 MB that come and go.
    """
    tests = training.__file__.replace("minicrf/training.py", "tests")
    done = subprocess.run([sys.executable, "-c", RESIDENT, tests + "/..", tests, kind, tmp_path],
                          capture_output=True, text=True, timeout=1800,
                          env={**os.environ, "MALLOC_ARENA_MAX": "1"})
    assert done.returncode == 0, done.stderr
    pages = [int(line) for line in done.stdout.splitlines() if line.isdigit()]
    n = len(pages) // 3 or 1
    after_100, after_300 = np.median(pages[:n]), np.median(pages[-n:])
    assert after_300 < 1.05 * after_100, (kind, after_100, after_300)


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
