"""The CRF against Eq. 5 in dense matrices; finite differences of it are in gradcheck."""
import numpy as np
import pytest
from helpers import drawn, example, refused
from reference import as_matrices, dense, mean_field

from minicrf import arrays
from minicrf.densecrf import DenseCRF
from minicrf.losses import softmax, softmax_loss

H, W, L = 4, 5, 3
SIGMAS = dict(sigma_position=(1.5, 2.), sigma_bilateral=(3., 4., 60., 80., 100.))
MATRICES = np.array([2., 5.])[:, None, None] * [[1., .3, -.2], [.3, .8, .1], [-.2, .1, .5]]
OPTIONS = [dict(normalization=normalization, exclude_self=exclude_self)
           for normalization in ("symmetric", "none") for exclude_self in (True, False)]


def image_features(image):
    """Position and colour, x first, one pixel at a time: (N, D+C) of an image (*S, C)."""
    return np.array([[*pixel[::-1], *image[pixel]] for pixel in np.ndindex(image.shape[:-1])])


def dense_kernels(crf, image):
    """The kernels of a DenseCRF as (N, N) matrices."""
    features = image_features(image)
    return [dense(features[:, :crf.params[name].size], np.exp(crf.params[name]), crf.normalization,
                  crf.exclude_self) for name in crf.params if name != "w"]


def inference(crf, scores, kernels):
    """Marginals (*S, L) by Eq. 5 in dense matrices."""
    f, W = scores.reshape(-1, crf.n_labels), as_matrices(crf.params["w"], crf.n_labels)
    return mean_field(f, kernels, W, crf.iterations, crf.damping)[-1].reshape(scores.shape)


@pytest.mark.parametrize("options", OPTIONS)
def test_exact_inference_is_equation_5(options):
    scores, image, _ = example()
    crf = DenseCRF(L, w=(0.5, 1.), exact=True, **SIGMAS, **options)
    q = crf.forward(scores, image)
    np.testing.assert_allclose(q, inference(crf, scores, dense_kernels(crf, image)),
                               atol=1e-12)
    np.testing.assert_allclose(softmax(crf.logits), q, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS)
def test_inference_on_the_lattice_is_equation_5_with_its_matrix(options):
    """Each kernel as a dense matrix: its answer to every pixel."""
    scores, image, _ = example()
    crf = DenseCRF(L, w=(0.5, 1.), **SIGMAS, **options)
    q = crf.forward(scores, image)
    one = np.eye(H * W)
    for kernel in crf.state.kernels:
        np.testing.assert_allclose(kernel.filter(one), kernel.K_with_self.filter(one)
                                   - np.diag(kernel.diagonal * crf.exclude_self), atol=1e-15)
    matrices = [kernel.filter(one)[:] for kernel in crf.state.kernels]
    np.testing.assert_allclose(q, inference(crf, scores, matrices), atol=1e-12)


def loss_and_gradient(crf, scores, image, labels):
    """Eq. 6 and its gradient to the scores; the parameters' gradients are left in crf.grads."""
    crf.forward(scores, image)
    loss, dz = softmax_loss(crf.logits.reshape(-1, crf.n_labels), labels.ravel())
    return float(loss), crf.backward_logits(dz)


def test_gradients_add_up():
    scores, image, labels = example()
    crf = DenseCRF(L, exact=True, **SIGMAS)
    loss_and_gradient(crf, scores, image, labels)
    once = {name: g.copy() for name, g in crf.grads.items()}
    loss_and_gradient(crf, scores, image, labels)
    for name, g in crf.grads.items():
        np.testing.assert_allclose(g, 2 * once[name])


@pytest.mark.parametrize("xy, rgb", [(20, 13), (40, 30), (80, 13)])
def test_lattice_shape_gradient_follows_the_exact_one_through_five_steps(xy, rgb):
    scores, image, labels = drawn()
    gradients = []
    for exact in (True, False):
        crf = DenseCRF(3, w=(1., 2.), sigma_bilateral=(xy, xy, rgb, rgb, rgb), exact=exact)
        loss_and_gradient(crf, scores, image, labels)
        gradients.append(np.concatenate([crf.grads["log_sigma_position"],
                                         crf.grads["log_sigma_bilateral"]]))
    (a, b), (length_a, length_b) = gradients, np.linalg.norm(gradients, axis=1)
    cosine, ratio = a @ b / (length_a * length_b), length_b / length_a
    assert cosine > 0.97 and 0.75 < ratio < 1.25, (cosine, ratio)


