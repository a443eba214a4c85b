// The product in f32 (gemm.cuh): plain FMA over tiles in shared memory.
#pragma once

#include "gemm_steps.cuh"

constexpr int FMA_K = 16;  // of TILE_K at a time, so that shared memory suffices
constexpr int SHARED_BYTES = FMA_K * (TILE_M + 4 + TILE_N + 4) * 4;
constexpr int LANE_M = TILE_M / 16, LANE_N = TILE_N / 8;  // outputs of a thread

typedef float Accumulators[LANE_M][LANE_N];

__device__ __forceinline__ void clear(Accumulators& sums) {
#pragma unroll
    for (int i = 0; i < LANE_M; ++i)
#pragma unroll
        for (int j = 0; j < LANE_N; ++j) sums[i][j] = 0.0f;
}

// FMA_K x EXTENT of an operand into shared memory, zeros beyond the matrix.
template <Layout LAYOUT, int EXTENT>
__device__ __forceinline__ void fetch(float (*tile)[EXTENT + 4], Operand operand, int origin, int k, int limit) {
    for (int index = threadIdx.x; index < EXTENT * FMA_K; index += THREADS) {
        int i = LAYOUT == K_INNER ? index / FMA_K : index % EXTENT;
        int at = LAYOUT == K_INNER ? index % FMA_K : index / EXTENT;
        bool inside = origin + i < operand.count && k + at < limit;
        long long place = LAYOUT == K_INNER ? (origin + i) * operand.stride + k + at : (k + at) * operand.stride + origin + i;
        tile[at][i] = inside ? operand.data[place] : 0.0f;
    }
}

template <Layout A, Layout B, typename Steps, typename Sources>
__device__ __forceinline__ void accumulate(
    Accumulators& sums, int row, int column, Steps steps, Sources operands, unsigned char* tiles
) {
    float(*tile_a)[TILE_M + 4] = (float(*)[TILE_M + 4]) tiles;
    float(*tile_b)[TILE_N + 4] = (float(*)[TILE_N + 4])(tile_a + FMA_K);
    int thread_m = threadIdx.x / 8, thread_n = threadIdx.x % 8;
    for (Run run = steps.first(); !run.empty(); run = steps.after(run)) {
        auto [a, b, limit] = operands(run.source);
        for (int k = run.k; k < run.end; k += FMA_K) {
            __syncthreads();
            fetch<A, TILE_M>(tile_a, a, row, k, limit);
            fetch<B, TILE_N>(tile_b, b, column, k, limit);
            __syncthreads();
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
}

template <typename Epilogue>
__device__ __forceinline__ void finish(
    const Accumulators& sums, int row, int rows, int column, int columns, unsigned char*, Epilogue epilogue
) {
    int thread_m = threadIdx.x / 8, thread_n = threadIdx.x % 8;
#pragma unroll
    for (int j = 0; j < LANE_N; ++j) {
        int c = column + thread_n + j * 8;
        if (c >= columns) continue;
        auto row_of = epilogue(c);
#pragma unroll
        for (int i = 0; i < LANE_M; ++i) {
            int r = row + thread_m + i * 16;
            float value[OUT_WIDTH] = {sums[i][j]};
            if (r < rows) row_of.store(r, value, row_of.fetch(r));
        }
    }
}
