// The one C ABI of lowrank's native kernels: no torch, no Python.
//
// Every function that computes returns a status. Sizes are int64, strides are in elements, `dtype`
// and `isa` are the enumerations below, `threads` is the number of OpenMP threads to use.
// Letters: N out features (rows of the weight), K in features, M rows of x, G block size.
//
// A weight [N, K] quantized in blocks of G (a power of two, 32..4096) that never cross rows is
//   packed        uint8 [N, Kp / 2], Kp = K rounded up to 32; even elements in the high nibbles
//   absmax        float32 [N, nb], nb = ceil(K / G); or, with absmax_scale, uint8 codes [N, nb]
//   absmax_scale  null, or float32 [N, 2] = (step, offset): absmax = float32(code * step) + offset
//   codebook      float32 [T, 16], T = 1 or N
// and stands for w[n, k] = codebook[n, code[n, k]] * absmax[n, k / G], one float32 multiplication.
#pragma once

#include <stdint.h>

#define LOWRANK_ABI 7

#if defined(__GNUC__)
#define LOWRANK_EXPORT __attribute__((visibility("default")))
#else
#define LOWRANK_EXPORT
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum lowrank_status {
  LOWRANK_OK = 0,
  LOWRANK_BAD_ARGUMENT = 1,
  LOWRANK_UNSUPPORTED_ISA = 2,
  LOWRANK_OUT_OF_MEMORY = 3,
};

enum lowrank_dtype { LOWRANK_F32 = 0, LOWRANK_F16 = 1, LOWRANK_BF16 = 2 };

enum lowrank_isa {
  LOWRANK_GENERIC = 0,
  LOWRANK_AVX2 = 1,
  LOWRANK_AVX512 = 2,
  LOWRANK_NEON = 3,
};

// The number of this interface; a caller refuses a library whose number is not the one it knows.
LOWRANK_EXPORT int32_t lowrank_abi(void);

// The instruction set in use: at first the widest that this processor and this build can run.
LOWRANK_EXPORT int32_t lowrank_isa_in_use(void);

// LOWRANK_OK if this processor and this build can run it.
LOWRANK_EXPORT int32_t lowrank_isa_usable(int32_t isa);

// Use another instruction set from now on, in every thread.
LOWRANK_EXPORT int32_t lowrank_use_isa(int32_t isa);

// weight [N, K] of `dtype`, rows `stride` apart -> packed, absmax float32. A NaN or an infinity in
// a block shows as a non-finite absmax of that block, and its codes mean nothing.
LOWRANK_EXPORT int32_t lowrank_codebook_quantize(
    const void* weight, int32_t dtype, int64_t N, int64_t K, int64_t stride, const float* codebook,
    int64_t codebook_rows, int64_t block_size, uint8_t* packed, float* absmax, int32_t threads);

// Rows n0 <= n < n1 of the weight -> out [n1 - n0, K] of `dtype`, contiguous.
LOWRANK_EXPORT int32_t lowrank_codebook_dequantize(
    const uint8_t* packed, const void* absmax, const float* absmax_scale, const float* codebook,
    int64_t codebook_rows, int64_t N, int64_t K, int64_t block_size, int64_t n0, int64_t n1,
    void* out, int32_t dtype, int32_t threads);

// Columns k0 <= k < k1 of the weight, k0 a multiple of 32 -> out [N, k1 - k0], contiguous.
LOWRANK_EXPORT int32_t lowrank_codebook_dequantize_columns(
    const uint8_t* packed, const void* absmax, const float* absmax_scale, const float* codebook,
    int64_t codebook_rows, int64_t N, int64_t K, int64_t block_size, int64_t k0, int64_t k1,
    void* out, int32_t dtype, int32_t threads);

// y [M, N] = x [M, K] w^T + bias, all contiguous; x and y of `dtype`, bias float32 [N] or null.
// Decoded once for each 512 rows of x, in registers or in a cache, and never whole.
LOWRANK_EXPORT int32_t lowrank_codebook_linear(
    const void* x, int32_t dtype, int64_t M, const uint8_t* packed, const void* absmax,
    const float* absmax_scale, const float* codebook, int64_t codebook_rows, int64_t N, int64_t K,
    int64_t block_size, const float* bias, void* y, int32_t threads);

