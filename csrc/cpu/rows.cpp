#include "rows.h"

namespace dgg {
namespace {

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
#pragma GCC unroll 4  // each mask then stays in a register
    for (int k = 0; k < 4; ++k) count += positions(hit[k], (int32_t)j + k * LANES, chosen + count);
  }
  return count;
}

}  // namespace

void scan(Row& row, const float* z, int64_t n, int64_t first, uint32_t seed, ScanScratch& scratch) {
  float* e = scratch.e.data();
  int32_t* chosen = scratch.chosen.data();
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
  if (row.inverse_eps == 0) return;
  // The final lse is not known yet; what is summed so far, or the target alone, is a lower bound of
  // it. Selecting against a lower bound keeps more; finish() draws again with the same numbers
  // against the final lse, which leaves exactly the set that one pass would have chosen.
  double bound = row.s;
  if (row.target < first + n) bound = std::max(bound, std::exp((double)row.z_target - m));
  const int64_t padded = (n + 4 * LANES - 1) / (4 * LANES) * (4 * LANES);
  std::fill(e + n, e + padded, 0.0f);
  const float scale = (float)(row.inverse_eps / bound);
  const int64_t count = choose(e, n, scale, row_key(row.index, seed), first, chosen);
  for (int64_t i = 0; i < count; ++i)
    row.entries.push_back({(int32_t)(first + chosen[i]), z[chosen[i]], 0.0f});
}

void finish(Row& row, uint32_t seed) {
  const float lse = (float)row.lse();
  const uint32_t key = row_key(row.index, seed);
  size_t kept = 0;
  for (const Entry& entry : row.entries) {
    if (entry.column == row.target) continue;
    const float u = (float)mix(key + (uint32_t)entry.column * 0x85EBCA77u) * UNIT;
    const float p = std::exp(entry.z - lse), pi = p * row.inverse_eps;
    if (!(u < pi)) continue;
    const float weight = pi < 1 ? 1 / keep_probability(pi) : 1.0f;
    if (weight == 1) row.certain += (double)p;
    row.entries[kept++] = {entry.column, entry.z, weight};
  }
  row.entries.resize(kept);
  row.entries.push_back({(int32_t)row.target, row.z_target, 1.0f});
  row.certain += (double)std::exp(row.z_target - lse);
}

}  // namespace dgg
