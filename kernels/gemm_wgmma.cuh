// The product by wgmma (gemm.cuh): two groups of four warps compute half of the tile's rows each, straight from shared memory.
//
// Shared memory holds STAGES pairs of tiles, filled by 16-byte cp.async. A tile is made of squares of 64 by 64, 128 bytes a row,
// whose 16-byte pieces lie where the 128-byte swizzle wants them: of rows along i with k contiguous (K_INNER), or of rows along k
// with i contiguous (K_OUTER). While a chunk is multiplied, the one before it may still be, and the next STAGES - 2 are copied.
#pragma once

#include "gemm_steps.cuh"

constexpr int GROUP_M = TILE_M / 2, PARTS_M = GROUP_M / 64;  // rows of a group, 64 for each instruction
constexpr int STEP_K = 16, STEPS = TILE_K / STEP_K;          // k of an instruction
constexpr int SQUARE_BYTES = 64 * 128;
constexpr int TILE_A_BYTES = TILE_M * TILE_K * 2;
constexpr int STAGE_BYTES = TILE_A_BYTES + TILE_N * TILE_K * 2;
constexpr int SHARED_BYTES = STAGES * STAGE_BYTES;
constexpr int AHEAD = STAGES - 2;  // chunks that are copied while one is multiplied

// Of N columns, for each part of 64 rows: two columns of a lane's row and two of the row 8 below, then the same 8 columns on.
template <int N>
using Accumulators = float[PARTS_M][N / 2];

// What this thread wrote to shared memory is there for wgmma, which reads by another way.
__device__ __forceinline__ void fence_for_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Before the first product, and after the accumulators were written.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most N of the last groups of products are under way.
template <int N>
__device__ __forceinline__ void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// How wgmma finds a tile: squares SQUARE_BYTES apart, of which 8 rows are 1024 bytes, with the 128-byte swizzle. The low half of the
// descriptor has the place, in units of 16 bytes; the high half is the same for all.
#define HIGH "0x40000040"
__device__ __forceinline__ unsigned int descriptor(unsigned int shared) { return shared >> 4 | SQUARE_BYTES >> 4 << 16; }

// Names of 32 registers in a list of operands, and the registers.
#define NAMES_0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_32 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_64 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define NAMES_96 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define SUMS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SUMS_16(i) SUMS_4(i), SUMS_4(i + 4), SUMS_4(i + 8), SUMS_4(i + 12)
#define SUMS_32(i) SUMS_16(i), SUMS_16(i + 16)
// d += a b for 64 rows and SHAPE columns; A, B, TURNED_A, TURNED_B are the names of the operands after the sums.
#define PRODUCT(SHAPE, NAMES, A, B, TURNED_A, TURNED_B, ...)                                                          \
    asm volatile("{\n.reg .pred add;\n.reg .b64 a, b;\nsetp.ne.b32 add, 1, 0;\n"                                      \
                 "mov.b64 a, {" A ", " HIGH "};\nmov.b64 b, {" B ", " HIGH "};\n"                                    \
                 "wgmma.mma_async.sync.aligned.m64n" SHAPE "k16.f32.bf16.bf16 {" NAMES "}, a, b, add, 1, 1, " TURNED_A \
                 ", " TURNED_B ";\n}"                                                                                \
                 : __VA_ARGS__                                                                                        \
                 : "r"(a), "r"(b), "n"(IS_TURNED_A), "n"(IS_TURNED_B))

