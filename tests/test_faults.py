"""What a long run may meet: kills, full disks, damaged and crafted files, numbers out of range.

Kills are real ones of real processes.  Long versions carry the marker `slow`.
"""
import contextlib
import gc
import io
import json
import os
import pathlib
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

import run_voc
from minicrf import arrays, densecrf, files, training, vgg
from minicrf.data import loading, toy, voc, weights
from minicrf.results import checkpoints, evaluation, fitting, logs
from minicrf.densecrf import DenseCRF
from minicrf.kernels import GaussianKernel
from minicrf.losses import VOID, softmax

resource = pytest.importorskip("resource", reason="signals and limits of a process are Unix's")
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc or /dev/full")
PROGRAM = pathlib.Path(run_voc.__file__)
OPTIONS = ["--net", "tiny", "--batch-size", "2", "--iterations", "4", "--evaluate-every", "2",
           "--rate", "0.1"]
ROWS = 8                                           # of log.csv: four iterations of two stages
CLASSES = list("abcd")


@pytest.fixture(scope="module")
def toy_set(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "set"
    toy.draw(root, n_train=4, n_val=2, width=(30, 40), height=(24, 32))
    return root


def options(toy_set, out, *more):
    return ["--voc", str(toy_set), "--out", str(out), *OPTIONS, *more]


@pytest.fixture(scope="module")
def whole(toy_set, tmp_path_factory):
    """The output folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    assert run_voc.main(options(toy_set, out)) == 0
    return out


def one_line(error, *words):
    """What the program said on stderr, checked to be one line that has these words."""
    lines = error.splitlines()
    assert len(lines) == 1 and lines[0].startswith("run_voc.py: "), error
    for word in words:
        assert word in lines[0], error


# --- kills ---------------------------------------------------------------------------------------

# The program, with a signal to itself before or after the n-th call of os.fsync or os.replace
SUICIDE = """
import os, signal, sys
import run_voc
name, number, when, signum = sys.argv[1:5]
real, calls = getattr(os, name), 0
def call(*arguments):
    global calls
    calls += 1
    if when == "after":
        real(*arguments)
    if calls == int(number):
        os.kill(os.getpid(), int(signum))
    if when == "before":
        real(*arguments)
setattr(os, name, call)
sys.exit(run_voc.main(sys.argv[5:]))
"""


def signalled(arguments, name, number, when, signum=signal.SIGKILL):
    """Runs the program, with a signal to itself; returns the finished process."""
    command = [sys.executable, "-c", SUICIDE, name, str(number), when, str(int(signum)), *arguments]
    return subprocess.run(command, cwd=PROGRAM.parent, capture_output=True, text=True, timeout=300)


def killed_from_outside(arguments, out, rows, delay):
    """Starts the program and kills it `delay` seconds after log.csv has this many rows."""
    process = subprocess.Popen([sys.executable, PROGRAM, *arguments], stdout=subprocess.DEVNULL)
    until = time.monotonic() + 300
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            if (out / "log.csv").read_text().count("\n") > rows:
                break
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    return process.wait()


def assert_as_if_undisturbed(out, whole):
    """Every array of every checkpoint to the bit, the log and the results to the letter."""
    assert not list(out.glob("**/*.tmp"))
    for path in whole.glob("*.npz"):
        expected, found = weights.read_npz(path), weights.read_npz(out / path.name)
        assert expected.keys() == found.keys()
        for key in expected:
            if key != "info":                      # tells the command line, --resume in it
                assert np.array_equal(expected[key], found[key]), (path.name, key)
    for name in ("log.csv", "results.json", "table.txt"):
        assert (out / name).read_text() == (whole / name).read_text()


def resume(toy_set, out):
    done = subprocess.run([sys.executable, PROGRAM, *options(toy_set, out, "--resume")],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_run_killed_three_times_ends_as_if_undisturbed(toy_set, whole, tmp_path):
    arguments = options(toy_set, tmp_path, "--resume")
    assert killed_from_outside(arguments, tmp_path, rows=1, delay=0) == -signal.SIGKILL
    in_a_write = signalled(arguments, "fsync", 3, "before")
    assert in_a_write.returncode == -signal.SIGKILL and list(tmp_path.glob("*.npz.tmp"))
    assert killed_from_outside(arguments, tmp_path, rows=ROWS - 1, delay=0) == -signal.SIGKILL
    assert checkpoints.read(tmp_path / "joint.npz")[1]["iteration"] == 2
    resume(toy_set, tmp_path)
    assert_as_if_undisturbed(tmp_path, whole)


@pytest.mark.slow
def test_runs_killed_at_twenty_moments_end_as_if_undisturbed(toy_set, whole, tmp_path):
    rng = np.random.default_rng(0)
    moments = [(rows, rng.uniform(0, 0.1)) for rows in [0, 0, *range(1, ROWS), ROWS - 1]]
    moments += [("fsync", n, "before") for n in (2, 3, 5, 7)]            # inside a checkpoint write
    moments += [("replace", n, when) for n in (2, 4, 6) for when in ("before", "after")]
    assert len(moments) == 20
    late = 0
    for number, moment in enumerate(moments):
        out = tmp_path / str(number)
        arguments = options(toy_set, out)
        if len(moment) == 2:
            code = killed_from_outside(arguments, out, *moment)
            late += code == 0
        else:
            code = signalled(arguments, *moment).returncode
        assert code == -signal.SIGKILL or code == 0 and len(moment) == 2, moment
        resume(toy_set, out)
        assert_as_if_undisturbed(out, whole)
    assert late <= 2                     # a slow machine may kill only once the run has ended


# after that of log.csv, in the second and in the last iteration
@pytest.mark.parametrize("write", [2, 4])
def test_ctrl_c_saves_says_so_and_exits_with_130(toy_set, whole, tmp_path, write):
    stopped = signalled(options(toy_set, tmp_path), "fsync", write, "before", signal.SIGINT)
    assert stopped.returncode == 130 and stopped.stderr == ""
    iteration = checkpoints.read(tmp_path / "unary.npz")[1]["iteration"]
    assert f"unary: stopped after iteration {iteration} and saved" in stopped.stdout
    assert not (tmp_path / "joint.npz").exists()
    assert len(logs.read_log(tmp_path / "log.csv")) == iteration
    resume(toy_set, tmp_path)
    assert_as_if_undisturbed(tmp_path, whole)


def test_a_log_row_that_was_cut_short_is_no_row(tmp_path):
    path, model = tmp_path / "log.csv", small_model()
    log = logs.Log(path, model, "joint", 0)
    for iteration in (10, 11):
        log.append(iteration, 0.25, 1.0)
    kept = path.read_bytes()
    log.append(12, 0.125, 1.0, miou=3.5)
    content = path.read_bytes()
    for end in range(len(kept), len(content)):
        path.write_bytes(content[:end])
        logs.Log(path, model, "joint", 11)
        assert path.read_bytes() == kept, content[len(kept):end]
    for other in (b"a,b\n1,2\n", b"stage,iteration,loss\nunary,one,0.5\n", b"\xff\xfe\n1,2\n"):
        path.write_bytes(other)
        with pytest.raises(ValueError, match="log.csv: not a readable log"):
            logs.Log(path, model, "joint", 11)


# --- a full disk, no permission ------------------------------------------------------------------

INFO = {"stage": "joint", "classes": CLASSES, "iteration": 1, "seed": 0}


def small_model(crf=True, dtype=np.float32):
    net = vgg.build("tiny", len(CLASSES), dropout=0.0, dtype=dtype)
    refine = DenseCRF(len(CLASSES), w=(1.5, 2.0), sigma_position=(2.0, 1.3),
                      sigma_bilateral=(6.0, 7.0, 50.0, 60.0, 70.0))
    return training.Model(net, (100.0, 110.0, 120.0), refine if crf else None)


def denied(*_, **options):
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize("fault", [pytest.param("disk full", marks=LINUX), "no permission"])
def test_a_checkpoint_that_cannot_be_written(tmp_path, monkeypatch, fault):
    model, path = small_model(), tmp_path / "joint.npz"
    checkpoints.save(path, model, INFO)
    before = path.read_bytes()
    if fault == "disk full":
        (tmp_path / "joint.npz.tmp").symlink_to("/dev/full")
    else:
        monkeypatch.setattr(files, "open", denied, raising=False)
    words = {"disk full": "No space left on device", "no permission": "Permission denied"}[fault]
    with pytest.raises(OSError, match=f"joint.npz: could not be written .{words}.; what it held"):
        checkpoints.save(path, model, INFO)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["joint.npz"]
    if fault == "disk full":
        (tmp_path / "log.csv.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"log.csv: could not be written .{words}"):
        logs.Log(tmp_path / "log.csv", model, "joint", 0)
    assert os.listdir(tmp_path) == ["joint.npz"]


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_the_last_checkpoint_knows_of_no_better_state_than_is_kept(tmp_path, monkeypatch, failing):
    """Whichever write a run ends in: best and last are two files."""
    save, calls = checkpoints.save, []

    def fail(path, *arguments):
        calls.append(path)
        if len(calls) == failing:
            raise OSError(f"{path}: could not be written")
        save(path, *arguments)

    monkeypatch.setattr(checkpoints, "save", fail)
    scores = iter([1.0, 2.0])
    with pytest.raises(OSError, match="could not be written"):
        fit(small_model(), tmp_path, validate=lambda: {"unary": next(scores)})
    if (tmp_path / "joint.npz").exists():
        _, last = checkpoints.read(tmp_path / "joint.npz")
        _, best = checkpoints.read(tmp_path / "joint_best.npz")
        assert best["best"] >= last["best"]


def test_a_run_out_of_space_keeps_the_earlier_checkpoint(toy_set, whole, tmp_path):
    """The largest size of a file is limited: writing fails in the middle of a checkpoint."""
    earlier = (whole / "unary.npz").read_bytes()
    (tmp_path / "unary.npz").write_bytes(earlier)
    limit = len(earlier) - 1000
    arguments = options(toy_set, tmp_path, "--resume", "--stage", "unary", "--iterations", "6")
    failed = subprocess.run(
        [sys.executable, PROGRAM, *arguments], capture_output=True, text=True, timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert failed.returncode == 2
    one_line(failed.stderr, f"{tmp_path / 'unary.npz'}: could not be written (File too large)")
    assert (tmp_path / "unary.npz").read_bytes() == earlier and not list(tmp_path.glob("*.tmp"))
    resume(toy_set, tmp_path)


@LINUX
def test_a_log_that_cannot_be_written_is_named(tmp_path):
    log = logs.Log(tmp_path / "log.csv", small_model(), "joint", 0)
    log.path = "/dev/full"
    with pytest.raises(OSError, match="/dev/full: could not be written .No space left on device"):
        log.append(1, 0.5, 1.0)


# --- damaged checkpoints -------------------------------------------------------------------------

def load(path):
    """All that a resumed run takes from a checkpoint, as one dict."""
    arrays, info = checkpoints.read(path)
    model = training.Model(checkpoints.load_net(path, arrays, info), arrays["mean"],
                           checkpoints.load_crf(path, arrays, info), scale=arrays["scale"])
    optimiser = training.optimizer(model, "joint" if model.crf else "unary", [])
    checkpoints.load_velocity(path, arrays, optimiser)
    velocity = {f"velocity_{key}": v for key, v in optimiser.velocity.items()}
    return {**optimiser.params, **velocity, "mean": model.mean, "scale": model.scale, "info": info}


def same(one, other):
    return one.keys() == other.keys() and all(
        np.asarray(one[key]).dtype == np.asarray(other[key]).dtype
        and np.array_equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of the joint stage in which no array is constant."""
    path, rng = tmp_path_factory.mktemp("checkpoint") / "joint.npz", np.random.default_rng(0)
    model = small_model()
    optimiser = training.optimizer(model, "joint", [])
    for arrays in (optimiser.params, optimiser.velocity):
        for array in arrays.values():
            array += rng.standard_normal(array.shape) * 0.01
    checkpoints.save(path, model, INFO, optimiser)
    return path


def flip(content, bit):
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def refused_or_same(path, read, expected):
    """Whether the file is refused, with one line that names it; otherwise it must read the same."""
    try:
        found = read(path)
    except (ValueError, OSError) as error:
        assert str(path) in str(error) and "\n" not in str(error), error
        return True
    assert same(found, expected)
    return False


def flip_bits(checkpoint, path, flips, seed):
    """Half of the flips anywhere, half where the archive's structure is; returns those refused."""
    content, expected, rng = checkpoint.read_bytes(), load(checkpoint), np.random.default_rng(seed)
    with zipfile.ZipFile(checkpoint) as archive:
        headers = np.array([entry.header_offset for entry in archive.infolist()])
        places = (headers[:, None] + np.arange(200)).ravel()
        places = np.concatenate([places, np.arange(archive.start_dir, len(content))])
    refused = 0
    for number in range(flips):
        byte = rng.integers(len(content)) if number % 2 else rng.choice(places)
        path.write_bytes(flip(content, 8 * int(byte) + int(rng.integers(8))))
        refused += refused_or_same(path, load, expected)
    return refused


@pytest.mark.filterwarnings("ignore")              # numpy's, of headers that look old
def test_a_flipped_bit_is_refused_or_without_effect(checkpoint, tmp_path):
    assert flip_bits(checkpoint, tmp_path / "joint.npz", 30, seed=1) >= 15


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_many_flipped_bits_are_refused_or_without_effect(checkpoint, tmp_path):
    assert flip_bits(checkpoint, tmp_path / "joint.npz", 400, seed=2) >= 200


def flip_a_small_archive(path, bits):
    expected = {"mean": np.arange(3.0), "crf_w": np.array([1.5, 2]),
                "info": np.array('{"a": 1}' * 8)}
    with io.BytesIO() as stream:
        np.savez(stream, **expected)
        content = stream.getvalue()
    refused = 0
    for bit in bits(8 * len(content)):
        path.write_bytes(flip(content, int(bit)))
        refused += refused_or_same(path, weights.read_npz, expected)
    return refused


@pytest.mark.filterwarnings("ignore")
def test_structure_is_checked_to_the_bit(tmp_path):
    """Most of a small archive is structure: headers, directory, end."""
    rng = np.random.default_rng(3)
    assert flip_a_small_archive(tmp_path / "a.npz", lambda n: rng.integers(n, size=1000)) > 500


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_single_bit_of_an_archive_is_checked(tmp_path):
    assert flip_a_small_archive(tmp_path / "a.npz", range) > 5000


def test_a_shape_that_shrank_is_found_by_the_checksum(tmp_path):
    """One flipped bit, of which the array that is left to read says nothing."""
    path = tmp_path / "a.npz"
    np.savez(path, fc6_b=np.arange(3000.0))
    path.write_bytes(path.read_bytes().replace(b"(3000,)", b"(1000,)"))
    assert refused_or_same(path, weights.read_npz, None)


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.9, 0.999, 0.99999])
def test_a_truncated_checkpoint_is_refused(checkpoint, tmp_path, share):
    content, path = checkpoint.read_bytes(), tmp_path / "joint.npz"
    path.write_bytes(content[:int(share * len(content))])
    assert refused_or_same(path, load, None)


