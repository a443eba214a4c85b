// The product that every linear layer is made of:  C[i, j] = sum over k of A(i, k) B(k, j).
//
//   gemm_wgmma.cuh   bf16 on sm_90: wgmma by groups of four warps
//   gemm_mma.cuh     bf16 elsewhere: mma.sync m16n8k16
//   gemm_fma.cuh     f32: plain FMA
//
// All sum in f32 and take the same operands. One lies in memory in one of two ways:
//   K_INNER   [i, k] row-major, k contiguous:  x and W of  x W^T
//   K_OUTER   [k, i] row-major, i contiguous:  W of  g W,  and both operands of  g^T h
//
// The reduction runs over chunks of TILE_K. `Steps` says which, as runs of chunks that contribute to the same window of C: the
// channels of a window, or the rows of the samples whose windows meet the tile. What a chunk covers beyond a window is zero
// in memory: the kernels that write windowed activations promise that. What it covers beyond `limit`, or by wgmma beyond the operands'
// maps, is read as zero.
//
// product(..) is a tile of TILE_M x TILE_N by a block of THREADS threads. each_tile(..) calls its argument with the tiles of a matrix, and
// with what computes one in place of product(..), by a block of TILES_THREADS.
//
// `epilogue(column, sample)` is called for OUT_WIDTH columns of a thread and returns an Epilogue, which is given them for rows of that
// sample; `tokens` rows are a sample's, all of them where the epilogue does not ask.
//
// Several blocks may share a tile's reduction: `others.complete(sums)` is called before the epilogue (gemm_shares.cuh).
#pragma once

#include "gemm_shares.cuh"
#include "gemm_steps.cuh"

// What becomes of a row's sums. `fetch(row)` reads what `store(row, sums, fetched)` needs: where registers allow it (wgmma), of several
// rows before the first is stored, so that the reads of one are not waited for before the next. Without branches, so that the
// instructions of those rows run side by side.
template <typename Fetch, typename Store>
struct Epilogue {
    Fetch fetch;
    Store store;
};

template <typename Fetch, typename Store>
__device__ __forceinline__ Epilogue<Fetch, Store> epilogue_of(Fetch fetch, Store store) {
    return {fetch, store};
}

struct Nothing {};

// Without anything to read.
template <typename Store>
__device__ __forceinline__ auto epilogue_of(Store store) {
    return epilogue_of([](int) { return Nothing{}; }, [=](int i, float (&value)[OUT_WIDTH], Nothing) { store(i, value); });
}

// Shared memory of a product.
extern __shared__ __align__(1024) unsigned char tiles[];

#if defined(WGMMA)
#include "gemm_wgmma.cuh"
#elif defined(ELEM_BF16)
#include "gemm_mma.cuh"
#else
#include "gemm_fma.cuh"
#endif

#ifndef WGMMA
// The tile of C at `row` and `column`, of `rows` and `columns`, `tokens` rows a sample, over the chunks of `steps`, where
// `operands(source)` says of what.
template <Layout A, Layout B, typename Steps, typename Sources, typename Epilogue, typename Parts = NoParts>
__device__ __forceinline__ void product(
    int row, int rows, int column, int columns, int tokens, Steps steps, Sources operands, unsigned char* tiles, Epilogue epilogue,
    Parts others = {}
) {
    Accumulators sums;
    clear(sums);
    accumulate<A, B>(sums, row, column, steps, operands, tiles);
    if (!others.complete(sums)) return;
    finish(sums, row, rows, column, columns, tokens, tiles, epilogue);
}

template <Layout A, Layout B>
struct Product {
    template <typename Steps, typename Sources, typename Epilogue>
    __device__ __forceinline__ void operator()(
        int row, int rows, int column, int columns, int tokens, const Steps& steps, Sources operands, Epilogue epilogue
    ) {
        product<A, B>(row, rows, column, columns, tokens, steps, operands, tiles, epilogue);
    }
};

// A block for each tile.
template <Layout A, Layout B, typename Each>
__device__ __forceinline__ void each_tile(int, int, Each each) {
    Product<A, B> product;
    each(blockIdx.y * TILE_M, blockIdx.x * TILE_N, product);
}
#endif

// OUT_WIDTH numbers that an epilogue keeps.
struct Wide {
    float x[OUT_WIDTH];
};

__device__ __forceinline__ void load_wide(float (&x)[OUT_WIDTH], const elem* from) {
    Vector<OUT_WIDTH> vector;
    vector.load(from);
    vector.unpack(x);
}

__device__ __forceinline__ void store_wide(elem* to, const float (&x)[OUT_WIDTH], bool is_stored = true) {
    Vector<OUT_WIDTH> vector;
    // Before the question, so that a predicate answers it, and no branch.
    vector.pack(x);
    if (is_stored) vector.store(to);
}

// The epilogue of weight gradients [rows, columns]:  = or +=.
__device__ __forceinline__ auto store_gradient(float* to, int columns, int add) {
    return [=](int c, int) {
        return epilogue_of(
            [=](int r) {
                Wide before = {};
                if (add) load_floats(before.x, to + (long long)r * columns + c, true);
                return before;
            },
            [=](int r, float (&value)[OUT_WIDTH], Wide before) {
#pragma unroll
                for (int e = 0; e < OUT_WIDTH; ++e) value[e] += before.x[e];
                store_floats(to + (long long)r * columns + c, value, true);
            }
        );
    };
}

// sigmoid(1.5957691 x (1 + 0.044715 x^2)) from the hardware's exponential and reciprocal: within 1e-6, in six instructions. (Calls would
// spill the accumulators, and without .ftz each of the two comes with a case for subnormal numbers.)
__device__ __forceinline__ float gelu_sigmoid(float x) {
    float power, sigmoid;
    // 2^power = e^(-1.5957691 x ..)
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * fmaf(-0.10294324f * x, x, -2.3022082f)));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(sigmoid) : "f"(1.0f + power));
    return sigmoid;
}

// GELU in its tanh form:  gelu(x) = x s.
__device__ __forceinline__ float gelu(float x) {
    return x * gelu_sigmoid(x);
}

__device__ __forceinline__ float gelu_derivative(float x) {
    float s = gelu_sigmoid(x);
    return fmaf(x * s * (1.0f - s), 1.5957691216057308f * fmaf(0.134145f * x, x, 1.0f), s);
}
