"""What documents and comments say of the source is so: names, numbers, shapes."""

import ast
import importlib
import inspect
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import yaml

import tppo
import tppo_kernels as tk
from tppo_kernels._core import record as records
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


ABOUT_CALLS = {"BackendError", "Explanation", "doctor", "explain", "use_backend"}


def missing_names(table, changes):
    """(public names that are in no row of the README's table, those that no change names)"""
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    names = set(tk.__all__) - ABOUT_CALLS
    return ({n for n in names if not re.search(rf"`{n}\b", "".join(rows))},
            {n for n in names if not re.search(rf"`(tk\.)?{n}\b", changes)})


def test_every_operator_is_in_the_readmes_table_and_in_the_changelog():
    readme, changes = (ROOT / "README.md").read_text(), (ROOT / "CHANGELOG.md").read_text()
    assert missing_names(readme, changes) == (set(), set())
    bare = {"gae"}, {"gae"}
    without = (text.replace("`gae`", "`x`") for text in (readme, changes))
    assert missing_names(*without) == bare
    steps = (ROOT / "CONTRIBUTING.md").read_text()
    adding = steps[steps.index("## Adding an operator"):steps.index("\n## Rooms")]
    assert "README.md" in adding and "CHANGELOG.md" in adding


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


def site_map():
    """(the pages of the site's table of contents, the names that the reference documents)"""
    def pages(entry):
        if isinstance(entry, str):
            yield entry
        for inner in entry.values() if isinstance(entry, dict) else ():
            yield from [inner] if isinstance(inner, str) else [p for x in inner for p in pages(x)]

    listed = [p for x in yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"] for p in pages(x)]
    text = "".join(p.read_text() for p in (ROOT / "docs/api").glob("*.md"))
    return listed, re.findall(r"^::: (\S+)$", text, re.MULTILINE)


def test_every_page_and_every_public_name_is_on_the_site():
    """A page is listed in `nav` of mkdocs.yml, a name has a line `::: package.name` in docs/api."""
    pages, names = site_map()
    there = {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")}
    assert sorted(pages) == sorted(there)
    public = {f"{package.__name__}.{name}" for package in (tk, tppo) for name in package.__all__}
    assert sorted(names) == sorted(public | {"tppo_kernels"})


def test_the_site_is_built_without_a_warning_and_fetches_nothing(tmp_path):
    pytest.importorskip("zensical", reason="zensical is not installed: pip install '.[docs]'")
    for name in ("tppo_kernels", "python"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    build = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    site = tmp_path / "build/docs"
    text = (site / "api/operators.html").read_text()
    for part in ("A_t     = delta_t + gamma lam A_{t+1}", "cu_seqlens", 'id="tppo_kernels.gae"'):
        assert part in re.sub(r"<(?!h2)[^>]*>", "", text)
    assert 'id="tppo.PPOTrainer"' in (site / "api/trainer.html").read_text()
    for page in site.rglob("*.html"):
        assert not re.search(r"<(?:script|img|link|iframe)[^>]*(?:src|href)=.?(?:https?:)?//",
                             page.read_text()), page.name
    (tmp_path / "docs/index.md").write_text("[a page that is not there](nowhere.md)")
    done = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode, done.stdout  # the check can fail


RECORDS = sorted(records._INNER, key=lambda record: record.__name__)  # that raw ops take
SHAPE = re.compile(r"\[[^\]]*\]")


def shapes_of(tree, source):
    """{name: the trailing comment} of the fields or parameters whose annotation has a Tensor."""
    lines = source.splitlines()
    if isinstance(tree, ast.ClassDef):
        nodes = [node for node in tree.body if isinstance(node, ast.AnnAssign)]
    else:
        nodes = [*tree.args.posonlyargs, *tree.args.args, *tree.args.kwonlyargs]
    found = {}
    for node in nodes:
        if node.annotation and re.search(r"\bTensor\b", ast.unparse(node.annotation)):
            name = node.target.id if isinstance(node, ast.AnnAssign) else node.arg
            found[name] = lines[node.end_lineno - 1].partition("# ")[2]
    return found


def definition(thing):
    """A function or class as it stands in its file, and the file's text."""
    source = Path(inspect.getsourcefile(inspect.unwrap(thing))).read_text()
    name, tree = thing.__qualname__.split("."), ast.parse(source)
    for word in name:
        tree = next(node for node in own(tree) if getattr(node, "name", None) == word)
    return tree, source


def parts_of(record):
    """A record and the records inside it."""
    yield record
    for kind in typing.get_type_hints(record).values():
        if kind in RECORDS:
            yield from parts_of(kind)


PUBLIC = [thing for name in tk.__all__ if inspect.isfunction(thing := getattr(tk, name))]
PUBLIC += [tk.PrefixLayout.response_states, tk.FusedLMHead.__call__, tk.FusedLMHead.loss,
           tk.align.covering]


@pytest.mark.parametrize("function", PUBLIC, ids=lambda f: f.__qualname__)
def test_every_tensor_of_a_public_function_has_its_shape_beside_it(function):
    bare = {name: text for name, text in shapes_of(*definition(function)).items()
            if not text.startswith("[")}
    assert bare == {}


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: r.__name__)
def test_every_tensor_of_a_raw_op_has_its_shape_beside_it(record):
    bare = {name: text for name, text in shapes_of(*definition(record)).items()
            if not text.startswith("[")}
    assert bare == {}


@pytest.mark.parametrize("name", OPS)
def test_a_record_has_the_shapes_of_the_public_function(name):
    """A record that several operators share may be more general: [..., D] for [B, T, D]."""
    public = shapes_of(*definition(getattr(tk, name)))
    module = importlib.import_module(f"tppo_kernels.ops.{name}")
    calls = [record for record in RECORDS if record.__name__.endswith("Call")
             and getattr(module, record.__name__, None) is record]
    assert calls
    seen = {}
    for record in calls:
        for part in parts_of(record):
            seen |= shapes_of(*definition(part))
    for field in public.keys() & seen.keys():
        inner, outer = (set(SHAPE.findall(text)) for text in (seen[field], public[field]))
        assert inner <= outer or any("..." in shape for shape in inner), (
            field, seen[field], public[field])
