"""The benchmark harness: wrong results get no time, truth is the truth, reports and memory probe work."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench_margin_softmax as bench
from benchmarks import bench_maxsim, bench_projection, harness, report

CASE = bench.Case(16, 512, 300)
PEAKS = {"gemm_gflop_per_s": 100.0, "copy_gb_per_s": 10.0}


def _dropped_class(e, w, labels):
    """The planted bug: the last class is forgotten."""
    return bench.lean(e, w[:-1], labels)


def _measured(monkeypatch, extra):
    monkeypatch.setattr(harness, "peak_memory", lambda *arguments: (3 << 20, 1 << 20))
    monkeypatch.setattr(CASE.__class__, "inputs", _inputs)
    ours = {"pyelastic eager": harness.Variant(bench._ours("eager"), bench.FLOAT32)}
    fake = SimpleNamespace(**vars(bench))
    fake.variants = lambda case, device: {**ours, **extra}
    return harness.measure(fake, CASE, 4, lambda text: None)


_original = bench.Case.inputs


def _inputs(self, seed, device):
    e, w, labels = _original(self, seed, device)
    return e, w, labels % (self.classes - 1)  # the last class is never a target


@pytest.mark.parametrize(
    "wrong", [_dropped_class, lambda *x: 1.0001 * bench.lean(*x), lambda *x: bench.lean(*x) * torch.nan]
)
def test_wrong_variant_gets_no_time(monkeypatch, wrong):
    planted = {"wrong": harness.Variant(wrong, bench.FLOAT32), "right": harness.Variant(bench.lean, bench.FLOAT32)}
    rows = _measured(monkeypatch, planted)["rows"]
    assert rows["wrong"]["failed"].startswith("ORACLE") and "step_s" not in rows["wrong"]
    assert len(rows["right"]["step_s"]) == 4 and min(rows["right"]["step_s"]) > 0


def test_variant_that_raises_is_a_result(monkeypatch):
    def broken(e, w, labels):
        raise ValueError("no such kernel")

    result = _measured(monkeypatch, {"broken": harness.Variant(broken, 1.0)})
    assert result["rows"]["broken"]["failed"] == "ValueError: no such kernel"
    table = report.lines(result, PEAKS)
    assert table[-1][:2] == ("broken", "ValueError: no such kernel")
    assert result["ours"] == "pyelastic eager"
    ours = next(cells for cells in table if cells[0] == "pyelastic eager")
    ours = dict(zip(report.columns(result), ours, strict=True))
    assert ours["vs ours"] == "1.00x" and ours["peak MiB beyond gradients"] == "2"
    time = harness.median(result["rows"]["pyelastic eager"]["step_s"])
    assert ours["% of GEMM peak"] == f"{100 * 6 * 16 * 512 * 300 / time / 100e9:.0f} %"
    assert ours["% of copy"] == f"{100 * 12 * 512 * (300 + 16) / time / 10e9:.0f} %"


def test_truth_is_the_textbook_formula():
    e, w, labels = bench.Case(16, 24, 300).inputs(3, "cpu")
    leaves = [x.double().requires_grad_() for x in (e, w)]
    loss = bench.official(*leaves, labels)
    loss.backward()
    got = bench.truth(e, w, labels)
    assert harness.errors(got[:2], (loss.detach(), leaves[0].grad)) < [1e-12, 1e-12]
    assert harness.errors(got[2:], (leaves[1].grad.float(),)) < [1e-7]


RERANK, TRAIN = bench_maxsim.Case("rerank", 40, 8, 30, 32), bench_maxsim.Case("train", 8, 8, 30, 32)


def _maxsim_measured(monkeypatch, case, found):
    monkeypatch.setattr(harness, "peak_memory", lambda *arguments: (1 << 20, 0))
    fake = SimpleNamespace(**vars(bench_maxsim))
    fake.variants = lambda case, device: found
    return harness.measure(fake, case, 4, lambda text: None)


def test_forward_only_case_has_one_time_and_no_gradient(monkeypatch):
    """Scores alone, each storage type judged on the values it stores, and one wrong token refused."""
    everything = bench_maxsim.variants(RERANK, "cpu")
    found = {name: everything[name] for name in ("pyelastic eager", "torch flat", "torch flat, bf16")}
    ours = bench_maxsim._ours
    for prepare in (bench_maxsim.bfloat16, bench_maxsim.int8):
        run = lambda q, d: ours("rerank", "eager", q, d)  # noqa: E731
        found[prepare.__name__] = harness.Variant(run, bench_maxsim.FLOAT32, prepare)
    # The planted bugs: a document's last token forgotten; bfloat16 storage passed off as float32.
    found["short"] = harness.Variant(lambda q, d: bench_maxsim.flat(q, d[:, :-1]), bench_maxsim.FLOAT32)
    found["coarse"] = harness.Variant(lambda q, d: bench_maxsim.flat(q, d.bfloat16().float()), bench_maxsim.FLOAT32)
    result = _maxsim_measured(monkeypatch, RERANK, found)
    for name, row in result["rows"].items():
        if name in ("short", "coarse"):
            assert row["failed"].startswith("ORACLE") and "step_s" not in row
        else:
            assert len(row["step_s"]) == 4 and row["forward_s"] == [] and "failed" not in row, name
            assert name == "floor" or len(row["error"]) == 1
    assert report.columns(result) is report.FORWARD
    assert {len(cells) for cells in report.lines(result, PEAKS)} == {len(report.FORWARD)}


def test_maxsim_gradient_of_a_wrong_winner_is_refused(monkeypatch):
    def second_best(q, d):
        """One of the 8 x 8 x 8 winners is the runner-up, while the loss stays within 1e-6 of the truth's."""
        best, s = bench_maxsim.einsum(q, d), torch.einsum("sh,th->st", q[3], d[5])
        values, index = s[2].topk(2)
        swap = s[2, index[1]] - s[2, index[0]] + (values[0] - values[1]).detach()
        return best + swap * torch.nn.functional.one_hot(torch.tensor(3 * 8 + 5), 64).view(8, 8)

    right = bench_maxsim.variants(TRAIN, "cpu")
    found = {name: right[name] for name in ("pyelastic eager", "torch einsum", "torch chunked")}
    found["wrong"] = harness.Variant(lambda q, d: bench_maxsim.contrastive(second_best, q, d), bench_maxsim.FLOAT32)
    rows = _maxsim_measured(monkeypatch, TRAIN, found)["rows"]
    assert rows["wrong"]["error"][0] < bench_maxsim.FLOAT32 < min(rows["wrong"]["error"][1:])
    assert [name for name, row in rows.items() if "failed" in row] == ["wrong"]


