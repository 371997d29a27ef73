// Batch norm and the activation after it in one: half the passes through memory of one after the other, and only the
// input is kept for the gradient, from which all else is computed again.
//
// A map (B, C, H, W) in channels-last memory is seen as `rows` of `width` numbers: the channels of as many pixels side
// by side as make whole registers. Tensors of channels have C numbers; here they are repeated to a row.

#include "vectors.h"

namespace {

enum Activation { NONE, RELU, SILU };

constexpr int64_t PILOTS = 16;  // rows

template <class T, int A>
inline Floats activate(Floats z) {
    if (A == RELU) return z < 0.0f ? Floats{} : z;  // a NaN stays one
    if (A == SILU) return z * sigmoid<T>(z);
    return z;
}

template <class T, int A>
inline Floats act_slope(Floats z) {
    if (A == RELU) return z > 0.0f ? fill(1.0f) : Floats{};
    if (A == SILU) {
        const Floats gate = sigmoid<T>(z);
        return gate + z * gate * (1.0f - gate);
    }
    return fill(1.0f);
}

// Two sums a number of a row, over all rows; `add(row, first, second)` adds a row to the float sums of a block.
template <class Add>
std::vector<double> two_sums(int64_t rows, int64_t width, int64_t channels, int threads, Add add) {
    std::vector<double> sums(threads * 2 * width);
#pragma omp parallel num_threads(threads) if (rows * width > SMALL)
    {
        const Share share(rows);
        double* own = sums.data() + omp_get_thread_num() * 2 * width;
        Row first(width), second(width);
        for (int64_t begin = share.begin; begin < share.end; begin += BLOCK) {
            first.clear();
            second.clear();
            const int64_t end = std::min(begin + BLOCK, share.end);
            for (int64_t row = begin; row < end; row++) add(row * width, first.data(), second.data());
            for (int64_t i = 0; i < width; i++) own[i] += first.data()[i], own[width + i] += second.data()[i];
        }
    }
    std::vector<double> total(2 * channels);
    for (int64_t at = 0; at < threads * 2 * width; at += channels) {
        double* both = total.data() + at / width % 2 * channels;
        for (int64_t c = 0; c < channels; c++) both[c] += sums[at + c];
    }
    return total;
}

// What turns x into its distance from the mean, and this into the slope of the activation there. Loops take the bare
// pointers of `rows`, as a vector's own would be read anew after every store.
template <class T, int A>
class Slopes {
    Row mean, scale, offset;

    static Row scale_of(const float* inverse, const float* weight, int64_t channels, int64_t width) {
        std::vector<float> scales(inverse, inverse + channels);
        for (int64_t c = 0; weight && c < channels; c++) scales[c] *= weight[c];
        return Row(scales.data(), channels, width);
    }

  public:
    struct Rows {
        const float *mean, *scale, *offset;

        Floats apart(const T* x, int64_t i) const { return stream(x + i) - load(mean + i); }
        Floats slope(Floats apart, int64_t i) const {
            return act_slope<T, A>(apart * load(scale + i) + load(offset + i));
        }
    };

    Slopes(const float* saved, const float* weight, const float* bias, int64_t channels, int64_t width)
        : mean(saved, channels, width), scale(scale_of(saved + channels, weight, channels, width)),
          offset(bias, channels, width) {}

