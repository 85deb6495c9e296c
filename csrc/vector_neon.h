// NEON (AArch64) primitives: a vector is 4 floats, and a codebook the 64 bytes that one TBL looks
// up. Operators are the compiler's, on vectors of its own.
#pragma once

#include <arm_neon.h>
#include <math.h>

#include "moments8bit.h"
#include "scalar.h"

namespace {

constexpr int W = 4;
constexpr int TILE_M = 4;  // rows of x held in accumulators, beside 4 rows of the weight
constexpr int BLOCK_N = 12, BLOCK_V = 2;  // the same for many: rows of the weight, vectors of x
using Vec = float32x4_t;

inline Vec load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, Vec v) { vst1q_f32(p, v); }
inline void stream(void* to, const void* from, int bytes) { memcpy(to, from, size_t(bytes)); }
inline void finish_streams() {}
inline Vec set1(float v) { return vdupq_n_f32(v); }
inline Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
inline Vec sub(Vec a, Vec b) { return vsubq_f32(a, b); }
inline Vec mul(Vec a, Vec b) { return vmulq_f32(a, b); }
inline Vec div(Vec a, Vec b) { return vdivq_f32(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
// Both return b where either is NaN.
inline Vec min(Vec a, Vec b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
inline Vec max(Vec a, Vec b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
inline float sum(Vec v) { return vaddvq_f32(v); }
inline Vec root(Vec v) { return vsqrtq_f32(v); }
inline Vec round_to_even(Vec v) { return vrndnq_f32(v); }
inline Vec halves(float first, float second) {
  return vcombine_f32(vdup_n_f32(first), vdup_n_f32(second));
}

inline int32x4_t bits_of(Vec v) { return vreinterpretq_s32_f32(v); }
inline int32x4_t abs_bits_of(Vec v) { return vandq_s32(bits_of(v), vdupq_n_s32(0x7FFFFFFF)); }

// Largest |x| so far, compared as integers: there NaN is above infinity, and is not lost.
struct AbsMax {
  int32x4_t bits = vdupq_n_s32(0);
  void take(Vec v) { bits = vmaxq_s32(bits, abs_bits_of(v)); }
  float get() const { return float_of(uint32_t(vmaxvq_s32(bits))); }
};

// v * 2^n for the integer n nearest to t; v a normal float.
inline Vec scale_by_power(Vec v, Vec t) {
  return vreinterpretq_f32_s32(vaddq_s32(bits_of(v), vshlq_n_s32(vcvtnq_s32_f32(t), 23)));
}
// v[i] becomes the elements i of all of v.
inline void transpose(Vec (&v)[W]) {
  const float32x4x2_t a = vtrnq_f32(v[0], v[1]), b = vtrnq_f32(v[2], v[3]);
  v[0] = vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0]));
  v[1] = vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1]));
  v[2] = vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0]));
  v[3] = vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1]));
}

inline Vec zero_below(Vec v, Vec x, Vec bound) {
  return vbslq_f32(vcltq_f32(x, bound), vdupq_n_f32(0), v);
}

inline Vec load(const Half* p) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)));
}
inline Vec load(const Bfloat16* p) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p->bits), 16));
}
inline void store(Half* p, Vec v) { vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
inline void store(Bfloat16* p, Vec v) {
  const uint32x4_t bits = vreinterpretq_u32_f32(v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  vst1_u16(&p->bits, vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, quiet), 16));
}

struct Table {
  uint8x16x4_t bytes;
  explicit Table(const float* values) {
    const uint8_t* from = reinterpret_cast<const uint8_t*>(values);
    for (int i = 0; i < 4; ++i) bytes.val[i] = vld1q_u8(from + 16 * i);
  }
};

struct BlockTable {
  uint8x16x4_t bytes;
  BlockTable(const Table& table, float absmax) {
    for (int i = 0; i < 4; ++i) {
      const Vec scaled = mul(vreinterpretq_f32_u8(table.bytes.val[i]), set1(absmax));
      bytes.val[i] = vreinterpretq_u8_f32(scaled);
    }
  }
};

// 16 packed bytes -> 32 codes in order.
inline uint8x16x2_t codes32(const uint8_t* packed) {
  const uint8x16_t bytes = vld1q_u8(packed);
  return vzipq_u8(vshrq_n_u8(bytes, 4), vandq_u8(bytes, vdupq_n_u8(0x0F)));
}

