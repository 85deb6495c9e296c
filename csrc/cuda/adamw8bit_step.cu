// One step of 8-bit AdamW over all tensors in one launch; csrc/moments8bit_impl.h is its twin.
//
// A lane takes eight consecutive elements, so a warp takes a block of 256, or several blocks of
// shorter rows side by side. Moments stay in registers between the update and their new codes.
// The nearest code is found by counting midpoints below, in a binary search tree whose levels lie
// one after another: the lanes of a warp meet no bank conflict in its first five levels.
#include "cuda/common.h"

namespace {

using lowrank_cuda::kOctet;

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kPasses = 4;  // that share the tables: about 8192 elements a thread block
constexpr int kBlock = 256;
constexpr int kZeroOfM = 127;
constexpr int kLevels = 8;  // of a search tree
constexpr float kSmallestScale = 1.17549435e-38f;  // the smallest normal: its reciprocal is finite

struct Entry {
  void* p;
  const void* g;
  uint8_t* m;
  uint8_t* v;
  float* m_scale;
  float* v_scale;
  int64_t cols, blocks;  // `blocks` in all rows
  uint32_t first;        // thread block of this launch that begins with this tensor
  int16_t dtype, lanes;  // that share a block, a power of two
};

// What a kernel's arguments can hold: 4 KB, and 32 KB since CUDA 12.1.
#if CUDART_VERSION >= 12010
constexpr int kMostTensors = 400;
#else
constexpr int kMostTensors = 48;
#endif

struct Step {
  lowrank_adamw8bit_coefficients by;
  const float* m_map;
  const float* v_map;
  int count;
  Entry entries[kMostTensors];
};

// Node 1 is the middle one of 2^kLevels - 1 thresholds, nodes 2 and 3 are those of the halves.
__device__ int threshold_at(int node) {
  int level = 0;
  while (node >> (level + 1)) ++level;
  return (2 * (node - (1 << level)) + 1) * (1 << (kLevels - 1 - level)) - 1;
}

struct Tree {
  float nodes[1 << kLevels];

  // By thread i of 2^kLevels. The largest float not above the exact midpoint of two neighbours is
  // below whatever the midpoint is below; there are `count` entries, and no number passes infinity.
  __device__ void make(const float* entries, int count, int i) {
    if (i == 0) return;
    const int at = threshold_at(i);
    nodes[i] = __uint_as_float(0x7F800000u);
    if (at + 1 < count) {
      nodes[i] = __double2float_rd((double(entries[at]) + double(entries[at + 1])) / 2);
    }
  }
  __device__ int below(float s) const {
    int node = 1;
#pragma unroll
    for (int level = 0; level < kLevels; ++level) node = 2 * node + (s > nodes[node] ? 1 : 0);
    return node - (1 << kLevels);
  }
};

struct Tables {
  float m[kBlock], v[kBlock];
  Tree m_tree;  // of the 129 values of m from 0 on
  Tree v_tree;  // of the 255 values of v above 0: only 0 itself becomes 0
};

__device__ float usable(uint32_t bits) {
  const float largest = __uint_as_float(bits);
  return largest < kSmallestScale ? 0.0f : largest;
}
__device__ float inverse_of(float scale) { return scale == 0.0f ? 0.0f : __frcp_rn(scale); }

__device__ void load_codes(const uint8_t* from, int64_t count, bool whole, uint8_t zero,
                           uint8_t (&codes)[kOctet]) {
  if (whole) {
    *reinterpret_cast<uint2*>(codes) = *reinterpret_cast<const uint2*>(from);
  } else {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) codes[i] = i < count ? from[i] : zero;
  }
}

__device__ void store_codes(uint8_t* to, int64_t count, bool whole,
                            const uint8_t (&codes)[kOctet]) {
  if (whole) {
    *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(codes);
  } else {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      if (i < count) to[i] = codes[i];
    }
  }
}

