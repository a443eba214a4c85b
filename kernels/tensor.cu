// Sums of gradients that two operations contribute to.
//
//   to += from,   rounded once
#include "common.cuh"

extern "C" __global__ void tensor_add(
    elem* __restrict__ to,          // [n]  +=
    const elem* __restrict__ from,  // [n]
    unsigned long long n
) {
    unsigned long long i = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) from_f32(to[i], to_f32(to[i]) + to_f32(from[i]));
}
