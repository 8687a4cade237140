// Products with float32 sums on CPUs with AVX2 or AVX-512. Contract: ../gemm.h. Packing and micro-kernel: products.h.
//
// Depth is cut into steps of kDepth, in their order. In a step the operand of the shorter side is packed once, into `room`, by
// all threads; each thread then packs a block of the other, which stays in L2, and multiplies: a group of rows of A stays in
// L1 while the panels of B pass by.

#include "../gemm.h"

#include "../common/parallel.h"
#include "products.h"

namespace pyelastic {
namespace PYELASTIC_ISA {
namespace {

// Packs kWidth-wide pieces of rows (A) or columns (B) first .. first + count - 1 of depth k0 .. k0 + depth - 1, `pitch`
// elements apart. piece: distance of two rows of A or columns of B, deep: of two along the depth.
template <class Kind, Int kWidth>
void pack_pieces(const GemmOperand& x, Int piece, Int deep, Int first, Int count, Int k0, Int depth,
                 typename Kind::Element* out, Int pitch) {
  if (deep == 1) {
    pack_along<Kind, kWidth>(Matrix{x.data, x.dtype, piece}, first, count, k0, depth, out, pitch);
  } else {
    pack_across<Kind, kWidth>(Matrix{x.data, x.dtype, deep}, first, count, k0, depth, out, pitch);
  }
}

// Runs body(k0, depth) for each step.
template <class Body>
void for_steps(Int depth, const Body& body) {
  for (Int k0 = 0; k0 < depth; k0 += kDepth) body(k0, least(kDepth, depth - k0));
}

template <class Kind>
void multiply_all(GemmOperand a, GemmOperand b, float* c, Int rows, Int columns, Int depth, bool add, void* room,
                  int threads) {
  using Element = typename Kind::Element;
  constexpr Int kElements = kDepth / Kind::depth;
  Element* const packed = static_cast<Element*>(room);
  const bool rows_shared = rows <= columns;
  const Int shared = rows_shared ? rows : columns, other = rows_shared ? columns : rows;
  const Int width = rows_shared ? kGroup : kPanel, unit = rows_shared ? kPanel : kGroup;
  const Cut blocks(other, kBlockElements / kDepth, unit, threads);
  for_steps(depth, [&](Int k0, Int step) {
    const bool onto = add || k0 > 0;
    const Int length = ceil_div(step, Kind::depth);
    parallel_for(ceil_div(shared, width), 4, threads, [&](Int begin, Int end) {
      const Int first = begin * width, count = least(end * width, shared) - first;
      Element* const to = packed + first * kElements;
      if (rows_shared) {
        pack_pieces<Kind, kGroup>(a, a.row, a.column, first, count, k0, step, to, kElements * kGroup);
      } else {
        pack_pieces<Kind, kPanel>(b, b.column, b.row, first, count, k0, step, to, kElements * kPanel);
      }
    });
    parallel_for(blocks.parts, 1, threads, [&](Int begin, Int end) {
      const auto bytes = sizeof(Element) * static_cast<std::size_t>(blocks.widest() * kElements);
      Element* const own = static_cast<Element*>(thread_scratch(bytes));
      for (Int part = begin; part < end; ++part) {
        const Int at = blocks.first(part), count = blocks.first(part + 1) - at;
        if (rows_shared) {
          pack_pieces<Kind, kPanel>(b, b.column, b.row, at, count, k0, step, own, kElements * kPanel);
          for (Int i = 0; i < rows; i += kGroup) {
            for (Int j = 0; j < count; j += kPanel) {
              multiply_tile(packed + i * kElements, own + j * kElements, length, c, i, rows, at + j, columns, onto);
            }
          }
        } else {
          pack_pieces<Kind, kGroup>(a, a.row, a.column, at, count, k0, step, own, kElements * kGroup);
          for (Int j = 0; j < columns; j += kPanel) {
            for (Int i = 0; i < count; i += kGroup) {
              multiply_tile(own + i * kElements, packed + j * kElements, length, c, at + i, rows, j, columns, onto);
            }
          }
        }
      }
    });
  });
}

void run(GemmOperand a, GemmOperand b, float* c, Int rows, Int columns, Int depth, bool add, void* room, int threads) {
  if (depth == 0 && !add) {
    for (Int i = 0; i < rows * columns; ++i) c[i] = 0.0f;
  }
#if defined(__AVX512BF16__)
  if (a.dtype == Dtype::bfloat16 && b.dtype == Dtype::bfloat16) {
    return multiply_all<Pairs>(a, b, c, rows, columns, depth, add, room, threads);
  }
#endif
  multiply_all<Floats>(a, b, c, rows, columns, depth, add, room, threads);
}

Int room(Int rows, Int columns) {
  const Int shared = rows <= columns ? round_up(rows, kGroup) : round_up(columns, kPanel);
  return static_cast<Int>(sizeof(float)) * shared * kDepth;
}

}  // namespace

const Gemm gemm = {room, run};

}  // namespace PYELASTIC_ISA
}  // namespace pyelastic
