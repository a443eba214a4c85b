// Multi-head self-attention over packed queries, keys and values (formulas: src/ops/attention/mod.rs).
//
//   qkv [B, T, 3 C] = q | k | v, each [NH, HS] a token    S = q k^T / sqrt(HS)    P = softmax(S)    out = P v  [B, T, C]
//
// A block owns TILE tokens of one head of one sample, 16 a warp, and walks over all others TILE at a time. P never reaches
// memory: its accumulators are the next product's operand. Saved for backward: qkv, out, lse.
// Backward: D_t = dout_t . out_t;  dv = P^T dout,  dS = P (dout v^T - D),  dk = dS^T q / sqrt(HS) by blocks that own keys;
// dq = dS k / sqrt(HS) by blocks that own queries. So every sum has one owner and a fixed order.
//
// HS is a definition, a multiple of 8 up to 128; products run over HSP, the next multiple of 16, with zeros between.
#include "common.cuh"

#ifndef HS
#define HS 64
#endif

constexpr int THREADS = 128;

// Where the rows of one head of one sample lie: part 0 (q), 1 (k), 2 (v) of qkv, or an activation [B, T, C].
struct Head {
    long long first;  // element
    int stride;       // elements from one token to the next
};

__device__ __forceinline__ Head part_of_qkv(int part, int b, int head, int T, int C) {
    return Head{(long long)b * T * 3 * C + part * C + head * HS, 3 * C};
}

__device__ __forceinline__ Head of_activation(int b, int head, int T, int C) {
    return Head{(long long)b * T * C + head * HS, C};
}

// D = rowsum(dout out), one warp a token and head.  Grid: ceil(B T NH / 8) blocks of 256 threads.
extern "C" __global__ void __launch_bounds__(256) attention_bwd_rows(
    float* __restrict__ D,            // [B, NH, T]
    const elem* __restrict__ dout,    // [B, T, C]
    const elem* __restrict__ out,     // [B, T, C]
    int B,
    int T,
    int C
) {
    int heads = C / HS, index = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (index >= B * T * heads) return;
    int head = index % heads, t = index / heads % T, b = index / heads / T;
    Head rows = of_activation(b, head, T, C);
    long long at = rows.first + (long long)t * rows.stride;
    float sum = 0.0f;
    for (int i = lane; i < HS; i += 32) sum = fmaf(to_f32(dout[at + i]), to_f32(out[at + i]), sum);
    sum = warp_sum(sum);
    if (lane == 0) D[((long long)b * heads + head) * T + t] = sum;
}

#ifdef ELEM_BF16

constexpr int TILE = 64;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr int HSP = (HS + 15) / 16 * 16;
constexpr int CHUNKS = HSP / 8;                // of 16 bytes in a row
constexpr int ROW_BYTES = (CHUNKS + 1) * 16;   // an odd number of chunks: eight rows in eight groups of banks
constexpr int TILE_BYTES = TILE * ROW_BYTES;
constexpr int K_STEPS = HSP / 16;

__device__ __forceinline__ unsigned int shared_address(const void* pointer) {
    return (unsigned int)__cvta_generic_to_shared(pointer);
}

// TILE rows of a head from token `first` on into shared memory; zeros beyond T and beyond HS.
__device__ __forceinline__ void copy_tile(unsigned int to, const elem* data, Head rows, int first, int T) {
    for (int index = threadIdx.x; index < TILE * CHUNKS; index += THREADS) {
        int row = index / CHUNKS, chunk = index % CHUNKS;
        bool inside = first + row < T && chunk * 8 < HS;
        const elem* from = data + rows.first + (inside ? (long long)(first + row) * rows.stride + chunk * 8 : 0);
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to + row * ROW_BYTES + chunk * 16), "l"(from),
                     "r"(inside ? 16 : 0)
                     : "memory");
    }
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int N>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

