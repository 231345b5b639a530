"""The paper on a few screens: the file to read first.  `python -m minicrf.plain` runs it.

The network (Sec. 4.1), the loss (3.2), the fully connected CRF (3.1), both stages (Fig. 3).
A function returns its value y and `backward`, which turns dy = dLoss/dy into that of what went in.
Legend, shapes in -> out: C channels, O after a convolution, k kernel size, H x W pixels, N = H*W,
    h x w cells, L labels, M kernels, T mean-field steps, d feature dimensions, c damping."""
import numpy as np

# --- The network (Sec. 4.1) -----------------------------------------------------------------------
def taps(x, k, stride, hole):                         # (C, H, W) -> k * k views (C, h, w)
    H, W = (n - hole * (k - 1) for n in x.shape[1:])
    return [x[:, i*hole:i*hole + H:stride, j*hole:j*hole + W:stride] for i, j in np.ndindex(k, k)]

def conv2d(x, w, b, hole):                            # (C, H, W), (O, C, k, k), (O,) -> (O, H, W)
    """Convolution with holes: y = b + sum_ij w_ij x_ij over the taps."""
    (_, H, W), k = x.shape, w.shape[2]
    p = hole * (k - 1) // 2                           # zeros around x: y is as large as x
    x = np.pad(x, ((0, 0), (p, p), (p, p)))
    y = b[:, None, None]
    for (i, j), x_ij in zip(np.ndindex(k, k), taps(x, k, 1, hole)):
        y = y + np.tensordot(w[:, :, i, j], x_ij, 1)

    def backward(dy):                                 # -> dx, dw, db
        dx, dw = np.zeros_like(x), np.zeros_like(w)
        for (i, j), x_ij, dx_ij in zip(np.ndindex(k, k), taps(x, k, 1, hole), taps(dx, k, 1, hole)):
            dw[:, :, i, j] = np.tensordot(dy, x_ij, ((1, 2), (1, 2)))
            dx_ij += np.tensordot(w[:, :, i, j].T, dy, 1)
        return dx[:, p:p + H, p:p + W], dw, dy.sum(axis=(1, 2))
    return y, backward

def relu(x):                                          # any shape; backward -> (dx,)
    return np.maximum(x, 0), lambda dy: (dy * (x > 0),)

def max_pool2d(x, stride, hole, padding):             # (C, H, W) -> (C, h, w)
    """The largest of 2 x 2 taps.  Stride 1 skips the downsampling: the next layers have holes."""
    (_, H, W), (before, _) = x.shape, padding
    x = np.pad(x, ((0, 0), padding, padding), constant_values=-np.inf)
    values = np.stack(taps(x, 2, stride, hole))                          # (4, C, h, w)

    def backward(dy):                                 # to the first of the largest
        dx, winner = np.zeros_like(x), values.argmax(axis=0)
        for number, tap in enumerate(taps(dx, 2, stride, hole)):
            tap += dy * (winner == number)
        return dx[:, before:before + H, before:before + W],
    return values.max(axis=0), backward

NET = [  # layer, its geometry (hole; stride, hole, padding before and after), shape of w
    (conv2d, (1,), (16, 3, 3, 3)), (relu, (), ()), (max_pool2d, (2, 1, (1, 1)), ()),
    (conv2d, (1,), (24, 16, 3, 3)), (relu, (), ()), (max_pool2d, (2, 1, (1, 1)), ()),
    (conv2d, (1,), (32, 24, 3, 3)), (relu, (), ()), (max_pool2d, (1, 1, (0, 1)), ()),
    (conv2d, (2,), (48, 32, 3, 3)), (relu, (), ()), (conv2d, (1,), (6, 48, 1, 1))]

def network(x, net):                                  # (3, H, W) -> scores (L, h, w)
    backwards = []
    for (layer, geometry, _), params in zip(NET, net):
        x, backward = layer(x, *params, *geometry)
        backwards.append(backward)

    def backward(dx):                                 # -> [dw, db, dw, db, ...]
        grads = []
        for layer_backward in reversed(backwards):
            dx, *dparams = layer_backward(dx)
            grads = dparams + grads
        return grads
    return x, backward

