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
        const Place& place = this->place(l, p, target);
        int rank = int(place.rank), rows = int(p.end - p.start), at = int(p.start % ROWS);
        alignas(64) float sums[ROWS * STRIP];
        E* tile = this->tile(piece, target);
        const E* a = slots_ + p.slot * m_.slot_size + place.a;
        if (rows < ROWS) std::memset(static_cast<void*>(tile), 0, ROWS * rank * sizeof(E));
        for (int first = 0; first < rank; first += STRIP) {
            int panels = std::min(PANELS, (rank - first) / LANES);
            multiply(Left<E>{x + p.start * row, row}, rows,
                     Right<E>(a + first * l.in, LANES * PAIR<E>, LANES * l.in, panels), panels, int(l.in), sums,
                     STRIP);
            for (int r = 0; r < rows; ++r)
                for (int n = 0; n < panels; ++n)
                    store(tile + (at + r) * rank + first + n * LANES, load(sums + r * STRIP + n * LANES));
        }
    }

    // What the pieces of a block of rows add to panels [panel, panel + panels) of the layer: tile · B each.
    int extras(const Linear& l, int64_t block, int64_t panel, int panels, Extra<E>* found) const {
        int count = 0;
        auto [from, to] = of_block(block);
        for (size_t piece = from; piece < to; ++piece)
            for (int n = 0; n < panels; ++n) {
                const Piece& p = pieces_[piece];
                int64_t target = l.panel_target[panel + n];
                const Place& place = this->place(l, p, target);
                if (place.rank == 0) continue;
                const E* b = slots_ + p.slot * m_.slot_size + place.b;
                found[count++] = {{tile(piece, target), long(place.rank)},
                                  b + l.panel_index[panel + n] * LANES * place.rank,
                                  int(place.rank),
                                  n,
                                  int(p.start % ROWS),
                                  int(p.end - p.start)};
            }
        return count;
    }

  private:
    const Place& place(const Linear& l, const Piece& p, int64_t target) const {
        return m_.places[p.slot * m_.num_targets + l.targets[target]];
    }

    E* tile(size_t piece, int64_t target) const {
        return low_ + (piece * 3 + target) * ROWS * m_.max_rank;
    }

    const Model& m_;
    const std::vector<Piece>& pieces_;
    const E* slots_;
    E* low_;
};

inline void add_bias(const float* bias, int rows, int panels, float* sums) {
    for (int r = 0; r < rows; ++r)
        for (int n = 0; n < panels; ++n) {
            float* sum = sums + r * STRIP + n * LANES;
            store(sum, load(sum) + load(bias + n * LANES));
        }
}

// y = x · Wᵀ + bias + adapters for panels [begin, end); `take(row, rows, panel, panels, sums)` gets every block
// of sums [16][STRIP].
template <class E, class Take>
void apply(const Linear& l, const E* x, long row, int64_t rows, const Adapters<E>& adapters, int64_t begin,
           int64_t end, Take take) {
    const E* weights = static_cast<const E*>(l.weights);
    long panel_size = LANES * l.in;
    alignas(64) float sums[ROWS * STRIP];
    Extra<E> extras[ROWS * PANELS];
    for (int64_t panel = begin; panel < end; panel += PANELS) {
        int panels = int(std::min<int64_t>(PANELS, end - panel));
        Right<E> right(weights + panel * panel_size, LANES * PAIR<E>, panel_size, panels);
        for (int64_t first = 0; first < rows; first += ROWS) {
            int count = int(std::min<int64_t>(ROWS, rows - first));
            int num_extras = l.num_targets ? adapters.extras(l, first / ROWS, panel, panels, extras) : 0;
            multiply(Left<E>{x + first * row, row}, count, right, panels, int(l.in), sums, STRIP, extras, num_extras);
            if (l.bias) add_bias(l.bias + panel * LANES, count, panels, sums);
            take(first, count, panel, panels, sums);
        }
    }
}

}  // namespace okv
