// The operations with weight matrices: what is quantized when, and how the threads share it.
//
// `exact` asks for float32 arithmetic; without it, activations meet quantized weights as int8. Threads take whole rows, in
// runs, so memory is read in order and no sum depends on who computes it.
#include <algorithm>
#include <atomic>
#include <deque>
#include <vector>

#include "matrix_ops.h"
#include "kernels.h"
#include "pool.h"
#include "scratch.h"

using namespace moepack;

namespace {

constexpr int64_t ROW_GRAIN = 32;     // rows that a thread takes at least: a panel, and cache lines of its own in the result
constexpr int64_t TOKENS_AT_ONCE = 512;  // tokens of an expert held as scratch
constexpr int64_t ROW_PADDING = 256, GROUP_PADDING = 16;
constexpr int64_t TOKEN_PADDING = 16;  // a kernel may read so many together

bool as_int8(const Matrix& m, bool exact) { return m.storage == QUANTIZED && !exact; }

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Memory of one set of activations.
struct ActivationBuffer {
    Scratch q, floats;

    Activations shape(int64_t tokens, const Matrix& m, bool one_token) {
        Activations a;
        a.tokens = tokens;
        a.columns = m.columns;
        a.groups = m.groups();
        a.row_stride = round_up(m.columns, ROW_PADDING);
        a.group_stride = round_up(a.groups, GROUP_PADDING);
        a.bits = m.bits;
        a.group_size = m.group_size;
        a.one_token = one_token;
        a.q = q.get<int8_t>(round_up(tokens, TOKEN_PADDING) * a.row_stride);
        const int64_t count = tokens * a.group_stride;
        a.scale = floats.get<float>(3 * count);
        a.sum = a.scale + count;
        a.residual = a.sum + count;
        return a;
    }
};

// The distinct ways in which the matrices of one call need x quantized: by bits and group size. Of all of x, or where
// `rows` is given of these rows of it, `tokens` in number.
class Prepared {
  public:
    // Does nothing for a matrix that meets x as it is. Not on a worker: the buffers belong to the calling thread.
    void prepare(const Matrix& m, const float* x, const int64_t* rows, int64_t tokens, bool exact) {
        if (!as_int8(m, exact) || find(m)) return;
        static thread_local ActivationBuffer buffers[LIMIT];
        Activations& a = sets_[count_] = buffers[count_].shape(tokens, m, tokens == 1 && !rows);
        ++count_;
        const MatrixKernels& k = kernels().matrix;
        Pool::get().split(tokens, 1, [&](int64_t begin, int64_t end) { k.quantize(a, x, rows, begin, end); });
    }

    // What a matrix is to be multiplied with; null: x as it is.
    const Activations* find(const Matrix& m) const {
        for (int i = 0; i < count_; ++i)
            if (sets_[i].bits == m.bits && sets_[i].group_size == m.group_size) return &sets_[i];
        return nullptr;
    }

  private:
    static constexpr int LIMIT = 12;  // 4 widths of integers x 3 group sizes
    Activations sets_[LIMIT];
    int count_ = 0;
};

// out [tokens, out_stride] = a, or without it x or these rows of it, times rows [begin, end) of a matrix.
void multiply_rows(const Matrix& m, const Activations* a, const float* x, const int64_t* rows, int64_t tokens, float* out, int64_t out_stride,
                   int64_t begin, int64_t end) {
    const MatrixKernels& k = kernels().matrix;
    if (!a) k.float_rows(m, x, rows, tokens, out, out_stride, begin, end);
    else if (a->one_token) k.dot_row_walk(m, *a, out, begin, end);
    else k.dot_tile(m, *a, out, out_stride, begin, end);
}

// gate = silu(gate) * up for columns [begin, end) of [tokens, width]
void gate_columns(float* gate, const float* up, int64_t tokens, int64_t width, int64_t begin, int64_t end) {
    for (int64_t first = begin; first < tokens * width; first += width)
        kernels().floats.silu_mul(gate + first, gate + first, 0, up + first, 0, end - begin, 0, 1);
}

}  // namespace