// The same in fixed point, for speed: 16-bit values of the codebook, 14-bit ones of x with a scale
// for each 64 elements. The error of y is about 1e-4 of ||y||; where x is not finite, y is NaN.
LOWRANK_EXPORT int32_t lowrank_codebook_linear_int16(
    const void* x, int32_t dtype, int64_t M, const uint8_t* packed, const void* absmax,
    const float* absmax_scale, const float* codebook, int64_t codebook_rows, int64_t N, int64_t K,
    int64_t block_size, const float* bias, void* y, int32_t threads);

// Element (m, k) of [M, K] is kept, times `inverse` = 1 / (1 - p), iff its random word is not below
// `threshold` = p * 2^32; else it becomes 0, whatever it was. The word is word k % 4 of
// Philox-4x32-7 with the low and the high word of `seed` as its key and of m * ceil(K / 4) + k / 4
// as the first half of its counter, the other half being 0.
struct lowrank_dropout {
  int64_t seed;
  uint32_t threshold;
  float inverse;
};

// An adapter beside a weight, all contiguous: A [R, K], B [N, R], and h [M, R], which is written.
struct lowrank_lora {
  const float* A;
  const float* B;
  float* h;
  int64_t R;
  float scale;
  const struct lowrank_dropout* dropout;  // or null
};

// h = z A^T and y = x w^T + bias + scale * h B^T, z being x after dropout; N, R >= 1, the rest as in
// lowrank_codebook_linear. x is read and y written once in each pass over the weight.
LOWRANK_EXPORT int32_t lowrank_codebook_lora_linear(
    const void* x, int32_t dtype, int64_t M, const uint8_t* packed, const void* absmax,
    const float* absmax_scale, const float* codebook, int64_t codebook_rows, int64_t N, int64_t K,
    int64_t block_size, const float* bias, const struct lowrank_lora* lora, void* y,
    int32_t threads);

// dx [M, K] = dy [M, N] w + scale * g A of the same with g = dy B, or added to dx with `add`; dA [R, K]
// = scale * g^T x and dB [N, R] = scale * dy^T h. All float32 and contiguous, x [M, K] and h [M, R]
// as in the forward, without dropout. Without `lora` it is dx = dy w alone. Null what is not needed:
// dx, dA and dB, then x, of dA alone, and h, of dB.
LOWRANK_EXPORT int32_t lowrank_codebook_lora_backward(
    const float* dy, const float* x, int64_t M, const uint8_t* packed, const void* absmax,
    const float* absmax_scale, const float* codebook, int64_t codebook_rows, int64_t N, int64_t K,
    int64_t block_size, const struct lowrank_lora* lora, float* dx, int32_t add, float* dA,
    float* dB, int32_t threads);

// One of several products of the same x, with an adapter or, where A is null, without one: a weight
// [N, K], bias [N] or null, A [R, K], B [N, R], all contiguous.
struct lowrank_product {
  const uint8_t* packed;
  const void* absmax;
  const float* absmax_scale;
  const float* codebook;
  int64_t codebook_rows, N, block_size;
  const float* bias;
  const float* A;
  const float* B;
  int64_t R;
  float scale;
};

// y = x w^T + bias + scale * (x A^T) B^T [M, N] of each of `count` products, into the i-th of `ys`,
// for x [M, K] of M <= 16 rows; x and every y are of `dtype`.
LOWRANK_EXPORT int32_t lowrank_codebook_products(
    const void* x, int32_t dtype, int64_t M, int64_t K, const struct lowrank_product* products,
    int64_t count, void* const* ys, int32_t threads);

// What the newest position of B texts looks at, in every layer: `position` is its number, `first`
// that of the first it sees. The first `rotary` of D elements are turned: cos [rotary] holds each
// pair's twice, sin [rotary / 2] once; texts are `cos_row` and `sin_row` apart, 0 where they share
// theirs. Null, nothing is turned. mask [B, position + 1 - first] is 0 where nothing is to be seen,
// or null; softcap c > 0 makes scores s c tanh(s / c).
struct lowrank_newest {
  const void* cos;
  const void* sin;
  const uint8_t* mask;
  int64_t cos_row, sin_row, mask_row;
  int64_t B, heads, kv_heads, D, rotary, capacity, position, first;
  float scale, softcap;
};