// `count` <= 8 elements of the lane, from `at` on, of the block with scales number `block`. Lanes
// beyond the last block pass count <= 0, and read and write nothing.
template <class T>
__device__ void step_octet(const Entry& e, int64_t at, int64_t block, int64_t count, bool first,
                           const Tables& tables, const lowrank_adamw8bit_coefficients& by) {
  T* const p = static_cast<T*>(e.p) + at;
  const T* const g = static_cast<const T*>(e.g) + at;
  const bool all = count >= kOctet;
  const bool whole = all && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  alignas(8) uint8_t m_codes[kOctet], v_codes[kOctet];
  float values[kOctet], gs[kOctet], ms[kOctet], vs[kOctet];
  const bool m_whole = all && reinterpret_cast<uintptr_t>(e.m + at) % 8 == 0;
  const bool v_whole = all && reinterpret_cast<uintptr_t>(e.v + at) % 8 == 0;
  lowrank_cuda::load_octet(g, count, all && reinterpret_cast<uintptr_t>(g) % 16 == 0, gs);
  lowrank_cuda::load_octet(p, count, whole, values);
  load_codes(e.m + at, count, m_whole, kZeroOfM, m_codes);
  load_codes(e.v + at, count, v_whole, 0, v_codes);
  const float m_scale = count > 0 ? e.m_scale[block] : 0.0f;
  const float v_scale = count > 0 ? e.v_scale[block] : 0.0f;

  // The least value of the map of m is above -1: its scale is such that a negative m of the
  // largest magnitude is kept too.
  const float below = __frcp_rn(tables.m[0]);
  uint32_t m_largest = 0, v_largest = 0;
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    const float m_was = __fmul_rn(tables.m[m_codes[i]], m_scale);
    const float v_was = __fmul_rn(tables.v[v_codes[i]], v_scale);
    const float m = __fadd_rn(__fmul_rn(m_was, by.beta1), __fmul_rn(gs[i], by.rest1));
    const float v = __fadd_rn(__fmul_rn(v_was, by.beta2),
                              __fmul_rn(__fmul_rn(gs[i], gs[i]), by.rest2));
    const float root = __fadd_rn(__fmul_rn(__fsqrt_rn(v), by.root2), by.eps);
    values[i] = __fsub_rn(__fmul_rn(values[i], by.decay), __fmul_rn(__fdiv_rn(m, root), by.rate));
    const uint32_t m_bits = lowrank_cuda::magnitude_bits(fmaxf(m, __fmul_rn(m, below)));
    const uint32_t v_bits = lowrank_cuda::magnitude_bits(v);
    m_largest = i < count && m_bits > m_largest ? m_bits : m_largest;
    v_largest = i < count && v_bits > v_largest ? v_bits : v_largest;
    ms[i] = m;
    vs[i] = v;
  }
  const float m_now = usable(lowrank_cuda::largest_of(m_largest, e.lanes));
  const float v_now = usable(lowrank_cuda::largest_of(v_largest, e.lanes));
  const float m_inverse = inverse_of(m_now), v_inverse = inverse_of(v_now);
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    const float m = __fmul_rn(ms[i], m_inverse), v = __fmul_rn(vs[i], v_inverse);
    const int away = tables.m_tree.below(fabsf(m));
    const int code = kZeroOfM + (__float_as_uint(m) >> 31 ? -away : away);
    m_codes[i] = static_cast<uint8_t>(code < 0 ? 0 : code);
    v_codes[i] = static_cast<uint8_t>(v == 0.0f ? 0 : 1 + tables.v_tree.below(v));
  }
  if (count <= 0) return;
  lowrank_cuda::store_octet(p, count, whole, values);
  store_codes(e.m + at, count, m_whole, m_codes);
  store_codes(e.v + at, count, v_whole, v_codes);
  if (first) {
    e.m_scale[block] = m_now;
    e.v_scale[block] = v_now;
  }
}

