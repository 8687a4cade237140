// norm_linear_attention on the CPU in quadratic order, for sequences of at most one tile. Contract: ../norm_linear_attention.h.
//
// The weights of all pairs (64 x 64) stay in L1 in place of a state (2 d x dv): fewer products where N is below about d,
// or 2 d if causal. A unit is a sequence and a head of keys, with its queries' heads; nothing goes through memory but
// inputs and outputs. Not for MALA, nor with states.

#include "norm_linear_attention_rows.h"

namespace pyelastic {
namespace PYELASTIC_ISA {
namespace {

// What forward and backward share: tiles of a unit's keys and of one head's queries, and their weights.
template <class T>
struct Short {
  const NormLinearAttention<T>& x;
  std::int64_t rows, vp, ld, wide, n, m;
  Tile<T> query, key;
  T *v, *columns, *weights, *z, *d, *gate;  // z [n or 1][ld]: sums of the keys that a row sees
  Span span;
  std::int64_t sequence, kv;

  static std::int64_t bytes(const NormLinearAttention<T>& x) {
    const std::int64_t vp = padded<T>(x.v_dim), ld = Tile<T>::row(x.dim);
    return 2 * Tile<T>::bytes(x.dim) + 2 * Room::bytes<T>(kNlaTile * vp) + 2 * Room::bytes<T>(kNlaTile * ld) +
           Room::bytes<T>(kNlaTile * kNlaTile) + Room::bytes<T>(kNlaTile);
  }
  Short(Room& room, const NormLinearAttention<T>& x_)
      : x(x_), rows(2 * x_.dim), vp(padded<T>(x_.v_dim)), ld(Tile<T>::row(x_.dim)), wide(padded<T>(2 * x_.dim)),
        n(x_.queries), m(x_.keys), query(room, x_.dim, x_.sin != nullptr), key(room, x_.dim, x_.sin != nullptr) {
    v = room.template take<T>(kNlaTile * vp);
    columns = room.template take<T>(ld * kNlaTile);
    weights = room.template take<T>(kNlaTile * kNlaTile);
    z = room.template take<T>(kNlaTile * ld);
    d = room.template take<T>(kNlaTile);
    gate = room.template take<T>(kNlaTile * vp);
    std::memset(v, 0, sizeof(T) * kNlaTile * vp);
    std::memset(gate, 0, sizeof(T) * kNlaTile * vp);
  }

  std::int64_t z_ld() const { return x.causal ? ld : 0; }
  const T* plain(const Tile<T>& tile, std::int64_t t) const { return x.rope_both ? tile.g_row(t) : tile.f_row(t); }

  void load_keys(std::int64_t unit) {
    sequence = unit / x.kv_heads;
    kv = unit % x.kv_heads;
    span = {sequence, 0, n};
    key.make(x, x.k, span, sequence, 0, m, kv, false);
    load_rows(x.v, x.dtype, span, 0, m, kv, x.v_dim, v, vp);
    transpose(key.g, ld, m, rows, columns, kNlaTile);
    std::memset(z, 0, sizeof(T) * ld);
    for (std::int64_t t = 0; t < m; ++t) {
      T* const sum = z + t * z_ld();
      if (x.causal && t > 0) std::memcpy(sum, sum - ld, sizeof(T) * ld);
      add_scaled(sum, plain(key, t), T(1), ld);
    }
  }

  // Queries of a head, their denominators, and all weights of the numerator.
  void load_queries(std::int64_t head) {
    query.make(x, x.q, span, sequence, 0, n, head, true);
    for (std::int64_t t = 0; t < n; ++t) {
      d[t] = inner(plain(query, t), z + t * z_ld(), ld) + effective_eps(x, sequence, t, m);
    }
  }
  void weigh() {
    if (x.causal) return lower_product(query.g, ld, columns, n, rows, weights);
    product(query.g, ld, 1, columns, kNlaTile, n, rows, padded<T>(m), weights, kNlaTile, false);
  }