def changed(checkpoint, path, arrays=(), **info):
    """A copy with other arrays (None: without) and entries of info, its checksums right."""
    content = weights.read_npz(checkpoint)
    if info:
        content["info"] = np.array(json.dumps({**json.loads(str(content["info"])), **info}))
    content |= dict(arrays)
    np.savez(path, **{key: array for key, array in content.items() if array is not None})
    return path


@pytest.mark.parametrize("arrays, info, named", [
    ({}, {"version": "99.0"}, "found version 99.0"), ({}, {"version": 3}, "no training state"),
    ({}, {"preset": "vgg19"}, "found preset 'vgg19'"),
    ({}, {"preset": "largefov"}, "conv1_1_w: found shape"),
    ({}, {"preset": ["tiny"]}, "no training state"), ({}, {"classes": 4}, "no training state"),
    ({}, {"classes": CLASSES[:3]}, "fc8_w: found shape"),
    ({}, {"iteration": "1"}, "no training state"), ({}, {"stage": None}, "no training state"),
    ({"info": None}, {}, "no training state"), ({"info": np.array("[]")}, {}, "no training state"),
    ({"info": np.array("[" * 50000)}, {}, "no training state"),
    ({"info": np.float64(1)}, {}, "no training state"), ({"mean": None}, {}, "no training state"),
    ({"mean": np.ones(1)}, {}, "mean: found shape (1,)"), ({"scale": np.zeros(())}, {}, "scale"),
    ({"scale": np.ones(2)}, {}, "scale"), ({"conv3_1_b": None}, {}, "found no conv3_1"),
    ({"fc7_w": None}, {}, "found no fc7"), ({"fc7_b": np.full(96, np.nan)}, {}, "fc7_b: found"),
    ({"fc7_b": np.ones(96, int)}, {}, "fc7_b: found int64"),
    ({"fc7_b": np.full(96, "1.0")}, {}, "fc7_b: found <U3"),
    ({"velocity_fc7_b": None}, {}, "no momentum for fc7_b"),
    ({"velocity_fc7_b": np.full(96, np.inf)}, {}, "velocity_fc7_b: found"),
    ({"crf_w": np.ones(3)}, {}, "w: found"), ({"crf_w": np.ones((1, 2))}, {}, "crf_w: found"),
    ({"crf_log_sigma_position": np.full(2, 800.0)}, {}, "sigma_position: found"),
    ({"crf_log_sigma_bilateral": np.full(5, -800.0)}, {}, "sigma_bilateral: found"),
    ({"scale": None}, {}, "no training state"),
    ({"crf_log_sigma_bilateral": np.ones(2)}, {}, "sigma_bilateral: found"),
    ({"crf_log_sigma_position": None}, {}, "crf_log_sigma_position: found int8 of shape (0,)")])
