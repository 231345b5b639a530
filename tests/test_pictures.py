"""Photographs of every kind come in as RGB, and broken ones with one clear line."""
import numpy as np
import pytest
from PIL import Image

from minicrf.data import pictures


@pytest.fixture
def gradient():
    """(8, 12, 3): red grows to the right, green downwards."""
    y, x = np.mgrid[:8, :12]
    return np.stack([20 * x, 30 * y, np.full_like(x, 90)], axis=2).astype(np.uint8)


def read_back(tmp_path, picture, name="a.png", **options):
    picture.save(tmp_path / name, **options)
    return pictures.read_photograph(str(tmp_path / name))


def test_rgb_comes_back_as_it_was(tmp_path, gradient):
    assert np.array_equal(read_back(tmp_path, Image.fromarray(gradient)), gradient)


def test_grey_in_8_and_16_bits_becomes_three_equal_channels(tmp_path):
    grey = np.arange(96, dtype=np.uint8).reshape(8, 12) * 2
    eight = read_back(tmp_path, Image.fromarray(grey))
    assert (eight == grey[:, :, None]).all()
    sixteen = read_back(tmp_path, Image.fromarray(grey.astype(np.uint16) * 256))
    assert sixteen.shape == (8, 12, 3) and sixteen.dtype == np.uint8
    assert abs(sixteen[:, :, 0].astype(int) - grey * 1.0).max() <= 1    # 16 bits: v / 256


def test_transparent_pixels_turn_white(tmp_path, gradient):
    alpha = np.full((8, 12, 1), 255, np.uint8)
    alpha[2:4] = 0
    found = read_back(tmp_path, Image.fromarray(np.concatenate([gradient, alpha], axis=2)))
    assert (found[2:4] == 255).all() and np.array_equal(found[4:], gradient[4:])


def test_cmyk_and_palette_are_converted(tmp_path, gradient):
    cmyk = read_back(tmp_path, Image.fromarray(gradient).convert("CMYK"), "a.jpg", quality=95)
    assert abs(cmyk.astype(int) - gradient).mean() < 12
    few = read_back(tmp_path, Image.new("P", (4, 3), 0))
    assert few.shape == (3, 4, 3)


def test_the_orientation_tag_is_respected(tmp_path, gradient):
    exif = Image.Exif()
    exif[0x0112] = 6                                         # turn by 90 degrees, clockwise
    found = read_back(tmp_path, Image.fromarray(gradient), "a.png", exif=exif)
    assert np.array_equal(found, np.rot90(gradient, -1))


def test_broken_files_end_in_one_line_that_names_them(tmp_path, gradient):
    Image.fromarray(gradient.repeat(20, 0).repeat(20, 1)).save(tmp_path / "cut.jpg")
    whole = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("cut.jpg", "text.jpg", "empty.png", "missing.png"):
        with pytest.raises((ValueError, OSError)) as error:
            pictures.read_photograph(str(tmp_path / name))
        assert name in str(error.value) and "\n" not in str(error.value)


def test_folders_are_searched_and_empty_ones_refused(tmp_path, gradient):
    with pytest.raises(FileNotFoundError, match="found no photographs"):
        pictures.find_photographs(str(tmp_path))
    Image.fromarray(gradient).save(tmp_path / "b.png")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "folder.png").mkdir()
    assert pictures.find_photographs(str(tmp_path)) == [str(tmp_path / "b.png")]


def test_32_bits_a_pixel_are_refused_since_their_range_is_unknown(tmp_path, gradient):
    for mode, values in (("F", gradient[:, :, 0] / 255), ("I", gradient[:, :, 0] * 70000.)):
        Image.fromarray(values.astype({"F": np.float32, "I": np.int32}[mode])).save(
            tmp_path / "a.tif")
        with pytest.raises(ValueError, match=rf"a.tif: found .* 32 bits a pixel \(mode {mode}\)"):
            pictures.read_photograph(str(tmp_path / "a.tif"))


def test_shrinking_keeps_the_shape_and_the_limit():
    image = np.zeros((300, 400, 3), np.uint8)
    small = pictures.shrink(image, max_pixels=1200)
    assert small.shape == (30, 40, 3)
    assert pictures.shrink(small, max_pixels=1200).shape == small.shape
    assert pictures.enlarge(np.zeros((30, 40), np.uint8), (300, 400)).shape == (300, 400)
