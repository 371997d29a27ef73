// The gradients of a depthwise convolution (one filter of K x K a channel) over channels-last maps.
//
// A task is a band of a slice's rows. Of the map that a filter slides over, K rows at a time lie in float32 beside it,
// a register of channels of all pixels after another, with the border around them. The input's gradient at any stride is a
// convolution with the output's gradient, whose numbers stand `stride` apart with zeros between them.

#include "vectors.h"

namespace {

constexpr int64_t PIXELS = 4;      // neighbours that share a load of the filter
constexpr int64_t BAND = 1 << 19;  // numbers of a band, about; by the shape alone, as sums are taken band by band

struct Shape {
    int64_t slices, channels, height, width, out_height, out_width, stride_y, stride_x, padding_y, padding_x;

    int64_t parts() const { return (channels + LANES - 1) / LANES; }
    int64_t lanes(int64_t part) const { return std::min(LANES, channels - part * LANES); }

    // A register of channels of a pixel; where it has less, those of the next one follow, if any, which nobody looks at
    template <class T>
    Floats read(const T* pixel, int64_t part, bool has_next) const {
        const bool is_whole = has_next && channels >= LANES;
        return is_whole ? stream(pixel + part * LANES) : load(pixel + part * LANES, lanes(part));
    }
};

// The last K rows of a slice in float32, `stride` registers between pixels, with `margin` registers before them.
template <class T, int K>
class Rows {
    const T* slice;
    const Shape& shape;
    int64_t height, width, margin, stride, length, next;
    std::vector<Floats> values;

  public:
    Rows(
        const T* slice, const Shape& shape, int64_t height, int64_t width, int64_t margin, int64_t stride,
        int64_t room, int64_t first)
        : slice(slice), shape(shape), height(height), width(width), margin(margin), stride(stride),
          length(margin + std::max(room, width * stride)), next(std::max<int64_t>(first, 0)),
          values((K * shape.parts() + 1) * length) {}

    // Reads the rows up to this one; those K before it are forgotten.
    void read(int64_t row) {
        for (; next <= std::min(row, height - 1); next++) {
            const T* from = slice + next * width * shape.channels;
            Floats* to = &values[next % K * shape.parts() * length + margin];
            for (int64_t pixel = 0; pixel < width; pixel++)
                for (int64_t part = 0; part < shape.parts(); part++)
                    to[part * length + pixel * stride] =
                        shape.read(from + pixel * shape.channels, part, pixel < width - 1);
        }
    }

    bool holds(int64_t row) const { return row >= 0 && row < height; }

