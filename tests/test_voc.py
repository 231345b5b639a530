"""The data set on disk: lists, labels, and what is said of broken folders."""
import os

import numpy as np
import pytest
import scipy.io
from PIL import Image

import run_voc
from minicrf.data import loading, voc

TRAIN, VAL = ["a_1", "a_2", "a_3"], ["b_1", "b_2"]


def write_list(root, name, ids, end="\n"):
    (root / voc.LISTS / f"{name}.txt").write_bytes("".join(i + end for i in ids).encode())


def write_image(path, labels):
    """An image whose red channel tells its labels: PNG inside, so that no pixel is lost."""
    image = np.stack([labels, np.full_like(labels, 7), labels * 0], axis=-1)
    Image.fromarray(image).save(path, format="PNG")


def image_of(root, i):
    return root / "JPEGImages" / f"{i}.jpg"


def labels_of(root, i):
    return root / "SegmentationClass" / f"{i}.png"


@pytest.fixture
def root(tmp_path):
    """A sound little VOC folder."""
    root, rng = tmp_path / "VOC2012", np.random.default_rng(0)
    for folder in ("JPEGImages", "SegmentationClass", voc.LISTS):
        (root / folder).mkdir(parents=True)
    write_list(root, "train", TRAIN)
    write_list(root, "val", VAL)
    for i in [*TRAIN, *VAL]:
        labels = rng.choice(np.array([0, 1, 2, 20, 255], np.uint8), rng.integers(8, 14, 2))
        write_image(image_of(root, i), labels)
        voc.save_labels(labels_of(root, i), labels)
    return root


def check(root, sbd=None):
    """(problems, notes), none of more than one line."""
    problems, notes = loading.DataSet(root, sbd).check()
    assert not any("\n" in line for line in problems + notes)
    return problems, notes


def test_palette_is_vocs():
    colours = voc.palette(256)
    assert colours.dtype == np.uint8 and colours.shape == (256, 3)
    for label, colour in {0: (0, 0, 0), 1: (128, 0, 0), 7: (128, 128, 128), 12: (64, 0, 128),
                          15: (192, 128, 128), 20: (0, 64, 128), 255: (224, 224, 192)}.items():
        assert tuple(colours[label]) == colour


def test_class_names_are_vocs_or_those_of_classes_txt(root):
    assert voc.class_names(root)[15] == "person" and len(voc.class_names(root)) == 21
    write_list(root, "classes", ["nothing", "boat house"], end="\r\n")
    assert voc.class_names(root) == ["nothing", "boat house"]
    for wrong in (["nothing", "cat", "cat"], ["nothing"], [str(i) for i in range(256)]):
        write_list(root, "classes", wrong)
        with pytest.raises(ValueError, match=f"classes.txt: found {len(wrong)} names, "):
            voc.class_names(root)
    (root / voc.LISTS / "classes.txt").rename(root / "classes.txt")
    with pytest.raises(ValueError, match="VOC2012/classes.txt: found class names here, expected"):
        voc.class_names(root)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\n\n", " \t\n", "\r\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_lists_keep_their_order_whatever_ends_their_lines(root, end, mark):
    write_list(root, "train", [mark + TRAIN[0], *TRAIN[1:], "a_1"], end)
    assert voc.image_list(root, "train") == TRAIN and voc.image_list(root, "val") == VAL


def test_load_gives_image_and_labels_and_saved_labels_come_back(root):
    image, labels = voc.load(root, "a_1")
    assert image.dtype == labels.dtype == np.uint8 and image.shape == (*labels.shape, 3)
    assert (image[:, :, 0] == labels).all() and (image[:, :, 1] == 7).all()
    png = Image.open(labels_of(root, "a_1"))
    assert png.mode == "P" and png.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
    assert check(root)[0] == []
    image_of(root, "a_1").rename(root / "JPEGImages" / "a_1.png")        # as microscopes have them
    assert (voc.load(root, "a_1")[0] == image).all()


def test_n_classes_bounds_the_labels(root):
    with pytest.raises(ValueError, match=r"a_1.png: labels: found 20, expected 0 to 19, or 255"):
        voc.load(root, "a_1", n_classes=20)


@pytest.fixture
def sbd(tmp_path, root):
    """SBD's folder: s_1 and s_2 are its own, a_1 is VOC train's, b_1 is VOC val's."""
    folder, labels = tmp_path / "dataset", np.full((5, 6), 3, np.uint8)
    (folder / "cls").mkdir(parents=True)
    (folder / "train.txt").write_text("s_2\nb_1\na_1\n")
    (folder / "val.txt").write_text("s_1\n")
    for i in ("s_1", "s_2", "a_1", "b_1"):
        scipy.io.savemat(folder / "cls" / f"{i}.mat", {"GTcls": {"Segmentation": labels}})
    (folder / "img").mkdir()
    write_image(folder / "img" / "s_1.jpg", labels)               # and s_2 is among VOC's
    write_image(image_of(root, "s_2"), labels)
    return folder