// 16 packed bytes -> 32 weights: byte b of the float of code c is byte 4 c + b of the table.
inline void decode32(const uint8_t* packed, const BlockTable& table, Vec (&out)[8]) {
  const uint8x16x2_t codes = codes32(packed);
  const uint32x4_t four = vdupq_n_u32(0x04040404), offsets = vdupq_n_u32(0x03020100);
  for (int i = 0; i < 8; ++i) {
    const uint8x16_t some = i < 4 ? codes.val[0] : codes.val[1];
    const uint8x16_t copies = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
    const uint8x16_t each = vqtbl1q_u8(some, vaddq_u8(copies, vdupq_n_u8(uint8_t(i % 4 * 4))));
    const uint8x16_t at =
        vmlaq_u8(vreinterpretq_u8_u32(offsets), each, vreinterpretq_u8_u32(four));
    out[i] = vreinterpretq_f32_u8(vqtbl4q_u8(table.bytes, at));
  }
}

// 32 entries of the codebook, of 16 packed bytes.
struct Entries {
  Vec v[8];
  Entries(const uint8_t* packed, const Table& table) { decode32(packed, BlockTable(table, 1), v); }
};
// Where in a span of x the element that meets entry i is.
inline int span_place(int i) { return i; }
// The scale of a span, which is in one block.
struct Spread {
  explicit Spread(int64_t) {}
  Vec of(const float* absmax) const { return set1(absmax[0]); }
};

// The low and the high bytes of sixteen 16-bit values.
struct Planes {
  uint8x16_t low, high;
  Planes() = default;
  explicit Planes(const void* values) {
    const uint8x16x2_t both = vld2q_u8(static_cast<const uint8_t*>(values));
    low = both.val[0];
    high = both.val[1];
  }
};

// The block's sixteen weights, rounded to 16 bits.
struct BlockTable16 {
  Planes planes;
  template <class T>
  BlockTable16(const Table& table, float absmax, T*) {
    T rounded[16];
    for (int i = 0; i < 4; ++i)
      store(rounded + 4 * i, mul(vreinterpretq_f32_u8(table.bytes.val[i]), set1(absmax)));
    planes = Planes(rounded);
  }
};

template <class T>
inline void decode32(const uint8_t* packed, const BlockTable16& table, T* out) {
  const uint8x16x2_t codes = codes32(packed);
  for (int i = 0; i < 2; ++i) {
    const uint8x16_t low = vqtbl1q_u8(table.planes.low, codes.val[i]);
    const uint8x16_t high = vqtbl1q_u8(table.planes.high, codes.val[i]);
    vst2q_u8(reinterpret_cast<uint8_t*>(out + 16 * i), uint8x16x2_t{{low, high}});
  }
}

// 64 weights in 16-bit fixed point, of 32 packed bytes.
struct FixedTable {
  Planes planes;
  float unit;
  explicit FixedTable(const FixedPoint& f) : planes(f.values), unit(f.unit) {}
};
// Where in a unit of x the element that meets weight i is; the lower half meets the first 32.
inline int fixed_place(int i) { return i; }
struct FixedWeights {
  int16x8_t v[8];
  FixedWeights(const uint8_t* packed, const FixedTable& table) {
    for (int i = 0; i < 4; ++i) {
      const uint8x16_t codes = codes32(packed + i / 2 * 16).val[i % 2];
      const uint8x16_t low = vqtbl1q_u8(table.planes.low, codes);
      const uint8x16_t high = vqtbl1q_u8(table.planes.high, codes);
      v[2 * i] = vreinterpretq_s16_u8(vzip1q_u8(low, high));
      v[2 * i + 1] = vreinterpretq_s16_u8(vzip2q_u8(low, high));
    }
  }
  // The sums of the first 32 products in the lower half, of the others in the upper.
  Vec times(const int16_t* x) const {
    int32x4_t sums[2];
    for (int half = 0; half < 2; ++half) {
      int32x4_t s = vdupq_n_s32(0);
      for (int i = 4 * half; i < 4 * half + 4; ++i) {
        const int16x8_t other = vld1q_s16(x + 8 * i);
        s = vmlal_s16(s, vget_low_s16(v[i]), vget_low_s16(other));
        s = vmlal_high_s16(s, v[i], other);
      }
      sums[half] = s;
    }
    // Neighbours are added as floats: sums of 16 products may exceed 31 bits.
    return vpaddq_f32(vcvtq_f32_s32(sums[0]), vcvtq_f32_s32(sums[1]));
  }
};

