// Linear layers of few rows (rows.cuh) in bf16, by mma.sync: each weight is read from memory once for 32 samples.
//
// Numbers in f32 are split into three of bf16, which hold all of their bits, a product for each. What lies in f32 starts at a multiple of
// 16 bytes, as buffers do. Forward, the order of k within 32 is another than that of the instruction, the same in both operands, so that a
// lane's share of a row is 16 bytes: of eight numbers, the first four are those of one m16n8k16, the others of a second.
#pragma once

#include "tensor_core.cuh"
#include "vector.cuh"

constexpr int MMA_THREADS = 128;
constexpr int MMA_WARPS = MMA_THREADS / 32;
constexpr int MMA_SAMPLES = 32;  // at a time
constexpr int MMA_OUTPUTS = 16;  // of a warp, forward
constexpr int K_CHUNK = 192;     // inputs whose weights are on their way at the same time
constexpr int K_PITCH = K_CHUNK + 32;  // of rows in shared memory: two of them are in different banks
// Of a block of dx:
constexpr int MMA_COLUMNS = 64;
constexpr int INPUT_STAGES = 3;  // one is used, the others are on their way
constexpr int INPUT_BLOCKS = 2;  // of a multiprocessor

// Whether rows of the weight, and of what has its N columns, can be read in vectors; as in src/ops/cuda/rows.rs.
__device__ __forceinline__ bool are_mma_rows(const elem* weight, int K, int N) {
    return K % 8 == 0 && N % 8 == 0 && is_aligned(weight);
}

constexpr int F32_PARTS = 3;

// Two numbers as sums of parts in bf16: what one leaves over is the next.
__device__ __forceinline__ void split(unsigned int (&parts)[F32_PARTS], float a, float b) {
#pragma unroll
    for (unsigned int& part : parts) {
        part = pack_bf16(a, b);
        a -= low_bf16(part);
        b -= high_bf16(part);
    }
}

// Tensor cores cut off what a sum cannot hold, where an addition rounds: sums are of few products, smallest parts first, and added here.
__device__ __forceinline__ void add(float (&sums)[4], const float (&partial)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] += partial[i];
}

// Rows of x [B, K] in shared memory.
typedef elem RowsMemory[F32_PARTS][MMA_SAMPLES][K_PITCH];

// Samples from `first` and inputs from k0 on, zeros beyond.
__device__ __forceinline__ void copy_rows(RowsMemory& to, const float* x, int first, int k0, int B, int K) {
    constexpr int FOURS = K_CHUNK / 4, AT_ONCE = 6;  // of a row, and of a thread on their way
    static_assert(MMA_SAMPLES * FOURS % (MMA_THREADS * AT_ONCE) == 0);
#pragma unroll 1
    for (int i0 = threadIdx.x; i0 < MMA_SAMPLES * FOURS; i0 += MMA_THREADS * AT_ONCE) {
        float4 fours[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            int i = i0 + j * MMA_THREADS, row = first + i / FOURS, k = k0 + i % FOURS * 4;
            fours[j] = float4{};
            if (row < B && k < K) fours[j] = *(const float4*)(x + (long long)row * K + k);
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            int i = i0 + j * MMA_THREADS;
            unsigned int first_two[F32_PARTS], last_two[F32_PARTS];
            split(first_two, fours[j].x, fours[j].y);
            split(last_two, fours[j].z, fours[j].w);
#pragma unroll
            for (int part = 0; part < F32_PARTS; ++part)
                *(uint2*)&to[part][i / FOURS][i % FOURS * 4] = make_uint2(first_two[part], last_two[part]);
        }
    }
}

