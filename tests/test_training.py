"""The two stages: gradients of the whole model, micro-batches, checkpoints, stopping and resuming."""
import csv
import json
import os

import numpy as np
import pytest

from minicrf import DenseCRF, training, vgg
from minicrf.data import loading, toy, voc
from minicrf.results import checkpoints, evaluation, fitting
from minicrf.gradcheck import relative_error
from minicrf.losses import VOID

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


@pytest.fixture(scope="module")
def toy_set(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy") / "set"
    toy.draw(root, n_train=6, n_val=2, width=(30, 40), height=(24, 32))
    return str(root)


def run(toy_set, out, iterations, start_from=None, stop_at=None, stage="joint"):
    """Train a few iterations as run_voc.py does; optionally interrupted by Ctrl-C at stop_at."""
    classes = voc.class_names(toy_set)
    os.makedirs(out, exist_ok=True)
    net = vgg.build("tiny", len(classes))
    model = training.Model(net, (100.0, 110.0, 120.0), DenseCRF(len(classes)))
    info = {"stage": stage, "classes": classes, "seed": 3}
    start = 0
    if start_from:
        arrays, info = checkpoints.read(start_from)
        model = training.Model(checkpoints.load_net(start_from, arrays, info), arrays["mean"],
                               checkpoints.load_crf(start_from, arrays, info))
        start = info["iteration"]
    optimiser = training.optimizer(model, stage, [])
    if start_from:
        checkpoints.load_velocity(start_from, arrays, optimiser)
    calls = []

    def validate():
        calls.append(1)
        if stop_at is not None and len(calls) == stop_at:
            os.kill(os.getpid(), 2)
        return {"unary": 10.0 + len(calls), "crf": 20.0 + len(calls)}

    batches = loading.batches(toy_set, voc.image_list(toy_set, "train"), 2, 3, model.resized,
                          2 * start, n_classes=len(classes))
    return fitting.fit(model, stage, optimiser, batches, validate, out, info, start=start,
                        iterations=iterations, batch_size=2, evaluate_every=1)


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(toy_set, tmp_path, monkeypatch):
    monkeypatch.setitem(vgg.PRESETS["tiny"], "dropout", 0.5)
    assert run(toy_set, tmp_path / "whole", 3)
    assert not run(toy_set, tmp_path / "parts", 3, stop_at=2)            # Ctrl-C in iteration 2
    checkpoint = str(tmp_path / "parts" / "joint.npz")
    assert checkpoints.read(checkpoint)[1]["iteration"] == 2
    assert run(toy_set, tmp_path / "parts", 3, start_from=checkpoint)
    whole, _ = checkpoints.read(tmp_path / "whole" / "joint.npz")
    parts, _ = checkpoints.read(checkpoint)
    assert whole.keys() == parts.keys()
    for key in whole:
        assert np.array_equal(whole[key], parts[key]), key
    with open(tmp_path / "whole" / "log.csv") as a, open(tmp_path / "parts" / "log.csv") as b:
        for one, other in zip(csv.DictReader(a), csv.DictReader(b), strict=True):
            one.pop("miou"), other.pop("miou"), one.pop("miou_unary"), other.pop("miou_unary")
            assert one == other


def test_dropout_masks_are_named_by_seed_iteration_and_first_image(monkeypatch):
    """So that a resumed run draws the same ones, and no two steps or micro-batches do."""
    model, masks = small_model(), []
    monkeypatch.setattr(training, "seed_dropout", lambda net, *seed: masks.append(seed))
    optimiser = training.optimizer(model, "joint", [])
    for iteration in (5, 6):
        training.train_step(model, optimiser, batch(model, 3), 7, iteration, micro_batch=2)
    assert masks == [(7, 5, 0), (7, 5, 2), (7, 6, 0), (7, 6, 2)]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(toy_set, tmp_path,
                                                                          monkeypatch):
    run(toy_set, tmp_path, 2)
    before = (tmp_path / "joint.npz").read_bytes()
    monkeypatch.setattr(fitting, "train_step", lambda *_: np.float32("nan"))
    with pytest.raises(FloatingPointError, match="joint: iteration 3: found loss nan"):
        run(toy_set, tmp_path, 4, start_from=str(tmp_path / "joint.npz"))
    assert (tmp_path / "joint.npz").read_bytes() == before


def test_the_best_state_is_kept_beside_the_last(toy_set, tmp_path):
    run(toy_set, tmp_path, 2)
    assert checkpoints.read(tmp_path / "joint_best.npz")[1]["best"] == 22.0


def test_evaluation_counts_every_labelled_pixel_once():
    model, samples = small_model(), pairs(3)
    counts = evaluation.evaluate(model, samples, N_CLASSES, band=2)
    assert set(counts) == {"unary", "crf", "unary_band", "crf_band"}
    labelled = [int((labels != VOID).sum()) for _, labels in samples]
    assert counts["unary"].sum(axis=(1, 2)).tolist() == labelled
    assert counts["crf"].sum(axis=(1, 2)).tolist() == labelled
    assert (counts["crf_band"].sum(axis=(1, 2)) <= labelled).all()


def test_an_interrupted_checkpoint_write_leaves_the_earlier_one(tmp_path, monkeypatch):
    model, path = small_model(), tmp_path / "joint.npz"
    info = {"stage": "joint", "classes": list("abcd"), "iteration": 1}
    checkpoints.save(path, model, info)
    before = path.read_bytes()

    def full(file, **arrays):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="joint.npz: could not be written .No space left"):
        checkpoints.save(path, model, info)
    assert path.read_bytes() == before


def test_checkpoint_round_trip(tmp_path):
    model, path = small_model(), str(tmp_path / "joint.npz")
    checkpoints.save(path, model, {"stage": "joint", "classes": list("abcd"), "iteration": 1})
    arrays, info = checkpoints.read(path)
    net, crf = checkpoints.load_net(path, arrays, info), checkpoints.load_crf(path, arrays, info)
    assert info["version"] and json.dumps(info) and info["preset"] == "tiny"
    for key, p in model.net.params.items():
        assert np.array_equal(net.params[key], p)
    for key, p in model.crf.params.items():
        np.testing.assert_allclose(crf.params[key], p, rtol=1e-15)