// values[code] of W codes.
inline Vec look_up(const float* values, const uint8_t* codes) {
  return Vec{values[codes[0]], values[codes[1]], values[codes[2]], values[codes[3]]};
}
// How far from the code of 0 the code nearest to |s| is; see moments8bit.h.
inline int32x4_t code_distance(const lowrank::MomentMap& map, Vec s) {
  const int32x4_t low = vdupq_n_s32(lowrank::LOWEST), rest = vdupq_n_s32(0xFFFF);
  const int32x4_t bits =
      vminq_s32(vmaxq_s32(abs_bits_of(s), low), vdupq_n_s32(lowrank::HIGHEST));
  const int32x4_t bin = vshrq_n_s32(vsubq_s32(bits, low), 16);
  const uint32_t* b = map.bins;
  const int32x4_t found = {int32_t(b[bin[0]]), int32_t(b[bin[1]]), int32_t(b[bin[2]]),
                           int32_t(b[bin[3]])};
  const uint32x4_t above = vcgtq_s32(vandq_s32(bits, rest), vandq_s32(found, rest));
  return vsubq_s32(vshrq_n_s32(found, 16), vreinterpretq_s32_u32(above));
}
inline int32x4_t signed_codes(const lowrank::MomentMap& map, Vec s) {
  const int32x4_t distance = code_distance(map, s);
  const uint32x4_t negative = vcltq_s32(bits_of(s), vdupq_n_s32(0));
  const int32x4_t with_sign = vbslq_s32(negative, vnegq_s32(distance), distance);
  return vmaxq_s32(vaddq_s32(vdupq_n_s32(map.zero), with_sign), vdupq_n_s32(0));
}
inline int32x4_t unsigned_codes(const lowrank::MomentMap& map, Vec s) {
  const int32x4_t zero = vreinterpretq_s32_u32(vceqzq_f32(s));
  return vbicq_s32(code_distance(map, s), zero);
}
inline void store_codes(uint8_t* to, int32x4_t codes) {
  for (int i = 0; i < W; ++i) to[i] = uint8_t(codes[i]);
}

// Lanes of 64 bits of which products take the lower halves; store_words stores those of four
// vectors, lane by lane.
using Wide = uint64x2_t;
inline Wide ascending(uint64_t q) { return Wide{q, q + 1}; }
inline Wide wide(uint32_t v) { return vdupq_n_u64(v); }
inline Wide product(Wide a, uint32_t b) { return vmull_n_u32(vmovn_u64(a), b); }
inline Wide upper_half(Wide a) { return vshrq_n_u64(a, 32); }
inline Wide exclusive_or(Wide a, Wide b) { return veorq_u64(a, b); }
inline void store_words(uint32_t* to, Wide c0, Wide c1, Wide c2, Wide c3) {
  vst4_u32(to, (uint32x2x4_t{{vmovn_u64(c0), vmovn_u64(c1), vmovn_u64(c2), vmovn_u64(c3)}}));
}
// v where the word is at least `least`, else 0.
inline Vec where_at_least(const uint32_t* words, uint32_t least, Vec v) {
  const uint32x4_t kept = vcgeq_u32(vld1q_u32(words), vdupq_n_u32(least));
  return vreinterpretq_f32_u32(vandq_u32(kept, vreinterpretq_u32_f32(v)));
}

// 32 scaled weights -> 16 packed bytes: four steps down the tree of midpoints, then the nibbles.
struct Encoder {
  uint8x16x2_t level[4];
  uint8x16_t order;
  explicit Encoder(const Levels& levels) : order(vld1q_u8(levels.order)) {
    for (int i = 0; i < 4; ++i) {
      const uint8_t* from = reinterpret_cast<const uint8_t*>(levels.midpoints[i]);
      level[i] = {{vld1q_u8(from), vld1q_u8(from + 16)}};
    }
  }
  uint32x4_t ranks(Vec s) const {
    uint32x4_t rank = vdupq_n_u32(0);
    for (int i = 0; i < 4; ++i) {
      const uint32x4_t at = vmlaq_n_u32(vdupq_n_u32(0x03020100), rank, 0x04040404);
      const Vec midpoint = vreinterpretq_f32_u8(vqtbl2q_u8(level[i], vreinterpretq_u8_u32(at)));
      rank = vsubq_u32(vaddq_u32(rank, rank), vcgtq_f32(s, midpoint));
    }
    return rank;
  }
  void encode32(const Vec (&s)[8], uint8_t* packed) const {
    for (int half = 0; half < 2; ++half) {
      const Vec* from = s + 4 * half;
      const uint16x8_t first = vcombine_u16(vmovn_u32(ranks(from[0])), vmovn_u32(ranks(from[1])));
      const uint16x8_t second = vcombine_u16(vmovn_u32(ranks(from[2])), vmovn_u32(ranks(from[3])));
      const uint8x16_t ranked = vcombine_u8(vmovn_u16(first), vmovn_u16(second));
      const uint16x8_t pairs = vreinterpretq_u16_u8(vqtbl1q_u8(order, ranked));
      // The even code is the low byte of a pair: it goes to the high nibble.
      const uint16x8_t both = vorrq_u16(vshlq_n_u16(pairs, 4), vshrq_n_u16(pairs, 8));
      vst1_u8(packed + 8 * half, vmovn_u16(both));
    }
  }
};

}  // namespace
