// fira on the CPU: the work around the two GEMMs, and the limiter. Contract and formulas: ../fira.h.
//
// Blocking: everything is done on pieces of a memory row, at most kSegment elements, that are converted to T in L1 (or used in
// place where they are T already). Bytes: `moments` reads G once, `apply` reads W and G and writes W; T = C P^T comes from L2.

#include "../common/parallel.h"
#include "fira_moments.h"

namespace pyelastic {
namespace PYELASTIC_ISA {
namespace {

constexpr Int kGrainElements = 1 << 14;

Int grain(Int elements) { return kGrainElements / (elements + 1) + 1; }

// |x|^2 of vectors first .. first + count - 1.
template <class T>
void square_gradients(const FiraProblem& p, const void* g, Dtype dtype, Int stride, Int first, Int count, double* squares) {
  T room[kSegment];
  const double square = p.factor * p.factor;
  for (Int j = first; !p.left && j < first + count; ++j) {
    double sum = 0;
    for (Int d = 0; d < p.dim; d += kSegment) {
      const Int n = least(kSegment, p.dim - d);
      sum += sum_squares(read_row(g, dtype, j * stride + d, n, room), n);
    }
    squares[j] = sum * square;
  }
  for (Int at = first; p.left && at < first + count; at += kColumns) {
    const Int n = least(kColumns, first + count - at);
    ColumnSquares<T, kColumns> sums;
    for (Int i = 0; i < p.dim; ++i) sums.add(read_row(g, dtype, i * stride + at, n, room), n);
    const double* of_x = sums.sums(n);
    for (Int i = 0; i < n; ++i) squares[at + i] = of_x[i] * square;
  }
}

template <class T>
void moments(const FiraProblem& p, const void* r, Dtype r_dtype, const void* g, Dtype g_dtype, Int g_stride,
             const FiraMoments& s, double* squares, int threads) {
  const Int width = p.left ? p.vectors : p.rank, step = p.left ? kColumns : grain(p.dim);
  const auto read = [&](Int row, Int first, Int n, T* out) {
    load_scaled(r, r_dtype, row * width + first, n, p.factor, out);
  };
  parallel_for(p.vectors, step, threads, [&](Int begin, Int end) {
    square_gradients<T>(p, g, g_dtype, g_stride, begin, end - begin, squares);
    moments_of<T>(p, s, read, begin, end - begin, squares);
  });
}

template <class T>
FiraLimiter scales(const FiraProblem& p, const double* squares, const double* gram, const double* exact, double before,
                   double gamma, bool collapse, bool per_matrix, T* f) {
  const Int count = p.vectors;
  const double *x2 = squares, *r2 = squares + count, *n2 = squares + 2 * count;
  double all_r = 0, all_n = 0;
  for (Int j = 0; per_matrix && j < count; ++j) {
    all_r += r2[j];
    all_n += n2[j];
  }
  const double one_phi = std::sqrt(all_n) / (std::sqrt(all_r) + kFiraNormEps);
  double s2 = 0, whole = 0;
  for (Int j = 0; j < count; ++j) {
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
  for (Int j = 0; j < count; ++j) f[j] = static_cast<T>(static_cast<double>(f[j]) * scale);
  return out;
}

template <class T>
void coefficients(const FiraProblem& p, const FiraMoments& s, const T* f, void* r, Dtype r_dtype, int threads) {
  const Int rows = p.left ? p.rank : p.vectors, width = p.left ? p.vectors : p.rank;
  parallel_for(rows, grain(width), threads, [&](Int begin, Int end) {
    T c[kFiraBlock];
    for (Int row = begin; row < end; ++row) {
      for (Int k = 0; k < width; k += kFiraBlock) {
        const Int n = least(kFiraBlock, width - k);
        load_scaled(r, r_dtype, row * width + k, n, p.factor, c);
        combine(p, s, f, row, k, n, c);
        write_row(c, n, r, r_dtype, row * width + k);
      }
    }
  });
}

template <class T>
void apply(const FiraProblem& p, const void* t, Dtype t_dtype, const T* f, const void* g, Int g_stride, void* w,
           Int w_stride, Dtype w_dtype, Int first, Int rows, double size, double keep,
           const FiraRounding& rounding, int threads) {
  const Int columns = p.left ? p.vectors : p.dim;
  const FiraWeights<T> x{p, f, g, g_stride, w, w_stride, w_dtype, static_cast<T>(size), static_cast<T>(keep), rounding};
  parallel_for(rows, grain(columns), threads, [&](Int begin, Int end) {
    T room[kSegment];
    for (Int i = begin; i < end; ++i) {
      for (Int at = 0; at < columns; at += kSegment) {
        const Int n = least(kSegment, columns - at);
        write_segment(x, first + i, at, n, t == nullptr ? nullptr : read_row(t, t_dtype, i * columns + at, n, room));
      }
    }
  });
}

}  // namespace

const FiraKernels<float> fira_float = {moments<float>, scales<float>, coefficients<float>, apply<float>};
const FiraKernels<double> fira_double = {moments<double>, scales<double>, coefficients<double>, apply<double>};

}  // namespace PYELASTIC_ISA
}  // namespace pyelastic
