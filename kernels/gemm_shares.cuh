// Even shares of a weight's gradient: blocks work through lists of pieces, whole tiles or parts of them, and a tile whose reduction is
// cut is added up by one of the blocks. Who computes what is planned on the host, which knows the windows (src/ops/cuda/shares.rs).
//
// A block stores the sums of a part, and says so; the block that owns the tile waits, and adds the parts in their order, so that a run
// gives the same bits again. It waits for lists of lower numbers alone. A block takes the next list when it starts, so these were taken
// by blocks that run or are done, in whatever order the device starts blocks.
#pragma once

#include "gemm_steps.cuh"

// A product that no other block has a part of.
struct NoParts {
    template <typename Sums>
    __device__ bool complete(Sums&) const { return true; }
};

// What a block computes of a tile: a piece of a plan.
struct Piece {
    int row, column;  // of the tile; a column below 0: no tile, but what the kernel says
    int start, end;   // rows of the batch
    int more;         // whether the other pairs of operands are its too
    int part;         // its number among the parts that are stored; below 0: it completes the tile
    int first, count; // the parts that are added to it
};

// Calls f(piece) for the pieces of the next list of `plan`: for each list where its pieces begin, in all gridDim.x + 1, and then the pieces.
// `taken` counts the lists that blocks have taken.
template <typename F>
__device__ __forceinline__ void for_pieces(const int* plan, unsigned int* taken, F f) {
    // In shared memory, so that none of it takes a register while a product runs.
    constexpr int WORDS = sizeof(Piece) / 4;
    __shared__ Piece piece;
    __shared__ int at, end;
    if (threadIdx.x == 0) {
        unsigned int list = atomicAdd(taken, 1u);
        at = plan[list], end = plan[list + 1];
    }
    __syncthreads();
#pragma unroll 1
    while (at < end) {
        if (threadIdx.x < WORDS) ((int*)&piece)[threadIdx.x] = plan[gridDim.x + 1 + at * WORDS + threadIdx.x];
        __syncthreads();
        f(piece);
        // Every warp is done with the shared memory of this piece.
        __syncthreads();
        if (threadIdx.x == 0) ++at;
        __syncthreads();
    }
}

// Parts of tiles, in the order of the threads' accumulators.
struct SharedParts {
    float* sums;           // [parts, TILE_M TILE_N]
    unsigned int* stored;  // [parts] 1 once the sums are there; 0 before
    const Piece& piece;

    // Stores the sums, or adds the others' to them; says whether they are the tile's.
    template <typename Sums>
    __device__ bool complete(Sums& own) const {
        constexpr int COUNT = sizeof(Sums) / 16;
        float* x = (float*)own;
        if (piece.part >= 0) {
            float4* to = (float4*)(sums + (long long)piece.part * TILE_M * TILE_N) + threadIdx.x;
#pragma unroll
            for (int i = 0; i < COUNT; ++i) to[i * THREADS] = float4{x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]};
            __syncthreads();
            // Of all threads: the barrier hands on what they wrote.
            if (threadIdx.x == 0)
                asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(stored + piece.part), "r"(1) : "memory");
            return false;
        }
        int first = piece.first, end = first + piece.count;
        if (first == end) return true;
        // Each thread waits for some.
        for (int part = first + threadIdx.x; part < end; part += THREADS) {
            unsigned int there;
            do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(there) : "l"(stored + part) : "memory");
            while (!there);
        }
        __syncthreads();
        // As many numbers at a time as there are registers for.
        constexpr int AT_ONCE = 4;
        unrolled<COUNT / AT_ONCE>([&](auto group) {
            constexpr int FIRST = group.value * AT_ONCE;
            const float4* from = (const float4*)(sums + (long long)first * TILE_M * TILE_N) + FIRST * THREADS + threadIdx.x;
#pragma unroll 1
            for (int part = first; part < end; ++part, from += TILE_M * TILE_N / 4)
#pragma unroll
                for (int i = 0; i < AT_ONCE; ++i) {
                    float4 other = from[i * THREADS];
                    float* at = x + 4 * (FIRST + i);
                    at[0] += other.x, at[1] += other.y, at[2] += other.z, at[3] += other.w;
                }
        });
        return true;
    }
};
