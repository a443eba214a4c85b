// The product in f32 (gemm.cuh): plain FMA over tiles in shared memory, of which the next is read while one is multiplied.
#pragma once

#include "gemm_steps.cuh"

constexpr int FMA_K = 8;  // of TILE_K at a time: what is on its way is held in registers
constexpr int SHARED_BYTES = FMA_K * (TILE_M + 4 + TILE_N + 4) * 4;
constexpr int LANE_M = TILE_M / 16, LANE_N = TILE_N / 8;  // outputs of a thread

typedef float Accumulators[LANE_M][LANE_N];

__device__ __forceinline__ void clear(Accumulators& sums) {
#pragma unroll
    for (int i = 0; i < LANE_M; ++i)
#pragma unroll
        for (int j = 0; j < LANE_N; ++j) sums[i][j] = 0.0f;
}

// FMA_K x EXTENT of an operand on its way into shared memory, zeros beyond the matrix.
template <Layout LAYOUT, int EXTENT>
struct Fetched {
    static constexpr int COUNT = EXTENT * FMA_K / THREADS;
    float held[COUNT];

    __device__ static int i(int n) {
        int index = threadIdx.x + n * THREADS;
        return LAYOUT == K_INNER ? index / FMA_K : index % EXTENT;
    }
    __device__ static int at(int n) {
        int index = threadIdx.x + n * THREADS;
        return LAYOUT == K_INNER ? index % FMA_K : index / EXTENT;
    }

    __device__ void load(Operand operand, int origin, int k, int limit) {
#pragma unroll
        for (int n = 0; n < COUNT; ++n) {
            int row = origin + i(n), column = k + at(n);
            bool inside = row < operand.count && column < limit;
            long long place = LAYOUT == K_INNER ? row * operand.stride + column : column * operand.stride + row;
            held[n] = inside ? operand.data[place] : 0.0f;
        }
    }

    __device__ void store(float (*tile)[EXTENT + 4]) const {
#pragma unroll
        for (int n = 0; n < COUNT; ++n) tile[at(n)][i(n)] = held[n];
    }
};

template <Layout A, Layout B, typename Steps, typename Sources>
__device__ __forceinline__ void accumulate(
    Accumulators& sums, int row, int column, Steps steps, Sources operands, unsigned char* tiles
) {
    float(*tile_a)[TILE_M + 4] = (float(*)[TILE_M + 4]) tiles;
    float(*tile_b)[TILE_N + 4] = (float(*)[TILE_N + 4])(tile_a + FMA_K);
    int thread_m = threadIdx.x / 8, thread_n = threadIdx.x % 8;
    Fetched<A, TILE_M> next_a;
    Fetched<B, TILE_N> next_b;
    Run run = steps.first();
    int k = run.k;
    auto load = [&]() {
        if (run.empty()) return;
        auto [a, b, limit] = operands(run.source);
        next_a.load(a, row, k, limit);
        next_b.load(b, column, k, limit);
    };
    load();
#pragma unroll 1
    while (!run.empty()) {
        __syncthreads();
        next_a.store(tile_a);
        next_b.store(tile_b);
        __syncthreads();
        k += FMA_K;
        if (k >= run.end) {
            run = steps.after(run);
            k = run.k;
        }
        // On its way while this is multiplied.
        load();
#pragma unroll 4
        for (int at = 0; at < FMA_K; ++at) {
            float from_a[LANE_M], from_b[LANE_N];
#pragma unroll
            for (int i = 0; i < LANE_M; ++i) from_a[i] = tile_a[at][thread_m + i * 16];
#pragma unroll
            for (int j = 0; j < LANE_N; ++j) from_b[j] = tile_b[at][thread_n + j * 8];
#pragma unroll
            for (int i = 0; i < LANE_M; ++i)
#pragma unroll
                for (int j = 0; j < LANE_N; ++j) sums[i][j] = fmaf(from_a[i], from_b[j], sums[i][j]);
        }
    }
}

template <typename Epilogue>
__device__ __forceinline__ void finish(
    const Accumulators& sums, int row, int rows, int column, int columns, int tokens, unsigned char*, Epilogue epilogue
) {
    int thread_m = threadIdx.x / 8, thread_n = threadIdx.x % 8;
#pragma unroll
    for (int j = 0; j < LANE_N; ++j) {
        int c = column + thread_n + j * 8;
        if (c >= columns) continue;
#pragma unroll
        for (int i = 0; i < LANE_M; ++i) {
            int r = row + thread_m + i * 16;
            float value[OUT_WIDTH] = {sums[i][j]};
            if (r >= rows) continue;
            auto row_of = epilogue(c, r / tokens);
            row_of.store(r, value, row_of.fetch(r));
        }
    }
}
