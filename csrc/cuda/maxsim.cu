// maxsim on CUDA: norms, float32 products, and scores from the tokens' maxima. Contract: ../maxsim.h.
#include <type_traits>

#include "maxsim_sweep.cuh"

namespace pyelastic {
namespace cuda {

void maxsim_forward_mma(const MaxSimProblem& problem, const Sweep& sweep, void* stream);  // maxsim_mma.cu

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

__global__ void __launch_bounds__(kThreads) norms(Tokens x, std::int64_t dim, float* inverse /* [total] */) {
  const std::int64_t t = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (t >= x.total) return;
  double square = 0;  // in double, as a float32 row of norm 1e19 overflows float
  for (std::int64_t k = threadIdx.x % 32; k < dim; k += 32) {
    const double v = element(x, t, k);
    square += v * v;
  }
  const double norm = sqrt(warp_sum(square));
  if (threadIdx.x % 32 == 0) inverse[t] = static_cast<float>(1.0 / (norm < kZeroNorm ? kZeroNorm : norm));
}

// A warp a pair: lanes take the query's tokens in turn.
__global__ void __launch_bounds__(kThreads)
    scores_of(MaxSimProblem p, const float* maxima, const float* weights /* [q.total] or null */,
              float* scores /* [Nq, ld] or [P] */, std::int64_t ld) {
  const std::int64_t n = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const bool listed = p.pair_q != nullptr;
  if (n >= (listed ? p.pairs : p.q.count * p.d.count)) return;
  const std::int64_t i = listed ? p.pair_q[n] : n / p.d.count, j = listed ? 0 : n % p.d.count;
  const std::int64_t first = p.q.offsets[i], at = token_array(p, i, j, n);
  double sum = 0;
  for (std::int64_t s = threadIdx.x % 32; s < p.q.offsets[i + 1] - first; s += 32) {
    const float w = weights == nullptr ? 1.0f : weights[first + s];
    if (w != 0) sum += static_cast<double>(w) * maxima[at + s];
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) scores[listed ? n : i * ld + j] = static_cast<float>(sum);
}

unsigned warp_blocks(std::int64_t warps) { return static_cast<unsigned>((warps + kWarps - 1) / kWarps); }

}  // namespace

void maxsim_norms(const Tokens& x, std::int64_t dim, float* inverse, void* stream) {
  if (x.total == 0) return;
  LAUNCH((norms), warp_blocks(x.total), kThreads, 0, stream, x, dim, inverse);
}

void maxsim_forward(const MaxSimProblem& p, MaxSimReads reads, const float* share, float* maxima, Winners winners,
                    void* stream) {
  const float smooth = p.temperature > 0 ? static_cast<float>(1.4426950408889634 / p.temperature) : 0.0f;
  const Sweep w{0, 0, reads.q_aligned, reads.d_aligned, false, smooth, share, maxima, winners, {}};
  if (reads.mma) return maxsim_forward_mma(p, w, stream);
  forward_on<Simt>(p, w, stream);
}

void maxsim_scores(const MaxSimProblem& p, const float* maxima, const float* weights, float* scores, std::int64_t ld,
                   void* stream) {
  const std::int64_t pairs = p.pair_q != nullptr ? p.pairs : p.q.count * p.d.count;
  if (pairs == 0) return;
  LAUNCH((scores_of), warp_blocks(pairs), kThreads, 0, stream, p, maxima, weights, scores, ld);
}

}  // namespace cuda
}  // namespace pyelastic
