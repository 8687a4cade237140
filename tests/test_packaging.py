"""What is installed: isolated build without torch, wheel contents, the state without a compiler."""

import ast
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock

from pyelastic import _extension

ROOT = Path(__file__).parents[1]
SETUP = ROOT / "setup.py"


def _copy(target):
    """A copy of the checkout's files, so that no build writes into it; setuptools reuses what lies in build/."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)
    return target


def _once(tmp_path_factory, name, make):
    """A folder that make(folder) fills, once for all of xdist's processes."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    done = root / f"{name}.done"
    with FileLock(root / f"{name}.lock"):
        if not done.exists():
            make(root / name)
            done.touch()
    return root / name


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    return _once(tmp_path_factory, "source", _copy)


def _run(command, cwd, **environment):
    return subprocess.run(
        [str(c) for c in command], cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment}
    )


def _only(target):
    """For python -S: `target` and the dependencies, without the .pth file that leads back to the checkout."""
    return {"PYTHONPATH": os.pathsep.join([str(target), sysconfig.get_path("purelib")])}


def test_setup_py_is_a_short_driver():
    assert len(SETUP.read_text().splitlines()) <= 120
    # Every variable it reads is in its docstring and in the docs page.
    named = set(re.findall(r"environ(?:\.get)?[(\[]\"(\w+)\"", SETUP.read_text()))
    page = (ROOT / "docs/environment.md").read_text()
    assert named and all(name in ast.get_docstring(ast.parse(SETUP.read_text())) for name in named)
    assert all(f"`{name}`" in page for name in named)


@pytest.fixture(scope="session")
def wheel(source, tmp_path_factory):
    """Built in isolation: pip makes an environment from [build-system] alone, where torch is not. CPU kernels only: the
    checkout's own build has the others."""

    def build(out):
        command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", out, "."]
        done = _run(command, source, MAX_JOBS="2", PYELASTIC_CUDA="OFF")
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert "Collecting torch" not in done.stdout

    out = _once(tmp_path_factory, "wheel", build)
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_isolated_wheel_holds_what_it_should(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for needed in ("_build.json", "py.typed", "_C.pyi", "ops/margin_softmax.py", "nn/margin_softmax.py"):
        assert f"pyelastic/{needed}" in names
    assert "pyelastic/triton_kernels/__init__.py" in names
    assert any(re.fullmatch(r"pyelastic/_C\..*so", name) for name in names)
    # No top-level triton_kernels (another package has that name), no tests, no sources, no emulator.
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"pyelastic"}
    assert not [name for name in names if "emulator" in name or name.endswith((".cu", ".cpp", ".h"))]


@pytest.mark.slow
def test_installed_wheel_runs_kernels_outside_the_checkout(wheel, tmp_path):
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", target, wheel]
    assert _run(install, tmp_path).returncode == 0
    script = (
        "import torch, pyelastic;"
        "assert 'site' in pyelastic.__file__, pyelastic.__file__;"
        "e, w = torch.randn(4, 8), torch.randn(10, 8); y = torch.arange(4);"
        "a = pyelastic.margin_softmax(e, w, y, backend='cpu'); b = pyelastic.margin_softmax(e, w, y, backend='eager');"
        "assert torch.allclose(a, b, rtol=1e-5), (a, b);"
        "import pyelastic.triton_kernels; assert pyelastic.triton_kernels.__name__ == 'pyelastic.triton_kernels'"
    )
    done = _run([sys.executable, "-S", "-c", script], tmp_path, **_only(target))
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def without_compiler(tmp_path_factory):
    """site directory of a `pip install` on a PATH without any compiler."""
    bare, clean = tmp_path_factory.mktemp("bare"), _copy(tmp_path_factory.mktemp("clean"))
    for tool in ("git", "sh", "uname", "env"):
        if shutil.which(tool):
            (bare / tool).symlink_to(shutil.which(tool))
    target = tmp_path_factory.mktemp("pure") / "site"
    environment = {"PATH": str(bare), "CXX": ""}
    command = [sys.executable, "-m", "pip", "install", "-v", "--no-deps", "--no-build-isolation"]
    return target, _run([*command, "--target", target, "."], clean, **environment), environment


