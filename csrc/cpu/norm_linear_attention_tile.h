// What norm_linear_attention's CPU kernels share: a product in registers, where sequences lie, and a tile of rows.
#pragma once

#include <cstring>

#include "norm_linear_attention_features.h"

namespace pyelastic {
namespace PYELASTIC_ISA {
namespace {

template <int R, int V, class T>
inline void product_block(const T* a, std::int64_t ra, std::int64_t ka, const T* b, std::int64_t ldb, std::int64_t depth,
                          T* c, std::int64_t ldc, bool add) {
  constexpr std::int64_t lanes = kLanes<T>;
  Vec<T> acc[R][V];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) acc[r][v] = add ? load_vec(c + r * ldc + v * lanes) : Vec<T>{};
  }
  for (std::int64_t k = 0; k < depth; ++k) {
    Vec<T> x[V];
    for (int v = 0; v < V; ++v) x[v] = load_vec(b + k * ldb + v * lanes);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const T y = a[r * ra + k * ka];
      for (int v = 0; v < V; ++v) acc[r][v] += x[v] * y;
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) store_vec(c + r * ldc + v * lanes, acc[r][v]);
  }
}

template <int V, class T>
inline void product_columns(const T* a, std::int64_t ra, std::int64_t ka, const T* b, std::int64_t ldb, std::int64_t rows,
                            std::int64_t depth, T* c, std::int64_t ldc, bool add) {
  std::int64_t r = 0;
  for (; r + kMicroRows <= rows; r += kMicroRows) {
    product_block<kMicroRows, V>(a + r * ra, ra, ka, b, ldb, depth, c + r * ldc, ldc, add);
  }
  if constexpr (kMicroRows > 8) {
    if (r + 8 <= rows) product_block<8, V>(a + r * ra, ra, ka, b, ldb, depth, c + r * ldc, ldc, add), r += 8;
  }
  if (r + 4 <= rows) product_block<4, V>(a + r * ra, ra, ka, b, ldb, depth, c + r * ldc, ldc, add), r += 4;
  if (r + 2 <= rows) product_block<2, V>(a + r * ra, ra, ka, b, ldb, depth, c + r * ldc, ldc, add), r += 2;
  if (r < rows) product_block<1, V>(a + r * ra, ra, ka, b, ldb, depth, c + r * ldc, ldc, add);
}

// c[r][j] = (c[r][j] +) sum_k a[r ra + k ka] b[k ldb + j]; width is whole vectors.
template <class T>
inline void product(const T* a, std::int64_t ra, std::int64_t ka, const T* b, std::int64_t ldb, std::int64_t rows,
                    std::int64_t depth, std::int64_t width, T* c, std::int64_t ldc, bool add) {
  constexpr std::int64_t two = 2 * kLanes<T>;
  std::int64_t j = 0;
  for (; j + two <= width; j += two) product_columns<2>(a, ra, ka, b + j, ldb, rows, depth, c + j, ldc, add);
  if (j < width) product_columns<1>(a, ra, ka, b + j, ldb, rows, depth, c + j, ldc, add);
}

// Lower triangles [n][kNlaTile] of what tokens of a tile do to each other, in bands of rows.
constexpr std::int64_t kBand = 24;

// w[t][j] = sum_k a[t lda + k] b[k kNlaTile + j] for j <= t, zeros up to the end of the band.
template <class T>
inline void lower_product(const T* a, std::int64_t lda, const T* b, std::int64_t n, std::int64_t depth, T* w) {
  for (std::int64_t r = 0; r < n; r += kBand) {
    const std::int64_t end = r + kBand < n ? r + kBand : n;
    product(a + r * lda, lda, 1, b, kNlaTile, end - r, depth, padded<T>(end), w + r * kNlaTile, kNlaTile, false);
    for (std::int64_t t = r; t < end; ++t) {
      for (std::int64_t j = t + 1; j < end; ++j) w[t * kNlaTile + j] = T(0);
    }
  }
}

// c[t] += sum_j w[t][j] b[j], rows of `width`.
template <class T>
inline void lower_apply(const T* w, const T* b, std::int64_t ldb, std::int64_t n, std::int64_t width, T* c, std::int64_t ldc) {
  for (std::int64_t r = 0; r < n; r += kBand) {
    const std::int64_t end = r + kBand < n ? r + kBand : n;
    product(w + r * kNlaTile, kNlaTile, 1, b, ldb, end - r, end, width, c + r * ldc, ldc, true);
  }
}

