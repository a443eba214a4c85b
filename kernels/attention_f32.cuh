// Attention in f32: FMA over tiles in shared memory. A part of attention.cu, which defines Head.
#pragma once

#include "common.cuh"

constexpr int THREADS = 128, BLOCKS = 1;
constexpr int BACKWARD_THREADS = THREADS, BACKWARD_BLOCKS = BLOCKS;
constexpr int ROWS = 32;                        // tokens of a block, and of a tile
constexpr int STRIDE = HS + 1;                  // no bank conflicts along a column
constexpr int LANES = THREADS / ROWS;           // threads that share a row: each has every fourth column,
constexpr int COLUMNS = ROWS / LANES;           // so many of another tile's rows,
constexpr int OWN = (HS + LANES - 1) / LANES;   // and so many elements
constexpr int TILE_FLOATS = ROWS * STRIDE;

// ROWS rows of a head; zeros beyond T.
__device__ __forceinline__ void copy_tile(float* to, const elem* data, Head rows, int first, int T) {
    for (int index = threadIdx.x; index < ROWS * HS; index += THREADS) {
        int row = index / HS, i = index % HS;
        to[row * STRIDE + i] = first + row < T ? data[rows.first + (long long)(first + row) * rows.stride + i] : 0.0f;
    }
}

// Products of a row with this lane's rows of a tile: the row is read once for all of them.
__device__ __forceinline__ void dots(float (&sums)[COLUMNS], const float* row, const float* tile) {
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) sums[j] = 0.0f;
#pragma unroll 4
    for (int i = 0; i < HS; ++i) {
        float x = row[i];
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) sums[j] = fmaf(x, tile[j * LANES * STRIDE + i], sums[j]);
    }
}

// sums += weights of a row times a tile, for this lane's elements.
__device__ __forceinline__ void weighted_rows(float (&sums)[OWN], const float* weights, const float* tile, int rows) {
    for (int s = 0; s < rows; ++s)
#pragma unroll
        for (int i = 0; i < OWN; ++i)
            if ((i + 1) * LANES <= HS || threadIdx.x % LANES + i * LANES < HS)
                sums[i] = fmaf(weights[s], tile[s * STRIDE + i * LANES], sums[i]);
}

// Sum over the threads that share a row.
__device__ __forceinline__ float row_sum(float x) {
#pragma unroll
    for (int other = 1; other < LANES; other *= 2) x += __shfl_xor_sync(0xffffffffu, x, other);
    return x;
}

// D of this thread's row.
__device__ __forceinline__ float row_product(const float* dout, const float* out) {
    float sum = 0.0f;
    for (int i = threadIdx.x % LANES; i < HS; i += LANES) sum = fmaf(dout[i], out[i], sum);
    return row_sum(sum);
}

__device__ __forceinline__ void store_row(elem* data, Head to, int t, int T, const float (&sums)[OWN], float factor) {
    int lane = threadIdx.x % LANES;
    if (t >= T) return;
#pragma unroll
    for (int i = 0; i < OWN; ++i)
        if (lane + i * LANES < HS) data[to.first + (long long)t * to.stride + lane + i * LANES] = sums[i] * factor;
}

// Grid: (ceil(T / 32), NH, B). Shared memory: 3 tiles and [ROWS][ROWS + 1] floats.
__device__ __forceinline__ void forward(
    elem* __restrict__ out, float* __restrict__ lse, const elem* __restrict__ qkv, float scale, int T, int C, unsigned char* shared
) {
    float* tile_q = (float*)shared;
    float* tile_k = tile_q + TILE_FLOATS;
    float* tile_v = tile_k + TILE_FLOATS;
    int first = blockIdx.x * ROWS, head = blockIdx.y, b = blockIdx.z;
    int row = threadIdx.x / LANES, lane = threadIdx.x % LANES, t = first + row;
    float* weights = tile_v + TILE_FLOATS + row * (ROWS + 1);
    copy_tile(tile_q, qkv, part_of_qkv(0, b, head, T, C), first, T);
    float sums[OWN] = {}, highest = -INFINITY, total = 0.0f;
    for (int start = 0; start < T; start += ROWS) {
        __syncthreads();
        copy_tile(tile_k, qkv, part_of_qkv(1, b, head, T, C), start, T);
        copy_tile(tile_v, qkv, part_of_qkv(2, b, head, T, C), start, T);
        __syncthreads();
        int keys = min(ROWS, T - start);
        float scores[COLUMNS], previous = highest;
        dots(scores, tile_q + row * STRIDE, tile_k + lane * STRIDE);
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) {
            scores[j] = lane + j * LANES < keys ? scores[j] * scale : -INFINITY;
            highest = fmaxf(highest, scores[j]);
        }
#pragma unroll
        for (int other = 1; other < LANES; other *= 2) highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, other));
        float shrink = expf(previous - highest);
        total *= shrink;
