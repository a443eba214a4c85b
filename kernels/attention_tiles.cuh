// What attention in bf16 is made of: tiles of rows in shared memory, products with mma.sync m16n8k16 (and m16n8k8 for the last
// half step of a head size that is no multiple of 16), with f32 accumulators. A part of attention.cu, which defines Head.
#pragma once

#include "tensor_core.cuh"

#ifndef WARPS
#define WARPS 4
#endif
// Rows of a tile that is walked over.
#ifndef TILE
#define TILE 64
#endif
// Of 16 queries, how many a warp owns. (Of 16 keys it owns one: gradients of keys and values take twice the registers.)
#ifndef ROW_TILES
#define ROW_TILES 2
#endif
// Backward by blocks that own a whole head: leaner, for up to 256 tokens and HS up to 72.
#ifndef WHOLE_HEAD
#define WHOLE_HEAD 0
#endif

constexpr int THREADS = WARPS * 32, BLOCKS = 8 / WARPS;  // so many on a multiprocessor, at least
constexpr float LOG2_E = 1.4426950408889634f;
constexpr int CHUNKS = HS / 8;              // of 16 bytes in a row
constexpr int ROW_CHUNKS = CHUNKS | 1;      // in shared memory: odd, so that eight rows are in eight groups of banks
constexpr int ROW_BYTES = ROW_CHUNKS * 16;
constexpr int TILE_BYTES = TILE * ROW_BYTES;
constexpr int STEPS = HS / 16;              // along a row: products of 16 elements,
constexpr bool HALF_STEP = HS % 16 != 0;    // and one of 8
static_assert(16 * WARPS * ROW_TILES <= 2 * TILE, "a block's own rows take the place of two tiles");

// Two 8 x 8 matrices at `address` + OFFSET: rows 0-7 and 8-15 of a chunk.
template <bool TRANSPOSED, int OFFSET>
__device__ __forceinline__ void load_two_matrices(unsigned int (&r)[2], unsigned int address) {
    if (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2+%3];"
                     : "=r"(r[0]), "=r"(r[1])
                     : "r"(address), "n"(OFFSET)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2+%3];"
                     : "=r"(r[0]), "=r"(r[1])
                     : "r"(address), "n"(OFFSET)
                     : "memory");
}

// threadIdx.x. What is computed from it is not kept in registers from earlier.
__device__ __forceinline__ unsigned int thread_again() {
    unsigned int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}

// Of a tile, where this lane's row of the matrices lies.
__device__ __forceinline__ unsigned int lane_offset(unsigned int thread = threadIdx.x) {
    unsigned int lane = thread % 32;
    return lane % 16 * ROW_BYTES + lane / 16 * 16;
}