def test_maxsim_truth_is_the_formula():
    q, d = TRAIN.inputs(3, "cpu")
    leaves = [x.double().requires_grad_() for x in (q, d)]
    loss = bench_maxsim.contrastive(bench_maxsim.einsum, *leaves)
    loss.backward()
    got = bench_maxsim.truth(q, d)
    # einsum sums the maxima in float32.
    assert max(harness.errors(got, (loss.detach(), *(leaf.grad for leaf in leaves)))) < 1e-6
    assert bench_maxsim.case(TRAIN.id) == TRAIN and bench_maxsim.case(RERANK.id) == RERANK


@pytest.mark.parametrize("kind", ("dense", "sparse", "skip"))
def test_projection_with_a_wrong_gradient_is_refused(monkeypatch, kind):
    """Right variants pass; a forgotten bias, and a norm taken for a constant, whose loss is right, do not."""
    case = bench_projection.Case(kind, 60, 32, 16)
    assert bench_projection.case(case.id) == case

    def no_bias(x, w, b, *skip):
        return bench_projection.linear_normalize(x, w, 0 * b, *skip)

    def constant_norm(x, w, b, *skip):
        z = torch.nn.functional.linear(x, w, b) + sum(torch.nn.functional.linear(x, r) for r in skip)
        return z / z.detach().norm(dim=1, keepdim=True)

    everything = bench_projection.variants(case, "cpu")
    found = {name: everything[name] for name in ("pyelastic eager", "F.linear, F.normalize")}
    for wrong in (no_bias, constant_norm):
        run = lambda *x, wrong=wrong: bench_projection.loss(wrong, *x)  # noqa: E731
        found[wrong.__name__] = harness.Variant(run, bench_projection.FLOAT32)
    monkeypatch.setattr(harness, "peak_memory", lambda *arguments: (1 << 20, 0))
    fake = SimpleNamespace(**vars(bench_projection))
    fake.variants = lambda case, device: found
    rows = harness.measure(fake, case, 4, lambda text: None)["rows"]
    assert [name for name, row in rows.items() if "failed" in row] == ["no_bias", "constant_norm"]
    assert rows["constant_norm"]["error"][0] < bench_projection.FLOAT32
    assert len(rows["pyelastic eager"]["error"]) == 1 + case.leaves and len(rows["floor"]["step_s"]) == 4


