// Counter-based random numbers, bit for bit those of src/rng.rs: Philox4x32-10 (Salmon et al., SC 2011) and Box-Muller with
// operations that IEEE 754 rounds exactly, never fused.
#pragma once

#include "common.cuh"

struct Words {
    unsigned int x, y, z, w;
};

__device__ __forceinline__ Words philox(Words counter, unsigned int key_low, unsigned int key_high) {
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        unsigned int high0 = __umulhi(counter.x, 0xD2511F53u), low0 = counter.x * 0xD2511F53u;
        unsigned int high1 = __umulhi(counter.z, 0xCD9E8D57u), low1 = counter.z * 0xCD9E8D57u;
        counter = Words{high1 ^ counter.y ^ key_low, low1, high0 ^ counter.w ^ key_high, low0};
        key_low += 0x9E3779B9u;
        key_high += 0xBB67AE85u;
    }
    return counter;
}

__device__ __forceinline__ float times(float a, float b) { return __fmul_rn(a, b); }

__device__ __forceinline__ float plus(float a, float b) { return __fadd_rn(a, b); }

// The upper bits of a word as a number in (0, 1).
__device__ __forceinline__ float open_unit(unsigned int word) {
    return times(plus(__uint2float_rn(word >> 9), 0.5f), 1.0f / 8388608.0f);
}

// Natural logarithm of a normal number in (0, 1).
__device__ __forceinline__ float ln_unit(float x) {
    unsigned int shifted = __float_as_uint(x) - 0x3F3504F3u;
    float e = __int2float_rn((int)shifted >> 23);
    float m = __uint_as_float((shifted & 0x007FFFFFu) + 0x3F3504F3u);
    float s = __fdiv_rn(plus(m, -1.0f), plus(m, 1.0f));
    float z = times(s, s);
    float series = plus(times(plus(times(plus(times(0.22222222f, z), 0.2857143f), z), 0.4f), z), 0.6666667f);
    float sum = plus(times(times(s, z), series), plus(s, s));
    return plus(plus(sum, times(e, 1.4286068e-6f)), times(e, 0.69314575f));
}

// Sine and cosine of 2 pi times word / 2^32.
__device__ __forceinline__ void sin_cos_turn(unsigned int word, float& sine, float& cosine) {
    unsigned int quarter = (word + 0x20000000u) >> 30;
    int rest = (int)(word - (quarter << 30));
    float x = times(__int2float_rn(rest >> 6), 6.2831853071795865f / 67108864.0f);
    float z = times(x, x);
    float sin = plus(times(times(plus(times(plus(times(-1.9515296e-4f, z), 8.332161e-3f), z), -0.16666655f), z), x), x);
    float cos = plus(times(plus(times(2.4433157e-5f, z), -1.3887316e-3f), z), 4.1666646e-2f);
    cos = plus(plus(times(times(cos, z), z), -times(0.5f, z)), 1.0f);
    sine = quarter == 0 ? sin : quarter == 1 ? cos : quarter == 2 ? -sin : -cos;
    cosine = quarter == 0 ? cos : quarter == 1 ? -sin : quarter == 2 ? -cos : sin;
}

// Two standard normal numbers.
__device__ __forceinline__ void box_muller(unsigned int a, unsigned int b, float& first, float& second) {
    float radius = __fsqrt_rn(times(-2.0f, ln_unit(open_unit(a)))), sine, cosine;
    sin_cos_turn(b, sine, cosine);
    first = times(radius, cosine);
    second = times(radius, sine);
}
