// y = x w^T + bias for few rows of x, straight from packed codes; codebook_impl.h comes before it.
//
// One or two rows of x: each 32 weights are decoded into registers and used at once. More rows:
// four rows of the weight are decoded into the first-level cache, a stretch of K at a time, and
// multiplied there in tiles of 4 x TILE_M accumulators: decoding is paid once for all rows of x.
#pragma once

#include "codebook_impl.h"

namespace {

constexpr int MAX_DIRECT = 2;   // rows of x for which decoded weights are used from registers
constexpr int MAX_M = 16;       // rows of x in one pass over the weight
constexpr int TILE_N = 4;
constexpr int STRETCH = 512;    // of K: 8 KB of decoded weights, 32 KB of x

template <class T>
struct Product {
  const float* x;  // [M, Kp], zeros beyond K
  int64_t M;
  const CodebookWeight& w;
  const float* bias;
  T* y;

  void put(int64_t m, int64_t n, float value) const {
    from_float(bias ? value + bias[n] : value, y + m * w.N + n);
  }
};

template <int M, class T>
void direct_row(const Product<T>& p, int64_t n, const Table& table) {
  constexpr int SUMS = M == 1 && VECTORS >= 4 ? 4 : 2;  // independent, to hide the latency of fma
  const int64_t Kp = padded(p.w.K);
  const uint8_t* packed = p.w.packed + n * (Kp / 2);
  RowScales scales(p.w, n);
  Vec sums[M][SUMS];
  for (int m = 0; m < M; ++m)
    for (int i = 0; i < SUMS; ++i) sums[m][i] = set1(0);
  for (int64_t k = 0, b = 0; k < Kp; ++b) {
    const BlockTable block(table, scales[b]);
    for (const int64_t end = smaller(k + p.w.block_size, Kp); k < end; k += CHUNK) {
      prefetch(packed + k / 2, AHEAD);
      Vec v[VECTORS];
      decode32(packed + k / 2, block, v);
      for (int m = 0; m < M; ++m)
        for (int i = 0; i < VECTORS; ++i)
          sums[m][i % SUMS] = fma(v[i], load(p.x + m * Kp + k + i * W), sums[m][i % SUMS]);
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int i = 1; i < SUMS; ++i) sums[m][0] = add(sums[m][0], sums[m][i]);
    p.put(m, n, sum(sums[m][0]));
  }
}

// sums[m][j] += w[j] . x[m] over `length` of K, for the M rows of x of one tile.
template <int M>
void multiply_tile(const float (*w)[STRETCH], const float* x, int64_t Kp, int64_t length,
                   Vec (*sums)[TILE_N]) {
  Vec s[M][TILE_N];
  for (int m = 0; m < M; ++m)
    for (int j = 0; j < TILE_N; ++j) s[m][j] = sums[m][j];
  for (int64_t k = 0; k < length; k += W) {
    Vec xs[M];
    for (int m = 0; m < M; ++m) xs[m] = load(x + m * Kp + k);
    for (int j = 0; j < TILE_N; ++j) {
      const Vec v = load(w[j] + k);
      for (int m = 0; m < M; ++m) s[m][j] = fma(v, xs[m], s[m][j]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int j = 0; j < TILE_N; ++j) sums[m][j] = s[m][j];
}

template <class T>
void tiled_rows(const Product<T>& p, int64_t n0, const Table& shared) {
  alignas(64) float w[TILE_N][STRETCH];
  Vec sums[MAX_M][TILE_N];
  for (int m = 0; m < MAX_M; ++m)
    for (int j = 0; j < TILE_N; ++j) sums[m][j] = set1(0);
  const int64_t Kp = padded(p.w.K), rows = smaller(TILE_N, p.w.N - n0);
  for (int64_t k0 = 0; k0 < Kp; k0 += STRETCH) {
    const int64_t length = smaller(STRETCH, Kp - k0);
    for (int64_t j = 0; j < TILE_N; ++j) {
      const int64_t n = n0 + smaller(j, rows - 1);  // past the last row: decoded again, not stored
      const uint8_t* packed = p.w.packed + (n * Kp + k0) / 2;
      RowScales scales(p.w, n);
      const Table table = p.w.codebook_rows == 1 ? shared : Table(codebook_of(p.w, n));
      for (int64_t k = 0; k < length;) {
        const BlockTable block(table, scales[block_of(p.w, k0 + k)]);
        const int64_t end = smaller(k + smaller(p.w.block_size, STRETCH), length);
        for (; k < end; k += CHUNK) {
          prefetch(packed + k / 2, TILE_N * Kp / 2);  // the same place in the next four rows
          decode32(packed + k / 2, block, w[j] + k);
        }
      }
    }
    int64_t m = 0;
    for (; m + TILE_M <= p.M; m += TILE_M)
      multiply_tile<TILE_M>(w, p.x + m * Kp + k0, Kp, length, sums + m);
    for (; m < p.M; ++m) multiply_tile<1>(w, p.x + m * Kp + k0, Kp, length, sums + m);
  }
  for (int64_t m = 0; m < p.M; ++m)
    for (int64_t j = 0; j < rows; ++j) p.put(m, n0 + j, sum(sums[m][j]));
}

template <class T>
void multiply(const Product<T>& p, int32_t threads) {
  const int64_t step = p.M <= MAX_DIRECT ? 1 : TILE_N;
#pragma omp parallel num_threads(threads) if (p.w.N * p.w.K > WORTH_THREADS)
  {
    const Table shared(p.w.codebook);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < p.w.N; n += step) {
      if (p.M > MAX_DIRECT) {
        tiled_rows(p, n, shared);
        continue;
      }
      const Table table = p.w.codebook_rows == 1 ? shared : Table(codebook_of(p.w, n));
      if (p.M == 1) direct_row<1>(p, n, table);
      if (p.M == 2) direct_row<2>(p, n, table);
    }
  }
}

// x as floats with rows padded by zeros: x itself where it is that already, else in `room`.
inline const float* padded_rows(const float* x, int64_t M, int64_t K, float* room) {
  if (!room) return x;
  for (int64_t m = 0; m < M; ++m) widen(x + m * K, K, room + m * padded(K));
  return room;
}
template <class T>
const float* padded_rows(const T* x, int64_t M, int64_t K, float* room) {
  for (int64_t m = 0; m < M; ++m) widen(x + m * K, K, room + m * padded(K));
  return room;
}

template <class T>
int32_t linear_of(const T* x, int64_t M, const CodebookWeight& w, const float* bias, T* y,
                  int32_t threads) {
  float* room = nullptr;
  if (sizeof(T) != sizeof(float) || w.K % CHUNK != 0) {
    const size_t bytes = size_t(smaller(M, MAX_M) * padded(w.K)) * sizeof(float);
    room = static_cast<float*>(aligned_alloc(64, bytes ? bytes : 64));
    if (!room) return LOWRANK_OUT_OF_MEMORY;
  }
  for (int64_t m = 0; m < M; m += MAX_M) {
    const int64_t rows = smaller(MAX_M, M - m);
    const float* some = padded_rows(x + m * w.K, rows, w.K, room);
    multiply(Product<T>{some, rows, w, bias, y + m * w.N}, threads);
  }
  free(room);
  return LOWRANK_OK;
}

int32_t linear(const void* x, int32_t dtype, int64_t M, const CodebookWeight& w, const float* bias,
               void* y, int32_t threads) {
  if (dtype == LOWRANK_F16)
    return linear_of(static_cast<const Half*>(x), M, w, bias, static_cast<Half*>(y), threads);
  if (dtype == LOWRANK_BF16)
    return linear_of(static_cast<const Bfloat16*>(x), M, w, bias, static_cast<Bfloat16*>(y),
                     threads);
  return linear_of(static_cast<const float*>(x), M, w, bias, static_cast<float*>(y), threads);
}

}  // namespace
