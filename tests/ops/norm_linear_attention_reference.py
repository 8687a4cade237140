"""The truth of norm_linear_attention in float64, from the formulas of the paper and of its gradients.

Nothing of it is shared with the package: all weights of a sequence are written out (the quadratic form), and so are the
gradients, with a running error beside each value for the oracle's A. The eager backend, whose gradients are autograd's,
meets them in float64.
"""

import math
from dataclasses import dataclass

import torch
from norm_linear_attention_cases import Case
from running_error import Running, cat, product
from torch import Tensor

QUARTER = math.pi / 4


@dataclass
class Truth:
    """Results (o, s, z) and gradients (dq, ...) by name; A of each; ``half``: with features stored in 16 bits."""

    value: dict[str, Tensor]
    A: dict[str, Tensor]
    half: dict[str, Tensor]
    K: int


@dataclass
class _Side:
    """phi [N, H, 2d], and what its gradient needs."""

    phi: Running
    x: Tensor
    a: Running
    w: Running
    r: Running
    turn: Running | None = None  # d angle / d direction
    c: Running | None = None
    s: Running | None = None
    p: Running | None = None
    t: Running | None = None
    log: Running | None = None


def _one(x: Tensor) -> Tensor:
    return torch.ones_like(x)


def _norm(square: Running, eps: float) -> Running:
    whole = square + eps**2
    safe = Running(torch.where(whole.x > 0, whole.x, 1.0), whole.e, whole.noise)
    return safe.map(torch.sqrt, lambda x: 0.5 / x.sqrt())


def _by_sign(x: Tensor, value: Running) -> Running:
    return cat([value.where(x > 0), value.where(x < 0)], -1)


def _angles(case: Case, side: _Side, u: Running) -> None:
    inner = (u * case.alpha).map(torch.tanh, lambda x: 1 / torch.cosh(x).square())
    angle = inner * QUARTER
    side.c = angle.map(torch.cos, torch.sin)
    side.s = angle.map(torch.sin, torch.cos)
    side.turn = (inner.exact(1.0) - inner * inner) * (QUARTER * case.alpha)
    side.phi = cat([side.w * side.c, side.w * side.s], -1)


def _query(case: Case, q: Running, params: Running) -> _Side:
    lam, tau, beta = (params.view(lambda x, i=i: x[i][:, None]) for i in range(3))
    r = _norm((q * q).sum(-1, True), case.norm_eps)
    t = (beta * r).map(torch.tanh, lambda x: 1 / torch.cosh(x).square())
    p = lam * (tau + t)
    u = q / r
    a = u.map(torch.abs, _one)
    there = a.x > 0
    safe = Running(torch.where(there, a.x, 1.0), torch.where(there, a.e, 0.0), a.noise)
    log = safe.map(torch.log, lambda x: 1 / x)
    w = (p * log).map(torch.exp, torch.exp).where(there)
    side = _Side(_by_sign(q.x, w), q.x, a, w, r, p=p, t=t, log=log)
    if case.mode == "cos":
        _angles(case, side, u)
    return side


def _power(k: Running, exponent: float) -> Running:
    x = torch.where(k.x != 0, torch.where(k.x != 0, k.x.abs(), 1.0) ** exponent, 0.0)
    return Running(x, k.noise * x * (1 + abs(exponent)), k.noise)


def _key(case: Case, k: Running) -> _Side:
    m = _power(k, case.key_power)
    r = _norm((k * k).sum(-1, True), case.norm_eps)
    u = k / r
    side = _Side(_by_sign(k.x, m), k.x, u.map(torch.abs, _one), m, r)
    if case.mode == "cos":
        _angles(case, side, u)
    return side


