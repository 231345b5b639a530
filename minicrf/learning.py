"""Learning a CRF on scores that stay as they are: Eq. 6, its gradients, and momentum SGD.

Steps 2 and 3 of Fig. 3, for one image; training.py puts the network before them.
Legend: S the shape of an image, N its pixels, L labels.
"""
import copy

import numpy as np

from .inputs import check_labels
from .localcrf import LocalCRF
from .losses import softmax_loss
from .meanfield import LARGEST_LOG_SIGMA
from .optim import SGD


def crf_gradients(crf, f, image, y):
    """Steps 2 and 3 of Fig. 3: the loss, its gradients by f, and by crf.params as a dict.

    f: scores (*S, L); image: as in crf.forward; y: labels (*S), VOID where not known.  `crf` keeps
    nothing: of one CRF several images can be worked on side by side.
    """
    crf = copy.copy(crf)
    crf.grads = {key: np.zeros_like(g) for key, g in crf.grads.items()}
    if isinstance(crf, LocalCRF):            # Fig. 2: marginals minus truth is the gradient
        crf.forward(f, image)
        return crf.loss(y), crf.backward(), crf.grads
    # Step 2: marginals q^t by filtering; the loss of the last, q^T = softmax(logits)
    crf.forward(f, image)
    loss, dz = softmax_loss(crf.logits.reshape(-1, crf.n_labels), y.ravel())             # (N, L)
    # Step 3: back-tracking through the marginals
    return loss, crf.backward_logits(dz), crf.grads


def learn(crf, samples, epochs=10, rate=1.0, rate_w=0.3, rate_sigma=0.1, momentum=0.9):
    """Fit the parameters of a CRF, on scores that stay as they are, to Eq. 6; returns the losses.

    crf: a DenseCRF or FeatureCRF, changed in place.  samples: a list of (scores, image, labels),
    as in crf.forward, labels (*S) integers or VOID.  One update for each sample, in an order drawn
    anew for each epoch; rates of w and log sigma, both times `rate`.  Losses: each sample's, before
    its update, as an array (epochs, samples).  Raises ValueError where labels are out of range or
    not of the scores' shape, and where a step leaves no numbers.

    The likelihood is not intersection over union: the two need not agree on the best weights.  And
    a network is surer of the images it was trained on than of others: learn from other images, or
    the weights come out too small.
    """
    from tqdm import tqdm        # only the bar needs it

    for scores, _, labels in samples:
        check_labels(labels, scores.shape[:-1], crf.n_labels)
    rates = {key: rate * (rate_w if key == "w" else rate_sigma) for key in crf.params}
    optimiser = SGD(crf.params, crf.grads, rates, dict.fromkeys(rates, 0.0), momentum)
    losses = np.empty((epochs, len(samples)))
    rng = np.random.default_rng(0)
    for epoch in tqdm(range(epochs), "learn", unit="epoch", disable=None):
        for i in rng.permutation(len(samples)):
            loss, _, grads = crf_gradients(crf, *samples[i])
            for key, g in grads.items():
                crf.grads[key] += g
            optimiser.step()
            crf.project()
            losses[epoch, i] = float(loss)
            check_finite(losses[epoch, i], crf.params)
    return losses


def check_finite(loss, params):
    """Raises ValueError where a step left numbers that no next step and no checkpoint can use."""
    if not np.isfinite(loss):
        raise ValueError(f"found loss {loss}, expected a finite one")
    for key, p in params.items():
        with np.errstate(over="ignore", invalid="ignore"):
            finite = np.isfinite(float(p.sum()))
        if not finite:
            raise ValueError(f"found {key} not finite after the step, expected finite values")
        if "log_sigma" in key and abs(p).max() > LARGEST_LOG_SIGMA:
            raise ValueError(f"found {key} {p.round(2).tolist()} after the step, expected "
                             f"-{LARGEST_LOG_SIGMA} to {LARGEST_LOG_SIGMA}")
