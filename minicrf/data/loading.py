"""What training takes from a data set: images shuffled, mirrored, resized, and read ahead.

Legend: H x W original pixels, S the network's input side.
"""
import collections
import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from . import voc


class DataSet:
    """A folder in VOC's format: class names, image lists, and the images with their labels.

    root, sbd: as in `voc.image_list`.  weak: as in `voc.load`, for the training list.
    Raises OSError or ValueError with one line.
    """

    def __init__(self, root, sbd=None, weak=None):
        self.root, self.sbd, self.weak = root, sbd, weak
        self.classes = voc.class_names(root)
        self.train = voc.image_list(root, "train", sbd)
        self.val = voc.image_list(root, "val")
        both = {*self.train} & {*self.val}           # their score would be a training image's
        if both:
            raise ValueError(f"{root}: found {min(both)} in both train.txt and val.txt, expected "
                             "it in one")

    def load(self, image_id):
        """(image, labels) as from `voc.load`; of the validation list VOC's own: SBD has no void."""
        sbd, weak = (None, None) if image_id in self.val else (self.sbd, self.weak)
        return voc.load(self.root, image_id, sbd, len(self.classes), weak)

    def samples(self, ids, note):
        """(image, labels) of each id.  note: says what for, beside a progress bar on a terminal."""
        return tqdm(ahead(self.load, zip(ids)), note, len(ids), unit="image", leave=False,
                    disable=None)

    def check(self):
        """(problems, notes), lists of lines; a class without a pixel may well be meant: a note."""
        problems, notes = [], []
        for name, ids in (("training", self.train), ("validation", self.val)):
            where = f"{self.root}: the {name} list"
            present = set()
            for image_id in tqdm(ids, f"check, {name}", unit="image", disable=None):
                try:
                    present |= {*np.unique(self.load(image_id)[1]).tolist()}
                except (ValueError, OSError) as error:
                    problems.append(str(error))
            absent = [each for label, each in enumerate(self.classes) if label not in present]
            if present:
                problems += voc.one_class(where, present)
            if present and absent:
                notes.append(f"{where} has no pixel of {', '.join(absent)}")
        return problems, notes


def draws(n, seed):
    """Endless (index, mirrored) pairs: shuffled epochs over n images, the same for a seed."""
    for epoch in itertools.count():
        rng = np.random.default_rng([seed, epoch])
        yield from zip(rng.permutation(n).tolist(), (rng.random(n) < 0.5).tolist())


def batches(data, batch_size, seed, resized, start=0):
    """Endless batches for training: lists of batch_size (image, labels, resized(image)).

    data: a DataSet.  resized: Model.resized.  Shuffled epochs without replacement, each image
    mirrored left to right or not at random.  start: images to leave out, those that a run to be
    resumed has seen.
    """
    def read(index, mirrored):
        image, labels = data.load(data.train[index])
        if mirrored:
            image, labels = image[:, ::-1].copy(), labels[:, ::-1].copy()
        return image, labels, resized(image)

    arguments = itertools.islice(draws(len(data.train), seed), start, None)
    samples = ahead(read, arguments, 2 * batch_size)
    while True:
        yield list(itertools.islice(samples, batch_size))


def ahead(function, arguments, depth=8):
    """function(*each) for each of an iterator, in its order; threads work `depth` ahead of use.

    An exception in a thread is raised here, when its result is due.
    """
    with ThreadPoolExecutor(4) as pool:            # its own: threads do not live on in a fork
        waiting = collections.deque()
        for each in arguments:
            waiting.append(pool.submit(function, *each))
            if len(waiting) == depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
