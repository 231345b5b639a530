"""Checkpoints come back to the bit; what is none, or another run's, is refused in one line."""
import json

import numpy as np
import pytest

from minicrf import DenseCRF, training, vgg
from minicrf.results import checkpoints
from minicrf.saving import read_npz

CLASSES = list("abcd")
INFO = {"stage": "joint", "classes": CLASSES, "iteration": 1, "seed": 0, "fresh": [],
        "settings": {"stage": "joint", "seed": 0, "rate": 1.0}}


@pytest.fixture(scope="module")
def model():
    crf = DenseCRF(4, w=(1.5, 2.0), sigma_position=(2.0, 1.3),
                   sigma_bilateral=(6.0, 7.0, 50.0, 60.0, 70.0))
    return training.Model(vgg.build("tiny", 4), (100.0, 110.0, 120.0), crf, scale=60)


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    """A checkpoint of the joint stage in which no array is constant."""
    path, rng = tmp_path_factory.mktemp("checkpoint") / "joint.npz", np.random.default_rng(0)
    optimiser = training.optimizer(model, "joint", [])
    for arrays in (optimiser.params, optimiser.velocity):
        for array in arrays.values():
            array += rng.standard_normal(array.shape) * 0.01
    checkpoints.save(path, model, INFO, optimiser)
    return path


def load(path, settings=()):
    """All that a resumed run takes from a checkpoint, as one dict."""
    model, arrays, info = checkpoints.resume(path, CLASSES, "cpu", dict(settings))
    optimiser = training.optimizer(model, "joint", info["fresh"])
    checkpoints.restore(arrays, optimiser.velocity, "velocity_")
    velocity = {f"velocity_{key}": v for key, v in optimiser.velocity.items()}
    return {**optimiser.params, **velocity, "mean": model.mean, "scale": model.scale}


def refused(path, *words):
    with pytest.raises((ValueError, OSError)) as error:
        load(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message, message
    assert all(word in message for word in words), message


def test_parameters_momentum_and_what_else_is_needed_come_back_to_the_bit(checkpoint):
    """Also log sigma, which is not the logarithm of its own exponential everywhere."""
    stored, found = read_npz(checkpoint), load(checkpoint)
    assert not np.array_equal(np.log(np.exp(stored["crf_log_sigma_position"])),
                              stored["crf_log_sigma_position"])
    assert stored.keys() - {"info"} == found.keys()
    assert all(np.array_equal(stored[key], found[key]) for key in found)


def test_another_stages_settings_are_refused(checkpoint):
    with pytest.raises(ValueError, match="a run with stage joint, expected piecewise: --resume"):
        load(checkpoint, {"seed": 0, "stage": "piecewise"})


def changed(checkpoint, path, **info):
    """A copy with other entries of info."""
    content = read_npz(checkpoint)
    content["info"] = json.dumps({**json.loads(str(content["info"])), **info})
    np.savez(path, **content)
    return path


def test_a_checkpoint_of_another_version_is_refused(checkpoint, tmp_path):
    refused(changed(checkpoint, tmp_path / "joint.npz", version="99.0"), "found version 99.0")


def test_weights_alone_are_refused(checkpoint, tmp_path):
    arrays = read_npz(checkpoint)
    del arrays["info"]
    np.savez(tmp_path / "weights.npz", **arrays)
    refused(tmp_path / "weights.npz", "no training state", "--stage unary takes bare")


def test_a_checkpoint_with_more_and_with_fewer_settings_is_taken(checkpoint, tmp_path):
    old = changed(checkpoint, tmp_path / "joint.npz", best=50.5, start=7, settings={
        "seed": 0, "training list (its checksum)": 5})
    load(old, {"stage": "joint", "seed": 0, "image lists (their checksum)": 6})


def test_a_damaged_checkpoint_is_refused(checkpoint, tmp_path):
    content, path = bytearray(checkpoint.read_bytes()), tmp_path / "joint.npz"
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    refused(path, "not a readable .npz file: Bad CRC-32")
    for half in (content[:len(content) // 3], b""):
        path.write_bytes(half)
        refused(path, "not a readable .npz file")
