// What the passes over norm_linear_attention's rows begin and end with: outputs, their gradients, the gate, RoPE undone.
#pragma once

#include "norm_linear_attention_tile.h"

namespace pyelastic {
namespace PYELASTIC_ISA {
namespace {

// One head's rows of a tile: o and its denominators are made, gated and stored.
template <class T>
inline void finish_rows(const NormLinearAttention<T>& x, const Span& span, std::int64_t first, std::int64_t n, std::int64_t head,
                 const T* denominators, T* o, std::int64_t vp, T* gate, void* to) {
  for (std::int64_t t = 0; t < n; ++t) {
    const T factor = T(1) / denominators[t];
    T* const row = o + t * vp;
    for (std::int64_t c = 0; c < vp; c += kLanes<T>) store_vec(row + c, load_vec(row + c) * factor);
    if (x.gate.data != nullptr) {
      const std::int64_t at = span.batch * x.gate.batch + (span.begin + first + t) * x.gate.token + head * x.gate.head;
      const T* const from = read_row(x.gate.data, x.dtype, at, x.v_dim, gate);
      if (from != gate) std::memcpy(gate, from, sizeof(T) * x.v_dim);
      for (std::int64_t c = 0; c < vp; c += kLanes<T>) {
        const Vec<T> v = load_vec(gate + c);
        const Vec<T> e = exp2_any<T>(v * T(-kLog2e));
        store_vec(row + c, load_vec(row + c) * v / (T(1) + e));
      }
    }
    const std::int64_t at = ((span.batch * x.queries + span.begin + first + t) * x.q_heads + head) * x.v_dim;
    write_row(row, x.v_dim, to, x.dtype, at);
  }
}

// y of a tile's rows [n][vp]: the gradient before the gate over the denominator; the gate's silu and its slope if asked for.
template <class T>
inline void load_gradient(const NormLinearAttention<T>& x, const void* grad, const Span& span, std::int64_t first, std::int64_t n,
                   std::int64_t head, T* y, std::int64_t vp, T* gate_rows) {
  for (std::int64_t t = 0; t < n; ++t) {
    const std::int64_t token = span.begin + first + t;
    T* const row = y + t * vp;
    load_rows(grad, x.dtype, ((span.batch * x.queries + token) * x.q_heads + head) * x.v_dim, 0, 1, x.v_dim, row, vp);
    if (x.gate.data == nullptr) continue;
    T* const gate = gate_rows + t * vp;
    load_rows(x.gate.data, x.dtype, span.batch * x.gate.batch + token * x.gate.token + head * x.gate.head, 0, 1, x.v_dim, gate,
              vp);
    for (std::int64_t c = 0; c < x.v_dim; ++c) row[c] *= gate[c] * sigmoid(gate[c]);
  }
}

// dgate of a row, from the numerators `o`, which it overwrites, and their denominator.
template <class T>
inline void gate_gradient(const NormLinearAttention<T>& x, const void* grad, std::int64_t row, const T* gate, T denominator, T* o,
                          T* line, void* dgate) {
  load_rows(grad, x.dtype, row * x.v_dim, 0, 1, x.v_dim, line, x.v_dim);
  for (std::int64_t c = 0; c < x.v_dim; ++c) {
    const T g = gate[c], sig = sigmoid(g);
    o[c] = line[c] * o[c] / denominator * sig * (T(1) + g * (T(1) - sig));
  }
  write_row(o, x.v_dim, dgate, x.dtype, row * x.v_dim);
}

// Gradients of a tile's plain features from those of its rotated ones, in place; dd z goes in before or after.
template <class T>
inline void unrotate(const NormLinearAttention<T>& x, const Tile<T>& tile, std::int64_t sequence, std::int64_t token, T* df,
              const T* z, T factor, T* room) {
  const bool inside = x.rope_both || x.sin == nullptr;
  if (inside) add_scaled(df, z, factor, tile.ld);
  if (x.sin != nullptr) {
    tile.rotate(x, sequence, token, df, room, T(-1));
    std::memcpy(df, room, sizeof(T) * tile.ld);
  }
  if (!inside) add_scaled(df, z, factor, tile.ld);
}

}  // namespace
}  // namespace PYELASTIC_ISA
}  // namespace pyelastic
