// Every native operation that shares work, on several threads: the same bits as on one, and nothing for ThreadSanitizer
// to report. Built and run by test_native_sanitizers.py. Covered: one and many tokens, parts of every size, a pool
// that is resized, asleep, called from two threads at once, and forked. Prints what differs and exits 1.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "float_ops.h"
#include "matrix_ops.h"

API void moepack_set_threads(int threads);
API int moepack_threads();
API int moepack_set_isa(const char* name);

namespace {

using namespace moepack;
using Floats = std::vector<float>;

// Numbers that look random and are the same in every run.
class Chance {
  public:
    explicit Chance(uint32_t seed) : state_(seed * 2654435761u + 1) {}
    uint32_t bits() { return (state_ = state_ * 1664525u + 1013904223u) >> 8; }
    float number() { return float(bits()) / float(1 << 23) - 1; }
    Floats numbers(int64_t count) {
        Floats result(size_t(count), 0.0f);
        for (float& value : result) value = number();
        return result;
    }

  private:
    uint32_t state_;
};

// A quantized matrix; its buffers end where its rows end.
struct Weights {
    std::vector<uint8_t> data;
    std::vector<uint16_t> scales, biases;
    Matrix matrix;

    Weights(int64_t rows, int64_t columns, int32_t bits, int32_t group_size) {
        Chance chance(uint32_t(rows * 31 + columns * 7 + bits));
        data.resize(size_t(rows * columns * bits / 8));
        for (uint8_t& byte : data) byte = uint8_t(chance.bits());
        for (auto* part : {&scales, &biases}) {
            part->resize(size_t(rows * columns / group_size));
            for (uint16_t& value : *part) value = uint16_t(0x3c00 + chance.bits() % 256);  // bf16 near 0.01
        }
        matrix = {data.data(), scales.data(), biases.data(), rows, columns, bits, group_size, QUANTIZED};
    }
};

struct ExpertWeights {
    Weights gate, up, down;
    Expert expert;

    ExpertWeights(int64_t hidden, int64_t width, int32_t bits)
        : gate(width, hidden, bits, 64), up(width, hidden, bits, 64), down(hidden, width, bits, 64),
          expert{&gate.matrix, &up.matrix, &down.matrix} {}
};

constexpr int64_t HIDDEN = 512, WIDTH = 576;  // an expert of several pieces of work
const int64_t EXPERTS_AT_ONCE[] = {1, 2, 5, 9}, TOKENS[] = {1, 7, 70};

// Results of the operations, one after the other, as one long row.
class Trial {
  public:
    Trial() {
        for (int32_t bits : {4, 2, 8, 3, 4, 4, 4, 2, 4}) experts_.push_back(std::make_unique<ExpertWeights>(HIDDEN, WIDTH, bits));
        for (int64_t rows : {700, 1, 37}) matrices_.push_back(std::make_unique<Weights>(rows, HIDDEN, 4, 64));
    }

    Floats run(int rounds = 1) {
        results_.clear();
        for (int round = 0; round < rounds; ++round) {
            for (int exact : {0, 1}) run_matrices(exact);
            run_mixers();
            run_rows();
        }
        return results_;
    }

    // A single operation of two parts.
    Floats run_one() {
        const Floats x = Chance(17).numbers(HIDDEN);
        Floats out(37);
        float* const outs[] = {out.data()};
        const Matrix* const matrices[] = {&matrices_[2]->matrix};
        moepack_linear(outs, x.data(), 1, matrices, 1, 1);
        return out;
    }

  private:
    float* result(int64_t count) {
        pieces_.emplace_back(size_t(count), 0.0f);
        return pieces_.back().data();
    }

    void keep() {
        for (const Floats& piece : pieces_) results_.insert(results_.end(), piece.begin(), piece.end());
        pieces_.clear();
    }

    void run_matrices(int exact) {
        for (int64_t tokens : TOKENS) {
            const Floats x = Chance(uint32_t(tokens)).numbers(tokens * HIDDEN);
            const Matrix* const matrices[] = {&matrices_[0]->matrix, &matrices_[1]->matrix, &matrices_[2]->matrix};
            float* const outs[] = {result(tokens * 700), result(tokens), result(tokens * 37)};
            moepack_linear(outs, x.data(), tokens, matrices, 3, exact);
            keep();
        }
        const Floats x = Chance(5).numbers(HIDDEN);
        for (int64_t count : EXPERTS_AT_ONCE) {
            std::vector<const Expert*> experts;
            std::vector<float*> outs;
            for (int64_t e = 0; e < count; ++e) {
                experts.push_back(&experts_[size_t(e)]->expert);
                outs.push_back(result(HIDDEN));
            }
            moepack_run_experts(outs.data(), x.data(), experts.data(), count, exact);
            keep();
        }
        const int64_t chosen = exact ? 20 : 530;  // more than are held at once
        const Floats many = Chance(6).numbers(chosen * HIDDEN), weights = Chance(7).numbers(chosen);
        std::vector<int64_t> tokens;
        for (int64_t t = 0; t < chosen; ++t) tokens.push_back(chosen - 1 - t);
        moepack_add_expert(result(chosen * HIDDEN), many.data(), tokens.data(), weights.data(), chosen, &experts_[1]->expert, exact);
        keep();
    }

