// Screen and refine: all logits in few bits, those that matter again at full precision.
//
// Codes of hidden states and weights (int8 with a scale per row, or bfloat16) give every logit z an
// estimate z~, cheaply. Entries are drawn by z~, with probability pi = min(1, p~ inverse_eps), and
// every drawn entry is computed anew from the numbers themselves. The sums over the vocabulary are
//
//   sum of e^z  ~  sum over all of e^z~  +  sum over drawn entries of (e^z - e^z~) / pi :
//
// the screen is a control variate, and the entries that the gradient needs correct it, without
// bias. Rows that it does not suit are left to be computed without it.
#pragma once
#include "active_set.h"

namespace dgg __attribute__((visibility("hidden"))) {

  // Sums and draws of all rows by screened logits. screen: codes [V, D], scale, norm_sq,
  // residual_sq [V] of the weight. Rows that are not `screened()` afterwards are as they were
  // before.
  void scan_screened(const Inputs& in, const Head& head, const std::vector<Tensor>& screen,
                     std::vector<Row>& rows, uint32_t seed);

  // Logits of the screened rows' entries at full precision, in place of the screened ones in the
  // active set; sums corrected by them; the report [N, 4].
  void refine(const Inputs& in, const Head& head, std::vector<Row>& rows, const Tensor& active,
              double grad_eps, float* report);

}  // namespace dgg