def test_training_list_is_voc_and_sbd_without_voc_val(root, sbd):
    assert voc.image_list(root, "train", sbd) == [*TRAIN, "s_2", "s_1"]
    assert voc.image_list(root, "train", sbd.parent) == [*TRAIN, "s_2", "s_1"]
    assert voc.image_list(root, "val", sbd) == VAL
    assert check(root, sbd)[0] == []
    image, labels = voc.load(root, "s_1", sbd)
    assert image.shape == (5, 6, 3) and labels.dtype == np.uint8 and (labels == 3).all()
    assert voc.load(root, "a_1", sbd)[1].shape != (5, 6)          # VOC's own labels come first
    labels_of(root, "b_1").unlink()
    [line] = check(root, sbd)[0]                                  # SBD has it, but without void
    assert "SegmentationClass/b_1.png: found no such file" in line


def test_sbd_as_a_folder_of_pngs(root, sbd, tmp_path):
    folder = sbd / "SegmentationClassAug"
    folder.mkdir()
    for i in ("s_2", "s_1", "a_1", "b_1"):
        voc.save_labels(folder / f"{i}.png", np.full((5, 6), 3, np.uint8))
    (folder / "._s_1.png").write_bytes(b"what a Mac leaves behind")
    assert voc.image_list(root, "train", folder) == [*TRAIN, "s_1", "s_2"]
    assert (voc.load(root, "s_2", folder)[1] == 3).all()
    assert check(root, folder)[0] == []


def test_broken_sbd_is_named(root, sbd, tmp_path):
    for folder in (tmp_path / "nowhere", root):
        with pytest.raises(FileNotFoundError, match=f"{folder}: neither SBD's dataset folder"):
            voc.image_list(root, "train", folder)
    (sbd / "cls" / "s_1.mat").write_bytes(b"no .mat file")
    scipy.io.savemat(sbd / "cls" / "s_2.mat", {"GTcls": {"Segmentation": np.full((5, 6), 300)}})
    scipy.io.savemat(sbd / "cls" / "s_3.mat", {"GTinst": {"Segmentation": np.full((5, 6), 1)}})
    write_image(image_of(root, "s_3"), np.zeros((5, 6), np.uint8))
    for name in ("s_1", "s_2", "s_3"):
        with pytest.raises(ValueError, match=f"{name}.mat: "):
            voc.load(root, name, sbd)
    (sbd / "val.txt").unlink()
    with pytest.raises(FileNotFoundError, match="dataset/val.txt"):
        voc.image_list(root, "train", sbd)


def test_a_list_of_paths_is_no_list_of_ids(root):
    write_list(root, "val", ["/JPEGImages/a_1.jpg /SegmentationClassAug/a_1.png"])
    with pytest.raises(ValueError, match=r"val.txt: '/JPEG.*png' is no image id"):
        voc.image_list(root, "val")


