"""The data set on disk: lists, labels, batches, and what is said of broken folders."""
import itertools
import os
import shutil
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.io
from PIL import Image

from minicrf import training, vgg
from minicrf.data import loading, voc

TRAIN, VAL = ["a_1", "a_2", "a_3"], ["b_1", "b_2"]
MODEL = training.Model(vgg.build("tiny", 21), (1.0, 2.0, 3.0))
NET = {"resized": MODEL.resized}


def write_list(root, name, ids, end="\n"):
    (root / voc.LISTS / f"{name}.txt").write_bytes("".join(i + end for i in ids).encode())


def write_image(path, labels):
    """An image whose red channel tells its labels: PNG inside, so that no pixel is lost."""
    image = np.stack([labels, np.full_like(labels, 7), labels * 0], axis=-1)
    Image.fromarray(image).save(path, format="PNG")


def make_voc(root, train=TRAIN, val=VAL, rng=None):
    """A sound little VOC folder."""
    rng = rng or np.random.default_rng(0)
    for folder in ("JPEGImages", "SegmentationClass", voc.LISTS):
        (root / folder).mkdir(parents=True)
    write_list(root, "train", train)
    write_list(root, "val", val)
    for i in [*train, *val]:
        labels = rng.choice(np.array([0, 1, 2, 20, 255], np.uint8), rng.integers(8, 14, 2))
        write_image(root / "JPEGImages" / f"{i}.jpg", labels)
        voc.save_labels(root / "SegmentationClass" / f"{i}.png", labels)
    return root


@pytest.fixture
def root(tmp_path):
    return make_voc(tmp_path / "VOC2012")


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
    write_list(root, "classes", ["nothing", "cat", "cat"])
    with pytest.raises(ValueError, match="classes.txt.*'cat' 2 times"):
        voc.class_names(root)


def test_lists_keep_their_order(root):
    assert voc.image_list(root, "train") == TRAIN and voc.image_list(root, "val") == VAL
    with pytest.raises(ValueError, match="'test', expected 'train' or 'val'"):
        voc.image_list(root, "test")


def test_load_gives_image_and_labels_and_saved_labels_come_back(root):
    image, labels = voc.load(root, "a_1")
    assert image.dtype == labels.dtype == np.uint8 and image.shape == (*labels.shape, 3)
    assert (image[:, :, 0] == labels).all() and (image[:, :, 1] == 7).all()
    png = Image.open(root / "SegmentationClass" / "a_1.png")
    assert png.mode == "P" and png.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
    assert voc.check(root) == []


def test_n_classes_bounds_the_labels(root):
    with pytest.raises(ValueError, match=r"a_1.png: found label 20 .*expected 0 to 19, or 255"):
        voc.load(root, "a_1", n_classes=20)


def write_sbd(folder, ids, kind):
    labels = np.full((5, 6), 3, np.uint8)
    for i in ids:
        if kind == "mat":
            scipy.io.savemat(folder / "cls" / f"{i}.mat", {"GTcls": {"Segmentation": labels}})
            write_image(folder / "img" / f"{i}.jpg", labels)
        else:
            voc.save_labels(folder / f"{i}.png", labels)


@pytest.fixture
def sbd(tmp_path):
    """SBD's folder: s_1 and s_2 are its own, a_1 is VOC train's, b_1 is VOC val's."""
    folder = tmp_path / "benchmark_RELEASE" / "dataset"
    for name in ("cls", "img"):
        (folder / name).mkdir(parents=True)
    (folder / "train.txt").write_text("s_2\nb_1\na_1\n")
    (folder / "val.txt").write_text("s_1\n")
    write_sbd(folder, ["s_1", "s_2", "a_1", "b_1"], "mat")
    return folder


def test_training_list_is_voc_and_sbd_without_voc_val(root, sbd):
    for given in (sbd, sbd.parent):
        assert voc.image_list(root, "train", given) == [*TRAIN, "s_2", "s_1"]
        assert voc.image_list(root, "val", given) == VAL
        assert voc.check(root, given) == []
    image, labels = voc.load(root, "s_1", sbd)
    assert image.shape == (5, 6, 3) and labels.dtype == np.uint8 and (labels == 3).all()
    assert voc.load(root, "a_1", sbd)[1].shape != (5, 6)          # VOC's own labels come first
    labels_of(root, "b_1").unlink()
    [line] = voc.check(root, sbd)                                 # SBD has it, but without void
    assert "SegmentationClass/b_1.png: found no such file" in line


