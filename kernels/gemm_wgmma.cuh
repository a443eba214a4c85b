// The product by wgmma (gemm.cuh): groups of four warps compute 64 of the tile's rows each, straight from shared memory.
//
// A ring of stages in shared memory holds chunks of both operands, copied by one thread in squares of 64 by 64 (TMA): 128 bytes a row,
// in the 128-byte swizzle; of rows along i with k contiguous (K_INNER), or of rows along k with i contiguous (K_OUTER). A barrier of a
// stage says that its chunk is there. While a chunk is multiplied, the one before it may still be, and the others are copied.
//
// product(..) computes a tile with all of a block's threads. Under each_tile(..) a block goes over many tiles, and half of its threads
// finish one while the other half multiplies the next.
#pragma once

#include "gemm_shares.cuh"
#include "gemm_steps.cuh"

constexpr int SQUARE = 64, SQUARE_BYTES = SQUARE * 128;
constexpr int STEP_K = 16, STEPS = TILE_K / STEP_K;  // k of an instruction
constexpr int TILE_A_BYTES = TILE_M / SQUARE * SQUARE_BYTES;
constexpr int STAGE_BYTES = TILE_A_BYTES + TILE_N / SQUARE * SQUARE_BYTES;
constexpr int SHARED = 227 << 10;  // of a block
constexpr int BARRIER_BYTES = 8;
constexpr int STAGES = SHARED / (STAGE_BYTES + BARRIER_BYTES);
static_assert(STAGES * (STAGE_BYTES + BARRIER_BYTES) + 1024 <= SHARED, "room for a piece of a plan, rounded up");
// Under each_tile: sums that are handed over, and the stages for which there is room beside them.
constexpr int SUMS_PITCH = TILE_N + 8;  // floats: four rows of a quarter of the banks each
constexpr int SUMS_BYTES = TILE_M * SUMS_PITCH * 4;
constexpr int FEWER_STAGES = (SHARED - SUMS_BYTES) / (STAGE_BYTES + BARRIER_BYTES);
constexpr int MULTIPLY_REGISTERS = 152, FINISH_REGISTERS = 104;  // of a thread: 65536 of 2 x 256

// Of N columns: two columns of a lane's row and two of the row 8 below, then the same 8 columns on.
template <int N>
using Accumulators = float[N / 2];

