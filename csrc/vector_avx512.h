// AVX-512 (F, BW, VL, DQ) primitives: a vector is 16 floats, and a codebook is one register.
#pragma once

// GCC 12 warns about its own AVX-512 header, whose undefined registers initialise themselves.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "moments8bit.h"
#include "scalar.h"

namespace {

constexpr int W = 16;
constexpr int TILE_M = 4;  // rows of x held in accumulators, beside 4 rows of the weight
constexpr int BLOCK_N = 8, BLOCK_V = 3;  // the same for many: rows of the weight, vectors of x
using Vec = __m512;

inline __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
// Writes past the caches, without reading first what is overwritten: `bytes` a multiple of 64.
inline void stream(void* to, const void* from, int bytes) {
  for (int i = 0; i < bytes; i += 64)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(static_cast<char*>(to) + i),
                        _mm512_load_si512(static_cast<const char*>(from) + i));
}
inline void finish_streams() { _mm_sfence(); }
inline Vec set1(float v) { return _mm512_set1_ps(v); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// Both return b where either is NaN.
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline float sum(Vec v) { return _mm512_reduce_add_ps(v); }

// Largest |x| so far, compared as integers: there NaN is above infinity, and is not lost.
struct AbsMax {
  __m512i bits = _mm512_setzero_si512();
  void take(Vec v) {
    const __m512i abs = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7FFFFFFF));
    bits = _mm512_max_epi32(bits, abs);
  }
  float get() const { return float_of(_mm512_reduce_max_epi32(bits)); }
};

// v * 2^n for the integer n nearest to t; v a normal float.
inline Vec scale_by_power(Vec v, Vec t) {
  const __m512i n = _mm512_slli_epi32(_mm512_cvtps_epi32(t), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(v), n));
}
inline Vec round_to_even(Vec v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT); }
// v[i] becomes the elements i of all of v: pairs, fours, then quarters change places.
inline void transpose(Vec (&v)[W]) {
  Vec pairs[W], fours[W], halves[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < W; i += 4) {
    for (int j = 0; j < 2; ++j) {
      fours[i + 2 * j] = _mm512_shuffle_ps(pairs[i + j], pairs[i + 2 + j], 0x44);
      fours[i + 2 * j + 1] = _mm512_shuffle_ps(pairs[i + j], pairs[i + 2 + j], 0xEE);
    }
  }
  // fours[4 g + c] is, in its quarter q, elements 4 q + c of rows 4 g to 4 g + 3
#pragma GCC unroll 16
  for (int c = 0; c < 4; ++c) {
    for (int g = 0; g < 2; ++g) {
      halves[8 * g + c] = _mm512_shuffle_f32x4(fours[8 * g + c], fours[8 * g + 4 + c], 0x88);
      halves[8 * g + 4 + c] = _mm512_shuffle_f32x4(fours[8 * g + c], fours[8 * g + 4 + c], 0xDD);
    }
  }
#pragma GCC unroll 16
  for (int c = 0; c < 4; ++c) {
    v[c] = _mm512_shuffle_f32x4(halves[c], halves[8 + c], 0x88);
    v[8 + c] = _mm512_shuffle_f32x4(halves[c], halves[8 + c], 0xDD);
    v[4 + c] = _mm512_shuffle_f32x4(halves[4 + c], halves[12 + c], 0x88);
    v[12 + c] = _mm512_shuffle_f32x4(halves[4 + c], halves[12 + c], 0xDD);
  }
}

inline Vec zero_below(Vec v, Vec x, Vec bound) {
  return _mm512_mask_mov_ps(v, _mm512_cmp_ps_mask(x, bound, _CMP_LT_OQ), _mm512_setzero_ps());
}

