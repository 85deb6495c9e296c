// y = x w^T + bias for tens and hundreds of rows of x; codebook_impl.h comes before it.
//
// As BLAS does it, but that the weight is decoded where BLAS would copy it: a few hundred rows by
// DEPTH of K, into the second-level cache. There they meet x in stripes of STRIPE rows, which lie
// k after k; a stripe's DEPTH stays in the first level. BLOCK_N rows of the weight and a stripe are
// multiplied in registers, and their sums added to those of what came before of K.
#pragma once

#include "codebook_impl.h"

namespace {

constexpr int STRIPE = BLOCK_V * W;
constexpr int DEPTH = 256;       // of K, decoded at once
constexpr int WIDE_M = 512;      // rows of x in one pass over the weight
constexpr int WIDE_BLOCKS = 24;  // of BLOCK_N rows, decoded at once

inline int64_t stripes_of(int64_t M) { return (M + STRIPE - 1) / STRIPE; }

// Elements k0 <= k < k0 + length of row n, k0 a multiple of 256; `ahead` bytes on is read next.
inline void decode_stretch(const CodebookWeight& w, int64_t n, int64_t k0, int64_t length,
                           const Table& table, int64_t ahead, float* to) {
  const uint8_t* packed = w.packed + (n * padded(w.K) + k0) / 2;
  RowScales scales(w, n);
  for (int64_t k = 0; k < length;) {
    const BlockTable block(table, scales[block_of(w, k0 + k)]);
    const int64_t end = smaller(k + w.block_size, length);
    for (; k < end; k += CHUNK) {
      prefetch(packed + k / 2, ahead);
      decode32(packed + k / 2, block, to + k);
    }
  }
}

// Elements k0 <= k < k0 + 16 of a stripe's `count` rows of x -> [16, STRIPE], zeros beyond x.
template <class T>
void lay_stripe(const T* x, int64_t count, int64_t K, int64_t k0, float* to) {
  float room[STRIPE][16];  // by whole lines: rows of x may be a power of two apart
  const int64_t length = smaller(16, K - k0);
  for (int64_t m = 0; m < STRIPE; ++m)
    for (int64_t k = 0; k < 16; ++k)
      room[m][k] = m < count && k < length ? to_float(x[m * K + k0 + k]) : 0;
  for (int64_t k = 0; k < 16; ++k)
    for (int m = 0; m < STRIPE; ++m) to[k * STRIPE + m] = room[m][k];
}

// sums[n, m] += w[n] . x[m] over `length` of K, for BLOCK_N rows of w and a stripe of x.
inline void multiply_stripe(const float (*w)[DEPTH], const float* x, int64_t length, float* sums) {
  Vec s[BLOCK_N][BLOCK_V];
#pragma GCC unroll 32
  for (int n = 0; n < BLOCK_N; ++n)
    for (int v = 0; v < BLOCK_V; ++v) s[n][v] = set1(0);
  for (int64_t k = 0; k < length; ++k, x += STRIPE) {
    Vec xs[BLOCK_V];
    for (int v = 0; v < BLOCK_V; ++v) xs[v] = load(x + v * W);
#pragma GCC unroll 32
    for (int n = 0; n < BLOCK_N; ++n) {
      const Vec wn = set1(w[n][k]);
      for (int v = 0; v < BLOCK_V; ++v) s[n][v] = fma(wn, xs[v], s[n][v]);
    }
  }
#pragma GCC unroll 32
  for (int n = 0; n < BLOCK_N; ++n) {
    for (int v = 0; v < BLOCK_V; ++v) {
      float* to = sums + n * STRIPE + v * W;
      store(to, add(load(to), s[n][v]));
    }
  }
}

// A thread's: decoded rows of the weight, and their sums with every stripe of x.
struct WideRoom {
  float (*decoded)[BLOCK_N][DEPTH];  // [WIDE_BLOCKS]
  float* sums;                       // [stripes, WIDE_BLOCKS, BLOCK_N, STRIPE]
};

// Rows n0 <= n < n1 of y^T, WIDE_BLOCKS blocks or fewer; x in stripes [stripes, Kp, STRIPE].
template <class T>
void wide_rows(const float* x, int64_t M, const CodebookWeight& w, const float* bias,
               const Table& shared, int64_t n0, int64_t n1, const WideRoom& room, T* y) {
  const int64_t Kp = padded(w.K), stripes = stripes_of(M);
  const int64_t blocks = (n1 - n0 + BLOCK_N - 1) / BLOCK_N;
  const auto sums_of = [&](int64_t stripe, int64_t b) {
    return room.sums + (stripe * WIDE_BLOCKS + b) * BLOCK_N * STRIPE;
  };
  memset(room.sums, 0, size_t(stripes * WIDE_BLOCKS * BLOCK_N * STRIPE) * sizeof(float));
  for (int64_t k0 = 0; k0 < Kp; k0 += DEPTH) {
    const int64_t length = smaller(DEPTH, Kp - k0);
    for (int64_t i = 0; i < blocks * BLOCK_N; ++i) {
      const int64_t n = smaller(n0 + i, n1 - 1);  // past the last row it is decoded again
      const Table own = w.codebook_rows == 1 ? shared : Table(codebook_of(w, n));
      decode_stretch(w, n, k0, length, own, DEPTH / 2, room.decoded[i / BLOCK_N][i % BLOCK_N]);
    }
    for (int64_t i = 0; i < stripes; ++i)
      for (int64_t b = 0; b < blocks; ++b)
        multiply_stripe(room.decoded[b], x + (i * Kp + k0) * STRIPE, length, sums_of(i, b));
  }
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t b = 0, n = n0; b < blocks; ++b) {
      const float* sum = sums_of(m / STRIPE, b) + m % STRIPE;
      const int64_t end = smaller(n + BLOCK_N, n1);
      for (; n < end; ++n, sum += STRIPE) from_float(bias ? *sum + bias[n] : *sum, y + m * w.N + n);
    }
  }
}

