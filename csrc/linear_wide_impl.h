// y = x w^T + bias for tens and hundreds of rows of x; codebook_impl.h comes before it.
//
// As BLAS does it, but that the weight is decoded where BLAS would copy it: a few hundred rows by
// DEPTH of K, into the second-level cache. There they meet x in stripes of STRIPE rows, which lie
// k after k; a stripe's DEPTH stays in the first level. BLOCK_N rows of the weight and a stripe are
// multiplied in registers, and their sums added to those of what came before of K.
//
// An adapter is more of the same: h^T = A z^T is a product of the stripes just laid, and lies behind
// them, R after K; there rows of B stand in for decoded ones, beside the last of them: the sums are
// then not fetched once more for a product as short as R.
#pragma once

#include "multiply_impl.h"

namespace {

constexpr int WIDE_M = 512;  // rows of x in one pass over the weight
constexpr int WIDE_BLOCKS = 384 / BLOCK_N / W * W;  // of BLOCK_N rows, decoded at once
constexpr int DOWN_N = W == 16 ? 8 : 4;             // rows of A that are multiplied together
static_assert(WIDE_BLOCKS * BLOCK_N % W == 0 && 16 % W == 0, "tiles of W x W are transposed");

// Elements k0 <= k < k0 + length of row n, k0 a multiple of CHUNK; `ahead` bytes on is read next.
inline void decode_stretch(const CodebookWeight& w, int64_t n, int64_t k0, int64_t length,
                           const Table& table, int64_t ahead, float* to) {
  const uint8_t* packed = w.packed + (n * padded(w.K) + k0) / 2;
  RowScales scales(w, n);
  for (int64_t k = 0, b = block_of(w, k0); k < length; ++b) {
    const BlockTable block(table, scales[b]);
    for (const int64_t end = smaller((b + 1) * w.block_size - k0, length); k < end; k += CHUNK) {
      prefetch(packed + k / 2, ahead);
      decode32(packed + k / 2, block, to + k);
    }
  }
}

// Elements k0 <= k < k0 + 16 of a stripe's `count` rows of x -> [16, STRIPE], zeros beyond x.
template <class T>
void lay_stripe(const T* x, int64_t count, int64_t K, int64_t k0, float* to) {
  for (int64_t m = 0; m < STRIPE; m += W) {
    for (int64_t k = 0; k < 16; k += W) {
      const int64_t left = K - k0 - k;
      Vec rows[W];
      for (int i = 0; i < W; ++i)
        rows[i] = m + i < count && left > 0 ? load_part(x + (m + i) * K + k0 + k, left) : set1(0);
      transpose(rows);
      for (int i = 0; i < W; ++i) store(to + (k + i) * STRIPE + m, rows[i]);
    }
  }
}

// The same of 64 elements after dropout; m is the number of the first row.
template <class T>
void lay_dropped(const T* x, int64_t count, int64_t K, int64_t k0, int64_t m0,
                 const lowrank_dropout* dropout, float* to) {
  float room[STRIPE][SPAN] = {};
  const int64_t length = smaller(SPAN, K - k0);
  for (int64_t m = 0; m < count; ++m) {
    for (int64_t k = 0; k < length; ++k) room[m][k] = to_float(x[m * K + k0 + k]);
    drop_out(dropout, m0 + m, k0, K, room[m]);
  }
  for (int64_t k = 0; k < SPAN; ++k)
    for (int m = 0; m < STRIPE; ++m) to[k * STRIPE + m] = room[m][k];
}

// Some rows of x, M <= WIDE_M, and what is to be multiplied with them.
template <class T>
struct WideProduct {
  const T* x;  // [M, K], the row number `first` of x on
  int64_t first, M;
  const CodebookWeight& w;
  const float* bias;
  const lowrank_lora* lora;  // or null
  T* y;
  float* laid = nullptr;  // [stripes, Kp + Rp, STRIPE]: x, then scale * h