__device__ __forceinline__ void load_matrices(unsigned int (&r)[4], unsigned int address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(unsigned int (&r)[4], unsigned int address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void mma(float (&d)[4], const unsigned int (&a)[4], unsigned int b0, unsigned int b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 x TILE: a warp's own rows against a tile of others.
typedef float Scores[TILE / 8][4];
// 16 x HSP: a warp's own rows of an output.
typedef float Rows[HSP / 8][4];
// 16 x HSP of an operand.
typedef unsigned int Fragments[K_STEPS][4];

__device__ __forceinline__ void clear(Rows& rows) {
#pragma unroll
    for (int n = 0; n < HSP / 8; ++n)
#pragma unroll
        for (int r = 0; r < 4; ++r) rows[n][r] = 0.0f;
}

// The 16 rows of this warp from a tile in shared memory.
__device__ __forceinline__ void load_own(Fragments& own, unsigned int tile) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned int address = tile + (warp * 16 + lane % 16) * ROW_BYTES + lane / 16 * 16;
#pragma unroll
    for (int k = 0; k < K_STEPS; ++k) load_matrices(own[k], address + k * 32);
}

// scores = own tile^T: products of rows.
__device__ __forceinline__ void rows_times_rows(Scores& scores, const Fragments& own, unsigned int tile) {
    int lane = threadIdx.x % 32;
    unsigned int address = tile + (lane % 8 + lane / 16 * 8) * ROW_BYTES + lane / 8 % 2 * 16;
#pragma unroll
    for (int n = 0; n < TILE / 16; ++n) {
#pragma unroll
        for (int r = 0; r < 4; ++r) scores[2 * n][r] = scores[2 * n + 1][r] = 0.0f;
#pragma unroll
        for (int k = 0; k < K_STEPS; ++k) {
            unsigned int others[4];
            load_matrices(others, address + n * 16 * ROW_BYTES + k * 32);
            mma(scores[2 * n], own[k], others[0], others[1]);
            mma(scores[2 * n + 1], own[k], others[2], others[3]);
        }
    }
}

// rows += weights tile: sums of the tile's rows. The accumulators of a product are the operand of this one.
__device__ __forceinline__ void weighted_rows(Rows& rows, const Scores& weights, unsigned int tile) {
    int lane = threadIdx.x % 32;
    unsigned int address = tile + lane % 16 * ROW_BYTES + lane / 16 * 16;
#pragma unroll
    for (int k = 0; k < TILE / 16; ++k) {
        unsigned int own[4] = {
            pack_bf16(weights[2 * k][0], weights[2 * k][1]), pack_bf16(weights[2 * k][2], weights[2 * k][3]),
            pack_bf16(weights[2 * k + 1][0], weights[2 * k + 1][1]), pack_bf16(weights[2 * k + 1][2], weights[2 * k + 1][3])
        };
#pragma unroll
        for (int n = 0; n < HSP / 16; ++n) {
            unsigned int others[4];
            load_matrices_transposed(others, address + k * 16 * ROW_BYTES + n * 32);
            mma(rows[2 * n], own, others[0], others[1]);
            mma(rows[2 * n + 1], own, others[2], others[3]);
        }
    }
}

// Stores this warp's rows, times a factor for each of a lane's two rows.
__device__ __forceinline__ void store_rows(
    elem* data, Head to, int first, int T, const Rows& rows, float factor_low, float factor_high
) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        int t = first + warp * 16 + lane / 4 + half * 8;
        if (t >= T) continue;
        float factor = half ? factor_high : factor_low;
        elem* row = data + to.first + (long long)t * to.stride;
#pragma unroll
        for (int n = 0; n < HSP / 8; ++n) {
            int i = n * 8 + lane % 4 * 2;
            if (i >= HS) continue;
            *(unsigned int*)(row + i) = pack_bf16(rows[n][half * 2] * factor, rows[n][half * 2 + 1] * factor);
        }
    }
}