// c[j] += sum_t w[t][j] b[t].
template <class T>
inline void upper_apply(const T* w, const T* b, std::int64_t ldb, std::int64_t n, std::int64_t width, T* c, std::int64_t ldc) {
  for (std::int64_t r = 0; r < n; r += kBand) {
    const std::int64_t end = r + kBand < n ? r + kBand : n;
    product(w + r * kNlaTile + r, 1, kNlaTile, b + r * ldb, ldb, end - r, n - r, width, c + r * ldc, ldc, true);
  }
}

// to [columns][ldt] from x [rows][ldx]; what is left of whole vectors of `to` becomes zeros.
template <class T>
inline void transpose(const T* x, std::int64_t ldx, std::int64_t rows, std::int64_t columns, T* to, std::int64_t ldt) {
  constexpr std::int64_t block = 16;
  for (std::int64_t r0 = 0; r0 < rows; r0 += block) {
    const std::int64_t r1 = r0 + block < rows ? r0 + block : rows;
    for (std::int64_t c = 0; c < columns; ++c) {
      for (std::int64_t r = r0; r < r1; ++r) to[c * ldt + r] = x[r * ldx + c];
    }
  }
  for (std::int64_t c = 0; c < columns; ++c) {
    for (std::int64_t r = rows; r < padded<T>(rows); ++r) to[c * ldt + r] = T(0);
  }
}

// Rows of a state, and how many of them are in z. MALA's last row, the sum of the values, is a feature too: 1 of every key,
// and of a query what its readout takes of them.
template <class T>
inline std::int64_t rows_of(const NormLinearAttention<T>& x) {
  return x.map == FeatureMap::mala ? x.dim + 1 : 2 * x.dim;
}
template <class T>
inline std::int64_t features_of(const NormLinearAttention<T>& x) {
  return x.map == FeatureMap::mala ? x.dim : 2 * x.dim;
}

// One sequence's place: batch, first token in it, tokens.
struct Span {
  std::int64_t batch, begin, length;
};

template <class T>
inline Span span_of(const NormLinearAttention<T>& x, std::int64_t sequence, std::int64_t tokens) {
  if (x.offsets == nullptr) return {sequence, 0, tokens};
  return {0, x.offsets[sequence], x.offsets[sequence + 1] - x.offsets[sequence]};
}

// The sequence that a slot belongs to.
inline std::int64_t sequence_of(const std::int64_t* first, std::int64_t sequences, std::int64_t slot) {
  std::int64_t low = 0, high = sequences;  // first[low] <= slot < first[high]
  while (high - low > 1) {
    const std::int64_t middle = (low + high) / 2;
    (first[middle] <= slot ? low : high) = middle;
  }
  return low;
}

// Element of a view where a token's row of a head begins.
inline std::int64_t row_of(const HeadsView& view, const Span& span, std::int64_t token, std::int64_t head) {
  return span.batch * view.batch + (span.begin + token) * view.token + head * view.head;
}

template <class T>
inline Head<T> head_of(const NormLinearAttention<T>& x, std::int64_t head, bool query, T* power_room) {
  const bool pola = x.map == FeatureMap::pola || x.map == FeatureMap::pola_opposite;
  Head<T> h{x.map, x.dim, 0, 0, 0, x.key_power, x.alpha, x.norm_eps, nullptr};
  if (pola) {
    for (std::int64_t c = 0; c < x.dim; ++c) power_room[c] = x.params[head * x.dim + c];
    for (std::int64_t c = x.dim; c < padded<T>(x.dim); ++c) power_room[c] = T(1);
    h.power = power_room;
  } else if (query && x.map != FeatureMap::mala) {
    h.lam = x.params[head];
    h.tau = x.params[x.q_heads + head];
    h.beta = x.params[2 * x.q_heads + head];
  }
  return h;
}

// Without the calls that memcpy of a length not known here would be.
template <class T>
inline void copy_row(const T* from, std::int64_t width, T* to) {
  std::int64_t c = 0;
  for (; c + kLanes<T> <= width; c += kLanes<T>) store_vec(to + c, load_vec(from + c));
  for (; c < width; ++c) to[c] = from[c];
}

