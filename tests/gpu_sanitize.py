"""compute-sanitizer's four tools on one small case per CUDA kernel, each after it has caught a planted bug.

``python tests/gpu_sanitize.py`` on a machine with a GPU, after `make gpu-build`. A tool that does not catch its bug
fails the run: its silence about our kernels would mean nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[1]
PLANTED = ROOT / "build" / "planted"
# tool -> the bug of tests/planted/cuda_bugs.cu; "uninitialised" is a clean kernel on memory that nobody wrote.
TOOLS = {"memcheck": "4", "racecheck": "1", "synccheck": "5", "initcheck": "uninitialised"}


def run_bug(bug: str) -> None:
    import torch

    sys.path.append(str(PLANTED))
    import planted

    rows, columns = 16, 300
    if bug == "uninitialised":
        x, number = torch.empty(rows, columns, device="cuda"), 0
    else:
        x, number = torch.randn(rows, columns, device="cuda"), int(bug)
    out = torch.zeros(rows, device="cuda")
    planted.row_sum(number, x.data_ptr(), rows, columns, out.data_ptr(), torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()


def run_cases() -> None:
    """Forward and backward through every kernel: both operand types, all statistics, hard negatives, sub-centres.

    And projection's, a warp and a block a row, with a residual of either dtype.
    """
    import torch

    import pyelastic

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for subcenters, margin in ((1, None), (1, pyelastic.margins.CurricularFace(t=0.3)), (2, None)):
            e = torch.randn(33, 40, device="cuda", dtype=dtype, requires_grad=True)
            w = torch.randn(150 * subcenters, 40, device="cuda", dtype=dtype, requires_grad=True)
            labels = torch.randint(0, 150, (33,), device="cuda")
            for aux in (False, True):
                out = pyelastic.margin_softmax(
                    e, w, labels, margin=margin, subcenters=subcenters, return_aux=aux, backend="cuda"
                )
                (out[0] if aux else out).backward()
        shapes = ((40, dtype, True), (1100, torch.float32, True), (40, dtype, False))
        for d_out, other, normalize in (*shapes, (100, dtype, True), (200, dtype, True)):
            x = torch.randn(33, 24, device="cuda", dtype=dtype, requires_grad=True)
            weight = torch.randn(d_out, 24, device="cuda", dtype=dtype, requires_grad=True)
            residual = torch.randn(33, d_out, device="cuda", dtype=other, requires_grad=True)
            bias = torch.randn(d_out, device="cuda", requires_grad=True)
            y = pyelastic.projection(x, weight, bias, residual=residual, normalize=normalize, backend="cuda")
            y.backward(torch.randn_like(y))
    run_maxsim()
    run_norm_linear_attention()
    run_fira()
    torch.cuda.synchronize()


def run_maxsim() -> None:
    """Both sizes of tiles, all reductions, lists, quantised documents, recomputation."""
    import torch

    import pyelastic

    pairs = torch.tensor([[0, 2], [3, 0], [0, 2]], device="cuda")
    options = ({}, {"topk": 3}, {"temperature": 0.5}, {"dims": (8, 20)}, {"save": "recompute"}, {"pairs": pairs})
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for tokens in (9, 33):
            q = torch.randn(4, tokens, 20, device="cuda", dtype=dtype, requires_grad=True)
            d = torch.randn(3, 70, 20, device="cuda", dtype=dtype, requires_grad=True)
            mask = torch.rand(3, 70, device="cuda") > 0.3
            for chosen in options:
                scores = pyelastic.maxsim(q, d, document_mask=mask, normalize=True, backend="cuda", **chosen)
                scores.sum().backward()
            pyelastic.maxsim(q, pyelastic.quantize_int8(d.detach()), backend="cuda")


def run_norm_linear_attention() -> None:
    """Both forms over more than one part, packed sequences, gate, RoPE, grouped heads, states, each map."""
    import torch

    import pyelastic
    from pyelastic.ops import _norm_linear_attention_cuda

    cu = torch.tensor([0, 130, 130, 140], device="cuda")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for causal in (False, True):
            q = torch.randn(1, 140, 4, 20, device="cuda", dtype=dtype, requires_grad=True)
            k = torch.randn(1, 140, 2, 20, device="cuda", dtype=dtype, requires_grad=True)
            v = torch.randn(1, 140, 2, 35, device="cuda", dtype=dtype, requires_grad=True)
            gate = torch.randn(1, 140, 4, 35, device="cuda", dtype=dtype, requires_grad=True)
            for options in ({"rope": "num", "gate": gate}, {"mode": "cos", "cu_seqlens": cu}, {"rope": "both"}):
                o, state = pyelastic.norm_linear_attention(
                    q, k, v, causal=causal, output_final_state=True, backend="cuda", **options
                )
                (o.float().sum() + state.s.sum()).backward()
            power = torch.full((2, 20), 2.0, device="cuda", requires_grad=True)
            o = pyelastic.polaformer_attention(q[:, :, :2], k, v[..., :34], power, causal=causal, backend="cuda")
            o.float().sum().backward()
    with mock.patch.object(_norm_linear_attention_cuda, "WHOLE_HEADS", 0):
        run_norm_linear_attention_whole()


def run_norm_linear_attention_whole(device: str = "cuda") -> None:
    """A block per sequence and kv head."""
    import torch

    import pyelastic

    cu = torch.tensor([0, 130, 130, 140], device=device)
    for causal in (False, True):
        for d, dv in ((24, 40), (64, 64)):
            widths = ((4, d), (2, d), (2, dv), (4, dv))
            q, k, v, gate = (torch.randn(1, 140, *w, device=device, dtype=torch.bfloat16) for w in widths)
            leaves = [x.requires_grad_() for x in (q, k, v)]
            for options in ({"rope": "num", "gate": gate}, {"mode": "cos", "cu_seqlens": cu}, {"rope": "both"}):
                o, state = pyelastic.norm_linear_attention(
                    *leaves, causal=causal, output_final_state=True, backend="cuda", **options
                )
                (o.float().sum() + state.s.sum() + state.z.sum()).backward()


def run_fira(device: str = "cuda") -> None:
    """Both sides, matrix units and float32 tiles, all storages, a residual that has to be formed; groups."""
    import torch

    import pyelastic

    plain, half = (torch.float32, False), (torch.float16, torch.bfloat16)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        cases = [(plain, {}), ((torch.bfloat16, False), {"mode": "paper"}), ((torch.int8, False), {"per_matrix": True})]
        cases += [(plain, {"alpha": 1.0}), (plain, {"found_inf": torch.ones((), device=device)})]
        cases += [((torch.float32, True), {})] if dtype in half else []
        cases += [(plain, {"stochastic": True})] if dtype == torch.bfloat16 else []
        for (state_dtype, compensated), options in cases:
            params, grads, states, left = [], [], [], []
            for m, n, rank in ((33, 70, 5), (70, 33, 5), (48, 144, 136), (144, 48, 40), (8, 8, 8)):
                side = m < n
                basis = torch.linalg.qr(torch.randn(min(m, n), min(rank, m, n), device=device))[0]
                projector = (basis if side else basis.mT).to(dtype).contiguous()
                w, noise = (torch.randn(m, n, device=device) for _ in range(2))
                g = basis @ (basis.mT @ noise) if side else (noise @ basis) @ basis.mT
                gram = (basis.mT @ basis) if "alpha" in options and rank == 5 else None
                params.append(w.to(dtype))
                grads.append((g + (1e-6 if "alpha" in options else 0.5) * noise).to(dtype))
                states.append(pyelastic.fira_state(
                    params[-1], projector, left=side, state_dtype=state_dtype, gram=gram, compensated=compensated,
                ))  # fmt: skip
                left.append(side)
            for _ in range(2):
                pyelastic.fira(params, grads, states, left=left, lr=0.1, backend="cuda", **options)


def sanitize(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, __file__, *arguments]
    # torch's allocator hands out parts of large blocks, in which no overrun is seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def main() -> int:
    if not shutil.which("compute-sanitizer"):
        print("compute-sanitizer is not on the PATH")
        return 1
    failed = 0
    for tool, bug in TOOLS.items():
        caught = sanitize(tool, "--bug", bug).returncode == 9
        print(f"{tool}: planted bug {bug} {'caught' if caught else 'NOT CAUGHT'}")
        done = sanitize(tool, "--cases")
        print(f"{tool}: our kernels {'clean' if done.returncode == 0 else 'NOT CLEAN'}")
        if not caught or done.returncode:
            failed += 1
            print("\n".join(line for line in done.stdout.splitlines() if line.startswith("====="))[-4000:])
    return int(failed > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--bug"]:
        run_bug(sys.argv[2])
    elif sys.argv[1:] == ["--cases"]:
        run_cases()
    else:
        raise SystemExit(main())
