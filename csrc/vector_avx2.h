// AVX2 (with FMA and F16C) primitives: a vector is 8 floats, a codebook four registers of bytes.
#pragma once

#include <immintrin.h>

#include "moments8bit.h"
#include "scalar.h"

namespace {

constexpr int W = 8;
constexpr int TILE_M = 2;  // rows of x held in accumulators, beside 4 rows of the weight
constexpr int BLOCK_N = 6, BLOCK_V = 2;  // the same for many: rows of the weight, vectors of x
using Vec = __m256;

inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
// Writes past the caches, without reading first what is overwritten: `bytes` a multiple of 64.
inline void stream(void* to, const void* from, int bytes) {
  const __m256i* source = static_cast<const __m256i*>(from);
  for (int i = 0; i < bytes / 32; ++i)
    _mm256_stream_si256(static_cast<__m256i*>(to) + i, _mm256_load_si256(source + i));
}
inline void finish_streams() { _mm_sfence(); }
inline Vec set1(float v) { return _mm256_set1_ps(v); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
// Both return b where either is NaN.
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline float sum(Vec v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// Largest |x| so far, compared as integers: there NaN is above infinity, and is not lost.
struct AbsMax {
  __m256i bits = _mm256_setzero_si256();
  void take(Vec v) {
    const __m256i abs = _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7FFFFFFF));
    bits = _mm256_max_epi32(bits, abs);
  }
  float get() const {
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4E));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xB1));
    return float_of(_mm_cvtsi128_si32(m));
  }
};

// v * 2^n for the integer n nearest to t; v a normal float.
inline Vec scale_by_power(Vec v, Vec t) {
  const __m256i n = _mm256_slli_epi32(_mm256_cvtps_epi32(t), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(v), n));
}
inline Vec round_to_even(Vec v) {
  return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// v[i] becomes the elements i of all of v: pairs, then fours, then halves change places.
inline void transpose(Vec (&v)[W]) {
  Vec pairs[W], fours[W];
  for (int i = 0; i < W; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
  }
  for (int i = 0; i < W; i += 4) {
    for (int j = 0; j < 2; ++j) {
      fours[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + 2 + j], 0x44);
      fours[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + 2 + j], 0xEE);
    }
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
    v[i + 4] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
  }
}

inline Vec zero_below(Vec v, Vec x, Vec bound) {
  return _mm256_andnot_ps(_mm256_cmp_ps(x, bound, _CMP_LT_OQ), v);
}

inline __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline void store128(void* p, __m128i v) { _mm_storeu_si128(static_cast<__m128i*>(p), v); }

inline Vec load(const Half* p) { return _mm256_cvtph_ps(load128(p)); }
inline Vec load(const Bfloat16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(p)), 16));
}
inline void store(Half* p, Vec v) { store128(p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
inline void store(Bfloat16* p, Vec v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i top = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  store128(p, _mm_packus_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1)));
}

// Byte plane p holds byte p of each of the sixteen floats, in both halves of the register, so that
// four pshufb look up thirty-two codes and two rounds of unpacking make floats of their bytes.
struct Table {
  const float* codebook;
  __m256i plane[4];
  explicit Table(const float* values) : codebook(values) {
    alignas(16) uint8_t bytes[4][16];
    for (int i = 0; i < 16; ++i) {
      const uint32_t bits = bits_of(values[i]);
      for (int p = 0; p < 4; ++p) bytes[p][i] = uint8_t(bits >> (8 * p));
    }
    for (int p = 0; p < 4; ++p) plane[p] = _mm256_broadcastsi128_si256(load128(bytes[p]));
  }
};

struct BlockTable {
  const Table& table;
  Vec absmax;
  BlockTable(const Table& t, float scale) : table(t), absmax(set1(scale)) {}
};

// Codes of the bytes that `pick` names twice each: the high nibble, then the low.
inline __m256i codes32(const uint8_t* packed, __m256i pick) {
  const __m256i v = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load128(packed)), pick);
  const __m256i high = _mm256_and_si256(_mm256_srli_epi16(v, 4), _mm256_set1_epi16(0x000F));
  return _mm256_or_si256(high, _mm256_and_si256(v, _mm256_set1_epi16(0x0F00)));
}