@pytest.mark.parametrize("width, tolerance, w, damping", [
    (3., 1e-3, (1., 2.), 0), (0.4, 5e-3, (1., 2.), 0), (3., 1e-3, MATRICES / 2, 1.)])
def test_gradients_in_float32_are_those_of_float64(width, tolerance, w, damping):
    """Widths are learned from sums in which large terms cancel, the more so the narrower they are.

    At 0.4 pixels the kernel hardly reaches the next pixel; further down only rounding is left.
    """
    scores, image, labels = drawn(96, 128)
    single, double = (DenseCRF(3, w=w, sigma_position=width, sigma_bilateral=(20., 13.),
                               damping=damping) for _ in range(2))
    loss_and_gradient(single, scores.astype(np.float32), image, labels)
    loss_and_gradient(double, scores, image, labels)
    for name, expected in double.grads.items():
        error = np.linalg.norm(single.grads[name] - expected) / np.linalg.norm(expected)
        assert error < tolerance, (name, error)


# Blocks, threads, memory

@pytest.mark.parametrize("options", [{}, dict(w=MATRICES, damping=1.), dict(exact=True)],
                         ids=["Potts", "damped matrices", "exact"])
def test_blocks_and_threads_change_no_bit(monkeypatch, options):
    scores, image, labels = example(20, 30)
    scores = scores.astype(np.float32)
    results = []
    for block, threads in ((64, 1), (64, 2), (64, 3)):
        monkeypatch.setattr(arrays, "BLOCK", block)
        monkeypatch.setattr(arrays, "POOL", arrays.POOL)               # put back in the end
        arrays._new_pool(threads)
        monkeypatch.setattr(arrays, "SMALL", 0)
        crf = DenseCRF(L, sigma_bilateral=(9., 9., 90., 90., 90.), **options)
        _, df = loss_and_gradient(crf, scores, image, labels)
        results.append((crf.logits, df, *crf.grads.values()))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            np.testing.assert_array_equal(a, b)


def test_inference_keeps_nothing_and_gives_the_same():
    scores, image, _ = example()
    crf = DenseCRF(L)
    found = crf.forward(scores, image, train=False)
    assert crf.state is None
    for asked in (lambda: crf.logits, lambda: crf.backward(scores),
                  lambda: crf.backward_logits(scores)):
        with pytest.raises(ValueError, match="backward: found no forward pass with train=True"):
            asked()
    np.testing.assert_array_equal(crf.forward(scores, image), found)
    kept = crf.state
    crf.forward(2 * scores, image, train=False)
    assert crf.state is kept


# Signals, photographs, volumes

SHAPES = pytest.mark.parametrize("shape", [(9,), (4, 5), (2, 3, 4)], ids=["1-D", "2-D", "3-D"])


@SHAPES
@pytest.mark.parametrize("exact", [True, False])
def test_axes_come_in_the_order_x_y_z(shape, exact):
    """Widths that tell all axes apart, against dense matrices; the lattice by its own answers."""
    rng, D = np.random.default_rng(0), len(shape)
    scores, image = rng.standard_normal((*shape, L)), rng.uniform(0, 255, (*shape, 1))
    crf = DenseCRF(L, w=(1., 2.), sigma_position=(0.7, 1.5, 3.)[:D], exact=exact, dimensions=D,
                   sigma_bilateral=(1., 2.5, 4.)[:D] + (60.,), channels=1)
    q = crf.forward(scores, image)
    position = image_features(image)[:, :D]                              # (N, D)
    np.testing.assert_allclose(crf.state.kernels[0].F * (0.7, 1.5, 3.)[:D], position, atol=1e-12)
    kernels = dense_kernels(crf, image) if exact else [kernel.filter(np.eye(len(position)))[:]
                                                       for kernel in crf.state.kernels]
    np.testing.assert_allclose(q, inference(crf, scores, kernels), atol=1e-12)


