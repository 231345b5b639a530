"""Time and memory, beside pydensecrf and PyTorch where they are installed: peers, not dependencies.

    python tests/evidence/benchmark.py --crf [IMAGE [LABELS]]
    python tests/evidence/benchmark.py --net --preset largefov --batch-size 2
    python tests/evidence/benchmark.py --joint --preset vgg16 --batch-size 20 --device gpu

What a row compares runs in turn in one process, A B A B.  It gives the median of each and, in
brackets, the median over the rounds of ours / theirs.  Memory is that of a process of its own.
"""
import argparse
import contextlib
import importlib
import multiprocessing
import os
import pathlib
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

if (os.cpu_count() or 1) <= 4:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")     # as run_voc.py, before NumPy comes in
import numpy as np   # noqa: E402

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from minicrf import DenseCRF, arrays, layers, training, vgg   # noqa: E402
from minicrf.data import pictures, toy, weights   # noqa: E402
from minicrf.programs import gpu   # noqa: E402
from minicrf.programs.refine import read_labels   # noqa: E402
from minicrf.kernels import GaussianKernel   # noqa: E402
from minicrf.inputs import VOID   # noqa: E402
from minicrf.losses import softmax_loss   # noqa: E402
from minicrf.scores import scores_from_labels   # noqa: E402

PIECES = "conv1_2", "conv3_2", "conv5_1", "fc6"
SIGMAS = (20, 5), (80, 13), (160, 30)       # pixels and colour units of the bilateral kernel


def peer_module(name):
    """A peer, or None where it is not installed."""
    with contextlib.suppress(ImportError):
        return importlib.import_module(name)


pydensecrf, torch = peer_module("pydensecrf.densecrf"), peer_module("torch")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("image", nargs="?", help="a photograph for the CRF (default: one is drawn)")
    add("annotation", nargs="?", metavar="LABELS",
        help="its label picture, black where unknown, to make scores from (default: random scores)")
    add("--crf", action="store_true", help="the CRF")
    add("--net", action="store_true", help="the network and its convolutions")
    add("--joint", action="store_true", help="a joint training step, five mean-field iterations")
    add("--device", choices=("cpu", "gpu"), default="cpu", help="(pydensecrf has the CPU only)")
    add("--tf32", action="store_true", help="let a GPU round the factors of products to 10 bits")
    add("--repeats", type=int, default=5, metavar="N", help="rounds, after one to warm up")
    add("--size", type=int, nargs=2, default=(500, 375), metavar=("W", "H"), help="of drawn images")
    add("--labels", type=int, default=21, metavar="L")
    add("--preset", choices=vgg.PRESETS, default="largefov")
    add("--batch-size", type=int, default=2, metavar="B")
    add("--micro-batch", type=int, metavar="B", help="of the joint step")
    add("--input-size", type=int, metavar="S", help="of the network (default: the preset's)")
    return parser.parse_args()


def synchronise(args):
    if args.device == "gpu":
        arrays.cupy.cuda.Device().synchronize()


def show(row, functions, args):
    """Time functions in turn and print a row, "ours" first.  Returns median seconds by name."""
    functions = {name: f for name, f in functions.items() if f is not None}
    seconds = {name: [] for name in functions}
    for turn in range(args.repeats + 1):
        for name, f in functions.items():
            synchronise(args)
            start = time.perf_counter()
            f()
            synchronise(args)
            if turn:                                 # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    print(f"{row:50}", end="")
    for name, each in seconds.items():
        ratio = np.median(np.divide(seconds["ours"], each))
        print(f"{name} {1e3 * np.median(each):8.1f} ms", end="   " if name == "ours" else
              f" ({ratio:.2f})   ")
    print(flush=True)
    return {name: np.median(each) for name, each in seconds.items()}


def show_memory(row, tasks, args):
    """Peak memory, above that of an interpreter with everything imported, of functions by name."""
    print(f"{row:50}", end="")
    for name, task in tasks.items():
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            print(f"{name} {process.submit(measure, task, args).result() / 1e6:8.0f} MB", end="   ")
    print(flush=True)


