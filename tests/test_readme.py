"""Both READMEs: their excerpts are the code, their names exist, their examples give what they say.

README.md says what the project is; minicrf/README.md is the lesson.
"""
import ast
import doctest
import functools
import itertools
import pathlib
import re

import draw_lesson
import numpy as np
import pytest
import run_voc

from minicrf import DenseCRF, gradcheck
from minicrf.programs import exercises, refine
from minicrf.losses import softmax

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {name: (ROOT / name).read_text(encoding="utf-8")
         for name in ("README.md", "minicrf/README.md", "tests/evidence/RESULTS.md")}
LESSON = PAGES["minicrf/README.md"]
FILES = [path.relative_to(ROOT) for folder in (".", "minicrf", "minicrf/data", "minicrf/results",
                                               "tests") for path in (ROOT / folder).glob("*.py")]

# A marker line such as *`minicrf/layers.py`, `Conv2d.backward`*, then the block of code.
EXCERPTS = [each for page in PAGES.values() for each in
            re.findall(r"^\*`([^`]+)`, `([^`]+)`\*\n+```python\n(.*?)^```", page, re.M | re.S)]
EXAMPLES = [each for page in PAGES.values() for each in
            re.findall(r"^```python\n(>>> .*?)^```", page, re.M | re.S)]
# but for the section on another library's names, which tests/test_recipes.py runs
PROSE = re.sub(r"^```.*?^```\n|^## 16\. .*?(?=^## )", "", LESSON, flags=re.M | re.S)
CODE = re.findall(r"`([^`\n]+)`", PROSE)                 # inline code, in the order of the text
INDEX = LESSON.partition("## Index")[2].partition("\n## ")[0]


def test_equations_3_and_4_by_enumeration():
    """P(y) over all 2^6 labellings; free_energy is KL(q || P) - log Z, lowest where Eq. 5 rests."""
    rng = np.random.default_rng(0)
    f, image = rng.standard_normal((2, 3, 2)), rng.uniform(0, 255, (2, 3, 3))
    crf = DenseCRF(2, w=(0.3, 0.5), sigma_position=(1.5, 2.), normalization="none", exact=True,
                   sigma_bilateral=(2., 3., 90., 120., 100.), iterations=200)
    labellings = np.array(list(itertools.product(range(2), repeat=6)))   # (64, 6)
    F = f.reshape(6, 2)[range(6), labellings].sum(axis=1)                # (64,)
    points = np.array([[x, y, *image[y, x]] for y in range(2) for x in range(3)])
    for w_m, name in zip((0.3, 0.5), ("log_sigma_position", "log_sigma_bilateral")):
        p = points[:, :len(crf.params[name])] / np.exp(crf.params[name])
        for i, j in itertools.combinations(range(6), 2):
            k = np.exp(-((p[i] - p[j]) ** 2).sum() / 2)
            F += w_m * k * (labellings[:, i] == labellings[:, j])
    log_Z = np.log(np.exp(F).sum())

    def kl(q):
        Q = q.reshape(6, 2)[range(6), labellings].prod(axis=1)           # (64,)
        return (Q * (np.log(Q) - (F - log_Z))).sum()

    q = crf.forward(f, image)
    for other in (q, softmax(rng.standard_normal(f.shape)), softmax(f)):
        np.testing.assert_allclose(crf.free_energy(other, f, image) + log_Z, kl(other), atol=1e-9)
    for _ in range(20):
        assert kl(softmax(crf.logits + 0.01 * rng.standard_normal(f.shape))) > kl(q)


# --- excerpts, examples, links -------------------------------------------------------------------

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
    assert name in definitions(path), f"{path}: found no {name}, which a README quotes"
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    node = definitions(path)[name]
    source = squeezed("\n".join(lines[node.lineno - 1:node.end_lineno]))
    assert contains(source, squeezed(excerpt)), (
        f"a README quotes {path}, {name}, otherwise than it stands there:\n{excerpt}")


def test_a_changed_excerpt_is_noticed():
    source = squeezed("def f(x):\n    y = 2 * x\n    z = y + 1\n    return z\n")
    assert contains(source, ["y = 2 * x", "z = y + 1"])
    assert contains(source, ["y = 2 * x", "...", "return z"])
    for wrong in (["y = 2 * x", "return z"], ["y = 3 * x"], ["..."],
                  ["return z", "...", "y = 2 * x"]):
        assert not contains(source, wrong)


def test_every_block_of_code_in_the_lesson_is_an_excerpt_or_an_example():
    assert len(EXCERPTS) >= 10 and len(EXAMPLES) >= 4
    known = {excerpt for *_, excerpt in EXCERPTS} | {*EXAMPLES}
    blocks = re.findall(r"^```python\n(.*?)^```", LESSON, re.M | re.S)
    assert [block for block in blocks if block not in known] == []


@pytest.mark.parametrize("example", EXAMPLES, ids=[f"example{i}" for i in range(len(EXAMPLES))])
def test_an_example_prints_what_it_says(example):
    test = doctest.DocTestParser().get_doctest(example, {}, "README", "README", 0)
    printed = []
    failed, attempted = doctest.DocTestRunner(verbose=False).run(test, out=printed.append)
    assert attempted and not failed, "".join(printed)


