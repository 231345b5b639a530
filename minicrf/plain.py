"""The paper on a few screens: the file to read first.  `python -m minicrf.plain` runs it.

The network (Sec. 4.1), the fully connected CRF (Secs. 3.1, 4.1), learning (Sec. 3.2), both stages.
Each backward stands below its forward; d<name> is dLoss/d<name>.  Shapes: in -> out, on the right.
Legend: C channels, O after a convolution, k kernel size, H x W pixels, N = H*W, h x w cells,
    L labels, M kernels, T mean-field steps, d feature dimensions.
"""
import numpy as np


# The network (Sec. 4.1): convolutions with holes, ReLU, pooling, upsampling -----------------------

def conv2d(x, w, b, hole):                            # (C, H, W), (O, C, k, k), (O,) -> (O, H, W)
    """A loop over the k x k taps, which are `hole` cells apart: y = b + sum_ij w_ij x_ij."""
    k, (_, H, W) = w.shape[2], x.shape
    p = hole * (k - 1) // 2                           # zeros around x: y has its size
    x, y = np.pad(x, ((0, 0), (p, p), (p, p))), b[:, None, None]
    for i, j in np.ndindex(k, k):
        y = y + np.tensordot(w[:, :, i, j], x[:, i * hole:i * hole + H, j * hole:j * hole + W], 1)
    return y


def conv2d_backward(dy, x, w, b, hole):               # (O, H, W), ... -> dx, dw, db
    k, (_, H, W) = w.shape[2], x.shape
    p = hole * (k - 1) // 2
    x = np.pad(x, ((0, 0), (p, p), (p, p)))
    dx, dw = np.zeros_like(x), np.zeros_like(w)
    for i, j in np.ndindex(k, k):                     # forward: y += w_ij x_ij
        tap = np.s_[:, i * hole:i * hole + H, j * hole:j * hole + W]
        dw[:, :, i, j] = np.tensordot(dy, x[tap], ((1, 2), (1, 2)))
        dx[tap] += np.tensordot(w[:, :, i, j].T, dy, 1)
    return dx[:, p:p + H, p:p + W], dw, dy.sum(axis=(1, 2))


def relu(x):                                          # any shape
    return np.maximum(x, 0)


def relu_backward(dy, x):
    return dy * (x > 0),


def taps(x, stride, hole):                            # (C, H, W) -> 4 views (C, h, w)
    _, H, W = x.shape
    return [x[:, i:H - hole + i:stride, j:W - hole + j:stride] for i in (0, hole) for j in (0, hole)]


def max_pool2d(x, stride, hole, padding):             # (C, H, W) -> (C, h, w)
    """The largest of 2 x 2 taps.  Stride 1 skips the downsampling; the next layers have holes."""
    x = np.pad(x, ((0, 0), padding, padding), constant_values=-np.inf)
    return np.max(taps(x, stride, hole), axis=0)


def max_pool2d_backward(dy, x, stride, hole, padding):
    x = np.pad(x, ((0, 0), padding, padding), constant_values=-np.inf)
    dx, winner = np.zeros_like(x), np.argmax(taps(x, stride, hole), axis=0)
    for number, tap in enumerate(taps(dx, stride, hole)):        # forward: y = x at the winner
        tap += dy * (winner == number)
    before, after = padding
    return dx[:, before:dx.shape[1] - after, before:dx.shape[2] - after],


def interpolation(pixels, cells, step, centre):       # -> R (pixels, cells), two entries in a row
    """Cell i lies at pixel step * i + centre: a tent around each; the outermost hold beyond."""
    at = np.clip((np.arange(pixels) - centre) / step, 0, cells - 1)
    return np.maximum(0, 1 - abs(at[:, None] - np.arange(cells)))


def upsample(S, R_y, R_x):                            # (L, h, w) -> (N, L)
    """Y = R_y S R_x^T, label by label: a score for each label of each pixel."""
    return (R_y @ S @ R_x.T).reshape(len(S), -1).T    # (L, H, W) -> (L, N) -> (N, L)


def upsample_backward(dy, R_y, R_x):                  # (N, L) -> (L, h, w)
    return R_y.T @ dy.T.reshape(-1, len(R_y), len(R_x)) @ R_x


CHANNELS = (3, 16, 24, 32, 6)                         # colours, hidden channels, L labels
NET = [(conv2d, 1), (relu,), (max_pool2d, 2, 1, (1, 1)),         # layer, then its geometry:
       (conv2d, 1), (relu,), (max_pool2d, 1, 1, (0, 1)),         # hole; stride, hole, padding
       (conv2d, 2), (relu,), (conv2d, 1)]
BACKWARD = {conv2d: conv2d_backward, relu: relu_backward, max_pool2d: max_pool2d_backward}


def network(x, params):                               # (3, H, W) -> (L, h, w), each layer's input
    inputs = []
    for (layer, *geometry), p in zip(NET, params):
        inputs.append(x)
        x = layer(x, *p, *geometry)
    return x, inputs


