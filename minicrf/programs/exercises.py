"""Exercises: bugs to put into this package on purpose, and to see finite differences find.

Try `python -m minicrf.gradcheck --break NAME`: which row fails, and can you say why?  Each bug
stands for one that people write: a sign, a transpose or a term forgotten on the way back.
"""
import contextlib
import inspect
import pkgutil
import textwrap

# name: (function, its right text, the wrong one that --break puts in its place)
BUGS = {
    "conv-dx-not-turned": (
        "layers.Conv2d.backward",
        "w[:, :, ::-1, ::-1]", "w"),
    "crf-softmax-forgotten": (
        "meanfield.FeatureCRF.backward",
        "through_marginals(dq, q, state.c if state.steps else 0)", "dq"),
    "kernel-transpose-forgotten": (
        "kernels.GaussianKernel.filter_transpose",
        "blur_transpose", "blur"),
    "kernel-n-dropped": (
        "kernels.GaussianKernel.backward",
        "dlog_sigma += dn @", "0 * dn @"),
    "crf-dz0-dropped": (
        "meanfield.FeatureCRF._back_track",
        "dz, *A)", "*A)"),
    "kernel-one-step": (
        "kernels.GaussianKernel.backward",
        "(sum(each) for", "(each[0] for"),
    "relu-mask-dropped": (
        "layers.ReLU.backward",
        "y > 0", "y >= 0"),
    "crf-start-damped": (
        "meanfield.FeatureCRF._back_track",
        "c if t > 1 else 0", "c"),
    "local-echo": (
        "localcrf._sweep",
        "z[i] - back[i]", "z[i]"),
    "loss-truth-dropped": (
        "losses.softmax_loss",
        "q[pixels, y] -= 1", "pass"),
}


@contextlib.contextmanager
def broken(path, right, wrong):
    """While this context lasts, one function of the package runs with `wrong` for `right` in it.

    Its code object is exchanged, so that whoever has imported it sees the bug; files stay as they
    are.  Raises ValueError where the right text is not there exactly once.
    """
    function = pkgutil.resolve_name("minicrf." + path)
    source, namespace, kept = textwrap.dedent(inspect.getsource(function)), {}, function.__code__
    if source.count(right) != 1:
        raise ValueError(f"found {right!r} {source.count(right)} times in {path}, expected once")
    exec(source.replace(right, wrong), namespace)
    function.__code__ = namespace[function.__name__].__code__
    try:
        yield
    finally:
        function.__code__ = kept
