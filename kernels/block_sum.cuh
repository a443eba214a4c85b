// The sum over a block.
#pragma once

// In a fixed order. `shared` holds a number of each of the THREADS threads, a power of two; it may still hold those of a sum before.
template <int THREADS>
__device__ __forceinline__ double block_sum(double x, double* shared) {
    __syncthreads();
    shared[threadIdx.x] = x;
    for (int step = THREADS / 2; step > 0; step /= 2) {
        __syncthreads();
        if (threadIdx.x < step) shared[threadIdx.x] += shared[threadIdx.x + step];
    }
    __syncthreads();
    return shared[0];
}