def network_backward(dy, inputs, params):             # (L, h, w) -> for each layer [dw, db] or []
    grads = []
    for (layer, *geometry), p, x in reversed([*zip(NET, params, inputs)]):
        dy, *dp = BACKWARD[layer](dy, x, *p, *geometry)
        grads = [dp] + grads
    return grads


# The loss (Sec. 3.2) ------------------------------------------------------------------------------

def log_softmax(z):                                   # (..., L) -> (..., L)
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def softmax(z):                                       # (..., L) -> (..., L)
    return np.exp(log_softmax(z))


def softmax_loss(z, y):                               # (N, L), (N,) -> loss, dz (N, L)
    """Eq. 6 for q = softmax(z), over the n pixels that are not void (255), divided by n."""
    i, dz = np.flatnonzero(y != 255), np.zeros_like(z)
    log_q, truth = log_softmax(z[i]), np.eye(z.shape[1])[y[i]]
    dz[i] = (np.exp(log_q) - truth) / len(i)          # Eq. 8 and the softmax: q - onehot(y)
    return -(log_q * truth).sum() / len(i), dz


# The fully connected CRF (Sec. 3.1) ---------------------------------------------------------------

def gaussian_kernel(p, log_sigma):                    # (N, d), (d,) -> K_hat (N, N), K (N, N)
    """k(i,j) = exp(-|F_i - F_j|^2 / 2), F = p / sigma (below Eq. 9), normalised, without i = j."""
    F = p / np.exp(log_sigma)
    K = np.exp(-sum((F_k[:, None] - F_k) ** 2 for F_k in F.T) / 2)
    n = K.sum(axis=1)                                 # paper silent: D^-1/2 K D^-1/2, D = diag(n)
    return (K - np.eye(len(n))) / np.sqrt(n[:, None] * n), K


def gaussian_kernel_backward(dK_hat, K_hat, K, p, log_sigma):    # (N, N), ... -> dlog_sigma (d,)
    F, n = p / np.exp(log_sigma), K.sum(axis=1)
    # forward: K_hat = (K - I) / sqrt(n_i n_j), n = K 1
    dn = -((dK_hat * K_hat).sum(axis=1) + (dK_hat * K_hat).sum(axis=0)) / (2 * n)
    dK = dK_hat / np.sqrt(n[:, None] * n) + dn[:, None]
    # forward: K = exp(-sum_k (F_ik - F_jk)^2 / 2), F = p / sigma
    return np.array([(dK * K * (F_k[:, None] - F_k) ** 2).sum() for F_k in F.T])


def messages(q, K, W):                                # (N, L), (M, N, N), (M, L, L) -> (N, L)
    """sum_j,l' f_ij(l,l') q_j(l'), f_ij = sum_m mu_m k_m(i,j).  Eq. 9, Potts: W_m = mu_m = w_m I."""
    return sum(K_m @ q @ W_m for K_m, W_m in zip(K, W))


def mean_field_one_by_one(f, K, W, sweeps):           # (N, L), ... -> q (N, L)
    """Eq. 5 as printed: one marginal, all others fixed.  Never further from p (Eq. 4)."""
    q = softmax(f)
    for i in [*range(len(f))] * sweeps:
        q[i] = softmax(f[i] + messages(q, K[:, i], W))
    return q


def log_marginals(z, c):                              # (N, L) -> u = log q (N, L)
    """Solves u + c q = z - lambda, sum_l q = 1 for each pixel by Newton's method; c = 0: softmax."""
    u = log_softmax(z / (1 + c))
    lam = (z - u - c * np.exp(u)).mean(axis=1, keepdims=True)
    for _ in range(20 if c else 0):
        q = np.exp(u)
        h, r = q / (1 + c * q), z - u - c * q - lam
        dlam = ((h * r).sum(1, keepdims=True) - 1 + q.sum(1, keepdims=True)) / h.sum(1, keepdims=True)
        u, lam = u + (r - dlam) / (1 + c * q), lam + dlam
    return u


def log_marginals_backward(du, q, c):                 # (N, L) -> dz (N, L)
    # forward: (1 + c q) du = dz - dlambda, sum_l q du = 0
    h, g = q / (1 + c * q), du / (1 + c * q)
    return g - h / h.sum(axis=1, keepdims=True) * g.sum(axis=1, keepdims=True)


def mean_field(f, K, W, T=5, c=0):                    # (N, L), ... -> log q^T, [q^0 .. q^T]
    """All marginals at once: q^t = softmax(f + messages).  c > 0, damped: CCCP, which converges."""
    q = [softmax(f)]
    for t in range(1, T + 1):
        u = log_marginals(f + messages(q[t - 1], K, W) + c * q[t - 1], c)
        q.append(np.exp(u))
    return u, q


