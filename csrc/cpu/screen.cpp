#include "screen.h"

#include <type_traits>

#include "quantize.h"

namespace dgg {
namespace {

// Standard deviations of the screen's error that the threshold is lowered by: an entry with p > eps
// then is kept with certainty but for one in a thousand or so.
constexpr float MARGIN = 3.0f;
// The bound on a row's log-prob error is so many standard deviations of the sums' own error.
constexpr float BOUND = 5.0f;
// Rows whose bound is higher, in nats, are computed exactly.
constexpr float LIMIT = 1e-2f;
// And so are rows where a screened logit's own error is larger, in nats, or where more than this
// share of the entries is kept: a product of the whole row is then the cheaper way.
constexpr float NOISE_LIMIT = 1.0f;
constexpr double KEPT_LIMIT = 0.25;
// Products of bfloat16 come back rounded to it: by at most this share of a logit, as a standard
// deviation (2^-8 / sqrt 3); and the logits that matter are so many times the row's typical one.
constexpr float BF16_ROUNDING = 2.3e-3f;
constexpr float PEAK = 4.5f;

// Whether torch's int8 product of d features is right. Without VNNI oneDNN adds up pairs of
// products in 16 bits, which saturate; of one feature it mistakes the strides.
bool int8_products_are_exact(int64_t d) {
  static const bool exact = [] {
    constexpr int64_t size = 64;
    const int64_t shape[2] = {size, size}, strides[2] = {size, 1};
    AtenTensorHandle handles[2];
    for (int i = 0; i < 2; ++i)
      TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
          2, shape, strides, i ? aoti_torch_dtype_int32() : aoti_torch_dtype_int8(),
          aoti_torch_device_type_cpu(), 0, &handles[i]));
    const Tensor ones(handles[0]), out(handles[1]);
    memset(ones.mutable_data_ptr(), 127, size * size);
    const Tensor transposed = torch::stable::transpose(ones, 0, 1);
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__int_mm_out(out.get(), ones.get(), transposed.get()));
    return data<int32_t>(out)[0] == 127 * 127 * size;
  }();
  return exact && d > 1 && d <= INT32_MAX / (127 * 127);
}

// A mean in which large values, whose logits matter most, count for most.
double typical(const Tensor& t) {
  double sum = 0, squares = 0;
  for (int64_t i = 0; i < t.numel(); ++i) {
    const double x = (double)data<float>(t)[i];
    sum += x, squares += x * x;
  }
  return squares / std::max(sum, 1e-30);
}

// What codes leave out acts like noise on every product: its standard deviation, in nats.
std::vector<float> noise(const Codes& x, const Codes& w, int64_t d, float temperature, bool int8) {
  double norm_sq = typical(w.norm_sq), residual_sq = typical(w.residual_sq);
  if (!int8) residual_sq += norm_sq * (double)(BF16_ROUNDING * PEAK * BF16_ROUNDING * PEAK);
  std::vector<float> sigma(x.scale.numel());
  for (size_t i = 0; i < sigma.size(); ++i) {
    const double square = (double)data<float>(x.residual_sq)[i] * norm_sq +
                          (double)data<float>(x.norm_sq)[i] * residual_sq;
    sigma[i] = (float)(std::sqrt(square / (double)d) / (double)temperature);
  }
  return sigma;
}

// How products of codes become logits.
struct Scaling {
  const float *w_scale, *bias;  // of the chunk; bias may be null
  float x_scale, inverse_temperature, softcap;
};

DGG_INLINE vf products(const int32_t* at) {
  vi raw;
  memcpy(&raw, at, sizeof(raw));
  return __builtin_convertvector(raw, vf);
}
DGG_INLINE vf products(const BFloat16* at) { return values(at, 0, LANES); }

template <typename P>
DGG_INLINE void to_logits_of(const P* raw, int64_t n, const Scaling& by, float* z) {
  const float inverse_cap = by.softcap != 0 ? 1 / by.softcap : 0.0f;
  for (int64_t j = 0; j < n; j += LANES) {
    P last[LANES] = {};
    const P* at = raw + j;
    if (j + LANES > n) {
      memcpy(last, at, (n - j) * sizeof(P));
      at = last;
    }
    __builtin_prefetch(raw + n + j);  // the next row's, which comes from the last-level cache
    vf x = products(at) * (values(by.w_scale, j, n) * by.x_scale);
    if (by.bias) x += values(by.bias, j, n);
    if (by.softcap != 0) x = by.softcap * tanh(x * inverse_cap);
    store(z + j, x * by.inverse_temperature);
  }
}
// z has room for a whole last vector.
DGG_CLONES void to_logits(const int32_t* raw, int64_t n, const Scaling& by, float* z) {
  to_logits_of(raw, n, by, z);
}
DGG_CLONES void to_logits(const BFloat16* raw, int64_t n, const Scaling& by, float* z) {
  to_logits_of(raw, n, by, z);
}

