// What margin_softmax does to the cosines of a tile, shared by the kernels that read a tile from memory
// and those that have it in tensor-core accumulators. Formulas: ../margin_softmax.h.
#pragma once

#include "../common/device.cuh"
#include "../common/ptx.cuh"
#include "../margin_softmax.h"

namespace pyelastic {
namespace cuda {

constexpr float kLog2e = 1.4426950408889634f;
constexpr int kSumCos = 1, kRank = 2, kMoments = 4;  // bits of Negatives::stats
constexpr float kNone = -1e30f;                      // maximum of no negative: finite, so differences are 0
constexpr int kPartials = 7;                         // fields of RowStats

// The rule for the negatives of one row.
template <bool kHard>
struct Rule {
  float threshold = 0, a0 = 0, a1 = 1, a2 = 0;
  __device__ Rule(const Negatives& n, std::int64_t row) {
    if constexpr (kHard) {
      threshold = n.threshold[row];
      a0 = n.hard_map[0];
      a1 = n.hard_map[1];
      a2 = n.hard_map[2];
    }
  }
  __device__ float map(float c) const {
    if constexpr (!kHard) return c;
    return c > threshold ? a0 + c * (a1 + c * a2) : c;
  }
  __device__ float slope(float c) const {
    if constexpr (!kHard) return 1.0f;
    return c > threshold ? a1 + 2 * c * a2 : 1.0f;
  }
};

// Statistics of some negatives of one row; `max` and sum_z in units of the logit.
struct RowStats {
  float max = kNone, sum = 0, sum_sq = 0, sum_z = 0, sum_cos = 0, top = kNone;
  int rank = 0;
};

// Adds a negative of cosine c, given a maximum over all that will be added.
template <bool kHard, bool kExtra>
__device__ __forceinline__ void add_negative(RowStats& s, const Rule<kHard>& rule, float c, float scale,
                                             float cos_target) {
  const float z = rule.map(c) * scale;
  const float x = exp2_approx((z - s.max) * kLog2e);
  s.sum += x;
  if constexpr (kExtra) {
    s.sum_sq += x * x;
    s.sum_z += x * z;
    s.sum_cos += rule.map(c);
    s.rank += c > cos_target ? 1 : 0;
    s.top = max_or_nan(s.top, c);
  }
}

// The statistics of both; b may be of no negative at all.
template <bool kExtra>
__device__ __forceinline__ void merge(RowStats& a, const RowStats& b) {
  const float max = max_or_nan(a.max, b.max);
  const float ra = exp2_approx((a.max - max) * kLog2e), rb = exp2_approx((b.max - max) * kLog2e);
  a.max = max;
  a.sum = a.sum * ra + b.sum * rb;
  if constexpr (kExtra) {
    a.sum_sq = a.sum_sq * ra * ra + b.sum_sq * rb * rb;
    a.sum_z = a.sum_z * ra + b.sum_z * rb;
    a.sum_cos += b.sum_cos;
    a.rank += b.rank;
    a.top = max_or_nan(a.top, b.top);
  }
}

// Adds to the running statistics of a row, owned by the one thread that calls this.
__device__ __forceinline__ void carry(const RunningStats& to, int wanted, std::int64_t row, const RowStats& s) {
  const float before = to.max[row];
  const float max = max_or_nan(before, s.max);
  const double rb = exp(static_cast<double>(before) - max), rs = exp(static_cast<double>(s.max) - max);
  to.max[row] = max;
  to.sum[row] = to.sum[row] * rb + s.sum * rs;
  if (wanted & kMoments) {
    to.sum_sq[row] = to.sum_sq[row] * rb * rb + s.sum_sq * rs * rs;
    to.sum_z[row] = to.sum_z[row] * rb + s.sum_z * rs;
  }
  if (wanted & kSumCos) to.sum_cos[row] += s.sum_cos;
  if (wanted & kRank) {
    to.rank[row] += s.rank;
    to.max_cos[row] = max_or_nan(to.max_cos[row], s.top);
  }
}

// The gradient of one negative, scaled to fit a half (see the contract).
template <bool kHard>
struct Gradient {
  Rule<kHard> rule;
  float scale, shift, factor, sum;
  bool used;
  __device__ Gradient(const Negatives& n, std::int64_t row, const float* lse_neg, const float* grad_lse,
                      const float* grad_sum, const float* row_scale)
      : rule(n, row), scale(n.scale), shift(lse_neg[row]) {
    const float inverse = 1.0f / row_scale[row];  // finite, as row_scale is normal
    sum = grad_sum != nullptr ? grad_sum[row] : 0.0f;
    factor = grad_lse[row] * n.scale;
    // An ignored row, and one whose loss has no upstream gradient, gives exactly zero.
    used = n.labels[row] >= 0 && !(factor == 0 && sum == 0);
    // In this order: row_scale of a row that is sure of its class may be 1e-37, and 2^14 over it would overflow.
    factor = factor * inverse * kGradientScale;
    sum = sum * inverse * kGradientScale;
  }
  __device__ float operator()(float c) const {
    if (!used) return 0;
    const float p = exp2_approx((rule.map(c) * scale - shift) * kLog2e);
    return (p * factor + sum) * rule.slope(c);
  }
};

// Calls f with the two compile-time switches of the statistics kernels.
template <class F>
void visit_switches(const Negatives& n, F f) {
  const bool hard = n.threshold != nullptr, extra = n.stats != 0;
  if (hard && extra) return f(std::true_type{}, std::true_type{});
  if (hard) return f(std::true_type{}, std::false_type{});
  if (extra) return f(std::false_type{}, std::true_type{});
  f(std::false_type{}, std::false_type{});
}

}  // namespace cuda
}  // namespace pyelastic