// The floats whose byte planes are looked up by 32 codes: 0-3 and 16-19, 4-7 and 20-23, ...
inline void look_up32(const Table& table, __m256i codes, Vec* out) {
  const __m256i b0 = _mm256_shuffle_epi8(table.plane[0], codes);
  const __m256i b1 = _mm256_shuffle_epi8(table.plane[1], codes);
  const __m256i b2 = _mm256_shuffle_epi8(table.plane[2], codes);
  const __m256i b3 = _mm256_shuffle_epi8(table.plane[3], codes);
  const __m256i low0 = _mm256_unpacklo_epi8(b0, b1), low1 = _mm256_unpackhi_epi8(b0, b1);
  const __m256i high0 = _mm256_unpacklo_epi8(b2, b3), high1 = _mm256_unpackhi_epi8(b2, b3);
  out[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low0, high0));
  out[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low0, high0));
  out[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low1, high1));
  out[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low1, high1));
}

// 16 packed bytes -> 32 weights.
inline void decode32(const uint8_t* packed, const BlockTable& block, Vec (&out)[4]) {
  // Unpacking works in each half by itself: the lower half takes elements 0-3 of every eight.
  const __m256i pick = _mm256_setr_epi8(
      0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13,
      2, 2, 3, 3, 6, 6, 7, 7, 10, 10, 11, 11, 14, 14, 15, 15);
  look_up32(block.table, codes32(packed, pick), out);
  for (int i = 0; i < 4; ++i) out[i] = mul(out[i], block.absmax);
}

// 64 entries of the codebook, of 32 packed bytes: all even ones, then all odd, so that nothing is
// rearranged but x. The lower four lanes are the first 32 of them.
struct Entries {
  Vec v[8];
  Entries(const uint8_t* packed, const Table& table) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed));
    const __m256i nibble = _mm256_set1_epi8(0x0F);
    look_up32(table, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble), v);
    look_up32(table, _mm256_and_si256(bytes, nibble), v + 4);
  }
};
// Where in a span of x the element that meets entry i is.
inline int span_place(int i) {
  const int byte = i / 2;
  return i % 2 * 32 + byte % 16 / 4 * 8 + byte / 16 * 4 + byte % 4;
}
// The scales of a span of blocks of G, a block's in the lanes of its weights.
struct Spread {
  bool two;
  explicit Spread(int64_t G) : two(G == 32) {}
  Vec of(const float* absmax) const {
    return two ? _mm256_set_m128(_mm_set1_ps(absmax[1]), _mm_set1_ps(absmax[0])) : set1(absmax[0]);
  }
};

// Two byte planes of the block's sixteen weights, already scaled and rounded to 16 bits.
struct BlockTable16 {
  __m256i low, high;
  template <class T>
  BlockTable16(const Table& table, float absmax, T*) {
    T rounded[16];
    store(rounded, mul(load(table.codebook), set1(absmax)));
    store(rounded + 8, mul(load(table.codebook + 8), set1(absmax)));
    const __m128i a = load128(rounded), b = load128(rounded + 8), byte = _mm_set1_epi16(0xFF);
    const __m128i lows = _mm_packus_epi16(_mm_and_si128(a, byte), _mm_and_si128(b, byte));
    const __m128i highs = _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8));
    low = _mm256_broadcastsi128_si256(lows);
    high = _mm256_broadcastsi128_si256(highs);
  }
};

template <class T>
inline void decode32(const uint8_t* packed, const BlockTable16& block, T* out) {
  const __m256i pick = _mm256_setr_epi8(
      0, 0, 1, 1, 2, 2, 3, 3, 8, 8, 9, 9, 10, 10, 11, 11,
      4, 4, 5, 5, 6, 6, 7, 7, 12, 12, 13, 13, 14, 14, 15, 15);
  const __m256i codes = codes32(packed, pick);
  const __m256i low = _mm256_shuffle_epi8(block.low, codes);
  const __m256i high = _mm256_shuffle_epi8(block.high, codes);
  __m256i* to = reinterpret_cast<__m256i*>(out);
  _mm256_storeu_si256(to, _mm256_unpacklo_epi8(low, high));
  _mm256_storeu_si256(to + 1, _mm256_unpackhi_epi8(low, high));
}