def _rotate(x: Running, tables: tuple[Tensor, Tensor] | None, back: bool = False) -> Running:
    """Each half of x [N, H, 2d] turned by sin, cos [N, d / 2], pair by pair."""
    if tables is None:
        return x
    sin, cos = (t[: len(x.x)].repeat_interleave(2, -1).repeat(1, 2)[:, None] for t in tables)
    sign = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(x.x.shape[-1] // 2) * (-1 if back else 1)
    swapped = x.view(lambda t: t.unflatten(-1, (-1, 2)).flip(-1).flatten(-2))
    return x * cos + swapped * (sin * sign)


def _repeated(x: Running, heads: int, dim: int) -> Running:
    return x.view(lambda t: t.repeat_interleave(heads // t.shape[dim], dim))


def _grouped(x: Running, kv_heads: int, dim: int) -> Running:
    return x.view(lambda t: t.unflatten(dim, (kv_heads, -1))).sum(dim + 1)


@dataclass
class _Sequence:
    """One sequence's part of a call."""

    q: Running
    k: Running
    v: Running
    gate: Running | None
    s0: Running
    z0: Running
    tables: tuple[Tensor, Tensor] | None
    before: int


def _sequence(
    case: Case, x: _Sequence, params: Running, up: dict[str, Running]
) -> tuple[dict[str, Running], dict[str, Running]]:
    """(results, gradients) of one sequence."""
    heads, kv = x.q.x.shape[1], x.k.x.shape[1]
    query, key = _query(case, x.q, params), _key(case, x.k)
    both = case.rope == "both"
    gq, gk = (_rotate(side.phi, x.tables).stored() for side in (query, key))
    fq, fk = (gq, gk) if both else (query.phi, key.phi)
    s0, z0 = (_repeated(t, heads, 0) for t in (x.s0, x.z0))
    gkr, fkr, v = (_repeated(t, heads, 1) for t in (gk, fk, x.v))
    allowed = torch.ones(len(x.q.x), len(x.k.x), dtype=torch.float64)
    total = torch.full((len(x.q.x),), float(x.before + len(x.k.x)), dtype=torch.float64)
    if case.causal:
        allowed = allowed.tril()
        total = x.before + 1.0 + torch.arange(len(x.q.x), dtype=torch.float64)
    mask = allowed.bool()
    weights = product("nhf,mhf->hnm", gq, gkr).where(mask)
    sums = product("nm,mhf->nhf", fkr.exact(allowed), fkr) + z0
    eps = case.eps * (total[:, None] if case.eps_mode == "mean" else torch.ones_like(total[:, None]))
    d = (product("nhf,nhf->nh", fq, sums) + eps).view(lambda t: t[..., None])
    state = (s0 + product("mhf,mhd->hfd", gkr, v)).stored()
    # A kernel reads the state where this sums weights: what rounding it costs is counted once.
    numerator = product("hnm,mhd->nhd", weights, v) + product("nhf,hfd->nhd", gq, s0)
    if not case.causal:
        numerator.e += product("nhf,hfd->nhd", gq, Running(state.x, 0 * state.x, 0.0).stored()).e
    else:
        numerator.e += product("hnm,mhd->nhd", weights.stored(), v).e * (1 - weights.noise)
        numerator.e += product("nhf,hfd->nhd", gq, s0.stored()).e * (1 - weights.noise)
    o = numerator / d
    made = {"o": o, "s": x.s0 + product("mhf,mhd->hfd", gk, x.v), "z": x.z0 + fk.sum(0)}
    grads: dict[str, Running] = {}
    g = up["o"]
    if x.gate is not None:
        sigmoid = x.gate.map(torch.sigmoid, lambda t: torch.sigmoid(t) * torch.sigmoid(-t))
        made["o"] = o * (x.gate * sigmoid)
        grads["gate"] = g * o * sigmoid * (x.gate * (sigmoid.exact(1.0) - sigmoid) + 1.0)
        g = g * (x.gate * sigmoid)
    y = (g / d).stored()
    dd = -(y * o).sum(-1)
    pairs = product("nhd,mhd->hnm", y, v).where(mask).stored()
    dgq = product("hnm,mhf->nhf", pairs, gkr) + product("nhd,hfd->nhf", y, s0.stored())
    us, uz = up["s"].stored(), up["z"]
    dgk = _grouped(product("hnm,nhf->mhf", pairs, gq), kv, 1) + product("mhd,hfd->mhf", x.v, us)
    dv = _grouped(product("hnm,nhd->mhd", weights.stored(), y), kv, 1) + product("mhf,hfd->mhd", gk, us)
    rows = dd.view(lambda t: t[..., None])
    dfq = rows * sums
    dfk = _grouped(product("nm,nhf->mhf", fq.exact(allowed), rows * fq), kv, 1) + uz
    grads |= {
        "v": dv,
        "s0": up["s"] + _grouped(product("nhf,nhd->hfd", gq, y), kv, 0),
        "z0": uz + _grouped((rows * fq).sum(0), kv, 0),
    }
    if both:
        dfq, dfk = _rotate(dgq + dfq, x.tables, True), _rotate(dgk + dfk, x.tables, True)
    else:
        dfq, dfk = dfq + _rotate(dgq, x.tables, True), dfk + _rotate(dgk, x.tables, True)
    grads |= _query_gradient(case, query, dfq, params)
    grads["k"] = _key_gradient(case, key, dfk)
    return made, grads


def _halves(side: _Side, df: Running) -> tuple[Running, Running | None]:
    """Gradients of the magnitudes, and of the angles if there are any."""
    d = df.x.shape[-1] // 2
    upper, lower = df.view(lambda t: t[..., :d]), df.view(lambda t: t[..., d:])
    if side.c is None or side.s is None or side.turn is None:
        return upper.where(side.x > 0) + lower.where(side.x < 0), None
    return upper * side.c + lower * side.s, side.w * (lower * side.c - upper * side.s) * side.turn


def _query_gradient(case: Case, side: _Side, df: Running, params: Running) -> dict[str, Running]:
    assert side.p is not None and side.t is not None and side.log is not None
    lam, tau, beta = (params.view(lambda x, i=i: x[i][:, None]) for i in range(3))
    e, eta = _halves(side, df)
    sign = torch.sign(side.x)
    there = side.a.x > 0
    ew = e * side.w
    P, T = (ew * side.log).where(there).sum(-1, True), ew.sum(-1, True)
    flat = lam.exact(1.0) - side.t * side.t
    A = side.p / side.r
    B = P * (lam * beta * flat) - A * T
    safe = Running(torch.where(there, side.a.x, 1.0), torch.where(there, side.a.e, 0.0), side.a.noise)
    dq = (A * e * (side.w / safe) + B * side.a) * sign
    if eta is not None:
        along = (side.a * sign * eta).sum(-1, True) / side.r
        dq = dq + eta / side.r - along * side.a * sign
    return {
        "q": dq,
        "lam": (P * (tau + side.t)).sum((0, 2)),
        "tau": (P * lam).sum((0, 2)),
        "norm_scale": (P * lam * side.r * flat).sum((0, 2)),
    }


def _key_gradient(case: Case, side: _Side, df: Running) -> Running:
    e, eta = _halves(side, df)
    k = Running(side.x, torch.zeros_like(side.x), df.noise)
    dk = e * _power(k, case.key_power - 1) * (case.key_power * torch.sign(side.x))
    if eta is None:
        return dk
    u = side.a * torch.sign(side.x)
    return dk + (eta - u * (u * eta).sum(-1, True)) / side.r


def _inputs(case: Case, noise: float) -> dict[str, Running]:
    def exact(x: Tensor) -> Running:
        x = x.detach().cpu().double()
        return Running(x, torch.zeros_like(x), noise)

    s, z = (torch.zeros(shape, dtype=torch.float64) for shape in case.state_shapes)
    rows = [torch.as_tensor(getattr(case, n)).detach().double() for n in ("lam", "tau", "norm_scale")]
    heads = case.q.shape[2]
    found = {n: exact(x) for n, x in ({"s0": s, "z0": z} | case.tensors).items()}
    return found | {"params": exact(torch.stack([x.expand(heads) for x in rows]))}


def _whole(case: Case, upstream: dict[str, Tensor], noise: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values and errors of all results and gradients."""
    given = _inputs(case, noise)
    shape_s, shape_z = case.state_shapes
    zero = {"s": torch.zeros(shape_s).double(), "z": torch.zeros(shape_z).double()}
    up = {n: given["q"].exact(t.detach().cpu().double()) for n, t in (zero | upstream).items()}
    if "o" not in up:
        up["o"] = given["q"].exact(torch.zeros(*case.q.shape[:3], case.v.shape[3], dtype=torch.float64))
    parts: dict[str, list[Running]] = {}
    for i, (batch, span) in enumerate(case.spans):
        take = lambda name: given[name].view(lambda t: t[batch, span])  # noqa: B023, E731
        x = _Sequence(
            take("q"),
            take("k"),
            take("v"),
            take("gate") if "gate" in given else None,
            given["s0"].view(lambda t: t[i]),  # noqa: B023
            given["z0"].view(lambda t: t[i]),  # noqa: B023
            case.tables_of(i),
            0 if case.before is None else case.before[i],
        )
        here = {n: r.view(lambda t: t[batch, span] if n == "o" else t[i]) for n, r in up.items()}  # noqa: B023
        made, grads = _sequence(case, x, given["params"], here)
        for name, value in (made | {f"d{n}": g for n, g in grads.items()}).items():
            parts.setdefault(name, []).append(value)
    shapes = {"o": (*case.q.shape[:3], case.v.shape[3]), "s": shape_s, "z": shape_z}
    shapes |= {f"d{n}": tuple(x.shape) for n, x in case.tensors.items()}
    values, errors = {}, {}
    for name, shape in shapes.items():
        for found, pick in ((values, "x"), (errors, "e")):
            pieces = [getattr(p, pick) for p in parts.get(name, [])]
            if name in ("dlam", "dtau", "dnorm_scale"):
                total = sum(pieces, torch.zeros(case.q.shape[2], dtype=torch.float64))
                found[name] = total if len(shape) else total.sum()
            elif not pieces:
                found[name] = torch.zeros(shape, dtype=torch.float64)
            elif case.cu_seqlens is not None and name not in ("s", "z", "ds0", "dz0"):
                found[name] = torch.cat(pieces)[None]
            else:
                found[name] = torch.stack(pieces)
    return values, errors


def reference(case: Case, upstream: dict[str, Tensor]) -> Truth:
    """Results and gradients for ``upstream``, gradients of o and, if given, of s and z."""
    value, A = _whole(case, upstream, 1.0)
    half = _whole(case, upstream, 0.0)[1]
    K = case.q.shape[1] + case.k.shape[1] + 2 * case.q.shape[3] + case.v.shape[3]
    return Truth(value, A, half, K)
