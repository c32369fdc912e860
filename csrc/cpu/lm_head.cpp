// The lm_head ops on the CPU.
//
// Forward: a product of all rows with one chunk of the vocabulary at a time (torch's own mm), then
// one pass over that block while it is in cache: online log-sum-exp, entropy, sum of p^2, and the
// choice of the active set. Backward: sparse, over the active set alone; or, with grad_eps = 0,
// dense by the same chunks. Every row and every weight row has one owner and one order of
// summation: results are the same bits on any number of threads.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "simd.h"

namespace dgg {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::stable::parallel_for;

constexpr int64_t BLOCK_ROWS = 1024;  // rows x columns of the logits held at a time: 8 MiB,
constexpr int64_t BLOCK_COLS = 2048;  // which stays in the last-level cache

// -- elements -----------------------------------------------------------------------------------

DGG_INLINE float to_float(float x) { return x; }
DGG_INLINE float to_float(BFloat16 x) {
  const uint32_t u = (uint32_t)x.x << 16;
  float f;
  memcpy(&f, &u, sizeof(f));
  return f;
}
DGG_INLINE float to_float(Half x) { return (float)x; }

template <typename T>
DGG_INLINE T from_float(float x) {
  return T(x);
}

template <typename F>
auto by_dtype(const Tensor& t, F&& f) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Half:
      return f(Half{});
    default:
      STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float,
                      "lm_head: expected bfloat16, float16 or float32");
      return f(float{});
  }
}

template <typename T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <typename T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

Tensor new_floats(const Tensor& like, std::vector<int64_t> shape) {
  return torch::stable::new_empty(like, shape, ScalarType::Float);
}

// to[i] = from[index[i]] in fp32; index may be null: the identity.
template <typename T>
void gather_rows(float* to, const T* from, const int64_t* index, int64_t rows, int64_t d) {
  parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* row = from + (index ? index[i] : i) * d;
      for (int64_t k = 0; k < d; ++k) to[i * d + k] = to_float(row[k]);
    }
  });
}

// out [rows, n] = a [rows, d] @ b [n, d]^T, all fp32 and contiguous.
void mm_nt(const Tensor& out, const Tensor& a, const Tensor& b) {
  const Tensor bt = torch::stable::transpose(b, 0, 1);
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), bt.get()));
}

// out += a @ b, or out = a @ b.
void addmm(const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate) {
  if (accumulate) {
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
  }
}

// -- a head: what z = cap(h . W_v + b_v) / T needs -----------------------------------------------

struct Head {
  Tensor weight;               // [V, D] contiguous
  std::vector<float> bias;     // [V] or empty
  float temperature, softcap;  // softcap 0: none
  Tensor scratch;              // [BLOCK_COLS, D] fp32, where the weight is not fp32 itself

  Head(const Tensor& w, const std::optional<Tensor>& b, double temperature, double softcap)
      : weight(torch::stable::contiguous(w)),
        temperature((float)temperature),
        softcap((float)softcap) {
    if (b) {
      const Tensor contiguous = torch::stable::contiguous(*b);
      bias.resize(b->numel());
      by_dtype(contiguous, [&](auto t) {
        const auto* from = data<decltype(t)>(contiguous);
        for (size_t v = 0; v < bias.size(); ++v) bias[v] = to_float(from[v]);
      });
    }
  }

  int64_t vocabulary() const { return weight.size(0); }
  int64_t dim() const { return weight.size(1); }

  // Rows [start, start + size) of the weight in fp32.
  Tensor chunk(int64_t start, int64_t size) {
    Tensor w = weight;
    w = torch::stable::narrow(w, 0, start, size);
    if (w.scalar_type() == ScalarType::Float) return w;
    if (!scratch.defined()) scratch = new_floats(weight, {BLOCK_COLS, dim()});
    by_dtype(w, [&](auto t) {
      gather_rows(mutable_data<float>(scratch), data<decltype(t)>(w), nullptr, size, dim());
    });
    return torch::stable::narrow(scratch, 0, 0, size);
  }
};

