"""The dispatcher: precedence, the error catalogue of design section 7, and that nothing is downgraded in silence."""

import dataclasses
import logging
import os
import shutil
import subprocess
import sys
import types
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

import pyelastic
from pyelastic import BackendError, _dispatch, _extension

OP = "margin_softmax"


@pytest.fixture
def call():
    return torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 4, 2])


@pytest.fixture
def toy(monkeypatch):
    """An op of its own, so that each row of the catalogue can be brought about."""
    monkeypatch.setattr(_dispatch, "_ops", dict(_dispatch._ops))
    return "toy"


class Call:
    def __init__(self, dtype=torch.float32, device="cpu"):
        self.device, self.dtype, self.dtype_argument = torch.device(device), dtype, "queries"


def make(name, why=None):
    return _dispatch.Backend(name, lambda *inputs: name, lambda call: why(call) if callable(why) else why)


def register(op, **reasons):
    table = [make(name, reasons.get(name)) for name in _dispatch.BACKENDS]
    _dispatch.register(op, *table, make_call=lambda call: call)


def only_floats(call):
    return _dispatch.unsupported_dtype(call, (torch.float16, torch.bfloat16, torch.float32))


def test_explicit_backend_that_cannot_run_says_why_and_what_to_do(toy):
    register(toy, cuda=only_floats)
    with pytest.raises(BackendError) as error:
        _dispatch.resolve(toy, Call(torch.float64), "cuda")
    assert str(error.value) == (
        "toy: backend 'cuda' cannot run this call: queries is float64; supported: float16, bfloat16, float32. "
        "Use backend='eager' or queries.float()."
    )


def test_auto_that_finds_nothing_lists_a_line_per_backend(toy):
    register(toy, cpu="no compiler", eager="sparse")
    with pytest.raises(BackendError) as error:
        _dispatch.resolve(toy, Call())
    assert str(error.value) == "toy: no backend can run this call\ncpu: no compiler\neager: sparse"


@pytest.mark.parametrize("how", ["argument", "context", "environment"])
def test_unknown_name_is_refused(call, how):
    choices = "unknown backend 'cud'; choose from auto, cuda, triton, cpu, eager"
    if how == "argument":
        with pytest.raises(ValueError, match=f"^{OP}: {choices}$"):
            pyelastic.margin_softmax(*call, backend="cud")
    elif how == "context":
        with pytest.raises(ValueError, match=f"^use_backend: {choices}$"), pyelastic.use_backend("cud"):
            pass
    else:
        done = child("import pyelastic; pyelastic.backends", PYELASTIC_BACKEND=f"{OP}=cud")
        assert f"ValueError: PYELASTIC_BACKEND: {choices}" in done.stderr


def test_unknown_op_is_refused():
    """A misspelt op would leave the request without effect, unnoticed."""
    refused = pytest.raises(ValueError, match=r"^use_backend: unknown op 'maxsin'; choose from ")
    with refused, pyelastic.use_backend("maxsim=cpu,maxsin=cpu"):
        pass
    assert not _dispatch._requests
    done = child("import pyelastic; pyelastic.maxsim", PYELASTIC_BACKEND="maxsin=cpu")
    assert "ValueError: PYELASTIC_BACKEND: unknown op 'maxsin'; choose from " in done.stderr
    assert "maxsim" in done.stderr


@pytest.mark.parametrize("status", ["not built", "broken"])
def test_missing_module_shows_state_reason_and_cure(call, monkeypatch, status):
    state = _extension.State(status, "the reason", "the cure")
    monkeypatch.setattr(_extension, "_loaded", (None, state))
    with pytest.raises(BackendError) as error:
        pyelastic.margin_softmax(*call, backend="cpu")
    text = f"the compiled module is {status} (the reason); the cure"
    assert text in str(error.value) and "Use backend='eager'" in str(error.value)
    assert pyelastic.backends(OP, *call)["cpu"] == text
    with pytest.raises(BackendError, match="the cure"):
        _extension.load()