// out [B, heads, D] = softmax(scale * q keys^T) values over what is seen, q [B, heads, D] turned;
// before, k [B, kv_heads, D] turned and v are written to keys and values [B, capacity, kv_heads, D]
// at `position`. All are of `dtype`; head h looks at those of h / (heads / kv_heads). Texts of q, of k
// and of v are strides[0], [2] and [4] apart, their heads strides[1], [3] and [5].
LOWRANK_EXPORT int32_t lowrank_attend_newest(
    const struct lowrank_newest* newest, const void* q, const void* k, const void* v,
    const int64_t* strides, int32_t dtype, void* keys, void* values, void* out, int32_t threads);

// loss[t] = logsumexp(logits[t]) - logits[t, labels[t]]; with `gradient` non-zero, logits [T, V] is
// overwritten by its own gradient softmax(logits) - onehot(labels).
LOWRANK_EXPORT int32_t lowrank_softmax_cross_entropy(
    float* logits, const int64_t* labels, int64_t T, int64_t V, float* loss, int32_t gradient,
    int32_t threads);

// Some rows of a matrix [M, K]: order[first + i] for 0 <= i < count, or first + i without an order.
struct lowrank_rows {
  const int32_t* order;
  int64_t first, count, M;
};

// out [count, K] = those rows of x [M, K] of `dtype`, `stride` apart, dropout null or applied.
LOWRANK_EXPORT int32_t lowrank_gather_rows(
    const void* x, int32_t dtype, int64_t K, int64_t stride, const struct lowrank_rows* rows,
    const struct lowrank_dropout* dropout, float* out, int32_t threads);

// Those rows of out [M, K] of `dtype`, `stride` apart, each at most once, = values [count, K] after
// dropout, added to what is there if `accumulate` is not zero: the gradient of gather_rows.
LOWRANK_EXPORT int32_t lowrank_scatter_rows(
    const float* values, int64_t K, const struct lowrank_rows* rows,
    const struct lowrank_dropout* dropout, int32_t accumulate, void* out, int32_t dtype,
    int64_t stride, int32_t threads);

// y [M, H] = x * rstd * weight, rstd [M] = 1 / sqrt(mean(x^2) + eps) of each row of x [M, H], all
// contiguous; x and y of `dtype`, weight [H] of `weight_dtype`, to which 1 is added with `plus_one`.
LOWRANK_EXPORT int32_t lowrank_rms_norm(
    const void* x, int32_t dtype, int64_t M, int64_t H, const void* weight, int32_t weight_dtype,
    int32_t plus_one, float eps, void* y, float* rstd, int32_t threads);

// Its gradients of dy [M, H]: dx of `dtype`, or null; dweight float32 [H], or null.
LOWRANK_EXPORT int32_t lowrank_rms_norm_backward(
    const void* dy, const void* x, int32_t dtype, int64_t M, int64_t H, const void* weight,
    int32_t weight_dtype, int32_t plus_one, const float* rstd, void* dx, float* dweight,
    int32_t threads);

// Heads x [B, S, heads, D], the last dimension contiguous.
struct lowrank_heads {
  const void* data;
  int64_t B, S, heads, D;
  int64_t stride_b, stride_s, stride_head;
};

// Of each position: cos [B or 1, S, turned], sin [B or 1, S, turned / 2], contiguous; turned even.
struct lowrank_angles {
  const void* cos;
  const void* sin;
  int64_t B, turned;
  int32_t dtype;
};

// With h = turned / 2: y[i] = x[i] cos[i] - x[i + h] sin[i], y[i + h] = x[i + h] cos[i + h] +
// x[i] sin[i] for i < h, y[i] = x[i] from `turned` on; with `back` by -sin, which is the gradient.
// y [B, S, heads, D] is contiguous and of `dtype`, as x.
LOWRANK_EXPORT int32_t lowrank_rotate(
    const struct lowrank_heads* x, int32_t dtype, const struct lowrank_angles* angles, int32_t back,
    void* y, int32_t threads);

enum lowrank_activation { LOWRANK_SILU = 0, LOWRANK_GELU_TANH = 1 };

