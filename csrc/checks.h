// Argument checks shared by the ops. The public functions in Python check first and name their own
// arguments; these keep a direct call of an op from reading outside its tensors.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>

#include "gate.h"

namespace dgg {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_state(const Tensor& state) {
  STD_TORCH_CHECK(state.scalar_type() == ScalarType::Double && state.dim() == 1 &&
                      state.is_contiguous() && state.numel() >= HEADER_SIZE,
                  "gate state: expected a contiguous 1-D float64 tensor of at least ",
                  (int64_t)HEADER_SIZE, " values");
}

// On the CPU, dense, contiguous, of this dtype and shape.
inline void check_plain(const Tensor& t, ScalarType dtype, std::initializer_list<int64_t> shape,
                        const char* name) {
  bool ok = t.is_cpu() && t.scalar_type() == dtype && t.dim() == (int64_t)shape.size();
  int64_t i = 0;
  for (const int64_t size : shape) ok = ok && t.size(i++) == size;
  STD_TORCH_CHECK(ok && t.is_contiguous(), name,
                  ": expected another dtype or shape, or a contiguous tensor on the CPU");
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  if (a.is_cpu() || b.is_cpu()) return a.is_cpu() && b.is_cpu();
  return a.is_cuda() && b.is_cuda() && a.get_device_index() == b.get_device_index();
}

inline void check_scalar(const Tensor& t, const char* name, const Tensor& state) {
  STD_TORCH_CHECK(same_device(t, state) && t.scalar_type() == ScalarType::Float && t.numel() == 1,
                  name, ": expected one float32 value where the gate's state is");
}

inline void check_decision(double max_grad_norm, int64_t phase) {
  STD_TORCH_CHECK(max_grad_norm > 0, "max_grad_norm: expected a positive number, got ",
                  max_grad_norm);
  STD_TORCH_CHECK(phase >= FINISHED && phase <= CONFIRM, "phase: expected 0, 1 or 2, got ", phase);
}

}  // namespace dgg
