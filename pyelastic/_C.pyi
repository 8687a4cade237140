"""Compiled kernels (csrc/bindings.cpp). Pointers are integers, 0 for none; sizes and strides are in elements."""

def isa() -> str: ...
def use_openmp(gomp_parallel: int) -> None: ...

# One set per compute type T: float (_f32) and double (_f64). Contract: csrc/margin_softmax.h.
def margin_softmax_normalize_f32(
    x: int, dtype: int, row_stride: int, col_stride: int, index: int, rows: int, dim: int, out: int, inv_norm:
    int, threads: int, /,
) -> None: ...
def margin_softmax_normalize_f64(
    x: int, dtype: int, row_stride: int, col_stride: int, index: int, rows: int, dim: int, out: int, inv_norm:
    int, threads: int, /,
) -> None: ...
def margin_softmax_target_angle_f32(
    e_hat: int, w_hat_y: int, rows: int, subcenters: int, dim: int, theta: int, best: int, threads: int, /,
) -> None: ...
def margin_softmax_target_angle_f64(
    e_hat: int, w_hat_y: int, rows: int, subcenters: int, dim: int, theta: int, best: int, threads: int, /,
) -> None: ...
def margin_softmax_accumulate_f32(
    cosines: int, column_scale: int, ld: int, rows: int, classes: int, subcenters: int, first: int, labels:
    int, threshold: int, hard_map: int, scale: float, max: int, sum: int, sum_sq: int, sum_z: int, sum_cos:
    int, rank: int, max_cos: int, cos_target: int, online: bool, threads: int, /,
) -> None: ...
def margin_softmax_accumulate_f64(
    cosines: int, column_scale: int, ld: int, rows: int, classes: int, subcenters: int, first: int, labels:
    int, threshold: int, hard_map: int, scale: float, max: int, sum: int, sum_sq: int, sum_z: int, sum_cos:
    int, rank: int, max_cos: int, cos_target: int, online: bool, threads: int, /,
) -> None: ...
def margin_softmax_gradient_f32(
    cosines: int, column_scale: int, ld: int, rows: int, classes: int, subcenters: int, first: int, labels:
    int, threshold: int, hard_map: int, scale: float, lse_neg: int, grad_lse: int, grad_sum: int, threads:
    int, /,
) -> None: ...
def margin_softmax_gradient_f64(
    cosines: int, column_scale: int, ld: int, rows: int, classes: int, subcenters: int, first: int, labels:
    int, threshold: int, hard_map: int, scale: float, lse_neg: int, grad_lse: int, grad_sum: int, threads:
    int, /,
) -> None: ...
def margin_softmax_add_target_f32(
    a: int, b: int, theta: int, grad_theta: int, to: int, rows: int, dim: int, first: int, count: int, out:
    int, threads: int, /,
) -> None: ...
def margin_softmax_add_target_f64(
    a: int, b: int, theta: int, grad_theta: int, to: int, rows: int, dim: int, first: int, count: int, out:
    int, threads: int, /,
) -> None: ...
def margin_softmax_project_f32(
    d: int, x: int, x_stride: int, x_is_unit: bool, inv_norm: int, rows: int, dim: int, out: int, dtype: int,
    row_stride: int, col_stride: int, threads: int, /,
) -> None: ...
def margin_softmax_project_f64(
    d: int, x: int, x_stride: int, x_is_unit: bool, inv_norm: int, rows: int, dim: int, out: int, dtype: int,
    row_stride: int, col_stride: int, threads: int, /,
) -> None: ...

# maxsim; contract: csrc/maxsim.h. Sides and problems as in csrc/bindings.cpp.
_Side = tuple[int, int, int, int, int, int, int, int, int, int]
_MaxSim = tuple[_Side, _Side, int, int, int, int, int, int, int, int, int, int, float, int, int]

