// Schemas of every op, declared once; each backend registers its own implementation.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

// DGG_TORCH, DGG_CUDA_ARCHS: of the build, by setup.py.
static std::tuple<std::string, std::string> build() { return {DGG_TORCH, DGG_CUDA_ARCHS}; }

STABLE_TORCH_LIBRARY(dgg, m) {
  // hidden [N, D], weight [V, D], target [N] int64 (-1: row ignored), bias [V], lse_ref [N] fp32,
  // seed [1] int64 (None: no active set is stored). screen: empty, or what quantize_rows makes of
  // the weight: codes [V, D], their scale [V], and the squared norms of the weight's rows and of
  // what the codes leave out [V] fp32.
  // Returns logp, entropy, lse, sum_p2 [N] fp32, the active set, opaque to the caller, and the
  // screen's report [N, 4]: error bound (-1: computed exactly), entries refined, their squared
  // errors, and an estimate of those missed.
  m.def(
      "lm_head_forward(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, "
      "float temperature, float softcap, float grad_eps, Tensor? lse_ref, Tensor? seed, "
      "Tensor[] screen) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // grad_logp, grad_entropy, grad_lse [N] fp32; screened: whether the forward had a screen. Returns
  // d_hidden [N, D], d_weight [V, D], d_bias [V] and row_sq [V] fp32, the squared norms of
  // d_weight's rows as stored; what is not needed is empty.
  m.def(
      "lm_head_backward(Tensor grad_logp, Tensor? grad_entropy, Tensor? grad_lse, Tensor hidden, "
      "Tensor weight, Tensor target, Tensor? bias, Tensor lse, Tensor entropy, Tensor active, "
      "Tensor? seed, "
      "float temperature, float softcap, float grad_eps, bool screened, bool need_hidden, "
      "bool need_weight, bool need_bias, bool need_row_sq) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "quantize_rows_cpu(Tensor x, Tensor(a!) codes, Tensor(b!) scale, Tensor(c!) norm_sq,"
      " Tensor(d!) residual_sq, Tensor? unchanged) -> ()");
  // Names of the first values of the gate's state, in order, and the state's whole length.
  m.def("gate_layout() -> str");
  m.def("gate_state_size(int window, int mini_batches) -> int");
  m.def("gate_new_batch(Tensor(a!) state, Tensor(b!) found_inf) -> ()");
  // signal: partial squares of the energy to be summed ([V] fp32 or fp64; squares=True), or the
  // energy itself (squares=False). total_norm: 0-dim fp32, the global gradient norm. header: pinned
  // host memory that a CUDA kernel writes the state's first HEADER_SIZE values to. phase: 0 when
  // the gradient is finished; 1 before the backward, by another signal; 2 after the backward that
  // followed a 1.
  m.def(
      "gate_decide(Tensor(a!) state, Tensor signal, bool squares, Tensor? total_norm, "
      "float max_grad_norm, Tensor(b!) found_inf, Tensor(c!) grad_scale, Tensor(d!)? header, "
      "int phase=0) -> ()");
  // The torch that the library was built with, and its CUDA architectures, or "none".
  m.def("build() -> (str, str)");
}

STABLE_TORCH_LIBRARY_IMPL(dgg, CompositeExplicitAutograd, m) { m.impl("build", TORCH_BOX(&build)); }
