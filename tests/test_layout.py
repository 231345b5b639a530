"""The house: its rooms, and who may import whom."""
import ast
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "minicrf"
FILES = [path.relative_to(PACKAGE) for path in sorted(PACKAGE.rglob("*.py"))]
TREES = {path: ast.parse((PACKAGE / path).read_text(encoding="utf-8")) for path in FILES}
# which rooms a room may import from; "" is the core: what one reads to learn
BELOW = {"": {""}, "data": {"", "data"}, "results": {"", "data", "results"},
         "programs": {"", "data", "results", "programs"}}
FRONT = {"__main__", "gradcheck"}                    # programs, in front of all rooms


def imports(path):
    """(room, module, imported where the file is loaded) of each import within the package."""
    def walk(node, outside):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ImportFrom) and child.level:
                parts = [*path.parent.parts][:len(path.parent.parts) + 1 - child.level]
                parts += (child.module or "").split(".") if child.module else []
                modules = [parts] if (PACKAGE.joinpath(*parts).with_suffix(".py")).exists() else [
                    [*parts, alias.name] for alias in child.names]
                for module in modules:
                    if (PACKAGE.joinpath(*module).with_suffix(".py")).exists():
                        yield "/".join(module[:-1]), module[-1], outside
            yield from walk(child, outside and not isinstance(child, ast.FunctionDef))

    return list(walk(TREES[path], True))


def test_every_file_lies_in_a_room():
    assert {str(path.parent).replace(".", "") for path in FILES} == set(BELOW)
    config = (ROOT / "setup.cfg").read_text()
    assert all(f"    minicrf.{room}\n" in config for room in BELOW if room)


def test_a_room_imports_from_those_below_it_alone():
    for path in FILES:
        if path.stem not in FRONT:
            room = str(path.parent).replace(".", "")
            assert {other for other, _, _ in imports(path)} <= BELOW[room], path


def test_no_file_imports_itself_by_way_of_others():
    """Imports run downward: files can be put into an order in which each rests on earlier ones."""
    graph = {(str(path.parent).replace(".", ""), path.stem):
             {(room, module) for room, module, outside in imports(path) if outside}
             for path in FILES}
    while graph:
        free = [name for name, below in graph.items() if not below & graph.keys()]
        assert free, f"a circle among {sorted(graph)}"
        for name in free:
            del graph[name]


def imported(tree):
    """The names of the modules that a file imports from outside the package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


def test_only_arrays_imports_cupy_and_nothing_unpickles_or_evaluates():
    for path, tree in TREES.items():
        assert path.stem == "arrays" or not {"cupy", "cupyx"} & {*imported(tree)}, path
        assert not {"pickle", "marshal", "shelve"} & {*imported(tree)}, path
        called = {node.func.id for node in ast.walk(tree)
                  if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
        # exercises.py runs the package's own source with a bug in it
        assert "eval" not in called and (path.stem == "exercises" or "exec" not in called), path


def test_no_line_is_longer_than_100_columns():
    for path in [*PACKAGE.rglob("*.py"), ROOT / "run_voc.py"]:
        assert max(map(len, path.read_text(encoding="utf-8").splitlines()), default=0) <= 100, path


def test_the_crf_alone_imports_neither_pillow_nor_tqdm():
    code = "import sys, minicrf; assert not {'PIL', 'tqdm'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