// h . W_v -> z of a row of one chunk, in place; bias is the chunk's, or null.
DGG_CLONES void finish_logits(float* z, int64_t n, const float* bias, float temperature,
                              float softcap) {
  const float cap = softcap, inverse = softcap ? 1.0f / softcap : 0.0f;
  float tail[LANES];
  for (int64_t j = 0; j < n; j += LANES) {
    const int64_t width = std::min<int64_t>(LANES, n - j);
    float* at = z + j;
    if (width < LANES) {
      memcpy(tail, at, width * sizeof(float));
      at = tail;
    }
    vf x = load(at);
    if (bias) {
      float b[LANES] = {};
      memcpy(b, bias + j, width * sizeof(float));
      x = x + load(b);
    }
    if (cap != 0) x = cap * tanh(x * inverse);
    store(at, x / temperature);
    if (width < LANES) memcpy(z + j, tail, width * sizeof(float));
  }
}

// -- one row's running sums ----------

struct Entry {
  int32_t column;
  float z;
};

struct Row {
  int64_t index;  // in the caller's order: what the draw is keyed by
  int64_t target;
  float maximum = -INFINITY;
  float z_target = 0;
  double s = 0, t = 0, q = 0;  // sums of e, e (z - maximum), e^2 with e = exp(z - maximum)
  std::vector<Entry> entries;

  double lse() const { return (double)maximum + std::log(s); }
};

// The draw: uniform in [0, 1), a function of (row, column, seed) alone, so that the same seed gives
// the same set on any chunking and any device.
DGG_INLINE uint32_t row_key(int64_t row, uint32_t seed) {
  return ((uint32_t)row * 0x9E3779B1u) ^ seed;
}
template <typename U>
DGG_INLINE U mix(U x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return (x ^ (x >> 16)) >> 8;
}
constexpr float UNIT = 1.0f / 16777216.0f;
// u is a multiple of 2^-24: u < pi for this share of them, which is a little more than pi.
DGG_INLINE float keep_probability(float pi) {
  return std::max(std::ceil(pi * 16777216.0f), 1.0f) * UNIT;
}

DGG_CLONES float maximum_of(const float* z, int64_t n, float floor) {
  vf best = splat(floor);
  int64_t j = 0;
  for (; j + LANES <= n; j += LANES) {
    const vf x = load(z + j);
    best = x > best ? x : best;
  }
  float result = floor;
  for (int i = 0; i < LANES; ++i) result = best[i] > result ? best[i] : result;
  for (; j < n; ++j) result = z[j] > result ? z[j] : result;
  return result;
}

// e[j] = exp(z[j] - m); adds to sums = {e, e (z - m), e^2}. e has room for a whole last vector.
DGG_CLONES void exponentials(const float* z, int64_t n, float m, float* e, double* sums) {
  vf s{}, t{}, q{};
  const vf lowest = splat(-1e4f);  // 0 * (-inf) would be NaN at banned tokens
  for (int64_t j = 0; j < n; j += LANES) {
    vf x;
    if (j + LANES <= n) {
      x = load(z + j);
    } else {
      float last[LANES];
      for (int i = 0; i < LANES; ++i) last[i] = j + i < n ? z[j + i] : -INFINITY;
      x = load(last);
    }
    vf d = x - m;
    const vf p = exp(d);
    d = d < lowest ? lowest : d;
    store(e + j, p);
    s += p;
    t += p * d;
    q += p * p;
  }
  sums[0] += sum(s);
  sums[1] += sum(t);
  sums[2] += sum(q);
}

