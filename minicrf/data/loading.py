"""What training takes from a data set: shuffled, mirrored, resized, read ahead by threads.

Legend: H x W original pixels; the network's input is BGR minus mean (paper, Sec. 4.1).
"""
import collections
import concurrent.futures
import contextlib
import itertools

import numpy as np

from . import voc

READERS = concurrent.futures.ThreadPoolExecutor(4)


def draws(n, seed, start=0):
    """Endless (index, mirrored) pairs: shuffled epochs over n images, from draw number `start` on.

    A pure function of (n, seed, draw number), so those numbers are all there is to save and resume.
    """
    for epoch in itertools.count(start // n):
        rng = np.random.default_rng([seed, epoch])
        order, mirrored = rng.permutation(n), rng.random(n) < 0.5
        for i in range(start % n if epoch == start // n else 0, n):
            yield int(order[i]), bool(mirrored[i])


def batches(root, ids, batch_size, seed, resized, start=0, sbd=None,
            n_classes=len(voc.CLASS_NAMES), pool=READERS):
    """Endless batches for training: lists of batch_size (image, labels, resized image) triples.

    The first two as from `voc.load`, the third as resized (Model.resized) gives it.  Shuffled epochs without
    replacement, each image mirrored left to right or not at random.  After k batches, a new
    iterator with start + k * batch_size goes on exactly there.
    """
    if not ids or batch_size < 1:
        raise ValueError(f"{root}: found {len(ids)} images for batches of {batch_size}, "
                         "expected at least one of each")

    def read(index, mirrored):
        image, labels = voc.load(root, ids[index], sbd, n_classes)
        if mirrored:
            image, labels = image[:, ::-1].copy(), labels[:, ::-1].copy()
        return image, labels, resized(image)

    with contextlib.closing(ahead(read, draws(len(ids), seed, start), pool,
                                  2 * batch_size)) as samples:
        while True:
            yield list(itertools.islice(samples, batch_size))


def ahead(function, arguments, pool=READERS, depth=8):
    """function(*each) for each of `arguments`, in their order; threads work `depth` ahead of use.

    What goes wrong in a thread is raised here, in its place.  function must not use pool itself.
    """
    waiting = collections.deque()
    try:
        for each in arguments:
            waiting.append(pool.submit(function, *each))
            if len(waiting) == depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
