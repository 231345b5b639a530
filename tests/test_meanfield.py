"""Sec. 3.1 in full: any features, matrices of compatibility, damped updates, and the way back."""
import copy

import numpy as np
import pytest
from helpers import refused
from reference import as_matrices, dense, free_energy, mean_field

from minicrf import DenseCRF
from minicrf.losses import softmax, softmax_loss
from minicrf.meanfield import FeatureCRF

L = 3
POTTS = np.array([0.3, 0.5, 0.4])
S = np.array([[1., .3, -.2], [.3, .8, .1], [-.2, .1, .5]])       # positive definite
MATRICES = POTTS[:, None, None] * S                              # (M, L, L)
NARROW = ([1.5, 2., 1.2], [3., 4., 2., 60., 80.])                # widths of x, y, z; and colours


def example(shape=(4, 5), seed=0):
    """Scores (*S, L), an image (*S, 2), three features of own kinds, labels (N,), one void."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, L, np.prod(shape))
    labels[0] = 255
    features = [rng.standard_normal((*shape, d)) for d in (1, 2, 4)]
    return (rng.standard_normal((*shape, L)), rng.uniform(0, 255, (*shape, 2)), features, labels)


def image_crf(D, w, **options):
    return DenseCRF(L, w=w, sigma_position=NARROW[0][:D], dimensions=D,
                    sigma_bilateral=NARROW[1][:D] + [60., 80.], **options)


def feature_crf(w, **options):
    return FeatureCRF(L, w=w, sigmas=[[1.], [.8, 1.2], [1.5, 2., 1.8, 1.6]], **options)


@pytest.mark.parametrize("normalization", ["symmetric", "none"])
@pytest.mark.parametrize("exclude_self", [True, False])
@pytest.mark.parametrize("w", [POTTS, MATRICES], ids=["Potts", "matrices"])
@pytest.mark.parametrize("damping", [0, 1.5])
def test_mean_field_is_equation_5_in_dense_matrices(w, damping, normalization, exclude_self):
    scores, _, features, _ = example()
    options = dict(normalization=normalization, exclude_self=exclude_self)
    crf = feature_crf(w, damping=damping, exact=True, **options)
    q, f = crf.forward(scores, features), scores.reshape(-1, L)
    K = [dense(F.reshape(len(f), -1), np.exp(crf.params[f"log_sigma_{m}"]), *options.values())
         for m, F in enumerate(features)]
    expected = mean_field(f, K, as_matrices(w, L), crf.iterations, damping)
    for found, step in zip([*crf.state.steps, q.reshape(f.shape)], expected, strict=True):
        np.testing.assert_allclose(found, step, atol=1e-11)
    np.testing.assert_allclose(softmax(crf.logits), q, atol=1e-12)
    crf.exclude_self = True                                              # j != i, always
    K = [kernel - np.diag(np.diag(kernel)) for kernel in K]
    np.testing.assert_allclose(crf.free_energy(q, scores, features),
                               free_energy(expected[-1], f, K, as_matrices(w, L)))


# Gradients: finite differences of them are in gradcheck

def back_and_forth(crf, scores, features, labels):
    """Marginals, gradient of the scores, and of the parameters, from Eq. 6."""
    q = crf.forward(scores, features)
    df = crf.backward_logits(softmax_loss(crf.logits.reshape(-1, L), labels)[1])
    return q, df, crf.grads


@pytest.mark.parametrize("damping", [0, 1.5])
@pytest.mark.parametrize("exact", [True, False])
def test_matrices_w_times_identity_are_potts(exact, damping):
    scores, _, features, labels = example()
    potts, matrices = (back_and_forth(feature_crf(w, exact=exact, damping=damping), scores,
                                      features, labels) for w in (POTTS, as_matrices(POTTS, L)))
    for a, b in zip(potts[:2], matrices[:2]):
        np.testing.assert_allclose(a, b, atol=1e-14)
    traces = np.trace(matrices[2].pop("w"), axis1=1, axis2=2)
    np.testing.assert_allclose(potts[2].pop("w"), traces, rtol=1e-11)
    for name, gradient in potts[2].items():
        np.testing.assert_allclose(gradient, matrices[2][name], rtol=1e-11)


def test_gradients_of_another_shape_are_refused_but_may_be_flat_or_integers():
    scores, _, features, _ = example()
    crf = feature_crf(POTTS)
    q = crf.forward(scores, features)                                    # (4, 5, 3)
    whole = (9 * q).astype(int)
    for back, name in ((crf.backward, "dq"), (crf.backward_logits, "dz")):
        np.testing.assert_array_equal(back(whole), back(whole.reshape(20, 3).astype(float)))
        for wrong in (q.swapaxes(0, 1), q.reshape(5, 12), q.ravel(), q.reshape(3, 20), q[:1]):
            with refused(f"{name}: found shape .*, expected "):
                back(wrong)
        with refused(f"{name}: found builtins.list, expected a NumPy", TypeError):
            back(q.tolist())


# States

def test_two_forward_passes_before_one_way_back_each_with_its_own_state():
    samples = [example(shape, seed) for shape, seed in (((4, 5), 0), ((3, 6), 1))]
    crf, states, alone = feature_crf(MATRICES, damping=1.), [], []
    for scores, _, features, _ in samples:
        q = crf.forward(scores, features)
        alone.append((crf.backward_logits(q), crf.backward(q), copy.deepcopy(crf.grads)))
        for gradient in crf.grads.values():
            gradient[...] = 0
    for scores, _, features, _ in samples:
        q = crf.forward(scores, features)
        states.append((q, crf.state))
    crf.params["w"] *= 2                                                 # states keep their own
    crf.damping, crf.iterations = 0., 1
    for (q, state), (dz_back, dq_back, grads) in zip(states, alone):
        np.testing.assert_array_equal(crf.backward_logits(q, state), dz_back)
        np.testing.assert_array_equal(crf.backward(q, state), dq_back)
        for name, gradient in crf.grads.items():
            np.testing.assert_array_equal(gradient, grads[name])
            gradient[...] = 0
    np.testing.assert_array_equal(crf.backward(states[1][0]), alone[1][1])     # None: the last


def test_a_shallow_copy_keeps_a_state_of_its_own():
    """By which images are worked on side by side."""
    scores, _, features, _ = example()
    crf = feature_crf(POTTS)
    other = copy.copy(crf)
    other.forward(scores, features)
    assert crf.state is None and other.params is crf.params


# Convergence

def random_model(rng, kind):
    """A CRF of one or two kernels, its scores and features."""
    n, n_labels, M = rng.integers(2, 30), rng.integers(2, 5), rng.integers(1, 3)
    d = rng.integers(1, 4, M)
    features = [rng.uniform(.1, 3) * rng.standard_normal((n, d_m)) for d_m in d]
    A = 2 * rng.standard_normal((M, n_labels, n_labels))
    w = {"Potts": rng.uniform(0, 12, M), "negative": rng.uniform(-12, 0, M),
         "matrices": A @ A.swapaxes(1, 2), "indefinite": A + A.swapaxes(1, 2)}[kind]
    crf = FeatureCRF(n_labels, w=w, sigmas=[[1.] * d_m for d_m in d], iterations=30, exact=True,
                     normalization=rng.choice(["symmetric", "none"]))
    return crf, 2 * rng.standard_normal((n, n_labels)), features


def largest_rise(crf, scores, features):
    """Of the free energy, from any step to the next."""
    q = crf.forward(scores, features)
    K = [kernel.filter(np.eye(len(scores)))[:] for kernel in crf.state.kernels]
    energies = [free_energy(q, scores, K, as_matrices(crf.params["w"], crf.n_labels))
                for q in (*crf.state.steps, q)]
    return np.diff(energies).max()


@pytest.mark.parametrize("kind, models", [("Potts", 200), ("matrices", 200), ("negative", 50),
                                          ("indefinite", 50)])
def test_the_free_energy_of_random_models_never_rises_with_descent_damping(kind, models):
    rng = np.random.default_rng(0)
    undamped, damped = [], []
    for _ in range(models):
        crf, scores, features = random_model(rng, kind)
        undamped.append(largest_rise(crf, scores, features))
        crf.damping = crf.descent_damping(scores, features)
        damped.append(largest_rise(crf, scores, features))
    assert max(damped) <= 1e-9
    assert max(undamped) > 1                             # so it is the damping that does it


@pytest.mark.parametrize("w, largest", [
    (POTTS, POTTS), (MATRICES, POTTS * np.linalg.eigvalsh(S)[-1])])
def test_descent_damping_is_the_sum_of_what_the_diagonals_left_out(w, largest):
    scores, _, features, _ = example()
    crf = feature_crf(w, exact=True)
    n = [dense(F.reshape(20, -1), np.exp(crf.params[f"log_sigma_{m}"]), "none", False).sum(axis=1)
         for m, F in enumerate(features)]
    np.testing.assert_allclose(crf.descent_damping(scores, features),
                               max(sum(x / n_m for x, n_m in zip(largest, n))))
    crf.exclude_self = False                             # nothing left out
    assert crf.descent_damping(scores, features) == 0


def test_project_goes_to_the_nearest_weights_in_range():
    crf = feature_crf([-1., 0., 2.])
    crf.project()
    assert crf.params["w"].tolist() == [0, 0, 2]
    crf = feature_crf(MATRICES)
    crf.project()
    np.testing.assert_allclose(crf.params["w"], MATRICES, atol=1e-15)    # in range already
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.standard_normal((3, L, L)))[0]
    crf.params["w"][...] = axes * [-2., 1., 3.] @ axes.swapaxes(1, 2)
    crf.params["w"][0, 0, 1] += 0.5                                      # rounding, exaggerated
    crf.params["w"][0, 1, 0] -= 0.5
    crf.project()
    np.testing.assert_allclose(crf.params["w"], axes * [0., 1., 3.] @ axes.swapaxes(1, 2),
                               atol=1e-12)


# Options and input

def test_attributes_that_do_nothing_cannot_be_set():
    for crf in (feature_crf(POTTS), image_crf(2, POTTS[:2])):
        for name in ("w", "sigma_position", "sigmas", "damp", "n_iterations"):
            with pytest.raises(AttributeError):
                setattr(crf, name, 1.)
        crf.iterations, crf.damping = 3, 1.                              # these do something


def test_repr_shows_what_was_given():
    crf = FeatureCRF(4, w=(1., 2.5), sigmas={"age": [3.], "place": (7, 9)}, damping=1.5)
    assert repr(crf) == (
        "FeatureCRF(4, w=[1.0, 2.5], sigma_age=[3.0], sigma_place=[7.0, 9.0], iterations=5, "
        "normalization='symmetric', exclude_self=True, damping=1.5, exact=False)")


def test_sigmas_have_names_or_numbers():
    names = [FeatureCRF(2, w=[1., 1.], sigmas=sigmas).params.keys()
             for sigmas in ([[1.], [2., 3.]], {"a": [1.], "b": [2., 3.]})]
    assert [*names[0]] == ["w", "log_sigma_0", "log_sigma_1"]
    assert [*names[1]] == ["w", "log_sigma_a", "log_sigma_b"]


@pytest.mark.parametrize("options, message", [
    (dict(w=[1., 2.]), r"w: found \[1.0, 2.0\], expected a finite number for each kernel, \(1,\)"),
    (dict(w=[np.nan]), "w: found"),
    (dict(w=np.ones((1, 3, 3))), r"w: found .* symmetric matrices, \(1, 2, 2\)"),
    (dict(w=[[[1., 2.], [3., 1.]]]), "w: found .* symmetric matrices"),
    (dict(sigmas=[[]]), r"sigma_0: found \[\], expected positive widths"),
    (dict(sigmas=[[1., -1.]]), "sigma_0: found"),
    (dict(sigmas={"age": [0.]}), "sigma_age: found"),
    (dict(damping=-1.), "damping -1"),
    (dict(damping=np.nan), "damping nan"),
    (dict(iterations=-1), "iterations -1"),
    (dict(normalization="row"), "normalization: found 'row'"),
])
def test_bad_options_are_refused(options, message):
    with refused(message):
        FeatureCRF(2, **{"w": [1.], "sigmas": [[1.]], **options})


@pytest.mark.parametrize("spoil, error, message", [
    (lambda F: F[:2], ValueError, "features: found 2 arrays, expected 3"),
    (lambda F: [*F[:2], F[2][:, :, :3]], ValueError,
     r"features: found shape \(4, 5, 3\), expected \(4, 5, 4\)"),
    (lambda F: [F[0][:3], *F[1:]], ValueError, r"features: found shape \(3, 5, 1\)"),
    (lambda F: [F[0] * np.nan, *F[1:]], ValueError, "features: found (magnitude nan|NaN)"),
    (lambda F: [F[0].tolist(), *F[1:]], TypeError, "features: found builtins.list"),
])
@pytest.mark.parametrize("exact", [True, False])
def test_bad_features_are_refused_in_one_line(spoil, error, message, exact):
    scores, _, features, _ = example()
    with refused(message, error):
        feature_crf(POTTS, exact=exact).forward(scores, spoil(features))


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@pytest.mark.parametrize("damping", [0, 1.])
@pytest.mark.parametrize("w", [POTTS, MATRICES], ids=["Potts", "matrices"])
def test_weights_beyond_float32_are_refused(w, damping):
    scores, _, features, _ = example()
    crf = feature_crf(1e39 * w, damping=damping)
    with refused("w: found .*, too large for marginals in float32"):
        crf.forward(scores.astype(np.float32), features)
    assert crf.state is None


def test_an_image_is_three_lines_of_features():
    scores, image, _, labels = example()
    y, x = np.mgrid[:4, :5]
    position = np.stack([x, y], axis=2)
    features = [position, np.concatenate([position, image], axis=2)]
    by_features = FeatureCRF(L, w=POTTS[:2], sigmas=[NARROW[0][:2], NARROW[1][:2] + [60., 80.]])
    found = back_and_forth(by_features, scores, features, labels)
    expected = back_and_forth(image_crf(2, POTTS[:2]), scores, image, labels)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
    for a, b in zip(found[2].values(), expected[2].values(), strict=True):
        np.testing.assert_array_equal(a, b)
