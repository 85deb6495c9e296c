// What one instruction set provides; dispatch.cpp validates arguments and calls the chosen table.
#pragma once

#include "moments8bit.h"
#include "lowrank.h"

namespace lowrank {

struct CodebookWeight {
  const uint8_t* packed;
  const void* absmax;
  const float* absmax_scale;
  const float* codebook;
  int64_t codebook_rows, N, K, block_size;
};

// Rows n0 <= n < n1 and columns k0 <= k < k1 of a weight.
struct Rectangle {
  int64_t n0, n1, k0, k1;
};

// What a norm of rows [M, H] knows beside them.
struct Norm {
  int32_t dtype;
  int64_t M, H;
  const void* weight;
  int32_t weight_dtype;
  bool plus_one;
};

// What a product's backward writes; null what is not needed. dx is added to with `add`.
struct LinearGradients {
  float *dx, *dA, *dB;
  bool add;
};

struct Kernels {
  void (*quantize)(const void* weight, int32_t dtype, int64_t stride, const CodebookWeight& shape,
                   uint8_t* packed, float* absmax, int32_t threads);
  void (*dequantize)(const CodebookWeight& w, const Rectangle& r, void* out, int32_t dtype,
                     int32_t threads);
  int32_t (*linear)(const void* x, int32_t dtype, int64_t M, const CodebookWeight& w,
                    const float* bias, const lowrank_lora* lora, void* y, int32_t threads);
  int32_t (*linear_backward)(const float* dy, const float* x, int64_t M, const CodebookWeight& w,
                             const lowrank_lora* lora, const LinearGradients& to, int32_t threads);
  int32_t (*products)(const void* x, int32_t dtype, int64_t M, int64_t K,
                      const lowrank_product* products, int64_t count, void* const* ys,
                      int32_t threads);
  int32_t (*linear_int16)(const void* x, int32_t dtype, int64_t M, const CodebookWeight& w,
                          const float* bias, void* y, int32_t threads);
  int32_t (*attend_newest)(const lowrank_newest& newest, const void* q, const void* k,
                           const void* v, const int64_t* strides, int32_t dtype, void* keys,
                           void* values, void* out, int32_t threads);
  void (*softmax_cross_entropy)(float* logits, const int64_t* labels, int64_t T, int64_t V,
                                float* loss, bool gradient, int32_t threads);
  void (*gather_rows)(const void* x, int32_t dtype, int64_t K, int64_t stride,
                      const lowrank_rows& rows, const lowrank_dropout* dropout, float* out,
                      int32_t threads);
  void (*scatter_rows)(const float* values, int64_t K, const lowrank_rows& rows,
                       const lowrank_dropout* dropout, bool accumulate, void* out, int32_t dtype,
                       int64_t stride, int32_t threads);
  void (*rms_norm)(const Norm& norm, const void* x, float eps, void* y, float* rstd,
                   int32_t threads);
  void (*rms_norm_backward)(const Norm& norm, const void* dy, const void* x, const float* rstd,
                            void* dx, float* dweight, int32_t threads);
  void (*rotate)(const lowrank_heads& x, int32_t dtype, const lowrank_angles& angles, bool back,
                 void* y, int32_t threads);
  void (*gated)(const lowrank_gate& gate, void* y, int32_t threads);
  void (*gated_backward)(const lowrank_gate& gate, const void* dy, void* dgate, void* dup,
                         int32_t threads);
  // Blocks first <= b < last of one tensor.
  void (*adamw8bit)(const lowrank_moments8bit_tensor& tensor, int64_t first, int64_t last,
                    const AdamwStep& step);
  void (*lion8bit)(const lowrank_moments8bit_tensor& tensor, int64_t first, int64_t last,
                   const LionStep& step);
};

const Kernels& kernels_in_use();

const Kernels* kernels_generic();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_neon();

}  // namespace lowrank
