// Cross entropy of rows of logits and its gradient in place, a row at a time while it is in cache.
#pragma once

#include <math.h>

#include "kernels.h"

namespace {

// e^x for x <= 0, to about 1e-7 relative; 0 below the smallest normal float; NaN stays NaN.
// x = n ln 2 + r with |r| <= ln(2) / 2, and e^r by its Taylor polynomial of degree 7 (error 5e-9).
inline Vec exp_nonpositive(Vec x) {
  const Vec lowest = set1(-87.33654f), bounded = max(lowest, x);
  const Vec n = round_to_even(mul(bounded, set1(1.44269504f)));
  // ln 2 in two parts, the first exact in products with n.
  Vec r = fma(n, set1(-0.693359375f), bounded);
  r = fma(n, set1(2.12194440e-4f), r);
  constexpr float coefficients[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  Vec p = set1(1.0f / 5040);
  for (const float c : coefficients) p = fma(p, r, set1(c));
  return zero_below(scale_by_power(p, n), x, lowest);
}

// Calls visit(values, offset) on each vector of the row; the last is filled up with -infinity.
template <class Visit>
inline void each_vector(const float* row, int64_t V, Visit visit) {
  int64_t v = 0;
  for (; v + W <= V; v += W) visit(load(row + v), v);
  if (v < V) {
    float rest[W];
    for (int i = 0; i < W; ++i) rest[i] = v + i < V ? row[v + i] : -INFINITY;
    visit(load(rest), v);
  }
}

inline void store_up_to(float* row, int64_t v, int64_t V, Vec values) {
  if (v + W <= V) return store(row + v, values);
  float rest[W];
  store(rest, values);
  for (; v < V; ++v) row[v] = rest[v % W];
}

inline float cross_entropy_row(float* row, int64_t label, int64_t V, bool gradient) {
  constexpr int SUMS = 4;  // short chains of additions: faster, and nearer to the true sum
  Vec largest[SUMS], sums[SUMS];
  for (int i = 0; i < SUMS; ++i) {
    largest[i] = set1(-INFINITY);
    sums[i] = set1(0);
  }
  each_vector(row, V, [&](Vec x, int64_t v) {
    Vec& m = largest[v / W % SUMS];
    m = max(x, m);  // a NaN is passed over here, and shows in the sum
  });
  float lanes[W];
  store(lanes, max(max(largest[0], largest[1]), max(largest[2], largest[3])));
  float top = lanes[0];
  for (int i = 1; i < W; ++i) top = lanes[i] > top ? lanes[i] : top;

  const float at_label = row[label];
  each_vector(row, V, [&](Vec x, int64_t v) {
    const Vec e = exp_nonpositive(sub(x, set1(top)));
    Vec& s = sums[v / W % SUMS];
    s = add(s, e);
    if (gradient) store_up_to(row, v, V, e);
  });
  const float total = sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  if (gradient) {
    const Vec inverse = set1(1.0f / total);
    each_vector(row, V, [&](Vec e, int64_t v) { store_up_to(row, v, V, mul(e, inverse)); });
    row[label] -= 1.0f;
  }
  return float(log(double(total)) + (double(top) - double(at_label)));
}

void softmax_cross_entropy(float* logits, const int64_t* labels, int64_t T, int64_t V, float* loss,
                           bool gradient, int32_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (T * V > (1 << 14))
  for (int64_t t = 0; t < T; ++t)
    loss[t] = cross_entropy_row(logits + t * V, labels[t], V, gradient);
}

}  // namespace
