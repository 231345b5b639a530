"""The README's lesson: its excerpts are the code, its names exist, its examples give what they say.

Also the plain versions beside it: Eqs. 3 and 4 by enumeration, back-tracking in matrices.
"""
import ast
import doctest
import functools
import itertools
import pathlib
import re

import numpy as np
import pytest

import run_voc
from minicrf import DenseCRF, __main__, gradcheck, plain
from minicrf.gradcheck import relative_error
from minicrf.losses import softmax, softmax_loss

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LESSON = "## The lesson" + README.partition("\n## The lesson")[2]
FILES = [path.relative_to(ROOT) for folder in ("minicrf", "tests", ".")
         for path in sorted((ROOT / folder).glob("*.py"))]

# A marker line such as *`minicrf/layers.py`, `Conv2d.backward`*, then the block of code.
EXCERPTS = re.findall(r"^\*`([^`]+)`, `([^`]+)`\*\n+```python\n(.*?)^```", README, re.M | re.S)
EXAMPLES = re.findall(r"^```python\n(>>> .*?)^```", README, re.M | re.S)
PROSE = re.sub(r"^```.*?^```\n", "", LESSON, flags=re.M | re.S)
CODE = re.findall(r"`([^`\n]+)`", PROSE)                 # inline code, in the order of the text


# --- the plain versions --------------------------------------------------------------------------

def small(h, w, n_labels, **options):
    """Scores, an image, labels, an exact CRF with unnormalised kernels, its matrices K and dK."""
    rng = np.random.default_rng(0)
    f, y = rng.standard_normal((h, w, n_labels)), rng.integers(0, n_labels, h * w)
    image = rng.uniform(0, 255, (h, w, 3))
    crf = DenseCRF(n_labels, w=(0.3, 0.5), sigma_position=(1.5, 2.), normalization="none",
                   sigma_bilateral=(2., 3., 90., 120., 100.), exact=True, **options)
    points = np.array([[x, y_, *image[y_, x]] for y_ in range(h) for x in range(w)])
    kernels, dkernels = [], []
    for name, d in (("log_sigma_position", 2), ("log_sigma_bilateral", 5)):
        F = points[:, :d] / np.exp(crf.params[name])                     # (N, d)
        squares = (F[:, None] - F) ** 2                                  # (N, N, d)
        K = np.exp(-squares.sum(axis=2) / 2) - np.eye(h * w)
        kernels.append(K)
        dkernels.append([K * squares[:, :, k] for k in range(d)])
    return f, image, y, crf, kernels, dkernels


def test_back_tracking_in_matrices_gives_the_gradients_of_the_crf():
    f, image, y, crf, kernels, dkernels = small(4, 5, 3)
    crf.forward(f, image)
    found = crf.backward_logits(softmax_loss(crf.logits.reshape(-1, 3), y)[1] * len(y))
    W = crf.params["w"][:, None, None] * np.eye(3)
    u, backward = plain.mean_field(f.reshape(-1, 3), np.stack(kernels), W)
    df, dK, dW = backward(np.exp(u) - np.eye(3)[y])
    dw = np.trace(dW, axis1=1, axis2=2)
    dsigma = [[(dK_m * dK_k).sum() for dK_k in each] for dK_m, each in zip(dK, dkernels)]
    assert relative_error(found.reshape(-1, 3), df) < 1e-9
    assert relative_error(crf.grads["w"], dw) < 1e-9
    assert relative_error(crf.grads["log_sigma_position"], dsigma[0]) < 1e-9
    assert relative_error(crf.grads["log_sigma_bilateral"], dsigma[1]) < 1e-9


def test_equations_3_and_4_by_enumeration():
    """P(y) over all 2^6 labellings; free_energy is KL(q || P) - log Z, lowest where Eq. 5 rests."""
    f, image, _, crf, kernels, _ = small(2, 3, 2, iterations=200)
    labellings = np.array(list(itertools.product(range(2), repeat=6)))   # (64, 6)
    F = f.reshape(6, 2)[range(6), labellings].sum(axis=1)                # (64,)
    for i, j in itertools.combinations(range(6), 2):
        k = sum(w * K[i, j] for w, K in zip(crf.params["w"], kernels))
        F += k * (labellings[:, i] == labellings[:, j])
    log_Z = np.log(np.exp(F).sum())

    def kl(q):
        Q = q.reshape(6, 2)[range(6), labellings].prod(axis=1)           # (64,)
        return (Q * (np.log(Q) - (F - log_Z))).sum()

    rng = np.random.default_rng(1)
    q = crf.forward(f, image)
    for other in (q, softmax(rng.standard_normal(f.shape)), softmax(f)):
        np.testing.assert_allclose(crf.free_energy(other, f, image) + log_Z, kl(other), atol=1e-9)
    for _ in range(20):
        assert kl(softmax(crf.logits + 0.01 * rng.standard_normal(f.shape))) > kl(q)


