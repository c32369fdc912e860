// The backward op on the CPU: sparse, over the active set alone; or, with grad_eps = 0, dense by
// chunks of the vocabulary. Every row and every weight row has one owner and one order of
// summation: results are the same bits on any number of threads.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <tuple>

#include "active_set.h"

namespace dgg {
namespace {

// out += a @ b, or out = a @ b.
void addmm(const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate) {
  if (accumulate) {
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
  }
}

// dL/d(h . W_v) of one entry. p: the probability its p-terms are weighted by (see docs/lm_head.md).
struct LogitGradient {
  const float *c, *c_entropy, *c_lse, *lse, *entropy;  // c_entropy and c_lse may be null
  float temperature, softcap;

  bool works(int64_t i) const {
    return c[i] != 0 || (c_entropy && c_entropy[i] != 0) || (c_lse && c_lse[i] != 0);
  }
  // What every probability is multiplied by: a log-prob goes down with lse.
  float of_p(int64_t i) const { return c_lse ? c[i] - c_lse[i] : c[i]; }
  float operator()(int64_t i, float z, float weighted_p, bool is_target) const {
    float g = -of_p(i) * weighted_p;
    if (c_entropy) g -= c_entropy[i] * weighted_p * (std::max(z - lse[i], -1e4f) + entropy[i]);
    if (is_target) g += c[i];
    if (softcap != 0) {
      const float ratio = z * (temperature / softcap);
      g *= 1 - ratio * ratio;
    }
    return g / temperature;
  }
};

// sum += sum_k scale[k] * rows[index[k]], each row [d]: four rows at a time, to touch `sum` less
// often.
template <typename T>
DGG_INLINE void weighted_sum_of(float* sum, int64_t d, int64_t count, const T* rows,
                                const int32_t* index, const float* scale) {
  auto row = [&](int64_t k) { return rows + (int64_t)index[k] * d; };
  int64_t k = 0;
  for (; k + 4 <= count; k += 4) {
    const T *a = row(k), *b = row(k + 1), *e = row(k + 2), *f = row(k + 3);
    const float sa = scale[k], sb = scale[k + 1], se = scale[k + 2], sf = scale[k + 3];
    for (int64_t i = 0; i < d; ++i)
      sum[i] +=
          (sa * to_float(a[i]) + sb * to_float(b[i])) + (se * to_float(e[i]) + sf * to_float(f[i]));
  }
  for (; k < count; ++k) {
    const T* a = row(k);
    for (int64_t i = 0; i < d; ++i) sum[i] += scale[k] * to_float(a[i]);
  }
}
DGG_CLONES void weighted_sum(float* sum, int64_t d, int64_t count, const float* rows,
                             const int32_t* index, const float* scale) {
  weighted_sum_of(sum, d, count, rows, index, scale);
}
DGG_CLONES void weighted_sum(float* sum, int64_t d, int64_t count, const BFloat16* rows,
                             const int32_t* index, const float* scale) {
  weighted_sum_of(sum, d, count, rows, index, scale);
}
DGG_CLONES void weighted_sum(float* sum, int64_t d, int64_t count, const Half* rows,
                             const int32_t* index, const float* scale) {
  weighted_sum_of(sum, d, count, rows, index, scale);
}

DGG_CLONES float squares(const float* x, int64_t d) {
  vf s{};
  int64_t i = 0;
  for (; i + LANES <= d; i += LANES) {
    const vf v = load(x + i);
    s += v * v;
  }
  double total = sum(s);
  for (; i < d; ++i) total += (double)x[i] * x[i];
  return (float)total;
}

// Where one weight row's finished gradient goes: rounded to the weight's dtype, its squares taken
// of the values as stored.
struct WeightGradient {
  Tensor d_weight, row_sq;  // empty where not needed
  bool store, squares_wanted;

  template <typename T>
  void write(int64_t v, float* row, int64_t d) const {
    T* out = store ? mutable_data<T>(d_weight) + v * d : nullptr;
    for (int64_t k = 0; k < d; ++k) {
      const T rounded = T(row[k]);
      if (out) out[k] = rounded;
      row[k] = to_float(rounded);
    }
    if (squares_wanted) mutable_data<float>(row_sq)[v] = squares(row, d);
  }

