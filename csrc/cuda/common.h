// What every kernel's file needs: a weight as the kernels address it, conversions, launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "lowrank_cuda.h"

namespace lowrank_cuda {

struct Weight {
  const uint8_t* packed;
  const void* absmax;
  const float* absmax_scale;
  const float* codebook;
  int64_t codebook_stride;  // 16 if each row has its table, 0 if all share one
  int64_t N, K, row_bytes, blocks;
  int log2_block;
};

// False if the sizes cannot be those of a weight. The pointers are the caller's to check.
inline bool make_weight(const uint8_t* packed, const void* absmax, const float* absmax_scale,
                        const float* codebook, int64_t codebook_rows, int64_t N, int64_t K,
                        int64_t block_size, Weight* w) {
  const bool power_of_two = (block_size & (block_size - 1)) == 0;
  if (block_size < 32 || block_size > 4096 || !power_of_two) return false;
  if (N < 0 || N > INT32_MAX || K < 0) return false;
  if (codebook_rows != 1 && codebook_rows != N) return false;
  int log2_block = 5;
  while ((int64_t(1) << log2_block) < block_size) ++log2_block;
  *w = {packed, absmax, absmax_scale, codebook, codebook_rows == 1 ? 0 : 16, N, K,
        (K + 31) / 32 * 16, (K + block_size - 1) / block_size, log2_block};
  return true;
}

inline bool aligned(const void* pointer, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

inline int32_t status_of(cudaError_t error) {
  return error == cudaSuccess ? LOWRANK_OK : LOWRANK_CUDA_ERROR + static_cast<int32_t>(error);
}

// Asynchronous, on `stream` of `device`; the thread's own device stays what it was.
template <class... Parameters, class... Arguments>
int32_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, int32_t device, void* stream,
               const Arguments&... arguments) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error != cudaSuccess) return status_of(error);
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(stream);
  error = cudaLaunchKernelEx(&config, kernel, arguments...);
  const cudaError_t restored = cudaSetDevice(before);
  return status_of(error == cudaSuccess ? restored : error);
}

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

__device__ inline void from_float(float v, float* to) { *to = v; }
__device__ inline void from_float(float v, __half* to) { *to = __float2half_rn(v); }
__device__ inline void from_float(float v, __nv_bfloat16* to) { *to = __float2bfloat16_rn(v); }

// The bits of |v|: ordered as the magnitudes are, and a NaN above every number.
__device__ inline uint32_t magnitude_bits(float v) { return __float_as_uint(v) & 0x7FFFFFFFu; }

// The largest of `width` neighbouring lanes, a power of two, in each of them.
__device__ inline uint32_t largest_of(uint32_t bits, int width) {
  for (int apart = width / 2; apart > 0; apart /= 2) {
    const uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, bits, apart);
    bits = other > bits ? other : bits;
  }
  return bits;
}

// Consecutive elements of a row as 16-byte loads and stores where `whole`: all eight are there and
// aligned. Else one by one, those from `count` on being zero, or not stored.
constexpr int kOctet = 8;

template <class T>
__device__ inline void load_octet(const T* from, int64_t count, bool whole, float (&v)[kOctet]) {
  if (whole) {
    alignas(16) T raw[kOctet];
#pragma unroll
    for (int i = 0; i < int(sizeof raw / 16); ++i) {
      reinterpret_cast<uint4*>(raw)[i] = reinterpret_cast<const uint4*>(from)[i];
    }
#pragma unroll
    for (int i = 0; i < kOctet; ++i) v[i] = to_float(raw[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) v[i] = i < count ? to_float(from[i]) : 0.0f;
  }
}

template <class T>
__device__ inline void store_octet(T* to, int64_t count, bool whole, const float (&v)[kOctet]) {
  alignas(16) T raw[kOctet];
#pragma unroll
  for (int i = 0; i < kOctet; ++i) from_float(v[i], raw + i);
  if (whole) {
#pragma unroll
    for (int i = 0; i < int(sizeof raw / 16); ++i) {
      reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(raw)[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      if (i < count) to[i] = raw[i];
    }
  }
}

}  // namespace lowrank_cuda