// outs[i] [tokens, rows of i] = x [tokens, columns] times matrix i, for matrices of the same columns.
API void moepack_linear(float* const* outs, const float* x, int64_t tokens, const Matrix* const* matrices, int64_t count, int exact) {
    Prepared prepared;
    int64_t rows = 0;
    for (int64_t i = 0; i < count; ++i) {
        prepared.prepare(*matrices[i], x, nullptr, tokens, exact);
        rows += matrices[i]->rows;
    }
    // The matrices as one tall one, so that small ones do not leave a thread idle.
    Pool::get().split(rows, ROW_GRAIN, [&](int64_t begin, int64_t end) {
        int64_t first = 0;
        for (int64_t i = 0; i < count; first += matrices[i++]->rows) {
            const Matrix& m = *matrices[i];
            const int64_t from = std::max(begin - first, int64_t(0)), to = std::min(end - first, m.rows);
            if (from < to) multiply_rows(m, prepared.find(m), x, nullptr, tokens, outs[i], m.rows, from, to);
        }
    });
}

namespace {

constexpr int64_t PIECE_BYTES = 128 << 10;  // of weights, where experts are shared

// One token's run of several experts, as pieces that the threads take in order: whole experts, which are read in the
// longest runs, and at the end, so that all threads end together, experts by rows: first gate and up, then down. Whoever
// ends an expert's gate and up quantizes the result for its down.
class ExpertsRun {
  public:
    ExpertsRun(const float* x, const Expert* const* experts, int64_t count, bool exact) : x_(x) {
        static thread_local Scratch floats;
        static thread_local std::deque<Progress> progress;  // keeps the buffers, and their places
        static thread_local std::vector<Piece> pieces;
        while (int64_t(progress.size()) < count) progress.emplace_back();
        pieces.clear();
        progress_ = &progress;
        pieces_ = &pieces;
        int64_t width = 0;
        for (int64_t e = 0; e < count; ++e) width = std::max(width, experts[e]->gate->rows);
        float* memory = floats.get<float>(2 * count * width);
        for (int64_t e = 0; e < count; ++e) {
            for (const Matrix* m : {experts[e]->gate, experts[e]->up}) prepared_.prepare(*m, x, nullptr, 1, exact);
            progress[e].start(*experts[e], memory + 2 * e * width, memory + (2 * e + 1) * width, exact);
        }
        const int64_t threads = Pool::get().size(), whole = (count - 1) / threads * threads;
        for (int64_t e = 0; e < whole; ++e) pieces.push_back({e, {0, experts[e]->gate->rows}, {0, experts[e]->down->rows}});
        for (int64_t e = whole; e < count; ++e)
            progress[e].unfinished = cut(*experts[e]->gate, 2, [&](Rows rows) { pieces.push_back({e, rows, {}}); });
        for (int64_t e = whole; e < count; ++e) cut(*experts[e]->down, 1, [&](Rows rows) { pieces.push_back({e, {}, rows}); });
    }

    void run(float* const* outs) {
        Pool::get().each(int64_t(pieces_->size()), [&](int64_t i) {
            const Piece& piece = (*pieces_)[i];
            Progress& p = (*progress_)[piece.expert];
            if (piece.gate_and_up.count()) run_gate_and_up(p, piece.gate_and_up);
            if (piece.down.count()) run_down(p, piece.down, outs[piece.expert]);
        });
    }

  private:
    static constexpr int64_t READY = -1;

    struct Rows {
        int64_t begin, end;
        int64_t count() const { return end - begin; }
    };

    struct Piece {
        int64_t expert;
        Rows gate_and_up, down;
    };

    struct Progress {
        const Expert* expert = nullptr;
        float *hidden = nullptr, *up = nullptr;  // [width]
        ActivationBuffer buffer;
        Activations quantized = {};            // hidden as down needs it; no columns if as it is
        std::atomic<int64_t> unfinished{READY};  // pieces of gate and up, then READY

        void start(const Expert& of, float* hidden_memory, float* up_memory, bool exact) {
            expert = &of;
            hidden = hidden_memory;
            up = up_memory;
            quantized = as_int8(*of.down, exact) ? buffer.shape(1, *of.down, true) : Activations{};
            unfinished = 1;
        }
    };

    // A matrix as runs of rows, for a piece that reads `matrices` like it; returns how many.
    template <class Take> static int64_t cut(const Matrix& m, int64_t matrices, const Take& take) {
        const int64_t step = round_up(PIECE_BYTES / (matrices * m.row_bytes()) + 1, ROW_GRAIN);
        for (int64_t begin = 0; begin < m.rows; begin += step) take({begin, std::min(begin + step, m.rows)});
        return (m.rows + step - 1) / step;
    }