def anchor(heading):
    """The name that GitHub gives to a heading: letters, digits, -, with - for spaces."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    headings = {anchor(heading) for heading in re.findall(r"^#+ (.+)$", PAGES[page], re.M)}
    prose = re.sub(r"^```.*?^```\n", "", PAGES[page], flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)]+)\)", prose):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif "://" not in target:
            assert (ROOT / page).parent.joinpath(target.split("#")[0]).exists(), target


def test_the_pictures_of_the_lesson_are_drawn_and_small(tmp_path):
    draw_lesson.main(tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {*re.findall(r"\.github/(\w+\.png)", LESSON)}
    for name in drawn:
        assert 1000 < (tmp_path / name).stat().st_size < 150_000
        assert (ROOT / ".github" / name).stat().st_size < 150_000


def test_the_readme_is_short_and_has_the_commands_of_the_tests():
    assert len(PAGES["README.md"].splitlines()) < 200
    assert "    pip install -e . && python run_voc.py\n" in PAGES["README.md"]
    assert "    pip install -e '.[test]' && pytest\n" in PAGES["README.md"]


# --- names ---------------------------------------------------------------------------------------

@functools.cache
def known_names():
    """Identifiers and strings; dotted names of classes, methods, attributes; default values."""
    names, dotted, defaults = set(), set(), {}
    for path in FILES:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        names.add(path.stem)
        for node in ast.walk(tree):
            if isinstance(node, (ast.Name, ast.Attribute, ast.arg)):
                names |= {getattr(node, kind, None) for kind in ("id", "attr", "arg")}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names |= {node.value} if path.name != "test_readme.py" else set()
            if isinstance(node, ast.FunctionDef):
                pairs = [*zip(reversed(node.args.args), reversed(node.args.defaults)),
                         *zip(node.args.kwonlyargs, node.args.kw_defaults)]
                for argument, value in pairs:
                    if value is not None:
                        defaults.setdefault(argument.arg, set()).add(ast.unparse(value))
        dotted |= {f"{path.stem}.{target.id}" for node in tree.body
                   for target in getattr(node, "targets", []) if isinstance(target, ast.Name)}
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
    if match := re.fullmatch(r"((?:\w+/)*\w+\.py)(?:::(\w+))?", token):
        path, test = pathlib.Path(match[1]), match[2]
        path = pathlib.Path("tests") / path if pathlib.Path("tests") / path in FILES else path
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


@pytest.mark.parametrize("token", sorted({*CODE}))
def test_names_in_the_lesson_exist(token):
    assert unknown(token) is None, f"minicrf/README.md: `{token}`: {unknown(token)}"


def test_names_that_do_not_exist_are_noticed():
    for wrong in ("minicrf/layer.py", "test_layers.py::test_nothing", "layers.Conv3d",
                  "DenseCRF.forwards", "spread_backwards", "iterations=6", "no_such_parameter=1"):
        assert unknown(wrong), wrong
    for right in ("minicrf/layers.py", "test_readme.py::anchor", "layers.Conv2d.backward",
                  "Conv2d.backward", "FeatureCRF.logits", "softmax_loss", "exclude_self=False",
                  "iterations=5", "inputs.VOID", "z = f + 1"):
        assert unknown(right) is None, right


def test_the_index_leads_from_every_equation_and_figure_to_code_and_a_test():
    rows = [line for line in INDEX.splitlines() if line.startswith("| ")][1:]
    assert [row for row in rows if not re.search(r"`test_\w+\.py(::test_\w+)?`", row)] == []
    wanted = ["Table 1 ", "Fig. 4 ", "Figs. 5, 6 ", "Sec. 4.1 "]
    wanted += [f"Eq. {n} " for n in range(1, 10)]
    wanted += [f"Fig. {n}, step {step} " for n, steps in ((1, 4), (2, 4), (3, 5))
               for step in range(1, steps + 1)]
    wanted += [f"Sec. 3.1, {what} " for what in ("$\\mu^{(m)}$", "CCCP", "Newton")]
    for start in wanted:
        assert any(row.startswith(f"| {start}") for row in rows), start


def test_the_index_names_functions_of_the_files_that_it_links_to():
    """The one hop: each name of the column `fast` is defined in the file linked before it."""
    plain = {*definitions("minicrf/plain.py"), "NET"}
    found = 0
    for line in INDEX.splitlines():
        cells = re.split(r" ?\| ", line)
        if not re.match(r"\| (Eq|Fig|Sec|Table|below)", line):
            continue
        assert {*re.findall(r"`(\w+)`", cells[3])} - {"W", "c", "backward"} <= plain, line
        parts = re.split(r"\]\(([^)]+)\)", cells[4])       # text, link, text, link, text
        assert "`" not in parts[0], line
        for link, names in zip(parts[1::2], parts[2::2]):
            path = (ROOT / "minicrf" / link).resolve().relative_to(ROOT)
            for name in set(re.findall(r"`([\w.]+)`", names)) - {"damping"}:
                assert name in definitions(path), (line, name)
                found += 1
            for comment in re.findall(r'"(Step \d)"', names):
                assert f"# {comment}:" in (ROOT / path).read_text("utf-8"), line
    assert found > 40


def help_of(main, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    return capsys.readouterr().out


def test_options_and_bugs_in_the_pages_exist(capsys):
    known = set()
    for main in (run_voc.parse_arguments, refine.parse_arguments, gradcheck.main):
        known |= set(re.findall(r"--[a-z][a-z-]*", help_of(main, capsys)))
    for script in ("tests/evidence/benchmark.py", "tests/evidence/experiment.py"):
        known |= set(re.findall(r'"(--[a-z-]+)"', (ROOT / script).read_text("utf-8")))
    lines = [line for page in PAGES.values() for line in page.splitlines()
             if "pip install" not in line]
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", "\n".join(lines))) <= known
    named = set(re.findall(r"--break ([a-z][\w-]*)", LESSON))
    assert named <= exercises.BUGS.keys() and len(named) >= 5