def test_sbd_as_a_folder_of_pngs(root, tmp_path):
    folder = tmp_path / "aug" / "SegmentationClassAug"
    folder.mkdir(parents=True)
    write_sbd(folder, ["s_2", "s_1", "a_1", "b_1"], "png")
    (folder / "._s_1.png").write_bytes(b"what a Mac leaves behind")
    for i in ("s_1", "s_2"):
        write_image(root / "JPEGImages" / f"{i}.jpg", np.zeros((5, 6), np.uint8))
    for given in (folder, folder.parent):
        assert voc.image_list(root, "train", given) == [*TRAIN, "s_1", "s_2"]
        assert (voc.load(root, "s_2", given)[1] == 3).all()
        assert voc.check(root, given) == []


def test_broken_sbd_is_named(root, sbd, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: found no such folder"):
        voc.image_list(root, "train", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty: found no label PNGs"):
        voc.image_list(root, "train", tmp_path / "empty")
    whole = (sbd / "cls" / "s_1.mat").read_bytes()
    rng = np.random.default_rng(3)
    for content in (b"", b"no .mat file", whole[:-9], *(rng.bytes(200) for _ in range(5))):
        (sbd / "cls" / "s_1.mat").write_bytes(content)
        with pytest.raises(ValueError, match="s_1.mat: found") as caught:
            voc.load(root, "s_1", sbd)
        assert "\n" not in str(caught.value)
    for value in (np.ones((5, 6)), "text", np.ones((5, 6, 2), np.uint8), np.full((5, 6), 300)):
        scipy.io.savemat(sbd / "cls" / "s_1.mat", {"GTcls": {"Segmentation": value}})
        with pytest.raises(ValueError, match="s_1.mat: found"):
            voc.load(root, "s_1", sbd)
    (sbd / "val.txt").unlink()
    with pytest.raises(FileNotFoundError, match="dataset/val.txt: found no such file"):
        voc.image_list(root, "train", sbd)


def test_network_input_is_bgr_minus_mean_and_square():
    image = np.zeros((6, 9, 3), np.uint8)
    image[:, 3:6] = (10, 20, 30)                                  # RGB
    x = MODEL.resized(image)
    S = x.shape[1]
    assert x.shape == (3, S, S) and x.dtype == np.float32 and x.flags.c_contiguous
    assert np.allclose(x[:, 5, S // 2], [29, 18, 7])      # middle third stays middle
    assert np.allclose(x[:, :, [0, -1]].mean(axis=1), [[-1, -1], [-2, -2], [-3, -3]])


def same(one, other):
    return all((a == b).all() for x, y in zip(one, other) for a, b in zip(x, y))


def test_epochs_draw_every_image_once_and_differ():
    drawn = list(itertools.islice(loading.draws(10, seed=4), 40))
    epochs = [drawn[i:i + 10] for i in range(0, 40, 10)]
    assert all(sorted(index for index, _ in epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(index for index, _ in epoch) for epoch in epochs}) == 4
    assert 8 < sum(mirrored for _, mirrored in drawn) < 32
    assert drawn != list(itertools.islice(loading.draws(10, seed=5), 40))
    for start in (0, 3, 10, 19, 33):
        assert list(itertools.islice(loading.draws(10, 4, start), 7)) == drawn[start:start + 7]


def test_batches_resume_exactly_with_any_number_of_threads(root):
    whole = list(itertools.islice(loading.batches(root, TRAIN, 2, seed=1, **NET), 6))
    for start, threads in ((0, 1), (2, 4), (8, 2)):
        again = loading.batches(root, TRAIN, 2, seed=1, start=start,
                                pool=ThreadPoolExecutor(threads), **NET)
        assert all(same(next(again), batch) for batch in whole[start // 2:])
        again.close()


def test_mirroring_turns_image_and_labels_together(root):
    image, labels = voc.load(root, "a_1")
    seen = set()
    for [(x, y, small)] in itertools.islice(loading.batches(root, ["a_1"], 1, seed=0, **NET), 12):
        assert (small == MODEL.resized(x)).all()
        assert (x[:, :, 0] == y).all()
        mirrored = not (y == labels).all()
        assert same([(x, y)], [(image[:, ::-1], labels[:, ::-1])]) == mirrored
        seen.add(mirrored)
    assert seen == {True, False}


def test_pictures_are_loaded_and_resized_ahead_of_use_in_other_threads(root):
    threads = []

    def resized(image):
        threads.append(threading.current_thread())
        return MODEL.resized(image)

    batches = loading.batches(root, TRAIN, 2, seed=0, resized=resized)
    next(batches)
    for _ in range(500):                     # nobody asks for more: still two batches get ready
        if len(threads) >= 4:
            break
        time.sleep(0.01)
    batches.close()
    assert len(threads) >= 4 and threading.main_thread() not in threads


def test_photographs_of_16_bits_or_with_transparency_are_refused(root):
    for mode in ("I;16", "RGBA"):
        shape = (10, 12, 4) if mode == "RGBA" else (10, 12)
        dtype = np.uint8 if mode == "RGBA" else np.uint16
        Image.fromarray(np.zeros(shape, dtype)).save(root / "JPEGImages" / "a_1.jpg", format="PNG")
        found = mode.replace(";16", "(;16)?")               # older Pillows call 16 bits I
        with pytest.raises(ValueError, match=f"a_1.jpg: found a picture of mode {found}, expected"):
            voc.load(root, "a_1")


def test_what_goes_wrong_in_a_thread_is_raised(root):
    (root / "JPEGImages" / "a_2.jpg").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="a_2.jpg: found a file that cannot be read"):
        for _ in itertools.islice(loading.batches(root, TRAIN, 2, seed=0, **NET), 4):
            pass
    with pytest.raises(ValueError, match="found 0 images for batches of 2"):
        next(loading.batches(root, [], 2, seed=0, **NET))


def test_half_unpacked_folders_are_named(root, tmp_path):
    below = tmp_path / "download" / "VOCdevkit" / "VOC2012"
    below.parent.mkdir(parents=True)
    shutil.copytree(root, below)
    with pytest.raises(FileNotFoundError, match=f"did you mean {below}\\?"):
        voc.image_list(tmp_path / "download", "train")
    shutil.rmtree(root / "SegmentationClass")
    with pytest.raises(FileNotFoundError, match="found no folder SegmentationClass, expected"):
        voc.class_names(root)
    with pytest.raises(FileNotFoundError, match="nowhere: found nothing"):
        voc.class_names(tmp_path / "nowhere")


def test_check_reports_every_problem_at_once(root):
    write_list(root, "train", [*TRAIN, "a_1", "../x", "b_2", "gone"])
    (root / "JPEGImages" / "a_2.jpg").unlink()
    (root / "SegmentationClass" / "b_1.png").write_bytes(b"")
    lines = voc.check(root)
    assert len(lines) == 6 and not any("\n" in line for line in lines)
    for words in ("'a_1' 2 times", "'../x'", "found b_2 in both", "JPEGImages/gone.jpg",
                  "JPEGImages/a_2.jpg", "SegmentationClass/b_1.png"):
        assert sum(words in line for line in lines) == 1
    (root / voc.LISTS / "train.txt").unlink()
    (root / voc.LISTS / "val.txt").write_text("\n")
    assert len(voc.check(root)) == 2


def png_header(width, height):
    """The beginning of a PNG that claims to be large."""
    def chunk(name, data):
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(9999))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels)


BAD_IDS = ["/etc/passwd", "../VOC2012/JPEGImages/a_1", "..", "C:\\a_1", "a_1\0", ".a", "a/b", "~",
           "/JPEGImages/a_1.jpg /SegmentationClassAug/a_1.png", "b" * 5000]


@pytest.mark.parametrize("bad", BAD_IDS)
def test_ids_are_bare_file_names(root, bad):
    """Nothing outside the folder can be named by a list, not even a picture that is there."""
    write_list(root, "train", ["a_1", bad])
    with pytest.raises(ValueError, match="train.txt: found .*expected an image id") as error:
        voc.image_list(root, "train")
    assert repr(bad[:100]) in str(error.value)
    write_list(root, "train", ["a_1", "é" * 100])                  # no such file: a name too long
    assert len(voc.check(root)) == 1


@pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF"])
def test_only_jpeg_and_png_are_opened(root, kind):
    """Pillow reads many more formats, some by starting other programs."""
    picture = Image.open(labels_of(root, "a_1"))
    picture.save(labels_of(root, "a_1"), format=kind)
    with pytest.raises(ValueError, match="a_1.png: found a file that cannot be read"):
        voc.load(root, "a_1")


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("side", [9_000, 12_000, 60_000])
def test_decompression_bombs_are_refused(root, side):
    path = root / "SegmentationClass" / "a_1.png"
    path.write_bytes(png_header(side, side))
    with pytest.raises(ValueError, match="a_1.png: found a file .*[0-9] pixels"):
        voc.load(root, "a_1")


# Broken folders at random.  Each fault takes (root, id, rng) and returns whether the folder is
# still sound: True, False, or None for either (a truncated file may lack what nobody needs).

def image_of(root, i):
    return root / "JPEGImages" / f"{i}.jpg"


def labels_of(root, i):
    return root / "SegmentationClass" / f"{i}.png"


def any_file(root, i, rng):
    lists = [root / voc.LISTS / f"{name}.txt" for name in ("train", "val")]
    return [image_of(root, i), labels_of(root, i), *lists][rng.integers(4)]


def fault_missing(root, i, rng):
    any_file(root, i, rng).unlink()
    return False


def fault_missing_folder(root, i, rng):
    shutil.rmtree(root / ["JPEGImages", "SegmentationClass", "ImageSets"][rng.integers(3)])
    return False


def fault_empty(root, i, rng):
    any_file(root, i, rng).write_bytes(b"")
    return False


def fault_folder_for_file(root, i, rng):
    path = any_file(root, i, rng)
    path.unlink()
    path.mkdir()
    return False


def fault_swapped(root, i, rng):
    one, other = image_of(root, i), labels_of(root, i)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    return False


def fault_truncated(root, i, rng):
    path = [image_of(root, i), labels_of(root, i)][rng.integers(2)]
    size = rng.integers(path.stat().st_size)
    os.truncate(path, size)
    return None


def fault_bytes_changed(root, i, rng):
    path = any_file(root, i, rng)
    content = bytearray(path.read_bytes())
    for place in rng.integers(len(content), size=rng.integers(1, 4)):
        content[place] ^= int(rng.integers(1, 256))
    path.write_bytes(bytes(content))
    return None


def fault_jpeg(root, i, rng):
    """Real JPEGs, grey, RGB or CMYK, whole or cut short."""
    size = np.array(Image.open(labels_of(root, i))).shape[::-1]
    Image.new(["L", "RGB", "CMYK"][rng.integers(3)], size).save(image_of(root, i), format="JPEG")
    if rng.random() < 0.5:
        os.truncate(image_of(root, i), image_of(root, i).stat().st_size // 2)
        return False
    return True


def fault_wrong_mode(root, i, rng):
    mode = ["RGB", "RGBA", "LA", "1", "I;16"][rng.integers(5)]
    Image.new(mode, Image.open(image_of(root, i)).size).save(labels_of(root, i))
    return False


def fault_wrong_size(root, i, rng):
    w, h = Image.open(image_of(root, i)).size
    size = [(h + w, w), (w + 1, h), (1, 1)][rng.integers(3)]
    voc.save_labels(labels_of(root, i), np.zeros(size[::-1], np.uint8))
    return False


def fault_wrong_value(root, i, rng):
    labels = np.array(Image.open(labels_of(root, i)))
    labels[0, rng.integers(labels.shape[1])] = rng.integers(21, 255)
    voc.save_labels(labels_of(root, i), labels)
    return False


def fault_duplicate(root, i, rng):
    write_list(root, "train", [*TRAIN, TRAIN[rng.integers(3)]])
    return False


def fault_line_endings(root, i, rng):
    end = ["\r\n", "\r", "\n\n", " \t\n", "\r\r\n"][rng.integers(5)]
    mark = "\ufeff" if rng.random() < 0.5 else ""
    write_list(root, "train", [mark + TRAIN[0], *TRAIN[1:]], end)
    return True


def fault_bad_id(root, i, rng):
    write_list(root, "val", [*VAL, BAD_IDS[rng.integers(len(BAD_IDS))]])
    return False


def fault_no_text(root, i, rng):
    content = ["a_1\n".encode("utf-16"), b"\xff\xfe\xfd", b" \n\n"][rng.integers(3)]
    (root / voc.LISTS / "train.txt").write_bytes(content)
    return False


def use(root):
    """All of the loader on a folder."""
    n_classes = len(voc.class_names(root))
    for split in ("train", "val"):
        ids = voc.image_list(root, split)
        for image_id in ids:
            voc.load(root, image_id, n_classes=n_classes)
        batches = loading.batches(root, ids, 2, seed=0, **NET)
        next(batches)
        batches.close()


FAULTS = [value for name, value in list(globals().items()) if name.startswith("fault_")]


def break_and_use(tmp_path, cases, seed):
    for case in range(cases):
        rng = np.random.default_rng([seed, case])
        root = make_voc(tmp_path / str(case), rng=rng)
        fault = FAULTS[case % len(FAULTS)]
        sound = fault(root, [*TRAIN, *VAL][rng.integers(5)], rng)
        error = None
        try:
            use(root)
        except (ValueError, FileNotFoundError) as caught:
            error = caught
        said = f"case {case}, {fault.__name__}: {error!r}"
        assert sound is None or sound == (error is None), said
        assert bool(voc.check(root)) == (error is not None), said
        for line in [str(error)] * (error is not None) + voc.check(root):
            assert str(root) in line and "\n" not in line and "found" in line, said
            assert "expected" in line and len(line) < 1000, said
        shutil.rmtree(root)


@pytest.mark.filterwarnings("ignore:Image size")
def test_broken_folders_work_or_end_in_one_line(tmp_path):
    break_and_use(tmp_path, 2 * len(FAULTS), seed=1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Image size")
def test_many_broken_folders_work_or_end_in_one_line(tmp_path):
    break_and_use(tmp_path, 200, seed=2)
