// The forward op on the CPU: a product of all rows with one chunk of the vocabulary at a time
// (torch's own mm), then one pass over that block while it is in cache: online log-sum-exp,
// entropy, sum of p^2, and the choice of the active set. With a screen (screen.h) only rows that it
// does not suit go this way. Every row has one owner and one order of summation: results are the
// same bits on any number of threads.
#include <tuple>

#include "active_set.h"
#include "screen.h"

namespace dgg {

DGG_CLONES void finish_logits(float* z, int64_t n, const float* bias, float temperature,
                              float softcap) {
  const float cap = softcap, inverse = softcap ? 1.0f / softcap : 0.0f;
  for (int64_t j = 0; j < n; j += LANES) {
    vf x = values(z, j, n);
    if (bias) x = x + values(bias, j, n);
    if (cap != 0) x = cap * tanh(x * inverse);
    store_values(z, j, n, x / temperature);
  }
}

namespace {

// Sums, and draws where inverse_eps > 0, by logits at full precision.
void scan_exactly(const Inputs& in, Head& head, const std::vector<Row*>& rows, uint32_t seed) {
  if (rows.empty()) return;
  std::vector<int64_t> index;
  for (const Row* row : rows) index.push_back(row->index);
  for_each_logits(head, in.gather(index),
                  [&](const Tensor& block, const Tensor&, const Tensor&, const Block& at) {
                    const float* z = data<float>(block);
                    parallel_for(0, at.rows, 4, [&](int64_t begin, int64_t end) {
                      ScanScratch scratch(at.columns);
                      for (int64_t i = begin; i < end; ++i)
                        scan(*rows[at.row + i], z + i * at.columns, at.columns, at.column, seed,
                             scratch);
                    });
                  });
  parallel_for(0, (int64_t)rows.size(), 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      if (rows[i]->inverse_eps > 0) finish(*rows[i], seed);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward_cpu(
    const Tensor& hidden, const Tensor& weight, const Tensor& target,
    const std::optional<Tensor>& bias, double temperature, double softcap, double grad_eps,
    const std::optional<Tensor>& /* lse_ref: the exact one is at hand when entries are drawn */,
    const std::optional<Tensor>& seed, const std::vector<Tensor>& screen) {
  const Inputs in(hidden, weight, target);
  Head head(weight, bias, temperature, softcap);
  const bool select = seed.has_value() && grad_eps > 0;
  STD_TORCH_CHECK(select || screen.empty(), "screen: needs a seed, and grad_eps > 0");
  if (select) check_plain(*seed, ScalarType::Long, {1}, "seed");
  const uint32_t key = select ? (uint32_t)*data<int64_t>(*seed) : 0;
  std::vector<Row> rows;
  for (int64_t i = 0; i < in.n; ++i) {
    if (in.target[i] < 0) continue;
    rows.emplace_back();
    rows.back().index = i;
    rows.back().target = in.target[i];
    rows.back().inverse_eps = select ? (float)(1 / grad_eps) : 0.0f;
  }
  if (!screen.empty()) scan_screened(in, head, screen, rows, key);
  std::vector<Row*> exact;
  for (Row& row : rows)
    if (!row.screened()) exact.push_back(&row);
  scan_exactly(in, head, exact, key);
  const Tensor active = select ? pack(in.hidden, rows, in.n)
                               : torch::stable::new_empty(in.hidden, {0}, ScalarType::Int);
  Tensor report =
      torch::stable::new_zeros(in.hidden, {screen.empty() ? 0 : in.n, 4}, ScalarType::Float);
  if (!screen.empty()) refine(in, head, rows, active, grad_eps, mutable_data<float>(report));
  std::vector<Tensor> outputs;
  for (int i = 0; i < 4; ++i)
    outputs.push_back(torch::stable::new_zeros(in.hidden, {in.n}, ScalarType::Float));
  float *logp = mutable_data<float>(outputs[0]), *entropy = mutable_data<float>(outputs[1]),
        *lse = mutable_data<float>(outputs[2]), *sum_p2 = mutable_data<float>(outputs[3]);
  for (const Row& row : rows) {
    logp[row.index] = (float)((double)row.z_target - row.lse());
    entropy[row.index] = (float)(std::log(row.s) - row.t / row.s);
    lse[row.index] = (float)row.lse();
    sum_p2[row.index] = (float)(row.q / (row.s * row.s));
  }
  return {outputs[0], outputs[1], outputs[2], outputs[3], active, report};
}

}  // namespace
}  // namespace dgg

STABLE_TORCH_LIBRARY_IMPL(dgg, CPU, m) { m.impl("lm_head_forward", TORCH_BOX(&dgg::forward_cpu)); }
