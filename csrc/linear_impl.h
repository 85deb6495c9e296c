// y = x w^T + bias for few rows of x, straight from packed codes; codebook_impl.h comes before it.
// Several weights of one x are multiplied in one go, as waking threads takes as long as a small one.
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
float dot(const float* a, const T* b, int64_t length) {
  Vec s = set1(0);
  int64_t i = 0;
  for (; i + W <= length; i += W) s = fma(load(a + i), load(b + i), s);
  float rest = 0;
  for (; i < length; ++i) rest += a[i] * to_float(b[i]);
  return sum(s) + rest;
}

template <class T>
struct Product {
  const float* x;  // [M, Kp], zeros beyond K; for direct_rows [M, spans, LOOKUP]
  int64_t M;
  CodebookWeight w;
  const float* bias;
  const lowrank_lora* lora;  // or null; its h times its scale is there when rows of y are put
  T* y;

  void put(int64_t m, int64_t n, float value) const {
    if (bias) value += bias[n];
    if (lora) value += dot(lora->B + n * lora->R, lora->h + m * lora->R, lora->R);
    from_float(value, y + m * w.N + n);
  }
};

// The scales of `count` blocks of row n from b on, and zeros up to whole vectors and one more: as
// many as are no blocks meet zeros of x.
inline void scales_of(const CodebookWeight& w, int64_t n, int64_t b, int64_t count, float* out) {
  const RowScales scales(w, n);
  const int64_t left = (w.N - n) * scales.blocks - b;  // in the array
  if (scales.codes && (count + W - 1) / W * W <= left) {
    const uint8_t* codes = scales.codes + b;
    const float step = scales.step, offset = scales.offset;
    for (int64_t i = 0; i < count; i += W) {
      float room[W];
      for (int j = 0; j < W; ++j) room[j] = float(codes[i + j]) * step + offset;
      memcpy(out + i, room, sizeof room);
    }
  } else {
    scales.range(b, count, out);
  }
  store(out + count, set1(0));
}

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
  float scales[ROWS][LOOKUPS * LOOKUP / CHUNK + 2 * W];
  Vec sums[ROWS][M];
  for (int r = 0; r < ROWS; ++r)
    for (int m = 0; m < M; ++m) sums[r][m] = set1(0);
  for (int64_t s0 = 0; s0 < spans; s0 += LOOKUPS) {
    const int64_t count = smaller(LOOKUPS, spans - s0), full = smaller(count, whole - s0);
    const int64_t b0 = block_of(p.w, s0 * LOOKUP);
    const int64_t b1 = smaller(block_of(p.w, (s0 + count) * LOOKUP - 1) + 1, blocks);
    for (int r = 0; r < ROWS; ++r) scales_of(p.w, rows.n[r], b0, b1 - b0, scales[r]);
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
      const uint8_t* from = rows.packed[r] + whole * LOOKUP / 2;
      const int64_t end = padded(p.w.K) / 2 - whole * LOOKUP / 2;
      if (end + (p.w.N - 1 - rows.n[r]) * (padded(p.w.K) / 2) >= LOOKUP / 2) {
        multiply_span(from, full, r);  // what follows of other rows meets zeros of x
      } else {
        uint8_t rest[LOOKUP / 2] = {};
        memcpy(rest, from, size_t(end));
        multiply_span(rest, full, r);
      }
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

// Shared by the threads of a region, which do not wait for one another in the end.
template <int M, class T>
void direct_multiply(const Product<T>& p) {
  const int64_t apart = rows_apart(p.w);
  if (p.w.codebook_rows == 1) {
    const Table table(p.w.codebook);
#pragma omp for schedule(static) nowait
    for (int64_t n = 0; n < apart; ++n) direct_rows<M>(p, Rows<STREAMS>(p.w, n, apart), table);
  } else {
#pragma omp for schedule(static) nowait
    for (int64_t n = 0; n < p.w.N; ++n)
      direct_rows<M>(p, Rows<1>(p.w, n, 0), Table(codebook_of(p.w, n)));
  }
}

template <class T>
void tiled_multiply(const Product<T>& p) {
  const Table shared(p.w.codebook);
#pragma omp for schedule(static) nowait
  for (int64_t n = 0; n < p.w.N; n += TILE_N) tiled_rows(p, n, shared);
}

// x as floats with rows padded by zeros.
template <class T>
const float* padded_rows(const T* x, int64_t M, int64_t K, float* room) {
  for (int64_t m = 0; m < M; ++m) widen(x + m * K, K, room + m * padded(K));
  return room;
}

// h of one adapter, times its scale; z is x [M, K] in float32, `apart` between rows.
inline void project_down(const float* z, int64_t M, int64_t K, int64_t apart,
                         const lowrank_lora& lora) {
#pragma omp for schedule(static) nowait
  for (int64_t r = 0; r < lora.R; ++r)
    for (int64_t m = 0; m < M; ++m)
      lora.h[m * lora.R + r] = lora.scale * dot(lora.A + r * K, z + m * apart, K);
}

// M <= MAX_M rows of x.
template <class T>
int32_t products_of(const T* x, int64_t M, int64_t K, const lowrank_product* products,
                    int64_t count, void* const* ys, int32_t threads) {
  int64_t ranks = 0, weights = 0;
  for (int64_t i = 0; i < count; ++i) {
    ranks += products[i].A ? products[i].R : 0;
    weights += products[i].N * K;
  }
  const bool direct = M <= MAX_DIRECT;
  const bool plain = sizeof(T) == sizeof(float) && K % CHUNK == 0;  // x is as `padded_rows` has it
  const int64_t for_spans = direct ? M * spans_of(K) * LOOKUP : 0;
  const int64_t for_rows = plain || (direct && ranks == 0) ? 0 : M * padded(K);
  thread_local Scratch scratch;
  float* room = scratch.of(size_t(for_spans + for_rows + M * ranks + 1));
  if (!room) return LOWRANK_OUT_OF_MEMORY;
  float* h = room + for_spans + for_rows;
  if (direct) lay_out(x, M, K, room);
  const float* z = reinterpret_cast<const float*>(x);
  if (!plain) z = for_rows ? padded_rows(x, M, K, room + for_spans) : nullptr;
#pragma omp parallel num_threads(threads) if (weights > WORTH_THREADS)
  {
    int64_t at = 0;  // of h
    const auto lora_of = [&](const lowrank_product& p) {
      const lowrank_lora lora{p.A, p.B, h + at, p.A ? p.R : 0, p.scale, nullptr};
      at += M * lora.R;
      return lora;
    };
    for (int64_t i = 0; i < count; ++i)
      project_down(z, M, K, plain ? K : padded(K), lora_of(products[i]));
    if (ranks) {
#pragma omp barrier
    }
    at = 0;
    for (int64_t i = 0; i < count; ++i) {
      const lowrank_product& one = products[i];
      const lowrank_lora lora = lora_of(one);
      const CodebookWeight w{one.packed,        one.absmax, one.absmax_scale, one.codebook,
                             one.codebook_rows, one.N,      K,                one.block_size};
      const Product<T> p{direct ? room : z, M, w, one.bias, one.A ? &lora : nullptr,
                         static_cast<T*>(ys[i])};
      if (M == 1) direct_multiply<1>(p);
      if (M == 2) direct_multiply<2>(p);
      if (M == 3) direct_multiply<3>(p);
      if (M == 4) direct_multiply<4>(p);
      if (!direct) tiled_multiply(p);
    }
  }
  return LOWRANK_OK;
}

int32_t products(const void* x, int32_t dtype, int64_t M, int64_t K,
                 const lowrank_product* products, int64_t count, void* const* ys,
                 int32_t threads) {
  int32_t status = LOWRANK_OK;
  with_type(dtype, [&](auto* type) {
    using T = decltype(type);
    status = products_of(static_cast<T>(const_cast<void*>(x)), M, K, products, count, ys,
                         threads);
  });
  return status;
}

template <class T>
int32_t linear_of(const T* x, int64_t M, const CodebookWeight& w, const float* bias,
                  const lowrank_lora* lora, T* y, int32_t threads) {
  if (M <= MAX_M && !lora) {
    const lowrank_product one{w.packed,     w.absmax, w.absmax_scale, w.codebook, w.codebook_rows,
                              w.N,          w.block_size, bias, nullptr, nullptr, 0, 0};
    void* const ys[] = {y};
    return products_of(x, M, w.K, &one, 1, ys, threads);
  }
  const int64_t passes = (M + WIDE_M - 1) / WIDE_M;  // of equally many stripes
  const int64_t rows = ((M + passes - 1) / passes + STRIPE - 1) / STRIPE * STRIPE;
  for (int64_t m = 0; m < M; m += rows) {
    const WideProduct<T> p{x + m * w.K, m, smaller(rows, M - m), w, bias, lora, y + m * w.N};
    if (!wide_multiply(p, threads)) return LOWRANK_OUT_OF_MEMORY;
  }
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
