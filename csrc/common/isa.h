// The instruction sets the CPU kernels are compiled for, and the one this process uses.
//
// Every csrc/cpu/*.cpp is compiled once per instruction set into a namespace of its own, so that one
// wheel serves every machine; the choice is made once, at the first call.
#pragma once

namespace pyelastic {

// amx: with AVX-512-BF16, and the system lets this process use the tile registers.
enum class Isa { baseline = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3, amx = 4 };

// The best instruction set that this machine has and this build contains. PYELASTIC_CPU_ISA
// (baseline, avx2, avx512, avx512bf16, amx) lowers it, for tests and for comparing; it never raises it.
// Throws std::invalid_argument for any other value.
Isa isa();

const char* isa_name(Isa isa);

}  // namespace pyelastic