#pragma unroll
        for (int i = 0; i < OWN; ++i) sums[i] *= shrink;
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) {
            float weight = expf(scores[j] - highest);
            weights[lane + j * LANES] = weight;
            total += weight;
        }
        __syncwarp();
        weighted_rows(sums, weights, tile_v + lane, keys);
    }
    total = row_sum(total);
    if (lane == 0 && t < T) lse[((long long)b * gridDim.y + head) * T + t] = highest + logf(total);
    store_row(out, of_activation(b, head, T, C), t, T, sums, 1.0f / total);
}

// Grid: (ceil(T / 32) blocks that own keys and as many that own queries, NH, B).
// Shared memory: 4 tiles, 2 times [ROWS][ROWS + 1] floats, and D of a tile.
__device__ __forceinline__ void backward(
    elem* __restrict__ dqkv,
    const elem* __restrict__ dout,
    const elem* __restrict__ qkv,
    const elem* __restrict__ out,
    const float* __restrict__ lse,
    float scale,
    int T,
    int C,
    unsigned char* shared
) {
    float* tile_q = (float*)shared;
    float* tile_k = tile_q + TILE_FLOATS;
    float* tile_v = tile_k + TILE_FLOATS;
    float* tile_dout = tile_v + TILE_FLOATS;
    int owners = gridDim.x / 2, first = blockIdx.x % owners * ROWS, head = blockIdx.y, b = blockIdx.z;
    int row = threadIdx.x / LANES, lane = threadIdx.x % LANES, t = first + row;
    float* p = tile_dout + TILE_FLOATS + row * (ROWS + 1);
    float* ds = p + ROWS * (ROWS + 1);
    float* tile_d = tile_dout + TILE_FLOATS + 2 * ROWS * (ROWS + 1);
    Head queries = part_of_qkv(0, b, head, T, C), keys = part_of_qkv(1, b, head, T, C), values = part_of_qkv(2, b, head, T, C);
    Head upstream = of_activation(b, head, T, C);
    lse += ((long long)b * gridDim.y + head) * T;
    float dp[COLUMNS], scores[COLUMNS];
    if (blockIdx.x < owners) {
        copy_tile(tile_k, qkv, keys, first, T);
        copy_tile(tile_v, qkv, values, first, T);
        float dk[OWN] = {}, dv[OWN] = {};
        for (int start = 0; start < T; start += ROWS) {
            __syncthreads();
            copy_tile(tile_dout, dout, upstream, start, T);
            // Where the queries come next.
            copy_tile(tile_q, out, upstream, start, T);
            __syncthreads();
            float row_d = row_product(tile_dout + row * STRIDE, tile_q + row * STRIDE);
            if (lane == 0) tile_d[row] = row_d;
            __syncthreads();
            copy_tile(tile_q, qkv, queries, start, T);
            __syncthreads();
            int there = min(ROWS, T - start);
            dots(scores, tile_k + row * STRIDE, tile_q + lane * STRIDE);
            dots(dp, tile_v + row * STRIDE, tile_dout + lane * STRIDE);
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j) {
                int s = lane + j * LANES;
                float weight = s < there ? expf(scores[j] * scale - lse[start + s]) : 0.0f;
                p[s] = weight;
                ds[s] = weight * (dp[j] - tile_d[s]);
            }
            __syncwarp();
            weighted_rows(dv, p, tile_dout + lane, there);
            weighted_rows(dk, ds, tile_q + lane, there);
        }
        store_row(dqkv, keys, t, T, dk, scale);
        store_row(dqkv, values, t, T, dv, 1.0f);
    } else {
        copy_tile(tile_q, qkv, queries, first, T);
        copy_tile(tile_dout, dout, upstream, first, T);
        copy_tile(tile_k, out, upstream, first, T);
        __syncthreads();
        float own_d = row_product(tile_dout + row * STRIDE, tile_k + row * STRIDE), own_lse = lse[min(t, T - 1)];
        float dq[OWN] = {};
        for (int start = 0; start < T; start += ROWS) {
            __syncthreads();
            copy_tile(tile_k, qkv, keys, start, T);
            copy_tile(tile_v, qkv, values, start, T);
            __syncthreads();
            int there = min(ROWS, T - start);
            dots(scores, tile_q + row * STRIDE, tile_k + lane * STRIDE);
            dots(dp, tile_dout + row * STRIDE, tile_v + lane * STRIDE);
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j)
                ds[lane + j * LANES] = expf(scores[j] * scale - own_lse) * (dp[j] - own_d);
            __syncwarp();
            weighted_rows(dq, ds, tile_k + lane, there);
        }
        store_row(dqkv, queries, t, T, dq, scale);
    }
}
