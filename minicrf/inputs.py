"""What callers hand in, checked once: arrays of the right kind and shape, scores, labels."""
import numpy as np

from .arrays import array_module

VOID = 255     # the label of pixels that are not scored: object borders and difficult regions


def check_array(name, x, shape):
    """Raises unless x is an array of that shape, in which a word stands for any number."""
    if not isinstance(x, array_module(x).ndarray):
        raise TypeError(f"{name}: found {type(x).__module__}.{type(x).__name__}, expected a NumPy "
                        "or CuPy array")
    if len(x.shape) != len(shape) or any(n != expected for n, expected in zip(x.shape, shape)
                                         if not isinstance(expected, str)):
        raise ValueError(f"{name}: found shape {x.shape}, expected "
                         f"({', '.join(map(str, shape))})")


def check_scores(scores, n_labels):
    check_array("scores", scores, ("...",) * max(getattr(scores, "ndim", 2) - 1, 1) + (n_labels,))
    if scores.dtype.str[1:] not in ("f4", "f8") or not scores.dtype.isnative or not scores.size:
        raise ValueError(f"scores: found {scores.size} numbers of {scores.dtype.name} "
                         f"({scores.dtype.str}), expected float32 or float64 in the machine's byte "
                         "order")
    # NumPy finds one maximum ten times faster than one a pixel; a GPU should be asked but once
    per_pixel = array_module(scores) is not np or scores.min() == -np.inf
    best = scores.max(axis=-1) if per_pixel else scores.max()
    if not bool((abs(best) < np.inf).all()):     # NaN compares as false
        raise ValueError("scores: found NaN, +inf, or a pixel with -inf for every label")


def check_image(image, shape):
    """Raises unless image is an array of that shape, as for check_array, and finite."""
    check_array("image", image, shape)
    if image.dtype.kind == "f" and not bool((abs(image) < np.inf).all()):
        raise ValueError("image: found NaN or infinite values, expected finite ones")


def check_labels(labels, shape, n_labels):
    """Raises unless labels on the host are whole numbers, 0 .. n_labels-1 or VOID, in that shape.

    Labels on a GPU are only looked at from outside: more would mean to wait for it.
    """
    check_array("labels", labels, shape)
    if labels.dtype.kind not in "iu":
        raise ValueError(f"labels: found {labels.dtype}, expected whole numbers, as of an integer "
                         "dtype")
    if n_labels > VOID:
        raise ValueError(f"n_labels: found {n_labels}, more than {VOID}, and label {VOID} is void")
    if array_module(labels) is np:
        wrong = (labels != VOID) & ((labels < 0) | (labels >= n_labels))
        if wrong.any():
            raise ValueError(f"labels: found {labels[wrong][0]}, expected 0 to {n_labels - 1}, or "
                             f"{VOID} for pixels without a label")
