// norm_linear_attention on CUDA with a block per sequence and kv head, on tensor cores ("whole"): bfloat16 inputs whose d and dv
// are multiples of 8 up to 64. Contract and formulas: ../norm_linear_attention.h.
//
// Blocking: 256 threads walk over a sequence in tiles of 64 tokens. The sum of features times values, 128 x 64, is 32 registers
// of a thread; wider heads have no such form, as d = dv = 128 would take 128 of them, beside 64 for a tile's gradient.
// What a tile reads is a copy of it in shared memory, rounded to bfloat16, made once a sequence or, causal, once a tile.
// `whole_forward`: bidirectional, keys, then the queries of all heads of the group; causal, both in one walk. `whole_backward`:
// bidirectional, queries, which sum the gradient of the state, then keys; causal, a walk forwards that carries the state
// again, for dq, and one backwards that carries its gradient, for dk and dv.
// Bytes: bidirectional, q, o, k, v once; causal the same, and k, v again for each head of a group, from L1 or L2. States go to
// memory once a sequence, not once a tile or part.
#include "norm_linear_attention_mma.h"
#include "norm_linear_attention_mma_tiles.cuh"

namespace pyelastic {
namespace cuda {
namespace {

// Values and states have rows of 64 columns whatever dv is: tiles of both then serve all products.
__device__ __forceinline__ Widths whole_widths(const Problem& x) {
  Widths width(x);
  width.ldv = kStateLd;
  return width;
}

// What a block keeps beside the tiles: sums of features by thread, their total, and the state that tiles read. Eight rows more
// than it has, as products of 16 rows at a time read on behind those of an odd multiple of 8; nobody takes what they make.
struct WholeRoom {
  float *sums, *z;  // [16][kMmaThreads], [features]
  Bits* state;      // [features + 8][kStateLd], and what load_state fills up to a multiple of 64 rows
  float* rest;

