// The one product that everything is made of:  c[rows, 16 * panels] = a[rows, k] · b[k, 16 * panels].
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

template <class E> struct Left {
    const E* data;
    long row;  // elements between rows
};

// Up to PANELS panels, wherever each of them lies.
template <class E> struct Right {
    const E* panels[PANELS];
    long row;  // elements between rows of a panel

    Right(const E* first, long row, long panel, int count) : row(row) {
        for (int n = 0; n < PANELS; ++n) panels[n] = first + (n < count ? n : 0) * panel;
    }
};

// One more product, for one panel and rows [first, first + rows) alone; other rows of a are zero.
template <class E> struct Extra {
    Left<E> a;  // [16][k]
    const E* b;
    int k, panel, first, rows;
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

#define OKV_EACH(DO) DO(0) DO(1) DO(2) DO(3)
#define OKV_CLEAR(PANEL) if (PANEL < N) _tile_zero(PANEL);
#define OKV_KEEP(PANEL) if (PANEL < N) _tile_stored(PANEL, c + PANEL * LANES, ldc * 4);
#define OKV_WIDE(PANEL)                                            \
    if (PANEL < N) {                                               \
        if (FRESH) fetch_tile(b.panels[PANEL] + (at / 2 + AHEAD) * b.row); \
        _tile_loadd(5, b.panels[PANEL] + at / 2 * b.row, b.row * 2); \
        _tile_dpbf16ps(PANEL, 4, 5);                               \
    }
#define OKV_NARROW(PANEL)                                          \
    if (PANEL < N) {                                               \
        _tile_loadd(7, b.panels[PANEL] + at / 2 * b.row, b.row * 2); \
        _tile_dpbf16ps(PANEL, 6, 7);                               \
    }

// Weights come from memory faster if they are asked for two tiles ahead. `FRESH`: nobody has read them just now.
constexpr int AHEAD = 32;  // rows of a panel

inline void fetch_tile(const Bf16* from) {
    for (int i = 0; i < 16; ++i) __builtin_prefetch(from + i * 32, 0, 3);
}

template <int N, bool FRESH = false> inline void add_product(Left<Bf16> a, const Right<Bf16>& b, int k) {
    int at = 0;
    for (; at + 32 <= k; at += 32) {
        _tile_loadd(4, a.data + at, a.row * 2);
        OKV_EACH(OKV_WIDE)
    }
    if (at < k) {
        _tile_loadd(6, a.data + at, a.row * 2);
        OKV_EACH(OKV_NARROW)
    }
}

inline void add_extra(const Extra<Bf16>& extra, int base = 0) {
    for (int at = 0; at < extra.k; at += LANES) {
        _tile_loadd(6, extra.a.data + at, extra.a.row * 2);
        _tile_loadd(7, extra.b + at * LANES, LANES * 4);
        switch (extra.panel + base) {
            case 0: _tile_dpbf16ps(0, 6, 7); break;
            case 1: _tile_dpbf16ps(1, 6, 7); break;
            case 2: _tile_dpbf16ps(2, 6, 7); break;
            default: _tile_dpbf16ps(3, 6, 7);
        }
    }
}

template <int N>
inline void multiply(Left<Bf16> a, int, const Right<Bf16>& b, int k, float* c, long ldc,
                     const Extra<Bf16>* extras = nullptr, int num_extras = 0, bool fresh = false) {
    settle();
    OKV_EACH(OKV_CLEAR)
    fresh ? add_product<N, true>(a, b, k) : add_product<N>(a, b, k);
    for (int i = 0; i < num_extras; ++i) add_extra(extras[i]);
    OKV_EACH(OKV_KEEP)
}

// The same over `count` pieces of b, sixteen rows of k each, that lie apart: pieces[i] + n * panel is panel n.
template <int N>
inline void multiply_pieces(Left<Bf16> a, int, const Bf16* const* pieces, int count, long row, long panel,
                            float* c, long ldc) {
    settle();
    OKV_EACH(OKV_CLEAR)
    for (int i = 0; i < count; ++i)
        add_product<N>({a.data + i * LANES, a.row}, Right<Bf16>(pieces[i], row, panel, N), LANES);
    OKV_EACH(OKV_KEEP)
}

// Two blocks of rows at a time over two panels, each as `multiply` has it; the first `num_upper` extras belong to
// the upper block. Each of b's tiles is used twice while it is near.
template <bool FRESH>
inline void add_tall(Left<Bf16> a, const Right<Bf16>& b, int k) {
    for (int at = 0; at < k; at += 32) {
        const Bf16 *b0 = b.panels[0] + at / 2 * b.row, *b1 = b.panels[1] + at / 2 * b.row;
        if (FRESH) fetch_tile(b0 + AHEAD * b.row), fetch_tile(b1 + AHEAD * b.row);
        _tile_loadd(4, a.data + at, a.row * 2);
        _tile_loadd(5, b0, b.row * 2);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(5, b1, b.row * 2);
        _tile_dpbf16ps(1, 4, 5);
        _tile_loadd(4, a.data + ROWS * a.row + at, a.row * 2);
        _tile_dpbf16ps(3, 4, 5);
        _tile_loadd(5, b0, b.row * 2);
        _tile_dpbf16ps(2, 4, 5);
    }
}

template <int N = PANELS>
inline void multiply_tall(Left<Bf16> a, const Right<Bf16>& b, int k, float* c, long ldc, const Extra<Bf16>* extras,
                          int num_upper, int num_extras, bool fresh) {
    settle();
    OKV_EACH(OKV_CLEAR)
    fresh ? add_tall<true>(a, b, k) : add_tall<false>(a, b, k);
    for (int i = 0; i < num_extras; ++i) add_extra(extras[i], i < num_upper ? 0 : 2);
    float* lower = c + ROWS * ldc;
    _tile_stored(0, c, ldc * 4);
    _tile_stored(1, c + LANES, ldc * 4);
    _tile_stored(2, lower, ldc * 4);
    _tile_stored(3, lower + LANES, ldc * 4);
}

#undef OKV_EACH
#undef OKV_CLEAR
#undef OKV_KEEP
#undef OKV_WIDE
#undef OKV_NARROW

#else
inline void begin_tiles() {}
inline void end_tiles() {}
inline bool request_tiles() { return true; }
#endif

inline void accumulate(Vec& sum, const float* a, const float* b) { sum = fma(splat(*a), load(b), sum); }

inline void accumulate(Vec& sum, const Bf16* a, const Bf16* b) {
#if defined(__AVX512BF16__)
    uint32_t pair;
    std::memcpy(&pair, a, 4);
    sum = (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(pair)),
                                (__m512bh)_mm512_loadu_si512(b));
#else
    BitVec bits = load_as<BitVec>(b);
    BitVec even = bits << 16, odd = bits & 0xffff0000u;
    sum = fma(splat(value(a[0])), load_as<Vec>(&even), sum);
    sum = fma(splat(value(a[1])), load_as<Vec>(&odd), sum);
#endif
}

