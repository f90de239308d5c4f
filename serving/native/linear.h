// A linear layer over the step's rows, the adapters of its segments added while the sums are still warm.
#pragma once

#include <algorithm>

#include "int8.h"
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
        : m_(m), pieces_(pieces), slots_(reinterpret_cast<const E* const*>(m.slots)), low_(low) {}

    bool any() const { return !pieces_.empty(); }
    size_t size() const { return pieces_.size(); }

    // Pieces of a block of rows, as [begin, end): they are in the order of their rows.
    std::pair<size_t, size_t> of_block(int64_t block) const {
        auto less = [](const Piece& p, int64_t b) { return p.block < b; };
        auto begin = std::lower_bound(pieces_.begin(), pieces_.end(), block, less);
        auto end = std::lower_bound(begin, pieces_.end(), block + 1, less);
        return {begin - pieces_.begin(), end - pieces_.begin()};
    }

    // x · Aᵀ of one piece for targets [begin, end), at most PANELS of them → their tiles [16][rank], zero in
    // rows of others.
    void shrink(const Linear& l, size_t piece, int64_t begin, int64_t end, const E* x, long row) const {
        const Piece& p = pieces_[piece];
        const E* factors = slots_[p.slot];
        int rows = int(p.end - p.start), at = int(p.start % ROWS), panels = 0;
        Right<E> right(factors, LANES * PAIR<E>, 0, 0);
        E* to[PANELS];
        long ranks[PANELS];
        auto flush = [&] {
            alignas(64) float sums[ROWS * STRIP];
            if (panels == 0) return;
            multiply(Left<E>{x + p.start * row, row}, rows, right, panels, int(l.in), sums, STRIP,
                     static_cast<const Extra<E>*>(nullptr), 0, true);
            for (int n = 0; n < panels; ++n)
                for (int r = 0; r < rows; ++r) store(to[n] + r * ranks[n], load(sums + r * STRIP + n * LANES));
            panels = 0;
        };
        for (int64_t target = begin; target < end; ++target) {
            const Place& place = this->place(l, p, target);
            E* tile = this->tile(piece, target);
            if (rows < ROWS) std::memset(static_cast<void*>(tile), 0, ROWS * place.rank * sizeof(E));
            for (int64_t first = 0; first < place.rank; first += LANES) {
                right.panels[panels] = factors + place.a + first * l.in;
                to[panels] = tile + at * place.rank + first;
                ranks[panels] = place.rank;
                if (++panels == PANELS) flush();
            }
        }
        flush();
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
                const E* b = slots_[p.slot] + place.b;
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
    const E* const* slots_;
    E* low_;
};

inline void add_bias(const float* bias, int rows, int panels, float* sums) {
    for (int r = 0; r < rows; ++r)
        for (int n = 0; n < panels; ++n) {
            float* sum = sums + r * STRIP + n * LANES;
            store(sum, load(sum) + load(bias + n * LANES));
        }
}

// What a thread computes of a product.
struct Share {
    int64_t first_row, end_row;  // the first one a multiple of ROWS
    int64_t first_panel, end_panel;
};

// y = x · Wᵀ + bias + adapters for a share of it; `take(row, rows, panel, panels, sums)` gets every block of sums
// [up to 32][STRIP]. strip: room for BYTE_PANELS panels, if weights must be restored.
template <class E, class Take>
void apply(const Linear& l, const E* x, long row, const Adapters<E>& adapters, const Share& share, E* strip,
           Take take) {
    const E* weights = static_cast<const E*>(l.weights);
    const int8_t* bytes = static_cast<const int8_t*>(l.weights);
    long panel_size = LANES * l.in;
    alignas(64) float sums[2 * ROWS * STRIP];
    Extra<E> extras[2 * ROWS * PANELS];
    const bool is_one_block = share.end_row - share.first_row <= ROWS, streams = TALL<E> && l.scales && is_one_block;
    const bool tall = TALL<E> && !is_one_block && l.in % 32 == 0;
    const int width = l.scales ? BYTE_PANELS : tall ? 2 : PANELS, height = tall ? 2 * ROWS : ROWS;
    for (int64_t panel = share.first_panel; panel < share.end_panel; panel += width) {
        int panels = int(std::min<int64_t>(width, share.end_panel - panel));
        const int8_t* own_bytes = bytes + panel * panel_size;
        if (l.scales && !streams) restore_panels(own_bytes, l.scales + panel * LANES, panels, l.in, strip);
        Right<E> right(l.scales ? strip : weights + panel * panel_size, LANES * PAIR<E>, panel_size, panels);
        for (int64_t first = share.first_row; first < share.end_row; first += height) {
            const int count = int(std::min<int64_t>(height, share.end_row - first)), upper = std::min(count, ROWS);
            const bool fresh = first == share.first_row && !l.scales;
            int num_upper = 0, num_extras = 0;
            if (l.num_targets) {
                num_extras = num_upper = adapters.extras(l, first / ROWS, panel, panels, extras);
                if (count > ROWS)
                    num_extras += adapters.extras(l, first / ROWS + 1, panel, panels, extras + num_upper);
            }
            Left<E> left{x + first * row, row};
            if (streams) {
                multiply_bytes(left, own_bytes, l.scales + panel * LANES, panels, int(l.in), sums, STRIP, extras,
                               num_upper);
            } else if (TALL<E> && count > ROWS && panels == 2) {
                multiply_tall(left, right, int(l.in), sums, STRIP, extras, num_upper, num_extras, fresh);
            } else {
                multiply(left, upper, right, panels, int(l.in), sums, STRIP, extras, num_upper, fresh);
                if (count > ROWS)
                    multiply(Left<E>{left.data + ROWS * row, row}, count - ROWS, right, panels, int(l.in),
                             sums + ROWS * STRIP, STRIP, extras + num_upper, num_extras - num_upper);
            }
            if (l.bias) add_bias(l.bias + panel * LANES, count, panels, sums);
            take(first, count, panel, panels, sums);
        }
    }
}

}  // namespace okv
