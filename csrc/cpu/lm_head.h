// What the lm_head ops on the CPU share: elements of any dtype, a head, and blocks of its logits.
#pragma once
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "../checks.h"
#include "simd.h"

namespace dgg __attribute__((visibility("hidden"))) {

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

  // 16 values of a row of d from `at` on; zeros beyond its end.
  template <typename T>
  DGG_INLINE vf values(const T* row, int64_t at, int64_t d) {
    float v[LANES] = {};
    if (at + LANES <= d) {
      for (int i = 0; i < LANES; ++i) v[i] = to_float(row[at + i]);
    } else {
      for (int64_t i = 0; i < d - at; ++i) v[i] = to_float(row[at + i]);
    }
    return load(v);
  }

  // Writes those of 16 values that are of a row of n, from `at` on.
  DGG_INLINE void store_values(float* row, int64_t at, int64_t n, vf v) {
    memcpy(row + at, &v, std::min<int64_t>(LANES, n - at) * sizeof(float));
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

  inline Tensor new_floats(const Tensor& like, std::vector<int64_t> shape) {
    return torch::stable::new_empty(like, shape, ScalarType::Float);
  }

  // Rows [start, start + size).
  inline Tensor rows_of(const Tensor& t, int64_t start, int64_t size) {
    Tensor whole = t;
    return torch::stable::narrow(whole, 0, start, size);
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
  inline void mm_nt(const Tensor& out, const Tensor& a, const Tensor& b) {
    const Tensor bt = torch::stable::transpose(b, 0, 1);
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), bt.get()));
  }

  // -- a head: what z = cap(h . W_v + b_v) / T needs
  // -----------------------------------------------

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
        STD_TORCH_CHECK(b->is_cpu() && b->dim() == 1 && b->size(0) == w.size(0),
                        "bias: expected [V] on the CPU");
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
      const Tensor w = rows_of(weight, start, size);
      if (w.scalar_type() == ScalarType::Float) return w;
      if (!scratch.defined()) scratch = new_floats(weight, {BLOCK_COLS, dim()});
      by_dtype(w, [&](auto t) {
        gather_rows(mutable_data<float>(scratch), data<decltype(t)>(w), nullptr, size, dim());
      });
      return rows_of(scratch, 0, size);
    }
  };

  // h . W_v -> z of a row of one chunk, in place; bias is the chunk's, or null.
  void finish_logits(float* z, int64_t n, const float* bias, float temperature, float softcap);

  struct Inputs {
    Tensor hidden;  // [N, D] contiguous
    const int64_t* target;
    Tensor target_storage;
    int64_t n, d;

    Inputs(const Tensor& h, const Tensor& weight, const Tensor& t)
        : hidden(torch::stable::contiguous(h)), target_storage(torch::stable::contiguous(t)) {
      STD_TORCH_CHECK(h.is_cpu() && weight.is_cpu() && t.is_cpu() && h.dim() == 2 &&
                          weight.dim() == 2 && h.size(1) == weight.size(1) &&
                          h.scalar_type() == weight.scalar_type(),
                      "lm_head: expected hidden [N, D] and weight [V, D] of one dtype, on the CPU");
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

  struct Block {
    int64_t row, rows, column, columns;
  };

  // All row blocks of a chunk of the vocabulary follow one another.
  template <typename F>
  void for_each_block(int64_t n, int64_t vocabulary, F&& use) {
    for (int64_t c = 0; c < vocabulary; c += BLOCK_COLS)
      for (int64_t r = 0; r < n; r += BLOCK_ROWS)
        use(Block{r, std::min(BLOCK_ROWS, n - r), c, std::min(BLOCK_COLS, vocabulary - c)});
  }

  // Where the products of every block go: [rows, columns], one after the other in the same memory.
  struct BlockBuffer {
    Tensor memory;

    BlockBuffer(const Tensor& like, int64_t n, int64_t vocabulary, ScalarType dtype)
        : memory(torch::stable::new_empty(
              like, {std::min(n, BLOCK_ROWS) * std::min(vocabulary, BLOCK_COLS)}, dtype)) {}
    Tensor of(const Block& block) const {
      return torch::stable::view(rows_of(memory, 0, block.rows * block.columns),
                                 {block.rows, block.columns});
    }
  };

  // Calls use(logits [rows, columns], those rows of x, rows of the weight in fp32, block).
  template <typename F>
  void for_each_logits(Head & head, const Tensor& x, F&& use) {
    const int64_t n = x.size(0), vocabulary = head.vocabulary();
    const BlockBuffer buffer(x, n, vocabulary, ScalarType::Float);
    Tensor w;
    for_each_block(n, vocabulary, [&](const Block& at) {
      if (at.row == 0) w = head.chunk(at.column, at.columns);
      const Tensor block = buffer.of(at), part = rows_of(x, at.row, at.rows);
      mm_nt(block, part, w);
      float* z = mutable_data<float>(block);
      const float* bias = head.bias.empty() ? nullptr : head.bias.data() + at.column;
      if (bias || head.softcap != 0 || head.temperature != 1) {
        parallel_for(0, at.rows, 8, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i)
            finish_logits(z + i * at.columns, at.columns, bias, head.temperature, head.softcap);
        });
      }
      use(block, part, w, at);
    });
  }

}  // namespace dgg
