// Adds the embedding of each sample's class (formulas: src/ops/label_embed/mod.rs).
//
//   base [B, C], labels [B], table [rows, C] -> y = base + table[labels]   [B, C]
#include "common.cuh"

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

// One thread an element of the table, so that the samples of a class are added in their order.
// Grid: ceil(rows C / 256) blocks of 256 threads.
extern "C" __global__ void __launch_bounds__(256) label_embed_bwd(
    float* __restrict__ dtable,              // [rows, C]  = or +=
    const float* __restrict__ dy,            // [B, C]
    const unsigned int* __restrict__ labels, // [B]
    int add,
    int B,
    int C,
    int rows
) {
    long long i = (long long)blockIdx.x * 256 + threadIdx.x;
    if (i >= (long long)rows * C) return;
    unsigned int row = (unsigned int)(i / C);
    int c = (int)(i % C);
    float sum = add ? dtable[i] : 0.0f;
    for (int b = 0; b < B; ++b)
        if (labels[b] == row) sum += dy[(long long)b * C + c];
    dtable[i] = sum;
}
