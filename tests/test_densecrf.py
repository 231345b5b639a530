"""The CRF against Eq. 5 in dense matrices; finite differences of it are in gradcheck."""
import numpy as np
import pytest
from reference import as_matrices, dense, mean_field

from minicrf import arrays
from minicrf.densecrf import DenseCRF
from minicrf.losses import softmax, softmax_loss
from minicrf.scores import scores_from_labels, scores_from_probabilities

H, W, L = 4, 5, 3
SIGMAS = dict(sigma_position=(1.5, 2.), sigma_bilateral=(3., 4., 60., 80., 100.))
MATRICES = np.array([2., 5.])[:, None, None] * [[1., .3, -.2], [.3, .8, .1], [-.2, .1, .5]]
OPTIONS = [dict(normalization=normalization, exclude_self=exclude_self)
           for normalization in ("symmetric", "none") for exclude_self in (True, False)]


def example(h=H, w=W, n_labels=L, channels=3, seed=0):
    """Scores (h, w, L), an image (h, w, C) and labels (N,), one of them void."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n_labels, h * w)
    labels[0] = 255
    return rng.standard_normal((h, w, n_labels)), rng.uniform(0, 255, (h, w, channels)), labels


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
    loss, dz = softmax_loss(crf.logits.reshape(-1, crf.n_labels), labels)
    return float(loss), crf.backward_logits(dz)


def test_gradients_add_up():
    scores, image, labels = example()
    crf = DenseCRF(L, exact=True, **SIGMAS)
    loss_and_gradient(crf, scores, image, labels)
    once = {name: g.copy() for name, g in crf.grads.items()}
    loss_and_gradient(crf, scores, image, labels)
    for name, g in crf.grads.items():
        np.testing.assert_allclose(g, 2 * once[name])


def drawn(h=48, w=64):
    """A drawn image of shaded discs (h, w, 3), noisy scores (h, w, 3) and the true labels (N,)."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:h, :w]
    labels = np.zeros((h, w), dtype=int)
    labels[(x - 20) ** 2 + (y - 20) ** 2 < 150] = 1
    labels[(x - 44) ** 2 + (y - 30) ** 2 < 130] = 2
    colours = np.array([[70, 110, 60], [160, 100, 80], [110, 120, 150]])
    image = colours[labels] + (0.5 * x + 0.3 * y)[..., None] + rng.normal(0, 12, (h, w, 3))
    scores = np.eye(3)[labels] + rng.standard_normal((h, w, 3))
    return image, scores, labels.ravel()


@pytest.mark.parametrize("xy, rgb", [(20, 13), (40, 30), (80, 13)])
def test_lattice_shape_gradient_follows_the_exact_one_through_five_steps(xy, rgb):
    image, scores, labels = drawn()
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
    image, scores, labels = drawn(96, 128)
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
    np.testing.assert_allclose(crf.state.kernels[0].F * (0.7, 1.5, 3.)[:D],
                               position - position.mean(axis=0), atol=1e-12)
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


def test_defaults_and_repr():
    assert repr(DenseCRF(21)) == repr(DenseCRF(21, w=(3, 10), sigma_position=(3, 3),
                                               sigma_bilateral=(80, 80, 13, 13, 13)))
    assert repr(DenseCRF(2, sigma_position=None)) == (
        "DenseCRF(2, w=[10.0], sigma_bilateral=[80.0, 80.0, 13.0, 13.0, 13.0], iterations=5, "
        "normalization='symmetric', exclude_self=True, damping=0.0, exact=False)")


def volume():
    """Two blobs in a volume (10, 12, 16), noisy scores, noisy grey, and the true labels."""
    rng, (z, y, x) = np.random.default_rng(0), np.mgrid[:10, :12, :16]
    labels = np.zeros(x.shape, dtype=int)
    labels[(x - 5) ** 2 + (y - 6) ** 2 + (z - 5) ** 2 < 20] = 1
    labels[(x - 12) ** 2 + (y - 5) ** 2 + (2 * z - 8) ** 2 < 16] = 2
    image = 40 + 70 * labels + rng.normal(0, 15, x.shape)
    return np.eye(3)[labels] + rng.standard_normal((*x.shape, 3)), image[..., None], labels


def test_a_volume_is_cleaned_as_brute_force_cleans_it():
    scores, image, labels = volume()
    options = dict(w=(2., 4.), sigma_position=(1.5, 1.5, 1.), sigma_bilateral=(6., 6., 4., 25.),
                   dimensions=3)
    exact, lattice = (DenseCRF(3, exact=exact, **options) for exact in (True, False))
    p, q = exact.forward(scores, image), lattice.forward(scores, image)
    block = tuple(slice(n, n + 6) for n in (3, 4, 3))            # as a volume of its own
    np.testing.assert_allclose(
        exact.forward(scores[block], image[block]),
        inference(exact, scores[block], dense_kernels(exact, image[block])), atol=1e-10)
    before, by_force, after = ((a.argmax(axis=3) == labels).mean() for a in (scores, p, q))
    assert before < 0.7 and by_force > 0.97 and after > 0.97, (before, by_force, after)
    assert abs(p - q).mean() < 0.02 and (p.argmax(axis=3) == q.argmax(axis=3)).mean() > 0.98


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