def maxsim_block_f32() -> int: ...
def maxsim_pairs_f32() -> bool: ...
def maxsim_norms_f32(x: _Side, prefixes: int, planes: int, inverse: int, threads: int, /) -> None: ...
def maxsim_pack_f32(
    q: _Side, dim: int, groups: int, blocks: int, n: int, packed: int, pairs: bool, threads: int, /,
) -> None: ...
def maxsim_forward_f32(
    problem: _MaxSim, packed: int, pairs: bool, groups: int, blocks: int, n: int, weights: int, scores: int,
    maxima: int, winners: int, narrow: bool, threads: int, /,
) -> None: ...
def maxsim_backward_f32(
    problem: _MaxSim, of_queries: bool, scores: int, weights: int, per_token: int, winners: int, narrow: bool,
    order: int, first: int, out: int, dtype: int, threads: int, /,
) -> None: ...
def maxsim_block_f64() -> int: ...
def maxsim_pairs_f64() -> bool: ...
def maxsim_norms_f64(x: _Side, prefixes: int, planes: int, inverse: int, threads: int, /) -> None: ...
def maxsim_pack_f64(
    q: _Side, dim: int, groups: int, blocks: int, n: int, packed: int, pairs: bool, threads: int, /,
) -> None: ...
def maxsim_forward_f64(
    problem: _MaxSim, packed: int, pairs: bool, groups: int, blocks: int, n: int, weights: int, scores: int,
    maxima: int, winners: int, narrow: bool, threads: int, /,
) -> None: ...
def maxsim_backward_f64(
    problem: _MaxSim, of_queries: bool, scores: int, weights: int, per_token: int, winners: int, narrow: bool,
    order: int, first: int, out: int, dtype: int, threads: int, /,
) -> None: ...

# projection; contract: csrc/projection.h. Matrices are (pointer, dtype, row stride).
def projection_forward_f32(
    z: int, bias: int, residual: tuple[int, int, int], rows: int, dim: int, out: tuple[int, int, int], inverse: int,
    threads: int, /,
) -> None: ...
def projection_backward_f32(
    grad: tuple[int, int, int], y: tuple[int, int, int], inverse: int, rows: int, dim: int, parts: bool, dz: int,
    threads: int, /,
) -> None: ...
def projection_forward_f64(
    z: int, bias: int, residual: tuple[int, int, int], rows: int, dim: int, out: tuple[int, int, int], inverse: int,
    threads: int, /,
) -> None: ...
def projection_backward_f64(
    grad: tuple[int, int, int], y: tuple[int, int, int], inverse: int, rows: int, dim: int, parts: bool, dz: int,
    threads: int, /,
) -> None: ...

# The CUDA kernels, where they were built (tuples: csrc/bindings_cuda.cpp; contracts: the headers of csrc/).
_Matrix = tuple[int, int, int, int, int, int, int]
_Negatives = tuple[int, int, int, int, int, int, int, float, int]
_Stats = tuple[int, int, int, int, int, int, int, int]
_Targets = tuple[int, int, int, int, int]