def mean_field_backward(du, q, K, W, c=0):            # (N, L), ... -> df (N, L), dK, dW
    """Fig. 3, step 3: from du = dLoss/dlog q^T, q - onehot(y) by Eq. 6, back through t = T..1."""
    df, dK, dW = np.zeros_like(du), np.zeros_like(K), np.zeros_like(W)
    for t in range(len(q) - 1, 0, -1):
        dz = log_marginals_backward(du, q[t], c)
        # forward: z^t = f + sum_m K_m q^(t-1) W_m + c q^(t-1)
        df += dz
        for m in range(len(K)):
            dK[m] += dz @ (q[t - 1] @ W[m]).T
            dW[m] += (K[m] @ q[t - 1]).T @ dz
        dq = sum(K_m.T @ dz @ W_m.T for K_m, W_m in zip(K, W)) + c * dz
        du = q[t - 1] * dq
    # forward: q^0 = softmax(f)
    return df + log_marginals_backward(du, q[0], 0), dK, dW


def simplex(F_i):                                     # (d,) -> d + 1 lattice points and weights
    """The corners of the permutohedral lattice's simplex around a feature [Adams 2010]."""
    d = len(F_i)
    basis = np.array([[1.] * j + [-j] + [0] * (d - j) for j in range(1, d + 1)])     # (d, d + 1)
    basis /= np.linalg.norm(basis, axis=1, keepdims=True)
    place = F_i @ basis * np.sqrt(2 / 3) * (d + 1)    # coordinates that sum to 0
    cell = (d + 1) * np.rint(place / (d + 1))         # corner 0, once its coordinates sum to 0:
    while cell.sum() > 0:
        cell[np.argmin(place - cell)] -= d + 1
    while cell.sum() < 0:
        cell[np.argmax(place - cell)] += d + 1
    order = np.argsort(cell - place)                  # of the axes, furthest from corner 0 first
    offset = (place - cell)[order] / (d + 1)
    corners = [cell + r for r in range(d + 1)]        # corner r: the last r axes are one cell back
    for r in range(d + 1):
        corners[r][order[d + 1 - r:]] -= d + 1
    return corners, [1 + offset[-1] - offset[0], *-np.diff(offset)[::-1]]


def lattice_filter(F, values):                        # (N, d), (N, C) -> about K values (N, C)
    """K in O(N), without its matrix; the lattice is a dictionary: point -> row of values."""
    d, lattice = F.shape[1], {}
    places = [[(tuple(corner), b) for corner, b in zip(*simplex(F_i))] for F_i in F]
    for place, value in zip(places, values):          # splat
        for point, b in place:
            lattice[point] = lattice.get(point, 0) + b * value
    for axis in range(d + 1):                         # blur
        step = 1 - (d + 1) * np.eye(d + 1)[axis]
        lattice = {point: v + (lattice.get(tuple(point + step), 0)
                               + lattice.get(tuple(point - step), 0)) / 2
                   for point, v in lattice.items()}
    return np.array([sum(b * lattice[point] for point, b in place)       # slice
                     for place in places]) / (1 + 2. ** -d)


# Both stages (Fig. 3) -----------------------------------------------------------------------------

def alignment():                                      # -> step, centre of the cells, in pixels
    step, centre = 1, 0
    for layer, *geometry in NET:
        if layer is max_pool2d:                       # the middle of its two taps
            stride, hole, (before, _) = geometry
            centre, step = centre + step * (hole / 2 - before), step * stride
    return step, centre


def unary(image, net):                                # (H, W, 3) -> scores f (N, L), backward
    scores, inputs = network(image.transpose(2, 0, 1) / 60 - 2, net)     # (3, H, W)
    R = [interpolation(n, m, *alignment()) for n, m in zip(image.shape, scores.shape[1:])]

    def backward(df):
        return network_backward(upsample_backward(df, *R), inputs, net)
    return upsample(scores, *R), backward


def joint(image, net, crf):                           # (H, W, 3) -> log-marginals (N, L), backward
    (f, unary_backward), (w, *log_sigmas) = unary(image, net), crf
    y, x = np.indices(image.shape[:2]).reshape(2, -1)                    # (N,)
    position = np.stack([x, y], axis=1)
    features = position, np.hstack([position, image.reshape(-1, 3)])     # (N, 2), (N, 5)
    kernels = [gaussian_kernel(p, log_sigma) for p, log_sigma in zip(features, log_sigmas)]
    K, W = np.stack([K_hat for K_hat, _ in kernels]), w[:, None, None] * np.eye(f.shape[1])
    u, q = mean_field(f, K, W)

    def backward(du):
        df, dK, dW = mean_field_backward(du, q, K, W)
        dw = np.trace(dW, axis1=1, axis2=2)
        dlog_sigmas = [gaussian_kernel_backward(dK_m, *kernel, p, log_sigma) for
                       dK_m, kernel, p, log_sigma in zip(dK, kernels, features, log_sigmas)]
        return unary_backward(df), [dw, *dlog_sigmas]
    return u, backward


def sgd(params, grads, velocity, rate, decay=0.0005, momentum=0.9):
    for p, g, v in zip(params, grads, velocity):      # in place
        v *= momentum
        v -= rate * (g + decay * p)
        p += v
