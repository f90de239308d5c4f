// Sixteen floats at a time, on whatever vector unit the compiler finds, and the two element types.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#endif

namespace okv {

constexpr int LANES = 16;
typedef float Vec __attribute__((vector_size(64)));
typedef int32_t IntVec __attribute__((vector_size(64)));
typedef uint32_t BitVec __attribute__((vector_size(64)));
typedef uint16_t HalfVec __attribute__((vector_size(32)));

struct Bf16 {
    uint16_t bits;
};

// Elements of one 32-bit lane along the summed dimension: the field's VNNI layout for bfloat16.
template <class E> constexpr int PAIR = 1;
template <> constexpr int PAIR<Bf16> = 2;

// Whether there is a product of two blocks of rows at once.
template <class E> constexpr bool TALL = false;
#if defined(__AMX_BF16__)
template <> constexpr bool TALL<Bf16> = true;
#endif

inline Vec splat(float x) { return Vec{} + x; }

template <class V, class T> inline V load_as(const T* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline Vec load(const float* from) { return load_as<Vec>(from); }

inline Vec load(const Bf16* from) {
    BitVec bits = __builtin_convertvector(load_as<HalfVec>(from), BitVec) << 16;
    return load_as<Vec>(&bits);
}

inline void store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }

inline HalfVec round_half(Vec v) {  // to nearest, ties to even
#if defined(__AVX512BF16__)
    return (HalfVec)_mm512_cvtneps_pbh((__m512)v);
#else
    BitVec bits = load_as<BitVec>(&v);
    bits += 0x7fff + ((bits >> 16) & 1);
    return __builtin_convertvector(bits >> 16, HalfVec);
#endif
}

inline void store(Bf16* to, Vec v) {
    HalfVec half = round_half(v);
    std::memcpy(to, &half, sizeof half);
}

inline float value(float x) { return x; }

inline float value(Bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float found;
    std::memcpy(&found, &bits, 4);
    return found;
}

// What will be read soon and lies where the processor cannot guess it.
template <class E> inline void fetch(const E* from, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(E))) __builtin_prefetch(from + i, 0, 2);
}

// a * b + c, rounded once where the processor can.
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
    return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    __m256 x[2], y[2], z[2];
    std::memcpy(x, &a, sizeof a);
    std::memcpy(y, &b, sizeof b);
    std::memcpy(z, &c, sizeof c);
    for (int i = 0; i < 2; ++i) z[i] = _mm256_fmadd_ps(x[i], y[i], z[i]);
    return load_as<Vec>(z);
#else
    return a * b + c;
#endif
}

inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

// Over all lanes, by halves: `join` takes vectors and floats alike.
template <class Join> inline float reduce(Vec v, Join join) {
    typedef float Eight __attribute__((vector_size(32)));
    typedef float Four __attribute__((vector_size(16)));
    Eight eight[2];
    Four four[2];
    float one[4];
    std::memcpy(eight, &v, sizeof v);
    eight[0] = join(eight[0], eight[1]);
    std::memcpy(four, eight, sizeof four);
    four[0] = join(four[0], four[1]);
    std::memcpy(one, four, sizeof one);
    return join(join(one[0], one[2]), join(one[1], one[3]));
}

inline float sum(Vec v) {
    return reduce(v, [](auto a, auto b) { return a + b; });
}

inline float largest(Vec v) {
    return reduce(v, [](auto a, auto b) { return a > b ? a : b; });
}

// e^x to about 2e-7: 2^n times a polynomial on [-ln2/2, ln2/2] (Cephes' expf). Between e^-87 and e^88 at the
// ends; nan stays nan.
inline Vec exp(Vec x) {
    x = x < -87.f ? splat(-87.f) : x;
    x = x > 88.f ? splat(88.f) : x;
    // 1.5 * 2^23 more, and the whole number is in the lowest bits
    Vec shifted = fma(x, splat(1.44269504088896341f), splat(12582912.f));
    Vec whole = shifted - 12582912.f;
    Vec r = fma(whole, splat(2.12194440e-4f), fma(whole, splat(-0.693359375f), x));
    Vec p = splat(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = fma(p, r, splat(c));
    p = fma(p * r, r, r) + 1.f;
    IntVec power = (load_as<IntVec>(&shifted) << 23) + 0x3f800000;
    return p * load_as<Vec>(&power);
}

// 1 / x to the last bit or two, for x from 1 to 1e38.
inline Vec inverse(Vec x) {
#if defined(__AVX512F__)
    Vec guess = (Vec)_mm512_rcp14_ps((__m512)x);
    return fma(guess, fma(-x, guess, splat(1.f)), guess);
#else
    return 1.f / x;
#endif
}

}  // namespace okv