@pytest.mark.slow
def test_no_compiler_installs_pure_python_and_says_so(without_compiler, tmp_path):
    target, done, _ = without_compiler
    assert done.returncode == 0, done.stderr[-3000:]
    assert "INSTALLING PURE PYTHON" in done.stdout + done.stderr
    script = (
        "import torch, pyelastic, pyelastic._extension as x;"
        "s = x.state(); assert s.status == 'not built' and 'no C++ compiler' in s.reason, s;"
        "e, w = torch.randn(4, 8, requires_grad=True), torch.randn(10, 8); y = torch.arange(4);"
        "pyelastic.margin_softmax(e, w, y).backward(); assert e.grad.isfinite().all();"
        "why = pyelastic.backends('margin_softmax', e, w, y)['cpu']; assert 'no C++ compiler' in why, why\n"
        "try: pyelastic.margin_softmax(e, w, y, backend='cpu')\n"
        "except pyelastic.BackendError as error: assert 'pip install' in str(error)\n"
        "else: raise SystemExit('backend=cpu ran')\n"
    )
    environment = {**_only(target), "PYELASTIC_STRICT": "0"}
    done = _run([sys.executable, "-S", "-c", script], tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert "no kernel can run this call" in done.stderr  # logged once
    report = _run([sys.executable, "-S", "-m", "pyelastic.info"], tmp_path, **environment)
    assert report.returncode == 0 and "not built" in report.stdout


@pytest.mark.slow
def test_no_compiler_is_an_error_where_the_extension_is_required(without_compiler, source):
    _, _, environment = without_compiler
    command = [sys.executable, "setup.py", "build_ext"]
    done = _run(command, source, **environment, PYELASTIC_REQUIRE_EXTENSION="1")
    assert done.returncode != 0 and "PYELASTIC_REQUIRE_EXTENSION=1" in done.stderr


def _setup_values(memory=None, **environment):
    """What setup.py makes of the environment (and of so many bytes of memory): its functions without setup()."""
    code = "" if memory is None else f"import os; os.sysconf = {{'SC_PAGE_SIZE': 1, 'SC_PHYS_PAGES': {memory}}}.get\n"
    code += "" if memory is None else "os.cpu_count = lambda: 64\n"
    code += f"__file__ = {str(SETUP)!r}\n" + SETUP.read_text().rsplit("\nsetup(", 1)[0]
    code += "\nprint(cuda_archs(), jobs())"
    clean = {"PYELASTIC_CUDA_ARCHS": "", "TORCH_CUDA_ARCH_LIST": "", "MAX_JOBS": ""}
    return _run([sys.executable, "-c", code], ROOT, **{**clean, **environment})


@pytest.mark.parametrize(
    ("environment", "archs"),
    [
        ({}, ""),
        ({"PYELASTIC_CUDA_ARCHS": "80,90a"}, "80,90a"),
        ({"TORCH_CUDA_ARCH_LIST": "8.0;9.0a 10.0+PTX"}, "80,90a,100"),
        ({"PYELASTIC_CUDA_ARCHS": "75", "TORCH_CUDA_ARCH_LIST": "8.0"}, "75"),
    ],
)
def test_cuda_architectures_from_the_environment(environment, archs):
    done = _setup_values(**environment)
    assert done.stdout.split(" ")[0].strip() == archs, done.stderr


def test_wrong_environment_is_refused_by_name():
    done = _setup_values(TORCH_CUDA_ARCH_LIST="Hopper")
    assert done.returncode != 0 and "TORCH_CUDA_ARCH_LIST: Hopper is no architecture" in done.stderr


def test_max_jobs_and_memory_are_honoured():
    assert _setup_values(MAX_JOBS="3").stdout.split()[-1] == "3"
    for gigabytes, jobs in ((1, "1"), (9, "2"), (24, "6"), (512, "8")):
        assert _setup_values(memory=gigabytes << 30).stdout.split()[-1] == jobs


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PYELASTIC_CUDA": "MAYBE"}, "PYELASTIC_CUDA is 'MAYBE'; choose from AUTO, ON, OFF"),
        ({"PYELASTIC_REQUIRE_EXTENSION": "yes"}, "PYELASTIC_REQUIRE_EXTENSION is 'yes'; expected 0 or 1"),
        ({"CXX": "no-such-compiler -O1"}, "CXX is 'no-such-compiler', which is not there"),
        ({"MAX_JOBS": "many"}, "MAX_JOBS is 'many'; expected a number"),
        # Never a silent downgrade: CMake stops, and says which variable names the compiler.
        ({"PYELASTIC_CUDA": "ON", "CUDACXX": "/no/such/nvcc"}, "CUDACXX"),
    ],
)
def test_wrong_build_variables_are_errors(environment, message, source, tmp_path):
    command = [sys.executable, "setup.py", "build_ext", "--build-temp", tmp_path / "t", "--build-lib", tmp_path / "l"]
    done = _run(command, source, **{"PYELASTIC_CUDA": "OFF", **environment})
    assert done.returncode != 0 and message in done.stdout + done.stderr, done.stderr[-2000:]


