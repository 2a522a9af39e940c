"""The law of the tree: one op, one name, everywhere; nothing unlisted, nothing too long."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

import tppo_kernels as tk
from tppo_kernels._core.op import OPS

ROOT = Path(__file__).parent.parent
BENCHED = {"entropy", "gae", "kl", "linear_logprobs", "linear_ppo_loss", "ppo_loss",
           "prefix_attention", "reduce", "rollout", "step", "token_advantages", "token_head",
           "token_logprobs", "value_loss", "whiten"}
READMES = {"gae", "linear_logprobs", "ppo_loss", "prefix_attention"}  # whose derivation is long
ENGINES = {"token_advantages": {"_composed.py"}}  # what several backends of an op share
KERNEL_FILES = {"__init__.py", "__main__.py", "testing.py", "py.typed"}
ROOMS = {  # of the kernel library, beside its operators
    "_core": {"op", "check", "backends", "derivatives", "eager", "keywords", "metrics",
              "packed", "record", "watch"},
    "_math": {"sequence", "rows", "linear", "kept", "layout"},
    "_kernels": {"chunks", "launch", "memory", "losses", "products", "selection",
                 "structs", "triton_losses", "triton_policy", "triton_prefix", "triton_rows",
                 "triton_softmax", "values", "varlen"},
    "models": {"lm_head", "shared_prefix", "align", "pieces"},
    "integrations": {"_peer", "_reward_model", "_tensors", "_token_rewards", "_trl_grpo",
                     "_verl_plugin", "nemo_rl", "openrlhf", "skyrl", "slime", "trl", "verl"},
}
SHARED_CSRC = {"bindings.cpp", "common.h", "kernels.h", "loss.h", "loss.cuh", "loss.cpp", "loss.cu"}
TOP = {"README.md", "Makefile", "pyproject.toml", "setup.py", "LICENSE", "CONTRIBUTING.md",
       "CHANGELOG.md", "CITATION.cff", "SECURITY.md", "mkdocs.yml", ".gitignore", ".ci",
       "tppo_kernels", "csrc", "python", "tests", "bench", "docs", "examples"}
SHARED_TESTS = {"conftest.py", "_families.py", "_linear_cases.py", "_loss_cases.py",
                "_matrix.py", "_processes.py", "_weights.py", "test_tree.py", "test_op.py",
                "test_check.py", "test_compile.py", "test_packaging.py", "test_align.py",
                "test_bench.py", "test_prefix.py", "test_lm_head.py", "test_aot.py",
                "test_host_cost.py", "test_linear_memory.py", "test_linear_shards.py",
                "test_gpu_check.py", "_emulated.py", "test_public.py", "test_sass.py", "_sass.py",
                "test_hops.py", "test_docs.py", "test_integrations.py", "test_rooms.py",
                "test_ppo_objectives.py", "test_ppo_loss_backends.py", "test_ppo_loss_torch.py",
                "test_peer.py", "test_peers_from_source.py", "test_trl.py", "test_watch.py"}
FAULTS = {"cases.py", "endpoint.py", "harness.py", "injected.py", "machine.py", "person.py",
          "proof.py", "results", "soak.py", "spoilt.py", "works.py", "test_faults.py"}  # fmt: skip
GPU_TESTS = {"conftest.py", "_gpu.py", "test_gpu_backends.py", "test_gpu_streams.py"}
TRITON_TESTS = {"conftest.py", "_bf16.py", "test_interpreter.py", "test_triton_saturation.py"}
LIMITS = {"README.md": 200, "setup.py": 80, "tppo_kernels/_core/op.py": 170,
          "python/tppo/methods/ser.py": 250, "python/tppo/methods/pit.py": 250,
          "python/tppo/methods/rlgf.py": 250}  # fmt: skip


def files() -> list[str]:
    try:
        listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"],
                                cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("the tree is judged in a git checkout")
    return [f for f in listed.splitlines() if (ROOT / f).exists()]


def test_every_op_has_its_pieces_and_no_other():
    folders = {p.parent.name for p in (ROOT / "tppo_kernels/ops").glob("*/__init__.py")}
    assert folders == set(OPS)
    for name, op in OPS.items():
        backends = {b for order in op.order.values() for b in order} - {"reference"}
        expected = {"__init__.py", "reference.py"} | {f"_{b}.py" for b in backends}
        expected |= ENGINES.get(name, set())
        expected |= {"README.md"} if name in READMES else set()
        present = {p.name for p in (ROOT / "tppo_kernels/ops" / name).iterdir() if p.is_file()}
        assert present == expected, name
        assert (ROOT / f"tests/test_{name}.py").exists(), name
        assert name in tk.__all__ and callable(getattr(tk, name))


def test_no_file_is_unlisted():
    names = set(OPS)
    for file in files():
        parts = file.split("/")
        assert parts[0] in TOP, file
        if parts[0] == "tppo_kernels" and len(parts) == 2:
            assert parts[1] in KERNEL_FILES, file
        if parts[0] == "tppo_kernels" and len(parts) == 3:
            assert parts[2].removesuffix(".py") in ROOMS.get(parts[1], set()) | {"__init__"}, file
        if parts[0] == "csrc":
            assert len(parts) == 2
            assert parts[1] in SHARED_CSRC or parts[1].split(".")[0] in names, file
        if parts[0] == "tests" and len(parts) == 2:
            assert parts[1] in SHARED_TESTS | {f"test_{n}.py" for n in names}, file
        if parts[:2] == ["tests", "faults"]:
            assert parts[2] in FAULTS, file
        if parts[:2] == ["tests", "gpu"]:
            assert parts[2] in GPU_TESTS | {f"test_gpu_{n}.py" for n in names}, file
        if parts[:2] == ["tests", "triton"]:
            assert parts[2] in TRITON_TESTS | {f"test_triton_{n}.py" for n in names}, file
        if parts[0] == "bench" and parts[-1].startswith("bench_"):
            assert parts[1] in {f"bench_{n}.py" for n in BENCHED}, file


def test_lists_name_what_is_there():
    """A name that is left in a list would let a new file of that name in unseen."""
    assert all((ROOT / "tests" / file).exists() for file in SHARED_TESTS)
    assert all((ROOT / "tests/faults" / file).exists() for file in FAULTS)
    assert all((ROOT / "tests/gpu" / file).exists() for file in GPU_TESTS)
    assert all((ROOT / "tests/triton" / file).exists() for file in TRITON_TESTS)
    assert all((ROOT / "csrc" / file).exists() for file in SHARED_CSRC)
    assert all((ROOT / "tppo_kernels" / file).exists() for file in KERNEL_FILES)
    assert all((ROOT / file).exists() for file in TOP | LIMITS.keys())
    assert all((ROOT / f"tppo_kernels/{room}/{file}.py").exists()
               for room, names in ROOMS.items() for file in names)


def test_benchmarks_are_where_they_are_promised():
    assert all((ROOT / f"bench/bench_{name}.py").exists() for name in BENCHED)


@pytest.mark.parametrize("file", [f for f in ("README.md", *LIMITS)])
def test_files_that_have_a_limit_of_their_own(file):
    assert len((ROOT / file).read_text().splitlines()) <= LIMITS[file]


def test_sources_are_short():
    for file in files():
        path = ROOT / file
        if path.suffix not in (".py", ".cpp", ".cu", ".cuh", ".h") or file.startswith("tests/"):
            continue
        lines = path.read_text().splitlines()
        assert len(lines) <= 400, f"{file} has {len(lines)} lines"
        long = [i for i, line in enumerate(lines, 1) if len(line) > 100]
        assert not long, f"{file}: lines {long} are over 100 columns"
        if path.suffix == ".py":
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    size = node.end_lineno - node.lineno + 1
                    doc = ast.get_docstring(node, clean=False)
                    size -= len(doc.splitlines()) if doc else 0
                    assert size <= 60, f"{file}: {node.name} has {size} lines"


def long_lists() -> set[str]:
    """Functions with more than 8 positional parameters, kernels excepted."""
    found = set()
    for file in files():
        if not file.endswith(".py"):
            continue
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            name = getattr(node, "name", "lambda")
            decorators = map(ast.unparse, getattr(node, "decorator_list", ()))
            kernel = any("triton.jit" in decorator for decorator in decorators)
            if len(node.args.posonlyargs + node.args.args) > 8 and not kernel:
                found.add(f"{file}:{name}")
    return found


def test_no_function_takes_a_long_positional_list():
    """Arguments that travel together are a record."""
    assert long_lists() == set()


def test_an_argument_is_written_down_few_times():
    """`max_log_ratio` stood on 26 lines of 8 files, handed on one by one from the public function
    to the kernels: a record carries it."""
    lines = [line for file in files()
             if file.startswith(("tppo_kernels/", "csrc/")) and not file.endswith(".md")
             and not file.startswith("tppo_kernels/integrations/")  # users of the function
             for line in (ROOT / file).read_text().splitlines() if "max_log_ratio" in line]
    assert 2 < len(lines) <= 12


def test_public_functions_have_docstrings():
    for file in files():
        if not file.startswith(("tppo_kernels/", "python/")) or not file.endswith(".py"):
            continue
        tree = ast.parse((ROOT / file).read_text())
        assert ast.get_docstring(tree), f"{file} says nothing of itself"
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{file}: {node.name} has no docstring"


def test_csrc_is_free_of_torch():
    for path in (ROOT / "csrc").iterdir():
        assert not re.search(r'#include\s*[<"](torch|ATen|c10)', path.read_text()), path.name


def test_structs_of_the_extension_have_the_fields_of_their_tuples():
    """bindings.cpp takes a struct by the order of its fields: a NamedTuple of the same name has the
    same ones in the same order, and there is one for each."""
    text = (ROOT / "csrc/bindings.cpp").read_text()
    structs = {name: re.findall(r"x\.(\w+)", fields)
               for name, fields in re.findall(r"^TPPO_STRUCT\((\w+),(.*?)\);", text, re.M | re.S)}
    tuples = {}
    for path in [ROOT / "tppo_kernels/_kernels/structs.py",
                 *(ROOT / "tppo_kernels/ops").glob("*/_c[pu]*.py")]:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name in structs:
                assert node.name not in tuples, f"{path}: {node.name} is there already"
                tuples[node.name] = [x.target.id for x in node.body
                                     if isinstance(x, ast.AnnAssign)]
    assert structs.pop("GaeMap")  # of a test, which gives it a plain tuple
    assert tuples == structs


def test_the_closing_totals_of_the_tests_are_shown(pytestconfig):
    """A -q of the configuration and one of the command line together hide them."""
    assert "-q" not in pytestconfig.getini("addopts")


def test_nothing_runs_at_a_cost_in_accuracy():
    """-ffast-math flushes denormals process-wide; -march=native breaks on the next machine."""
    text = (ROOT / "setup.py").read_text()
    assert "fast-math" not in text and "march=native" not in text
