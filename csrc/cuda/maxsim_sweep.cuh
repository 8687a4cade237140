// maxsim's forward on CUDA: one kernel over tiles, for each engine (maxsim_tile.cuh) and aggregate below. Contract:
// ../maxsim.h.
//
// Blocking: a block holds consecutive query tokens, of several queries if they are short: 128 of them (64 in float32), or
// 32 for short queries of a list and for few tokens in all. It walks over some documents in tiles of 64 tokens, of one
// document each, so that a document is read from L2 once for 128 query tokens. Tiles flow through kStages buffers filled
// by cp.async, without a stop between documents. A thread keeps the running aggregate of its own columns; lanes meet
// once a document.
// Bytes a tile of d from L2: 64 d elements for 2 * 128 * 64 * d operations. Shared memory at 16 bits and d = 128:
// 37 KB of queries, which stay, and 37 KB of stages.
#pragma once

#include <climits>

#include "maxsim_tile.cuh"

namespace pyelastic {
namespace cuda {

constexpr int kStages = 4;          // also how many tiles' columns are remembered: at most a tile a stage
constexpr int kResidentChunks = 4;  // of the dimension: up to here the queries stay in shared memory
constexpr int kNone = INT_MAX;      // position of no token
constexpr int kMaxTopk = 64;

// Prefixes of the dimension that one sweep takes, and how far apart their planes are, in elements.
struct Planes {
  int count, ends[kMaxSimPlanes];
  std::int64_t q_inv, d_inv, maxima, winners;
};

struct Sweep {
  std::int64_t tiles_m, per_block;  // documents of a block; 1 for a list
  bool q_aligned, d_aligned, resident;
  float smooth;        // log2(e) / tau
  const float* share;  // [d.count], top-k
  float* maxima;
  Winners winners;
  Planes planes;  // read by Prefixes (maxsim_prefixes.cu) alone
};

// What one block does: rows first_q .. of the query tokens, whose results begin at `out` of the per-token arrays.
struct Part {
  std::int64_t first_q;
  int rows;  // of the tile
};

struct Columns {
  float factor[kTileN];
  std::uint32_t kept[kTileN / 32];
};

// First kept token of document j, or -1.
__device__ inline int first_kept(const MaxSimProblem& p, std::int64_t j) {
  for (std::int64_t t = p.d.offsets[j]; t < p.d.offsets[j + 1]; ++t) {
    if (counts(p, t)) return static_cast<int>(t - p.d.offsets[j]);
  }
  return -1;
}

__device__ __forceinline__ void store_winner(const Winners& w, std::int64_t at, int t) {
  if (w.narrow) {
    static_cast<std::uint16_t*>(w.data)[at] = static_cast<std::uint16_t>(t);
  } else {
    static_cast<std::int32_t*>(w.data)[at] = t;
  }
}

__device__ __forceinline__ float query_factor(const MaxSimProblem& p, std::int64_t token) {
  return p.q_inv == nullptr ? 1.0f : static_cast<const float*>(p.q_inv)[token];
}

// Makes a thread's sums similarities: the documents' factors, and -inf in columns that do not count. Bit c of the
// result: whether column c does.
template <class Engine>
__device__ __forceinline__ std::uint32_t finish_tile(const MaxSimProblem& p, const Columns& columns,
                                                     typename Engine::Sums& s) {
  constexpr std::uint32_t kAll = (1u << Engine::kColumns) - 1;
  std::uint32_t kept = 0;
#pragma unroll
  for (int c = 0; c < Engine::kColumns; ++c) {
    const int column = Engine::column(c);
    kept |= (columns.kept[column / 32] >> (column % 32) & 1u) << c;
  }
  if (p.d_inv != nullptr) {
#pragma unroll
    for (int c = 0; c < Engine::kColumns; ++c) {
      const float factor = columns.factor[Engine::column(c)];
#pragma unroll
      for (int r = 0; r < Engine::kRows; ++r) Engine::at(s, r, c) *= factor;
    }
  }
  if (kept != kAll) {
#pragma unroll
    for (int c = 0; c < Engine::kColumns; ++c) {
#pragma unroll
      for (int r = 0; r < Engine::kRows; ++r) Engine::at(s, r, c) = kept >> c & 1u ? Engine::at(s, r, c) : -infinity();
    }
  }
  return kept;
}

// --- aggregates ---

// The maximum. The index is looked for only where a tile beats the maximum so far.
template <class Engine, bool kWinners>
struct Maximum {
  static constexpr int kSharedBytes = 0;  // a row
  static constexpr bool kPrefixes = false;
  float m[Engine::kRows];
  int at[Engine::kRows];