def interpolation(pixels, cells):                     # -> R (pixels, cells), two entries a row
    """Cell i lies at pixel step * i + centre: a tent around each, flat beyond the last."""
    step, centre = 1, 0
    for stride, hole, (before, _) in (shape for layer, shape, _ in NET if layer is max_pool2d):
        step, centre = step * stride, centre + step * (hole / 2 - before)    # middle of its taps
    at = np.clip((np.arange(pixels) - centre) / step, 0, cells - 1)
    return np.maximum(0, 1 - abs(at[:, None] - np.arange(cells)))

def upsample(S, R_y, R_x):                            # (L, h, w) -> (N, L)
    """Bilinear: Y = R_y S R_x^T for each label, the scores of every pixel."""
    Y = (R_y @ S @ R_x.T).reshape(len(S), -1).T       # (L, H, W) -> (L, N) -> (N, L)
    return Y, lambda dY: R_y.T @ dY.T.reshape(-1, len(R_y), len(R_x)) @ R_x      # (L, h, w)

# --- The loss (Sec. 3.2) and the update -----------------------------------------------------------
def log_softmax(z):                                   # (..., L) -> (..., L)
    return z - np.logaddexp.reduce(z, axis=-1, keepdims=True)

def softmax(z):                                       # (..., L) -> (..., L)
    return np.exp(log_softmax(z))

def softmax_loss(z, y):                               # (N, L), (N,) -> loss, dz (N, L)
    """Eq. 6 for q = softmax(z), over the n pixels that are not void (255), divided by n."""
    i = np.flatnonzero(y != 255)
    log_q, onehot = log_softmax(z[i]), np.eye(z.shape[1])[y[i]]          # (n, L)
    dz = np.zeros_like(z)
    dz[i] = (np.exp(log_q) - onehot) / len(i)         # Eq. 8 through the softmax: q - onehot(y)
    return -(log_q * onehot).sum() / len(i), dz

def sgd(params, grads, velocity, rates, momentum=0.9):           # lists of arrays, in place
    for p, g, v, rate in zip(params, grads, velocity, rates):
        decay = 0.0005 if p.ndim == 4 else 0          # of the convolutions' w alone
        v[...] = momentum * v - rate * (g + decay * p)
        p += v

# --- The fully connected CRF (Sec. 3.1) -----------------------------------------------------------
def gaussian_kernel(p, log_sigma):                    # (N, d), (d,) -> K_hat (N, N)
    """k(i,j) = exp(-|F_i - F_j|^2 / 2), F = p / sigma (below Eq. 9); normalised, j != i."""
    F = p / np.exp(log_sigma)
    K = np.exp(-sum((F_k[:, None] - F_k) ** 2 for F_k in F.T) / 2)
    n = K.sum(axis=1)                                 # paper silent: D^-1/2 K D^-1/2, D = diag(n)
    K_hat = (K - np.eye(len(n))) / np.sqrt(n[:, None] * n)

    def backward(dK_hat):                             # -> dlog_sigma (d,)
        dn = -((dK_hat * K_hat).sum(axis=1) + (dK_hat * K_hat).sum(axis=0)) / (2 * n)
        dK = dK_hat / np.sqrt(n[:, None] * n) + dn[:, None]
        return np.array([(dK * K * (F_k[:, None] - F_k) ** 2).sum() for F_k in F.T])
    return K_hat, backward

def mean_field_one_by_one(f, K, W, sweeps):           # (N, L), (M, N, N), (M, L, L) -> q (N, L)
    """Eq. 5 as printed, one marginal, all others fixed; f_ij = sum_m W_m k_m(i,j), Potts w_m I."""
    q = softmax(f)
    for i in [*range(len(f))] * sweeps:
        q[i] = softmax(f[i] + sum(K_m[i] @ q @ W_m for K_m, W_m in zip(K, W)))
    return q