void multiply_codes(const Tensor& out, const Tensor& x, const Tensor& w) {
  const Tensor wt = torch::stable::transpose(w, 0, 1);
  TORCH_ERROR_CODE_CHECK(out.scalar_type() == ScalarType::Int
                             ? aoti_torch_cpu__int_mm_out(out.get(), x.get(), wt.get())
                             : aoti_torch_cpu_mm_out(out.get(), x.get(), wt.get()));
}

template <typename P>
void scan_codes(const Head& head, const Codes& x, const Codes& w, std::vector<Row>& rows,
                uint32_t seed) {
  const int64_t n = x.codes.size(0), vocabulary = w.codes.size(0);
  const size_t most = (size_t)(KEPT_LIMIT * (double)vocabulary);
  const BlockBuffer buffer(x.codes, n, vocabulary,
                           std::is_same_v<P, int32_t> ? ScalarType::Int : ScalarType::BFloat16);
  for_each_block(n, vocabulary, [&](const Block& at) {
    const Tensor block = buffer.of(at);
    multiply_codes(block, rows_of(x.codes, at.row, at.rows),
                   rows_of(w.codes, at.column, at.columns));
    parallel_for(0, at.rows, 4, [&](int64_t begin, int64_t end) {
      ScanScratch scratch(at.columns);
      std::vector<float> z(at.columns + LANES);
      for (int64_t i = begin; i < end; ++i) {
        Row& row = rows[at.row + i];
        if (!row.screened()) continue;
        to_logits(data<P>(block) + i * at.columns, at.columns,
                  {data<float>(w.scale) + at.column,
                   head.bias.empty() ? nullptr : head.bias.data() + at.column,
                   data<float>(x.scale)[at.row + i], 1 / head.temperature, head.softcap},
                  z.data());
        scan(row, z.data(), at.columns, at.column, seed, scratch);
        if (row.entries.size() > most) row = row.unscanned();
      }
    });
  });
}

// In nats: the variance of the sums is that of what was drawn, whose screened part is known.
float error_bound(const Row& row, float sigma) {
  const double tail = std::max(1 - row.certain, 0.0);
  return BOUND * sigma * (float)std::sqrt(tail / (double)row.inverse_eps);
}

// -- refine -------------------------------------------------------------------------------------

DGG_INLINE float fold(vf x) {
  using v8 = float __attribute__((vector_size(32)));
  using v4 = float __attribute__((vector_size(16)));
  v8 half[2];
  memcpy(half, &x, sizeof(x));
  half[0] += half[1];
  v4 quarter[2];
  memcpy(quarter, half, sizeof(quarter));
  quarter[0] += quarter[1];
  return (quarter[0][0] + quarter[0][2]) + (quarter[0][1] + quarter[0][3]);
}

// z[k] = w . rows[index[k]]: four rows at a time, to load w less often.
template <typename T>
DGG_INLINE void dots_of(const T* w, const T* rows, const int32_t* index, int64_t count, int64_t d,
                        float* z) {
  for (int64_t k = 0; k < count; k += 4) {
    auto row = [&](int64_t g) { return rows + (int64_t)index[std::min(k + g, count - 1)] * d; };
    const T *a = row(0), *b = row(1), *e = row(2), *f = row(3);
    vf za{}, zb{}, ze{}, zf{};
    for (int64_t j = 0; j < d; j += LANES) {
      const vf by = values(w, j, d);
      za += by * values(a, j, d);
      zb += by * values(b, j, d);
      ze += by * values(e, j, d);
      zf += by * values(f, j, d);
    }
    const float group[4] = {fold(za), fold(zb), fold(ze), fold(zf)};
    memcpy(z + k, group, std::min<int64_t>(4, count - k) * sizeof(float));
  }
}
DGG_CLONES void dots(const float* w, const float* rows, const int32_t* index, int64_t count,
                     int64_t d, float* z) {
  dots_of(w, rows, index, count, d, z);
}
DGG_CLONES void dots(const BFloat16* w, const BFloat16* rows, const int32_t* index, int64_t count,
                     int64_t d, float* z) {
  dots_of(w, rows, index, count, d, z);
}
DGG_CLONES void dots(const Half* w, const Half* rows, const int32_t* index, int64_t count,
                     int64_t d, float* z) {
  dots_of(w, rows, index, count, d, z);
}

