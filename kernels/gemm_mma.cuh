// The product by mma.sync (gemm.cuh): shared memory holds STAGES pairs of tiles, filled by 16-byte cp.async; ldmatrix reads them
// without bank conflicts (the 16-byte chunks of a row are permuted). A warp computes a quarter of the tile.
#pragma once

#include "gemm_steps.cuh"

constexpr int WARP_M = TILE_M / 2, WARP_N = TILE_N / 2;
constexpr int PARTS_M = WARP_M / PART, PARTS_N = WARP_N / PART;
constexpr unsigned int ALL_M = (1u << PARTS_M) - 1, ALL_N = (1u << PARTS_N) - 1;

// Of COUNT parts from `origin` on, a bit for each that meets the window.
template <int COUNT>
__device__ __forceinline__ unsigned int meeting_parts(Range window, int origin) {
    unsigned int parts = 0;
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
        if (origin + i * PART < window.end && origin + i * PART + PART > window.start) parts |= 1u << i;
    return parts;
}

// Keeps a number in its register, where the compiler would rather compute it again in a loop.
__device__ __forceinline__ void keep(unsigned int& x) { asm volatile("" : "+r"(x)); }

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
    const Accumulators& sums, int row, int rows, int column, int columns, int tokens, unsigned char* tiles, Epilogue epilogue
) {
    constexpr int PITCH = WARP_N + 8;  // floats: four rows of a quarter of the banks each
    constexpr int LANES = WARP_N / OUT_WIDTH, ROWS_AT_ONCE = 32 / LANES;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float* stage = (float*)tiles + warp * 16 * PITCH;
    float* own = stage + lane / 4 * PITCH + lane % 4 * 2;
    int c = column + warp / 2 * WARP_N + lane % LANES * OUT_WIDTH;
    // Half of the lanes read the second 16 bytes first: eight lanes then read from all banks.
    bool turned = lane & 4;
    const float* from = stage + lane % LANES * OUT_WIDTH;
#pragma unroll
    for (int i = 0; i < PARTS_M; ++i) {
        __syncwarp();
#pragma unroll
        for (int j = 0; j < PARTS_N * 2; ++j) {
            *(float2*)(own + j * 8) = float2{sums[i][j][0], sums[i][j][1]};
            *(float2*)(own + 8 * PITCH + j * 8) = float2{sums[i][j][2], sums[i][j][3]};
        }
        __syncwarp();
        int first = row + warp % 2 * WARP_M + i * 16, end = c < columns ? min(rows, first + 16) : 0;
        for (int at = first + lane / LANES; at < end;) {
            // The rows of a sample.
            int sample = at / tokens, next = min(end, (sample + 1) * tokens);
            auto row_of = epilogue(c, sample);
#pragma unroll 1
            for (; at < next; at += ROWS_AT_ONCE) {
                const float* own_row = from + (at - first) * PITCH;
                float4 one = *(const float4*)(own_row + (turned ? 4 : 0));
                float4 other = *(const float4*)(own_row + (turned ? 0 : 4));
                float4 low = turned ? other : one, high = turned ? one : other;
                float values[OUT_WIDTH] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
                row_of.store(at, values, row_of.fetch(at));
            }
        }
    }
}
