"""The data set on disk: lists, labels, and what is said of broken folders."""
import os
import shutil
import struct
import zlib

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
    for wrong in (["nothing", "cat", "cat"], ["nothing"], [str(i) for i in range(256)]):
        write_list(root, "classes", wrong)
        with pytest.raises(ValueError, match=f"classes.txt: found {len(wrong)} class names, "):
            voc.class_names(root)
    names = root / voc.LISTS / "classes.txt"
    for folder in (root, root / "ImageSets"):                            # too high
        names = names.rename(folder / "classes.txt")
        with pytest.raises(ValueError, match=f"{names}: class names are not read from here"):
            voc.class_names(root)
        assert voc.check(root)


def test_lists_keep_their_order(root):
    assert voc.image_list(root, "train") == TRAIN and voc.image_list(root, "val") == VAL


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
    assert "SegmentationClass/b_1.png: no such file for the labels" in line


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
    (tmp_path / "empty").mkdir()
    for name in ("nowhere", "empty"):
        with pytest.raises(FileNotFoundError, match=f"{name}: neither SBD's dataset folder"):
            voc.image_list(root, "train", tmp_path / name)
    (sbd / "cls" / "s_1.mat").write_bytes(b"no .mat file")
    scipy.io.savemat(sbd / "cls" / "s_2.mat", {"GTcls": {"Segmentation": np.full((5, 6), 300)}})
    for name in ("s_1", "s_2"):
        with pytest.raises(ValueError, match=f"{name}.mat: "):
            voc.load(root, name, sbd)
    (sbd / "val.txt").unlink()
    with pytest.raises(FileNotFoundError, match="dataset/val.txt: no such list"):
        voc.image_list(root, "train", sbd)


def test_photographs_may_be_png_of_any_depth_with_transparency_or_cmyk(root):
    """As microscopes and cameras leave them; converted as `predict` converts them."""
    labels = np.array(Image.open(labels_of(root, "a_1")))
    for name, mode in (("a_1.png", "I;16"), ("a_1.png", "RGBA"), ("a_1.jpg", "CMYK")):
        image_of(root, "a_1").unlink(missing_ok=True)
        picture = (Image.fromarray(np.full(labels.shape, 200 * 256, np.uint16)) if mode == "I;16"
                   else Image.new("RGB", labels.shape[::-1], (200, 200, 200)).convert(mode))
        picture.save(root / "JPEGImages" / name)
        image, _ = voc.load(root, "a_1")
        assert image.shape == (*labels.shape, 3) and (image == 200).all(), mode
        (root / "JPEGImages" / name).unlink()


