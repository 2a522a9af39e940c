"""Environments of the trainers that `tppo_kernels.integrations` fits into, and their tests.

    python tests/interop/run.py [--ci] [NAME ...]

Each requirements/NAME.txt is an environment .venv-interop/NAME, made once and again where the file
or what it stands on has changed.  NAME is the peer, or the peer and a version (trl-1.12), and
runs tests/interop/test_PEER*.py, which import the peer without a condition: that it is absent is an
error there.  What a file needs besides pins stands at its head, as `# key: value`:

    base      what the environment sees besides its own packages: "project" (the default), the
              environment that runs this script, with its torch, transformers and pytest; another
              NAME; or "none", where the file lists all of them, pytest and pytest-xdist too
    python    the interpreter, of an environment without a base: python3.12
    no-deps   pins that are installed without what they ask for, separated by spaces
    without   packages that are taken out again: others ask for them and do without
    python-below  a version, as 3.12, and a statement: pins that ask for that version are installed
              into an older interpreter too, where the statement runs before everything else
    ci        "yes": a part of --ci, which leaves tests that are marked slow out and sets
              TPPO_INTEROP_SHORT, by which tests of random cases draw fewer

TORCH_INDEX is a package index for torch alone, as in the Makefile.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
REQUIREMENTS = Path(__file__).resolve().parent / "requirements"
TESTS = Path(__file__).resolve().parent
PIP = (sys.executable, "-m", "pip", "--python")


class Environment:
    """One requirements file and the environment that is made of it."""

    def __init__(self, name: str) -> None:
        self.name, self.file = name, REQUIREMENTS / f"{name}.txt"
        if not self.file.exists():
            raise SystemExit(f"{self.file.relative_to(ROOT)} is not there; the environments are "
                             f"{', '.join(names())}")
        self.text = self.file.read_text()
        head = dict(re.findall(r"^# ([a-z-]+): (.+)$", self.text, re.M))
        unknown = head.keys() - {"base", "python", "no-deps", "without", "python-below", "ci"}
        if unknown:
            raise SystemExit(f"{self.file.relative_to(ROOT)}: unknown key {sorted(unknown)[0]!r}")
        base = head.get("base", "project")
        self.base = None if base in ("project", "none") else Environment(base)
        self.alone = base == "none"
        self.interpreter = head.get("python", sys.executable)
        self.without_dependencies = head.get("no-deps", "").split()
        self.without = head.get("without", "").split()
        self.ci = head.get("ci") == "yes"
        wanted, _, statement = head.get("python-below", "").partition(" ")
        older = wanted and sys.version_info < tuple(map(int, wanted.split(".")))
        self.statement = statement if older else None
        self.folder = ROOT / ".venv-interop" / name
        self.python = self.folder / "bin/python"

    @property
    def mark(self) -> str:
        """Changes where the environment has to be made again."""
        under = self.base.mark if self.base else "" if self.alone else sys.prefix + sys.version
        return hashlib.sha256((self.text + under).encode()).hexdigest()

    def seen(self) -> Path | None:
        """Where the packages lie that this environment sees besides its own."""
        if self.base:
            return self.base.packages()
        return None if self.alone else Path(sysconfig.get_path("purelib"))

    def packages(self) -> Path:
        """Where its own packages lie."""
        return next(self.folder.glob("lib/python3*/site-packages"))

    def make(self) -> None:
        """Makes the environment, unless it is there."""
        ready = self.folder / "ready"
        if self.base:
            self.base.make()
        if ready.exists() and ready.read_text() == self.mark:
            return
        start = time.perf_counter()
        print(f"== making {self.folder.relative_to(ROOT)}", flush=True)
        run(self.interpreter, "-m", "venv", "--clear", "--without-pip", self.folder)
        if (seen := self.seen()) is not None:
            # `addsitedir` reads the .pth files there too: those of the project and of its base
            line = f"import site; site.addsitedir({str(seen)!r})\n"
            (self.packages() / "zz_base.pth").write_text(line)
        if self.statement is not None:
            (self.packages() / "zz_python.pth").write_text(f"{self.statement}\n")
        pins = [line.strip() for line in self.text.splitlines()
                if line.strip() and not line.startswith("#")]
        index = os.environ.get("TORCH_INDEX")
        torch = [pin for pin in pins if pin.startswith("torch==")]
        if torch and index:
            self.install("--index-url", index, *torch)
        if pins:
            self.install(*pins)
        if self.without_dependencies:
            self.install("--no-deps", *self.without_dependencies)
        if self.without:
            run(*PIP, self.python, "uninstall", "--quiet", "--yes", *self.without)
        ready.write_text(self.mark)
        print(f"== {time.perf_counter() - start:.0f} s", flush=True)

    def install(self, *arguments: str) -> None:
        """By the pip of the environment that runs this script, into this one."""
        older = [] if self.statement is None else ["--ignore-requires-python"]
        run(*PIP, self.python, "install", "--quiet", "--disable-pip-version-check", *older,
            *arguments)

    def test(self, ci: bool) -> int:
        """Runs the peer's tests and gives pytest's exit code."""
        files = sorted(TESTS.glob(f"test_{self.name.split('-')[0]}*.py"))
        if not files:
            print(f"tests/interop has no test of {self.name}")
            return 1
        print(f"== {self.name}: {', '.join(file.name for file in files)}", flush=True)
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "TPPO_PEER": self.name,
                   "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}
        selected = ("-m", "not slow") if ci else ()
        if ci:
            environ["TPPO_INTEROP_SHORT"] = "1"
        return subprocess.run(
            [self.python, "-m", "pytest", "--numprocesses", "auto", "--dist", "loadfile",
             *selected, *files], cwd=ROOT, env=environ).returncode


def run(*command: str | Path) -> None:
    """Errors: SystemExit where the command fails."""
    done = subprocess.run(command, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: exit code {done.returncode}")


def names() -> list[str]:
    """The environments that there are."""
    return sorted(file.stem for file in REQUIREMENTS.glob("*.txt"))


def main() -> int:
    """0 where every test of every chosen environment passes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="all of them without a name")
    parser.add_argument("--ci", action="store_true", help="the short form")
    given = parser.parse_args()
    chosen = [Environment(name) for name in given.names or names()]
    failed = []
    for environment in chosen:
        if given.ci and not environment.ci:
            continue
        environment.make()
        if environment.test(given.ci):
            failed.append(environment.name)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return len(failed) > 0


if __name__ == "__main__":
    sys.exit(main())
