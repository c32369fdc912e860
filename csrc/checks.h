// Argument checks shared by the ops. The public functions in Python check first and name their own
// arguments; these keep a direct call of an op from reading outside its tensors.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

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

inline void check_scalar(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.numel() == 1, name,
                  ": expected one float32 value");
}

}  // namespace dgg