def test_spread_and_median():
    assert harness.median([3.0, 1.0, 2.0]) == 2.0
    assert harness.spread([1.0, 2.0, 3.0, 4.0]) == pytest.approx((3.75 - 1.25) / 2.5)


def test_memory_probe_sees_the_logits():
    """The eager op holds B x C cosines; the probe, in its fresh process, must see them."""
    case = bench.Case(256, 32, 20_000)
    eager, gradients = harness.peak_memory(bench, case, "pyelastic eager", "cpu")
    assert gradients == 4 * (case.batch + case.classes) * case.dim
    assert eager - gradients > 2 * 4 * case.batch * case.classes


def test_cpu_kernel_never_holds_the_logits():
    """Less than one array of B x C beyond the gradients: two tiles of 8 MiB and O(B D)."""
    case = bench.Case(256, 32, 100_000)
    needed, gradients = harness.peak_memory(bench, case, "pyelastic cpu", "cpu")
    assert needed - gradients < 0.5 * 4 * case.batch * case.classes


def test_command_line(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "no_such_op", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "choose from" in done.stderr and "margin_softmax" in done.stderr


def test_main_writes_tables_json_and_a_page_with_plots(monkeypatch, tmp_path, capsys):
    """The whole command on a tiny case, with one variant that the oracle refuses."""
    from benchmarks import __main__ as command

    fake = SimpleNamespace(**vars(bench))
    fake.cases = lambda full, device: [CASE]
    fake.memory_only = lambda full: []
    variants = {
        "pyelastic cpu": harness.Variant(bench._ours("cpu"), bench.FLOAT32),
        "wrong & <slow>": harness.Variant(lambda *x: 1.01 * bench.lean(*x), bench.FLOAT32),
    }
    fake.variants = lambda case, device: dict(variants)
    monkeypatch.setattr(harness, "load", lambda op: fake)
    monkeypatch.setattr(harness, "peak_memory", lambda *arguments: (3 << 20, 1 << 20))
    arguments = [bench.OP, "--rounds", "4", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    command.main()
    printed = capsys.readouterr().out
    assert f"report: {tmp_path.resolve() / 'index.html'}" in printed and "pyelastic cpu" in printed
    saved = json.loads((tmp_path / "margin_softmax.json").read_text())
    assert len(saved["cases"][0]["rows"]["pyelastic cpu"]["step_s"]) == 4
    assert saved["machine"]["copy_gb_per_s"] > 0 and saved["machine"]["gemm_gflop_per_s"] > 0
    page = (tmp_path / "index.html").read_text()
    assert page.count("<svg") == 1 and "wrong &amp; &lt;slow&gt;" in page and "ORACLE: relative RMS error" in page
    assert "| pyelastic cpu |" in (tmp_path / "margin_softmax.md").read_text()


def test_committed_results_hold_raw_samples():
    from pathlib import Path

    for path in (Path(bench.__file__).parent / "results").glob("*.json"):
        results = json.loads(path.read_text())
        for result in results["cases"]:
            for name, row in result["rows"].items():
                assert "failed" in row or len(row["step_s"]) >= 5, (path.name, result["case"], name)


def test_fira_variants_are_what_they_claim():
    """Each is graded against a step of its own algorithm, and a wrong one gets no time."""
    from benchmarks import bench_fira

    for dtype in (torch.float32, torch.bfloat16):
        case = bench_fira.Case(24, 40, 4, dtype)
        found = bench_fira.variants(case, "cpu")
        chosen = {name: v for name, v in found.items() if name.startswith(("pyelastic", "torch"))}
        assert {"pyelastic cpu", "pyelastic eager", "torch AdamW fused"} <= set(chosen)
        if "apollo-torch" in found:  # the one peer whose truth is read from its state
            chosen["apollo-torch"] = found["apollo-torch"]
        for name, variant in chosen.items():
            inputs = case.inputs(0, "cpu")
            error = harness.errors(harness.step(case, variant.run, inputs), variant.truth(*inputs))
            assert harness.refusal(error, variant.limit) is None, (name, error)
            wrong = variant.truth(*inputs)[0] * 1.05
            assert harness.refusal(harness.errors((wrong,), variant.truth(*inputs)), variant.limit), name
