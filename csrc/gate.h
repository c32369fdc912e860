// The gate's state and its one transition function.
//
// Included by the CPU op (cpu/gate.cpp, which dgg_kernels.replay runs too) and the CUDA kernel
// (cuda/gate.cu), so that one piece of code decides everywhere and can be tested on a machine
// without a GPU. Needs neither torch nor CUDA headers.
//
// The whole gate is one fp64 vector: configuration, counters, references and windows. One tensor to
// move, save and restore; counters up to 2^53 are exact.
#pragma once
#include <math.h>
#include <stdint.h>

#if defined(__CUDACC__)
#define DGG_HD __host__ __device__ __forceinline__
#else
#define DGG_HD inline
#endif

namespace dgg {

enum Statistic { INCREMENT = 0, LEVEL = 1, EITHER = 2 };
enum Average { WINDOW = 0, EMA = 1 };

// Where a value lies in the state: once for the enum, once for the names that dgg_kernels.gate
// compares its own Slot with.
#define DGG_SLOTS(SLOT)                                                                   \
  /* Configuration: written once when the gate is built. */                               \
  SLOT(THRESHOLD)                                                                         \
  SLOT(WINDOW_SIZE)                                                                       \
  SLOT(MAX_REUSE)                                                                         \
  SLOT(STATISTIC)                                                                         \
  SLOT(AVERAGE)                                                                           \
  SLOT(EMA_DECAY)                                                                         \
  SLOT(INCLUDE_SHUT)                                                                      \
  SLOT(MINI_BATCHES)                                                                      \
  SLOT(SQUARED)                                                                           \
  /* Counters over the gate's life. */                                                    \
  SLOT(BATCHES)                                                                           \
  SLOT(ATTEMPTED)                                                                         \
  SLOT(APPLIED)                                                                           \
  /* This batch; new_batch() clears POSITION, LATCH and the references. */                \
  SLOT(POSITION) /* decisions taken since new_batch() */                                  \
  SLOT(LATCH)    /* 1 once shut, until new_batch() */                                     \
  /* The last decision. */                                                                \
  SLOT(REUSE)           /* 1 for the first use of the batch */                            \
  SLOT(ENERGY)          /* g */                                                           \
  SLOT(INCREMENT_VALUE) /* of g, or g g, over the mini-batch's previous use; or NaN */    \
  SLOT(Z)               /* the score compared with the threshold; NaN: none was formed */ \
  SLOT(SHUT)            /* 1 when the update is discarded */                              \
  SLOT(GRAD_NORM)       /* global, before clipping; NaN where it was not asked for */     \
  SLOT(HEADER_SIZE)

#define DGG_ENUMERATOR(name) name,
enum Slot : int64_t { DGG_SLOTS(DGG_ENUMERATOR) };
#undef DGG_ENUMERATOR

// A tracker is [count, next, mean, variance, values[window]]; one for increments, one for levels.
enum TrackerSlot : int64_t { COUNT, NEXT, MEAN, VARIANCE, TRACKER_HEADER };

DGG_HD int64_t state_size(int64_t window, int64_t mini_batches) {
  return HEADER_SIZE + mini_batches + 2 * (TRACKER_HEADER + window);
}

DGG_HD bool is_finite(double x) { return x - x == 0.0; }

DGG_HD double* references(double* s) { return s + HEADER_SIZE; }

DGG_HD double* tracker(double* s, Statistic which) {
  const int64_t size = TRACKER_HEADER + (int64_t)s[WINDOW_SIZE];
  return s + HEADER_SIZE + (int64_t)s[MINI_BATCHES] + (which == LEVEL ? size : 0);
}

// Whether sizes and places are such as a gate writes: the transition finds its way by them.
DGG_HD bool is_sound(double* s, int64_t numel) {
  const double largest = (double)numel, window = s[WINDOW_SIZE], batches = s[MINI_BATCHES];
  if (!(window >= 1 && window <= largest && batches >= 1 && batches <= largest)) return false;
  if (numel != state_size((int64_t)window, (int64_t)batches)) return false;
  const double up = tracker(s, INCREMENT)[NEXT], level = tracker(s, LEVEL)[NEXT];
  return s[POSITION] >= 0 && s[POSITION] <= 9007199254740992.0 &&  // 2^53
         up >= 0 && up < window && level >= 0 && level < window;
}

DGG_HD void push(double* s, double* t, double x) {
  const int64_t window = (int64_t)s[WINDOW_SIZE];
  if (s[AVERAGE] == (double)EMA) {
    const double d = s[EMA_DECAY], delta = x - t[MEAN];
    if (t[COUNT] == 0) {
      t[MEAN] = x;
      t[VARIANCE] = 0;
    } else {
      t[MEAN] += (1 - d) * delta;
      t[VARIANCE] = d * (t[VARIANCE] + (1 - d) * delta * delta);
    }
    t[COUNT] += 1;
    return;
  }
  const int64_t next = (int64_t)t[NEXT];
  t[TRACKER_HEADER + next] = x;
  t[NEXT] = (double)((next + 1) % window);
  if (t[COUNT] < window) t[COUNT] += 1;
}

// (x - mean) / std over the window (population std, oldest value first), or the running mean and
// variance. A window without spread scores 0 at its own value and +-inf beside it.
// Returns false while the window is not populated: no score is formed then.
DGG_HD bool score(double* s, double* t, double x, double* z) {
  const int64_t window = (int64_t)s[WINDOW_SIZE];
  if (t[COUNT] < window) return false;
  if (s[AVERAGE] == (double)WINDOW) {
    const int64_t oldest = (int64_t)t[NEXT];
    const double first = t[TRACKER_HEADER + oldest];
    double sum = 0, squares = 0;  // over the first: of equal values the mean is their value
    for (int64_t i = 0; i < window; ++i) sum += t[TRACKER_HEADER + (oldest + i) % window] - first;
    const double mean = first + sum / (double)window;
    for (int64_t i = 0; i < window; ++i) {
      const double d = t[TRACKER_HEADER + (oldest + i) % window] - mean;
      squares += d * d;
    }
    t[MEAN] = mean;
    t[VARIANCE] = squares / (double)window;
  }
  const double d = x - t[MEAN], std = sqrt(t[VARIANCE]);
  if (std > 0 || !is_finite(std)) {
    *z = d / std;
  } else {
    *z = d == 0 ? 0.0 : (d > 0 ? HUGE_VAL : -HUGE_VAL);
  }
  return true;
}

DGG_HD void gate_new_batch(double* s) {
  s[BATCHES] += 1;
  s[POSITION] = 0;
  s[LATCH] = 0;
  for (int64_t m = 0; m < (int64_t)s[MINI_BATCHES]; ++m) references(s)[m] = NAN;
}

// One decision. energy: the signal g; norm: the global gradient norm, or NaN with has_norm false.
// Afterwards s[SHUT] is 1 when this update must be discarded.
// Scored is x: g, or g g where the configuration says so.
DGG_HD void gate_step(double* s, double energy, double norm, bool has_norm) {
  const int64_t position = (int64_t)s[POSITION], batches = (int64_t)s[MINI_BATCHES];
  const int64_t use = position / batches + 1;
  double* reference = references(s) + position % batches;
  const double x = s[SQUARED] != 0 ? energy * energy : energy;
  s[POSITION] = (double)(position + 1);
  s[ATTEMPTED] += 1;
  s[REUSE] = (double)use;
  s[GRAD_NORM] = has_norm ? norm : NAN;
  s[Z] = NAN;
  s[ENERGY] = energy;
  s[INCREMENT_VALUE] = use > 1 ? x - *reference : NAN;
  s[SHUT] = 1;
  // Latched: what was computed after the gate shut is wasted work and enters no statistic.
  if (s[LATCH] != 0) return;

  const bool finite = is_finite(x) && (!has_norm || is_finite(norm));
  bool shut = !finite || use > (int64_t)s[MAX_REUSE];
  const bool by_increment = s[STATISTIC] != (double)LEVEL;
  const bool by_level = s[STATISTIC] != (double)INCREMENT;
  if (finite && use > 1) {
    double z, best = NAN;
    if (by_increment && score(s, tracker(s, INCREMENT), s[INCREMENT_VALUE], &z)) {
      best = z;
      if (!(z <= s[THRESHOLD])) shut = true;  // NaN shuts
    }
    if (by_level && score(s, tracker(s, LEVEL), x, &z)) {
      if (!(best >= z)) best = z;
      if (!(z <= s[THRESHOLD])) shut = true;
    }
    s[Z] = best;
  }
  if (finite) {
    // Score first, push after: a value never takes part in its own mean.
    if (!shut || s[INCLUDE_SHUT] != 0) {
      if (by_increment && use > 1) push(s, tracker(s, INCREMENT), s[INCREMENT_VALUE]);
      if (by_level) push(s, tracker(s, LEVEL), x);
    }
    *reference = x;
  }
  s[LATCH] = s[SHUT] = shut ? 1 : 0;
  if (!shut) s[APPLIED] += 1;
}

// When a decision is taken: on the finished gradient, or before the backward by another signal (the
// energy is not known then), which leaves for afterwards to look for NaN and Inf.
enum Phase : int64_t { FINISHED = 0, FORESEE = 1, CONFIRM = 2 };

DGG_HD void gate_decide(double* s, Phase phase, double energy, double norm, bool has_norm) {
  if (phase != CONFIRM) {
    gate_step(s, energy, norm, has_norm);
    if (phase == FINISHED) return;
    s[ENERGY] = NAN;
    if (s[SHUT] == 0) s[APPLIED] -= 1;  // not yet
    return;
  }
  s[ENERGY] = energy;
  s[GRAD_NORM] = has_norm ? norm : NAN;
  if (s[SHUT] != 0) return;
  if (is_finite(energy) && (!has_norm || is_finite(norm))) {
    s[APPLIED] += 1;
  } else {
    s[SHUT] = s[LATCH] = 1;
  }
}

// What torch's fused optimizers divide the gradient by, so that ||g|| <= max_norm afterwards:
// the inverse of the coefficient of torch.nn.utils.clip_grad_norm_.
DGG_HD float clip_divisor(double norm, double max_norm) {
  const double d = (norm + 1e-6) / max_norm;
  return d > 1.0 ? (float)d : 1.0f;
}

}  // namespace dgg
