// fira on CPUs with AVX2 or AVX-512: the two products, R = X P and C P^T, with the passes over G and W inside. Contract: ../fira.h.
//
// A library's GEMM would read G once more for |x|^2 and write and read C P^T. Here G is squared while it is packed, and
// C P^T of a group of rows is in L1 when W is written. Both are products A B with a row-major result [rows, columns]:
//   left   R [r, n] = P^T [r, m] G [m, n],   C P^T [m, n] = P [m, r] C [r, n]
//   right  R [m, r] = G [m, n] P^T [n, r],   C P^T [m, n] = C [m, r] P [r, n]
// Packing and micro-kernel: products.h. With AVX-512-BF16 and bfloat16 weights P, G and C are rounded to pairs of bfloat16 and R
// is not; else everything is float. Depth is cut into kDepth. P (projection) and A (way back) are packed once, into `room`, the
// rest into a thread's scratch: a block of B stays in L2, a group of A in L1.

#include "fira_rows.h"
#include "products.h"

namespace pyelastic {
namespace PYELASTIC_ISA {
namespace {

inline Int bytes_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

// Asks for `columns` of rows of a matrix before they are read, a little at each call, while products are computed: rows
// are too short for the CPU's own prefetching.
class Ahead {
 public:
  // calls: of fetch, after which all has been asked for.
  Ahead(const void* data, Dtype dtype, Int stride, Int row, Int rows, Int column, Int columns, Int calls)
      : from_(static_cast<const char*>(data) + (row * stride + column) * bytes_of(dtype)),
        pitch_(stride * bytes_of(dtype)), width_(columns * bytes_of(dtype)), rows_(rows),
        each_(calls > 0 ? ceil_div(rows * ceil_div(width_, kLineBytes), calls) : 0) {}
  void fetch() {
    for (Int i = 0; i < each_ && rows_ > 0; ++i) {
      __builtin_prefetch(from_ + at_, 0, 2);
      at_ += kLineBytes;
      if (at_ < width_) continue;
      at_ = 0;
      from_ += pitch_;
      --rows_;
    }
  }