inline Vec load(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec load(const Bfloat16* p) {
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}
inline void store(Half* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(Bfloat16* p, Vec v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

// Sixteen floats in one register: vpermps looks up sixteen codes at once, by their low four bits.
struct Table {
  Vec values;
  explicit Table(const float* codebook) : values(load(codebook)) {}
};

struct BlockTable {
  Vec values;
  BlockTable(const Table& table, float absmax) : values(mul(table.values, set1(absmax))) {}
};

// 16 packed bytes -> 32 weights.
inline void decode32(const uint8_t* packed, const BlockTable& table, Vec (&out)[2]) {
  const __m512i shifts = _mm512_set1_epi64(int64_t(4));  // 4, 0, 4, 0, ...: high nibble first
  const __m512i bytes = _mm512_broadcast_i32x4(load128(packed));
  // Lane i of four dwords takes bytes 2i, 2i, 2i + 1, 2i + 1, and 8 further on for the second half.
  const __m512i pick = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  const __m512i first = _mm512_srlv_epi32(_mm512_shuffle_epi8(bytes, pick), shifts);
  const __m512i second = _mm512_srlv_epi32(
      _mm512_shuffle_epi8(bytes, _mm512_add_epi32(pick, _mm512_set1_epi32(8))), shifts);
  out[0] = _mm512_permutexvar_ps(first, table.values);
  out[1] = _mm512_permutexvar_ps(second, table.values);
}

// 128 entries of the codebook, of 64 packed bytes: the i-th code of each of sixteen dwords at once,
// so that nothing is rearranged but x. Lanes 4q to 4q + 3 are the q-th 32 of them.
struct Entries {
  Vec v[8];
  Entries(const uint8_t* packed, const Table& table) {
    const __m512i bytes = _mm512_loadu_si512(packed);
    for (int i = 0; i < 8; ++i)
      v[i] = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4 * (i ^ 1)), table.values);
  }
};
// Where in a span of x the element that meets entry i is.
inline int span_place(int i) { return i % 8 * 16 + i / 8; }
// The scales of a span of blocks of G, a block's in the lanes of its weights; reads 16 floats.
struct Spread {
  __m512i block;  // of each lane
  explicit Spread(int64_t G) {
    const __m512i part = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    block = G == 32 ? part : G == 64 ? _mm512_srli_epi32(part, 1) : _mm512_setzero_si512();
  }
  Vec of(const float* absmax) const { return _mm512_permutexvar_ps(block, load(absmax)); }
};

// The block's sixteen weights, rounded to 16 bits, twice over: vpermw looks at five bits of a code.
struct BlockTable16 {
  __m512i values;
  template <class T>
  BlockTable16(const Table& table, float absmax, T*) {
    T rounded[16];
    store(rounded, mul(table.values, set1(absmax)));
    values = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rounded)));
  }
};

template <class T>
inline void decode32(const uint8_t* packed, const BlockTable16& table, T* out) {
  const __m512i v = _mm512_cvtepu8_epi32(load128(packed));
  const __m512i codes = _mm512_or_si512(_mm512_srli_epi32(v, 4), _mm512_slli_epi32(v, 16));
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(codes, table.values));
}

inline Vec halves(float first, float second) {
  return _mm512_insertf32x8(_mm512_set1_ps(first), _mm256_set1_ps(second), 1);
}

// 64 weights in 16-bit fixed point, of 32 packed bytes. The table is there twice: vpermw looks at
// five bits of a word, of which a byte's fifth then does not matter.
struct FixedTable {
  __m512i values;
  float unit;
  explicit FixedTable(const FixedPoint& f)
      : values(_mm512_broadcast_i64x4(
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(f.values)))),
        unit(f.unit) {}
};
// Where in a unit of x the element that meets weight i is: the even ones, then the odd.
inline int fixed_place(int i) { return i % 2 * 32 + i / 2; }
struct FixedWeights {
  __m512i even, odd;
  FixedWeights(const uint8_t* packed, const FixedTable& table) {
    const __m512i bytes =
        _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)));
    even = _mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4), table.values);
    odd = _mm512_permutexvar_epi16(bytes, table.values);
  }
  // The sums of the first 32 products in the lower half, of the others in the upper.
  Vec times(const int16_t* x) const {
    const __m512i first = _mm512_madd_epi16(even, _mm512_load_si512(x));
    const __m512i second = _mm512_madd_epi16(odd, _mm512_load_si512(x + 32));
    return _mm512_cvtepi32_ps(_mm512_add_epi32(first, second));
  }
};

inline Vec root(Vec v) { return _mm512_sqrt_ps(v); }

