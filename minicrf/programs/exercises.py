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
        "conv-dw-sign": ("dw += dturned", "dw -= dturned"),
        "conv-db-dropped": ("dy.reshape(len(dy), O, -1).sum(axis=2).sum(axis=0)", "0"),
        "conv-dx-not-turned": ("w[:, :, ::-1, ::-1]", "w")},
    "layers.ReLU.backward": {"relu-mask-dropped": ("y[p] > 0", "y[p] >= 0")},
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
    "permutohedral.PermutohedralLattice.blur_transpose": {
        "lattice-blurs-not-reversed": ("reversed(self.blurs)", "self.blurs")},
    "kernels.GaussianKernel.shape_gradient": {
        "kernel-cross-sign": ("- 2 * cross", "+ 2 * cross"),
        "kernel-n-dropped": ("gradient += (", "0 * ("),
        "kernel-n-squares-dropped": ("+ K_squares", ""),
        "kernel-kappa-dropped": ("self.self_weight[:, 0] * product - outer / 2", "-outer / 2")},
    "kernels.KernelGradient.__init__": {
        "kernel-moments-unnormalised": ("kernel.K_hat.side_by_side", "kernel.K.side_by_side")},
    "kernels.KernelGradient.spread": {
        "kernel-q-unmixed": ("[self.mixed(", "[("),
        "kernel-cross-one-step": ("self.cross[part] +=", "self.cross[part] ="),
        "kernel-transpose-forgotten": ("blur_transpose", "blur")},
    "kernels.KernelGradient.gather": {
        "kernel-outer-forth-dropped": ("row_sums(dz * K_q) + ", ""),
        "kernel-outer-back-dropped": (" + row_sums(q * self.mixed(K_dz))", ""),
        "kernel-outer-one-step": ("self.outer[rows] +=", "self.outer[rows] ="),
        "kernel-product-unmixed": ("self.mixed(dz)", "dz"),
        "kernel-product-one-step": ("self.product[rows] +=", "self.product[rows] ="),
        "kernel-dw-one-step": ("self.dW_of_rows.get(rows.start, 0) + dW", "dW"),
        "kernel-self-forgotten": ("K_dz -= self.kernel.self_weight[rows] * dz", "pass"),
        "kernel-message-unweighted": ("return compatible(K_dz, self.W)", "return K_dz")},
    "kernels.KernelGradient.result": {
        "kernel-cross-of-others": ("(self.cross)[1:]", "(self.cross)[:-1]"),
        "kernel-dw-lopsided": ("(dW + dW.T) / 2", "dW"),
        "kernel-dsigma-unweighted": (" * (self.W if isinstance(self.W, float) else 1)", "")},
    "marginals.through_marginals": {
        "marginals-sum-forgotten": ("(dq - mean[:, None])", "dq"),
        "marginals-undamped": ("q / (1 + c * q) if c else q", "q"),
        "marginals-mean-of-more-than-one": ("/ row_sums(h) if c else", "if c else")},
    "meanfield.FeatureCRF.backward": {
        "crf-softmax-forgotten": ("through_marginals(dq, state.q, state.c)", "dq"),
        "crf-last-step-undamped": ("state.q, state.c", "state.q, 0")},
    "meanfield.FeatureCRF.backward_logits": {
        "crf-logits-undamped": ("if state.c and state.steps", "if False"),
        "crf-logits-undivided": ("dz = weight * dz", "pass"),
        "crf-logits-lambda-dropped": ("dz -= h * (", "0 * h * (")},
    "meanfield.FeatureCRF._back_track": {
        "crf-dz-dropped": ("df[rows] += dz[rows]", "pass"),
        "crf-dz0-dropped": ("df += dz\n", "pass\n"),
        "crf-damping-dropped": ("dq = c * dz[rows]", "dq = 0 * dz[rows]"),
        "crf-message-sign": ("dq += kernel.gather", "dq -= kernel.gather"),
        "crf-softmax-skipped": ("dz[rows] = through_marginals(dq, q[rows], c if t > 1 else 0)",
                                "dz[rows] = dq"),
        "crf-start-damped": ("c if t > 1 else 0", "c")},
    "learning.crf_gradients": {
        # "truth minus marginals" alone, back-tracking left out
        "joint-crf-skipped": ("loss, crf.backward_logits(dz), crf.grads",
                              "loss, (crf.backward_logits(dz), dz)[1], crf.grads"),
        "joint-loss-of-unary-scores": ("softmax_loss(crf.logits", "softmax_loss(f")},
    "training.image_gradients": {
        "joint-share-dropped": ("df *= df.dtype.type(share)", "pass"),
        "joint-crf-share-dropped": ("share * g for", "g for"),
        "joint-upsampling-turned": ("backward(df.reshape(f.shape))",
                                    "backward(df.reshape(f.shape)[:, ::-1])")},
    "training.accumulate_gradients": {
        "joint-crf-one-image": ("model.crf.grads[key] += g", "model.crf.grads[key][...] = g"),
        "joint-net-dropped": ("net.backward(array_module(scores).stack(dscores))", "pass")},
    "localcrf.LocalCRF.backward": {
        "local-truth-dropped": ("self._b - self._b_y", "self._b"),
        "local-dw-truth-dropped": ("d = P - P_y", "d = P"),
        "local-dw-contrast-dropped": ("contrast * d", "d"),
        "local-labelled-forgotten": ("dloss / self._labelled", "dloss")},
    "localcrf._sweep": {
        "local-rho-forgotten": ("z[i + 1] += rho * (m", "z[i + 1] += (m"),
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
