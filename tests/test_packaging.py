"""sdist -> wheel -> empty environment -> `python -m tppo_kernels`, with and without a compiler."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import tppo_kernels

ROOT = Path(__file__).parent.parent
TYPED = {"tppo/py.typed", "tppo_kernels/py.typed"}


def run(*command, cwd, **env) -> str:
    """What a command prints; a PYTHONPATH would put the tree before what is installed."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env={**inherited, **env},
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The tree packed from a copy of its sources, on a path with a space in it."""
    where = tmp_path_factory.mktemp("a path with spaces") / "tree"
    names = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "tppo_kernels", "csrc", "python")
    where.mkdir()
    for name in names:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, where / name, ignore=shutil.ignore_patterns(
                "*.so", "__pycache__", "*.egg-info"))
        else:
            shutil.copy(source, where / name)
    run(sys.executable, "-m", "build", "--sdist", "--outdir", where / "dist", cwd=where)
    (archive,) = (where / "dist").glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def empty(tmp_path_factory) -> Path:
    """An environment that holds torch and numpy, the only things the library depends on."""
    where = tmp_path_factory.mktemp("an environment") / "env"
    venv.create(where, with_pip=True)
    python = where / "bin/python"
    index = os.environ.get("TORCH_INDEX")
    run(python, "-m", "pip", "install", "-q", f"torch=={torch.__version__.split('+')[0]}", "numpy",
        *(("--extra-index-url", index) if index else ()), cwd=where)
    return python


def unpacked(archive: Path, where: Path) -> Path:
    where.mkdir(exist_ok=True)
    with tarfile.open(archive) as tar:
        tar.extractall(where, filter="data")
    return where / archive.name.removesuffix(".tar.gz")


def wheel(tree: Path, **env: str) -> tuple[Path, str]:
    said = run(sys.executable, "-m", "build", "--wheel", "--outdir", tree / "dist", cwd=tree, **env)
    (built,) = (tree / "dist").glob("*.whl")
    return built, said


def test_the_sdist_holds_every_source_and_nothing_else(sdist):
    with tarfile.open(sdist) as tar:
        names = {n.split("/", 1)[1] for n in tar.getnames() if "/" in n}
    kinds = (".py", ".cpp", ".cu", ".cuh", ".h")
    sources = [p.relative_to(ROOT).as_posix() for folder in ("tppo_kernels", "csrc", "python/tppo")
               for p in (ROOT / folder).rglob("*") if p.suffix in kinds]
    assert not [s for s in sources if s not in names]
    assert {"LICENSE", "README.md", "setup.py", "pyproject.toml"} <= names
    assert not [n for n in names if n.endswith((".so", ".pyc")) or n.startswith("tests")]
    assert TYPED <= names | {n.removeprefix("python/") for n in names}


def test_wheels_without_docker_are_one_sentence(tmp_path):
    """Before anything is installed: the first thing that `make wheel` does is to ask for docker."""
    (tmp_path / "docker").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "docker").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["make", "wheel"], cwd=ROOT, env={**os.environ, "PATH": path},
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "no docker daemon answers here: install docker" in done.stdout


def test_the_citation_is_of_this_version_and_of_the_paper():
    yaml = pytest.importorskip("yaml")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == tppo_kernels.__version__ and cited["license"] == "Apache-2.0"
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    (paper,) = cited["references"]
    assert paper["year"] == 2025 and paper["authors"][0]["family-names"] == "Ouyang"


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler here: g++ is not installed")
def test_with_a_compiler(sdist, empty, tmp_path):
    built, said = wheel(unpacked(sdist, tmp_path), TPPO_BUILD_CUDA="0")
    assert "tppo-kernels: building C++ with g++, no CUDA (TPPO_BUILD_CUDA=0 at build time)" in said
    names = zipfile.ZipFile(built).namelist()
    assert any("_C." in n for n in names) and set(names) >= TYPED
    assert {n.split("/")[0].partition("-")[0] for n in names} == {"tppo", "tppo_kernels"}
    run(empty, "-m", "pip", "install", "-q", "--force-reinstall", "--no-deps", built, cwd=tmp_path)
    said = run(empty, "-m", "tppo_kernels", cwd=tmp_path)
    assert "compiled part C++, no CUDA: TPPO_BUILD_CUDA=0 at build time" in said
    assert "self-test: all passed" in said and "cpp" in said


def test_without_a_compiler(sdist, empty, tmp_path):
    built, said = wheel(unpacked(sdist, tmp_path), CXX="no-such-compiler")
    assert "building pure Python: no compiler no-such-compiler was found (install g++" in said
    assert built.name.endswith("py3-none-any.whl")
    run(empty, "-m", "pip", "install", "-q", "--force-reinstall", "--no-deps", built, cwd=tmp_path)
    said = run(empty, "-m", "tppo_kernels", cwd=tmp_path)
    assert "no compiled part" in said and "self-test: all passed" in said


@pytest.fixture
def broken(tmp_path) -> dict[str, str]:
    """A PATH whose compilers are there and fail, as without Python's headers."""
    tools = tmp_path / "broken tools"
    tools.mkdir()
    for name in ("cc", "gcc", "c++", "g++"):
        (tools / name).write_text(
            "#!/bin/sh\necho 'In file included from csrc/bindings.cpp:1:' >&2\n"
            "echo 'pybind11.h:5:10: fatal error: Python.h: No such file or directory' >&2\n"
            "echo 'compilation terminated.' >&2\nexit 1\n")
        (tools / name).chmod(0o755)
    return {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "CXX": "g++", "CC": "gcc",
            "TPPO_BUILD_CUDA": "0"}


