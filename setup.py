"""Builds `tppo_kernels._C`: the C++ part wherever a compiler is, the CUDA part where nvcc is.

TPPO_BUILD_CUDA=auto|1|0 (default auto) and TPPO_CUDA_ARCHS="80;90;100" choose; nothing links torch.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ARCHS = os.environ.get("TPPO_CUDA_ARCHS", "80;90;100").split(";")


def find_nvcc():
    """(nvcc or None, why not)."""
    wish = os.environ.get("TPPO_BUILD_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        sys.exit(f"TPPO_BUILD_CUDA is {wish!r}, expected auto, 1 or 0")
    if wish == "0":
        return None, "TPPO_BUILD_CUDA=0 at build time"
    homes = [Path(os.environ[k], "bin") for k in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(k)]
    path = os.pathsep.join([*map(str, homes), os.environ.get("PATH", "")])
    nvcc = shutil.which("nvcc", path=path)
    if nvcc is None and wish == "1":
        sys.exit("TPPO_BUILD_CUDA=1, but nvcc is neither on PATH nor under CUDA_HOME")
    return nvcc, "" if nvcc else "nvcc was not found at build time"


def toolkit(nvcc):
    """The root that nvcc itself uses: right for wrappers, symlinks and pip layouts."""
    probe = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    out = subprocess.run(probe, capture_output=True, text=True)
    for line in (out.stderr + out.stdout).splitlines():
        if line.startswith("#$ TOP="):
            return Path(line.split("=", 1)[1].strip().strip('"')).resolve()
    return Path(nvcc).resolve().parent.parent


def extension():
    """(ext_modules, cmdclass, the one line that says what is built)."""
    compiler = shutil.which(os.environ.get("CXX", "c++").split()[0]) or shutil.which("g++")
    if compiler is None:
        return [], {}, "pure Python: no C++ compiler was found (install g++ for the compiled part)"
    from pybind11.setup_helpers import Pybind11Extension, build_ext

    nvcc, why_not = find_nvcc()
    ext = Pybind11Extension("tppo_kernels._C", sorted(map(str, Path("csrc").glob("*.cpp"))),
                            cxx_std=17, extra_compile_args=["-O3", "-pthread"],
                            depends=sorted(map(str, Path("csrc").glob("*.*h"))))
    ext.define_macros += [("TPPO_CUDA", int(bool(nvcc))),
                          ("TPPO_CUDA_ARCHS", f'"{" ".join(ARCHS) if nvcc else ""}"'),
                          ("TPPO_WHY_NO_CUDA", f'"{why_not}"')]

    class BuildExt(build_ext):
        def build_extension(self, ext):
            if nvcc:
                self.compile_cuda(ext)
            super().build_extension(ext)

        def compile_cuda(self, ext):
            root, build = toolkit(nvcc), Path(self.build_temp)
            build.mkdir(parents=True, exist_ok=True)
            targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHS]
            targets.append(f"-gencode=arch=compute_{ARCHS[-1]},code=compute_{ARCHS[-1]}")
            for source in sorted(Path("csrc").glob("*.cu")):
                target = str(build / f"{source.name}.o")
                self.spawn([nvcc, "-c", str(source), "-o", target, "-O3", "-std=c++17", "-lineinfo",
                            "--threads", "2", "-Xcompiler", "-fPIC,-fvisibility=hidden", *targets])
                ext.extra_objects.append(target)
            ext.include_dirs.append(str(root / "include"))
            ext.library_dirs += [str(p) for p in (root / "lib64", root / "lib") if p.exists()][:1]
            ext.libraries += ["cudart_static", "rt", "dl", "pthread"]

    cuda = f"CUDA for sm_{', sm_'.join(ARCHS)}" if nvcc else f"no CUDA ({why_not})"
    return [ext], {"build_ext": BuildExt}, f"C++ with {compiler}, {cuda}"


ext_modules, cmdclass, built = extension()
print(f"tppo-kernels: building {built}", file=sys.stderr)
setup(packages=["tppo_kernels", "tppo_kernels.ops",
                *(f"tppo_kernels.ops.{p.parent.name}"
                  for p in sorted(Path("tppo_kernels/ops").glob("*/__init__.py"))), "tppo"],
      package_dir={"tppo": "python/tppo"}, ext_modules=ext_modules, cmdclass=cmdclass)
