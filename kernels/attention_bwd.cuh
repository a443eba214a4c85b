// Attention in bf16, backward, for any number of tokens and any head size: blocks that own keys, and blocks that own queries.
#pragma once

#include "attention_tiles.cuh"

constexpr int BACKWARD_THREADS = THREADS, BACKWARD_BLOCKS = BLOCKS;

// Rows of a tile that backward computes with at a time: as many as registers allow.
constexpr int KEYS_PART = TILE < 32 ? TILE : 32;
constexpr int QUERIES_PART = ROW_TILES > 1 || TILE < 32 ? 16 : 32;
// Long rows of dk and dv do not fit in the registers of one warp: other blocks compute dv then.
constexpr bool SPLIT = HS > 104;

// dk and dv of a block's own keys, from `first` on, or only one of them.
template <bool DK, bool DV>
__device__ __forceinline__ void gradients_of_keys(
    elem* __restrict__ dqkv,
    const elem* __restrict__ dout,
    const elem* __restrict__ qkv,
    const elem* __restrict__ out,
    const float* __restrict__ lse,  // of this head
    float scale,
    int b,
    int head,
    int T,
    int C,
    int first,
    unsigned char* shared
) {
    constexpr int N = KEYS_PART / 8, OWN = WARPS * 16;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned int tiles = shared_address(shared), tile_out = tiles + 4 * TILE_BYTES;
    // For every two queries of a tile: -lse of both, in powers of 2, and -D of both.
    float* rows = (float*)(shared + 5 * TILE_BYTES);
    Share<THREADS> share;
    Head queries = part_of_qkv(0, b, head, T, C), upstream = of_activation(b, head, T, C);
    const elem* query = qkv + share.of(queries, 0);
    const elem* dout_row = dout + share.of(upstream, 0);
    long long to_out = out - dout;

    const elem* own_key = qkv + share.of(part_of_qkv(1, b, head, T, C), first);
    share.copy<OWN>({Copy{own_key, queries.stride, tiles}}, T - first);
    if (DK) share.copy<OWN>({Copy{own_key + C, queries.stride, tiles + 2 * TILE_BYTES}}, T - first);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    Fragments<1> k, v;
    unsigned int own = tiles + warp * 16 * ROW_BYTES + lane_offset();
    k.load(own);
    if (DK) v.load(own + 2 * TILE_BYTES);
    __syncthreads();

    float next_lse;
    auto copy_next = [&](unsigned int to, int start) {
        Copy q{query, queries.stride, to}, gradients{dout_row, upstream.stride, to + TILE_BYTES};
        Copy outputs{dout_row + to_out, upstream.stride, tile_out};
        if constexpr (DK) share.copy<TILE>({q, gradients, outputs}, T - start);
        else share.copy<TILE>({q, gradients}, T - start);
        commit_copies();
        query += (long long)TILE * queries.stride;
        dout_row += (long long)TILE * upstream.stride;
        // A query that is not there has no probabilities: 2^-infinity.
        if (threadIdx.x < TILE) next_lse = start + threadIdx.x < T ? -lse[start + threadIdx.x] * LOG2_E : -INFINITY;
    };
    float dk[1][CHUNKS][4] = {}, dv[1][CHUNKS][4] = {};
    float factor = scale * LOG2_E;
    unsigned int reading = tiles, writing = tiles + 2 * TILE_BYTES;
    copy_next(reading, 0);
    for (int start = 0; start < T; start += TILE) {
        wait_copies<0>();
        // The tile is there for every warp, and every warp is done with the one before.
        __syncthreads();
        if (threadIdx.x < TILE) rows[threadIdx.x / 2 * 4 + threadIdx.x % 2] = next_lse;
        for (int row = warp * 16; DK && row < TILE; row += WARPS * 16) {
            unsigned int at = row * ROW_BYTES + lane_offset();
            store_row_products(rows + row * 2, reading + TILE_BYTES + at, tile_out + at);
        }
        __syncthreads();
        if (start + TILE < T) copy_next(writing, start + TILE);
        unsigned int tile_q = reading + lane_offset(), tile_dout = tile_q + TILE_BYTES;
        unrolled<TILE / KEYS_PART>([&](auto part) {
            constexpr int FIRST = decltype(part)::value * KEYS_PART;
            float p[1][N][4] = {}, ds[1][N][4];
            rows_times_rows<FIRST>(p, k, tile_q);
#pragma unroll
            for (int n = 0; n < N; ++n) {
                const float* row = rows + FIRST * 2 + n * 16 + lane % 4 * 4;
                float2 log_sum = *(const float2*)row, d = DK ? *(const float2*)(row + 2) : float2();
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    p[0][n][r] = power_of_2(fmaf(p[0][n][r], factor, r % 2 ? log_sum.y : log_sum.x));
                    ds[0][n][r] = r % 2 ? d.y : d.x;
                }
            }
            if (DV) weighted_rows<FIRST>(dv, p, tile_dout);
            if (DK) {
                rows_times_rows<FIRST>(ds, v, tile_dout);
#pragma unroll
                for (int n = 0; n < N; ++n)
#pragma unroll
                    for (int r = 0; r < 4; ++r) ds[0][n][r] *= p[0][n][r];
                weighted_rows<FIRST>(dk, ds, tile_q);
            }
        });
        unsigned int other = reading;
        reading = writing;
        writing = other;
    }
    __syncthreads();
    const float scales[1][2] = {{scale, scale}}, ones[1][2] = {{1.0f, 1.0f}};
    if (DK) stage_rows(shared, dk, scales);
    if (DV) stage_rows(shared + 2 * TILE_BYTES, dv, ones);
    __syncthreads();
    if (DK) share.store<OWN>(dqkv, part_of_qkv(1, b, head, T, C), first, T, shared);
    if (DV) share.store<OWN>(dqkv, part_of_qkv(2, b, head, T, C), first, T, shared + 2 * TILE_BYTES);
}