def test_a_photograph_is_not_turned_as_its_labels_are_not(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.open(image_of(root, "a_1"))
    picture.load()
    picture.save(image_of(root, "a_1"), format="PNG", exif=exif)
    image, labels = voc.load(root, "a_1")
    assert (image[:, :, 0] == labels).all()


def test_labels_are_the_values_of_a_palette_or_of_grey(root):
    path, size = labels_of(root, "a_1"), Image.open(image_of(root, "a_1")).size
    for mode, options in (("L", {}), ("P", {"bits": 2})):
        picture = Image.new(mode, size, 3)
        if mode == "P":
            picture.putpalette(voc.palette(4).tobytes())
        picture.save(path, **options)
        assert (voc.load(root, "a_1")[1] == 3).all()


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_of_an_rgb_label_picture_is_said_how_to_convert_it(root, mode):
    path = labels_of(root, "a_1")
    labels = np.array(Image.open(path))
    Image.open(path).convert(mode).save(path)
    with pytest.raises(ValueError, match=f"a_1.png: a picture of mode {mode}, but lab") as error:
        voc.load(root, "a_1")
    recipe = str(error.value).partition("become labels by ")[2]
    converted = eval(recipe, {"Image": Image, "voc": voc, "np": np, "path": path})
    converted.save(path)
    assert (voc.load(root, "a_1")[1] == labels).all()


@pytest.mark.parametrize("mode", ["1", "I;16", "LA"])
def test_labels_of_another_depth_are_refused(root, mode):
    Image.new(mode, Image.open(image_of(root, "a_1")).size).save(labels_of(root, "a_1"))
    with pytest.raises(ValueError, match=f"a_1.png: a picture of mode {mode}, but labels"):
        voc.load(root, "a_1")


def test_check_reports_every_broken_image_at_once(root):
    write_list(root, "train", [*TRAIN, "gone"])
    image_of(root, "a_2").unlink()
    labels_of(root, "b_1").write_bytes(b"")
    lines, _ = check(root)
    assert len(lines) == 3
    for words in ("JPEGImages/gone.jpg", "JPEGImages/a_2.jpg", "SegmentationClass/b_1.png"):
        assert sum(words in line for line in lines) == 1


def relabel(root, ids, *values):
    """Label pictures of left and right halves, or stripes, of these values."""
    for i in ids:
        H, W = np.array(Image.open(labels_of(root, i))).shape
        labels = np.array(values, np.uint8)[np.arange(W) * len(values) // W]         # (W,)
        voc.save_labels(labels_of(root, i), np.tile(labels, (H, 1)))


def test_classes_without_a_pixel_are_notes_by_list(root):
    write_list(root, "classes", ["nothing", "cat", "dog"])
    relabel(root, TRAIN, 0, 1, 255)
    relabel(root, VAL, 0, 2)
    assert check(root) == ([], [f"{root}: the training list has no pixel of dog",
                                f"{root}: the validation list has no pixel of cat"])


def test_masks_of_0_and_255_and_lists_of_one_class_are_problems(root):
    relabel(root, TRAIN, 0, 255)                                         # 255 is void
    relabel(root, VAL, 3, 3)
    training, validation = check(root)[0]
    assert training.startswith(f"{root}: the training list: labels are 0 and 255 alone, one class")
    assert "255 is void; save masks of two classes as 0 and 1" in training
    assert validation.startswith(f"{root}: the validation list: labels are 3 alone, one class, fr")
    relabel(root, VAL, 255)
    assert "validation list: labels are 255 alone" in check(root)[0][1]
    relabel(root, TRAIN, 0, 1)
    relabel(root, VAL, 1, 0, 255)
    assert check(root)[0] == []


def test_the_program_warns_before_training_and_check_ends_in_code_2(root, tmp_path, capsys):
    command = ["--voc", str(root), "--out", str(tmp_path / "out")]
    relabel(root, [*TRAIN, *VAL], 0, 1, 255)
    assert run_voc.main([*command, "--check"]) == 0                      # classes missing: notes
    out = capsys.readouterr().out
    assert "the training list has no pixel of bicycle, bird" in out and "no problem found" in out
    relabel(root, [*TRAIN, *VAL], 0, 255)
    assert run_voc.main([*command, "--check"]) == 2
    assert "the training list: labels are 0 and 255 alone" in capsys.readouterr().out
    assert run_voc.main([*command, "--stage", "unary", "--net", "tiny", "--iterations", "1"]) == 0
    assert ("warning: " + str(root) + ": the first training images: labels are 0 and 255 alone"
            in capsys.readouterr().out)


def wrong_size(path):
    labels = np.array(Image.open(path))
    voc.save_labels(path, labels[:-1])


def wrong_value(path):
    labels = np.array(Image.open(path))
    labels[0, -1] = 21
    voc.save_labels(path, labels)


def folder_for_file(path):
    path.unlink()
    path.mkdir()


IMAGE, LABELS, LIST = "JPEGImages/a_1.jpg", "SegmentationClass/a_1.png", f"{voc.LISTS}/train.txt"
FAULTS = {
    "missing": (os.remove, IMAGE, LABELS, LIST),
    "empty": (lambda path: path.write_bytes(b""), IMAGE, LABELS, LIST),
    "folder": (folder_for_file, IMAGE, LABELS, LIST),
    "cut": (lambda path: os.truncate(path, path.stat().st_size // 2), IMAGE, LABELS),
    "UTF-16": (lambda path: path.write_bytes("a_1\n".encode("utf-16")), LIST),
    "wrong size": (wrong_size, LABELS), "wrong value": (wrong_value, LABELS)}


@pytest.mark.parametrize("fault, name", [(fault, name) for fault, (_, *names) in FAULTS.items()
                                         for name in names])
def test_broken_folders_end_in_one_line_that_names_the_file(root, fault, name):
    FAULTS[fault][0](root / name)
    with pytest.raises((ValueError, OSError)) as error:
        data = loading.DataSet(root)
        data.load("a_1")
    assert str(root / name) in str(error.value) and "\n" not in str(error.value)
    if name != LIST:
        assert str(error.value) in check(root)[0]