@SHAPES
def test_scalars_and_pairs_are_short_for_widths(shape):
    D = len(shape)
    short = DenseCRF(L, sigma_position=3, sigma_bilateral=(80, 13), dimensions=D, channels=2)
    long = DenseCRF(L, sigma_position=[3] * D, sigma_bilateral=[80] * D + [13] * 2, dimensions=D)
    assert short.params.keys() == long.params.keys()
    for name, p in short.params.items():
        np.testing.assert_array_equal(p, long.params[name])


def test_defaults():
    assert repr(DenseCRF(21)) == repr(DenseCRF(21, w=(3, 10), sigma_position=(3, 3),
                                               sigma_bilateral=(80, 80, 13, 13, 13)))


# Any image, any scores

@pytest.mark.parametrize("h, w, n_labels, channels", [
    (1, 1, 3, 3), (1, 30, 3, 3), (30, 1, 3, 3), (6, 7, 2, 3), (6, 7, 150, 3),
    (6, 7, 3, 1), (6, 7, 3, 7)])
def test_every_shape_works_forward_and_backward(h, w, n_labels, channels):
    scores, image, labels = example(h, w, n_labels, channels)
    crf = DenseCRF(n_labels, sigma_bilateral=(9., 9.) + (30.,) * channels)
    _, df = loss_and_gradient(crf, scores, image, labels)
    q = crf.forward(scores, image)
    assert q.shape == df.shape == scores.shape and q.dtype == np.float64
    np.testing.assert_allclose(q.sum(axis=2), 1)
    assert np.isfinite(df).all() and all(np.isfinite(g).all() for g in crf.grads.values())


@pytest.mark.parametrize("left_out", ["sigma_position", "sigma_bilateral"])
def test_either_kernel_can_be_left_out(left_out):
    scores, image, labels = example()
    crf = DenseCRF(L, w=(0.5, 1.), exact=True, **{**SIGMAS, left_out: None})
    assert crf.params["w"].tolist() == [1. if left_out == "sigma_position" else 0.5]
    assert "log_" + left_out not in crf.params and crf.params.keys() == crf.grads.keys()
    loss_and_gradient(crf, scores, image, labels)
    np.testing.assert_allclose(crf.forward(scores, image),
                               inference(crf, scores, dense_kernels(crf, image)))


def test_forbidden_labels_stay_forbidden():
    scores, image, labels = example()
    scores[1, 2, 0] = scores[0, 1, :2] = -np.inf
    labels[1, 2], labels[0, 1] = 1, 2
    crf = DenseCRF(L)
    loss, df = loss_and_gradient(crf, scores, image, labels)
    q = crf.forward(scores, image)
    assert q[1, 2, 0] == 0 and q[0, 1].tolist() == [0, 0, 1]
    assert np.isfinite(loss) and np.isfinite(df).all() and df[1, 2, 0] == 0
    with np.errstate(all="raise", under="ignore"):
        assert np.isfinite(crf.free_energy(q, scores, image))


def test_huge_messages_do_not_overflow():
    scores, image, _ = example()
    for w in (300., -300.):
        crf = DenseCRF(L, w=(w, w), exact=True, normalization="none", iterations=2, **SIGMAS)
        with np.errstate(all="raise", under="ignore"):
            q = crf.forward(scores, image)
        np.testing.assert_allclose(q, inference(crf, scores, dense_kernels(crf, image)), atol=1e-9)