  __device__ Maximum(const MaxSimProblem&, const Sweep&, const Part&, int, unsigned char*) {}
  __device__ __forceinline__ void start() {
#pragma unroll
    for (int r = 0; r < Engine::kRows; ++r) {
      m[r] = -infinity();
      at[r] = kNone;
    }
  }
  __device__ __forceinline__ void take(typename Engine::Sums& s, std::uint32_t, int t0) {
#pragma unroll
    for (int r = 0; r < Engine::kRows; ++r) {
      float top = Engine::at(s, r, 0);
#pragma unroll
      for (int c = 1; c < Engine::kColumns; ++c) top = max_nan(top, Engine::at(s, r, c));
      if (!above(top, m[r])) continue;
      m[r] = top;
      if constexpr (kWinners) {
        int column = 0;
#pragma unroll
        for (int c = Engine::kColumns - 1; c >= 0; --c) {
          const float v = Engine::at(s, r, c);
          if (v == top || (top != top && v != v)) column = Engine::column(c);
        }
        at[r] = t0 + column;
      }
    }
  }
  __device__ __forceinline__ void finish(const MaxSimProblem& p, const Sweep& w, const Part& part, std::int64_t j,
                                         std::int64_t out, int warp_row) {
    store(p, static_cast<const float*>(p.q_inv), w.maxima, w.winners, part, j, out, warp_row);
  }
  __device__ __forceinline__ void store(const MaxSimProblem& p, const float* q_inv, float* maxima, const Winners& winners,
                                        const Part& part, std::int64_t j, std::int64_t out, int warp_row) {
    const int own = static_cast<int>(threadIdx.x) % Engine::kShare;  // the row of theirs that this lane stores
    float result = 0;
    int winner = kNone;
#pragma unroll
    for (int r = 0; r < Engine::kRows; ++r) {
#pragma unroll
      for (int lanes = 1; lanes < Engine::kShare; lanes *= 2) {
        const float other = __shfl_xor_sync(kAllLanes, m[r], lanes);
        const int other_at = kWinners ? __shfl_xor_sync(kAllLanes, at[r], lanes) : kNone;
        const bool same = other == m[r] || (other != other && m[r] != m[r]);
        if (above(other, m[r]) || (same && other_at < at[r])) {
          m[r] = other;
          at[r] = other_at;
        }
      }
      result = own == r ? m[r] : result;
      winner = own == r ? at[r] : winner;
    }
    const int row = warp_row + Engine::row(own);
    if (own >= Engine::kRows || row >= part.rows) return;
    if (result == -infinity()) winner = first_kept(p, j);  // nothing is above it, so it may be no token at all
    if (q_inv != nullptr) result *= q_inv[part.first_q + row];
    if (winner == -1 || (p.floor != nullptr && p.floor[j] != 0 && result < 0)) {
      winner = -1;
      result = 0;
    }
    maxima[out + row] = result;
    if constexpr (kWinners) store_winner(winners, out + row, winner);
  }
};

// tau log sum exp(s / tau), as a maximum and a sum in powers of 2.
template <class Engine>
struct Smooth {
  static constexpr int kSharedBytes = 0;
  static constexpr bool kPrefixes = false;
  float top[Engine::kRows], sum[Engine::kRows], scale[Engine::kRows];