// gate and up [M, I] of `dtype`, their rows so many elements apart.
struct lowrank_gate {
  const void* gate;
  const void* up;
  int64_t M, I, gate_stride, up_stride;
  int32_t dtype, activation;
};

// y [M, I] = activation(gate) * up, contiguous.
LOWRANK_EXPORT int32_t lowrank_gated(const struct lowrank_gate* gate, void* y, int32_t threads);

// Its gradients of dy, all three [M, I] and contiguous.
LOWRANK_EXPORT int32_t lowrank_gated_backward(
    const struct lowrank_gate* gate, const void* dy, void* dgate, void* dup, int32_t threads);

// A norm of rows as lowrank_rms_norm has them; where `weight` is null, there is none.
struct lowrank_norm {
  const void* weight;
  int32_t dtype, plus_one;
  float eps;
};

// A decoder's block: its norms, of which the two before attention and MLP are there; its products,
// `heads` being those of queries, keys and values, or one whose rows are all of them, and `inner`
// those of gate and up, or one of both; and what is the attention's own of a lowrank_newest.
struct lowrank_block {
  struct lowrank_norm attention_norm, q_norm, k_norm, attention_out_norm, mlp_norm, mlp_out_norm;
  struct lowrank_product heads[3], out, inner[2], down;
  int32_t heads_count, inner_count;
  int64_t query_heads;
  float scale, softcap;
  int32_t activation;
};

// x [B, H] of the newest positions through `count` blocks one after another, in place and contiguous:
//   x += norm(out(attention(norm(x)))),  then x += norm(down(activation(gate(z)) * up(z))), z = norm(x)
// each block over its own of `newest`, `keys` and `values`, as in lowrank_attend_newest; B <= 16.
LOWRANK_EXPORT int32_t lowrank_blocks(
    const struct lowrank_block* blocks, int64_t count, const struct lowrank_newest* const* newest,
    void* const* keys, void* const* values, void* x, int32_t dtype, int64_t H, int32_t threads);

// A parameter and its moments of 8 bits: p and g [rows, cols] of `dtype`, m and v codes of that
// shape, and a float32 scale for each 256 elements of a row: [rows, ceil(cols / 256)]. m stands for
// m_map[code] * scale, v for v_map[code] * scale: maps of 256 ascending values, 0 and 1 among them;
// the negative values of m_map mirror its positive ones, v_map begins with 0.
struct lowrank_moments8bit_tensor {
  void* p;
  const void* g;
  uint8_t* m;
  uint8_t* v;
  float* m_scale;
  float* v_scale;
  int64_t rows, cols;
  int32_t dtype;
};

struct lowrank_adamw8bit_coefficients {
  float beta1, rest1;  // beta1, 1 - beta1
  float beta2, rest2;  // beta2, 1 - beta2
  float decay;         // 1 - lr * weight_decay
  float rate;          // lr / (1 - beta1^step)
  float root2;         // 1 / sqrt(1 - beta2^step)
  float eps;
};

// In place, for each tensor, every operation rounded to float32 by itself:
//   m = m * beta1 + g * rest1,  v = v * beta2 + (g * g) * rest2
//   p = p * decay - (m / (sqrt(v) * root2 + eps)) * rate
LOWRANK_EXPORT int32_t lowrank_adamw8bit_step(
    const struct lowrank_moments8bit_tensor* tensors, int64_t count, const float* m_map,
    const float* v_map, const struct lowrank_adamw8bit_coefficients* coefficients, int32_t threads);

struct lowrank_lion8bit_coefficients {
  float beta1, rest1;  // beta1, 1 - beta1
  float beta2, rest2;  // beta2, 1 - beta2
  float decay;         // 1 - lr * weight_decay
  float rate;          // lr
};

// The same for, with v and v_scale not looked at:
//   c = m * beta1 + g * rest1,  m = m * beta2 + g * rest2,  p = p * decay - sign(c) * rate
// where sign(c) is 0 if c is, and NaN if c is not finite.
LOWRANK_EXPORT int32_t lowrank_lion8bit_step(
    const struct lowrank_moments8bit_tensor* tensors, int64_t count, const float* m_map,
    const struct lowrank_lion8bit_coefficients* coefficients, int32_t threads);

#ifdef __cplusplus
}
#endif
