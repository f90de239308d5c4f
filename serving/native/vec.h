// Sixteen floats at a time, on whatever vector unit the compiler finds, and the two element types.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__) || defined(__AMX_BF16__)
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
    BitVec bits = load_as<BitVec>(&v);
    bits += 0x7fff + ((bits >> 16) & 1);
    return __builtin_convertvector(bits >> 16, HalfVec);
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

inline void put(float& to, float x) { to = x; }

inline void put(Bf16& to, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    to.bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// What will be read soon and lies where the processor cannot guess it.
template <class E> inline void fetch(const E* from, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(E))) __builtin_prefetch(from + i, 0, 2);
}

inline float sum(Vec v) {
    float total = 0;
    for (int i = 0; i < LANES; ++i) total += v[i];
    return total;
}

inline float largest(Vec v) {
    float most = v[0];
    for (int i = 1; i < LANES; ++i) most = v[i] > most ? v[i] : most;
    return most;
}

inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

// e^x to about 2e-7: 2^n times a polynomial on [-ln2/2, ln2/2] (Cephes' expf); 0 below -87, nan stays nan.
inline Vec exp(Vec x) {
    Vec clipped = x < -87.f ? splat(-87.f) : x;
    clipped = clipped > 88.f ? splat(88.f) : clipped;
    Vec scaled = clipped * 1.44269504088896341f;
    IntVec n = __builtin_convertvector(scaled + (scaled < 0 ? splat(-0.5f) : splat(0.5f)), IntVec);
    Vec whole = __builtin_convertvector(n, Vec);
    Vec r = clipped - whole * 0.693359375f - whole * -2.12194440e-4f;
    Vec p = splat(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = p * r + c;
    p = p * r * r + r + 1.f;
    IntVec exponent = (n + 127) << 23;
    Vec found = p * load_as<Vec>(&exponent);
    found = x < -87.f ? Vec{} : found;
    return x != x ? x : found;
}

}  // namespace okv