inline Vec halves(float first, float second) {
  return _mm256_set_m128(_mm_set1_ps(second), _mm_set1_ps(first));
}

// 64 weights in 16-bit fixed point, of 32 packed bytes: a table is its low and its high bytes.
struct FixedTable {
  __m256i low, high;
  float unit;
  explicit FixedTable(const FixedPoint& f) : unit(f.unit) {
    const __m128i a = load128(f.values), b = load128(f.values + 8), byte = _mm_set1_epi16(0xFF);
    low = _mm256_broadcastsi128_si256(
        _mm_packus_epi16(_mm_and_si128(a, byte), _mm_and_si128(b, byte)));
    high = _mm256_broadcastsi128_si256(
        _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8)));
  }
};
// Where in a unit of x the element that meets weight i is; the lower half meets the first 32.
inline int fixed_place(int i) {
  const int byte = i / 2;  // even weights of bytes 0-7 and 16-23, of the others, then odd weights
  return i % 2 * 32 + byte / 8 % 2 * 16 + byte / 16 * 8 + byte % 8;
}
struct FixedWeights {
  __m256i v[4];
  FixedWeights(const uint8_t* packed, const FixedTable& table) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed));
    const __m256i nibble = _mm256_set1_epi8(0x0F);
    const __m256i even = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
    const __m256i odd = _mm256_and_si256(bytes, nibble);
    const __m256i even_low = _mm256_shuffle_epi8(table.low, even);
    const __m256i even_high = _mm256_shuffle_epi8(table.high, even);
    const __m256i odd_low = _mm256_shuffle_epi8(table.low, odd);
    const __m256i odd_high = _mm256_shuffle_epi8(table.high, odd);
    v[0] = _mm256_unpacklo_epi8(even_low, even_high);
    v[1] = _mm256_unpackhi_epi8(even_low, even_high);
    v[2] = _mm256_unpacklo_epi8(odd_low, odd_high);
    v[3] = _mm256_unpackhi_epi8(odd_low, odd_high);
  }
  // The sums of the first 32 products in the lower half, of the others in the upper.
  Vec times(const int16_t* x) const {
    const __m256i* at = reinterpret_cast<const __m256i*>(x);
    __m256i products[4];
    for (int i = 0; i < 4; ++i) products[i] = _mm256_madd_epi16(v[i], _mm256_load_si256(at + i));
    return _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_add_epi32(products[0], products[1]),
                                               _mm256_add_epi32(products[2], products[3])));
  }
};

inline Vec root(Vec v) { return _mm256_sqrt_ps(v); }

// values[code] of W codes.
inline Vec look_up(const float* values, const uint8_t* codes) {
  const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
  return _mm256_i32gather_ps(values, _mm256_cvtepu8_epi32(eight), 4);
}
// How far from the code of 0 the code nearest to |s| is; see moments8bit.h.
inline __m256i code_distance(const lowrank::MomentMap& map, Vec s) {
  const __m256i low = _mm256_set1_epi32(lowrank::LOWEST);
  __m256i bits = _mm256_and_si256(_mm256_castps_si256(s), _mm256_set1_epi32(0x7FFFFFFF));
  bits = _mm256_max_epi32(bits, low);
  bits = _mm256_min_epi32(bits, _mm256_set1_epi32(lowrank::HIGHEST));
  const __m256i bin = _mm256_srli_epi32(_mm256_sub_epi32(bits, low), 16);
  const __m256i found =
      _mm256_i32gather_epi32(reinterpret_cast<const int*>(map.bins), bin, 4);
  const __m256i rest = _mm256_set1_epi32(0xFFFF);
  const __m256i above =
      _mm256_cmpgt_epi32(_mm256_and_si256(bits, rest), _mm256_and_si256(found, rest));
  return _mm256_sub_epi32(_mm256_srli_epi32(found, 16), above);
}
inline __m256i signed_codes(const lowrank::MomentMap& map, Vec s) {
  const __m256i distance = code_distance(map, s);
  const __m256i with_sign = _mm256_sign_epi32(
      distance, _mm256_or_si256(_mm256_castps_si256(s), _mm256_set1_epi32(1)));
  return _mm256_add_epi32(_mm256_set1_epi32(map.zero), with_sign);
}
inline __m256i unsigned_codes(const lowrank::MomentMap& map, Vec s) {
  const Vec zero = _mm256_cmp_ps(s, _mm256_setzero_ps(), _CMP_EQ_OQ);
  return _mm256_andnot_si256(_mm256_castps_si256(zero), code_distance(map, s));
}
// Saturates: one below the first code is the first code.
inline void store_codes(uint8_t* to, __m256i codes) {
  const __m128i words =
      _mm_packs_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
}

