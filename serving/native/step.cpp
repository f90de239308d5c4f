// A whole step of a Llama-like decoder in one call: every thread walks through all layers, and they meet at
// barriers. Residuals and sums are float32; weights, keys, values and what is multiplied are of type E.
//
// Each matrix is cut by its output columns among the threads, so that each reads its own part of the weights.

#include <omp.h>

#include "attention.h"
#include "linear.h"

namespace okv {

constexpr int64_t FEWEST_ROWS = 64;  // that a thread takes for itself

template <class E> class Decoder {
  public:
    explicit Decoder(const Model& m) : m_(m), layers_(m.layers, m.layers + m.num_layers) {}

    void run(const Step& step) {
        size_t rows = size_t(step.rows) + ROWS;
        pieces_ = cut_into_pieces(step);
        normed_ = normed_buffer_.get(rows * m_.width);
        qkv_ = qkv_buffer_.get(rows * columns(m_.heads + 2 * m_.kv_heads));
        q_ = q_buffer_.get(rows * columns(m_.heads));
        seen_ = seen_buffer_.get(rows * columns(m_.heads));
        hidden_ = hidden_buffer_.get(rows * m_.inner);
        low_ = low_buffer_.get((pieces_.size() + 1) * 3 * ROWS * m_.max_rank);
        strips_ = strips_buffer_.get(m_.head.scales ? strip_size() * m_.threads : 1);
        next_.reset(new std::atomic<int64_t>[m_.num_layers]());
#pragma omp parallel num_threads(m_.threads)
        {
#pragma omp single
            barrier_.reset(new Barrier(omp_get_num_threads()));
            begin_tiles();
            Worker{*this, step, omp_get_thread_num(), omp_get_num_threads()}.run();
            end_tiles();
        }
    }

  private:
    size_t strip_size() const {
        return size_t(BYTE_PANELS * LANES * std::max({m_.width, m_.inner, m_.heads * m_.head_width}));
    }

    size_t columns(int64_t heads) const { return size_t(heads * m_.head_width); }

    struct Worker {
        Decoder& d;
        const Step& step;
        int thread, threads;
        Adapters<E> adapters{d.m_, d.pieces_, d.low_};
        E* strip = d.strips_ + thread * d.strip_size();

        // Few rows: every thread has all of them and its own columns, so that each weight is read once. Many:
        // its own rows and all columns, so that what one thread wrote is not read by another.
        bool by_rows = step.rows >= FEWEST_ROWS * threads;
        Share mine = by_rows ? Share{part(ROWS * 2, thread), part(ROWS * 2, thread + 1), 0, 0}
                             : Share{0, step.rows, 0, 0};

        int64_t part(int64_t unit, int number) const {
            int64_t units = (step.rows + unit - 1) / unit;
            return std::min(step.rows, units * number / threads * unit);
        }

        void run() {
            for (size_t i = 0; i < d.layers_.size(); ++i) {
                attention(d.layers_[i], d.next_[i]);
                mlp(d.layers_[i]);
            }
            meet();
            output();
        }

        void attention(const Layer& layer, std::atomic<int64_t>& next) {
            long qkv_row = long(d.columns(d.m_.heads + 2 * d.m_.kv_heads)), row = long(d.columns(d.m_.heads));
            normalise(layer.attention_norm);
            shrink(layer.qkv, d.normed_, d.m_.width);
            linear(layer.qkv, d.normed_, d.m_.width, 1, copy_to(d.qkv_, qkv_row));
            meet();
            place(layer, qkv_row, row);
            meet();
            read(layer, next);
            meet();
            shrink(layer.out, d.seen_, row);
            linear(layer.out, d.seen_, row, 1, add_to_x());
            meet_columns();
        }

        void mlp(const Layer& layer) {
            normalise(layer.mlp_norm);
            shrink(layer.gate_up, d.normed_, d.m_.width);
            linear(layer.gate_up, d.normed_, d.m_.width, 2, activate());
            meet_columns();
            shrink(layer.down, d.hidden_, d.m_.inner);
            linear(layer.down, d.hidden_, d.m_.inner, 1, add_to_x());
            meet_columns();
        }

        void output() {
            for (int64_t i = thread; i < step.num_outputs; i += threads)
                normalise_row(step.x + step.outputs[i] * d.m_.width, d.m_.final_norm, d.normed_ + i * d.m_.width);
            meet();
            Adapters<E> none{d.m_, d.nothing_, d.low_};
            Share share = columns({0, step.num_outputs, 0, 0}, d.m_.head.panels, 1);
            apply(d.m_.head, d.normed_, long(d.m_.width), none, share, strip, to_logits());
        }

        void meet() { d.barrier_->wait(); }

        void meet_columns() {
            if (!by_rows) meet();
        }

        Share columns(Share rows, int64_t panels, int64_t unit) const {
            int64_t units = panels / unit;
            rows.first_panel = units * thread / threads * unit;
            rows.end_panel = units * (thread + 1) / threads * unit;
            return rows;
        }

        // Zhang & Sennrich 2019.
        void normalise_row(const float* x, const float* weight, E* to) const {
            Vec squares = {};
            for (int64_t i = 0; i < d.m_.width; i += LANES) squares += load(x + i) * load(x + i);
            float scale = float(1 / std::sqrt(sum(squares) / d.m_.width + d.m_.eps));
            for (int64_t i = 0; i < d.m_.width; i += LANES)
                store(to + i, load(x + i) * scale * load(weight + i));
        }

        void normalise(const float* weight) {
            int64_t next = by_rows ? 1 : threads, end = mine.end_row;
            for (int64_t r = by_rows ? mine.first_row : thread; r < end; r += next) {
                if (r + next < end) fetch(step.x + (r + next) * d.m_.width, d.m_.width);
                normalise_row(step.x + r * d.m_.width, weight, d.normed_ + r * d.m_.width);
            }
            meet_columns();
        }

        // All targets of a piece at once, unless that would leave threads without work.
        void shrink(const Linear& l, const E* x, int64_t row) {
            if (!adapters.any()) return;
            if (by_rows) {
                size_t begin = adapters.of_block(mine.first_row / ROWS).first;
                size_t end = adapters.of_block((mine.end_row + ROWS - 1) / ROWS).first;
                for (size_t i = begin; i < end; ++i) adapters.shrink(l, i, 0, l.num_targets, x, long(row));
                return;
            }
            int64_t pieces = int64_t(adapters.size()), each = pieces < threads ? 1 : l.num_targets;
            int64_t tasks = pieces * l.num_targets / each;
            for (int64_t i = thread; i < tasks; i += threads) {
                int64_t begin = i * each % l.num_targets;
                adapters.shrink(l, size_t(i * each / l.num_targets), begin, begin + each, x, long(row));
            }
            meet();
        }

        template <class Take> void linear(const Linear& l, const E* x, int64_t row, int64_t unit, Take take) {
            Share share = mine;
            if (by_rows) share.end_panel = l.panels;
            else share = columns(mine, l.panels, unit);
            apply(l, x, long(row), adapters, share, strip, take);
        }

        auto copy_to(float* y, long row) const {
            return [=](int64_t first, int count, int64_t panel, int panels, const float* sums) {
                for (int r = 0; r < count; ++r)
                    for (int n = 0; n < panels; ++n)
                        store(y + (first + r) * row + (panel + n) * LANES, load(sums + r * STRIP + n * LANES));
            };
        }

        auto add_to_x() const {
            return [x = step.x, row = d.m_.width](int64_t first, int count, int64_t panel, int panels,
                                                  const float* sums) {
                for (int r = 0; r < count; ++r)
                    for (int n = 0; n < panels; ++n) {
                        float* to = x + (first + r) * row + (panel + n) * LANES;
                        store(to, load(to) + load(sums + r * STRIP + n * LANES));
                    }
            };
        }

        // Panels of gate and up take turns, so that both halves of a product are in the same block of sums.
        auto activate() const {
            return [to = d.hidden_, row = d.m_.inner, kind = d.m_.activation](
                       int64_t first, int count, int64_t panel, int panels, const float* sums) {
                for (int r = 0; r < count; ++r)
                    for (int n = 0; n < panels; n += 2) {
                        const float* gate = sums + r * STRIP + n * LANES;
                        store(to + (first + r) * row + (panel + n) / 2 * LANES,
                              activated(load(gate), kind) * load(gate + LANES));
                    }
            };
        }

        static Vec activated(Vec x, int64_t kind) {
            if (kind == SILU) return x * inverse(1.f + exp(-x));
            Vec inner = 1.5957691216057308f * (x + 0.044715f * x * x * x);  // 2 √(2/π): tanh as a sigmoid
            return x * inverse(1.f + exp(-inner));
        }

        auto to_logits() const {
            return [to = step.logits, columns = d.m_.vocabulary](int64_t first, int count, int64_t panel,
                                                                 int panels, const float* sums) {
                for (int r = 0; r < count; ++r) {
                    int64_t at = panel * LANES, width = std::min<int64_t>(panels * LANES, columns - at);
                    std::memcpy(to + (first + r) * columns + at, sums + r * STRIP, size_t(width) * 4);
                }
            };
        }

        // One block of one sequence at a time, so that it is wiped before its first row is stored. It belongs to
        // the thread that has its first row.
        void place(const Layer& layer, long qkv_row, long row) {
            int64_t p = d.m_.block_size, unit = by_rows ? ROWS * 2 : 1;
            int64_t begin = part(unit, thread), end = part(unit, thread + 1);
            for (int64_t i = 0; i < step.num_chunks; ++i) {
                const Chunk& c = step.chunks[i];
                for (int64_t from = c.first, to; from < c.first + c.count; from = to) {
                    to = std::min(c.first + c.count, (from / p + 1) * p);
                    int64_t first = c.row + from - c.first;
                    if (first < begin || first >= end) continue;
                    for (int64_t position = from, r = first; position < to; ++position, ++r)
                        place_row(d.m_, layer, d.qkv_ + r * qkv_row, d.q_ + r * row, position,
                                  step.tables[c.table + position / p]);
                }
            }
        }

        // Where there are sequences enough, one thread reads all heads of a block: they lie behind each other.
        void read(const Layer& layer, std::atomic<int64_t>& next) {
            int64_t group = d.m_.heads / d.m_.kv_heads, seen = 0, mine = next++;
            int64_t heads = step.num_chunks >= 2 * threads ? d.m_.kv_heads : 1;
            for (int64_t i = 0; i < step.num_chunks; ++i) {
                const Chunk& c = step.chunks[i];
                int64_t queries = c.count * group, tiles = (queries + ROWS - 1) / ROWS;
                int64_t tasks = tiles * (d.m_.kv_heads / heads);
                for (; mine < seen + tasks; mine = next++) {
                    int64_t head = (mine - seen) / tiles * heads, begin = (mine - seen) % tiles * ROWS;
                    for (int64_t end = head + heads; head < end; ++head)
                        attend(d.m_, layer, c, step.tables, head, begin, std::min(begin + ROWS, queries), d.q_,
                               d.seen_, d.tiles_[size_t(thread)]);
                }
                seen += tasks;
            }
        }
    };

    Model m_;
    std::vector<Layer> layers_;
    std::vector<Piece> pieces_;
    const std::vector<Piece> nothing_;
    Buffer<E> normed_buffer_, q_buffer_, seen_buffer_, hidden_buffer_, low_buffer_, strips_buffer_;
    Buffer<float> qkv_buffer_;
    E *normed_, *q_, *seen_, *hidden_, *low_, *strips_;
    float* qkv_;
    std::vector<Tile<E>> tiles_ = std::vector<Tile<E>>(size_t(m_.threads));
    std::unique_ptr<std::atomic<int64_t>[]> next_;
    std::unique_ptr<Barrier> barrier_;
};

}  // namespace okv

using okv::Bf16;
using okv::Decoder;

extern "C" {

int okv_prepare() { return okv::request_tiles() ? 0 : 1; }

void* okv_create(const okv::Model* model, int is_half) {
    if (is_half) return new Decoder<Bf16>(*model);
    return new Decoder<float>(*model);
}

void okv_run(void* decoder, int is_half, const okv::Step* step) {
    if (is_half)
        static_cast<Decoder<Bf16>*>(decoder)->run(*step);
    else
        static_cast<Decoder<float>*>(decoder)->run(*step);
}

void okv_destroy(void* decoder, int is_half) {
    if (is_half)
        delete static_cast<Decoder<Bf16>*>(decoder);
    else
        delete static_cast<Decoder<float>*>(decoder);
}
}
