// Attention in bf16, backward, for up to 256 tokens and head sizes up to 72: every product once, every tensor read once.
#pragma once

#include "attention_tiles.cuh"

constexpr int HEAD_WARPS = 8;  // of 32 keys each
constexpr int HEAD_THREADS = HEAD_WARPS * 32;
constexpr int BACKWARD_THREADS = HEAD_THREADS, BACKWARD_BLOCKS = 1;
constexpr int HEAD_BYTES = HEAD_THREADS * ROW_BYTES;  // a row for each thread
constexpr int QUERIES = 32;                           // at a time
constexpr int QUERIES_BYTES = QUERIES * ROW_BYTES;
// Whether dS takes P as it was rounded for dv, two numbers a register: what sm_120's assembler makes of this needs more of them.
constexpr bool ROUNDED_P = __CUDA_ARCH__ >= 1200;
constexpr int DS_ROW_BYTES = QUERIES * 2 + 16;        // of a key: an odd number of chunks

// Grid: (1, NH, B) blocks of 256 threads: dk and dv of 32 keys a warp; dS of all passes through shared memory to dq.
// Shared memory: rows of HS for all keys and 6 times 32 queries, DS_ROW_BYTES
// and a float a key, and 2 floats for each of 32 queries.
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
    constexpr int M = 2, N = 2;
    int head = blockIdx.y, b = blockIdx.z, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // Keys; two stages of queries and gradients of outputs; outputs; gradients of queries; dS; statistics.
    constexpr int STAGES = HEAD_BYTES, OUTPUTS = STAGES + 4 * QUERIES_BYTES, DQ = OUTPUTS + QUERIES_BYTES;
    constexpr int DS = DQ + QUERIES_BYTES, STATISTICS = DS + HEAD_THREADS * DS_ROW_BYTES;
    static_assert(STAGES + HEAD_BYTES <= STATISTICS, "values, and later their gradients, take the place of all after keys");
    unsigned int keys = shared_address(shared), tiles = keys + STAGES;
    // For every two queries: -lse of both, in powers of 2, and -D of both.
    float* rows = (float*)(shared + STATISTICS);
    float* head_lse = rows + 2 * QUERIES;
    Head queries = part_of_qkv(0, b, head, T, C);
    {
        Share<HEAD_THREADS> share;
        const elem* query = qkv + share.of(queries, 0);
        share.copy<HEAD_THREADS>({Copy{query + C, queries.stride, keys}, Copy{query + 2 * C, queries.stride, tiles}}, T);
        commit_copies();
    }
    // A query that is not there has no probabilities: 2^-infinity.
    int t = threadIdx.x;
    head_lse[t] = t < T ? -lse[((long long)b * gridDim.y + head) * T + t] * LOG2_E : -INFINITY;
    wait_copies<0>();
    __syncthreads();
    Fragments<M> v;
    unsigned int own_keys = keys + warp * 32 * ROW_BYTES + lane_offset();
    v.load(own_keys + STAGES);
    __syncthreads();

    // What copies, stores and dq need is computed for each tile again: there are no registers to keep it in.
    auto copy_next = [&](unsigned int to, int start) {
        Share<HEAD_THREADS> share(thread_again());
        Head upstream = of_activation(b, head, T, C);
        long long at = share.of(upstream, start);
        Copy q{qkv + share.of(queries, start), queries.stride, to}, gradients{dout + at, upstream.stride, to + QUERIES_BYTES};
        share.copy<QUERIES>({q, gradients, Copy{out + at, upstream.stride, keys + OUTPUTS}}, T - start);
        commit_copies();
    };
    auto store_dq = [&](int start) {
        Share<HEAD_THREADS>(thread_again()).store<QUERIES>(dqkv, queries, start, T, shared + DQ);
    };
    unsigned int own_ds = keys + DS + (warp * 32 + lane / 4) * DS_ROW_BYTES + lane % 4 * 4;

    float dk[M][CHUNKS][4] = {}, dv[M][CHUNKS][4] = {};
    float factor = scale * LOG2_E;
    unsigned int reading = tiles;
    copy_next(reading, 0);
    for (int start = 0; start < T; start += QUERIES) {
        wait_copies<0>();
        // The tile is there for every warp, and so is dq of the one before.
        __syncthreads();
        if (start) store_dq(start - QUERIES);
        if (t < QUERIES) rows[t / 2 * 4 + t % 2] = head_lse[start + t];
        for (int row = warp * 16; row < QUERIES; row += HEAD_WARPS * 16) {
            unsigned int at = row * ROW_BYTES + lane_offset();
            store_row_products(rows + row * 2, reading + QUERIES_BYTES + at, keys + OUTPUTS + at);
        }
        __syncthreads();
        if (start + QUERIES < T) copy_next(2 * tiles + 2 * QUERIES_BYTES - reading, start + QUERIES);
        unsigned int tile_q = reading + lane_offset(), tile_dout = tile_q + QUERIES_BYTES;
        // One code for all parts: unrolled, they would share registers.
#pragma unroll 1
        for (int part = 0; part < QUERIES / 16; ++part, tile_q += 16 * ROW_BYTES, tile_dout += 16 * ROW_BYTES) {
            float p[M][N][4] = {}, ds[M][N][4];
            unsigned int packed_p[M][4], packed[M][4];
            rows_times_rows<0>(p, own_keys, tile_q);
#pragma unroll
            for (int n = 0; n < N; ++n) {
                float4 row = ((const float4*)rows)[part * 8 + n * 4 + lane % 4];
#pragma unroll
                for (int m = 0; m < M; ++m)
#pragma unroll
                    for (int r = 0; r < 4; ++r) {
                        p[m][n][r] = power_of_2(fmaf(p[m][n][r], factor, r % 2 ? row.y : row.x));
                        ds[m][n][r] = r % 2 ? row.w : row.z;
                    }
            }
            // dS of keys that are not there must be 0, not infinity: they are multiplied with zeros in dq.
            if (warp * 32 + 32 > T) {
#pragma unroll
                for (int m = 0; m < M; ++m)
#pragma unroll
                    for (int r = 0; r < 4; ++r)
                        if (warp * 32 + m * 16 + lane / 4 + r / 2 * 8 >= T) p[m][0][r] = p[m][1][r] = 0.0f;
            }
            pack_weights<0>(packed_p, p);
            add_weighted<0>(dv, packed_p, tile_dout);
            rows_times_rows<0>(ds, v, tile_dout);
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int r = 0; r < 4; ++r)
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        float rounded_p = i ? high_bf16(packed_p[m][r]) : low_bf16(packed_p[m][r]);
                        ds[m][r / 2][r % 2 * 2 + i] *= ROUNDED_P ? rounded_p : p[m][r / 2][r % 2 * 2 + i];
                    }
            pack_weights<0>(packed, ds);
            unrolled<M * 4>([&](auto index) {
                constexpr int m = decltype(index)::value / 4, r = decltype(index)::value % 4;
                store_shared<(m * 16 + r % 2 * 8) * DS_ROW_BYTES + r / 2 * 16>(own_ds + part * 32, packed[m][r]);
            });
            add_weighted<0>(dk, packed, tile_q);
        }
        __syncthreads();
        // Of dq, a warp computes 16 queries and PART chunks.
        constexpr int PART = (CHUNKS + HEAD_WARPS / 2 - 1) / (HEAD_WARPS / 2);
        unsigned int thread = thread_again(), first_chunk = thread / 64 * PART;
        if (first_chunk < CHUNKS) {
            // The last part may overlap the one before: both store the same.
            first_chunk = min(first_chunk, CHUNKS - PART);
            unsigned int lane = thread % 32, first_query = thread / 32 % 2 * 16;
            unsigned int ds_part = keys + DS + lane % 16 * DS_ROW_BYTES + lane / 16 * 16 + first_query * 2;
            unsigned int keys_part = keys + lane_offset(thread) + first_chunk * 16;
            unsigned int own_dq = keys + DQ + (first_query + lane / 4) * ROW_BYTES + first_chunk * 16 + lane % 4 * 4;
            float dq[1][PART][4] = {};
            unrolled<HEAD_THREADS / 16>([&](auto step) {
                constexpr int k = decltype(step)::value;
                unsigned int weights[1][4];
                load_matrices<true, k * 16 * DS_ROW_BYTES>(weights[0], ds_part);
                // Transposed, rows become columns.
                unsigned int second = weights[0][1];
                weights[0][1] = weights[0][2];
                weights[0][2] = second;
                add_weighted<k * 16>(dq, weights, keys_part);
            });
            unrolled<PART * 2>([&](auto index) {
                constexpr int n = decltype(index)::value / 2, h = decltype(index)::value % 2;
                unsigned int packed = pack_bf16(dq[0][n][h * 2] * scale, dq[0][n][h * 2 + 1] * scale);
                store_shared<h * 8 * ROW_BYTES + n * 16>(own_dq, packed);
            });
        }
        reading = 2 * tiles + 2 * QUERIES_BYTES - reading;
    }
    __syncthreads();
    store_dq((T - 1) / QUERIES * QUERIES);
    __syncthreads();
    const float scales[M][2] = {{scale, scale}, {scale, scale}}, ones[M][2] = {{1.0f, 1.0f}, {1.0f, 1.0f}};
    stage_rows(shared, dk, scales);
    stage_rows(shared + STAGES, dv, ones);
    __syncthreads();
    Share<HEAD_THREADS> share;
    share.store<HEAD_THREADS>(dqkv, part_of_qkv(1, b, head, T, C), 0, T, shared);
    share.store<HEAD_THREADS>(dqkv, part_of_qkv(2, b, head, T, C), 0, T, shared + STAGES);
}
