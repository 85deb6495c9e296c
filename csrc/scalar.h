// Scalar conversions and the tree of midpoints, shared by every instruction set. All of it has
// internal linkage, as everything compiled with instruction-set flags must: one copy per file.
#pragma once

#include <stdint.h>
#include <string.h>

namespace {

struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

inline uint32_t bits_of(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float v;
  memcpy(&v, &bits, 4);
  return v;
}

inline float to_float(float v) { return v; }
inline float to_float(Bfloat16 v) { return float_of(uint32_t(v.bits) << 16); }
inline float to_float(Half v) {
  const uint32_t sign = uint32_t(v.bits & 0x8000) << 16;
  const uint32_t rest = uint32_t(v.bits & 0x7FFF) << 13;
  if (rest >= 0x0F800000) return float_of(sign | rest | 0x7F800000);  // infinity, NaN
  // 2^112 moves the exponent from half's bias to float's, subnormals included.
  return float_of(sign | bits_of(float_of(rest) * float_of(0x77800000)));
}

inline void from_float(float v, float* out) { *out = v; }
inline void from_float(float v, Bfloat16* out) {
  const uint32_t bits = bits_of(v);
  out->bits = v != v ? uint16_t((bits | 0x400000) >> 16)
                     : uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
inline void from_float(float v, Half* out) {
  const uint32_t sign = (bits_of(v) >> 16) & 0x8000, abs = bits_of(v) & 0x7FFFFFFF;
  uint32_t half;
  if (abs > 0x7F800000) {
    half = 0x7E00 | ((abs >> 13) & 0x1FF);
  } else if (abs >= 0x477FF000) {  // 65520 and above round to infinity
    half = 0x7C00;
  } else if (abs < 0x38800000) {  // subnormal: adding 0.5 leaves the rounded significand
    half = bits_of(float_of(abs) + 0.5f) - 0x3F000000;
  } else {
    half = (abs - 0x38000000 + 0xFFF + ((abs >> 13) & 1)) >> 13;
  }
  out->bits = uint16_t(sign | half);
}

// A codebook in 16 bits: its values are about values[code] * unit.
struct FixedPoint {
  int16_t values[16];
  float unit;

  explicit FixedPoint(const float* codebook) {
    float largest = 0;
    for (int i = 0; i < 16; ++i) {
      const float abs = float_of(bits_of(codebook[i]) & 0x7FFFFFFF);
      largest = abs > largest || abs != abs ? abs : largest;
    }
    unit = largest / 32767;
    const bool usable = largest >= 1e-30f && largest < 1e38f;  // else no product is right anyway
    for (int i = 0; i < 16; ++i) {
      const float v = usable ? codebook[i] / unit : 0.0f;
      values[i] = int16_t(v < 0 ? v - 0.5f : v + 0.5f);
    }
  }
};

// The 15 midpoints of a sorted codebook as a binary tree, one row of candidates a level, so that
// rank = number of midpoints < s (a tie goes to the lower) is four comparisons; its code is
// order[rank].
struct Levels {
  float midpoints[4][8] = {};
  uint8_t order[16];

  explicit Levels(const float* codebook) {
    for (int i = 0; i < 16; ++i) {  // stable insertion sort: codebooks like FP4 are not in order
      int j = i;
      for (; j > 0 && codebook[order[j - 1]] > codebook[i]; --j) order[j] = order[j - 1];
      order[j] = uint8_t(i);
    }
    for (int level = 0; level < 4; ++level) {
      const int half = 8 >> level;
      for (int i = 0; i < 1 << level; ++i) {
        const int k = half * (2 * i + 1) - 1;
        midpoints[level][i] = (codebook[order[k]] + codebook[order[k + 1]]) / 2;
      }
    }
  }
};

}  // namespace
