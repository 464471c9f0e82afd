// What the paths (one per instruction set) offer to the rest. Layouts and orders of sums: docs/kernels.md.
#pragma once

#include <cstdint>

namespace frugal {

constexpr int TILE = 16;        // output rows in a tile: one lane each
constexpr int WORDS = 16;       // of a row of inputs that lie beside each other
constexpr int BLOCK = 16;       // tokens in a block of the cache
constexpr int CHUNK = 256;      // positions whose attention is summed apart
constexpr int QUERIES = 8;      // queries that attend together
constexpr int WIDEST_HEAD = 256;

enum Kind : int32_t { INT4 = 0, INT8 = 1, BF16 = 2, F32 = 3 };
enum Number : int32_t { NONE = 0, NUM_F16 = 1, NUM_BF16 = 2, NUM_F32 = 3, NUM_INT8 = 4 };
enum Epilogue : int32_t { STORE = 0, ADD = 1, SILU_MUL = 2, GELU_MUL = 3 };

inline bool is_gated(int epilogue) { return epilogue >= SILU_MUL; }  // tiles of gate and up in turns give half as many

// One packed weight (rows, width). Mirrored by ctypes in library.py.
struct Linear {
    const uint8_t* lines;  // (tiles, lines of a tile, 64)
    const void* scales;    // (tiles, groups, 16) of scale_type
    const void* zeros;     // (tiles, groups, 16): zero points if zero_type is NUM_INT8, else minima; or null
    const float* bias;     // (tiles * 16) or null
    int32_t kind, scale_type, zero_type;
    int32_t rows, width, group, groups, tiles;
};

// Rows of activations in the form that a kind of weight reads: words of four int8 codes, two bf16 or one float32. Rows lie
// in blocks of several (see RowBlock), sixteen words of a row beside those of the next: row m of a block of M that begins at
// row r has its word k at words[r * stride + k / 16 * 16 * M + 16 * m + k % 16].
struct Inputs {
    uint32_t* words;
    float* scales;  // by group: number g of row m of that block is scales[r * group_stride + g * M + m]
    int32_t* sums;  // of the codes of a group; where weights have scales alone, times what these codes are to begin with
    int64_t stride, group_stride, rows;
};

inline int inputs_per_word(int kind) { return kind == BF16 ? 2 : kind == F32 ? 1 : 4; }
inline int inputs_per_line(int kind) { return kind == INT4 ? 8 : inputs_per_word(kind); }

// Words of a row as they lie in Inputs: whole sixteens.
inline int64_t words_of(const Linear& w) {
    return (int64_t(w.groups) * w.group / inputs_per_word(w.kind) + WORDS - 1) / WORDS * WORDS;
}

struct Query {
    const uint32_t* pairs;  // (padded head / 2): two bf16 each
    float* out;             // (head)
    int32_t position;
};

// What one chunk of positions gives a query: values are sums of weights times values, weights relative to the largest score.
struct Partial {
    float largest, total;  // -inf: nothing was seen
    float values[WIDEST_HEAD];
};

// One layer's cache of one head: block b lies at keys + b * block_stride.
struct Cache {
    uint16_t* keys;    // (padded head / 2, 16 slots, 2)
    uint16_t* values;  // (8 pairs of slots, padded head, 2)
    int64_t block_stride;
    int32_t head, padded;  // width of a head, and rounded up to 16
    int32_t window;        // positions that a token sees, its own included; 0: all
    float scale;
};

struct Ops {
    void (*prepare)(const Linear&, const float* x, int64_t x_stride, int64_t first, int64_t last, Inputs&);
    void (*linear)(const Linear&, const Inputs&, int64_t first_row, int64_t last_row, int first_tile, int last_tile,
                   float* out, int64_t out_stride, int epilogue);
    void (*embed)(const Linear&, int row, float* out);
    void (*rms_norm)(const float* x, const float* weight, float eps, int width, float* out);
    void (*rotate)(float* head, const float* cos, const float* sin, int half);
    void (*gated_mul)(const float* gate, const float* up, int count, int epilogue, float* out);
    void (*to_bf16)(const float* x, int count, int padded, uint16_t* out);
    void (*write_cache)(const Cache&, int block, int slot, const float* key, const float* value);
    // Queries of one head group of one sequence, positions ascending, at most QUERIES: all at once; or a chunk that begins at
    // a multiple of CHUNK, and what all chunks (chunks, QUERIES) give together. Both ways give the same.
    void (*attend)(const Cache&, const int32_t* table, const Query* queries, int count);
    void (*attend_chunk)(const Cache&, const int32_t* table, const Query* queries, int count, int begin, Partial* parts);
    void (*join)(const Cache&, const Query* queries, int count, const Partial* parts, int chunks);
};

extern const Ops generic_ops, avx2_ops, avx512_ops, avx512bf16_ops;

}  // namespace frugal