// Offsets j with draw(j) < e[j] * scale, in order; returns how many. Columns start at `first`.
DGG_CLONES int64_t choose(const float* e, int64_t n, float scale, uint32_t key, int64_t first,
                          int32_t* chosen) {
  constexpr int WIDE = 4 * LANES;
  int64_t count = 0;
  vu lane;
  for (int i = 0; i < LANES; ++i) lane[i] = (uint32_t)(first + i) * 0x85EBCA77u;
  lane += key;
  const vu advance = vu{} + (uint32_t)LANES * 0x85EBCA77u;
  for (int64_t j = 0; j < n; j += WIDE) {
    vi hit[4];
    for (int k = 0; k < 4; ++k) {
      const vf u = __builtin_convertvector((vi)mix(lane), vf) * UNIT;
      lane += advance;
      hit[k] = u < load(e + j + k * LANES) * scale;
    }
    if (!any((hit[0] | hit[1]) | (hit[2] | hit[3]))) continue;
    int32_t flags[WIDE];
    memcpy(flags, hit, sizeof(flags));
    const int64_t width = std::min<int64_t>(WIDE, n - j);
    for (int64_t i = 0; i < width; ++i) {
      chosen[count] = (int32_t)(j + i);
      count += flags[i] != 0;
    }
  }
  return count;
}

// Takes n logits of the columns from `first` on into the row. inverse_eps 0: no active set.
void scan(Row& row, const float* z, int64_t n, int64_t first, float inverse_eps, uint32_t seed,
          float* e, int32_t* chosen) {
  const float m = maximum_of(z, n, row.maximum);
  if (m != row.maximum && row.s > 0) {
    const double shift = (double)row.maximum - m, f = std::exp(shift);
    row.t = f * (row.t + row.s * shift);
    row.s *= f;
    row.q *= f * f;
  }
  row.maximum = m;
  double sums[3] = {row.s, row.t, row.q};
  exponentials(z, n, m == -INFINITY ? 0.0f : m, e, sums);
  row.s = sums[0], row.t = sums[1], row.q = sums[2];
  if (row.target >= first && row.target < first + n) row.z_target = z[row.target - first];
  if (inverse_eps == 0) return;
  // The final lse is not known yet; what is summed so far, or the target alone, is a lower bound of
  // it. Selecting against a lower bound keeps more; finish() draws again with the same numbers
  // against the final lse, which leaves exactly the set that one pass would have chosen.
  double bound = row.s;
  if (row.target < first + n) bound = std::max(bound, std::exp((double)row.z_target - m));
  const int64_t padded = (n + 4 * LANES - 1) / (4 * LANES) * (4 * LANES);
  std::fill(e + n, e + padded, 0.0f);
  const float scale = (float)(inverse_eps / bound);
  const int64_t count = choose(e, n, scale, row_key(row.index, seed), first, chosen);
  for (int64_t i = 0; i < count; ++i)
    row.entries.push_back({(int32_t)(first + chosen[i]), z[chosen[i]]});
}

// Keeps the target, always, and what the final lse selects.
void finish(Row& row, float inverse_eps, uint32_t seed) {
  const float lse = (float)row.lse();
  const uint32_t key = row_key(row.index, seed);
  size_t kept = 0;
  for (const Entry& entry : row.entries) {
    if (entry.column == row.target) continue;
    const float u = (float)mix(key + (uint32_t)entry.column * 0x85EBCA77u) * UNIT;
    if (u < std::exp(entry.z - lse) * inverse_eps) row.entries[kept++] = entry;
  }
  row.entries.resize(kept);
  row.entries.push_back({(int32_t)row.target, row.z_target});
}

// -- the active set as a tensor: [row_start int64 x (N + 1)] [column int32 x nnz] [z fp32 x nnz]

struct ActiveSet {
  const int64_t* row_start;
  const int32_t* column;
  const float* z;

  ActiveSet(const Tensor& t, int64_t n) {
    const int32_t* base = data<int32_t>(t);
    row_start = reinterpret_cast<const int64_t*>(base);
    column = base + 2 * (n + 1);
    z = reinterpret_cast<const float*>(column + row_start[n]);
  }
};

