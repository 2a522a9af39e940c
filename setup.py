"""Builds `tppo_kernels._C`: C++ wherever a compiler is, CUDA where nvcc is; nothing links torch.

TPPO_BUILD_CUDA=auto|1|0 (default auto) and TPPO_CUDA_ARCHS="80;90;100" choose.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup

ARCHS = os.environ.get("TPPO_CUDA_ARCHS", "80;90;100").split(";")


def find_nvcc():
    """(nvcc or None, why not)."""
    wish = os.environ.get("TPPO_BUILD_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        sys.exit(f"TPPO_BUILD_CUDA is {wish!r}, expected auto, 1 or 0")
    if wish == "0":
        return None, "TPPO_BUILD_CUDA=0 at build time"
    homes = [f"{os.environ[k]}/bin" for k in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(k)]
    nvcc = shutil.which("nvcc", path=os.pathsep.join([*homes, os.environ.get("PATH", "")]))
    if nvcc is None and wish == "1":
        sys.exit("TPPO_BUILD_CUDA=1, but nvcc is neither on PATH nor under CUDA_HOME")
    return nvcc, "" if nvcc else "nvcc was not found at build time"


def toolkit(nvcc):
    """The root that nvcc itself uses: right for wrappers, symlinks and pip layouts."""
    out = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull],
                         capture_output=True, text=True)
    top = re.search(r'^#\$ TOP="?(.*?)"?\s*$', out.stderr + out.stdout, re.MULTILINE)
    return Path(top[1]).resolve() if top else Path(nvcc).resolve().parent.parent


def extension():
    """(ext_modules, cmdclass, the one line that says what is built)."""
    wanted = os.environ.get("CXX", "g++").split()[0]
    if shutil.which(wanted) is None:
        return [], {}, f"pure Python: no compiler {wanted} was found (install g++, or set CXX)"
    from pybind11.setup_helpers import Pybind11Extension, build_ext

    nvcc, why_not = find_nvcc()
    ext = Pybind11Extension("tppo_kernels._C", sorted(map(str, Path("csrc").glob("*.cpp"))),
                            cxx_std=17, extra_compile_args=["-O3", "-pthread"],
                            depends=sorted(map(str, Path("csrc").glob("*"))))
    ext.define_macros += [("TPPO_CUDA", int(bool(nvcc))), ("TPPO_WHY_NO_CUDA", f'"{why_not}"'),
                          ("TPPO_CUDA_ARCHS", f'"{" ".join(ARCHS) * bool(nvcc)}"')]

    class BuildExt(build_ext):
        def build_extension(self, ext):
            if nvcc:
                self.compile_cuda(ext, toolkit(nvcc))
            super().build_extension(ext)

        def compile_cuda(self, ext, root):
            Path(self.build_temp).mkdir(parents=True, exist_ok=True)
            targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHS]
            targets += [f"-gencode=arch=compute_{ARCHS[-1]},code=compute_{ARCHS[-1]}"]
            for source in sorted(Path("csrc").glob("*.cu")):
                target = str(Path(self.build_temp, f"{source.name}.o"))
                self.spawn([nvcc, "-c", str(source), "-o", target, "-O3", "-std=c++17",
                            "--threads", "2", "-Xcompiler", "-fPIC,-fvisibility=hidden", *targets])
                ext.extra_objects.append(target)
            ext.include_dirs.append(str(root / "include"))
            ext.library_dirs += [str(root / "lib64"), str(root / "lib")]
            ext.libraries += ["cudart_static", "rt", "dl", "pthread"]

    cuda = f"CUDA for sm_{', sm_'.join(ARCHS)}" if nvcc else f"no CUDA ({why_not})"
    return [ext], {"build_ext": BuildExt}, f"C++ with {wanted}, {cuda}"


ext_modules, cmdclass, built = extension()
print(f"tppo-kernels: building {built}", file=sys.stderr)
setup(packages=[*find_packages(include=["tppo_kernels*"]), *find_packages("python")],
      package_dir={"tppo": "python/tppo"}, ext_modules=ext_modules, cmdclass=cmdclass)
