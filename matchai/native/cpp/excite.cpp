// Squeeze-and-excitation (Hu et al. 2018): means over the pixels of a slice, and its channels scaled by gates.
//
// A map (B, C, H, W) in channels-last memory is seen as B slices of `rows` of `width` numbers, as in norm.cpp; means
// and gates are (B, C) float32.

#include "vectors.h"

namespace {

// out (B, C) = `factor` · Σ over a slice's pixels of `term(position)`, in blocks as in norm.cpp
template <class Term>
void sum_slices(
    int64_t slices, int64_t rows, int64_t width, int64_t channels, double factor, float* out, int threads, Term term) {
#pragma omp parallel for num_threads(threads) if (slices * rows * width > SMALL)
    for (int64_t slice = 0; slice < slices; slice++) {
        std::vector<double> sums(channels);
        Row block(width);
        float* sum = block.data();
        for (int64_t begin = 0; begin < rows; begin += BLOCK) {
            block.clear();
            for (int64_t row = begin; row < std::min(begin + BLOCK, rows); row++)
                for (int64_t i = 0; i < width; i += LANES)
                    store(sum + i, load(sum + i) + term((slice * rows + row) * width + i));
            for (int64_t at = 0; at < width; at += channels)
                for (int64_t c = 0; c < channels; c++) sums[c] += sum[at + c];
        }
        for (int64_t c = 0; c < channels; c++) out[slice * channels + c] = float(sums[c] * factor);
    }
}

Row repeated(const float* values, int64_t slices, int64_t channels, int64_t width, float factor = 1) {
    Row rows(slices * width);
    for (int64_t at = 0; at < slices * width; at += channels) {
        const float* own = values + at / width * channels;
        for (int64_t c = 0; c < channels; c++) rows.data()[at + c] = own[c] * factor;
    }
    return rows;
}

// y = work(slice, position in the map, position in a row)
template <class T, class Work>
void each(T* y, int64_t slices, int64_t rows, int64_t width, int threads, Work work) {
#pragma omp parallel num_threads(threads) if (slices * rows * width > SMALL)
    {
        const Share share(slices * rows);
        for (int64_t row = share.begin; row < share.end; row++)
            for (int64_t i = 0; i < width; i += LANES) store(y + row * width + i, work(row / rows, row * width + i, i));
    }
}

}  // namespace

extern "C" {

void excite_means(
    int is_half, int64_t slices, int64_t rows, int64_t width, int64_t channels, const void* x, float* means,
    int threads) {
    of_type(is_half, [&](auto number) {
        const auto* from = (const decltype(number)*)x;
        const double factor = double(channels) / (double(rows) * width);
        sum_slices(slices, rows, width, channels, factor, means, threads, [=](int64_t at) {
            return stream(from + at);
        });
    });
}

void excite_scale(
    int is_half, int64_t slices, int64_t rows, int64_t width, int64_t channels, const void* x, void* y,
    const float* gates, int threads) {
    const Row row = repeated(gates, slices, channels, width);
    const float* gate = row.data();
    of_type(is_half, [&](auto number) {
        using T = decltype(number);
        each((T*)y, slices, rows, width, threads, [=](int64_t slice, int64_t at, int64_t i) {
            return stream((const T*)x + at) * load(gate + slice * width + i);
        });
    });
}

// grad_gates (B, C) = Σ ∂y · x
void excite_gate_gradient(
    int is_half, int64_t slices, int64_t rows, int64_t width, int64_t channels, const void* x, const void* grad,
    float* grad_gates, int threads) {
    of_type(is_half, [&](auto number) {
        using T = decltype(number);
        sum_slices(slices, rows, width, channels, 1, grad_gates, threads, [=](int64_t at) {
            return stream((const T*)x + at) * stream((const T*)grad + at);
        });
    });
}

// ∂x = ∂y · gate + ∂mean / pixels
void excite_gradient(
    int is_half, int64_t slices, int64_t rows, int64_t width, int64_t channels, const void* grad, void* grad_x,
    const float* gates, const float* grad_means, int threads) {
    const float pixels = float(rows) * float(width) / float(channels);
    const Row gate_row = repeated(gates, slices, channels, width);
    const Row spread_row = repeated(grad_means, slices, channels, width, 1 / pixels);
    const float *gate = gate_row.data(), *spread = spread_row.data();
    of_type(is_half, [&](auto number) {
        using T = decltype(number);
        each((T*)grad_x, slices, rows, width, threads, [=](int64_t slice, int64_t at, int64_t i) {
            return stream((const T*)grad + at) * load(gate + slice * width + i) + load(spread + slice * width + i);
        });
    });
}
}