  __device__ Smooth(const MaxSimProblem& p, const Sweep& w, const Part& part, int warp_row, unsigned char*) {
#pragma unroll
    for (int r = 0; r < Engine::kRows; ++r) {
      const int row = warp_row + Engine::row(r);
      scale[r] = row < part.rows ? query_factor(p, part.first_q + row) * w.smooth : 0.0f;
    }
  }
  __device__ __forceinline__ void start() {
#pragma unroll
    for (int r = 0; r < Engine::kRows; ++r) {
      top[r] = -infinity();
      sum[r] = 0;
    }
  }
  // 2^(x - top), where inf - inf is 0.
  static __device__ __forceinline__ float term(float x, float top) { return exp2_approx(x == top ? 0.0f : x - top); }
  __device__ __forceinline__ void take(typename Engine::Sums& s, std::uint32_t kept, int) {
#pragma unroll
    for (int r = 0; r < Engine::kRows; ++r) {
      float v[Engine::kColumns], most = top[r];
#pragma unroll
      for (int c = 0; c < Engine::kColumns; ++c) {
        v[c] = kept >> c & 1u ? Engine::at(s, r, c) * scale[r] : -infinity();
        most = max_nan(most, v[c]);
      }
      float total = sum[r] * term(top[r], most);
#pragma unroll
      for (int c = 0; c < Engine::kColumns; ++c) total += kept >> c & 1u ? term(v[c], most) : 0.0f;
      top[r] = most;
      sum[r] = total;
    }
  }
  __device__ __forceinline__ void finish(const MaxSimProblem& p, const Sweep& w, const Part& part, std::int64_t j,
                                         std::int64_t out, int warp_row) {
    const int own = static_cast<int>(threadIdx.x) % Engine::kShare;
    float own_top = 0, own_sum = 0;
#pragma unroll
    for (int r = 0; r < Engine::kRows; ++r) {
#pragma unroll
      for (int lanes = 1; lanes < Engine::kShare; lanes *= 2) {
        const float other = __shfl_xor_sync(kAllLanes, top[r], lanes);
        const float most = max_nan(top[r], other);
        const float here = sum[r] * term(top[r], most);
        const float there = __shfl_xor_sync(kAllLanes, sum[r], lanes) * term(other, most);
        sum[r] = here + there;
        top[r] = most;
      }
      own_top = own == r ? top[r] : own_top;
      own_sum = own == r ? sum[r] : own_sum;
    }
    const int row = warp_row + Engine::row(own);
    if (own >= Engine::kRows || row >= part.rows) return;
    // No token: a kept one adds at least one term of 1, or NaN.
    w.maxima[out + row] = own_sum == 0 ? 0.0f : (own_top + log2f(own_sum)) / w.smooth;
  }
};

// The mean of the k largest. A tile of similarities goes to shared memory, where one lane per row sorts it into the
// row's list: simple, and slower than the maximum.
template <class Engine>
struct TopK {
  static constexpr int kStride = kTileN + 1;
  static constexpr int kSharedBytes = 4 * (kStride + 2 * kMaxTopk);
  static constexpr bool kPrefixes = false;
  float* tile;  // of this warp: [kWarpRows][kStride]
  float* best;  // [kMaxTopk][kWarpRows]
  int* at;
  int k;

