"""The error catalogue: each wrong call raises what the design fixes, naming the argument."""

from typing import Any

import backends
import pytest
import torch
from maxsim_cases import OP, over_kernels

import pyelastic
from pyelastic import Int8Tokens, ResidualTokens

Q, D = torch.randn(2, 3, 4), torch.randn(5, 6, 4)
GROUPED = torch.randn(2, 3, 6, 4)

CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "queries type": ({"queries": [1.0]}, TypeError, r"queries is list; expected a tensor"),
    "documents type": ({"documents": "text"}, TypeError, r"documents is str; expected a tensor, Int8Tokens"),
    "queries rank": ({"queries": torch.randn(2, 3, 4, 5)}, ValueError, r"queries is \[2, 3, 4, 5\]; .*\[Nq, Lq, d\]"),
    "documents rank": ({"documents": torch.randn(5, 4)}, ValueError, r"documents is \[5, 4\]; .*\[Nd, Ld, d\]"),
    "d differs": ({"documents": torch.randn(5, 6, 3)}, ValueError, r"\[2, 3, 4\].*\[5, 6, 3\].*same last size"),
    "d is 0": ({"queries": Q[..., :0], "documents": D[..., :0]}, ValueError, r"d >= 1"),
    "integer queries": ({"queries": Q.int()}, TypeError, r"queries is int32; expected one of float16"),
    "integer documents": ({"documents": D.int()}, TypeError, r"documents is int32"),
    "raw int8 documents": ({"documents": D.to(torch.int8)}, TypeError, r"documents is int8"),
    "half double": ({"documents": D.double()}, TypeError, r"float32.*float64"),
    "layout": ({"layout": "all"}, ValueError, r"layout is 'all'; choose from single, cross"),
    "pairs, no layout": ({"layout": "cross", "pairs": torch.zeros(1, 2).long()}, ValueError, r"'list' and pairs"),
    "list without pairs": ({"layout": "list"}, ValueError, r"layout 'list' and pairs"),
    "pairs shape": ({"pairs": torch.zeros(3).long()}, ValueError, r"pairs is \[3\]; .*\[P, 2\]"),
    "pairs columns": ({"pairs": torch.zeros(3, 3).long()}, TypeError, r"pairs is torch.int64 \[3, 3\]"),
    "pairs dtype": ({"pairs": torch.zeros(3, 2)}, TypeError, r"pairs is torch.float32"),
    "pairs range": ({"pairs": torch.tensor([[0, 0], [1, 5]])}, ValueError, r"pairs\[1\] is \[1, 5\].*below 2.*below 5"),
    "pairs negative": ({"pairs": torch.tensor([[-1, 0]])}, ValueError, r"pairs\[0\] is \[-1, 0\]"),
    "pairs count": ({"layout": "pairs"}, ValueError, r"2 queries and 5 documents"),
    "grouped count": ({"documents": GROUPED[:1]}, ValueError, r"\[2, 3, 4\].*\[1, 3, 6, 4\]"),
    "query_mask shape": ({"query_mask": torch.ones(2, 4)}, ValueError, r"query_mask is \[2, 4\]; expected \[2, 3\]"),
    "document_mask shape": ({"document_mask": torch.ones(5)}, ValueError, r"document_mask is \[5\]; expected \[5, 6\]"),
    "mask_mode": ({"mask_mode": "drop"}, ValueError, r"mask_mode is 'drop'; choose from exclude, zero"),
    "token_weights": ({"token_weights": torch.ones(3)}, ValueError, r"token_weights is \[3\]; expected \[2, 3\]"),
    "reduction": ({"reduction": "max"}, ValueError, r"reduction is 'max'; choose from sum, mean, none"),
    "save": ({"save": "all"}, ValueError, r"save is 'all'"),
    "topk 0": ({"topk": 0}, ValueError, r"topk is 0"),
    "topk 65": ({"topk": 65}, ValueError, r"topk is 65; expected an integer from 1 to 64"),
    "topk float": ({"topk": 2.0}, ValueError, r"topk is 2.0"),
    "temperature": ({"temperature": -0.1}, ValueError, r"temperature is -0.1"),
    "temperature nan": ({"temperature": float("nan")}, ValueError, r"temperature is nan"),
    "both": ({"temperature": 0.1, "topk": 2}, ValueError, r"only one of them"),
    "dims order": ({"dims": (4, 2)}, ValueError, r"dims is \[4, 2\]; expected rising sizes from 1 to d = 4"),
    "dims beyond": ({"dims": (2, 5)}, ValueError, r"dims is \[2, 5\]"),
    "dims empty": ({"dims": ()}, ValueError, r"dims is \[\]"),
    "cu rank": ({"cu_seqlens_d": torch.zeros(2, 2).long()}, ValueError, r"documents is \[5, 6, 4\]"),
    "cu dtype": ({"queries": Q[0], "cu_seqlens_q": torch.tensor([0.0, 3.0])}, TypeError, r"cu_seqlens_q is float32"),
    "cu empty": ({"queries": Q[0], "cu_seqlens_q": torch.zeros(0).long()}, ValueError, r"cu_seqlens_q is \[0\]"),
    "cu end": ({"queries": Q[0], "cu_seqlens_q": torch.tensor([0, 2])}, ValueError, r"cu_seqlens_q must rise.*to 3"),
    "cu falls": ({"queries": Q[0], "cu_seqlens_q": torch.tensor([0, 2, 1, 3])}, ValueError, r"cu_seqlens_q must rise"),
    "max_seqlen": ({"max_seqlen_q": torch.tensor(3)}, TypeError, r"max_seqlen_q is Tensor; expected int"),
    "backend": ({"backend": "cud"}, ValueError, r"unknown backend 'cud'; choose from auto, cuda, triton, cpu, eager"),
    "devices": ({"documents": D.to("meta")}, ValueError, r"one device; queries is on cpu, documents is on meta"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_wrong_call(name: str) -> None:
    changes, error, message = CALLS[name]
    with pytest.raises(error, match=message) as caught:
        pyelastic.maxsim(**{"queries": Q, "documents": D, **changes})
    assert str(caught.value).startswith("maxsim: ")


def test_a_dtensor_is_refused() -> None:
    class DTensor(torch.Tensor):
        pass

    with pytest.raises(TypeError, match=r"maxsim: documents is a DTensor.*to_local"):
        pyelastic.maxsim(Q, D.as_subclass(DTensor))


def test_quantised_tokens_check_themselves() -> None:
    values, scale = torch.zeros(2, 3, 4, dtype=torch.int8), torch.ones(2, 3)
    codes, residuals = torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, 3, 1, dtype=torch.uint8)
    centroids, buckets = torch.zeros(5, 4), torch.zeros(4)
    wrong: list[tuple[Any, type[Exception], str]] = [
        (lambda: Int8Tokens(values.float(), scale), TypeError, "values is torch.float32"),
        (lambda: Int8Tokens(values, scale[:1]), ValueError, r"scale is \[1, 3\]; expected \[2, 3\]"),
        (lambda: ResidualTokens(codes.long(), residuals, centroids, buckets), TypeError, "codes is torch.int64"),
        (lambda: ResidualTokens(codes, residuals, centroids, torch.zeros(5)), ValueError, r"buckets is \[5\]"),
        (lambda: ResidualTokens(codes, residuals, centroids[0], buckets), ValueError, r"centroids is \[4\]"),
        (
            lambda: ResidualTokens(codes, residuals, torch.zeros(5, 8), buckets),
            ValueError,
            r"residuals is \[2, 3, 1\]",
        ),
        (lambda: ResidualTokens(codes + 5, residuals, centroids, buckets), ValueError, "codes reach from 5 to 5"),
        (lambda: pyelastic.quantize_residual(D, centroids, 3), ValueError, "bits is 3"),
    ]
    for call, error, message in wrong:
        with pytest.raises(error, match=message):
            call()
    tokens = ResidualTokens(codes, residuals, centroids, buckets)
    with pytest.raises(ValueError, match="must end at d = 4"):
        pyelastic.maxsim(Q, tokens, dims=(2,))
    with pytest.raises(ValueError, match="not quantised"):
        pyelastic.maxsim(Q, tokens, document_mask=torch.ones(2, 3), mask_mode="zero", topk=2)