// d += a b:  a 64 x 16, b 16 x N, where descriptors' low halves say; `d` is N / 2 registers. Turned: k is outer.
template <int N, int IS_TURNED_A, int IS_TURNED_B>
__device__ __forceinline__ void multiply(float* d, unsigned int a, unsigned int b) {
    if constexpr (N == 64) PRODUCT("64", NAMES_0, "%32", "%33", "%34", "%35", SUMS_32(0));
    if constexpr (N == 128) PRODUCT("128", NAMES_0 ", " NAMES_32, "%64", "%65", "%66", "%67", SUMS_32(0), SUMS_32(32));
    if constexpr (N == 192)
        PRODUCT("192", NAMES_0 ", " NAMES_32 ", " NAMES_64, "%96", "%97", "%98", "%99", SUMS_32(0), SUMS_32(32), SUMS_32(64));
    if constexpr (N == 256)
        PRODUCT("256", NAMES_0 ", " NAMES_32 ", " NAMES_64 ", " NAMES_96, "%128", "%129", "%130", "%131", SUMS_32(0),
                SUMS_32(32), SUMS_32(64), SUMS_32(96));
}

// From the k of an instruction to the next, in bytes.
template <Layout LAYOUT>
constexpr int STEP_BYTES = LAYOUT == K_INNER ? STEP_K * 2 : STEP_K * 128;

// What one thread copies of an operand's tiles, from the next chunk on.
template <Layout LAYOUT, int EXTENT>
struct Copier {
    static constexpr int COPIES = EXTENT / 32;  // of all THREADS: 32 rows of a square
    const unsigned char* from[COPIES];
    long long chunk_stride;  // bytes from one chunk to the next
    unsigned int to;
    int own_k;  // along k, in the chunk, of the first copy

    // Rows and columns beyond the matrix are replaced by others: their products are never stored.
    __device__ Copier(Operand operand, int origin, int k, unsigned int shared) {
        int piece = threadIdx.x % 8, row = threadIdx.x / 8;
        to = shared + row * 128 + (piece ^ row & 7) * 16;
        own_k = LAYOUT == K_INNER ? piece * 8 : row;
        chunk_stride = TILE_K * 2 * (LAYOUT == K_INNER ? 1 : operand.stride);
#pragma unroll
        for (int c = 0; c < COPIES; ++c) {
            int i = origin + (LAYOUT == K_INNER ? row + c * 32 : c / 2 * 64 + piece * 8);
            const elem* at = LAYOUT == K_INNER ? operand.data + min(i, operand.count - 1) * operand.stride + piece * 8 + k
                                               : operand.data + (row + c % 2 * 32 + k) * operand.stride
                                                     + min(i, (operand.count - 1) & ~7);
            from[c] = (const unsigned char*)at;
        }
    }

    // The next chunk, at k, with zeros from `limit` on.
    __device__ void copy(int limit, int k, unsigned int stage) {
        unsigned int target = to + stage;
        if (k + TILE_K <= limit)
            unrolled<COPIES>([&](auto c) { copy_async<c.value * 32 * 128>(target, from[c.value]); });
        else
            unrolled<COPIES>([&](auto c) {
                int bytes = k + own_k + (LAYOUT == K_INNER ? 0 : c.value % 2 * 32) < limit ? 16 : 0;
                copy_async_or_zeros<c.value * 32 * 128>(target, from[c.value], bytes);
            });
#pragma unroll
        for (int c = 0; c < COPIES; ++c) from[c] += LAYOUT == K_INNER ? TILE_K * 2 : chunk_stride;
    }
};

