// Weights in eight bits (serving/quantised.py), restored to E just before they are multiplied: sums are the same to
// the bit as if they had been stored so.
#pragma once

#include <algorithm>

#include "matmul.h"

namespace okv {

constexpr int BYTE_PANELS = 2;     // at most, at once
constexpr int64_t FORESIGHT = 4096;  // weights that are fetched ahead

typedef int8_t ByteVec __attribute__((vector_size(16)));

inline Vec restore(const int8_t* from, const Vec& scales) {
#if defined(__AVX512F__)
    IntVec whole = (IntVec)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
    IntVec whole = __builtin_convertvector(load_as<ByteVec>(from), IntVec);
#endif
    return __builtin_convertvector(whole, Vec) * scales;
}

// A panel's scales in the order of its elements.
template <class E> struct PanelScales {
    Vec parts[PAIR<E>];

    void set(const float* scales) {
        for (int i = 0; i < PAIR<E> * LANES; ++i) parts[i / LANES][i % LANES] = scales[i / PAIR<E>];
    }
};

// `count` elements of a panel, a multiple of 64.
template <class E> void restore(const int8_t* from, const PanelScales<E>& scales, int64_t count, E* to) {
    for (int64_t at = 0; at < count; at += PAIR<E> * LANES) {
        if (at % 64 == 0) __builtin_prefetch(from + at + FORESIGHT, 0, 3);
#if defined(__AVX512BF16__)
        if constexpr (PAIR<E> == 2) {
            Vec low = restore(from + at, scales.parts[0]), high = restore(from + at + LANES, scales.parts[1]);
            __m512bh both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
            std::memcpy(static_cast<void*>(to + at), &both, sizeof both);
            continue;
        }
#endif
        for (int i = 0; i < PAIR<E>; ++i)
            store(to + at + i * LANES, restore(from + at + i * LANES, scales.parts[i]));
    }
}

// Whole panels, for many rows.
template <class E> void restore_panels(const int8_t* from, const float* scales, int panels, int64_t k, E* to) {
    for (int n = 0; n < panels; ++n) {
        PanelScales<E> own;
        own.set(scales + n * LANES);
        restore(from + n * k * LANES, own, k * LANES, to + n * k * LANES);
    }
}

#if defined(__AMX_BF16__)

// Sixteen rows: the next tiles are restored while the last ones are multiplied.
template <int N>
inline void multiply_bytes(Left<Bf16> a, const int8_t* from, const float* scales, int k, float* c, long ldc,
                           const Extra<Bf16>* extras, int num_extras) {
    alignas(64) Bf16 tiles[2][BYTE_PANELS][32 * LANES];
    PanelScales<Bf16> own[N];
    for (int n = 0; n < N; ++n) own[n].set(scales + n * LANES);
    auto restore_next = [&](int at, int which) {
        for (int n = 0; n < N; ++n)
            restore(from + (int64_t(n) * k + at) * LANES, own[n], std::min(k - at, 32) * LANES, tiles[which][n]);
    };
    _tile_zero(0);
    _tile_zero(1);
    restore_next(0, 0);
    for (int at = 0, now = 0; at < k; at += 32, now ^= 1) {
        settle();
        if (at + 32 <= k) {
            _tile_loadd(4, a.data + at, a.row * 2);
            _tile_loadd(5, tiles[now][0], 64);
            _tile_dpbf16ps(0, 4, 5);
            if (N > 1) _tile_loadd(5, tiles[now][1], 64);
            if (N > 1) _tile_dpbf16ps(1, 4, 5);
        } else {
            _tile_loadd(6, a.data + at, a.row * 2);
            _tile_loadd(7, tiles[now][0], 64);
            _tile_dpbf16ps(0, 6, 7);
            if (N > 1) _tile_loadd(7, tiles[now][1], 64);
            if (N > 1) _tile_dpbf16ps(1, 6, 7);
        }
        if (at + 32 < k) restore_next(at + 32, now ^ 1);
    }
    for (int i = 0; i < num_extras; ++i) add_extra(extras[i]);
    _tile_stored(0, c, ldc * 4);
    if (N > 1) _tile_stored(1, c + LANES, ldc * 4);
}

inline void multiply_bytes(Left<Bf16> a, const int8_t* from, const float* scales, int panels, int k, float* c,
                           long ldc, const Extra<Bf16>* extras, int num_extras) {
    panels == 1 ? multiply_bytes<1>(a, from, scales, k, c, ldc, extras, num_extras)
                : multiply_bytes<2>(a, from, scales, k, c, ldc, extras, num_extras);
}

#endif

template <class E>
inline void multiply_bytes(Left<E>, const int8_t*, const float*, int, int, float*, long, const Extra<E>*, int) {}

}  // namespace okv
