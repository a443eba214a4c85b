// What products on tensor cores share: loops whose counter is a constant, asynchronous copies, fragments.
#pragma once

#include "common.cuh"

template <int VALUE>
struct Constant {
    static constexpr int value = VALUE;
};

// f(Constant<0>()), .., f(Constant<N - 1>()): a loop whose index may stand in an instruction.
template <int N, int I = 0, typename F>
__device__ __forceinline__ void unrolled(F f) {
    if constexpr (I < N) {
        f(Constant<I>());
        unrolled<N, I + 1>(f);
    }
}

__device__ __forceinline__ unsigned int shared_address(const void* pointer) {
    return (unsigned int)__cvta_generic_to_shared(pointer);
}

// 16 bytes from `from` + SOURCE in global memory to `to` + TARGET in shared memory.
template <int TARGET, int SOURCE = 0>
__device__ __forceinline__ void copy_async(unsigned int to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0 + %2], [%1 + %3], 16;" ::"r"(to), "l"(from), "n"(TARGET), "n"(SOURCE) : "memory");
}

// 16 bytes from global memory to `to` + TARGET in shared memory; zeros when `bytes` is 0, and then nothing is read.
template <int TARGET>
__device__ __forceinline__ void copy_async_or_zeros(unsigned int to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0 + %3], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes), "n"(TARGET) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most N of the last groups of copies are under way.
template <int N>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8 x 8 matrices at `address` + OFFSET.
template <bool TRANSPOSED, int OFFSET>
__device__ __forceinline__ void load_matrices(unsigned int (&r)[4], unsigned int address) {
    if constexpr (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address), "n"(OFFSET)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address), "n"(OFFSET)
                     : "memory");
}