// sums += A B over the chunks of `steps`, where `operands(source)` says of what, for N columns from `column` on.
template <Layout A, Layout B, int N, typename Steps, typename Sources>
__device__ __forceinline__ void accumulate(
    Accumulators<N>& sums, int row, int column, Steps steps, Sources operands, unsigned char* tiles
) {
    unsigned int shared = shared_address(tiles);
    // From a lane, so that the compiler sees that it is the same for all.
    int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
    unsigned int tile_a = descriptor(shared + group * (PARTS_M * SQUARE_BYTES)), tile_b = descriptor(shared + TILE_A_BYTES);
    Run run = steps.first();
    int k = run.k;
    Operands of_run = operands(run.source);
    int limit = of_run.limit;
    Copier<A, TILE_M> copier_a(of_run.a, row, k, shared);
    Copier<B, N> copier_b(of_run.b, column, k, shared + TILE_A_BYTES);
    // Starts the copy of the next chunk, and says whether there is one.
    auto start_copy = [&](unsigned int stage) {
        if (!Steps::IS_ONE_RUN && k >= run.end && !run.empty()) {
            run = steps.after(run);
            k = run.k;
            Operands of_run = operands(run.source);
            limit = of_run.limit;
            copier_a = Copier<A, TILE_M>(of_run.a, row, k, shared);
            copier_b = Copier<B, N>(of_run.b, column, k, shared + TILE_A_BYTES);
        }
        bool there = k < run.end;
        if (there) {
            copier_a.copy(limit, k, stage);
            copier_b.copy(limit, k, stage);
            k += TILE_K;
        }
        commit_copies();
        return there;
    };
    auto next = [](unsigned int stage) { return stage == (STAGES - 1) * STAGE_BYTES ? 0 : stage + STAGE_BYTES; };

    bool there[AHEAD];
    unsigned int reading = 0, writing = 0;
#pragma unroll
    for (int c = 0; c < AHEAD; ++c) {
        there[c] = start_copy(writing);
        writing = next(writing);
    }
    // A vote, so that the compiler sees that all threads go the same way.
#pragma unroll 1
    while (__any_sync(0xffffffffu, there[0])) {
        wait_copies<AHEAD - 1>();
        fence_for_products();
        wait_products<1>();
        // The chunk is there for every warp, and every warp is done with the one whose place the next copy takes.
        __syncthreads();
        begin_products();
#pragma unroll
        for (int step = 0; step < STEPS; ++step)
#pragma unroll
            for (int i = 0; i < PARTS_M; ++i)
                multiply<N, A == K_OUTER, B == K_OUTER>(
                    sums[i], tile_a + (reading >> 4) + (step * STEP_BYTES<A> + i * SQUARE_BYTES >> 4),
                    tile_b + (reading >> 4) + (step * STEP_BYTES<B> >> 4)
                );
        commit_products();
        bool last = start_copy(writing);
#pragma unroll
        for (int c = 0; c + 1 < AHEAD; ++c) there[c] = there[c + 1];
        there[AHEAD - 1] = last;
        reading = next(reading);
        writing = next(writing);
    }
    wait_products<0>();
    // Copies that nobody waits for would land in what comes next.
    wait_copies<0>();
    __syncthreads();
}

