"""The order of the rooms: what a file may import, and what an import may load.

A room imports from itself and from rooms before it.  An import inside a function and one for type
checkers count as well: they too say that a file knows of the other.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
Broken = set[tuple[str, str]]  # (file, what it imports)

# What may be imported from each room of python/tppo.  Labels come before sessions: what a word is,
# and when two queries say the same, is the matter of those who judge answers, and sessions count
# words and find duplicates by it; a labeller is given texts and knows no log.
BASE = {"errors", "progress", "console", "environment", "stopping", "settings",
        "plain_text", "flags"}  # single files
STORE = BASE | {"store"}
LABELS = STORE | {"labels"}
SESSIONS = LABELS | {"sessions"}
MODELS = STORE | {"models"}
REWARDS = LABELS | MODELS | {"rewards"}
METHODS = BASE | {"models", "rewards", "methods"}  # batches in, a better model out: no file
EVALUATION = SESSIONS | REWARDS | METHODS | {"evaluation"}
CONFIG = EVALUATION | {"config"}
STAGES = CONFIG | {"stages"}
CLI = STAGES | {"options", "help", "commands", "cli"}
TRAINER = {
    **dict.fromkeys(BASE, BASE), "store": STORE, "labels": LABELS, "sessions": SESSIONS,
    "models": MODELS, "rewards": REWARDS, "methods": METHODS, "evaluation": EVALUATION,
    "config": CONFIG, "stages": STAGES, "options": CONFIG | {"options"},
    "help": STAGES | {"options", "help"}, "commands": CLI - {"cli"}, "cli": CLI,
    "__main__": CLI, "__init__": CLI,
}  # fmt: skip
WITHOUT_TORCH = {"labels", "sessions"}
TORCH = {"torch", "transformers", "tppo_kernels", "safetensors"}  # and what loads it

# The same for tppo_kernels; the files above the rooms may import any of them.
KERNELS = {
    "_core": {"_core"},
    "_math": {"_core", "_math"},
    "_kernels": {"_core", "_math", "_kernels"},
    "ops": {"_core", "_math", "_kernels", "ops"},
    "models": {"_core", "_math", "ops", "models"},
    "integrations": {"__init__", "integrations"},  # over public names, as `tk.gae`
}

# What stands against the rules.  The list may only become shorter.
KNOWN: Broken = {
    # These two load the extension to say whether it works here, and call nothing else of it.
    ("tppo_kernels/_core/backends.py", "tppo_kernels._C"),
    ("tppo_kernels/__main__.py", "tppo_kernels._C"),
}


class Import(NamedTuple):
    """A module, or something in one, by its whole name."""

    file: str
    name: str
    for_types: bool

    def room(self, package: str) -> str | None:
        """The part of the package that is imported, None where it is not of the package."""
        first, _, rest = self.name.partition(".")
        return rest.split(".")[0] or "__init__" if first == package else None


def imports(root: Path, package: str) -> Iterator[Import]:
    """Every import of a package's files, those by `import_module("...")` too."""
    folder = root / package
    for path in sorted(folder.rglob("*.py")):
        parents = path.relative_to(folder.parent).parts[:-1]
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for_types = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for statement in node.body
            for inner in ast.walk(statement)
        }
        for node in ast.walk(tree):
            for name in _names(node, parents):
                yield Import(path.relative_to(root).as_posix(), name, id(node) in for_types)


