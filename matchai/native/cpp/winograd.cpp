// Convolutions of 3 x 3 at stride 1 over channels-last maps by Winograd's minimal filtering, F(4 x 4, 3 x 3), in float32.
//
// Lavin and Gray, "Fast algorithms for convolutional neural networks", 2016: 36 products a pair of channels make 4 x 4
// pixels of the output, instead of 144. The polynomials are taken at 0, ±1/√2, ±√2 and infinity, where the rounding is
// twice that of the plain sum; at the usual 0, ±1, ±2 it is four times.

#include <memory>

#include "vectors.h"

namespace {

constexpr int64_t TILE = 4, PATCH = 6, POINTS = PATCH * PATCH;
constexpr float SMALLER = 0.70710678f, LARGER = 1.41421356f;  // the points 1/√2 and √2
constexpr int64_t CACHE = 1 << 18;  // numbers of a block of tiles, about: half of what is a core's own in the cache
constexpr int64_t MOST = 1 << 25;  // numbers of all threads' sums; in wide layers, of few pixels, not all take part
// rows, and registers of a row, whose sums stay in registers: 24 of AVX-512's 32, 8 of the 16 that others have
constexpr int ROWS = LANES == 16 ? 8 : 4, REGISTERS = LANES == 16 ? 3 : 2;

// 6 pixels to their 6 points
inline void of_input(const Floats (&d)[6], Floats (&v)[6]) {
    const Floats even_small = d[4] - 2.0f * d[2], odd_small = SMALLER * (d[3] - 2.0f * d[1]);
    const Floats even_large = d[4] - 0.5f * d[2], odd_large = LARGER * (d[3] - 0.5f * d[1]);
    v[0] = d[0] - 2.5f * d[2] + d[4];
    v[1] = even_small + odd_small;
    v[2] = even_small - odd_small;
    v[3] = even_large + odd_large;
    v[4] = even_large - odd_large;
    v[5] = d[1] - 2.5f * d[3] + d[5];
}

// The sums at 6 points to 4 pixels
inline void to_output(const Floats (&m)[6], Floats (&y)[4]) {
    const Floats even_small = m[1] + m[2], odd_small = SMALLER * (m[1] - m[2]);
    const Floats even_large = m[3] + m[4], odd_large = LARGER * (m[3] - m[4]);
    y[0] = m[0] + even_small + even_large;
    y[1] = odd_small + odd_large;
    y[2] = 0.5f * even_small + 2.0f * even_large;
    y[3] = 0.5f * odd_small + 2.0f * odd_large + m[5];
}

// The gradient of 4 pixels to that of the sums: `to_output` the other way
inline void of_gradient(const Floats (&g)[4], Floats (&d)[6]) {
    const Floats even_small = g[0] + 0.5f * g[2], odd_small = SMALLER * (g[1] + 0.5f * g[3]);
    const Floats even_large = g[0] + 2.0f * g[2], odd_large = LARGER * (g[1] + 2.0f * g[3]);
    d[0] = g[0];
    d[1] = even_small + odd_small;
    d[2] = even_small - odd_small;
    d[3] = even_large + odd_large;
    d[4] = even_large - odd_large;
    d[5] = g[3];
}

// 3 weights to their 6 points
inline void of_weight(const Floats (&w)[3], Floats (&u)[6]) {
    const Floats even_small = (-2.0f / 3) * w[0] - (1.0f / 3) * w[2], odd_small = (-2.0f / 3 * SMALLER) * w[1];
    const Floats even_large = (1.0f / 6) * w[0] + (1.0f / 3) * w[2], odd_large = (1.0f / 6 * LARGER) * w[1];
    u[0] = w[0];
    u[1] = even_small + odd_small;
    u[2] = even_small - odd_small;
    u[3] = even_large + odd_large;
    u[4] = even_large - odd_large;
    u[5] = w[2];
}

// The gradient of 6 points to that of 3 weights: `of_weight` the other way
inline void to_weight(const Floats (&u)[6], Floats (&w)[3]) {
    const Floats even_small = u[1] + u[2], even_large = u[3] + u[4];
    w[0] = u[0] - (2.0f / 3) * even_small + (1.0f / 6) * even_large;
    w[1] = (-2.0f / 3 * SMALLER) * (u[1] - u[2]) + (1.0f / 6 * LARGER) * (u[3] - u[4]);
    w[2] = (1.0f / 3) * (even_large - even_small) + u[5];
}

// One of the above, down the columns of what `get(i, j)` gives and along the rows of that, into `put(i, j, values)`.
template <int64_t FROM, int64_t TO, class Get, class Put>
inline void both_ways(void (*transform)(const Floats (&)[FROM], Floats (&)[TO]), Get get, Put put) {
    Floats half[TO][FROM];
#pragma GCC unroll 6
    for (int64_t j = 0; j < FROM; j++) {
        Floats column[FROM], made[TO];
#pragma GCC unroll 6
        for (int64_t i = 0; i < FROM; i++) column[i] = get(i, j);
        transform(column, made);
#pragma GCC unroll 6
        for (int64_t i = 0; i < TO; i++) half[i][j] = made[i];
    }
#pragma GCC unroll 6
    for (int64_t i = 0; i < TO; i++) {
        Floats made[TO];
        transform(half[i], made);
#pragma GCC unroll 6
        for (int64_t j = 0; j < TO; j++) put(i, j, made[j]);
    }
}

// c (ROWS x N registers) = a · b, summed over `length`, or that is added to it. The numbers of a stand `a_row` and
// `a_step` apart, the rows of b and c `b_step` and `c_row`.
template <int N>
void multiply(
    const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step, float* c, int64_t c_row,
    int64_t length, bool is_added) {
    Floats sums[ROWS][N] = {};
    for (int64_t k = 0; k < length; k++) {
        Floats right[N];
#pragma GCC unroll 3
        for (int n = 0; n < N; n++) right[n] = load(b + k * b_step + n * LANES);
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 3
            for (int n = 0; n < N; n++) sums[row][n] += right[n] * a[row * a_row + k * a_step];
    }
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 3
        for (int n = 0; n < N; n++) {
            float* to = c + row * c_row + n * LANES;
            store(to, is_added ? load(to) + sums[row][n] : sums[row][n]);
        }
}

int64_t whole(int64_t number, int64_t part) { return (number + part - 1) / part * part; }

// The product of `rows` rows, rounded up to ROWS, and `width` columns, a multiple of LANES.
void product(
    const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step, float* c, int64_t c_row,
    int64_t rows, int64_t width, int64_t length, bool is_added) {
    for (int64_t left = 0; left < width;) {
        const int64_t rest = (width - left) / LANES;
        const int64_t registers = rest == REGISTERS + 1 ? 2 : std::min<int64_t>(rest, REGISTERS);  // 4 are 2 + 2
        const auto compute = registers == 3 ? multiply<3> : registers == 2 ? multiply<2> : multiply<1>;
        for (int64_t row = 0; row < rows; row += ROWS)
            compute(a + row * a_row, a_row, a_step, b + left, b_step, c + row * c_row + left, c_row, length, is_added);
        left += registers * LANES;
    }
}

// Numbers in memory that begin at a whole register, not set to anything.
class Numbers {
    std::unique_ptr<Floats[]> registers;

