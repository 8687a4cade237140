// The launchers of the CUDA kernels as Python functions, for pyelastic._C and for the emulator's module.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace pyelastic {

void bind_cuda(pybind11::module_& m);

}  // namespace pyelastic