def cuda_margin_softmax_normalize(
    x: _Matrix, factor: int, out_dtype: int, out: int, ld: int, inv_norm: int, stream: int, /,
) -> None: ...
def cuda_margin_softmax_target(
    e: _Matrix, w: _Matrix, labels: int, subcenters: int, theta: int, best: int, center: int, w_inv: int,
    stream: int, /,
) -> None: ...
def cuda_margin_softmax_accumulate(
    n: _Negatives, cosines: int, ld: int, stats: _Stats, stream: int, /,
) -> None: ...
def cuda_margin_softmax_accumulate_mma(
    n: _Negatives, e_hat: int, w_hat: int, ld: int, partials: int, stats: _Stats, stream: int, /,
) -> None: ...
def cuda_margin_softmax_gradient(
    n: _Negatives, cosines: int, ld: int, lse_neg: int, grad_lse: int, grad_sum: int, row_scale: int, dtype:
    int, p: int, ldp: int, stream: int, /,
) -> None: ...
def cuda_margin_softmax_gradient_mma(
    n: _Negatives, e_hat: int, w_hat: int, ld: int, lse_neg: int, grad_lse: int, grad_sum: int, row_scale:
    int, p: int, ldp: int, stream: int, /,
) -> None: ...
def cuda_margin_softmax_project_e(
    d: int, ldd: int, factor: int, e: _Matrix, e_inv: int, w: _Matrix, w_inv: int, t: _Targets, out: int,
    row_stride: int, col_stride: int, stream: int, /,
) -> None: ...
def cuda_margin_softmax_project_w(
    d: int, ldd: int, factor: int, w: _Matrix, w_inv: int, first: int, e: _Matrix, e_inv: int, t: _Targets,
    batch: int, out: int, row_stride: int, col_stride: int, stream: int, /,
) -> None: ...
def cuda_mma_gemm(
    a: int, lda: int, a_k_major: bool, b: int, ldb: int, b_k_major: bool, rows: int, columns: int, k: int, c:
    int, ldc: int, splits: int, add: bool, stream: int, /,
) -> None: ...

def cuda_projection_forward(
    z: int, bias: int, residual: tuple[int, int, int], rows: int, dim: int, out: tuple[int, int, int], inverse: int,
    stream: int, /,
) -> None: ...
def cuda_projection_backward(
    grad: tuple[int, int, int], y: tuple[int, int, int], inverse: int, rows: int, dim: int, parts: bool, dz: int,
    part: int, stream: int, /,
) -> None: ...
def cuda_projection_fits(dim: int, /) -> bool: ...
def cuda_projection_linear(
    x: tuple[int, int, int], weight: tuple[int, int, int], residual: tuple[int, int, int],
    residual_weight: tuple[int, int, int], bias: int, sizes: tuple[int, int, int, int], out: int, out_stride: int,
    inverse: int, stream: int, /,
) -> None: ...

# fira, one set per compute type. Contract: csrc/fira.h. problem: (vectors, dim, rank, left, beta1, beta2, eps, factor,
# correction, a_r, a_n, a_s); moments: (m, v, dtype, m_scale, v_scale).
_FiraProblem = tuple[int, int, int, bool, float, float, float, float, float, float, float, float]
_FiraMoments = tuple[int, int, int, int, int]

def fira_moments_f32(
    problem: _FiraProblem, r: int, r_dtype: int, g: int, g_dtype: int, g_stride: int, moments: _FiraMoments,
    squares: int, threads: int, /,
) -> None: ...
def fira_scales_f32(
    problem: _FiraProblem, squares: int, gram: int, exact: int, before: float, gamma: float, collapse: bool,
    per_matrix: bool, f: int, /,
) -> tuple[float, float, float, float]: ...
def fira_coefficients_f32(
    problem: _FiraProblem, moments: _FiraMoments, f: int, r: int, r_dtype: int, threads: int, /,
) -> None: ...
def fira_apply_f32(
    problem: _FiraProblem, t: int, t_dtype: int, f: int, g: int, g_stride: int, w: int, w_stride: int, w_dtype: int,
    first: int, rows: int, size: float, keep: float, rounding: tuple[bool, int, int, int], threads: int, /,
) -> None: ...
def fira_moments_f64(
    problem: _FiraProblem, r: int, r_dtype: int, g: int, g_dtype: int, g_stride: int, moments: _FiraMoments,
    squares: int, threads: int, /,
) -> None: ...
def fira_scales_f64(
    problem: _FiraProblem, squares: int, gram: int, exact: int, before: float, gamma: float, collapse: bool,
    per_matrix: bool, f: int, /,
) -> tuple[float, float, float, float]: ...
def fira_coefficients_f64(
    problem: _FiraProblem, moments: _FiraMoments, f: int, r: int, r_dtype: int, threads: int, /,
) -> None: ...
def fira_apply_f64(
    problem: _FiraProblem, t: int, t_dtype: int, f: int, g: int, g_stride: int, w: int, w_stride: int, w_dtype: int,
    first: int, rows: int, size: float, keep: float, rounding: tuple[bool, int, int, int], threads: int, /,
) -> None: ...