// Grid: (ceil(T / TILE), NH, B).
extern "C" __global__ void __launch_bounds__(THREADS) attention_fwd(
    elem* __restrict__ out,        // [B, T, C]
    float* __restrict__ lse,       // [B, NH, T]
    const elem* __restrict__ qkv,  // [B, T, 3 C]
    float scale,                   // 1 / sqrt(HS)
    int B,
    int T,
    int C
) {
    extern __shared__ __align__(128) unsigned char shared[];
    int first = blockIdx.x * TILE, head = blockIdx.y, b = blockIdx.z, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned int tile_q = shared_address(shared), tile_k = tile_q + TILE_BYTES, tile_v = tile_q + 3 * TILE_BYTES;
    Head keys = part_of_qkv(1, b, head, T, C), values = part_of_qkv(2, b, head, T, C);
    copy_tile(tile_q, qkv, part_of_qkv(0, b, head, T, C), first, T);
    copy_tile(tile_k, qkv, keys, 0, T);
    copy_tile(tile_v, qkv, values, 0, T);
    commit_copies();

    Fragments q;
    Rows sums;
    clear(sums);
    float factor = scale * LOG2_E;  // powers of 2 are what the hardware computes
    float highest[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
    int buffer = 0;
    for (int start = 0; start < T; start += TILE, buffer ^= 1) {
        if (start + TILE < T) {
            copy_tile(tile_k + (buffer ^ 1) * TILE_BYTES, qkv, keys, start + TILE, T);
            copy_tile(tile_v + (buffer ^ 1) * TILE_BYTES, qkv, values, start + TILE, T);
        }
        commit_copies();
        wait_copies<1>();
        __syncthreads();
        if (start == 0) load_own(q, tile_q);
        Scores scores;
        rows_times_rows(scores, q, tile_k + buffer * TILE_BYTES);
        float previous[2] = {highest[0], highest[1]};
#pragma unroll
        for (int n = 0; n < TILE / 8; ++n)
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                bool inside = start + n * 8 + lane % 4 * 2 + r % 2 < T;
                scores[n][r] = inside ? scores[n][r] * factor : -INFINITY;
                highest[r / 2] = fmaxf(highest[r / 2], scores[n][r]);
            }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            highest[h] = fmaxf(highest[h], __shfl_xor_sync(0xffffffffu, highest[h], 1));
            highest[h] = fmaxf(highest[h], __shfl_xor_sync(0xffffffffu, highest[h], 2));
            // The first key is always there, so the highest score is finite.
            float shrink = exp2f(previous[h] - highest[h]);
            total[h] *= shrink;
#pragma unroll
            for (int n = 0; n < HSP / 8; ++n) {
                sums[n][h * 2] *= shrink;
                sums[n][h * 2 + 1] *= shrink;
            }
        }
#pragma unroll
        for (int n = 0; n < TILE / 8; ++n)
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                scores[n][r] = exp2f(scores[n][r] - highest[r / 2]);
                total[r / 2] += scores[n][r];
            }
        weighted_rows(sums, scores, tile_v + buffer * TILE_BYTES);
        // The buffer is copied to again in the next round.
        __syncthreads();
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        total[h] += __shfl_xor_sync(0xffffffffu, total[h], 1);
        total[h] += __shfl_xor_sync(0xffffffffu, total[h], 2);
        int t = first + warp * 16 + lane / 4 + h * 8;
        if (lane % 4 == 0 && t < T)
            lse[((long long)b * gridDim.y + head) * T + t] = (highest[h] + log2f(total[h])) / LOG2_E;
    }
    store_rows(out, of_activation(b, head, T, C), first, T, sums, 1.0f / total[0], 1.0f / total[1]);
}

