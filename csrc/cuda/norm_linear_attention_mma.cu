// norm_linear_attention on CUDA, forward, on tensor cores: bfloat16 inputs of widths that are multiples of 8. Contract and
// formulas: ../norm_linear_attention.h.
//
// Blocking: blocks of 256 threads. `state`, a block for a part of a sequence and 64 columns of the values: the sum stays
// in registers while tiles of 64 keys pass by. `forward`, a block for 64 queries of a head and all columns: 16 x 64 (or 32) of
// the output in a warp's registers; the state comes in pieces of 64 features. Causal, tiles of 64 keys of the part follow,
// alone, those of all keys.
// Features, weights and states are rounded to bfloat16 once, for the products; sums, z and denominators are float32.
// Bytes: q, o once; k, v once a 64 columns, causal 1.5 times; a state of 8 d dv bytes a tile, from L2.
#include "norm_linear_attention_mma.h"
#include "norm_linear_attention_mma.cuh"

namespace pyelastic {
namespace cuda {
namespace {

template <bool kWide>
__global__ void __launch_bounds__(kMmaThreads, 2)
    nla_state_mma(Problem x, NlaSlots parts, std::int64_t part, float* s /* [parts, Hk, 2 d, dv] */, float* z /* [parts, Hk, 2 d] */) {
  DYN_SHARED(float, shared);
  const Widths width(x);
  const Fragment f;
  Bits* const keys = reinterpret_cast<Bits*>(shared + kStateFloats);  // [64][ldf]
  Bits* const values = keys + kMmaTile * width.ldf;  // [64][kStateLd]
  const std::int64_t head = blockIdx.y;
  const int column = static_cast<int>(blockIdx.z) * kStateColumns;
  const Place at = locate_part(x, parts, x.keys, part);
  const std::int64_t first = at.part * part;
  if (first >= at.length) return;
  StateSums<kWide> sums(shared);
  for (std::int64_t token = first; token < at.length; token += kMmaTile) {
    __syncthreads();
    make_features<false>(x, x.k, at, token, head, x.sin != nullptr, width, keys, SumInto{sums.z});
    load_values(x.v, at, token, head, column, kStateColumns, width.v_dim, values, kStateLd);
    __syncthreads();
    sums.add(width, f, keys, values);
  }
  const std::int64_t slot = static_cast<std::int64_t>(blockIdx.x) * x.kv_heads + head;
  sums.store(width, f, column, s + slot * width.features * width.v_dim, blockIdx.z == 0 ? z + slot * width.features : nullptr);
}

template <bool kWide, bool kAlone>
__global__ void __launch_bounds__(kMmaThreads, 2)
    nla_forward_mma(Problem x, NlaSlots pieces, std::int64_t part, std::int64_t each, const float* s, const float* z) {
  DYN_SHARED(float, shared);
  const Widths width(x);
  const Fragment f;
  const Tiles tiles(shared, width);
  const std::int64_t head = blockIdx.y, kv = head / (x.q_heads / x.kv_heads);
  const Place at = locate(x, pieces, x.queries, kAlone);
  const std::int64_t first = at.part * kMmaTile;
  if (first >= at.length) return;
  const Met met = keys_met(x, at, first, part, kMmaTile, kAlone);
  const int slot = state_slot(x, at, first, part, each, kv);
  const StateFar state{kAlone ? nullptr : s + state_at(slot, width.features * width.v_dim),
                       kAlone ? nullptr : z + state_at(slot, width.features)};
  forward_tile<kWide, kAlone>(x, width, f, tiles, at, first, met, head, kv, state, NoLook{});
}

}  // namespace

bool nla_mma_fits(const Problem& x) {
  const auto width = [](std::int64_t w) { return w > 0 && w % 8 == 0 && w <= kNlaWidest; };
  return x.dtype == Dtype::bfloat16 && x.map != FeatureMap::mala && width(x.dim) && width(x.v_dim);
}

void nla_mma_state(const Problem& x, NlaSlots parts, std::int64_t part, float* s, float* z, void* stream) {
  const dim3 grid(static_cast<unsigned>(parts.count), static_cast<unsigned>(x.kv_heads),
                  static_cast<unsigned>((x.v_dim + kStateColumns - 1) / kStateColumns));
  const std::size_t shared = state_bytes(x);
  if (x.dim > 64) {
    LAUNCH((nla_state_mma<true>), grid, kMmaThreads, shared, stream, x, parts, part, s, z);
  } else {
    LAUNCH((nla_state_mma<false>), grid, kMmaThreads, shared, stream, x, parts, part, s, z);
  }
}

void nla_mma_forward(const Problem& x, NlaSlots tiles, std::int64_t part, std::int64_t each, const float* s, const float* z,
                     void* stream) {
  const dim3 grid(static_cast<unsigned>(tiles.count), static_cast<unsigned>(x.q_heads));
  with_flags(x.v_dim > 64, s == nullptr, [&](auto wide, auto alone) {
    LAUNCH((nla_forward_mma<decltype(wide)::value, decltype(alone)::value>), grid, kMmaThreads, Tiles::bytes(x, alone), stream,
           x, tiles, part, each, s, z);
  });
}

}  // namespace cuda
}  // namespace pyelastic
