// Rows gathered into a panel of floats and scattered back, with dropout on the way: what stands
// beside a product of the BLAS, while the panel is in cache.
//
// Dropout forms no mask in memory: 64 elements at a time, the words of Philox-4x32 with 7 rounds
// (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11) are made in registers.
#pragma once

#include "codebook_impl.h"

namespace {

constexpr int SPAN = 64;                        // elements of a row at once
constexpr int CHAINS = 2;                       // vectors of counters at once, to hide latency
constexpr int64_t WORTH_ROW_THREADS = 1 << 14;  // elements; below, waking threads costs more

// The 4 * CHAINS * W / 2 words of the counters from q on, each counter's four beside one another.
inline void random_words(uint64_t q, uint64_t seed, uint32_t* words) {
  constexpr int COUNTERS = W / 2;  // of a vector
  Wide c0[CHAINS], c1[CHAINS], c2[CHAINS], c3[CHAINS];
  for (int i = 0; i < CHAINS; ++i) {
    c0[i] = ascending(q + uint64_t(i * COUNTERS));
    c1[i] = upper_half(c0[i]);
    c2[i] = c3[i] = wide(0);
  }
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 7; ++round) {
    for (int i = 0; i < CHAINS; ++i) {  // what is in the upper halves, no product ever sees
      const Wide even = product(c0[i], 0xD2511F53u), odd = product(c2[i], 0xCD9E8D57u);
      c0[i] = exclusive_or(exclusive_or(upper_half(odd), c1[i]), wide(k0));
      c2[i] = exclusive_or(exclusive_or(upper_half(even), c3[i]), wide(k1));
      c1[i] = odd;
      c3[i] = even;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int i = 0; i < CHAINS; ++i) store_words(words + 4 * COUNTERS * i, c0[i], c1[i], c2[i], c3[i]);
}

// SPAN elements of row m from k on: v / (1 - p) where kept, else 0.
inline void drop_out(const lowrank_dropout* dropout, int64_t m, int64_t k, int64_t K, float* v) {
  constexpr int STEP = 2 * CHAINS * W;
  uint32_t words[SPAN];
  const uint64_t q = uint64_t(m) * uint64_t((K + 3) / 4) + uint64_t(k / 4);
  for (int i = 0; i < SPAN; i += STEP)
    random_words(q + uint64_t(i / 4), uint64_t(dropout->seed), words + i);
  for (int i = 0; i < SPAN; i += W) {
    const Vec scaled = mul(load(v + i), set1(dropout->inverse));
    store(v + i, where_at_least(words + i, dropout->threshold, scaled));
  }
}

inline int64_t row_of(const lowrank_rows& rows, int64_t i) {
  return rows.order ? rows.order[rows.first + i] : rows.first + i;
}

template <class T>
void gather_row(const T* x, int64_t m, int64_t K, const lowrank_dropout* dropout, float* out) {
  int64_t k = 0;
  for (; k + SPAN <= K; k += SPAN) {
    float v[SPAN];
    for (int i = 0; i < SPAN; i += W) store(v + i, load(x + k + i));
    if (dropout) drop_out(dropout, m, k, K, v);
    memcpy(out + k, v, sizeof v);
  }
  if (k < K) {
    float v[SPAN] = {};
    for (int64_t i = k; i < K; ++i) v[i - k] = to_float(x[i]);
    if (dropout) drop_out(dropout, m, k, K, v);
    memcpy(out + k, v, size_t(K - k) * sizeof(float));
  }
}

template <class T>
void scatter_row(const float* values, int64_t m, int64_t K, const lowrank_dropout* dropout,
                 bool accumulate, T* out) {
  int64_t k = 0;
  for (; k + SPAN <= K; k += SPAN) {
    float v[SPAN];
    memcpy(v, values + k, sizeof v);
    if (dropout) drop_out(dropout, m, k, K, v);
    for (int i = 0; i < SPAN; i += W) {
      const Vec sum = accumulate ? add(load(v + i), load(out + k + i)) : load(v + i);
      store(out + k + i, sum);
    }
  }
  if (k < K) {
    float v[SPAN] = {};
    memcpy(v, values + k, size_t(K - k) * sizeof(float));
    if (dropout) drop_out(dropout, m, k, K, v);
    for (int64_t i = k; i < K; ++i) {
      from_float(accumulate ? v[i - k] + to_float(out[i]) : v[i - k], out + i);
    }
  }
}

// The first `count` of W elements, the others 0; and back.
template <class T>
inline Vec load_part(const T* p, int64_t count) {
  if (count >= W) return load(p);
  T rest[W] = {};
  memcpy(rest, p, size_t(count) * sizeof(T));
  return load(rest);
}
template <class T>
inline void store_part(T* p, int64_t count, Vec v) {
  if (count >= W) return store(p, v);
  T rest[W];
  store(rest, v);
  memcpy(p, rest, size_t(count) * sizeof(T));
}

// Calls run(a null pointer of the type that `dtype` names).
template <class Run>
void with_type(int32_t dtype, Run run) {
  if (dtype == LOWRANK_F16) return run(static_cast<Half*>(nullptr));
  if (dtype == LOWRANK_BF16) return run(static_cast<Bfloat16*>(nullptr));
  run(static_cast<float*>(nullptr));
}

void gather_rows(const void* x, int32_t dtype, int64_t K, int64_t stride, const lowrank_rows& rows,
                 const lowrank_dropout* dropout, float* out, int32_t threads) {
  with_type(dtype, [&](auto* type) {
    const auto* from = static_cast<decltype(type)>(const_cast<void*>(x));
#pragma omp parallel for schedule(static) num_threads(threads) \
    if (rows.count * K > WORTH_ROW_THREADS)
    for (int64_t i = 0; i < rows.count; ++i) {
      const int64_t m = row_of(rows, i);
      gather_row(from + m * stride, m, K, dropout, out + i * K);
    }
  });
}

void scatter_rows(const float* values, int64_t K, const lowrank_rows& rows,
                  const lowrank_dropout* dropout, bool accumulate, void* out, int32_t dtype,
                  int64_t stride, int32_t threads) {
  with_type(dtype, [&](auto* type) {
    auto* to = static_cast<decltype(type)>(out);
#pragma omp parallel for schedule(static) num_threads(threads) \
    if (rows.count * K > WORTH_ROW_THREADS)
    for (int64_t i = 0; i < rows.count; ++i) {
      const int64_t m = row_of(rows, i);
      scatter_row(values + i * K, m, K, dropout, accumulate, to + m * stride);
    }
  });
}

}  // namespace
