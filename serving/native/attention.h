// Paged attention: rotate, store, then read block by block with a running softmax (Milakov & Gimelshein 2018;
// Dao et al. 2022). What a row sees is summed in the order of its positions, in groups that begin at multiples
// of GROUP, so that it gets the same numbers whichever way its sequence was cut into chunks.
#pragma once

#include <algorithm>

#include "model.h"

namespace okv {

constexpr int GROUP = 128;  // positions between two corrections of the running softmax
constexpr float NOTHING = -1e30f;
constexpr int WIDEST_HEAD = 256;

template <class E> struct Cache {
    E *keys, *values;
    int64_t size, stride;  // elements of a block, and between blocks

    Cache(const Model& m, const Layer& layer, int64_t kv_head)
        : keys(static_cast<E*>(layer.keys) + kv_head * m.head_stride),
          values(static_cast<E*>(layer.values) + kv_head * m.head_stride), size(m.block_size * m.head_width),
          stride(m.block_stride) {}
};

inline void normalise_head(float* x, const float* weight, int64_t width, double eps) {
    double squares = 0;
    for (int64_t i = 0; i < width; ++i) squares += double(x[i]) * x[i];
    float scale = float(1 / std::sqrt(squares / width + eps));
    for (int64_t i = 0; i < width; ++i) x[i] = x[i] * scale * weight[i];
}

// Su et al. 2021, halves rotated against each other as in GPT-NeoX.
inline void rotate(float* x, const float* cosines, const float* sines, int64_t width) {
    int64_t half = width / 2;
    for (int64_t i = 0; i < half; ++i) {
        float low = x[i], high = x[i + half];
        x[i] = low * cosines[i] - high * sines[i];
        x[i + half] = high * cosines[i + half] + low * sines[i + half];
    }
}

inline void put_value(float* row, int64_t, const float* value, int64_t width) {
    std::memcpy(row, value, size_t(width) * sizeof(float));
}

// Into the first or second of each pair.
inline void put_value(Bf16* row, int64_t which, const Bf16* value, int64_t width) {
    uint32_t kept = which ? 0xffff : 0xffff0000, shift = which ? 16 : 0;
    for (int64_t i = 0; i < width; i += LANES) {
        BitVec before = load_as<BitVec>(row + 2 * i);
        BitVec now = __builtin_convertvector(load_as<HalfVec>(value + i), BitVec) << shift;
        now |= before & kept;
        std::memcpy(static_cast<void*>(row + 2 * i), &now, sizeof now);
    }
}

// One row: queries rotated into q, key and value into the cache. A block that begins here is wiped first:
// nothing of its former holder may be read, for zero times nan is nan.
template <class E>
void place_row(const Model& m, const Layer& layer, float* qkv, E* q, int64_t position, int64_t block) {
    int64_t d = m.head_width, pairs = m.block_size * PAIR<E>, inside = position % m.block_size;
    const float *cosines = m.cosines + position * d, *sines = m.sines + position * d;
    for (int64_t h = 0; h < m.heads + m.kv_heads; ++h) {
        const float* norm = h < m.heads ? layer.query_norm : layer.key_norm;
        if (norm) normalise_head(qkv + h * d, norm, d, m.eps);
        rotate(qkv + h * d, cosines, sines, d);
    }
    for (int64_t i = 0; i < m.heads * d; i += LANES) store(q + i, load(qkv + i));
    for (int64_t h = 0; h < m.kv_heads; ++h) {
        Cache<E> cache(m, layer, h);
        E *keys = cache.keys + block * cache.stride, *values = cache.values + block * cache.stride;
        alignas(64) E key[WIDEST_HEAD], value[WIDEST_HEAD];
        const float *new_key = qkv + (m.heads + h) * d, *new_value = new_key + m.kv_heads * d;
        if (inside == 0) {
            std::memset(static_cast<void*>(keys), 0, cache.size * sizeof(E));
            std::memset(static_cast<void*>(values), 0, cache.size * sizeof(E));
        }
        for (int64_t i = 0; i < d; i += LANES) {
            store(key + i, load(new_key + i));
            store(value + i, load(new_value + i));
        }
        keys += inside * PAIR<E>;
        for (int64_t i = 0; i < d; i += PAIR<E>)
            std::memcpy(static_cast<void*>(keys + i / PAIR<E> * pairs), key + i, PAIR<E> * sizeof(E));
        put_value(values + inside / PAIR<E> * d * PAIR<E>, inside % PAIR<E>, value, d);
    }
}

// Up to 16 queries of one sequence and one kv head; query i is head i % G of the position first + i / G.
template <class E> struct Tile {
    alignas(64) E q[ROWS * WIDEST_HEAD];
    alignas(64) float scores[ROWS * GROUP];
    alignas(64) E weights[ROWS * GROUP];
    alignas(64) float seen[ROWS * WIDEST_HEAD], part[ROWS * WIDEST_HEAD];
    alignas(64) float most[ROWS], total[ROWS];
};

struct Span {
    int64_t first, last;  // positions that a row sees
};

// Keys and values of a group's positions, sixteen by sixteen.
template <class E> struct Pieces {
    const E *keys[GROUP / LANES], *values[GROUP / LANES];
    int count = 0;

    Pieces(const Model& m, const Cache<E>& cache, const int32_t* table, int64_t from, int64_t to) {
        for (int64_t at = from; at < to; at += LANES, ++count) {
            int64_t block = table[at / m.block_size] * cache.stride, inside = at % m.block_size;
            keys[count] = cache.keys + block + inside * PAIR<E>;
            values[count] = cache.values + block + inside * m.head_width;
            fetch(cache.keys + block, cache.size);
            fetch(cache.values + block, cache.size);
        }
    }
};

template <class E> void score(const Model& m, Tile<E>& t, const Pieces<E>& pieces, int rows) {
    for (int first = 0; first < pieces.count; first += PANELS) {
        int panels = std::min(PANELS, pieces.count - first);
        Right<E> keys(pieces.keys[first], m.block_size * PAIR<E>, 0, 1);
        for (int n = 0; n < panels; ++n) keys.panels[n] = pieces.keys[first + n];
        multiply(Left<E>{t.q, m.head_width}, rows, keys, panels, int(m.head_width), t.scores + first * LANES, GROUP);
    }
}

// Scores of positions [from, to) → weights, the running sums corrected.
template <class E>
void weigh(const Model& m, Tile<E>& t, const Span* spans, int64_t from, int64_t to, int rows) {
    Vec lane, now = load(t.most);
    for (int i = 0; i < LANES; ++i) lane[i] = float(i);
    for (int r = 0; r < rows; ++r) {
        float* scores = t.scores + r * GROUP;
        float first = float(spans[r].first - from), last = float(spans[r].last - from);
        Vec most = splat(NOTHING);
        for (int64_t at = 0; at < to - from; at += LANES) {
            Vec position = lane + float(at), s = load(scores + at) * float(m.scale);
            s = position < first ? splat(NOTHING) : s;
            s = position > last ? splat(NOTHING) : s;
            most = max(s, most);  // nan is left out here, and found again below
            store(scores + at, s);
        }
        now[r] = std::max(t.most[r], largest(most));
    }
    Vec kept = exp(load(t.most) - now);
    store(t.most, now);
    for (int r = 0; r < rows; ++r) {
        const float* scores = t.scores + r * GROUP;
        Vec total = {};
        for (int64_t at = 0; at < to - from; at += LANES) {
            Vec s = load(scores + at), w = exp(s - now[r]);
            w = s <= NOTHING ? Vec{} : w;
            total += w;
            store(t.weights + r * GROUP + at, w);
        }
        t.total[r] = t.total[r] * kept[r] + sum(total);
        float* seen = t.seen + r * m.head_width;
        for (int64_t i = 0; i < m.head_width; i += LANES) store(seen + i, load(seen + i) * kept[r]);
    }
}

template <class E> void gather(const Model& m, Tile<E>& t, const Pieces<E>& pieces, int rows) {
    int64_t d = m.head_width;
    const E* values[GROUP / LANES];
    for (int64_t panel = 0; panel < d / LANES; panel += PANELS) {
        int panels = int(std::min<int64_t>(PANELS, d / LANES - panel));
        for (int i = 0; i < pieces.count; ++i) values[i] = pieces.values[i] + panel * LANES * PAIR<E>;
        multiply_pieces(Left<E>{t.weights, GROUP}, rows, values, pieces.count, d * PAIR<E>, LANES * PAIR<E>, panels,
                        t.part + panel * LANES, d);
    }
    for (int64_t i = 0; i < rows * d; i += LANES) store(t.seen + i, load(t.seen + i) + load(t.part + i));
}

// Queries [begin, end) of a chunk's kv head, at most 16; q and out are [rows][heads * head_width].
template <class E>
void attend(const Model& m, const Layer& layer, const Chunk& chunk, const int32_t* tables, int64_t kv_head,
            int64_t begin, int64_t end, const E* q, E* out, Tile<E>& t) {
    int64_t d = m.head_width, group = m.heads / m.kv_heads;
    int rows = int(end - begin);
    Span spans[ROWS];
    auto place = [&](int r) {
        int64_t query = begin + r, row = chunk.row + query / group;
        return (row * m.heads + kv_head * group + query % group) * d;
    };
    for (int r = 0; r < rows; ++r) {
        std::memcpy(static_cast<void*>(t.q + r * d), q + place(r), d * sizeof(E));
        int64_t position = chunk.first + (begin + r) / group;
        spans[r] = {layer.window ? std::max<int64_t>(0, position - layer.window + 1) : 0, position};
    }
    std::fill(t.most, t.most + ROWS, NOTHING);
    std::fill(t.total, t.total + ROWS, 0.f);
    std::fill(t.seen, t.seen + rows * d, 0.f);
    Cache<E> cache(m, layer, kv_head);
    const int32_t* table = tables + chunk.table;
    int64_t stop = (spans[rows - 1].last / LANES + 1) * LANES;
    for (int64_t from = spans[0].first / GROUP * GROUP; from < stop; from += GROUP) {
        int64_t to = std::min(from + GROUP, stop);
        Pieces<E> pieces(m, cache, table, from, to);
        score(m, t, pieces, rows);
        weigh(m, t, spans, from, to, rows);
        gather(m, t, pieces, rows);
    }
    for (int r = 0; r < rows; ++r)
        for (int64_t i = 0; i < d; i += LANES)
            store(out + place(r) + i, load(t.seen + r * d + i) / t.total[r]);
}

}  // namespace okv
