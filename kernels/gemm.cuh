// The product that every linear layer is made of:  C[i, j] = sum over k of A(i, k) B(k, j).
//
//   bf16   mma.sync m16n8k16 with f32 accumulators. Shared memory holds STAGES pairs of tiles, filled by 16-byte cp.async;
//          ldmatrix reads them without bank conflicts (the 16-byte chunks of a row are permuted).
//   f32    plain FMA over tiles in shared memory.
//
// An operand lies in memory in one of two ways:
//   K_INNER   [i, k] row-major, k contiguous:  x and W of  x W^T
//   K_OUTER   [k, i] row-major, i contiguous:  W of  g W,  and both operands of  g^T h
//
// The reduction runs over chunks of TILE_K. `Steps` says which, as runs of chunks that contribute to the same window of C: the
// channels of a window, or the rows of the samples whose windows meet the tile. What a chunk covers beyond a window is zero
// in memory: the kernels that write windowed activations promise that. What it covers beyond `limit` is read as zero.
//
// A block has THREADS threads and computes TILE_M x TILE_N: in bf16, a warp a quarter of it. An epilogue gets OUT_WIDTH columns
// of a row at a time:  `epilogue(column)` is called once for the columns of a thread, and what it returns for every row:  `(row, values)`.
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

constexpr int TILE_K = 32;
constexpr int STAGES = 3;
constexpr int THREADS = 128;
// Blocks of a multiprocessor that registers must do for; 0: unsaid. Two large tiles fit, but asked for that the assembler spills.
constexpr int BLOCKS = TILE_M * TILE_N > 64 * 64 ? 0 : 4;

// A matrix of elem, `count` rows (or columns) of it along i.
struct Operand {
    const elem* data;
    long long stride;  // elements from one row in memory to the next
    int count;
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

// Which rows or columns of C a window names. A warp leaves out the parts of 16 of its tile that the window misses.
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
    Run run;
    __device__ Run first() const { return run; }
    __device__ Run after(Run) const { return Run{0, 0, {0, 0}, false, 0}; }
};

// The reduction over start .. end for all of C.
__device__ __forceinline__ OneRun<NEITHER> all_of(int start, int end) { return {{start, end, {0, 0}, true, 0}}; }

// The reduction over 0 .. end for the columns of C in a window; `column` is the tile's first.
__device__ __forceinline__ OneRun<COLUMNS_OF_C> windowed_columns(int end, Range window, int column) {
    return {{0, end, window, window.start <= column && column + TILE_N <= window.end, 0}};
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
__device__ __forceinline__ OneRun<NEITHER> window_steps(Range window) { return all_of(window.start & ~7, window.end); }

// The reduction over the rows [B T] of a batch that leaves out samples whose windows miss the tile's channels, start .. end,
// which are its rows or its columns. Then, over all of `more_rows` rows of `more` other pairs of operands.
template <Side SIDE>
struct MeetingRows {
    static constexpr Side WINDOWED = SIDE;
    const int* windows;
    int tokens;
    int end;  // B T
    Range channels;
    int more;
    int more_rows;

    // The window of the samples that chunk k holds rows of.
    __device__ Range window(int k) const { return union_of(windows, k / tokens, (min(k + TILE_K, end) - 1) / tokens); }

    __device__ bool holds(Range window) const { return window.start <= channels.start && channels.end <= window.end; }

    // The run that starts with the first chunk from k on that some sample in it needs.
    __device__ Run from(int k) const {
        for (; k < end; k += TILE_K) {
            Range own = window(k);
            if (own.start < channels.end && own.end > channels.start) {
                Run run{k, k + TILE_K, own, holds(own), 0};
                // On with the chunks that are as good as this one: of the same sample, or needed by the whole tile too.
                while (run.end < end) {
                    Range next = window(run.end);
                    bool same = next.start == own.start && next.end == own.end;
                    if (!same && !(run.whole && holds(next))) break;
                    // To the last chunk that lies in that chunk's first sample alone.
                    run.end = max(run.end + TILE_K, (run.end / tokens + 1) * tokens / TILE_K * TILE_K);
                }
                return run;
            }
            // All of them miss: on with the chunk that holds the next sample's first row.
            k = max(k, (k / tokens + 1) * tokens / TILE_K * TILE_K - TILE_K);
        }
        return Run{0, more > 0 ? more_rows : 0, channels, true, 1};
    }

    __device__ Run first() const { return from(0); }
    __device__ Run after(Run run) const {
        return run.source == 0 ? from(run.end) : Run{0, run.source < more ? more_rows : 0, channels, true, run.source + 1};
    }
};

#ifdef ELEM_BF16

constexpr int OUT_WIDTH = 8;  // columns of an epilogue: 16 bytes of elem
constexpr int WARP_M = TILE_M / 2, WARP_N = TILE_N / 2;
constexpr int PARTS_M = WARP_M / 16, PARTS_N = WARP_N / 16;  // of 16 rows or columns
constexpr unsigned int ALL_M = (1u << PARTS_M) - 1, ALL_N = (1u << PARTS_N) - 1;

// Of COUNT parts of 16 from `origin` on, a bit for each that meets the window.
template <int COUNT>
__device__ __forceinline__ unsigned int meeting_parts(Range window, int origin) {
    unsigned int parts = 0;
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
        if (origin + i * 16 < window.end && origin + i * 16 + 16 > window.start) parts |= 1u << i;
    return parts;
}

// 16 bytes from `from` + SOURCE in global memory to `to` + TARGET in shared memory.
template <int TARGET, int SOURCE>
__device__ __forceinline__ void copy_async(unsigned int to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0 + %2], [%1 + %3], 16;" ::"r"(to), "l"(from), "n"(TARGET), "n"(SOURCE) : "memory");
}