@over_kernels
def test_double_backward_is_refused(backend: str) -> None:
    q = Q.clone().to(backends.device_of(backend)).requires_grad_()
    d = D.to(q.device)
    for loss in (pyelastic.maxsim(q, d, backend=backend).sum(), pyelastic.maxsim_info_nce(q, d, backend=backend)):
        (grad,) = torch.autograd.grad(loss, q, create_graph=True)
        with pytest.raises(RuntimeError, match=r"maxsim: double backward needs backend='eager'"):
            grad.square().sum().backward()


def test_eager_has_a_double_backward() -> None:
    q, d = Q.double().requires_grad_(), D.double().requires_grad_()
    (grad,) = torch.autograd.grad(
        pyelastic.maxsim(q, d, temperature=0.5, backend="eager").sum(), q, create_graph=True
    )
    grad.square().sum().backward()
    assert q.grad is not None and q.grad.isfinite().all() and q.grad.any()


def test_backends_say_why_not() -> None:
    reasons = pyelastic.backends(OP, Q, D, dims=(2, 4), topk=2)
    assert reasons["eager"] is None and "several dims" in str(reasons["cpu"])
    with pytest.raises(pyelastic.BackendError, match=r"maxsim: backend 'cpu' cannot run this call: several dims"):
        pyelastic.maxsim(Q, D, dims=(2, 4), topk=2, backend="cpu")
    with pytest.raises(pyelastic.BackendError, match=r"PYELASTIC_STRICT"):
        pyelastic.maxsim(Q, D, dims=(2, 4), topk=2)
    both = pyelastic.maxsim(Q, D, dims=(2, 4), topk=2, backend="eager")
    each = [pyelastic.maxsim(Q[..., :n].contiguous(), D[..., :n].contiguous(), topk=2, backend="cpu") for n in (2, 4)]
    torch.testing.assert_close(both, torch.stack(each))