// Grid: (ceil(N / (MMA_WARPS MMA_OUTPUTS)), ceil(B / MMA_SAMPLES)) blocks of MMA_THREADS.  A = weights, from memory, B = x.
__device__ __forceinline__ void rows_forward_mma(
    RowsMemory& memory, float* y, const float* x, const elem* weight, const float* bias, int B, int K, int N
) {
    constexpr int TILES = MMA_SAMPLES / 8, STEPS = K_CHUNK / 32;
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, first = blockIdx.y * MMA_SAMPLES;
    int n[2];  // outputs of the lane's weights
    const elem* from[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        n[i] = (blockIdx.x * MMA_WARPS + threadIdx.x / 32) * MMA_OUTPUTS + i * 8 + g;
        from[i] = weight + (long long)min(n[i], N - 1) * K + t * 8;
    }
    float sums[TILES][4] = {};
#pragma unroll 1
    for (int k0 = 0; k0 < K; k0 += K_CHUNK) {
        uint4 weights[STEPS][2];
#pragma unroll
        for (int s = 0; s < STEPS; ++s)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                weights[s][i] = uint4{};
                if (k0 + s * 32 + t * 8 < K) weights[s][i] = *(const uint4*)(from[i] + k0 + s * 32);
            }
        __syncthreads();
        copy_rows(memory, x, first, k0, B, K);
        __syncthreads();
#pragma unroll
        for (int s = 0; s < STEPS; ++s) {
            if (k0 + s * 32 >= K) continue;
            uint4 upper = weights[s][0], lower = weights[s][1];
            const unsigned int a[2][4] = {{upper.x, lower.x, upper.y, lower.y}, {upper.z, lower.z, upper.w, lower.w}};
#pragma unroll
            for (int j = 0; j < TILES; ++j) {
                float partial[4] = {};
#pragma unroll
                for (int part = F32_PARTS - 1; part >= 0; --part) {
                    uint4 b = *(const uint4*)&memory[part][j * 8 + g][s * 32 + t * 8];
                    mma(partial, a[0], b.x, b.y);
                    mma(partial, a[1], b.z, b.w);
                }
                add(sums[j], partial);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if (n[i] >= N) continue;
        float constant = bias[n[i]];
#pragma unroll
        for (int j = 0; j < TILES; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                int b = first + j * 8 + t * 2 + e;
                if (b < B) y[(long long)b * N + n[i]] = sums[j][2 * i + e] + constant;
            }
    }
}

// What a warp of dx reads of the weight, each lane's own; in the end the sums of all warps. (Pitch: no bank conflicts.)
union InputMemory {
    uint4 stages[INPUT_STAGES][MMA_WARPS][8][32];
    float4 sums[MMA_WARPS][16][32 + 2];
};

// The part of dx that outputs `blockIdx.z` of gridDim.z give; the warps take turns of 32 of them.
// Grid: (ceil(K / MMA_COLUMNS), ceil(B / MMA_SAMPLES), splits) blocks of MMA_THREADS.  A = dy, B = weights: tile j of eight columns
// is the columns 8 i + j, so that a lane's share is 16 bytes of a row here too.
__device__ __forceinline__ void rows_backward_input_mma(
    InputMemory& memory, float* parts, const float* dy, const elem* weight, int B, int K, int N
) {
    constexpr int TURN = 32, ALL = TURN * MMA_WARPS;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, first = blockIdx.y * MMA_SAMPLES;
    int each = ((N + ALL - 1) / ALL + gridDim.z - 1) / gridDim.z * ALL, end = min(N, ((int)blockIdx.z + 1) * each);
    // Of the lane: four outputs from n on, and four from n + 16 on.
    int n = blockIdx.z * each + warp * TURN + t * 4, k = blockIdx.x * MMA_COLUMNS + g * 8;
    const elem* from = weight + (long long)n * K + k;
    int copied = n;
    auto copy = [&](int stage) {
        if (copied - t * 4 < end) {
#pragma unroll
            for (int step = 0; step < 2; ++step) {
                int bytes = copied + step * 16 < end && k < K ? 16 : 0;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    unsigned int to = shared_address(&memory.stages[stage][warp][step * 4 + i][lane]);
                    copy_async_or_zeros<0>(to, from + (long long)(step * 16 + i) * K, bytes);
                }
            }
        }
        commit_copies();
        copied += ALL;
        from += (long long)ALL * K;
    };
#pragma unroll
    for (int stage = 0; stage < INPUT_STAGES - 1; ++stage) copy(stage);
    const float* of_samples[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) of_samples[i] = dy + (long long)min(first + i * 8 + g, B - 1) * N + n;
    float sums[2][8][4] = {};
    int stage = 0;
    // A warp ends its loop as one.
#pragma unroll 1
    for (; n - t * 4 < end; n += ALL) {
        float4 upstream[4][2];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int step = 0; step < 2; ++step) {
                upstream[i][step] = float4{};
                if (n + step * 16 < end) upstream[i][step] = *(const float4*)(of_samples[i] + step * 16);
            }
            of_samples[i] += ALL;
        }
        wait_copies<INPUT_STAGES - 2>();
        // Into the stage of the turn before.
        copy(stage == 0 ? INPUT_STAGES - 1 : stage - 1);
#pragma unroll
        for (int step = 0; step < 2; ++step) {
            unsigned int a[F32_PARTS][2][4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float4 four = upstream[i][step];
                unsigned int first_two[F32_PARTS], last_two[F32_PARTS];
                split(first_two, four.x, four.y);
                split(last_two, four.z, four.w);
#pragma unroll
                for (int part = 0; part < F32_PARTS; ++part)
                    a[part][i / 2][i % 2] = first_two[part], a[part][i / 2][2 + i % 2] = last_two[part];
            }
            uint4 rows[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) rows[i] = memory.stages[stage][warp][step * 4 + i][lane];
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                auto both = [&](uint4 one, uint4 next) {
                    const unsigned int ones[4] = {one.x, one.y, one.z, one.w}, nexts[4] = {next.x, next.y, next.z, next.w};
                    return __byte_perm(ones[j / 2], nexts[j / 2], j % 2 ? 0x7632 : 0x5410);
                };
                unsigned int b0 = both(rows[0], rows[1]), b1 = both(rows[2], rows[3]);
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    float partial[4] = {};
#pragma unroll
                    for (int part = F32_PARTS - 1; part >= 0; --part) mma(partial, a[part][m], b0, b1);
                    add(sums[m][j], partial);
                }
            }
        }
        stage = stage == INPUT_STAGES - 1 ? 0 : stage + 1;
    }
    wait_copies<0>();
    __syncthreads();
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                int j = c % 2 * 4, r = 2 * i + c / 2;
                memory.sums[warp][(2 * m + i) * 4 + c][lane] =
                    make_float4(sums[m][j][r], sums[m][j + 1][r], sums[m][j + 2][r], sums[m][j + 3][r]);
            }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < MMA_SAMPLES * MMA_COLUMNS / 4 / MMA_THREADS; ++i) {
        int r = (i * MMA_THREADS + threadIdx.x) / (MMA_COLUMNS / 4), four = threadIdx.x % (MMA_COLUMNS / 4);
        int b = first + r, column = blockIdx.x * MMA_COLUMNS + four * 4;
        if (b >= B || column >= K) continue;
        float4 sum = {};
#pragma unroll
        for (int w = 0; w < MMA_WARPS; ++w) {
            float4 own = memory.sums[w][r / 8 * 4 + four % 4][r % 8 * 4 + four / 4];
            sum.x += own.x, sum.y += own.y, sum.z += own.z, sum.w += own.w;
        }
        *(float4*)(parts + ((long long)blockIdx.z * B + b) * K + column) = sum;
    }
}