// d = c + a b: where c is needed again, or 0, this takes no copy of it.
__device__ __forceinline__ void mma(
    float (&d)[4], const unsigned int (&a)[4], unsigned int b0, unsigned int b1, const float (&c)[4]
) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// d = c + a b:  a 16 x 8, b 8 x 8.
__device__ __forceinline__ void mma(float (&d)[4], const unsigned int (&a)[2], unsigned int b, const float (&c)[4]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

template <int OFFSET>
__device__ __forceinline__ void store_shared(unsigned int address, unsigned int x) {
    asm volatile("st.shared.u32 [%0+%2], %1;" ::"r"(address), "r"(x), "n"(OFFSET) : "memory");
}

// 2^x as the hardware computes it, without care for subnormal results.
__device__ __forceinline__ float power_of_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float logarithm_to_2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// A tile to copy: from a thread's element on, with so many elements from row to row, to an address in shared memory.
struct Copy {
    const elem* from;
    int stride;
    unsigned int to;
};

// What a thread of THREADS copies of every tile: one chunk of rows `row`, `row + STEP`, ...
template <int THREADS>
struct Share {
    // Where rows are no multiple of 8 chunks, one thread more goes over the pad: neighbours stay in different banks.
    static constexpr int LANES = CHUNKS % 8 ? ROW_CHUNKS : CHUNKS;
    static constexpr int STEP = THREADS / LANES;
    int row, chunk;
    int at;  // of its first chunk in a tile, bytes

    __device__ Share(unsigned int thread = threadIdx.x)
        : row(thread / LANES), chunk(thread % LANES),
          at(LANES == ROW_CHUNKS ? thread * 16 : thread / LANES * ROW_BYTES + thread % LANES * 16) {}

    __device__ bool any() const { return STEP * LANES == THREADS || at < STEP * ROW_BYTES; }

    // Where this thread's first element of rows from token `first` on is.
    __device__ long long of(Head rows, int first) const {
        return rows.first + (long long)(first + row) * rows.stride + (LANES == CHUNKS || chunk < CHUNKS ? chunk * 8 : 0);
    }

    // COUNT rows of some tiles into shared memory, of which `there` are there; zeros for the others.
    template <int COUNT, int TILES>
    __device__ void copy(const Copy (&tiles)[TILES], int there) const {
        if (!any()) return;
        int bytes = LANES == CHUNKS || chunk < CHUNKS ? 16 : 0;
        // With the last rows only if the threads come out at the tile's end.
        auto rows = [&](auto size) {
            unrolled<(COUNT + STEP - 1) / STEP>([&](auto i) {
                constexpr int first = decltype(i)::value * STEP;
                if (first + STEP > COUNT && row >= COUNT - first) return;
                unrolled<TILES>([&](auto n) {
                    const Copy& tile = tiles[decltype(n)::value];
                    const elem* from = tile.from + (long long)tile.stride * first;
                    copy_async_or_zeros<first * ROW_BYTES>(tile.to + at, from, size(first));
                });
            });
        };
        if (there >= COUNT) rows([&](int) { return bytes; });
        else rows([&](int first) { return row < there - first ? bytes : 0; });
    }

    // COUNT rows from shared memory to token `first` on; those beyond T are left out.
    template <int COUNT>
    __device__ void store(elem* data, Head rows, int first, int T, const unsigned char* from) const {
        if (!any() || (LANES != CHUNKS && chunk >= CHUNKS)) return;
        from += at;
        elem* to = data + rows.first + (long long)(first + row) * rows.stride + chunk * 8;
        long long step = (long long)STEP * rows.stride;
        int there = min(T - first, COUNT);
#pragma unroll
        for (int at = 0; at < COUNT; at += STEP) {
            if (row < there - at) *(uint4*)to = *(const uint4*)(from + at * ROW_BYTES);
            to += step;
        }
    }
};

// 16 M rows of HS elements: an operand.
template <int M>
struct Fragments {
    unsigned int whole[M][STEPS ? STEPS : 1][4];
    unsigned int half[M][2];

    // From a tile's first row on, `tile` with the lane's offset.
    __device__ __forceinline__ void load(unsigned int tile) {
        unrolled<M>([&](auto m) {
            constexpr int row = decltype(m)::value * 16 * ROW_BYTES;
            unrolled<STEPS>([&](auto k) {
                load_matrices<false, row + decltype(k)::value * 32>(whole[decltype(m)::value][decltype(k)::value], tile);
            });
            if constexpr (HALF_STEP) load_two_matrices<false, row + STEPS * 32>(half[decltype(m)::value], tile);
        });
    }
};

// scores += own tile^T, products of rows: 16 M own rows, and 8 N of the tile from row FIRST on.
template <int FIRST, int M, int N>
__device__ __forceinline__ void rows_times_rows(float (&scores)[M][N][4], const Fragments<M>& own, unsigned int tile) {
    unrolled<STEPS>([&](auto step) {
        constexpr int k = decltype(step)::value;
        unrolled<N / 2>([&](auto pair) {
            constexpr int n = decltype(pair)::value;
            unsigned int others[4];
            load_matrices<false, (FIRST + n * 16) * ROW_BYTES + k * 32>(others, tile);
#pragma unroll
            for (int m = 0; m < M; ++m) {
                mma(scores[m][2 * n], own.whole[m][k], others[0], others[2], scores[m][2 * n]);
                mma(scores[m][2 * n + 1], own.whole[m][k], others[1], others[3], scores[m][2 * n + 1]);
            }
        });
    });
    if constexpr (HALF_STEP)
        unrolled<N / 2>([&](auto pair) {
            constexpr int n = decltype(pair)::value;
            unsigned int others[2];
            load_two_matrices<false, (FIRST + n * 16) * ROW_BYTES + STEPS * 32>(others, tile);
#pragma unroll
            for (int m = 0; m < M; ++m) {
                mma(scores[m][2 * n], own.half[m], others[0], scores[m][2 * n]);
                mma(scores[m][2 * n + 1], own.half[m], others[1], scores[m][2 * n + 1]);
            }
        });
}

// The same where own rows are read from shared memory again: fewer registers.
template <int FIRST, int M, int N>
__device__ __forceinline__ void rows_times_rows(float (&scores)[M][N][4], unsigned int own, unsigned int tile) {
    auto step = [&](auto index) {
        constexpr int k = decltype(index)::value;
        Fragments<M> rows;
        unrolled<M>([&](auto m) {
            constexpr int at = decltype(m)::value * 16 * ROW_BYTES + k * 32;
            if constexpr (k < STEPS) load_matrices<false, at>(rows.whole[decltype(m)::value][0], own);
            else load_two_matrices<false, at>(rows.half[decltype(m)::value], own);
        });
        unrolled<N / 2>([&](auto pair) {
            constexpr int n = decltype(pair)::value, at = (FIRST + n * 16) * ROW_BYTES + k * 32;
            if constexpr (k < STEPS) {
                unsigned int others[4];
                load_matrices<false, at>(others, tile);
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    mma(scores[m][2 * n], rows.whole[m][0], others[0], others[2], scores[m][2 * n]);
                    mma(scores[m][2 * n + 1], rows.whole[m][0], others[1], others[3], scores[m][2 * n + 1]);
                }
            } else {
                unsigned int others[2];
                load_two_matrices<false, at>(others, tile);
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    mma(scores[m][2 * n], rows.half[m], others[0], scores[m][2 * n]);
                    mma(scores[m][2 * n + 1], rows.half[m], others[1], scores[m][2 * n + 1]);
                }
            }
        });
    };
    unrolled<STEPS + HALF_STEP>(step);
}

