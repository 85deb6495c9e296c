// Attention of the newest position of each text: one query a head against all keys so far.
//
// So little is computed for a token that what surrounds a product takes longer than the product:
// turning, caching, scores, softmax and the sum over values are one pass over a head.
#pragma once

#include <type_traits>

#include "linear_impl.h"
#include "softmax_impl.h"

namespace {

constexpr int64_t WORTH_HEAD_THREADS = 1 << 16;  // elements of keys; below, waking threads costs more

// x [D] turned by the angles of a position; cos and sin are null, or as in lowrank.h.
template <class T, class Out>
void turned(const T* x, int64_t D, const T* cos, const T* sin, int64_t rotary, Out* out) {
  const int64_t half = cos ? rotary / 2 : 0;
  for (int64_t i = 0; i < half; ++i) {
    const float a = to_float(x[i]), b = to_float(x[half + i]), s = to_float(sin[i]);
    from_float(a * to_float(cos[i]) - b * s, out + i);
    from_float(b * to_float(cos[half + i]) + a * s, out + half + i);
  }
  for (int64_t i = 2 * half; i < D; ++i) from_float(to_float(x[i]), out + i);
}

// out[d] = sum over t of p[t] * values[t, d] for V * W of them, `apart` between positions.
template <int V, class T>
inline void weighted_sum(const float* p, int64_t count, const T* values, int64_t apart, float* out) {
  Vec s[V];
  for (int v = 0; v < V; ++v) s[v] = set1(0);
  for (int64_t t = 0; t < count; ++t, values += apart) {
    const Vec pt = set1(p[t]);
    for (int v = 0; v < V; ++v) s[v] = fma(pt, load(values + v * W), s[v]);
  }
  for (int v = 0; v < V; ++v) store(out + v * W, s[v]);
}

// s -> e^(s - max) over `count` scores, and zeros up to whole vectors; returns their sum.
inline float exponentials(float* s, int64_t count) {
  const int64_t whole = (count + W - 1) / W * W;
  for (int64_t t = count; t < whole; ++t) s[t] = -INFINITY;
  float top = s[0];
  for (int64_t t = 1; t < count; ++t) top = s[t] > top || s[t] != s[t] ? s[t] : top;
  Vec total = set1(0);
  for (int64_t t = 0; t < whole; t += W) {
    const Vec e = exp_nonpositive(sub(load(s + t), set1(top)));
    store(s + t, e);
    total = add(total, e);
  }
  return sum(total);
}

// c tanh(s / c), by e^(-2 |s / c|).
inline void cap_scores(float* s, int64_t count, float c) {
  for (int64_t t = 0; t < count; t += W) {
    float room[W] = {}, signs[W];
    for (int64_t i = t; i < smaller(t + W, count); ++i) {
      signs[i - t] = s[i] < 0 ? -c : c;
      room[i - t] = (s[i] < 0 ? 2 : -2) * s[i] / c;
    }
    const Vec e = exp_nonpositive(load(room));
    store(room, div(sub(set1(1), e), add(set1(1), e)));
    for (int64_t i = t; i < smaller(t + W, count); ++i) s[i] = signs[i - t] * room[i - t];
  }
}

// One head's: q [D] turned and scaled, its keys and values from the first seen on; `room` is for as
// many scores as there are positions, in whole vectors.
template <class T>
void attend_head(const lowrank_newest& n, const float* q, const T* keys, const T* values,
                 const uint8_t* mask, float* room, T* out) {
  const int64_t count = n.position + 1 - n.first, apart = n.kv_heads * n.D;
  for (int64_t t = 0; t < count; ++t) room[t] = dot(q, keys + t * apart, n.D);
  if (n.softcap > 0) cap_scores(room, count, n.softcap);
  for (int64_t t = 0; mask && t < count; ++t) room[t] = mask[t] ? room[t] : -INFINITY;
  const float inverse = 1.0f / exponentials(room, count);
  float sums[4 * W];
  for (int64_t d = 0; d < n.D;) {
    int64_t length = smaller(4 * W, n.D - d);
    if (length == 4 * W) {
      weighted_sum<4>(room, count, values + d, apart, sums);
    } else if (length >= W) {
      weighted_sum<1>(room, count, values + d, apart, sums);
      length = W;
    } else {
      for (int64_t i = 0; i < length; ++i) {
        sums[i] = 0;
        for (int64_t t = 0; t < count; ++t) sums[i] += room[t] * to_float(values[t * apart + d + i]);
      }
    }
    for (int64_t i = 0; i < length; ++i) from_float(sums[i] * inverse, out + d + i);
    d += length;
  }
}

template <class T>
int32_t attend_newest_of(const lowrank_newest& n, const T* q, const T* k, const T* v,
                         const int64_t* strides, T* keys, T* values, T* out, int32_t threads) {
  const int64_t D = n.D, seen = n.position + 1 - n.first, text = n.capacity * n.kv_heads * D;
  const int64_t tasks = n.B * n.heads, for_scores = (seen + W - 1) / W * W;
  thread_local Scratch scratch;
  float* room = scratch.of(size_t(threads * (D + for_scores)));
  if (!room) return LOWRANK_OUT_OF_MEMORY;
  const auto angles = [](const void* at, int64_t row) {
    return at ? static_cast<const T*>(at) + row : nullptr;
  };
  for (int64_t b = 0; b < n.B; ++b) {
    const T *cos = angles(n.cos, b * n.cos_row), *sin = angles(n.sin, b * n.sin_row);
    T* to = keys + b * text + n.position * n.kv_heads * D;
    T* value = values + b * text + n.position * n.kv_heads * D;
    for (int64_t h = 0; h < n.kv_heads; ++h) {
      turned(k + b * strides[2] + h * strides[3], D, cos, sin, n.rotary, to + h * D);
      memcpy(value + h * D, v + b * strides[4] + h * strides[5], size_t(D) * sizeof(T));
    }
  }
#pragma omp parallel for schedule(static) num_threads(threads) \
    if (tasks * seen * D > WORTH_HEAD_THREADS)
  for (int64_t i = 0; i < threads; ++i) {
    float* own = room + i * (D + for_scores);
    for (int64_t task = tasks * i / threads; task < tasks * (i + 1) / threads; ++task) {
      const int64_t b = task / n.heads, h = task % n.heads, j = h / (n.heads / n.kv_heads);
      const int64_t first = b * text + (n.first * n.kv_heads + j) * D;
      turned(q + b * strides[0] + h * strides[1], D, angles(n.cos, b * n.cos_row), angles(n.sin, b * n.sin_row),
             n.rotary, own + for_scores);
      for (int64_t d = 0; d < D; ++d) own[for_scores + d] *= n.scale;
      attend_head(n, own + for_scores, keys + first, values + first,
                  n.mask ? n.mask + b * n.mask_row : nullptr, own, out + task * D);
    }
  }
  return LOWRANK_OK;
}

int32_t attend_newest(const lowrank_newest& n, const void* q, const void* k, const void* v,
                      const int64_t* strides, int32_t dtype, void* keys, void* values, void* out,
                      int32_t threads) {
  int32_t status = LOWRANK_OK;
  with_type(dtype, [&](auto* type) {
    using T = decltype(type);
    const auto from = [](const void* at) { return static_cast<T>(const_cast<void*>(at)); };
    status = attend_newest_of<std::remove_pointer_t<T>>(n, from(q), from(k), from(v), strides, static_cast<T>(keys), static_cast<T>(values),
                              static_cast<T>(out), threads);
  });
  return status;
}

}  // namespace