  template <typename T>
  void write_zero(int64_t v, int64_t d) const {
    if (store) memset(static_cast<void*>(mutable_data<T>(d_weight) + v * d), 0, d * sizeof(T));
    if (squares_wanted) mutable_data<float>(row_sq)[v] = 0;
  }
};

// A gradient of this size is fresh memory every time, whose page faults would cost as much as the
// sums that go there: 27,000 of them for a vocabulary of 49,152 and 576 features.
void use_huge_pages(const Tensor& t) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  const uintptr_t end = begin + t.numel() * t.element_size();
  const uintptr_t first = (begin + page - 1) / page * page, last = end / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

struct Gradients {
  Tensor d_hidden, d_bias;
  WeightGradient weight;
};

// Sparse: over the active set.
template <typename T>
void backward_sparse(const Inputs& in, const Head& head, const LogitGradient& gradient,
                     const ActiveSet& set, bool need_hidden, bool need_bias, const Gradients& out) {
  const int64_t d = in.d, vocabulary = head.vocabulary();
  const T *w = data<T>(head.weight), *x = data<T>(in.hidden);
  std::vector<float> g(set.size());
  parallel_for(0, in.n, 16, [&](int64_t begin, int64_t end) {
    std::vector<float> sum(d);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = set.row_start[i], last = set.row_start[i + 1];
      const bool works = last > first && gradient.works(i);
      if (works) {
        for (int64_t k = first; k < last; ++k) {
          const float p = std::exp(set.z[k] - gradient.lse[i]) * set.weight[k];
          g[k] = gradient(i, set.z[k], p, set.column[k] == in.target[i]);
        }
      }
      if (!need_hidden) continue;
      T* to = mutable_data<T>(out.d_hidden) + i * d;
      if (!works) {
        memset(static_cast<void*>(to), 0, d * sizeof(T));
        continue;
      }
      std::fill(sum.begin(), sum.end(), 0.0f);
      weighted_sum(sum.data(), d, last - first, w, set.column + first, g.data() + first);
      for (int64_t k = 0; k < d; ++k) to[k] = T(sum[k]);
    }
  });
  if (!out.weight.store && !out.weight.squares_wanted && !need_bias) return;

  const ByColumn entries(set, vocabulary, [&](int64_t i) { return gradient.works(i); });
  entries.for_each_range([&](int64_t begin, int64_t end) {
    std::vector<float> sum(d), scale;
    for (int64_t v = begin; v < end; ++v) {
      const int64_t first = entries.start[v], count = entries.start[v + 1] - first;
      scale.resize(count);
      for (int64_t k = 0; k < count; ++k) scale[k] = g[entries.entry[first + k]];
      if (need_bias) {
        double total = 0;
        for (const float one : scale) total += (double)one;
        by_dtype(out.d_bias, [&](auto b) {
          mutable_data<decltype(b)>(out.d_bias)[v] = decltype(b)((float)total);
        });
      }
      if (count == 0) {
        out.weight.template write_zero<T>(v, d);
        continue;
      }
      std::fill(sum.begin(), sum.end(), 0.0f);
      weighted_sum(sum.data(), d, count, x, entries.row.data() + first, scale.data());
      out.weight.template write<T>(v, sum.data(), d);
    }
  });
}

// z -> dL/d(h . W_v) of a row of one chunk, in place.
DGG_CLONES void dense_gradient(float* z, int64_t n, float c, float c_entropy, float lse,
                               float entropy, float temperature, float softcap) {
  const float ratio = softcap != 0 ? temperature / softcap : 0.0f;
  const vf lowest = splat(-1e4f);
  for (int64_t j = 0; j < n; j += LANES) {
    const vf x = values(z, j, n);
    vf logp = x - lse;
    const vf p = exp(logp);
    logp = logp < lowest ? lowest : logp;
    vf g = -(c * p) - c_entropy * p * (logp + entropy);
    if (ratio != 0) {
      const vf r = x * ratio;
      g = g * (1.0f - r * r);
    }
    store_values(z, j, n, g / temperature);
  }
}

// Dense: every entry, chunk by chunk of the vocabulary.
template <typename T>
void backward_dense(const Inputs& in, Head& head, const LogitGradient& gradient, bool need_hidden,
                    bool need_bias, const Gradients& out) {
  const int64_t d = in.d;
  std::vector<int64_t> index;
  for (int64_t i = 0; i < in.n; ++i)
    if (in.target[i] >= 0 && gradient.works(i)) index.push_back(i);
  if (need_hidden && (int64_t)index.size() < in.n)
    torch::stable::zero_(const_cast<Tensor&>(out.d_hidden));
  if (index.empty()) {
    for (int64_t v = 0; v < head.vocabulary(); ++v) out.weight.template write_zero<T>(v, d);
    if (need_bias) torch::stable::zero_(const_cast<Tensor&>(out.d_bias));
    return;
  }
  const Tensor x = in.gather(index);
  const bool need_weight = out.weight.store || out.weight.squares_wanted;
  const int64_t n = (int64_t)index.size();
  Tensor d_x = new_floats(x, {need_hidden ? n : 0, d});
  Tensor d_w = new_floats(x, {need_weight ? std::min(BLOCK_COLS, head.vocabulary()) : 0, d});
  std::vector<double> d_b(BLOCK_COLS);
  for_each_logits(
      head, x, [&](const Tensor& block, const Tensor& part, const Tensor& w, const Block& at) {
        float* z = mutable_data<float>(block);
        parallel_for(0, at.rows, 8, [&](int64_t begin, int64_t end) {
          for (int64_t k = begin; k < end; ++k) {
            const int64_t i = index[at.row + k], y = in.target[i] - at.column;
            float* row = z + k * at.columns;
            const bool has_target = y >= 0 && y < at.columns;
            const float z_target = has_target ? row[y] : 0.0f;
            dense_gradient(row, at.columns, gradient.of_p(i),
                           gradient.c_entropy ? gradient.c_entropy[i] : 0.0f, gradient.lse[i],
                           gradient.entropy[i], gradient.temperature, gradient.softcap);
            if (has_target)
              row[y] = gradient(i, z_target, std::exp(z_target - gradient.lse[i]), true);
          }
        });
        if (need_hidden) addmm(rows_of(d_x, at.row, at.rows), block, w, at.column > 0);
        const bool last = at.row + at.rows == n;
        if (need_bias) {
          if (at.row == 0) std::fill(d_b.begin(), d_b.end(), 0.0);
          for (int64_t k = 0; k < at.rows; ++k)
            for (int64_t j = 0; j < at.columns; ++j) d_b[j] += (double)z[k * at.columns + j];
          if (last)
            by_dtype(out.d_bias, [&](auto b) {
              using B = decltype(b);
              for (int64_t j = 0; j < at.columns; ++j)
                mutable_data<B>(out.d_bias)[at.column + j] = B((float)d_b[j]);
            });
        }
        if (!need_weight) return;
        const Tensor part_dw = rows_of(d_w, 0, at.columns);
        addmm(part_dw, torch::stable::transpose(block, 0, 1), part, at.row > 0);
        if (!last) return;
        float* finished = mutable_data<float>(part_dw);
        parallel_for(0, at.columns, 16, [&](int64_t begin, int64_t end) {
          for (int64_t j = begin; j < end; ++j)
            out.weight.template write<T>(at.column + j, finished + j * d, d);
        });
      });
  if (!need_hidden) return;
  const float* from = data<float>(d_x);
  parallel_for(0, n, 64, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k)
      for (int64_t j = 0; j < d; ++j)
        mutable_data<T>(out.d_hidden)[index[k] * d + j] = T(from[k * d + j]);
  });
}

