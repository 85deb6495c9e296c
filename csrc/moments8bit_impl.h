// One step of an 8-bit optimizer over some blocks of a tensor; a vector_*.h comes before it.
//
// A block's codes are decoded, its moments and parameters updated, and the moments kept in the
// first-level cache until their largest is known; then they are coded again. The parameters move by
// the moments before these are rounded to codes.
#pragma once

#include <string.h>

#include "kernels.h"

namespace {

using lowrank::AdamwStep;
using lowrank::LionStep;
using lowrank::MOMENT_BLOCK;
using lowrank::MomentMap;

constexpr float SMALLEST_SCALE = 1.17549435e-38f;  // the smallest normal: its reciprocal is finite

template <class T>
struct Block {
  T* p;
  const T* g;
  uint8_t* m;
  uint8_t* v;  // null without a second moment, as is v_scale
  float* m_scale;
  float* v_scale;
};

// Updates `length` elements, a multiple of W; the new m and v go to `ms` and `vs`.
template <class T>
inline void update_moments(const Block<T>& block, int64_t length, const AdamwStep& step,
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

inline void code_signed(const MomentMap& map, const float* values, int64_t length, uint8_t* codes,
                        float* scale) {
  // The least value of the map is above -1: its scale is such that a negative value of the largest
  // magnitude is kept too.
  const Vec below = set1(1.0f / map.values[0]);
  AbsMax largest;
  for (int64_t i = 0; i < length; i += W) {
    const Vec v = load(values + i);
    largest.take(max(v, mul(v, below)));
  }
  *scale = usable(largest.get());
  const Vec inverse = inverse_of(*scale);
  for (int64_t i = 0; i < length; i += W)
    store_codes(codes + i, signed_codes(map, mul(load(values + i), inverse)));
}

inline void code_unsigned(const MomentMap& map, const float* values, int64_t length, uint8_t* codes,
                          float* scale) {
  AbsMax largest;
  for (int64_t i = 0; i < length; i += W) largest.take(load(values + i));
  *scale = usable(largest.get());
  const Vec inverse = inverse_of(*scale);
  for (int64_t i = 0; i < length; i += W)
    store_codes(codes + i, unsigned_codes(map, mul(load(values + i), inverse)));
}

// `length` elements, a multiple of W.
template <class T>
inline void step_block(const Block<T>& block, int64_t length, const AdamwStep& step) {
  alignas(64) float ms[MOMENT_BLOCK], vs[MOMENT_BLOCK];
  update_moments(block, length, step, ms, vs);
  code_signed(step.m, ms, length, block.m, block.m_scale);
  code_unsigned(step.v, vs, length, block.v, block.v_scale);
}

// -1, 0 or 1, and NaN of what is not finite: times 2^254 nothing but 0 is below 1.
inline Vec sign(Vec v) {
  const Vec large = set1(0x1p127f);
  const Vec far = mul(mul(v, large), large);
  return add(max(min(far, set1(1.0f)), set1(-1.0f)), mul(v, set1(0.0f)));
}

template <class T>
inline void step_block(const Block<T>& block, int64_t length, const LionStep& step) {
  alignas(64) float ms[MOMENT_BLOCK];
  const Vec scale = set1(*block.m_scale);
  const Vec beta1 = set1(step.by.beta1), beta2 = set1(step.by.beta2);
  const Vec rest1 = set1(step.by.rest1), rest2 = set1(step.by.rest2);
  const Vec decay = set1(step.by.decay), rate = set1(step.by.rate);
  for (int64_t i = 0; i < length; i += W) {
    const Vec g = load(block.g + i);
    const Vec m = mul(look_up(step.m.values, block.m + i), scale);
    const Vec way = sign(add(mul(m, beta1), mul(g, rest1)));
    store(block.p + i, sub(mul(load(block.p + i), decay), mul(way, rate)));
    store(ms + i, add(mul(m, beta2), mul(g, rest2)));
  }
  code_signed(step.m, ms, length, block.m, block.m_scale);
}

// A block that is no multiple of W, in a copy filled up with zeros.
template <class T, class Step>
void step_ragged(const Block<T>& block, int64_t length, const Step& step) {
  alignas(64) T p[MOMENT_BLOCK] = {}, g[MOMENT_BLOCK] = {};
  alignas(64) uint8_t m[MOMENT_BLOCK], v[MOMENT_BLOCK] = {};
  memset(m, step.m.zero, sizeof m);
  memcpy(p, block.p, size_t(length) * sizeof(T));
  memcpy(g, block.g, size_t(length) * sizeof(T));
  memcpy(m, block.m, size_t(length));
  if (block.v) memcpy(v, block.v, size_t(length));
  step_block(Block<T>{p, g, m, v, block.m_scale, block.v_scale}, (length + W - 1) / W * W, step);
  memcpy(block.p, p, size_t(length) * sizeof(T));
  memcpy(block.m, m, size_t(length));
  if (block.v) memcpy(block.v, v, size_t(length));
}

template <class T, class Step>
void step_blocks(const lowrank_moments8bit_tensor& t, int64_t first, int64_t last,
                 const Step& step) {
  const int64_t in_row = (t.cols + MOMENT_BLOCK - 1) / MOMENT_BLOCK;
  for (int64_t b = first; b < last; ++b) {
    const int64_t col = b % in_row * MOMENT_BLOCK, at = b / in_row * t.cols + col;
    const int64_t length = t.cols - col < MOMENT_BLOCK ? t.cols - col : MOMENT_BLOCK;
    const Block<T> block{static_cast<T*>(t.p) + at,
                         static_cast<const T*>(t.g) + at,
                         t.m + at,
                         t.v ? t.v + at : nullptr,
                         t.m_scale + b,
                         t.v ? t.v_scale + b : nullptr};
    if (length % W == 0) {
      step_block(block, length, step);
    } else {
      step_ragged(block, length, step);
    }
  }
}

template <class Step>
void step_tensor(const lowrank_moments8bit_tensor& t, int64_t first, int64_t last,
                 const Step& step) {
  if (t.dtype == LOWRANK_F32) step_blocks<float>(t, first, last, step);
  if (t.dtype == LOWRANK_F16) step_blocks<Half>(t, first, last, step);
  if (t.dtype == LOWRANK_BF16) step_blocks<Bfloat16>(t, first, last, step);
}

void adamw8bit(const lowrank_moments8bit_tensor& t, int64_t first, int64_t last,
               const AdamwStep& step) {
  step_tensor(t, first, last, step);
}

void lion8bit(const lowrank_moments8bit_tensor& t, int64_t first, int64_t last,
              const LionStep& step) {
  step_tensor(t, first, last, step);
}

}  // namespace
