// norm_linear_attention on CUDA, backward, on tensor cores: bfloat16 inputs of widths that are multiples of 8. Contract and
// formulas: ../norm_linear_attention.h; the passes are those of norm_linear_attention_backward.cu.
//
// Blocking: as in the forward pass, 64 tokens of a head a block. The gradient of their features, 64 x 2 d, stays in registers
// while pieces of the state and the part's other tokens pass by; a warp holds both halves of its channels, so that RoPE is
// undone in place. It goes through shared memory once, where threads take eight channels of a row to make dq or dk. Rounded
// to bfloat16, once, for the products: y = g / D, features, weights, states, and dD where it is a weight.
#include "norm_linear_attention_mma.h"
#include "norm_linear_attention_mma_backward.cuh"

namespace pyelastic {
namespace cuda {
namespace {

bool wide(const Problem& x) { return x.dim > 64 || x.v_dim > 64; }

template <bool kWide, bool kAlone>
__global__ void __launch_bounds__(kMmaThreads, kWide ? 1 : 2)
    nla_queries_mma(Problem x, NlaSlots pieces, std::int64_t part, std::int64_t each, const float* s, const float* z,
                    float* d_out, float* dd_out, float* dparams) {
  DYN_SHARED(float, shared);
  const Widths width(x);
  const Fragment f;
  const BackTiles tiles(shared, width, x.causal || kAlone);
  const std::int64_t head = blockIdx.y, kv = head / (x.q_heads / x.kv_heads);
  const Place at = locate(x, pieces, x.queries, kAlone);
  const std::int64_t first = at.part * kMmaTile;
  if (first >= at.length) return;
  const Met met = keys_met(x, at, first, part, kMmaTile, kAlone);
  const int slot = state_slot(x, at, first, part, each, kv);
  const float* const state = kAlone ? nullptr : s + state_at(slot, width.features * width.v_dim);
  if (!kAlone) z += state_at(slot, width.features);
  const bool rope = x.sin != nullptr;
  make_queries(x, width, f, tiles, at, first, met, head, kv, z, true);
  if (threadIdx.x < kMmaTile) {
    const std::int64_t token = first + threadIdx.x;
    const bool there = token < at.length;
    const float d = there ? tiles.d[threadIdx.x] + effective_eps(x, at, token) : 1.0f;
    tiles.d[threadIdx.x] = d;
    if (there) d_out[query_row(x, at, token, head)] = d;
  }
  __syncthreads();
  make_gradient(x, at, first, head, 0, width.ldv - 8, width.v_dim, tiles.side, width.ldv,
                [&](int row) { return tiles.d[row]; });
  if (x.dgate.data != nullptr) {
    float out[kPairs<kWide>][2][4];
    clear(out);
    if (!kAlone) multiply_state(width, f, tiles, state, out);
    for (std::int64_t other = met.first; other < met.end; other += kMmaTile) {
      make_features<false>(x, x.k, met.at, other, kv, rope, width, tiles.others, NoLook{});
      load_values(x.v, met.at, other, kv, 0, width.ldv - 8, width.v_dim, tiles.values, width.ldv);
      weigh_keys(width, f, tiles, ahead_of(x, first, other), true, false);
      multiply_rows(f, tiles.weights, kWeightsLd, tiles.values, width.ldv, kMmaTile, width.v_dim, out);
      __syncthreads();
    }
#pragma unroll
    for (int n = 0; n < 8 * kPairs<kWide>; ++n) {
      const int i = n / 8, tile = n / 4 % 2, row = f.row + f.g + n / 2 % 2 * 8;
      const int c = 16 * (f.half + 2 * i) + 8 * tile + 2 * f.t + n % 2;
      const std::int64_t token = first + row;
      if (token >= at.length || c >= width.v_dim) continue;
      const float g = gate_value(x, at, token, head, c), sig = sigmoid(g);
      const float up = widen(row_of<const Bits>(x.o, at, token, head)[c]);
      const float made = up * (out[i][tile][n % 4] / tiles.d[row]) * sig * (1.0f + g * (1.0f - sig));
      row_of<Bits>(x.dgate, at, token, head)[c] = static_cast<Bits>(pack(made, 0.0f, BF16{}));
    }
  }
  Back<kWide> back;
  if (!kAlone) back.add_state(width, f, tiles.side, state, tiles.values);
  for (std::int64_t other = met.first; other < met.end; other += kMmaTile) {
    __syncthreads();
    make_features<false>(x, x.k, met.at, other, kv, rope, width, tiles.others, NoLook{});
    load_values(x.v, met.at, other, kv, 0, width.ldv - 8, width.v_dim, tiles.values, width.ldv);
    __syncthreads();
    float w[2][2][4];
    multiply_tokens(f, tiles.side, tiles.values, width.ldv, width.ldv - 8, w);
    mask_tokens<true>(f, ahead_of(x, first, other), w);
    store_tokens(f, w, tiles.weights);
    __syncthreads();
    back.add_tokens(width, f, tiles.weights, tiles.others);
  }
  back.dot_rows(width, f, tiles.Tiles::own, tiles.sums);
  __syncthreads();
  if (threadIdx.x < kMmaTile) {
    const float dd = -(tiles.sums[threadIdx.x] + tiles.sums[kMmaTile + threadIdx.x]) / tiles.d[threadIdx.x];
    tiles.dd[threadIdx.x] = dd;
    if (first + threadIdx.x < at.length) dd_out[query_row(x, at, first + threadIdx.x, head)] = dd;
  }
  if (rope && !x.rope_both) back.turn_back(x, width, f, at, first);
  __syncthreads();  // dd
  if (!kAlone) back.add_rows(width, f, tiles.dd, z);
  for (std::int64_t other = met.first; other < met.end; other += kMmaTile) {
    __syncthreads();
    make_features<false>(x, x.k, met.at, other, kv, x.rope_both && rope, width, tiles.others, NoLook{});
    store_meeting(ahead_of(x, first, other), true, tiles.weights, [&](int row, int) { return tiles.dd[row]; });
    __syncthreads();
    back.add_tokens(width, f, tiles.weights, tiles.others);
  }
  if (rope && x.rope_both) back.turn_back(x, width, f, at, first);
  __syncthreads();
  back.store(width, f, tiles.h);
  __syncthreads();
  query_gradients(x, width, at, first, head, tiles,
                  dparams + (static_cast<std::int64_t>(blockIdx.x) * x.q_heads + head) * (is_pola(x.map) ? width.dim : 3));
}

template <bool kWide>
__global__ void __launch_bounds__(kMmaThreads, 2)
    nla_grad_state_mma(Problem x, NlaSlots parts, std::int64_t part, const float* d_in, const float* dd_in,
                       float* ds /* [parts, Hq, 2 d, dv] */, float* dz /* [parts, Hq, 2 d] */) {
  DYN_SHARED(float, shared);
  const Widths width(x);
  const Fragment f;
  Bits* const queries = reinterpret_cast<Bits*>(shared + kStateFloats);  // [64][ldf]
  Bits* const y = queries + kMmaTile * width.ldf;                        // [64][kStateLd]
  const std::int64_t head = blockIdx.y;
  const int column = static_cast<int>(blockIdx.z) * kStateColumns;
  const Place at = locate_part(x, parts, x.queries, part);
  const std::int64_t first = at.part * part;
  if (first >= at.length) return;
  StateSums<kWide> sums(shared);
  for (std::int64_t token = first; token < at.length; token += kMmaTile) {
    __syncthreads();
    const float* const dd = dd_in + query_row(x, at, token, head);
    make_features<true>(x, x.q, at, token, head, x.sin != nullptr, width, queries,
                        [&](int row, int, const float(&upper)[8], const float(&lower)[8]) {
                          const float scale = token + row < at.length ? dd[row * x.q_heads] : 0.0f;
#pragma unroll
                          for (int i = 0; i < 8; ++i) {
                            SumInto{shared}.at(i) += scale * upper[i];
                            SumInto{shared}.at(8 + i) += scale * lower[i];
                          }
                        });
    const float* const d = d_in + query_row(x, at, token, head);
    make_gradient(x, at, token, head, column, kStateColumns, width.v_dim, y, kStateLd, [&](int row) { return d[row * x.q_heads]; });
    __syncthreads();
    sums.add(width, f, queries, y);
  }
  const std::int64_t slot = static_cast<std::int64_t>(blockIdx.x) * x.q_heads + head;
  sums.store(width, f, column, ds + slot * width.features * width.v_dim,
             blockIdx.z == 0 ? dz + slot * width.features : nullptr);
}

template <bool kWide, bool kAlone>
__global__ void __launch_bounds__(kMmaThreads, kWide ? 1 : 2)
    nla_keys_mma(Problem x, NlaSlots pieces, std::int64_t part, std::int64_t each, const float* d_in,
                 const float* dd_in, const float* ds, const float* dz, float* dparams) {
  DYN_SHARED(float, shared);
  const Widths width(x);
  const Fragment f;
  const BackTiles tiles(shared, width, x.causal || kAlone);
  const int kv = static_cast<int>(blockIdx.y), group = static_cast<int>(x.q_heads) / static_cast<int>(x.kv_heads);
  const Place at = locate(x, pieces, x.keys, kAlone);
  const std::int64_t first = at.part * kMmaTile;
  if (first >= at.length) return;
  const int slot = state_slot(x, at, first, part, each, kv);
  const float* const state = kAlone ? nullptr : ds + state_at(slot, width.features * width.v_dim);
  const Met met = queries_met(x, at, first, part, kAlone);
  const int span = static_cast<int>(met.end - met.first);
  const bool rope = x.sin != nullptr;
  const auto meet = [&](auto what) {  // begins with a barrier, if there is any
    // One loop, and kAlone wherever it decides: narrow heads have no register left.
#pragma unroll 1
    for (int head = kv * group, after = 0; head < kv * group + group && (kAlone || after < span);) {
      __syncthreads();
      what(head, (kAlone ? met.first : first) + after, kAlone && !x.causal ? -kMmaTile : -after);
      __syncthreads();
      after += kMmaTile;
      if (after >= span) after = 0, ++head;
    }
  };
  const auto make_y = [&](int head, std::int64_t other) {  // ends with a barrier
    const float* const d = d_in + query_row(x, met.at, other, head);
    make_gradient(x, met.at, other, head, 0, width.ldv - 8, width.v_dim, tiles.values, width.ldv,
                  [&](int row) { return d[row * x.q_heads]; });
    __syncthreads();
  };
  make_features<false>(x, x.k, at, first, kv, rope, width, tiles.Tiles::own, NoLook{});
  load_values(x.v, at, first, kv, 0, width.ldv - 8, width.v_dim, tiles.side, width.ldv);
  {
    float out[kPairs<kWide>][2][4];
    clear(out);
    if (!kAlone) multiply_state(width, f, tiles, state, out);
    meet([&](int head, std::int64_t other, int ahead) {
      make_features<true>(x, x.q, met.at, other, head, rope, width, tiles.others, NoLook{});
      make_y(head, other);
      float w[2][2][4];
      multiply_tokens(f, tiles.Tiles::own, tiles.others, width.ldf, width.features, w);
      mask_tokens<false>(f, ahead, w);
      store_tokens(f, w, tiles.weights);
      __syncthreads();
      multiply_rows(f, tiles.weights, kWeightsLd, tiles.values, width.ldv, kMmaTile, width.v_dim, out);
    });
    const bool aligned = aligned_16(x.dv);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const std::int64_t token = first + f.row + f.g + 8 * r;
      if (token >= at.length) continue;
      Bits* const to = row_of<Bits>(x.dv, at, token, kv);
#pragma unroll
      for (int n = 0; n < 2 * kPairs<kWide>; ++n) {
        const int i = n / 2, tile = n % 2, c = 16 * (f.half + 2 * i) + 8 * tile + 2 * f.t;
        if (c < width.v_dim) store_pair(to + c, out[i][tile][2 * r], out[i][tile][2 * r + 1], aligned);
      }
    }
  }
  Back<kWide> back;
  if (!kAlone) back.add_state(width, f, tiles.side, state, tiles.values);
  const auto add_queries = [&](bool numerator) {
    meet([&](int head, std::int64_t other, int ahead) {
      make_features<true>(x, x.q, met.at, other, head, rope && (numerator || x.rope_both), width, tiles.others, NoLook{});
      if (numerator) {
        make_y(head, other);
        float w[2][2][4];
        multiply_tokens(f, tiles.side, tiles.values, width.ldv, width.ldv - 8, w);
        mask_tokens<false>(f, ahead, w);
        store_tokens(f, w, tiles.weights);
      } else {
        const float* const dd = dd_in + query_row(x, met.at, other, head);
        store_meeting(ahead, false, tiles.weights,
                      [&](int, int column) { return other + column < met.at.length ? dd[column * x.q_heads] : 0.0f; });
      }
      __syncthreads();
      back.add_tokens(width, f, tiles.weights, tiles.others);
    });
    if (!numerator) return;
    if (rope && !x.rope_both) back.turn_back(x, width, f, at, first);
    if (!kAlone) back.add_rows(width, f, nullptr, dz + state_at(slot, width.features));
  };
  if constexpr (kAlone) {  // one loop, as two would spill; the other way round with states
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) add_queries(pass == 0);
  } else {
    add_queries(true);
    add_queries(false);
  }
  if (rope && x.rope_both) back.turn_back(x, width, f, at, first);
  __syncthreads();
  back.store(width, f, tiles.h);
  __syncthreads();
  key_gradients(x, width, at, first, kv, tiles,
                dparams + (static_cast<std::int64_t>(blockIdx.x) * x.kv_heads + kv) * width.dim);
}

}  // namespace

