// maxsim on CUDA, forward for several prefixes of the dimension in one pass. Contract: ../maxsim.h; the kernel:
// maxsim_sweep.cuh.
//
// Products run on over the chunks of a tile; where a prefix ends, the sums so far are its similarities. A thread takes
// the maximum of a copy of them, and keeps the maxima of all prefixes in shared memory, at places that only it uses.
// Work: one product with the whole dimension instead of one with each prefix.
#include <type_traits>

#include "maxsim_sweep.cuh"

namespace pyelastic {
namespace cuda {

namespace {

template <class Engine, bool kWinners>
struct Prefixes {
  using One = Maximum<Engine, kWinners>;
  static constexpr bool kPrefixes = true;
  static constexpr int kWords = 2 * Engine::kRows;  // a maximum and its token for each row of a thread
  static constexpr int kWarpBytes = kMaxSimPlanes * kWords * 4 * 32;
  static constexpr int kSharedBytes = kWarpBytes / Engine::kWarpRows;  // a row
  std::uint32_t* own;  // words of this thread, 32 apart
  int count, plane;

  __device__ Prefixes(const MaxSimProblem&, const Sweep& w, const Part&, int warp_row, unsigned char* shared)
      : count(w.planes.count), plane(0) {
    own = reinterpret_cast<std::uint32_t*>(shared + warp_row * kSharedBytes) + threadIdx.x % 32;
  }
  __device__ __forceinline__ std::uint32_t& word(int of_plane, int n) const { return own[(of_plane * kWords + n) * 32]; }
  __device__ __forceinline__ void store(const One& one, int to) {
#pragma unroll
    for (int r = 0; r < Engine::kRows; ++r) {
      word(to, r) = __float_as_uint(one.m[r]);
      word(to, Engine::kRows + r) = static_cast<std::uint32_t>(one.at[r]);
    }
  }
  __device__ __forceinline__ void load(One& one, int from) const {
#pragma unroll
    for (int r = 0; r < Engine::kRows; ++r) {
      one.m[r] = __uint_as_float(word(from, r));
      one.at[r] = static_cast<int>(word(from, Engine::kRows + r));
    }
  }
  // By constant indices: a parameter that is indexed otherwise is copied to the stack.
  __device__ __forceinline__ int end_of(const Sweep& w) const {
    int end = w.planes.ends[0];
#pragma unroll
    for (int n = 1; n < kMaxSimPlanes; ++n) end = plane == n ? w.planes.ends[n] : end;
    return end;
  }
  static __device__ __forceinline__ One make(const MaxSimProblem& p, const Sweep& w) {
    return One(p, w, Part{}, 0, nullptr);
  }
  __device__ __forceinline__ void start() {
    for (int n = 0; n < count; ++n) {
#pragma unroll
      for (int r = 0; r < Engine::kRows; ++r) {
        word(n, r) = __float_as_uint(-infinity());
        word(n, Engine::kRows + r) = kNone;
      }
    }
  }

  // Adds elements k0 .. k0 + depth - 1 of a tile's tokens, of which the first is d.data[token] and the document's t0-th.
  __device__ __forceinline__ void multiply(const MaxSimProblem& p, const Sweep& w, const unsigned char* q,
                                           const unsigned char* d, int k0, int depth, const Columns& columns,
                                           std::int64_t token, int t0, typename Engine::Sums& sums) {
    for (int k = 0; k < depth;) {
      const int end = end_of(w) - k0, stop = end < depth ? end : depth;
      Engine::template multiply<true>(q, d, k, stop, sums);
      k = stop;
      if (stop != end) continue;
      take(p, w, columns, token, t0, sums);
      plane = plane + 1 < count ? plane + 1 : 0;  // the last prefix ends where the tile does
    }
  }

  __device__ __forceinline__ void take(const MaxSimProblem& p, const Sweep& w, const Columns& columns,
                                       std::int64_t token, int t0, typename Engine::Sums& sums) {
    const auto* const factors = static_cast<const float*>(p.d_inv);
    typename Engine::Sums s;
#pragma unroll
    for (int c = 0; c < Engine::kColumns; ++c) {
      const int column = Engine::column(c);
      const bool kept = (columns.kept[column / 32] >> (column % 32) & 1u) != 0;
      const float factor = factors != nullptr && kept ? factors[plane * w.planes.d_inv + token + column] : 1.0f;
#pragma unroll
      for (int r = 0; r < Engine::kRows; ++r) {
        Engine::at(s, r, c) = kept ? Engine::at(sums, r, c) * factor : -infinity();
      }
    }
    One one = make(p, w);
    load(one, plane);
    one.take(s, 0, t0);
    store(one, plane);
  }

  __device__ __forceinline__ void finish(const MaxSimProblem& p, const Sweep& w, const Part& part, std::int64_t j,
                                         std::int64_t out, int warp_row) {
    const auto* const q_inv = static_cast<const float*>(p.q_inv);
    const std::int64_t bytes = w.winners.narrow ? 2 : 4;
    for (int n = 0; n < count; ++n) {
      Winners winners = w.winners;
      if (kWinners) winners.data = static_cast<char*>(winners.data) + n * w.planes.winners * bytes;
      One one = make(p, w);
      load(one, n);
      one.store(p, q_inv != nullptr ? q_inv + n * w.planes.q_inv : nullptr, w.maxima + n * w.planes.maxima, winners,
                part, j, out, warp_row);
    }
  }
};

template <class Engine>
void prefixes_on(const MaxSimProblem& p, const Sweep& w, void* stream) {
  const bool small = p.pair_q != nullptr ? p.max_q <= 64 : p.q.total <= 64;
  const bool fits = Layout<Engine, Prefixes<Engine, true>, Engine::kLargeWarps>::shared(p.dim) <= shared_limit();
  const auto run = [&](auto winners) {
    using Aggregate = Prefixes<Engine, decltype(winners)::value>;
    if (small || !fits) return launch_sweep<Engine, Aggregate, Engine::kSmallWarps>(p, w, stream);
    launch_sweep<Engine, Aggregate, Engine::kLargeWarps>(p, w, stream);
  };
  if (w.winners.data != nullptr) return run(std::true_type{});
  run(std::false_type{});
}

}  // namespace

void maxsim_forward_prefixes(const MaxSimProblem& p, MaxSimReads reads, const MaxSimPlanes& planes, float* maxima,
                             Winners winners, void* stream) {
  Sweep w{0, 0, reads.q_aligned, reads.d_aligned, false, 0.0f, nullptr, maxima, winners, {}};
  w.planes = {planes.count, {}, planes.q_inv, planes.d_inv, planes.maxima, planes.winners};
  for (int n = 0; n < planes.count; ++n) w.planes.ends[n] = static_cast<int>(p.prefixes[n]);
  if (!reads.mma) return prefixes_on<Simt>(p, w, stream);
  if (p.q.dtype == Dtype::bfloat16) return prefixes_on<Mma<BF16>>(p, w, stream);
  prefixes_on<Mma<F16>>(p, w, stream);
}

}  // namespace cuda
}  // namespace pyelastic