// Rows of a view's head as T in [n][padded width]; the padding is the caller's zeros.
template <class T>
inline void load_rows(const HeadsView& view, Dtype dtype, const Span& span, std::int64_t first, std::int64_t n,
                      std::int64_t head, std::int64_t width, T* to, std::int64_t ld) {
  const std::int64_t at = row_of(view, span, first, head);
  for (std::int64_t t = 0; t < n; ++t) {
    const T* from = read_row(view.data, dtype, at + t * view.token, width, to + t * ld);
    if (from != to + t * ld) copy_row(from, width, to + t * ld);
  }
}

// A tile of up to kNlaTile rows of queries or keys: x, magnitudes w, logarithms l, features f, rotated ones g (f itself
// where there is no RoPE), and the queries' exponents e. keep: w and l are wanted.
template <class T>
struct Tile {
  std::int64_t dim, dp, ld;
  T *x, *w, *l, *f, *g, *power;
  Exponent<T>* e;
  bool keep = true;

  static std::int64_t row(std::int64_t dim) { return padded<T>(dim + padded<T>(dim)); }
  static std::int64_t bytes(std::int64_t dim) {
    return 3 * Room::bytes<T>(kNlaTile * padded<T>(dim)) + 2 * Room::bytes<T>(kNlaTile * row(dim)) +
           Room::bytes<T>(padded<T>(dim)) + Room::bytes<Exponent<T>>(kNlaTile);
  }
  Tile(Room& room, std::int64_t dim_, bool rope) : dim(dim_), dp(padded<T>(dim_)), ld(row(dim_)) {
    x = room.take<T>(kNlaTile * dp);
    w = room.take<T>(kNlaTile * dp);
    l = room.take<T>(kNlaTile * dp);
    f = room.take<T>(kNlaTile * ld);
    g = room.take<T>(kNlaTile * ld);
    power = room.take<T>(dp);
    e = room.take<Exponent<T>>(kNlaTile);
    std::memset(x, 0, sizeof(T) * kNlaTile * dp);
    std::memset(f, 0, sizeof(T) * kNlaTile * ld);
    if (!rope) g = f;
  }

  const T* f_row(std::int64_t t) const { return f + t * ld; }
  const T* g_row(std::int64_t t) const { return g + t * ld; }

  // Rows `first` .. of a view's head, n of them, and their features.
  void make(const NormLinearAttention<T>& p, const HeadsView& view, const Span& span, std::int64_t sequence, std::int64_t first,
            std::int64_t n, std::int64_t head, bool query) {
    const Head<T> h = head_of(p, head, query, power);
    load_rows(view, p.dtype, span, first, n, head, dim, x, dp);
    if (query && h.power == nullptr && h.map != FeatureMap::mala) {
      T squares[kNlaTile];
      for (std::int64_t t = 0; t < n; ++t) squares[t] = square_of(x + t * dp, dim);
      exponents(h, squares, n, e);
    }
    if (h.map == FeatureMap::split && dim % (2 * kLanes<T>) == 0) {
      const std::int64_t start = (first + (p.start == nullptr ? 0 : p.start[sequence])) * (dim / 2);
      for (std::int64_t t = 0; t < n; ++t) {
        const T* const sin = g == f ? nullptr : p.sin + start + t * (dim / 2);
        const T* const cos = g == f ? nullptr : p.cos + start + t * (dim / 2);
        T *const magnitudes = keep ? w + t * dp : nullptr, *const logs = keep ? l + t * dp : nullptr;
        if (query) {
          split_and_turn<true>(h, e[t], x + t * dp, sin, cos, magnitudes, logs, f + t * ld, g + t * ld);
        } else {
          split_and_turn<false>(h, e[t], x + t * dp, sin, cos, magnitudes, static_cast<T*>(nullptr), f + t * ld, g + t * ld);
        }
      }
      return;
    }
    for (std::int64_t t = 0; t < n; ++t) {
      T* const to = x + t * dp;
      if (query) {
        query_row(h, e[t], to, w + t * dp, l + t * dp, f + t * ld);
      } else {
        key_row(h, to, w + t * dp, f + t * ld);
      }
      if (p.map == FeatureMap::mala) {
        f[t * ld + dim] = query ? T(0) : T(1);
        for (std::int64_t c = dim + 1; c < ld; ++c) f[t * ld + c] = T(0);
      }
      if (g != f) rotate(p, sequence, first + t, f + t * ld, g + t * ld, T(1));
    }
  }