def _names(node: ast.AST, parents: tuple[str, ...]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        start = parents[: len(parents) - node.level + 1] if node.level else ()
        module = [*start, *([node.module] if node.module else [])]
        return [".".join([*module, alias.name]) for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        given = node.args[0]
        return [given.value] if isinstance(given, ast.Constant) else []
    return []


def broken_by_the_trainer(root: Path) -> Broken:
    found = set()
    for path in (root / "python/tppo").iterdir():
        if path.stem not in TRAINER and (path.suffix == ".py" or any(path.glob("*.py"))):
            found.add((path.relative_to(root).as_posix(), "a room that no rule names"))
    for item in imports(root, "python/tppo"):
        own = item.file.split("/")[2].removesuffix(".py")
        other = item.room("tppo")
        against_order = other is not None and other not in TRAINER.get(own, {other})
        torch = item.name.split(".")[0] in TORCH and not item.for_types
        if against_order or own in WITHOUT_TORCH and torch:
            found.add((item.file, item.name))
    return found


def broken_by_the_kernels(root: Path) -> Broken:
    found = set()
    for item in imports(root, "tppo_kernels"):
        _, *folders, name = item.file.split("/")
        own = folders[0] if folders else ""
        other = item.room("tppo_kernels")
        if item.name.split(".")[0] == "tppo":
            good = False  # the trainer stands on the operators
        elif other == "_C" or item.name.split(".")[0] == "triton":
            backend = own == "ops" and name.startswith("_") and name != "__init__.py"
            good = own == "_kernels" or backend
        else:
            good = other is None or not own or other in KERNELS.get(own, set())
        if not good:
            found.add((item.file, item.name))
    return found


def complaints(found: Broken, known: Broken) -> list[str]:
    """What differs from the list, in both directions."""
    new = [f"{file} imports {name}, which its room may not" for file, name in sorted(found - known)]
    gone = [f"{file} imports {name} no more: take it off KNOWN" for file, name in known - found]
    return new + sorted(gone)


def test_imports_keep_the_order_of_the_rooms():
    found = broken_by_the_trainer(ROOT) | broken_by_the_kernels(ROOT)
    assert complaints(found, KNOWN) == []


GOOD = {
    "python/tppo/__init__.py": "",
    "python/tppo/progress.py": "import sys",
    "python/tppo/store/jsonl.py": "from tppo.progress import say",
    "python/tppo/labels/words.py": "from tppo.store.jsonl import read",
    "python/tppo/sessions/split.py": "from tppo.labels import words\nfrom typing import "
    "TYPE_CHECKING\nif TYPE_CHECKING:\n    from transformers import PreTrainedTokenizerBase",
    "python/tppo/models/batch.py": "import torch\nfrom tppo.store import jsonl",
    "python/tppo/methods/ppo.py": "import tppo_kernels as tk\nfrom tppo.models.batch import Batch",
    "python/tppo/stages/ppo.py": "from tppo.methods.ppo import step\nimport tppo.sessions.split",
    "tppo_kernels/__init__.py": "from .ops.gae import gae",
    "tppo_kernels/_core/check.py": "import torch",
    "tppo_kernels/_math/rows.py": "from .._core.check import Check",
    "tppo_kernels/_kernels/launch.py": "import triton\nfrom .._C import stream",
    "tppo_kernels/ops/gae/__init__.py": "from ..._kernels import launch\nfrom . import reference",
    "tppo_kernels/ops/gae/_triton.py": "import triton.language as tl",
    "tppo_kernels/models/align.py": "from ..ops.gae import gae",
    "tppo_kernels/integrations/_peer.py": "import sys",
    "tppo_kernels/integrations/trl.py": "import tppo_kernels as tk\nfrom ._peer import say",
}
BAD = [
    ("python/tppo/progress.py", "from tppo.store.jsonl import read", "tppo.store.jsonl.read"),
    ("python/tppo/store/jsonl.py", "from tppo import labels", "tppo.labels"),
    ("python/tppo/labels/words.py", "import tppo.sessions.split", "tppo.sessions.split"),
    ("python/tppo/labels/words.py", "def f():\n    import torch", "torch"),
    ("python/tppo/sessions/split.py", "from transformers import AutoModel",
     "transformers.AutoModel"),
    ("python/tppo/sessions/split.py", "import tppo_kernels", "tppo_kernels"),
    ("python/tppo/sessions/split.py", "from ..models import batch", "tppo.models.batch"),
    ("python/tppo/models/batch.py", "from tppo.labels.words import fold", "tppo.labels.words.fold"),
    ("python/tppo/models/batch.py", "if TYPE_CHECKING:\n    from tppo.methods.ppo import PPO",
     "tppo.methods.ppo.PPO"),
    ("python/tppo/methods/ppo.py", "from tppo.store import jsonl", "tppo.store.jsonl"),
    ("python/tppo/methods/ppo.py", "from tppo.labels import words", "tppo.labels.words"),
    ("python/tppo/methods/ppo.py", "def f():\n    from tppo.sessions import split",
     "tppo.sessions.split"),
    ("python/tppo/methods/ppo.py", "from tppo.stages import ppo", "tppo.stages.ppo"),
    ("python/tppo/stages/ppo.py", "from importlib import import_module\nimport_module('tppo.cli')",
     "tppo.cli"),
    ("python/tppo/shed/tool.py", "", "a room that no rule names"),
    ("tppo_kernels/_core/check.py", "from .._math import rows", "tppo_kernels._math.rows"),
    ("tppo_kernels/_core/check.py", "import tppo_kernels", "tppo_kernels"),
    ("tppo_kernels/_core/check.py", "def f():\n    from .._C import within",
     "tppo_kernels._C.within"),
    ("tppo_kernels/_math/rows.py", "from .._kernels import launch", "tppo_kernels._kernels.launch"),
    ("tppo_kernels/_kernels/launch.py", "from ..ops.gae import gae", "tppo_kernels.ops.gae.gae"),
    ("tppo_kernels/ops/gae/__init__.py", "import triton", "triton"),
    ("tppo_kernels/ops/gae/reference.py", "from ... import _C", "tppo_kernels._C"),
    ("tppo_kernels/ops/gae/reference.py", "from ...models import align",
     "tppo_kernels.models.align"),
    ("tppo_kernels/models/align.py", "from .._kernels import launch",
     "tppo_kernels._kernels.launch"),
    ("tppo_kernels/integrations/trl.py", "from ..ops.gae import gae", "tppo_kernels.ops.gae.gae"),
    ("tppo_kernels/integrations/trl.py", "import tppo.rewards", "tppo.rewards"),
    ("tppo_kernels/ops/gae/__init__.py", "from ...integrations import trl",
     "tppo_kernels.integrations.trl"),
    ("tppo_kernels/doctor.py", "import triton", "triton"),
]  # fmt: skip


@pytest.fixture
def tree(tmp_path):
    for file, text in GOOD.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    return tmp_path


def broken(root: Path) -> Broken:
    return broken_by_the_trainer(root) | broken_by_the_kernels(root)


def test_a_tree_that_keeps_the_order_is_fine(tree):
    assert broken(tree) == set()


@pytest.mark.parametrize(("file", "text", "name"), BAD)
def test_each_kind_of_violation_is_found(tree, file, text, name):
    (tree / file).parent.mkdir(exist_ok=True)
    (tree / file).write_text(text)
    where = file if text else str(Path(file).parent)
    assert broken(tree) == {(where, name)}


def test_a_listed_violation_that_is_gone_is_named():
    assert complaints(set(), {("a.py", "b")}) == ["a.py imports b no more: take it off KNOWN"]
    assert complaints({("a.py", "b")}, {("a.py", "b")}) == []


def loaded(code: str) -> list[set[str]]:
    """The modules that each `note()` of the code finds loaded."""
    head = "import json, sys\nnote = lambda: print(json.dumps(list(sys.modules)))\n"
    done = subprocess.run([sys.executable, "-c", head + code], check=True, capture_output=True,
                          text=True)  # fmt: skip
    return [set(json.loads(line)) for line in done.stdout.splitlines()]


def packages(modules: set[str]) -> set[str]:
    """Installed packages among modules."""
    return {name.split(".")[0] for name in modules} - sys.stdlib_module_names


# Libraries that a method brings besides torch and transformers, with what those load themselves.
# pydantic, with its three parts: PPOConfig and its like are held to types and ranges when they are
# made, in a script as from flags and YAML, and pydantic is what checks them.
BROUGHT = {"tppo", "tppo_kernels", "pydantic", "pydantic_core", "annotated_types",
           "typing_inspection"}  # fmt: skip


def test_a_method_loads_no_labeller_reader_or_command_line():
    before, after = loaded(
        "import torch, torch.distributed\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM\n"
        "from transformers import AutoModelForTokenClassification, PreTrainedModel\n"
        "note()\nimport tppo.methods.ppo, tppo.methods.sft, tppo.methods.reward_model\nnote()"
    )
    own = {name.split(".")[1] for name in after if name.startswith("tppo.")}
    assert "methods" in own and own <= METHODS
    assert packages(after) - packages(before) <= BROUGHT
    assert not {"tyro", "ruamel", "rich", "openai"} & packages(after)


def test_labels_sessions_and_settings_load_no_torch():
    code = (
        "import tppo\nnote()\nimport importlib, pkgutil, tppo.config, tppo.cli\n"
        "for room in ('labels', 'sessions'):\n"
        "    path = importlib.import_module(f'tppo.{room}').__path__\n"
        "    for module in pkgutil.walk_packages(path, f'tppo.{room}.'):\n"
        "        importlib.import_module(module.name)\n"
        "note()"
    )
    alone, rooms = loaded(code)
    assert packages(alone) - packages(loaded("note()")[0]) == {"tppo"}
    assert {"tppo.labels.endpoint.live", "tppo.sessions.readers.aol"} <= rooms
    assert not TORCH & packages(rooms)