def measure(task, args):
    """The bytes that task(args)() takes, in a fresh process."""
    prepare(args)
    before = peak_memory()
    task(args)()
    if args.device == "cpu":
        return peak_memory() - before
    # what either pool holds: neither gives anything back
    return (torch and torch.cuda.max_memory_reserved()) or (
        arrays.cupy.get_default_memory_pool().total_bytes())


def prepare(args):
    """Full float32 or TF32 everywhere; no PyTorch on a GPU that it cannot use."""
    global torch
    os.environ["CUPY_TF32"] = str(int(args.tf32))          # read by cupy at its first product
    if torch and args.device == "gpu" and not torch.cuda.is_available():
        torch = None
    if torch:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32


def peak_memory():
    """This process' peak so far, in bytes; on Linux.

    Not ru_maxrss: that begins with the size of the process that started this one.
    """
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


# The CRF.

def crf_example(args, tiles=1, n_labels=None):
    """(scores (H, W, L) float32, image (H, W, 3)), tiled.  n_labels: random scores for so many."""
    rng = np.random.default_rng(0)
    image = (pictures.read_photograph(args.image) if args.image
             else toy.picture(rng, *args.size[::-1])[0])
    H, W = image.shape[:2]
    if args.annotation and n_labels is None:
        labels, n_labels, _ = read_labels(args.annotation, (0, 0, 0))
        scores = scores_from_labels(labels, n_labels, 0.7)
    else:                                            # blocks, and noise
        blocks = rng.standard_normal((H // 16 + 1, W // 16 + 1, n_labels or args.labels),
                                     np.float32)
        scores = 2 * blocks.repeat(16, axis=0).repeat(16, axis=1)[:H, :W]
        scores += rng.standard_normal(scores.shape, np.float32)
    return np.tile(scores, (tiles, tiles, 1)), np.tile(image, (tiles, tiles, 1))


def our_crf(args, example, sigma=(80, 13), gradient=False, **options):
    """A function: inference with a new DenseCRF, without cache, that returns marginals (H, W, L).

    gradient: and the gradient of Eq. 6 by the scores and all nine parameters.
    """
    scores, image = (arrays.to_device(x, args.device) for x in example)
    L, y = scores.shape[2], scores.argmax(axis=2).ravel()

    def infer():
        crf = DenseCRF(L, sigma_bilateral=(*sigma[:1] * 2, *sigma[1:] * 3), **options)
        q = crf.forward(scores, image, train=gradient)
        if gradient:
            crf.backward_logits(softmax_loss(crf.logits.reshape(-1, L), y)[1])
        return q
    return infer


def peer_crf(example, sigma=(80, 13), kernels=("position", "bilateral")):
    """pydensecrf's (building of the kernels, inference): functions; None where it is missing."""
    if pydensecrf is None:
        return None, None
    scores, image = example
    H, W, L = scores.shape
    energy = np.ascontiguousarray(-scores.reshape(-1, L).T, np.float32)          # (L, N)
    image = np.ascontiguousarray(image)

    def build():
        crf = pydensecrf.DenseCRF2D(W, H, L)
        crf.setUnaryEnergy(energy)
        if "position" in kernels:
            crf.addPairwiseGaussian(sxy=3, compat=3)
        if "bilateral" in kernels:
            crf.addPairwiseBilateral(sxy=sigma[0], srgb=sigma[1], rgbim=image, compat=10)
        return crf

    def infer():
        return np.array(build().inference(5)).T.reshape(H, W, L)
    return build, infer


def peer_filter(crf):
    state = crf.startInference()
    return lambda: crf.stepInference(*state)


def our_inference(args):
    return our_crf(args, crf_example(args))


def peer_inference(args):
    return peer_crf(crf_example(args))[1]


def show_crf(args):
    example = crf_example(args)
    scores, image = example
    H, W, L = scores.shape
    print(f"\nCRF: {W}x{H} pixels, {L} labels, 5 iterations; ours on the {args.device}; pydensecrf "
          f"{'on the CPU' if pydensecrf else 'is not installed'}")
    show_kernels(args, example)
    _, peer = peer_crf(example)
    show("inference", {"ours": our_crf(args, example), "pydensecrf": peer}, args)
    show("with gradient, against its inference", {
        "ours": our_crf(args, example, gradient=True), "pydensecrf": peer}, args)
    for sigma in SIGMAS:
        show(f"inference, sigmas {sigma[0]} and {sigma[1]}", {
            "ours": our_crf(args, example, sigma), "pydensecrf": peer_crf(example, sigma)[1]}, args)
    for n_labels in (2, 60):
        other = crf_example(args, n_labels=n_labels)
        show(f"inference, {n_labels} labels", {
            "ours": our_crf(args, other), "pydensecrf": peer_crf(other)[1]}, args)
    large = crf_example(args, tiles=2)
    show("inference, 4 times the pixels", {
        "ours": our_crf(args, large), "pydensecrf": peer_crf(large)[1],
        "ours on one": our_crf(args, example)}, args)
    show_memory("peak memory, inference", {"ours": our_inference} | (
        {"pydensecrf": peer_inference} if pydensecrf and args.device == "cpu" else {}), args)
    show_agreement(args, example)


def show_kernels(args, example):
    scores, image = example
    H, W, L = scores.shape
    y, x = np.mgrid[:H, :W].astype(np.float32)
    position = np.stack([x.ravel(), y.ravel()], axis=1)                          # (N, 2)
    colour = image.reshape(-1, 3).astype(np.float32)                             # (N, 3)
    bilateral = np.concatenate([position, colour], axis=1)                       # (N, 5)
    values = arrays.to_device(scores.reshape(-1, L), args.device)
    for name, features, sigma in (("position", position, (3, 3)),
                                  ("bilateral", bilateral, (80, 80, 13, 13, 13))):
        features = arrays.to_device(features, args.device)
        kernel = GaussianKernel(features, sigma)
        build, _ = peer_crf(example, kernels=[name])
        step = build and peer_filter(build())
        show(f"{name} kernel: lattice and normalisation", {
            "ours": lambda: GaussianKernel(features, sigma), "pydensecrf": build}, args)
        show(f"{name} kernel: one filter (*)", {
            "ours": lambda: kernel.K_with_self.filter(values), "pydensecrf": step}, args)
    print("(*) pydensecrf: a mean-field step with that kernel alone, the least that it offers")


def show_agreement(args, example):
    """Marginals beside pydensecrf's, and both beside brute force on five crops."""
    def show_difference(row, pairs):
        pairs = [(arrays.to_host(a), arrays.to_host(b)) for a, b in pairs]
        same = [np.mean(a.argmax(axis=2) == b.argmax(axis=2)) for a, b in pairs]
        mean = np.mean([abs(a - b).mean() for a, b in pairs])
        print(f"{row:50}mean |difference| {mean:.1e}, same label {100 * np.mean(same):.2f}%")

    print("marginals:")
    if pydensecrf:
        ours = our_crf(args, example, exclude_self=False)()
        show_difference("  ours and pydensecrf, i = j in both", [(ours, peer_crf(example)[1]())])
    H, W = (min(n, most) for n, most in zip(example[1].shape, (48, 64)))
    down, right = example[1].shape[0] - H, example[1].shape[1] - W
    corners = (0, 0), (0, right), (down, 0), (down, right), (down // 2, right // 2)
    crops = [[x[y:y + H, x0:x0 + W] for x in example] for y, x0 in corners]
    for excluded in (True, False):
        options = dict(exclude_self=excluded)
        exact = [our_crf(args, (scores.astype(np.float64), image), exact=True, **options)()
                 for scores, image in crops]
        row = f"brute force, {W}x{H}, i = j {'excluded' if excluded else 'included'}"
        show_difference(f"  ours, {row}",
                        [(our_crf(args, crop, **options)(), q) for crop, q in zip(crops, exact)])
    if pydensecrf:
        show_difference(f"  pydensecrf, {row}",
                        [(peer_crf(crop)[1](), q) for crop, q in zip(crops, exact)])


# The network.

def our_net(args):
    """(network, its input (B, 3, S, S))."""
    net = vgg.build(args.preset, args.labels)
    net.input_size = args.input_size or net.input_size
    vgg.move(net, args.device)
    shape = args.batch_size, 3, net.input_size, net.input_size
    x = 50 * np.random.default_rng(1).standard_normal(shape, np.float32)
    x = arrays.to_device(x, args.device)
    vgg.scale_fresh(net, [name for name in net.layers if f"{name}_w" in net.params], x[:1])
    return net, x


def our_step(args):
    """A function: forward, backward and update of the network."""
    net, x = our_net(args)
    optimiser = training.optimizer(training.Model(net, weights.MEAN), "unary", [], rate=1e-9)

    def step():
        net.backward(net.forward(x, train=True))
        optimiser.step()
    return step


def to_torch(x, args):
    return torch.tensor(arrays.to_host(x), device="cuda" if args.device == "gpu" else "cpu")


def peer_output(net, params, x, train):
    """What the network gives in PyTorch; params: by the names of ours."""
    F = torch.nn.functional
    for name, layer in net.layers.items():
        if isinstance(layer, layers.Conv2d):
            x = F.conv2d(x, params[f"{name}_w"], params[f"{name}_b"], padding=layer.padding[0],
                         dilation=layer.dilation)
        elif isinstance(layer, layers.ReLU):
            x = F.relu(x, inplace=True)
        elif isinstance(layer, layers.MaxPool2d):
            before, after = layer.padding
            if before != after:
                x, before = F.pad(x, (before, after, before, after), value=-np.inf), 0
            x = F.max_pool2d(x, layer.kernel, layer.stride, before, layer.dilation)
        elif isinstance(layer, layers.Dropout):
            x = F.dropout(x, layer.rate, train)
    return x


def peer_net(args):
    """(forward pass by PyTorch, its parameters): our network."""
    net, x = our_net(args)
    params = {key: to_torch(p, args).requires_grad_() for key, p in net.params.items()}
    x = to_torch(x, args)
    return lambda train: peer_output(net, params, x, train), params.values()


def peer_forward(args):
    forward, _ = peer_net(args)
    return torch.no_grad()(lambda: forward(train=False))


def peer_step(args):
    """As `our_step`, by PyTorch."""
    forward, params = peer_net(args)
    optimiser = torch.optim.SGD(params, lr=1e-9, momentum=0.9, weight_decay=5e-4)

    def step():
        optimiser.zero_grad()
        y = forward(train=True)
        y.backward(y.detach())
        optimiser.step()
    return step


def show_net(args):
    net, x = our_net(args)
    print(f"\nnetwork: {args.preset}, batch of {args.batch_size}, {net.input_size} pixels square, "
          f"on the {args.device}, {'TF32' if args.tf32 else 'full float32'}; PyTorch "
          f"{f'with {torch.get_num_threads()} threads' if torch else 'is not there'}")
    show("forward", {"ours": lambda: net.forward(x), "torch": torch and peer_forward(args)}, args)
    show("forward, backward, update", {
        "ours": our_step(args), "torch": torch and peer_step(args)}, args)
    size = net.input_size
    for name, layer in net.layers.items():
        if name in PIECES:
            show_piece(name, layer, size, args)
        size = layer.output_size(size)
    show_memory("peak memory, forward, backward, update",
                {"ours": our_step} | ({"torch": peer_step} if torch else {}), args)


def show_piece(name, layer, size, args):
    """One convolution forward, beside PyTorch and the plain product of the same operations."""
    w, b = layer.params["w"], layer.params["b"]
    shape = args.batch_size, w.shape[1], size, size
    x = np.random.default_rng(2).standard_normal(shape, np.float32)
    x = arrays.to_device(x, args.device)
    xp = arrays.array_module(x)
    matrix = w.reshape(len(w), -1)                                               # (O, C*k*k)
    columns = xp.ones((matrix.shape[1], layer.output_size(size)**2), np.float32)     # (C*k*k, h*w)
    results = [xp.empty((len(matrix), columns.shape[1]), np.float32)
               for _ in range(args.batch_size)]

    def multiply():
        arrays.for_each(lambda y: xp.matmul(matrix, columns, out=y), results, columns,
                        products=True)

    functions = {"ours": lambda: layer.forward(x), "matrix product": multiply}
    if torch:
        tensors = [to_torch(a, args) for a in (x, w, b)]
        functions["torch"] = lambda: torch.nn.functional.conv2d(
            *tensors, padding=layer.padding[0], dilation=layer.dilation)
    seconds = show(f"{name} forward", functions, args)
    operations = 2 * matrix.size * columns.shape[1] * args.batch_size
    print(f"  {operations / seconds['ours'] / 1e9:.0f} GFLOP/s, "
          f"{100 * seconds['matrix product'] / seconds['ours']:.0f}% of the matrix product's rate")


# The joint training step.

def joint_step(args):
    """A function: one update of network and CRF from drawn pictures."""
    net, _ = our_net(args)
    model = training.Model(net, weights.MEAN, DenseCRF(args.labels), args.device)
    optimiser = training.optimizer(model, "joint", [], rate=1e-6)
    rng = np.random.default_rng(3)
    batch = [toy.picture(rng, *args.size[::-1]) for _ in range(args.batch_size)]
    batch = [(image, np.where(y < args.labels, y, VOID).astype(np.uint8), model.resized(image))
             for image, y in batch]
    return lambda: training.train_step(model, optimiser, batch, 0, 1, args.micro_batch)


def show_joint(args):
    print(f"\njoint training step: {args.preset}, batch of {args.batch_size}, pictures of "
          f"{args.size[0]}x{args.size[1]}, {args.labels} labels, 5 iterations, on the "
          f"{args.device}, {'TF32' if args.tf32 else 'full float32'}")
    step = joint_step(args)
    seconds = show("step", {"ours": step}, args)["ours"]
    print(f"  {args.batch_size / seconds:.2f} images/s; share of the time: " + ", ".join(
        f"{part} {100 * share:.0f}%" for part, share in shares(step, args).items()))
    show_memory("peak memory, joint step", {"ours": joint_step}, args)


def shares(step, args):
    """The share of one step's time in each part, waiting for the device before and after each."""
    inside = {"convolutions": 0, "CRF forward": 0, "CRF backward": 0}

    def watched(part, method):
        def call(*arguments, **options):
            synchronise(args)
            start = time.perf_counter()
            result = method(*arguments, **options)
            synchronise(args)
            inside[part] += time.perf_counter() - start
            return result
        return call

    with contextlib.ExitStack() as stack:
        for part, owner, name in (("convolutions", layers.Conv2d, "forward"),
                                  ("convolutions", layers.Conv2d, "backward"),
                                  ("CRF forward", DenseCRF, "forward"),
                                  ("CRF backward", DenseCRF, "backward_logits")):
            method = watched(part, getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, method))
        start = time.perf_counter()
        step()
        synchronise(args)
        total = time.perf_counter() - start
    return {part: seconds / total for part, seconds in inside.items()}


def main():
    args = parse_arguments()
    if args.device == "gpu" and not gpu.gpu_available():
        print(f"benchmark.py: --device: found gpu, but {gpu.gpu_failure()}; expected cpu",
              file=sys.stderr)
        sys.exit(2)
    prepare(args)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {cores} cores, Python "
          f"{platform.python_version()}, NumPy {np.__version__}; {args.repeats} rounds")
    everything = not (args.crf or args.net or args.joint)
    for wanted, part in ((args.crf, show_crf), (args.net, show_net), (args.joint, show_joint)):
        if wanted or everything:
            part(args)


if __name__ == "__main__":
    main()
