"""Builds `tppo_kernels._C`: C++ where a compiler works, CUDA where nvcc does and torch is for CUDA;
nothing links torch.  TPPO_BUILD_CUDA=auto|1|0 and TPPO_CUDA_ARCHS="80;90;100" choose.  What cannot
be built is left out, and why is kept; `setup.py build_ext` and TPPO_BUILD_CUDA=1 fail instead."""
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

WISH, POOL = os.environ.get("TPPO_BUILD_CUDA", "auto"), ThreadPoolExecutor(os.cpu_count())
CXX, STRICT = (os.environ.get("CXX") or "g++").split()[0], WISH == "1" or "build_ext" in sys.argv
ARCHS = os.environ.get("TPPO_CUDA_ARCHS", "80;90;100").split(";")
if WISH not in ("auto", "0", "1") or not all(re.fullmatch(r"\d+[af]?", a) for a in ARCHS):
    sys.exit(f"TPPO_BUILD_CUDA={WISH}, expected auto, 1 or 0; TPPO_CUDA_ARCHS={ARCHS}, all numbers")
HOMES = [f"{os.environ[k]}/bin" for k in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(k)]
NVCC = shutil.which("nvcc", path=os.pathsep.join([*HOMES, os.environ.get("PATH", "")]))
if NVCC is None and WISH == "1":
    sys.exit("TPPO_BUILD_CUDA=1, but nvcc is neither on PATH nor under CUDA_HOME")
TORCH = Path(sysconfig.get_path("purelib"), "torch/version.py")  # in sight of isolated builds too
CPU = WISH == "auto" and TORCH.exists() and re.search(r"(?m)^cuda\b.*= None", TORCH.read_text())
NO_CUDA = ("TPPO_BUILD_CUDA=0 at build time" if WISH == "0" else "nvcc not found" if not NVCC
           else "the installed torch has none, TPPO_BUILD_CUDA=1 builds it anyway" if CPU else "")

def run(command, **_):  # of a failure all output ends the build, or its first error is raised
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode and STRICT:
        sys.exit(f"{' '.join(command)}\n{done.stderr}{done.stdout}exit status {done.returncode}")
    if done.returncode:
        first = re.search(r".*error.*|$", done.stderr + done.stdout, re.IGNORECASE)[0][:300]
        raise RuntimeError(f"{Path(command[0]).name} failed at build time: {first.strip()}")
    print("tppo-kernels: built", Path(command[command.index("-o") + 1]).name, file=sys.stderr)

class Build(build_ext):
    def build_extension(self, ext):
        (note := Path("" if self.inplace else self.build_lib, "tppo_kernels/_why.txt")).unlink(True)
        no_cuda = NO_CUDA or self.without_cuda(ext) or ""
        ext.define_macros += [("TPPO_CUDA", int(not no_cuda)), ("TPPO_WHY_NO_CUDA", f'"{no_cuda}"'),
                              ("TPPO_CUDA_ARCHS", f'"{" ".join(ARCHS) * (not no_cuda)}"')]
        self.compiler.spawn = self.compiler.call = run  # older and newer setuptools
        one = self.compiler.compile  # of one file; a file on each core
        self.compiler.compile = lambda files, **o: sum(POOL.map(lambda f: one([f], **o), files), [])
        try:
            super().build_extension(ext)
        except Exception as error:  # where STRICT holds, `run` has ended the build
            print(f"tppo-kernels: pure Python: {error}", file=sys.stderr)
            note.write_text(str(error), encoding="utf-8")  # read by tppo_kernels/_core/backends.py
            ext.optional = True  # an editable installation looks for its file otherwise

    def without_cuda(self, ext):  # compiles the CUDA part; returns why that failed
        out = [str(Path(self.build_temp, f"{p.name}.o")) for p in Path("csrc").glob("*.cu")]
        how = "-O3 -std=c++17 --threads 0 -Xcompiler -fPIC,-fvisibility=hidden".split()  # all archs
        how += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHS]
        how += [f"-gencode=arch=compute_{ARCHS[-1]},code=compute_{ARCHS[-1]}"]
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        try:
            list(POOL.map(lambda o: run([NVCC, "-c", f"csrc/{Path(o).stem}", "-o", o, *how]), out))
        except (RuntimeError, OSError) as error:
            print(f"tppo-kernels: no CUDA: {error}", file=sys.stderr)
            return re.sub(r"[^\w .,:;/+-]", " ", str(error))  # it becomes a macro
        said = subprocess.getoutput(f'"{NVCC}" --dryrun -x cu -c /dev/null -o /dev/null')
        top = re.search(r'^#\$ TOP="?(.*?)"?\s*$', said, re.MULTILINE)  # the root nvcc itself uses
        root = Path(top[1] if top else Path(NVCC).resolve().parent.parent).resolve()
        ext.include_dirs += [f"{root}/include"]
        ext.extra_objects, ext.library_dirs = out, [f"{root}/lib64", f"{root}/lib"]
        ext.libraries += ["cudart_static", "rt", "dl", "pthread"]

EXT = [Pybind11Extension("tppo_kernels._C", sorted(map(str, Path("csrc").glob("*.cpp"))),
                         cxx_std=17, extra_compile_args=["-O3", "-pthread"],
                         depends=sorted(map(str, Path("csrc").iterdir())))]
CUDA = f"no CUDA ({NO_CUDA})" if NO_CUDA else f"CUDA for {ARCHS}"
print("tppo-kernels: building", f"C++ with {CXX}, {CUDA}" if shutil.which(CXX) else
      f"pure Python: no compiler {CXX} was found (install g++, or set CXX)", file=sys.stderr)
setup(ext_modules=EXT if shutil.which(CXX) else [], cmdclass={"build_ext": Build})