// One pass over the weight for M <= WIDE_M rows of x; returns false where memory is short.
template <class T>
bool wide_multiply(const T* x, int64_t M, const CodebookWeight& w, const float* bias, T* y,
                   int32_t threads) {
  const int64_t Kp = padded(w.K), stripes = stripes_of(M), for_x = stripes * Kp * STRIPE;
  const int64_t for_rows = WIDE_BLOCKS * BLOCK_N * (DEPTH + stripes * STRIPE);  // of a thread
  float* room = static_cast<float*>(
      aligned_alloc(64, size_t(for_x + threads * for_rows) * sizeof(float)));
  if (!room) return false;
#pragma omp parallel num_threads(threads) if (w.N * w.K > WORTH_THREADS)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < stripes * (Kp / 16); ++i) {
      const int64_t m = i / (Kp / 16) * STRIPE, k = i % (Kp / 16) * 16;
      lay_stripe(x + m * w.K, smaller(STRIPE, M - m), w.K, k, room + m * Kp + k * STRIPE);
    }
    const Table shared(w.codebook);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < threads; ++t) {
      const int64_t blocks = (w.N + BLOCK_N - 1) / BLOCK_N;
      float* own = room + for_x + t * for_rows;
      float* sums = own + WIDE_BLOCKS * BLOCK_N * DEPTH;
      const WideRoom rows{reinterpret_cast<float (*)[BLOCK_N][DEPTH]>(own), sums};
      const int64_t last = smaller(blocks * (t + 1) / threads * BLOCK_N, w.N);
      for (int64_t n = blocks * t / threads * BLOCK_N; n < last; n += WIDE_BLOCKS * BLOCK_N)
        wide_rows(room, M, w, bias, shared, n, smaller(n + WIDE_BLOCKS * BLOCK_N, last), rows,
                  y);
    }
  }
  free(room);
  return true;
}

}  // namespace
