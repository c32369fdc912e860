// One row of logits, met chunk by chunk: its running sums, and the entries drawn for its gradient.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"

namespace dgg __attribute__((visibility("hidden"))) {

  struct Entry {
    int32_t column;
    float z;
    float weight;  // 1 / the probability that it was kept with: known when the row is finished
  };

  struct Row {
    int64_t index;  // in the caller's order: what the draw is keyed by
    int64_t target;
    float inverse_eps;  // an entry is kept with probability min(1, p * inverse_eps); 0: none is
    float bound = -1;   // of the error that a screen leaves in logp, in nats; -1: not screened
    float maximum = -INFINITY;
    float z_target = 0;
    double s = 0, t = 0, q = 0;  // sums of e, e (z - maximum), e^2 with e = exp(z - maximum)
    std::vector<Entry> entries;
    double certain = 0;  // share of s in the entries kept with certainty: known when finished

    bool screened() const { return bound >= 0; }
    Row unscanned() const {
      Row row;
      row.index = index, row.target = target, row.inverse_eps = inverse_eps;
      return row;
    }
    double lse() const { return (double)maximum + std::log(s); }
  };

  // Room for one chunk of a row in `scan`.
  struct ScanScratch {
    std::vector<float> e;
    std::vector<int32_t> chosen;

    explicit ScanScratch(int64_t columns) : e(columns + 4 * LANES), chosen(columns + 4 * LANES) {}
  };

  // Takes n logits of the columns from `first` on into the row.
  void scan(Row & row, const float* z, int64_t n, int64_t first, uint32_t seed,
            ScanScratch& scratch);

  // Keeps the target, always, and what the final lse selects.
  void finish(Row & row, uint32_t seed);

}  // namespace dgg
