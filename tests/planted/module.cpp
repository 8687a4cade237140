// The planted bugs as a Python module: emulated (PYELASTIC_EMULATOR_NAME) or on a GPU.
#include <pybind11/pybind11.h>

#include <cstdint>

#if defined(PYELASTIC_EMULATOR_NAME)
#include "../../csrc/emulator/runtime.h"
#define PLANTED_NAME PYELASTIC_EMULATOR_NAME
#else
#define PLANTED_NAME planted
#endif

namespace pyelastic {
namespace planted {
void row_sum_with(int bug, const float* x, int rows, int columns, float* out, void* stream);
void last_block_sum_with(int bug, const float* x, int rows, int columns, float* sums, unsigned* ticket, float* out,
                         void* stream);
void first_four_clean(const float* x, float* out, void* stream);
void multiply_fragments(bool bfloat16, const std::uint16_t* a, const std::uint16_t* b, float* out, void* stream);
void count_threads(int* counts, int blocks, void* stream);
}  // namespace planted
}  // namespace pyelastic

namespace {
namespace py = pybind11;
using Pointer = std::uintptr_t;
template <class T>
T* as(Pointer p) {
  return reinterpret_cast<T*>(p);
}
}  // namespace

PYBIND11_MODULE(PLANTED_NAME, m) {
  namespace planted = pyelastic::planted;
#if defined(PYELASTIC_EMULATOR_NAME)
  m.def("set_seed", &pyelastic::emulator::set_seed);
  m.def("set_preemption", &pyelastic::emulator::set_preemption);
#endif
  m.def("row_sum", [](int bug, Pointer x, int rows, int columns, Pointer out, Pointer stream) {
    const py::gil_scoped_release nogil;  // as pyelastic's own bindings do
    planted::row_sum_with(bug, as<const float>(x), rows, columns, as<float>(out), as<void>(stream));
  });
  m.def("last_block_sum", [](int bug, Pointer x, int rows, int columns, Pointer sums, Pointer ticket, Pointer out,
                             Pointer stream) {
    planted::last_block_sum_with(bug, as<const float>(x), rows, columns, as<float>(sums), as<unsigned>(ticket),
                                 as<float>(out), as<void>(stream));
  });
  m.def("first_four", [](Pointer x, Pointer out, Pointer stream) {
    planted::first_four_clean(as<const float>(x), as<float>(out), as<void>(stream));
  });
  m.def("fragments", [](bool bfloat16, Pointer a, Pointer b, Pointer out, Pointer stream) {
    planted::multiply_fragments(bfloat16, as<const std::uint16_t>(a), as<const std::uint16_t>(b), as<float>(out),
                                as<void>(stream));
  });
  m.def("count", [](Pointer counts, int blocks, Pointer stream) {
    planted::count_threads(as<int>(counts), blocks, as<void>(stream));
  });
}
