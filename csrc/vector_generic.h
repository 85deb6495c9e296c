// The same primitives for any processor, through the compiler's four-float vectors.
#pragma once

#include <math.h>

#include "moments8bit.h"
#include "scalar.h"

namespace {

constexpr int W = 4;
constexpr int TILE_M = 2;  // rows of x held in accumulators, beside 4 rows of the weight
constexpr int BLOCK_N = 4, BLOCK_V = 2;  // the same for many: rows of the weight, vectors of x
typedef float Vec __attribute__((vector_size(16)));
typedef int32_t Bits __attribute__((vector_size(16)));

template <class T>
inline Vec load(const T* p) {
  return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
template <class T>
inline void store(T* p, Vec v) {
  for (int i = 0; i < W; ++i) from_float(v[i], p + i);
}
inline void stream(void* to, const void* from, int bytes) { memcpy(to, from, size_t(bytes)); }
inline void finish_streams() {}
inline Vec set1(float v) { return Vec{v, v, v, v}; }
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec sub(Vec a, Vec b) { return a - b; }
inline Vec mul(Vec a, Vec b) { return a * b; }
inline Vec div(Vec a, Vec b) { return a / b; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
// Both return b where either is NaN.
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline float sum(Vec v) { return (v[0] + v[1]) + (v[2] + v[3]); }

// Largest |x| so far, compared as integers: there NaN is above infinity, and is not lost.
struct AbsMax {
  Bits bits = {0, 0, 0, 0};
  void take(Vec v) {
    const Bits abs = reinterpret_cast<Bits>(v) & 0x7FFFFFFF;
    bits = abs > bits ? abs : bits;
  }
  float get() const {
    int32_t largest = 0;
    for (int i = 0; i < W; ++i) largest = bits[i] > largest ? bits[i] : largest;
    return float_of(uint32_t(largest));
  }
};

inline Vec round_to_even(Vec v) {
  return Vec{nearbyintf(v[0]), nearbyintf(v[1]), nearbyintf(v[2]), nearbyintf(v[3])};
}
// v * 2^n for the integer n nearest to t; v a normal float.
inline Vec scale_by_power(Vec v, Vec t) {
  const Bits n = __builtin_convertvector(t == t ? t : set1(0.0f), Bits);
  return reinterpret_cast<Vec>(reinterpret_cast<Bits>(v) + n * (1 << 23));
}
inline Vec halves(float first, float second) { return Vec{first, first, second, second}; }

// 64 weights in 16-bit fixed point, of 32 packed bytes.
struct FixedTable {
  FixedPoint fixed;
  float unit;
  explicit FixedTable(const FixedPoint& f) : fixed(f), unit(f.unit) {}
};
// Where in a unit of x the element that meets weight i is; the lower half meets the first 32.
inline int fixed_place(int i) { return i; }
struct FixedWeights {
  int32_t v[64];
  FixedWeights(const uint8_t* packed, const FixedTable& table) {
    for (int i = 0; i < 32; ++i) {
      v[2 * i] = table.fixed.values[packed[i] >> 4];
      v[2 * i + 1] = table.fixed.values[packed[i] & 15];
    }
  }
  // The sums of the first 32 products in the lower half, of the others in the upper.
  Vec times(const int16_t* x) const {
    int32_t sums[8] = {};
    for (int i = 0; i < 64; ++i) sums[i / 8] += v[i] * x[i];
    const Vec low = {float(sums[0]), float(sums[2]), float(sums[4]), float(sums[6])};
    const Vec high = {float(sums[1]), float(sums[3]), float(sums[5]), float(sums[7])};
    return low + high;
  }
};

inline Vec root(Vec v) { return Vec{sqrtf(v[0]), sqrtf(v[1]), sqrtf(v[2]), sqrtf(v[3])}; }

// values[code] of W codes.
inline Vec look_up(const float* values, const uint8_t* codes) {
  return Vec{values[codes[0]], values[codes[1]], values[codes[2]], values[codes[3]]};
}
// How far from the code of 0 the code nearest to |s| is; see moments8bit.h.
inline Bits code_distance(const lowrank::MomentMap& map, Vec s) {
  constexpr int32_t low = lowrank::LOWEST, high = lowrank::HIGHEST;
  Bits bits = reinterpret_cast<Bits>(s) & 0x7FFFFFFF;
  bits = bits < low ? low : bits;
  bits = bits > high ? high : bits;
  const Bits bin = (bits - low) >> 16;
  const uint32_t* b = map.bins;
  const Bits found = {int32_t(b[bin[0]]), int32_t(b[bin[1]]), int32_t(b[bin[2]]),
                      int32_t(b[bin[3]])};
  return (found >> 16) - ((bits & 0xFFFF) > (found & 0xFFFF));
}
inline Bits signed_codes(const lowrank::MomentMap& map, Vec s) {
  const Bits distance = code_distance(map, s), negative = reinterpret_cast<Bits>(s) >> 31;
  const Bits codes = map.zero + ((distance ^ negative) - negative);
  return codes < 0 ? 0 : codes;
}
inline Bits unsigned_codes(const lowrank::MomentMap& map, Vec s) {
  return code_distance(map, s) & (s != 0.0f);
}
inline void store_codes(uint8_t* to, Bits codes) {
  for (int i = 0; i < W; ++i) to[i] = uint8_t(codes[i]);
}

// v[i] becomes the elements i of all of v.
inline void transpose(Vec (&v)[W]) {
  for (int i = 0; i < W; ++i) {
    for (int j = 0; j < i; ++j) {
      const float upper = v[j][i];
      v[j][i] = v[i][j];
      v[i][j] = upper;
    }
  }
}

inline Vec zero_below(Vec v, Vec x, Vec bound) { return x < bound ? set1(0.0f) : v; }

struct Table {
  const float* values;
  explicit Table(const float* codebook) : values(codebook) {}
};

struct BlockTable {
  float values[16];
  BlockTable(const Table& table, float absmax) {
    for (int i = 0; i < 16; ++i) values[i] = table.values[i] * absmax;
  }
};

// 16 packed bytes -> 32 weights.
inline void decode32(const uint8_t* packed, const BlockTable& table, Vec (&out)[8]) {
  for (int i = 0; i < 8; ++i) {
    const uint8_t a = packed[2 * i], b = packed[2 * i + 1];
    const float* v = table.values;
    out[i] = Vec{v[a >> 4], v[a & 15], v[b >> 4], v[b & 15]};
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

// The block's sixteen weights, rounded to 16 bits.
struct BlockTable16 {
  uint16_t values[16];
  template <class T>
  BlockTable16(const Table& table, float absmax, T*) {
    for (int i = 0; i < 16; ++i) {
      T rounded;
      from_float(table.values[i] * absmax, &rounded);
      values[i] = rounded.bits;
    }
  }
};

template <class T>
inline void decode32(const uint8_t* packed, const BlockTable16& table, T* out) {
  for (int i = 0; i < 16; ++i) {
    out[2 * i].bits = table.values[packed[i] >> 4];
    out[2 * i + 1].bits = table.values[packed[i] & 15];
  }
}

// Lanes of 64 bits of which products take the lower halves; store_words stores those of four
// vectors, lane by lane.
typedef uint64_t Wide __attribute__((vector_size(16)));
inline Wide ascending(uint64_t q) { return Wide{q, q + 1}; }
inline Wide wide(uint32_t v) { return Wide{v, v}; }
inline Wide product(Wide a, uint32_t b) { return (a & 0xFFFFFFFF) * wide(b); }
inline Wide upper_half(Wide a) { return a >> 32; }
inline Wide exclusive_or(Wide a, Wide b) { return a ^ b; }
inline void store_words(uint32_t* to, Wide c0, Wide c1, Wide c2, Wide c3) {
  for (int i = 0; i < 2; ++i) {
    const Wide lanes[4] = {c0, c1, c2, c3};
    for (int j = 0; j < 4; ++j) to[4 * i + j] = uint32_t(lanes[j][i]);
  }
}
// v where the word is at least `least`, else 0.
inline Vec where_at_least(const uint32_t* words, uint32_t least, Vec v) {
  const Bits kept = {-(words[0] >= least), -(words[1] >= least), -(words[2] >= least),
                     -(words[3] >= least)};
  return reinterpret_cast<Vec>(kept & reinterpret_cast<Bits>(v));
}

// 32 scaled weights -> 16 packed bytes: four steps down the tree of midpoints, then the nibbles.
struct Encoder {
  const Levels& levels;
  explicit Encoder(const Levels& l) : levels(l) {}
  uint8_t code(float s) const {
    int rank = 0;
    for (int i = 0; i < 4; ++i) rank = 2 * rank + (s > levels.midpoints[i][rank]);
    return levels.order[rank];
  }
  void encode32(const Vec (&s)[8], uint8_t* packed) const {
    for (int i = 0; i < 16; ++i) {
      const Vec v = s[i / 2];
      const int e = 2 * (i % 2);
      packed[i] = uint8_t(code(v[e]) << 4 | code(v[e + 1]));
    }
  }
};

}  // namespace
