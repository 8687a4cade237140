// norm_linear_attention on CUDA, forward, the general path: float32 products from shared memory. Contract and formulas:
// ../norm_linear_attention.h.
//
// Blocking: a block of 128 threads makes the features of 16 tokens in shared memory (16 x 2 d, 16 KB at d = 128) and
// multiplies them with 32 columns of the values or of a state. `nla_state` sums a part of a sequence, `nla_scan` adds parts
// up in their order, `nla_forward` reads the sum and, causal, adds the tokens of its own part by their weights; alone, all
// tokens by their weights. No atomics.
// Bytes: q, k, v read dv / 32 times from L2, o written once; a state of 4 R dv bytes per part.
#include "norm_linear_attention_mma.h"
#include "norm_linear_attention_tile.cuh"

namespace pyelastic {
namespace cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads, 3)
    nla_state_kernel(Problem x, NlaSlots parts, std::int64_t part, float* s /* [parts, Hk, 2 d, dv] */,
                 float* z /* [parts, Hk, 2 d] */) {
  DYN_SHARED(float, shared);
  float* room = shared;
  const int dim = static_cast<int>(x.dim), rows = 2 * dim;
  Tile tile(room, dim, x.sin != nullptr);
  float* const v = room;
  float* const sum = v + kTile * kColumns;  // [2 d][kColumns]
  float* const z_sum = sum + rows * kColumns;
  const std::int64_t head = blockIdx.y, column = static_cast<std::int64_t>(blockIdx.z) * kColumns;
  const Place at = locate_part(x, parts, x.keys, part);
  const std::int64_t first = at.part * part;
  if (first >= at.length) return;
  for (int i = threadIdx.x; i < rows * kColumns; i += kThreads) sum[i] = 0.0f;
  for (int i = threadIdx.x; i < rows; i += kThreads) z_sum[i] = 0.0f;
  const T* const values = static_cast<const T*>(x.v.data) + at.batch * x.v.batch + head * x.v.head;
  for (std::int64_t token = first; token < at.length; token += kTile) {
    make_tile<T>(x, x.k, at, token, head, false, tile);
    load_columns(values, x.v.token, at, token, column, x.v_dim, v);
    __syncthreads();
    product(tile.g, 1, tile.ldf, v, kColumns, 1, rows, kTile, kColumns, sum, kColumns, true);
    const float* const plain = x.rope_both ? tile.g : tile.f;
    for (int r = threadIdx.x; r < rows; r += kThreads) {
      for (int t = 0; t < kTile; ++t) z_sum[r] += plain[t * tile.ldf + r];
    }
  }
  const std::int64_t slot = static_cast<std::int64_t>(blockIdx.x) * x.kv_heads + head;
  for (int i = threadIdx.x; i < rows * kColumns; i += kThreads) {
    const std::int64_t c = column + i % kColumns;
    if (c < x.v_dim) s[(slot * rows + i / kColumns) * x.v_dim + c] = sum[i];
  }
  if (blockIdx.z != 0) return;
  for (int r = threadIdx.x; r < rows; r += kThreads) z[slot * rows + r] = z_sum[r];
}

