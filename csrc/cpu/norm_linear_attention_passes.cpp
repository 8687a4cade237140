// norm_linear_attention on the CPU: the kernels of a pass in their order. Contract: ../norm_linear_attention.h.
//
// Bidirectional: sums of parts, the sum of these, and what reads it; where each sequence is one part, its sums go where the
// whole belongs. Causal: a walk that carries the state, or parts whose states are summed first.

#include <algorithm>
#include <stdexcept>

#include "../norm_linear_attention.h"

namespace pyelastic {
namespace {

// A block of memory given out from its front.
class Pieces {
 public:
  explicit Pieces(NlaRoom room) : room_(room) {}
  template <class U>
  U* take(std::int64_t count) {
    constexpr std::int64_t line = 64;
    const std::int64_t bytes = (count * static_cast<std::int64_t>(sizeof(U)) + line - 1) / line * line;
    if (bytes > room_.bytes - used_) throw std::length_error("norm_linear_attention: too little room for a pass");
    used_ += bytes;
    return reinterpret_cast<U*>(static_cast<char*>(room_.data) + used_ - bytes);
  }

 private:
  NlaRoom room_;
  std::int64_t used_ = 0;
};

template <class T>
struct State {
  T *s, *z;
};

// Sizes of a call.
template <class T>
struct Plan {
  const NormLinearAttention<T>& x;
  const NlaParts& parts;
  bool pola;
  std::int64_t s_width, z_width, q_slots, k_slots;

  Plan(const NormLinearAttention<T>& x_, const NlaParts& parts_)
      : x(x_), parts(parts_), pola(x_.map == FeatureMap::pola || x_.map == FeatureMap::pola_opposite),
        q_slots(parts_.first_q[x_.sequences]), k_slots(parts_.first_k[x_.sequences]) {
    const bool mala = x.map == FeatureMap::mala;
    s_width = (mala ? x.dim + 1 : 2 * x.dim) * x.v_dim;
    z_width = mala ? x.dim : 2 * x.dim;
  }

  std::int64_t param_width() const { return pola ? x.dim : 3; }
  State<T> states(Pieces& pieces, std::int64_t slots) const {
    T* const s = pieces.template take<T>(slots * x.kv_heads * s_width);
    return {s, pieces.template take<T>(slots * x.kv_heads * z_width)};
  }
  // Whether the sums of each sequence's one part are the whole.
  bool alone(std::int64_t slots, const T* s, const T* z) const {
    return !x.causal && x.offsets == nullptr && slots == x.sequences && s == nullptr && z == nullptr;
  }
  // `to` = `from`, or zeros.
  void begin(const T* from_s, const T* from_z, State<T> to) const {
    const std::int64_t heads = x.sequences * x.kv_heads;
    fill(from_s, heads * s_width, to.s);
    fill(from_z, heads * z_width, to.z);
  }
  void scan(const NlaKernels<T>& kernels, const std::int64_t* first, const T* s, const T* z, bool reverse, State<T> sums,
            State<T> total, int threads) const {
    kernels.scan(first, x.sequences, x.kv_heads, s_width, s, x.causal, reverse, sums.s, total.s, threads);
    kernels.scan(first, x.sequences, x.kv_heads, z_width, z, x.causal, reverse, sums.z, total.z, threads);
  }
  // The state that `forward` and `queries` read, and the whole (a walk: what comes before it).
  State<T> read(const NlaKernels<T>& kernels, Pieces& pieces, State<T> whole, int threads) const {
    if (parts.walk) {
      begin(x.s0, x.z0, whole);
      return whole;
    }
    if (alone(k_slots, x.s0, x.z0)) {
      kernels.states(x, parts, whole.s, whole.z, threads);
      return whole;
    }
    const State<T> sums = states(pieces, k_slots);
    kernels.states(x, parts, sums.s, sums.z, threads);
    scan(kernels, parts.first_k, x.s0, x.z0, false, sums, whole, threads);
    return x.causal ? sums : whole;
  }
  // Gradients of the parameters, added up in the order of the parts; kernels leave [slots, heads, width].
  void add_up(const double* dparams, std::int64_t slots, const double* dpowers, std::int64_t key_slots, T* to) const {
    const std::int64_t width = param_width(), count = x.q_heads * width;
    for (std::int64_t i = 0; i < count; ++i) {
      double sum = 0, of_keys = 0;
      for (std::int64_t slot = 0; slot < slots; ++slot) sum += dparams[slot * count + i];
      for (std::int64_t slot = 0; pola && slot < key_slots; ++slot) of_keys += dpowers[slot * count + i];
      to[pola ? i : i % width * x.q_heads + i / width] = static_cast<T>(sum + of_keys);
    }
  }

 private:
  static void fill(const T* from, std::int64_t count, T* to) {
    if (from == nullptr) {
      std::fill_n(to, count, T(0));
    } else if (from != to) {
      std::copy_n(from, count, to);
    }
  }
};

}  // namespace

template <class T>
void NlaPasses<T>::forward(const NormLinearAttention<T>& x, const NlaParts& parts, NlaRoom room, T* s, T* z,
                           int threads) const {
  if (s == nullptr) return quadratic.forward(x, threads);
  Pieces pieces(room);
  const State<T> read = Plan<T>(x, parts).read(forward_kernels, pieces, {s, z}, threads);
  forward_kernels.forward(x, parts, read.s, read.z, parts.walk ? s : nullptr, parts.walk ? z : nullptr, threads);
}

template <class T>
void NlaPasses<T>::backward(const NormLinearAttention<T>& x, const NlaParts& parts, NlaRoom room, const T* s, const T* z,
                            const T* s_grad, const T* z_grad, T* dparams, T* ds, T* dz, int threads) const {
  const Plan<T> plan(x, parts);
  const bool short_order = ds == nullptr;
  const std::int64_t q_slots = short_order ? x.sequences : plan.q_slots, k_slots = short_order ? x.sequences : plan.k_slots;
  Pieces pieces(room);
  double* const own = pieces.take<double>(q_slots * x.q_heads * plan.param_width());
  double* const powers = pieces.take<double>(plan.pola ? k_slots * x.kv_heads * x.dim : 0);
  if (short_order) {
    quadratic.backward(x, own, powers, threads);
  } else {
    const std::int64_t rows = (x.offsets == nullptr ? x.sequences : 1) * x.queries * x.q_heads;
    T* const d = pieces.take<T>(rows);
    T* const dd = pieces.take<T>(rows);
    if (x.causal) {
      const State<T> read = plan.read(forward_kernels, pieces, plan.states(pieces, x.sequences), threads);
      s = read.s;
      z = read.z;
    }
    const State<T> result{ds, dz};
    State<T> sums = result, after = result;
    if (parts.walk) {
      plan.begin(s_grad, z_grad, result);
      sums = {nullptr, nullptr};
    } else if (!plan.alone(q_slots, s_grad, z_grad)) {
      sums = plan.states(pieces, q_slots);
      if (x.causal) after = sums;
    }
    backward_kernels.queries(x, parts, s, z, d, dd, sums.s, sums.z, own, threads);
    if (sums.s != nullptr && sums.s != ds) {
      plan.scan(forward_kernels, parts.first_q, s_grad, z_grad, true, sums, result, threads);
    }
    backward_kernels.keys(x, parts, d, dd, after.s, after.z, powers, threads);
  }
  if (dparams != nullptr) plan.add_up(own, q_slots, powers, k_slots, dparams);
}

template struct NlaPasses<float>;
template struct NlaPasses<double>;

}  // namespace pyelastic
