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
// The reduction runs over chunks of TILE_K; `Steps` says which: a window of channels, or the rows of the samples whose
// windows meet the tile. What a chunk covers beyond a window is zero in memory: the kernels that write windowed
// activations promise that. What it covers beyond `limit` is read as zero.
//
// A block has THREADS threads and computes TILE_M x TILE_N: in bf16, a warp a quarter of it. `Epilogue` gets every element of the
// tile that is inside the matrix: `epilogue(i, j, value)`.
#pragma once

#include "common.cuh"

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

// A matrix of elem, `count` rows (or columns) of it along i.
struct Operand {
    const elem* data;
    long long stride;  // elements from one row in memory to the next
    int count;
};

// Which rows or columns of C a chunk contributes to: all, or those of a window. A warp leaves out the parts of 16 of its tile
// that the window misses.
enum Side { NEITHER, ROWS_OF_C, COLUMNS_OF_C };

// One range of the reduction, in chunks of TILE_K from `start` on.
struct Range {
    static constexpr Side WINDOWED = NEITHER;
    int start;
    int end;
    __device__ int first() const { return start; }
    __device__ int next(int k) const { return k + TILE_K; }
    __device__ Range window(int) const { return *this; }
};

// The whole reduction 0 .. end for the columns of C in one window.
struct WindowedColumns {
    static constexpr Side WINDOWED = COLUMNS_OF_C;
    int end;
    Range columns;
    __device__ int first() const { return 0; }
    __device__ int next(int k) const { return k + TILE_K; }
    __device__ Range window(int) const { return columns; }
};

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

// The reduction over the channels of the samples that rows `row .. row + TILE_M` belong to: from an aligned channel on.
__device__ __forceinline__ Range window_steps(const int* windows, int row, int rows, int tokens) {
    Range window = union_of(windows, row / tokens, (min(row + TILE_M, rows) - 1) / tokens);
    window.start &= ~7;
    return window;
}

// The reduction over the rows [B T] of a batch that leaves out samples whose windows miss the tile's channels, start .. end,
// which are its rows or its columns.
template <Side SIDE>
struct MeetingRows {
    static constexpr Side WINDOWED = SIDE;
    const int* windows;
    int tokens;
    int end;  // B T
    int channel_start;
    int channel_end;

    __device__ bool meets(int sample) const {
        int start = windows[2 * sample];
        return start < channel_end && start + windows[2 * sample + 1] > channel_start;
    }

    // The first chunk from k on that some sample in it needs.
    __device__ int from(int k) const {
        while (k < end) {
            int last = (min(k + TILE_K, end) - 1) / tokens;
            int sample = k / tokens;
            while (sample <= last && !meets(sample)) ++sample;
            if (sample <= last) return k;
            // All of them miss: on with the chunk that holds the next sample's first row.
            k = max(k + TILE_K, sample * tokens / TILE_K * TILE_K);
        }
        return end;
    }

    __device__ int first() const { return from(0); }
    __device__ int next(int k) const { return from(k + TILE_K); }
    __device__ Range window(int k) const { return union_of(windows, k / tokens, (min(k + TILE_K, end) - 1) / tokens); }
};

// Of COUNT parts of 16 from `origin` on, a bit for each that meets the window.
template <int COUNT>
__device__ __forceinline__ unsigned int meeting_parts(Range window, int origin) {
    unsigned int parts = 0;
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
        if (origin + i * 16 < window.end && origin + i * 16 + 16 > window.start) parts |= 1u << i;
    return parts;
}

#ifdef ELEM_BF16

__device__ __forceinline__ unsigned int shared_address(const void* pointer) {
    return (unsigned int)__cvta_generic_to_shared(pointer);
}

