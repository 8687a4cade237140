#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(PYELASTIC_HAVE_AMX) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pyelastic {
namespace {

// Whether the CPU has AMX with bfloat16 and Linux grants this process the registers, which it must be asked for
// (Documentation/arch/x86/xstate.rst). Elsewhere: no.
bool may_use_tiles() {
#if defined(PYELASTIC_HAVE_AMX) && defined(__linux__)
  constexpr unsigned kBfloat16 = 1u << 22, kTiles = 1u << 24;  // of edx
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  if ((edx & kBfloat16) == 0 || (edx & kTiles) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa detect() {
#ifdef PYELASTIC_HAVE_X86_ISAS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    if (!__builtin_cpu_supports("avx512bf16")) return Isa::avx512;
    if (may_use_tiles()) return Isa::amx;
    // Intel's cores multiply pairs of bfloat16 at half the rate of float32: measured, CONTRIBUTING.md.
    return __builtin_cpu_is("intel") ? Isa::avx512 : Isa::avx512bf16;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa choose() {
  const Isa best = detect();
  const char* wanted = std::getenv("PYELASTIC_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (const Isa candidate : {Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512bf16, Isa::amx}) {
    if (std::string(wanted) == isa_name(candidate)) return candidate < best ? candidate : best;
  }
  throw std::invalid_argument(std::string("PYELASTIC_CPU_ISA is '") + wanted +
                              "'; choose from baseline, avx2, avx512, avx512bf16, amx");
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::amx:
      return "amx";
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
