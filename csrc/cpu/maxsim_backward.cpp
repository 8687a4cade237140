// maxsim on the CPU, backward. Contract and formulas: ../maxsim.h.
//
// A document (or query) is owned by one thread, which adds up the winners' rows in its scratch and stores each row once, the
// normalisation's Jacobian applied. 2 / Ld of the forward's operations for the maximum. The smooth maximum computes its
// similarities again, two tiles at a time, with the forward's micro-kernel for all three products.

#include <cmath>

#include "maxsim_tile.h"

namespace pyelastic {
namespace PYELASTIC_ISA {
namespace {

constexpr double kLog2e = 1.4426950408889634;
constexpr double kLargestInverse = 1e12;  // 1 / F.normalize's eps: there the norm is constant

template <class T>
void add_scaled(const T* x, T c, std::int64_t n, T* out) {
  for (std::int64_t k = 0; k < n; ++k) out[k] += c * x[k];
}

inline std::int32_t winner(Winners w, std::int64_t at) {
  if (!w.narrow) return static_cast<const std::int32_t*>(w.data)[at];
  const std::uint16_t t = static_cast<const std::uint16_t*>(w.data)[at];
  return t == 0xffff ? -1 : t;
}

// c of query token s of the pair, in plane p; per_token arrays are as maxima.
template <class T>
struct Coefficients {
  const MaxSimProblem& p;
  const MaxSimGradient<T>& g;
  // Top-k: the planes are winners of one mean.
  T operator()(int plane, std::int64_t i, std::int64_t j, std::int64_t pair, std::int64_t s) const {
    const int of = p.topk > 1 ? 0 : plane;
    if (g.per_token != nullptr) return g.per_token[token_array(p, of, i, j, pair) + s];
    const T w = g.weights == nullptr ? T(1) : g.weights[p.q.offsets[i] + s];
    return w == 0 ? T(0) : g.scores[score_at(p, of, i, j, pair)] * w;
  }
};

// The pairs of sequence `own` of one side, in order: calls f(other, pair).
template <class F>
void each_pair(const MaxSimProblem& p, PairOrder order, bool own_is_query, std::int64_t own, const F& f) {
  if (p.pair_q == nullptr) {
    const std::int64_t others = own_is_query ? p.d.count : p.q.count;
    for (std::int64_t other = 0; other < others; ++other) f(other, std::int64_t{-1});
    return;
  }
  for (std::int64_t n = order.first[own]; n < order.first[own + 1]; ++n) {
    const std::int64_t pair = order.order[n];
    f(own_is_query ? p.pair_d[pair] : p.pair_q[pair], pair);
  }
}

// out += (dx^ - <dx^, x^> x^) / |x| for unit x^ = x inverse; dx^ itself if not normalised. A row without a gradient
// stays without one, whatever it holds: it may be a masked token.
template <class T>
void add_through_norm(const T* dx_hat, const T* x, const T* inverse, std::int64_t n, T* out) {
  bool some = false;
  for (std::int64_t k = 0; k < n; ++k) some |= dx_hat[k] != 0;
  if (!some) return;
  if (inverse == nullptr) {
    for (std::int64_t k = 0; k < n; ++k) out[k] += dx_hat[k];
    return;
  }
  double dot = 0;
  for (std::int64_t k = 0; k < n; ++k) dot += static_cast<double>(dx_hat[k]) * static_cast<double>(x[k]);
  const double r = static_cast<double>(*inverse);
  // 0.999: the largest inverse, rounded to float.
  const T along = r >= 0.999 * kLargestInverse ? T(0) : static_cast<T>(dot * r * r);
  for (std::int64_t k = 0; k < n; ++k) out[k] += (dx_hat[k] - along * x[k]) * *inverse;
}

template <class T>
const T* inverse_of(const void* all, int plane, std::int64_t total) {
  return all == nullptr ? nullptr : static_cast<const T*>(all) + plane * total;
}

// One side's gradient: `own` tokens get c times the unit rows of `other` tokens.
template <class T>
void gather(const MaxSimProblem& p, const MaxSimGradient<T>& g, Winners winners, PairOrder order, bool own_is_query,
            void* out, Dtype dtype, int threads) {
  const Tokens &own = own_is_query ? p.q : p.d, &other = own_is_query ? p.d : p.q;
  const void *own_inv = own_is_query ? p.q_inv : p.d_inv, *other_inv = own_is_query ? p.d_inv : p.q_inv;
  const Coefficients<T> coefficient{p, g};
  const bool one_each = p.topk <= 1 && p.planes == 1;
  std::int64_t longest = 0;
  for (std::int64_t n = 0; n < own.count; ++n) longest = std::max(longest, own.offsets[n + 1] - own.offsets[n]);
  const std::int64_t planes = p.planes;
  const std::int64_t bytes = 2 * Room::bytes<T>(longest * p.dim) + 2 * Room::bytes<T>(p.dim);
  parallel_for(own.count, 1, threads, [&](std::int64_t begin, std::int64_t end) {
    Room room(bytes);
    T* const d_hat = room.take<T>(longest * p.dim);
    T* const total = room.take<T>(longest * p.dim);
    T* const other_room = room.take<T>(p.dim);
    T* const own_room = room.take<T>(p.dim);
    for (std::int64_t n = begin; n < end; ++n) {
      const std::int64_t first = own.offsets[n], length = own.offsets[n + 1] - first;
      std::fill(total, total + length * p.dim, T(0));
      for (int plane = 0; plane < planes; ++plane) {
        const std::int64_t width = p.prefixes[plane];
        const T* scale = inverse_of<T>(other_inv, p.topk > 1 ? 0 : plane, other.total);
        // The k winners of a mean share their Jacobian: one sum.
        const bool starts = p.topk <= 1 || plane == 0, ends = p.topk <= 1 || plane + 1 == planes;
        if (starts) std::fill(d_hat, d_hat + length * p.dim, T(0));
        each_pair(p, order, own_is_query, n, [&](std::int64_t m, std::int64_t pair) {
          const std::int64_t i = own_is_query ? n : m, j = own_is_query ? m : n;
          const std::int64_t at = token_array(p, plane, i, j, pair), tokens = p.q.offsets[i + 1] - p.q.offsets[i];
          T share = T(1);
          if (p.topk > 1) {
            std::int64_t kept_tokens = 0;
            for (std::int64_t t = p.d.offsets[j]; t < p.d.offsets[j + 1]; ++t) {
              kept_tokens += p.d_mask == nullptr || p.d_mask[t] != 0;
            }
            share = T(1) / static_cast<T>(std::max<std::int64_t>(1, std::min<std::int64_t>(p.topk, kept_tokens)));
          }
          for (std::int64_t s = 0; s < tokens; ++s) {
            const std::int32_t t = winner(winners, at + s);
            if (t < 0) continue;
            T c = coefficient(plane, i, j, pair, s) * share;
            if (c == 0) continue;
            const std::int64_t to = own_is_query ? s : t;
            const std::int64_t from = own_is_query ? p.d.offsets[j] + t : p.q.offsets[i] + s;
            if (scale != nullptr) c *= scale[from];
            add_scaled(token(other, from, width, other_room), c, width, d_hat + to * p.dim);
          }
        });
        if (!ends) continue;
        const T* inverse = inverse_of<T>(own_inv, p.topk > 1 ? 0 : plane, own.total);
        if (one_each && inverse == nullptr) {
          std::copy(d_hat, d_hat + length * p.dim, total);
          continue;
        }
        for (std::int64_t t = 0; t < length; ++t) {
          add_through_norm(d_hat + t * p.dim, token(own, first + t, width, own_room),
                           inverse == nullptr ? nullptr : inverse + first + t, width, total + t * p.dim);
        }
      }
      for (std::int64_t k = 0; k < length * p.dim; ++k) store(out, dtype, first * p.dim + k, total[k]);
    }
  });
}

template <class T>
constexpr Dtype kOwn = sizeof(T) == sizeof(float) ? Dtype::float32 : Dtype::float64;

template <class T>
void queries(const MaxSimProblem& p, const MaxSimGradient<T>& g, Winners winners, PairOrder order, T* dq, int threads) {
  gather(p, g, winners, order, true, dq, kOwn<T>, threads);
}

template <class T>
void documents(const MaxSimProblem& p, const MaxSimGradient<T>& g, Winners winners, PairOrder order, void* dd,
               Dtype dtype, int threads) {
  gather(p, g, winners, order, false, dd, dtype, threads);
}

// The smooth maximum: every kept token t gets c_s exp((s - m) / tau). Unit rows of both sides are made in scratch.
template <class T>
void smooth(const MaxSimProblem& p, const MaxSimGradient<T>& g, const T* maxima, PairOrder order, bool own_is_query,
            void* out, Dtype dtype, int threads) {
  const Tokens &own = own_is_query ? p.q : p.d, &other = own_is_query ? p.d : p.q;
  const auto *own_inv = static_cast<const T*>(own_is_query ? p.q_inv : p.d_inv);
  const auto *other_inv = static_cast<const T*>(own_is_query ? p.d_inv : p.q_inv);
  const Coefficients<T> coefficient{p, g};
  constexpr std::int64_t kB = kBlock<T>;
  const std::int64_t padded = (p.dim + kB - 1) / kB * kB;  // columns, in whole blocks of lanes
  std::int64_t longest = 0;
  for (std::int64_t n = 0; n < own.count; ++n) longest = std::max(longest, own.offsets[n + 1] - own.offsets[n]);
  const std::int64_t bytes = Room::bytes<T>(longest * p.dim) + Room::bytes<T>(longest * padded) +
                             Room::bytes<T>(p.dim * kB) + Room::bytes<T>(kB * padded) + Room::bytes<T>(kRows * kB) +
                             Room::bytes<T>(p.dim);
  const T per_tau = static_cast<T>(kLog2e / p.temperature);
  parallel_for(own.count, 1, threads, [&](std::int64_t begin, std::int64_t end) {
    Room room(bytes);
    T* const rows_of_own = room.take<T>(longest * p.dim);   // unit rows
    T* const sum = room.take<T>(longest * padded);          // dx^
    T* const columns = room.take<T>(p.dim * kB);            // a block of the other side, [dim][lanes]
    T* const block_rows = room.take<T>(kB * padded);        // the same, [lanes][dim]
    T* const weights = room.take<T>(kRows * kB);            // c exp((s - m) / tau)
    T* const spare = room.take<T>(p.dim);
    const auto unit = [&](const Tokens& x, const T* inverse, std::int64_t t, T* to) {
      const T* row = token(x, t, p.dim, spare);
      const T scale = inverse == nullptr ? T(1) : inverse[t];
      for (std::int64_t k = 0; k < p.dim; ++k) to[k] = row[k] * scale;
    };
    const auto counts = [&](std::int64_t t) { return p.d_mask == nullptr || p.d_mask[t] != 0; };
    for (std::int64_t n = begin; n < end; ++n) {
      const std::int64_t first = own.offsets[n], length = own.offsets[n + 1] - first;
      for (std::int64_t t = 0; t < length; ++t) unit(own, own_inv, first + t, rows_of_own + t * p.dim);
      std::fill(sum, sum + length * padded, T(0));
      each_pair(p, order, own_is_query, n, [&](std::int64_t m, std::int64_t pair) {
        const std::int64_t i = own_is_query ? n : m, j = own_is_query ? m : n;
        const std::int64_t at = token_array(p, 0, i, j, pair);
        for (std::int64_t b = other.offsets[m]; b < other.offsets[m + 1]; b += kB) {
          const std::int64_t lanes = std::min(kB, other.offsets[m + 1] - b);
          std::fill(block_rows, block_rows + kB * padded, T(0));
          std::fill(columns, columns + p.dim * kB, T(0));
          for (std::int64_t l = 0; l < lanes; ++l) {
            unit(other, other_inv, b + l, block_rows + l * padded);
            // Zero times what a token without weight holds may be NaN.
            const bool on = own_is_query ? counts(b + l) : coefficient(0, i, j, pair, b - other.offsets[m] + l) != 0;
            if (!on) std::fill(block_rows + l * padded, block_rows + (l + 1) * padded, T(0));
            for (std::int64_t k = 0; k < p.dim; ++k) columns[k * kB + l] = block_rows[l * padded + k];
          }
          each_rows(length, [&](std::int64_t t0, auto rows) {
            constexpr int R = decltype(rows)::value;
            Sums<T> s{};
            multiply<R>(rows_of_own + t0 * p.dim, p.dim, columns, kB, p.dim, s);
            for (int r = 0; r < R; ++r) {
              for (int half = 0; half < 2; ++half) {
                T low[VecOf<T>::lanes], c[VecOf<T>::lanes];
                for (std::int64_t l = 0; l < VecOf<T>::lanes; ++l) {
                  const std::int64_t lane = half * VecOf<T>::lanes + l;
                  const std::int64_t q = own_is_query ? t0 + r : b - other.offsets[m] + lane;
                  const std::int64_t d = own_is_query ? b + lane : first + t0 + r;
                  const bool on = lane < lanes && counts(d);
                  low[l] = on ? maxima[at + q] : T(0);
                  c[l] = on ? coefficient(0, i, j, pair, q) : T(0);
                }
                const Vec<T> grad = load_vec(c);
                const Vec<T> e = exp2_vec((s.v[r][half] - load_vec(low)) * per_tau);
                store_vec(weights + r * kB + half * VecOf<T>::lanes, grad == T(0) ? Vec<T>{} : grad * e);
              }
            }
            for (std::int64_t k = 0; k < padded; k += kB) {
              Sums<T> add{};
              multiply<R>(weights, kB, block_rows + k, padded, lanes, add);
              for (int r = 0; r < R; ++r) {
                T* to = sum + (t0 + r) * padded + k;
                store_vec(to, load_vec(to) + add.v[r][0]);
                store_vec(to + VecOf<T>::lanes, load_vec(to + VecOf<T>::lanes) + add.v[r][1]);
              }
            }
          });
        }
      });
      T* const row = columns;  // free by now
      for (std::int64_t t = 0; t < length; ++t) {
        std::fill(row, row + p.dim, T(0));
        add_through_norm(sum + t * padded, token(own, first + t, p.dim, spare),
                         own_inv == nullptr ? nullptr : own_inv + first + t, p.dim, row);
        for (std::int64_t k = 0; k < p.dim; ++k) store(out, dtype, (first + t) * p.dim + k, row[k]);
      }
    }
  });
}

template <class T>
void smooth_queries(const MaxSimProblem& p, const MaxSimGradient<T>& g, const T* maxima, PairOrder order, T* dq,
                    int threads) {
  smooth(p, g, maxima, order, true, dq, kOwn<T>, threads);
}

template <class T>
void smooth_documents(const MaxSimProblem& p, const MaxSimGradient<T>& g, const T* maxima, PairOrder order, void* dd,
                      Dtype dtype, int threads) {
  smooth(p, g, maxima, order, false, dd, dtype, threads);
}

}  // namespace

const MaxSimBackward<float> maxsim_backward_float = {queries<float>, documents<float>, smooth_queries<float>,
                                                     smooth_documents<float>};
const MaxSimBackward<double> maxsim_backward_double = {queries<double>, documents<double>, smooth_queries<double>,
                                                       smooth_documents<double>};

}  // namespace PYELASTIC_ISA
}  // namespace pyelastic
