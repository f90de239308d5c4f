// The one product that everything is made of:  c[rows, 16 * panels] (+)= a[rows, k] · b[k, 16 * panels].
//
// b lies in panels of 16 columns; one row of a panel holds PAIR elements of k beside each other for every
// column, so that one vector register is one row. A row of c depends on its own row of a alone, and is summed
// over k in the same order whatever stands beside it: the same request gives the same numbers in any batch.
//
// On AMX, a and c must have sixteen readable (c: writable) rows, however few are meant.
#pragma once

#include <unistd.h>

#include <sys/syscall.h>

#include "vec.h"

namespace okv {

constexpr int ROWS = 16;    // of one block of a and c
constexpr int PANELS = 4;   // at most, at once
constexpr int STRIP = LANES * PANELS;

template <class E> struct Operand {
    const E* data;
    long row;    // elements between rows of a panel (for a: between rows)
    long panel;  // elements between panels
};

#if defined(__AMX_BF16__)

// GCC's tile intrinsics do not say what memory they read: whatever was stored must be there before them.
inline void settle() { asm volatile("" ::: "memory"); }

// tmm0-3 sums, tmm4 and 5 for steps of 32, tmm6 and 7 for a last step of 16.
inline void begin_tiles() {
    struct alignas(64) {
        uint8_t palette = 1, start = 0, unused[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = 16;
    config.bytes[6] = 32, config.rows[7] = 8;
    asm volatile("" ::"r"(&config) : "memory");
    _tile_loadconfig(&config);
}

inline void end_tiles() { _tile_release(); }

// The kernel grants a process the tiles' state on request (Linux: Documentation/arch/x86/xstate.rst).
inline bool request_tiles() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

#define OKV_STEP(PANEL, LEFT, RIGHT)                                        \
    if (PANEL < N) {                                                        \
        _tile_loadd(RIGHT, right + PANEL * b.panel, b.row * 2);             \
        _tile_dpbf16ps(PANEL, LEFT, RIGHT);                                 \
    }
#define OKV_STEPS(LEFT, RIGHT)                                              \
    OKV_STEP(0, LEFT, RIGHT) OKV_STEP(1, LEFT, RIGHT) OKV_STEP(2, LEFT, RIGHT) OKV_STEP(3, LEFT, RIGHT)
#define OKV_EACH(DO) DO(0) DO(1) DO(2) DO(3)
#define OKV_CLEAR(PANEL) if (PANEL < N) _tile_zero(PANEL);
#define OKV_FETCH(PANEL) if (PANEL < N) _tile_loadd(PANEL, c + PANEL * LANES, ldc * 4);
#define OKV_KEEP(PANEL) if (PANEL < N) _tile_stored(PANEL, c + PANEL * LANES, ldc * 4);

template <int N>
inline void multiply(Operand<Bf16> a, int, Operand<Bf16> b, int k, float* c, long ldc, bool add) {
    settle();
    if (add) {
        OKV_EACH(OKV_FETCH)
    } else {
        OKV_EACH(OKV_CLEAR)
    }
    int at = 0;
    for (; at + 32 <= k; at += 32) {
        const Bf16* right = b.data + at / 2 * b.row;
        _tile_loadd(4, a.data + at, a.row * 2);
        OKV_STEPS(4, 5)
    }
    if (at < k) {
        const Bf16* right = b.data + at / 2 * b.row;
        _tile_loadd(6, a.data + at, a.row * 2);
        OKV_STEPS(6, 7)
    }
    OKV_EACH(OKV_KEEP)
}

#undef OKV_STEP
#undef OKV_STEPS
#undef OKV_EACH
#undef OKV_CLEAR
#undef OKV_FETCH
#undef OKV_KEEP

#else
inline void begin_tiles() {}
inline void end_tiles() {}
inline bool request_tiles() { return true; }
#endif

inline void accumulate(Vec& sum, const float* a, const float* b) { sum += *a * load(b); }

inline void accumulate(Vec& sum, const Bf16* a, const Bf16* b) {
#if defined(__AVX512BF16__)
    uint32_t pair;
    std::memcpy(&pair, a, 4);
    sum = (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(pair)),
                                (__m512bh)_mm512_loadu_si512(b));
#else
    BitVec bits = load_as<BitVec>(b);
    BitVec even = bits << 16, odd = bits & 0xffff0000u;
    sum += value(a[0]) * load_as<Vec>(&even);
    sum += value(a[1]) * load_as<Vec>(&odd);
#endif
}

template <int R, int N, class E>
inline void block(Operand<E> a, Operand<E> b, int k, float* c, long ldc, bool add) {
    Vec sums[R][N];
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) sums[r][n] = add ? load(c + r * ldc + n * LANES) : Vec{};
    for (int at = 0; at < k; at += PAIR<E>) {
        const E* right = b.data + at / PAIR<E> * b.row;
        for (int r = 0; r < R; ++r)
            for (int n = 0; n < N; ++n) accumulate(sums[r][n], a.data + r * a.row + at, right + n * b.panel);
    }
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) store(c + r * ldc + n * LANES, sums[r][n]);
}

template <int N, class E>
inline void multiply(Operand<E> a, int rows, Operand<E> b, int k, float* c, long ldc, bool add) {
    int r = 0;
    for (; r + 4 <= rows; r += 4) block<4, N>({a.data + r * a.row, a.row, 0}, b, k, c + r * ldc, ldc, add);
    for (; r < rows; ++r) block<1, N>({a.data + r * a.row, a.row, 0}, b, k, c + r * ldc, ldc, add);
}

template <class E>
inline void multiply(Operand<E> a, int rows, Operand<E> b, int panels, int k, float* c, long ldc, bool add) {
    switch (panels) {
        case 1: return multiply<1>(a, rows, b, k, c, ldc, add);
        case 2: return multiply<2>(a, rows, b, k, c, ldc, add);
        case 3: return multiply<3>(a, rows, b, k, c, ldc, add);
        default: return multiply<4>(a, rows, b, k, c, ldc, add);
    }
}

}  // namespace okv
