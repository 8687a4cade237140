// norm_linear_attention on the CPU, forward. Contract and formulas: ../norm_linear_attention.h.
//
// Tiles of 64 tokens: their features are made in L1 (64 x 2 d, 32 KB at d = 64), and meet the state (2 d x dv, 32 KB) in a
// product of 12 rows by two vectors of registers. Bidirectional: `states` sums parts of a sequence, `scan` adds them up,
// `forward` reads the sum. Causal: a unit walks over its part with the state carried, and the weights of a tile with
// itself (64 x 64) are all that is quadratic; with several parts, `states` and `scan` say where each begins.

#include "norm_linear_attention_rows.h"

namespace pyelastic {
namespace PYELASTIC_ISA {
namespace {

template <class T>
void states(const NormLinearAttention<T>& x, const NlaParts& parts, T* s, T* z, int threads) {
  const std::int64_t slots = parts.first_k[x.sequences], rows = rows_of(x), features = features_of(x), vp = padded<T>(x.v_dim);
  parallel_for(slots * x.kv_heads, 1, threads, [&](std::int64_t begin, std::int64_t end) {
    Room room(Tile<T>::bytes(x.dim) + Room::bytes<T>(kNlaTile * vp) + Room::bytes<T>(rows * vp) +
              Room::bytes<T>(Tile<T>::row(x.dim)));
    Tile<T> tile(room, x.dim, x.sin != nullptr);
    tile.keep = false;
    T* const v = room.template take<T>(kNlaTile * vp);
    T* const sum = room.template take<T>(rows * vp);
    T* const z_sum = room.template take<T>(tile.ld);
    std::memset(v, 0, sizeof(T) * kNlaTile * vp);
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const std::int64_t slot = unit / x.kv_heads, head = unit % x.kv_heads;
      const std::int64_t sequence = sequence_of(parts.first_k, x.sequences, slot);
      const Span span = span_of(x, sequence, x.keys);
      const std::int64_t first = (slot - parts.first_k[sequence]) * parts.part;
      const std::int64_t last = first + parts.part < span.length ? first + parts.part : span.length;
      std::memset(sum, 0, sizeof(T) * rows * vp);
      std::memset(z_sum, 0, sizeof(T) * tile.ld);
      for (std::int64_t at = first; at < last; at += kNlaTile) {
        const std::int64_t n = at + kNlaTile < last ? kNlaTile : last - at;
        tile.make(x, x.k, span, sequence, at, n, head, false);
        load_rows(x.v, x.dtype, span, at, n, head, x.v_dim, v, vp);
        product(tile.g, 1, tile.ld, v, vp, rows, n, vp, sum, vp, true);
        const T* const plain = x.rope_both ? tile.g : tile.f;
        for (std::int64_t t = 0; t < n; ++t) add_scaled(z_sum, plain + t * tile.ld, T(1), tile.ld);
      }
      store_state(sum, vp, rows, x.v_dim, s + unit * rows * x.v_dim);
      std::memcpy(z + unit * features, z_sum, sizeof(T) * features);
    }
  });
}

template <class T>
void scan(const std::int64_t* first, std::int64_t sequences, std::int64_t heads, std::int64_t width, const T* initial,
          bool exclusive, bool reverse, T* parts, T* total_, int threads) {
  parallel_for(sequences * heads, 1, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const std::int64_t sequence = unit / heads, head = unit % heads, count = first[sequence + 1] - first[sequence];
      T* const sum = total_ + unit * width;
      if (initial == nullptr) {
        std::memset(sum, 0, sizeof(T) * width);
      } else if (initial != total_) {
        std::memcpy(sum, initial + unit * width, sizeof(T) * width);
      }
      for (std::int64_t i = 0; i < count; ++i) {
        const std::int64_t slot = first[sequence] + (reverse ? count - 1 - i : i);
        T* const part = parts + (slot * heads + head) * width;
        for (std::int64_t c = 0; c < width; ++c) {
          const T own = part[c];
          if (exclusive) part[c] = sum[c];
          sum[c] += own;
        }
      }
    }
  });
}