def test_a_module_that_does_not_load_is_broken_and_says_so(tmp_path):
    """A real one: the package beside a file that is no module. The report still prints."""
    package = Path(pyelastic.__file__).parent
    ignored = shutil.ignore_patterns("_C*", "_build.json", "__pycache__", "triton_kernels")
    shutil.copytree(package, tmp_path / "pyelastic", ignore=ignored)
    (tmp_path / "pyelastic" / f"_C{EXTENSION_SUFFIXES[0]}").write_bytes(b"no module")
    code = "import torch, pyelastic; x = torch.ones(2, 3); y = torch.zeros(2).long(); "
    code += f"assert pyelastic.__file__.startswith({str(tmp_path)!r}); "
    code += "pyelastic.margin_softmax(x, x, y, backend='cpu')"
    done = child(code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert "BackendError: margin_softmax: backend 'cpu' cannot run this call: " in done.stderr
    assert "the compiled module is broken (ImportError: " in done.stderr
    assert "pip install --force-reinstall" in done.stderr
    report = child("from pyelastic import info; info.main([])", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert report.returncode == 0 and "'status': 'broken'" in report.stdout and "margin_softmax  cpu" in report.stdout


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        ("80,90a,100", (8, 0), True),
        ("80,90a,100", (8, 9), True),  # machine code of 8.0
        ("80,90a,100", (9, 0), True),
        ("80,90a,100", (12, 0), True),  # PTX of 10.0
        ("90a", (8, 0), False),
        ("90a", (10, 0), True),
        ("80,100", (9, 0), False),
        ("86", (8, 0), False),
        ("not said", (9, 0), True),
    ],
)
def test_missing_architecture_is_named_with_its_cure(monkeypatch, built, capability, runs):
    module = types.SimpleNamespace(cuda_mma_gemm=None)
    monkeypatch.setattr(_extension, "_emulator", None)
    monkeypatch.setattr(_extension, "_loaded", (module, _extension.State("built")))
    monkeypatch.setattr(_extension, "build_metadata", lambda: {"cuda": f"built for {built}"})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    reason = _extension.cuda_why_not("cuda:0")
    arch = f"{capability[0]}{capability[1]}"
    assert (reason is None) == runs
    assert runs or (f"cuda:0 is sm_{arch} and" in reason and f"PYELASTIC_CUDA_ARCHS={arch}" in reason)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 7.5; the kernels need 8.0" in _extension.cuda_why_not("cuda:0")


def test_nondeterministic_backend_is_refused_in_deterministic_mode(toy):
    """The test suite runs in that mode: conftest.py."""
    table = [make(name) for name in ("triton", "cpu", "eager")]
    cuda = dataclasses.replace(make("cuda"), deterministic=False)
    _dispatch.register(toy, cuda, *table, make_call=lambda call: call)
    with pytest.raises(BackendError, match=r"'cuda' cannot.*it is not deterministic.*: triton, cpu, eager"):
        _dispatch.resolve(toy, Call(), "cuda")
    assert _dispatch.resolve(toy, Call(device="cuda")).name == "triton"
    assert "not deterministic" in pyelastic.backends(toy, Call())["cuda"]
    torch.use_deterministic_algorithms(False)  # the fixture of conftest.py puts it back
    assert _dispatch.resolve(toy, Call(device="cuda")).name == "cuda"


def test_not_implemented_shows_its_reason(toy):
    table = [make(name) for name in ("triton", "cpu", "eager")]
    register_call = {"make_call": lambda call: call}
    _dispatch.register(toy, _dispatch.not_implemented("cuda", "too small to gain"), *table, **register_call)
    with pytest.raises(BackendError, match="not implemented: too small to gain"):
        _dispatch.resolve(toy, Call(), "cuda")