__global__ void __launch_bounds__(kThreads) adamw8bit(const __grid_constant__ Step step) {
  __shared__ Tables tables;
  const int i = threadIdx.x;
  tables.m[i] = step.m_map[i];
  tables.v[i] = step.v_map[i];
  __syncthreads();
  tables.m_tree.make(tables.m + kZeroOfM, kBlock - kZeroOfM, i);
  tables.v_tree.make(tables.v + 1, kBlock - 1, i);
  __syncthreads();

  int low = 0, high = step.count;  // the last tensor that begins at this thread block or before
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (step.entries[middle].first <= blockIdx.x ? low : high) = middle;
  }
  const Entry& e = step.entries[low];
  const int64_t in_row = (e.cols + kBlock - 1) / kBlock, at_once = kThreads / e.lanes;
  const int lane = i % e.lanes;
  const int64_t pass = int64_t(blockIdx.x - e.first) * kPasses;
  for (int64_t begin = pass * at_once; begin < (pass + kPasses) * at_once && begin < e.blocks;
       begin += at_once) {
    const int64_t block = begin + i / e.lanes;
    const int64_t col = block % in_row * kBlock + lane * kOctet;
    const int64_t at = block / in_row * e.cols + col;
    const int64_t end = (block % in_row + 1) * kBlock;
    const int64_t count = block < e.blocks ? (end < e.cols ? end : e.cols) - col : 0;
    switch (e.dtype) {
      case LOWRANK_F32: step_octet<float>(e, at, block, count, lane == 0, tables, step.by); break;
      case LOWRANK_F16: step_octet<__half>(e, at, block, count, lane == 0, tables, step.by); break;
      default: step_octet<__nv_bfloat16>(e, at, block, count, lane == 0, tables, step.by);
    }
  }
}

bool valid(const lowrank_moments8bit_tensor& t) {
  if (t.rows < 0 || t.cols < 0 || t.dtype < LOWRANK_F32 || t.dtype > LOWRANK_BF16) return false;
  if (t.rows == 0 || t.cols == 0) return true;
  const uintptr_t size = t.dtype == LOWRANK_F32 ? 4 : 2;
  return t.p && t.g && t.m && t.v && t.m_scale && t.v_scale && lowrank_cuda::aligned(t.p, size) &&
         lowrank_cuda::aligned(t.g, size);
}

}  // namespace

int32_t lowrank_cuda_adamw8bit_step(const lowrank_moments8bit_tensor* tensors, int64_t count,
                                    const float* m_map, const float* v_map,
                                    const lowrank_adamw8bit_coefficients* coefficients,
                                    int32_t device, void* stream) {
  if (count < 0) return LOWRANK_BAD_ARGUMENT;
  if (count == 0) return LOWRANK_OK;
  if (!tensors || !m_map || !v_map || !coefficients) return LOWRANK_BAD_ARGUMENT;
  for (int64_t i = 0; i < count; ++i) {
    if (!valid(tensors[i])) return LOWRANK_BAD_ARGUMENT;
  }
  Step step;
  step.by = *coefficients;
  step.m_map = m_map;
  step.v_map = v_map;
  step.count = 0;
  int64_t grid = 0;
  const auto run = [&]() -> int32_t {
    if (step.count == 0) return LOWRANK_OK;
    const dim3 blocks(static_cast<unsigned>(grid));
    const int32_t status =
        lowrank_cuda::launch(adamw8bit, blocks, kThreads, device, stream, step);
    step.count = 0;
    grid = 0;
    return status;
  };
  for (int64_t i = 0; i < count; ++i) {
    const lowrank_moments8bit_tensor& t = tensors[i];
    if (t.rows == 0 || t.cols == 0) continue;
    int lanes = 1;
    while (lanes < 32 && lanes * kOctet < t.cols) lanes *= 2;
    const int64_t blocks = t.rows * ((t.cols + kBlock - 1) / kBlock);
    const int64_t together = int64_t(kPasses) * (kThreads / lanes);
    const int64_t needed = (blocks + together - 1) / together;
    if (needed > INT32_MAX) return LOWRANK_BAD_ARGUMENT;
    if (step.count == kMostTensors || grid + needed > INT32_MAX) {
      const int32_t status = run();
      if (status != LOWRANK_OK) return status;
    }
    step.entries[step.count++] = {t.p, t.g, t.m, t.v, t.m_scale, t.v_scale, t.cols, blocks,
                                  static_cast<uint32_t>(grid), static_cast<int16_t>(t.dtype),
                                  static_cast<int16_t>(lanes)};
    grid += needed;
  }
  return run();
}