  int64_t stripes() const { return (M + STRIPE - 1) / STRIPE; }
  int64_t rank() const { return lora ? lora->R : 0; }
  int64_t parts() const { return (rank() + DOWN_N - 1) / DOWN_N; }  // of A
  int64_t width() const { return padded(w.K) + parts() * DOWN_N; }
  float* stripe(int64_t i) const { return laid + i * width() * STRIPE; }
  int64_t rows_in(int64_t stripe) const { return smaller(STRIPE, M - stripe * STRIPE); }
};

// A thread's: decoded rows of the weight, and their sums with every stripe of x.
struct WideRoom {
  float (*decoded)[BLOCK_N][ROOM];   // [WIDE_BLOCKS]
  float* sums;                       // [stripes, WIDE_BLOCKS, BLOCK_N, STRIPE]
  float* dropped;                    // [SPAN, STRIPE]
};

// Row n of `matrix` [N, C] from c on -> `length` elements.
inline void copy_stretch(const float* matrix, int64_t C, int64_t n, int64_t c, int64_t length,
                         float* to) {
  memcpy(to, matrix + n * C + c, size_t(length) * sizeof(float));
}

// DOWN_N elements of h for each row of stripes s0 <= i < s1: written to h, and scaled to where
// wide_rows looks.
template <class T>
void wide_down(const WideProduct<T>& p, int64_t part, int64_t s0, int64_t s1,
               const WideRoom& room) {
  const lowrank_lora& lora = *p.lora;
  const int64_t K = p.w.K, r0 = part * DOWN_N;
  const auto sums_of = [&](int64_t i) { return p.stripe(i) + (padded(K) + r0) * STRIPE; };
  for (int64_t i = s0; i < s1; ++i) memset(sums_of(i), 0, DOWN_N * STRIPE * sizeof(float));
  float (*rows)[ROOM] = room.decoded[0];  // of A
  for (int64_t k0 = 0; k0 < K; k0 += DEPTH) {
    const int64_t length = smaller(DEPTH, K - k0);
    for (int64_t r = 0; r < DOWN_N; ++r)  // past the last row it is multiplied again
      copy_stretch(lora.A, K, smaller(r0 + r, lora.R - 1), k0, length, rows[r]);
    for (int64_t i = s0; i < s1; ++i) {
      const int64_t m = i * STRIPE, count = p.rows_in(i);
      const auto down = [&](const float* of_A, const float* x, int64_t over) {
        const Sums to{sums_of(i), STRIPE, DOWN_N, (count + W - 1) / W * W, true};
        multiply_rows<DOWN_N>(ByRow{of_A}, x, STRIPE, over, to);
      };
      if (!lora.dropout) {
        down(rows[0], p.stripe(i) + k0 * STRIPE, length);
        continue;
      }
      for (int64_t k = 0; k < length; k += SPAN) {
        lay_dropped(p.x + m * K, count, K, k0 + k, p.first + m, lora.dropout, room.dropped);
        down(rows[0] + k, room.dropped, smaller(SPAN, length - k));
      }
    }
  }
  for (int64_t i = s0; i < s1; ++i) {
    float* sums = sums_of(i);
    for (int64_t m = 0; m < p.rows_in(i); ++m)
      for (int64_t r = r0; r < smaller(r0 + DOWN_N, lora.R); ++r)
        lora.h[(p.first + i * STRIPE + m) * lora.R + r] = sums[(r - r0) * STRIPE + m];
    for (int64_t j = 0; j < DOWN_N * STRIPE; j += W)
      store(sums + j, mul(load(sums + j), set1(lora.scale)));
  }
}

// Rows n0 <= n < n1 of y^T, WIDE_BLOCKS blocks or fewer.
template <class T>
void wide_rows(const WideProduct<T>& p, const Table& shared, int64_t n0, int64_t n1,
               const WideRoom& room) {
  const CodebookWeight& w = p.w;
  const int64_t Kp = padded(w.K), stripes = p.stripes();
  const int64_t blocks = (n1 - n0 + BLOCK_N - 1) / BLOCK_N;
  const auto sums_of = [&](int64_t stripe, int64_t b) {
    return room.sums + (stripe * WIDE_BLOCKS + b) * BLOCK_N * STRIPE;
  };
  const int64_t width = Kp + p.rank();
  if (width == 0) memset(room.sums, 0, size_t(stripes * WIDE_BLOCKS * BLOCK_N * STRIPE) * 4);
  for (int64_t k0 = 0, length; k0 < width; k0 += length) {
    const int64_t of_w = k0 < Kp ? smaller(DEPTH, Kp - k0) : 0;  // of them decoded
    const bool last = k0 + of_w >= Kp;
    const int64_t of_B = last ? smaller((of_w ? ROOM : DEPTH) - of_w, width - k0 - of_w) : 0;
    length = of_w + of_B;
    for (int64_t i = 0; i < blocks * BLOCK_N; ++i) {  // past the last row it is filled in again
      const int64_t n = smaller(n0 + i, n1 - 1);
      float* to = room.decoded[i / BLOCK_N][i % BLOCK_N];
      if (of_w) {
        const Table own = w.codebook_rows == 1 ? shared : Table(codebook_of(w, n));
        decode_stretch(w, n, k0, of_w, own, DEPTH / 2, to);
      }
      if (of_B) copy_stretch(p.lora->B, p.rank(), n, k0 + of_w - Kp, of_B, to + of_w);
    }
    for (int64_t i = 0; i < stripes; ++i) {
      const int64_t whole = (p.rows_in(i) + W - 1) / W * W;  // vectors
      for (int64_t b = 0; b < blocks; ++b) {
        const Sums to{sums_of(i, b), STRIPE, BLOCK_N, whole, k0 > 0};
        multiply_rows<BLOCK_N>(ByRow{room.decoded[b][0]}, p.stripe(i) + k0 * STRIPE, STRIPE, length,
                               to);
      }
    }
  }
  for (int64_t m0 = 0; m0 < p.M; m0 += W) {
    for (int64_t n = n0; n < n1; n += W) {
      const float* sums = sums_of(m0 / STRIPE, 0) + (n - n0) * STRIPE + m0 % STRIPE;
      Vec rows[W];
      for (int i = 0; i < W; ++i) rows[i] = load(sums + i * STRIPE);
      transpose(rows);
      const int64_t count = smaller(W, p.M - m0);
      for (int64_t i = 0; i < count; ++i) {
        const Vec y = p.bias ? add(rows[i], load_part(p.bias + n, n1 - n)) : rows[i];
        store_part(p.y + (m0 + i) * w.N + n, n1 - n, y);
      }
    }
  }
}

// One pass over the weight; returns false where memory is short.
template <class T>
bool wide_multiply(WideProduct<T> p, int32_t threads) {
  const CodebookWeight& w = p.w;
  const int64_t Kp = padded(w.K), stripes = p.stripes(), for_x = stripes * p.width() * STRIPE;
  const int64_t for_decoded = WIDE_BLOCKS * BLOCK_N * ROOM;  // of a thread, like the next two
  const int64_t for_sums = WIDE_BLOCKS * BLOCK_N * stripes * STRIPE;
  const int64_t for_rows = for_decoded + for_sums + SPAN * STRIPE;
  p.laid = kept_scratch(size_t(for_x + threads * for_rows));
  if (!p.laid) return false;
#pragma omp parallel num_threads(threads) if (w.N * w.K > WORTH_THREADS)
  {
    const auto room_of = [&](int64_t t) {
      float* own = p.laid + for_x + t * for_rows;
      return WideRoom{reinterpret_cast<float (*)[BLOCK_N][ROOM]>(own), own + for_decoded,
                      own + for_decoded + for_sums};
    };
#pragma omp for schedule(static)
    for (int64_t i = 0; i < stripes * (Kp / 16); ++i) {
      const int64_t s = i / (Kp / 16), k = i % (Kp / 16) * 16;
      lay_stripe(p.x + s * STRIPE * w.K, p.rows_in(s), w.K, k, p.stripe(s) + k * STRIPE);
    }
#pragma omp for schedule(static)
    for (int64_t t = 0; t < threads; ++t) {
      const int64_t last = stripes * p.parts() * (t + 1) / threads;
      for (int64_t i = stripes * p.parts() * t / threads, count; i < last; i += count) {
        count = smaller(stripes - i % stripes, last - i);
        wide_down(p, i / stripes, i % stripes, i % stripes + count, room_of(t));
      }
    }
    const Table shared(w.codebook);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < threads; ++t) {
      const int64_t blocks = (w.N + BLOCK_N - 1) / BLOCK_N;
      const int64_t last = smaller(blocks * (t + 1) / threads * BLOCK_N, w.N);
      for (int64_t n = blocks * t / threads * BLOCK_N; n < last; n += WIDE_BLOCKS * BLOCK_N)
        wide_rows(p, shared, n, smaller(n + WIDE_BLOCKS * BLOCK_N, last), room_of(t));
    }
  }
  return true;
}

}  // namespace
