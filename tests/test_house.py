"""How the package is built: which files import which, and what names stand for; read from the syntax, never run."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
ROOMS = {"text", "model", "run", "mine", "neuron"}  # with the files above all rooms, the spine
WINGS = {
    "prediction",
    "tracing",
    "patterns",
    "trials",
    "annotation",
    "exchange",
    "studies",
    "views",
    "atlas",
    "api",
    "cli",
}
DOORS = {
    "mnemoscope",
    "mnemoscope.api",
    "mnemoscope.cli",
    "mnemoscope.model",  # sets what products depend on, before anything can multiply
}  # packages whose `__init__` is more than a docstring

# Numbers and lists below only ever shrink.
DOUBLES = {"Run"}  # the stored run, and the public one that asks it
FLOORS = 17  # files in the longest chain of imports
LONGEST = 95  # lines of a function, signature and docstring included
SPINE_FILES, SPINE_LINES = (
    99,
    25_538,
)  # with mixtures of experts, their null units, layers that differ, encoders, encoder-decoders, adapters,
# packed weights, every entry of transformers, fairseq's own modules, units that are not neurons, by their files,
# triggers by where they are, from which searches of large runs are answered, builds in parts, Ray, URLs, the price
# of a build, also of a model that is not here, vocabularies that are read in pieces, nine more families, accelerators,
# several of them, which share layers, too, laws of what the tables of a run say of each other, kernels that are tried
# where they run, web servers, states that say of which build they are, uploads that come at once, and processes that
# leave signals to who started them
ROLES = {"found", "one", "part", "some", "mine"}  # what a thing does in its sentence, not what it is
ROLE_NAMES = 64


def _files(source: Path) -> dict[str, Path]:
    """Modules by their dotted name; a package is its `__init__`."""
    names = {path: path.relative_to(source).with_suffix("").parts for path in source.rglob("*.py")}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for path, parts in names.items()}


FILES = _files(SOURCE)


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _run(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes below one, without what only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for branch in child.orelse:
                yield branch
                yield from _run(branch)
        else:
            yield child
            yield from _run(child)


def _imports(files: dict[str, Path]) -> dict[str, set[str]]:
    """Of each module the modules of the package that it imports, at its top or in a function."""
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        names: set[str] = set()
        for node in _run(_tree(path)):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}:{node.lineno}: imports are absolute"
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                names |= inner & files.keys()
                if inner - files.keys():
                    names.add(str(node.module))
        graph[module] = names & files.keys() - {module}
    return graph


@cache
def imports() -> dict[str, set[str]]:
    """Of each module of the package those that it imports."""
    return _imports(FILES)


def _longest(graph: dict[str, set[str]]) -> list[str]:
    """The longest chain of imports, from who imports to who is imported."""

    @cache
    def chain(module: str) -> tuple[str, ...]:
        return (module, *max(map(chain, sorted(graph[module])), key=len, default=()))

    return list(max(map(chain, sorted(graph)), key=len))


def _room(module: str) -> str:
    """The package below the top one that a module is in; "" for the files above all rooms."""
    _, *parts = module.split(".")
    return parts[0] if parts and parts[0] in ROOMS | WINGS else ""


# -- imports -----------------------------------------------------------------------------------------------------


def test_every_package_has_a_place() -> None:
    """A folder is a room of the spine or a wing: a new one is entered here."""
    packages = {module.split(".")[1] for module, path in FILES.items() if path.parent.parent.parent == SOURCE}
    assert packages == ROOMS | WINGS


def test_modules_import_in_no_circle() -> None:
    """Lazy imports are counted: a circle is two files that are one."""
    try:
        order = list(TopologicalSorter(imports()).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(reversed(error.args[1]))}")
    assert len(order) == len(FILES)


def test_the_spine_imports_no_wing() -> None:
    """Who has read the spine has read all that it runs; the top package and `python -m` are doors, not spine."""
    spine = {module for module in FILES if _room(module) not in WINGS} - {"mnemoscope", "mnemoscope.__main__"}
    assert len(spine) > 60
    faults = {
        f"{module} imports {name}" for module in spine for name in imports()[module] if _room(name) in WINGS
    }
    assert not faults


def test_the_chain_of_imports_is_short() -> None:
    """Who wants to understand a file reads those below it: there are no more floors than there were."""
    chain = _longest(imports())
    assert len(chain) <= FLOORS, "\n".join(chain)


def test_the_spine_is_read_in_an_afternoon() -> None:
    """Files and lines of the spine, and the longest function of all, do not grow without a word here."""
    spine = [path for module, path in FILES.items() if _room(module) not in WINGS]
    assert len(spine) <= SPINE_FILES, len(spine)
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in spine)
    assert lines <= SPINE_LINES, lines
    functions = {
        f"{path.relative_to(SOURCE)}: {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in FILES.values()
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.FunctionDef)
    }
    longest = max(functions, key=lambda name: functions[name])
    assert functions[longest] <= LONGEST, longest


def test_every_module_is_reached_from_the_command_line() -> None:
    """What no command imports, now or when it is called, is dead."""
    seen, left = set(), ["mnemoscope.__main__"]
    while left:
        module = left.pop()
        if module not in seen:
            seen.add(module)
            left += imports()[module]
    packages = {module for module, path in FILES.items() if path.name == "__init__.py"}
    assert set(FILES) - seen - packages == set()


def _named(tree: ast.Module) -> Iterator[str]:
    """Where code would import by a string: calls that do so, and strings that name a function of ours."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute | ast.alias):
            name = getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "name", "")
            if name in {"import_module", "__import__", "run_module", "resolve_name"}:
                yield f"{name} in line {node.lineno}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            ours = re.fullmatch(r"(mnemoscope(\.\w+)+)(:\w+)?", node.value)
            if ours and (ours[3] or (ours[1] in FILES and FILES[ours[1]].name != "__init__.py")):
                yield f"{node.value!r} in line {node.lineno}"