  __host__ __device__ static constexpr int rows(int features) { return (features + kMmaTile - 1) / kMmaTile * kMmaTile + 8; }
  static std::size_t bytes(const Problem& x) {
    const int features = static_cast<int>(2 * x.dim);
    return sizeof(float) * static_cast<std::size_t>(kStateFloats + features + rows(features) * kStateLd / 2);
  }
  __device__ WholeRoom(float* shared, const Widths& width) {
    sums = shared;
    z = sums + kStateFloats;
    state = reinterpret_cast<Bits*>(z + width.features);
    rest = reinterpret_cast<float*>(state + rows(width.features) * kStateLd);
  }
};

// A StateFar that is in shared memory, rounded.
struct StateNear {
  const Bits* s;
  const float* z;
  template <int kCount>
  __device__ __forceinline__ void multiply(const Widths& width, const Fragment& f, const Tiles& tiles,
                                           float (&sums)[kCount][2][4]) const {
    __syncthreads();
    multiply_rows(f, tiles.own, width.ldf, s, width.ldv, width.features, width.v_dim, sums);
  }
  template <bool kWide>
  __device__ __forceinline__ void add_to(const Widths& width, const Fragment& f, const BackTiles& tiles, Back<kWide>& back) const {
    back.add_near(width, f, tiles.side, s);
  }
};

// SumInto, or none.
struct SumIf {
  SumInto into;
  bool on;
  __device__ __forceinline__ void operator()(int row, int c, const float (&upper)[8], const float (&lower)[8]) const {
    if (on) into(row, c, upper, lower);
  }
};

__device__ __forceinline__ Place sequence_of(const Problem& x, std::int64_t tokens) {
  const std::int64_t sequence = blockIdx.x;
  if (x.offsets == nullptr) return {sequence, 0, sequence, 0, tokens};
  return {sequence, 0, 0, x.offsets[sequence], x.offsets[sequence + 1] - x.offsets[sequence]};
}

// The block's state in arrays [sequences, kv_heads, size]; null stays null.
template <class T>
__device__ __forceinline__ T* of_block(const Problem& x, T* all, int size) {
  const std::int64_t slot = static_cast<std::int64_t>(blockIdx.x) * x.kv_heads + blockIdx.y;
  return all == nullptr ? nullptr : all + slot * size;
}

// The sums so far, with z's `initial`, to where tiles read them. Begins and ends with a barrier.
__device__ __forceinline__ void show(const Widths& width, const Fragment& f, StateSums<false>& sums, const float* initial,
                                     const WholeRoom& room) {
  __syncthreads();
  sums.round(width, f, room.state);
  sums.sum_z(width, initial, [&](int r, float sum) { room.z[r] = sum; });
  __syncthreads();
}

// The final sums to memory; `s` and `z` may be where they started from. Begins with a barrier.
__device__ __forceinline__ void leave(const Problem& x, const Widths& width, const Fragment& f, StateSums<false>& sums,
                                      const float* initial, float* s, float* z) {
  __syncthreads();
  sums.store(width, f, 0, of_block(x, s, width.features * width.v_dim), nullptr);
  float* const to = of_block(x, z, width.features);
  sums.sum_z(width, initial, [&](int r, float sum) { to[r] = sum; });
}

// The keys of a tile: features, summed, as `features`, and values as `values`, added to the sums. Begins with a barrier.
__device__ __forceinline__ void add_keys(const Problem& x, const Widths& width, const Fragment& f, const Place& at,
                                         std::int64_t first, int kv, Bits* features, Bits* values, StateSums<false>& sums) {
  __syncthreads();
  make_features<false>(x, x.k, at, first, kv, x.sin != nullptr, width, features, SumInto{sums.z});
  load_values(x.v, at, first, kv, 0, kStateColumns, width.v_dim, values, kStateLd);
  __syncthreads();
  sums.add(width, f, features, values);
}

template <bool kCausal>
__global__ void __launch_bounds__(kMmaThreads, kCausal ? 1 : 2)
    nla_whole_forward_mma(Problem x, float* s /* [sequences, Hk, 2 d, dv] */, float* z /* [sequences, Hk, 2 d] */) {
  DYN_SHARED(float, shared);
  const Widths width = whole_widths(x);
  const Fragment f;
  const WholeRoom room(shared, width);
  const Tiles tiles(room.rest, width);
  const int kv = static_cast<int>(blockIdx.y), group = static_cast<int>(x.q_heads / x.kv_heads);
  const Place at = sequence_of(x, x.queries);
  const float* const s0 = of_block(x, x.s0, width.features * width.v_dim);
  const float* const z0 = of_block(x, x.z0, width.features);
  const StateNear state{room.state, room.z};
  StateSums<false> sums(room.sums);
  if (s0 != nullptr) sums.load(width, f, s0);
  if constexpr (!kCausal) {
    const Place keys = sequence_of(x, x.keys);
    for (std::int64_t first = 0; first < keys.length; first += kMmaTile) {
      add_keys(x, width, f, keys, first, kv, tiles.own, tiles.values, sums);
    }
    leave(x, width, f, sums, z0, s, z);
    show(width, f, sums, z0, room);
  }
#pragma unroll 1
  for (std::int64_t first = 0; first < at.length; first += kMmaTile) {
    if constexpr (kCausal) show(width, f, sums, z0, room);
    const Met met = keys_met(x, at, first, kMmaTile, kMmaTile, false);
#pragma unroll 1
    for (int i = 0; i < group; ++i) {
      __syncthreads();
      forward_tile<false, false>(x, width, f, tiles, at, first, met, kv * group + i, kv, state,
                                 SumIf{SumInto{sums.z}, kCausal && i == 0});
    }
    if constexpr (kCausal) sums.add(width, f, tiles.others, tiles.values);
  }
  if constexpr (kCausal) leave(x, width, f, sums, z0, s, z);
}

// dq, dgate, dk, dv; dparams as nla_queries and, of powers, dpowers as nla_keys leave them; ds, dz.
template <bool kCausal>
__global__ void __launch_bounds__(kMmaThreads, 1)
    nla_whole_backward_mma(Problem x, const float* s, const float* z, const float* s_grad, const float* z_grad, float* d, float* dd,
                           float* dparams, float* dpowers, float* ds, float* dz) {
  DYN_SHARED(float, shared);
  const Widths width = whole_widths(x);
  const Fragment f;
  const WholeRoom room(shared, width);
  const BackTiles tiles(room.rest, width, kCausal);
  const int kv = static_cast<int>(blockIdx.y), group = static_cast<int>(x.q_heads / x.kv_heads), size = width.features * width.v_dim;
  const Place at = sequence_of(x, x.queries), keys = sequence_of(x, x.keys);
  const float* const s_start = of_block(x, kCausal ? x.s0 : s_grad, size);
  const float* const z0 = of_block(x, x.z0, width.features);
  const float* const z_start = of_block(x, z_grad, width.features);
  const StateNear near{room.state, room.z};
  StateSums<false> sums(room.sums);  // causal, of keys, then of queries; else of queries
  if (s_start != nullptr) sums.load(width, f, s_start);
  if constexpr (!kCausal) {
    const float *const whole = of_block(x, s, size), *const whole_z = of_block(x, z, width.features);
    for (int k = 0; k < width.features; k += kMmaTile) {
      load_state(whole, width, room.state + k * width.ldv, [&](int i) { return k + i < width.features ? k + i : -1; });
    }
    for (int r = static_cast<int>(threadIdx.x); r < width.features; r += kMmaThreads) room.z[r] = whole_z[r];
  }
  const std::int64_t slots = first_part(x, at.sequence, kMmaTile, (x.queries + kMmaTile - 1) / kMmaTile);
#pragma unroll 1
  for (std::int64_t first = 0; first < at.length; first += kMmaTile) {
    if constexpr (kCausal) show(width, f, sums, z0, room);
    const Met met = keys_met(x, at, first, kMmaTile, kMmaTile, false);
#pragma unroll 1
    for (int head = kv * group; head < kv * group + group; ++head) {
      __syncthreads();
      queries_tile<false, false>(
          x, width, f, tiles, at, first, met, head, kv, near, d, dd,
          [&] {
            if constexpr (!kCausal) {
              make_features<true>(x, x.q, at, first, head, x.sin != nullptr, width, tiles.Tiles::own,
                                  ScaledSumInto{{sums.z}, tiles.dd, 1, kMmaTile});
              __syncthreads();
              sums.add(width, f, tiles.Tiles::own, tiles.side);
              __syncthreads();
            }
          },
          dparams + ((slots + first / kMmaTile) * x.q_heads + head) * params_of(x));
    }
    if constexpr (kCausal) add_keys(x, width, f, at, first, kv, tiles.others, tiles.values, sums);
  }
  if constexpr (kCausal) {
    __syncthreads();
    sums.reset();
    const float* const given = of_block(x, s_grad, size);
    if (given != nullptr) sums.load(width, f, given);
  } else {
    leave(x, width, f, sums, z_start, ds, dz);
    show(width, f, sums, z_start, room);
  }
  const std::int64_t key_slots = first_part(x, at.sequence, kMmaTile, (x.keys + kMmaTile - 1) / kMmaTile);
#pragma unroll 1
  for (std::int64_t left = (keys.length + kMmaTile - 1) / kMmaTile; left > 0; --left) {
    const std::int64_t first = (left - 1) * kMmaTile;
    if constexpr (kCausal) show(width, f, sums, z_start, room);
    __syncthreads();
    keys_tile<false, false>(x, width, f, tiles, keys, first, queries_met(x, at, first, kMmaTile, false), kv, near, d, dd,
                            dpowers + ((key_slots + left - 1) * x.kv_heads + kv) * width.dim);
    if constexpr (kCausal) {
#pragma unroll 1
      for (int head = kv * group; head < kv * group + group; ++head) {
        __syncthreads();
        make_grad_tile(x, width, at, first, head, d, dd, 0, tiles.others, tiles.values, sums.z);
        __syncthreads();
        sums.add(width, f, tiles.others, tiles.values);
      }
    }
  }
  if constexpr (kCausal) leave(x, width, f, sums, z_start, ds, dz);
}

// Tiles of 64 columns of values.
Problem with_wide_rows(Problem x) {
  x.v_dim = kStateColumns;
  return x;
}

dim3 blocks_of(const Problem& x) { return dim3(static_cast<unsigned>(x.sequences), static_cast<unsigned>(x.kv_heads)); }

template <class Run>
void with_order(const Problem& x, Run run) {
  if (x.sequences == 0 || x.kv_heads == 0) return;
  x.causal ? run(std::true_type{}) : run(std::false_type{});
}

}  // namespace

bool nla_whole_fits(const Problem& x) { return nla_mma_fits(x) && x.dim <= 64 && x.v_dim <= kStateColumns; }

void nla_whole_forward(const Problem& x, float* s, float* z, void* stream) {
  const std::size_t shared = WholeRoom::bytes(x) + Tiles::bytes(with_wide_rows(x), false);
  with_order(x, [&](auto causal) {
    LAUNCH((nla_whole_forward_mma<decltype(causal)::value>), blocks_of(x), kMmaThreads, shared, stream, x, s, z);
  });
}

void nla_whole_backward(const Problem& x, const float* s, const float* z, const float* s_grad, const float* z_grad, float* d,
                        float* dd, float* dparams, float* dpowers, float* ds, float* dz, void* stream) {
  const std::size_t shared = WholeRoom::bytes(x) + BackTiles::bytes(with_wide_rows(x), false);
  with_order(x, [&](auto causal) {
    LAUNCH((nla_whole_backward_mma<decltype(causal)::value>), blocks_of(x), kMmaThreads, shared, stream, x, s, z, s_grad, z_grad,
           d, dd, dparams, dpowers, ds, dz);
  });
}

}  // namespace cuda
}  // namespace pyelastic
