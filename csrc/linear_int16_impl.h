// y = x w^T + bias for few rows of x in 16-bit fixed point; linear_impl.h comes before it.
//
// The codebook becomes 16-bit integers, and each 64 elements of x 14-bit ones with a scale of their
// own. Then 64 weights are two to four lookups of bytes or words and as many pmaddwd, where float32
// takes twice the lookups and twice the products: near the speed at which the weight can be read.
// The sums of 64 are exact (8 products of 15 + 13 bits fit 31), and are added up in float32.
#pragma once

#include <math.h>

#include "linear_impl.h"

namespace {

constexpr int UNIT = 64;     // weights that are multiplied as integers
constexpr int UNITS = 64;    // whose scales are decoded at once
constexpr int FIXED_M = 4;   // rows of x in one pass over the weight
constexpr float X_MAX = 8191;
constexpr float X_TINY = 1e-34f;  // where 64 elements are all below it, they count as 0

template <class T>
struct FixedProduct {
  const int16_t* x;     // [M, units, 64] in the order of fixed_place
  const float* scales;  // [M, units]
  int64_t units;
  const CodebookWeight& w;
  const float* bias;
  T* y;
};

// `from` [length <= 64] -> fixed point; returns its scale, NaN if an element is not finite.
template <class T>
float fix_unit(const T* from, int64_t length, int16_t* to) {
  alignas(64) float room[UNIT] = {};
  for (int64_t i = 0; i < length; ++i) room[i] = to_float(from[i]);
  AbsMax largest;
  for (int i = 0; i < UNIT; i += W) largest.take(load(room + i));
  const float top = largest.get();
  const bool finite = top < INFINITY, tiny = !(top >= X_TINY);
  const Vec inverse = set1(finite && !tiny ? X_MAX / top : 0);
  for (int i = 0; i < UNIT; i += W) store(room + i, round_to_even(mul(load(room + i), inverse)));
#pragma GCC unroll 64  // the places are then constants
  for (int i = 0; i < UNIT; ++i) to[fixed_place(i)] = finite ? int16_t(room[i]) : 0;
  return finite ? (tiny ? 0 : top / X_MAX) : NAN;
}

// What `count` sums from unit u0 on stand for, in units of the codebook: absmax times the scale of
// x. Blocks of 32 have two absmax in a unit: `first` is for the lower half of a sum.
template <int M>
struct UnitScales {
  float first[M][UNITS], second[M][UNITS];

