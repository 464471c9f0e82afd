// Sixteen lanes, the same on every path: compilers split them into what the processor has. No product is ever fused
// with a sum, so every path rounds the same way.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.hpp"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define UNROLL _Pragma("GCC unroll 16")

namespace frugal {
namespace {

typedef float v16 __attribute__((vector_size(64), aligned(64)));
typedef int32_t i16 __attribute__((vector_size(64), aligned(64)));
typedef uint32_t u16 __attribute__((vector_size(64), aligned(64)));
typedef uint16_t h16 __attribute__((vector_size(32), aligned(32)));
typedef int8_t b16 __attribute__((vector_size(16), aligned(16)));

template <class V>
struct Like {  // as many numbers of other types
    typedef i16 I;
    typedef u16 U;
    typedef h16 H;
};

// As many lanes as a register holds. Compilers cut wider ones up, but shift them lane by lane.
#if defined(__AVX2__) && !defined(__AVX512F__)
#define EIGHT_LANES
typedef float vreg __attribute__((vector_size(32)));
typedef int32_t ireg __attribute__((vector_size(32)));
typedef uint32_t ureg __attribute__((vector_size(32)));
typedef uint16_t hreg __attribute__((vector_size(16)));
typedef int8_t breg __attribute__((vector_size(8)));
template <>
struct Like<vreg> {
    typedef ireg I;
    typedef ureg U;
    typedef hreg H;
};
#else
typedef v16 vreg;
typedef i16 ireg;
typedef u16 ureg;
typedef h16 hreg;
typedef b16 breg;
#endif
constexpr int WIDTH = sizeof(vreg) / 4;
constexpr int PARTS = 16 / WIDTH;

template <class V>
inline V load(const void* from) {
    V v;
    std::memcpy(&v, from, sizeof(V));
    return v;
}

template <class V>
inline void store(void* to, V v) {
    std::memcpy(to, &v, sizeof(V));
}

// Up to sixteen numbers, then zeros.
inline v16 first_of(const float* x, int count) {
    if (count == 16) return load<v16>(x);  // a copy of a known size is one instruction
    v16 v{};
    std::memcpy(&v, x, 4 * count);
    return v;
}

inline v16 all_lanes(float x) { return v16{} + x; }
inline v16 as_float(i16 x) { return (v16)x; }
inline i16 as_int(v16 x) { return (i16)x; }
template <class V>
inline V max_of(V a, V b) {
    return a > b ? a : b;
}

template <class T>
inline T read(const void* from) {
    T x;
    std::memcpy(&x, from, sizeof(T));
    return x;
}

// The lanes joined by halves: lane i with i + 8, then + 4, + 2, + 1.
template <class V16, class Join>
inline auto over_lanes(V16 v, Join join) {
    typedef decltype(v[0] + v[0]) T;
    typedef T V8 __attribute__((vector_size(32)));
    typedef T V4 __attribute__((vector_size(16)));
    V8 eight[2];
    store(eight, v);
    eight[0] = join(eight[0], eight[1]);
    V4 four[2];
    store(four, eight[0]);
    four[0] = join(four[0], four[1]);
    T last[4];
    store(last, four[0]);
    return join(join(last[0], last[2]), join(last[1], last[3]));
}

inline float sum_of(v16 v) {
    return over_lanes(v, [](auto a, auto b) { return a + b; });
}
inline int32_t sum_of(i16 v) {
    return over_lanes(v, [](auto a, auto b) { return a + b; });
}
inline float largest_of(v16 v) {
    return over_lanes(v, [](auto a, auto b) { return a > b ? a : b; });
}

inline uint16_t bf16_of(float x) {  // to nearest, ties to even; NaN stays one
    uint32_t u = read<uint32_t>(&x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t((u >> 16) | 0x40);
    return uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

inline h16 bf16_lanes(v16 x) {
    u16 u = (u16)x;
    u16 nearest = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    u16 found = (u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : nearest;
    return __builtin_convertvector(found, h16);
}

template <class V>
inline V from_bf16(const uint16_t* from) {
    typedef typename Like<V>::U U;
    typedef typename Like<V>::H H;
    return (V)(__builtin_convertvector(load<H>(from), U) << 16);
}

template <class V>
inline V from_f16(const uint16_t* from) {
#if defined(__AVX512F__)
    static_assert(sizeof(V) == 64, "one register");
    return (V)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)from));
#else
    typedef typename Like<V>::U U;
    typedef typename Like<V>::I I;
    typedef typename Like<V>::H H;
    U h = __builtin_convertvector(load<H>(from), U);
    U sign = (h & 0x8000u) << 16, bits = h & 0x7fffu;
    V normal = (V)((bits << 13) + (112u << 23));
    V small = __builtin_convertvector((I)bits, V) * 5.9604644775390625e-8f;  // 2^-24
    U magnitude = bits < 0x400u ? (U)small : (U)normal;
    return (V)(magnitude | sign);
#endif
}

// Stored scales or minima, as many as there are lanes.
template <class V>
inline V numbers(const void* base, int64_t index, int32_t type) {
    if (type == NUM_BF16) return from_bf16<V>((const uint16_t*)base + index);
    if (type == NUM_F16) return from_f16<V>((const uint16_t*)base + index);
    return load<V>((const float*)base + index);
}

inline float number_at(const void* base, int64_t index, int32_t type) {
    return numbers<v16>(base, index / 16 * 16, type)[index % 16];
}

constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to a whole number, ties to even

// exp(x) for x <= 88 or so, a polynomial of degree 6 over [-ln 2 / 2, ln 2 / 2]; 0 below -60.
template <class V>
__attribute__((always_inline)) inline V exp_here(V x) {
    typedef typename Like<V>::I I;
    V n = x * 1.44269504088896341f + ROUND;
    I shift = ((I)n - 0x4B400000) << 23;
    n = n - ROUND;
    V r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    V p = V{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    V y = p * (r * r) + r;
    y = y + 1.0f;
    y = (V)((I)y + shift);
    return x < -60.0f ? V{} : y;
}

__attribute__((noinline)) v16 exp_of(v16 x) { return exp_here(x); }  // where registers are short

inline v16 silu_of(v16 x) {
    v16 clipped = x > 60.0f ? all_lanes(60.0f) : x;
    clipped = clipped < -60.0f ? all_lanes(-60.0f) : clipped;
    return x / (exp_of(-clipped) + 1.0f);
}

// x / 2 * (1 + tanh(u)), u = sqrt(2 / pi) * (x + 0.044715 x^3), which is x / (1 + exp(-2 u)).
inline v16 gelu_of(v16 x) {
    v16 twice = (x + (x * x) * x * 0.044715f) * 1.59576912160573f;
    v16 clipped = twice > 60.0f ? all_lanes(60.0f) : twice;
    clipped = clipped < -60.0f ? all_lanes(-60.0f) : clipped;
    return x / (exp_of(-clipped) + 1.0f);
}

// ------------------------------------------------------------------------------------------------ products of codes

#if defined(__AVX512VNNI__)

inline i16 dot4(i16 sum, i16 weights, const uint32_t* x) {
    return (i16)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, _mm512_set1_epi32(int32_t(*x)));
}
constexpr int BYTE_OFFSET = 128;

#elif defined(__AVX2__)

// |c| * (q with the sign of c) fits pairs of products into 16 bits, which c + 128 times q does not.
inline __m256i signed_dot4(__m256i stored, __m256i q) {
    __m256i c = _mm256_xor_si256(stored, _mm256_set1_epi8(-128));
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(c), _mm256_sign_epi8(q, c));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
constexpr int BYTE_OFFSET = 0;  // what sums of bytes count too much for every input

inline ireg dot4(ireg sum, ireg weights, const uint32_t* x) {
    return sum + (ireg)signed_dot4((__m256i)weights, _mm256_set1_epi32(int32_t(*x)));
}

#else

inline i16 dot4(i16 sum, i16 weights, const uint32_t* x) {
    for (int i = 0; i < 4; i++) sum = sum + ((weights >> (8 * i)) & 255) * int32_t(int8_t(*x >> (8 * i)));
    return sum;
}
constexpr int BYTE_OFFSET = 128;

#endif

// sum[m] += products of codes of 4 bits, eight inputs: words 0 and 1 of each row.
template <int M>
inline void dot8(ireg* sum, ireg low, ireg high, const uint32_t* x) {
#if defined(EIGHT_LANES)
    UNROLL for (int m = 0; m < M; m++) {  // four products of 15 * 127 fit into 16 bits
        __m256i first = _mm256_maddubs_epi16((__m256i)low, _mm256_set1_epi32(int32_t(x[WORDS * m])));
        __m256i second = _mm256_maddubs_epi16((__m256i)high, _mm256_set1_epi32(int32_t(x[WORDS * m + 1])));
        sum[m] = sum[m] + (ireg)_mm256_madd_epi16(_mm256_add_epi16(first, second), _mm256_set1_epi16(1));
    }
#else
    UNROLL for (int m = 0; m < M; m++) sum[m] = dot4(sum[m], low, x + WORDS * m);
    UNROLL for (int m = 0; m < M; m++) sum[m] = dot4(sum[m], high, x + WORDS * m + 1);
#endif
}

// ----------------------------------------------------------------------------------------------- products of bf16

// sum + products of pairs of bf16, as many as there are lanes, with one pair.
#if defined(__AVX512BF16__)
inline v16 dot2(v16 sum, i16 weights, uint32_t pair) {
    return (v16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weights, (__m512bh)_mm512_set1_epi32(int32_t(pair)));
}
#else
template <class V, class I>
inline V dot2(V sum, I weights, uint32_t pair) {
    uint32_t low = pair << 16, high = pair & 0xffff0000u;
    V even = (V)(weights << 16) * read<float>(&low);
    V odd = (V)(weights & int32_t(0xffff0000u)) * read<float>(&high);
    return (sum + odd) + even;  // as the instruction does it
}
#endif

}  // namespace
}  // namespace frugal