// Keeps a number in its register, where the compiler would rather compute it again in a loop.
__device__ __forceinline__ void keep(unsigned int& x) { asm volatile("" : "+r"(x)); }

// d += a b:  a 16 x 16, b 16 x 8.
__device__ __forceinline__ void mma(float (&d)[4], const unsigned int (&a)[4], unsigned int b0, unsigned int b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// A tile of an operand in shared memory: EXTENT along i, TILE_K along k.
template <Layout LAYOUT, int EXTENT>
struct SharedTile {
    static constexpr int ROWS = LAYOUT == K_INNER ? EXTENT : TILE_K;
    static constexpr int CHUNKS = (LAYOUT == K_INNER ? TILE_K : EXTENT) / 8;  // of 16 bytes in a row
    static constexpr int ROW_BYTES = CHUNKS * 16;
    static constexpr int BYTES = ROWS * ROW_BYTES;
    static constexpr int ROW_STEP = THREADS / CHUNKS;  // rows from one copy of a thread to the next: the permutation repeats
    static constexpr int COPIES = ROWS / ROW_STEP;

    // Where a chunk lies, so that eight rows of one column of chunks are in eight different groups of banks.
    __device__ static int offset(int row, int chunk) {
        int turned = LAYOUT == K_INNER ? chunk ^ (row >> 1 & 3) : chunk ^ (row & 7);
        return row * ROW_BYTES + turned * 16;
    }
};

// What one thread copies of an operand's tiles, from the next chunk on.
template <Layout LAYOUT, int EXTENT>
struct Copier {
    typedef SharedTile<LAYOUT, EXTENT> Tile;
    const unsigned char* from[Tile::COPIES];
    const void* somewhere;   // for copies of nothing
    long long chunk_stride;  // bytes from one chunk to the next
    unsigned int to;
    int own_k;  // along k, in the chunk, of the first copy

    // Rows and columns beyond the matrix are replaced by others: their products are never stored.
    __device__ Copier(Operand operand, int origin, int k, unsigned int shared) : somewhere(operand.data) {
        int chunk = threadIdx.x % Tile::CHUNKS, row = threadIdx.x / Tile::CHUNKS;
        to = shared + Tile::offset(row, chunk);
        keep(to);
        own_k = LAYOUT == K_INNER ? chunk * 8 : row;
        chunk_stride = TILE_K * 2 * (LAYOUT == K_INNER ? 1 : operand.stride);
#pragma unroll
        for (int c = 0; c < Tile::COPIES; ++c) {
            int i = origin + (LAYOUT == K_INNER ? row + c * Tile::ROW_STEP : chunk * 8);
            const elem* at = LAYOUT == K_INNER ? operand.data + min(i, operand.count - 1) * operand.stride + chunk * 8 + k
                                               : operand.data + (row + c * Tile::ROW_STEP + k) * operand.stride
                                                     + min(i, (operand.count - 1) & ~7);
            from[c] = (const unsigned char*)at;
        }
    }

    // The next chunk but AHEAD, all of it inside the matrix.
    template <int AHEAD, int TARGET>
    __device__ void copy() {
        unrolled<Tile::COPIES>([&](auto c) {
            constexpr int OFFSET = TARGET + c.value * Tile::ROW_STEP * Tile::ROW_BYTES;
            copy_async<OFFSET, LAYOUT == K_INNER ? AHEAD * TILE_K * 2 : 0>(to, from[c.value]);
            if (LAYOUT == K_OUTER) from[c.value] += chunk_stride;
        });
    }

    // The next chunk, at k, with zeros from `limit` on.
    __device__ void copy_below(int limit, int k, int target) {
        unrolled<Tile::COPIES>([&](auto c) {
            int bytes = k + own_k + (LAYOUT == K_INNER ? 0 : c.value * Tile::ROW_STEP) < limit ? 16 : 0;
            constexpr int OFFSET = c.value * Tile::ROW_STEP * Tile::ROW_BYTES;
            copy_async_or_zeros<OFFSET>(to + target, bytes ? from[c.value] : somewhere, bytes);
            from[c.value] += chunk_stride;
        });
    }

    // After CHUNKS calls of `copy`.
    template <int CHUNKS>
    __device__ void copied() {
#pragma unroll
        for (int c = 0; c < Tile::COPIES; ++c)
            if (LAYOUT == K_INNER) from[c] += CHUNKS * TILE_K * 2;
    }
};

// Reads fragments of a warp's PARTS parts of 16 from a tile. As operand A, or as the right one.
template <Layout LAYOUT, int EXTENT, int PARTS, bool IS_A>
struct Reader {
    typedef SharedTile<LAYOUT, EXTENT> Tile;
    // K_INNER: where this lane's row of each matrix lies, for both halves of the chunk; 16 rows on, the permutation repeats.
    // K_OUTER: for each part; the second half of the chunk is 16 rows on.
    unsigned int at[LAYOUT == K_INNER ? 2 : PARTS];

    __device__ Reader(unsigned int shared, int first) {
        int lane = threadIdx.x % 32;
        int inner = IS_A ? lane % 16 : lane % 8 + lane / 16 * 8, inner_chunk = IS_A ? lane / 16 : lane / 8 % 2;
        int outer = IS_A ? lane % 8 + lane / 16 * 8 : lane % 16, outer_chunk = IS_A ? lane / 8 % 2 : lane / 16;
        if (LAYOUT == K_INNER) {
#pragma unroll
            for (int half = 0; half < 2; ++half) at[half] = shared + Tile::offset(first + inner, half * 2 + inner_chunk);
        } else {
#pragma unroll
            for (int i = 0; i < PARTS; ++i) at[i] = shared + Tile::offset(outer, first / 8 + outer_chunk + i * 2);
        }
#pragma unroll
        for (unsigned int& address : at) keep(address);
    }

    template <int PART, int HALF, int STAGE>
    __device__ void load(unsigned int (&fragment)[4], unsigned int stage) const {
        constexpr int OFFSET = STAGE + (LAYOUT == K_INNER ? PART * 16 * Tile::ROW_BYTES : HALF * 16 * Tile::ROW_BYTES);
        load_matrices<LAYOUT == K_OUTER, OFFSET>(fragment, at[LAYOUT == K_INNER ? HALF : PART] + stage);
    }
};

constexpr int STAGE_BYTES = (TILE_M + TILE_N) * TILE_K * 2;
constexpr int SHARED_BYTES = STAGES * STAGE_BYTES;

typedef float Accumulators[PARTS_M][PARTS_N * 2][4];

__device__ __forceinline__ void clear(Accumulators& sums) {
#pragma unroll
    for (int i = 0; i < PARTS_M; ++i)
#pragma unroll
        for (int j = 0; j < PARTS_N * 2; ++j)
#pragma unroll
            for (int r = 0; r < 4; ++r) sums[i][j][r] = 0.0f;
}

// Adds one chunk: all of the warp's tile, or with PARTIAL what `parts_m` and `parts_n` name.
template <bool PARTIAL, int STAGE, typename ReaderA, typename ReaderB>
__device__ __forceinline__ void multiply(
    Accumulators& sums, const ReaderA& a, const ReaderB& b, unsigned int stage, unsigned int parts_m, unsigned int parts_n
) {
    unrolled<2>([&](auto half) {
        constexpr int HALF = half.value;
        unsigned int fragment_a[PARTS_M][4];
        unrolled<PARTS_M>([&](auto i) {
            if (PARTIAL && !(parts_m >> i.value & 1)) return;
            a.template load<i.value, HALF, STAGE>(fragment_a[i.value], stage);
        });
        unrolled<PARTS_N>([&](auto j) {
            if (PARTIAL && !(parts_n >> j.value & 1)) return;
            unsigned int fragment_b[4];
            b.template load<j.value, HALF, STAGE>(fragment_b, stage);
#pragma unroll
            for (int i = 0; i < PARTS_M; ++i) {
                if (PARTIAL && !(parts_m >> i & 1)) continue;
                mma(sums[i][2 * j.value], fragment_a[i], fragment_b[0], fragment_b[1]);
                mma(sums[i][2 * j.value + 1], fragment_a[i], fragment_b[2], fragment_b[3]);
            }
        });
    });
}

// What a chunk in shared memory is multiplied for, in one register: parts of the warp's tile, whether there is a chunk, and
// whether it is for the whole tile of every warp.
struct Chunk {
    unsigned int bits;
    __device__ static Chunk of(unsigned int parts_m, unsigned int parts_n, bool whole) {
        return Chunk{parts_m | parts_n << 8 | 1u << 16 | (whole ? 1u << 17 : 0)};
    }
    __device__ unsigned int parts_m() const { return bits & 0xff; }
    __device__ unsigned int parts_n() const { return bits >> 8 & 0xff; }
    __device__ bool there() const { return bits != 0; }
    __device__ bool whole() const { return bits >> 17; }
};

// sums += A B over the chunks of `steps`, where `operands(source)` says of what. `tiles` is shared memory: SHARED_BYTES,
// aligned to 128.
template <Layout A, Layout B, typename Steps, typename Sources>
__device__ __forceinline__ void accumulate(
    Accumulators& sums, int row, int column, Steps steps, Sources operands, unsigned char* tiles
) {
    constexpr int TILE_A_BYTES = SharedTile<A, TILE_M>::BYTES;
    constexpr Side SIDE = Steps::WINDOWED;
    int warp = threadIdx.x / 32, warp_m = warp % 2 * WARP_M, warp_n = warp / 2 * WARP_N;
    unsigned int shared = shared_address(tiles);
    Run run = steps.first();
    int k = run.k;
    Operands of_run = operands(run.source);
    int limit = of_run.limit;
    Copier<A, TILE_M> copier_a(of_run.a, row, k, shared);
    Copier<B, TILE_N> copier_b(of_run.b, column, k, shared + TILE_A_BYTES);
    Reader<A, TILE_M, PARTS_M, true> reader_a(shared, warp_m);
    Reader<B, TILE_N, PARTS_N, false> reader_b(shared + TILE_A_BYTES, warp_n);
    // Parts beyond the matrix are left out too.
    unsigned int inside_m = meeting_parts<PARTS_M>(Range{0, of_run.a.count}, row + warp_m);
    unsigned int inside_n = meeting_parts<PARTS_N>(Range{0, of_run.b.count}, column + warp_n);
    bool inside = row + TILE_M <= of_run.a.count && column + TILE_N <= of_run.b.count;

    auto chunk_of_run = [&]() {
        unsigned int m = SIDE == ROWS_OF_C ? meeting_parts<PARTS_M>(run.window, row + warp_m) : ALL_M;
        unsigned int n = SIDE == COLUMNS_OF_C ? meeting_parts<PARTS_N>(run.window, column + warp_n) : ALL_N;
        return run.empty() ? Chunk{0} : Chunk::of(m & inside_m, n & inside_n, run.whole && inside);
    };
    Chunk current = chunk_of_run();
    // Starts the copy of the next chunk, and says what it is for.
    auto start_copy = [&](unsigned int stage) {
        if (k >= run.end && !run.empty()) {
            run = steps.after(run);
            k = run.k;
            Operands of_run = operands(run.source);
            limit = of_run.limit;
            copier_a = Copier<A, TILE_M>(of_run.a, row, k, shared);
            copier_b = Copier<B, TILE_N>(of_run.b, column, k, shared + TILE_A_BYTES);
            current = chunk_of_run();
        }
        if (current.there()) {
            copier_a.copy_below(limit, k, stage);
            copier_b.copy_below(limit, k, stage);
            k += TILE_K;
        }
        commit_copies();
        return current;
    };

    Chunk first = start_copy(0), second = start_copy(STAGE_BYTES);
    unsigned int reading = 0, writing = 2 * STAGE_BYTES;
#pragma unroll 1
    while (first.there()) {
        // As long as three chunks are to be copied and the last three to be multiplied for the whole tile: nothing to decide.
        if (reading == 0 && first.whole() && second.whole() && current.whole()) {
#pragma unroll 1
            for (int end = min(run.end, limit) - STAGES * TILE_K; k <= end; k += STAGES * TILE_K) {
                unrolled<STAGES>([&](auto s) {
                    constexpr int STAGE = s.value;
                    wait_copies<STAGES - 2>();
                    // The chunk is there for every warp, and every warp is done with the one that is overwritten next.
                    __syncthreads();
                    constexpr int NEXT = (STAGE + STAGES - 1) % STAGES * STAGE_BYTES;
                    copier_a.template copy<STAGE, NEXT>();
                    copier_b.template copy<STAGE, NEXT>();
                    commit_copies();
                    multiply<false, STAGE * STAGE_BYTES>(sums, reader_a, reader_b, 0, ALL_M, ALL_N);
                });
                copier_a.template copied<STAGES>();
                copier_b.template copied<STAGES>();
            }
        }
        wait_copies<STAGES - 2>();
        __syncthreads();
        Chunk third = start_copy(writing);
        if (first.parts_m() == ALL_M && first.parts_n() == ALL_N)
            multiply<false, 0>(sums, reader_a, reader_b, reading, ALL_M, ALL_N);
        else if (first.parts_m() && first.parts_n())
            multiply<true, 0>(sums, reader_a, reader_b, reading, first.parts_m(), first.parts_n());
        first = second;
        second = third;
        writing = reading;
        reading = reading == (STAGES - 1) * STAGE_BYTES ? 0 : reading + STAGE_BYTES;
    }
    // Copies that nobody waits for would land in the next product's tiles.
    wait_copies<0>();
    __syncthreads();
}

// Calls the epilogue for OUT_WIDTH columns of every row inside the matrix. Each warp turns its sums through shared memory, so that
// eight lanes hold a row of 64 columns.
template <typename Epilogue>
__device__ __forceinline__ void finish(
    const Accumulators& sums, int row, int rows, int column, int columns, unsigned char* tiles, Epilogue epilogue
) {
    constexpr int PITCH = WARP_N + 8;  // floats: four rows of a quarter of the banks each
    constexpr int LANES = WARP_N / OUT_WIDTH, ROWS_AT_ONCE = 32 / LANES;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float* stage = (float*)tiles + warp * 16 * PITCH;
    float* own = stage + lane / 4 * PITCH + lane % 4 * 2;
    int first_row = row + warp % 2 * WARP_M + lane / LANES;
    int c = column + warp / 2 * WARP_N + lane % LANES * OUT_WIDTH;
    // Half of the lanes read the second 16 bytes first: eight lanes then read from all banks.
    bool turned = lane & 4;
    const float* from = stage + lane / LANES * PITCH + lane % LANES * OUT_WIDTH;
    bool is_inside = c < columns;
    auto store = epilogue(is_inside ? c : 0);
#pragma unroll
    for (int i = 0; i < PARTS_M; ++i) {
        __syncwarp();
#pragma unroll
        for (int j = 0; j < PARTS_N * 2; ++j) {
            *(float2*)(own + j * 8) = float2{sums[i][j][0], sums[i][j][1]};
            *(float2*)(own + 8 * PITCH + j * 8) = float2{sums[i][j][2], sums[i][j][3]};
        }
        __syncwarp();
#pragma unroll 1
        for (int r = 0; r < 16; r += ROWS_AT_ONCE) {
            float4 one = *(const float4*)(from + r * PITCH + (turned ? 4 : 0));
            float4 other = *(const float4*)(from + r * PITCH + (turned ? 0 : 4));
            float4 low = turned ? other : one, high = turned ? one : other;
            float values[OUT_WIDTH] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
            int at = first_row + i * 16 + r;
            if (is_inside && at < rows) store(at, values);
        }
    }
}

#else

constexpr int OUT_WIDTH = 1;
constexpr int FMA_K = 16;  // of TILE_K at a time, so that shared memory suffices
constexpr int SHARED_BYTES = FMA_K * (TILE_M + 4 + TILE_N + 4) * 4;
constexpr int LANE_M = TILE_M / 16, LANE_N = TILE_N / 8;  // outputs of a thread

typedef float Accumulators[LANE_M][LANE_N];

__device__ __forceinline__ void clear(Accumulators& sums) {
#pragma unroll
    for (int i = 0; i < LANE_M; ++i)
#pragma unroll
        for (int j = 0; j < LANE_N; ++j) sums[i][j] = 0.0f;
}

// FMA_K x EXTENT of an operand into shared memory, zeros beyond the matrix.
template <Layout LAYOUT, int EXTENT>
__device__ __forceinline__ void fetch(float (*tile)[EXTENT + 4], Operand operand, int origin, int k, int limit) {
    for (int index = threadIdx.x; index < EXTENT * FMA_K; index += THREADS) {
        int i = LAYOUT == K_INNER ? index / FMA_K : index % EXTENT;
        int at = LAYOUT == K_INNER ? index % FMA_K : index / EXTENT;
        bool inside = origin + i < operand.count && k + at < limit;
        long long place = LAYOUT == K_INNER ? (origin + i) * operand.stride + k + at : (k + at) * operand.stride + origin + i;
        tile[at][i] = inside ? operand.data[place] : 0.0f;
    }
}

template <Layout A, Layout B, typename Steps, typename Sources>
__device__ __forceinline__ void accumulate(
    Accumulators& sums, int row, int column, Steps steps, Sources operands, unsigned char* tiles
) {
    float(*tile_a)[TILE_M + 4] = (float(*)[TILE_M + 4]) tiles;
    float(*tile_b)[TILE_N + 4] = (float(*)[TILE_N + 4])(tile_a + FMA_K);
    int thread_m = threadIdx.x / 8, thread_n = threadIdx.x % 8;
    for (Run run = steps.first(); !run.empty(); run = steps.after(run)) {
        auto [a, b, limit] = operands(run.source);
        for (int k = run.k; k < run.end; k += FMA_K) {
            __syncthreads();
            fetch<A, TILE_M>(tile_a, a, row, k, limit);
            fetch<B, TILE_N>(tile_b, b, column, k, limit);
            __syncthreads();
#pragma unroll 4
            for (int at = 0; at < FMA_K; ++at) {
                float from_a[LANE_M], from_b[LANE_N];
#pragma unroll
                for (int i = 0; i < LANE_M; ++i) from_a[i] = tile_a[at][thread_m + i * 16];
#pragma unroll
                for (int j = 0; j < LANE_N; ++j) from_b[j] = tile_b[at][thread_n + j * 8];
#pragma unroll
                for (int i = 0; i < LANE_M; ++i)
#pragma unroll
                    for (int j = 0; j < LANE_N; ++j) sums[i][j] = fmaf(from_a[i], from_b[j], sums[i][j]);
            }
        }
    }
}

template <typename Epilogue>
__device__ __forceinline__ void finish(
    const Accumulators& sums, int row, int rows, int column, int columns, unsigned char*, Epilogue epilogue
) {
    int thread_m = threadIdx.x / 8, thread_n = threadIdx.x % 8;
#pragma unroll
    for (int j = 0; j < LANE_N; ++j) {
        int c = column + thread_n + j * 8;
        if (c >= columns) continue;
        auto store = epilogue(c);
#pragma unroll
        for (int i = 0; i < LANE_M; ++i) {
            int r = row + thread_m + i * 16;
            float value[OUT_WIDTH] = {sums[i][j]};
            if (r < rows) store(r, value);
        }
    }
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

__device__ __forceinline__ void store_wide(elem* to, const float (&x)[OUT_WIDTH]) {
    Vector<OUT_WIDTH> vector;
    vector.pack(x);
    vector.store(to);
}

// The epilogue of weight gradients [rows, columns]:  = or +=.
__device__ __forceinline__ auto store_gradient(float* to, int columns, int add) {
    return [=](int c) {
        return [=](int r, float (&value)[OUT_WIDTH]) {
            float* at = to + (long long)r * columns + c;
            if (add) {
                float before[OUT_WIDTH];
                load_floats(before, at, true);
#pragma unroll
                for (int e = 0; e < OUT_WIDTH; ++e) value[e] += before[e];
            }
            store_floats(at, value, true);
        };
    };
}

// sigmoid(1.5957691 x (1 + 0.044715 x^2)) from the hardware's exponential and reciprocal: within 1e-6, and no calls, which
// would spill the accumulators.
__device__ __forceinline__ float gelu_sigmoid(float x) {
    return __fdividef(1.0f, 1.0f + __expf(-1.5957691216057308f * x * fmaf(0.044715f * x, x, 1.0f)));
}

// GELU in its tanh form:  gelu(x) = x s.
__device__ __forceinline__ float gelu(float x) {
    return x * gelu_sigmoid(x);
}

__device__ __forceinline__ float gelu_derivative(float x) {
    float s = gelu_sigmoid(x);
    return fmaf(x * s * (1.0f - s), 1.5957691216057308f * fmaf(0.134145f * x, x, 1.0f), s);
}
