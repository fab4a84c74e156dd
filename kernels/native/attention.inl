// Attention over the KV cache: a block of queries meets the context one tile of keys at a time.
//
// Queries are packed once, transposed, so that scores come out as [keys, queries] from keys as they lie, the softmax
// runs down the lanes, and the product with the values takes both as they lie. A query's row of the block is
// token * group + head: those that cannot see a key are the first rows.

constexpr int64_t SCORE_KEYS = 16;  // keys whose values are fetched while their scores are computed

// What a tile of keys gives to each row: exponents are relative to the row's largest score.
struct Partial {
    float *largest, *total;  // [rows], padded to 16
    float* mixed;            // [rows, width], the width padded to 16
    int64_t floats;

    Partial(const Attention& a, int64_t count, float* buffer) {
        Pieces pieces(buffer);
        const int64_t rows = round_up(count * a.group(), LANES);
        largest = pieces.take(rows);
        total = pieces.take(rows);
        mixed = pieces.take(count * a.group() * round_up(a.width, LANES));
        floats = pieces.taken();
    }
};

struct AttentionScratch {
    int64_t panel;   // rows of a panel: a tile's columns, fewer for few rows
    int64_t stride;  // rows in whole panels
    float* queries;  // panels, each [width, panel], scaled
    float* scores;   // [KEY_TILE, stride]
    float* keys;     // [SCORE_KEYS, width], widened from bf16
    float* values;   // [KEY_TILE, width], widened, or padded where the width is no multiple of 16
    float *running, *partial;
    int64_t floats;

    AttentionScratch(const Attention& a, int64_t count, float* buffer) {
        Pieces pieces(buffer);
        const int64_t rows = count * a.group(), width = round_up(a.width, LANES);
        panel = rows <= LANES ? LANES : TILE_COLUMNS;
        stride = round_up(rows, panel);
        queries = pieces.take(stride * a.width);
        scores = pieces.take(KEY_TILE * stride);
        keys = pieces.take(a.is_bf16 ? SCORE_KEYS * a.width : 0);
        values = pieces.take(width == a.width && !a.is_bf16 ? 0 : KEY_TILE * width);
        running = pieces.take(Partial(a, count, nullptr).floats);
        partial = pieces.take(Partial(a, count, nullptr).floats);
        floats = pieces.taken();
    }
};

static int64_t attend_partial(const Attention& a, int64_t count) { return Partial(a, count, nullptr).floats; }
static int64_t attend_scratch(const Attention& a, int64_t count) { return AttentionScratch(a, count, nullptr).floats; }

// Where a row's query or result begins.
INLINE int64_t row_offset(const Attention& a, const QueryBlock& block, int64_t row) {
    const int64_t group = a.group(), token = block.first + row / group, head = block.kv_head * group + row % group;
    return (token * a.heads + head) * a.width;
}

// Keys that a token of the call sees.
INLINE int64_t keys_seen(const Attention& a, int64_t token) { return a.context - a.tokens + token + 1; }

static void pack_queries(const Attention& a, const QueryBlock& block, const AttentionScratch& s) {
    const int64_t rows = block.count * a.group();
    const float scale = 1.0f / std::sqrt(float(a.width));
    for (int64_t row = 0; row < s.stride; ++row) {
        float* to = s.queries + row / s.panel * s.panel * a.width + row % s.panel;
        const float* from = row < rows ? a.q + row_offset(a, block, row) : nullptr;
        for (int64_t i = 0; i < a.width; ++i) to[i * s.panel] = from ? from[i] * scale : 0.0f;
    }
}

// Rows of bf16 as floats, the columns behind the width set to zero.
static void widen_padded(float* to, int64_t to_stride, const uint16_t* from, int64_t rows, int64_t width) {
    for (int64_t row = 0; row < rows; ++row, to += to_stride, from += width) {
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES) store(to + i, load_bf16(from + i));
        for (; i < width; ++i) to[i] = bf16_value(from[i]);
        for (; i < to_stride; ++i) to[i] = 0.0f;
    }
}

// Scores of `count` keys. The values of these keys, needed next, and the keys after them are fetched meanwhile.
template <class T> static void score_keys(const Attention& a, const T* keys, const T* values, int64_t count, const AttentionScratch& s) {
    for (int64_t key = 0; key < count; key += SCORE_KEYS) {
        const int64_t some = smaller(SCORE_KEYS, count - key), begin = key * a.width, end = begin + some * a.width;
        for (int64_t i = begin; i < end; i += 64 / int64_t(sizeof(T))) {
            __builtin_prefetch(keys + i + SCORE_KEYS * a.width, 0, 2);
            __builtin_prefetch(values + i, 0, 2);
        }
        const float* rows;
        if constexpr (sizeof(T) == sizeof(float)) rows = keys + begin;
        else widen_padded(s.keys, a.width, keys + begin, some, a.width), rows = s.keys;
        for (int64_t row = 0; row < s.stride; row += s.panel)
            multiply<Sum::START>(s.scores + key * s.stride + row, s.stride, {rows, a.width, 1}, s.queries + row * a.width,
                                 s.panel, some, s.panel, a.width);
    }
}

