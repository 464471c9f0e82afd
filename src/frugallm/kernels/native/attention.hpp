// Attention over a cache in blocks. A query's result follows from its own sequence alone: positions are summed in chunks of
// CHUNK, counted from position 0, and the chunks joined one after the other.
#pragma once

#include "vectors.hpp"

namespace frugal {
namespace {

constexpr float NOTHING = -__builtin_inff();

inline void clear(Partial& part, int padded) {
    part.largest = NOTHING, part.total = 0;
    for (int d = 0; d < padded; d += 16) store(part.values + d, v16{});
}

inline void add_chunk(Partial& all, const Partial& chunk, int padded) {
    if (!(chunk.largest > NOTHING)) return;
    if (!(all.largest > NOTHING)) {
        all.largest = chunk.largest, all.total = chunk.total;
        std::memcpy(all.values, chunk.values, sizeof(float) * padded);
        return;
    }
    float largest = all.largest > chunk.largest ? all.largest : chunk.largest;
    v16 powers = exp_of(v16{all.largest - largest, chunk.largest - largest});
    v16 before = all_lanes(powers[0]), now = all_lanes(powers[1]);
    all.total = all.total * powers[0] + chunk.total * powers[1];
    for (int d = 0; d < padded; d += 16)
        store(all.values + d, load<v16>(all.values + d) * before + load<v16>(chunk.values + d) * now);
    all.largest = largest;
}

// Scores of N queries against B blocks of keys: sums over pairs of the head's dimensions, first to last.
template <int N, int B>
inline void scores_of(const Cache& c, const int32_t* table, int left, const Query* q, float (*scores)[CHUNK], int at) {
    const uint16_t *keys[B], *later[B], *values[B];  // blocks are too small for the processor to guess what comes next
    UNROLL for (int b = 0; b < B; b++) {
        keys[b] = c.keys + table[b] * c.block_stride;
        values[b] = c.values + table[b] * c.block_stride;
        later[b] = b + B < left ? c.keys + table[b + B] * c.block_stride : values[b];
    }
    for (int lane = 0; lane < 16; lane += WIDTH) {
        vreg acc[B][N];
        UNROLL for (int b = 0; b < B; b++) {
            UNROLL for (int n = 0; n < N; n++) acc[b][n] = vreg{};
        }
        for (int k = 0; k < c.padded / 2; k++) {
            UNROLL for (int b = 0; b < B; b++) {
                __builtin_prefetch(later[b] + 32 * k);
                __builtin_prefetch(values[b] + 32 * k);
                ireg line = load<ireg>(keys[b] + 32 * k + 2 * lane);
                UNROLL for (int n = 0; n < N; n++) acc[b][n] = dot2(acc[b][n], line, q[n].pairs[k]);
            }
        }
        UNROLL for (int b = 0; b < B; b++) {
            UNROLL for (int n = 0; n < N; n++) store(scores[n] + at + 16 * b + lane, acc[b][n] * c.scale);
        }
    }
}

// Weighted sums of the values of pairs of slots, first to last, D registers of dimensions at once.
template <int N, int D>
inline void values_at(const Cache& c, const int32_t* table, int first, int last, const uint32_t (*weights)[CHUNK / 2],
                      Partial* parts, int d) {
    vreg acc[D][N];
    UNROLL for (int i = 0; i < D; i++) {
        UNROLL for (int n = 0; n < N; n++) acc[i][n] = load<vreg>(parts[n].values + d + WIDTH * i);
    }
    for (int j = first; j < last; j++) {
        const uint16_t* pair = c.values + table[j / 8] * c.block_stride + (j % 8) * 2 * c.padded + 2 * d;
        UNROLL for (int i = 0; i < D; i++) {
            ireg line = load<ireg>(pair + 2 * WIDTH * i);
            UNROLL for (int n = 0; n < N; n++) acc[i][n] = dot2(acc[i][n], line, weights[n][j]);
        }
    }
    UNROLL for (int i = 0; i < D; i++) {
        UNROLL for (int n = 0; n < N; n++) store(parts[n].values + d + WIDTH * i, acc[i][n]);
    }
}

template <int N>
inline void values_of(const Cache& c, const int32_t* table, int first, int last, const uint32_t (*weights)[CHUNK / 2],
                      Partial* parts) {
    constexpr int D = N <= 4 ? 4 : 2;
    int d = 0;
    for (; d + WIDTH * D <= c.padded; d += WIDTH * D) values_at<N, D>(c, table, first, last, weights, parts, d);
    for (; d < c.padded; d += WIDTH) values_at<N, 1>(c, table, first, last, weights, parts, d);
}

// The same for a pair whose second slot the query does not see.
inline void half_pair(const Cache& c, const int32_t* table, int j, uint32_t weight, Partial& part) {
    const uint16_t* pair = c.values + table[j / 8] * c.block_stride + (j % 8) * 2 * c.padded;
    for (int d = 0; d < c.padded; d += WIDTH) {
        ireg line = load<ireg>(pair + 2 * d) & 0xffff;
        store(part.values + d, dot2(load<vreg>(part.values + d), line, weight));
    }
}

constexpr i16 LANES = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Hide what lies in the vectors from `first` on and is outside of begin <= slot < end.
inline void hide(float* scores, int first, int count, int begin, int end) {
    for (int i = first; i < count; i += TILE) {
        i16 slot = LANES + i;
        store(scores + i, (slot >= begin) & (slot < end) ? load<v16>(scores + i) : all_lanes(NOTHING));
    }
}

// Turn scores of `count` slots, of which each query sees those below seen[n], into weights, bf16 in pairs.
template <int N>
inline void weigh(const Cache& c, float (*scores)[CHUNK], int begin, const Query* q, const int* seen, int count,
                  uint32_t (*weights)[CHUNK / 2], Partial* parts) {
    for (int n = 0; n < N; n++) {
        int hidden = c.window > 0 ? q[n].position + 1 - c.window - begin : 0;
        hide(scores[n], hidden > 0 ? 0 : seen[n] / TILE * TILE, count, hidden, seen[n]);
    }
    v16 largest[N];
    UNROLL for (int n = 0; n < N; n++) largest[n] = load<v16>(scores[n]);
    for (int i = TILE; i < count; i += TILE) {
        UNROLL for (int n = 0; n < N; n++) largest[n] = max_of(largest[n], load<v16>(scores[n] + i));
    }
    for (int n = 0; n < N; n++) {
        float top = parts[n].largest = largest_of(largest[n]);
        vreg total[PARTS] = {};
        for (int i = 0; i < count; i += TILE) {
            UNROLL for (int p = 0; p < PARTS; p++) {
                vreg weight = exp_here(load<vreg>(scores[n] + i + WIDTH * p) - top);
                ureg bits = (ureg)weight;
                bits = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;  // to bf16: what is summed is what is multiplied
                total[p] = total[p] + (vreg)bits;
                store((uint16_t*)weights[n] + i + WIDTH * p, __builtin_convertvector(bits >> 16, hreg));
            }
        }
        parts[n].total = sum_of(load<v16>(total));
    }
}

template <int N>
void chunk_of(const Cache& c, const int32_t* table, const Query* q, int begin, Partial* parts) {
    alignas(64) float scores[N][CHUNK];
    alignas(64) uint32_t weights[N][CHUNK / 2];
    const int32_t* blocks = table + begin / BLOCK;
    int last = q[N - 1].position + 1 - begin, count = ((last < CHUNK ? last : CHUNK) + BLOCK - 1) / BLOCK, b = 0;
    constexpr int AT_ONCE = N <= 4 ? 4 : 2;  // as many sums at once as registers hold, for each waits for its last
    for (; b + AT_ONCE <= count; b += AT_ONCE) scores_of<N, AT_ONCE>(c, blocks + b, count - b, q, scores, b * BLOCK);
    for (; b < count; b++) scores_of<N, 1>(c, blocks + b, count - b, q, scores, b * BLOCK);
    int seen[N];
    for (int n = 0; n < N; n++) {
        clear(parts[n], c.padded);
        seen[n] = q[n].position + 1 - begin < CHUNK ? q[n].position + 1 - begin : CHUNK;
    }
    weigh<N>(c, scores, begin, q, seen, count * BLOCK, weights, parts);
    int common = seen[0] / 2;  // positions ascend, so the first query sees least
    values_of<N>(c, blocks, 0, common, weights, parts);
    for (int n = 0; n < N; n++) {
        values_of<1>(c, blocks, common, seen[n] / 2, weights + n, parts + n);
        if (seen[n] % 2) half_pair(c, blocks, seen[n] / 2, weights[n][seen[n] / 2], parts[n]);
    }
}

void attend_chunk(const Cache& c, const int32_t* table, const Query* q, int count, int begin, Partial* parts) {
    int n = 0;
    for (; n < count && q[n].position < begin; n++) clear(parts[n], c.padded);  // they do not see the chunk
    switch (count - n) {
#define CASE(k)                                          \
    case k:                                              \
        chunk_of<k>(c, table, q + n, begin, parts + n);  \
        break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
    }
}

inline void divide(const Cache& c, const Query& q, const Partial& all) {
    for (int d = 0; d < c.head; d++) q.out[d] = all.values[d] / all.total;
}

void join(const Cache& c, const Query* q, int count, const Partial* parts, int chunks) {
    for (int n = 0; n < count; n++) {
        Partial all;
        clear(all, c.padded);
        for (int chunk = 0; chunk < chunks; chunk++) add_chunk(all, parts[chunk * QUERIES + n], c.padded);
        divide(c, q[n], all);
    }
}

void attend(const Cache& c, const int32_t* table, const Query* q, int count) {
    Partial all[QUERIES], parts[QUERIES];
    for (int n = 0; n < count; n++) clear(all[n], c.padded);
    int start = c.window > 0 && q[0].position + 1 > c.window ? q[0].position + 1 - c.window : 0;
    for (int begin = start / CHUNK * CHUNK; begin <= q[count - 1].position; begin += CHUNK) {
        attend_chunk(c, table, q, count, begin, parts);
        for (int n = 0; n < count; n++) add_chunk(all[n], parts[n], c.padded);
    }
    for (int n = 0; n < count; n++) divide(c, q[n], all[n]);
}

void write_cache(const Cache& c, int block, int slot, const float* key, const float* value) {
    uint16_t* keys = c.keys + block * c.block_stride + 2 * slot;
    uint16_t* values = c.values + block * c.block_stride + (slot / 2) * 2 * c.padded + slot % 2;
    for (int d = 0; d < c.padded; d += 16) {
        int count = c.head - d < 16 ? c.head - d : 16;
        uint16_t k[16], v[16];
        store(k, bf16_lanes(first_of(key + d, count))), store(v, bf16_lanes(first_of(value + d, count)));
        for (int i = 0; i < 16; i += 2) std::memcpy(keys + (d + i) * BLOCK, k + i, 4);
        for (int i = 0; i < 16; i++) values[2 * (d + i)] = v[i];
    }
}

}  // namespace
}  // namespace frugal
