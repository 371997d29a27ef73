// The sums of matchai/losses.py and their gradient, a register of pixels at a time.
//
// Logits are (P, C), the channels of one pixel after another; targets are (P,) class indices.

#include "vectors.h"

namespace {

// log((1 + q) / (1 - q)) for |q| <= 1/3, by its series to q^15: to a unit in the last place
inline Floats log_ratio(Floats q) {
    const Floats square = q * q;
    Floats sum = fill(1.0f / 15);
    for (float coefficient : {1.0f / 13, 1.0f / 11, 1.0f / 9, 1.0f / 7, 1.0f / 5, 1.0f / 3, 1.0f})
        sum = sum * square + coefficient;
    return 2.0f * q * sum;
}

// log(1 + x) for 0 <= x <= 1
inline Floats log_one_plus(Floats x) { return log_ratio(x * reciprocal(2.0f + x)); }

// log x for x >= 1: x = 2^k m with m in 3/4..3/2
inline Floats logarithm(Floats x) {
    const Ints k = ((Ints)x - 0x3f400000) >> 23;
    const Floats m = (Floats)((Ints)x - (k << 23));
    const Floats rest = log_ratio((m - 1.0f) * reciprocal(m + 1.0f));
    const Floats value = __builtin_convertvector(k, Floats) * 0.6931471806f + rest;
    return x == x ? value : x;
}

inline Floats maximum(Floats a, Floats b) { return a < b ? b : a; }

// What is computed of a register of pixels for the sums as for their gradient.
class Pixels {
    int64_t channels;
    float gamma;

  public:
    std::vector<Floats> logits, probs;
    Floats log_sum, target_weight;  // log Σ e^z; the class weight of the target
    Ints target;                    // -1 in lanes that hold no pixel
    bool is_known = true;

    Pixels(int64_t channels, float gamma) : channels(channels), gamma(gamma), logits(channels), probs(channels) {}

    template <class T>
    void read(const T* from, const int64_t* targets, int64_t count, const float* class_weights) {
        target = Ints{} - 1;
        target_weight = Floats{};
        for (int64_t lane = 0; lane < count; lane++) {
            const int64_t index = targets[lane];
            if (index < 0 || index >= channels) {
                is_known = false;
                continue;
            }
            target[lane] = int32_t(index);
            target_weight[lane] = class_weights[index];
        }
        alignas(Floats) float numbers[LANES];
        for (int64_t c = 0; c < channels; c++) {
            for (int64_t lane = 0; lane < LANES; lane++)
                numbers[lane] = lane < count ? widened(from[lane * channels + c]) : 0.0f;
            logits[c] = load(numbers);
        }
        Floats largest = logits[0], sum = {};
        for (int64_t c = 1; c < channels; c++) largest = maximum(largest, logits[c]);
        for (int64_t c = 0; c < channels; c++) sum += probs[c] = exponential(logits[c] - largest);
        const Floats inverse = reciprocal(sum);
        for (int64_t c = 0; c < channels; c++) probs[c] *= inverse;
        log_sum = largest + logarithm(sum);
    }

    // The loss of one class against the rest, whose wrong answer has the probability σ(y): σ(y)^γ · softplus(y), and its
    // slope by y.
    void focal(Floats y, Floats& value, Floats& slope) const {
        const Floats wrong = maximum(y, Floats{}) + log_one_plus(exponential(y < 0.0f ? y : -y));
        const Floats power = exponential(gamma * (y - wrong)), chance = exponential(y - wrong);
        value = power * wrong;
        slope = power * (gamma * (1.0f - chance) * wrong + chance);
    }

