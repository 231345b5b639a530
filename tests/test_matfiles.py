"""SBD's and MatConvNet's .mat files: sound ones are read, all others end in one line."""
import numpy as np
import pytest
import scipy.io
import scipy.sparse

from minicrf.data import voc
from minicrf.data.matfiles import read_mat

LABELS = np.random.default_rng(1).integers(0, 21, (5, 7)).astype(np.uint8)


def write_sbd(path, compressed=True):
    """A file as SBD's are: boundaries in a cell array of sparse matrices, labels, classes."""
    boundaries = np.empty((20, 1), object)
    boundaries[:, 0] = [scipy.sparse.csc_matrix(LABELS == i) for i in range(20)]
    scipy.io.savemat(path, {"GTcls": {"Boundaries": boundaries, "Segmentation": LABELS,
                                      "CategoriesPresent": np.unique(LABELS)[:, None]}},
                     do_compression=compressed)
    return path


@pytest.mark.parametrize("compressed", [True, False])
def test_sbds_labels_are_read(tmp_path, compressed):
    labels = voc._read_mat(write_sbd(tmp_path / "x.mat", compressed))
    assert labels.dtype == np.uint8 and np.array_equal(labels, LABELS)


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_a_truncated_file_ends_in_one_line(tmp_path, compressed, share):
    path = write_sbd(tmp_path / "x.mat", compressed)
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=f"{path}: not a readable .mat file: ") as error:
        read_mat(path)
    assert "\n" not in str(error.value)


def test_a_flipped_bit_in_a_compressed_file_ends_in_one_line(tmp_path):
    path = write_sbd(tmp_path / "x.mat")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="x.mat: not a readable .mat file: "):
        read_mat(path)


@pytest.mark.parametrize("content", [b"no .mat file", b"\x89HDF\r\n\x1a\n" + bytes(200),
                                     b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\2IM"])
def test_what_is_no_mat_file_ends_in_one_line(tmp_path, content):
    (tmp_path / "x.mat").write_bytes(content)
    with pytest.raises(ValueError, match="x.mat: not a readable .mat file: "):
        read_mat(tmp_path / "x.mat")


@pytest.mark.parametrize("content", [5.0, "text", {}, {"Segmentation": np.ones((5, 6))},
                                     {"Segmentation": np.ones((5, 6, 2), np.uint8)},
                                     {"Segmentation": scipy.sparse.csc_matrix(np.eye(3))}])
def test_a_sound_file_without_labels(content, tmp_path):
    for name in ("GTcls", "GTinst"):
        scipy.io.savemat(tmp_path / "x.mat", {name: content})
        with pytest.raises(ValueError, match="x.mat: no GTcls.Segmentation of integers"):
            voc._read_mat(tmp_path / "x.mat")