def test_an_op_registers_every_backend_once(toy):
    with pytest.raises(ValueError, match="register each of"):
        _dispatch.register(toy, make("cpu"), make("eager"), make_call=None)


# --- precedence ---


def resolved(op="toy", argument="auto"):
    return _dispatch.resolve(op, Call(), argument).name


def test_argument_beats_context_beats_environment_beats_auto(toy, monkeypatch):
    register(toy)
    assert resolved() == "cpu"
    monkeypatch.setattr(_dispatch, "_environment", {"*": "triton"})
    assert resolved() == "triton"
    with pyelastic.use_backend("cuda"):
        assert resolved() == "cuda"
        assert resolved(argument="eager") == "eager"
        with pyelastic.use_backend("toy=eager"):
            assert resolved() == "eager"
        with pyelastic.use_backend("maxsim=eager"):
            assert resolved() == "cuda"  # the outer block still holds
        with pyelastic.use_backend("auto"):
            assert resolved() == "cuda"  # auto asks for nothing
    assert resolved() == "triton"


def test_environment_names_ops(toy, monkeypatch):
    register(toy)
    monkeypatch.setattr(_dispatch, "_environment", _dispatch._parse("other=cuda, toy=eager", "PYELASTIC_BACKEND"))
    assert resolved() == "eager"


def test_context_is_left_after_an_exception(toy):
    register(toy)
    with pytest.raises(KeyError), pyelastic.use_backend("eager"):
        raise KeyError
    assert resolved() == "cpu"


def test_auto_follows_the_device(toy):
    register(toy, cuda="too old a GPU")
    assert _dispatch.resolve(toy, Call(device="cuda")).name == "triton"
    assert _dispatch.resolve(toy, Call(device="meta")).name == "triton"


# --- no silent downgrade ---


def test_fall_back_is_logged_once_per_reason(toy, monkeypatch, caplog):
    monkeypatch.setattr(_dispatch, "_strict", False)
    monkeypatch.setattr(_dispatch, "_logged", set())
    register(toy, cpu=only_floats)
    with caplog.at_level(logging.WARNING, "pyelastic"):
        assert [_dispatch.resolve(toy, Call(torch.float64)).name for _ in range(3)] == ["eager"] * 3
        _dispatch.resolve(toy, Call(torch.int8))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2 and "queries is float64" in messages[0] and "queries is int8" in messages[1]


def test_strict_makes_the_fall_back_an_error_but_not_the_wish(toy, monkeypatch):
    monkeypatch.setattr(_dispatch, "_strict", True)
    register(toy, cpu="no compiler")
    with pytest.raises(BackendError, match=r"(?s)cpu: no compiler.*PYELASTIC_STRICT=1"):
        _dispatch.resolve(toy, Call())
    assert resolved(argument="eager") == "eager"


@pytest.mark.parametrize("name", ["PYELASTIC_STRICT", "PYELASTIC_DEBUG"])
def test_flags_are_validated(name):
    done = child("import pyelastic; pyelastic.backends", **{name: "yes"})
    assert f"ValueError: {name} is 'yes'; expected 0 or 1" in done.stderr


def child(code, cwd=None, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env={**os.environ, **environment}
    )


# --- the public view ---


def test_backends_explains_each(call):
    table = pyelastic.backends(OP, *call)
    assert set(table) == set(_dispatch.BACKENDS)
    assert table["eager"] is None and table["cpu"] is None
    with pytest.raises(ValueError, match="unknown op 'softmax'; choose from"):
        pyelastic.backends("softmax")


def test_resolution_is_traced_without_a_graph_break(call):
    def loss(e, w, labels):
        with pyelastic.use_backend("eager"):
            return pyelastic.margin_softmax(e, w, labels, scale=8.0)

    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: pyelastic.margin_softmax(*x, scale=8.0), fullgraph=True, backend="eager")
    assert torch.allclose(compiled(*call), loss(*call), rtol=1e-5)
