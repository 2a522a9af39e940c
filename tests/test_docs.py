"""What the documents say of the source is so: names exist, numbers are those of the code."""

import ast
import re
from pathlib import Path

import pytest

from tppo_kernels._core.op import OPS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tppo_kernels"
READMES = sorted(PACKAGE.glob("ops/*/README.md"))
DOCUMENTS = [ROOT / "docs/how-a-call-runs.md", *READMES]
FOLDERS = "_core|_math|_kernels|ops|models"
NAME = re.compile(rf"(?<![\w./])((?:{FOLDERS})(?:\.\w+)+)")  # ops.gae._cpp.fwd
IN_CSRC = re.compile(r"(csrc/\w+\.\w+)(?::(\w+))?")  # csrc/gae.cpp:gae_fwd
IN_TESTS = re.compile(r"((?:tests|bench)/\w+\.py)(?:::(\w+))?")
NUMBER = re.compile(r"`((?:\w+\.)*\w+) = (\d[\d_,]*)`")  # of a table: `_cuda.CHUNK = 2048`


def own(tree):
    """The statements of a module, class or function, without those of a definition inside."""
    for node in ast.iter_child_nodes(tree):
        yield node
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield from own(node)


def within(tree, names):
    """Whether a definition lies in a definition ... in a module; the last may be a variable."""
    for i, name in enumerate(names):
        inner = [node for node in own(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)
                 and node.name == name]
        if not inner:
            return i == len(names) - 1 and any(
                isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Store)
                for node in own(tree))
        tree = inner[0]
    return True


def exists(name):
    """Whether a dotted name of the package is a module, or something that one defines."""
    words, folder = name.split("."), PACKAGE
    while words and (folder / words[0]).is_dir():
        folder /= words.pop(0)
    file = folder / "__init__.py"
    if words and (folder / f"{words[0]}.py").exists():
        file = folder / f"{words.pop(0)}.py"
    return within(ast.parse(file.read_text()), words)


@pytest.mark.parametrize("name, there", [
    ("_core.op.Op.define.call", True), ("ops.gae._op", True), ("ops.gae", True),
    ("_kernels.varlen.merge", True), ("_core.op.Op.call", False), ("ops.gae._cuda.plans", False),
    ("ops.gea.gae", False)])
def test_the_search_for_names_finds_what_is_there_and_nothing_else(name, there):
    assert exists(name) is there


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_name_of_the_source_in_a_document_exists(document):
    text = document.read_text()
    names = NAME.findall(text)
    assert names or document in READMES
    assert [name for name in names if not exists(name)] == []
    for pattern in (IN_CSRC, IN_TESTS):
        for file, name in pattern.findall(text):
            assert (ROOT / file).exists(), file
            assert re.search(rf"\b{name}\b", (ROOT / file).read_text()), f"{file} has no {name}"


@pytest.mark.parametrize("document", READMES, ids=lambda p: p.parent.name)
def test_the_numbers_of_an_operators_readme_are_those_of_its_source(document):
    numbers = NUMBER.findall(document.read_text())
    assert numbers, "the table of block sizes has none"
    for name, value in numbers:
        *path, constant = name.split(".")
        file = (PACKAGE.joinpath(*path) if path and path[0] in FOLDERS.split("|")
                else document.parent.joinpath(*path)).with_suffix(".py")
        if path and path[0] == "csrc":
            source = "".join(p.read_text() for p in (ROOT / "csrc").glob(f"{path[1]}.*"))
        else:
            source = file.read_text()
        found = re.search(rf"\b{constant}(?:: \w+)? = ([\d_]+)\b", source)
        assert found, f"{name} is not set to a number"
        assert int(found[1].replace("_", "")) == int(value.replace(",", "")), name


def test_a_readme_stands_with_an_operator_and_is_short():
    assert {path.parent.name for path in READMES} <= set(OPS)
    for path in READMES:
        lines = path.read_text().splitlines()
        assert lines[0] == f"# {path.parent.name}" and len(lines) <= 200
