// dx = dy w for tens and hundreds of rows, and the gradients of an adapter beside it;
// linear_wide_impl.h comes before it.
//
// The weight is decoded where it is used, as in the forward: DEPTH of its rows by WIDE_COLUMNS of its
// columns, into the second-level cache, in stripes of STRIPE columns that stay in the first level
// while every BLOCK_N rows of dy meet them. The adapter is more of the same: g = scale * dy B lies
// behind dy, and there rows of A stand in for decoded ones.
#pragma once

#include "linear_wide_impl.h"

namespace {

constexpr int WIDE_COLUMNS = 384;  // decoded at once
// Whole stripes of whole chunks, which threads share out.
constexpr int SHARE = CHUNK % STRIPE ? CHUNK * STRIPE / W : CHUNK;
static_assert(SHARE % STRIPE == 0 && SHARE % CHUNK == 0 && WIDE_COLUMNS % SHARE == 0,
              "no stripe is one thread's and another's");

// Some rows of dy, M <= WIDE_M, and what is to be made of them; null what is not needed.
struct WideGradient {
  const float *dy, *x;  // [M, N], [M, K]
  int64_t M;
  const CodebookWeight& w;
  const lowrank_lora* lora;  // or null; its h [M, R] belongs to these rows
  float *dx, *dA, *dB;
  bool add_dx, add_dAB;
  float *laid = nullptr;  // [depths, rows, ROOM]: dy, then g
  float *g = nullptr, *h = nullptr, *B = nullptr;  // [rows, Rp], [M, Rp], [N, Rp]; h is scaled

