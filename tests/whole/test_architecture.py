"""The folders of the package are its map: who may import whom, and how large.

`CONTRIBUTING.md` describes the map.
"""

import ast
import collections
import pathlib
import re

import pytest

import keras_srlora

pytestmark = pytest.mark.once

ROOT = pathlib.Path(keras_srlora.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))
# Each imports from those below it.
ORDER = (
    "__init__",
    "plots",
    "adapters",
    "training",
    "conversion",
    "layers",
    "recipes",
    "files",
    "functional",
    "backend",
)
# A number, that all may import.
FOR_ALL = "version"


def part_of(path):
    """The folder, or the module at the top, that a file belongs to."""
    first, *_ = path.relative_to(ROOT).parts
    return first.removesuffix(".py")


def imported(path):
    """`(line, names after keras_srlora)` of the package's own modules."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno} is relative"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            package, *parts = name.split(".")
            if package == "keras_srlora":
                yield node.lineno, parts


def test_every_part_has_its_place():
    found = {part_of(path) for path in MODULES} - {FOR_ALL}
    assert found <= set(ORDER), "add it to the map, here and in CONTRIBUTING"
    assert found >= set(ORDER) - {"plots"}


@pytest.mark.parametrize(
    "path", MODULES, ids=lambda path: str(path.relative_to(ROOT))
)
def test_a_part_imports_from_those_below_it(path):
    part = part_of(path)
    for line, parts in imported(path):
        other = parts[0] if parts else "__init__"
        if other in (FOR_ALL, part):
            continue
        where = f"{path}:{line} imports {'.'.join(parts) or 'the package'}"
        assert part != FOR_ALL, where
        assert other in ORDER, where
        assert ORDER.index(other) > ORDER.index(part), where


def test_the_imports_are_seen(tmp_path):
    """What is above would pass with a function that finds nothing."""
    path = tmp_path / "module.py"
    path.write_text(
        "import keras_srlora.layers.base\n"
        "def late():\n"
        "    from keras_srlora.training import slots\n"
        "    from keras_srlora import Recipe\n"
    )
    assert list(imported(path)) == [
        (1, ["layers", "base"]),
        (3, ["training", "slots"]),
        (4, ["Recipe"]),
    ]
    assert sum(len(list(imported(path))) for path in MODULES) > 100


def test_modules_do_not_import_each_other_in_a_circle():
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in MODULES
    }
    needs = {
        name: {
            other
            for _, parts in imported(path)
            for end in (len(parts), len(parts) - 1)
            if (other := ".".join(parts[:end])) in names and other != name
        }
        for name, path in names.items()
    }
    while needs:
        free = [name for name, others in needs.items() if not others]
        assert free, f"these import each other: {sorted(needs)}"
        needs = {
            name: others.difference(free)
            for name, others in needs.items()
            if name not in free
        }


# Public, in spite of the underscore.
NAMED_TUPLES = {"_asdict", "_fields", "_replace"}


def private_names(path):
    """The attributes of others that begin with an underscore."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr):
            if getattr(node.value, "id", "") not in ("self", "cls"):
                yield node.attr
        elif isinstance(node, ast.ImportFrom):
            if "keras.src" in (node.module or ""):
                yield node.module


def own_names(path):
    """What a module itself defines with such a name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Attribute):
            if isinstance(node.ctx, ast.Store):
                yield node.attr


def test_private_api_of_keras_is_in_one_place():
    place = ROOT / "backend" / "keras_private"
    others = [path for path in MODULES if place not in path.parents]
    own = {name for path in others for name in own_names(path)}
    own |= NAMED_TUPLES
    foreign = {
        (str(path.relative_to(ROOT)), name)
        for path in others
        for name in set(private_names(path)) - own
    }
    assert not foreign
    found = {
        name for path in place.glob("*.py") for name in private_names(path)
    }
    assert {"_flatten_layers", "_initial_epoch", "_tracker"} <= found


def test_no_class_and_no_module_is_large():
    for path in MODULES:
        text = path.read_text()
        lines = len(text.splitlines())
        assert lines <= 400, f"{path} has {lines} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= 250, f"{node.name} in {path}: {lines} lines"


def test_no_two_names_look_alike():
    """They would differ by an underscore, or by an `s` at the end."""
    places = [*MODULES, *{path.parent for path in MODULES} - {ROOT}]
    names = collections.defaultdict(list)
    for path in places:
        if path.stem != "__init__":
            alike = path.stem.replace("_", "").removesuffix("s")
            names[alike].append(str(path.relative_to(ROOT)))
    assert not {k: found for k, found in names.items() if len(found) > 1}