@pytest.mark.parametrize("choice", ["OFF", "AUTO"])
def test_cuda_off_and_auto_without_nvcc_say_so(choice, source, tmp_path):
    import pybind11

    options = [f"-DPYELASTIC_CUDA={choice}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    command = ["cmake", "-S", source, "-B", tmp_path, "-G", "Ninja", *options, f"-DPython_EXECUTABLE={sys.executable}"]
    done = _run(command, source, CUDACXX="/no/such/nvcc")
    assert done.returncode == 0, done.stderr
    reason = {"OFF": "PYELASTIC_CUDA=OFF", "AUTO": "no CUDA compiler was found"}[choice]
    assert json.loads((tmp_path / "_build.json").read_text())["cuda"] == f"not built: {reason}"


def test_stub_names_what_the_module_has():
    module = _extension.load()
    tree = ast.parse((ROOT / "pyelastic/_C.pyi").read_text())
    stub = {f.name: len(f.args.args) + len(f.args.posonlyargs) for f in tree.body if isinstance(f, ast.FunctionDef)}
    built = {name: getattr(module, name) for name in dir(module) if not name.startswith("_")}
    # The CUDA half is there only where nvcc was.
    assert set(built) <= set(stub) and all(name.startswith("cuda_") for name in set(stub) - set(built))
    for name, function in built.items():
        assert stub[name] == len(re.findall(r"\barg\d+: ", function.__doc__)), function.__doc__


@pytest.mark.skipif(not sys.platform.startswith("linux") or not shutil.which("nm"), reason="needs nm")
def test_module_links_neither_torch_nor_cuda_and_leaks_no_symbol():
    path = Path(_extension.load().__file__)
    needed = _run(["ldd", path], ROOT).stdout
    assert "torch" not in needed and "cudart" not in needed
    exported = _run(["nm", "-D", "--defined-only", path], ROOT).stdout.split("\n")
    names = [line.split()[-1] for line in exported if line]
    assert "PyInit__C" in names
    assert not [name for name in names if "pyelastic" in name and name != "PyInit__C"]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm")
def test_no_weak_symbol_in_objects_of_an_instruction_set(wheel, source):
    """The linker keeps one copy of a weak symbol: it could give AVX-512 code to a machine without it."""
    sets = ("avx2", "avx512", "avx512bf16", "amx")
    objects = [path for isa in sets for path in source.glob(f"build/**/cpu_{isa}.dir/**/*.o")]
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("one instruction set only")
    assert len(objects) >= 2
    for path in objects:
        symbols = _run(["nm", "-C", path], ROOT).stdout
        # DW.ref...: an address for the unwinder, no code.
        weak = [line for line in symbols.splitlines() if re.search(r"^[0-9a-f]+ [WVu] (?!DW\.ref\.)", line)]
        assert not weak, (path.name, weak)