template <class T>
std::int64_t forward_bytes(const NormLinearAttention<T>& x) {
  const std::int64_t vp = padded<T>(x.v_dim), ld = Tile<T>::row(x.dim);
  return 2 * Tile<T>::bytes(x.dim) + 2 * Room::bytes<T>(kNlaTile * vp) + Room::bytes<T>(2 * x.dim * vp) +
         3 * Room::bytes<T>(ld) + Room::bytes<T>(ld * kNlaTile) + 2 * Room::bytes<T>(kNlaTile * kNlaTile) + Room::bytes<T>(vp);
}

template <class T>
void forward_full(const NormLinearAttention<T>& x, const T* s, const T* z, int threads) {
  const std::int64_t rows = rows_of(x), vp = padded<T>(x.v_dim), group = x.q_heads / x.kv_heads;
  const std::int64_t tiles = (x.queries + kNlaTile - 1) / kNlaTile;
  // A unit is a tile of one head; those of a head follow each other, so that its state is loaded once.
  parallel_for(x.sequences * x.q_heads * tiles, 4, threads, [&](std::int64_t begin, std::int64_t end) {
    Room room(forward_bytes(x));
    Tile<T> tile(room, x.dim, x.sin != nullptr);
    tile.keep = false;
    T* const state = room.template take<T>(rows * vp);
    T* const sums = room.template take<T>(tile.ld);
    T* const out = room.template take<T>(kNlaTile * vp);
    T* const d = room.template take<T>(kNlaTile);
    T* const gate = room.template take<T>(vp);
    std::memset(gate, 0, sizeof(T) * vp);
    std::memset(sums, 0, sizeof(T) * tile.ld);
    std::int64_t loaded = -1;
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const std::int64_t sequence = unit / (x.q_heads * tiles), head = unit / tiles % x.q_heads;
      const Span span = span_of(x, sequence, x.queries);
      const std::int64_t first = unit % tiles * kNlaTile;
      if (first >= span.length) continue;
      const std::int64_t n = first + kNlaTile < span.length ? kNlaTile : span.length - first;
      const std::int64_t from = sequence * x.kv_heads + head / group;
      if (from != loaded) {
        load_state(s + from * rows * x.v_dim, rows, x.v_dim, state, vp);
        std::memcpy(sums, z + from * features_of(x), sizeof(T) * features_of(x));
        loaded = from;
      }
      tile.make(x, x.q, span, sequence, first, n, head, true);
      const T* const plain = x.rope_both ? tile.g : tile.f;
      const std::int64_t keys = x.offsets == nullptr ? x.keys : span.length;
      for (std::int64_t t = 0; t < n; ++t) {
        const T sum = inner(plain + t * tile.ld, sums, tile.ld);
        if (x.map == FeatureMap::mala) {
          apply_readout(readout_of(x, sequence, keys, sum), x.dim, tile.g + t * tile.ld, tile.ld);
          d[t] = T(1);
        } else {
          d[t] = sum + effective_eps(x, sequence, first + t, keys);
        }
      }
      product(tile.g, tile.ld, 1, state, vp, n, rows, vp, out, vp, false);
      finish_rows(x, span, first, n, head, d, out, vp, gate);
    }
  });
}