// dq of a block's own queries, from `first` on.
__device__ __forceinline__ void gradients_of_queries(
    elem* __restrict__ dqkv,
    const elem* __restrict__ dout,
    const elem* __restrict__ qkv,
    const elem* __restrict__ out,
    const float* __restrict__ lse,  // of this head
    float scale,
    int b,
    int head,
    int T,
    int C,
    int first,
    unsigned char* shared
) {
    constexpr int M = ROW_TILES, N = QUERIES_PART / 8, OWN = WARPS * 16 * M;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned int tiles = shared_address(shared);
    Share<THREADS> share;
    Head queries = part_of_qkv(0, b, head, T, C), upstream = of_activation(b, head, T, C);
    long long own_row = share.of(upstream, first);
    Copy gradients{dout + own_row, upstream.stride, tiles}, outputs{out + own_row, upstream.stride, tiles + 2 * TILE_BYTES};
    share.copy<OWN>({gradients, outputs}, T - first);
    commit_copies();
    float row_lse[M][2];
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            int t = first + (warp * M + m) * 16 + lane / 4 + h * 8;
            row_lse[m][h] = t < T ? -lse[t] * LOG2_E : -INFINITY;
        }
    wait_copies<0>();
    __syncthreads();
    Fragments<M> q, g;
    float row_d[M][2];
    unsigned int own = tiles + warp * 16 * M * ROW_BYTES + lane_offset();
    g.load(own);
#pragma unroll
    for (int m = 0; m < M; ++m) row_products(row_d[m], own + m * 16 * ROW_BYTES, own + m * 16 * ROW_BYTES + 2 * TILE_BYTES);
    __syncthreads();
    const elem* key = qkv + share.of(part_of_qkv(1, b, head, T, C), 0);
    share.copy<OWN>({Copy{qkv + share.of(queries, first), queries.stride, tiles + 2 * TILE_BYTES}}, T - first);
    share.copy<TILE>({Copy{key, queries.stride, tiles}, Copy{key + C, queries.stride, tiles + TILE_BYTES}}, T);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    q.load(own + 2 * TILE_BYTES);

    float dq[M][CHUNKS][4] = {};
    float factor = scale * LOG2_E;
    unsigned int reading = tiles, writing = tiles + 2 * TILE_BYTES;
    for (int left = T; left > 0; left -= TILE) {
        wait_copies<0>();
        __syncthreads();
        if (left > TILE) {
            key += (long long)TILE * queries.stride;
            share.copy<TILE>(
                {Copy{key, queries.stride, writing}, Copy{key + C, queries.stride, writing + TILE_BYTES}}, left - TILE
            );
            commit_copies();
        }
        unsigned int tile_k = reading + lane_offset(), tile_v = tile_k + TILE_BYTES;
        unrolled<TILE / QUERIES_PART>([&](auto part) {
            constexpr int FIRST = decltype(part)::value * QUERIES_PART;
            float p[M][N][4] = {}, ds[M][N][4];
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int n = 0; n < N; ++n)
#pragma unroll
                    for (int r = 0; r < 4; ++r) ds[m][n][r] = -row_d[m][r / 2];
            rows_times_rows<FIRST>(p, q, tile_k);
            rows_times_rows<FIRST>(ds, g, tile_v);
            if (left < FIRST + QUERIES_PART) mask<FIRST>(p, left);
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int n = 0; n < N; ++n)
#pragma unroll
                    for (int r = 0; r < 4; ++r) ds[m][n][r] *= power_of_2(fmaf(p[m][n][r], factor, row_lse[m][r / 2]));
            weighted_rows<FIRST>(dq, ds, tile_k);
        });
        unsigned int other = reading;
        reading = writing;
        writing = other;
    }
    float scales[M][2];
#pragma unroll
    for (int m = 0; m < M; ++m) scales[m][0] = scales[m][1] = scale;
    __syncthreads();
    stage_rows(shared, dq, scales);
    __syncthreads();
    share.store<OWN>(dqkv, queries, first, T, shared);
}

// Grid: (ceil(T / (16 WARPS)) blocks that own keys, as many again when SPLIT, and ceil(T / (16 WARPS ROW_TILES)) that own
// queries, NH, B).
// Shared memory: 5 tiles and two floats for each of a tile's rows.
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
    int head = blockIdx.y, b = blockIdx.z, index = blockIdx.x, owners = (T + WARPS * 16 - 1) / (WARPS * 16);
    lse += ((long long)b * gridDim.y + head) * T;
    int first = index % owners * WARPS * 16;
    if (index < owners) {
        gradients_of_keys<true, !SPLIT>(dqkv, dout, qkv, out, lse, scale, b, head, T, C, first, shared);
    } else if (SPLIT && index < 2 * owners) {
        gradients_of_keys<false, SPLIT>(dqkv, dout, qkv, out, lse, scale, b, head, T, C, first, shared);
    } else {
        first = (index - (SPLIT ? 2 : 1) * owners) * WARPS * 16 * ROW_TILES;
        gradients_of_queries(dqkv, dout, qkv, out, lse, scale, b, head, T, C, first, shared);
    }
}
