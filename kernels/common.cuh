// Types and helpers of every kernel. No CUDA headers: NVRTC has none.
//
//   elem   type of activations and of the weights that products read: bf16 with -DELEM_BF16, else float
//   The arithmetic is f32 in both; `to_f32` and `from_f32` convert.
#pragma once

#define INFINITY __int_as_float(0x7f800000)

struct __align__(2) bf16 {
    unsigned short bits;
};

#ifdef ELEM_BF16
typedef bf16 elem;
#else
typedef float elem;
#endif

// Elements of elem in the 16 bytes of the widest access.
constexpr int ELEMS_16B = 16 / sizeof(elem);

__device__ __forceinline__ float to_f32(float x) { return x; }

__device__ __forceinline__ float to_f32(bf16 x) { return __uint_as_float((unsigned int)x.bits << 16); }

__device__ __forceinline__ void from_f32(float& to, float x) { to = x; }

// Rounds to nearest even.
__device__ __forceinline__ void from_f32(bf16& to, float x) {
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
}

template <typename T>
__device__ __forceinline__ T rounded(float x) {
    T to;
    from_f32(to, x);
    return to;
}

// Two numbers as packed bf16, the first in the low half.
__device__ __forceinline__ unsigned int pack_bf16(float low, float high) {
    unsigned int packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

__device__ __forceinline__ float low_bf16(unsigned int packed) { return __uint_as_float(packed << 16); }

__device__ __forceinline__ float high_bf16(unsigned int packed) { return __uint_as_float(packed & 0xffff0000u); }

// Sum over the 32 lanes of a warp, in a fixed order; every lane gets it.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int lane = 16; lane > 0; lane >>= 1) x += __shfl_xor_sync(0xffffffffu, x, lane);
    return x;
}
