// Enough of CUDA to run csrc/cuda on a CPU: each thread of a thread block is a fiber.
//
// Fibers run one at a time, in a random order, each up to the next barrier or exchange between the
// lanes of its warp. So a result depends on the order of threads if a barrier is missing, and a
// barrier that only some threads reach ends the program.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <functional>

#define __device__
#define __global__
#define __shared__ static
#define __grid_constant__
#define __restrict__
#define __launch_bounds__(...)
#define CUDART_VERSION 13000

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
constexpr int kMostBytes = 64;  // that a lane shows to the others of its warp at once

void launch(dim3 grid, dim3 block, const std::function<void()>& kernel);
void wait_for_block();
// Shows `mine` to the warp and returns what all 32 lanes show, [32][kMostBytes].
const unsigned char* exchange(const void* mine, size_t bytes);
}  // namespace emulation

inline void __syncthreads() { emulation::wait_for_block(); }

template <class T>
T __shfl_xor_sync(uint32_t, T value, int apart, int = 32) {
  const int lane = int(threadIdx.x % 32);
  const unsigned char* shown = emulation::exchange(&value, sizeof value);
  memcpy(&value, shown + (lane ^ apart) * emulation::kMostBytes, sizeof value);
  return value;
}
template <class T>
T __shfl_sync(uint32_t, T value, int from, int width = 32) {
  const int lane = int(threadIdx.x % 32);
  const unsigned char* shown = emulation::exchange(&value, sizeof value);
  memcpy(&value, shown + (lane / width * width + from % width) * emulation::kMostBytes,
         sizeof value);
  return value;
}

inline uint32_t __float_as_uint(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float v;
  memcpy(&v, &bits, 4);
  return v;
}
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __double2float_rd(double v) {
  const float nearest = float(v);
  return double(nearest) > v ? nextafterf(nearest, -INFINITY) : nearest;
}
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = uint64_t(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    out |= uint32_t(both >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
  }
  return out;
}
template <class T>
T __ldcs(const T* from) {
  return *from;
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidDevice = 101 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrComputeCapabilityMajor = 75 };

// Two devices of one multiprocessor: 0 of Hopper's kind, 1 of Turing's.
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 2;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  return device == 0 || device == 1 ? cudaSuccess : cudaErrorInvalidDevice;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid device ordinal";
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
  *value = which == cudaDevAttrMultiProcessorCount ? 1 : device == 1 ? 7 : 9;
  return cudaSetDevice(device);
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  void* attrs;
  unsigned numAttrs;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  emulation::launch(config->gridDim, config->blockDim, [&] { kernel(arguments...); });
  return cudaSuccess;
}