// dk and dv of TILE keys.  Grid: (ceil(T / TILE), NH, B).
extern "C" __global__ void __launch_bounds__(THREADS) attention_bwd_keys(
    elem* __restrict__ dqkv,        // [B, T, 3 C]: its k and v
    const elem* __restrict__ dout,  // [B, T, C]
    const elem* __restrict__ qkv,   // [B, T, 3 C]
    const float* __restrict__ lse,  // [B, NH, T]
    const float* __restrict__ D,    // [B, NH, T]
    float scale,                    // 1 / sqrt(HS)
    int B,
    int T,
    int C
) {
    extern __shared__ __align__(128) unsigned char shared[];
    int first = blockIdx.x * TILE, head = blockIdx.y, b = blockIdx.z, lane = threadIdx.x % 32;
    unsigned int tile_q = shared_address(shared), tile_dout = tile_q + TILE_BYTES;
    float* row_lse = (float*)(shared + 2 * TILE_BYTES);
    float* row_d = row_lse + TILE;
    Head queries = part_of_qkv(0, b, head, T, C), upstream = of_activation(b, head, T, C);
    // Own keys and values go through the same tiles, and stay in registers.
    copy_tile(tile_q, qkv, part_of_qkv(1, b, head, T, C), first, T);
    copy_tile(tile_dout, qkv, part_of_qkv(2, b, head, T, C), first, T);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    Fragments k, v;
    load_own(k, tile_q);
    load_own(v, tile_dout);

    Rows dk, dv;
    clear(dk);
    clear(dv);
    const float* own_lse = lse + ((long long)b * gridDim.y + head) * T;
    const float* own_d = D + ((long long)b * gridDim.y + head) * T;
    for (int start = 0; start < T; start += TILE) {
        __syncthreads();
        copy_tile(tile_q, qkv, queries, start, T);
        copy_tile(tile_dout, dout, upstream, start, T);
        commit_copies();
        if (threadIdx.x < TILE) {
            bool inside = start + threadIdx.x < T;
            // A query that is not there has no probabilities: exp2(-infinity).
            row_lse[threadIdx.x] = inside ? own_lse[start + threadIdx.x] * LOG2_E : INFINITY;
            row_d[threadIdx.x] = inside ? own_d[start + threadIdx.x] : 0.0f;
        }
        wait_copies<0>();
        __syncthreads();
        Scores p, ds;
        rows_times_rows(p, k, tile_q);
#pragma unroll
        for (int n = 0; n < TILE / 8; ++n)
#pragma unroll
            for (int r = 0; r < 4; ++r)
                p[n][r] = exp2f(fmaf(p[n][r], scale * LOG2_E, -row_lse[n * 8 + lane % 4 * 2 + r % 2]));
        weighted_rows(dv, p, tile_dout);
        rows_times_rows(ds, v, tile_dout);
#pragma unroll
        for (int n = 0; n < TILE / 8; ++n)
#pragma unroll
            for (int r = 0; r < 4; ++r) ds[n][r] = p[n][r] * (ds[n][r] - row_d[n * 8 + lane % 4 * 2 + r % 2]);
        weighted_rows(dk, ds, tile_q);
    }
    store_rows(dqkv, part_of_qkv(1, b, head, T, C), first, T, dk, scale, scale);
    store_rows(dqkv, part_of_qkv(2, b, head, T, C), first, T, dv, 1.0f, 1.0f);
}