def test_a_checkpoint_of_something_else_is_refused(checkpoint, tmp_path, arrays, info, named):
    path = changed(checkpoint, tmp_path / "joint.npz", arrays, **info)
    with pytest.raises(ValueError) as error:
        load(path)
    assert str(error.value).startswith(f"{path}: ") and named in str(error.value), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"PK", b"text\n", b"MATLAB 5.0 MAT-file", bytes(3000)])
def test_what_is_no_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "joint.npz"
    path.write_bytes(content)
    assert refused_or_same(path, load, None)


def test_resuming_from_a_damaged_checkpoint_ends_in_one_line(toy_set, whole, tmp_path, capsys):
    content = (whole / "unary.npz").read_bytes()
    (tmp_path / "unary.npz").write_bytes(flip(content, 4 * len(content)))
    assert run_voc.main(options(toy_set, tmp_path, "--resume")) == 2
    one_line(capsys.readouterr().err, str(tmp_path / "unary.npz"), "not a readable .npz file")


def test_parameters_come_back_to_the_bit(checkpoint):
    """Also log sigma, which is not the logarithm of its own exponential everywhere."""
    stored, found = weights.read_npz(checkpoint), load(checkpoint)
    assert not np.array_equal(np.log(np.exp(stored["crf_log_sigma_position"])),
                              stored["crf_log_sigma_position"])
    for key in stored.keys() - {"info"}:
        assert np.array_equal(stored[key], found[key]), key