// What this thread wrote to shared memory is there for wgmma and for tensor copies, which come by another way.
__device__ __forceinline__ void fence_for_tensor_cores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Before the first product, and after the accumulators were written.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most N of the last groups of products are under way.
template <int N>
__device__ __forceinline__ void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Barriers of warps. Waits until all `threads` have come here or to `arrive_at`.
__device__ __forceinline__ void meet_at(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void arrive_at(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Of the groups that multiply; of a pair that hands sums over, when their place is free and when they are there.
constexpr int MULTIPLYING = 1, FREE = 2, THERE = 4;

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

// Where the chunks of a run are.
struct Maps {
    const TensorMap *a, *b;
    int k_a, k_b;  // where k starts in them
};

__device__ __forceinline__ Maps maps_of(const Operands& operands) {
    return {operands.a.map, operands.b.map, operands.a.k, operands.b.k};
}

// Chunks of a product on their way through a ring of COUNT stages.
template <Layout A, Layout B, int COUNT>
struct Ring {
    unsigned int tiles, barriers;         // in shared memory
    unsigned int writing = 0;             // the stage of the chunk that is copied next
    unsigned int reading = 0, round = 0;  // that is multiplied next

    // The barriers come after the stages and `room` bytes.
    __device__ Ring(unsigned char* memory, int room = 0)
        : tiles(shared_address(memory)), barriers(tiles + COUNT * STAGE_BYTES + room) {}

    // By all threads, before any of them copies or waits.
    __device__ void begin() const {
        if (threadIdx.x < COUNT) begin_barrier(barriers + threadIdx.x * BARRIER_BYTES, 1);
        fence_for_tensor_cores();
        __syncthreads();
    }

    // By all threads, after the last has waited.
    __device__ void end() const {
        __syncthreads();
        if (threadIdx.x < COUNT) end_barrier(barriers + threadIdx.x * BARRIER_BYTES);
    }

    // By one thread: starts the copy of the chunk at k, of N columns.
    template <int N>
    __device__ __forceinline__ void copy(const Maps& maps, int row, int column, int k) {
        unsigned int barrier = barriers + writing * BARRIER_BYTES, to = tiles + writing * STAGE_BYTES;
        arrive_expecting(barrier, TILE_A_BYTES + N / SQUARE * SQUARE_BYTES);
        copy_squares<A, TILE_M>(to, maps.a, row, maps.k_a + k, barrier);
        copy_squares<B, N>(to + TILE_A_BYTES, maps.b, column, maps.k_b + k, barrier);
        writing = writing == COUNT - 1 ? 0 : writing + 1;
    }

    template <Layout LAYOUT, int EXTENT>
    __device__ __forceinline__ static void copy_squares(unsigned int to, const TensorMap* map, int i, int k, unsigned int barrier) {
#pragma unroll
        for (int square = 0; square < EXTENT / SQUARE; ++square) {
            int at = i + square * SQUARE;
            copy_box(to + square * SQUARE_BYTES, map, LAYOUT == K_INNER ? k : at, LAYOUT == K_INNER ? at : k, barrier);
        }
    }

    // sums += A B over the next `chunks` chunks, for 64 rows and N columns, by THREADS in groups; `start_copy` copies one more.
    template <int N, typename StartCopy>
    __device__ __forceinline__ void multiply_chunks(Accumulators<N>& sums, int chunks, int group, StartCopy start_copy) {
        unsigned int tile_a = descriptor(tiles + group * SQUARE_BYTES), tile_b = descriptor(tiles + TILE_A_BYTES);
#pragma unroll 1
        for (int c = 0; c < chunks; ++c) {
            wait_for(barriers + reading * BARRIER_BYTES, round);
            begin_products();
            unsigned int stage = reading * (STAGE_BYTES >> 4);
#pragma unroll
            for (int step = 0; step < STEPS; ++step)
                multiply<N, A == K_OUTER, B == K_OUTER>(
                    sums, tile_a + stage + (step * STEP_BYTES<A> >> 4), tile_b + stage + (step * STEP_BYTES<B> >> 4)
                );
            commit_products();
            if (++reading == COUNT) reading = 0, round ^= 1;
            // The chunk before is multiplied, by all groups: its place is free.
            wait_products<1>();
            meet_at(MULTIPLYING, THREADS);
            if (threadIdx.x == 0) start_copy();
            __syncwarp();
        }
        wait_products<0>();
    }
};

template <int N>
__device__ __forceinline__ void clear(Accumulators<N>& sums) {
#pragma unroll
    for (int j = 0; j < N / 2; ++j) sums[j] = 0.0f;
}

// Stores the sums of a warp's 16 rows from `own` on, where this lane's first ones go.
template <int N>
__device__ __forceinline__ void store_sums(float* own, int pitch, const Accumulators<N>& sums) {
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
        *(float2*)(own + j * 8) = float2{sums[j * 4], sums[j * 4 + 1]};
        *(float2*)(own + 8 * pitch + j * 8) = float2{sums[j * 4 + 2], sums[j * 4 + 3]};
    }
}

// Calls the epilogue for OUT_WIDTH columns of every row of 16 from `start` on that is inside the matrix: of all TILE_N columns from
// `column` on, of which `stage` has the sums of N from `first` on; what the epilogue gets for the others is not defined.
template <int N, int PITCH, typename Epilogue>
__device__ __forceinline__ void finish_rows(
    const float* stage, int start, int rows, int column, int first, int columns, int tokens, Epilogue epilogue
) {
    constexpr int LANES = TILE_N / OUT_WIDTH, ROWS_AT_ONCE = 32 / LANES;
    constexpr int FETCHED = 4;  // rows of a lane that are read before the first is stored
    int lane = threadIdx.x % 32;
    int c = column + lane % LANES * OUT_WIDTH;
    // Half of the lanes read the second 16 bytes first: eight lanes then read from all banks.
    bool turned = lane & 4;
    const float* from = stage + min(max(c - first, 0), N - OUT_WIDTH);
    auto sums_of = [&](int r, float(&values)[OUT_WIDTH]) {
        float4 one = *(const float4*)(from + r * PITCH + (turned ? 4 : 0));
        float4 other = *(const float4*)(from + r * PITCH + (turned ? 0 : 4));
        float4 low = turned ? other : one, high = turned ? one : other;
        values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
        values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
    };
    if (c >= columns || lane >= LANES * ROWS_AT_ONCE || start >= rows) return;
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
        return;
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

// Of a tile's columns, those that are computed: in parts of PART, all unless a window of columns cuts the tile.
struct Columns {
    int first;
    int parts = TILE_N / PART;

    template <typename Steps>
    __device__ Columns(int column, const Steps& steps) : first(column) {
        if constexpr (Steps::IS_CUT) {
            int start = max(column, steps.run.window.start & -ALIGN);
            int needed = (min(column + TILE_N, steps.run.window.end) - start + PART - 1) / PART;
            // From a lane, so that the compiler sees that all go the same way.
            needed = max(__shfl_sync(0xffffffffu, needed, 0), 1);
            if (needed < parts) first = start, parts = needed;
        }
    }
};

template <Layout A, Layout B, int N, typename Steps, typename Sources, typename Epilogue, typename Parts>
__device__ __forceinline__ void product_of_columns(
    int row, int rows, int column, int first, int columns, int tokens, Steps steps, Sources operands, unsigned char* tiles,
    Epilogue epilogue, Parts others
) {
    Ring<A, B, STAGES> ring(tiles);
    ring.begin();
    // The next chunk that is copied, by one thread. Where it is, is asked anew for each: that takes fewer registers.
    Run run = {};
    int k = 0;
    auto start_copy = [&] {
        if (!Steps::IS_ONE_RUN && k >= run.end && !run.empty()) {
            run = steps.after(run);
            k = run.k;
        }
        if (k >= run.end) return;
        ring.template copy<N>(maps_of(operands(run.source)), row, first, k);
        k += TILE_K;
    };
    if (threadIdx.x == 0) {
        run = steps.first();
        k = run.k;
        for (int c = 0; c < STAGES - 1; ++c) start_copy();
    }
    __syncwarp();
    Accumulators<N> sums;
    clear<N>(sums);
    // From a lane, so that the compiler sees that it is the same for all.
    int chunks = __shfl_sync(0xffffffffu, steps.chunks(), 0), warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    ring.template multiply_chunks<N>(sums, chunks, warp / 4, start_copy);
    ring.end();
    if (!others.complete(sums)) return;
    // Each warp turns its sums, so that lanes side by side hold a row.
    constexpr int PITCH = N + 8;
    int lane = threadIdx.x % 32;
    float* stage = (float*)tiles + warp * 16 * PITCH;
    store_sums<N>(stage + lane / 4 * PITCH + lane % 4 * 2, PITCH, sums);
    __syncwarp();
    finish_rows<N, PITCH>(stage, row + warp * 16, rows, column, first, columns, tokens, epilogue);
}

// The tile of C at `row` and `column`, of `rows` and `columns`. Of a tile that a window of columns cuts, as many columns are computed
// as reach from its first to its last, in parts of PART.
template <Layout A, Layout B, typename Steps, typename Sources, typename Epilogue, typename Parts = NoParts>
__device__ __forceinline__ void product(
    int row, int rows, int column, int columns, int tokens, Steps steps, Sources operands, unsigned char* tiles, Epilogue epilogue,
    Parts others = {}
) {
    Columns computed(column, steps);
    unrolled<TILE_N / PART>([&](auto i) {
        constexpr int N = (i.value + 1) * PART;
        if constexpr (Steps::IS_CUT || N == TILE_N)
            if (computed.parts * PART == N)
                product_of_columns<A, B, N>(row, rows, column, computed.first, columns, tokens, steps, operands, tiles, epilogue, others);
    });
}

// One of the groups that multiply. `visit(tile, product)` calls product(..) for a tile of the matrix; chunks of the next are copied while
// the last of one are multiplied.
template <Layout A, Layout B, typename Visit>
struct Multiplier {
    Ring<A, B, FEWER_STAGES>& ring;
    Visit visit;
    int group, count;
    float* own;  // where this lane's first sums go
    // The next chunk that is copied, by one thread.
    int copied_tile, row = 0, column = 0, k = 0, end = 0;
    Maps maps;

    __device__ __forceinline__ Multiplier(Ring<A, B, FEWER_STAGES>& ring, Visit visit, int group, int count, float* sums)
        : ring(ring), visit(visit), group(group), count(count), copied_tile(blockIdx.x) {
        int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        own = sums + (warp * 16 + lane / 4) * SUMS_PITCH + lane % 4 * 2;
        if (threadIdx.x == 0)
            for (int c = 0; c < FEWER_STAGES - 1; ++c) start_copy();
        __syncwarp();
    }

    // Starts the copy of the next chunk, if there is one.
    __device__ __forceinline__ void start_copy() {
        for (; k >= end && copied_tile < count; copied_tile += gridDim.x) {
            auto begin = [&](int new_row, int, int new_column, int, int, const auto& steps, auto operands, auto) {
                row = new_row, column = new_column, k = steps.run.k, end = steps.run.end;
                maps = maps_of(operands(0));
            };
            visit(copied_tile, begin);
        }
        if (k >= end) return;
        ring.template copy<TILE_N>(maps, row, column, k);
        k += TILE_K;
    }

    template <typename Steps, typename Sources, typename Epilogue>
    __device__ __forceinline__ void operator()(int, int, int, int, int, const Steps& steps, Sources, Epilogue) {
        static_assert(Steps::IS_ONE_RUN && !Steps::IS_CUT, "");
        Accumulators<TILE_N> sums;
        clear<TILE_N>(sums);
        int chunks = __shfl_sync(0xffffffffu, steps.chunks(), 0);
        ring.template multiply_chunks<TILE_N>(sums, chunks, group, [&] { start_copy(); });
        meet_at(FREE + group, THREADS);
        store_sums<TILE_N>(own, SUMS_PITCH, sums);
        arrive_at(THERE + group, THREADS);
    }
};

// One of the groups that finish what another multiplies.
struct Finisher {
    int group;
    const float* sums;  // of all rows of the tile

    template <typename Steps, typename Sources, typename Epilogue>
    __device__ __forceinline__ void operator()(
        int row, int rows, int column, int columns, int tokens, const Steps&, Sources, Epilogue epilogue
    ) {
        arrive_at(FREE + group, THREADS);
        meet_at(THERE + group, THREADS);
        int own = (threadIdx.x - THREADS) / 32 * 16;
        finish_rows<TILE_N, SUMS_PITCH>(sums + own * SUMS_PITCH, row + own, rows, column, column, columns, tokens, epilogue);
        __syncwarp();
    }
};

// Calls each(row, column, product) for this block's tiles of those that cover rows x columns.
template <Layout A, Layout B, typename Each>
__device__ __forceinline__ void each_tile(int rows, int columns, Each each) {
    // Larger tiles leave no room for sums.
    if constexpr (TILE_M == 128 && FEWER_STAGES >= 3) {
        int across = (columns + TILE_N - 1) / TILE_N, count = across * ((rows + TILE_M - 1) / TILE_M);
        auto visit = [=](int tile, auto& product) { each(tile / across * TILE_M, tile % across * TILE_N, product); };
        auto all = [&](auto& product) {
            for (int tile = blockIdx.x; tile < count; tile += gridDim.x) visit(tile, product);
        };
        float* sums = (float*)(tiles + FEWER_STAGES * STAGE_BYTES);
        Ring<A, B, FEWER_STAGES> ring(tiles, SUMS_BYTES);
        ring.begin();
        // From a lane, so that the compiler sees that all of a warp go the same way.
        int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
        if (group < 2) {
            asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(MULTIPLY_REGISTERS));
            Multiplier<A, B, decltype(visit)> multiplier(ring, visit, group, count, sums);
            all(multiplier);
        } else {
            asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(FINISH_REGISTERS));
            Finisher finisher{group - 2, sums};
            all(finisher);
        }
    } else {
        __trap();
    }
}