// dq of TILE queries.  Grid: (ceil(T / TILE), NH, B).
extern "C" __global__ void __launch_bounds__(THREADS) attention_bwd_queries(
    elem* __restrict__ dqkv,        // [B, T, 3 C]: its q
    const elem* __restrict__ dout,  // [B, T, C]
    const elem* __restrict__ qkv,   // [B, T, 3 C]
    const float* __restrict__ lse,  // [B, NH, T]
    const float* __restrict__ D,    // [B, NH, T]
    float scale,                    // 1 / sqrt(HS)
    int B,
    int T,
    int C
) {
    extern __shared__ __align__(128) unsigned char shared[];
    int first = blockIdx.x * TILE, head = blockIdx.y, b = blockIdx.z, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned int tile_k = shared_address(shared), tile_v = tile_k + TILE_BYTES;
    Head keys = part_of_qkv(1, b, head, T, C), values = part_of_qkv(2, b, head, T, C);
    copy_tile(tile_k, qkv, part_of_qkv(0, b, head, T, C), first, T);
    copy_tile(tile_v, dout, of_activation(b, head, T, C), first, T);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    Fragments q, upstream;
    load_own(q, tile_k);
    load_own(upstream, tile_v);
    float row_lse[2], row_d[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        int t = first + warp * 16 + lane / 4 + h * 8;
        long long at = ((long long)b * gridDim.y + head) * T + t;
        row_lse[h] = t < T ? lse[at] * LOG2_E : INFINITY;
        row_d[h] = t < T ? D[at] : 0.0f;
    }
    Rows dq;
    clear(dq);
    for (int start = 0; start < T; start += TILE) {
        __syncthreads();
        copy_tile(tile_k, qkv, keys, start, T);
        copy_tile(tile_v, qkv, values, start, T);
        commit_copies();
        wait_copies<0>();
        __syncthreads();
        Scores p, ds;
        rows_times_rows(p, q, tile_k);
        rows_times_rows(ds, upstream, tile_v);
#pragma unroll
        for (int n = 0; n < TILE / 8; ++n)
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                // Keys that are not there are rows of zeros: what they are weighted with does not matter.
                float probability = exp2f(fmaf(p[n][r], scale * LOG2_E, -row_lse[r / 2]));
                ds[n][r] = probability * (ds[n][r] - row_d[r / 2]);
            }
        weighted_rows(dq, ds, tile_k);
    }
    store_rows(dqkv, part_of_qkv(0, b, head, T, C), first, T, dq, scale, scale);
}

#else

constexpr int ROWS = 32;          // tokens of a block
constexpr int STRIDE = HS + 1;    // no bank conflicts along a column
constexpr int LANES = THREADS / ROWS;
constexpr int OWN = (HS + LANES - 1) / LANES;  // of a row's elements that a thread sums

// ROWS rows of a head; zeros beyond T.
__device__ __forceinline__ void copy_tile(float* to, const elem* data, Head rows, int first, int T) {
    for (int index = threadIdx.x; index < ROWS * HS; index += THREADS) {
        int row = index / HS, i = index % HS;
        to[row * STRIDE + i] = first + row < T ? data[rows.first + (long long)(first + row) * rows.stride + i] : 0.0f;
    }
}

__device__ __forceinline__ float dot(const float* a, const float* b) {
    float sum = 0.0f;
#pragma unroll 8
    for (int i = 0; i < HS; ++i) sum = fmaf(a[i], b[i], sum);
    return sum;
}

// Grid: (ceil(T / 32), NH, B). Four threads share a query: each scores every fourth key and sums every fourth element.
extern "C" __global__ void __launch_bounds__(THREADS) attention_fwd(
    elem* __restrict__ out,        // [B, T, C]
    float* __restrict__ lse,       // [B, NH, T]
    const elem* __restrict__ qkv,  // [B, T, 3 C]
    float scale,                   // 1 / sqrt(HS)
    int B,
    int T,
    int C
) {
    extern __shared__ __align__(128) unsigned char shared[];
    float* tile_q = (float*)shared;
    float* tile_k = tile_q + ROWS * STRIDE;
    float* tile_v = tile_k + ROWS * STRIDE;
    float* p = tile_v + ROWS * STRIDE;  // [ROWS][ROWS + 1]
    int first = blockIdx.x * ROWS, head = blockIdx.y, b = blockIdx.z;
    int row = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    copy_tile(tile_q, qkv, part_of_qkv(0, b, head, T, C), first, T);
    float sums[OWN], highest = -INFINITY, total = 0.0f;
#pragma unroll
    for (int i = 0; i < OWN; ++i) sums[i] = 0.0f;
    for (int start = 0; start < T; start += ROWS) {
        __syncthreads();
        copy_tile(tile_k, qkv, part_of_qkv(1, b, head, T, C), start, T);
        copy_tile(tile_v, qkv, part_of_qkv(2, b, head, T, C), start, T);
        __syncthreads();
        int keys = min(ROWS, T - start);
        float previous = highest;
        for (int s = lane; s < keys; s += LANES) {
            float score = dot(tile_q + row * STRIDE, tile_k + s * STRIDE) * scale;
            p[row * (ROWS + 1) + s] = score;
            highest = fmaxf(highest, score);
        }
#pragma unroll
        for (int other = 1; other < LANES; other *= 2) highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, other));
        float shrink = expf(previous - highest);
        total *= shrink;