def log_marginals(z, c):                              # (N, L) -> u = log q (N, L)
    """u + c q = z - lambda, sum_l q = 1, by Newton's method for each pixel; c = 0: log_softmax."""
    u = log_softmax(z / (1 + c))
    for _ in range(20 if c else 1):
        q = np.exp(u)
        h, r = q / (1 + c * q), z - u - c * q
        lam = ((h * r + q).sum(axis=1, keepdims=True) - 1) / h.sum(axis=1, keepdims=True)
        u = u + (r - lam) / (1 + c * q)

    def backward(du):                                 # (1 + c q) du = dz - dlambda, sum_l q du = 0
        g = du / (1 + c * q)
        return g - h * g.sum(axis=1, keepdims=True) / h.sum(axis=1, keepdims=True)
    return u, backward

def mean_field(f, K, W, T=5, c=0):                    # (N, L), (M, N, N), (M, L, L) -> u = log q^T
    """All at once, q^t = softmax(z^t): it may swing; damped, c >= sum_m |W_m|, it settles: CCCP."""
    u, back = log_marginals(f, 0)                     # q^0 = softmax(f)
    q, into_z = [np.exp(u)], [back]
    for t in range(1, T + 1):
        z = f + (K @ q[t - 1] @ W).sum(axis=0) + c * q[t - 1]            # (M, N, L) -> (N, L)
        u, back = log_marginals(z, c)                 # c = 0: u^t = log softmax(z^t)
        q.append(np.exp(u))
        into_z.append(back)

    def backward(du):                                 # for Eq. 6 q^T - onehot(y) -> df, dK, dW
        df, dK, dW = np.zeros_like(f), np.zeros_like(K), np.zeros_like(W)
        for t in range(T, 0, -1):                     # Fig. 3, step 3
            dz = into_z[t](du)                        # dLoss/dz^t
            df += dz
            K_dz = K.transpose(0, 2, 1) @ dz          # (M, N, L)
            dK += dz @ (q[t - 1] @ W).transpose(0, 2, 1)
            dW += q[t - 1].T @ K_dz                   # (K q)^T dz
            dq = (K_dz @ W.transpose(0, 2, 1)).sum(axis=0) + c * dz
            du = q[t - 1] * dq                        # q = exp u
        return df + into_z[0](du), dK, dW
    return u, backward

def simplex(F_i):                                     # (d,) -> lattice points, their weights
    """The corners around a feature in the permutohedral lattice [Adams 2010]: floor(a + lambda)
    visits them while lambda runs from 0 to 1, and a corner's weight is how long it stays there."""
    d = len(F_i)
    axes = np.array([[1.] * j + [-j] + [0] * (d - j) for j in range(1, d + 1)])      # (d, d + 1)
    a = F_i @ (axes / np.linalg.norm(axes, axis=1, keepdims=True)) * np.sqrt(2 / 3)  # sum 0
    leaves = np.floor(a) + 1 - a                      # lambda at which each coordinate moves on
    times = np.append(0, np.sort(leaves))             # the last point is the first, a round later
    corners = [np.floor(a) + (leaves <= time) for time in times]
    return [tuple((d + 1) * n - n.sum()) for n in corners], np.diff(np.append(times, 1))

def lattice_filter(F, values):                        # (N, d), (N, C) -> about K values (N, C)
    """O(N) instead of K's O(N^2): splat, blur, slice on a dictionary, point -> row of values."""
    d = F.shape[1]
    corners = [[*zip(*simplex(F_i))] for F_i in F]    # of each feature: (point, weight)
    lattice = {}
    for at, value in zip(corners, values):            # splat, each value on its corners
        for x, b in at:
            lattice[x] = lattice.get(x, 0) + b * value
    for step in 1 - (d + 1) * np.eye(d + 1):          # blur along each axis; then slice
        lattice = {x: v + (lattice.get(tuple(x + step), 0) + lattice.get(tuple(x - step), 0)) / 2
                   for x, v in lattice.items()}
    return np.array([sum(b * lattice[x] for x, b in at) for at in corners]) / (1 + 2. ** -d)

# --- Both stages (Fig. 3) -------------------------------------------------------------------------
def unary(image, net, crf=None):                      # (H, W, 3) -> scores f (N, L)
    scores, into_net = network(image.transpose(2, 0, 1) / 60 - 2, net)   # of (3, H, W)
    f, into_scores = upsample(scores, *map(interpolation, image.shape, scores.shape[1:]))
    return f, lambda df: into_net(into_scores(df))

