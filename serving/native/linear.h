// A linear layer over the step's rows, the adapters of its segments added while the sums are still warm.
#pragma once

#include <algorithm>

#include "model.h"

namespace okv {

// Rows [start, end) of one slot inside one block of sixteen rows.
struct Piece {
    int64_t slot, block, start, end;
};

inline std::vector<Piece> cut_into_pieces(const Step& step) {
    std::vector<Piece> pieces;
    for (int64_t i = 0; i < step.num_segments; ++i) {
        const Segment& s = step.segments[i];
        for (int64_t start = s.start; start < s.end;) {
            int64_t end = std::min(s.end, (start / ROWS + 1) * ROWS);
            pieces.push_back({s.slot, start / ROWS, start, end});
            start = end;
        }
    }
    return pieces;
}

template <class E> class Adapters {
  public:
    Adapters(const Model& m, const std::vector<Piece>& pieces, E* low)
        : m_(m), pieces_(pieces), slots_(static_cast<const E*>(m.slots)), low_(low) {}

    bool any() const { return !pieces_.empty(); }
    size_t size() const { return pieces_.size(); }

    // Pieces of a block of rows, as [begin, end): they are in the order of their rows.
    std::pair<size_t, size_t> of_block(int64_t block) const {
        auto less = [](const Piece& p, int64_t b) { return p.block < b; };
        auto begin = std::lower_bound(pieces_.begin(), pieces_.end(), block, less);
        auto end = std::lower_bound(begin, pieces_.end(), block + 1, less);
        return {begin - pieces_.begin(), end - pieces_.begin()};
    }

    // x · Aᵀ of one piece for one target → its tile [16][rank], zero in rows of others.
    void shrink(const Linear& l, size_t piece, int64_t target, const E* x, long row) const {
        const Piece& p = pieces_[piece];
        int rank = this->rank(l, p, target), rows = int(p.end - p.start), at = int(p.start % ROWS);
        alignas(64) float sums[ROWS * STRIP];
        E* tile = this->tile(piece, target);
        const E* a = slots_ + p.slot * m_.slot_size + l.targets[target].a;
        if (rows < ROWS) std::memset(static_cast<void*>(tile), 0, ROWS * rank * sizeof(E));
        for (int first = 0; first < rank; first += STRIP) {
            int panels = std::min(PANELS, (rank - first) / LANES);
            multiply(Operand<E>{x + p.start * row, row, 0}, rows,
                     Operand<E>{a + first * l.in, LANES * PAIR<E>, LANES * l.in}, panels, int(l.in), sums, STRIP,
                     false);
            for (int r = 0; r < rows; ++r)
                for (int n = 0; n < panels; ++n)
                    store(tile + (at + r) * rank + first + n * LANES, load(sums + r * STRIP + n * LANES));
        }
    }

    // c[16][panels * 16] += tile · B for panels [panel, panel + panels) of the layer.
    void expand(const Linear& l, size_t piece, int64_t panel, int panels, float* c) const {
        for (int n = 0, run; n < panels; n += run) {
            int64_t target = l.panel_target[panel + n], index = l.panel_index[panel + n];
            for (run = 1; n + run < panels && l.panel_target[panel + n + run] == target;) ++run;
            const Piece& p = pieces_[piece];
            int rank = this->rank(l, p, target);
            if (rank == 0) continue;
            const E* b = slots_ + p.slot * m_.slot_size + l.targets[target].b + index * LANES * rank;
            add_rows(p, Operand<E>{tile(piece, target), rank, 0},
                     Operand<E>{b, LANES * PAIR<E>, long(LANES) * rank}, run, rank, c + n * LANES);
        }
    }

    int rank(const Linear& l, const Piece& p, int64_t target) const {
        return m_.ranks[p.slot * m_.num_targets + l.targets[target].id];
    }

  private:
    void add_rows(const Piece& p, Operand<E> a, Operand<E> b, int panels, int rank, float* c) const {
#if defined(__AMX_BF16__)
        if (PAIR<E> == 2) return multiply(a, ROWS, b, panels, rank, c, STRIP, true);
#endif
        long at = p.start % ROWS;
        multiply(Operand<E>{a.data + at * a.row, a.row, 0}, int(p.end - p.start), b, panels, rank,
                 c + at * STRIP, STRIP, true);
    }

    E* tile(size_t piece, int64_t target) const {
        return low_ + (piece * 3 + target) * ROWS * m_.max_rank;
    }

    const Model& m_;
    const std::vector<Piece>& pieces_;
    const E* slots_;
    E* low_;
};

// y = x · Wᵀ + bias + adapters for panels [begin, end); `take(row, rows, panel, panels, sums)` gets every block
// of sums [16][STRIP].
template <class E, class Take>
void apply(const Linear& l, const E* x, long row, int64_t rows, const Adapters<E>& adapters, int64_t begin,
           int64_t end, Take take) {
    const E* weights = static_cast<const E*>(l.weights);
    long panel_size = LANES * l.in;
    alignas(64) float sums[ROWS * STRIP];
    for (int64_t panel = begin; panel < end; panel += PANELS) {
        int panels = int(std::min<int64_t>(PANELS, end - panel));
        for (int64_t first = 0; first < rows; first += ROWS) {
            int count = int(std::min<int64_t>(ROWS, rows - first));
            multiply(Operand<E>{x + first * row, row, 0}, count,
                     Operand<E>{weights + panel * panel_size, LANES * PAIR<E>, panel_size}, panels, int(l.in), sums,
                     STRIP, false);
            if (l.bias)
                for (int r = 0; r < count; ++r)
                    for (int n = 0; n < panels; ++n) {
                        float* sum = sums + r * STRIP + n * LANES;
                        store(sum, load(sum) + load(l.bias + (panel + n) * LANES));
                    }
            if (adapters.any() && l.num_targets) {
                auto [from, to] = adapters.of_block(first / ROWS);
                for (size_t piece = from; piece < to; ++piece) adapters.expand(l, piece, panel, panels, sums);
            }
            take(first, count, panel, panels, sums);
        }
    }
}

}  // namespace okv