  private:
    static float widened(float number) { return number; }
    static float widened(BFloat16 number) {
        const uint32_t bits = uint32_t(number.bits) << 16;
        float value;
        std::memcpy(&value, &bits, sizeof value);
        return value;
    }
};

template <class T>
bool sum_up(
    const T* logits, const int64_t* targets, int64_t num_pixels, int64_t channels, const float* class_weights,
    float gamma, double* sums, int threads) {
    const int64_t groups = (num_pixels + LANES - 1) / LANES, num_sums = 4 + 3 * channels;
    std::vector<double> all(threads * num_sums);
    int unknown = 0;
#pragma omp parallel num_threads(threads) reduction(+ : unknown) if (num_pixels * channels > SMALL)
    {
        const Share share(groups);
        double* own = all.data() + omp_get_thread_num() * num_sums;
        Pixels pixels(channels, gamma);
        std::vector<Floats> block(num_sums);
        for (int64_t group = share.begin; group < share.end; group++) {
            const int64_t first = group * LANES, count = std::min(LANES, num_pixels - first);
            pixels.read(logits + first * channels, targets + first, count, class_weights);
            block[1] += pixels.target_weight;
            for (int64_t c = 0; c < channels; c++) {
                const auto is_target = pixels.target == int32_t(c);
                const Floats z = pixels.logits[c], none = {};
                Floats value, slope;
                pixels.focal(is_target ? -z : z, value, slope);
                block[0] += is_target ? (pixels.log_sum - z) * pixels.target_weight : none;
                block[2] += pixels.target < 0 ? none : value;
                block[4 + c] += is_target ? pixels.probs[c] : none;
                block[4 + channels + c] += pixels.target < 0 ? none : pixels.probs[c];
                block[4 + 2 * channels + c] += is_target ? fill(1.0f) : none;
            }
            if ((group - share.begin) % BLOCK == BLOCK - 1 || group + 1 == share.end)
                for (int64_t i = 0; i < num_sums; i++) {
                    for (int64_t lane = 0; lane < LANES; lane++) own[i] += block[i][lane];
                    block[i] = Floats{};
                }
        }
        unknown += !pixels.is_known;
    }
    std::fill(sums, sums + num_sums, 0.0);
    for (int thread = 0; thread < threads; thread++)
        for (int64_t i = 0; i < num_sums; i++) sums[i] += all[thread * num_sums + i];
    sums[3] = double(num_pixels) * channels;
    return unknown == 0;
}

template <class T>
void gradient(
    const T* logits, const int64_t* targets, int64_t num_pixels, int64_t channels, const float* class_weights,
    float gamma, const float* slopes, T* grad, int threads) {
    const int64_t groups = (num_pixels + LANES - 1) / LANES;
    const float *by_overlap = slopes + 4, *by_size = slopes + 4 + channels;
#pragma omp parallel num_threads(threads) if (num_pixels * channels > SMALL)
    {
        const Share share(groups);
        Pixels pixels(channels, gamma);
        std::vector<float> numbers(LANES * channels);
        for (int64_t group = share.begin; group < share.end; group++) {
            const int64_t first = group * LANES, count = std::min(LANES, num_pixels - first);
            pixels.read(logits + first * channels, targets + first, count, class_weights);
            const Floats none = {};
            // ∂p_k / ∂z_c = p_k (δ_kc - p_c): what all p_k pull at z_c together, and what the target's pulls
            Floats sizes = {}, overlap = {};
            for (int64_t c = 0; c < channels; c++) {
                sizes += by_size[c] * pixels.probs[c];
                overlap += pixels.target == int32_t(c) ? by_overlap[c] * pixels.probs[c] : none;
            }
            const Floats weight = slopes[0] * pixels.target_weight;
            for (int64_t c = 0; c < channels; c++) {
                const auto is_target = pixels.target == int32_t(c);
                const Floats z = pixels.logits[c], p = pixels.probs[c];
                Floats value, slope;
                pixels.focal(is_target ? -z : z, value, slope);
                slope *= slopes[2];
                const Floats sum = p * (weight - overlap + by_size[c] - sizes) +
                                   (is_target ? overlap - weight - slope : slope);
                for (int64_t lane = 0; lane < LANES; lane++) numbers[lane * channels + c] = sum[lane];
            }
            T* to = grad + first * channels;
            for (int64_t i = 0; i < count * channels; i += LANES)
                store(to + i, load(&numbers[i]), std::min(LANES, count * channels - i));
        }
    }
}

}  // namespace

extern "C" {

// sums (4 + 3 C): Σ w_t · -log p_t, Σ w_t, the focal sum and P · C, then of every class Σ p·t, Σ p and Σ t. Returns whether
// all targets are classes.
int loss_sums(
    int is_half, int64_t num_pixels, int64_t channels, const void* logits, const int64_t* targets,
    const float* class_weights, double gamma, double* sums, int threads) {
    return of_type(is_half, [&](auto number) {
        return sum_up(
            (const decltype(number)*)logits, targets, num_pixels, channels, class_weights, float(gamma), sums, threads);
    });
}

// The gradient of the logits, given those of the sums, `slopes`.
void loss_gradient(
    int is_half, int64_t num_pixels, int64_t channels, const void* logits, const int64_t* targets,
    const float* class_weights, double gamma, const float* slopes, void* grad, int threads) {
    of_type(is_half, [&](auto number) {
        using T = decltype(number);
        gradient(
            (const T*)logits, targets, num_pixels, channels, class_weights, float(gamma), slopes, (T*)grad, threads);
    });
}
}
