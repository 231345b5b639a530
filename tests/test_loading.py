"""What training takes from a data set: its images in batches that can be resumed, read ahead."""
import itertools
import multiprocessing
import threading
import time

import numpy as np
import pytest

from minicrf import training, vgg
from minicrf.data import loading, voc

MODEL = training.Model(vgg.build("tiny", 6), (1.0, 2.0, 3.0))


@pytest.fixture(scope="module")
def data(toy_set):
    return loading.DataSet(toy_set)


def same(one, other):
    return all(np.array_equal(a, b) for x, y in zip(one, other, strict=True)
               for a, b in zip(x, y, strict=True))


def test_a_data_set_knows_its_classes_lists_and_images(data, toy_set):
    assert data.classes == voc.class_names(toy_set) and len(data.train) == 4 and len(data.val) == 2
    assert same(data.samples(data.val, "test"), [voc.load(toy_set, i) for i in data.val])
    assert same([data.load("val_0001")], [voc.load(toy_set, "val_0001")])


def test_epochs_draw_every_image_once_and_differ():
    drawn = list(itertools.islice(loading.draws(10, seed=4), 40))
    epochs = [drawn[i:i + 10] for i in range(0, 40, 10)]
    assert all(sorted(index for index, _ in epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(index for index, _ in epoch) for epoch in epochs}) == 4
    assert 8 < sum(mirrored for _, mirrored in drawn) < 32
    assert drawn != list(itertools.islice(loading.draws(10, seed=5), 40))


def test_batches_resume_exactly(data):
    whole = list(itertools.islice(loading.batches(data, 2, 1, MODEL.resized), 6))
    for start in (0, 2, 8):
        again = loading.batches(data, 2, 1, MODEL.resized, start)
        assert all(same(next(again), batch) for batch in whole[start // 2:])
        again.close()


def test_mirroring_turns_image_and_labels_together(data):
    samples = dict(zip(data.train, data.samples(data.train, "test")))
    seen = set()
    for [(x, y, small)] in itertools.islice(loading.batches(data, 1, 0, MODEL.resized), 12):
        assert np.array_equal(small, MODEL.resized(x))
        [mirrored] = [m for image, labels in samples.values() for m in (False, True)
                      if same([(x, y)], [(image[:, ::-1], labels[:, ::-1])] if m
                              else [(image, labels)])]
        seen.add(mirrored)
    assert seen == {True, False}


def test_pictures_are_loaded_and_resized_ahead_of_use_in_other_threads(data):
    threads = []

    def resized(image):
        threads.append(threading.current_thread())
        return MODEL.resized(image)

    batches = loading.batches(data, 2, 0, resized)
    next(batches)
    for _ in range(500):                     # nobody asks for more: still two batches get ready
        if len(threads) >= 4:
            break
        time.sleep(0.01)
    batches.close()
    assert len(threads) >= 4 and threading.main_thread() not in threads


def test_results_keep_their_order_and_errors_their_place():
    def function(x):
        time.sleep(0.01 * (x % 3))
        if x == 7:
            raise ValueError("seven")
        return x

    results = loading.ahead(function, zip(range(20)), depth=4)
    assert list(itertools.islice(results, 7)) == list(range(7))
    with pytest.raises(ValueError, match="seven"):
        next(results)
    assert list(loading.ahead(function, zip(range(2)))) == [0, 1]        # fewer than depth


def first_batch(data):
    batches = loading.batches(data, 2, 0, MODEL.resized)
    next(batches)
    batches.close()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_forked_after_training_reads_on(data):
    """Threads do not live on in a fork: a pool for all would leave it waiting for ever."""
    first_batch(data)
    child = multiprocessing.get_context("fork").Process(target=first_batch, args=(data,))
    child.start()
    child.join(30)
    hangs = child.is_alive()
    child.kill()
    assert not hangs and child.exitcode == 0