def test_nothing_is_imported_by_a_string() -> None:
    """A linter and a reader see every import; packages may be named to read a file of data in them."""
    assert not {f"{path}: {fault}" for path in FILES.values() for fault in _named(_tree(path))}


def test_a_package_holds_its_docstring_only() -> None:
    """Importing one file of a package runs no other; what a package is for is said in its `__init__`."""
    for module, path in FILES.items():
        if path.name == "__init__.py" and module not in DOORS:
            assert ast.get_docstring(_tree(path)), module
            assert len(_tree(path).body) == 1, module


def test_these_checks_can_fail(tmp_path: Path) -> None:
    """A small package with a circle in a function, an import for types only, and an import by a string."""
    (tmp_path / "pack").mkdir()
    texts = {
        "__init__": "",
        "high": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pack.low\nfrom pack import mid",
        "mid": "def later():\n    from pack.low import thing\n    import json",
        "low": "thing = 1",
    }
    for name, text in texts.items():
        (tmp_path / "pack" / f"{name}.py").write_text(text)
    graph = _imports(_files(tmp_path))
    assert graph == {"pack": set(), "pack.high": {"pack.mid"}, "pack.mid": {"pack.low"}, "pack.low": set()}
    assert _longest(graph) == ["pack.high", "pack.mid", "pack.low"]
    with pytest.raises(CycleError):
        TopologicalSorter(graph | {"pack.low": {"pack.high"}}).prepare()
    assert list(_named(ast.parse("a = 'mnemoscope.api:build'"))) == ["'mnemoscope.api:build' in line 1"]
    assert list(_named(ast.parse("importlib.import_module(name)"))) == ["import_module in line 1"]


# -- names -------------------------------------------------------------------------------------------------------


def test_a_class_name_means_one_thing() -> None:
    """No class is called as another one is, but for the doubles listed; a double that is gone leaves the list."""
    names = Counter(
        node.name
        for path in FILES.values()
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.ClassDef)
    )
    assert {name for name, times in names.items() if times > 1} == DOUBLES


def test_names_say_what_things_are() -> None:
    """Locals called by their role in a sentence (`found`, `one` ...) only become fewer."""
    roles = Counter(
        path.relative_to(SOURCE).as_posix()
        for path in FILES.values()
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in ROLES
    )
    assert roles.total() <= ROLE_NAMES, roles.most_common(10)