// Lanes of 64 bits of which products take the lower halves; store_words stores those of four
// vectors, lane by lane.
using Wide = __m256i;
inline Wide ascending(uint64_t q) {
  return _mm256_add_epi64(_mm256_set1_epi64x(int64_t(q)), _mm256_setr_epi64x(0, 1, 2, 3));
}
inline Wide wide(uint32_t v) { return _mm256_set1_epi64x(v); }
inline Wide product(Wide a, uint32_t b) { return _mm256_mul_epu32(a, wide(b)); }
inline Wide upper_half(Wide a) { return _mm256_srli_epi64(a, 32); }
inline Wide exclusive_or(Wide a, Wide b) { return _mm256_xor_si256(a, b); }
inline void store_words(uint32_t* to, Wide c0, Wide c1, Wide c2, Wide c3) {
  const __m256i first = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xAA);
  const __m256i second = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xAA);
  const __m256i even = _mm256_unpacklo_epi64(first, second);
  const __m256i odd = _mm256_unpackhi_epi64(first, second);
  __m256i* at = reinterpret_cast<__m256i*>(to);
  _mm256_storeu_si256(at, _mm256_permute2x128_si256(even, odd, 0x20));
  _mm256_storeu_si256(at + 1, _mm256_permute2x128_si256(even, odd, 0x31));
}
// v where the word is at least `least`, else 0.
inline Vec where_at_least(const uint32_t* words, uint32_t least, Vec v) {
  const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
  const __m256i largest = _mm256_max_epu32(w, _mm256_set1_epi32(int32_t(least)));
  return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(w, largest)));
}

// 32 scaled weights -> 16 packed bytes: four steps down the tree of midpoints, then the nibbles.
struct Encoder {
  Vec level[4];
  __m256i order;
  explicit Encoder(const Levels& levels)
      : order(_mm256_broadcastsi128_si256(load128(levels.order))) {
    for (int i = 0; i < 4; ++i) level[i] = load(levels.midpoints[i]);
  }
  __m256i ranks(Vec s) const {
    __m256i rank = _mm256_setzero_si256();
    for (int i = 0; i < 4; ++i) {
      const Vec above = _mm256_cmp_ps(s, _mm256_permutevar8x32_ps(level[i], rank), _CMP_GT_OQ);
      rank = _mm256_sub_epi32(_mm256_add_epi32(rank, rank), _mm256_castps_si256(above));
    }
    return rank;
  }
  void encode32(const Vec (&s)[4], uint8_t* packed) const {
    const __m256i first = _mm256_packs_epi32(ranks(s[0]), ranks(s[1]));
    const __m256i second = _mm256_packs_epi32(ranks(s[2]), ranks(s[3]));
    const __m256i codes = _mm256_shuffle_epi8(order, _mm256_packus_epi16(first, second));
    __m256i pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0110));  // 16 even + odd
    pairs = _mm256_packus_epi16(pairs, pairs);
    // Packing worked in halves: the two bytes of each group of four come from either half in turn.
    const __m128i low = _mm256_castsi256_si128(pairs), high = _mm256_extracti128_si256(pairs, 1);
    store128(packed, _mm_unpacklo_epi16(low, high));
  }
};

}  // namespace
