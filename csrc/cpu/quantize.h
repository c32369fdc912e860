// Rows of a matrix in few bits.
#pragma once
#include "lm_head.h"

namespace dgg __attribute__((visibility("hidden"))) {

  struct Codes {
    Tensor codes;  // [R, D] int8 or bfloat16: row i is about scale[i] codes[i]
    Tensor scale, norm_sq, residual_sq;  // [R] fp32: squared norms of the rows, and of what is left
  };

  Codes quantize_rows(const Tensor& x, bool int8);

}  // namespace dgg