template <int R, int N, class E>
inline void block(Left<E> a, const Right<E>& b, int k, float* c, long ldc, bool add) {
    Vec sums[R][N];
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) sums[r][n] = add ? load(c + r * ldc + n * LANES) : Vec{};
    for (int at = 0; at < k; at += PAIR<E>) {
        const long right = at / PAIR<E> * b.row;
        for (int r = 0; r < R; ++r)
            for (int n = 0; n < N; ++n) accumulate(sums[r][n], a.data + r * a.row + at, b.panels[n] + right);
    }
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) store(c + r * ldc + n * LANES, sums[r][n]);
}

template <int N, class E>
inline void add_product(Left<E> a, int rows, const Right<E>& b, int k, float* c, long ldc, bool add) {
    int r = 0;
    for (; r + 4 <= rows; r += 4) block<4, N>({a.data + r * a.row, a.row}, b, k, c + r * ldc, ldc, add);
    for (; r < rows; ++r) block<1, N>({a.data + r * a.row, a.row}, b, k, c + r * ldc, ldc, add);
}

template <int N, class E>
inline void multiply(Left<E> a, int rows, const Right<E>& b, int k, float* c, long ldc,
                     const Extra<E>* extras = nullptr, int num_extras = 0, bool = false) {
    add_product<N>(a, rows, b, k, c, ldc, false);
    for (int i = 0; i < num_extras; ++i) {
        const Extra<E>& extra = extras[i];
        add_product<1>(Left<E>{extra.a.data + extra.first * extra.a.row, extra.a.row}, extra.rows,
                       Right<E>(extra.b, LANES * PAIR<E>, 0, 1), extra.k,
                       c + extra.first * ldc + extra.panel * LANES, ldc, true);
    }
}

template <int N, class E>
inline void multiply_pieces(Left<E> a, int rows, const E* const* pieces, int count, long row, long panel, float* c,
                            long ldc) {
    for (int i = 0; i < count; ++i)
        add_product<N>(Left<E>{a.data + i * LANES, a.row}, rows, Right<E>(pieces[i], row, panel, N), LANES, c, ldc,
                       i > 0);
}

template <class E>
inline void multiply_tall(Left<E>, const Right<E>&, int, float*, long, const Extra<E>*, int, int, bool) {}

template <class E>
inline void multiply_pieces(Left<E> a, int rows, const E* const* pieces, int count, long row, long panel,
                            int panels, float* c, long ldc) {
    switch (panels) {
        case 1: return multiply_pieces<1>(a, rows, pieces, count, row, panel, c, ldc);
        case 2: return multiply_pieces<2>(a, rows, pieces, count, row, panel, c, ldc);
        case 3: return multiply_pieces<3>(a, rows, pieces, count, row, panel, c, ldc);
        default: return multiply_pieces<4>(a, rows, pieces, count, row, panel, c, ldc);
    }
}

template <class E>
inline void multiply(Left<E> a, int rows, const Right<E>& b, int panels, int k, float* c, long ldc,
                     const Extra<E>* extras = nullptr, int num_extras = 0, bool fresh = false) {
    switch (panels) {
        case 1: return multiply<1>(a, rows, b, k, c, ldc, extras, num_extras, fresh);
        case 2: return multiply<2>(a, rows, b, k, c, ldc, extras, num_extras, fresh);
        case 3: return multiply<3>(a, rows, b, k, c, ldc, extras, num_extras, fresh);
        default: return multiply<4>(a, rows, b, k, c, ldc, extras, num_extras, fresh);
    }
}

}  // namespace okv
