// The plain C interface that library.py calls.
#include <cstring>

#include "step.hpp"

#define API extern "C" __attribute__((visibility("default")))

using namespace frugal;

namespace {

struct Path {
    const char* name;
    const Ops* ops;
    bool usable;
};

const Path* paths(int* count) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    static const bool vnni = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                             __builtin_cpu_supports("avx512vnni");
    static const Path all[] = {{"generic", &generic_ops, true},
                               {"avx2", &avx2_ops, avx2},
                               {"avx512", &avx512_ops, vnni},
                               {"avx512bf16", &avx512bf16_ops, vnni && __builtin_cpu_supports("avx512bf16")}};
#else
    static const Path all[] = {{"generic", &generic_ops, true}};
#endif
    *count = int(sizeof(all) / sizeof(all[0]));
    return all;
}

struct Product {
    const Ops* ops;
    const Linear* w;
    const float* x;
    int64_t x_stride;
    Inputs in;
    float* out;
    int64_t out_stride;
    int epilogue;
};

void multiply(void* context, Pool& pool, int thread) {
    Product& p = *static_cast<Product*>(context);
    Range rows = share(p.in.rows, thread, pool.size());
    p.ops->prepare(*p.w, p.x, p.x_stride, rows.first, rows.last, p.in);
    pool.barrier();
    Range tiles = share(p.w->tiles, thread, pool.size(), is_gated(p.epilogue) ? 2 : 1);
    if (tiles.first < tiles.last)
        p.ops->linear(*p.w, p.in, 0, p.in.rows, int(tiles.first), int(tiles.last), p.out, p.out_stride, p.epilogue);
}

}  // namespace

API int frugal_version() { return 2; }

// The table of a path by its name; null where it is not built or this processor lacks it.
API const Ops* frugal_path(const char* name) {
    int count;
    const Path* all = paths(&count);
    for (int i = 0; i < count; i++)
        if (std::strcmp(all[i].name, name) == 0) return all[i].usable ? all[i].ops : nullptr;
    return nullptr;
}

API Pool* frugal_pool_new(int threads) { return new Pool(threads); }
API void frugal_pool_free(Pool* pool) { delete pool; }

API Stepper* frugal_stepper_new(const Ops* ops, Pool* pool, const Model* model) { return new Stepper(*ops, *pool, *model); }
API void frugal_stepper_free(Stepper* stepper) { delete stepper; }
API int frugal_step(Stepper* stepper, const Batch* batch) { return stepper->run(*batch); }

// x (rows, x_stride), each row with zeros up to whole groups; words, scales, sums: room for the rounded rows.
API void frugal_linear(const Ops* ops, Pool* pool, const Linear* w, const float* x, int64_t x_stride, int64_t rows,
                       uint32_t* words, float* scales, int32_t* sums, float* out, int64_t out_stride, int epilogue) {
    Product p{ops, w, x, x_stride, {words, scales, sums, words_of(*w), w->groups, rows}, out, out_stride, epilogue};
    pool->run(multiply, &p);
}

API void frugal_embed(const Ops* ops, const Linear* w, const int32_t* rows, int64_t count, float* out, int64_t stride) {
    for (int64_t i = 0; i < count; i++) ops->embed(*w, rows[i], out + i * stride);
}

API void frugal_rms_norm(const Ops* ops, const float* x, const float* weight, float eps, int64_t rows, int width, float* out) {
    for (int64_t i = 0; i < rows; i++) ops->rms_norm(x + i * width, weight, eps, width, out + i * width);
}

// x (rows, 2 * half) in place; cos and sin (rows, half)
API void frugal_rotate(const Ops* ops, float* x, const float* cos, const float* sin, int64_t rows, int half) {
    for (int64_t i = 0; i < rows; i++) ops->rotate(x + i * 2 * half, cos + i * half, sin + i * half, half);
}

API void frugal_gated_mul(const Ops* ops, const float* gate, const float* up, int64_t count, int epilogue, float* out) {
    ops->gated_mul(gate, up, int(count), epilogue, out);
}

API void frugal_to_bf16(const Ops* ops, const float* x, int64_t rows, int width, int padded, uint16_t* out) {
    for (int64_t i = 0; i < rows; i++) ops->to_bf16(x + i * width, width, padded, out + i * padded);
}

// keys, values (count, head) of positions first, first + 1, ... of one sequence and one head
API void frugal_write_cache(const Ops* ops, const Cache* cache, const int32_t* table, int first, int64_t count,
                            const float* keys, const float* values) {
    for (int64_t i = 0; i < count; i++) {
        int position = first + int(i);
        ops->write_cache(*cache, table[position / BLOCK], position % BLOCK, keys + i * cache->head, values + i * cache->head);
    }
}

// queries (count, padded / 2) pairs of bf16 of one sequence, positions ascending; out (count, head)
API void frugal_attend(const Ops* ops, const Cache* cache, const int32_t* table, const uint32_t* queries,
                       const int32_t* positions, int64_t count, float* out) {
    for (int64_t i = 0; i < count; i += QUERIES) {
        Query some[QUERIES];
        int n = 0;
        for (; n < QUERIES && i + n < count; n++)
            some[n] = {queries + (i + n) * cache->padded / 2, out + (i + n) * cache->head, positions[i + n]};
        ops->attend(*cache, table, some, n);
    }
}
