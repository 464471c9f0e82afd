// Weights times activations, for as many rows at once as registers hold.
#pragma once

#include "vectors.hpp"

namespace frugal {
namespace {

// Rows are computed in blocks of these sizes, the largest that fits first. A row's result is the same in each.
#if defined(__AVX512F__)
#define FRUGAL_BLOCKS(X) X(12) X(8) X(6) X(4) X(3) X(2) X(1)
constexpr int LARGEST = 12;
#else
#define FRUGAL_BLOCKS(X) X(8) X(4) X(2) X(1)
constexpr int LARGEST = 8;
#endif
constexpr int AHEAD = 4096;  // bytes of weights between what is multiplied and what is fetched: memory takes that long
constexpr bool PAIRS = LARGEST == 12;  // registers for two tiles at once
constexpr int64_t UNPACK_ROWS = 128;  // of inputs, for which codes of 4 bits are unpacked beforehand
constexpr int64_t CHUNK_BYTES = 256 << 10;  // weights that stay in the second cache while rows pass

struct RowBlock {
    int64_t first;
    int size;
};

inline int block_size(int64_t left) {
#define FITS(n) \
    if (left >= n) return n;
    FRUGAL_BLOCKS(FITS)
#undef FITS
    return 0;
}

inline RowBlock block_of(int64_t row, int64_t rows) {
    int64_t first = row / LARGEST * LARGEST;
    if (first + LARGEST <= rows) return {first, LARGEST};
    first = rows / LARGEST * LARGEST;
    for (;;) {
        int size = block_size(rows - first);
        if (row < first + size) return {first, size};
        first += size;
    }
}

// Row m's sixteen words with the number k / 16, at word k, counted from the first of row 0 in a block of M rows.
inline int64_t word_at(int64_t k, int m, int M) { return k / WORDS * WORDS * M + WORDS * m + k % WORDS; }

// Round one group to int8: largest magnitude on 127. Codes go to words from number k on; returns their sum.
inline int32_t round_group(const float* x, int group, uint32_t* words, int64_t k, int M, float* scale) {
    const int whole = group / TILE * TILE;  // most groups have no rest, and copies of a known size are one instruction
    v16 rest = whole < group ? first_of(x + whole, group - whole) : v16{}, largest = max_of(rest, -rest);
    for (int i = 0; i < whole; i += TILE) {
        v16 v = load<v16>(x + i);
        largest = max_of(largest, max_of(v, -v));
    }
    float top = largest_of(largest);
    bool nothing = top < 1e-30f;
    float inverse = nothing ? 0.0f : 127.0f / top;
    *scale = nothing ? 0.0f : top / 127.0f;
    i16 sum{};
    auto round = [&](v16 v, int i, int count) {
        i16 rounded = as_int(v * inverse + ROUND) - 0x4B400000;
        b16 bytes = __builtin_convertvector(rounded, b16);
        std::memcpy(words + word_at(k + i / 4, 0, M), &bytes, count);
        sum = sum + rounded;
    };
    for (int i = 0; i < whole; i += TILE) round(load<v16>(x + i), i, TILE);
    if (whole < group) round(rest, whole, group - whole);
    return sum_of(sum);
}

// What unsigned codes count too much for every input, if scales alone belong to them.
inline int32_t offset_of(const Linear& w) {
    const bool minima = w.zero_type != NONE && w.zero_type != NUM_INT8;
    return (w.kind == INT4 ? 8 : BYTE_OFFSET) - (minima ? (w.kind == INT4 ? 8 : 128) : 0);
}

void prepare_codes(const Linear& w, const float* x, RowBlock block, int m, Inputs& to) {
    // Copies, for whatever is stored below could be a part of these.
    const int32_t times = w.zero_type == NONE ? -offset_of(w) : 1;
    const int groups = w.groups, group = w.group, M = block.size;
    uint32_t* words = to.words + block.first * to.stride + WORDS * m;
    float* scales = to.scales + block.first * to.group_stride + m;
    int32_t* sums = to.sums + block.first * to.group_stride + m;
    for (int g = 0; g < groups; g++)
        sums[g * M] = times * round_group(x + g * group, group, words, int64_t(g) * (group / 4), M, scales + g * M);
}

void prepare(const Linear& w, const float* x, int64_t x_stride, int64_t first, int64_t last, Inputs& to) {
    for (int64_t row = first; row < last; row++) {
        const float* from = x + row * x_stride;
        RowBlock block = block_of(row, to.rows);
        int m = int(row - block.first);
        if (w.kind == INT4 || w.kind == INT8) {
            prepare_codes(w, from, block, m, to);
            continue;
        }
        uint32_t* words = to.words + block.first * to.stride;
        int64_t width = int64_t(w.groups) * w.group;
        if (w.kind == BF16)
            for (int64_t k = 0; k < width; k += 2)
                words[word_at(k / 2, m, block.size)] = bf16_of(from[k]) | uint32_t(bf16_of(from[k + 1])) << 16;
        else
            for (int64_t k = 0; k < width; k++) words[word_at(k, m, block.size)] = read<uint32_t>(from + k);
    }
}

// Add the exact sums of products of codes: T tiles, which lie `apart` bytes from each other, as many rows of each as there are
// lanes, by M rows of activations, whose words lie in one sixteen.
template <int M, int T, int KIND>
inline void add_sums(const uint8_t* line, int64_t apart, int lines, const uint32_t* x, ireg (*sum)[M]) {
    for (int l = 0; l < lines; l++, line += 64, x += KIND == INT4 ? 2 : 1) {
        ireg v[T];
        UNROLL for (int t = 0; t < T; t++) {
            __builtin_prefetch(line + t * apart + AHEAD);
            v[t] = load<ireg>(line + t * apart);
        }
        if (KIND == INT8) {
            UNROLL for (int m = 0; m < M; m++) {
                UNROLL for (int t = 0; t < T; t++) sum[t][m] = dot4(sum[t][m], v[t], x + WORDS * m);
            }
            continue;
        }
        UNROLL for (int t = 0; t < T; t++) {
            ireg low = v[t] & 0x0f0f0f0f, high = (v[t] >> 4) & 0x0f0f0f0f;
            dot8<M>(sum[t], low, high, x);
        }
    }
}

// acc[m] += (scale of the row's weights * scale of the inputs) * (exact sum of products), for one group.
template <int M>
inline void add_group(const Linear& w, int32_t offset, int64_t at, const float* scales, const int32_t* sums, ireg* sum, vreg* acc) {
    const bool minima = w.zero_type != NONE && w.zero_type != NUM_INT8;
    vreg scale = numbers<vreg>(w.scales, at, w.scale_type);
    if (w.zero_type == NUM_INT8) {
        ireg zero = __builtin_convertvector(load<breg>((const int8_t*)w.zeros + at), ireg) + offset;
        UNROLL for (int m = 0; m < M; m++) sum[m] = sum[m] - zero * sums[m];
    } else if (minima) {
        UNROLL for (int m = 0; m < M; m++) sum[m] = sum[m] - offset * sums[m];
    }
    UNROLL for (int m = 0; m < M; m++) acc[m] = acc[m] + __builtin_convertvector(sum[m], vreg) * (scale * scales[m]);
    if (minima) {
        vreg least = numbers<vreg>(w.zeros, at, w.zero_type);
        UNROLL for (int m = 0; m < M; m++) acc[m] = acc[m] + least * (float(sums[m]) * scales[m]);
    }
}

// acc[t][m]: groups from the first to the last, for T tiles, of each the rows from number `lane` on, and M rows of a block of B
// from its row `skip` on.
template <int M, int B, int T, int KIND>
inline void products_of_codes(const Linear& w, const Inputs& in, int64_t row, int skip, int tile, int lane, vreg (*acc)[M]) {
    constexpr int words = KIND == INT4 ? 2 : 1;  // of a line
    const int each = w.group / 4;
    const int64_t apart = int64_t(w.groups) * (each / words) * 64, groups = w.groups;
    const uint8_t* line = w.lines + tile * apart + 4 * lane;
    const uint32_t* x = in.words + row * in.stride + WORDS * skip;
    const float* scales = in.scales + row * in.group_stride + skip;
    const int32_t* sums = in.sums + row * in.group_stride + skip;
    UNROLL for (int t = 0; t < T; t++) {
        UNROLL for (int m = 0; m < M; m++) acc[t][m] = vreg{};
    }
    const int32_t offset = offset_of(w);
    int64_t at = tile * groups * TILE + lane;
    for (int g = 0; g < groups; g++, at += TILE, scales += B, sums += B) {
        ireg sum[T][M];
        UNROLL for (int t = 0; t < T; t++) {
            UNROLL for (int m = 0; m < M; m++) sum[t][m] = ireg{} + (w.zero_type == NONE ? sums[m] : 0);
        }
        for (int k = g * each, next; k < (g + 1) * each; k = next) {
            next = k / WORDS * WORDS + WORDS;
            next = next < (g + 1) * each ? next : (g + 1) * each;
            add_sums<M, T, KIND>(line, apart, (next - k) / words, x + word_at(k, 0, B), sum);
            line += (next - k) / words * 64;
        }
        UNROLL for (int t = 0; t < T; t++) add_group<M>(w, offset, at + t * groups * TILE, scales, sums, sum[t], acc[t]);
    }
}

// acc[m] = (sum over even lines) + (sum over odd lines), a line at a time.
template <int M, int KIND>
inline void products_of_floats(const Linear& w, const Inputs& in, int64_t row, int tile, int lane, vreg* acc) {
    const int64_t lines = int64_t(w.groups) * 2;
    const uint8_t* line = w.lines + int64_t(tile) * lines * 64 + 4 * lane;
    const uint32_t* x = in.words + row * in.stride;
    vreg odd[M];
    UNROLL for (int m = 0; m < M; m++) acc[m] = odd[m] = vreg{};
    for (int64_t l = 0; l < lines; l += 2, line += 128) {
        const uint32_t* words = x + word_at(l, 0, M);
        __builtin_prefetch(line + AHEAD), __builtin_prefetch(line + AHEAD + 64);
        ireg first = load<ireg>(line), second = load<ireg>(line + 64);
        if (KIND == BF16) {
            UNROLL for (int m = 0; m < M; m++) acc[m] = dot2(acc[m], first, words[WORDS * m]);
            UNROLL for (int m = 0; m < M; m++) odd[m] = dot2(odd[m], second, words[WORDS * m + 1]);
        } else {
            UNROLL for (int m = 0; m < M; m++) acc[m] = acc[m] + (vreg)first * read<float>(words + WORDS * m);
            UNROLL for (int m = 0; m < M; m++) odd[m] = odd[m] + (vreg)second * read<float>(words + WORDS * m + 1);
        }
    }
    UNROLL for (int m = 0; m < M; m++) acc[m] = acc[m] + odd[m];
}

inline void put(v16& out, int, v16 all) { out = all; }  // stays in its register
#if defined(EIGHT_LANES)
inline void put(v16& out, int lane, vreg some) { store((float*)&out + lane, some); }
#endif

// T tiles times M rows of a block of B from its row `skip` on.
template <int M, int B, int T, int KIND>
inline void products(const Linear& w, const Inputs& in, int64_t row, int skip, int tile, v16 (*out)[M]) {
    for (int lane = 0; lane < TILE; lane += WIDTH) {
        vreg acc[T][M];
        if constexpr (KIND == INT4 || KIND == INT8)
            products_of_codes<M, B, T, KIND>(w, in, row, skip, tile, lane, acc);
        else
            products_of_floats<M, KIND>(w, in, row, tile, lane, acc[0]);
        UNROLL for (int t = 0; t < T; t++) {
            if (w.bias != nullptr) {
                vreg bias = load<vreg>(w.bias + int64_t(tile + t) * TILE + lane);
                UNROLL for (int m = 0; m < M; m++) acc[t][m] = acc[t][m] + bias;
            }
            UNROLL for (int m = 0; m < M; m++) put(out[t][m], lane, acc[t][m]);
        }
    }
}

template <int M>
inline void put_rows(const v16* rows, float* to, int64_t stride, int epilogue) {
    for (int m = 0; m < M; m++, to += stride) store(to, epilogue == ADD ? load<v16>(to) + rows[m] : rows[m]);
}

template <int M>
inline void put_gated(const v16* gate, const v16* up, float* to, int64_t stride) {
    for (int m = 0; m < M; m++, to += stride) store(to, silu_of(gate[m]) * up[m]);
}

template <int M, int KIND>
void row_block(const Linear& w, const Inputs& in, int64_t row, int first, int last, float* to, int64_t stride, int epilogue) {
    int tile = first;
    if constexpr (PAIRS && M == LARGEST && KIND == INT8) {  // an input is fetched once for two tiles
        constexpr int HALF = M / 2;
        for (; tile + 2 <= last; tile += 2, to += epilogue == SILU_MUL ? TILE : 2 * TILE) {
            for (int skip = 0; skip < M; skip += HALF) {
                v16 two[2][HALF];
                float* place = to + skip * stride;
                products<HALF, M, 2, KIND>(w, in, row, skip, tile, two);
                if (epilogue == SILU_MUL) {
                    put_gated<HALF>(two[0], two[1], place, stride);
                    continue;
                }
                put_rows<HALF>(two[0], place, stride, epilogue);
                put_rows<HALF>(two[1], place + TILE, stride, epilogue);
            }
        }
    }
    for (; tile < last; to += TILE) {
        v16 one[1][M], up[1][M];
        products<M, M, 1, KIND>(w, in, row, 0, tile++, one);
        if (epilogue == SILU_MUL) {  // even tiles hold the gate, odd ones what it multiplies
            products<M, M, 1, KIND>(w, in, row, 0, tile++, up);
            put_gated<M>(one[0], up[0], to, stride);
        } else {
            put_rows<M>(one[0], to, stride, epilogue);
        }
    }
}

template <int KIND>
inline void block_of_any_size(const Linear& w, const Inputs& in, RowBlock block, int first, int last, float* to, int64_t stride,
                              int epilogue) {
    switch (block.size) {
#define CASE(n)                                                                  \
    case n:                                                                      \
        row_block<n, KIND>(w, in, block.first, first, last, to, stride, epilogue); \
        break;
        FRUGAL_BLOCKS(CASE)
#undef CASE
    }
}

// GELU of a block's gates times up, which are stored first: within row_block it would take registers from all other models.
template <int KIND>
void gelu_block(const Linear& w, const Inputs& in, RowBlock block, int first, int last, float* to, int64_t stride) {
    alignas(64) float both[LARGEST * 2 * TILE];
    for (int tile = first; tile < last; tile += 2, to += TILE) {
        block_of_any_size<KIND>(w, in, block, tile, tile + 2, both, 2 * TILE, STORE);
        for (int m = 0; m < block.size; m++) {
            const float* gate = both + m * 2 * TILE;
            store(to + m * stride, gelu_of(load<v16>(gate)) * load<v16>(gate + TILE));
        }
    }
}

template <int KIND>
void rows_and_tiles(const Linear& w, const Inputs& in, int64_t first_row, int64_t last_row, int first, int last, float* out,
                    int64_t stride, int epilogue) {
    int64_t tile_bytes = int64_t(w.groups) * w.group / inputs_per_line(KIND) * 64;
    int step = int(CHUNK_BYTES / tile_bytes) / 2 * 2;
    step = step < 2 ? 2 : step;
    for (int tile = first; tile < last; tile += step) {
        int end = tile + step < last ? tile + step : last;
        for (int64_t row = first_row; row < last_row;) {
            RowBlock block = block_of(row, in.rows);
            float* to = out + row * stride + int64_t(tile) * TILE / (is_gated(epilogue) ? 2 : 1);
            if (epilogue == GELU_MUL)
                gelu_block<KIND>(w, in, block, tile, end, to, stride);
            else
                block_of_any_size<KIND>(w, in, block, tile, end, to, stride, epilogue);
            row += block.size;
        }
    }
}

// Codes of 4 bits as those of 8, once for many rows of inputs: shifts and masks are in the way of products.
void unpack_and_multiply(const Linear& w, const Inputs& in, int64_t first_row, int64_t last_row, int first, int last, float* out,
                         int64_t stride, int epilogue) {
    const int64_t tile_bytes = int64_t(w.groups) * w.group * TILE;
    const int step = int(CHUNK_BYTES / tile_bytes) / 2 * 2;
    if (last_row - first_row < UNPACK_ROWS || step == 0)
        return rows_and_tiles<INT4>(w, in, first_row, last_row, first, last, out, stride, epilogue);
    alignas(64) static thread_local uint8_t codes[CHUNK_BYTES];
    for (int tile = first; tile < last; tile += step) {
        int end = tile + step < last ? tile + step : last;
        const uint8_t* line = w.lines + tile * tile_bytes / 2;
        for (uint8_t* to = codes; to < codes + (end - tile) * tile_bytes; to += 128, line += 64) {
            i16 v = load<i16>(line);
            store(to, v & 0x0f0f0f0f), store(to + 64, (v >> 4) & 0x0f0f0f0f);
        }
        Linear wide = w;  // still of 4 bits: what codes count too much is that of these
        wide.lines = codes - tile * tile_bytes;
        rows_and_tiles<INT8>(wide, in, first_row, last_row, tile, end, out, stride, epilogue);
    }
}

// Rows first_row to last_row, which begin and end with a block, times the weights of some tiles.
void linear(const Linear& w, const Inputs& in, int64_t first_row, int64_t last_row, int first, int last, float* out,
            int64_t stride, int epilogue) {
    auto run = w.kind == INT4   ? (PAIRS ? unpack_and_multiply : rows_and_tiles<INT4>)
               : w.kind == INT8 ? rows_and_tiles<INT8>
               : w.kind == BF16 ? rows_and_tiles<BF16>
                                : rows_and_tiles<F32>;
    run(w, in, first_row, last_row, first, last, out, stride, epilogue);
}

// One row of a packed weight as floats: what a token is embedded as.
void embed(const Linear& w, int row, float* out) {
    const int per_line = inputs_per_line(w.kind), tile = row / TILE, lane = row % TILE;
    const int64_t padded = int64_t(w.groups) * w.group;
    const uint8_t* base = w.lines + int64_t(tile) * (padded / per_line) * 64 + 4 * lane;
    if (w.kind == F32 || w.kind == BF16) {
        for (int k = 0; k < w.width; k++) {
            const uint8_t* at = base + int64_t(k / per_line) * 64;
            uint32_t bits = w.kind == F32 ? read<uint32_t>(at) : uint32_t(read<uint16_t>(at + 2 * (k % 2))) << 16;
            out[k] = read<float>(&bits);
        }
        return;
    }
    for (int g = 0; g < w.groups; g++) {
        int64_t number = (int64_t(tile) * w.groups + g) * TILE + lane;
        float scale = number_at(w.scales, number, w.scale_type), least = 0;
        int zero = w.kind == INT4 ? 8 : 128;
        if (w.zero_type == NUM_INT8)
            zero += ((const int8_t*)w.zeros)[number];
        else if (w.zero_type != NONE)
            zero = 0, least = number_at(w.zeros, number, w.zero_type);
        int end = (g + 1) * w.group < w.width ? (g + 1) * w.group : w.width;
        for (int k = g * w.group; k < end; k++) {
            uint8_t byte = base[int64_t(k / per_line) * 64 + k % 4];
            int code = w.kind == INT8 ? byte : k % 8 < 4 ? byte & 15 : byte >> 4;
            out[k] = scale * float(code - zero) + least;
        }
    }
}

}  // namespace
}  // namespace frugal
