"""The pages: excerpts are the code, examples print what they say, links and names lead somewhere.

README.md says what the project is, minicrf/README.md is the lesson, RESULTS.md what was measured.
"""
import ast
import doctest
import functools
import pathlib
import re

import draw_lesson
import numpy as np
import pytest
import run_voc
from reference import as_matrices, dense, kl

from minicrf import DenseCRF, gradcheck
from minicrf.losses import softmax
from minicrf.programs import exercises, refine

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {name: (ROOT / name).read_text(encoding="utf-8")
         for name in ("README.md", "minicrf/README.md", "tests/evidence/RESULTS.md")}
LESSON = PAGES["minicrf/README.md"]
ALL = "\n".join(PAGES.values())
FILES = [path.relative_to(ROOT) for folder in (".", "minicrf", "minicrf/data", "minicrf/results",
                                               "tests") for path in (ROOT / folder).glob("*.py")]
CODE_OF_FILES = "\n".join((ROOT / path).read_text(encoding="utf-8") for path in FILES
                          if path.name != "test_readme.py") + "\n".join(map(str, FILES))

# A marker line such as *`minicrf/layers.py`, `Conv2d.backward`*, then the block of code.
EXCERPTS = re.findall(r"^\*`([^`]+)`, `([^`]+)`\*\n+```python\n(.*?)^```", ALL, re.M | re.S)
EXAMPLES = re.findall(r"^```python\n(>>> .*?)^```", ALL, re.M | re.S)
# but for the section on another library's names, which tests/test_recipes.py runs
PROSE = re.sub(r"^```.*?^```\n|^## 16\. .*?(?=^## )", "", LESSON, flags=re.M | re.S)
CODE = sorted({*re.findall(r"`([^`\n]+)`", PROSE)})
INDEX = [line for line in LESSON.partition("## Index")[2].partition("\n## ")[0].splitlines()
         if re.match(r"\| (Eq|Fig|Sec|Table|below)", line)]


def test_equations_3_and_4_by_enumeration():
    """Over all 2^6 labellings; free_energy is KL(q || P) - log Z, lowest where Eq. 5 rests."""
    rng = np.random.default_rng(0)
    f, image = rng.standard_normal((2, 3, 2)), rng.uniform(0, 255, (2, 3, 3))
    crf = DenseCRF(2, w=(0.3, 0.5), sigma_position=(1.5, 2.), normalization="none", exact=True,
                   sigma_bilateral=(2., 3., 90., 120., 100.), iterations=200)
    points = np.array([[x, y, *image[y, x]] for y in range(2) for x in range(3)])
    sigmas = [np.exp(p) for name, p in crf.params.items() if name != "w"]
    K = [dense(points[:, :len(sigma)], sigma, "none", exclude_self=True) for sigma in sigmas]

    def divergence(q):
        return kl(q.reshape(6, 2), f.reshape(6, 2), K, as_matrices(crf.params["w"], 2))

    q = crf.forward(f, image)
    for other in (q, softmax(rng.standard_normal(f.shape)), softmax(f)):
        np.testing.assert_allclose(crf.free_energy(other, f, image), divergence(other), atol=1e-9)
    for _ in range(20):
        moved = softmax(crf.logits + 0.01 * rng.standard_normal(f.shape))
        assert divergence(moved) > divergence(q)


# --- excerpts, examples, links, pictures ---------------------------------------------------------