REASON = ("g++ failed at build time: pybind11.h:5:10: fatal error: Python.h: No such file or "
          "directory")


def test_pip_installs_the_rest_where_the_compiler_cannot_build(sdist, empty, tmp_path, broken):
    said = run(empty, "-m", "pip", "install", "-v", "--force-reinstall", "--no-deps",
               unpacked(sdist, tmp_path / "tree"), cwd=tmp_path, **broken)
    assert said.count(f"tppo-kernels: pure Python: {REASON}") == 1
    said = run(empty, "-m", "tppo_kernels", cwd=tmp_path)
    assert f"compiled part none: no compiled part ({REASON}): install" in said
    assert "self-test: all passed" in said


def setup_py(tree, *command, python=sys.executable, **env):
    return subprocess.run([python, "setup.py", *command], cwd=tree, capture_output=True,
                          text=True, env={**os.environ, **env}, timeout=600)


@pytest.fixture
def without_torch(tmp_path) -> dict[str, str]:
    """An environment of its own whose packages are those of this one, looked up elsewhere: as pip's
    isolated build finds what it needs, with a torch in the environment or without."""
    venv.create(tmp_path / "bare", with_pip=False)
    return {"python": str(tmp_path / "bare/bin/python"),
            "PYTHONPATH": sysconfig.get_path("purelib")}


@pytest.fixture
def fake_nvcc(tmp_path) -> Path:
    """A CUDA_HOME whose nvcc fails."""
    (home := tmp_path / "cuda").joinpath("bin").mkdir(parents=True)
    (home / "bin/nvcc").write_text(
        "#!/bin/sh\necho 'host_config.h:143:2: error: #error -- unsupported GNU version!' >&2\n"
        "exit 2\n")
    (home / "bin/nvcc").chmod(0o755)
    return home


def of_one_source(tree: Path) -> Path:
    """The tree with an extension of one short source, which says as much as all, sooner."""
    for source in (tree / "csrc").glob("*.cpp"):
        source.unlink()
    (tree / "csrc/bindings.cpp").write_text(
        '#include <Python.h>\nstatic PyModuleDef C = {PyModuleDef_HEAD_INIT, "_C"};\n'
        "PyMODINIT_FUNC PyInit__C() {\n  PyObject *m = PyModule_Create(&C);\n"
        '  PyModule_AddStringConstant(m, "why_no_cuda", TPPO_WHY_NO_CUDA);\n  return m;\n}\n')
    return tree


def test_a_compiler_without_its_second_half_and_a_developers_build(sdist, tmp_path, broken):
    tree = unpacked(sdist, tmp_path / "tree")
    tool = tmp_path / "broken tools" / "g++"
    said = "g++: fatal error: cannot execute 'cc1plus': execvp: No such file or directory"
    tool.write_text(f'#!/bin/sh\necho "{said}" >&2\nexit 1\n')
    done = setup_py(tree, "build", **broken)
    assert done.returncode == 0 and done.stderr.count("cc1plus") == 1, done.stderr
    (note,) = (tree / "build").glob("lib*/tppo_kernels/_why.txt")
    assert note.read_text() == f"g++ failed at build time: {said}"
    done = setup_py(tree, "build_ext", **broken)  # whoever changes csrc wants the error
    assert done.returncode and said in done.stderr and "bindings.cpp" in done.stderr
    done = setup_py(tree, "build", **{**broken, "TPPO_CUDA_ARCHS": "80;;x"})
    assert done.returncode and "TPPO_CUDA_ARCHS=['80', '', 'x'], all numbers" in done.stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler here: g++ is not installed")
