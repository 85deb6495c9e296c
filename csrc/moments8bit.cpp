// The steps of 8-bit optimizers: check the arguments, prepare maps, share blocks among threads.
#include "moments8bit.h"

#include <math.h>
#include <string.h>

#include <vector>

#include "kernels.h"

namespace {

using lowrank::MOMENT_BLOCK;
using lowrank::AdamwStep;
using lowrank::BINS;
using lowrank::HIGHEST;
using lowrank::LionStep;
using lowrank::LOWEST;
using lowrank::MomentMap;

constexpr int64_t TASK = 1 << 14;  // elements that a thread takes at once

// The largest float not above the exact midpoint: s is nearer to b than to a where s is above it.
float midpoint(float a, float b) {
  const double exact = (double(a) + double(b)) / 2;
  const float rounded = float(exact);
  return double(rounded) > exact ? nextafterf(rounded, -1.0f) : rounded;
}

// The map from its value 0 upwards; `nearest_to_zero` is 1 where only 0 itself may become 0.
// False if the values are not in order, or two midpoints have their first 16 bits in common.
bool prepare(const float* values, int32_t nearest_to_zero, MomentMap* map) {
  map->values = values;
  map->zero = 0;
  while (map->zero < 256 && values[map->zero] < 0) ++map->zero;
  if (map->zero > 254 || values[map->zero] != 0 || values[255] != 1) return false;
  const float* above = values + map->zero;
  const int32_t largest = 255 - map->zero;
  for (int32_t i = 0; i < map->zero; ++i) {  // negative values mirror the positive
    if (above[-1 - i] != -above[1 + i]) return false;
  }
  int32_t below = nearest_to_zero;  // midpoints below the bin
  for (int bin = 0; bin < BINS; ++bin) {
    const uint32_t first = LOWEST + (uint32_t(bin) << 16);
    uint32_t threshold = 0xFFFF;
    int32_t inside = 0;
    for (; below + inside < largest; ++inside) {
      const float a = above[below + inside], b = above[below + inside + 1];
      const float middle = midpoint(a, b);
      uint32_t bits;
      memcpy(&bits, &middle, 4);
      if (!(a < b) || bits < first) return false;
      if (bits > first + 0xFFFF) break;
      threshold = bits & 0xFFFF;
    }
    if (inside > 1) return false;
    map->bins[bin] = uint32_t(below) << 16 | threshold;
    below += inside;
  }
  return below == largest;
}

struct Task {
  const lowrank_moments8bit_tensor* tensor;
  int64_t first, last;  // blocks
};

bool valid(const lowrank_moments8bit_tensor* tensors, int64_t count, bool with_v) {
  if (count < 0 || (count > 0 && !tensors)) return false;
  for (int64_t i = 0; i < count; ++i) {
    const lowrank_moments8bit_tensor& t = tensors[i];
    if (t.rows < 0 || t.cols < 0 || t.dtype < LOWRANK_F32 || t.dtype > LOWRANK_BF16) return false;
    if (t.rows == 0 || t.cols == 0) continue;
    if (!(t.p && t.g && t.m && t.m_scale) || (with_v && !(t.v && t.v_scale))) return false;
  }
  return true;
}

std::vector<Task> tasks_of(const lowrank_moments8bit_tensor* tensors, int64_t count) {
  std::vector<Task> tasks;
  for (int64_t i = 0; i < count; ++i) {
    const lowrank_moments8bit_tensor& t = tensors[i];
    if (t.rows == 0 || t.cols == 0) continue;
    const int64_t blocks = t.rows * ((t.cols + MOMENT_BLOCK - 1) / MOMENT_BLOCK);
    const int64_t together = TASK / (t.cols < MOMENT_BLOCK ? t.cols : MOMENT_BLOCK);
    for (int64_t b = 0; b < blocks; b += together) {
      tasks.push_back({&t, b, b + together < blocks ? b + together : blocks});
    }
  }
  return tasks;
}

template <class Step>
int32_t run(const lowrank_moments8bit_tensor* tensors, int64_t count, const Step& step,
            void (*kernel)(const lowrank_moments8bit_tensor&, int64_t, int64_t, const Step&),
            int32_t threads) {
  const std::vector<Task> tasks = tasks_of(tensors, count);
  const int64_t last = int64_t(tasks.size());
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (last > 1)
  for (int64_t i = 0; i < last; ++i)
    kernel(*tasks[size_t(i)].tensor, tasks[size_t(i)].first, tasks[size_t(i)].last, step);
  return LOWRANK_OK;
}

}  // namespace

int32_t lowrank_adamw8bit_step(const lowrank_moments8bit_tensor* tensors, int64_t count,
                               const float* m_map, const float* v_map,
                               const lowrank_adamw8bit_coefficients* coefficients,
                               int32_t threads) {
  if (!valid(tensors, count, true) || threads < 1) return LOWRANK_BAD_ARGUMENT;
  if (count == 0) return LOWRANK_OK;
  if (!m_map || !v_map || !coefficients) return LOWRANK_BAD_ARGUMENT;
  MomentMap m, v;
  if (!prepare(m_map, 0, &m) || !prepare(v_map, 1, &v) || v.zero != 0) return LOWRANK_BAD_ARGUMENT;
  return run(tensors, count, AdamwStep{m, v, *coefficients}, lowrank::kernels_in_use().adamw8bit,
             threads);
}

int32_t lowrank_lion8bit_step(const lowrank_moments8bit_tensor* tensors, int64_t count,
                              const float* m_map, const lowrank_lion8bit_coefficients* coefficients,
                              int32_t threads) {
  if (!valid(tensors, count, false) || threads < 1) return LOWRANK_BAD_ARGUMENT;
  if (count == 0) return LOWRANK_OK;
  if (!m_map || !coefficients) return LOWRANK_BAD_ARGUMENT;
  MomentMap m;
  if (!prepare(m_map, 0, &m)) return LOWRANK_BAD_ARGUMENT;
  return run(tensors, count, LionStep{m, *coefficients}, lowrank::kernels_in_use().lion8bit,
             threads);
}