Tensor pack(const Tensor& like, std::vector<Row>& rows, int64_t n) {
  int64_t total = 0;
  for (const Row& row : rows) total += (int64_t)row.entries.size();
  Tensor packed = torch::stable::new_empty(like, {2 * (n + 1) + 2 * total}, ScalarType::Int);
  int32_t* base = mutable_data<int32_t>(packed);
  int64_t* start = reinterpret_cast<int64_t*>(base);
  int32_t* column = base + 2 * (n + 1);
  float* z = reinterpret_cast<float*>(column + total);
  int64_t at = 0, next = 0;
  for (Row& row : rows) {
    while (next <= row.index) start[next++] = at;
    for (const Entry& entry : row.entries) {
      column[at] = entry.column;
      z[at++] = entry.z;
    }
    std::vector<Entry>().swap(row.entries);
  }
  while (next <= n) start[next++] = at;
  return packed;
}

// -- forward ------------------------------------------------------------------------------------

struct Inputs {
  Tensor hidden;  // [N, D] contiguous
  const int64_t* target;
  Tensor target_storage;
  int64_t n, d;

  Inputs(const Tensor& h, const Tensor& weight, const Tensor& t)
      : hidden(torch::stable::contiguous(h)), target_storage(torch::stable::contiguous(t)) {
    STD_TORCH_CHECK(h.dim() == 2 && weight.dim() == 2 && h.size(1) == weight.size(1) &&
                        h.scalar_type() == weight.scalar_type(),
                    "lm_head: expected hidden [N, D] and weight [V, D] of one dtype");
    n = h.size(0), d = h.size(1);
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.dim() == 1 && t.size(0) == n,
                    "lm_head: expected target [N] int64");
    target = data<int64_t>(target_storage);
    for (int64_t i = 0; i < n; ++i)
      STD_TORCH_CHECK(target[i] >= -1 && target[i] < weight.size(0),
                      "lm_head: expected target in [-1, V), got ", target[i]);
  }

  // The given rows of hidden, fp32 [rows, D].
  Tensor gather(const std::vector<int64_t>& index) const {
    Tensor x = new_floats(hidden, {(int64_t)index.size(), d});
    by_dtype(hidden, [&](auto t) {
      gather_rows(mutable_data<float>(x), data<decltype(t)>(hidden), index.data(),
                  (int64_t)index.size(), d);
    });
    return x;
  }
};