// values[code] of W codes.
inline Vec look_up(const float* values, const uint8_t* codes) {
  return _mm512_i32gather_ps(_mm512_cvtepu8_epi32(load128(codes)), values, 4);
}
// How far from the code of 0 the code nearest to |s| is; see moments8bit.h.
inline __m512i code_distance(const lowrank::MomentMap& map, Vec s) {
  const __m512i low = _mm512_set1_epi32(lowrank::LOWEST);
  __m512i bits = _mm512_and_si512(_mm512_castps_si512(s), _mm512_set1_epi32(0x7FFFFFFF));
  bits = _mm512_max_epi32(bits, low);
  bits = _mm512_min_epi32(bits, _mm512_set1_epi32(lowrank::HIGHEST));
  const __m512i bin = _mm512_srli_epi32(_mm512_sub_epi32(bits, low), 16);
  const __m512i found = _mm512_i32gather_epi32(bin, map.bins, 4);
  const __m512i rest = _mm512_set1_epi32(0xFFFF);
  const __mmask16 above =
      _mm512_cmpgt_epi32_mask(_mm512_and_si512(bits, rest), _mm512_and_si512(found, rest));
  const __m512i below = _mm512_srli_epi32(found, 16);
  return _mm512_mask_add_epi32(below, above, below, _mm512_set1_epi32(1));
}
inline __m512i signed_codes(const lowrank::MomentMap& map, Vec s) {
  const __m512i distance = code_distance(map, s), zero = _mm512_set1_epi32(map.zero);
  const __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(s));
  const __m512i codes =
      _mm512_mask_sub_epi32(_mm512_add_epi32(zero, distance), negative, zero, distance);
  return _mm512_max_epi32(codes, _mm512_setzero_si512());
}
inline __m512i unsigned_codes(const lowrank::MomentMap& map, Vec s) {
  const __mmask16 zero = _mm512_cmp_ps_mask(s, _mm512_setzero_ps(), _CMP_EQ_OQ);
  return _mm512_mask_mov_epi32(code_distance(map, s), zero, _mm512_setzero_si512());
}
inline void store_codes(uint8_t* to, __m512i codes) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(codes));
}

// Lanes of 64 bits of which products take the lower halves; store_words stores those of four
// vectors, lane by lane.
using Wide = __m512i;
inline Wide ascending(uint64_t q) {
  return _mm512_add_epi64(_mm512_set1_epi64(int64_t(q)), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Wide wide(uint32_t v) { return _mm512_set1_epi64(v); }
inline Wide product(Wide a, uint32_t b) { return _mm512_mul_epu32(a, wide(b)); }
inline Wide upper_half(Wide a) { return _mm512_srli_epi64(a, 32); }
inline Wide exclusive_or(Wide a, Wide b) { return _mm512_xor_si512(a, b); }
inline void store_words(uint32_t* to, Wide c0, Wide c1, Wide c2, Wide c3) {
  const __m512i first = _mm512_mask_blend_epi32(0xAAAA, c0, _mm512_slli_epi64(c1, 32));
  const __m512i second = _mm512_mask_blend_epi32(0xAAAA, c2, _mm512_slli_epi64(c3, 32));
  const __m512i low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  const __m512i high = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  _mm512_storeu_si512(to, _mm512_permutex2var_epi64(first, low, second));
  _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi64(first, high, second));
}
// v where the word is at least `least`, else 0.
inline Vec where_at_least(const uint32_t* words, uint32_t least, Vec v) {
  const __m512i bound = _mm512_set1_epi32(int32_t(least));
  return _mm512_maskz_mov_ps(_mm512_cmpge_epu32_mask(_mm512_loadu_si512(words), bound), v);
}

// 32 scaled weights -> 16 packed bytes: four steps down the tree of midpoints, then the nibbles.
struct Encoder {
  __m512 level[4];
  __m128i order;
  explicit Encoder(const Levels& levels)
      : order(load128(levels.order)) {
    for (int i = 0; i < 4; ++i) {
      level[i] = _mm512_castsi512_ps(_mm512_broadcast_i64x4(
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(levels.midpoints[i]))));
    }
  }
  __m128i ranks(Vec s) const {
    __m512i rank = _mm512_setzero_si512();
    for (int i = 0; i < 4; ++i) {
      const Vec midpoint = _mm512_permutexvar_ps(rank, level[i]);
      const __mmask16 above = _mm512_cmp_ps_mask(s, midpoint, _CMP_GT_OQ);
      rank = _mm512_add_epi32(rank, rank);
      rank = _mm512_mask_add_epi32(rank, above, rank, _mm512_set1_epi32(1));
    }
    return _mm512_cvtepi32_epi8(rank);
  }
  void encode32(const Vec (&s)[2], uint8_t* packed) const {
    const __m256i order2 = _mm256_broadcastsi128_si256(order);
    const __m256i ranks32 = _mm256_set_m128i(ranks(s[1]), ranks(s[0]));
    const __m256i codes = _mm256_shuffle_epi8(order2, ranks32);
    const __m256i pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0110));  // 16 even + odd
    _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), _mm256_cvtepi16_epi8(pairs));
  }
};

}  // namespace