  public:
    explicit Numbers(int64_t count) : registers(new Floats[count / LANES + 1]) {}
    float* data() { return (float*)registers.get(); }
};

// How a map is cut into tiles of 4 x 4 pixels.
struct Tiles {
    int64_t slices, height, width, rows = (height + TILE - 1) / TILE, columns = (width + TILE - 1) / TILE;

    int64_t count() const { return slices * rows * columns; }
    int64_t top(int64_t tile) const { return tile / columns % rows * TILE; }
    int64_t left(int64_t tile) const { return tile % columns * TILE; }
    bool holds(int64_t y, int64_t x) const { return y >= 0 && y < height && x >= 0 && x < width; }

    // the number of a pixel, given its place in the slice of this tile
    int64_t pixel(int64_t tile, int64_t y, int64_t x) const {
        return (tile / (rows * columns) * height + y) * width + x;
    }
};

// What lies at the points, (36, tiles, channels) for a block of tiles.
struct Points {
    int64_t width, step;  // numbers between tiles, and between points: a power of two would share lines of the cache
    Numbers numbers;

    Points(int64_t tiles, int64_t channels)
        : width(whole(channels, LANES)), step(whole(tiles, ROWS) * width + LANES), numbers(POINTS * step) {}

    float* at(int64_t point, int64_t tile) { return numbers.data() + point * step + tile * width; }
};

// Transforms every tile from `begin` to `end`: SIZE x SIZE pixels, which are the tile's own or one more on each side.
template <int64_t SIZE, class T>
void read(
    const T* map, const Tiles& tiles, int64_t channels, int64_t begin, int64_t end,
    void (*transform)(const Floats (&)[SIZE], Floats (&)[PATCH]), Points& points) {
    const int64_t border = (SIZE - TILE) / 2;
    for (int64_t tile = begin; tile < end; tile++) {
        const int64_t top = tiles.top(tile) - border, left = tiles.left(tile) - border;
        const bool is_inside = tiles.holds(top, left) && tiles.holds(top + SIZE - 1, left + SIZE - 1);
        for (int64_t channel = 0; channel < channels; channel += LANES) {
            const T* corner = map + tiles.pixel(tile, top, left) * channels + channel;
            const int64_t lanes = std::min(LANES, channels - channel);
            float* points_of = points.at(0, tile - begin) + channel;
            const auto keep = [=, &points](int64_t i, int64_t j, Floats values) {
                store(points_of + (i * PATCH + j) * points.step, values);
            };
            const auto take = [=, &tiles](int64_t i, int64_t j, int64_t count) {
                const T* from = corner + (i * tiles.width + j) * channels;
                // the CPU sees no pattern in six rows at once and would wait for each pixel of the next tile
                if (j >= SIZE - TILE) __builtin_prefetch(from + TILE * channels);
                return count ? load(from, count) : Floats{};
            };
            // most tiles by far: whole registers at known distances, which the compiler loads without asking
            if (is_inside && lanes == LANES)
                both_ways(transform, [=](int64_t i, int64_t j) { return take(i, j, LANES); }, keep);
            else {
                const auto take_rest = [=, &tiles](int64_t i, int64_t j) {
                    return take(i, j, is_inside || tiles.holds(top + i, left + j) ? lanes : 0);
                };
                both_ways(transform, take_rest, keep);
            }
        }
    }
}

// Transforms the sums at the points to the pixels of the tiles from `begin` to `end`.
template <class T>
void write(T* map, const Tiles& tiles, int64_t channels, int64_t begin, int64_t end, Points& points) {
    for (int64_t tile = begin; tile < end; tile++) {
        const int64_t top = tiles.top(tile), left = tiles.left(tile);
        const bool is_inside = tiles.holds(top + TILE - 1, left + TILE - 1);
        for (int64_t channel = 0; channel < channels; channel += LANES) {
            T* corner = map + tiles.pixel(tile, top, left) * channels + channel;
            const int64_t lanes = std::min(LANES, channels - channel);
            const float* sums = points.at(0, tile - begin) + channel;
            const auto sum = [=, &points](int64_t i, int64_t j) { return load(sums + (i * PATCH + j) * points.step); };
            const auto put = [=, &tiles](int64_t i, int64_t j, Floats values, int64_t count) {
                T* to = corner + (i * tiles.width + j) * channels;
                __builtin_prefetch(to + TILE * channels, 1);
                store(to, values, count);
            };
            if (is_inside && lanes == LANES)
                both_ways(to_output, sum, [=](int64_t i, int64_t j, Floats values) { put(i, j, values, LANES); });
            else
                both_ways(to_output, sum, [=, &tiles](int64_t i, int64_t j, Floats values) {
                    if (is_inside || tiles.holds(top + i, left + j)) put(i, j, values, lanes);
                });
        }
    }
}

// Tiles of a block: what the cache holds, but enough to make the weights' numbers worth their way from memory.
int64_t block_size(int64_t num_tiles, int64_t width, int64_t weights) {
    const int64_t most = std::max(CACHE, weights) / (POINTS * width);
    return std::max<int64_t>(ROWS, std::min(most, num_tiles) / ROWS * ROWS);
}

template <class T>
void convolve(
    int64_t slices, int64_t height, int64_t width, int64_t channels, int64_t filters, const T* x, const float* weight,
    T* y, int threads) {
    const Tiles tiles{slices, height, width};
    const int64_t row = whole(filters, LANES), plane = channels * row;
    Numbers points(POINTS * plane);
#pragma omp parallel num_threads(threads)
    {
        const Share own(channels), mine(tiles.count());
        for (int64_t channel = own.begin; channel < own.end; channel++)
            for (int64_t filter = 0; filter < filters; filter += LANES) {
                const auto tap = [=](int64_t i, int64_t j) {
                    const float* from = weight + ((i * 3 + j) * channels + channel) * filters + filter;
                    return load(from, std::min(LANES, filters - filter));
                };
                both_ways(of_weight, tap, [&](int64_t i, int64_t j, Floats values) {
                    store(points.data() + (i * PATCH + j) * plane + channel * row + filter, values);
                });
            }
#pragma omp barrier
        const int64_t size = block_size(mine.end - mine.begin, whole(channels, LANES) + row, POINTS * plane);
        Points patches(size, channels), sums(size, filters);
        for (int64_t begin = mine.begin; begin < mine.end; begin += size) {
            const int64_t end = std::min(begin + size, mine.end);
            read<PATCH>(x, tiles, channels, begin, end, of_input, patches);
            for (int64_t point = 0; point < POINTS; point++)
                product(
                    patches.at(point, 0), patches.width, 1, points.data() + point * plane, row, sums.at(point, 0), row,
                    end - begin, row, channels, false);
            write(y, tiles, filters, begin, end, sums);
        }
    }
}

template <class T>
void weight_gradient(
    int64_t slices, int64_t height, int64_t width, int64_t channels, int64_t filters, const T* x, const T* grad,
    float* grad_weight, int threads) {
    const Tiles tiles{slices, height, width};
    const int64_t row = whole(filters, LANES), plane = whole(channels, ROWS) * row;
    threads = int(std::clamp<int64_t>(MOST / (POINTS * plane), 1, threads));
    Numbers all(threads * POINTS * plane);
#pragma omp parallel num_threads(threads)
    {
        const Share mine(tiles.count()), own(channels);
        float* sums = all.data() + omp_get_thread_num() * POINTS * plane;
        std::fill(sums, sums + POINTS * plane, 0.0f);
        const int64_t size = block_size(mine.end - mine.begin, whole(channels, LANES) + row, POINTS * plane);
        Points patches(size, channels), grads(size, filters);
        for (int64_t begin = mine.begin; begin < mine.end; begin += size) {
            const int64_t end = std::min(begin + size, mine.end);
            read<PATCH>(x, tiles, channels, begin, end, of_input, patches);
            read<TILE>(grad, tiles, filters, begin, end, of_gradient, grads);
            for (int64_t point = 0; point < POINTS; point++)
                product(
                    patches.at(point, 0), 1, patches.width, grads.at(point, 0), row, sums + point * plane, row,
                    channels, row, end - begin, true);
        }
#pragma omp barrier
        for (int64_t channel = own.begin; channel < own.end; channel++)
            for (int64_t filter = 0; filter < filters; filter += LANES) {
                const auto sum = [&](int64_t i, int64_t j) {
                    Floats total = {};
                    for (int64_t thread = 0; thread < omp_get_num_threads(); thread++)
                        total += load(
                            all.data() + (thread * POINTS + i * PATCH + j) * plane + channel * row + filter);
                    return total;
                };
                both_ways(to_weight, sum, [=](int64_t i, int64_t j, Floats values) {
                    float* to = grad_weight + ((i * 3 + j) * channels + channel) * filters + filter;
                    store(to, values, std::min(LANES, filters - filter));
                });
            }
    }
}

}  // namespace

extern "C" {

// Of x (B, C, H, W) and weight (3, 3, C, O) float32 to y (B, O, H, W).
void winograd_convolve(
    int is_half, int64_t slices, int64_t height, int64_t width, int64_t channels, int64_t filters, const void* x,
    const float* weight, void* y, int threads) {
    of_type(is_half, [&](auto number) {
        using T = decltype(number);
        convolve(slices, height, width, channels, filters, (const T*)x, weight, (T*)y, threads);
    });
}

// The gradient of the weight (3, 3, C, O) float32, given that of the output, grad (B, O, H, W).
void winograd_weight_gradient(
    int is_half, int64_t slices, int64_t height, int64_t width, int64_t channels, int64_t filters, const void* x,
    const void* grad, float* grad_weight, int threads) {
    of_type(is_half, [&](auto number) {
        using T = decltype(number);
        weight_gradient(
            slices, height, width, channels, filters, (const T*)x, (const T*)grad, grad_weight, threads);
    });
}
}
