// The gate on CUDA: one launch of one block reduces the partial squares in a fixed order in fp64
// and takes the decision. Nothing is read by the host.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <optional>

#include "../checks.h"
#include "../gate.h"

// A CPU build of torch has no such symbol. Compiled beside one, as a check, the library must still
// load; otherwise the symbol is strong, so that the linker keeps libtorch_cuda.
#ifdef DGG_TORCH_WITHOUT_CUDA
#pragma weak aoti_torch_get_current_cuda_stream
#endif

namespace dgg {
namespace {

constexpr int THREADS = 1024;

template <typename T>
__global__ void __launch_bounds__(THREADS)
    decide_kernel(double* state, int64_t size, const T* signal, int64_t count, bool squares,
                  const float* total_norm, double max_grad_norm, float* found_inf,
                  float* grad_scale, double* header, int64_t phase) {
  __shared__ double partial[THREADS];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += THREADS) sum += (double)signal[i];
  partial[threadIdx.x] = sum;
  __syncthreads();
  for (int width = THREADS / 2; width > 0; width /= 2) {
    if (threadIdx.x < width) partial[threadIdx.x] += partial[threadIdx.x + width];
    __syncthreads();
  }
  if (threadIdx.x != 0) return;
  *found_inf = *grad_scale = 1.0f;
  if (!is_sound(state, size)) return;  // shut: the host, which alone can tell, does not wait
  const double norm = total_norm ? (double)*total_norm : NAN;
  const double energy = squares ? sqrt(partial[0]) : partial[0];
  gate_decide(state, (Phase)phase, energy, norm, total_norm != nullptr);
  *found_inf = (float)state[SHUT];
  if (total_norm && state[SHUT] == 0) *grad_scale = clip_divisor(norm, max_grad_norm);
  if (header == nullptr) return;
  // The batch last: a host that sees this batch's number sees this batch's latch.
  for (int slot = 0; slot < HEADER_SIZE; ++slot)
    if (slot != BATCHES) header[slot] = state[slot];
  __threadfence_system();
  header[BATCHES] = state[BATCHES];
}

__global__ void new_batch_kernel(double* state, int64_t size, float* found_inf) {
  *found_inf = 1.0f;
  if (!is_sound(state, size)) return;
  gate_new_batch(state);
  *found_inf = 0.0f;
}

cudaStream_t current_stream(const Tensor& t) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "dgg_kernels was built beside a CPU build of torch: install it again");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch(const char* name) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, name, ": ", cudaGetErrorString(error));
}

void check_cuda_state(const Tensor& state) {
  check_state(state);
  STD_TORCH_CHECK(state.is_cuda(), "gate state: expected it on a CUDA device");
}

void new_batch_cuda(Tensor state, Tensor found_inf) {
  check_cuda_state(state);
  check_scalar(found_inf, "found_inf", state);
  torch::stable::accelerator::DeviceGuard guard(state.get_device_index());
  new_batch_kernel<<<1, 1, 0, current_stream(state)>>>(
      static_cast<double*>(state.mutable_data_ptr()), state.numel(),
      static_cast<float*>(found_inf.mutable_data_ptr()));
  check_launch("gate_new_batch");
}

void decide_cuda(Tensor state, const Tensor& signal, bool squares,
                 const std::optional<Tensor>& total_norm, double max_grad_norm, Tensor found_inf,
                 Tensor grad_scale, std::optional<Tensor> header, int64_t phase) {
  check_cuda_state(state);
  check_decision(max_grad_norm, phase);
  check_scalar(found_inf, "found_inf", state);
  check_scalar(grad_scale, "grad_scale", state);
  STD_TORCH_CHECK(
      same_device(signal, state) && signal.is_contiguous() && (squares || signal.numel() == 1),
      "signal: expected contiguous partial squares, or one value, on the state's device");
  if (total_norm) check_scalar(*total_norm, "total_norm", state);
  if (header) check_state(*header);
  STD_TORCH_CHECK(!header || header->is_cpu(),
                  "header: expected memory of the host, pinned (which is not checked)");
  torch::stable::accelerator::DeviceGuard guard(state.get_device_index());
  auto launch = [&](auto* x) {
    decide_kernel<<<1, THREADS, 0, current_stream(state)>>>(
        static_cast<double*>(state.mutable_data_ptr()), state.numel(), x, signal.numel(), squares,
        total_norm ? static_cast<const float*>(total_norm->const_data_ptr()) : nullptr,
        max_grad_norm, static_cast<float*>(found_inf.mutable_data_ptr()),
        static_cast<float*>(grad_scale.mutable_data_ptr()),
        header ? static_cast<double*>(header->mutable_data_ptr()) : nullptr, phase);
  };
  if (signal.scalar_type() == ScalarType::Double) {
    launch(static_cast<const double*>(signal.const_data_ptr()));
  } else {
    STD_TORCH_CHECK(signal.scalar_type() == ScalarType::Float,
                    "signal: expected float32 or float64");
    launch(static_cast<const float*>(signal.const_data_ptr()));
  }
  check_launch("gate_decide");
}

}  // namespace
}  // namespace dgg

STABLE_TORCH_LIBRARY_IMPL(dgg, CUDA, m) {
  m.impl("gate_new_batch", TORCH_BOX(&dgg::new_batch_cuda));
  m.impl("gate_decide", TORCH_BOX(&dgg::decide_cuda));
}
