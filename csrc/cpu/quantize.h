// Rows of a matrix in few bits.
#pragma once
#include "lm_head.h"

namespace dgg __attribute__((visibility("hidden"))) {

  struct Codes {
    Tensor codes;  // [R, D] int8 or bfloat16: row i is about scale[i] codes[i]
    Tensor scale, norm_sq, residual_sq;  // [R] fp32: squared norms of the rows, and of what is left
  };

  inline void check_codes(const Codes& of, int64_t rows, int64_t d) {
    const bool int8 = of.codes.scalar_type() == ScalarType::Char;
    check_plain(of.codes, int8 ? ScalarType::Char : ScalarType::BFloat16, {rows, d}, "codes");
    check_plain(of.scale, ScalarType::Float, {rows}, "scale");
    check_plain(of.norm_sq, ScalarType::Float, {rows}, "norm_sq");
    check_plain(of.residual_sq, ScalarType::Float, {rows}, "residual_sq");
  }

  Codes quantize_rows(const Tensor& x, bool int8);

}  // namespace dgg