    Rows rows() const { return {mean.data(), scale.data(), offset.data()}; }
};

template <class T>
void statistics(const T* x, int64_t rows, int64_t width, int64_t channels, double* own, int threads) {
    // about the mean of a few rows no squares of a large mean cancel, and hardly those of a few pixels far from it
    Row block(width), first(channels);
    const int64_t some = std::min(PILOTS, rows);
    const float share = float(channels) / float(some * width);
    for (int64_t n = 0; n < some; n++)
        for (int64_t i = 0, at = rows * n / some * width; i < width; i += LANES)
            store(block.data() + i, load(block.data() + i) + load(x + at + i) * share);
    for (int64_t i = 0; i < width; i++) first.data()[i % channels] += block.data()[i];
    const Row repeated(first.data(), channels, width);
    const float* pilot = repeated.data();
    const auto sums = two_sums(rows, width, channels, threads, [=](int64_t at, float* sum, float* squares) {
        for (int64_t i = 0; i < width; i += LANES) {
            const Floats value = stream(x + at + i) - load(pilot + i);
            store(sum + i, load(sum + i) + value);
            store(squares + i, load(squares + i) + value * value);
        }
    });
    const double count = double(rows) * (width / channels);
    own[0] = count;
    for (int64_t c = 0; c < channels; c++) {
        own[1 + c] = pilot[c] + sums[c] / count;
        own[1 + channels + c] = std::max(0.0, sums[channels + c] - sums[c] * sums[c] / count);
        if (sums[c] != sums[c]) own[1 + channels + c] = sums[c];  // max takes a NaN for a number
    }
}

template <class T, int A>
void transform(const T* x, T* y, int64_t rows, int64_t width, const Row& scale, const Row& offset, int threads) {
#pragma omp parallel num_threads(threads) if (rows * width > SMALL)
    {
        const Share share(rows);
        const float *scale_row = scale.data(), *offset_row = offset.data();
        for (int64_t at = share.begin * width; at < share.end * width; at += width)
            for (int64_t i = 0; i < width; i += LANES)
                store(y + at + i, activate<T, A>(stream(x + at + i) * load(scale_row + i) + load(offset_row + i)));
    }
}

template <class T, int A>
std::vector<double> gradient_sums(
    const T* x, const T* grad, int64_t rows, int64_t width, int64_t channels, const float* saved, const float* weight,
    const float* bias, int threads) {
    const Slopes<T, A> slopes(saved, weight, bias, channels, width);
    auto sums = two_sums(rows, width, channels, threads, [=, &slopes](int64_t at, float* along, float* total) {
        const auto rows = slopes.rows();
        for (int64_t i = 0; i < width; i += LANES) {
            const Floats apart = rows.apart(x + at, i), inner = stream(grad + at + i) * rows.slope(apart, i);
            store(along + i, load(along + i) + inner * apart);
            store(total + i, load(total + i) + inner);
        }
    });
    for (int64_t c = 0; c < channels; c++) sums[c] *= saved[channels + c];
    return sums;
}

template <class T, int A>
void gradient(
    const T* x, const T* grad, T* grad_x, int64_t rows, int64_t width, int64_t channels, const float* saved,
    const float* weight, const float* bias, const double* sums, double count, int threads) {
    const Slopes<T, A> slopes(saved, weight, bias, channels, width);
    std::vector<float> means(2 * channels);
    for (int64_t c = 0; c < channels; c++) {
        means[c] = float(sums[c] / count * saved[channels + c]);
        means[channels + c] = float(sums[channels + c] / count);
    }
    const Row along(means.data(), channels, width), total(means.data() + channels, channels, width);
#pragma omp parallel num_threads(threads) if (rows * width > SMALL)
    {
        const Share share(rows);
        const auto rows = slopes.rows();
        const float *along_row = along.data(), *total_row = total.data();
        for (int64_t at = share.begin * width; at < share.end * width; at += width)
            for (int64_t i = 0; i < width; i += LANES) {
                const Floats apart = rows.apart(x + at, i), inner = stream(grad + at + i) * rows.slope(apart, i);
                const Floats centred = inner - load(total_row + i) - apart * load(along_row + i);
                store(grad_x + at + i, centred * load(rows.scale + i));
            }
    }
}

// Calls `work` with a number of the type in memory and the activation as a constant.
template <class Work>
void choose(int is_half, int activation, Work work) {
    of_type(is_half, [&](auto number) {
        if (activation == RELU) work(number, std::integral_constant<int, RELU>());
        else if (activation == SILU) work(number, std::integral_constant<int, SILU>());
        else work(number, std::integral_constant<int, NONE>());
    });
}

}  // namespace