  __device__ TopK(const MaxSimProblem& p, const Sweep&, const Part&, int warp_row, unsigned char* shared) : k(p.topk) {
    tile = reinterpret_cast<float*>(shared + warp_row * kSharedBytes);
    best = tile + Engine::kWarpRows * kStride;
    at = reinterpret_cast<int*>(best + kMaxTopk * Engine::kWarpRows);
  }
  static __device__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ __forceinline__ void start() {
    if (lane() >= Engine::kWarpRows) return;
    for (int n = 0; n < k; ++n) at[n * Engine::kWarpRows + lane()] = -1;
  }
  __device__ __forceinline__ void take(typename Engine::Sums& s, std::uint32_t own, int t0) {
    std::uint64_t kept = 0;
#pragma unroll
    for (int c = 0; c < Engine::kColumns; ++c) {
      kept |= static_cast<std::uint64_t>(own >> c & 1u) << Engine::column(c);
#pragma unroll
      for (int r = 0; r < Engine::kRows; ++r) tile[Engine::row(r) * kStride + Engine::column(c)] = Engine::at(s, r, c);
    }
#pragma unroll
    for (int lanes = 1; lanes < Engine::kShare; lanes *= 2) kept |= __shfl_xor_sync(kAllLanes, kept, lanes);
    __syncwarp();
    if (lane() < Engine::kWarpRows) {
      for (int c = 0; c < kTileN; ++c) {
        if (kept >> c & 1u) insert(tile[lane() * kStride + c], t0 + c);
      }
    }
    __syncwarp();  // the tile may be written again
  }
  __device__ void insert(float v, int t) {
    for (int n = k - 1; n >= 0; --n) {  // from the lowest up, past those that v is above
      const int here = n * Engine::kWarpRows + lane();
      if (at[here] >= 0 && !above(v, best[here])) return;
      if (n + 1 < k) {
        best[here + Engine::kWarpRows] = best[here];
        at[here + Engine::kWarpRows] = at[here];
      }
      best[here] = v;
      at[here] = t;
    }
  }
  __device__ __forceinline__ void finish(const MaxSimProblem& p, const Sweep& w, const Part& part, std::int64_t j,
                                         std::int64_t out, int warp_row) {
    const int row = warp_row + lane();
    if (lane() >= Engine::kWarpRows || row >= part.rows) return;
    double sum = 0;
    for (int n = 0; n < k; ++n) {
      const int here = n * Engine::kWarpRows + lane();
      if (at[here] >= 0) sum += best[here];
      if (w.winners.data != nullptr) store_winner(w.winners, out + row + n * plane_size(p), at[here]);
    }
    w.maxima[out + row] = static_cast<float>(sum * w.share[j]) * query_factor(p, part.first_q + row);
  }
};

// --- the kernel ---

template <class Engine, class Aggregate, int kWarps>
struct Layout {
  static constexpr int kTileM = kWarps * Engine::kWarpRows, kThreads = kWarps * 32;
  static constexpr int kQueryBytes = kTileM * kRowBytes, kDocumentBytes = kTileN * kRowBytes;
  static std::int64_t chunks(std::int64_t dim) { return (dim + Engine::kChunk - 1) / Engine::kChunk; }
  static bool resident(std::int64_t dim) { return chunks(dim) <= kResidentChunks; }
  static std::size_t shared(std::int64_t dim) {
    const std::int64_t queries = resident(dim) ? chunks(dim) : kStages;
    return static_cast<std::size_t>(queries * kQueryBytes + kStages * kDocumentBytes) + kStages * sizeof(Columns) +
           static_cast<std::size_t>(Aggregate::kSharedBytes * kTileM);
  }
};

// Where the loader is: it runs kStages - 1 chunks ahead of the products.
struct Cursor {
  std::int64_t j, end, begin;
  int t, k, length;
  unsigned tile;  // how many came before