#pragma unroll
        for (int i = 0; i < OWN; ++i) sums[i] *= shrink;
        for (int s = lane; s < keys; s += LANES) {
            float weight = expf(p[row * (ROWS + 1) + s] - highest);
            p[row * (ROWS + 1) + s] = weight;
            total += weight;
        }
        __syncwarp();
        for (int s = 0; s < keys; ++s)
#pragma unroll
            for (int i = 0; i < OWN; ++i)
                if (lane + i * LANES < HS)
                    sums[i] = fmaf(p[row * (ROWS + 1) + s], tile_v[s * STRIDE + lane + i * LANES], sums[i]);
    }
#pragma unroll
    for (int other = 1; other < LANES; other *= 2) total += __shfl_xor_sync(0xffffffffu, total, other);
    int t = first + row;
    if (t >= T) return;
    if (lane == 0) lse[((long long)b * gridDim.y + head) * T + t] = highest + logf(total);
    Head to = of_activation(b, head, T, C);
#pragma unroll
    for (int i = 0; i < OWN; ++i)
        if (lane + i * LANES < HS) out[to.first + (long long)t * to.stride + lane + i * LANES] = sums[i] / total;
}

// dk and dv of 32 keys.  Grid: (ceil(T / 32), NH, B).
extern "C" __global__ void __launch_bounds__(THREADS) attention_bwd_keys(
    elem* __restrict__ dqkv,        // [B, T, 3 C]: its k and v
    const elem* __restrict__ dout,  // [B, T, C]
    const elem* __restrict__ qkv,   // [B, T, 3 C]
    const float* __restrict__ lse,  // [B, NH, T]
    const float* __restrict__ D,    // [B, NH, T]
    float scale,                    // 1 / sqrt(HS)
    int B,
    int T,
    int C
) {
    extern __shared__ __align__(128) unsigned char shared[];
    float* tile_k = (float*)shared;
    float* tile_v = tile_k + ROWS * STRIDE;
    float* tile_q = tile_v + ROWS * STRIDE;
    float* tile_dout = tile_q + ROWS * STRIDE;
    float* p = tile_dout + ROWS * STRIDE;   // [ROWS][ROWS + 1], by key and query
    float* ds = p + ROWS * (ROWS + 1);
    int first = blockIdx.x * ROWS, head = blockIdx.y, b = blockIdx.z;
    int row = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    copy_tile(tile_k, qkv, part_of_qkv(1, b, head, T, C), first, T);
    copy_tile(tile_v, qkv, part_of_qkv(2, b, head, T, C), first, T);
    const float* own_lse = lse + ((long long)b * gridDim.y + head) * T;
    const float* own_d = D + ((long long)b * gridDim.y + head) * T;
    float dk[OWN], dv[OWN];
#pragma unroll
    for (int i = 0; i < OWN; ++i) dk[i] = dv[i] = 0.0f;
    for (int start = 0; start < T; start += ROWS) {
        __syncthreads();
        copy_tile(tile_q, qkv, part_of_qkv(0, b, head, T, C), start, T);
        copy_tile(tile_dout, dout, of_activation(b, head, T, C), start, T);
        __syncthreads();
        int queries = min(ROWS, T - start);
        for (int s = lane; s < queries; s += LANES) {
            float weight = expf(dot(tile_k + row * STRIDE, tile_q + s * STRIDE) * scale - own_lse[start + s]);
            p[row * (ROWS + 1) + s] = weight;
            ds[row * (ROWS + 1) + s] = weight * (dot(tile_v + row * STRIDE, tile_dout + s * STRIDE) - own_d[start + s]);
        }
        __syncwarp();
        for (int s = 0; s < queries; ++s)
#pragma unroll
            for (int i = 0; i < OWN; ++i)
                if (lane + i * LANES < HS) {
                    dv[i] = fmaf(p[row * (ROWS + 1) + s], tile_dout[s * STRIDE + lane + i * LANES], dv[i]);
                    dk[i] = fmaf(ds[row * (ROWS + 1) + s], tile_q[s * STRIDE + lane + i * LANES], dk[i]);
                }
    }
    int t = first + row;
    if (t >= T) return;
    Head keys = part_of_qkv(1, b, head, T, C), values = part_of_qkv(2, b, head, T, C);
#pragma unroll
    for (int i = 0; i < OWN; ++i)
        if (lane + i * LANES < HS) {
            dqkv[keys.first + (long long)t * keys.stride + lane + i * LANES] = dk[i] * scale;
            dqkv[values.first + (long long)t * values.stride + lane + i * LANES] = dv[i];
        }
}

