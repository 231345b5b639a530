"""Exercises: bugs to put into this package on purpose, and to see finite differences find.

Try `python -m minicrf.gradcheck --break NAME`: which row fails, and can you say why?  Each bug
stands for one that people write: a sign, a transpose or a term forgotten on the way back.
"""
import contextlib
import inspect
import pkgutil
import textwrap

# function: {name: (right text, the wrong one that --break puts in its place)}
BUGS = {
    "layers.Conv2d.backward": {
        "conv-dw-sign": ("dw_matrix +=", "dw_matrix -="),
        "conv-db-dropped": ("cells_dy.sum(axis=(0, 2))", "0"),
        "conv-dx-not-turned": ("w[:, :, ::-1, ::-1]", "w")},
    "layers.ReLU.backward": {"relu-mask-dropped": ("y > 0", "y >= 0")},
    "layers.MaxPool2d.backward": {"pool-to-all-taps": ("(winner[p] == number)", "1")},
    "layers.Dropout.backward": {
        "dropout-mask-dropped": ("dy *= kept", "pass"),
        "dropout-scale-dropped": ("1 / (1 - self.rate)", "1")},
    "layers.BilinearUpsample.backward": {
        "upsample-transposed": ("transpose(2, 0, 1)", "transpose(2, 1, 0)")},
    "layers.Sequential.backward": {
        "sequential-not-chained": ("dy = layer.backward(dy)", "layer.backward(dy.copy())")},
    "losses.softmax_loss": {
        "loss-truth-dropped": ("q[pixels, y] -= 1", "pass"),
        "loss-void-counted": ("q *= weight[:, None]", "q *= weight.max()")},
    "densecrf.DenseCRF.backward": {
        "crf-softmax-forgotten": ("_through_softmax(dq.reshape(q.shape), q)", "dq")},
    "densecrf._through_softmax": {"crf-softmax-term-dropped": ("- _row_dots(dq, q)[:, None]", "")},
    "densecrf.DenseCRF.backward_logits": {
        "crf-dz-dropped": ("df[rows] += dz[rows]", "pass"),
        "crf-dz0-dropped": ("df += dz\n", "pass\n"),
        "crf-transpose-forgotten": ("spread_transpose", "spread"),
        "crf-message-sign": ("dq += w[m] * K_dz", "dq -= w[m] * K_dz"),
        "crf-message-unweighted": ("w[m] * K_dz", "K_dz"),
        "crf-self-forgotten": ("dq = -self_weight[rows]", "dq = 0"),
        "crf-softmax-skipped": ("dz[rows] = _through_softmax(dq, q[rows])", "dz[rows] = dq"),
        "crf-dw-one-step": ("forth[m, rows] +=", "forth[m, rows] ="),
        "crf-dsigma-back-one-step": ("back[m, rows] +=", "back[m, rows] ="),
        "crf-product-one-step": ("product[rows] +=", "product[rows] ="),
        "crf-dsigma-cross-dropped": ("cross[m] +=", "cross[m] = 0 *")},
    "densecrf.DenseCRF._add_parameter_gradients": {
        "crf-dw-self-forgotten": ("forth[m] - kernel.self_weight * product", "forth[m]"),
        "crf-dsigma-forth-dropped": ("forth[m] + back[m]", "back[m]"),
        "crf-dsigma-back-dropped": ("forth[m] + back[m]", "forth[m]"),
        "crf-dsigma-unweighted": ('self.params["w"][m] * dsigma', "dsigma")},
    "kernels.GaussianKernel.shape_gradient": {
        "kernel-cross-sign": ("- 2 * cross", "+ 2 * cross"),
        "kernel-n-dropped": ("gradient += (", "0 * ("),
        "kernel-n-squares-dropped": ("+ K_squares", ""),
        "kernel-kappa-dropped": ("self.self_weight * product - outer / 2", "-outer / 2")},
    "permutohedral.PermutohedralLattice.spread_transpose": {
        "lattice-blurs-not-reversed": ("reversed(self.blurs)", "self.blurs")},
    "permutohedral.PermutohedralLattice.inner": {
        "lattice-inner-not-blurred": ("self.spread(b)", "self._splat(b)")},
    "training.accumulate_gradients": {
        # "truth minus marginals" alone, back-tracking left out
        "joint-crf-skipped": ("df = crf.backward_logits(df)", "crf.backward_logits(df)"),
        "joint-loss-of-unary-scores": ("z = crf.logits", "z = f.copy()"),
        "joint-share-dropped": ("dz *= dz.dtype.type(share)", "pass"),
        "joint-upsampling-turned": ("upsample.backward(df)", "upsample.backward(df)[:, ::-1]"),
        "joint-net-dropped": ("net.backward(dscores)", "pass")},
    "localcrf.LocalCRF.backward": {
        "local-truth-dropped": ("self._b - self._b_y", "self._b"),
        "local-dw-truth-dropped": ("d = P - P_y", "d = P"),
        "local-dw-contrast-dropped": ("contrast * d", "d"),
        "local-labelled-forgotten": ("dloss / self._labelled", "dloss")},
    "localcrf._sweep": {
        "local-rho-forgotten": ("z[i + 1] += rho * change", "z[i + 1] += change"),
        "local-echo": ("z[i] - back[i]", "z[i]")},
}


@contextlib.contextmanager
def broken(name):
    """While this context lasts, one function of the package runs with the bug of that name.

    Its code object is exchanged, so that whoever has imported it sees the bug; files stay as they
    are.  Raises ValueError where the right text is not there exactly once.
    """
    path, right, wrong = next((path, *bugs[name]) for path, bugs in BUGS.items() if name in bugs)
    function = pkgutil.resolve_name("minicrf." + path)
    source, namespace, kept = textwrap.dedent(inspect.getsource(function)), {}, function.__code__
    if source.count(right) != 1:
        raise ValueError(f"{name}: found {right!r} {source.count(right)} times in {path}, "
                         "expected once")
    exec(source.replace(right, wrong), namespace)
    function.__code__ = namespace[function.__name__].__code__
    try:
        yield
    finally:
        function.__code__ = kept
