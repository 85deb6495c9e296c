// The exported functions: check the arguments, choose the instruction set, call its kernels.
#include <atomic>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels.h"

namespace {

using lowrank::CodebookWeight;
using lowrank::Kernels;
using lowrank::Rectangle;

const Kernels* kernels_of(int32_t isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // F16C too, which older compilers cannot ask for: every processor with AVX2 has it.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (isa == LOWRANK_AVX2) return avx2 ? lowrank::kernels_avx2() : nullptr;
  if (isa == LOWRANK_AVX512) return avx512 ? lowrank::kernels_avx512() : nullptr;
#endif
#if defined(__aarch64__)
  if (isa == LOWRANK_NEON) return lowrank::kernels_neon();
#endif
  return isa == LOWRANK_GENERIC ? lowrank::kernels_generic() : nullptr;
}

int32_t best_isa() {
  for (int32_t isa = LOWRANK_NEON; isa > LOWRANK_GENERIC; --isa) {
    if (kernels_of(isa)) return isa;
  }
  return LOWRANK_GENERIC;
}

struct Choice {
  int32_t isa;
  const Kernels* kernels;
};

Choice choice_of(int32_t isa) { return {isa, kernels_of(isa)}; }

const Choice choices[] = {choice_of(LOWRANK_GENERIC), choice_of(LOWRANK_AVX2),
                          choice_of(LOWRANK_AVX512), choice_of(LOWRANK_NEON)};
std::atomic<const Choice*> chosen{&choices[best_isa()]};

const Kernels& kernels() { return lowrank::kernels_in_use(); }

bool valid_dtype(int32_t dtype) { return dtype >= LOWRANK_F32 && dtype <= LOWRANK_BF16; }

bool valid_sizes(const CodebookWeight& w, int32_t threads) {
  const int64_t G = w.block_size;
  const bool power_of_two = G >= 32 && G <= 4096 && (G & (G - 1)) == 0;
  return power_of_two && w.N >= 0 && w.K >= 0 && w.codebook && threads >= 1 &&
         (w.codebook_rows == 1 || w.codebook_rows == w.N);
}

// A large fresh output costs more in page faults than in decoding: ask for 2 MB pages, which Linux
// by default gives only to those who ask. A hint: where it is refused, nothing is lost.
void prefer_huge_pages(void* at, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t HUGE = 2 << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(at) + HUGE - 1) & ~(HUGE - 1);
  const uintptr_t last = (reinterpret_cast<uintptr_t>(at) + uintptr_t(bytes)) & ~(HUGE - 1);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)at, (void)bytes;
#endif
}

int32_t run_dequantize(const CodebookWeight& w, const Rectangle& r, void* out, int32_t dtype,
                       int32_t threads) {
  if (!valid_sizes(w, threads) || !valid_dtype(dtype)) return LOWRANK_BAD_ARGUMENT;
  if (r.n0 < 0 || r.n0 > r.n1 || r.n1 > w.N) return LOWRANK_BAD_ARGUMENT;
  if (r.k0 < 0 || r.k0 > r.k1 || r.k1 > w.K || r.k0 % 32) return LOWRANK_BAD_ARGUMENT;
  if (r.n0 == r.n1 || r.k0 == r.k1) return LOWRANK_OK;
  if (!w.packed || !w.absmax || !out) return LOWRANK_BAD_ARGUMENT;
  prefer_huge_pages(out, (r.n1 - r.n0) * (r.k1 - r.k0) * (dtype == LOWRANK_F32 ? 4 : 2));
  kernels().dequantize(w, r, out, dtype, threads);
  return LOWRANK_OK;
}

// Before a pointer is followed; `room` is whether all sizes but the rows' are in order.
bool valid_rows(const lowrank_rows* rows, int64_t K, bool room, int32_t dtype, int32_t threads) {
  if (!rows || K < 0 || !room || !valid_dtype(dtype) || threads < 1) return false;
  if (rows->first < 0 || rows->count < 0 || rows->M < 0) return false;
  if (!rows->order) return rows->first <= rows->M - rows->count;
  for (int64_t i = 0; i < rows->count; ++i) {
    const int64_t m = rows->order[rows->first + i];
    if (m < 0 || m >= rows->M) return false;
  }
  return true;
}

// Every product with a weight; `kernel` runs one whose sizes and pointers are in order.
template <class Kernel>
int32_t run_linear(const CodebookWeight& w, const void* x, int32_t dtype, int64_t M, const void* y,
                   int32_t threads, Kernel kernel) {
  if (!valid_sizes(w, threads) || !valid_dtype(dtype) || M < 0) return LOWRANK_BAD_ARGUMENT;
  if (M == 0 || w.N == 0) return LOWRANK_OK;
  if (!y || (w.K > 0 && (!x || !w.packed || !w.absmax))) return LOWRANK_BAD_ARGUMENT;
  return kernel();
}