// Calls use(logits [rows, columns], first row, rows, first column, columns) for every block; all
// row blocks of a chunk of the vocabulary follow one another.
template <typename F>
void for_each_block(Head& head, const Tensor& x, F&& use) {
  const int64_t n = x.size(0), vocabulary = head.vocabulary();
  Tensor buffer = new_floats(x, {std::min(n, BLOCK_ROWS) * std::min(vocabulary, BLOCK_COLS)});
  for (int64_t c = 0; c < vocabulary; c += BLOCK_COLS) {
    const int64_t columns = std::min(BLOCK_COLS, vocabulary - c);
    const Tensor w = head.chunk(c, columns);
    for (int64_t r = 0; r < n; r += BLOCK_ROWS) {
      const int64_t rows = std::min(BLOCK_ROWS, n - r);
      Tensor block = torch::stable::narrow(buffer, 0, 0, rows * columns);
      block = torch::stable::view(block, {rows, columns});
      Tensor all = x;
      const Tensor part = torch::stable::narrow(all, 0, r, rows);
      mm_nt(block, part, w);
      float* z = mutable_data<float>(block);
      const float* bias = head.bias.empty() ? nullptr : head.bias.data() + c;
      if (bias || head.softcap != 0 || head.temperature != 1) {
        parallel_for(0, rows, 8, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i)
            finish_logits(z + i * columns, columns, bias, head.temperature, head.softcap);
        });
      }
      use(block, part, w, r, rows, c, columns);
    }
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward_cpu(
    const Tensor& hidden, const Tensor& weight, const Tensor& target,
    const std::optional<Tensor>& bias, double temperature, double softcap, double grad_eps,
    const std::optional<Tensor>& /* lse_ref: the exact one is at hand when entries are drawn */,
    const std::optional<Tensor>& seed, const std::vector<Tensor>& screen) {
  STD_TORCH_CHECK(screen.empty(), "screen: not on a CPU yet");
  const Inputs in(hidden, weight, target);
  Head head(weight, bias, temperature, softcap);
  const bool select = seed.has_value() && grad_eps > 0;
  const float inverse_eps = select ? (float)(1 / grad_eps) : 0.0f;
  const uint32_t key = select ? (uint32_t)*data<int64_t>(*seed) : 0;
  std::vector<Row> rows;
  std::vector<int64_t> index;
  for (int64_t i = 0; i < in.n; ++i) {
    if (in.target[i] < 0) continue;
    rows.emplace_back();
    rows.back().index = i;
    rows.back().target = in.target[i];
    index.push_back(i);
  }
  if (!rows.empty()) {
    for_each_block(head, in.gather(index),
                   [&](const Tensor& block, const Tensor&, const Tensor&, int64_t r, int64_t count,
                       int64_t c, int64_t columns) {
                     const float* z = data<float>(block);
                     parallel_for(0, count, 4, [&](int64_t begin, int64_t end) {
                       std::vector<float> e(BLOCK_COLS + 4 * LANES);
                       std::vector<int32_t> chosen(BLOCK_COLS + 4 * LANES);
                       for (int64_t i = begin; i < end; ++i)
                         scan(rows[r + i], z + i * columns, columns, c, inverse_eps, key, e.data(),
                              chosen.data());
                     });
                   });
  }
  std::vector<Tensor> outputs;
  for (int i = 0; i < 4; ++i)
    outputs.push_back(torch::stable::new_zeros(in.hidden, {in.n}, ScalarType::Float));
  float *logp = mutable_data<float>(outputs[0]), *entropy = mutable_data<float>(outputs[1]),
        *lse = mutable_data<float>(outputs[2]), *sum_p2 = mutable_data<float>(outputs[3]);
  parallel_for(0, (int64_t)rows.size(), 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Row& row = rows[i];
      logp[row.index] = (float)((double)row.z_target - row.lse());
      entropy[row.index] = (float)(std::log(row.s) - row.t / row.s);
      lse[row.index] = (float)row.lse();
      sum_p2[row.index] = (float)(row.q / (row.s * row.s));
      if (select) finish(row, inverse_eps, key);
    }
  });
  Tensor active = select ? pack(in.hidden, rows, in.n)
                         : torch::stable::new_empty(in.hidden, {0}, ScalarType::Int);
  Tensor report = torch::stable::new_empty(in.hidden, {0, 4}, ScalarType::Float);
  return {outputs[0], outputs[1], outputs[2], outputs[3], active, report};
}

// -- backward -----------------------------------------------------------------------------------

// dL/d(h . W_v) of one entry. p: the probability its p-terms are weighted by (see docs/lm_head.md).
struct LogitGradient {
  const float *c, *c_entropy, *lse, *entropy;  // c_entropy may be null
  float temperature, softcap;

  bool works(int64_t i) const { return c[i] != 0 || (c_entropy && c_entropy[i] != 0); }
  float operator()(int64_t i, float z, float weighted_p, bool is_target) const {
    float g = -c[i] * weighted_p;
    if (c_entropy) g -= c_entropy[i] * weighted_p * (std::max(z - lse[i], -1e4f) + entropy[i]);
    if (is_target) g += c[i];
    if (softcap != 0) {
      const float ratio = z * (temperature / softcap);
      g *= 1 - ratio * ratio;
    }
    return g / temperature;
  }
};

