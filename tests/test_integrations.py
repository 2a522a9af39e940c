"""The adapters to other trainers, as far as no trainer is needed: documents, examples, and lines.

What needs the trainers themselves is in tests/interop.
"""

import ast
import importlib
import re
import runpy
import sys
from pathlib import Path

import pytest

from tppo_kernels.integrations._peer import PEERS, PeerError

ROOT = Path(__file__).parent.parent
ADAPTERS = sorted(p.stem for p in (ROOT / "tppo_kernels/integrations").glob("[a-z]*.py"))
EXAMPLES = sorted((ROOT / "examples/integrations").rglob("*.py"))
GUIDE = ROOT / "docs/integrations.md"
OF_A_RUN = {"cluster_data.py", "data.py"}  # of data: no trainer's script
NAMED = {"trl": "TRL", "verl": "verl", "skyrl": "SkyRL", "openrlhf": "OpenRLHF", "slime": "slime",
         "nemo_rl": "NeMo-RL"}


class Ours:
    """The lines of a script that name `tppo_kernels` or what comes from it.

    A name comes from it where it is imported from it, or bound (by `=`, `with`, `for`, `:=`, a
    class or a default) to an expression that names something which comes from it.  A statement
    counts with all its lines, one with a body with those of its head; a decorator with its own.
    """

    def __init__(self, source: str) -> None:
        self.names: set[str] = set()
        self.lines: set[int] = set()
        tree = ast.parse(source)
        before = -1
        while before != len(self.names):  # a name may be used before it is bound, in a function
            before = len(self.names)
            self.visit(tree.body)

    def visit(self, body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = getattr(node, "module", None)
                for alias in node.names:
                    whole = f"{module}.{alias.name}" if module else alias.name
                    if whole.split(".")[0] == "tppo_kernels":
                        self.names.add((alias.asname or alias.name).split(".")[0])
                        self.count(node)
                continue
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                continue  # a docstring
            blocks = [block for name in ("body", "orelse", "finalbody")
                      if isinstance(block := getattr(node, name, None), list)]
            blocks += [handler.body for handler in getattr(node, "handlers", ())]
            blocks += [case.body for case in getattr(node, "cases", ())]
            inside = {id(statement) for block in blocks for statement in block}
            head = [part for part in self.parts(node) if id(part) not in inside]
            if any(self.is_ours(part) for part in head):
                self.bind(node)
                for part in head:
                    if self.is_ours(part):
                        self.count(part if blocks else node)
            for block in blocks:
                self.visit(block)

    @staticmethod
    def parts(node: ast.stmt) -> list[ast.AST]:
        found = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found += node.decorator_list
        return found

    def is_ours(self, part: ast.AST) -> bool:
        """Whether an expression names something of ours; a string that does counts too."""
        for inner in ast.walk(part):
            if isinstance(inner, ast.stmt):
                return False  # of a body, which is looked at by itself
            if isinstance(inner, ast.Name) and inner.id in self.names:
                return True
            if isinstance(inner, ast.Constant) and "tppo_kernels" in str(inner.value):
                return True
        return False

    def bind(self, node: ast.stmt) -> None:
        """Takes in the names that a statement of ours binds."""
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            self.names.add(node.name)
        for part in self.parts(node):
            if not isinstance(part, ast.stmt):
                self.names |= {inner.id for inner in ast.walk(part) if isinstance(inner, ast.Name)
                               and isinstance(inner.ctx, ast.Store)}

    def count(self, node: ast.AST) -> None:
        placed = [x for x in ast.walk(node) if hasattr(x, "lineno")]
        self.lines |= set(range(min(x.lineno for x in placed),
                                max(x.end_lineno for x in placed) + 1))


@pytest.mark.parametrize(("source", "lines"), [
    ("import tppo_kernels as tk\nx = 1\ntk.f(\n    x,\n)\n", {1, 3, 4, 5}),
    ("from tppo_kernels.integrations import trl\ntrl.patch()\n", {1, 2}),
    ("from tppo_kernels import (\n    gae,\n)\nmine = gae\nmine(1)\nother(1)\n", {1, 2, 3, 4, 5}),
    ("import tppo_kernels as tk\nclass A(tk.B):\n    x = 1\n    def f(self):\n        return 2\n"
     "a = A()\na.f()\n", {1, 2, 6, 7}),
    ("import tppo_kernels as tk\ndef f():\n    y = 1\n    return tk.gae(y)\nf()\n", {1, 4}),
    ("import tppo_kernels as tk\nwith tk.use_backend('x') as b:\n    y = 1\n    b.f()\n",
     {1, 2, 4}),
    ("import tppo_kernels as tk\n@tk.f\ndef g(x):\n    return x\ng(1)\n", {1, 2, 5}),
    ("import tppo_kernels as tk\nif x:\n    y = 1\nelif tk.f():\n    z = 2\nelse:\n    tk.g()\n",
     {1, 4, 7}),
    ("def f():\n    return tk.g()\nimport tppo_kernels as tk\n", {2, 3}),
    ("__import__('tppo_kernels').gae(1)\n", {1}),
    ("import tppo_kernels as tk\nprint((x := tk.f()))\nx.g()\n", {1, 2, 3}),
    ("try:\n    import tppo_kernels as tk\nexcept ImportError as e:\n    print(e)\n", {2}),
    ("x = {'key': 1}\nimport skyrl\n", set()),
])
def test_lines_of_ours_are_counted(source, lines):
    assert Ours(source).lines == lines


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda p: str(p.relative_to(ROOT / "examples")))
def test_at_most_five_lines_of_an_example_are_ours(script):
    source = script.read_text()
    compile(source, script.name, "exec")
    ours = Ours(source).lines
    if script.name in OF_A_RUN:
        assert not ours
    else:
        assert 2 <= len(ours) <= 5, [source.splitlines()[i - 1] for i in sorted(ours)]


