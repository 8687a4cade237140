"""Drives CMake: environment -> CMake options, nothing else. The build is described in CMakeLists.txt.

Variables: PYELASTIC_CUDA (AUTO, ON, OFF), PYELASTIC_CUDA_ARCHS ("80,90a"), TORCH_CUDA_ARCH_LIST ("8.0 9.0a", used if
the former is unset), PYELASTIC_REQUIRE_EXTENSION=1 (fail instead of installing pure Python where no compiler exists),
MAX_JOBS, CXX.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def jobs() -> int:
    """MAX_JOBS, or what the memory allows at 4 GB a compiler: builds of CUDA code have frozen machines."""
    asked = os.environ.get("MAX_JOBS")
    if asked:
        if not asked.isdecimal():
            raise SystemExit(f"MAX_JOBS is '{asked}'; expected a number")
        return max(1, int(asked))
    try:
        gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, ValueError, OSError):
        gigabytes = 4.0
    return max(1, min(os.cpu_count() or 1, int(gigabytes / 4), 8))


def cuda_archs() -> str:
    """Comma-separated architectures from the environment, "" for CMakeLists.txt's default."""
    own = os.environ.get("PYELASTIC_CUDA_ARCHS", "")
    text = own or os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    archs = [a.replace("+PTX", "").replace(".", "") for a in re.split(r"[\s;,]+", text) if a]
    wrong = [a for a in archs if not re.fullmatch(r"\d{2,3}[af]?", a)]
    if wrong:
        name = "PYELASTIC_CUDA_ARCHS" if own else "TORCH_CUDA_ARCH_LIST"
        raise SystemExit(f"{name}: {', '.join(wrong)} is no architecture; write e.g. 80,90a or 8.0 9.0a")
    return ",".join(archs)


def cxx_compiler() -> str | None:
    """The C++ compiler, or None if this machine has none at all."""
    named = os.environ.get("CXX", "").split()
    if named:
        if shutil.which(named[0]) is None:
            raise SystemExit(f"CXX is '{named[0]}', which is not there")
        return shutil.which(named[0])
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        metadata = target.parent / "_build.json"
        required = os.environ.get("PYELASTIC_REQUIRE_EXTENSION", "0")
        if required not in ("0", "1", ""):
            raise SystemExit(f"PYELASTIC_REQUIRE_EXTENSION is '{required}'; expected 0 or 1")
        if cxx_compiler() is None:
            # No compiler is a state, not a crash; a compile *error* below is one.
            reason = "no C++ compiler was found at installation (CXX, c++, g++, clang++)"
            if required == "1":
                raise SystemExit(f"pyelastic: {reason}, and PYELASTIC_REQUIRE_EXTENSION=1")
            print(f"pyelastic: {reason}; INSTALLING PURE PYTHON, only backend='eager' will run", file=sys.stderr)
            metadata.write_text(json.dumps({"not_built": reason}) + "\n")
            return
        import pybind11

        cuda = os.environ.get("PYELASTIC_CUDA", "AUTO").upper()
        if cuda not in ("AUTO", "ON", "OFF"):
            raise SystemExit(f"PYELASTIC_CUDA is '{cuda}'; choose from AUTO, ON, OFF")
        build = Path(self.build_temp).resolve() / "cmake"
        cmake = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPYELASTIC_CUDA={cuda}", f"-DPYELASTIC_CUDA_ARCHS={cuda_archs()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
        ]  # fmt: skip
        subprocess.run(cmake, check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", str(jobs())], check=True)
        shutil.copyfile(build / "_build.json", metadata)

    def get_outputs(self) -> list[str]:
        return [output for output in super().get_outputs() if Path(output).exists()]

    def copy_extensions_to_source(self) -> None:
        """For editable installs: the module and its metadata, whichever were built."""
        built = Path(self.build_lib) / "pyelastic"
        for ext in self.extensions:
            for name in (Path(self.get_ext_filename(ext.name)).name, "_build.json"):
                if (built / name).exists():
                    shutil.copyfile(built / name, ROOT / "pyelastic" / name)


setup(ext_modules=[Extension("pyelastic._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
