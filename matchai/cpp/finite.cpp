// Whether numbers are finite, those of many tensors in one pass that writes nothing.

#include "vectors.h"

extern "C" {

// 1 if all numbers are finite; `tensors` of float32 hold `sizes` of them.
int are_finite(int64_t count, const int64_t* sizes, const float* const* tensors, int threads) {
    constexpr int32_t exponent = 0x7f800000;  // all its bits are set in infinities and NaNs alone
    int is_other = 0;
#pragma omp parallel num_threads(threads) reduction(| : is_other)
    for (int64_t tensor = 0; tensor < count; tensor++) {
        const Share share(sizes[tensor]);
        const float* from = tensors[tensor];
        int64_t at = share.begin;
        Ints found = {};
        for (; at + LANES <= share.end; at += LANES) found |= ((Ints)load(from + at) & exponent) == exponent;
        for (; at < share.end; at++) is_other |= !std::isfinite(from[at]);
        for (int64_t lane = 0; lane < LANES; lane++) is_other |= found[lane] != 0;
    }
    return !is_other;
}
}