// 16 bytes from global to shared memory; zeros when `bytes` is 0.
__device__ __forceinline__ void copy_async(unsigned int to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most N of the last groups of copies are under way.
template <int N>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(unsigned int (&r)[4], unsigned int address) {
    if (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
}

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
    static constexpr int BYTES = EXTENT * TILE_K * 2;
    static constexpr int COPIES = ROWS * CHUNKS / THREADS;  // of a thread
    static constexpr int ROW_STEP = THREADS / CHUNKS;       // rows between them

    // Where a chunk lies, so that eight rows of one column of chunks are in eight different groups of banks.
    __device__ static int offset(int row, int chunk) {
        int turned = LAYOUT == K_INNER ? chunk ^ (row >> 1 & 3) : chunk ^ (row & 7);
        return (row * CHUNKS + turned) * 16;
    }
};

// What one thread copies of an operand's tiles.
template <Layout LAYOUT, int EXTENT>
struct Copier {
    typedef SharedTile<LAYOUT, EXTENT> Tile;
    const elem* from[Tile::COPIES];
    int to[Tile::COPIES];
    int k[LAYOUT == K_INNER ? 1 : Tile::COPIES];  // along k, in the chunk, of what is copied
    long long stride;

    // Rows and chunks beyond the matrix are replaced by others: their products are never stored.
    __device__ Copier(Operand operand, int origin) : stride(operand.stride) {
        int chunk = threadIdx.x % Tile::CHUNKS;
        int first = threadIdx.x / Tile::CHUNKS;
#pragma unroll
        for (int c = 0; c < Tile::COPIES; ++c) {
            int row = first + c * Tile::ROW_STEP;
            to[c] = Tile::offset(row, chunk);
            if (LAYOUT == K_INNER) {
                from[c] = operand.data + min(origin + row, operand.count - 1) * operand.stride + chunk * 8;
            } else {
                from[c] = operand.data + row * operand.stride + min(origin + chunk * 8, (operand.count - 1) & ~7);
                k[c] = row;
            }
        }
        if (LAYOUT == K_INNER) k[0] = chunk * 8;
    }

    __device__ void copy(unsigned int shared, int at, int limit) const {
        if (LAYOUT == K_INNER) {
            int bytes = at + k[0] < limit ? 16 : 0;
            // A chunk that is not copied is not addressed either.
            int element = bytes ? at : 0;
#pragma unroll
            for (int c = 0; c < Tile::COPIES; ++c) copy_async(shared + to[c], from[c] + element, bytes);
        } else {
#pragma unroll
            for (int c = 0; c < Tile::COPIES; ++c) {
                int bytes = at + k[c] < limit ? 16 : 0;
                copy_async(shared + to[c], from[c] + (bytes ? at * stride : -k[c] * stride), bytes);
            }
        }
    }
};

struct Yes {
    static constexpr bool value = true;
};
struct No {
    static constexpr bool value = false;
};

constexpr int SHARED_BYTES = STAGES * (TILE_M + TILE_N) * TILE_K * 2;
constexpr int WARP_M = TILE_M / 2, WARP_N = TILE_N / 2;

typedef float Accumulators[WARP_M / 16][WARP_N / 8][4];

__device__ __forceinline__ void clear(Accumulators& sums) {
#pragma unroll
    for (int i = 0; i < WARP_M / 16; ++i)
#pragma unroll
        for (int j = 0; j < WARP_N / 8; ++j)
#pragma unroll
            for (int r = 0; r < 4; ++r) sums[i][j][r] = 0.0f;
}

// sums += A B over the chunks of `steps`, k below `limit`. `tiles` is shared memory: SHARED_BYTES, aligned to 128.
template <Layout A, Layout B, typename Steps>
__device__ __forceinline__ void accumulate(
    Accumulators& sums, Operand a, Operand b, int row, int column, Steps steps, int limit, unsigned char* tiles
) {
    typedef SharedTile<A, TILE_M> TileA;
    typedef SharedTile<B, TILE_N> TileB;
    constexpr int STAGE = TileA::BYTES + TileB::BYTES;
    unsigned int shared = shared_address(tiles);
    Copier<A, TILE_M> copier_a(a, row);
    Copier<B, TILE_N> copier_b(b, column);

    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int warp_m = warp % 2 * WARP_M, warp_n = warp / 2 * WARP_N;
    // Where this lane's row of each 8 x 8 matrix lies, for both halves of the chunk.
    unsigned int at_a[2], at_b[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        at_a[half] = A == K_INNER ? TileA::offset(warp_m + lane % 16, half * 2 + lane / 16)
                                  : TileA::offset(half * 16 + lane % 8 + lane / 16 * 8, warp_m / 8 + lane / 8 % 2);
        at_b[half] = TileA::BYTES
                     + (B == K_INNER ? TileB::offset(warp_n + lane % 8 + lane / 16 * 8, half * 2 + lane / 8 % 2)
                                     : TileB::offset(half * 16 + lane % 16, warp_n / 8 + lane / 16));
    }

    int next = steps.first();
    int loaded = 0;
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage) {
        if (next < steps.end) {
            copier_a.copy(shared + stage * STAGE, next, limit);
            copier_b.copy(shared + stage * STAGE + TileA::BYTES, next, limit);
            next = steps.next(next);
            ++loaded;
        }
        commit_copies();
    }
    // Adds one chunk: all of the warp's tile, or with PART what `parts_m` and `parts_n` name.
    auto multiply = [&](unsigned int tiles, unsigned int parts_m, unsigned int parts_n, auto part) {
        constexpr bool PART = decltype(part)::value;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            unsigned int fragment_a[WARP_M / 16][4];
#pragma unroll
            for (int i = 0; i < WARP_M / 16; ++i) {
                if (PART && !(parts_m >> i & 1)) continue;
                // 16 rows on the permutation repeats; 16 columns on, two chunks are added to a permuted number.
                unsigned int address = A == K_INNER ? at_a[half] + i * 16 * TileA::CHUNKS * 16 : at_a[half] ^ (i * 32);
                load_matrices<A == K_OUTER>(fragment_a[i], tiles + address);
            }
#pragma unroll
            for (int j = 0; j < WARP_N / 16; ++j) {
                if (PART && !(parts_n >> j & 1)) continue;
                unsigned int fragment_b[4];
                unsigned int address = B == K_INNER ? at_b[half] + j * 16 * TileB::CHUNKS * 16 : at_b[half] ^ (j * 32);
                load_matrices<B == K_OUTER>(fragment_b, tiles + address);
#pragma unroll
                for (int i = 0; i < WARP_M / 16; ++i) {
                    if (PART && !(parts_m >> i & 1)) continue;
                    mma(sums[i][2 * j], fragment_a[i], fragment_b[0], fragment_b[1]);
                    mma(sums[i][2 * j + 1], fragment_a[i], fragment_b[2], fragment_b[3]);
                }
            }
        }
    };
    constexpr unsigned int ALL_M = (1u << WARP_M / 16) - 1, ALL_N = (1u << WARP_N / 16) - 1;
    int current = steps.first();
    unsigned int reading = shared, writing = shared + (STAGES - 1) * STAGE;
    for (int done = 0; done < loaded; ++done) {
        wait_copies<STAGES - 2>();
        // The chunk is there for every warp, and every warp is done with the one that is overwritten next.
        __syncthreads();
        if (next < steps.end) {
            copier_a.copy(writing, next, limit);
            copier_b.copy(writing + TileA::BYTES, next, limit);
            next = steps.next(next);
            ++loaded;
        }
        commit_copies();
        if (Steps::WINDOWED == NEITHER) {
            multiply(reading, ALL_M, ALL_N, No());
        } else {
            Range window = steps.window(current);
            unsigned int parts_m = Steps::WINDOWED == ROWS_OF_C ? meeting_parts<WARP_M / 16>(window, row + warp_m) : ALL_M;
            unsigned int parts_n = Steps::WINDOWED == ROWS_OF_C ? ALL_N : meeting_parts<WARP_N / 16>(window, column + warp_n);
            if (parts_m == ALL_M && parts_n == ALL_N) multiply(reading, ALL_M, ALL_N, No());
            else if (parts_m && parts_n) multiply(reading, parts_m, parts_n, Yes());
            current = steps.next(current);
        }
        reading = reading == shared + (STAGES - 1) * STAGE ? shared : reading + STAGE;
        writing = writing == shared + (STAGES - 1) * STAGE ? shared : writing + STAGE;
    }
    // Copies that nobody waits for would land in the next product's tiles.
    wait_copies<0>();
    __syncthreads();
}