// sum += sum_k scale[k] * row[k], each row [d]: four rows at a time, to touch `sum` less often.
template <typename T>
DGG_INLINE void weighted_sum_of(float* sum, int64_t d, int64_t count, const T* const* row,
                                const float* scale) {
  int64_t k = 0;
  for (; k + 4 <= count; k += 4) {
    const T *a = row[k], *b = row[k + 1], *e = row[k + 2], *f = row[k + 3];
    const float sa = scale[k], sb = scale[k + 1], se = scale[k + 2], sf = scale[k + 3];
    for (int64_t i = 0; i < d; ++i)
      sum[i] +=
          (sa * to_float(a[i]) + sb * to_float(b[i])) + (se * to_float(e[i]) + sf * to_float(f[i]));
  }
  for (; k < count; ++k)
    for (int64_t i = 0; i < d; ++i) sum[i] += scale[k] * to_float(row[k][i]);
}
DGG_CLONES void weighted_sum(float* sum, int64_t d, int64_t count, const float* const* row,
                             const float* scale) {
  weighted_sum_of(sum, d, count, row, scale);
}
DGG_CLONES void weighted_sum(float* sum, int64_t d, int64_t count, const BFloat16* const* row,
                             const float* scale) {
  weighted_sum_of(sum, d, count, row, scale);
}
DGG_CLONES void weighted_sum(float* sum, int64_t d, int64_t count, const Half* const* row,
                             const float* scale) {
  weighted_sum_of(sum, d, count, row, scale);
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
      const T rounded = from_float<T>(row[k]);
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

struct Gradients {
  Tensor d_hidden, d_bias;
  WeightGradient weight;
};

// Sparse: over the active set.
template <typename T>
void backward_sparse(const Inputs& in, const Head& head, const LogitGradient& gradient,
                     const ActiveSet& set, float eps, bool need_hidden, bool need_bias,
                     const Gradients& out) {
  const int64_t d = in.d, vocabulary = head.vocabulary(), nnz = set.row_start[in.n];
  const T *w = data<T>(head.weight), *x = data<T>(in.hidden);
  std::vector<float> g(nnz);
  parallel_for(0, in.n, 16, [&](int64_t begin, int64_t end) {
    std::vector<float> sum(d);
    std::vector<const T*> rows;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = set.row_start[i], last = set.row_start[i + 1];
      const bool works = last > first && gradient.works(i);
      if (works) {
        rows.clear();
        for (int64_t k = first; k < last; ++k) {
          const int32_t v = set.column[k];
          const bool is_target = v == in.target[i];
          float p = std::exp(set.z[k] - gradient.lse[i]);
          if (!is_target && p < eps) p /= keep_probability(p / eps);
          g[k] = gradient(i, set.z[k], p, is_target);
          rows.push_back(w + (int64_t)v * d);
        }
      }
      if (!need_hidden) continue;
      T* to = mutable_data<T>(out.d_hidden) + i * d;
      if (!works) {
        memset(static_cast<void*>(to), 0, d * sizeof(T));
        continue;
      }
      std::fill(sum.begin(), sum.end(), 0.0f);
      weighted_sum(sum.data(), d, last - first, rows.data(), g.data() + first);
      for (int64_t k = 0; k < d; ++k) to[k] = from_float<T>(sum[k]);
    }
  });
  if (!out.weight.store && !out.weight.squares_wanted && !need_bias) return;

  // Transpose by counting: entries ordered by vocabulary index, then by row.
  std::vector<int64_t> start(vocabulary + 1, 0);
  for (int64_t i = 0; i < in.n; ++i)
    if (gradient.works(i))
      for (int64_t k = set.row_start[i]; k < set.row_start[i + 1]; ++k) ++start[set.column[k] + 1];
  for (int64_t v = 0; v < vocabulary; ++v) start[v + 1] += start[v];
  std::vector<const T*> rows(start[vocabulary]);
  std::vector<float> scale(start[vocabulary]);
  std::vector<int64_t> next(start.begin(), start.end() - 1);
  for (int64_t i = 0; i < in.n; ++i) {
    if (!gradient.works(i)) continue;
    for (int64_t k = set.row_start[i]; k < set.row_start[i + 1]; ++k) {
      const int64_t at = next[set.column[k]]++;
      rows[at] = x + i * d;
      scale[at] = g[k];
    }
  }
  // Tasks of equal cost: frequent tokens crowd at the vocabulary's start. An empty row still costs
  // the zeros written to it.
  const int64_t tasks = 16 * (int64_t)torch::stable::get_num_threads();
  const double cost = (double)start[vocabulary] + (double)vocabulary;
  std::vector<int64_t> bounds(tasks + 1, vocabulary);
  bounds[0] = 0;
  for (int64_t task = 1, v = 0; task < tasks; ++task) {
    while (v < vocabulary && (double)(start[v] + v) < cost * task / tasks) ++v;
    bounds[task] = v;
  }
  parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> sum(d);
    for (int64_t v = bounds[begin]; v < bounds[end]; ++v) {
      const int64_t count = start[v + 1] - start[v];
      if (need_bias) {
        double total = 0;
        for (int64_t k = start[v]; k < start[v + 1]; ++k) total += (double)scale[k];
        by_dtype(out.d_bias, [&](auto b) {
          mutable_data<decltype(b)>(out.d_bias)[v] = from_float<decltype(b)>((float)total);
        });
      }
      if (count == 0) {
        out.weight.template write_zero<T>(v, d);
        continue;
      }
      std::fill(sum.begin(), sum.end(), 0.0f);
      weighted_sum(sum.data(), d, count, rows.data() + start[v], scale.data() + start[v]);
      out.weight.template write<T>(v, sum.data(), d);
    }
  });
}

