// Products with float32 sums on CPUs with AVX2 or AVX-512. Contract: ../gemm.h. Packing and micro-kernel: products.h.
//
// Depth is cut into steps of kDepth, in their order. In a step the operand of the shorter side is packed once, into `room`, by
// all threads; each thread then packs a block of the other, which stays in L2, and multiplies: a group of rows of A stays in
// L1 while the panels of B pass by.

#include "../gemm.h"

#include "../common/parallel.h"
#include "tiles.h"

namespace pyelastic {
namespace PYELASTIC_ISA {
namespace {

// Packs rows (of A) or columns (of B) first .. first + count - 1 of depth k0 .. k0 + depth - 1, groups or panels `pitch`
// elements apart.
template <class Kind>
void pack_rows(const GemmOperand& a, Int first, Int count, Int k0, Int depth, typename Kind::Element* out, Int pitch) {
  const bool along = a.column == 1;
  pack_a<Kind>(along, Matrix{a.data, a.dtype, along ? a.row : a.column}, first, count, k0, depth, out, pitch);
}
template <class Kind>
void pack_columns(const GemmOperand& b, Int first, Int count, Int k0, Int depth, typename Kind::Element* out, Int pitch) {
  if (b.row == 1) {
    pack_along<Kind, kPanel>(Matrix{b.data, b.dtype, b.column}, first, count, k0, depth, out, pitch);
  } else {
    pack_across<Kind, kPanel>(Matrix{b.data, b.dtype, b.row}, first, count, k0, depth, out, pitch);
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
  constexpr Int kGroup = Kind::group;
  const Int elements = Kind::elements(kDepth);  // of a row or column, packed
  Element* const packed = static_cast<Element*>(room);
  const bool rows_shared = rows <= columns;
  const Int shared = rows_shared ? rows : columns, other = rows_shared ? columns : rows;
  const Int width = rows_shared ? kGroup : kPanel, unit = rows_shared ? kPanel : kGroup;
  const Cut blocks(other, kBlockElements / kDepth, unit, threads);
  for_steps(depth, [&](Int k0, Int step) {
    const bool onto = add || k0 > 0;
    const Int length = Kind::elements(step);
    parallel_for(ceil_div(shared, width), 4, threads, [&](Int begin, Int end) {
      const Int first = begin * width, count = least(end * width, shared) - first;
      Element* const to = packed + first * elements;
      if (rows_shared) {
        pack_rows<Kind>(a, first, count, k0, step, to, elements * kGroup);
      } else {
        pack_columns<Kind>(b, first, count, k0, step, to, elements * kPanel);
      }
    });
    parallel_for(blocks.parts, 1, threads, [&](Int begin, Int end) {
      const typename Kind::Ready ready;
      const auto bytes = sizeof(Element) * static_cast<std::size_t>(blocks.widest() * elements);
      Element* const own = static_cast<Element*>(thread_scratch(bytes));
      for (Int part = begin; part < end; ++part) {
        const Int at = blocks.first(part), count = blocks.first(part + 1) - at;
        if (rows_shared) {
          pack_columns<Kind>(b, at, count, k0, step, own, elements * kPanel);
          for (Int i = 0; i < rows; i += kGroup) {
            for (Int j = 0; j < count; j += kPanel) {
              multiply_tile<Kind>(packed + i * elements, own + j * elements, length, c, i, rows, at + j, columns, onto);
            }
          }
        } else {
          pack_rows<Kind>(a, at, count, k0, step, own, elements * kGroup);
          for (Int j = 0; j < columns; j += kPanel) {
            for (Int i = 0; i < count; i += kGroup) {
              multiply_tile<Kind>(own + i * elements, packed + j * elements, length, c, at + i, rows, j, columns, onto);
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
    return multiply_all<Bfloat16s>(a, b, c, rows, columns, depth, add, room, threads);
  }
#endif
  multiply_all<Floats>(a, b, c, rows, columns, depth, add, room, threads);
}

template <class Kind>
Int room_of(Int rows, Int columns) {
  const Int shared = rows <= columns ? round_up(rows, Kind::group) : round_up(columns, kPanel);
  return static_cast<Int>(sizeof(typename Kind::Element)) * shared * Kind::elements(kDepth);
}

Int room(Int rows, Int columns) {
  const Int floats = room_of<Floats>(rows, columns);
#if defined(__AVX512BF16__)
  const Int narrow = room_of<Bfloat16s>(rows, columns);
  return narrow > floats ? narrow : floats;
#else
  return floats;
#endif
}

}  // namespace

const Gemm gemm = {room, run};

}  // namespace PYELASTIC_ISA
}  // namespace pyelastic
