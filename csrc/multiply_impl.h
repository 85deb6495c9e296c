// Products in registers, of what lies in the first two levels of the cache: the innermost loop of
// linear_wide_impl.h and linear_backward_impl.h.
//
// BLOCK_N rows and a stripe of STRIPE columns meet over DEPTH or a little more; a stripe's DEPTH stays
// in the first level while many blocks of rows pass it.
#pragma once

#include <stdlib.h>

#include "rows_impl.h"

namespace {

constexpr int STRIPE = BLOCK_V * W;
constexpr int DEPTH = 192;        // decoded or laid at once
constexpr int ROOM = DEPTH + 64;  // and of an adapter's rank, beside the last of them

// What is multiplied with vectors, element i at a depth: rows of a matrix, or columns of one.
struct ByRow {
  const float* at;  // [rows, ROOM]
  float operator()(int i, int64_t depth) const { return at[i * ROOM + depth]; }
};
struct ByDepth {
  const float* at;
  int64_t apart;  // from depth to depth
  float operator()(int i, int64_t depth) const { return at[depth * apart + i]; }
};

// Where sums go: `apart` from row to row, those of rows and columns that there are; added or not.
struct Sums {
  float* at;
  int64_t apart, rows, columns;
  bool add;
};

// sums[i, j] = left(i) . x[j] over `length`, for ROWS of i and V vectors of j.
template <int ROWS, int V, class Left>
inline void multiply_vectors(const Left& left, const float* x, int64_t x_apart, int64_t length,
                             const Sums& to) {
  Vec s[ROWS][V];
#pragma GCC unroll 32
  for (int i = 0; i < ROWS; ++i)
    for (int v = 0; v < V; ++v) s[i][v] = set1(0);
  for (int64_t d = 0; d < length; ++d, x += x_apart) {
    Vec xs[V];
    for (int v = 0; v < V; ++v) xs[v] = load(x + v * W);
#pragma GCC unroll 32
    for (int i = 0; i < ROWS; ++i) {
      const Vec one = set1(left(i, d));
      for (int v = 0; v < V; ++v) s[i][v] = fma(one, xs[v], s[i][v]);
    }
  }
  if (to.rows >= ROWS && to.columns >= V * W) {
#pragma GCC unroll 32
    for (int i = 0; i < ROWS; ++i) {
      for (int v = 0; v < V; ++v) {
        float* at = to.at + i * to.apart + v * W;
        store(at, to.add ? add(load(at), s[i][v]) : s[i][v]);
      }
    }
    return;
  }
  float room[ROWS][V * W];
#pragma GCC unroll 32
  for (int i = 0; i < ROWS; ++i)
    for (int v = 0; v < V; ++v) store(room[i] + v * W, s[i][v]);
  for (int64_t i = 0; i < smaller(ROWS, to.rows); ++i)
    for (int64_t j = 0; j < smaller(V * W, to.columns); ++j) {
      float* at = to.at + i * to.apart + j;
      *at = to.add ? *at + room[i][j] : room[i][j];
    }
}

// The same of as many vectors, BLOCK_V or fewer, as there are columns: the last stripe is seldom
// full.
template <int ROWS, class Left, int V = BLOCK_V>
inline void multiply_rows(const Left& left, const float* x, int64_t x_apart, int64_t length,
                          const Sums& to) {
  if constexpr (V > 1) {
    if (to.columns <= (V - 1) * W)
      return multiply_rows<ROWS, Left, V - 1>(left, x, x_apart, length, to);
  }
  multiply_vectors<ROWS, V>(left, x, x_apart, length, to);
}

// Floats that a thread keeps from call to call: a model's forward keeps what each product gives, so
// fresh memory would lie elsewhere in every layer, and be faulted in.
struct Scratch {
  float* at = nullptr;
  size_t size = 0;
  ~Scratch() { free(at); }

  float* of(size_t floats) {
    if (floats > size) {
      floats = (floats + 15) / 16 * 16;  // whole lines of 64 bytes, as aligned_alloc asks
      free(at);
      at = static_cast<float*>(aligned_alloc(64, floats * sizeof(float)));
      size = at ? floats : 0;
    }
    return at;
  }
};

// This thread's.
inline float* kept_scratch(size_t floats) {
  thread_local Scratch scratch;
  return scratch.of(floats);
}

}  // namespace