    // A register of channels of a row; of one outside the slice, zeros.
    const Floats* at(int64_t row, int64_t part) const {
        return &values[(holds(row) ? row % K * shape.parts() + part : K * shape.parts()) * length];
    }
};

template <class T, int K>
void input_gradient(const T* grad, const Floats* filters, T* grad_x, const Shape& shape, int64_t begin, int64_t end) {
    // K registers before the first pixel and some after the last are zeros
    Rows<T, K> rows(
        grad, shape, shape.out_height, shape.out_width, K, shape.stride_x, shape.width + shape.padding_x + PIXELS,
        (begin + shape.padding_y - K + 1) / shape.stride_y);
    for (int64_t y = begin; y < end; y++) {
        rows.read((y + shape.padding_y) / shape.stride_y);
        int taps[K], num_taps = 0;
        for (int i = K - 1; i >= 0; i--) {
            const int64_t above = y + shape.padding_y - i;
            if (above >= 0 && above % shape.stride_y == 0 && rows.holds(above / shape.stride_y)) taps[num_taps++] = i;
        }
        for (int64_t part = 0; part < shape.parts(); part++) {
            T* to = grad_x + y * shape.width * shape.channels + part * LANES;
            const Floats* from[K];
            for (int n = 0; n < num_taps; n++)
                from[n] = rows.at((y + shape.padding_y - taps[n]) / shape.stride_y, part) + shape.padding_x + K;
            for (int64_t x = 0; x < shape.width; x += PIXELS) {
                Floats sums[PIXELS] = {};
                for (int n = 0; n < num_taps; n++) {
                    const Floats* filter = filters + (part * K + taps[n]) * K;
                    for (int j = 0; j < K; j++)
                        for (int64_t pixel = 0; pixel < PIXELS; pixel++)
                            sums[pixel] += from[n][x + pixel - j] * filter[j];
                }
                for (int64_t pixel = 0; pixel < std::min(PIXELS, shape.width - x); pixel++)
                    store(to + (x + pixel) * shape.channels, sums[pixel], shape.lanes(part));
            }
        }
    }
}

template <class T, int K>
void weight_gradient(const T* x, const T* grad, Floats* sums, const Shape& shape, int64_t begin, int64_t end) {
    Rows<T, K> rows(
        x, shape, shape.height, shape.width, shape.padding_x, 1, (shape.out_width - 1) * shape.stride_x + K,
        begin * shape.stride_y - shape.padding_y);
    for (int64_t y = begin; y < end; y++) {
        const int64_t top = y * shape.stride_y - shape.padding_y;
        rows.read(top + K - 1);
        for (int64_t part = 0; part < shape.parts(); part++) {
            const Floats* under[K];
            for (int i = 0; i < K; i++) under[i] = rows.at(top + i, part);
            const T* from = grad + y * shape.out_width * shape.channels;
            Floats row[K * K] = {};
            for (int64_t pixel = 0; pixel < shape.out_width; pixel++) {
                const Floats value = shape.read(from + pixel * shape.channels, part, pixel < shape.out_width - 1);
#pragma GCC unroll 7
                for (int i = 0; i < K; i++)
#pragma GCC unroll 7
                    for (int j = 0; j < K; j++) row[i * K + j] += value * under[i][pixel * shape.stride_x + j];
            }
            for (int tap = 0; tap < K * K; tap++) sums[part * K * K + tap] += row[tap];
        }
    }
}

template <class T, int K>
void gradients(
    const T* x, const T* grad, const float* weight, T* grad_x, float* grad_weight, const Shape& shape, int threads) {
    const int64_t map = shape.height * shape.width * shape.channels;
    const int64_t out_map = shape.out_height * shape.out_width * shape.channels;
    const int64_t bands = std::max<int64_t>(1, std::min(shape.out_height / (2 * K), map / BAND));
    const int64_t taps = shape.parts() * K * K;
    std::vector<Floats> filters(taps), sums(grad_weight ? shape.slices * bands * taps : 0);
    for (int64_t c = 0; c < shape.channels; c++)
        for (int tap = 0; tap < K * K; tap++) filters[c / LANES * K * K + tap][c % LANES] = weight[c * K * K + tap];
#pragma omp parallel for num_threads(threads) if (shape.slices * map > SMALL)
    for (int64_t task = 0; task < shape.slices * bands; task++) {
        const int64_t slice = task / bands, band = task % bands;
        if (grad_x)
            input_gradient<T, K>(
                grad + slice * out_map, filters.data(), grad_x + slice * map, shape, shape.height * band / bands,
                shape.height * (band + 1) / bands);
        if (grad_weight)
            weight_gradient<T, K>(
                x + slice * map, grad + slice * out_map, &sums[task * taps], shape, shape.out_height * band / bands,
                shape.out_height * (band + 1) / bands);
    }
    for (int64_t c = 0; grad_weight && c < shape.channels; c++)
        for (int tap = 0; tap < K * K; tap++) {
            double sum = 0;
            for (int64_t task = 0; task < shape.slices * bands; task++)
                sum += sums[task * taps + c / LANES * K * K + tap][c % LANES];
            grad_weight[c * K * K + tap] = float(sum);
        }
}

}  // namespace

extern "C" {

// x and grad_x (B, C, H, W), grad (B, C, H', W'), weight and grad_weight (C, 1, K, K) float32, K 3 or 5, padding below
// K; grad_x and grad_weight may be null. `sizes` are those of a Shape.
void depthwise_gradients(
    int is_half, int kernel, const void* x, const void* grad, const float* weight, void* grad_x, float* grad_weight,
    const int64_t* sizes, int threads) {
    Shape shape;
    std::memcpy(&shape, sizes, sizeof shape);
    of_type(is_half, [&](auto number) {
        using T = decltype(number);
        const auto compute = kernel == 3 ? gradients<T, 3> : gradients<T, 5>;
        compute((const T*)x, (const T*)grad, weight, (T*)grad_x, grad_weight, shape, threads);
    });
}
}
