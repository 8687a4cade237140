// A Python module with the launchers of the CUDA kernels, emulated: the CUDA half of pyelastic._C on CPU tensors.
// Built three times, as PYELASTIC_EMULATOR_NAME.
#include "../bindings_cuda.h"
#include "runtime.h"

#if defined(PYELASTIC_COVERAGE)
extern "C" void __gcov_dump();
#endif

PYBIND11_MODULE(PYELASTIC_EMULATOR_NAME, m) {
  m.doc() = "CUDA kernels of pyelastic under the SIMT emulator. Tests only.";
  m.def("set_seed", &pyelastic::emulator::set_seed);
  m.def("set_preemption", &pyelastic::emulator::set_preemption);
#if defined(PYELASTIC_COVERAGE)
  m.def("write_coverage", &__gcov_dump);
#endif
  pyelastic::bind_cuda(m);
}