def test_one_pixel_keeps_its_own_mind():
    scores, image, _ = example(1, 1)
    for exact in (True, False):
        np.testing.assert_allclose(DenseCRF(L, exact=exact).forward(scores, image), softmax(scores))


def test_constant_image_is_smoothed_by_position_alone():
    scores, image, _ = example(12, 12)
    both = DenseCRF(L, w=(0., 5.), sigma_bilateral=(3., 3., 9., 9., 9.), exact=True)
    position = DenseCRF(L, w=(5.,), sigma_bilateral=None, exact=True)
    q = both.forward(scores, np.full_like(image, 77))
    np.testing.assert_allclose(q, position.forward(scores, image), atol=1e-9)
    lattice = DenseCRF(L, w=(0., 5.), sigma_bilateral=(3., 3., 9., 9., 9.))
    assert abs(lattice.forward(scores, np.full_like(image, 77)) - q).mean() < 0.05


@pytest.mark.parametrize("left_out", ["sigma_position", "sigma_bilateral"])
def test_either_kernel_can_be_left_out(left_out):
    scores, image, labels = example()
    crf = DenseCRF(L, w=(0.5, 1.), exact=True, **{**SIGMAS, left_out: None})
    assert crf.params["w"].tolist() == [1. if left_out == "sigma_position" else 0.5]
    assert "log_" + left_out not in crf.params and crf.params.keys() == crf.grads.keys()
    np.testing.assert_allclose(crf.forward(scores, image), inference(crf, scores, dense_kernels(crf, image)))
    loss_and_gradient(crf, scores, image, labels)


def test_forbidden_labels_stay_forbidden():
    scores, image, labels = example()
    scores[1, 2, 0] = scores[0, 1, :2] = -np.inf
    labels[7], labels[1] = 1, 2
    crf = DenseCRF(L)
    loss, df = loss_and_gradient(crf, scores, image, labels)
    q = crf.forward(scores, image)
    assert q[1, 2, 0] == 0 and q[0, 1].tolist() == [0, 0, 1]
    assert np.isfinite(loss) and np.isfinite(df).all() and df[1, 2, 0] == 0


@pytest.mark.parametrize("scale", [1e6, -1e6])
def test_huge_scores_decide_alone(scale):
    scores, image, _ = example()
    q = DenseCRF(L).forward((scores * scale).astype(np.float32), image)
    np.testing.assert_array_equal(q.argmax(axis=2), (scores * scale).argmax(axis=2))
    assert np.isfinite(q).all()


def test_huge_messages_do_not_overflow():
    scores, image, _ = example()
    for w in (300., -300.):
        crf = DenseCRF(L, w=(w, w), exact=True, normalization="none", iterations=2, **SIGMAS)
        with np.errstate(all="raise", under="ignore"):
            q = crf.forward(scores, image)
        np.testing.assert_allclose(q, inference(crf, scores, dense_kernels(crf, image)), atol=1e-9)


def test_more_lattice_points_than_pixels():
    scores, image, labels = example(20, 20)
    crf = DenseCRF(L, sigma_bilateral=(9., 9., 1., 1., 1.))
    _, df = loss_and_gradient(crf, scores, image, labels)
    assert 400 < crf.state.kernels[1].K.S.shape[1] <= 400 * 6
    # no two colours within a kernel width: the bilateral kernel says nothing
    alone = DenseCRF(L, sigma_bilateral=None)
    np.testing.assert_allclose(crf.forward(scores, image), alone.forward(scores, image), atol=1e-3)


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
        dz = softmax_loss(crf.logits.reshape(-1, L), labels)[1]
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
    np.testing.assert_array_equal(df.reshape(-1, L), softmax_loss(scores.reshape(-1, L), labels)[1])