    void run_mixers() {
        constexpr int64_t heads = 8, kv_heads = 2, width = 32, places = 800;
        const Floats keys = Chance(8).numbers(kv_heads * places * width), values = Chance(9).numbers(kv_heads * places * width);
        for (int64_t tokens : TOKENS) {
            const Floats q = Chance(10).numbers(tokens * heads * width);
            moepack_attention(result(tokens * heads * width), q.data(), keys.data(), places * width, values.data(), places * width, 0,
                              tokens, heads, kv_heads, 700 + tokens, width);
            keep();
        }
        constexpr int64_t key_heads = 4, value_heads = 8, channels = (2 * key_heads + value_heads) * width, taps = 4;
        for (int64_t tokens : {1, 130}) {
            const Floats x = Chance(11).numbers(tokens * channels), kernel = Chance(12).numbers(channels * taps);
            const Floats gates = Chance(13).numbers(2 * tokens * value_heads), shares = Chance(14).numbers(2 * value_heads);
            float *mixed = result(tokens * channels), *conv_state = result((taps - 1) * channels);
            float *decay = result(tokens * value_heads), *strength = result(tokens * value_heads);
            float *out = result(tokens * value_heads * width), *state = result(value_heads * width * width);
            moepack_causal_conv(mixed, x.data(), channels, kernel.data(), conv_state, tokens, channels, taps);
            moepack_decay_and_strength(decay, strength, gates.data(), gates.data() + tokens * value_heads, shares.data(),
                                       shares.data() + value_heads, tokens, value_heads);
            moepack_gated_delta(out, mixed, channels, mixed + key_heads * width, channels, mixed + 2 * key_heads * width, channels, decay,
                                strength, state, tokens, key_heads, value_heads, width, width);
            keep();
        }
    }

    void run_rows() {
        const Floats x = Chance(15).numbers(300 * HIDDEN), weight = Chance(16).numbers(HIDDEN);
        moepack_rms_norm(result(300 * HIDDEN), x.data(), HIDDEN, weight.data(), 300, HIDDEN, 1e-6f);
        moepack_silu_mul(result(300 * HIDDEN), x.data(), HIDDEN, x.data(), HIDDEN, 300, HIDDEN);
        std::vector<int64_t> rows, ids(300 * 8);
        for (int64_t i = 0; i < 100; ++i) rows.push_back(i * 13 % 700);
        moepack_embed(result(100 * HIDDEN), &matrices_[0]->matrix, rows.data(), 100);
        moepack_choose_experts(ids.data(), result(300 * 8), x.data(), HIDDEN, 300, HIDDEN, 8);
        for (int64_t size : {1, 4096, 4097, 300000}) {
            const uint32_t sum = uint32_t(moepack_read_stream(reinterpret_cast<const uint8_t*>(x.data()), size));
            *result(1) = float(sum % 65521);  // the sum's upper half is the parts' own
        }
        for (int64_t id : ids) *result(1) = float(id);
        keep();
    }

    std::vector<std::unique_ptr<ExpertWeights>> experts_;
    std::vector<std::unique_ptr<Weights>> matrices_;
    std::vector<Floats> pieces_;
    Floats results_;
};

int failures = 0;

void check(const char* what, const Floats& found, const Floats& expected) {
    if (found.size() == expected.size() && memcmp(found.data(), expected.data(), found.size() * sizeof(float)) == 0) return;
    size_t at = 0;
    while (at < found.size() && memcmp(&found[at], &expected[at], sizeof(float)) == 0) ++at;
    printf("%s: result %zu of %zu differs from one thread's\n", what, at, expected.size());
    ++failures;
}

}  // namespace

int main(int count, char** names) {
    if (count > 1 && !moepack_set_isa(names[1])) return printf("%s: not on this processor\n", names[1]), 2;
    Trial trial, other;
    const Floats once = trial.run(), once_one = trial.run_one();
    check("one thread again", trial.run(), once);
    for (int threads : {4, 2, 3, 4, 1, 4}) {
        moepack_set_threads(threads);
        if (moepack_threads() != threads) return printf("%d threads, not %d\n", moepack_threads(), threads), 2;
        check("several threads", trial.run(), once);
    }
    for (int threads = 200; threads-- > 0;) {  // workers that come late meet the next size
        moepack_set_threads(2 + threads % 3);
        check("a pool resized at once", trial.run_one(), once_one);
    }
    usleep(200000);  // all workers are asleep
    check("after a pause", trial.run(), once);

    Floats found;
    std::thread second([&] { found = other.run(2); });
    const Floats twice = trial.run(2);
    second.join();
    check("two callers, one's results", twice, found);
    check("two callers", Floats(twice.begin(), twice.begin() + long(once.size())), once);

    fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        if (moepack_threads() != 1) return 3;
        check("a child on one thread", trial.run(), once);
        moepack_set_threads(3);
        check("a child on threads of its own", trial.run(), once);
        fflush(stdout);
        _exit(failures > 0);
    }
    int status = 0;
    check("the parent of a child at work", trial.run(), once);
    if (waitpid(child, &status, 0) != child || status) printf("the child ended with %d\n", status), ++failures;
    if (!failures) printf("%zu results\n", once.size());
    return failures > 0;
}