def is_intel() -> bool: ...
# With AVX2, where gemm_room is not -1: bytes of scratch.
def gemm_room(rows: int, columns: int, /) -> int: ...
# Operands: (data, dtype, row stride, column stride).
def gemm(
    a: tuple[int, int, int, int], b: tuple[int, int, int, int], c: int, rows: int, columns: int, depth: int, add: bool,
    room: int, threads: int, /,
) -> None: ...

# With AVX2, where fira_room is not -1: bytes of scratch.
def fira_room(problem: _FiraProblem, dtype: int, /) -> int: ...
def fira_project(
    problem: _FiraProblem, g: int, dtype: int, g_stride: int, basis: int, p_dtype: int, moments: _FiraMoments, r: int,
    r_dtype: int, squares: int, room: int, threads: int, /,
) -> None: ...
def fira_apply(
    problem: _FiraProblem, r: int, r_dtype: int, moments: _FiraMoments, basis: int, p_dtype: int, f: int, g: int,
    g_stride: int, w: int, w_stride: int, dtype: int, size: float, keep: float, rounding: tuple[bool, int, int, int],
    room: int, threads: int, /,
) -> None: ...

# fira's CUDA launchers: matrices of a group with what they share, and the stream.
_FiraMatrix = tuple[list[int], tuple[int, ...], int, bool]
_FiraShared = tuple[tuple[int, int, int, int, int], list[float], int, bool]

class _CudaFiraGroup:
    @property
    def mma(self) -> bool: ...

def cuda_fira_group(matrices: list[_FiraMatrix], shared: _FiraShared, /) -> _CudaFiraGroup: ...
def cuda_fira_project(group: _CudaFiraGroup, stream: int, /) -> None: ...
def cuda_fira_moments(group: _CudaFiraGroup, stream: int, /) -> None: ...
def cuda_fira_residual(group: _CudaFiraGroup, stream: int, /) -> None: ...
def cuda_fira_coefficients(group: _CudaFiraGroup, stream: int, /) -> None: ...
def cuda_fira_apply(group: _CudaFiraGroup, stream: int, /) -> None: ...


# (pointer, dtype, stride, offsets, count, total, bits, codes, centroids, buckets, dimension of the centroids)
_CudaSide = tuple[int, int, int, int, int, int, int, int, int, int, int]
# (q, d, dim, d_mask, floor, pair_q, pair_d, pairs, max_q, topk, temperature, q_inv, d_inv)
_CudaProblem = tuple[_CudaSide, _CudaSide, int, int, int, int, int, int, int, int, float, int, int]
_CudaGradient = tuple[int, int, int]  # (scores, weights, per_token)
_CudaOutput = tuple[int, int, int, bool, int]  # (data, dtype, ld, add, room)

def cuda_maxsim_fits(dim: int, /) -> bool: ...
def cuda_maxsim_norms(x: _CudaSide, dim: int, inverse: int, stream: int, /) -> None: ...
def cuda_maxsim_forward(
    p: _CudaProblem, mma: bool, q_aligned: bool, d_aligned: bool, share: int, maxima: int, winners: int, narrow: bool,
    stream: int, /,
) -> None: ...
def cuda_maxsim_forward_prefixes(
    p: _CudaProblem, mma: bool, q_aligned: bool, d_aligned: bool, prefixes: list[int],
    strides: tuple[int, int, int, int], maxima: int, winners: int, narrow: bool, stream: int, /,
) -> None: ...
def cuda_maxsim_scores(
    p: _CudaProblem, maxima: int, weights: int, scores: int, ld: int, stream: int, /,
) -> None: ...
def cuda_maxsim_backward(
    p: _CudaProblem, of_queries: bool, longest: int, g: _CudaGradient, ld: int, query_of: int, share: int,
    winners: int, narrow: bool, order: int, first: int, out: _CudaOutput, stream: int, /,
) -> None: ...
def cuda_maxsim_backward_smooth(
    p: _CudaProblem, of_queries: bool, g: _CudaGradient, ld: int, maxima: int, order: int, first: int,
    out: _CudaOutput, stream: int, /,
) -> None: ...

