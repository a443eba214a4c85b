// Adds the embedding of each sample's class (formulas: src/ops/label_embed/mod.rs).
//
//   base [B, C], labels [B], table [rows, C] -> y = base + table[labels]   [B, C]
#include "common.cuh"

constexpr int ROWS = 8;       // of the table, in a block
constexpr int COLUMNS = 256;  // of a warp

// Grid: ceil(B C / 256) blocks of 256 threads.
extern "C" __global__ void __launch_bounds__(256) label_embed_fwd(
    float* __restrict__ y,                   // [B, C]
    const float* __restrict__ base,          // [B, C]
    const float* __restrict__ table,         // [rows, C]
    const unsigned int* __restrict__ labels, // [B], below rows
    int B,
    int C
) {
    int i = blockIdx.x * 256 + threadIdx.x;
    if (i < B * C) y[i] = base[i] + table[(long long)labels[i / C] * C + i % C];
}

// A warp looks through the labels for those of its row, in their order; most rows have none.
// Grid: (ceil(C / 256), ceil(rows / ROWS)) blocks of 32 ROWS threads: a warp 256 columns of a row.
extern "C" __global__ void __launch_bounds__(32 * ROWS) label_embed_bwd(
    float* __restrict__ dtable,              // [rows, C]  = or +=
    const float* __restrict__ dy,            // [B, C]
    const unsigned int* __restrict__ labels, // [B]
    int add,
    int B,
    int C,
    int rows
) {
    int row = blockIdx.y * ROWS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    float sums[COLUMNS / 32];
#pragma unroll
    for (int i = 0; i < COLUMNS / 32; ++i) sums[i] = 0.0f;
    bool found = false;
    for (int first = 0; first < B; first += 32) {
        int b = first + lane;
        unsigned int own = __ballot_sync(0xffffffffu, b < B && labels[b] == row);
        found |= own != 0;
        for (; own != 0; own &= own - 1) {
            const float* from = dy + (long long)(first + __ffs(own) - 1) * C;
#pragma unroll
            for (int i = 0; i < COLUMNS / 32; ++i) {
                int c = blockIdx.x * COLUMNS + i * 32 + lane;
                if (c < C) sums[i] += from[c];
            }
        }
    }
    if (add && !found) return;
#pragma unroll
    for (int i = 0; i < COLUMNS / 32; ++i) {
        int c = blockIdx.x * COLUMNS + i * 32 + lane;
        if (c >= C) continue;
        float* to = dtable + (long long)row * C + c;
        *to = add ? *to + sums[i] : sums[i];
    }
}
