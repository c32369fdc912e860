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

inline void check_scalar(const Tensor& t, const char* name, const Tensor& state) {
  const bool there = t.is_cpu() == state.is_cpu() && t.is_cuda() == state.is_cuda();
  STD_TORCH_CHECK(there && t.scalar_type() == ScalarType::Float && t.numel() == 1, name,
                  ": expected one float32 value where the gate's state is");
}

}  // namespace dgg
