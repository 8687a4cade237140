// What the passes over norm_linear_attention's rows begin and end with: outputs, their gradients, the gate, RoPE undone.
#pragma once

#include "norm_linear_attention_tile.h"

namespace pyelastic {
namespace PYELASTIC_ISA {
namespace {

// One head's rows of a tile: o and its denominators are made, gated and stored.
template <class T>
inline void finish_rows(const NormLinearAttention<T>& x, const Span& span, std::int64_t first, std::int64_t n, std::int64_t head,
                 const T* denominators, T* o, std::int64_t vp, T* gate) {
  for (std::int64_t t = 0; t < n; ++t) {
    const T factor = T(1) / denominators[t];
    T* const row = o + t * vp;
    for (std::int64_t c = 0; c < vp; c += kLanes<T>) store_vec(row + c, load_vec(row + c) * factor);
    if (x.gate.data != nullptr) {
      load_rows(x.gate, x.dtype, span, first + t, 1, head, x.v_dim, gate, vp);
      for (std::int64_t c = 0; c < vp; c += kLanes<T>) {
        const Vec<T> v = load_vec(gate + c);
        const Vec<T> e = exp2_any<T>(v * T(-kLog2e));
        store_vec(row + c, load_vec(row + c) * v / (T(1) + e));
      }
    }
    write_row(row, x.v_dim, x.o.data, x.dtype, row_of(x.o, span, first + t, head));
  }
}

// y of a tile's rows [n][vp]: the gradient before the gate over the denominator; the gate's silu and its slope if asked for.
template <class T>
inline void load_gradient(const NormLinearAttention<T>& x, const Span& span, std::int64_t first, std::int64_t n,
                          std::int64_t head, T* y, std::int64_t vp, T* gate) {
  load_rows(x.o, x.dtype, span, first, n, head, x.v_dim, y, vp);
  if (x.gate.data == nullptr) return;
  load_rows(x.gate, x.dtype, span, first, n, head, x.v_dim, gate, vp);
  for (std::int64_t t = 0; t < n; ++t) {
    for (std::int64_t c = t * vp; c < t * vp + x.v_dim; ++c) y[c] *= gate[c] * sigmoid(gate[c]);
  }
}

// dgate of a row, from the numerators `o`, which it overwrites, and their denominator.
template <class T>
inline void gate_gradient(const NormLinearAttention<T>& x, const Span& span, std::int64_t token, std::int64_t head,
                          const T* gate, T denominator, T* o, T* line) {
  load_rows(x.o, x.dtype, span, token, 1, head, x.v_dim, line, x.v_dim);
  for (std::int64_t c = 0; c < x.v_dim; ++c) {
    const T g = gate[c], sig = sigmoid(g);
    o[c] = line[c] * o[c] / denominator * sig * (T(1) + g * (T(1) - sig));
  }
  write_row(o, x.v_dim, x.dgate.data, x.dtype, row_of(x.dgate, span, token, head));
}

// Gradients of a tile's plain features from those of its rotated ones, in place; dd z goes in before or after.
template <class T>
inline void unrotate(const NormLinearAttention<T>& x, const Tile<T>& tile, std::int64_t sequence, std::int64_t token, T* df,
              const T* z, T factor) {
  const bool inside = x.rope_both || x.sin == nullptr;
  if (inside) add_scaled(df, z, factor, tile.ld);
  if (x.sin != nullptr) {
    tile.rotate(x, sequence, token, df, df, T(-1));
  }
  if (!inside) add_scaled(df, z, factor, tile.ld);
}

}  // namespace
}  // namespace PYELASTIC_ISA
}  // namespace pyelastic