def test_a_photograph_is_not_turned_as_its_labels_are_not(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.open(image_of(root, "a_1"))
    picture.load()
    picture.save(image_of(root, "a_1"), format="PNG", exif=exif)
    image, labels = voc.load(root, "a_1")
    assert (image[:, :, 0] == labels).all()


def test_labels_are_the_values_of_a_png(root):
    """Not the colours of a JPEG, nor values that Pillow stretches: 0 and 1 in 4 bits, 0 and 17."""
    path, size = labels_of(root, "a_1"), Image.open(image_of(root, "a_1")).size
    Image.new("L", size, 15).save(path, format="JPEG")
    with pytest.raises(ValueError, match="a_1.png: found a file that cannot be read .*label pict"):
        voc.load(root, "a_1")
    for bits in (1, 2, 4, 8, 16):
        rows = b"".join(b"\0" + bytes(-(-size[0] * bits // 8)) for _ in range(size[1]))
        path.write_bytes(png(*size, bits, zlib.compress(rows)))
        if bits == 8:
            assert not voc.load(root, "a_1")[1].any()
        else:
            with pytest.raises(ValueError, match=f"a_1.png: {bits} bits a pixel"):
                voc.load(root, "a_1")
    palette = Image.new("P", size, 3)                                    # a palette's values stay
    palette.putpalette(voc.palette(4).tobytes())
    palette.save(path, bits=2)
    assert (voc.load(root, "a_1")[1] == 3).all()


def test_half_unpacked_folders_are_named(root, tmp_path):
    below = tmp_path / "download" / "VOCdevkit" / "VOC2012"
    below.parent.mkdir(parents=True)
    shutil.copytree(root, below)
    with pytest.raises(FileNotFoundError, match=f"did you mean {below}\\?"):
        voc.image_list(tmp_path / "download", "train")
    shutil.rmtree(root / "SegmentationClass")
    with pytest.raises(FileNotFoundError, match="found no folder SegmentationClass; a VOC"):
        voc.class_names(root)
    with pytest.raises(FileNotFoundError, match="nowhere: found no folder JPEGImages"):
        voc.class_names(tmp_path / "nowhere")


def test_check_reports_every_problem_at_once(root):
    write_list(root, "train", [*TRAIN, "a_1", "../x", "b_2", "gone"])
    (root / "JPEGImages" / "a_2.jpg").unlink()
    (root / "SegmentationClass" / "b_1.png").write_bytes(b"")
    lines = voc.check(root)
    assert len(lines) == 6 and not any("\n" in line for line in lines)
    for words in ("'a_1' is listed 2 times", "'../x'", "found b_2 in both", "JPEGImages/gone.jpg",
                  "JPEGImages/a_2.jpg", "SegmentationClass/b_1.png"):
        assert sum(words in line for line in lines) == 1
    (root / voc.LISTS / "train.txt").unlink()
    (root / voc.LISTS / "val.txt").write_text("\n")
    assert len(voc.check(root)) == 2


def png(width, height, bits=8, pixels=zlib.compress(bytes(9999))):
    """A grey PNG."""
    def chunk(name, data):
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels)
            + chunk(b"IEND", b""))


BAD_IDS = ["../VOC2012/JPEGImages/a_1", "..", "C:\\a_1", "a_1\0",
           "/JPEGImages/a_1.jpg /SegmentationClassAug/a_1.png", "b" * 5000]


@pytest.mark.parametrize("bad", BAD_IDS)
def test_ids_are_bare_file_names(root, bad):
    """Nothing outside the folder can be named by a list, not even a picture that is there."""
    write_list(root, "train", ["a_1", bad])
    with pytest.raises(ValueError, match="train.txt: .* is no image id") as error:
        voc.image_list(root, "train")
    assert repr(bad[:100]) in str(error.value)
    write_list(root, "train", ["a_1", "é" * 100])                  # no such file: a name too long
    assert len(voc.check(root)) == 1


@pytest.mark.parametrize("kind", ["BMP", "TIFF"])
def test_only_jpeg_and_png_are_opened(root, kind):
    """Pillow reads many more formats, some by starting other programs."""
    picture = Image.open(labels_of(root, "a_1"))
    picture.save(labels_of(root, "a_1"), format=kind)
    with pytest.raises(ValueError, match="a_1.png: found a file that cannot be read"):
        voc.load(root, "a_1")


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_of_an_rgb_label_picture_is_said_how_to_convert_it(root, mode):
    path = labels_of(root, "a_1")
    labels = np.array(Image.open(path))
    Image.open(path).convert(mode).save(path)
    with pytest.raises(ValueError, match="a_1.png: an RGB picture, but labels are") as error:
        voc.load(root, "a_1")
    recipe = str(error.value).partition("become labels by ")[2]
    converted = eval(recipe, {"Image": Image, "voc": voc, "np": np, "path": path})
    converted.save(path)
    assert (voc.load(root, "a_1")[1] == labels).all()


def relabel(root, ids, *values):
    """Label pictures of left and right halves, or stripes, of these values."""
    for i in ids:
        H, W = np.array(Image.open(labels_of(root, i))).shape
        labels = np.array(values, np.uint8)[np.arange(W) * len(values) // W]         # (W,)
        voc.save_labels(labels_of(root, i), np.tile(labels, (H, 1)))


def test_classes_without_a_pixel_are_notes_by_list(root):
    write_list(root, "classes", ["nothing", "cat", "dog"])
    relabel(root, TRAIN, 0, 1, 255)
    relabel(root, VAL, 0, 1, 2)
    notes = []
    assert voc.check(root, notes=notes) == []
    assert notes == [f"{root}: the training list has no pixel of dog"]
    relabel(root, VAL, 0, 2)
    notes = []
    assert voc.check(root, notes=notes) == []
    assert notes[1:] == [f"{root}: the validation list has no pixel of cat"]


def test_masks_of_0_and_255_and_lists_of_one_class_are_problems(root):
    relabel(root, TRAIN, 0, 255)                                         # 255 is void
    relabel(root, VAL, 3, 3)
    training, validation = voc.check(root)
    assert training.startswith(f"{root}: the training list: labels are 0 and 255 alone, but 255 is")
    assert training.endswith("save the masks of two classes as 0 and 1")
    assert validation.startswith(f"{root}: the validation list: all labels are 3, and nothing can")
    relabel(root, VAL, 255)
    assert "validation list: all labels are void" in voc.check(root)[1]
    relabel(root, TRAIN, 0, 1)
    relabel(root, VAL, 1, 0, 255)
    assert voc.check(root) == []


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
    os.truncate(path, rng.integers(path.stat().st_size))
    return None


def fault_jpeg(root, i, rng):
    """Real JPEGs, grey, RGB or CMYK, whole or cut short."""
    size = np.array(Image.open(labels_of(root, i))).shape[::-1]
    Image.new(["L", "RGB", "CMYK"][rng.integers(3)], size).save(image_of(root, i), format="JPEG")
    whole = rng.random() < 0.5
    if not whole:
        os.truncate(image_of(root, i), image_of(root, i).stat().st_size // 2)
    return whole


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


def fault_line_endings(root, i, rng):
    end = ["\r\n", "\r", "\n\n", " \t\n", "\r\r\n"][rng.integers(5)]
    mark = "\ufeff" if rng.random() < 0.5 else ""
    write_list(root, "train", [mark + TRAIN[0], *TRAIN[1:]], end)
    return True


def fault_no_text(root, i, rng):
    content = ["a_1\n".encode("utf-16"), b"\xff\xfe\xfd", b" \n\n"][rng.integers(3)]
    (root / voc.LISTS / "train.txt").write_bytes(content)
    return False


FAULTS = [value for name, value in list(globals().items()) if name.startswith("fault_")]


@pytest.mark.filterwarnings("ignore:Image size")
def test_broken_folders_work_or_end_in_one_line(tmp_path):
    for case in range(2 * len(FAULTS)):
        rng = np.random.default_rng([1, case])
        root = make_voc(tmp_path / str(case), rng=rng)
        fault = FAULTS[case % len(FAULTS)]
        sound = fault(root, [*TRAIN, *VAL][rng.integers(5)], rng)
        error = None
        try:
            data = loading.DataSet(root)
            for image_id in (*data.train, *data.val):
                data.load(image_id)
        except (ValueError, FileNotFoundError) as caught:
            error = caught
        said = f"case {case}, {fault.__name__}: {error!r}"
        assert sound is None or sound == (error is None), said
        assert bool(voc.check(root)) == (error is not None), said
        for line in [str(error)] * (error is not None) + voc.check(root):
            assert str(root) in line and "\n" not in line and len(line) < 1000, said