  template <class T>
  void fill(const FixedProduct<T>& p, const RowScales& scales, int64_t u0, int64_t count) {
    float absmax[2 * UNITS + 1];
    const int64_t b0 = block_of(p.w, u0 * UNIT);
    const int64_t blocks = smaller(block_of(p.w, (u0 + count) * UNIT - 1) + 1, scales.blocks) - b0;
    scales.range(b0, blocks, absmax);
    absmax[blocks] = 0;  // the second half of a row's last unit may be no block
    for (int m = 0; m < M; ++m) {
      const float* x = p.scales + m * p.units + u0;
      if (p.w.block_size == UNIT / 2) {
        for (int64_t i = 0; i < count; ++i) first[m][i] = absmax[2 * i] * x[i];
        for (int64_t i = 0; i < count; ++i) second[m][i] = absmax[2 * i + 1] * x[i];
      } else if (p.w.block_size == UNIT) {
        for (int64_t i = 0; i < count; ++i) first[m][i] = absmax[i] * x[i];
      } else {
        for (int64_t i = 0; i < count; ++i)
          first[m][i] = absmax[block_of(p.w, (u0 + i) * UNIT) - b0] * x[i];
      }
    }
  }
};

template <int M, bool TWO_BLOCKS, int ROWS, class T>
void fixed_rows(const FixedProduct<T>& p, const Rows<ROWS>& rows, const FixedTable& table) {
  const int64_t whole = padded(p.w.K) / UNIT;
  UnitScales<M> scales[ROWS];
  Vec sums[ROWS][M];
  for (int r = 0; r < ROWS; ++r)
    for (int m = 0; m < M; ++m) sums[r][m] = set1(0);
  for (int64_t u0 = 0; u0 < p.units; u0 += UNITS) {
    const int64_t count = smaller(UNITS, p.units - u0), full = smaller(count, whole - u0);
    for (int r = 0; r < ROWS; ++r) scales[r].fill(p, RowScales(p.w, rows.n[r]), u0, count);
    const auto multiply_unit = [&](const uint8_t* from, int64_t i, int r) {
      const FixedWeights weights(from, table);
      for (int m = 0; m < M; ++m) {
        const Vec products = weights.times(p.x + (m * p.units + u0 + i) * UNIT);
        const Vec scale = TWO_BLOCKS ? halves(scales[r].first[m][i], scales[r].second[m][i])
                                     : set1(scales[r].first[m][i]);
        sums[r][m] = fma(products, scale, sums[r][m]);
      }
    };
    const int64_t pairs = full / 2 * 2;
    for (int64_t i = 0; i < pairs; i += 2) {
      for (int r = 0; r < ROWS; ++r) {
        const uint8_t* from = rows.packed[r] + (u0 + i) * UNIT / 2;
        prefetch(from, NEXT);
        multiply_unit(from, i, r);
        multiply_unit(from + UNIT / 2, i + 1, r);
      }
    }
    for (int r = 0; r < ROWS && pairs < count; ++r) {
      const uint8_t* from = rows.packed[r] + (u0 + pairs) * UNIT / 2;
      if (pairs < full) multiply_unit(from, pairs, r);
      if (full < count) {  // half a unit: a row ends after 32 weights
        uint8_t rest[UNIT / 2] = {};
        memcpy(rest, rows.packed[r] + whole * UNIT / 2, UNIT / 4);
        multiply_unit(rest, full, r);
      }
    }
  }
  for (int r = 0; r < rows.count; ++r) {
    const int64_t n = rows.n[r];
    for (int m = 0; m < M; ++m) {
      const float y = sum(sums[r][m]) * table.unit;
      from_float(p.bias ? y + p.bias[n] : y, p.y + m * p.w.N + n);
    }
  }
}

template <int M, bool TWO_BLOCKS, class T>
void fixed_multiply(const FixedProduct<T>& p, int32_t threads) {
  const int64_t apart = rows_apart(p.w);
#pragma omp parallel num_threads(threads) if (p.w.N * p.w.K > WORTH_THREADS)
  if (p.w.codebook_rows == 1) {
    const FixedTable table{FixedPoint(p.w.codebook)};
#pragma omp for schedule(static)
    for (int64_t n = 0; n < apart; ++n)
      fixed_rows<M, TWO_BLOCKS>(p, Rows<STREAMS>(p.w, n, apart), table);
  } else {
#pragma omp for schedule(static)
    for (int64_t n = 0; n < p.w.N; ++n)
      fixed_rows<M, TWO_BLOCKS>(p, Rows<1>(p.w, n, 0),
                                FixedTable(FixedPoint(codebook_of(p.w, n))));
  }
}

template <int M, class T>
void fixed_multiply(const FixedProduct<T>& p, int32_t threads) {
  if (p.w.block_size == UNIT / 2) return fixed_multiply<M, true>(p, threads);
  fixed_multiply<M, false>(p, threads);
}

template <class T>
int32_t linear_int16_of(const T* x, int64_t M, const CodebookWeight& w, const float* bias, T* y,
                        int32_t threads) {
  const int64_t units = (w.K + UNIT - 1) / UNIT, rows = smaller(M, FIXED_M);
  const size_t for_x = size_t(rows * units) * UNIT * sizeof(int16_t);
  const size_t for_scales = (size_t(rows * units) * sizeof(float) + 63) / 64 * 64;
  char* room = static_cast<char*>(aligned_alloc(64, for_x + for_scales + 64));
  if (!room) return LOWRANK_OUT_OF_MEMORY;
  int16_t* fixed = reinterpret_cast<int16_t*>(room);
  float* scales = reinterpret_cast<float*>(room + for_x);
  for (int64_t m0 = 0; m0 < M; m0 += FIXED_M) {
    const int64_t some = smaller(FIXED_M, M - m0);
    for (int64_t i = 0; i < some * units; ++i) {
      const int64_t m = m0 + i / units, k = i % units * UNIT;
      scales[i] = fix_unit(x + m * w.K + k, smaller(UNIT, w.K - k), fixed + i * UNIT);
    }
    const FixedProduct<T> p{fixed, scales, units, w, bias, y + m0 * w.N};
    if (some == 1) fixed_multiply<1>(p, threads);
    if (some == 2) fixed_multiply<2>(p, threads);
    if (some == 3) fixed_multiply<3>(p, threads);
    if (some == 4) fixed_multiply<4>(p, threads);
  }
  free(room);
  return LOWRANK_OK;
}

int32_t linear_int16(const void* x, int32_t dtype, int64_t M, const CodebookWeight& w,
                     const float* bias, void* y, int32_t threads) {
  if (dtype == LOWRANK_F16)
    return linear_int16_of(static_cast<const Half*>(x), M, w, bias, static_cast<Half*>(y),
                           threads);
  if (dtype == LOWRANK_BF16)
    return linear_int16_of(static_cast<const Bfloat16*>(x), M, w, bias, static_cast<Bfloat16*>(y),
                           threads);
  return linear_int16_of(static_cast<const float*>(x), M, w, bias, static_cast<float*>(y),
                         threads);
}

}  // namespace