// z -> dL/d(h . W_v) of a row of one chunk, in place.
DGG_CLONES void dense_gradient(float* z, int64_t n, float c, float c_entropy, float lse,
                               float entropy, float temperature, float softcap) {
  const float ratio = softcap != 0 ? temperature / softcap : 0.0f;
  const vf lowest = splat(-1e4f);
  float tail[LANES];
  for (int64_t j = 0; j < n; j += LANES) {
    const int64_t width = std::min<int64_t>(LANES, n - j);
    float* at = z + j;
    if (width < LANES) {
      memcpy(tail, at, width * sizeof(float));
      at = tail;
    }
    const vf x = load(at);
    vf logp = x - lse;
    const vf p = exp(logp);
    logp = logp < lowest ? lowest : logp;
    vf g = -(c * p) - c_entropy * p * (logp + entropy);
    if (ratio != 0) {
      const vf r = x * ratio;
      g = g * (1.0f - r * r);
    }
    store(at, g / temperature);
    if (width < LANES) memcpy(z + j, tail, width * sizeof(float));
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
  for_each_block(head, x,
                 [&](const Tensor& block, const Tensor& part, const Tensor& w, int64_t r,
                     int64_t rows, int64_t c, int64_t columns) {
                   float* z = mutable_data<float>(block);
                   parallel_for(0, rows, 8, [&](int64_t begin, int64_t end) {
                     for (int64_t k = begin; k < end; ++k) {
                       const int64_t i = index[r + k], y = in.target[i] - c;
                       float* row = z + k * columns;
                       const bool has_target = y >= 0 && y < columns;
                       const float z_target = has_target ? row[y] : 0.0f;
                       dense_gradient(row, columns, gradient.c[i],
                                      gradient.c_entropy ? gradient.c_entropy[i] : 0.0f,
                                      gradient.lse[i], gradient.entropy[i], gradient.temperature,
                                      gradient.softcap);
                       if (has_target)
                         row[y] = gradient(i, z_target, std::exp(z_target - gradient.lse[i]), true);
                     }
                   });
                   if (need_hidden) {
                     const Tensor part_dx = torch::stable::narrow(d_x, 0, r, rows);
                     addmm(part_dx, block, w, c > 0);
                   }
                   const bool last = r + rows == n;
                   if (need_bias) {
                     if (r == 0) std::fill(d_b.begin(), d_b.end(), 0.0);
                     for (int64_t k = 0; k < rows; ++k)
                       for (int64_t j = 0; j < columns; ++j) d_b[j] += (double)z[k * columns + j];
                     if (last)
                       by_dtype(out.d_bias, [&](auto b) {
                         using B = decltype(b);
                         for (int64_t j = 0; j < columns; ++j)
                           mutable_data<B>(out.d_bias)[c + j] = from_float<B>((float)d_b[j]);
                       });
                   }
                   if (!need_weight) return;
                   const Tensor part_dw = torch::stable::narrow(d_w, 0, 0, columns);
                   addmm(part_dw, torch::stable::transpose(block, 0, 1), part, r > 0);
                   if (!last) return;
                   float* finished = mutable_data<float>(part_dw);
                   parallel_for(0, columns, 16, [&](int64_t begin, int64_t end) {
                     for (int64_t j = begin; j < end; ++j)
                       out.weight.template write<T>(c + j, finished + j * d, d);
                   });
                 });
  if (!need_hidden) return;
  const float* from = data<float>(d_x);
  parallel_for(0, n, 64, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k)
      for (int64_t j = 0; j < d; ++j)
        mutable_data<T>(out.d_hidden)[index[k] * d + j] = from_float<T>(from[k * d + j]);
  });
}

