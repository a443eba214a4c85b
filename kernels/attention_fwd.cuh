// Attention in bf16, forward.
#pragma once

#include "attention_tiles.cuh"

// Grid: (ceil(T / (16 WARPS ROW_TILES)), NH, B). Shared memory: 4 tiles.
__device__ __forceinline__ void forward(
    elem* __restrict__ out, float* __restrict__ lse, const elem* __restrict__ qkv, float scale, int T, int C, unsigned char* shared
) {
    constexpr int M = ROW_TILES, N = TILE / 8, OWN = WARPS * 16 * M;
    int first = blockIdx.x * OWN, head = blockIdx.y, b = blockIdx.z, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned int tiles = shared_address(shared);
    Share<THREADS> share;
    Head keys = part_of_qkv(1, b, head, T, C);
    const elem* key = qkv + share.of(keys, 0);
    const elem* query = qkv + share.of(part_of_qkv(0, b, head, T, C), first);
    share.copy<OWN>({Copy{query, keys.stride, tiles + 2 * TILE_BYTES}}, T - first);
    share.copy<TILE>({Copy{key, keys.stride, tiles}, Copy{key + C, keys.stride, tiles + TILE_BYTES}}, T);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    Fragments<M> q;
    q.load(tiles + 2 * TILE_BYTES + warp * 16 * M * ROW_BYTES + lane_offset());

    float sums[M][CHUNKS][4] = {};
    float factor = scale * LOG2_E;
    // Exponentials are relative to the highest score so far: its weight is 1, which bf16 does not round.
    float reference[M][2], total[M][2] = {};
#pragma unroll
    for (int m = 0; m < M; ++m) reference[m][0] = reference[m][1] = -INFINITY;
    unsigned int reading = tiles, writing = tiles + 2 * TILE_BYTES;
    for (int left = T; left > 0; left -= TILE) {
        wait_copies<0>();
        // The tile is there for every warp, and every warp is done with the one that is overwritten next.
        __syncthreads();
        if (left > TILE) {
            key += (long long)TILE * keys.stride;
            share.copy<TILE>(
                {Copy{key, keys.stride, writing}, Copy{key + C, keys.stride, writing + TILE_BYTES}}, left - TILE
            );
            commit_copies();
        }
        float scores[M][N][4], sum[M][2];
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int n = 0; n < N; ++n)
#pragma unroll
                for (int r = 0; r < 4; ++r) scores[m][n][r] = 0.0f;
        rows_times_rows<0>(scores, q, reading + lane_offset());
        if (left < TILE) mask<0>(scores, left);
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float highest = -INFINITY;
#pragma unroll
                for (int n = 0; n < N; ++n) highest = fmaxf(highest, fmaxf(scores[m][n][h * 2], scores[m][n][h * 2 + 1]));
                highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
                highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
                highest = fmaxf(reference[m][h], highest * factor);
                // 0 in the first tile, whose first key is always there.
                float shrink = power_of_2(reference[m][h] - highest);
                reference[m][h] = highest;
                total[m][h] *= shrink;
#pragma unroll
                for (int n = 0; n < CHUNKS; ++n) {
                    sums[m][n][h * 2] *= shrink;
                    sums[m][n][h * 2 + 1] *= shrink;
                }
            }
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
#pragma unroll
                for (int n = 0; n < N; ++n)
#pragma unroll
                    for (int r = h * 2; r < h * 2 + 2; ++r) {
                        scores[m][n][r] = power_of_2(fmaf(scores[m][n][r], factor, -reference[m][h]));
                        sum[m][h] = n == 0 && r == h * 2 ? scores[m][n][r] : sum[m][h] + scores[m][n][r];
                    }
            }
#pragma unroll
        for (int m = 0; m < M; ++m) {
            total[m][0] += sum[m][0];
            total[m][1] += sum[m][1];
        }
        weighted_rows<0>(sums, scores, reading + TILE_BYTES + lane_offset());
        unsigned int other = reading;
        reading = writing;
        writing = other;
    }
    float inverse[M][2];
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float sum = total[m][h];
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            inverse[m][h] = __fdividef(1.0f, sum);
            int t = first + (warp * M + m) * 16 + lane / 4 + h * 8;
            if (lane % 4 == 0 && t < T)
                lse[((long long)b * gridDim.y + head) * T + t] = (reference[m][h] + logarithm_to_2(sum)) * (1.0f / LOG2_E);
        }
    __syncthreads();
    stage_rows(shared, sums, inverse);
    __syncthreads();
    share.store<OWN>(out, of_activation(b, head, T, C), first, T, shared);
}
