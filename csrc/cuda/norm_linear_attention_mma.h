// The tensor-core path of norm_linear_attention's CUDA kernels. Arguments as in ../norm_linear_attention.h, with tiles of
// kNlaMmaTokens tokens.
#pragma once

#include "../norm_linear_attention.h"

namespace pyelastic {
namespace cuda {

// Whether these kernels take the problem: bfloat16, widths that are multiples of 8.
bool nla_mma_fits(const NormLinearAttention<float>& x);
void nla_mma_state(const NormLinearAttention<float>& x, NlaSlots parts, std::int64_t part, float* s, float* z, void* stream);
void nla_mma_forward(const NormLinearAttention<float>& x, NlaSlots tiles, std::int64_t part, std::int64_t each, const float* s,
                     const float* z, void* stream);
void nla_mma_queries(const NormLinearAttention<float>& x, NlaSlots tiles, std::int64_t part, std::int64_t each, const float* s,
                     const float* z, float* d, float* dd, float* dparams, void* stream);
void nla_mma_grad_state(const NormLinearAttention<float>& x, NlaSlots parts, std::int64_t part, const float* d, const float* dd,
                        float* ds, float* dz, void* stream);
void nla_mma_keys(const NormLinearAttention<float>& x, NlaSlots tiles, std::int64_t part, std::int64_t each, const float* d,
                  const float* dd, const float* ds, const float* dz, float* dparams, void* stream);

}  // namespace cuda
}  // namespace pyelastic
