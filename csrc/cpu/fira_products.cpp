// fira on CPUs with AVX2 or AVX-512: the two products, with all passes over G, W, R and the moments inside.
// Contract: ../fira.h.
//
// A library's GEMM would read G once more for |x|^2 and write and read C P^T. Here G is squared while it is packed, R of a
// block of vectors is in L2 when the moments take it, C is made while it is packed, and C P^T of a group of rows is in L1 when
// W is written. Both are products A B with a row-major result [rows, columns]:
//   left   R [r, n] = P^T [r, m] G [m, n],   C P^T [m, n] = P [m, r] C [r, n]
//   right  R [m, r] = G [m, n] P^T [n, r],   C P^T [m, n] = C [m, r] P [r, n]
// Packing and micro-kernel: products.h. With AVX-512-BF16 or AMX and bfloat16 weights P, G and C are bfloat16; else all is
// float. Depth is cut into kDepth. P (projection) and A (way back) are packed once, into `room`, the rest into a
// thread's scratch: a block of B and of R stays in L2, a group of A in L1. What comes next from memory is asked for meanwhile.

#include "../common/parallel.h"
#include "fira_moments.h"
#include "tiles.h"

namespace pyelastic {
namespace PYELASTIC_ISA {
namespace {

constexpr Int kOdd = kHalf;  // added to a pitch: rows a power of 2 apart would share few sets of L1

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

// Squares of elements: two of them where an element is a pair.
PYELASTIC_INLINE void add_square(Vec<float>& sum, const Vec<float>& x) { sum += x * x; }
inline double line_squares(const float* x, Int n) { return sum_squares(x, n); }
#if defined(__AVX512BF16__)
PYELASTIC_INLINE void add_square(Vec<float>& sum, const Words& x) {
  sum = (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)x);
}
// Sum of the lanes by halves, several times as fast as sum_lanes, and that was a tenth of a projection.
PYELASTIC_INLINE float halved(const Vec<float>& x) {
  __m256 halves[2];
  std::memcpy(halves, &x, sizeof(x));
  const __m256 half = halves[0] + halves[1];
  const __m128 quarter = _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
  return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}
inline double line_squares(const std::uint16_t* x, Int n) {
  Vec<float> sum = {};
  Int i = 0;
  for (; i + 2 * kHalf <= n; i += 2 * kHalf) {
    Words pairs;
    std::memcpy(&pairs, x + i, kVecBytes);
    add_square(sum, pairs);
  }
  return static_cast<double>(halved(sum)) + (i < n ? sum_squares(x + i, n - i) : 0.0);
}
#endif

// A tile of G packed into x, and its squares added to `sums` of its vectors.
template <class Kind>
void pack_gradients(const FiraProblem& p, const Matrix& g, Int at, Int count, Int k0, Int depth, typename Kind::Element* x,
                    double* sums) {
  using Element = typename Kind::Element;
  using Source = typename Kind::Source;
  const Int pitch = Kind::elements(kDepth);  // of a vector in a group or panel
  if (!p.left) {
    const auto read = [&](Int row, Int column, Int n, Source* room) {
      const Source* line = g(row, column, n, room);
      sums[row - at] += line_squares(line, n);
      return line;
    };
    return pack_a<Kind>(true, read, at, count, k0, depth, x, pitch * Kind::group);
  }
  pack_across<Kind, kPanel>(g, at, count, k0, depth, x, pitch * kPanel);
  typedef Element Lanes __attribute__((vector_size(kVecBytes)));
  for (Int j = 0; j < count; j += kPanel) {
    const Element* panel = x + j * pitch;
    Vec<float> sum[2] = {};
    for (Int k = 0; k < ceil_div(depth, Kind::depth); ++k, panel += kPanel) {
      Lanes low, high;
      std::memcpy(&low, panel, kVecBytes);
      std::memcpy(&high, panel + kHalf, kVecBytes);
      add_square(sum[0], low);
      add_square(sum[1], high);
    }
    for (Int i = 0; i < least(kPanel, count - j); ++i) sums[j + i] += static_cast<double>(sum[i / kHalf][i % kHalf]);
  }
}

template <class Kind>
void project(const FiraProblem& p, const Matrix& g, const Matrix& basis, const FiraMoments& moments, void* r, Dtype r_dtype,
             double* squares, void* room, int threads) {
  using Element = typename Kind::Element;
  constexpr Int kGroup = Kind::group;
  const Int steps = ceil_div(p.dim, kDepth), elements = Kind::elements(kDepth);  // of a group or panel and a step
  const Int width = p.left ? kGroup : kPanel, parts = ceil_div(p.rank, width);
  Element* const packed = static_cast<Element*>(room);  // [step][part][element][width]
  parallel_for(steps, 1, threads, [&](Int begin, Int end) {
    for (Int s = begin; s < end; ++s) {
      const Int k0 = s * kDepth, depth = least(kDepth, p.dim - k0), pitch = elements * width;
      Element* out = packed + s * parts * pitch;
      if (p.left) {
        pack_a<Kind>(false, basis, 0, p.rank, k0, depth, out, pitch);
      } else {
        pack_along<Kind, kPanel>(basis, 0, p.rank, k0, depth, out, pitch);
      }
    }
  });
  const Int unit = p.left ? kPanel : kGroup;
  const Cut blocks(p.vectors, kBlockElements / (p.rank > kDepth ? p.rank : kDepth), unit, threads);
  // R of a block, as it lies in memory but for its pitch.
  const Int pitch = (p.left ? blocks.widest() : round_up(p.rank, kPanel)) + kOdd;
  const Int height = p.left ? round_up(p.rank, kGroup) : blocks.widest();
  const Int in_memory = p.left ? p.vectors : p.rank;
  // What is read of a matrix [dim, vectors] on the left, [vectors, dim] on the right.
  const auto piece = [&](const Matrix& x, Int at, Int count, Int k0, Int depth, Int calls) {
    return p.left ? Ahead(x.data, x.dtype, x.stride, k0, depth, at, count, calls)
                  : Ahead(x.data, x.dtype, x.stride, at, count, k0, depth, calls);
  };
  parallel_for(blocks.parts, 1, threads, [&](Int begin, Int end) {
    const Int most = blocks.widest();
    const typename Kind::Ready ready;
    Room own(Room::bytes<Element>(most * elements) + Room::bytes<double>(most) +
             Room::bytes<float>(height * pitch));
    Element* const x = own.take<Element>(most * elements);
    double* const sums = own.take<double>(most);
    float* const of_r = own.take<float>(height * pitch);
    for (Int block = begin; block < end; ++block) {
      const Int at = blocks.first(block), count = blocks.first(block + 1) - at;
      for (Int i = 0; i < count; ++i) sums[i] = 0;
      for (Int s = 0; s < steps; ++s) {
        const Int k0 = s * kDepth, depth = least(kDepth, p.dim - k0), length = Kind::elements(depth);
        const bool last = s + 1 == steps;
        // Of the blocks to come this thread's is likely the one after those of the others.
        const Int next = least(last ? block + (block + 1 < end ? 1 : threads) : block, blocks.parts);
        const Int next_at = blocks.first(next), next_count = blocks.first(least(next + 1, blocks.parts)) - next_at;
        const Int next_k0 = last ? 0 : k0 + kDepth, calls = ceil_div(count, unit) * parts;
        Ahead gradients = piece(g, next_at, next_count, next_k0, next_count > 0 ? least(kDepth, p.dim - next_k0) : 0, calls);
        const Int stored = last && moments.m_scale == nullptr ? p.rank : 0;
        Ahead first_moments = piece({moments.m, moments.dtype, in_memory}, at, stored > 0 ? count : 0, 0, stored, calls);
        Ahead second_moments = piece({moments.v, moments.dtype, in_memory}, at, stored > 0 ? count : 0, 0, stored, calls);
        pack_gradients<Kind>(p, g, at, count, k0, depth, x, sums);
        const Element* const basis_step = packed + s * parts * elements * width;
        const Element *const a = p.left ? basis_step : x, *const b = p.left ? x : basis_step;
        const Int rows = p.left ? p.rank : count, columns = p.left ? count : p.rank;
        for (Int i = 0; i < rows; i += kGroup) {
          for (Int j = 0; j < columns; j += kPanel) {
            gradients.fetch();
            first_moments.fetch();
            second_moments.fetch();
            multiply<Kind>(rows - i, a + i * elements, b + j * elements, length, of_r + i * pitch + j, pitch, s > 0);
          }
        }
      }
      const float factor = static_cast<float>(p.factor);
      const auto read = [&](Int row, Int first, Int n, float* out) {
        const float* from = of_r + (p.left ? row * pitch + (first - at) : (row - at) * pitch + first);
        write_row(from, n, r, r_dtype, row * in_memory + first);
        for (Int i = 0; i < n; ++i) out[i] = factor * from[i];
      };
      moments_of<float>(p, moments, read, at, count, squares);
      for (Int i = 0; i < count; ++i) squares[at + i] = p.factor * p.factor * sums[i];
    }
  });
}

// Reads C, made from R and the moments as it is read.
template <class Source>
struct Coefficients {
  const FiraProblem& p;
  const FiraMoments& moments;
  const float* f;
  const void* r;
  Dtype r_dtype;