bool valid_norm(const lowrank::Norm& norm, int32_t threads) {
  return valid_dtype(norm.dtype) && valid_dtype(norm.weight_dtype) && norm.M >= 0 && norm.H >= 1 &&
         threads >= 1;
}

bool valid_gate(const lowrank_gate* gate, int32_t threads) {
  return gate && valid_dtype(gate->dtype) && gate->M >= 0 && gate->I >= 0 && threads >= 1 &&
         (gate->activation == LOWRANK_SILU || gate->activation == LOWRANK_GELU_TANH);
}

}  // namespace

const Kernels& lowrank::kernels_in_use() {
  return *chosen.load(std::memory_order_relaxed)->kernels;
}

int32_t lowrank_abi(void) { return LOWRANK_ABI; }

int32_t lowrank_isa_in_use(void) { return chosen.load()->isa; }

int32_t lowrank_isa_usable(int32_t isa) {
  if (isa < LOWRANK_GENERIC || isa > LOWRANK_NEON) return LOWRANK_BAD_ARGUMENT;
  return choices[isa].kernels ? LOWRANK_OK : LOWRANK_UNSUPPORTED_ISA;
}

int32_t lowrank_use_isa(int32_t isa) {
  const int32_t status = lowrank_isa_usable(isa);
  if (status == LOWRANK_OK) chosen.store(&choices[isa]);
  return status;
}

int32_t lowrank_codebook_quantize(const void* weight, int32_t dtype, int64_t N, int64_t K,
                                  int64_t stride, const float* codebook, int64_t codebook_rows,
                                  int64_t block_size, uint8_t* packed, float* absmax,
                                  int32_t threads) {
  const CodebookWeight w{nullptr, nullptr, nullptr, codebook, codebook_rows, N, K, block_size};
  if (!valid_sizes(w, threads) || !valid_dtype(dtype)) return LOWRANK_BAD_ARGUMENT;
  if (N == 0 || K == 0) return LOWRANK_OK;
  if (!weight || !packed || !absmax || stride < (N > 1 ? K : 0)) return LOWRANK_BAD_ARGUMENT;
  kernels().quantize(weight, dtype, stride, w, packed, absmax, threads);
  return LOWRANK_OK;
}

int32_t lowrank_codebook_dequantize(const uint8_t* packed, const void* absmax,
                                    const float* absmax_scale, const float* codebook,
                                    int64_t codebook_rows, int64_t N, int64_t K,
                                    int64_t block_size, int64_t n0, int64_t n1, void* out,
                                    int32_t dtype, int32_t threads) {
  const CodebookWeight w{packed, absmax, absmax_scale, codebook, codebook_rows, N, K, block_size};
  return run_dequantize(w, {n0, n1, 0, K}, out, dtype, threads);
}

int32_t lowrank_codebook_dequantize_columns(const uint8_t* packed, const void* absmax,
                                            const float* absmax_scale, const float* codebook,
                                            int64_t codebook_rows, int64_t N, int64_t K,
                                            int64_t block_size, int64_t k0, int64_t k1, void* out,
                                            int32_t dtype, int32_t threads) {
  const CodebookWeight w{packed, absmax, absmax_scale, codebook, codebook_rows, N, K, block_size};
  return run_dequantize(w, {0, N, k0, k1}, out, dtype, threads);
}

int32_t lowrank_codebook_linear(const void* x, int32_t dtype, int64_t M, const uint8_t* packed,
                                const void* absmax, const float* absmax_scale,
                                const float* codebook, int64_t codebook_rows, int64_t N, int64_t K,
                                int64_t block_size, const float* bias, void* y, int32_t threads) {
  const CodebookWeight w{packed, absmax, absmax_scale, codebook, codebook_rows, N, K, block_size};
  return run_linear(w, x, dtype, M, y, threads, [&] {
    return kernels().linear(x, dtype, M, w, bias, nullptr, y, threads);
  });
}

int32_t lowrank_codebook_linear_int16(const void* x, int32_t dtype, int64_t M,
                                      const uint8_t* packed, const void* absmax,
                                      const float* absmax_scale, const float* codebook,
                                      int64_t codebook_rows, int64_t N, int64_t K,
                                      int64_t block_size, const float* bias, void* y,
                                      int32_t threads) {
  const CodebookWeight w{packed, absmax, absmax_scale, codebook, codebook_rows, N, K, block_size};
  return run_linear(w, x, dtype, M, y, threads, [&] {
    return kernels().linear_int16(x, dtype, M, w, bias, y, threads);
  });
}

