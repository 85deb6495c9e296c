// y = x w^T + bias for few rows of x, straight from packed codes; codebook_impl.h comes before it.
//
// Up to four rows of x: a span of weights is looked up into registers and used at once. More rows:
// four rows of the weight are decoded into the first-level cache, a stretch of K at a time, and
// multiplied there in tiles of 4 x TILE_M accumulators: decoding is paid once for all rows of x.
#pragma once

#include "linear_wide_impl.h"

namespace {

constexpr int MAX_DIRECT = 4;   // rows of x for which weights are used from registers
constexpr int MAX_M = 16;       // rows of x in one pass over the weight
constexpr int LOOKUP = 8 * W;   // weights that are decoded at once
constexpr int LOOKUPS = 32;     // whose scales are decoded at once
constexpr int TILE_N = 4;
constexpr int STRETCH = 512;    // of K: 8 KB of decoded weights, 32 KB of x

// Rows of the weight that are multiplied together, from places far apart: memory is read a fifth
// faster in four streams than in one, as waiting for one page then overlaps reading the others.
constexpr int STREAMS = 4;
constexpr int64_t NEXT = 1024;  // bytes on in each, asked for ahead of use

inline int64_t rows_apart(const CodebookWeight& w) { return (w.N + STREAMS - 1) / STREAMS; }

template <int ROWS>
struct Rows {
  int64_t n[ROWS];
  const uint8_t* packed[ROWS];
  int count = 0;  // of them to be stored: past the last row, that is multiplied again

  Rows(const CodebookWeight& w, int64_t first, int64_t apart) {
    for (int r = 0; r < ROWS; ++r) {
      count += first + r * apart < w.N;
      n[r] = smaller(first + r * apart, w.N - 1);
      packed[r] = w.packed + n[r] * (padded(w.K) / 2);
    }
  }
};

inline int64_t spans_of(int64_t K) { return (K + LOOKUP - 1) / LOOKUP; }

template <class T>
struct Product {
  const float* x;  // [M, Kp], zeros beyond K; for direct_rows [M, spans, LOOKUP]
  int64_t M;
  const CodebookWeight& w;
  const float* bias;
  T* y;

  void put(int64_t m, int64_t n, float value) const {
    from_float(bias ? value + bias[n] : value, y + m * w.N + n);
  }
};

// The rows of x laid out in the order of span_place, with zeros to whole spans.
template <class T>
void lay_out(const T* x, int64_t M, int64_t K, float* to) {
  const int64_t whole = K / LOOKUP * LOOKUP, width = spans_of(K) * LOOKUP;
  for (int64_t m = 0; m < M; ++m, x += K, to += width) {
    for (int64_t k = 0; k < whole; k += LOOKUP)
#pragma GCC unroll 128  // the places are then constants
      for (int i = 0; i < LOOKUP; ++i) to[k + span_place(i)] = to_float(x[k + i]);
    if (whole == width) continue;
    memset(to + whole, 0, LOOKUP * sizeof(float));
    for (int i = 0; i < K - whole; ++i) to[whole + span_place(i)] = to_float(x[whole + i]);
  }
}

// The entries of the codebook are multiplied and summed up, then the sums by absmax: four lanes sum
// up 8 products or fewer of one block each, so that a product for each weight is saved.
template <int M, int ROWS, class T>
void direct_rows(const Product<T>& p, const Rows<ROWS>& rows, const Table& table) {
  const int64_t spans = spans_of(p.w.K), whole = padded(p.w.K) / LOOKUP, blocks = blocks_of(p.w);
  const Spread spread(p.w.block_size);
  float scales[ROWS][LOOKUPS * LOOKUP / CHUNK + W];
  Vec sums[ROWS][M];
  for (int r = 0; r < ROWS; ++r)
    for (int m = 0; m < M; ++m) sums[r][m] = set1(0);
  for (int64_t s0 = 0; s0 < spans; s0 += LOOKUPS) {
    const int64_t count = smaller(LOOKUPS, spans - s0), full = smaller(count, whole - s0);
    const int64_t b0 = block_of(p.w, s0 * LOOKUP);
    const int64_t b1 = smaller(block_of(p.w, (s0 + count) * LOOKUP - 1) + 1, blocks);
    for (int r = 0; r < ROWS; ++r) {
      RowScales(p.w, rows.n[r]).range(b0, b1 - b0, scales[r]);
      for (int i = 0; i < W; ++i) scales[r][b1 - b0 + i] = 0;  // no blocks: they meet zeros of x
    }
    const auto multiply_span = [&](const uint8_t* from, int64_t i, int r) {
      const Entries entries(from, table);
      const Vec scale = spread.of(scales[r] + block_of(p.w, (s0 + i) * LOOKUP) - b0);
      for (int m = 0; m < M; ++m) {
        const float* x = p.x + (m * spans + s0 + i) * LOOKUP;
        Vec products = mul(entries.v[0], load(x));
        for (int j = 1; j < 8; ++j) products = fma(entries.v[j], load(x + j * W), products);
        sums[r][m] = fma(products, scale, sums[r][m]);
      }
    };
    for (int64_t i = 0; i < full; ++i) {
      for (int r = 0; r < ROWS; ++r) {
        const uint8_t* from = rows.packed[r] + (s0 + i) * LOOKUP / 2;
        prefetch(from, NEXT);
        multiply_span(from, i, r);
      }
    }
    for (int r = 0; r < ROWS && full < count; ++r) {  // a row ends within a span
      uint8_t rest[LOOKUP / 2] = {};
      memcpy(rest, rows.packed[r] + whole * LOOKUP / 2,
             size_t(padded(p.w.K) / 2 - whole * LOOKUP / 2));
      multiply_span(rest, full, r);
    }
  }
  for (int r = 0; r < rows.count; ++r)
    for (int m = 0; m < M; ++m) p.put(m, rows.n[r], sum(sums[r][m]));
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
      const Table table = p.w.codebook_rows == 1 ? shared : Table(codebook_of(p.w, n));
      // the same place in the next four rows is read next
      decode_stretch(p.w, n, k0, length, table, TILE_N * Kp / 2, w[j]);
    }
    int64_t m = 0;
    for (; m + TILE_M <= p.M; m += TILE_M)
      multiply_tile<TILE_M>(w, p.x + m * Kp + k0, Kp, length, sums + m);
    for (; m < p.M; ++m) multiply_tile<1>(w, p.x + m * Kp + k0, Kp, length, sums + m);
  }
  for (int64_t m = 0; m < p.M; ++m)
    for (int64_t j = 0; j < rows; ++j) p.put(m, n0 + j, sum(sums[m][j]));
}