    void run_gate_and_up(Progress& p, Rows rows) {
        const Matrix &gate = *p.expert->gate, &up = *p.expert->up;
        multiply_rows(gate, prepared_.find(gate), x_, nullptr, 1, p.hidden, 0, rows.begin, rows.end);
        multiply_rows(up, prepared_.find(up), x_, nullptr, 1, p.up, 0, rows.begin, rows.end);
        gate_columns(p.hidden, p.up, 1, gate.rows, rows.begin, rows.end);
        if (p.unfinished.fetch_sub(1) > 1) return;
        if (p.quantized.columns) kernels().matrix.quantize(p.quantized, p.hidden, nullptr, 0, 1);
        p.unfinished.store(READY);
    }

    static void run_down(Progress& p, Rows rows, float* out) {
        spin_until([&] { return p.unfinished.load() == READY; });  // the last of its gate and up is at work, if not done
        const Activations* quantized = p.quantized.columns ? &p.quantized : nullptr;
        multiply_rows(*p.expert->down, quantized, p.hidden, nullptr, 1, out, 0, rows.begin, rows.end);
    }

    const float* x_;
    Prepared prepared_;
    std::deque<Progress>* progress_;
    std::vector<Piece>* pieces_;
};

}  // namespace

// outs[e] [D] = expert e of one token x [D], not weighted.
API void moepack_run_experts(float* const* outs, const float* x, const Expert* const* experts, int64_t count, int exact) {
    ExpertsRun(x, experts, count, exact).run(outs);
}

namespace {

// out[tokens[i]] += weights[i] * expert(x[tokens[i]]) for at most TOKENS_AT_ONCE tokens.
void add_expert_part(float* out, const float* x, const int64_t* tokens, const float* weights, int64_t count, const Expert& expert, bool exact) {
    static thread_local Scratch gates, ups, results;
    static thread_local ActivationBuffer hidden_buffer;
    const Matrix& down = *expert.down;
    const int64_t width = expert.gate->rows;
    float *gate = gates.get<float>(count * width), *up = ups.get<float>(count * width), *y = results.get<float>(count * down.rows);
    const MatrixKernels& k = kernels().matrix;
    Pool& pool = Pool::get();

    Prepared prepared;
    for (const Matrix* m : {expert.gate, expert.up}) prepared.prepare(*m, x, tokens, count, exact);
    pool.split(width, ROW_GRAIN, [&](int64_t begin, int64_t end) {
        multiply_rows(*expert.gate, prepared.find(*expert.gate), x, tokens, count, gate, width, begin, end);
        multiply_rows(*expert.up, prepared.find(*expert.up), x, tokens, count, up, width, begin, end);
        gate_columns(gate, up, count, width, begin, end);
    });
    Activations hidden = {};
    if (as_int8(down, exact)) {
        hidden = hidden_buffer.shape(count, down, false);
        pool.split(count, 1, [&](int64_t begin, int64_t end) { k.quantize(hidden, gate, nullptr, begin, end); });
    }
    pool.split(down.rows, ROW_GRAIN, [&](int64_t begin, int64_t end) {
        multiply_rows(down, hidden.columns ? &hidden : nullptr, gate, nullptr, count, y, down.rows, begin, end);
        k.add_weighted(out, y, tokens, weights, count, down.rows, begin, end);
    });
}

}  // namespace

// out [T, D]: out[tokens[i]] += weights[i] * expert(x[tokens[i]]); tokens are distinct rows of x [T, D].
API void moepack_add_expert(float* out, const float* x, const int64_t* tokens, const float* weights, int64_t count, const Expert* expert, int exact) {
    for (int64_t first = 0; first < count; first += TOKENS_AT_ONCE)
        add_expert_part(out, x, tokens + first, weights + first, std::min(count - first, TOKENS_AT_ONCE), *expert, exact);
}

// out [count, columns]: rows of a matrix in float32.
API void moepack_embed(float* out, const Matrix* m, const int64_t* rows, int64_t count) {
    Pool::get().split(count, 16, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) kernels().matrix.widen_row(*m, rows[i], out + i * m->columns);
    });
}

// Read memory with all threads, as a measure of what it delivers; the sum is returned so that nothing is left out.
API int64_t moepack_read_stream(const uint8_t* from, int64_t size_bytes) {
    std::atomic<int64_t> total{0};
    Pool::get().split(size_bytes, 4096, [&](int64_t begin, int64_t end) { total += kernels().matrix.read_stream(from + begin, end - begin); });
    return total;
}
