// What stands between the products of a decoder's block: norms, turns of pairs, gates. Each reads
// and writes its tensors once, computes in float32, and keeps nothing in between.
#pragma once

#include <math.h>

#include "rows_impl.h"
#include "softmax_impl.h"

namespace {

constexpr int64_t WORTH_ELEMENT_THREADS = 1 << 14;  // elements; below, waking threads costs more
constexpr int NORM_SUMS = 4;    // chains of additions of a row's sum
constexpr int64_t PART_M = 64;  // rows whose sum is one addend of a weight's gradient

// The sum of term(h, the elements that are left) over h in steps of W.
template <class Term>
inline float sum_over(int64_t H, Term term) {
  Vec sums[NORM_SUMS];
  for (int i = 0; i < NORM_SUMS; ++i) sums[i] = set1(0);
  int64_t h = 0;
  for (; h + NORM_SUMS * W <= H; h += NORM_SUMS * W) {
    for (int i = 0; i < NORM_SUMS; ++i) sums[i] = add(sums[i], term(h + i * W, W));
  }
  for (; h < H; h += W) sums[0] = add(sums[0], term(h, H - h));
  return sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

template <class U>
inline Vec norm_weight(const U* weight, int64_t h, int64_t left, bool plus_one) {
  const Vec w = load_part(weight + h, left);
  return plus_one ? add(w, set1(1)) : w;
}

template <class T, class U>
float norm_row(const T* x, const U* weight, int64_t H, bool plus_one, float eps, T* y) {
  const float squares = sum_over(H, [&](int64_t h, int64_t left) {
    const Vec v = load_part(x + h, left);
    return mul(v, v);
  });
  const float rstd = 1.0f / sqrtf(squares / float(H) + eps);
  for (int64_t h = 0; h < H; h += W) {
    const Vec n = mul(load_part(x + h, H - h), set1(rstd));
    store_part(y + h, H - h, mul(n, norm_weight(weight, h, H - h, plus_one)));
  }
  return rstd;
}

// With n = x * rstd and g = dy * weight: dx = rstd * (g - n * mean(g n)).
template <class T, class U>
void norm_row_backward(const T* dy, const T* x, const U* weight, int64_t H, bool plus_one,
                       float rstd, T* dx) {
  const auto g = [&](int64_t h, int64_t left) {
    return mul(load_part(dy + h, left), norm_weight(weight, h, left, plus_one));
  };
  const float dot = sum_over(
      H, [&](int64_t h, int64_t left) { return mul(g(h, left), load_part(x + h, left)); });
  const Vec slope = set1(-(dot * rstd / float(H)) * rstd);
  for (int64_t h = 0; h < H; h += W) {
    const Vec rest = fma(load_part(x + h, H - h), slope, g(h, H - h));
    store_part(dx + h, H - h, mul(rest, set1(rstd)));
  }
}

// Columns h .. h + W of dweight = sum of dy * x * rstd over the rows, whatever the threads.
template <class T>
void norm_weight_gradient(const T* dy, const T* x, const float* rstd, int64_t M, int64_t H,
                          int64_t h, float* dweight) {
  Vec total = set1(0);
  for (int64_t first = 0; first < M; first += PART_M) {
    const int64_t last = first + PART_M < M ? first + PART_M : M;
    Vec part = set1(0);
    for (int64_t m = first; m < last; ++m) {
      const Vec n = mul(load_part(x + m * H + h, H - h), set1(rstd[m]));
      part = fma(load_part(dy + m * H + h, H - h), n, part);
    }
    total = add(total, part);
  }
  store_part(dweight + h, H - h, total);
}

void rms_norm(const lowrank::Norm& n, const void* x, float eps, void* y, float* rstd,
              int32_t threads) {
  with_type(n.dtype, [&](auto* type) {
    const auto* from = static_cast<decltype(type)>(const_cast<void*>(x));
    auto* to = static_cast<decltype(type)>(y);
    with_type(n.weight_dtype, [&](auto* weight_type) {
      const auto* weight = static_cast<decltype(weight_type)>(const_cast<void*>(n.weight));
#pragma omp parallel for schedule(static) num_threads(threads) if (n.M * n.H > WORTH_ELEMENT_THREADS)
      for (int64_t m = 0; m < n.M; ++m)
        rstd[m] = norm_row(from + m * n.H, weight, n.H, n.plus_one, eps, to + m * n.H);
    });
  });
}

void rms_norm_backward(const lowrank::Norm& n, const void* dy, const void* x, const float* rstd,
                       void* dx, float* dweight, int32_t threads) {
  with_type(n.dtype, [&](auto* type) {
    const auto* from = static_cast<decltype(type)>(const_cast<void*>(x));
    const auto* slope = static_cast<decltype(type)>(const_cast<void*>(dy));
    auto* to = static_cast<decltype(type)>(dx);
    with_type(n.weight_dtype, [&](auto* weight_type) {
      const auto* weight = static_cast<decltype(weight_type)>(const_cast<void*>(n.weight));
#pragma omp parallel num_threads(threads) if (n.M * n.H > WORTH_ELEMENT_THREADS)
      {
        if (to) {
#pragma omp for schedule(static) nowait
          for (int64_t m = 0; m < n.M; ++m) {
            const int64_t at = m * n.H;
            norm_row_backward(slope + at, from + at, weight, n.H, n.plus_one, rstd[m], to + at);
          }
        }
        if (dweight) {
#pragma omp for schedule(static)
          for (int64_t h = 0; h < n.H; h += W)
            norm_weight_gradient(slope, from, rstd, n.M, n.H, h, dweight);
        }
      }
    });
  });
}

// y[i] = x[i] cos[i] - x[i + half] sin[i], y[i + half] = x[i + half] cos[i + half] + x[i] sin[i].
template <class T, class C>
void turn_head(const T* x, const C* cos, const C* sin, int64_t half, int64_t D, float sign, T* y) {
  for (int64_t i = 0; i < half; i += W) {
    const int64_t left = half - i;
    const Vec a = load_part(x + i, left), b = load_part(x + half + i, left);
    const Vec s = mul(load_part(sin + i, left), set1(sign));
    const Vec first = sub(mul(a, load_part(cos + i, left)), mul(b, s));
    const Vec second = add(mul(b, load_part(cos + half + i, left)), mul(a, s));
    store_part(y + i, left, first);
    store_part(y + half + i, left, second);
  }
  memcpy(y + 2 * half, x + 2 * half, size_t(D - 2 * half) * sizeof(T));
}

void rotate(const lowrank_heads& x, int32_t dtype, const lowrank_angles& angles, bool back, void* y,
            int32_t threads) {
  with_type(dtype, [&](auto* type) {
    const auto* from = static_cast<decltype(type)>(const_cast<void*>(x.data));
    auto* to = static_cast<decltype(type)>(y);
    with_type(angles.dtype, [&](auto* angle_type) {
      const auto* cos = static_cast<decltype(angle_type)>(const_cast<void*>(angles.cos));
      const auto* sin = static_cast<decltype(angle_type)>(const_cast<void*>(angles.sin));
      const int64_t half = angles.turned / 2;
#pragma omp parallel for schedule(static) num_threads(threads) \
    if (x.B * x.S * x.heads * x.D > WORTH_ELEMENT_THREADS)
      for (int64_t token = 0; token < x.B * x.S; ++token) {
        const int64_t b = token / x.S, s = token % x.S;
        const int64_t at = (angles.B == 1 ? s : token) * half;
        for (int64_t head = 0; head < x.heads; ++head) {
          turn_head(from + b * x.stride_b + s * x.stride_s + head * x.stride_head, cos + 2 * at,
                    sin + at, half, x.D, back ? -1.0f : 1.0f, to + (token * x.heads + head) * x.D);
        }
      }
    });
  });
}

// Both activations are x * sigmoid(t(x)): t(x) = x for SiLU, and for GELU by the hyperbolic tangent
// t(x) = 2 sqrt(2 / pi) (x + 0.044715 x^3), as 1 + tanh(u) = 2 sigmoid(2 u).
constexpr float GELU_1 = 1.5957691216057308f, GELU_3 = 0.044715f;

inline Vec gate_argument(Vec x, bool gelu) {
  if (!gelu) return x;
  return mul(mul(x, set1(GELU_1)), fma(mul(x, x), set1(GELU_3), set1(1)));
}
inline Vec gate_argument_slope(Vec x, bool gelu) {
  if (!gelu) return set1(1);
  return mul(set1(GELU_1), fma(mul(x, x), set1(3 * GELU_3), set1(1)));
}
// 1 / (1 + e^-t), from e^-|t|, which cannot overflow.
inline Vec sigmoid(Vec t) {
  const Vec small = exp_nonpositive(min(t, sub(set1(0), t)));
  const Vec top = max(zero_below(set1(1), t, set1(0)), small);
  return div(top, add(set1(1), small));
}

template <class T>
void gate_row(const T* gate, const T* up, int64_t I, bool gelu, T* y) {
  for (int64_t i = 0; i < I; i += W) {
    const Vec x = load_part(gate + i, I - i);
    const Vec activated = mul(x, sigmoid(gate_argument(x, gelu)));
    store_part(y + i, I - i, mul(activated, load_part(up + i, I - i)));
  }
}

// With s = sigmoid(t(x)): act(x) = x s and act'(x) = s + x s (1 - s) t'(x).
template <class T>
void gate_row_backward(const T* dy, const T* gate, const T* up, int64_t I, bool gelu, T* dgate,
                       T* dup) {
  for (int64_t i = 0; i < I; i += W) {
    const Vec x = load_part(gate + i, I - i), d = load_part(dy + i, I - i);
    const Vec s = sigmoid(gate_argument(x, gelu)), activated = mul(x, s);
    const Vec bend = mul(sub(set1(1), s), gate_argument_slope(x, gelu));
    const Vec slope = fma(activated, bend, s);
    store_part(dgate + i, I - i, mul(mul(d, load_part(up + i, I - i)), slope));
    store_part(dup + i, I - i, mul(d, activated));
  }
}

void gated(const lowrank_gate& g, void* y, int32_t threads) {
  with_type(g.dtype, [&](auto* type) {
    const auto* gate = static_cast<decltype(type)>(const_cast<void*>(g.gate));
    const auto* up = static_cast<decltype(type)>(const_cast<void*>(g.up));
    auto* to = static_cast<decltype(type)>(y);
    const bool gelu = g.activation == LOWRANK_GELU_TANH;
#pragma omp parallel for schedule(static) num_threads(threads) if (g.M * g.I > WORTH_ELEMENT_THREADS)
    for (int64_t m = 0; m < g.M; ++m)
      gate_row(gate + m * g.gate_stride, up + m * g.up_stride, g.I, gelu, to + m * g.I);
  });
}

void gated_backward(const lowrank_gate& g, const void* dy, void* dgate, void* dup,
                    int32_t threads) {
  with_type(g.dtype, [&](auto* type) {
    const auto* gate = static_cast<decltype(type)>(const_cast<void*>(g.gate));
    const auto* up = static_cast<decltype(type)>(const_cast<void*>(g.up));
    const auto* from = static_cast<decltype(type)>(const_cast<void*>(dy));
    auto* to_gate = static_cast<decltype(type)>(dgate);
    auto* to_up = static_cast<decltype(type)>(dup);
    const bool gelu = g.activation == LOWRANK_GELU_TANH;
#pragma omp parallel for schedule(static) num_threads(threads) if (g.M * g.I > WORTH_ELEMENT_THREADS)
    for (int64_t m = 0; m < g.M; ++m)
      gate_row_backward(from + m * g.I, gate + m * g.gate_stride, up + m * g.up_stride, g.I, gelu,
                        to_gate + m * g.I, to_up + m * g.I);
  });
}

}  // namespace
