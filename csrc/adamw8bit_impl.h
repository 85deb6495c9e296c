// One step of 8-bit AdamW over some blocks of a tensor; a vector_*.h comes before it.
//
// A block's codes are decoded, its moments and parameters updated, and the moments kept in the
// first-level cache until their largest is known; then they are coded again. The parameters move by
// the moments before these are rounded to codes.
#pragma once

#include <string.h>

#include "kernels.h"

namespace {

using lowrank::ADAMW_BLOCK;
using lowrank::AdamwStep;

constexpr float SMALLEST_SCALE = 1.17549435e-38f;  // the smallest normal: its reciprocal is finite

template <class T>
struct AdamwBlock {
  T* p;
  const T* g;
  uint8_t* m;
  uint8_t* v;
  float* m_scale;
  float* v_scale;
};

// Updates `length` elements, a multiple of W; the new m and v go to `ms` and `vs`.
template <class T>
inline void update_moments(const AdamwBlock<T>& block, int64_t length, const AdamwStep& step,
                           float* ms, float* vs) {
  const Vec m_scale = set1(*block.m_scale), v_scale = set1(*block.v_scale);
  const Vec beta1 = set1(step.by.beta1), beta2 = set1(step.by.beta2);
  const Vec rest1 = set1(step.by.rest1), rest2 = set1(step.by.rest2);
  const Vec decay = set1(step.by.decay), rate = set1(step.by.rate);
  const Vec root2 = set1(step.by.root2), eps = set1(step.by.eps);
  for (int64_t i = 0; i < length; i += W) {
    const Vec g = load(block.g + i);
    const Vec m_was = mul(look_up(step.m.values, block.m + i), m_scale);
    const Vec v_was = mul(look_up(step.v.values, block.v + i), v_scale);
    const Vec m = add(mul(m_was, beta1), mul(g, rest1));
    const Vec v = add(mul(v_was, beta2), mul(mul(g, g), rest2));
    const Vec ratio = div(m, add(mul(root(v), root2), eps));
    store(block.p + i, sub(mul(load(block.p + i), decay), mul(ratio, rate)));
    store(ms + i, m);
    store(vs + i, v);
  }
}

inline float usable(float largest) { return largest < SMALLEST_SCALE ? 0.0f : largest; }
inline Vec inverse_of(float scale) { return set1(scale == 0.0f ? 0.0f : 1.0f / scale); }

template <class T>
inline void step_block(const AdamwBlock<T>& block, int64_t length, const AdamwStep& step) {
  alignas(64) float ms[ADAMW_BLOCK], vs[ADAMW_BLOCK];
  update_moments(block, length, step, ms, vs);
  // The least value of the map of m is above -1: its scale is such that a negative m of the
  // largest magnitude is kept too.
  const Vec below = set1(1.0f / step.m.values[0]);
  AbsMax m_largest, v_largest;
  for (int64_t i = 0; i < length; i += W) {
    const Vec m = load(ms + i);
    m_largest.take(max(m, mul(m, below)));
    v_largest.take(load(vs + i));
  }
  *block.m_scale = usable(m_largest.get());
  *block.v_scale = usable(v_largest.get());
  const Vec m_inverse = inverse_of(*block.m_scale), v_inverse = inverse_of(*block.v_scale);
  for (int64_t i = 0; i < length; i += W) {
    const Vec m = mul(load(ms + i), m_inverse), v = mul(load(vs + i), v_inverse);
    store_codes(block.m + i, signed_codes(step.m, m));
    store_codes(block.v + i, unsigned_codes(step.v, v));
  }
}

// A block that is no multiple of W, in a copy filled up with zeros.
template <class T>
void step_ragged(const AdamwBlock<T>& block, int64_t length, const AdamwStep& step) {
  alignas(64) T p[ADAMW_BLOCK] = {}, g[ADAMW_BLOCK] = {};
  alignas(64) uint8_t m[ADAMW_BLOCK], v[ADAMW_BLOCK];
  memset(m, step.m.zero, sizeof m);
  memset(v, step.v.zero, sizeof v);
  memcpy(p, block.p, size_t(length) * sizeof(T));
  memcpy(g, block.g, size_t(length) * sizeof(T));
  memcpy(m, block.m, size_t(length));
  memcpy(v, block.v, size_t(length));
  step_block(AdamwBlock<T>{p, g, m, v, block.m_scale, block.v_scale}, (length + W - 1) / W * W,
             step);
  memcpy(block.p, p, size_t(length) * sizeof(T));
  memcpy(block.m, m, size_t(length));
  memcpy(block.v, v, size_t(length));
}

template <class T>
void step_blocks(const lowrank_adamw8bit_tensor& t, int64_t first, int64_t last,
                 const AdamwStep& step) {
  const int64_t in_row = (t.cols + ADAMW_BLOCK - 1) / ADAMW_BLOCK;
  for (int64_t b = first; b < last; ++b) {
    const int64_t col = b % in_row * ADAMW_BLOCK, at = b / in_row * t.cols + col;
    const int64_t length = t.cols - col < ADAMW_BLOCK ? t.cols - col : ADAMW_BLOCK;
    const AdamwBlock<T> block{static_cast<T*>(t.p) + at, static_cast<const T*>(t.g) + at,
                              t.m + at, t.v + at, t.m_scale + b, t.v_scale + b};
    if (length % W == 0) {
      step_block(block, length, step);
    } else {
      step_ragged(block, length, step);
    }
  }
}

void adamw8bit(const lowrank_adamw8bit_tensor& t, int64_t first, int64_t last,
               const AdamwStep& step) {
  if (t.dtype == LOWRANK_F32) step_blocks<float>(t, first, last, step);
  if (t.dtype == LOWRANK_F16) step_blocks<Half>(t, first, last, step);
  if (t.dtype == LOWRANK_BF16) step_blocks<Bfloat16>(t, first, last, step);
}

}  // namespace