const float* coefficients(const Tensor& t, int64_t n, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.numel() == n, name,
                  ": expected contiguous float32 [N]");
  return data<float>(t);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_cpu(
    const Tensor& grad_logp, const std::optional<Tensor>& grad_entropy, const Tensor& hidden,
    const Tensor& weight, const Tensor& target, const std::optional<Tensor>& bias,
    const Tensor& lse, const Tensor& entropy, const Tensor& active,
    const std::optional<Tensor>& seed, double temperature, double softcap, double grad_eps,
    bool /* screened */, bool need_hidden, bool need_weight, bool need_bias, bool need_row_sq) {
  const Inputs in(hidden, weight, target);
  Head head(weight, bias, temperature, softcap);
  const Tensor c = torch::stable::contiguous(grad_logp);
  std::optional<Tensor> c_entropy;
  if (grad_entropy) c_entropy = torch::stable::contiguous(*grad_entropy);
  const LogitGradient gradient{coefficients(c, in.n, "grad_logp"),
                               c_entropy ? coefficients(*c_entropy, in.n, "grad_entropy") : nullptr,
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
  out.weight.row_sq = new_floats(in.hidden, {need_row_sq ? vocabulary : 0});
  out.weight.store = need_weight;
  out.weight.squares_wanted = need_row_sq;
  by_dtype(in.hidden, [&](auto t) {
    using T = decltype(t);
    if (seed.has_value() && grad_eps > 0) {
      backward_sparse<T>(in, head, gradient, ActiveSet(active, in.n), (float)grad_eps, need_hidden,
                         need_bias, out);
    } else {
      backward_dense<T>(in, head, gradient, need_hidden, need_bias, out);
    }
  });
  return {out.d_hidden, out.weight.d_weight, out.d_bias, out.weight.row_sq};
}

}  // namespace
}  // namespace dgg

STABLE_TORCH_LIBRARY_IMPL(dgg, CPU, m) {
  m.impl("lm_head_forward", TORCH_BOX(&dgg::forward_cpu));
  m.impl("lm_head_backward", TORCH_BOX(&dgg::backward_cpu));
}