  const Source* operator()(Int row, Int at, Int n, Source* room) const {
    float c[kSegment];
    load_scaled(r, r_dtype, row * (p.left ? p.vectors : p.rank) + at, n, p.factor, c);
    for (Int i = 0; i < n; i += kFiraBlock) combine(p, moments, f, row, at + i, least(kFiraBlock, n - i), c + i);
    for (Int i = 0; i < n; ++i) narrow(c[i], room + i);
    return room;
  }
};

template <class Kind, class ReadA, class ReadB>
void apply(const FiraProblem& p, const ReadA& a, const ReadB& b, const FiraWeights<float>& x, void* room, int threads) {
  using Element = typename Kind::Element;
  const Int rows = p.left ? p.dim : p.vectors, columns = p.left ? p.vectors : p.dim;
  constexpr Int kGroup = Kind::group;
  const Int elements = Kind::elements(p.rank), groups = ceil_div(rows, kGroup);
  Element* const packed = static_cast<Element*>(room);  // [group][element][kGroup]
  parallel_for(groups, 4, threads, [&](Int begin, Int end) {
    const Int first = begin * kGroup, last = least(end * kGroup, rows);
    pack_a<Kind>(true, a, first, last - first, 0, p.rank, packed + first * elements, elements * kGroup);
  });
  // CPUs with AMX have 2 MB of L2.
  const Cut blocks(columns, (Kind::tiled ? 2 : 1) * kBlockElements / elements, kPanel, threads);
  parallel_for(blocks.parts, 1, threads, [&](Int begin, Int end) {
    const Int most = blocks.widest();
    const typename Kind::Ready ready;
    constexpr Int kPitch = kSegment + kOdd;
    Room own(Room::bytes<Element>(most * elements) + Room::bytes<float>(kGroup * kPitch));
    Element* const panels = own.take<Element>(most * elements);
    float* const t = own.take<float>(kGroup * kPitch);  // [kGroup, kPitch], in L1
    for (Int block = begin; block < end; ++block) {
      const Int at = blocks.first(block), count = blocks.first(block + 1) - at;
      pack_across<Kind, kPanel>(b, at, count, 0, p.rank, panels, elements * kPanel);
      for (Int row = 0; row < rows; row += kGroup) {
        const Int height = least(kGroup, rows - row);
        for (Int from = 0; from < count; from += kSegment) {
          const Int width = least(kSegment, count - from), calls = ceil_div(width, kPanel);
          Ahead weights(x.w, x.w_dtype, x.w_stride, row, height, at + from, width, calls);
          Ahead gradients(x.g, x.w_dtype, x.g_stride, row, height, at + from, width, calls);
          for (Int j = 0; j < width; j += kPanel) {
            weights.fetch();
            gradients.fetch();
            multiply<Kind>(height, packed + row * elements, panels + (from + j) * elements, elements, t + j, kPitch, false);
          }
          for (Int i = 0; i < height; ++i) write_segment(x, row + i, at + from, width, t + i * kPitch);
        }
      }
    }
  });
}

// Calls f with what products of weights of this dtype are made of.
template <class F>
auto with_kind(Dtype dtype, const F& f) {
#if defined(__AVX512BF16__)
  if (dtype == Dtype::bfloat16) return f(Bfloat16s{});
#endif
  static_cast<void>(dtype);
  return f(Floats{});
}

void fira_project(const FiraProblem& p, const void* g, Dtype dtype, Int g_stride, const void* basis, Dtype p_dtype,
                  const FiraMoments& moments, void* r, Dtype r_dtype, double* squares, void* room, int threads) {
  const Matrix gradient{g, dtype, g_stride}, projector{basis, p_dtype, p.left ? p.rank : p.dim};
  with_kind(dtype, [&](auto kind) {
    project<decltype(kind)>(p, gradient, projector, moments, r, r_dtype, squares, room, threads);
  });
}

void fira_apply(const FiraProblem& p, const void* r, Dtype r_dtype, const FiraMoments& moments, const void* basis,
                Dtype p_dtype, const float* f, const void* g, Int g_stride, void* w, Int w_stride, Dtype dtype, double size,
                double keep, const FiraRounding& rounding, void* room, int threads) {
  const Matrix projector{basis, p_dtype, p.left ? p.rank : p.dim};
  const FiraWeights<float> x{p, f, g, g_stride, w, w_stride, dtype, static_cast<float>(size), static_cast<float>(keep),
                             rounding};
  with_kind(dtype, [&](auto kind) {
    using Kind = decltype(kind);
    const Coefficients<typename Kind::Source> c{p, moments, f, r, r_dtype};
    p.left ? apply<Kind>(p, projector, c, x, room, threads) : apply<Kind>(p, c, projector, x, room, threads);
  });
}

Int fira_room(const FiraProblem& p, Dtype dtype) {
  return with_kind(dtype, [&](auto kind) {
    using Kind = decltype(kind);
    const Int rows = p.left ? p.dim : p.vectors, steps = ceil_div(p.dim, kDepth);
    const Int projection = round_up(p.rank, p.left ? Kind::group : kPanel) * steps * Kind::elements(kDepth);
    const Int back = round_up(rows, Kind::group) * Kind::elements(p.rank);
    return static_cast<Int>(sizeof(typename Kind::Element)) * (projection > back ? projection : back);
  });
}

}  // namespace

const FiraProducts fira_products = {fira_room, fira_project, fira_apply};

}  // namespace PYELASTIC_ISA
}  // namespace pyelastic
