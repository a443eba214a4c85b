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

// A matrix in global memory as the copies of its tiles take it (cuTensorMapEncodeTiled). In kernels whose launcher has none: zeros.
struct __align__(64) TensorMap {
    unsigned long long words[16];
};

// The box at `column` and `row` of a matrix to `to` in shared memory, whose bytes arrive at `barrier`; zeros beyond the matrix.
__device__ __forceinline__ void copy_box(unsigned int to, const TensorMap* map, int column, int row, unsigned int barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
                 "l"(map), "r"(column), "r"(row), "r"(barrier)
                 : "memory");
}

// A barrier in shared memory: a phase is over when `arrivals` have come, and the bytes that they expect.
__device__ __forceinline__ void begin_barrier(unsigned int barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void end_barrier(unsigned int barrier) {
    asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void arrive_expecting(unsigned int barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Until the phase of a barrier with this parity is over.
__device__ __forceinline__ void wait_for(unsigned int barrier, unsigned int parity) {
    asm volatile("{\n.reg .pred over;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n@!over bra again;\n}" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
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

// d += a b:  a 16 x 16, b 16 x 8.
__device__ __forceinline__ void mma(float (&d)[4], const unsigned int (&a)[4], unsigned int b0, unsigned int b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