  // Both halves by the position's angles, to another place or in place; direction -1: back.
  void rotate(const NormLinearAttention<T>& p, std::int64_t sequence, std::int64_t token, const T* from, T* to,
              T direction) const {
    const std::int64_t half = dim / 2, at = (token + (p.start == nullptr ? 0 : p.start[sequence])) * half;
    const T *sin = p.sin + at, *cos = p.cos + at;
    const bool mala = p.map == FeatureMap::mala;
    const int sides = mala ? 1 : 2;
    const T last = from[dim];
    std::int64_t j = 0;
    for (; j + kLanes<T> <= half; j += kLanes<T>) {
      const Vec<T> s = load_vec(sin + j) * direction, c = load_vec(cos + j);
      for (int side = 0; side < sides; ++side) {
        const std::int64_t at = side * dim + 2 * j;
        Vec<T> a = load_vec(from + at), b = load_vec(from + at + kLanes<T>);
        turn_pairs<T>(a, b, s, c);
        store_vec(to + at, a);
        store_vec(to + at + kLanes<T>, b);
      }
    }
    for (; j < half; ++j) {
      const T s = sin[j] * direction, c = cos[j];
      for (int side = 0; side < sides; ++side) {
        const T* const a = from + side * dim + 2 * j;
        T* const b = to + side * dim + 2 * j;
        const T even = a[0], odd = a[1];
        b[0] = even * c - odd * s;
        b[1] = odd * c + even * s;
      }
    }
    for (std::int64_t c = rows_of(p); c < ld; ++c) to[c] = T(0);
    if (mala) to[dim] = last;
  }
};

// A state between its padded rows here and its contiguous ones outside.
template <class T>
inline void load_state(const T* from, std::int64_t rows, std::int64_t width, T* to, std::int64_t ld) {
  for (std::int64_t r = 0; r < rows; ++r) {
    std::memcpy(to + r * ld, from + r * width, sizeof(T) * width);
    for (std::int64_t c = width; c < ld; ++c) to[r * ld + c] = T(0);
  }
}
template <class T>
inline void store_state(const T* from, std::int64_t ld, std::int64_t rows, std::int64_t width, T* to) {
  for (std::int64_t r = 0; r < rows; ++r) std::memcpy(to + r * width, from + r * ld, sizeof(T) * width);
}

template <class T>
inline T inner(const T* a, const T* b, std::int64_t width) {
  Vec<T> sum{};
  for (std::int64_t c = 0; c < width; c += kLanes<T>) sum += load_vec(a + c) * load_vec(b + c);
  return total<T>(sum);
}

template <class T>
inline void add_scaled(T* to, const T* from, T factor, std::int64_t width) {
  for (std::int64_t c = 0; c < width; c += kLanes<T>) store_vec(to + c, load_vec(to + c) + load_vec(from + c) * factor);
}

// eps times the tokens in z for a row.
template <class T>
inline T effective_eps(const NormLinearAttention<T>& x, std::int64_t sequence, std::int64_t token, std::int64_t keys) {
  if (!x.mean) return x.eps;
  const std::int64_t before = x.count == nullptr ? 0 : x.count[sequence];
  return x.eps * static_cast<T>(before + (x.causal ? token + 1 : keys));
}

// MALA's readout of a row with x = phi_q . z: o = S^T [c R phi_q; last].
template <class T>
struct Readout {
  T inverse, scale, weight, c, last;  // 1 / tokens, 1 / (sqrt(d) tokens), scale x
};
template <class T>
inline Readout<T> readout_of(const NormLinearAttention<T>& x, std::int64_t sequence, std::int64_t keys, T product) {
  const T tokens = static_cast<T>((x.count == nullptr ? 0 : x.count[sequence]) + keys);
  const T inverse = T(1) / tokens, scale = inverse / static_cast<T>(__builtin_sqrt(static_cast<double>(x.dim)));
  const T weight = product * scale;
  return {inverse, scale, weight, (T(1) + T(1) / (weight + x.eps)) * scale, -weight * inverse};
}
template <class T>
inline void apply_readout(const Readout<T>& r, std::int64_t dim, T* row, std::int64_t ld) {
  for (std::int64_t c = 0; c < ld; c += kLanes<T>) store_vec(row + c, load_vec(row + c) * r.c);
  row[dim] = r.last;
}

template <class T>
inline T sigmoid(T x) {
  const Vec<T> e = exp2_vec(spread<T>((x < T(0) ? x : -x) * T(kLog2e)));
  return x < T(0) ? e[0] / (T(1) + e[0]) : T(1) / (T(1) + e[0]);
}

}  // namespace
}  // namespace PYELASTIC_ISA
}  // namespace pyelastic
