// What C++ has no words for: products on tensor cores, and 32-bit addresses in shared memory.
//
// mma: d = a b + c: a [16, 16], b [16, 8] of 16-bit values, c and d [16, 8] float32.
//
// Lane 4g + t holds, two to a register, a[g][2t..], a[g + 8][2t..], a[g][2t + 8..],
// a[g + 8][2t + 8..] and b[2t..][g], b[2t + 8..][g]; and of c and d [g][2t..], [g + 8][2t..].
#pragma once

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace lowrank_cuda {

// Shared memory by address: through a pointer, the compiler adds the table's address for each entry.
using SharedAddress = uint32_t;

__device__ inline SharedAddress shared_address(const void* pointer) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
}
__device__ inline void load_shared(SharedAddress at, uint32_t* to) {
  asm("ld.shared.u32 %0, [%1];" : "=r"(*to) : "r"(at) : "memory");
}
__device__ inline void load_shared(SharedAddress at, float2* to) {
  asm("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(to->x), "=f"(to->y) : "r"(at) : "memory");
}

// Turing has no such instruction: there the launcher refuses, and this is never reached.
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                           const float (&c)[4], __nv_bfloat16) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]),
        "f"(c[2]), "f"(c[3]));
#else
  __trap();
#endif
}

__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                           const float (&c)[4], __half) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]),
        "f"(c[2]), "f"(c[3]));
#else
  __trap();
#endif
}

}  // namespace lowrank_cuda

#else
#include "emulated_ptx.h"  // of the tests, which run these kernels on a CPU
#endif