def test_inputs_may_be_strided_and_are_never_written_to():
    scores, image, labels = example(8, 10)
    expected = DenseCRF(L, **SIGMAS).forward(scores, image)
    for a in (scores, image):
        a.setflags(write=False)
    strided = np.asfortranarray(scores), image[::-1].copy()[::-1]
    for s, i in ((scores, image), strided):
        crf = DenseCRF(L, **SIGMAS)
        kept = s.copy(), i.copy()
        np.testing.assert_allclose(crf.forward(s, i), expected, atol=1e-12)
        dz = softmax_loss(crf.logits.reshape(-1, L), labels.ravel())[1]
        dz.setflags(write=False)
        crf.backward_logits(dz)
        np.testing.assert_array_equal(s, kept[0])
        np.testing.assert_array_equal(i, kept[1])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtype_follows_the_scores(dtype):
    scores, image, labels = example()
    crf = DenseCRF(L)
    _, df = loss_and_gradient(crf, scores.astype(dtype), image.astype(np.uint8), labels)
    assert crf.forward(scores.astype(dtype), image).dtype == crf.logits.dtype == df.dtype == dtype
    assert all(p.dtype == np.float64 for p in [*crf.params.values(), *crf.grads.values()])


def test_no_iterations_give_the_softmax():
    scores, image, labels = example()
    crf = DenseCRF(L, iterations=0)
    np.testing.assert_allclose(crf.forward(scores, image), softmax(scores))
    _, df = loss_and_gradient(crf, scores, image, labels)
    _, expected = softmax_loss(scores.reshape(-1, L), labels.ravel())
    np.testing.assert_array_equal(df.reshape(-1, L), expected)


@pytest.mark.parametrize("spoil, message", [
    (lambda s, i: (s * np.nan, i), "scores: found NaN"),
    (lambda s, i: (s + np.inf, i), "scores: found NaN, .inf"),
    (lambda s, i: (s - np.inf, i), "-inf for every label"),
    (lambda s, i: (np.where(s == s.max(), -np.inf, np.inf), i), "scores: found NaN, .inf"),
    (lambda s, i: (s[:, :, :2], i), r"scores: found shape \(4, 5, 2\), expected \(..., ..., 3\)"),
    (lambda s, i: (s[0], i[0]), r"scores: found shape \(5, 3\), expected 2 dimensions and labels"),
    (lambda s, i: (s[:0], i[:0]), "scores: found 0 numbers"),
    (lambda s, i: (s.astype(int), i), "scores: found 60 numbers of int64 .<i8., expected float32"),
    (lambda s, i: (s.astype(np.float16), i), "scores: found 60 numbers of float16"),
    (lambda s, i: (s.astype(">f8"), i), "scores: .* .>f8., expected .* machine's byte order"),
    (lambda s, i: (s, i[:3]), r"image: found shape \(3, 5, 3\), expected \(4, 5, 3\)"),
    (lambda s, i: (s, i[:, :, 0]), r"image: found shape \(4, 5\), expected \(4, 5, 3\)"),
    (lambda s, i: (s, i[:, :, :1]), r"image: found shape \(4, 5, 1\), expected \(4, 5, 3\)"),
    (lambda s, i: (s, i * np.nan), "image: found NaN"),
])
def test_bad_input_is_refused_in_one_line(spoil, message):
    with refused(message):
        DenseCRF(L).forward(*spoil(*example()[:2]))


@pytest.mark.parametrize("spoil, message", [
    (lambda s, i: (s.tolist(), i), "scores: found builtins.list"),
    (lambda s, i: (memoryview(s), i), "scores: found builtins.memoryview"),
    (lambda s, i: (s, i.tolist()), "image: found builtins.list"),
    (lambda s, i: (s, None), "image: found builtins.NoneType"),
])
def test_what_is_no_array_is_refused(spoil, message):
    with refused(message + ", expected a NumPy or CuPy array$", TypeError):
        DenseCRF(L).forward(*spoil(*example()[:2]))


@pytest.mark.parametrize("options, message", [
    (dict(sigma_position=(3., 3., 3.)), "sigma_position: found 3 widths, .* of 2 dimensions$"),
    (dict(sigma_bilateral=(9., 9., 9.), dimensions=3), "sigma_bilateral: found 3 widths"),
    (dict(sigma_bilateral=(80.,)), "sigma_bilateral: found 1 widths, .* and each channel"),
    (dict(sigma_position=None, sigma_bilateral=None), "found 0 kernels"),
])
def test_bad_options_are_refused(options, message):
    with refused(message):
        DenseCRF(L, **options)