def test_every_adapter_has_an_example():
    folders = {p.relative_to(ROOT / "examples/integrations").parts[0].removesuffix(".py")
               for p in EXAMPLES if p.name not in OF_A_RUN}
    assert folders == set(ADAPTERS)


# What the scripts import before ours, of a trainer that we do not know.
OTHERS = {
    "trl": {"datasets/__init__.py": "Dataset = None\n",
            "trl/__init__.py": "GRPOConfig = GRPOTrainer = None\n"},
    "skyrl": {"ray/__init__.py": "", "skyrl/__init__.py": "", "skyrl/train/__init__.py": "",
              "skyrl/train/config.py": "SkyRLTrainConfig = None\n",
              "skyrl/train/entrypoints/__init__.py": "",
              "skyrl/train/entrypoints/main_base.py": "BasePPOExp = None\n",
              "skyrl/train/utils.py": "initialize_ray = validate_cfg = None\n"}}


WRITTEN = {file.split("/")[0] for files in OTHERS.values() for file in files}


@pytest.mark.parametrize("script", ["trl/patch.py", "trl/token_rewards.py", "skyrl/train.py"])
@pytest.mark.parametrize("version", ["0.1.0", "9.9"])
def test_a_script_with_another_trainer_ends_in_one_sentence(
        script, version, tmp_path, monkeypatch):
    trainer = script.split("/")[0]
    metadata = f"Metadata-Version: 2.1\nName: {trainer}\nVersion: {version}\n"
    for file, text in {**OTHERS[trainer],
                       f"{trainer}-{version}.dist-info/METADATA": metadata}.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    try:
        with pytest.raises(PeerError) as caught:
            runpy.run_path(str(ROOT / "examples/integrations" / script), run_name="__main__")
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] in WRITTEN]:
            del sys.modules[name]
    expected = f"{trainer}{PEERS[trainer].versions}"
    assert str(caught.value) == (
        f"{trainer} {version} is installed, expected {expected}, whose interface this integration "
        f"knows: pip install '{expected}'")


def test_the_command_for_a_cluster_without_skyrl_ends_in_one_sentence():
    with pytest.raises(SystemExit, match="^skyrl is not installed, expected skyrl>=0.4,<0.5: pip "):
        runpy.run_module("tppo_kernels.integrations.skyrl", run_name="__main__")


def test_the_self_check_lists_every_adapter_and_the_guide_its_versions():
    assert sorted(PEERS) == ADAPTERS
    for name, peer in PEERS.items():
        first = re.search(r"[\d.]*\d", peer.versions)[0].removesuffix(".1")  # 0.9.1 as 0.9
        assert first in sections()[NAMED[name]], name


def sections() -> dict[str, str]:
    """The parts of the guide by their heading."""
    parts = re.split(r"^## (.+)$", GUIDE.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_adapter_has_a_table_of_differences(adapter):
    tables = [part for part in sections()[NAMED[adapter]].split("\n\n") if part.startswith("|")]
    rows = [line for line in tables[0].splitlines() if line.startswith("| ")]
    assert rows[0].split("|")[1:3] == [" function ", " theirs "] and len(rows) > 3
    assert all(line.count("|") == rows[0].count("|") for line in rows)


def test_the_guide_has_no_section_of_a_trainer_without_an_adapter():
    assert {name for name in NAMED.values() if name in sections()} == {NAMED[x] for x in ADAPTERS}


def test_the_readme_names_the_guides():
    text = (ROOT / "README.md").read_text()
    assert "(docs/integrations.md)" in text and "(docs/from-one-gpu-to-a-cluster.md)" in text