def test_an_nvcc_that_fails_costs_the_cuda_part_alone(sdist, tmp_path, without_torch, fake_nvcc):
    tree, home = of_one_source(unpacked(sdist, tmp_path / "tree")), fake_nvcc
    done = setup_py(tree, "build", CUDA_HOME=str(home), TPPO_BUILD_CUDA="auto", CXX="g++",
                    **without_torch)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no CUDA: nvcc failed at build time: host_config.h:143:2: error") == 1
    (built,) = (tree / "build").glob("lib*/tppo_kernels/_C*.so")
    why = run(sys.executable, "-c", "import _C; print(_C.why_no_cuda)", cwd=built.parent)
    assert why.startswith("nvcc failed at build time: host_config.h:143:2: error:")
    done = setup_py(tree, "build", CUDA_HOME=str(home), TPPO_BUILD_CUDA="1", CXX="g++")
    assert done.returncode and "unsupported GNU version" in done.stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler here: g++ is not installed")
@pytest.mark.parametrize("cuda, skipped", [("None", True), ("'13.0'", False)])
def test_cuda_is_skipped_with_a_line_where_torch_has_none(sdist, tmp_path, without_torch, fake_nvcc,
                                                          cuda, skipped):
    tree = of_one_source(unpacked(sdist, tmp_path / "tree"))
    torch_there = next((tmp_path / "bare/lib").glob("python*/site-packages")) / "torch"
    torch_there.mkdir()
    text = Path(torch.__file__).with_name("version.py").read_text()
    text, count = re.subn(r"(?m)^(cuda\b.*= ).*$", rf"\g<1>{cuda}", text)
    assert count == 1  # the file of a real torch, in which one line is another
    (torch_there / "version.py").write_text(text)
    done = setup_py(tree, "build", CUDA_HOME=str(fake_nvcc), TPPO_BUILD_CUDA="auto", CXX="g++",
                    **without_torch)
    assert done.returncode == 0, done.stderr
    said = "building C++ with g++, no CUDA (the installed torch has none, TPPO_BUILD_CUDA=1 builds"
    assert (said in done.stderr) is skipped
    assert ("unsupported GNU version" in done.stderr) is not skipped
    built = re.findall(r"tppo-kernels: built (\S+)", done.stderr)  # the progress of the build
    assert built[0] == "bindings.o" and built[1].startswith("_C.") and len(built) == 2
    (file,) = (tree / "build").glob("lib*/tppo_kernels/_C*.so")
    why = run(sys.executable, "-c", "import _C; print(_C.why_no_cuda)", cwd=file.parent)
    assert why.startswith("the installed torch has none" if skipped else "nvcc failed")


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core: one file after another")
def test_sources_are_compiled_at_once(sdist, tmp_path, without_torch):
    """Both compilers here wait until there are two of them: one after another, each is alone."""
    tree = unpacked(sdist, tmp_path / "tree")
    for source in (*(tree / "csrc").glob("*.cpp"), *(tree / "csrc").glob("*.cu")):
        source.unlink()
    for name in ("bindings.cpp", "other.cpp", "a.cu", "b.cu"):
        (tree / "csrc" / name).write_text("")
    for name in ("nvcc", "g++"):
        tool, begun = tmp_path / "bin" / name, tmp_path / f"begun {name}"
        tool.parent.mkdir(exist_ok=True)
        begun.mkdir()
        tool.write_text(
            f'#!/bin/bash\ntouch "{begun}/$$"\nfor _ in {{1..100}}; do\n'
            f'  [ $(ls "{begun}" | wc -l) = 2 ] && echo "error: two" >&2 && sleep 1 && exit 1\n'
            '  sleep 0.1\ndone\necho "error: alone" >&2\nexit 1\n')
        tool.chmod(0o755)
    done = setup_py(tree, "build", CUDA_HOME=str(tmp_path), TPPO_BUILD_CUDA="auto",
                    CXX=str(tmp_path / "bin/g++"), **without_torch)
    assert "no CUDA: nvcc failed at build time: error: two" in done.stderr, done.stderr
    assert "pure Python: g++ failed at build time: error: two" in done.stderr, done.stderr


def test_a_wish_for_cuda_that_cannot_be_met_stops_the_build(sdist, tmp_path):
    tree = unpacked(sdist, tmp_path)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("g++", "python3"):
        if shutil.which(name):
            (tools / name).symlink_to(shutil.which(name))
    env = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH")}
    done = subprocess.run([sys.executable, "setup.py", "build_ext"], cwd=tree, capture_output=True,
                          text=True, env={**env, "PATH": str(tools), "TPPO_BUILD_CUDA": "1"})
    assert done.returncode and "TPPO_BUILD_CUDA=1, but nvcc is neither" in done.stderr


def test_the_command_line_says_what_is_missing(empty, tmp_path, sdist):
    built, _ = wheel(unpacked(sdist, tmp_path), CXX="no-such-compiler")
    run(empty, "-m", "pip", "install", "-q", "--force-reinstall", "--no-deps", built, cwd=tmp_path)
    done = subprocess.run([empty, "-m", "tppo", "run", "--help"], capture_output=True, text=True,
                          cwd=tmp_path)
    assert done.returncode and "pip install 'tppo-kernels[train]'" in done.stderr
    assert "Traceback" not in done.stderr
