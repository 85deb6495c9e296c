// CUDA's 16-bit types, by the conversions of the CPU kernels.
#pragma once

#include "cuda_fp16.h"

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 v) {
  return emulation::to_float(emulation::Bfloat16{v.bits});
}
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  emulation::Bfloat16 to;
  emulation::from_float(v, &to);
  return {to.bits};
}
