// Products of small float32 matrices that lie in the cache: the work of the delta rule's chunks and of attention.

// Sums that are kept in registers: enough to hide the latency of a multiply-add, no more than there are.
constexpr int64_t TILE_ROWS = REGISTER == 16 ? 8 : 4;
constexpr int64_t TILE_REGISTERS = REGISTER == 16 ? 2 : 16 / REGISTER;
constexpr int64_t TILE_COLUMNS = TILE_REGISTERS * REGISTER;  // 32 or 16

// The left factor: element (m, k) at data[m * row + k * step].
struct Left {
    const float* data;
    int64_t row, step;
};

enum class Sum { START, CONTINUE };  // from zero, or from what the result holds

// Not inlined: around it, the addresses of the rows would not stay in registers.
template <Sum SUM, int64_t ROWS, int64_t REGISTERS>
static __attribute__((noinline)) void multiply_tile(float* out, int64_t out_stride, Left left, const float* right, int64_t right_stride, int64_t depth) {
    f32r sums[ROWS][REGISTERS] = {};
    if (SUM == Sum::CONTINUE)
        for (int64_t r = 0; r < ROWS; ++r)
            for (int64_t c = 0; c < REGISTERS; ++c) sums[r][c] = load_register(out + r * out_stride + c * REGISTER);
    for (int64_t k = 0; k < depth; ++k) {
        f32r row[REGISTERS];
        for (int64_t c = 0; c < REGISTERS; ++c) row[c] = load_register(right + k * right_stride + c * REGISTER);
        for (int64_t r = 0; r < ROWS; ++r)
            for (int64_t c = 0; c < REGISTERS; ++c) sums[r][c] += row[c] * left.data[r * left.row];
        left.data += left.step;
    }
    for (int64_t r = 0; r < ROWS; ++r)
        for (int64_t c = 0; c < REGISTERS; ++c) store_register(out + r * out_stride + c * REGISTER, sums[r][c]);
}

template <Sum SUM, int64_t ROWS, int64_t REGISTERS>
INLINE void multiply_rows(float* out, int64_t out_stride, Left left, const float* right, int64_t right_stride, int64_t rows, int64_t depth) {
    for (; rows >= ROWS; rows -= ROWS) {
        multiply_tile<SUM, ROWS, REGISTERS>(out, out_stride, left, right, right_stride, depth);
        out += ROWS * out_stride;
        left.data += ROWS * left.row;
    }
    if constexpr (ROWS > 1) multiply_rows<SUM, ROWS / 2, REGISTERS>(out, out_stride, left, right, right_stride, rows, depth);
}

// out [rows, columns] (+)= left [rows, depth] times right [depth, columns]; columns a multiple of 16. An element is
// summed over depth in ascending order, whatever the shape around it.
template <Sum SUM>
static void multiply(float* out, int64_t out_stride, Left left, const float* right, int64_t right_stride, int64_t rows,
                     int64_t columns, int64_t depth) {
    int64_t column = 0;
    for (; column + TILE_COLUMNS <= columns; column += TILE_COLUMNS)
        multiply_rows<SUM, TILE_ROWS, TILE_REGISTERS>(out + column, out_stride, left, right + column, right_stride, rows, depth);
    if (column < columns)
        multiply_rows<SUM, TILE_ROWS, LANES / REGISTER>(out + column, out_stride, left, right + column, right_stride, rows, depth);
}

// Copy a matrix between rows of different strides, the columns behind the width set to zero.
static void copy_padded(float* to, int64_t to_stride, const float* from, int64_t from_stride, int64_t rows, int64_t width) {
    for (int64_t i = 0; i < rows; ++i) {
        memcpy(to + i * to_stride, from + i * from_stride, size_t(width) * sizeof(float));
        for (int64_t column = width; column < to_stride; ++column) to[i * to_stride + column] = 0.0f;
    }
}

// Room taken from a buffer, piece by piece, each a whole number of cache lines. From null it only counts.
class Pieces {
  public:
    explicit Pieces(float* buffer) : buffer_(buffer) {}
    float* take(int64_t floats) {
        float* piece = buffer_ ? buffer_ + taken_ : nullptr;
        taken_ += round_up(floats, LANES);
        return piece;
    }
    int64_t taken() const { return taken_; }

  private:
    float* buffer_;
    int64_t taken_ = 0;
};
