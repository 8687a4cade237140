// norm_linear_attention on the CPU, backward. Contract and formulas: ../norm_linear_attention.h.
//
// `queries` walks over the queries of a part: denominators, dq, dgate, the gradients of the parameters, and the part's sum
// of R phi_q y^T, y = g / D. `keys` walks over keys: dk and dv. The causal forms carry the state, forwards and
// backwards; nothing of the forward pass is read but the states that parts begin with. Features are made again.

#include "norm_linear_attention_rows.h"

namespace pyelastic {
namespace PYELASTIC_ISA {
namespace {

template <class T>
std::int64_t backward_bytes(const NormLinearAttention<T>& x) {
  const std::int64_t vp = padded<T>(x.v_dim), ld = Tile<T>::row(x.dim);
  return 2 * Tile<T>::bytes(x.dim) + 6 * Room::bytes<T>(kNlaTile * vp) + 2 * Room::bytes<T>(2 * x.dim * vp) +
         2 * Room::bytes<T>(x.v_dim * ld) + 6 * Room::bytes<T>(kNlaTile * ld) + 4 * Room::bytes<T>(kNlaTile * kNlaTile) +
         2 * Room::bytes<T>(x.v_dim * kNlaTile) + 6 * Room::bytes<T>(ld + vp + kNlaTile);
}

template <class T>
void queries(const NormLinearAttention<T>& x, const NlaParts& parts, const T* s, const T* z, T* d_, T* dd_, T* ds, T* dz,
             double* dparams, int threads) {
  const std::int64_t rows = rows_of(x), features = features_of(x), vp = padded<T>(x.v_dim), group = x.q_heads / x.kv_heads;
  const bool pola = x.map == FeatureMap::pola || x.map == FeatureMap::pola_opposite, gated = x.gate.data != nullptr;
  const bool mala = x.map == FeatureMap::mala;
  const std::int64_t width = pola ? x.dim : 3;
  parallel_for(parts.first_q[x.sequences] * x.kv_heads, 1, threads, [&](std::int64_t begin, std::int64_t end) {
    Room room(backward_bytes(x));
    Tile<T> query(room, x.dim, x.sin != nullptr), key(room, x.dim, x.sin != nullptr);
    const std::int64_t ld = query.ld, wide = padded<T>(rows);
    T* const state = room.template take<T>(rows * vp);       // S, for the gate
    T* const turned = room.template take<T>(x.v_dim * ld);  // its transpose
    T* const ds_sum = room.template take<T>(rows * vp);
    T* const df = room.template take<T>(kNlaTile * ld);
    T* const cum = room.template take<T>(kNlaTile * ld);
    T* const columns = room.template take<T>(ld * kNlaTile);
    T* const v = room.template take<T>(kNlaTile * vp);
    T* const y = room.template take<T>(kNlaTile * vp);
    T* const gate = room.template take<T>(kNlaTile * vp);
    T* const o = room.template take<T>(kNlaTile * vp);
    T* const v_columns = room.template take<T>(x.v_dim * kNlaTile);
    T* const weights = room.template take<T>(kNlaTile * kNlaTile);
    T* const sums = room.template take<T>(ld);
    T* const dz_sum = room.template take<T>(ld);
    T* const line = room.template take<T>(ld > vp ? ld : vp);
    T* const d = room.template take<T>(kNlaTile);
    Readout<T> readouts[kNlaTile];
    std::memset(v, 0, sizeof(T) * kNlaTile * vp);
    std::memset(y, 0, sizeof(T) * kNlaTile * vp);
    std::memset(df, 0, sizeof(T) * kNlaTile * ld);
    std::memset(turned, 0, sizeof(T) * x.v_dim * ld);
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const std::int64_t slot = unit / x.kv_heads, kv = unit % x.kv_heads;
      const std::int64_t sequence = sequence_of(parts.first_q, x.sequences, slot);
      const Span span = span_of(x, sequence, x.queries);
      const std::int64_t keys = x.offsets == nullptr ? x.keys : span.length;
      const std::int64_t first = (slot - parts.first_q[sequence]) * parts.part;
      const std::int64_t last = first + parts.part < span.length ? first + parts.part : span.length;
      const std::int64_t from = x.causal ? unit : sequence * x.kv_heads + kv;
      load_state(s + from * rows * x.v_dim, rows, x.v_dim, state, vp);
      std::memset(sums, 0, sizeof(T) * ld);
      std::memcpy(sums, z + from * features, sizeof(T) * features);
      transpose(state, vp, rows, x.v_dim, turned, ld);
      std::memset(ds_sum, 0, sizeof(T) * rows * vp);
      std::memset(dz_sum, 0, sizeof(T) * ld);
      double* const own = dparams + (slot * x.q_heads + kv * group) * width;
      std::memset(own, 0, sizeof(double) * group * width);
      for (std::int64_t at = first; at < last; at += kNlaTile) {
        const std::int64_t n = at + kNlaTile < last ? kNlaTile : last - at;
        if (x.causal) {
          key.make(x, x.k, span, sequence, at, n, kv, false);
          load_rows(x.v, x.dtype, span, at, n, kv, x.v_dim, v, vp);
          transpose(v, vp, n, x.v_dim, v_columns, kNlaTile);
          if (gated) transpose(key.g, ld, n, rows, columns, kNlaTile);
        }
        const T* const plain_k = x.rope_both ? key.g : key.f;
        for (std::int64_t t = 0; t < n && x.causal; ++t) {
          T* const row = cum + t * ld;
          std::memcpy(row, t > 0 ? row - ld : sums, sizeof(T) * ld);
          add_scaled(row, plain_k + t * ld, T(1), ld);
        }
        // z of each row.
        const T* const z_rows = x.causal ? cum : sums;
        const std::int64_t z_ld = x.causal ? ld : 0;
        for (std::int64_t member = 0; member < group; ++member) {
          const std::int64_t head = kv * group + member;
          query.make(x, x.q, span, sequence, at, n, head, true);
          const T* const plain = x.rope_both ? query.g : query.f;
          load_gradient(x, span, at, n, head, y, vp, gate);
          for (std::int64_t t = 0; t < n; ++t) {
            const T sum = inner(plain + t * ld, z_rows + t * z_ld, ld);
            d[t] = mala ? sum : sum + effective_eps(x, sequence, at + t, keys);
            if (mala) continue;
            const T factor = T(1) / d[t];
            for (std::int64_t c = 0; c < vp; c += kLanes<T>) store_vec(y + t * vp + c, load_vec(y + t * vp + c) * factor);
          }
          product(y, vp, 1, turned, ld, n, x.v_dim, wide, df, ld, false);
          if (x.causal) {
            lower_product(y, vp, v_columns, n, x.v_dim, weights);
            lower_apply(weights, key.g, ld, n, wide, df, ld);
          }
          if (gated) {
            product(query.g, ld, 1, state, vp, n, rows, vp, o, vp, false);
            if (x.causal) {
              lower_product(query.g, ld, columns, n, rows, weights);
              lower_apply(weights, v, vp, n, vp, o, vp);
            }
          }
          const Head<T> h = head_of(x, head, true, query.power);
          for (std::int64_t t = 0; t < n; ++t) {
            const std::int64_t row = (span.batch * x.queries + span.begin + at + t) * x.q_heads + head;
            T dd = inner(query.g + t * ld, df + t * ld, wide);
            if (mala) {  // of c and of the last feature by the weight
              readouts[t] = readout_of(x, sequence, keys, d[t]);
              const Readout<T>& r = readouts[t];
              const T below = T(1) / (r.weight + x.eps);
              dd = -(dd * r.scale * below * below + df[t * ld + x.dim] * r.inverse) * r.scale;
              for (std::int64_t c = 0; c < ld; c += kLanes<T>) store_vec(df + t * ld + c, load_vec(df + t * ld + c) * r.c);
            } else {
              dd = -dd / d[t];
            }
            d_[row] = d[t];
            dd_[row] = dd;
            if (gated) gate_gradient(x, span, at + t, head, gate + t * vp, d[t], o + t * vp, line);
            add_scaled(dz_sum, plain + t * ld, dd, ld);
            unrotate(x, query, sequence, at + t, df + t * ld, z_rows + t * z_ld, dd);
            query_gradient(h, query.e[t], query.x + t * query.dp, query.w + t * query.dp, query.l + t * query.dp, df + t * ld, line,
                           own + member * width);
            write_row(line, x.dim, x.dq.data, x.dtype, row_of(x.dq, span, at + t, head));
          }
          for (std::int64_t t = 0; t < n && mala; ++t) apply_readout(readouts[t], x.dim, query.g + t * ld, ld);
          if (ds != nullptr) product(query.g, 1, ld, y, vp, rows, n, vp, ds_sum, vp, true);
        }
        if (x.causal) {
          std::memcpy(sums, cum + (n - 1) * ld, sizeof(T) * ld);
          product(v, 1, vp, key.g, ld, x.v_dim, n, wide, turned, ld, true);
          if (gated) product(key.g, 1, ld, v, vp, rows, n, vp, state, vp, true);
        }
      }
      if (ds != nullptr) {
        store_state(ds_sum, vp, rows, x.v_dim, ds + unit * rows * x.v_dim);
        std::memcpy(dz + unit * features, dz_sum, sizeof(T) * features);
      }
    }
  });
}

template <class T>
void keys(const NormLinearAttention<T>& x, const NlaParts& parts, const T* d_, const T* dd_, T* ds, T* dz, double* dparams,
          int threads) {
  const std::int64_t rows = rows_of(x), features = features_of(x), vp = padded<T>(x.v_dim), group = x.q_heads / x.kv_heads;
  const bool pola = x.map == FeatureMap::pola || x.map == FeatureMap::pola_opposite;
  parallel_for(parts.first_k[x.sequences] * x.kv_heads, 1, threads, [&](std::int64_t begin, std::int64_t end) {
    Room room(backward_bytes(x));
    Tile<T> query(room, x.dim, x.sin != nullptr), key(room, x.dim, x.sin != nullptr);
    const std::int64_t ld = query.ld, wide = padded<T>(rows);
    T* const state = room.template take<T>(rows * vp);
    T* const turned = room.template take<T>(x.v_dim * ld);
    T* const df = room.template take<T>(kNlaTile * ld);
    T* const cum = room.template take<T>(kNlaTile * ld);
    T* const columns = room.template take<T>(ld * kNlaTile);
    T* const v = room.template take<T>(kNlaTile * vp);
    T* const y = room.template take<T>(kNlaTile * vp);
    T* const gate = room.template take<T>(kNlaTile * vp);
    T* const dv_rows = room.template take<T>(kNlaTile * vp);
    T* const v_columns = room.template take<T>(x.v_dim * kNlaTile);
    T* const weights = room.template take<T>(kNlaTile * kNlaTile);
    T* const sums = room.template take<T>(ld);
    T* const running = room.template take<T>(ld);
    T* const line = room.template take<T>(ld);
    std::memset(v, 0, sizeof(T) * kNlaTile * vp);
    std::memset(y, 0, sizeof(T) * kNlaTile * vp);
    std::memset(df, 0, sizeof(T) * kNlaTile * ld);
    std::memset(turned, 0, sizeof(T) * x.v_dim * ld);
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const std::int64_t slot = unit / x.kv_heads, kv = unit % x.kv_heads;
      const std::int64_t sequence = sequence_of(parts.first_k, x.sequences, slot);
      const Span span = span_of(x, sequence, x.keys);
      const std::int64_t first = (slot - parts.first_k[sequence]) * parts.part;
      const std::int64_t last = first + parts.part < span.length ? first + parts.part : span.length;
      const std::int64_t from = x.causal ? unit : sequence * x.kv_heads + kv;
      load_state(ds + from * rows * x.v_dim, rows, x.v_dim, state, vp);
      std::memset(sums, 0, sizeof(T) * ld);
      std::memcpy(sums, dz + from * features, sizeof(T) * features);
      transpose(state, vp, rows, x.v_dim, turned, ld);
      const Head<T> h = head_of(x, kv, false, key.power);
      double* const own = pola ? dparams + unit * x.dim : nullptr;
      if (pola) std::memset(own, 0, sizeof(double) * x.dim);
      const std::int64_t tiles = last > first ? (last - first + kNlaTile - 1) / kNlaTile : 0;
      for (std::int64_t i = tiles - 1; i >= 0; --i) {
        const std::int64_t at = first + i * kNlaTile, n = at + kNlaTile < last ? kNlaTile : last - at;
        key.make(x, x.k, span, sequence, at, n, kv, false);
        load_rows(x.v, x.dtype, span, at, n, kv, x.v_dim, v, vp);
        product(v, vp, 1, turned, ld, n, x.v_dim, wide, df, ld, false);
        product(key.g, ld, 1, state, vp, n, rows, vp, dv_rows, vp, false);
        const T* const z_rows = x.causal ? cum : sums;
        const std::int64_t z_ld = x.causal ? ld : 0;
        if (x.causal) {
          for (std::int64_t t = 0; t < n; ++t) std::memcpy(cum + t * ld, sums, sizeof(T) * ld);
          transpose(v, vp, n, x.v_dim, v_columns, kNlaTile);
          transpose(key.g, ld, n, rows, columns, kNlaTile);
          for (std::int64_t member = 0; member < group; ++member) {
            const std::int64_t head = kv * group + member;
            query.make(x, x.q, span, sequence, at, n, head, true);
            const T* const plain = x.rope_both ? query.g : query.f;
            load_gradient(x, span, at, n, head, y, vp, gate);
            const std::int64_t row = (span.batch * x.queries + span.begin + at) * x.q_heads + head;
            std::memset(running, 0, sizeof(T) * ld);
            for (std::int64_t t = n - 1; t >= 0; --t) {
              const T factor = T(1) / d_[row + t * x.q_heads];
              for (std::int64_t c = 0; c < vp; c += kLanes<T>) store_vec(y + t * vp + c, load_vec(y + t * vp + c) * factor);
              add_scaled(running, plain + t * ld, dd_[row + t * x.q_heads], ld);
              add_scaled(cum + t * ld, running, T(1), ld);
            }
            lower_product(query.g, ld, columns, n, rows, weights);
            upper_apply(weights, y, vp, n, vp, dv_rows, vp);
            lower_product(y, vp, v_columns, n, x.v_dim, weights);
            upper_apply(weights, query.g, ld, n, wide, df, ld);
            product(query.g, 1, ld, y, vp, rows, n, vp, state, vp, true);
            add_scaled(sums, running, T(1), ld);
          }
          if (i > 0) transpose(state, vp, rows, x.v_dim, turned, ld);
        }
        for (std::int64_t t = 0; t < n; ++t) {
          write_row(dv_rows + t * vp, x.v_dim, x.dv.data, x.dtype, row_of(x.dv, span, at + t, kv));
          unrotate(x, key, sequence, at + t, df + t * ld, z_rows + t * z_ld, T(1));
          key_gradient(h, key.x + t * key.dp, key.w + t * key.dp, df + t * ld, line, own);
          write_row(line, x.dim, x.dk.data, x.dtype, row_of(x.dk, span, at + t, kv));
        }
      }
      if (x.causal) {
        store_state(state, vp, rows, x.v_dim, ds + unit * rows * x.v_dim);
        std::memcpy(dz + unit * features, sums, sizeof(T) * features);
      }
    }
  });
}

}  // namespace

extern const NlaBackward<float> nla_backward_float = {queries<float>, keys<float>};
extern const NlaBackward<double> nla_backward_double = {queries<double>, keys<double>};

}  // namespace PYELASTIC_ISA
}  // namespace pyelastic
