"""SBD's and MatConvNet's .mat files: sound ones are read, all others end in one line."""
import numpy as np
import pytest
import scipy.io
import scipy.sparse

from minicrf.data import voc
from minicrf.data.matfiles import read_mat

LABELS = np.random.default_rng(1).integers(0, 21, (5, 7)).astype(np.uint8)


@pytest.fixture(params=[True, False], ids=["compressed", "uncompressed"])
def path(tmp_path, request):
    """A file as SBD's are: boundaries in a cell array of sparse matrices, labels, classes."""
    boundaries = np.empty((20, 1), object)
    boundaries[:, 0] = [scipy.sparse.csc_matrix(LABELS == i) for i in range(20)]
    scipy.io.savemat(tmp_path / "x.mat", {
        "GTcls": {"Boundaries": boundaries, "Segmentation": LABELS,
                  "CategoriesPresent": np.unique(LABELS)[:, None]}}, do_compression=request.param)
    return tmp_path / "x.mat"


def test_sbds_labels_are_read(path):
    labels = voc.read_labels(path)
    assert labels.dtype == np.uint8 and np.array_equal(labels, LABELS)


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_a_truncated_file_ends_in_one_line(path, share):
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=f"{path}: not a readable .mat file: ") as error:
        read_mat(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"no .mat file", b"\x89HDF\r\n\x1a\n" + bytes(200),
                                     b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\2IM"])
def test_what_is_no_mat_file_ends_in_one_line(tmp_path, content):
    (tmp_path / "x.mat").write_bytes(content)
    with pytest.raises(ValueError, match="x.mat: not a readable .mat file: "):
        read_mat(tmp_path / "x.mat")