extern "C" {

// own (1 + 2 C): the number of pixels, and of every channel the mean and the sum of squared deviations.
void norm_statistics(
    int is_half, int64_t slices, int64_t rows, int64_t width, int64_t channels, const void* x, double* own,
    int threads) {
    rows *= slices;
    of_type(is_half, [&](auto number) {
        statistics((const decltype(number)*)x, rows, width, channels, own, threads);
    });
}

// y = act((x - mean) / sqrt(var + eps) · weight + bias), with the statistics of all parts (P, 1 + 2 C) merged by Chan,
// Golub and LeVeque (1983). Keeps mean and 1 / sqrt(var + eps) in saved (2, C); moves the running statistics, if any,
// by `rate`. Returns the number of pixels of all parts, and does nothing where these are less than two.
double norm_forward(
    int is_half, int64_t slices, int64_t rows, int64_t width, int64_t channels, const void* x, void* y, int activation,
    const double* parts, int64_t num_parts, const float* weight, const float* bias, double eps, double rate,
    float* running_mean, float* running_var, float* saved, int threads) {
    rows *= slices;
    const int64_t stride = 1 + 2 * channels;
    double count = 0;
    for (int64_t part = 0; part < num_parts; part++) count += parts[part * stride];
    if (count < 2) return count;
    std::vector<float> scales(channels), offsets(channels);
    for (int64_t c = 0; c < channels; c++) {
        double mean = 0, deviation = 0;
        for (int64_t part = 0; part < num_parts; part++)
            mean += parts[part * stride] * parts[part * stride + 1 + c] / count;
        for (int64_t part = 0; part < num_parts; part++) {
            const double* own = parts + part * stride;
            const double apart = own[1 + c] - mean;
            deviation += own[1 + channels + c] + own[0] * apart * apart;
        }
        const double inverse = 1 / std::sqrt(deviation / count + eps);
        saved[c] = float(mean);
        saved[channels + c] = float(inverse);
        if (running_mean) running_mean[c] += float(rate * (mean - running_mean[c]));
        if (running_var) running_var[c] += float(rate * (deviation / (count - 1) - running_var[c]));
        const double scale = (weight ? weight[c] : 1) * inverse;
        scales[c] = float(scale);
        offsets[c] = float((bias ? bias[c] : 0) - mean * scale);
    }
    const Row scale(scales.data(), channels, width), offset(offsets.data(), channels, width);
    choose(is_half, activation, [&](auto number, auto kind) {
        using T = decltype(number);
        transform<T, kind.value>((const T*)x, (T*)y, rows, width, scale, offset, threads);
    });
    return count;
}

// y = act((x - running_mean) / sqrt(running_var + eps) · weight + bias)
void norm_running(
    int is_half, int64_t slices, int64_t rows, int64_t width, int64_t channels, const void* x, void* y, int activation,
    const float* weight, const float* bias, double eps, const float* running_mean, const float* running_var,
    int threads) {
    rows *= slices;
    std::vector<float> scales(channels), offsets(channels);
    for (int64_t c = 0; c < channels; c++) {
        const double scale = (weight ? weight[c] : 1) / std::sqrt(running_var[c] + eps);
        scales[c] = float(scale);
        offsets[c] = float((bias ? bias[c] : 0) - running_mean[c] * scale);
    }
    const Row scale(scales.data(), channels, width), offset(offsets.data(), channels, width);
    choose(is_half, activation, [&](auto number, auto kind) {
        using T = decltype(number);
        transform<T, kind.value>((const T*)x, (T*)y, rows, width, scale, offset, threads);
    });
}

// With ∂z = ∂y · act'(z) and x̂ = (x - mean) / σ: own (2, C) = Σ ∂z · x̂ and Σ ∂z, the gradients of weight and bias.
void norm_gradient_sums(
    int is_half, int64_t slices, int64_t rows, int64_t width, int64_t channels, const void* x, const void* grad,
    int activation, const float* saved, const float* weight, const float* bias, double* own, int threads) {
    rows *= slices;
    choose(is_half, activation, [&](auto number, auto kind) {
        using T = decltype(number);
        const auto sums = gradient_sums<T, kind.value>(
            (const T*)x, (const T*)grad, rows, width, channels, saved, weight, bias, threads);
        std::memcpy(own, sums.data(), sums.size() * sizeof(double));
    });
}

// ∂x = weight / σ · (∂z - Σ∂z / N - x̂ · Σ(∂z · x̂) / N), with the sums (2, C) and the pixels N of all parts.
void norm_gradient(
    int is_half, int64_t slices, int64_t rows, int64_t width, int64_t channels, const void* x, const void* grad,
    void* grad_x, int activation, const float* saved, const float* weight, const float* bias, const double* sums,
    double count, int threads) {
    rows *= slices;
    choose(is_half, activation, [&](auto number, auto kind) {
        using T = decltype(number);
        gradient<T, kind.value>(
            (const T*)x, (const T*)grad, (T*)grad_x, rows, width, channels, saved, weight, bias, sums, count, threads);
    });
}
}