  __device__ void document(const MaxSimProblem& p) {  // skips empty ones
    for (; j < end; ++j) {
      begin = p.d.offsets[j];
      length = static_cast<int>(p.d.offsets[j + 1] - begin);
      if (length > 0) return;
    }
  }
  __device__ bool done() const { return j >= end; }
  __device__ void advance(const MaxSimProblem& p, int chunk) {
    k += chunk;
    if (k < static_cast<int>(p.dim)) return;
    k = 0;
    t += kTileN;
    ++tile;
    if (t < length) return;
    t = 0;
    ++j;
    document(p);
  }
};

template <class Engine, class Aggregate, int kWarps>
__global__ void __launch_bounds__(kWarps * 32,
                                  kWarps == Engine::kLargeWarps && !Aggregate::kPrefixes ? Engine::kLargeBlocks : 1)
    sweep(MaxSimProblem p, Sweep w) {
  using L = Layout<Engine, Aggregate, kWarps>;
  using Element = typename Engine::Element;
  DYN_SHARED(unsigned char, shared);
  const bool listed = p.pair_q != nullptr;
  const std::int64_t part_of = blockIdx.x / w.tiles_m, m0 = blockIdx.x % w.tiles_m * L::kTileM;
  const std::int64_t query = listed ? p.pair_q[part_of] : 0;
  const std::int64_t q_begin = listed ? p.q.offsets[query] : 0, q_end = listed ? p.q.offsets[query + 1] : p.q.total;
  const std::int64_t left_q = q_end - q_begin - m0;
  const Part part{q_begin + m0, static_cast<int>(left_q < L::kTileM ? left_q : L::kTileM)};
  if (part.rows <= 0) return;  // all threads of the block
  const std::int64_t j_begin = listed ? p.pair_d[part_of] : part_of * w.per_block;
  const std::int64_t j_end = listed || j_begin + w.per_block < p.d.count ? j_begin + w.per_block : p.d.count;

  const int dim = static_cast<int>(p.dim), chunks = (dim + Engine::kChunk - 1) / Engine::kChunk;
  unsigned char* const q_tiles = shared;
  unsigned char* const d_tiles = q_tiles + (w.resident ? chunks : kStages) * L::kQueryBytes;
  auto* const columns = reinterpret_cast<Columns*>(d_tiles + kStages * L::kDocumentBytes);
  auto* const room = reinterpret_cast<unsigned char*>(columns + kStages);

  const auto load_q = [&](int k, unsigned char* to) {
    load_rows<Element, L::kTileM, L::kThreads>(p.q, part.first_q, part.rows, k, dim, w.q_aligned, to);
  };
  const auto load = [&](const Cursor& at, unsigned step) {
    const unsigned stage = step % kStages;
    if (!w.resident) load_q(at.k, q_tiles + stage * L::kQueryBytes);
    load_rows<Element, kTileN, L::kThreads>(p.d, at.begin + at.t, at.length - at.t, at.k, dim, w.d_aligned,
                                            d_tiles + stage * L::kDocumentBytes);
    if (at.k != 0) return;
    Columns& to = columns[at.tile % kStages];
    for (int c = static_cast<int>(threadIdx.x); c < kTileN; c += L::kThreads) {
      const std::int64_t token = at.begin + at.t + c;
      const bool kept = at.t + c < at.length && counts(p, token);
      const std::uint32_t word = __ballot_sync(kAllLanes, kept);
      if (c % 32 == 0) to.kept[c / 32] = word;
      if (p.d_inv != nullptr) to.factor[c] = kept ? static_cast<const float*>(p.d_inv)[token] : 0.0f;
    }
  };

  Cursor ahead{j_begin, j_end, 0, 0, 0, 0, 0u};
  ahead.document(p);
  if (w.resident && !ahead.done()) {
    for (int n = 0; n < chunks; ++n) load_q(n * Engine::kChunk, q_tiles + n * L::kQueryBytes);
  }
  unsigned step = 0, tile = 0;
  for (unsigned n = 0; n < kStages - 1; ++n) {
    if (!ahead.done()) {
      load(ahead, n);
      ahead.advance(p, Engine::kChunk);
    }
    cp_async_commit();  // one group a step, empty ones included: the count below is constant
  }
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * Engine::kWarpRows;
  Aggregate aggregate(p, w, part, warp_row, room);
  typename Engine::Sums sums;
  for (std::int64_t j = j_begin; j < j_end; ++j) {
    aggregate.start();
    const int length = static_cast<int>(p.d.offsets[j + 1] - p.d.offsets[j]);
    for (int t = 0; t < length; t += kTileN, ++tile) {
      Engine::clear(sums);
      for (int n = 0; n < chunks; ++n, ++step) {
        cp_async_wait<kStages - 2>();
        __syncthreads();  // the step is there for all, and nobody still reads the buffers to be filled next
        if (!ahead.done()) {
          load(ahead, step + kStages - 1);
          ahead.advance(p, Engine::kChunk);
        }
        cp_async_commit();
        const int left = dim - n * Engine::kChunk, depth = left < Engine::kChunk ? left : Engine::kChunk;
        const unsigned stage = step % kStages;
        const unsigned char* const q =
            q_tiles + (w.resident ? static_cast<unsigned>(n) : stage) * L::kQueryBytes + warp_row * kRowBytes;
        const unsigned char* const d = d_tiles + stage * L::kDocumentBytes;
        if constexpr (Aggregate::kPrefixes) {
          aggregate.multiply(p, w, q, d, n * Engine::kChunk, depth, columns[tile % kStages], p.d.offsets[j] + t, t, sums);
        } else {
          Engine::multiply(q, d, 0, depth, sums);
        }
      }
      if constexpr (!Aggregate::kPrefixes) aggregate.take(sums, finish_tile<Engine>(p, columns[tile % kStages], sums), t);
    }
    aggregate.finish(p, w, part, j, (listed ? part_of * p.max_q : j * p.q.total) + m0, warp_row);
  }
  cp_async_wait<0>();
}

// --- the launch ---

constexpr std::int64_t kWantedBlocks = 2048;  // some waves of a large GPU

template <class Engine, class Aggregate, int kWarps>
void launch_sweep(const MaxSimProblem& p, Sweep w, void* stream) {
  using L = Layout<Engine, Aggregate, kWarps>;
  const bool listed = p.pair_q != nullptr;
  w.tiles_m = ((listed ? p.max_q : p.q.total) + L::kTileM - 1) / L::kTileM;
  const std::int64_t documents = listed ? p.pairs : p.d.count;
  if (w.tiles_m == 0 || documents == 0) return;
  w.per_block = listed ? 1 : (documents * w.tiles_m + kWantedBlocks - 1) / kWantedBlocks;
  if (w.per_block > documents) w.per_block = documents;
  w.resident = L::resident(p.dim);
  const auto blocks = static_cast<unsigned>((documents + w.per_block - 1) / w.per_block * w.tiles_m);
  LAUNCH((sweep<Engine, Aggregate, kWarps>), blocks, L::kThreads, L::shared(p.dim), stream, p, w);
}

template <class Engine>
void forward_on(const MaxSimProblem& p, const Sweep& w, void* stream) {
  constexpr int kSmall = Engine::kSmallWarps, kLarge = Engine::kLargeWarps;
  if (p.topk > 1) return launch_sweep<Engine, TopK<Engine>, kSmall>(p, w, stream);
  const auto run = [&](auto large) {
    constexpr int kWarps = decltype(large)::value ? kLarge : kSmall;
    if (p.temperature > 0) return launch_sweep<Engine, Smooth<Engine>, kWarps>(p, w, stream);
    if (w.winners.data != nullptr) return launch_sweep<Engine, Maximum<Engine, true>, kWarps>(p, w, stream);
    launch_sweep<Engine, Maximum<Engine, false>, kWarps>(p, w, stream);
  };
  // A list's blocks have one query each. Large tiles of d > 128 at 16 bits need 110 KB, which sm_86 and sm_89 do not have.
  const bool small = p.pair_q != nullptr ? p.max_q <= 64 : p.q.total <= 64;
  const bool fits = Layout<Engine, Maximum<Engine, true>, kLarge>::shared(p.dim) <= shared_limit();
  if (small || !fits) return run(std::false_type{});
  run(std::true_type{});
}

}  // namespace cuda
}  // namespace pyelastic
