// A register of numbers at a time: float32 there, float32 or bfloat16 in memory; and how threads share rows.
//
// GCC's and Clang's vector extensions, which the compiler turns into what the CPU has. All sums are taken in an order
// that depends on nothing but the shapes and the number of threads, so a result repeats its bits.

#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

// numbers in a register; vectors that are longer than these would be taken apart one number at a time
#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#elif defined(__AVX2__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif
constexpr int64_t BLOCK = 64;     // rows that are summed in float before their sum goes into a double
constexpr int64_t SMALL = 16384;  // numbers, below which waking a second thread takes longer than it saves
constexpr int64_t AHEAD = 1024;   // numbers between what is loaded and what is fetched into the cache

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

struct BFloat16 {
    uint16_t bits;
};

inline Floats fill(float value) { return Floats{} + value; }

inline Floats load(const float* from) {
    Floats values;
    std::memcpy(&values, from, sizeof values);
    return values;
}

// bfloat16 is the upper half of a float32
inline Floats widen(Halves halves) {
#ifdef __AVX512F__
    const auto words = (Words)_mm512_cvtepu16_epi32((__m256i)halves);  // GCC 12's own way takes five instructions
#else
    const Words words = __builtin_convertvector(halves, Words);
#endif
    return (Floats)(words << 16);
}

inline Floats load(const BFloat16* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return widen(halves);
}

// Loads, and asks for what lies AHEAD: the CPU's own prefetching ends at each page and loses count over several maps. By
// it the gradients in norm.cpp take half as long.
template <class T>
inline Floats stream(const T* from) {
    __builtin_prefetch(from + AHEAD);
    return load(from);
}

inline void store(float* to, Floats values) { std::memcpy(to, &values, sizeof values); }

inline void store(BFloat16* to, Floats values) {
#ifdef __AVX512BF16__
    const __m256bh halves = _mm512_cvtneps_pbh((__m512)values);
#else
    const Words words = (Words)values;
    const Words nearest = words + 0x7fffu + ((words >> 16) & 1u);  // ties to even
    const Words quiet = Words{} + 0x7fc00000u;                     // adding to a NaN's bits might make it a number
    const Halves halves = __builtin_convertvector((values == values ? nearest : quiet) >> 16, Halves);
#endif
    std::memcpy(to, &halves, sizeof halves);
}

// The first `count` lanes alone, the others 0. Channels are multiples of eight in most networks.
template <class T>
inline Floats load(const T* from, int64_t count) {
    if (count == LANES) return load(from);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    const __mmask16 lanes = __mmask16((1u << count) - 1);  // by way of memory, the CPU would wait for what it stored
    if constexpr (sizeof(T) == sizeof(float)) return (Floats)_mm512_maskz_loadu_ps(lanes, from);
    else return widen((Halves)_mm256_maskz_loadu_epi16(lanes, from));
#else
    T values[LANES] = {};
    std::memcpy(values, from, count * sizeof(T));
    return load(values);
#endif
}

template <class T>
inline void store(T* to, Floats values, int64_t count) {
    if (count == LANES) return store(to, values);
    T rest[LANES];
    store(rest, values);
    if (count == LANES / 2) std::memcpy(to, rest, LANES / 2 * sizeof(T));  // two instructions, not a call
    else std::memcpy(to, rest, count * sizeof(T));
}

inline Floats reciprocal(Floats values) {
#ifdef __AVX512F__
    const Floats near = (Floats)_mm512_rcp14_ps((__m512)values);  // 14 bits; Newton's step makes them 24
    return near * (2.0f - values * near);
#else
    return 1.0f / values;
#endif
}

// A NaN stays one.
inline Floats within(Floats x, float least, float most) {
#ifdef __AVX512F__
    // GCC 12 takes two instructions for either of the below
    return (Floats)_mm512_max_ps((__m512)fill(least), _mm512_min_ps((__m512)fill(most), (__m512)x));
#else
    x = x > most ? fill(most) : x;
    return x < least ? fill(least) : x;
#endif
}

// e^x to 2 units in the last place: x = k ln 2 + r, with the Taylor polynomial of degree 7 in |r| < 0.35.
inline Floats exponential(Floats x) {
    x = within(x, -87.0f, 88.0f);
    const float shift = 12582912.0f;  // 1.5 · 2^23: adding it rounds to a whole number, which lies in the low bits
    const Floats shifted = x * 1.442695041f + shift;
    const Floats k = shifted - shift;
    const Floats r = (x - k * 0.693359375f) + k * 2.1219444e-4f;  // ln 2 in two parts, the first exact in few bits
    Floats sum = fill(1.0f / 5040);
    for (float coefficient : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 1.0f / 2, 1.0f, 1.0f})
        sum = sum * r + coefficient;
    const Ints exponent = (Ints)shifted - 0x4b400000 + 127;
    return sum * (Floats)(exponent << 23);
}

// 1 / (1 + e^-x), as exact as what it is for has places: T is the type in memory.
template <class T>
inline Floats sigmoid(Floats x) {
    if constexpr (sizeof(T) == sizeof(float)) return reciprocal(1.0f + exponential(-x));
    // 2^t to 2^-17: t = k + f, with the polynomial of degree 4 of least relative error in |f| <= 1/2
    const Floats t = within(x * -1.442695041f, -126.0f, 126.0f);
    const Floats shifted = t + 12582912.0f, f = t - (shifted - 12582912.0f);
    Floats sum = fill(0.00957010f);
    for (float coefficient : {0.05591786f, 0.24024745f, 0.69312181f, 0.99999926f}) sum = sum * f + coefficient;
    return reciprocal(1.0f + (Floats)((Words)sum + ((Words)shifted << 23)));  // k is in the low bits of `shifted`
}

// A row of numbers that begins at a whole register: one that lies across two cache lines takes twice as long to load.
class Row {
    std::vector<Floats> registers;

  public:
    explicit Row(int64_t width) : registers((width + LANES - 1) / LANES) {}

    // `values` of C channels over and over, or zeros where there are none
    Row(const float* values, int64_t channels, int64_t width) : Row(width) {
        for (int64_t at = 0; values && at < width; at += channels)
            for (int64_t c = 0; c < channels; c++) data()[at + c] = values[c];
    }

    float* data() { return (float*)registers.data(); }
    const float* data() const { return (const float*)registers.data(); }
    void clear() { std::fill(registers.begin(), registers.end(), Floats{}); }
};

// Calls `work` with a number of the type in memory.
template <class Work>
auto of_type(int is_half, Work work) {
    return is_half ? work(BFloat16()) : work(float());
}

// This thread's rows of `num_rows`: begin <= row < end.
struct Share {
    int64_t begin, end;

    explicit Share(int64_t num_rows) {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        begin = num_rows * thread / threads;
        end = num_rows * (thread + 1) / threads;
    }
};