// dq of 32 queries.  Grid: (ceil(T / 32), NH, B).
extern "C" __global__ void __launch_bounds__(THREADS) attention_bwd_queries(
    elem* __restrict__ dqkv,        // [B, T, 3 C]: its q
    const elem* __restrict__ dout,  // [B, T, C]
    const elem* __restrict__ qkv,   // [B, T, 3 C]
    const float* __restrict__ lse,  // [B, NH, T]
    const float* __restrict__ D,    // [B, NH, T]
    float scale,                    // 1 / sqrt(HS)
    int B,
    int T,
    int C
) {
    extern __shared__ __align__(128) unsigned char shared[];
    float* tile_q = (float*)shared;
    float* tile_dout = tile_q + ROWS * STRIDE;
    float* tile_k = tile_dout + ROWS * STRIDE;
    float* tile_v = tile_k + ROWS * STRIDE;
    float* ds = tile_v + ROWS * STRIDE;  // [ROWS][ROWS + 1]
    int first = blockIdx.x * ROWS, head = blockIdx.y, b = blockIdx.z;
    int row = threadIdx.x / LANES, lane = threadIdx.x % LANES, t = first + row;
    copy_tile(tile_q, qkv, part_of_qkv(0, b, head, T, C), first, T);
    copy_tile(tile_dout, dout, of_activation(b, head, T, C), first, T);
    long long at = ((long long)b * gridDim.y + head) * T + min(t, T - 1);
    float own_lse = lse[at], own_d = D[at], dq[OWN];
#pragma unroll
    for (int i = 0; i < OWN; ++i) dq[i] = 0.0f;
    for (int start = 0; start < T; start += ROWS) {
        __syncthreads();
        copy_tile(tile_k, qkv, part_of_qkv(1, b, head, T, C), start, T);
        copy_tile(tile_v, qkv, part_of_qkv(2, b, head, T, C), start, T);
        __syncthreads();
        int keys = min(ROWS, T - start);
        for (int s = lane; s < keys; s += LANES) {
            float weight = expf(dot(tile_q + row * STRIDE, tile_k + s * STRIDE) * scale - own_lse);
            ds[row * (ROWS + 1) + s] = weight * (dot(tile_dout + row * STRIDE, tile_v + s * STRIDE) - own_d);
        }
        __syncwarp();
        for (int s = 0; s < keys; ++s)
#pragma unroll
            for (int i = 0; i < OWN; ++i)
                if (lane + i * LANES < HS)
                    dq[i] = fmaf(ds[row * (ROWS + 1) + s], tile_k[s * STRIDE + lane + i * LANES], dq[i]);
    }
    if (t >= T) return;
    Head to = part_of_qkv(0, b, head, T, C);
#pragma unroll
    for (int i = 0; i < OWN; ++i)
        if (lane + i * LANES < HS) dqkv[to.first + (long long)t * to.stride + lane + i * LANES] = dq[i] * scale;
}

#endif