// Columns 16 K .. of weights as an operand: the accumulators of a product are that of the next one.
template <int K, int M, int N>
__device__ __forceinline__ void pack_weights(unsigned int (&packed)[M][4], const float (&weights)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int r = 0; r < 4; ++r)
            packed[m][r] = pack_bf16(weights[m][2 * K + r / 2][r % 2 * 2], weights[m][2 * K + r / 2][r % 2 * 2 + 1]);
}

// sums += weights tile: sums of 16 of the tile's rows from FIRST on, and of COUNT chunks.
template <int FIRST, int M, int COUNT>
__device__ __forceinline__ void add_weighted(float (&sums)[M][COUNT][4], const unsigned int (&weights)[M][4], unsigned int tile) {
    unrolled<COUNT / 2>([&](auto pair) {
        constexpr int n = decltype(pair)::value;
        unsigned int others[4];
        load_matrices<true, FIRST * ROW_BYTES + n * 32>(others, tile);
#pragma unroll
        for (int m = 0; m < M; ++m) {
            mma(sums[m][2 * n], weights[m], others[0], others[1]);
            mma(sums[m][2 * n + 1], weights[m], others[2], others[3]);
        }
    });
    if constexpr (COUNT % 2 != 0) {
        unsigned int others[2];
        load_two_matrices<true, FIRST * ROW_BYTES + (COUNT - 1) * 16>(others, tile);
#pragma unroll
        for (int m = 0; m < M; ++m) mma(sums[m][COUNT - 1], weights[m], others[0], others[1]);
    }
}

// The same for all columns of the weights.
template <int FIRST, int M, int N>
__device__ __forceinline__ void weighted_rows(float (&sums)[M][CHUNKS][4], const float (&weights)[M][N][4], unsigned int tile) {
    unrolled<N / 2>([&](auto step) {
        constexpr int k = decltype(step)::value;
        unsigned int packed[M][4];
        pack_weights<k>(packed, weights);
        add_weighted<FIRST + k * 16>(sums, packed, tile);
    });
}

// Scores of a tile's rows from `there` on become -infinity: their exponentials are 0.
template <int FIRST, int M, int N>
__device__ __forceinline__ void mask(float (&scores)[M][N][4], int there) {
    int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int r = 0; r < 4; ++r)
                if (FIRST + n * 8 + column + r % 2 >= there) scores[m][n][r] = -INFINITY;
}

// D of 16 rows, of which a lane gets those of its accumulators: the diagonal of dout out^T. The tiles with the lane's offset.
__device__ __forceinline__ void row_products(float (&d)[2], unsigned int dout, unsigned int out) {
    Fragments<1> rows;
    rows.load(dout);
    float products[1][2][4] = {};
    rows_times_rows<0>(products, rows, out);
    // Row and column r are in lane 4 r + r / 2, as its accumulator r % 2, and 8 rows on in the second half.
    int lane = threadIdx.x % 32;
    bool odd = lane / 4 % 2;
    d[0] = odd ? products[0][0][1] : products[0][0][0];
    d[1] = odd ? products[0][1][3] : products[0][1][2];
    int from = lane / 4 * 4 + lane / 8;
    d[0] = __shfl_sync(0xffffffffu, d[0], from);
    d[1] = __shfl_sync(0xffffffffu, d[1], from);
}

// The same into shared memory, negative, behind two statistics of every two rows.
__device__ __forceinline__ void store_row_products(float* rows, unsigned int dout, unsigned int out) {
    float d[2];
    row_products(d, dout, out);
    int lane = threadIdx.x % 32, row = lane / 4;
    if (lane % 4 != 0) return;
    rows[row / 2 * 4 + 2 + row % 2] = -d[0];
    rows[row / 2 * 4 + 18 + row % 2] = -d[1];
}

// This warp's rows of an output, times a factor for each of a lane's rows, into shared memory.
template <int M>
__device__ __forceinline__ void stage_rows(unsigned char* tile, const float (&rows)[M][CHUNKS][4], const float (&factor)[M][2]) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    tile += (warp * 16 * M + lane / 4) * ROW_BYTES + lane % 4 * 4;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int n = 0; n < CHUNKS; ++n)
                *(unsigned int*)(tile + (m * 16 + half * 8) * ROW_BYTES + n * 16) =
                    pack_bf16(rows[m][n][half * 2] * factor[m][half], rows[m][n][half * 2 + 1] * factor[m][half]);
}