void nla_mma_queries(const Problem& x, NlaSlots tiles, std::int64_t part, std::int64_t each, const float* s, const float* z,
                     float* d, float* dd, float* dparams, void* stream) {
  const dim3 grid(static_cast<unsigned>(tiles.count), static_cast<unsigned>(x.q_heads));
  with_flags(wide(x), s == nullptr, [&](auto wide, auto alone) {
    LAUNCH((nla_queries_mma<decltype(wide)::value, decltype(alone)::value>), grid, kMmaThreads, BackTiles::bytes(x, alone),
           stream, x, tiles, part, each, s, z, d, dd, dparams);
  });
}

void nla_mma_grad_state(const Problem& x, NlaSlots parts, std::int64_t part, const float* d, const float* dd, float* ds,
                        float* dz, void* stream) {
  const dim3 grid(static_cast<unsigned>(parts.count), static_cast<unsigned>(x.q_heads),
                  static_cast<unsigned>((x.v_dim + kStateColumns - 1) / kStateColumns));
  const auto run = [&](auto wide) {
    LAUNCH((nla_grad_state_mma<decltype(wide)::value>), grid, kMmaThreads, state_bytes(x), stream, x, parts, part, d, dd,
           ds, dz);
  };
  x.dim > 64 ? run(std::true_type{}) : run(std::false_type{});
}

void nla_mma_keys(const Problem& x, NlaSlots tiles, std::int64_t part, std::int64_t each, const float* d, const float* dd,
                  const float* ds, const float* dz, float* dparams, void* stream) {
  const dim3 grid(static_cast<unsigned>(tiles.count), static_cast<unsigned>(x.kv_heads));
  with_flags(wide(x), ds == nullptr, [&](auto wide, auto alone) {
    LAUNCH((nla_keys_mma<decltype(wide)::value, decltype(alone)::value>), grid, kMmaThreads, BackTiles::bytes(x, alone),
           stream, x, tiles, part, each, d, dd, ds, dz, dparams);
  });
}

}  // namespace cuda
}  // namespace pyelastic