@pytest.mark.parametrize("spoil, message", [
    (lambda s, i: (s * np.nan, i), "scores: found NaN"),
    (lambda s, i: (s + np.inf, i), "scores: found NaN, .inf"),
    (lambda s, i: (s - np.inf, i), "-inf for every label"),
    (lambda s, i: (s[:, :, :2], i), r"scores: found shape \(4, 5, 2\), expected \(..., ..., 3\)"),
    (lambda s, i: (s[0], i[0]), r"scores: found shape \(5, 3\), expected 2 dimensions and labels"),
    (lambda s, i: (s[:0], i[:0]), "scores: found 0 numbers"),
    (lambda s, i: (np.where(s == s.max(), -np.inf, np.inf), i), "scores: found NaN, .inf"),
    (lambda s, i: (s.astype(int), i), "scores: found 60 numbers of int64 .<i8., expected float32 or float64"),
    (lambda s, i: (s.astype(">f8"), i), "scores: .* .>f8., expected .* machine's byte order"),
    (lambda s, i: (s, i[:3]), r"image: found shape \(3, 5, 3\), expected \(4, 5, 3\)"),
    (lambda s, i: (s, i[:, :, 0]), r"image: found shape \(4, 5\), expected \(4, 5, 3\)"),
    (lambda s, i: (s, i[:, :, :1]), r"image: found shape \(4, 5, 1\), expected \(4, 5, 3\)"),
    (lambda s, i: (s, i * np.nan), "image: found NaN"),
])
def test_bad_input_is_refused_in_one_line(spoil, message):
    with pytest.raises(ValueError, match=message) as error:
        DenseCRF(L).forward(*spoil(*example()[:2]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options, message", [
    (dict(w=(1., 2., 3.)), r"w: found \[1.0, 2.0, 3.0\], expected a finite number for each kernel"),
    (dict(sigma_position=(3., 0.)), r"sigma_position: found \[3.0, 0.0\], expected positive"),
    (dict(sigma_position=(3., 3., 3.)), "sigma_position: found 3 widths, .* of 2 dimensions$"),
    (dict(sigma_bilateral=(9., 9., 9.), dimensions=3), "sigma_bilateral: found 3 widths"),
    (dict(sigma_position=None, sigma_bilateral=None), "found 0 kernels"),
    (dict(w=np.ones((2, 2, 2))), r"w: found .* symmetric matrices, \(2, 3, 3\)"),
    (dict(sigma_bilateral=(80.,)), "sigma_bilateral: found 1 widths, .* and each channel"),
    (dict(normalization="row"), "normalization: found 'row'"),
])
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DenseCRF(L, **options)


@pytest.mark.parametrize("scores, image, message", [
    ([[[0.] * L]], np.zeros((1, 1, 3)), "scores: found builtins.list"),
    (np.zeros((1, 1, L)), [[[0.] * 3]], "image: found builtins.list"),
    (np.zeros((1, 1, L)), None, "image: found builtins.NoneType"),
])
def test_what_is_no_array_is_refused(scores, image, message):
    with pytest.raises(TypeError, match=message + ", expected a NumPy or CuPy array$"):
        DenseCRF(L).forward(scores, image)


# Free energy, and scores from elsewhere

def test_free_energy_falls_as_mean_field_converges():
    image, scores, _ = drawn()
    energies = []
    for iterations in (0, 1, 2, 5):
        crf = DenseCRF(3, w=(1., 2.), iterations=iterations)
        energies.append(crf.free_energy(crf.forward(scores, image), scores, image))
    assert energies == sorted(energies, reverse=True)


def test_free_energy_of_forbidden_labels_is_finite():
    scores, image, _ = example()
    scores[0, 0, 0] = -np.inf
    crf = DenseCRF(L)
    with np.errstate(all="raise", under="ignore"):
        assert np.isfinite(crf.free_energy(crf.forward(scores, image), scores, image))


def test_scores_from_probabilities_are_logarithms():
    p = np.array([[[0.25, 0.75, 0]]], dtype=np.float32)
    scores = scores_from_probabilities(p)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(softmax(scores), p, atol=2e-4)          # the floor, 1e-4
    assert scores_from_probabilities(p, floor=0)[0, 0, 2] == -np.inf
    for wrong in (-p, p * np.nan, np.ones((1, 1, 2), dtype=int)):
        with pytest.raises(ValueError, match="p: found"):
            scores_from_probabilities(wrong)


def test_scores_from_labels_give_the_stated_confidence():
    labels = np.array([[0, 2, 255]], dtype=np.uint8)
    q = softmax(scores_from_labels(labels, 4, 0.7))
    expected = [[0.7, 0.1, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1], [0.25] * 4]
    np.testing.assert_allclose(q[0], expected, rtol=1e-6)
    assert scores_from_labels(np.zeros((2, 2), dtype=int), 1, 0.7).shape == (2, 2, 1)
    with pytest.raises(ValueError, match="labels: found 255, expected 0 to 3"):
        scores_from_labels(labels, 4, 0.7, unknown=None)
    with pytest.raises(ValueError, match="confidence: found 1, expected"):
        scores_from_labels(labels, 4, 1)


@pytest.mark.parametrize("options", [
    {}, dict(w=(2.,), sigma_position=None), dict(w=np.ones((2, L, L)), damping=1.5, exact=True),
    dict(dimensions=3, sigma_position=(1, 2, 3), normalization="none", exclude_self=False)])
def test_a_saved_crf_is_the_same_to_the_bit(tmp_path, options):
    crf = DenseCRF(L, **options)
    crf.params["w"] += 0.1
    crf.save(tmp_path / "crf.npz")
    again = DenseCRF.load(tmp_path / "crf.npz")
    assert repr(again) == repr(crf) and again.dimensions == crf.dimensions
    assert all(np.array_equal(again.params[key], p) for key, p in crf.params.items())
    (tmp_path / "crf.npz").write_bytes(b"no")
    with pytest.raises(ValueError, match="not a readable .npz"):
        DenseCRF.load(tmp_path / "crf.npz")