// Scores -> exponentials, in place; their largest and their sum per row. In key's row of scores the first hidden(key)
// are of queries that come before the key: exactly zero, so that no query depends on what comes after it.
template <class Hidden>
INLINE void soften(float* scores, int64_t stride, int64_t keys, const Partial& result, int64_t rows, const Hidden& hidden) {
    for (int64_t row = 0; row < rows; row += LANES) {
        for (int64_t part = row; part < row + LANES; part += REGISTER) {
            f32r best = f32r{} - 3e38f;  // finite, so that nothing is NaN in a row that sees no key of the tile
            for (int64_t key = 0; key < keys; ++key) {
                const f32r score = load_register(scores + key * stride + part);
                best = score > best ? score : best;
            }
            store_register(result.largest + part, best);
        }
        const f32x16 best = load(result.largest + row);
        f32x16 sum = {};
        for (int64_t key = 0; key < keys; ++key) {
            float* at = scores + key * stride + row;
            store(at, exp(load(at) - best));
            const int64_t lanes_hidden = smaller(hidden(key) - row, LANES);
            for (int64_t lane = 0; lane < lanes_hidden; ++lane) at[lane] = 0.0f;
            sum += load(at);
        }
        store(result.total + row, sum);
    }
}

// The queries of a block, packed, against one tile of keys, which are stored as T.
template <class T>
static void attend_stored(const Attention& a, const QueryBlock& block, int64_t tile, const Partial& result,
                          const AttentionScratch& s) {
    const int64_t first = tile * KEY_TILE, group = a.group(), rows = block.count * group;
    const int64_t count = smaller(KEY_TILE, keys_seen(a, block.first + block.count - 1) - first);
    const int64_t stride = s.stride, width = round_up(a.width, LANES);
    const T* values = (const T*)a.values + block.kv_head * a.value_head_stride + first * a.width;
    score_keys(a, (const T*)a.keys + block.kv_head * a.key_head_stride + first * a.width, values, count, s);
    const int64_t seen_by_all = keys_seen(a, block.first) - first;
    const auto hidden = [=](int64_t key) INLINE_LAMBDA { return smaller(key + 1 - seen_by_all, block.count) * group; };
    for (int64_t key = seen_by_all < 0 ? 0 : seen_by_all; key < count; ++key) {
        const int64_t rows_hidden = hidden(key);
        for (int64_t row = 0; row < rows_hidden; ++row) s.scores[key * stride + row] = -INFINITY;
    }
    soften(s.scores, stride, count, result, rows, hidden);
    const float* right = s.values;
    if constexpr (sizeof(T) != sizeof(float)) widen_padded(s.values, width, values, count, a.width);
    else if (width != a.width) copy_padded(s.values, width, values, a.width, count, a.width);
    else right = values;
    multiply<Sum::START>(result.mixed, width, {s.scores, 1, stride}, right, width, rows, width, count);
}

static void attend_packed(const Attention& a, const QueryBlock& block, int64_t tile, const Partial& result,
                          const AttentionScratch& s) {
    if (a.is_bf16) attend_stored<uint16_t>(a, block, tile, result, s);
    else attend_stored<float>(a, block, tile, result, s);
}

// Add a tile's result to the running one, both relative to their own largest score.
static void fold(const Partial& running, const Partial& partial, int64_t rows, int64_t width) {
    for (int64_t row = 0; row < rows; ++row) {
        const float old_largest = running.largest[row], new_largest = partial.largest[row];
        const float best = old_largest > new_largest ? old_largest : new_largest;
        const float old_factor = exp(splat(old_largest - best))[0], new_factor = exp(splat(new_largest - best))[0];
        running.largest[row] = best;
        running.total[row] = running.total[row] * old_factor + partial.total[row] * new_factor;
        float *to = running.mixed + row * width, *from = partial.mixed + row * width;
        for (int64_t i = 0; i < width; i += LANES) store(to + i, load(to + i) * old_factor + load(from + i) * new_factor);
    }
}

static void write_rows(const Attention& a, const QueryBlock& block, const Partial& result) {
    for (int64_t row = 0; row < block.count * a.group(); ++row) {
        const float *from = result.mixed + row * round_up(a.width, LANES), factor = 1.0f / result.total[row];
        for_columns(a.out + row_offset(a, block, row), a.width,
                    [&](const auto& read) INLINE_LAMBDA { return read(from) * factor; });
    }
}

static void attend(const Attention& a, const QueryBlock& block, float* scratch) {
    const AttentionScratch s(a, block.count, scratch);
    const Partial running(a, block.count, s.running), partial(a, block.count, s.partial);
    pack_queries(a, block, s);
    attend_packed(a, block, 0, running, s);
    for (int64_t tile = 1; tile * KEY_TILE < keys_seen(a, block.first + block.count - 1); ++tile) {
        attend_packed(a, block, tile, partial, s);
        fold(running, partial, block.count * a.group(), round_up(a.width, LANES));
    }
    write_rows(a, block, running);
}

static void attend_tile(const Attention& a, const QueryBlock& block, int64_t tile, float* partial, float* scratch) {
    const AttentionScratch s(a, block.count, scratch);
    pack_queries(a, block, s);
    attend_packed(a, block, tile, Partial(a, block.count, partial), s);
}

static void attend_fold(const Attention& a, const QueryBlock& block, float* partials, int64_t tiles) {
    const Partial running(a, block.count, partials);
    for (int64_t tile = 1; tile < tiles; ++tile)
        fold(running, Partial(a, block.count, partials + tile * running.floats), block.count * a.group(), round_up(a.width, LANES));
    write_rows(a, block, running);
}