// By vocabulary index: the weight streams by once, and hidden states are gathered from cache.
template <typename T>
void compute_logits(const Inputs& in, const Head& head, const ByColumn& entries, float* z) {
  const T *w = data<T>(head.weight), *x = data<T>(in.hidden);
  entries.for_each_range([&](int64_t begin, int64_t end) {
    std::vector<float> exact;
    for (int64_t v = begin; v < end; ++v) {
      const int64_t first = entries.start[v], count = entries.start[v + 1] - first;
      if (count == 0) continue;
      exact.resize(count);
      dots(w + v * in.d, x, entries.row.data() + first, count, in.d, exact.data());
      if (!head.bias.empty())
        for (float& one : exact) one += head.bias[v];
      finish_logits(exact.data(), count, nullptr, head.temperature, head.softcap);
      for (int64_t k = 0; k < count; ++k) z[entries.entry[first + k]] = exact[k];
    }
  });
}

// What entries of a row, computed anew, change: in its sums, and in its report.
struct Correction {
  double s, t, q, error_sq, missed;
};
DGG_CLONES Correction correction(const float* z, const float* screened, const float* weight,
                                 int64_t n, float maximum, float important) {
  const vf lowest = splat(-1e4f);  // a difference of two banned tokens would be NaN
  vf s{}, t{}, q{}, error_sq{}, missed{};
  for (int64_t j = 0; j < n; j += LANES) {
    const vf by = values(weight, j, n);
    vf d = values(z, j, n) - maximum, d_far = values(screened, j, n) - maximum;
    const vf e = exp(d), e_far = exp(d_far);
    d = d < lowest ? lowest : d;
    d_far = d_far < lowest ? lowest : d_far;
    s += by * (e - e_far);
    t += by * (e * d - e_far * d_far);
    q += by * e * e;
    const vf off = d - d_far;
    error_sq += by == 0.0f ? vf{} : off * off;
    missed += (by > 1.0f) & (d > important) ? by - 1.0f : vf{};
  }
  return {sum(s), sum(t), sum(q), sum(error_sq), sum(missed)};
}

}  // namespace

void scan_screened(const Inputs& in, const Head& head, const std::vector<Tensor>& screen,
                   std::vector<Row>& rows, uint32_t seed) {
  STD_TORCH_CHECK(screen.size() == 4, "screen: expected codes, scale, norm_sq, residual_sq");
  const Codes w{screen[0], screen[1], screen[2], screen[3]};
  const bool int8 = w.codes.scalar_type() == ScalarType::Char;
  check_codes(w, head.vocabulary(), in.d);
  if (rows.empty() || (int8 && !int8_products_are_exact(in.d))) return;
  std::vector<int64_t> index;
  for (const Row& row : rows) index.push_back(row.index);
  const Codes x = quantize_rows(in.gather(index), int8);
  const std::vector<float> sigma = noise(x, w, in.d, head.temperature, int8);
  const int64_t n = (int64_t)rows.size();
  const float inverse_eps = rows[0].inverse_eps;
  for (int64_t i = 0; i < n; ++i) {
    if (!(sigma[i] <= NOISE_LIMIT)) continue;
    rows[i].bound = 0;
    rows[i].inverse_eps = inverse_eps * std::exp(MARGIN * sigma[i]);
  }
  if (int8) {
    scan_codes<int32_t>(head, x, w, rows, seed);
  } else {
    scan_codes<BFloat16>(head, x, w, rows, seed);
  }
  parallel_for(0, n, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (!rows[i].screened()) continue;
      finish(rows[i], seed);
      rows[i].bound = error_bound(rows[i], sigma[i]);
      if (!(rows[i].bound <= LIMIT)) rows[i] = rows[i].unscanned();
    }
  });
  for (Row& row : rows)
    if (!row.screened()) row.inverse_eps = inverse_eps;
}

void refine(const Inputs& in, const Head& head, std::vector<Row>& rows, const Tensor& active,
            double grad_eps, float* report) {
  const double log_eps = std::log(grad_eps);
  const ActiveSet set(active, in.n);
  std::vector<bool> wanted(in.n, false);
  for (const Row& row : rows) wanted[row.index] = row.screened();
  const ByColumn entries(set, head.vocabulary(), [&](int64_t i) { return wanted[i]; });
  const std::vector<float> screened(set.z, set.z + set.size());
  by_dtype(in.hidden, [&](auto t) { compute_logits<decltype(t)>(in, head, entries, set.z); });
  parallel_for(0, (int64_t)rows.size(), 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Row& row = rows[i];
      float* out = report + 4 * row.index;
      out[0] = row.bound;
      if (!row.screened()) continue;
      const int64_t first = set.row_start[row.index], last = set.row_start[row.index + 1];
      const Correction found =
          correction(set.z + first, screened.data() + first, set.weight + first, last - first,
                     row.maximum, (float)(row.lse() + log_eps - (double)row.maximum));
      row.s += found.s, row.t += found.t, row.q = found.q;
      row.z_target = set.z[last - 1];
      out[1] = (float)(last - first);
      out[2] = (float)found.error_sq, out[3] = (float)found.missed;
    }
  });
}

}  // namespace dgg
