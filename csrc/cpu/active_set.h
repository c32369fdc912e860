// The entries of all rows as one tensor, opaque to the caller:
// [row_start int64 x (N + 1)] [column int32 x nnz] [z fp32 x nnz] [weight fp32 x nnz].
#pragma once
#include <vector>

#include "lm_head.h"
#include "rows.h"

namespace dgg __attribute__((visibility("hidden"))) {

  struct ActiveSet {
    int64_t n;
    const int64_t* row_start;
    const int32_t* column;
    float* z;
    const float* weight;

    ActiveSet(const Tensor& packed, int64_t n) : n(n) {
      int32_t* base = mutable_data<int32_t>(packed);
      row_start = reinterpret_cast<const int64_t*>(base);
      column = base + 2 * (n + 1);
      z = reinterpret_cast<float*>(base + 2 * (n + 1) + row_start[n]);
      weight = z + row_start[n];
    }
    int64_t size() const { return row_start[n]; }
  };

  // The backward is handed the forward's entries by its caller: nothing outside them may be read.
  inline void check_active(const Tensor& t, int64_t n, int64_t vocabulary) {
    const int64_t head = 2 * (n + 1), size = t.numel();
    check_plain(t, ScalarType::Int, {size}, "active");
    STD_TORCH_CHECK(size >= head, "active: expected the forward's entries of ", n, " rows");
    const int32_t* base = mutable_data<int32_t>(t);
    const int64_t* start = reinterpret_cast<const int64_t*>(base);
    const int32_t* column = base + head;
    bool whole = start[0] == 0 && (size - head) % 3 == 0 && start[n] == (size - head) / 3;
    for (int64_t i = 0; whole && i < n; ++i) whole = start[i] <= start[i + 1];
    for (int64_t k = 0; whole && k < start[n]; ++k)
      whole = column[k] >= 0 && column[k] < vocabulary;
    STD_TORCH_CHECK(whole, "active: expected what the forward returned");
  }

  // Empties the rows, given in order, of n in the caller's.
  inline Tensor pack(const Tensor& like, std::vector<Row>& rows, int64_t n) {
    int64_t total = 0;
    for (const Row& row : rows) total += (int64_t)row.entries.size();
    Tensor packed = torch::stable::new_empty(like, {2 * (n + 1) + 3 * total}, ScalarType::Int);
    int32_t* base = mutable_data<int32_t>(packed);
    int64_t* start = reinterpret_cast<int64_t*>(base);
    int32_t* column = base + 2 * (n + 1);
    float* z = reinterpret_cast<float*>(column + total);
    float* weight = z + total;
    int64_t at = 0, next = 0;
    for (Row& row : rows) {
      while (next <= row.index) start[next++] = at;
      for (const Entry& entry : row.entries) {
        column[at] = entry.column;
        z[at] = entry.z;
        weight[at++] = entry.weight;
      }
      std::vector<Entry>().swap(row.entries);
    }
    while (next <= n) start[next++] = at;
    return packed;
  }

  // Entries of some rows ordered by vocabulary index, then by row: a transpose by counting.
  struct ByColumn {
    std::vector<int64_t> start;  // [V + 1]
    std::vector<int32_t> row;
    std::vector<int64_t> entry;  // its place in the active set

    template <typename Wanted>
    ByColumn(const ActiveSet& set, int64_t vocabulary, Wanted&& wanted) : start(vocabulary + 1, 0) {
      auto for_each = [&](auto&& use) {
        for (int64_t i = 0; i < set.n; ++i)
          if (wanted(i))
            for (int64_t k = set.row_start[i]; k < set.row_start[i + 1]; ++k) use(i, k);
      };
      for_each([&](int64_t, int64_t k) { ++start[set.column[k] + 1]; });
      for (int64_t v = 0; v < vocabulary; ++v) start[v + 1] += start[v];
      row.resize(start[vocabulary]);
      entry.resize(start[vocabulary]);
      std::vector<int64_t> next(start.begin(), start.end() - 1);
      for_each([&](int64_t i, int64_t k) {
        const int64_t at = next[set.column[k]]++;
        row[at] = (int32_t)i;
        entry[at] = k;
      });
    }

    // Calls use(first, last) for ranges of the vocabulary of equal cost: frequent tokens crowd at
    // its start. A token without entries still costs something, such as the zeros of its gradient.
    template <typename F>
    void for_each_range(F&& use) const {
      const int64_t vocabulary = (int64_t)start.size() - 1;
      const int64_t tasks = 16 * (int64_t)torch::stable::get_num_threads();
      const double cost = (double)start[vocabulary] + (double)vocabulary;
      std::vector<int64_t> bounds(tasks + 1, vocabulary);
      bounds[0] = 0;
      for (int64_t task = 1, v = 0; task < tasks; ++task) {
        while (v < vocabulary && (double)(start[v] + v) < cost * task / tasks) ++v;
        bounds[task] = v;
      }
      parallel_for(0, tasks, 1,
                   [&](int64_t begin, int64_t end) { use(bounds[begin], bounds[end]); });
    }
  };

}  // namespace dgg
