// maxsim on CUDA, forward on tensor cores: mma.sync on 16-bit tokens, float32 sums. Contract: ../maxsim.h; the kernel:
// maxsim_sweep.cuh.
#include <type_traits>

#include "maxsim_sweep.cuh"

namespace pyelastic {
namespace cuda {

void maxsim_forward_mma(const MaxSimProblem& p, const Sweep& w, void* stream) {
  if (p.q.dtype == Dtype::bfloat16) return forward_on<Mma<BF16>>(p, w, stream);
  forward_on<Mma<F16>>(p, w, stream);
}

}  // namespace cuda
}  // namespace pyelastic