# --- crafted files: refused in little memory -----------------------------------------------------

READ_ALL = r"""
import pathlib, re, resource, sys
sys.path.insert(0, sys.argv[1])
from minicrf.data import pictures, voc, weights
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
peak = lambda: int(re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1]) // 1024
before = peak()
for path in sorted(pathlib.Path(sys.argv[2]).iterdir()):
    for read in (weights.read_weights, pictures.read_photograph, voc._open):
        try:
            read(path)
        except (ValueError, OSError) as error:
            assert str(path) in str(error) and "\n" not in str(error), error
        else:
            print("read", path.name, read.__name__)
print(peak() - before)
"""
BOMB = 2 ** 27                                     # bytes that unpack from a file of 130 kB


def npy_header(shape):
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def write_bomb(path, compression, claimed=None, shape=(BOMB // 4,)):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("conv1_1_w.npy", npy_header(shape) + bytes(BOMB))
        if claimed:
            archive.filelist[0].file_size = claimed
    return path


def png_chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, extra=b"", pixels=bytes(9999)):
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + extra
            + png_chunk(b"IDAT", zlib.compress(pixels)))


@LINUX
def test_bombs_are_refused_in_little_memory(tmp_path):
    write_bomb(tmp_path / "deflated.npz", zipfile.ZIP_DEFLATED)
    write_bomb(tmp_path / "deflated, claims little.npz", zipfile.ZIP_DEFLATED, claimed=1000)
    write_bomb(tmp_path / "bz2.npz", zipfile.ZIP_BZIP2)
    with zipfile.ZipFile(tmp_path / "header claims much.npz", "w") as archive:
        archive.writestr("conv1_1_w.npy", npy_header((2 ** 40,)) + bytes(1000))
    tensor = {"dtype": "F32", "shape": [2 ** 18], "data_offsets": [0, 2 ** 20]}
    text = json.dumps({f"features.{i}.weight": tensor for i in range(5000)}).encode()
    (tmp_path / "overlapping.safetensors").write_bytes(struct.pack("<Q", len(text)) + text
                                                       + bytes(2 ** 20))
    text = zlib.compress(bytes(BOMB))
    for name, content in {
            "large.png": png(10000, 10000, pixels=bytes(BOMB)), "wider.png": png(2 ** 30, 2 ** 30),
            "text.png": png(9000, 9000, png_chunk(b"zTXt", b"Comment\0\0" + text)),
            "profile.png": png(9000, 9000, png_chunk(b"iCCP", b"a\0\0" + text)),
            "wide.gif": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + bytes(99),
            "wide.ppm": b"P6 65000 65000 255\n" + bytes(99),
            "wide.bmp": b"BM" + struct.pack("<IIIIiiHHIIIIII", 200, 0, 54, 40, 60000, 60000, 1, 24,
                                            0, 0, 0, 0, 0, 0) + bytes(99)}.items():
        (tmp_path / name).write_bytes(content)
    command = [sys.executable, "-W", "ignore", "-c", READ_ALL, PROGRAM.parent, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    *read, peak = done.stdout.splitlines()
    print(f"{peak} MB")
    assert not read and int(peak) < 60, done.stdout


# --- numbers -------------------------------------------------------------------------------------

def draw(root, sizes, label):
    """A VOC folder with a random image of each size (H, W) and labels label(rng, number, size)."""
    rng = np.random.default_rng(0)
    for folder in ("JPEGImages", "SegmentationClass", voc.LISTS):
        (root / folder).mkdir(parents=True)
    names = [f"p{number}" for number in range(len(sizes))]
    for number, (name, size) in enumerate(zip(names, sizes)):
        image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(image).save(root / "JPEGImages" / f"{name}.jpg")
        labels = np.broadcast_to(label(rng, number, size), size).astype(np.uint8)
        voc.save_labels(root / "SegmentationClass" / f"{name}.png", labels)
    (root / voc.LISTS / "train.txt").write_text("\n".join(names[:-1]))
    (root / voc.LISTS / "val.txt").write_text(names[-1])
    (root / voc.LISTS / "classes.txt").write_text("\n".join(CLASSES))
    return root


SIZES = [(12, 15), (14, 13), (11, 16)]


@pytest.mark.filterwarnings("ignore:All-NaN")
@pytest.mark.parametrize("sizes, label, miou", [
    (SIZES, lambda rng, number, size: VOID, None),
    (SIZES, lambda rng, number, size: 2, 100.0),
    ([(1, 1)] * 3, lambda rng, number, size: 1, 100.0)], ids=["all void", "one class", "one pixel"])
def test_pictures_with_little_in_them_run_to_the_end(tmp_path, capsys, sizes, label, miou):
    root, out = draw(tmp_path / "set", sizes, label), tmp_path / "out"
    assert run_voc.main(options(root, out, "--iterations", "2", "--rate", "1")) == 0
    assert capsys.readouterr().err == ""
    results = json.loads((out / "results.json").read_text())
    assert results["joint"]["miou"] == miou and results["joint"]["miou_band"] is None
    losses = [float(row["loss"]) for row in logs.read_log(out / "log.csv")]
    if miou is None:
        assert losses == [0] * 4
        velocity = {key: array for key, array in weights.read_npz(out / "joint.npz").items()
                    if key.startswith("velocity_crf")}
        assert len(velocity) == 3 and not any(array.any() for array in velocity.values())
    else:
        assert np.isfinite(losses).all() and losses[3] < losses[0]


def batch(n=2, seed=0):
    rng, samples = np.random.default_rng(seed), []
    for i in range(n):
        image = rng.integers(0, 256, (10 + i, 13, 3), dtype=np.uint8)
        labels = rng.integers(0, len(CLASSES), (10 + i, 13)).astype(np.uint8)
        samples.append((image, labels, small_model().resized(image)))
    return samples


def endless(samples):
    while True:
        yield samples


def fit(model, out, stage="joint", rate=0.1, iterations=2, validate=lambda: {"unary": 1.0}):
    os.makedirs(out, exist_ok=True)
    return fitting.fit(model, stage, training.optimizer(model, stage, [], rate=rate),
                        endless(batch()), validate, out, dict(INFO), start=0, iterations=iterations,
                        batch_size=2, evaluate_every=1)


def test_learning_rate_0_changes_nothing(tmp_path):
    model, expected = small_model(), small_model()
    assert fit(model, tmp_path, rate=0)
    for key, p in expected.net.params.items():
        assert np.array_equal(p, model.net.params[key]), key
    for key, p in expected.crf.params.items():
        assert np.array_equal(p, model.crf.params[key]), key


@pytest.mark.parametrize("rate", ["1e9", "1e300"])
@pytest.mark.parametrize("stage", ["unary", "joint", "piecewise"])
def test_a_huge_learning_rate_ends_in_one_line(toy_set, whole, tmp_path, capsys, stage, rate):
    start = ["--weights", str(whole / "unary.npz")]
    code = run_voc.main(options(toy_set, tmp_path, "--stage", stage, *start, "--rate", rate))
    assert code == 2
    one_line(capsys.readouterr().err, f"{stage}: iteration ", "expected", "try a smaller --rate")
    for path in tmp_path.glob("*.npz"):
        checkpoints.read(path)                     # what was written before can be read


@pytest.mark.parametrize("log_sigma", [-60, -25, 60, 800])
@pytest.mark.parametrize("kernel", ["log_sigma_position", "log_sigma_bilateral"])
def test_a_kernel_width_without_bounds_ends_in_one_line(tmp_path, kernel, log_sigma):
    model = small_model()
    model.crf.params[kernel][0] = log_sigma
    with pytest.raises(FloatingPointError, match="joint: iteration 1: .*found .*smaller") as error:
        fit(model, tmp_path)
    assert "\n" not in str(error.value) and not list(tmp_path.glob("*.npz"))


def test_a_kernel_much_wider_than_the_picture_is_fine(tmp_path):
    """Each pixel hears all others alike: the width no longer matters, and stays."""
    model = small_model()
    model.crf.params["log_sigma_position"][...] = 25
    assert fit(model, tmp_path)
    np.testing.assert_allclose(model.crf.params["log_sigma_position"], 25, atol=1e-6)
    assert load(tmp_path / "joint.npz")["crf_log_sigma_position"] == pytest.approx(25)


def test_kernels_much_narrower_than_a_pixel_say_nothing():
    (image, _, _), = batch(1)
    scores = np.random.default_rng(0).standard_normal((*image.shape[:2], len(CLASSES)))
    crf = small_model().crf
    for key in ("log_sigma_position", "log_sigma_bilateral"):
        crf.params[key][...] = -12
    np.testing.assert_allclose(crf.forward(scores, image), softmax(scores), atol=1e-12)


def test_weights_of_0_leave_the_unary_scores_and_can_grow_again(tmp_path):
    model, unary = small_model(dtype=np.float64), small_model(crf=False, dtype=np.float64)
    model.crf.params["w"][...] = 0
    losses = [float(training.accumulate_gradients(m, batch(), 0.5)) for m in (model, unary)]
    assert losses[0] == losses[1]
    for key, g in unary.net.grads.items():
        np.testing.assert_allclose(model.net.grads[key], g, rtol=1e-9, atol=1e-12)
    assert (model.crf.grads["w"] != 0).all() and (model.crf.grads["log_sigma_position"] == 0).all()
    assert fit(model, tmp_path, stage="piecewise", rate=0)
    assert model.crf.params["w"].tolist() == [0, 0]


def test_out_of_memory_names_the_batch_and_the_smaller_setting_to_try(toy_set, tmp_path,
                                                                      monkeypatch, capsys):
    monkeypatch.setattr(training.Model, "resized", lambda *_: np.empty(2 ** 60, np.uint8))
    assert run_voc.main(options(toy_set, tmp_path)) == 2
    one_line(capsys.readouterr().err, "too little memory for 2 images", "try --micro-batch 1")


# --- memory --------------------------------------------------------------------------------------

def train_on_changing_sizes(steps, model):
    """That many steps, each on a picture of another size; the same ones at every call."""
    optimiser, rng = training.optimizer(model, "joint", [], rate=0.01), np.random.default_rng(0)
    for iteration in range(steps):
        size = tuple(rng.integers(8, 32, 2))
        image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        labels = rng.integers(0, len(CLASSES), size).astype(np.uint8)
        batch = [(image, labels, model.resized(image))]
        training.train_step(model, optimiser, batch, 0, iteration)
        evaluation.evaluate(model, [(image, labels)], len(CLASSES))


def test_a_few_steps_on_changing_sizes_keep_memory_level():
    model, levels = small_model(), []
    tracemalloc.start()
    for steps in (8, 8, 24):                       # the first fills what libraries keep
        train_on_changing_sizes(steps, model)
        train_on_changing_sizes(densecrf.CACHED_KERNELS, model)          # the same ones last
        gc.collect()                               # SciPy's arrays leave cycles
        levels.append(tracemalloc.get_traced_memory()[0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert levels[2] - levels[1] < 0.05 * peak, (levels, peak)


RESIDENT = """
import ctypes, gc, sys
sys.path[:0] = sys.argv[1:3]
import test_faults as t
def pages():
    gc.collect()
    # freed, but kept by the allocator for next time: some 60 MB, that come and go
    ctypes.CDLL(None).malloc_trim(0)
    return int(open("/proc/self/statm").read().split()[1])
if sys.argv[3] == "changing sizes":
    model = t.small_model()
    for steps in (100, 200):
        t.train_on_changing_sizes(steps, model)
        print(pages())
else:
    def validate():
        print(pages())
        return {"unary": 1.0}
    out, stage = sys.argv[4], sys.argv[3]
    t.toy.draw(out + "/set")
    crf = t.DenseCRF(6) if stage == "joint" else None
    model = t.training.Model(t.vgg.build("tiny", 6), (0, 0, 0), crf, scale=60)
    batches = t.loading.batches(out + "/set", t.voc.image_list(out + "/set", "train"), 16, 0,
                                model.resized, n_classes=6)
    t.fitting.fit(model, stage, t.training.optimizer(model, stage, [], rate=0.01), batches,
                   validate, out, dict(t.INFO), start=0, iterations=300, batch_size=16,
                   evaluate_every=10)
"""


@pytest.mark.slow
@LINUX
@pytest.mark.parametrize("kind", ["unary", "joint", "changing sizes"])
def test_resident_memory_after_300_iterations_is_that_after_100(tmp_path, kind):
    """On the default run's pictures, in its batches of 16; and on pictures of ever other sizes.

    Pictures read and lattices built ahead make it go up and down: medians of ten readings.
    """
    done = subprocess.run([sys.executable, "-c", RESIDENT, PROGRAM.parent, PROGRAM.parent / "tests",
                           kind, tmp_path], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    pages = [int(line) for line in done.stdout.splitlines() if line.isdigit()]
    n = len(pages) // 3 or 1
    after_100, after_300 = np.median(pages[:n]), np.median(pages[-n:])
    print(f"{kind}: {after_100} pages after 100 iterations, {after_300} after 300")
    assert after_300 < 1.05 * after_100, (after_100, after_300)


# --- the same result to the bit ------------------------------------------------------------------

def test_any_number_of_threads_trains_the_same_network(toy_set, monkeypatch):
    monkeypatch.setattr(densecrf, "BLOCK", 100)    # so that small pictures use threads at all
    results = []
    for threads in (1, 2, 4):
        monkeypatch.setattr(arrays, "POOL", ThreadPoolExecutor(threads))
        monkeypatch.setattr(arrays, "SMALL", 0 if threads > 1 else 2 ** 60)
        model = training.Model(vgg.build("tiny", 6), (100., 110., 120.), DenseCRF(6), scale=60)
        optimiser = training.optimizer(model, "joint", [], rate=0.1)
        batches = loading.batches(toy_set, voc.image_list(toy_set, "train"), 2, 0,
                                  model.resized, n_classes=6,
                                  pool=ThreadPoolExecutor(threads))
        losses = [float(training.train_step(model, optimiser, next(batches), 0, i))
                  for i in (1, 2, 3)]
        batches.close()
        results.append((losses, {key: p.copy() for key, p in optimiser.params.items()}))
    for losses, params in results[1:]:
        assert losses == results[0][0]
        assert all(np.array_equal(p, results[0][1][key]) for key, p in params.items())


# --- properties of filters and marginals at random -----------------------------------------------

def random_filters(cases, exact):
    """Kernels of random dimension, size, spread and normalisation, with values of their length."""
    for seed in range(cases):
        rng = np.random.default_rng(seed)
        d, n = int(rng.integers(1, 6)), int(rng.integers(1, 80))
        features = rng.standard_normal((d, n)) * 10 ** rng.uniform(-2, 2)
        features = features[:, rng.integers(0, n, n)]                    # some points twice
        kernel = GaussianKernel(features, np.exp(rng.standard_normal(d)),
                                normalization=["symmetric", "none"][seed % 2], exact=exact)
        yield rng, kernel, rng.standard_normal((n, 3)), rng.standard_normal((n, 3))


@pytest.mark.parametrize("exact", [False, True], ids=["lattice", "exact"])
def test_filters_are_linear(exact):
    for rng, kernel, x, y in random_filters(30, exact):
        a, b = rng.standard_normal(2)
        for f in (kernel.K_hat.filter, kernel.K_hat.filter_transpose):
            np.testing.assert_allclose(f(a * x + b * y), a * f(x) + b * f(y), atol=1e-10 * len(x))


@pytest.mark.parametrize("exact", [False, True], ids=["lattice", "exact"])
def test_normalised_filters_keep_the_square_roots_of_their_sums(exact):
    """D^-1/2 K D^-1/2 sqrt(n) = sqrt(n), n = K 1: what a constant is to a kernel made symmetric."""
    for _, kernel, _, _ in random_filters(30, exact):
        if kernel.n is not None:
            root = np.sqrt(kernel.n)[:, None]
            np.testing.assert_allclose(kernel.K_hat.filter(root), root, rtol=1e-10)


@pytest.mark.parametrize("exact", [False, True], ids=["lattice", "exact"])
def test_filters_over_their_sums_stay_between_least_and_greatest_input(exact):
    for _, kernel, x, _ in random_filters(30, exact):
        for f in (kernel.K.filter, kernel.K.filter_transpose):
            mean = f(x) / f(np.ones((len(x), 1)))
            assert (mean <= x.max(axis=0) + 1e-9).all() and (mean >= x.min(axis=0) - 1e-9).all()


def test_the_order_of_points_and_of_columns_does_not_matter():
    for seed in range(30):
        rng = np.random.default_rng(seed)
        n, d = int(rng.integers(2, 80)), int(rng.integers(1, 6))
        features, x = rng.standard_normal((d, n)) * 3, rng.standard_normal((n, 4))
        points, columns, sigma = rng.permutation(n), rng.permutation(4), np.ones(d)
        given, turned = GaussianKernel(features, sigma), GaussianKernel(features[:, points], sigma)
        expected = given.K_hat.filter(x)[points][:, columns]
        found = turned.K_hat.filter(x[points][:, columns])
        np.testing.assert_allclose(found, expected, atol=1e-10)
        np.testing.assert_allclose(turned.self_weight, given.self_weight[points], atol=1e-10)


def test_the_order_of_labels_does_not_matter():
    for seed in range(10):
        rng = np.random.default_rng(seed)
        scores, image = rng.standard_normal((9, 11, 5)) * 3, rng.integers(0, 256, (9, 11, 3))
        order = rng.permutation(5)
        crf = DenseCRF(5, sigma_bilateral=(5, 5, 60, 60, 60))
        np.testing.assert_allclose(crf.forward(scores[:, :, order], image),
                                   crf.forward(scores, image)[:, :, order], atol=1e-9)


@pytest.mark.filterwarnings("ignore:overflow encountered in subtract")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_marginals_of_scores_over_the_whole_range(dtype):
    limits, image = np.finfo(dtype), np.random.default_rng(0).integers(0, 256, (8, 9, 3))
    for seed in range(20):
        rng = np.random.default_rng(seed)
        exponent = rng.uniform(np.log10(limits.smallest_subnormal), np.log10(limits.max), (8, 9, 4))
        scores = (rng.choice([-1, 1], exponent.shape) * 10.0 ** exponent).astype(dtype)
        special = rng.random(scores.shape) < 0.3
        scores[special] = rng.choice([0, limits.max, -limits.max, limits.tiny], special.sum())
        scores[~np.isfinite(scores)] = limits.max
        crf = DenseCRF(4, sigma_bilateral=(5, 5, 60, 60, 60))
        q = crf.forward(scores, image)
        assert np.isfinite(q).all() and (q >= 0).all()
        np.testing.assert_allclose(q.sum(axis=2), 1, atol=1e-5)
        df = crf.backward_logits(q - softmax(-q))
        assert np.isfinite(df).all() and all(np.isfinite(g).all() for g in crf.grads.values())
