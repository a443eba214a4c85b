// Multi-head self-attention over packed queries, keys and values (formulas: src/ops/attention/mod.rs).
//
//   qkv [B, T, 3 C] = q | k | v, each [NH, HS] a token    S = q k^T / sqrt(HS)    P = softmax(S)    out = P v  [B, T, C]
//
// A block owns tokens of one head of one sample and walks over all others, a tile at a time. P never reaches memory: its
// accumulators are the next product's operand. Saved for backward: qkv, out, lse.
// Backward: D_t = dout_t . out_t;  dv = P^T dout,  dS = P (dout v^T - D),  dk = dS^T q / sqrt(HS),  dq = dS k / sqrt(HS). Every sum
// has one owner and a fixed order: dk and dv the blocks that own keys, dq those that own queries (attention_bwd.cuh), or all of
// them a block that owns a whole head (attention_bwd_head.cuh).
//
// HS is a definition, up to 128; in bf16 a multiple of 8. The launcher checks sizes, and chooses the other definitions.
#include "common.cuh"

#ifndef HS
#define HS 64
#endif

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

#ifdef ELEM_BF16
#include "attention_tiles.cuh"
#include "attention_fwd.cuh"
#if WHOLE_HEAD
#include "attention_bwd_head.cuh"
#else
#include "attention_bwd.cuh"
#endif
#else
#include "attention_f32.cuh"
#endif

// Grid and shared memory: at `forward`.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attention_fwd(
    elem* __restrict__ out,        // [B, T, C]
    float* __restrict__ lse,       // [B, NH, T]
    const elem* __restrict__ qkv,  // [B, T, 3 C]
    float scale,                   // 1 / sqrt(HS)
    int T,
    int C
) {
    extern __shared__ __align__(128) unsigned char shared[];
    forward(out, lse, qkv, scale, T, C, shared);
}

// Grid and shared memory: at `backward`.
extern "C" __global__ void __launch_bounds__(BACKWARD_THREADS, BACKWARD_BLOCKS) attention_bwd(
    elem* __restrict__ dqkv,        // [B, T, 3 C]
    const elem* __restrict__ dout,  // [B, T, C]
    const elem* __restrict__ qkv,   // [B, T, 3 C]
    const elem* __restrict__ out,   // [B, T, C]
    const float* __restrict__ lse,  // [B, NH, T]
    float scale,                    // 1 / sqrt(HS)
    int T,
    int C
) {
    extern __shared__ __align__(128) unsigned char shared[];
    backward(dqkv, dout, qkv, out, lse, scale, T, C, shared);
}
