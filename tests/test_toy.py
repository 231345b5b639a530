"""The drawn set: sound, the same for the same seed, never half there, and not too easy."""
import hashlib

import numpy as np
import pytest
from PIL import Image

from minicrf import metrics
from minicrf.data import loading, toy, voc
from minicrf.inputs import VOID


def digests(directory):
    """Every file's name and content."""
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(directory.rglob("*")) if path.is_file()}


def pixels(directory, split):
    """All colours (N, 3) and labels (N,) of a split, void left out."""
    colours, labels = [], []
    for image_id in voc.image_list(directory, split):
        image, truth = voc.load(directory, image_id, n_classes=len(toy.CLASS_NAMES))
        colours.append(image[truth != VOID])
        labels.append(truth[truth != VOID])
    return np.concatenate(colours).astype(float), np.concatenate(labels)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return toy.draw(tmp_path_factory.mktemp("toy") / "set", n_train=30, n_val=12, seed=3)


def test_it_is_a_sound_set_in_vocs_format(drawn):
    assert loading.DataSet(drawn).check() == ([], [])
    assert voc.class_names(drawn) == list(toy.CLASS_NAMES)
    assert [len(voc.image_list(drawn, split)) for split in ("train", "val")] == [30, 12]
    sizes = {Image.open(path).size for path in (drawn / "JPEGImages").iterdir()}
    assert len(sizes) > 20
    assert all(96 <= w <= 140 and 72 <= h <= 110 for w, h in sizes)


def test_every_class_is_drawn_and_background_does_not_cover_all(drawn):
    for split in ("train", "val"):
        counts = np.bincount(pixels(drawn, split)[1], minlength=len(toy.CLASS_NAMES))
        assert (counts / counts.sum() > 0.015).all() and counts[0] / counts.sum() < 0.8


def test_objects_have_void_rims_and_never_touch_another_label(drawn):
    for image_id in voc.image_list(drawn, "val"):
        _, labels = voc.load(drawn, image_id)
        for a, b in ((labels[1:], labels[:-1]), (labels[:, 1:], labels[:, :-1])):
            assert ((a == b) | (a == VOID) | (b == VOID)).all()
        assert 0.005 < (labels == VOID).mean() < 0.25


def test_same_seed_same_bytes_and_other_seed_other_pictures(drawn, tmp_path):
    again = toy.draw(tmp_path / "again", n_train=30, n_val=12, seed=3)
    assert digests(again) == digests(drawn)
    other = digests(toy.draw(tmp_path / "other", n_train=3, n_val=2, seed=4))
    assert all(digest not in digests(drawn).values() for name, digest in other.items()
               if name.startswith(("JPEGImages", "SegmentationClass")))


def test_a_longer_list_begins_with_the_shorter_one(drawn, tmp_path):
    few = digests(toy.draw(tmp_path / "few", n_train=3, n_val=2, seed=3))
    pictures = {name: digest for name, digest in few.items() if name.endswith(("jpg", "png"))}
    assert len(pictures) == 20 and pictures.items() <= digests(drawn).items()


def test_an_easy_set_is_another_and_its_colours_tell_more(drawn, tmp_path):
    """The default run's: nearest mean colour of a class is right more often on it."""
    easy = toy.draw(tmp_path / "easy", n_train=30, n_val=12, seed=3, easy=True)
    assert "easy" in (easy / "toy.txt").read_text()
    right = []
    for directory in (drawn, easy):
        colours, labels = pixels(directory, "train")
        means = np.stack([colours[labels == label].mean(axis=0) for label in range(1, 6)])
        colours, labels = (array[labels > 0] for array in (colours, labels))
        nearest = ((colours[:, None] - means) ** 2).sum(axis=2).argmin(axis=1) + 1
        right.append((nearest == labels).mean())
    assert right[1] > right[0] + 0.1, right


def test_interrupted_drawing_leaves_no_set_and_the_next_one_is_whole(tmp_path, monkeypatch):
    directory, left = tmp_path / "set", iter(range(4))

    def interrupted(*arguments, picture=toy.picture):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return picture(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(toy, "picture", interrupted)
        with pytest.raises(KeyboardInterrupt):
            toy.draw(directory, n_train=5, n_val=2)
    assert not directory.exists()
    toy.draw(directory, n_train=5, n_val=2)
    assert loading.DataSet(directory).check()[0] == []
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_set_is_drawn_once_and_nothing_else_is_replaced(tmp_path, monkeypatch):
    directory = toy.draw(tmp_path / "set", n_train=2, n_val=2)
    before = digests(tmp_path)
    monkeypatch.setattr(toy, "picture", None)                      # must not be called
    assert toy.draw(directory, n_train=2, n_val=2) == directory
    for folder, n_train in ((directory, 1), (tmp_path, 2)):
        with pytest.raises(FileExistsError, match=f"{folder}: found something else than a set dr"):
            toy.draw(folder, n_train=n_train, n_val=2)
    assert digests(tmp_path) == before


def test_colour_alone_does_not_give_classes_away(drawn):
    """Of 64 colours, each is guessed to be the class that shows it most: not half right."""
    n_classes = len(toy.CLASS_NAMES)
    votes = np.zeros((4 ** 3, n_classes))
    colours, labels = pixels(drawn, "train")
    np.add.at(votes, (np.ravel_multi_index((colours // 64).astype(int).T, (4, 4, 4)), labels), 1)
    votes /= votes.sum(axis=0)                                     # every class counts alike
    colours, labels = pixels(drawn, "val")
    guess = votes.argmax(1)[np.ravel_multi_index((colours // 64).astype(int).T, (4, 4, 4))]
    assert metrics.mean_iou(metrics.confusion_matrix(labels, guess, n_classes)) < 50
