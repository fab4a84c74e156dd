// The operations with weight matrices: what is quantized when, and how the threads share it.
//
// `exact` asks for float32 arithmetic; without it, activations meet quantized weights as int8. Rows of a matrix are
// split among the threads, so every thread reads its own run of memory and no sum depends on their number.
#include <algorithm>

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

// The distinct ways in which the matrices of one call need x quantized: by bits and group size.
class Prepared {
  public:
    // Not on a worker: the buffers belong to the calling thread.
    void prepare(const float* x, int64_t tokens, const Matrix& m) {
        if (find(m)) return;
        static thread_local ActivationBuffer buffers[LIMIT];
        Activations& a = sets_[count_] = buffers[count_].shape(tokens, m, tokens == 1);
        ++count_;
        const MatrixKernels& k = kernels().matrix;
        Pool::get().split(tokens, 1, [&](int64_t begin, int64_t end) { k.quantize(a, x, nullptr, begin, end); });
    }

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

// out [tokens, out_stride] = x times rows [begin, end) of a matrix.
void multiply_rows(const Matrix& m, const float* x, int64_t tokens, const Activations* a, float* out, int64_t out_stride, int64_t begin, int64_t end) {
    const MatrixKernels& k = kernels().matrix;
    if (!a) k.float_rows(m, x, nullptr, tokens, out, out_stride, begin, end);
    else if (a->one_token) k.dot_row_walk(m, *a, out, begin, end);
    else k.dot_tile(m, *a, out, out_stride, begin, end);
}

// gate = silu(gate) * up for columns [begin, end) of [tokens, width]
void gate_columns(float* gate, const float* up, int64_t tokens, int64_t width, int64_t begin, int64_t end) {
    for (int64_t first = begin; first < tokens * width; first += width)
        kernels().floats.silu_mul(gate + first, gate + first, 0, up + first, 0, end - begin, 0, 1);
}

int64_t share(const Matrix& m, int thread, int threads) { return Pool::share(m.rows, ROW_GRAIN, thread, threads); }

}  // namespace

// outs[i] [tokens, rows of i] = x [tokens, columns] times matrix i, for matrices of the same columns.
API void moepack_linear(float* const* outs, const float* x, int64_t tokens, const Matrix* const* matrices, int64_t count, int exact) {
    Prepared prepared;
    int64_t rows = 0;
    for (int64_t i = 0; i < count; ++i) {
        if (as_int8(*matrices[i], exact)) prepared.prepare(x, tokens, *matrices[i]);
        rows += matrices[i]->rows;
    }
    // The matrices as one tall one, so that small ones do not leave a thread idle.
    Pool::get().split(rows, ROW_GRAIN, [&](int64_t begin, int64_t end) {
        int64_t first = 0;
        for (int64_t i = 0; i < count; first += matrices[i++]->rows) {
            const Matrix& m = *matrices[i];
            const int64_t from = std::max(begin - first, int64_t(0)), to = std::min(end - first, m.rows);
            if (from < to) multiply_rows(m, x, tokens, as_int8(m, exact) ? prepared.find(m) : nullptr, outs[i], m.rows, from, to);
        }
    });
}

namespace {

// Rows [begin, end) of gate and up, their product into hidden.
void run_gate_and_up(const Expert& expert, const float* x, const Prepared& prepared, float* hidden, float* up, int64_t begin, int64_t end, bool exact) {
    const Matrix &g = *expert.gate, &u = *expert.up;
    multiply_rows(g, x, 1, as_int8(g, exact) ? prepared.find(g) : nullptr, hidden, g.rows, begin, end);
    multiply_rows(u, x, 1, as_int8(u, exact) ? prepared.find(u) : nullptr, up, u.rows, begin, end);
    gate_columns(hidden, up, 1, g.rows, begin, end);
}

void run_down(const Expert& expert, const float* hidden, float* out, int64_t begin, int64_t end, bool exact) {
    static thread_local ActivationBuffer buffer;
    const Matrix& m = *expert.down;
    if (!as_int8(m, exact)) return multiply_rows(m, hidden, 1, nullptr, out, m.rows, begin, end);
    Activations a = buffer.shape(1, m, true);
    kernels().matrix.quantize(a, hidden, nullptr, 0, 1);
    multiply_rows(m, hidden, 1, &a, out, m.rows, begin, end);
}

}  // namespace