@functools.cache
def definitions(path):
    """{qualified name: source} of the functions and classes of a file, nested ones included."""
    source, found = (ROOT / path).read_text(encoding="utf-8"), {}
    lines = source.splitlines()

    def walk(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                found[prefix + child.name] = "\n".join(
                    lines[child.lineno - 1:child.end_lineno])
                walk(child, f"{prefix}{child.name}.")
            else:
                walk(child, prefix)

    walk(ast.parse(source), "")
    return found


def contains(source, excerpt):
    """Whether the lines of excerpt stand in source one after the other; ... for any lines."""
    def squeezed(text):                  # no indentation, no runs of spaces, no empty lines
        return "\n".join(" ".join(line.split()) for line in text.splitlines() if line.strip())

    wanted = re.escape("\n" + squeezed(excerpt) + "\n").replace(re.escape("\n...\n"), "\n(.*\n)*?")
    return re.search(wanted, "\n" + squeezed(source) + "\n") is not None


def test_an_excerpt_is_the_code_as_it_stands():
    for path, name, excerpt in EXCERPTS:
        assert contains(definitions(path)[name], excerpt), f"not so in {path}, {name}:\n{excerpt}"


def test_a_changed_excerpt_is_noticed():
    source = "def f(x):\n    y = 2 * x\n    z = y + 1\n    return z\n"
    assert contains(source, "y = 2  * x\n\nz = y + 1")
    assert contains(source, "y = 2 * x\n...\nreturn z")
    for wrong in "y = 2 * x\nreturn z", "y = 3 * x", "y = 2", "return z\n...\ny = 2 * x":
        assert not contains(source, wrong)


def test_every_block_of_code_in_the_lesson_is_an_excerpt_or_an_example():
    known = {excerpt for *_, excerpt in EXCERPTS} | {*EXAMPLES}
    blocks = re.findall(r"^```python\n(.*?)^```", LESSON, re.M | re.S)
    assert len(blocks) > 30 and [block for block in blocks if block not in known] == []


def test_an_example_prints_what_it_says():
    for number, example in enumerate(EXAMPLES):
        test = doctest.DocTestParser().get_doctest(example, {}, f"example {number}", "README", 0)
        printed = []
        failed, attempted = doctest.DocTestRunner(verbose=False).run(test, out=printed.append)
        assert attempted and not failed, "".join(printed)


def anchors(page):
    """The names that GitHub gives to a page's headings: letters, digits, -, with - for spaces."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
            for heading in re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.M)}


def test_links_lead_to_files_and_headings():
    for page, text in PAGES.items():
        prose = re.sub(r"^```.*?^```\n", "", text, flags=re.M | re.S)
        for target in re.findall(r"\]\(([^)]+)\)", prose):
            if "://" not in target:
                file, _, heading = target.partition("#")
                path = (ROOT / page).parent / file if file else ROOT / page
                assert path.exists(), target
                assert not heading or heading in anchors(path), target


def test_the_pictures_of_the_lesson_are_drawn_and_small(tmp_path):
    draw_lesson.main(tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {*re.findall(r"\.github/(\w+\.png)", LESSON)}
    for path in [tmp_path / name for name in drawn] + [ROOT / ".github" / name for name in drawn]:
        assert 1000 < path.stat().st_size < 150_000


def test_the_readme_has_the_commands_of_the_tests():
    assert "    pip install -e . && python run_voc.py\n" in PAGES["README.md"]
    assert "    pip install -e '.[test]' && pytest\n" in PAGES["README.md"]


# --- names ---------------------------------------------------------------------------------------

@functools.cache
def dotted_names():
    """function, Class.method, Class.attribute; each, and constants, also behind file."""
    dotted = set()
    for path in FILES:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        for name in definitions(path):
            dotted |= {name, f"{path.stem}.{name}"}
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                dotted |= {f"{node.name}.{a.attr}" for a in ast.walk(node)
                           if isinstance(a, ast.Attribute) and ast.unparse(a.value) == "self"}
        dotted |= {f"{path.stem}.{target.id}" for node in tree.body
                   for target in getattr(node, "targets", []) if isinstance(target, ast.Name)}
    return dotted


def unknown(token):
    """Whether a piece of inline code names what is not there.  Formulas and shell lines pass."""
    if match := re.fullmatch(r"((?:\w+/)*\w+\.py)(?:::(\w+))?", token):
        path = next((path for path in FILES if str(path) in (match[1], f"tests/{match[1]}")), None)
        return path is None or bool(match[2]) and match[2] not in definitions(path)
    if re.fullmatch(r"\w+(\.\w+)+", token):
        return token not in dotted_names()
    if re.fullmatch(r"[A-Za-z_]\w*", token):
        return not re.search(rf"\b{token}\b", CODE_OF_FILES)
    if match := re.fullmatch(r"(\w+=)([\d.e-]+)?.*", token):            # a number is the default
        return not re.search(rf"\b{match[1]}{match[2] or ''}\b", CODE_OF_FILES)
    return False


def test_names_in_the_lesson_exist():
    assert [token for token in CODE if unknown(token)] == []


def test_names_that_do_not_exist_are_noticed():
    for wrong in ("minicrf/layer.py", "test_layers.py::test_nothing", "layers.Conv3d",
                  "DenseCRF.forwards", "spread_backwards", "damping=17", "no_such_parameter=1"):
        assert unknown(wrong), wrong
    for right in ("minicrf/layers.py", "test_readme.py::anchors", "layers.Conv2d.backward",
                  "Conv2d.backward", "FeatureCRF.logits", "softmax_loss", "exclude_self=False",
                  "iterations=5", "inputs.VOID", "z = f + 1"):
        assert not unknown(right), right


def test_the_index_leads_from_every_equation_and_figure_to_code_and_a_test():
    """The one hop: each name of the column `fast` is defined in the file linked before it."""
    wanted = ["Table 1 ", "Fig. 4 ", "Figs. 5, 6 ", "Sec. 4.1 "]
    wanted += [f"Eq. {n} " for n in range(1, 10)]
    wanted += [f"Fig. {n}, step {step} " for n, steps in ((1, 4), (2, 4), (3, 5))
               for step in range(1, steps + 1)]
    wanted += [f"Sec. 3.1, {what} " for what in ("$\\mu^{(m)}$", "CCCP", "Newton")]
    for start in wanted:
        assert any(row.startswith(f"| {start}") for row in INDEX), start
    for row in INDEX:
        _, _, _, plain, fast, test, _ = re.split(r" ?\| ?", row)
        assert {*re.findall(r"`(\w+)`", plain)} - {"W", "c", "backward", "NET"} <= {
            *definitions("minicrf/plain.py")}, row
        text, *linked = re.split(r"\]\(([^)]+)\)", fast)                 # link, text, link, text
        assert "`" not in text and re.fullmatch(r"`test_\w+\.py::test_\w+`", test), row
        for link, names in zip(linked[::2], linked[1::2]):
            path = (ROOT / "minicrf" / link).resolve().relative_to(ROOT)
            assert {*re.findall(r"`([\w.]+)`", names)} - {"damping"} <= {*definitions(path)}, row
            for comment in re.findall(r'"(Step \d)"', names):
                assert f"# {comment}:" in (ROOT / path).read_text("utf-8"), row


def test_options_and_bugs_in_the_pages_exist(capsys):
    for main in (run_voc.parse_arguments, refine.parse_arguments, gradcheck.main):
        with pytest.raises(SystemExit):
            main(["--help"])
    known = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    for script in ("tests/evidence/benchmark.py", "tests/evidence/experiment.py"):
        known |= set(re.findall(r'"(--[a-z-]+)"', (ROOT / script).read_text("utf-8")))
    lines = [line for line in ALL.splitlines() if "pip install" not in line]
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", "\n".join(lines))) <= known
    named = set(re.findall(r"--break ([a-z][\w-]*)", LESSON))
    assert named <= exercises.BUGS.keys() and len(named) >= 5
