#include "quantize.h"

#include <optional>

namespace dgg {
namespace {

struct RowCodes {
  float scale, norm_sq, residual_sq;
};

// NaN and Inf in a row end up in its residual_sq.
template <typename T>
DGG_INLINE RowCodes int8_row(const T* row, int64_t d, int8_t* codes) {
  vf top{}, square{}, error{};
  for (int64_t k = 0; k < d; k += LANES) {
    const vf x = values(row, k, d), size = x < 0.0f ? -x : x;
    top = size > top ? size : top;
  }
  float largest = 1e-30f;
  for (int i = 0; i < LANES; ++i) largest = std::max(largest, top[i]);
  const float scale = largest / 127, inverse = 127 / largest;
  for (int64_t k = 0; k < d; k += LANES) {
    const vf x = values(row, k, d);
    const vf shifted = x * inverse + 12582912.0f;  // 1.5 * 2^23: rounds to nearest
    const vf off = x - (shifted - 12582912.0f) * scale;
    square += x * x;
    error += off * off;
    using Bytes = int8_t __attribute__((vector_size(LANES)));
    const Bytes rounded = __builtin_convertvector((vi)(bits(shifted) - 0x4B400000u), Bytes);
    memcpy(codes + k, &rounded, std::min<int64_t>(LANES, d - k));
  }
  return {scale, (float)sum(square), (float)sum(error)};
}
DGG_CLONES RowCodes to_codes(const float* row, int64_t d, int8_t* codes) {
  return int8_row(row, d, codes);
}
DGG_CLONES RowCodes to_codes(const BFloat16* row, int64_t d, int8_t* codes) {
  return int8_row(row, d, codes);
}
DGG_CLONES RowCodes to_codes(const Half* row, int64_t d, int8_t* codes) {
  return int8_row(row, d, codes);
}

template <typename T>
RowCodes to_codes(const T* row, int64_t d, BFloat16* codes) {
  double square = 0, error = 0;
  for (int64_t k = 0; k < d; ++k) {
    const float x = to_float(row[k]);
    codes[k] = BFloat16(x);
    const float off = x - to_float(codes[k]);
    square += (double)x * x;
    error += (double)off * off;
  }
  return {1.0f, (float)square, (float)error};
}

void fill(const Tensor& x, const Codes& to) {
  const Tensor from = torch::stable::contiguous(x);
  const int64_t rows = x.size(0), d = x.size(1);
  const bool int8 = to.codes.scalar_type() == ScalarType::Char;
  float *scale = mutable_data<float>(to.scale), *norm_sq = mutable_data<float>(to.norm_sq),
        *residual_sq = mutable_data<float>(to.residual_sq);
  by_dtype(from, [&](auto t) {
    const auto* row = data<decltype(t)>(from);
    parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const RowCodes made =
            int8 ? to_codes(row + i * d, d, mutable_data<int8_t>(to.codes) + i * d)
                 : to_codes(row + i * d, d, mutable_data<BFloat16>(to.codes) + i * d);
        scale[i] = made.scale, norm_sq[i] = made.norm_sq, residual_sq[i] = made.residual_sq;
      }
    });
  });
}

// unchanged: [] fp32; at 1.0 the outputs hold the codes of x already.
void quantize_rows_cpu(const Tensor& x, const Tensor& codes, const Tensor& scale,
                       const Tensor& norm_sq, const Tensor& residual_sq,
                       const std::optional<Tensor>& unchanged) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 2, "x: expected [R, D] on the CPU");
  check_codes({codes, scale, norm_sq, residual_sq}, x.size(0), x.size(1));
  if (unchanged) check_plain(*unchanged, ScalarType::Float, {}, "unchanged");
  if (!unchanged || *data<float>(*unchanged) != 1.0f) fill(x, {codes, scale, norm_sq, residual_sq});
}

}  // namespace

Codes quantize_rows(const Tensor& x, bool int8) {
  const int64_t rows = x.size(0);
  const Codes to{torch::stable::new_empty(x, {rows, x.size(1)},
                                          int8 ? ScalarType::Char : ScalarType::BFloat16),
                 new_floats(x, {rows}), new_floats(x, {rows}), new_floats(x, {rows})};
  fill(x, to);
  return to;
}

}  // namespace dgg

STABLE_TORCH_LIBRARY_IMPL(dgg, CPU, m) {
  m.impl("quantize_rows_cpu", TORCH_BOX(&dgg::quantize_rows_cpu));
}
