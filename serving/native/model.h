// What Python describes (serving/native/library.py mirrors these structs field by field), and the scratch.
#pragma once

#include <atomic>
#include <memory>
#include <new>
#include <sched.h>
#include <vector>

#include "matmul.h"

namespace okv {

// Where a slot has its factors of one target, in elements from the slot's start. rank: a multiple of 16, 0 where
// nothing is adapted.  a: rank / 16 panels over `in`;  b: `out` / 16 panels over the rank.
struct Place {
    int64_t rank, a, b;
};

struct Linear {
    const void* weights;  // [panels][in / PAIR][16][PAIR]
    const float* bias;    // [16 * panels] or null
    const float* scales;  // [16 * panels], then the weights are int8_t; or null
    int64_t in, panels, num_targets;
    int64_t targets[3];  // the adapted layers that this one is made of
    const int32_t* panel_target;  // [panels] which of these, and which panel of that
    const int32_t* panel_index;
};

struct Layer {
    const float *attention_norm, *mlp_norm, *query_norm, *key_norm;  // the last two may be null
    Linear qkv, out, gate_up, down;
    void *keys, *values;  // of the first block and kv head; those of others lie block_stride and head_stride
                          // elements apart. Keys are [D / PAIR][P][PAIR], values [P / PAIR][D][PAIR]
    int64_t window;       // positions that one sees, itself included; 0: all
};

struct Model {
    int64_t width, inner, heads, kv_heads, head_width, vocabulary;
    int64_t block_size, block_stride, head_stride, max_rank, activation, threads, num_layers;
    double eps, scale;
    const float *cosines, *sines;  // [context][head_width]
    const float* final_norm;
    const Layer* layers;
    Linear head;
    const void* const* slots;  // [slots]: each one's factors
    const Place* places;       // [slots][num_targets]
    int64_t num_targets;
};

// `count` rows of one sequence from position `first` on; its block table begins at tables[table].
struct Chunk {
    int64_t row, count, first, table;
};

struct Segment {
    int64_t slot, start, end;
};

struct Step {
    int64_t rows, num_chunks, num_segments, num_outputs;
    float* x;  // [rows][width], the embeddings; used up
    const Chunk* chunks;
    const int32_t* tables;
    const Segment* segments;
    const int64_t* outputs;  // rows whose logits are wanted
    float* logits;           // [num_outputs][vocabulary]
};

enum Activation { SILU = 0, GELU_TANH = 1 };

// Memory that stays as large as it once was, aligned for the widest registers.
template <class T> class Buffer {
  public:
    T* get(size_t count) {
        if (count > size_) {
            data_.reset(static_cast<T*>(::operator new[](count * sizeof(T), std::align_val_t(64))));
            std::memset(static_cast<void*>(data_.get()), 0, count * sizeof(T));
            size_ = count;
        }
        return data_.get();
    }

  private:
    struct Free {
        void operator()(T* p) const { ::operator delete[](p, std::align_val_t(64)); }
    };
    std::unique_ptr<T[], Free> data_;
    size_t size_ = 0;
};

// Threads meet here many times a layer: they spin for a moment, and give way if that was too short.
class Barrier {
  public:
    explicit Barrier(int threads) : threads_(threads) {}

    void wait() {
        int phase = phase_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            return;
        }
        for (int turn = 0; phase_.load(std::memory_order_acquire) == phase; ++turn)
            if (turn > 20000) sched_yield();
    }

  private:
    int threads_;
    std::atomic<int> arrived_{0}, phase_{0};
};

}  // namespace okv