// Calls the epilogue with every element inside the matrix.
template <typename Epilogue>
__device__ __forceinline__ void finish(
    const Accumulators& sums, int row, int rows, int column, int columns, Epilogue epilogue
) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int first_row = row + warp % 2 * WARP_M + lane / 4;
    int first_column = column + warp / 2 * WARP_N + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < WARP_M / 16; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int r = first_row + i * 16 + half * 8;
            if (r >= rows) continue;
#pragma unroll
            for (int j = 0; j < WARP_N / 8; ++j)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    int c = first_column + j * 8 + e;
                    if (c < columns) epilogue(r, c, sums[i][j][half * 2 + e]);
                }
        }
}

#else

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

template <Layout A, Layout B, typename Steps>
__device__ __forceinline__ void accumulate(
    Accumulators& sums, Operand a, Operand b, int row, int column, Steps steps, int limit, unsigned char* tiles
) {
    float(*tile_a)[TILE_M + 4] = (float(*)[TILE_M + 4]) tiles;
    float(*tile_b)[TILE_N + 4] = (float(*)[TILE_N + 4])(tile_a + FMA_K);
    int thread_m = threadIdx.x / 8, thread_n = threadIdx.x % 8;
    for (int chunk = steps.first(); chunk < steps.end; chunk = steps.next(chunk)) {
        for (int k = chunk; k < chunk + TILE_K; k += FMA_K) {
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
    const Accumulators& sums, int row, int rows, int column, int columns, Epilogue epilogue
) {
    int thread_m = threadIdx.x / 8, thread_n = threadIdx.x % 8;
#pragma unroll
    for (int i = 0; i < LANE_M; ++i) {
        int r = row + thread_m + i * 16;
        if (r >= rows) continue;
#pragma unroll
        for (int j = 0; j < LANE_N; ++j) {
            int c = column + thread_n + j * 8;
            if (c < columns) epilogue(r, c, sums[i][j]);
        }
    }
}

#endif

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