  int64_t rank() const { return lora ? lora->R : 0; }
  int64_t padded_rank() const { return (rank() + 15) / 16 * 16; }
  int64_t rows() const { return (M + BLOCK_N - 1) / BLOCK_N * BLOCK_N; }
  int64_t width() const { return w.N + rank(); }
  // How often DEPTH goes into it; the last time may be up to ROOM.
  int64_t depths() const {
    return width() <= ROOM ? 1 : (width() - (ROOM - DEPTH) + DEPTH - 1) / DEPTH;
  }
  int64_t depth_from(int64_t d) const { return d * DEPTH; }
  int64_t depth_to(int64_t d) const { return d + 1 == depths() ? width() : (d + 1) * DEPTH; }
  float* rows_of(int64_t d, int64_t m) const { return laid + (d * rows() + m) * ROOM; }
};

// A thread's: decoded columns of the weight, and a stripe of x.
struct GradientRoom {
  float (*decoded)[ROOM][STRIPE];  // [WIDE_COLUMNS / STRIPE]
  float* stripe;                   // [WIDE_M, STRIPE]
};

// Columns k0 <= k < k1 of row n, k0 and k1 multiples of CHUNK, to place d of each stripe.
inline void decode_columns(const CodebookWeight& w, int64_t n, int64_t k0, int64_t k1,
                           const Table& table, float (*to)[ROOM][STRIPE], int64_t d) {
  const uint8_t* packed = w.packed + n * (padded(w.K) / 2);
  RowScales scales(w, n);
  for (int64_t k = k0, b = block_of(w, k0); k < k1; ++b) {
    const BlockTable block(table, scales[b]);
    for (const int64_t end = smaller((b + 1) * w.block_size, k1); k < end; k += CHUNK) {
      Vec v[VECTORS];
      decode32(packed + k / 2, block, v);
      for (int i = 0; i < VECTORS; ++i) {
        const int64_t column = k - k0 + i * W;
        store(to[column / STRIPE][d] + column % STRIPE, v[i]);
      }
    }
  }
}

// The rows m0 <= m < m0 + BLOCK_N of dy, and of g, to where they are multiplied.
inline void lay_rows(const WideGradient& p, int64_t m0) {
  const int64_t N = p.w.N, R = p.rank(), Rp = p.padded_rank();
  for (int64_t d = 0; d < p.depths(); ++d) {
    const int64_t n = p.depth_from(d), length = smaller(p.depth_to(d), N) - n;
    for (int64_t m = m0; m < m0 + BLOCK_N && length > 0; ++m) {
      if (m < p.M) memcpy(p.rows_of(d, m), p.dy + m * N + n, size_t(length) * sizeof(float));
      else memset(p.rows_of(d, m), 0, size_t(length) * sizeof(float));
    }
    for (int64_t r = 0; r < Rp && length > 0; r += STRIPE) {
      const Sums to{p.g + m0 * Rp + r, Rp, BLOCK_N, Rp - r, d > 0};
      multiply_rows<BLOCK_N>(ByRow{p.rows_of(d, m0)}, p.B + n * Rp + r, Rp, length, to);
    }
  }
  for (int64_t m = m0; m < m0 + BLOCK_N; ++m) {
    float* g = p.g + m * Rp;
    for (int64_t r = 0; r < Rp; r += W) store(g + r, mul(load(g + r), set1(p.lora->scale)));
    for (int64_t r = 0; r < R; ++r) {
      const int64_t d = smaller((N + r) / DEPTH, p.depths() - 1);
      p.rows_of(d, m)[N + r - p.depth_from(d)] = g[r];
    }
  }
}

// Rows of dB [N, R]: those of some BLOCK_N columns of dy.
inline void gradient_of_B(const WideGradient& p, int64_t d, int64_t n, int64_t count) {
  const int64_t R = p.rank(), Rp = p.padded_rank();
  for (int64_t r = 0; r < R; r += STRIPE) {
    const Sums to{p.dB + n * R + r, R, count, R - r, p.add_dAB};
    multiply_rows<BLOCK_N>(ByDepth{p.rows_of(d, 0) + n - p.depth_from(d), ROOM}, p.h + r, Rp, p.M,
                           to);
  }
}

// A stripe of the columns of dA [R, K], from k on.
inline void gradient_of_A(const WideGradient& p, int64_t k, float* room) {
  const int64_t K = p.w.K, R = p.rank(), columns = K - k;
  const float* x = p.x + k;
  int64_t apart = K;
  if (columns < STRIPE) {
    for (int64_t m = 0; m < p.M; ++m)
      for (int64_t i = 0; i < STRIPE; ++i)
        room[m * STRIPE + i] = i < columns ? x[m * K + i] : 0;
    x = room, apart = STRIPE;
  }
  for (int64_t r = 0; r < R; r += DOWN_N) {
    const Sums to{p.dA + r * K + k, K, R - r, columns, p.add_dAB};
    multiply_rows<DOWN_N>(ByDepth{p.g + r, p.padded_rank()}, x, apart, p.M, to);
  }
}

// Columns k0 <= k < k1 of dx, WIDE_COLUMNS or fewer.
inline void gradient_of_x(const WideGradient& p, const Table& shared, int64_t k0, int64_t k1,
                          const GradientRoom& room) {
  const CodebookWeight& w = p.w;
  for (int64_t d = 0; d < p.depths(); ++d) {
    const int64_t from = p.depth_from(d), to = p.depth_to(d);
    for (int64_t n = from; n < smaller(to, w.N); ++n) {
      const Table own = w.codebook_rows == 1 ? shared : Table(codebook_of(w, n));
      decode_columns(w, n, k0, k1, own, room.decoded, n - from);
    }
    for (int64_t n = from < w.N ? w.N : from; n < to; ++n)
      for (int64_t k = k0; k < k1; ++k)
        room.decoded[(k - k0) / STRIPE][n - from][(k - k0) % STRIPE] =
            k < w.K ? p.lora->A[(n - w.N) * w.K + k] : 0;
    for (int64_t k = k0; k < smaller(k1, w.K); k += STRIPE) {
      const float* stripe = room.decoded[(k - k0) / STRIPE][0];
      for (int64_t m = 0; m < p.M; m += BLOCK_N) {
        const Sums sums{p.dx + m * w.K + k, w.K, p.M - m, w.K - k, d > 0 || p.add_dx};
        multiply_rows<BLOCK_N>(ByRow{p.rows_of(d, m)}, stripe, STRIPE, to - from, sums);
      }
    }
  }
}

// One pass over the weight; returns false where memory is short.
inline bool wide_gradient(WideGradient p, int32_t threads) {
  const CodebookWeight& w = p.w;
  const int64_t Kp = padded(w.K), R = p.rank(), Rp = p.padded_rank();
  const int64_t for_laid = p.depths() * p.rows() * ROOM + BLOCK_N, for_g = p.rows() * Rp;
  const int64_t for_thread = WIDE_COLUMNS * ROOM + WIDE_M * STRIPE;
  float* at = kept_scratch(size_t(for_laid + for_g + (p.M + w.N) * Rp + threads * for_thread + 64));
  if (!at) return false;
  const auto next = [&](int64_t size) {
    at += (size + 15) / 16 * 16;
    return at - (size + 15) / 16 * 16;
  };
  p.laid = next(for_laid), p.g = next(for_g), p.h = next(p.M * Rp), p.B = next(w.N * Rp);
  const int64_t blocks = p.rows() / BLOCK_N, stripes = (w.K + STRIPE - 1) / STRIPE;
#pragma omp parallel num_threads(threads) if (w.N * w.K > WORTH_THREADS)
  {
    const auto pad_ranks = [&](const float* from, int64_t row, float scale, float* to) {
      for (int64_t r = 0; r < Rp; ++r) to[row * Rp + r] = r < R ? scale * from[row * R + r] : 0;
    };
    if (R) {
#pragma omp for schedule(static)
      for (int64_t n = 0; n < w.N; ++n) pad_ranks(p.lora->B, n, 1, p.B);
    }
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; ++b) {
      lay_rows(p, b * BLOCK_N);
      for (int64_t m = b * BLOCK_N; R && p.dB && m < smaller(p.M, (b + 1) * BLOCK_N); ++m)
        pad_ranks(p.lora->h, m, p.lora->scale, p.h);
    }
    for (int64_t d = 0; p.dB && d < p.depths(); ++d) {
      const int64_t last = smaller(p.depth_to(d), w.N);
#pragma omp for schedule(static) nowait
      for (int64_t n = p.depth_from(d); n < last; n += BLOCK_N)
        gradient_of_B(p, d, n, last - n);
    }
    const Table shared(w.codebook);
#pragma omp for schedule(static) nowait
    for (int64_t t = 0; t < threads; ++t) {
      float* own = at + t * for_thread;
      const GradientRoom room{reinterpret_cast<float (*)[ROOM][STRIPE]>(own),
                              own + WIDE_COLUMNS * ROOM};
      if (p.dA) {
        for (int64_t s = stripes * t / threads; s < stripes * (t + 1) / threads; ++s)
          gradient_of_A(p, s * STRIPE, room.stripe);
      }
      if (!p.dx) continue;
      const int64_t shares = (Kp + SHARE - 1) / SHARE;
      const int64_t last = smaller(shares * (t + 1) / threads * SHARE, Kp);
      for (int64_t k = shares * t / threads * SHARE; k < last; k += WIDE_COLUMNS)
        gradient_of_x(p, shared, k, smaller(k + WIDE_COLUMNS, last), room);
    }
  }
  return true;
}

int32_t linear_backward(const float* dy, const float* x, int64_t M, const CodebookWeight& w,
                        const lowrank_lora* lora, const lowrank::LinearGradients& to,
                        int32_t threads) {
  const int64_t passes = (M + WIDE_M - 1) / WIDE_M;  // of equally many blocks
  const int64_t rows = ((M + passes - 1) / passes + BLOCK_N - 1) / BLOCK_N * BLOCK_N;
  for (int64_t m = 0; m < M; m += rows) {
    lowrank_lora of_rows{};
    if (lora) {
      of_rows = *lora;
      if (lora->h) of_rows.h += m * lora->R;
    }
    const WideGradient p{dy + m * w.N,
                         to.dA ? x + m * w.K : nullptr,
                         smaller(rows, M - m),
                         w,
                         lora ? &of_rows : nullptr,
                         to.dx ? to.dx + m * w.K : nullptr,
                         to.dA,
                         to.dB,
                         to.add,
                         m > 0};
    if (!wide_gradient(p, threads)) return LOWRANK_OUT_OF_MEMORY;
  }
  return LOWRANK_OK;
}

}  // namespace