# norm_linear_attention. Contract: csrc/norm_linear_attention.h; tuples: csrc/bindings_norm_linear_attention.h.
_NlaView = tuple[int, int, int, int]
_NlaViews = tuple[
    _NlaView, _NlaView, _NlaView, _NlaView, _NlaView, _NlaView, _NlaView, _NlaView, _NlaView,
]
_NlaPointers = tuple[int, int, int, int, int, int, int, int]
_Nla = tuple[
    int, tuple[int, int, int, int, int, int, int], _NlaViews, _NlaPointers,
    tuple[int, bool, bool, bool], tuple[float, float, float, float],
]
_NlaParts = tuple[int, bool, int, int]  # (part, walk, first_q, first_k)
_NlaRoom = tuple[int, int]  # (address, bytes)
_NlaSlots = tuple[int, int, int, int]  # (count, each, sequence, place)

def norm_linear_attention_forward_f32(
    x: _Nla, parts: _NlaParts, room: _NlaRoom, s: int, z: int, threads: int, /,
) -> None: ...
def norm_linear_attention_backward_f32(
    x: _Nla, parts: _NlaParts, room: _NlaRoom, s: int, z: int, s_grad: int, z_grad: int, dparams: int, ds: int,
    dz: int, threads: int, /,
) -> None: ...
def norm_linear_attention_forward_f64(
    x: _Nla, parts: _NlaParts, room: _NlaRoom, s: int, z: int, threads: int, /,
) -> None: ...
def norm_linear_attention_backward_f64(
    x: _Nla, parts: _NlaParts, room: _NlaRoom, s: int, z: int, s_grad: int, z_grad: int, dparams: int, ds: int,
    dz: int, threads: int, /,
) -> None: ...
def cuda_norm_linear_attention_tile(x: _Nla, /) -> int: ...
def cuda_norm_linear_attention_state(
    x: _Nla, parts: _NlaSlots, part: int, s: int, z: int, stream: int, /,
) -> None: ...
def cuda_norm_linear_attention_scan(
    x: _Nla, tokens: int, part: int, each: int, width: int, initial: int, exclusive: bool, reverse: bool, parts: int,
    total: int, stream: int, /,
) -> None: ...
def cuda_norm_linear_attention_forward(
    x: _Nla, tiles: _NlaSlots, part: int, each: int, s: int, z: int, stream: int, /,
) -> None: ...
def cuda_norm_linear_attention_queries(
    x: _Nla, tiles: _NlaSlots, part: int, each: int, s: int, z: int, d: int, dd: int, dparams: int, stream: int, /,
) -> None: ...
def cuda_norm_linear_attention_grad_state(
    x: _Nla, parts: _NlaSlots, part: int, d: int, dd: int, last: int, ds: int, dz: int, stream: int, /,
) -> None: ...
def cuda_norm_linear_attention_keys(
    x: _Nla, tiles: _NlaSlots, part: int, each: int, d: int, dd: int, ds: int, dz: int, dparams: int, stream: int, /,
) -> None: ...
def cuda_norm_linear_attention_whole(x: _Nla, /) -> bool: ...
def cuda_norm_linear_attention_whole_forward(x: _Nla, s: int, z: int, stream: int, /) -> None: ...
def cuda_norm_linear_attention_whole_backward(
    x: _Nla, s: int, z: int, s_grad: int, z_grad: int, d: int, dd: int, dparams: int, dpowers: int, ds: int, dz: int,
    stream: int, /,
) -> None: ...
