"""MATLAB's .mat files, in which SBD's labels and MatConvNet's weights come."""
import scipy.io

from ..saving import reason


def read_mat(path):
    """The variables {name: value} of a .mat file, as scipy.io.loadmat leaves them.

    Structs are arrays with named fields, cells arrays of objects, both of two dimensions.
    """
    try:
        with open(path, "rb") as file:
            return scipy.io.loadmat(file)
    except Exception as error:      # SciPy and zlib raise a dozen kinds for broken files
        raise ValueError(f"{path}: not a readable .mat file: {reason(error)}") from None
