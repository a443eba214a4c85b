// What a product goes over: operands, windows, and the chunks of its reduction (gemm.cuh).
#pragma once

#include "tensor_core.cuh"
#include "vector.cuh"

#ifndef TILE_M
#define TILE_M 64
#endif
#ifndef TILE_N
#define TILE_N 64
#endif

enum Layout { K_INNER, K_OUTER };

// As in src/ops/cuda/tile.rs. A thread's registers must do for BLOCKS on a multiprocessor; 0: unsaid. (Two large tiles of mma.sync fit, but
// asked for that the assembler spills.)
#if defined(ELEM_BF16) && defined(__CUDA_ARCH_FEAT_SM90_ALL) && TILE_M * TILE_N > 64 * 64
#define WGMMA
constexpr int TILE_K = 64;
constexpr int THREADS = TILE_M * 2;         // that multiply: a group of 128 for 64 rows
constexpr int TILES_THREADS = 2 * THREADS;  // of a kernel of many tiles
constexpr int BLOCKS = 1;
constexpr int PART = 64;   // columns that a tile is cut by
constexpr int ALIGN = 16;  // channels: a row's copies start with a sector of 32 bytes
#else
constexpr int TILE_K = 32;
constexpr int THREADS = 128;
constexpr int TILES_THREADS = THREADS;
constexpr int STAGES = 3;
constexpr int BLOCKS = TILE_M * TILE_N > 64 * 64 ? 0 : 4;
constexpr int PART = 16;  // rows and columns of the parts of a tile that are left out
constexpr int ALIGN = 8;  // channels: copies are of 16 bytes
#endif

// Columns of an epilogue: 16 bytes of elem in bf16.
#ifdef ELEM_BF16
constexpr int OUT_WIDTH = 8;
#else
constexpr int OUT_WIDTH = 1;
#endif

// A matrix of elem, `count` rows (or columns) of it along i.
struct Operand {
    const elem* data;
    long long stride;  // elements from one row in memory to the next
    int count;
    const TensorMap* map;  // for tensor copies
    int k = 0;             // where k starts in the map
};

// Both operands, k below `limit`.
struct Operands {
    Operand a;
    Operand b;
    int limit;
};

// Channels or rows start .. end.
struct Range {
    int start;
    int end;
};

// Which rows or columns of C a window names.
enum Side { NEITHER, ROWS_OF_C, COLUMNS_OF_C };

// Chunks k, k + TILE_K, .. below end, which contribute to the same window of C.
struct Run {
    int k;
    int end;
    Range window;
    bool whole;  // the window holds the whole tile
    int source;  // of which operands

    __device__ bool empty() const { return k >= end; }
};

// One run.
template <Side SIDE>
struct OneRun {
    static constexpr Side WINDOWED = SIDE;
    static constexpr bool IS_CUT = SIDE == COLUMNS_OF_C;  // the same columns for all of the reduction
    static constexpr bool IS_ONE_RUN = true;
    Run run;
    __device__ int chunks() const { return (max(run.end - run.k, 0) + TILE_K - 1) / TILE_K; }
    __device__ Run first() const { return run; }
    __device__ Run after(Run) const { return Run{0, 0, {0, 0}, false, 0}; }
};

// The reduction over start .. end for all of C.
__device__ __forceinline__ OneRun<NEITHER> all_of(int start, int end) { return {{start, end, {0, 0}, true, 0}}; }

// The reduction over 0 .. end for the columns of C in a window; `column` is the tile's first. Nothing, if the window misses the tile.
__device__ __forceinline__ OneRun<COLUMNS_OF_C> windowed_columns(int end, Range window, int column) {
    bool meets = column < window.end && column + TILE_N > window.start;
    return {{0, meets ? end : 0, window, window.start <= column && column + TILE_N <= window.end, 0}};
}

// The smallest window that holds those of samples first .. last.
__device__ __forceinline__ Range union_of(const int* windows, int first, int last) {
    Range all{windows[2 * first], windows[2 * first] + windows[2 * first + 1]};
    for (int b = first + 1; b <= last; ++b) {
        int start = windows[2 * b];
        all.start = min(all.start, start);
        all.end = max(all.end, start + windows[2 * b + 1]);
    }
    return all;
}

// The smallest window that holds those of the samples that the tile's rows, from `row` on, belong to.
__device__ __forceinline__ Range window_of_rows(const int* windows, int row, int rows, int tokens) {
    return union_of(windows, row / tokens, (min(row + TILE_M, rows) - 1) / tokens);
}

// The reduction over the channels of a window, from an aligned one on.
__device__ __forceinline__ OneRun<NEITHER> window_steps(Range window) { return all_of(window.start & -ALIGN, window.end); }

// The reduction over the rows first_row .. end of a batch that leaves out samples whose windows miss the tile's channels, start .. end,
// which are its rows or its columns; both are multiples of TILE_K, or the end of the batch. Then, over all of
// `more_rows` rows of `more` other pairs of operands.
template <Side SIDE>
struct MeetingRows {
    static constexpr Side WINDOWED = SIDE;
    static constexpr bool IS_CUT = false;
    static constexpr bool IS_ONE_RUN = false;
    const int* windows;
    int tokens;
    int rows;  // B T
    int first_row;
    int end;
    Range channels;
    int more;
    int more_rows;

    // The window of the samples that chunk k holds rows of.
    __device__ Range window(int k) const { return union_of(windows, k / tokens, (min(k + TILE_K, rows) - 1) / tokens); }

    __device__ bool holds(Range window) const { return window.start <= channels.start && channels.end <= window.end; }
    __device__ bool meets(Range window) const { return window.start < channels.end && window.end > channels.start; }

    // How many, by all lanes of a warp, where a chunk is left out if all of its samples' windows miss the tile.
    __device__ int chunks() const {
        int count = more * ((more_rows + TILE_K - 1) / TILE_K);
        for (int k = first_row; k < end; k += 32 * TILE_K) {
            int own = k + threadIdx.x % 32 * TILE_K;
            count += __popc(__ballot_sync(0xffffffffu, own < end && meets(window(own))));
        }
        return count;
    }

    // The run that starts with the first chunk from k on that some sample in it needs.
    __device__ Run from(int k) const {
        for (; k < end; k += TILE_K) {
            Range own = window(k);
            if (meets(own)) {
                Run run{k, k + TILE_K, own, holds(own), 0};
                // On with the chunks that are as good as this one: of the same sample, or needed by the whole tile too.
                while (run.end < end) {
                    Range next = window(run.end);
#ifdef WGMMA
                    bool goes_on = meets(next);  // it computes whole tiles
#else
                    bool same = next.start == own.start && next.end == own.end;
                    bool goes_on = same || run.whole && holds(next);
#endif
                    if (!goes_on) break;
                    // To the last chunk that lies in that chunk's first sample alone.
                    run.end = max(run.end + TILE_K, (run.end / tokens + 1) * tokens / TILE_K * TILE_K);
                }
                run.end = min(run.end, end);
                return run;
            }
            // All of them miss: on with the chunk that holds the next sample's first row.
            k = max(k, (k / tokens + 1) * tokens / TILE_K * TILE_K - TILE_K);
        }
        return Run{0, more > 0 ? more_rows : 0, channels, true, 1};
    }

    __device__ Run first() const { return from(first_row); }
    __device__ Run after(Run run) const {
        return run.source == 0 ? from(run.end) : Run{0, run.source < more ? more_rows : 0, channels, true, run.source + 1};
    }
};