template <int M, class T>
void direct_multiply(const Product<T>& p, int32_t threads) {
  const int64_t apart = rows_apart(p.w);
#pragma omp parallel num_threads(threads) if (p.w.N * p.w.K > WORTH_THREADS)
  if (p.w.codebook_rows == 1) {
    const Table table(p.w.codebook);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < apart; ++n) direct_rows<M>(p, Rows<STREAMS>(p.w, n, apart), table);
  } else {
#pragma omp for schedule(static)
    for (int64_t n = 0; n < p.w.N; ++n)
      direct_rows<M>(p, Rows<1>(p.w, n, 0), Table(codebook_of(p.w, n)));
  }
}

template <class T>
void tiled_multiply(const Product<T>& p, int32_t threads) {
#pragma omp parallel num_threads(threads) if (p.w.N * p.w.K > WORTH_THREADS)
  {
    const Table shared(p.w.codebook);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < p.w.N; n += TILE_N) tiled_rows(p, n, shared);
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
int32_t linear_of(const T* x, int64_t M, const CodebookWeight& w, const float* bias,
                  const lowrank_lora* lora, T* y, int32_t threads) {
  if (M > MAX_M || lora) {  // passes of equally many stripes
    const int64_t passes = (M + WIDE_M - 1) / WIDE_M;
    const int64_t rows = ((M + passes - 1) / passes + STRIPE - 1) / STRIPE * STRIPE;
    for (int64_t m = 0; m < M; m += rows) {
      const WideProduct<T> p{x + m * w.K, m, smaller(rows, M - m), w, bias, lora, y + m * w.N};
      if (!wide_multiply(p, threads)) return LOWRANK_OUT_OF_MEMORY;
    }
    return LOWRANK_OK;
  }
  float* room = nullptr;
  if (M <= MAX_DIRECT || sizeof(T) != sizeof(float) || w.K % CHUNK != 0) {
    const size_t bytes = size_t(M * spans_of(w.K) * LOOKUP) * sizeof(float);
    room = static_cast<float*>(aligned_alloc(64, bytes ? bytes : 64));
    if (!room) return LOWRANK_OUT_OF_MEMORY;
  }
  if (M <= MAX_DIRECT) lay_out(x, M, w.K, room);
  const Product<T> p{M <= MAX_DIRECT ? room : padded_rows(x, M, w.K, room), M, w, bias, y};
  if (M == 1) direct_multiply<1>(p, threads);
  if (M == 2) direct_multiply<2>(p, threads);
  if (M == 3) direct_multiply<3>(p, threads);
  if (M == 4) direct_multiply<4>(p, threads);
  if (M > MAX_DIRECT) tiled_multiply(p, threads);
  free(room);
  return LOWRANK_OK;
}

int32_t linear(const void* x, int32_t dtype, int64_t M, const CodebookWeight& w, const float* bias,
               const lowrank_lora* lora, void* y, int32_t threads) {
  int32_t status = LOWRANK_OK;
  with_type(dtype, [&](auto* type) {
    using T = decltype(type);
    status = linear_of(static_cast<T>(const_cast<void*>(x)), M, w, bias, lora, static_cast<T>(y),
                       threads);
  });
  return status;
}

}  // namespace