int32_t lowrank_codebook_lora_linear(const void* x, int32_t dtype, int64_t M, const uint8_t* packed,
                                     const void* absmax, const float* absmax_scale,
                                     const float* codebook, int64_t codebook_rows, int64_t N,
                                     int64_t K, int64_t block_size, const float* bias,
                                     const lowrank_lora* lora, void* y, int32_t threads) {
  const CodebookWeight w{packed, absmax, absmax_scale, codebook, codebook_rows, N, K, block_size};
  if (!lora || lora->R < 1 || N < 1) return LOWRANK_BAD_ARGUMENT;  // without N there is no pass
  return run_linear(w, x, dtype, M, y, threads, [&]() -> int32_t {
    if (!lora->B || !lora->h || (K > 0 && !lora->A)) return LOWRANK_BAD_ARGUMENT;
    return kernels().linear(x, dtype, M, w, bias, lora, y, threads);
  });
}

int32_t lowrank_codebook_lora_backward(const float* dy, const float* x, int64_t M,
                                       const uint8_t* packed, const void* absmax,
                                       const float* absmax_scale, const float* codebook,
                                       int64_t codebook_rows, int64_t N, int64_t K,
                                       int64_t block_size, const lowrank_lora* lora, float* dx,
                                       int32_t add, float* dA, float* dB, int32_t threads) {
  const CodebookWeight w{packed, absmax, absmax_scale, codebook, codebook_rows, N, K, block_size};
  if (!valid_sizes(w, threads) || M < 1 || N < 1 || K < 1) return LOWRANK_BAD_ARGUMENT;
  if (!dy || !packed || !absmax || (!lora && (dA || dB))) return LOWRANK_BAD_ARGUMENT;
  if (lora && (lora->R < 1 || !lora->A || !lora->B || lora->dropout)) return LOWRANK_BAD_ARGUMENT;
  if ((dA && !x) || (dB && !lora->h)) return LOWRANK_BAD_ARGUMENT;
  return kernels().linear_backward(dy, x, M, w, lora, {dx, dA, dB, add != 0}, threads);
}

int32_t lowrank_codebook_products(const void* x, int32_t dtype, int64_t M, int64_t K,
                                  const lowrank_product* products, int64_t count,
                                  void* const* ys, int32_t threads) {
  if (!valid_dtype(dtype) || M < 0 || M > 16 || K < 0 || count < 0 || threads < 1)
    return LOWRANK_BAD_ARGUMENT;
  if (count > 0 && (!products || !ys)) return LOWRANK_BAD_ARGUMENT;
  for (int64_t i = 0; i < count; ++i) {
    const lowrank_product& p = products[i];
    const CodebookWeight w{p.packed,        p.absmax, p.absmax_scale, p.codebook,
                           p.codebook_rows, p.N,      K,              p.block_size};
    if (!valid_sizes(w, threads) || (p.A && (p.R < 1 || !p.B))) return LOWRANK_BAD_ARGUMENT;
    if (M == 0 || p.N == 0) continue;
    if (!ys[i] || (K > 0 && (!x || !p.packed || !p.absmax))) return LOWRANK_BAD_ARGUMENT;
  }
  return M == 0 ? LOWRANK_OK : kernels().products(x, dtype, M, K, products, count, ys, threads);
}

int32_t lowrank_attend_newest(const lowrank_newest* newest, const void* q, const void* k,
                              const void* v, const int64_t* strides, int32_t dtype, void* keys,
                              void* values, void* out, int32_t threads) {
  if (!newest || !strides || !valid_dtype(dtype) || threads < 1) return LOWRANK_BAD_ARGUMENT;
  const lowrank_newest& n = *newest;
  if (n.B < 0 || n.heads < 1 || n.kv_heads < 1 || n.heads % n.kv_heads || n.D < 1)
    return LOWRANK_BAD_ARGUMENT;
  if (n.first < 0 || n.first > n.position || n.position >= n.capacity) return LOWRANK_BAD_ARGUMENT;
  if (!n.cos != !n.sin || (n.cos && (n.rotary < 0 || n.rotary > n.D || n.rotary % 2)))
    return LOWRANK_BAD_ARGUMENT;
  if (n.B == 0) return LOWRANK_OK;
  if (!q || !k || !v || !keys || !values || !out) return LOWRANK_BAD_ARGUMENT;
  return kernels().attend_newest(n, q, k, v, strides, dtype, keys, values, out, threads);
}

int32_t lowrank_softmax_cross_entropy(float* logits, const int64_t* labels, int64_t T, int64_t V,
                                      float* loss, int32_t gradient, int32_t threads) {
  if (T < 0 || V < 1 || threads < 1) return LOWRANK_BAD_ARGUMENT;
  if (T == 0) return LOWRANK_OK;
  if (!logits || !labels || !loss) return LOWRANK_BAD_ARGUMENT;
  for (int64_t t = 0; t < T; ++t) {
    if (labels[t] < 0 || labels[t] >= V) return LOWRANK_BAD_ARGUMENT;
  }
  kernels().softmax_cross_entropy(logits, labels, T, V, loss, gradient != 0, threads);
  return LOWRANK_OK;
}