// outs[e] [D] = expert e of one token x [D], not weighted. Each thread runs as many whole experts as the others, which
// reads memory in the longest runs; those left over are shared by rows.
API void moepack_run_experts(float* const* outs, const float* x, const Expert* const* experts, int64_t count, int exact) {
    static thread_local Scratch hidden_memory, up_memory;
    Prepared prepared;
    int64_t width = 0;
    for (int64_t e = 0; e < count; ++e) {
        for (const Matrix* m : {experts[e]->gate, experts[e]->up})
            if (as_int8(*m, exact)) prepared.prepare(x, 1, *m);
        width = std::max(width, experts[e]->gate->rows);
    }
    float *hidden = hidden_memory.get<float>(count * width), *up = up_memory.get<float>(count * width);
    Pool& pool = Pool::get();
    pool.run([&](int thread, int threads) {
        const int64_t whole = count - count % threads;
        for (int64_t e = thread; e < whole; e += threads) {
            const Expert& expert = *experts[e];
            run_gate_and_up(expert, x, prepared, hidden + e * width, up + e * width, 0, expert.gate->rows, exact);
            run_down(expert, hidden + e * width, outs[e], 0, expert.down->rows, exact);
        }
        if (whole == count) return;
        for (int64_t e = whole; e < count; ++e) {
            const int64_t begin = share(*experts[e]->gate, thread, threads), end = share(*experts[e]->gate, thread + 1, threads);
            if (begin < end) run_gate_and_up(*experts[e], x, prepared, hidden + e * width, up + e * width, begin, end, exact);
        }
        pool.barrier();
        for (int64_t e = whole; e < count; ++e) {
            const int64_t begin = share(*experts[e]->down, thread, threads), end = share(*experts[e]->down, thread + 1, threads);
            if (begin < end) run_down(*experts[e], hidden + e * width, outs[e], begin, end, exact);
        }
    });
}

namespace {

// out[tokens[i]] += weights[i] * expert(x[tokens[i]]) for at most TOKENS_AT_ONCE tokens, in four phases.
void add_expert_part(float* out, const float* x, const int64_t* tokens, const float* weights, int64_t count, const Expert& expert, bool exact) {
    static thread_local Scratch gates, ups, results;
    static thread_local ActivationBuffer input_buffers[2], hidden_buffer;
    const Matrix* inputs[] = {expert.gate, expert.up};
    const Matrix& down = *expert.down;
    const int64_t width = expert.gate->rows;
    float *gate = gates.get<float>(count * width), *up = ups.get<float>(count * width), *y = results.get<float>(count * down.rows);
    float* const halves[] = {gate, up};
    Activations in[2] = {}, hidden = {};
    const bool shared = expert.gate->bits == expert.up->bits && expert.gate->group_size == expert.up->group_size;
    for (int i = 0; i < 2; ++i)
        if (as_int8(*inputs[i], exact)) in[i] = i == 1 && shared && as_int8(*inputs[0], exact) ? in[0] : input_buffers[i].shape(count, *inputs[i], false);
    const bool int8_down = as_int8(down, exact);
    if (int8_down) hidden = hidden_buffer.shape(count, down, false);

    const MatrixKernels& k = kernels().matrix;
    Pool& pool = Pool::get();
    pool.run([&](int thread, int threads) {
        const int64_t first = Pool::share(count, 1, thread, threads), last = Pool::share(count, 1, thread + 1, threads);
        for (int i = 0; i < 2; ++i)
            if (as_int8(*inputs[i], exact) && (i == 0 || in[1].q != in[0].q)) k.quantize(in[i], x, tokens, first, last);
        pool.barrier();
        const int64_t begin = share(*expert.gate, thread, threads), end = share(*expert.gate, thread + 1, threads);
        for (int i = 0; i < 2 && begin < end; ++i) {
            if (as_int8(*inputs[i], exact)) k.dot_tile(*inputs[i], in[i], halves[i], width, begin, end);
            else k.float_rows(*inputs[i], x, tokens, count, halves[i], width, begin, end);
        }
        if (begin < end) gate_columns(gate, up, count, width, begin, end);
        pool.barrier();
        if (int8_down) {
            k.quantize(hidden, gate, nullptr, first, last);
            pool.barrier();
        }
        const int64_t left = share(down, thread, threads), right = share(down, thread + 1, threads);
        if (left == right) return;
        if (int8_down) k.dot_tile(down, hidden, y, down.rows, left, right);
        else k.float_rows(down, gate, nullptr, count, y, down.rows, left, right);
        k.add_weighted(out, y, tokens, weights, count, down.rows, left, right);
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
