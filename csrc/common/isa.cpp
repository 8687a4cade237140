#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace pyelastic {
namespace {

Isa detect() {
#ifdef PYELASTIC_HAVE_X86_ISAS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return __builtin_cpu_supports("avx512bf16") ? Isa::avx512bf16 : Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa choose() {
  const Isa best = detect();
  const char* wanted = std::getenv("PYELASTIC_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (const Isa candidate : {Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512bf16}) {
    if (std::string(wanted) == isa_name(candidate)) return candidate < best ? candidate : best;
  }
  throw std::invalid_argument(std::string("PYELASTIC_CPU_ISA is '") + wanted +
                              "'; choose from baseline, avx2, avx512, avx512bf16");
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512bf16:
      return "avx512bf16";
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    case Isa::baseline:
      break;
  }
  return "baseline";
}

}  // namespace pyelastic
