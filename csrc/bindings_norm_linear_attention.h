// The problem of norm_linear_attention as Python passes it (pyelastic/ops/_norm_linear_attention.py: Inputs.problem).
#pragma once

#include <cstdint>
#include <tuple>

#include "norm_linear_attention.h"

namespace pyelastic {

using NlaPointer = std::uintptr_t;
using NlaInt = std::int64_t;
using NlaView = std::tuple<NlaPointer, NlaInt, NlaInt, NlaInt>;
// (dtype, (sequences, N, M, Hq, Hk, d, dv), (q, k, v, gate, o, dq, dk, dv, dgate), (params, sin, cos, start, offsets, s0, z0, count),
//  (map, rope_both, causal, mean), (key_power, alpha, eps, norm_eps))
using NlaArguments =
    std::tuple<int, std::tuple<NlaInt, NlaInt, NlaInt, NlaInt, NlaInt, NlaInt, NlaInt>,
               std::tuple<NlaView, NlaView, NlaView, NlaView, NlaView, NlaView, NlaView, NlaView, NlaView>,
               std::tuple<NlaPointer, NlaPointer, NlaPointer, NlaPointer, NlaPointer, NlaPointer, NlaPointer, NlaPointer>,
               std::tuple<int, bool, bool, bool>, std::tuple<double, double, double, double>>;

using NlaPartsArguments = std::tuple<NlaInt, bool, NlaPointer, NlaPointer>;  // (part, walk, first_q, first_k)
using NlaRoomArguments = std::tuple<NlaPointer, NlaInt>;                     // (address, bytes)

inline NlaParts nla_parts(const NlaPartsArguments& arguments) {
  const auto& [part, walk, first_q, first_k] = arguments;
  return {part, walk, reinterpret_cast<const NlaInt*>(first_q), reinterpret_cast<const NlaInt*>(first_k)};
}
inline NlaRoom nla_room(const NlaRoomArguments& arguments) {
  return {reinterpret_cast<void*>(std::get<0>(arguments)), std::get<1>(arguments)};
}

inline HeadsView heads_view(const NlaView& view) {
  const auto& [data, batch, token, head] = view;
  return {reinterpret_cast<void*>(data), batch, token, head};
}

template <class T>
NormLinearAttention<T> norm_linear_attention_problem(const NlaArguments& arguments) {
  const auto& [dtype, sizes, views, pointers, flags, scalars] = arguments;
  const auto& [sequences, queries, keys, q_heads, kv_heads, dim, v_dim] = sizes;
  const auto& [q, k, v, gate, o, dq, dk, dv, dgate] = views;
  const auto& [params, sin, cos, start, offsets, s0, z0, count] = pointers;
  const auto& [map, rope_both, causal, mean] = flags;
  const auto& [key_power, alpha, eps, norm_eps] = scalars;
  const auto real = [](NlaPointer p) { return reinterpret_cast<const T*>(p); };
  const auto whole = [](NlaPointer p) { return reinterpret_cast<const NlaInt*>(p); };
  return {static_cast<Dtype>(dtype), sequences, queries, keys, q_heads, kv_heads, dim, v_dim,
          heads_view(q), heads_view(k), heads_view(v), heads_view(gate), heads_view(o),
          heads_view(dq), heads_view(dk), heads_view(dv), heads_view(dgate),
          real(params), real(sin), real(cos), whole(start), whole(offsets), real(s0), real(z0), whole(count),
          static_cast<FeatureMap>(map), rope_both, causal, mean,
          static_cast<T>(key_power), static_cast<T>(alpha), static_cast<T>(eps), static_cast<T>(norm_eps)};
}

}  // namespace pyelastic
