// What a block of a UNet++ decoder is given: a map at twice its size, and the channels of other maps beside it.

#include "vectors.h"

namespace {

// The next pixel's channels from one place to another; most numbers of channels fill words of sixteen bytes.
template <class T>
inline void copy(T* to, const T* from, int64_t channels) {
    constexpr int64_t WORD = 16 / sizeof(T);
    int64_t i = 0;
    for (; i + WORD <= channels; i += WORD) std::memcpy(to + i, from + i, 16);
    for (; i < channels; i++) to[i] = from[i];
}


struct Maps {
    int64_t slices, height, width, num_maps;  // height and width of the first map; the others' are twice as large
    const int64_t* channels;

    int64_t all_channels() const {
        int64_t sum = 0;
        for (int64_t map = 0; map < num_maps; map++) sum += channels[map];
        return sum;
    }
    bool is_large() const { return slices * height * width * 4 * all_channels() > SMALL; }
};

template <class T>
void join(const Maps& maps, const T* const* from, T* to, int threads) {
    const int64_t stride = maps.all_channels(), width = 2 * maps.width;
#pragma omp parallel num_threads(threads) if (maps.is_large())
    {
        const Share share(maps.slices * maps.height * 2);
        for (int64_t row = share.begin; row < share.end; row++)
            for (int64_t pixel = 0; pixel < width; pixel++) {
                T* out = to + (row * width + pixel) * stride;
                for (int64_t map = 0; map < maps.num_maps; map++) {
                    const int64_t at = map ? row * width + pixel : row / 2 * maps.width + pixel / 2;
                    const T* in = from[map] + at * maps.channels[map];
                    __builtin_prefetch(in + AHEAD);
                    copy(out, in, maps.channels[map]);
                    out += maps.channels[map];
                }
            }
    }
}

template <class T>
void split(const Maps& maps, const T* grad, T* const* to, int threads) {
    const int64_t stride = maps.all_channels(), width = 2 * maps.width, small = maps.channels[0];
#pragma omp parallel num_threads(threads) if (maps.is_large())
    {
        const Share share(maps.slices * maps.height);
        for (int64_t row = share.begin; row < share.end; row++)
            for (int64_t pixel = 0; pixel < maps.width; pixel++) {
                const int64_t corner = row * 2 * width + pixel * 2;
                const T* four[] = {
                    grad + corner * stride, grad + (corner + 1) * stride, grad + (corner + width) * stride,
                    grad + (corner + width + 1) * stride};
                T* sum = to[0] + (row * maps.width + pixel) * small;
                for (int64_t i = 0; i < small; i += LANES) {
                    const int64_t count = std::min(LANES, small - i);
                    Floats total = {};
                    for (const T* one : four) total += load(one + i, count);
                    store(sum + i, total, count);
                }
                int64_t first = small;
                for (int64_t map = 1; map < maps.num_maps; first += maps.channels[map++])
                    for (int64_t k = 0; k < 4; k++) {
                        __builtin_prefetch(four[k] + first + AHEAD);
                        const int64_t at = corner + k % 2 + k / 2 * width;
                        copy(to[map] + at * maps.channels[map], four[k] + first, maps.channels[map]);
                    }
            }
    }
}

}  // namespace

extern "C" {

// to (B, ΣC, 2 H, 2 W): every pixel of the first map (B, C0, H, W) four times, then those of the others (B, Ci, 2 H, 2 W)
void join_maps(
    int is_half, int64_t slices, int64_t height, int64_t width, int64_t num_maps, void* to,
    const int64_t* channels, const void* const* from, int threads) {
    const Maps maps{slices, height, width, num_maps, channels};
    if (is_half) join(maps, (const BFloat16* const*)from, (BFloat16*)to, threads);
    else join(maps, (const float* const*)from, (float*)to, threads);
}

// Its gradient: the sums of four pixels, and the parts.
void split_gradient(
    int is_half, int64_t slices, int64_t height, int64_t width, int64_t num_maps, const void* grad,
    const int64_t* channels, void* const* to, int threads) {
    const Maps maps{slices, height, width, num_maps, channels};
    if (is_half) split(maps, (const BFloat16*)grad, (BFloat16* const*)to, threads);
    else split(maps, (const float*)grad, (float* const*)to, threads);
}
}