def joint(image, net, crf):                           # (H, W, 3) -> u = log q^T (N, L)
    f, into_net = unary(image, net)                                      # Fig. 3, step 1
    y, x = np.indices(image.shape[:2])
    p = np.column_stack([x.ravel(), y.ravel(), image.reshape(-1, 3)])    # (N, 5): x, y, R, G, B
    K, into_sigma = zip(*map(gaussian_kernel, (p[:, :2], p), crf[1:]))
    u, into_crf = mean_field(f, np.stack(K), crf[0][:, None, None] * np.eye(6))      # step 2; Potts

    def backward(du):                                 # -> of the network, w, log sigmas
        df, dK, dW = into_crf(du)                                        # step 3
        dlog_sigmas = [into(dK_m) for into, dK_m in zip(into_sigma, dK)]
        return into_net(df) + [np.trace(dW, axis1=1, axis2=2), *dlog_sigmas]     # step 4
    return u, backward

def train(stage, net, crf, pictures, rates, steps, rng):
    params = sum(net, []) + crf
    velocity, losses = [np.zeros_like(p) for p in params], []
    for step in range(1, steps + 1):
        image, y = pictures[rng.integers(len(pictures))]
        u, backward = stage(image, net, crf)
        loss, du = softmax_loss(u, y)
        sgd(params, backward(du), velocity, rates)                       # step 5
        np.maximum(crf[0], 0, out=crf[0])             # convergence asks for w >= 0
        losses.append(loss)
        if step % (steps // 5) == 0:
            print(f"  step {step:4}: loss {np.mean(losses[-steps // 5:]):.3f}")

def evaluate(name, stage, net, crf, pictures):        # -> mean IoU in percent
    counts, losses = np.zeros((6, 6)), []             # counts: true label, label found
    for image, y in pictures:
        u, _ = stage(image, net, crf)
        losses.append(softmax_loss(u, y)[0])
        np.add.at(counts, (y[y != 255], u.argmax(axis=1)[y != 255]), 1)
    iou = 100 * np.mean(counts.diagonal() / (counts.sum(0) + counts.sum(1) - counts.diagonal()))
    print(f"{name}: loss {np.mean(losses):.3f}, IoU {iou:.1f}% on the 40 held out")
    return iou

def gradient_error(image, y, net, crf, rng, h=1e-6):  # relative, along a random direction
    params, losses = sum(net, []) + crf, []
    direction = [rng.normal(size=p.shape) for p in params]
    for step in (h, -2 * h, h):                       # ahead, to the other side, and back
        for p, v in zip(params, direction):
            p += step * v
        u, backward = joint(image, net, crf)
        loss, du = softmax_loss(u, y)
        losses.append(loss)
    found, expected = sum(map(np.vdot, backward(du), direction)), (losses[0] - losses[1]) / (2 * h)
    return abs(found - expected) / (abs(found) + abs(expected))

def main(seed=0):
    from minicrf.data.toy import picture
    rng = np.random.default_rng(seed)
    pictures = [(image, y.ravel()) for image, y in (picture(rng, 24, 32) for _ in range(440))]
    net = [[rng.normal(size=s) * np.sqrt(2 / np.prod(s[1:])), np.zeros(s[0])] if s else []
           for _, _, s in NET]
    crf = [np.array([0.5, 3.]), np.log([2., 2.]), np.log([8., 8., 25., 25., 25.])]
    print("440 drawn pictures, 24 x 32 pixels, 6 labels; 400 train.  Stage 1: the network alone.")
    for steps, rate in ((1600, 0.01), (400, 0.001)):
        train(unary, net, crf, pictures[:400], [rate] * 10, steps, rng)
    before = evaluate("unary", unary, net, crf, pictures[400:])
    evaluate("untrained CRF on top", joint, net, crf, pictures[400:])
    error = gradient_error(*pictures[0], net, crf, rng)
    print(f"joint gradient against differences: relative error {error:.0e}\nStage 2: both learn.")
    train(joint, net, crf, pictures[:400], [0.0001] * 10 + [0.02] * 3, 60, rng)
    after = evaluate("joint", joint, net, crf, pictures[400:])
    print(f"IoU: unary {before:.1f}%, joint {after:.1f}%")

if __name__ == "__main__":
    main()
