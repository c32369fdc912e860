// The gate on the CPU: the same transition as on CUDA, on the caller's thread.
#include "../gate.h"

#include <optional>
#include <string>

#include "../checks.h"

namespace dgg {
namespace {

double* checked(const Tensor& state) {
  check_state(state);
  STD_TORCH_CHECK(state.is_cpu(), "gate state: expected it on the CPU");
  double* s = static_cast<double*>(state.mutable_data_ptr());
  STD_TORCH_CHECK(is_sound(s, state.numel()),
                  "gate state: expected sizes and places as a gate writes them");
  return s;
}

template <typename T>
double total(const Tensor& signal, bool squares) {
  const T* x = static_cast<const T*>(signal.const_data_ptr());
  if (!squares) return (double)x[0];
  double sum = 0;
  for (int64_t i = 0; i < signal.numel(); ++i) sum += (double)x[i];
  return sqrt(sum);
}

void new_batch_cpu(Tensor state, Tensor found_inf) {
  double* s = checked(state);
  check_scalar(found_inf, "found_inf", state);
  gate_new_batch(s);
  *static_cast<float*>(found_inf.mutable_data_ptr()) = 0.0f;
}

void decide_cpu(Tensor state, const Tensor& signal, bool squares,
                const std::optional<Tensor>& total_norm, double max_grad_norm, Tensor found_inf,
                Tensor grad_scale, const std::optional<Tensor>& header, int64_t phase) {
  double* s = checked(state);
  check_decision(max_grad_norm, phase);
  check_scalar(found_inf, "found_inf", state);
  check_scalar(grad_scale, "grad_scale", state);
  STD_TORCH_CHECK(signal.is_cpu() && signal.is_contiguous() && (squares || signal.numel() == 1),
                  "signal: expected contiguous partial squares, or one value");
  const bool is_double = signal.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(is_double || signal.scalar_type() == ScalarType::Float,
                  "signal: expected float32 or float64");
  double norm = NAN;
  STD_TORCH_CHECK(!header, "header: expected None on a CPU, where the host reads the state itself");
  if (total_norm) {
    check_scalar(*total_norm, "total_norm", state);
    norm = (double)*static_cast<const float*>(total_norm->const_data_ptr());
  }
  const double energy = is_double ? total<double>(signal, squares) : total<float>(signal, squares);
  gate_decide(s, (Phase)phase, energy, norm, total_norm.has_value());
  *static_cast<float*>(found_inf.mutable_data_ptr()) = (float)s[SHUT];
  // A shut update divides nothing, so that its gradient stays as it was computed.
  *static_cast<float*>(grad_scale.mutable_data_ptr()) =
      total_norm && s[SHUT] == 0 ? clip_divisor(norm, max_grad_norm) : 1.0f;
}

#define DGG_NAME(name) #name " "
std::string layout() { return DGG_SLOTS(DGG_NAME); }
#undef DGG_NAME

}  // namespace
}  // namespace dgg

STABLE_TORCH_LIBRARY_IMPL(dgg, CPU, m) {
  m.impl("gate_new_batch", TORCH_BOX(&dgg::new_batch_cpu));
  m.impl("gate_decide", TORCH_BOX(&dgg::decide_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(dgg, CompositeExplicitAutograd, m) {
  m.impl("gate_layout", TORCH_BOX(&dgg::layout));
  m.impl("gate_state_size", TORCH_BOX(&dgg::state_size));
}
