// norm_linear_attention on CUDA, backward, on tensor cores: bfloat16 inputs of widths that are multiples of 8. Contract and
// formulas: ../norm_linear_attention.h; the passes are those of norm_linear_attention_backward.cu.
//
// Blocking: as in the forward pass, 64 tokens of a head a block. The gradient of their features, 64 x 2 d, stays in registers
// while pieces of the state and the part's other tokens pass by; a warp holds both halves of its channels, so that RoPE is
// undone in place. It goes through shared memory once, where threads take eight channels of a row to make dq or dk. Rounded
// to bfloat16, once, for the products: y = g / D, features, weights, states, and dD where it is a weight.
#include "norm_linear_attention_mma.h"
#include "norm_linear_attention_mma_tiles.cuh"

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
  const StateBehind state{{kAlone ? nullptr : s + state_at(slot, width.features * width.v_dim),
                           kAlone ? nullptr : z + state_at(slot, width.features)}};
  queries_tile<kWide, kAlone>(x, width, f, tiles, at, first, met, head, kv, state, d_out, dd_out, [] {},
                              dparams + (static_cast<std::int64_t>(blockIdx.x) * x.q_heads + head) * params_of(x));
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
    make_grad_tile(x, width, at, token, head, d_in, dd_in, column, queries, y, shared);
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
  const int kv = static_cast<int>(blockIdx.y);
  const Place at = locate(x, pieces, x.keys, kAlone);
  const std::int64_t first = at.part * kMmaTile;
  if (first >= at.length) return;
  const int slot = state_slot(x, at, first, part, each, kv);
  const Met met = queries_met(x, at, first, part, kAlone);
  const StateBehind state{{kAlone ? nullptr : ds + state_at(slot, width.features * width.v_dim),
                           kAlone ? nullptr : dz + state_at(slot, width.features)}};
  keys_tile<kWide, kAlone>(x, width, f, tiles, at, first, met, kv, state, d_in, dd_in,
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
