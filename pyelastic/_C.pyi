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
