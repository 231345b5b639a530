"""The loss of the paper, Eq. 6: minus the log-likelihood of the true labels under the marginals.

One function serves both stages: the marginals are softmax(z), with z the unary scores f for the
network alone and z = z^T, the logits of the last mean-field step, for the network with its CRF.
Legend: N pixels, L labels.
"""
from .arrays import array_module, row_maxima, row_sums
from .inputs import VOID, check_labels


def softmax(z):
    """exp(z) / sum exp(z) over the last axis: marginals, any shape (..., L) -> (..., L).

    A label may be forbidden by z = -inf, as long as another one of its pixel is finite.
    """
    xp = array_module(z)
    p = xp.exp(z - row_maxima(z)[..., None])
    p /= row_sums(p)[..., None]
    return p


def softmax_loss(z, labels):
    """Eq. 6 divided by the number of labelled pixels, and its gradient, q - onehot(y).

    z: (N, L) logits; labels: (N,) integers in 0..L-1, or VOID for pixels left out.  Raises
    ValueError for others on the host; a GPU would have to be waited for.
    Returns (loss, dz): a 0-d array (so that a GPU need not wait) and an (N, L) array.  Where no
    pixel is labelled both are zero.  Written with log-sum-exp: neither log 0 nor 1/q can occur
    (Eq. 8 joined with the softmax's Jacobian).
    """
    xp = array_module(z)
    check_labels(labels, z.shape[:1], z.shape[1])
    labelled = labels != VOID                                            # (N,)
    weight = labelled.astype(z.dtype)                                    # (N,)
    weight /= xp.maximum(labelled.sum(), 1).astype(z.dtype)
    pixels = xp.arange(len(labels))
    y = xp.where(labelled, labels, 0)                                    # (N,)

    shifted = z - z.max(axis=-1, keepdims=True)                          # (N, L)
    q = xp.exp(shifted)
    total = q.sum(axis=-1, keepdims=True)                                # (N, 1)
    shifted_y = xp.where(labelled, shifted[pixels, y], 0)                # void may be -inf at 0
    loss = (weight * (xp.log(total[:, 0]) - shifted_y)).sum()

    # forward: loss = sum_i weight_i (log sum_l exp z_il - z_i,y_i)
    q /= total
    q[pixels, y] -= 1
    q *= weight[:, None]
    return loss, q