LOSSES: dict[str, tuple[Any, type[Exception], str]] = {
    "layout": (lambda: pyelastic.maxsim_info_nce(Q[0], D), ValueError, "layout is 'single'"),
    "pairs": (lambda: pyelastic.maxsim_info_nce(Q, D, pairs=torch.zeros(1, 2)), TypeError, "do not take pairs"),
    "reduction": (lambda: pyelastic.maxsim_info_nce(Q, D, reduction="none"), ValueError, "a loss needs sum or mean"),
    "loss_reduction": (lambda: pyelastic.maxsim_info_nce(Q, D, loss_reduction="all"), ValueError, "loss_reduction is"),
    "temperature": (lambda: pyelastic.maxsim_info_nce(Q, D, temperature=0.0), ValueError, "temperature is 0.0"),
    "labels": (lambda: pyelastic.maxsim_info_nce(Q, D, labels=torch.zeros(3).long()), ValueError, r"labels is .*\[3\]"),
    "labels dtype": (lambda: pyelastic.maxsim_info_nce(Q, D, labels=torch.zeros(2)), ValueError, "is torch.float32"),
    "labels range": (lambda: pyelastic.maxsim_info_nce(Q, D, labels=torch.tensor([0, 5])), ValueError, "from 0 to 5"),
    "filter": (lambda: pyelastic.maxsim_info_nce(Q, D, filter_eps=1.0), ValueError, "filter_eps is 1.0"),
    "teacher": (lambda: pyelastic.maxsim_kl_distill(Q, D, torch.zeros(2, 3)), ValueError, r"teacher_scores .*\[2, 5\]"),
    "teacher rank": (lambda: pyelastic.maxsim_kl_distill(Q, D, torch.zeros(2)), ValueError, "teacher_scores"),
    "margin": (lambda: pyelastic.maxsim_margin_mse(Q, D[:1], torch.zeros(2, 1)), ValueError, "needs 2 or more"),
    "option": (lambda: pyelastic.maxsim_info_nce(Q, D, margin=1.0), TypeError, "margin"),
    "xtr k": (lambda: pyelastic.maxsim_xtr(Q, D, k=0), ValueError, "k is 0"),
    "xtr option": (lambda: pyelastic.maxsim_xtr(Q, D, topk=2), TypeError, "does not take topk"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_wrong_loss(name: str) -> None:
    call, error, message = LOSSES[name]
    with pytest.raises(error, match=message):
        call()
