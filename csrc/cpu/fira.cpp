// fira on the CPU: the work around the two GEMMs. Contract and formulas: ../fira.h.
//
// Blocking: everything is done on segments of a memory row, at most kSegment elements, that are converted to T in L1
// (or used in place where they are T already). Moments on the left are taken in tiles of 128 coordinates by
// 64 vectors, since the scale of an 8-bit block spans coordinates, which there lie in different memory rows.
// Bytes: `moments` reads G once, `apply` reads W and G and writes W; T = C P^T comes from L2.

#include <cmath>

#include "../common/parallel.h"
#include "fira_rows.h"

namespace pyelastic {
namespace PYELASTIC_ISA {
namespace {

constexpr std::int64_t kColumns = 64;  // vectors of a tile on the left
constexpr std::int64_t kGrainElements = 1 << 14;

std::int64_t grain(std::int64_t elements) { return kGrainElements / (elements + 1) + 1; }

std::int64_t blocks_of(const FiraProblem& p) { return (p.rank + kFiraBlock - 1) / kFiraBlock; }

template <class T>
T decode(std::int8_t code, T scale) {
  const T y = static_cast<T>(code) / T(127);
  return y * (y < 0 ? -y : y) * scale;
}
template <class T>
T decode(std::uint8_t code, T scale) {
  const T y = static_cast<T>(code) / T(255);
  return y * y * (y * y) * scale;
}
template <class T>
void encode(T x, T scale, std::int8_t* code) {
  const T a = scale > 0 ? scale : T(1);
  const T y = T(127) * std::sqrt((x < 0 ? -x : x) / a);
  *code = y == y ? static_cast<std::int8_t>(std::rint(x < 0 ? -y : y)) : std::int8_t(0);
}
template <class T>
void encode(T x, T scale, std::uint8_t* code) {
  const T a = scale > 0 ? scale : T(1);
  const T y = std::rint(T(255) * std::sqrt(std::sqrt(x / a)));
  *code = y == y ? static_cast<std::uint8_t>(x > 0 && y < 1 ? T(1) : y) : std::uint8_t(0);
}

// Elements [row, first .. first + n) of one moment as it is stored, in T. On the right a segment stays inside a block.
template <class T, class Code>
void load_moment(const FiraProblem& p, const void* data, Dtype dtype, const float* scales, std::int64_t row,
                 std::int64_t first, std::int64_t n, T* out) {
  const std::int64_t at = row * (p.left ? p.vectors : p.rank) + first, blocks = blocks_of(p);
  if (scales == nullptr) return load_segment(data, dtype, at, n, out);
  const Code* codes = static_cast<const Code*>(data) + at;
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int64_t s = p.left ? (first + i) * blocks + row / kFiraBlock : row * blocks + first / kFiraBlock;
    out[i] = decode(codes[i], static_cast<T>(scales[s]));
  }
}

// Stores a tile [rows, n] of a moment (row stride `ld` in x) and leaves in x what was stored. The tile spans whole
// blocks: on the right one row and at most 128 coordinates, on the left at most 128 coordinates (rows) of n vectors.
template <class T, class Code>
void store_moment(const FiraProblem& p, void* data, Dtype dtype, float* scales, std::int64_t row, std::int64_t rows,
                  std::int64_t first, std::int64_t n, T* x, std::int64_t ld) {
  const std::int64_t width = p.left ? p.vectors : p.rank, blocks = blocks_of(p);
  if (scales == nullptr) {
    for (std::int64_t k = 0; k < rows; ++k) {
      store_segment(data, dtype, (row + k) * width + first, n, x + k * ld);
      load_segment(data, dtype, (row + k) * width + first, n, x + k * ld);
    }
    return;
  }
  T most[kSegment];
  const std::int64_t scale_count = p.left ? n : 1;
  for (std::int64_t i = 0; i < scale_count; ++i) most[i] = 0;
  for (std::int64_t k = 0; k < rows; ++k) {
    for (std::int64_t i = 0; i < n; ++i) {
      const T value = x[k * ld + i], size = value < 0 ? -value : value;
      T& top = most[p.left ? i : 0];
      if (!(size <= top)) top = size;  // a NaN stays: nothing is larger
    }
  }
  for (std::int64_t i = 0; i < scale_count; ++i) {
    scales[p.left ? (first + i) * blocks + row / kFiraBlock : row * blocks + first / kFiraBlock] =
        static_cast<float>(most[i]);
  }
  for (std::int64_t k = 0; k < rows; ++k) {
    Code* codes = static_cast<Code*>(data) + (row + k) * width + first;
    for (std::int64_t i = 0; i < n; ++i) {
      const T top = most[p.left ? i : 0];
      encode(x[k * ld + i], top, &codes[i]);
      x[k * ld + i] = decode(codes[i], top);
    }
  }
}

template <class T>
void update(const FiraProblem& p, const T* r, std::int64_t n, T* m, T* v) {
  const T b1 = static_cast<T>(p.beta1), b2 = static_cast<T>(p.beta2);
  const T c1 = static_cast<T>(1.0 - p.beta1), c2 = static_cast<T>(1.0 - p.beta2);
  for (std::int64_t i = 0; i < n; ++i) {
    m[i] = b1 * m[i] + c1 * r[i];
    v[i] = b2 * v[i] + c2 * (r[i] * r[i]);
  }
}

// N over m.
template <class T>
void normalized(const FiraProblem& p, T* m, const T* v, std::int64_t n) {
  const T eps = static_cast<T>(p.eps), correction = static_cast<T>(p.correction);
  for (std::int64_t i = 0; i < n; ++i) m[i] = correction * (m[i] / (std::sqrt(v[i]) + eps));
}

template <class T>
void load_scaled(const void* r, Dtype dtype, std::int64_t at, std::int64_t n, double factor, T* out) {
  load_segment(r, dtype, at, n, out);
  const T c = static_cast<T>(factor);
  for (std::int64_t i = 0; i < n; ++i) out[i] *= c;
}

template <class T>
void moments_right(const FiraProblem& p, const void* r, Dtype r_dtype, const void* g, Dtype g_dtype,
                   std::int64_t g_stride, const FiraMoments& s, double* squares, int threads) {
  parallel_for(p.vectors, grain(p.dim), threads, [&](std::int64_t begin, std::int64_t end) {
    T room[kSegment], rr[kFiraBlock], m[kFiraBlock], v[kFiraBlock];
    for (std::int64_t j = begin; j < end; ++j) {
      double x2 = 0, r2 = 0, n2 = 0;
      for (std::int64_t d = 0; g != nullptr && d < p.dim; d += kSegment) {
        const std::int64_t n = least(kSegment, p.dim - d);
        x2 += sum_squares(segment(g, g_dtype, j * g_stride + d, n, room), n);
      }
      for (std::int64_t k = 0; k < p.rank; k += kFiraBlock) {
        const std::int64_t n = least(kFiraBlock, p.rank - k);
        load_scaled(r, r_dtype, j * p.rank + k, n, p.factor, rr);
        load_moment<T, std::int8_t>(p, s.m, s.dtype, s.m_scale, j, k, n, m);
        load_moment<T, std::uint8_t>(p, s.v, s.dtype, s.v_scale, j, k, n, v);
        update(p, rr, n, m, v);
        store_moment<T, std::int8_t>(p, s.m, s.dtype, s.m_scale, j, 1, k, n, m, 0);
        store_moment<T, std::uint8_t>(p, s.v, s.dtype, s.v_scale, j, 1, k, n, v, 0);
        normalized(p, m, v, n);
        r2 += sum_squares(rr, n);
        n2 += sum_squares(m, n);
      }
      if (g != nullptr) squares[j] = x2 * p.factor * p.factor;
      squares[p.vectors + j] = r2;
      squares[2 * p.vectors + j] = n2;
    }
  });
}

template <class T>
void moments_left(const FiraProblem& p, const void* r, Dtype r_dtype, const void* g, Dtype g_dtype,
                  std::int64_t g_stride, const FiraMoments& s, double* squares, int threads) {
  const std::int64_t tiles = (p.vectors + kColumns - 1) / kColumns;
  parallel_for(tiles, 1, threads, [&](std::int64_t begin, std::int64_t end) {
    constexpr std::int64_t tile = kFiraBlock * kColumns;
    T m[tile], v[tile];  // 64 KB of float in all: L2, and a small part of a thread's stack
    for (std::int64_t t = begin; t < end; ++t) {
      const std::int64_t first = t * kColumns, n = least(kColumns, p.vectors - first);
      T room[kColumns], sums[kColumns] = {}, n_sums[kColumns] = {};
      double x2[kColumns] = {}, r2[kColumns] = {}, n2[kColumns] = {};
      for (std::int64_t i = 0; g != nullptr && i < p.dim; ++i) {
        add_squares(segment(g, g_dtype, i * g_stride + first, n, room), n, sums);
        if ((i + 1) % kRowsFlush == 0) flush(sums, n, x2);
      }
      flush(sums, n, x2);
      for (std::int64_t k0 = 0; k0 < p.rank; k0 += kFiraBlock) {
        const std::int64_t rows = least(kFiraBlock, p.rank - k0);
        for (std::int64_t k = 0; k < rows; ++k) {
          T *mk = m + k * kColumns, *vk = v + k * kColumns;
          load_scaled(r, r_dtype, (k0 + k) * p.vectors + first, n, p.factor, room);
          load_moment<T, std::int8_t>(p, s.m, s.dtype, s.m_scale, k0 + k, first, n, mk);
          load_moment<T, std::uint8_t>(p, s.v, s.dtype, s.v_scale, k0 + k, first, n, vk);
          update(p, room, n, mk, vk);
          add_squares(room, n, sums);
          if ((k + 1) % kRowsFlush == 0) flush(sums, n, r2);
        }
        flush(sums, n, r2);
        store_moment<T, std::int8_t>(p, s.m, s.dtype, s.m_scale, k0, rows, first, n, m, kColumns);
        store_moment<T, std::uint8_t>(p, s.v, s.dtype, s.v_scale, k0, rows, first, n, v, kColumns);
        for (std::int64_t k = 0; k < rows; ++k) {
          normalized(p, m + k * kColumns, v + k * kColumns, n);
          add_squares(m + k * kColumns, n, n_sums);
          if ((k + 1) % kRowsFlush == 0) flush(n_sums, n, n2);
        }
        flush(n_sums, n, n2);
      }
      for (std::int64_t i = 0; i < n; ++i) {
        if (g != nullptr) squares[first + i] = x2[i] * p.factor * p.factor;
        squares[p.vectors + first + i] = r2[i];
        squares[2 * p.vectors + first + i] = n2[i];
      }
    }
  });
}

template <class T>
void moments(const FiraProblem& p, const void* r, Dtype r_dtype, const void* g, Dtype g_dtype, std::int64_t g_stride,
             const FiraMoments& s, double* squares, int threads) {
  (p.left ? moments_left<T> : moments_right<T>)(p, r, r_dtype, g, g_dtype, g_stride, s, squares, threads);
}

template <class T>
FiraLimiter scales(const FiraProblem& p, const double* squares, const double* gram, const double* exact, double before,
                   double gamma, bool collapse, bool per_matrix, T* f) {
  const std::int64_t count = p.vectors;
  const double *x2 = squares, *r2 = squares + count, *n2 = squares + 2 * count;
  double all_r = 0, all_n = 0;
  for (std::int64_t j = 0; per_matrix && j < count; ++j) {
    all_r += r2[j];
    all_n += n2[j];
  }
  const double one_phi = std::sqrt(all_n) / (std::sqrt(all_r) + kFiraNormEps);
  double s2 = 0, whole = 0;
  for (std::int64_t j = 0; j < count; ++j) {
    const double phi = per_matrix ? one_phi : std::sqrt(n2[j]) / (std::sqrt(r2[j]) + kFiraNormEps);
    double q = exact != nullptr ? exact[j] : x2[j];
    if (exact == nullptr) q += p.a_r * p.a_r * (gram != nullptr ? gram[j] : r2[j]) - 2.0 * p.a_r * r2[j];
    if (q < 0) q = 0;  // NaN is not below
    s2 += phi * phi * q;
    whole += phi * phi * x2[j];
    f[j] = static_cast<T>(phi);
  }
  FiraLimiter out;
  out.norm = std::sqrt(s2);
  out.lim = 1;
  const bool first = before != before || (!collapse && before == 0);
  if (gamma > 0 && !first) {
    const double growth = out.norm / (before + kFiraNormEps);
    out.lim = (growth < gamma ? gamma : growth) / gamma;
  }
  out.kept = !collapse && out.norm == 0 ? before : out.norm / out.lim;
  out.kappa = s2 == 0 ? (whole > 0 ? HUGE_VAL : 0.0) : whole / s2;
  const double scale = p.a_s / out.lim;
  for (std::int64_t j = 0; j < count; ++j) f[j] = static_cast<T>(static_cast<double>(f[j]) * scale);
  return out;
}

template <class T>
void coefficients(const FiraProblem& p, const FiraMoments& s, const T* f, void* r, Dtype r_dtype, int threads) {
  const std::int64_t rows = p.left ? p.rank : p.vectors, width = p.left ? p.vectors : p.rank;
  const T a_n = static_cast<T>(p.a_n), a_r = static_cast<T>(p.a_r);
  parallel_for(rows, grain(width), threads, [&](std::int64_t begin, std::int64_t end) {
    T c[kFiraBlock], m[kFiraBlock], v[kFiraBlock];
    for (std::int64_t row = begin; row < end; ++row) {
      for (std::int64_t k = 0; k < width; k += kFiraBlock) {
        const std::int64_t n = least(kFiraBlock, width - k);
        load_scaled(r, r_dtype, row * width + k, n, p.factor, c);
        load_moment<T, std::int8_t>(p, s.m, s.dtype, s.m_scale, row, k, n, m);
        load_moment<T, std::uint8_t>(p, s.v, s.dtype, s.v_scale, row, k, n, v);
        normalized(p, m, v, n);
        if (p.left) {
          for (std::int64_t i = 0; i < n; ++i) c[i] = a_n * m[i] - a_r * f[k + i] * c[i];
        } else {
          const T ff = a_r * f[row];
          for (std::int64_t i = 0; i < n; ++i) c[i] = a_n * m[i] - ff * c[i];
        }
        store_segment(r, r_dtype, row * width + k, n, c);
      }
    }
  });
}

template <class T>
void apply(const FiraProblem& p, const void* t, Dtype t_dtype, const T* f, const void* g, std::int64_t g_stride, void* w,
           std::int64_t w_stride, Dtype w_dtype, std::int64_t first, std::int64_t rows, double size, double keep,
           const FiraRounding& rounding, int threads) {
  const std::int64_t columns = p.left ? p.vectors : p.dim;
  const FiraWeights<T> x{p, f, g, g_stride, w, w_stride, w_dtype, static_cast<T>(size), static_cast<T>(keep), rounding};
  parallel_for(rows, grain(columns), threads, [&](std::int64_t begin, std::int64_t end) {
    T room[kSegment];
    for (std::int64_t i = begin; i < end; ++i) {
      for (std::int64_t at = 0; at < columns; at += kSegment) {
        const std::int64_t n = least(kSegment, columns - at);
        write_segment(x, first + i, at, n, t == nullptr ? nullptr : segment(t, t_dtype, i * columns + at, n, room));
      }
    }
  });
}

}  // namespace

const FiraKernels<float> fira_float = {moments<float>, scales<float>, coefficients<float>, apply<float>};
const FiraKernels<double> fira_double = {moments<double>, scales<double>, coefficients<double>, apply<double>};

}  // namespace PYELASTIC_ISA
}  // namespace pyelastic