  // c = w b, or w^T b added to c, for w of all pairs.
  void apply(const T* w, const T* b, std::int64_t ldb, std::int64_t width, T* c, std::int64_t ldc) const {
    if (!x.causal) return product(w, kNlaTile, 1, b, ldb, n, m, width, c, ldc, false);
    std::memset(c, 0, sizeof(T) * n * ldc);
    lower_apply(w, b, ldb, n, width, c, ldc);
  }
  void apply_transposed(const T* w, const T* b, std::int64_t ldb, std::int64_t width, T* c, std::int64_t ldc) const {
    if (x.causal) return upper_apply(w, b, ldb, n, width, c, ldc);
    product(w, 1, kNlaTile, b, ldb, m, n, width, c, ldc, true);
  }
};

template <class T>
void forward(const NormLinearAttention<T>& x, int threads) {
  const std::int64_t group = x.q_heads / x.kv_heads, vp = padded<T>(x.v_dim);
  parallel_for(x.sequences * x.kv_heads, 1, threads, [&](std::int64_t begin, std::int64_t end) {
    Room room(Short<T>::bytes(x) + Room::bytes<T>(kNlaTile * vp));
    Short<T> s(room, x);
    T* const out = room.template take<T>(kNlaTile * vp);
    for (std::int64_t unit = begin; unit < end; ++unit) {
      s.load_keys(unit);
      for (std::int64_t head = s.kv * group; head < (s.kv + 1) * group; ++head) {
        s.load_queries(head);
        s.weigh();
        s.apply(s.weights, s.v, vp, vp, out, vp);
        finish_rows(x, s.span, 0, s.n, head, s.d, out, vp, s.gate);
      }
    }
  });
}

template <class T>
void backward(const NormLinearAttention<T>& x, double* dparams, double* dpowers, int threads) {
  const std::int64_t group = x.q_heads / x.kv_heads, vp = padded<T>(x.v_dim), ld = Tile<T>::row(x.dim);
  const bool pola = x.map == FeatureMap::pola || x.map == FeatureMap::pola_opposite, gated = x.gate.data != nullptr;
  const std::int64_t width = pola ? x.dim : 3;
  parallel_for(x.sequences * x.kv_heads, 1, threads, [&](std::int64_t begin, std::int64_t end) {
    Room room(Short<T>::bytes(x) + 3 * Room::bytes<T>(kNlaTile * vp) + 3 * Room::bytes<T>(kNlaTile * ld) +
              Room::bytes<T>(kNlaTile * kNlaTile) + Room::bytes<T>(x.v_dim * kNlaTile) + 2 * Room::bytes<T>(ld + vp));
    Short<T> s(room, x);
    T* const y = room.template take<T>(kNlaTile * vp);
    T* const o = room.template take<T>(kNlaTile * vp);
    T* const dv_rows = room.template take<T>(kNlaTile * vp);
    T* const df = room.template take<T>(kNlaTile * ld);
    T* const dk_rows = room.template take<T>(kNlaTile * ld);
    T* const dz = room.template take<T>(kNlaTile * ld);
    T* const pull = room.template take<T>(kNlaTile * kNlaTile);  // y v^T
    T* const v_columns = room.template take<T>(x.v_dim * kNlaTile);
    T* const line = room.template take<T>(ld > vp ? ld : vp);
    T* const running = room.template take<T>(ld > vp ? ld : vp);
    std::memset(y, 0, sizeof(T) * kNlaTile * vp);
    std::memset(df, 0, sizeof(T) * kNlaTile * ld);
    for (std::int64_t unit = begin; unit < end; ++unit) {
      s.load_keys(unit);
      transpose(s.v, vp, s.m, x.v_dim, v_columns, kNlaTile);
      std::memset(dv_rows, 0, sizeof(T) * kNlaTile * vp);
      std::memset(dk_rows, 0, sizeof(T) * kNlaTile * ld);
      std::memset(dz, 0, sizeof(T) * kNlaTile * ld);
      for (std::int64_t head = s.kv * group; head < (s.kv + 1) * group; ++head) {
        s.load_queries(head);
        load_gradient(x, s.span, 0, s.n, head, y, vp, s.gate);
        for (std::int64_t t = 0; t < s.n; ++t) {
          const T factor = T(1) / s.d[t];
          for (std::int64_t c = 0; c < vp; c += kLanes<T>) store_vec(y + t * vp + c, load_vec(y + t * vp + c) * factor);
        }
        if (x.causal) {
          lower_product(y, vp, v_columns, s.n, x.v_dim, pull);
        } else {
          product(y, vp, 1, v_columns, kNlaTile, s.n, x.v_dim, padded<T>(s.m), pull, kNlaTile, false);
        }
        s.apply(pull, s.key.g, ld, s.wide, df, ld);
        s.weigh();
        if (gated) s.apply(s.weights, s.v, vp, vp, o, vp);
        const Head<T> h = head_of(x, head, true, s.query.power);
        double* const own = dparams + (s.sequence * x.q_heads + head) * width;
        std::memset(own, 0, sizeof(double) * width);
        std::memset(running, 0, sizeof(T) * ld);
        for (std::int64_t t = s.n - 1; t >= 0; --t) {
          const T dd = -inner(s.query.g_row(t), df + t * ld, s.wide) / s.d[t];
          if (gated) gate_gradient(x, s.span, t, head, s.gate + t * vp, s.d[t], o + t * vp, line);
          add_scaled(running, s.plain(s.query, t), dd, ld);
          if (x.causal) add_scaled(dz + t * ld, running, T(1), ld);
          unrotate(x, s.query, s.sequence, t, df + t * ld, s.z + t * s.z_ld(), dd);
          query_gradient(h, s.query.e[t], s.query.x + t * s.query.dp, s.query.w + t * s.query.dp, s.query.l + t * s.query.dp, df + t * ld,
                         line, own);
          write_row(line, x.dim, x.dq.data, x.dtype, row_of(x.dq, s.span, t, head));
        }
        if (!x.causal) add_scaled(dz, running, T(1), ld);
        s.apply_transposed(s.weights, y, vp, vp, dv_rows, vp);
        s.apply_transposed(pull, s.query.g, ld, s.wide, dk_rows, ld);
      }
      const Head<T> h = head_of(x, s.kv, false, s.key.power);
      double* const own = pola ? dpowers + unit * x.dim : nullptr;
      if (pola) std::memset(own, 0, sizeof(double) * x.dim);
      for (std::int64_t t = 0; t < s.m; ++t) {
        write_row(dv_rows + t * vp, x.v_dim, x.dv.data, x.dtype, row_of(x.dv, s.span, t, s.kv));
        unrotate(x, s.key, s.sequence, t, dk_rows + t * ld, dz + t * s.z_ld(), T(1));
        key_gradient(h, s.key.x + t * s.key.dp, s.key.w + t * s.key.dp, dk_rows + t * ld, line, own);
        write_row(line, x.dim, x.dk.data, x.dtype, row_of(x.dk, s.span, t, s.kv));
      }
    }
  });
}

}  // namespace

extern const NlaShort<float> nla_short_float = {forward<float>, backward<float>};
extern const NlaShort<double> nla_short_double = {forward<double>, backward<double>};

}  // namespace PYELASTIC_ISA
}  // namespace pyelastic