template <class T>
void forward_causal(const NormLinearAttention<T>& x, const NlaParts& parts, const T* s, const T* z, T* s_end, T* z_end,
                    int threads) {
  const std::int64_t rows = rows_of(x), vp = padded<T>(x.v_dim), group = x.q_heads / x.kv_heads;
  parallel_for(parts.first_k[x.sequences] * x.kv_heads, 1, threads, [&](std::int64_t begin, std::int64_t end) {
    Room room(forward_bytes(x));
    Tile<T> query(room, x.dim, x.sin != nullptr), key(room, x.dim, x.sin != nullptr);
    query.keep = key.keep = false;
    T* const state = room.template take<T>(rows * vp);
    T* const sums = room.template take<T>(key.ld);
    T* const running = room.template take<T>(key.ld);
    T* const v = room.template take<T>(kNlaTile * vp);
    T* const out = room.template take<T>(kNlaTile * vp);
    T* const columns = room.template take<T>(key.ld * kNlaTile);
    T* const weights = room.template take<T>(kNlaTile * kNlaTile);
    T* const d = room.template take<T>(kNlaTile);
    T* const gate = room.template take<T>(vp);
    std::memset(gate, 0, sizeof(T) * vp);
    std::memset(v, 0, sizeof(T) * kNlaTile * vp);
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const std::int64_t slot = unit / x.kv_heads, kv = unit % x.kv_heads;
      const std::int64_t sequence = sequence_of(parts.first_k, x.sequences, slot);
      const Span span = span_of(x, sequence, x.keys);
      const std::int64_t first = (slot - parts.first_k[sequence]) * parts.part;
      const std::int64_t last = first + parts.part < span.length ? first + parts.part : span.length;
      load_state(s + unit * rows * x.v_dim, rows, x.v_dim, state, vp);
      std::memset(sums, 0, sizeof(T) * key.ld);
      std::memcpy(sums, z + unit * rows, sizeof(T) * rows);
      for (std::int64_t at = first; at < last; at += kNlaTile) {
        const std::int64_t n = at + kNlaTile < last ? kNlaTile : last - at;
        key.make(x, x.k, span, sequence, at, n, kv, false);
        load_rows(x.v, x.dtype, span, at, n, kv, x.v_dim, v, vp);
        transpose(key.g, key.ld, n, rows, columns, kNlaTile);
        const T* const plain_k = x.rope_both ? key.g : key.f;
        for (std::int64_t member = 0; member < group; ++member) {
          const std::int64_t head = kv * group + member;
          query.make(x, x.q, span, sequence, at, n, head, true);
          const T* const plain = x.rope_both ? query.g : query.f;
          std::memcpy(running, sums, sizeof(T) * key.ld);
          for (std::int64_t t = 0; t < n; ++t) {
            add_scaled(running, plain_k + t * key.ld, T(1), key.ld);
            d[t] = inner(plain + t * key.ld, running, key.ld) + effective_eps(x, sequence, at + t, 0);
          }
          product(query.g, key.ld, 1, state, vp, n, rows, vp, out, vp, false);
          lower_product(query.g, key.ld, columns, n, rows, weights);
          lower_apply(weights, v, vp, n, vp, out, vp);
          finish_rows(x, span, at, n, head, d, out, vp, gate);
        }
        product(key.g, 1, key.ld, v, vp, rows, n, vp, state, vp, true);
        for (std::int64_t t = 0; t < n; ++t) add_scaled(sums, plain_k + t * key.ld, T(1), key.ld);
      }
      if (s_end != nullptr) {
        store_state(state, vp, rows, x.v_dim, s_end + (sequence * x.kv_heads + kv) * rows * x.v_dim);
        std::memcpy(z_end + (sequence * x.kv_heads + kv) * rows, sums, sizeof(T) * rows);
      }
    }
  });
}

template <class T>
void forward(const NormLinearAttention<T>& x, const NlaParts& parts, const T* s, const T* z, T* s_end, T* z_end,
             int threads) {
  if (x.causal) {
    forward_causal(x, parts, s, z, s_end, z_end, threads);
  } else {
    forward_full(x, s, z, threads);
  }
}

}  // namespace

extern const NlaKernels<float> nla_float = {states<float>, scan<float>, forward<float>};
extern const NlaKernels<double> nla_double = {states<double>, scan<double>, forward<double>};

}  // namespace PYELASTIC_ISA
}  // namespace pyelastic