# --- excerpts, examples --------------------------------------------------------------------------

def squeezed(text):
    """Lines without indentation and runs of spaces, empty ones left out."""
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


@functools.cache
def definitions(path):
    """{qualified name: node} of the functions and classes of a file, nested ones included."""
    found = {}

    def walk(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                found[prefix + child.name] = child
                walk(child, f"{prefix}{child.name}.")
            else:
                walk(child, prefix)

    walk(ast.parse((ROOT / path).read_text(encoding="utf-8")), "")
    return found


def contains(source, excerpt):
    """Whether the lines of excerpt stand in source one after the other; ... for any lines."""
    parts = [list(part) for dots, part in itertools.groupby(excerpt, lambda line: line == "...")
             if not dots]
    start = 0
    for part in parts:
        places = [i for i in range(start, len(source)) if source[i:i + len(part)] == part]
        if not places:
            return False
        start = places[0] + len(part)
    return bool(parts)


@pytest.mark.parametrize("path, name, excerpt", EXCERPTS, ids=[f"{p}-{n}" for p, n, _ in EXCERPTS])
def test_an_excerpt_is_the_code_as_it_stands(path, name, excerpt):
    assert name in definitions(path), f"{path}: found no {name}, which README.md quotes"
    text = (ROOT / path).read_text(encoding="utf-8")
    source = ast.get_source_segment(text, definitions(path)[name])
    assert contains(squeezed(source), squeezed(excerpt)), (
        f"README.md quotes {path}, {name}, otherwise than it stands there:\n{excerpt}")


def test_every_block_of_code_in_the_lesson_is_an_excerpt_or_an_example():
    assert len(EXCERPTS) >= 10 and len(EXAMPLES) >= 4
    blocks = re.findall(r"^```python\n(.*?)^```", LESSON, re.M | re.S)
    known = {excerpt for *_, excerpt in EXCERPTS} | set(EXAMPLES)
    assert [block for block in blocks if block not in known] == []


@pytest.mark.parametrize("example", EXAMPLES, ids=[f"example{i}" for i in range(len(EXAMPLES))])
def test_an_example_prints_what_it_says(example):
    test = doctest.DocTestParser().get_doctest(example, {}, "README.md", "README.md", 0)
    printed = []
    failed, attempted = doctest.DocTestRunner(verbose=False).run(test, out=printed.append)
    assert attempted and not failed, "".join(printed)


def test_a_changed_excerpt_is_noticed():
    source = squeezed("def f(x):\n    y = 2 * x\n    z = y + 1\n    return z\n")
    assert contains(source, ["y = 2 * x", "z = y + 1"])
    assert contains(source, ["y = 2 * x", "...", "return z"])
    assert not contains(source, ["y = 2 * x", "return z"])
    assert not contains(source, ["y = 3 * x"])
    assert not contains(source, ["return z", "...", "y = 2 * x"])
    assert not contains(source, ["..."])


# --- names ---------------------------------------------------------------------------------------

@functools.cache
def known_names():
    """Every identifier; every dotted name of classes, methods, attributes; parameters' defaults."""
    names, dotted, defaults = set(), set(), {}
    for path in FILES:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        names.add(path.stem)
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                names.add(node.id)
            elif isinstance(node, ast.Attribute):
                names.add(node.attr)
            elif isinstance(node, ast.arg):
                names.add(node.arg)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names |= {node.value} if path.name != "test_readme.py" else set()
            if isinstance(node, ast.FunctionDef):
                arguments = node.args
                pairs = [*zip(reversed(arguments.args), reversed(arguments.defaults)),
                         *zip(arguments.kwonlyargs, arguments.kw_defaults)]
                for argument, value in pairs:
                    if value is not None:
                        defaults.setdefault(argument.arg, set()).add(ast.unparse(value))
        for node in tree.body:
            for target in getattr(node, "targets", []):
                if isinstance(target, ast.Name):
                    dotted.add(f"{path.stem}.{target.id}")
        for name, node in definitions(path).items():
            parts = [path.stem, *name.split(".")]
            names.add(node.name)
            dotted |= {".".join(parts[i:]) for i in range(len(parts) - 1)}
            if isinstance(node, ast.ClassDef):
                dotted |= {f"{node.name}.{a.attr}" for a in ast.walk(node)
                           if isinstance(a, ast.Attribute) and ast.unparse(a.value) == "self"}
    return names, dotted, defaults


def unknown(token):
    """What is wrong with a piece of inline code, or None.  Formulas and shell lines pass."""
    names, dotted, defaults = known_names()
    if match := re.fullmatch(r"((?:minicrf/|tests/)?\w+\.py)(?:::(\w+))?", token):
        path, test = pathlib.Path(match[1]), match[2]
        if path not in FILES and pathlib.Path("tests") / path in FILES:
            path = pathlib.Path("tests") / path
        if path not in FILES:
            return "no such file"
        return None if not test or test in definitions(path) else f"no such test in {path}"
    if re.fullmatch(r"\w+(\.\w+)+", token):
        return None if token in dotted else "no such class, function or attribute"
    if re.fullmatch(r"[A-Za-z_]\w*", token):
        return None if token in names else "no such name"
    if match := re.fullmatch(r"(\w+)=(.+)", token):
        if match[1] not in defaults:
            return "no such parameter with a default"
        values = {ast.literal_eval(v) for v in defaults[match[1]] if re.match(r"[\d(.\-'\"TFN]", v)}
        value = ast.literal_eval(match[2])
        # a number is meant to be the default; another setting may be anything of its type
        if isinstance(value, (int, float, tuple)) and not isinstance(value, bool):
            return None if value in values else f"its default is {values}"
    return None


@pytest.mark.parametrize("token", sorted(set(CODE)))
def test_names_in_the_lesson_exist(token):
    assert unknown(token) is None, f"README.md: `{token}`: {unknown(token)}"


def test_names_that_do_not_exist_are_noticed():
    for wrong in ("minicrf/layer.py", "test_layers.py::test_nothing", "layers.Conv3d",
                  "DenseCRF.forwards", "spread_backwards", "iterations=6", "no_such_parameter=1"):
        assert unknown(wrong), wrong
    for right in ("minicrf/layers.py", "test_readme.py::small", "layers.Conv2d.backward",
                  "Conv2d.backward", "DenseCRF.logits", "softmax_loss", "exclude_self=False",
                  "iterations=5", "losses.VOID", "z = f + 1"):
        assert unknown(right) is None, right


def test_every_row_of_math_to_code_names_a_test():
    table = LESSON.partition("### From the mathematics to the code")[2].partition("\n### ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 20
    assert [row for row in rows if not re.search(r"`test_\w+\.py::test_\w+`", row)] == []
    for equation in range(3, 10):
        assert re.search(rf"Eqs?\. (\d, )*{equation}\b", table), equation
    for step in ("Fig. 1, forward", "Fig. 1, loss", "Fig. 1, backward", "Fig. 1, update",
                 "Fig. 3, step 1", "Fig. 3, step 2", "Fig. 3, steps 3-4", "Fig. 3, update"):
        assert step in table, step


def help_of(main, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    return capsys.readouterr().out


def test_options_and_bugs_in_the_readme_exist(capsys):
    known = set()
    for main in (run_voc.parse_arguments, __main__.parse_arguments, gradcheck.main):
        known |= set(re.findall(r"--[a-z][a-z-]*", help_of(main, capsys)))
    known |= set(re.findall(r'"(--[a-z-]+)"', (ROOT / "tests/benchmark.py").read_text("utf-8")))
    lines = [line for line in README.splitlines() if "pip install" not in line]
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", "\n".join(lines))) <= known
    bugs = {name for bugs in gradcheck.BUGS.values() for name in bugs}
    named = set(re.findall(r"--break ([a-z][\w-]*)", README))
    assert named <= bugs and len(named) >= 5