 private:
  static constexpr Int kLineBytes = 64;
  const char* from_;
  Int pitch_, width_, rows_, each_, at_ = 0;
};

template <class Kind>
void project(const FiraProblem& p, const Matrix& g, const Matrix& basis, float* r, double* squares, void* room,
             int threads) {
  using Element = typename Kind::Element;
  const Int steps = ceil_div(p.dim, kDepth), elements = kDepth / Kind::depth;  // of a group or panel and a step
  const Int width = p.left ? kGroup : kPanel, parts = ceil_div(p.rank, width);
  Element* const packed = static_cast<Element*>(room);  // [step][part][element][width]
  const double square = p.factor * p.factor;
  parallel_for(steps, 1, threads, [&](Int begin, Int end) {
    for (Int s = begin; s < end; ++s) {
      const Int k0 = s * kDepth, depth = least(kDepth, p.dim - k0), pitch = elements * width;
      Element* out = packed + s * parts * pitch;
      if (p.left) {
        pack_across<Kind, kGroup>(basis, 0, p.rank, k0, depth, out, pitch, kLookAway);
      } else {
        pack_along<Kind, kPanel>(basis, 0, p.rank, k0, depth, out, pitch, kLookAway);
      }
    }
  });
  const Int unit = p.left ? kPanel : kGroup;
  const Int block = block_width(p.vectors, kBlockElements / kDepth, unit, threads), pitch = elements * unit;
  // The part of G that a block of vectors from `at` on reads in the step from k0 on, if there is one before block `end`.
  const auto next_tile = [&](Int at, Int k0, Int end) {
    const Int last = least(end * block, p.vectors), count = at < last ? least(block, last - at) : 0;
    const Int depth = count > 0 ? least(kDepth, p.dim - k0) : 0, calls = ceil_div(count, unit) * ceil_div(p.rank, width);
    return p.left ? Ahead(g.data, g.dtype, g.stride, k0, depth, at, count, calls)
                  : Ahead(g.data, g.dtype, g.stride, at, count, k0, depth, calls);
  };
  parallel_for(ceil_div(p.vectors, block), 1, threads, [&](Int begin, Int end) {
    const Int scratch = round_up(static_cast<Int>(sizeof(Element)) * block * elements, 64);
    char* const own = static_cast<char*>(thread_scratch(static_cast<std::size_t>(scratch + 12 * block)));
    Element* const x = reinterpret_cast<Element*>(own);
    double* const sums = reinterpret_cast<double*>(own + scratch);
    float* const part = reinterpret_cast<float*>(sums + block);
    for (Int at = begin * block; at < least(end * block, p.vectors); at += block) {
      const Int count = least(block, p.vectors - at);
      for (Int i = 0; i < count; ++i) sums[i] = part[i] = 0;
      for (Int s = 0; s < steps; ++s) {
        const Int k0 = s * kDepth, depth = least(kDepth, p.dim - k0), length = ceil_div(depth, Kind::depth);
        Ahead ahead = next_tile(s + 1 < steps ? at : at + block, s + 1 < steps ? k0 + kDepth : 0, end);
        const Element* basis_step = packed + s * parts * elements * width;
        if (p.left) {
          pack_across<Kind, kPanel>(g, at, count, k0, depth, x, pitch,
                                    [&](Int j, Int n, const auto* row) { add_squares(row, n, part + j); });
          flush(part, count, sums);
          for (Int i = 0; i < p.rank; i += kGroup) {
            for (Int j = 0; j < count; j += kPanel) {
              ahead.fetch();
              multiply_tile(basis_step + i * elements, x + j * elements, length, r, i, p.rank, at + j, p.vectors, s > 0);
            }
          }
        } else {
          pack_along<Kind, kGroup>(g, at, count, k0, depth, x, pitch,
                                   [&](Int i, Int n, const auto* row) { sums[i] += sum_squares(row, n); });
          for (Int i = 0; i < count; i += kGroup) {
            for (Int j = 0; j < p.rank; j += kPanel) {
              ahead.fetch();
              multiply_tile(x + i * elements, basis_step + j * elements, length, r, at + i, p.vectors, j, p.rank, s > 0);
            }
          }
        }
      }
      for (Int i = 0; i < count; ++i) squares[at + i] = square * sums[i];
    }
  });
}

template <class Kind>
void apply(const FiraProblem& p, const Matrix& a, const Matrix& b, const FiraWeights<float>& x, void* room,
           int threads) {
  using Element = typename Kind::Element;
  const Int rows = p.left ? p.dim : p.vectors, columns = p.left ? p.vectors : p.dim;
  const Int elements = ceil_div(p.rank, Kind::depth), groups = ceil_div(rows, kGroup);
  Element* const packed = static_cast<Element*>(room);  // [group][element][kGroup]
  parallel_for(groups, 4, threads, [&](Int begin, Int end) {
    const Int first = begin * kGroup, last = least(end * kGroup, rows);
    pack_along<Kind, kGroup>(a, first, last - first, 0, p.rank, packed + first * elements, elements * kGroup, kLookAway);
  });
  const Int block = block_width(columns, least(kBlockElements / elements, 1024), kPanel, threads);
  parallel_for(ceil_div(columns, block), 1, threads, [&](Int begin, Int end) {
    const Int scratch = round_up(static_cast<Int>(sizeof(Element)) * block * elements, 64);
    char* const own = static_cast<char*>(thread_scratch(static_cast<std::size_t>(scratch + 4 * kGroup * block)));
    Element* const panels = reinterpret_cast<Element*>(own);
    float* const t = reinterpret_cast<float*>(own + scratch);  // [kGroup, block]
    for (Int at = begin * block; at < least(end * block, columns); at += block) {
      const Int count = least(block, columns - at);
      pack_across<Kind, kPanel>(b, at, count, 0, p.rank, panels, elements * kPanel, kLookAway);
      for (Int row = 0; row < rows; row += kGroup) {
        const Int calls = ceil_div(count, kPanel), height = least(kGroup, rows - row);
        Ahead weights(x.w, x.w_dtype, x.w_stride, row, height, at, count, calls);
        Ahead gradients(x.g, x.w_dtype, x.g_stride, row, height, at, count, calls);
        for (Int j = 0; j < count; j += kPanel) {
          weights.fetch();
          gradients.fetch();
          multiply(packed + row * elements, panels + j * elements, elements, t + j, block, false);
        }
        for (Int i = 0; i < height; ++i) {
          for (Int j = 0; j < count; j += kSegment) {
            write_segment(x, row + i, at + j, least(kSegment, count - j), t + i * block + j);
          }
        }
      }
    }
  });
}

// Whether bfloat16 operands are multiplied as such.
bool in_pairs(Dtype dtype) {
#if defined(__AVX512BF16__)
  return dtype == Dtype::bfloat16;
#else
  return dtype == Dtype::bfloat16 && false;
#endif
}

void fira_project(const FiraProblem& p, const void* g, Dtype dtype, Int g_stride, const void* basis, Dtype p_dtype,
                  float* r, double* squares, void* room, int threads) {
  const Matrix gradient{g, dtype, g_stride}, projector{basis, p_dtype, p.left ? p.rank : p.dim};
#if defined(__AVX512BF16__)
  if (in_pairs(dtype)) return project<Pairs>(p, gradient, projector, r, squares, room, threads);
#endif
  project<Floats>(p, gradient, projector, r, squares, room, threads);
}

void fira_apply(const FiraProblem& p, const float* c, const void* basis, Dtype p_dtype, const float* f, const void* g,
                Int g_stride, void* w, Int w_stride, Dtype dtype, double size, double keep,
                const FiraRounding& rounding, void* room, int threads) {
  const Matrix coefficients{c, Dtype::float32, p.left ? p.vectors : p.rank};
  const Matrix projector{basis, p_dtype, p.left ? p.rank : p.dim};
  const Matrix &a = p.left ? projector : coefficients, &b = p.left ? coefficients : projector;
  const FiraWeights<float> x{p, f, g, g_stride, w, w_stride, dtype, static_cast<float>(size), static_cast<float>(keep),
                             rounding};
#if defined(__AVX512BF16__)
  if (in_pairs(dtype)) return apply<Pairs>(p, a, b, x, room, threads);
#endif
  apply<Floats>(p, a, b, x, room, threads);
}

Int fira_room(const FiraProblem& p, Dtype dtype) {
  const Int rows = p.left ? p.dim : p.vectors, depth = in_pairs(dtype) ? 2 : 1;
  const Int projection = round_up(p.rank, p.left ? kGroup : kPanel) * round_up(p.dim, kDepth);
  const Int back = round_up(rows, kGroup) * round_up(p.rank, 2);
  return 4 / depth * (projection > back ? projection : back);
}

}  // namespace

const FiraProducts fira_products = {fira_room, fira_project, fira_apply};

}  // namespace PYELASTIC_ISA
}  // namespace pyelastic
