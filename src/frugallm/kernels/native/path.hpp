// One path: everything above compiled for one instruction set. PATH is the name of its table.
#pragma once

#include <cmath>

#include "attention.hpp"
#include "products.hpp"

namespace frugal {
namespace {

// x / sqrt(mean of squares + eps) * weight. Squares are summed in sixteen lanes, first to last, then the lanes.
void rms_norm(const float* x, const float* weight, float eps, int width, float* out) {
    v16 squares{};
    int whole = width / 16 * 16;
    for (int i = 0; i < whole; i += 16) {
        v16 v = load<v16>(x + i);
        squares = squares + v * v;
    }
    if (whole < width) {
        v16 v = first_of(x + whole, width - whole);
        squares = squares + v * v;
    }
    float factor = 1.0f / __builtin_sqrtf(sum_of(squares) / float(width) + eps);
    for (int i = 0; i < width; i++) out[i] = (x[i] * factor) * weight[i];
}

void rotate(float* head, const float* cos, const float* sin, int half) {
    float* second = head + half;
    for (int i = 0; i < half; i++) {
        float a = head[i], b = second[i];
        head[i] = a * cos[i] - b * sin[i];
        second[i] = b * cos[i] + a * sin[i];
    }
}

void gated_mul(const float* gate, const float* up, int count, int epilogue, float* out) {
    for (int i = 0; i < count; i += 16) {
        int n = count - i < 16 ? count - i : 16;
        v16 g = first_of(gate + i, n), u = first_of(up + i, n);
        v16 product = (epilogue == SILU_MUL ? silu_of(g) : gelu_of(g)) * u;
        std::memcpy(out + i, &product, 4 * n);
    }
}

void to_bf16(const float* x, int count, int padded, uint16_t* out) {
    for (int i = 0; i < padded; i += 16) store(out + i, bf16_lanes(first_of(x + i, count - i < 16 ? count - i : 16)));
}

}  // namespace

const Ops PATH = {prepare,  linear,      embed,  rms_norm,     rotate, gated_mul,
                  to_bf16, write_cache, attend, attend_chunk, join};

}  // namespace frugal
