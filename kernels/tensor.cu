// Sums of gradients that two operations contribute to.
//
//   to += from,   rounded once
#include "vector.cuh"

// Grid: ceil(n / (blockDim.x WIDTH)).
extern "C" __global__ void tensor_add(
    elem* __restrict__ to,          // [n]  +=
    const elem* __restrict__ from,  // [n]
    unsigned long long n
) {
    unsigned long long first = ((unsigned long long)blockIdx.x * blockDim.x + threadIdx.x) * WIDTH;
    if (first + WIDTH <= n) {
        Vector<WIDTH> vector;
        float x[WIDTH];
        vector.load(from + first);
        vector.unpack(x);
        add_or_store(to + first, x, false);
    } else {
        for (unsigned long long i = first; i < n; ++i) from_f32(to[i], to_f32(to[i]) + to_f32(from[i]));
    }
}
