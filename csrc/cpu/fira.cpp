// fira on the CPU: the work around the two GEMMs. Contract and formulas: ../fira.h.
//
// Blocking: everything is done on segments of a memory row, at most kSegment elements, that are converted to T in L1
// (or used in place where they are T already). Moments on the left are taken in tiles of 128 coordinates by
// 64 vectors, since the scale of an 8-bit block spans coordinates, which there lie in different memory rows.
// Bytes: `moments` reads G once, `apply` reads W and G and writes W; T = C P^T comes from L2.

#include "../fira.h"

#include <cmath>

#include "../common/parallel.h"

namespace pyelastic {
namespace PYELASTIC_ISA {
namespace {

constexpr std::int64_t kSegment = 256;
constexpr std::int64_t kColumns = 64;      // vectors of a tile on the left
constexpr std::int64_t kRowsFlush = 64;    // rows of G summed in T on the left before they are added to a double
constexpr std::int64_t kGrainElements = 1 << 14;
constexpr int kLanes = 16;

std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
std::int64_t grain(std::int64_t elements) { return kGrainElements / (elements + 1) + 1; }

template <class T>
void load_segment(const void* data, Dtype dtype, std::int64_t at, std::int64_t n, T* out) {
  switch (dtype) {
    case Dtype::float32:
      for (std::int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(static_cast<const float*>(data)[at + i]);
      return;
    case Dtype::float64:
      for (std::int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(static_cast<const double*>(data)[at + i]);
      return;
    case Dtype::bfloat16: {
      const std::uint16_t* from = static_cast<const std::uint16_t*>(data) + at;
      for (std::int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(bfloat16_to_float(from[i]));
      return;
    }
    case Dtype::float16: {
      const std::uint16_t* from = static_cast<const std::uint16_t*>(data) + at;
      for (std::int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(float16_to_float(from[i]));
      return;
    }
  }
}

template <class T>
void store_segment(void* data, Dtype dtype, std::int64_t at, std::int64_t n, const T* x) {
  switch (dtype) {
    case Dtype::float32:
      for (std::int64_t i = 0; i < n; ++i) static_cast<float*>(data)[at + i] = static_cast<float>(x[i]);
      return;
    case Dtype::float64:
      for (std::int64_t i = 0; i < n; ++i) static_cast<double*>(data)[at + i] = static_cast<double>(x[i]);
      return;
    case Dtype::bfloat16: {
      std::uint16_t* to = static_cast<std::uint16_t*>(data) + at;
      for (std::int64_t i = 0; i < n; ++i) to[i] = float_to_bfloat16(static_cast<float>(x[i]));
      return;
    }
    case Dtype::float16: {
      std::uint16_t* to = static_cast<std::uint16_t*>(data) + at;
      for (std::int64_t i = 0; i < n; ++i) to[i] = float_to_float16(static_cast<float>(x[i]));
      return;
    }
  }
}

// The segment as T: in place if it is T, else converted into `room`.
template <class T>
const T* segment(const void* data, Dtype dtype, std::int64_t at, std::int64_t n, T* room) {
  if (dtype == (sizeof(T) == sizeof(float) ? Dtype::float32 : Dtype::float64)) return static_cast<const T*>(data) + at;
  load_segment(data, dtype, at, n, room);
  return room;
}

// Sum of squares of n <= kSegment elements, in kLanes partial sums of T.
template <class T>
double sum_squares(const T* x, std::int64_t n) {
  T lanes[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) lanes[l] += x[i + l] * x[i + l];
  }
  double sum = 0;
  for (int l = 0; l < kLanes; ++l) sum += static_cast<double>(lanes[l]);
  for (; i < n; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return sum;
}

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
      for (std::int64_t d = 0; d < p.dim; d += kSegment) {
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
      squares[j] = x2 * p.factor * p.factor;
      squares[p.vectors + j] = r2;
      squares[2 * p.vectors + j] = n2;
    }
  });
}

template <class T>
void add_squares(const T* x, std::int64_t n, T* sums) {
  for (std::int64_t i = 0; i < n; ++i) sums[i] += x[i] * x[i];
}
template <class T>
void flush(T* sums, std::int64_t n, double* to) {
  for (std::int64_t i = 0; i < n; ++i) {
    to[i] += static_cast<double>(sums[i]);
    sums[i] = 0;
  }
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
      for (std::int64_t i = 0; i < p.dim; ++i) {
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
        squares[first + i] = x2[i] * p.factor * p.factor;
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

std::uint32_t mix(std::uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

template <class T>
void store_stochastic(const FiraRounding& rounding, std::int64_t element, std::uint16_t* to, std::int64_t n, const T* x) {
  std::uint32_t key = mix(rounding.step);
  key = mix(static_cast<std::uint32_t>(rounding.seed >> 32) ^ key);
  key = mix(static_cast<std::uint32_t>(rounding.seed) ^ key);
  key = mix(static_cast<std::uint32_t>(element >> 32) ^ key);
  const auto low = static_cast<std::uint32_t>(element);
  for (std::int64_t i = 0; i < n; ++i) {
    const auto bits = bit_cast<std::uint32_t>(static_cast<float>(x[i]));
    const std::uint32_t noise = mix((low + static_cast<std::uint32_t>(i)) ^ key) & 0xffffu;
    const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
    to[i] = finite ? static_cast<std::uint16_t>((bits + noise) >> 16) : float_to_bfloat16(static_cast<float>(x[i]));
  }
}

template <class T>
void apply(const FiraProblem& p, const void* t, Dtype t_dtype, const T* f, const void* g, std::int64_t g_stride, void* w,
           std::int64_t w_stride, Dtype w_dtype, std::int64_t first, std::int64_t rows, double size, double keep,
           const FiraRounding& rounding, int threads) {
  const std::int64_t columns = p.left ? p.vectors : p.dim;
  const T step = static_cast<T>(size), k = static_cast<T>(keep), c = static_cast<T>(p.factor);
  parallel_for(rows, grain(columns), threads, [&](std::int64_t begin, std::int64_t end) {
    T t_room[kSegment], g_room[kSegment], w_room[kSegment], rest[kSegment];
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t row = first + i;
      std::int64_t n = 0;
      for (std::int64_t at = 0; at < columns; at += n) {
        const std::int64_t element = row * columns + at;
        n = least(kSegment, columns - at);
        n = least(n, (std::int64_t{1} << 32) - (element & 0xffffffff));  // the hash's high word is one for a segment
        const T* gs = segment(g, w_dtype, row * g_stride + at, n, g_room);
        load_segment(w, w_dtype, row * w_stride + at, n, w_room);
        if (rounding.remainder != nullptr) {
          load_segment(rounding.remainder, w_dtype, element, n, rest);
          for (std::int64_t l = 0; l < n; ++l) w_room[l] += rest[l];
        }
        const T* ts = t == nullptr ? nullptr : segment(t, t_dtype, i * columns + at, n, t_room);
        const T factor = p.left ? T(0) : f[row] * c;
        const T* fs = p.left ? f + at : nullptr;
        if (ts == nullptr) {
          for (std::int64_t l = 0; l < n; ++l) w_room[l] = k * (w_room[l] - step * ((fs ? fs[l] * c : factor) * gs[l]));
        } else if (p.left) {
          for (std::int64_t l = 0; l < n; ++l) w_room[l] = k * (w_room[l] - step * (ts[l] + fs[l] * c * gs[l]));
        } else {
          for (std::int64_t l = 0; l < n; ++l) w_room[l] = k * (w_room[l] - step * (ts[l] + factor * gs[l]));
        }
        if (rounding.stochastic) {
          store_stochastic(rounding, element, static_cast<std::uint16_t*>(w) + row * w_stride + at, n, w_room);
          continue;
        }
        store_segment(w, w_dtype, row * w_stride + at, n, w_room);
        if (rounding.remainder != nullptr) {
          load_segment(w, w_dtype, row * w_stride + at, n, rest);
          for (std::int64_t l = 0; l < n; ++l) rest[l] = w_room[l] - rest[l];
          store_segment(rounding.remainder, w_dtype, element, n, rest);
        }
      }
    }
  });
}

}  // namespace

const FiraKernels<float> fira_float = {moments<float>, scales<float>, coefficients<float>, apply<float>};
const FiraKernels<double> fira_double = {moments<double>, scales<double>, coefficients<double>, apply<double>};

}  // namespace PYELASTIC_ISA
}  // namespace pyelastic
