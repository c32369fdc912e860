// Sixteen fp32 lanes in GCC/Clang vector extensions: one source, compiled for AVX-512, AVX2 and the
// baseline, chosen at run time where the loader can (DGG_CLONES), the baseline elsewhere.
#pragma once
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(DGG_NO_CLONES)
#define DGG_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), flatten))
#else
#define DGG_CLONES
#endif
#define DGG_INLINE static inline __attribute__((always_inline))

namespace dgg {

constexpr int LANES = 16;
using vf = float __attribute__((vector_size(64)));
using vi = int32_t __attribute__((vector_size(64)));
using vu = uint32_t __attribute__((vector_size(64)));

DGG_INLINE vf load(const float* p) {
  vf v;
  memcpy(&v, p, sizeof(v));
  return v;
}
DGG_INLINE void store(float* p, vf v) { memcpy(p, &v, sizeof(v)); }
DGG_INLINE vf splat(float x) { return vf{} + x; }
DGG_INLINE vu bits(vf x) {
  vu u;
  memcpy(&u, &x, sizeof(u));
  return u;
}
DGG_INLINE vf from_bits(vu u) {
  vf x;
  memcpy(&x, &u, sizeof(x));
  return x;
}

// A comparison's lanes as bytes, 8 in each half.
struct Lanes {
  uint64_t half[2];
};
DGG_INLINE Lanes lanes(vi mask) {
  using Bytes = int8_t __attribute__((vector_size(LANES)));
  const Bytes narrow = __builtin_convertvector(mask, Bytes);
  Lanes result;
  memcpy(&result, &narrow, sizeof(result));
  return result;
}
DGG_INLINE bool any(vi mask) {
  const Lanes set = lanes(mask);
  return set.half[0] | set.half[1];
}
// Writes the lanes that are set, each plus `first`, in order; returns how many.
DGG_INLINE int positions(vi mask, int32_t first, int32_t* out) {
  const Lanes set = lanes(mask);
  int count = 0;
  for (int h = 0; h < 2; ++h)
    for (uint64_t left = set.half[h] & 0x0101010101010101u; left; left &= left - 1)
      out[count++] = first + h * 8 + __builtin_ctzll(left) / 8;
  return count;
}

// In a fixed order, so that a sum does not depend on the machine.
DGG_INLINE double sum(vf v) {
  double total = 0;
  for (int i = 0; i < LANES; ++i) total += (double)v[i];
  return total;
}

// e^x to about 1 ulp; 0 below -87 (no denormals), NaN stays NaN. Polynomial: Cephes expf.
DGG_INLINE vf exp(vf x) {
  const vf high = splat(88.0f);
  const vi tiny = x < splat(-87.0f);
  const vf c = x > high ? high : x;
  const vf shifted = c * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: rounds to nearest
  const vf n = shifted - 12582912.0f;
  const vf r = (c - n * 0.693359375f) - n * -2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const vf y = (p * (r * r) + r) + 1.0f;
  const vu power = (bits(shifted) - 0x4B400000u + 127u) << 23;
  return tiny ? vf{} : y * from_bits(power);
}

// By its series near 0, where the difference of exponentials would cancel.
DGG_INLINE vf tanh(vf x) {
  const vf s = x * x;
  vf series = s * (62.0f / 2835.0f) - 17.0f / 315.0f;
  series = series * s + 2.0f / 15.0f;
  series = series * s - 1.0f / 3.0f;
  series = x + x * (series * s);
  const vi near_zero = (x < splat(0.3f)) & (x > splat(-0.3f));
  return near_zero ? series : 1.0f - 2.0f / (exp(x + x) + 1.0f);
}

}  // namespace dgg