int32_t lowrank_gather_rows(const void* x, int32_t dtype, int64_t K, int64_t stride,
                            const lowrank_rows* rows, const lowrank_dropout* dropout, float* out,
                            int32_t threads) {
  if (!valid_rows(rows, K, stride >= 0, dtype, threads)) return LOWRANK_BAD_ARGUMENT;
  if (rows->count == 0 || K == 0) return LOWRANK_OK;
  if (!x || !out) return LOWRANK_BAD_ARGUMENT;
  kernels().gather_rows(x, dtype, K, stride, *rows, dropout, out, threads);
  return LOWRANK_OK;
}

int32_t lowrank_scatter_rows(const float* values, int64_t K, const lowrank_rows* rows,
                             const lowrank_dropout* dropout, int32_t accumulate, void* out,
                             int32_t dtype, int64_t stride, int32_t threads) {
  if (!valid_rows(rows, K, stride >= K, dtype, threads)) return LOWRANK_BAD_ARGUMENT;
  if (rows->count == 0 || K == 0) return LOWRANK_OK;
  if (!values || !out) return LOWRANK_BAD_ARGUMENT;
  kernels().scatter_rows(values, K, *rows, dropout, accumulate != 0, out, dtype, stride, threads);
  return LOWRANK_OK;
}

int32_t lowrank_rms_norm(const void* x, int32_t dtype, int64_t M, int64_t H, const void* weight,
                         int32_t weight_dtype, int32_t plus_one, float eps, void* y, float* rstd,
                         int32_t threads) {
  const lowrank::Norm norm{dtype, M, H, weight, weight_dtype, plus_one != 0};
  if (!valid_norm(norm, threads)) return LOWRANK_BAD_ARGUMENT;
  if (M == 0) return LOWRANK_OK;
  if (!x || !weight || !y || !rstd) return LOWRANK_BAD_ARGUMENT;
  kernels().rms_norm(norm, x, eps, y, rstd, threads);
  return LOWRANK_OK;
}

int32_t lowrank_rms_norm_backward(const void* dy, const void* x, int32_t dtype, int64_t M,
                                  int64_t H, const void* weight, int32_t weight_dtype,
                                  int32_t plus_one, const float* rstd, void* dx, float* dweight,
                                  int32_t threads) {
  const lowrank::Norm norm{dtype, M, H, weight, weight_dtype, plus_one != 0};
  if (!valid_norm(norm, threads)) return LOWRANK_BAD_ARGUMENT;
  if (M > 0 && (!dy || !x || !weight || !rstd)) return LOWRANK_BAD_ARGUMENT;
  kernels().rms_norm_backward(norm, dy, x, rstd, dx, dweight, threads);
  return LOWRANK_OK;
}

int32_t lowrank_rotate(const lowrank_heads* x, int32_t dtype, const lowrank_angles* angles,
                       int32_t back, void* y, int32_t threads) {
  if (!x || !angles || !valid_dtype(dtype) || !valid_dtype(angles->dtype) || threads < 1)
    return LOWRANK_BAD_ARGUMENT;
  if (x->B < 0 || x->S < 0 || x->heads < 0 || x->D < 0 || angles->turned < 0 ||
      angles->turned > x->D || angles->turned % 2 || (angles->B != 1 && angles->B != x->B))
    return LOWRANK_BAD_ARGUMENT;
  if (x->B * x->S * x->heads * x->D == 0) return LOWRANK_OK;
  if (!x->data || !y || (angles->turned > 0 && (!angles->cos || !angles->sin)))
    return LOWRANK_BAD_ARGUMENT;
  kernels().rotate(*x, dtype, *angles, back != 0, y, threads);
  return LOWRANK_OK;
}

int32_t lowrank_gated(const lowrank_gate* gate, void* y, int32_t threads) {
  if (!valid_gate(gate, threads)) return LOWRANK_BAD_ARGUMENT;
  if (gate->M == 0 || gate->I == 0) return LOWRANK_OK;
  if (!gate->gate || !gate->up || !y) return LOWRANK_BAD_ARGUMENT;
  kernels().gated(*gate, y, threads);
  return LOWRANK_OK;
}

int32_t lowrank_gated_backward(const lowrank_gate* gate, const void* dy, void* dgate, void* dup,
                               int32_t threads) {
  if (!valid_gate(gate, threads)) return LOWRANK_BAD_ARGUMENT;
  if (gate->M == 0 || gate->I == 0) return LOWRANK_OK;
  if (!gate->gate || !gate->up || !dy || !dgate || !dup) return LOWRANK_BAD_ARGUMENT;
  kernels().gated_backward(*gate, dy, dgate, dup, threads);
  return LOWRANK_OK;
}
