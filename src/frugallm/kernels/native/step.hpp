// A step of a whole decoder of the Llama kind. Structures are mirrored by ctypes in library.py.
#pragma once

#include "kernels.hpp"
#include "pool.hpp"

namespace frugal {

struct Layer {
    Linear qkv, output, gate_up, down;
    const float *norm, *second_norm;       // (hidden)
    const float *output_norm, *down_norm;  // of what output and down give, before it is added; null, in all layers: none
    const float *query_norm, *key_norm;    // (head) or null
    const float *cos, *sin;                // (positions, head / 2)
    int32_t window;                        // 0: none
};

struct Model {
    const Layer* layers;
    Linear embedding, head;
    const float* last_norm;
    uint16_t *keys, *values;  // (layers, blocks, heads of keys, ...): see Cache
    int32_t count, hidden, heads, key_heads, head_dim, inner, vocabulary, positions, blocks;
    int32_t activation;             // SILU_MUL or GELU_MUL
    float eps, scale, embed_scale;  // what norms add, what scores and rows of the table are multiplied by
};

struct Batch {
    const int32_t *tokens, *positions, *starts, *tables, *wanted;
    int32_t count, sequences, table_width, rows;
    float* logits;  // (rows, tiles of the head * 16)
};

enum Fault : int { FINE = 0, NO_MEMORY = 1, BAD_STARTS = 2, BAD_TOKEN = 3, BAD_POSITION = 4, BAD_BLOCK = 5, BAD_ROW = 6 };

class Stepper {
public:
    Stepper(const Ops& ops, Pool& pool, const Model& model);
    ~Stepper();
    Fault run(const Batch& batch);  // nothing is computed unless it returns FINE

private:
    struct Work;
    Work* work_;
    Pool& pool_;
};

}  // namespace frugal