__global__ void __launch_bounds__(kThreads, 3)
    nla_scan_kernel(Problem x, std::int64_t tokens, std::int64_t part, std::int64_t each, std::int64_t width,
                const float* initial, bool exclusive, bool reverse, float* parts, float* total) {
  const std::int64_t sequence = blockIdx.x, head = blockIdx.y;
  const std::int64_t c = static_cast<std::int64_t>(blockIdx.z) * kThreads + threadIdx.x;
  if (c >= width) return;
  const std::int64_t length = x.offsets == nullptr ? tokens : x.offsets[sequence + 1] - x.offsets[sequence];
  const std::int64_t first = first_part(x, sequence, part, each), count = (length + part - 1) / part;
  const std::int64_t end = (sequence * x.kv_heads + head) * width + c;
  float sum = initial == nullptr ? 0.0f : initial[end];
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t slot = first + (reverse ? count - 1 - i : i);
    float* const at = parts + (slot * x.kv_heads + head) * width + c;
    const float own = *at;
    if (exclusive) *at = sum;
    sum += own;
  }
  total[end] = sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 3)
    nla_forward_kernel(Problem x, NlaSlots tiles, std::int64_t part, std::int64_t each, const float* s, const float* z) {
  DYN_SHARED(float, shared);
  float* room = shared;
  const int dim = static_cast<int>(x.dim), rows = 2 * dim;
  Tile query(room, dim, x.sin != nullptr), key(room, dim, x.sin != nullptr);
  float* const v = room;
  float* const out = v + kTile * kColumns;
  float* const weights = out + kTile * kColumns;  // [kTile][kTile] twice
  float* const d = weights + 2 * kTile * kTile;
  const std::int64_t head = blockIdx.y, column = static_cast<std::int64_t>(blockIdx.z) * kColumns;
  const std::int64_t kv = head / (x.q_heads / x.kv_heads);
  const Place at = locate(x, tiles, x.queries);
  const std::int64_t first = at.part * kTile;
  if (first >= at.length) return;
  std::int64_t slot = at.sequence;
  if (x.causal) slot = first_part(x, at.sequence, part, each) + first / part;
  slot = slot * x.kv_heads + kv;
  const bool alone = s == nullptr;
  const int depth = alone ? 0 : rows;  // of the products with the state, which without any are zeros
  const Met met = keys_met(x, at, first, part, kTile, alone);
  const int width = x.v_dim - column < kColumns ? static_cast<int>(x.v_dim - column) : kColumns;
  make_tile<T>(x, x.q, at, first, head, true, query);
  const float* const plain = x.rope_both ? query.g : query.f;
  product(plain, query.ldf, 1, alone ? nullptr : z + slot * rows, 1, 0, kTile, depth, 1, d, 1, false);
  const bool mala = x.map == FeatureMap::mala;
  if (mala) {
    __syncthreads();
    for (int i = threadIdx.x; i < kTile * (dim + 1); i += kThreads) {
      const int t = i / (dim + 1), c = i % (dim + 1);
      const Readout r = readout_of(x, at, d[t]);
      float* const f = query.g + t * query.ldf + c;
      *f = c < dim ? *f * r.c : r.last;
    }
    __syncthreads();
  }
  product(query.g, query.ldf, 1, alone ? nullptr : s + slot * rows * x.v_dim + column, x.v_dim, 1, kTile, depth, width, out,
          kColumns, false);
  const T* const values = static_cast<const T*>(x.v.data) + at.batch * x.v.batch + kv * x.v.head;
  for (std::int64_t other = met.first; other < met.end; other += kTile) {
    make_tile<T>(x, x.k, met.at, other, kv, false, key);
    load_columns(values, x.v.token, met.at, other, column, x.v_dim, v);
    const float* const plain_k = x.rope_both ? key.g : key.f;
    product(query.g, query.ldf, 1, key.g, 1, key.ldf, kTile, rows, kTile, weights, kTile, false);
    product(plain, query.ldf, 1, plain_k, 1, key.ldf, kTile, rows, kTile, weights + kTile * kTile, kTile, false);
    for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
      if (x.causal && other + i % kTile > first + i / kTile) weights[i] = weights[kTile * kTile + i] = 0.0f;
    }
    __syncthreads();
    product(weights, kTile, 1, v, kColumns, 1, kTile, kTile, width, out, kColumns, true);
    if (threadIdx.x < kTile) {
      for (int j = 0; j < kTile; ++j) d[threadIdx.x] += weights[kTile * kTile + threadIdx.x * kTile + j];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kTile * width; i += kThreads) {
    const int t = i / width, c = i % width;
    const std::int64_t token = first + t;
    if (token >= at.length) continue;
    float value = out[t * kColumns + c];
    if (!mala) value /= d[t] + effective_eps(x, at, token);
    if (x.gate.data != nullptr) {
      const float g = to_float(row_of<const T>(x.gate, at, token, head)[column + c]);
      value *= g * sigmoid(g);
    }
    row_of<T>(x.o, at, token, head)[column + c] = from_float<T>(value);
  }
}

unsigned columns_of(const Problem& x) { return static_cast<unsigned>((x.v_dim + kColumns - 1) / kColumns); }
int tile_floats(const Problem& x) {
  const int dim = static_cast<int>(x.dim);
  return kTile * ((dim | 1) + 2 * (2 * dim + 1) + 4);
}

}  // namespace

std::int64_t nla_tile(const Problem& x) { return nla_mma_fits(x) ? kNlaMmaTokens : kNlaTokens; }

void nla_state(const Problem& x, NlaSlots parts, std::int64_t part, float* s, float* z, void* stream) {
  if (parts.count == 0) return;
  if (nla_mma_fits(x)) return nla_mma_state(x, parts, part, s, z, stream);
  const std::size_t shared = sizeof(float) * (tile_floats(x) + kTile * kColumns + 2 * x.dim * (kColumns + 1));
  const dim3 grid(static_cast<unsigned>(parts.count), static_cast<unsigned>(x.kv_heads), columns_of(x));
  visit_dtype(x.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    LAUNCH((nla_state_kernel<T>), grid, kThreads, shared, stream, x, parts, part, s, z);
  });
}

void nla_scan(const Problem& x, std::int64_t tokens, std::int64_t part, std::int64_t each, std::int64_t width,
              const float* initial, bool exclusive, bool reverse, float* parts, float* total, void* stream) {
  if (x.sequences == 0 || width == 0) return;
  const dim3 grid(static_cast<unsigned>(x.sequences), static_cast<unsigned>(x.kv_heads),
                  static_cast<unsigned>((width + kThreads - 1) / kThreads));
  LAUNCH((nla_scan_kernel), grid, kThreads, 0, stream, x, tokens, part, each, width, initial, exclusive, reverse, parts, total);
}

void nla_forward(const Problem& x, NlaSlots tiles, std::int64_t part, std::int64_t each, const float* s, const float* z,
                 void* stream) {
  if (tiles.count == 0) return;
  if (nla_mma_fits(x)) return nla_mma_forward(x, tiles, part, each, s, z, stream);
  const std::size_t shared = sizeof(float) * (2 * tile_floats(x) + 2 * kTile * kColumns + 2 * kTile * kTile + kTile);
  const dim3 grid(static_cast<unsigned>(tiles.count), static_cast<unsigned>(x.q_heads), columns_of(x));
  visit_dtype(x.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    LAUNCH((nla_forward_kernel<T>), grid, kThreads, shared, stream, x, tiles, part, each, s, z);
  });
}

}  // namespace cuda
}  // namespace pyelastic