const float* coefficients(const Tensor& t, int64_t n, const char* name) {
  check_plain(t, ScalarType::Float, {n}, name);
  return data<float>(t);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_cpu(
    const Tensor& grad_logp, const std::optional<Tensor>& grad_entropy,
    const std::optional<Tensor>& grad_lse, const Tensor& hidden, const Tensor& weight,
    const Tensor& target, const std::optional<Tensor>& bias, const Tensor& lse,
    const Tensor& entropy, const Tensor& active, const std::optional<Tensor>& seed,
    double temperature, double softcap, double grad_eps,
    bool /* screened: entries have their weights */, bool need_hidden, bool need_weight,
    bool need_bias, bool need_row_sq) {
  const Inputs in(hidden, weight, target);
  Head head(weight, bias, temperature, softcap);
  const Tensor c = torch::stable::contiguous(grad_logp);
  std::optional<Tensor> c_entropy, c_lse;
  if (grad_entropy) c_entropy = torch::stable::contiguous(*grad_entropy);
  if (grad_lse) c_lse = torch::stable::contiguous(*grad_lse);
  const LogitGradient gradient{coefficients(c, in.n, "grad_logp"),
                               c_entropy ? coefficients(*c_entropy, in.n, "grad_entropy") : nullptr,
                               c_lse ? coefficients(*c_lse, in.n, "grad_lse") : nullptr,
                               coefficients(lse, in.n, "lse"),
                               coefficients(entropy, in.n, "entropy"),
                               head.temperature,
                               head.softcap};
  auto empty_unless = [&](bool needed, const Tensor& like, std::vector<int64_t> shape) {
    if (!needed) shape = {0};
    return torch::stable::new_empty(like, shape);
  };
  const int64_t vocabulary = head.vocabulary();
  Gradients out;
  out.d_hidden = empty_unless(need_hidden, in.hidden, {in.n, in.d});
  out.d_bias = empty_unless(need_bias, bias ? *bias : in.hidden, {vocabulary});
  out.weight.d_weight = empty_unless(need_weight, head.weight, {vocabulary, in.d});
  use_huge_pages(out.weight.d_weight);
  out.weight.row_sq = new_floats(in.hidden, {need_row_sq ? vocabulary : 0});
  out.weight.store = need_weight;
  out.weight.squares_wanted = need_row_sq;
  by_dtype(in.hidden, [&](auto t) {
    using T = decltype(t);
    if (seed.has_value() && grad_eps > 0) {
      check_active(active, in.n, vocabulary);
      backward_sparse<T>(in, head, gradient, ActiveSet(active, in.n), need_hidden, need_bias, out);
    } else {
      backward_dense<T>(in, head, gradient, need_hidden, need_bias, out);
    }
  });
  return {out.d_hidden, out.weight.d_weight, out.d_bias, out.weight.row_sq};
}

}  // namespace
}  // namespace dgg

STABLE_TORCH_LIBRARY_IMPL(dgg, CPU, m) {
  m.impl("lm_head_backward", TORCH_BOX(&dgg::backward_cpu));
}