// Calls the epilogue for OUT_WIDTH columns of every row inside the matrix: of all TILE_N columns from `column` on, of which `sums`
// are N from `first` on; what the epilogue gets for the others is not defined. Each warp turns its sums through shared memory, so
// that lanes side by side hold a row.
template <int N, typename Epilogue>
__device__ __forceinline__ void finish(
    const Accumulators<N>& sums, int row, int rows, int column, int first, int columns, int tokens, unsigned char* tiles,
    Epilogue epilogue
) {
    constexpr int PITCH = N + 8;  // floats: four rows of a quarter of the banks each
    constexpr int LANES = TILE_N / OUT_WIDTH, ROWS_AT_ONCE = 32 / LANES;
    constexpr int FETCHED = 4;  // rows of a lane that are read before the first is stored
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float* stage = (float*)tiles + warp * 16 * PITCH;
    float* own = stage + lane / 4 * PITCH + lane % 4 * 2;
    int c = column + lane % LANES * OUT_WIDTH;
    // Half of the lanes read the second 16 bytes first: eight lanes then read from all banks.
    bool turned = lane & 4;
    const float* from = stage + min(max(c - first, 0), N - OUT_WIDTH);
    bool is_inside = c < columns && lane < LANES * ROWS_AT_ONCE;
    auto sums_of = [&](int r, float(&values)[OUT_WIDTH]) {
        float4 one = *(const float4*)(from + r * PITCH + (turned ? 4 : 0));
        float4 other = *(const float4*)(from + r * PITCH + (turned ? 0 : 4));
        float4 low = turned ? other : one, high = turned ? one : other;
        values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
        values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
    };
#pragma unroll
    for (int i = 0; i < PARTS_M; ++i) {
        __syncwarp();
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
            *(float2*)(own + j * 8) = float2{sums[i][j * 4], sums[i][j * 4 + 1]};
            *(float2*)(own + 8 * PITCH + j * 8) = float2{sums[i][j * 4 + 2], sums[i][j * 4 + 3]};
        }
        __syncwarp();
        int start = row + warp / 4 * GROUP_M + warp % 4 * 16 + i * 64;
        if (!is_inside || start >= rows) continue;
        int sample = start / tokens;
        if (start + 16 <= rows && (start + 15) / tokens == sample) {
            auto row_of = epilogue(c, sample);
#pragma unroll 1
            for (int r = lane / LANES; r < 16; r += FETCHED * ROWS_AT_ONCE) {
                decltype(row_of.fetch(0)) fetched[FETCHED];
#pragma unroll
                for (int f = 0; f < FETCHED; ++f) fetched[f] = row_of.fetch(start + r + f * ROWS_AT_ONCE);
#pragma unroll
                for (int f = 0; f < FETCHED; ++f) {
                    float values[OUT_WIDTH];
                    sums_of(r + f * ROWS_AT_ONCE, values);
                    row_of.store(start + r + f * ROWS_AT_ONCE, values, fetched[f]);
                }
            }
            continue;
        }
        // Rows of several samples, or the last of the matrix.
#pragma unroll 1
        for (int r = lane / LANES; r < 16 && start + r < rows; r += ROWS_AT_ONCE) {
            auto row_of = epilogue(c, (start + r) / tokens);
            float values[OUT_WIDTH];
            sums_of(r, values);
            row_of.store(start + r, values, row_of.fetch(start + r));
        }
    }
}

template <Layout A, Layout B, int N, typename Steps, typename Sources, typename Epilogue>
__device__ __forceinline__ void product_of_columns(
    int row, int rows, int column, int first, int columns, int tokens, Steps steps, Sources operands, unsigned char* tiles,
    Epilogue epilogue
) {
    Accumulators<N> sums;
#pragma unroll
    for (int i = 0; i < PARTS_M; ++i)
#pragma unroll
        for (int j = 0; j < N / 2; ++j) sums[i][j] = 0.0f;
    accumulate<A, B, N>(sums, row, first, steps, operands, tiles);
    finish<N>(sums, row, rows, column, first, columns, tokens, tiles, epilogue);
}

// The tile of C at `row` and `column`, of `rows` and `columns`. Of a tile that a window of columns cuts, as many columns are computed
// as reach from its first to its last, in parts of PART.
template <Layout A, Layout B, typename Steps, typename Sources, typename Epilogue>
__device__ __forceinline__ void product(
    int row, int rows, int column, int columns, int tokens, Steps steps, Sources operands, unsigned char* tiles, Epilogue epilogue
) {
    if constexpr (Steps::IS_CUT) {
        int first = max(column, steps.run.window.start & -ALIGN);
        int parts = (min(column + TILE_N, steps.run.window.end) - first + PART - 1) / PART;
        // From a lane, so that the compiler sees that all go the same way.
        parts = max(__shfl_sync(0xffffffffu, parts, 0), 1);
        if (parts < TILE_N / PART) {
            unrolled<TILE_N / PART - 1>([&](auto i) {
                constexpr int N = (i.value + 1) * PART;
                if (parts * PART == N)
                    product_of_columns<A, B, N>(row, rows, column, first, columns, tokens, steps, operands, tiles, epilogue);
            });
            return;
        }
    }
    product_of_columns<A, B, TILE_N>(row, rows, column, column, columns, tokens, steps, operands, tiles, epilogue);
}
