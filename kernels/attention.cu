// Multi-head self-attention over packed queries, keys and values (formulas: src/ops/attention/mod.rs).
//
//   qkv [B, T, 3 C] = q | k | v, each [NH, HS] a token    S = q k^T / sqrt(HS)    P = softmax(S)    out = P v  [B, T, C]
//
// A block owns tokens of one head of one sample and walks over all others, a tile at a time. P never reaches memory: its
// accumulators are the next product's operand. Saved for backward: qkv, out, lse.
// Backward: D_t = dout_t . out_t;  dv = P^T dout,  dS = P (dout v^T - D),  dk = dS^T q / sqrt(HS) by blocks that own keys;
// dq = dS k / sqrt(HS) by blocks that own queries. So every sum has one owner and a fixed order.
//
// HS is a definition, up to 128; in bf16 a multiple of 8.
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

constexpr int THREADS = WARPS * 32;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr int CHUNKS = HS / 8;              // of 16 bytes in a row
constexpr int ROW_CHUNKS = CHUNKS | 1;      // in shared memory: odd, so that eight rows are in eight groups of banks
constexpr int ROW_BYTES = ROW_CHUNKS * 16;
constexpr int TILE_BYTES = TILE * ROW_BYTES;
constexpr int STEPS = HS / 16;              // along a row: products of 16 elements,
constexpr bool HALF_STEP = HS % 16 != 0;    // and one of 8
static_assert(16 * WARPS * ROW_TILES <= 2 * TILE, "a block's own rows take the place of two tiles");

template <int I>
struct Index {
    static constexpr int value = I;
};

// body(Index<0>()) ... body(Index<N - 1>()): a loop whose counter is a constant, as offsets in instructions must be.
template <int N, int I = 0, typename Body>
__device__ __forceinline__ void unroll(Body body) {
    if constexpr (I < N) {
        body(Index<I>());
        unroll<N, I + 1>(body);
    }
}

__device__ __forceinline__ unsigned int shared_address(const void* pointer) {
    return (unsigned int)__cvta_generic_to_shared(pointer);
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int N>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// 16 bytes from global to shared memory; zeros when `bytes` is 0, and then nothing is read.
template <int OFFSET>
__device__ __forceinline__ void copy_async(unsigned int to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0+%3], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes), "n"(OFFSET) : "memory");
}

// Four 8 x 8 matrices: rows 0-7 and 8-15 of a chunk, then of the next chunk, for a lane's address from `lane_offset`.
template <bool TRANSPOSED, int OFFSET>
__device__ __forceinline__ void load_matrices(unsigned int (&r)[4], unsigned int address) {
    if (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4+%5];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address), "n"(OFFSET)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4+%5];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address), "n"(OFFSET)
                     : "memory");
}

// The first two of them.
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

// d += a b:  a 16 x 16, b 16 x 8.
__device__ __forceinline__ void mma(float (&d)[4], const unsigned int (&a)[4], unsigned int b0, unsigned int b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
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
            unroll<(COUNT + STEP - 1) / STEP>([&](auto i) {
                constexpr int first = decltype(i)::value * STEP;
                if (first + STEP > COUNT && row >= COUNT - first) return;
                unroll<TILES>([&](auto n) {
                    const Copy& tile = tiles[decltype(n)::value];
                    const elem* from = tile.from + (long long)tile.stride * first;
                    copy_async<first * ROW_BYTES>(tile.to + at, from, size(first));
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
        unroll<M>([&](auto m) {
            constexpr int row = decltype(m)::value * 16 * ROW_BYTES;
            unroll<STEPS>([&](auto k) {
                load_matrices<false, row + decltype(k)::value * 32>(whole[decltype(m)::value][decltype(k)::value], tile);
            });
            if constexpr (HALF_STEP) load_two_matrices<false, row + STEPS * 32>(half[decltype(m)::value], tile);
        });
    }
};

// scores += own tile^T, products of rows: 16 M own rows, and 8 N of the tile from row FIRST on.
template <int FIRST, int M, int N>
__device__ __forceinline__ void rows_times_rows(float (&scores)[M][N][4], const Fragments<M>& own, unsigned int tile) {
    unroll<STEPS>([&](auto step) {
        constexpr int k = decltype(step)::value;
        unroll<N / 2>([&](auto pair) {
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
        unroll<N / 2>([&](auto pair) {
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
        unroll<M>([&](auto m) {
            constexpr int at = decltype(m)::value * 16 * ROW_BYTES + k * 32;
            if constexpr (k < STEPS) load_matrices<false, at>(rows.whole[decltype(m)::value][0], own);
            else load_two_matrices<false, at>(rows.half[decltype(m)::value], own);
        });
        unroll<N / 2>([&](auto pair) {
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
    unroll<STEPS + HALF_STEP>(step);
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
    unroll<COUNT / 2>([&](auto pair) {
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
    unroll<N / 2>([&](auto step) {
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

// Grid: (ceil(T / (16 WARPS ROW_TILES)), NH, B). Shared memory: 4 tiles.
extern "C" __global__ void __launch_bounds__(THREADS, 8 / WARPS) attention_fwd(
    elem* __restrict__ out,        // [B, T, C]
    float* __restrict__ lse,       // [B, NH, T]
    const elem* __restrict__ qkv,  // [B, T, 3 C]
    float scale,                   // 1 / sqrt(HS)
    int B,
    int T,
    int C
) {
    extern __shared__ __align__(128) unsigned char shared[];
    constexpr int M = ROW_TILES, N = TILE / 8, OWN = WARPS * 16 * M;
    // A sum of exponentials beyond this one is far from the largest number, and no score is likely to reach it.
    constexpr float RAISE = 1.8446744e19f;
    int first = blockIdx.x * OWN, head = blockIdx.y, b = blockIdx.z, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned int tiles = shared_address(shared);
    Share<THREADS> share;
    Head keys = part_of_qkv(1, b, head, T, C);
    const elem* key = qkv + share.of(keys, 0);
    const elem* query = qkv + share.of(part_of_qkv(0, b, head, T, C), first);
    share.copy<OWN>({Copy{query, keys.stride, tiles + 2 * TILE_BYTES}}, T - first);
    share.copy<TILE>({Copy{key, keys.stride, tiles}, Copy{key + C, keys.stride, tiles + TILE_BYTES}}, T);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    Fragments<M> q;
    q.load(tiles + 2 * TILE_BYTES + warp * 16 * M * ROW_BYTES + lane_offset());

    float sums[M][CHUNKS][4] = {};
    float factor = scale * LOG2_E;
    // Exponentials are relative to the first tile's highest score, and later to that of a tile that is far higher.
    float reference[M][2], total[M][2] = {};
#pragma unroll
    for (int m = 0; m < M; ++m) reference[m][0] = reference[m][1] = -INFINITY;
    bool raise = true;
    unsigned int reading = tiles, writing = tiles + 2 * TILE_BYTES;
    for (int left = T; left > 0; left -= TILE) {
        wait_copies<0>();
        // The tile is there for every warp, and every warp is done with the one that is overwritten next.
        __syncthreads();
        if (left > TILE) {
            key += (long long)TILE * keys.stride;
            share.copy<TILE>(
                {Copy{key, keys.stride, writing}, Copy{key + C, keys.stride, writing + TILE_BYTES}}, left - TILE
            );
            commit_copies();
        }
        float scores[M][N][4], sum[M][2];
        while (true) {
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int n = 0; n < N; ++n)
#pragma unroll
                    for (int r = 0; r < 4; ++r) scores[m][n][r] = 0.0f;
            rows_times_rows<0>(scores, q, reading + lane_offset());
            if (left < TILE) mask<0>(scores, left);
            if (raise) {
#pragma unroll
                for (int m = 0; m < M; ++m)
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        float highest = -INFINITY;
#pragma unroll
                        for (int n = 0; n < N; ++n) highest = fmaxf(highest, fmaxf(scores[m][n][h * 2], scores[m][n][h * 2 + 1]));
                        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
                        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
                        highest = fmaxf(reference[m][h], highest * factor);
                        // 0 in the first tile, whose first key is always there.
                        float shrink = power_of_2(reference[m][h] - highest);
                        reference[m][h] = highest;
                        total[m][h] *= shrink;
#pragma unroll
                        for (int n = 0; n < CHUNKS; ++n) {
                            sums[m][n][h * 2] *= shrink;
                            sums[m][n][h * 2 + 1] *= shrink;
                        }
                    }
            }
            float largest = 0.0f;
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
#pragma unroll
                    for (int n = 0; n < N; ++n)
#pragma unroll
                        for (int r = h * 2; r < h * 2 + 2; ++r) {
                            scores[m][n][r] = power_of_2(fmaf(scores[m][n][r], factor, -reference[m][h]));
                            sum[m][h] = n == 0 && r == h * 2 ? scores[m][n][r] : sum[m][h] + scores[m][n][r];
                        }
                    largest = fmaxf(largest, sum[m][h]);
                }
            raise = __any_sync(0xffffffffu, largest > RAISE);
            if (!raise) break;
        }
#pragma unroll
        for (int m = 0; m < M; ++m) {
            total[m][0] += sum[m][0];
            total[m][1] += sum[m][1];
        }
        weighted_rows<0>(sums, scores, reading + TILE_BYTES + lane_offset());
        unsigned int other = reading;
        reading = writing;
        writing = other;
    }
    float inverse[M][2];
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float sum = total[m][h];
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            inverse[m][h] = __fdividef(1.0f, sum);
            int t = first + (warp * M + m) * 16 + lane / 4 + h * 8;
            if (lane % 4 == 0 && t < T)
                lse[((long long)b * gridDim.y + head) * T + t] = (reference[m][h] + logarithm_to_2(sum)) * (1.0f / LOG2_E);
        }
    __syncthreads();
    stage_rows(shared, sums, inverse);
    __syncthreads();
    share.store<OWN>(out, of_activation(b, head, T, C), first, T, shared);
}

#if WHOLE_HEAD

constexpr int HEAD_WARPS = 8;  // of 32 keys each
constexpr int HEAD_THREADS = HEAD_WARPS * 32;
constexpr int HEAD_BYTES = HEAD_THREADS * ROW_BYTES;  // a row for each thread
constexpr int QUERIES = 32;                           // at a time
constexpr int QUERIES_BYTES = QUERIES * ROW_BYTES;
constexpr int DS_ROW_BYTES = QUERIES * 2 + 16;        // of a key: an odd number of chunks

// Grid: (1, NH, B) blocks of 256 threads: dk and dv of 32 keys a warp; dS of all passes through shared memory to dq.
// Shared memory: rows of HS for all keys and 6 times 32 queries, DS_ROW_BYTES
// and a float a key, and 2 floats for each of 32 queries.
extern "C" __global__ void __launch_bounds__(HEAD_THREADS) attention_bwd(
    elem* __restrict__ dqkv,        // [B, T, 3 C]
    const elem* __restrict__ dout,  // [B, T, C]
    const elem* __restrict__ qkv,   // [B, T, 3 C]
    const elem* __restrict__ out,   // [B, T, C]
    const float* __restrict__ lse,  // [B, NH, T]
    float scale,                    // 1 / sqrt(HS)
    int B,
    int T,
    int C
) {
    extern __shared__ __align__(128) unsigned char shared[];
    constexpr int M = 2, N = 2;
    int head = blockIdx.y, b = blockIdx.z, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // Keys; two stages of queries and gradients of outputs; outputs; gradients of queries; dS; statistics.
    constexpr int STAGES = HEAD_BYTES, OUTPUTS = STAGES + 4 * QUERIES_BYTES, DQ = OUTPUTS + QUERIES_BYTES;
    constexpr int DS = DQ + QUERIES_BYTES, STATISTICS = DS + HEAD_THREADS * DS_ROW_BYTES;
    static_assert(STAGES + HEAD_BYTES <= STATISTICS, "values, and later their gradients, take the place of all after keys");
    unsigned int keys = shared_address(shared), tiles = keys + STAGES;
    // For every two queries: -lse of both, in powers of 2, and -D of both.
    float* rows = (float*)(shared + STATISTICS);
    float* head_lse = rows + 2 * QUERIES;
    Head queries = part_of_qkv(0, b, head, T, C);
    {
        Share<HEAD_THREADS> share;
        const elem* query = qkv + share.of(queries, 0);
        share.copy<HEAD_THREADS>({Copy{query + C, queries.stride, keys}, Copy{query + 2 * C, queries.stride, tiles}}, T);
        commit_copies();
    }
    // A query that is not there has no probabilities: 2^-infinity.
    int t = threadIdx.x;
    head_lse[t] = t < T ? -lse[((long long)b * gridDim.y + head) * T + t] * LOG2_E : -INFINITY;
    wait_copies<0>();
    __syncthreads();
    Fragments<M> v;
    unsigned int own_keys = keys + warp * 32 * ROW_BYTES + lane_offset();
    v.load(own_keys + STAGES);
    __syncthreads();

    // What copies, stores and dq need is computed for each tile again: there are no registers to keep it in.
    auto copy_next = [&](unsigned int to, int start) {
        Share<HEAD_THREADS> share(thread_again());
        Head upstream = of_activation(b, head, T, C);
        long long at = share.of(upstream, start);
        Copy q{qkv + share.of(queries, start), queries.stride, to}, gradients{dout + at, upstream.stride, to + QUERIES_BYTES};
        share.copy<QUERIES>({q, gradients, Copy{out + at, upstream.stride, keys + OUTPUTS}}, T - start);
        commit_copies();
    };
    auto store_dq = [&](int start) {
        Share<HEAD_THREADS>(thread_again()).store<QUERIES>(dqkv, queries, start, T, shared + DQ);
    };
    unsigned int own_ds = keys + DS + (warp * 32 + lane / 4) * DS_ROW_BYTES + lane % 4 * 4;

    float dk[M][CHUNKS][4] = {}, dv[M][CHUNKS][4] = {};
    float factor = scale * LOG2_E;
    unsigned int reading = tiles;
    copy_next(reading, 0);
    for (int start = 0; start < T; start += QUERIES) {
        wait_copies<0>();
        // The tile is there for every warp, and so is dq of the one before.
        __syncthreads();
        if (start) store_dq(start - QUERIES);
        if (t < QUERIES) rows[t / 2 * 4 + t % 2] = head_lse[start + t];
        for (int row = warp * 16; row < QUERIES; row += HEAD_WARPS * 16) {
            unsigned int at = row * ROW_BYTES + lane_offset();
            store_row_products(rows + row * 2, reading + QUERIES_BYTES + at, keys + OUTPUTS + at);
        }
        __syncthreads();
        if (start + QUERIES < T) copy_next(2 * tiles + 2 * QUERIES_BYTES - reading, start + QUERIES);
        unsigned int tile_q = reading + lane_offset(), tile_dout = tile_q + QUERIES_BYTES;
        // One code for all parts: unrolled, they would share registers.
#pragma unroll 1
        for (int part = 0; part < QUERIES / 16; ++part, tile_q += 16 * ROW_BYTES, tile_dout += 16 * ROW_BYTES) {
            float p[M][N][4] = {}, ds[M][N][4];
            unsigned int packed[M][4];
            rows_times_rows<0>(p, own_keys, tile_q);
#pragma unroll
            for (int n = 0; n < N; ++n) {
                float4 row = ((const float4*)rows)[part * 8 + n * 4 + lane % 4];
#pragma unroll
                for (int m = 0; m < M; ++m)
#pragma unroll
                    for (int r = 0; r < 4; ++r) {
                        p[m][n][r] = power_of_2(fmaf(p[m][n][r], factor, r % 2 ? row.y : row.x));
                        ds[m][n][r] = r % 2 ? row.w : row.z;
                    }
            }
            // dS of keys that are not there must be 0, not infinity: they are multiplied with zeros in dq.
            if (warp * 32 + 32 > T) {
#pragma unroll
                for (int m = 0; m < M; ++m)
#pragma unroll
                    for (int r = 0; r < 4; ++r)
                        if (warp * 32 + m * 16 + lane / 4 + r / 2 * 8 >= T) p[m][0][r] = p[m][1][r] = 0.0f;
            }
            pack_weights<0>(packed, p);
            add_weighted<0>(dv, packed, tile_dout);
            rows_times_rows<0>(ds, v, tile_dout);
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int n = 0; n < N; ++n)
#pragma unroll
                    for (int r = 0; r < 4; ++r) ds[m][n][r] *= p[m][n][r];
            pack_weights<0>(packed, ds);
            unroll<M * 4>([&](auto index) {
                constexpr int m = decltype(index)::value / 4, r = decltype(index)::value % 4;
                store_shared<(m * 16 + r % 2 * 8) * DS_ROW_BYTES + r / 2 * 16>(own_ds + part * 32, packed[m][r]);
            });
            add_weighted<0>(dk, packed, tile_q);
        }
        __syncthreads();
        // Of dq, a warp computes 16 queries and PART chunks.
        constexpr int PART = (CHUNKS + HEAD_WARPS / 2 - 1) / (HEAD_WARPS / 2);
        unsigned int thread = thread_again(), first_chunk = thread / 64 * PART;
        if (first_chunk < CHUNKS) {
            // The last part may overlap the one before: both store the same.
            first_chunk = min(first_chunk, CHUNKS - PART);
            unsigned int lane = thread % 32, first_query = thread / 32 % 2 * 16;
            unsigned int ds_part = keys + DS + lane % 16 * DS_ROW_BYTES + lane / 16 * 16 + first_query * 2;
            unsigned int keys_part = keys + lane_offset(thread) + first_chunk * 16;
            unsigned int own_dq = keys + DQ + (first_query + lane / 4) * ROW_BYTES + first_chunk * 16 + lane % 4 * 4;
            float dq[1][PART][4] = {};
            unroll<HEAD_THREADS / 16>([&](auto step) {
                constexpr int k = decltype(step)::value;
                unsigned int weights[1][4];
                load_matrices<true, k * 16 * DS_ROW_BYTES>(weights[0], ds_part);
                // Transposed, rows become columns.
                unsigned int second = weights[0][1];
                weights[0][1] = weights[0][2];
                weights[0][2] = second;
                add_weighted<k * 16>(dq, weights, keys_part);
            });
            unroll<PART * 2>([&](auto index) {
                constexpr int n = decltype(index)::value / 2, h = decltype(index)::value % 2;
                unsigned int packed = pack_bf16(dq[0][n][h * 2] * scale, dq[0][n][h * 2 + 1] * scale);
                store_shared<h * 8 * ROW_BYTES + n * 16>(own_dq, packed);
            });
        }
        reading = 2 * tiles + 2 * QUERIES_BYTES - reading;
    }
    __syncthreads();
    store_dq((T - 1) / QUERIES * QUERIES);
    __syncthreads();
    const float scales[M][2] = {{scale, scale}, {scale, scale}}, ones[M][2] = {{1.0f, 1.0f}, {1.0f, 1.0f}};
    stage_rows(shared, dk, scales);
    stage_rows(shared + STAGES, dv, ones);
    __syncthreads();
    Share<HEAD_THREADS> share;
    share.store<HEAD_THREADS>(dqkv, part_of_qkv(1, b, head, T, C), 0, T, shared);
    share.store<HEAD_THREADS>(dqkv, part_of_qkv(2, b, head, T, C), 0, T, shared + STAGES);
}

#else

// Rows of a tile that backward computes with at a time: as many as registers allow.
constexpr int KEYS_PART = TILE < 32 ? TILE : 32;
constexpr int QUERIES_PART = ROW_TILES > 1 || TILE < 32 ? 16 : 32;
// Long rows of dk and dv do not fit in the registers of one warp: other blocks compute dv then.
constexpr bool SPLIT = HS > 104;

// dk and dv of a block's own keys, from `first` on, or only one of them.
template <bool DK, bool DV>
__device__ __forceinline__ void gradients_of_keys(
    elem* __restrict__ dqkv,
    const elem* __restrict__ dout,
    const elem* __restrict__ qkv,
    const elem* __restrict__ out,
    const float* __restrict__ lse,  // of this head
    float scale,
    int b,
    int head,
    int T,
    int C,
    int first,
    unsigned char* shared
) {
    constexpr int N = KEYS_PART / 8, OWN = WARPS * 16;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned int tiles = shared_address(shared), tile_out = tiles + 4 * TILE_BYTES;
    // For every two queries of a tile: -lse of both, in powers of 2, and -D of both.
    float* rows = (float*)(shared + 5 * TILE_BYTES);
    Share<THREADS> share;
    Head queries = part_of_qkv(0, b, head, T, C), upstream = of_activation(b, head, T, C);
    const elem* query = qkv + share.of(queries, 0);
    const elem* dout_row = dout + share.of(upstream, 0);
    long long to_out = out - dout;

    const elem* own_key = qkv + share.of(part_of_qkv(1, b, head, T, C), first);
    share.copy<OWN>({Copy{own_key, queries.stride, tiles}}, T - first);
    if (DK) share.copy<OWN>({Copy{own_key + C, queries.stride, tiles + 2 * TILE_BYTES}}, T - first);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    Fragments<1> k, v;
    unsigned int own = tiles + warp * 16 * ROW_BYTES + lane_offset();
    k.load(own);
    if (DK) v.load(own + 2 * TILE_BYTES);
    __syncthreads();

    float next_lse;
    auto copy_next = [&](unsigned int to, int start) {
        Copy q{query, queries.stride, to}, gradients{dout_row, upstream.stride, to + TILE_BYTES};
        Copy outputs{dout_row + to_out, upstream.stride, tile_out};
        if constexpr (DK) share.copy<TILE>({q, gradients, outputs}, T - start);
        else share.copy<TILE>({q, gradients}, T - start);
        commit_copies();
        query += (long long)TILE * queries.stride;
        dout_row += (long long)TILE * upstream.stride;
        // A query that is not there has no probabilities: 2^-infinity.
        if (threadIdx.x < TILE) next_lse = start + threadIdx.x < T ? -lse[start + threadIdx.x] * LOG2_E : -INFINITY;
    };
    float dk[1][CHUNKS][4] = {}, dv[1][CHUNKS][4] = {};
    float factor = scale * LOG2_E;
    unsigned int reading = tiles, writing = tiles + 2 * TILE_BYTES;
    copy_next(reading, 0);
    for (int start = 0; start < T; start += TILE) {
        wait_copies<0>();
        // The tile is there for every warp, and every warp is done with the one before.
        __syncthreads();
        if (threadIdx.x < TILE) rows[threadIdx.x / 2 * 4 + threadIdx.x % 2] = next_lse;
        for (int row = warp * 16; DK && row < TILE; row += WARPS * 16) {
            unsigned int at = row * ROW_BYTES + lane_offset();
            store_row_products(rows + row * 2, reading + TILE_BYTES + at, tile_out + at);
        }
        __syncthreads();
        if (start + TILE < T) copy_next(writing, start + TILE);
        unsigned int tile_q = reading + lane_offset(), tile_dout = tile_q + TILE_BYTES;
        unroll<TILE / KEYS_PART>([&](auto part) {
            constexpr int FIRST = decltype(part)::value * KEYS_PART;
            float p[1][N][4] = {}, ds[1][N][4];
            rows_times_rows<FIRST>(p, k, tile_q);
#pragma unroll
            for (int n = 0; n < N; ++n) {
                const float* row = rows + FIRST * 2 + n * 16 + lane % 4 * 4;
                float2 lse = *(const float2*)row, d = DK ? *(const float2*)(row + 2) : float2();
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    p[0][n][r] = power_of_2(fmaf(p[0][n][r], factor, r % 2 ? lse.y : lse.x));
                    ds[0][n][r] = r % 2 ? d.y : d.x;
                }
            }
            if (DV) weighted_rows<FIRST>(dv, p, tile_dout);
            if (DK) {
                rows_times_rows<FIRST>(ds, v, tile_dout);
#pragma unroll
                for (int n = 0; n < N; ++n)
#pragma unroll
                    for (int r = 0; r < 4; ++r) ds[0][n][r] *= p[0][n][r];
                weighted_rows<FIRST>(dk, ds, tile_q);
            }
        });
        unsigned int other = reading;
        reading = writing;
        writing = other;
    }
    __syncthreads();
    const float scales[1][2] = {{scale, scale}}, ones[1][2] = {{1.0f, 1.0f}};
    if (DK) stage_rows(shared, dk, scales);
    if (DV) stage_rows(shared + 2 * TILE_BYTES, dv, ones);
    __syncthreads();
    if (DK) share.store<OWN>(dqkv, part_of_qkv(1, b, head, T, C), first, T, shared);
    if (DV) share.store<OWN>(dqkv, part_of_qkv(2, b, head, T, C), first, T, shared + 2 * TILE_BYTES);
}

// dq of a block's own queries, from `first` on.
__device__ __forceinline__ void gradients_of_queries(
    elem* __restrict__ dqkv,
    const elem* __restrict__ dout,
    const elem* __restrict__ qkv,
    const elem* __restrict__ out,
    const float* __restrict__ lse,  // of this head
    float scale,
    int b,
    int head,
    int T,
    int C,
    int first,
    unsigned char* shared
) {
    constexpr int M = ROW_TILES, N = QUERIES_PART / 8, OWN = WARPS * 16 * M;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned int tiles = shared_address(shared);
    Share<THREADS> share;
    Head queries = part_of_qkv(0, b, head, T, C), upstream = of_activation(b, head, T, C);
    long long own_row = share.of(upstream, first);
    Copy gradients{dout + own_row, upstream.stride, tiles}, outputs{out + own_row, upstream.stride, tiles + 2 * TILE_BYTES};
    share.copy<OWN>({gradients, outputs}, T - first);
    commit_copies();
    float row_lse[M][2];
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            int t = first + (warp * M + m) * 16 + lane / 4 + h * 8;
            row_lse[m][h] = t < T ? -lse[t] * LOG2_E : -INFINITY;
        }
    wait_copies<0>();
    __syncthreads();
    Fragments<M> q, g;
    float row_d[M][2];
    unsigned int own = tiles + warp * 16 * M * ROW_BYTES + lane_offset();
    g.load(own);
#pragma unroll
    for (int m = 0; m < M; ++m) row_products(row_d[m], own + m * 16 * ROW_BYTES, own + m * 16 * ROW_BYTES + 2 * TILE_BYTES);
    __syncthreads();
    const elem* key = qkv + share.of(part_of_qkv(1, b, head, T, C), 0);
    share.copy<OWN>({Copy{qkv + share.of(queries, first), queries.stride, tiles + 2 * TILE_BYTES}}, T - first);
    share.copy<TILE>({Copy{key, queries.stride, tiles}, Copy{key + C, queries.stride, tiles + TILE_BYTES}}, T);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    q.load(own + 2 * TILE_BYTES);

    float dq[M][CHUNKS][4] = {};
    float factor = scale * LOG2_E;
    unsigned int reading = tiles, writing = tiles + 2 * TILE_BYTES;
    for (int left = T; left > 0; left -= TILE) {
        wait_copies<0>();
        __syncthreads();
        if (left > TILE) {
            key += (long long)TILE * queries.stride;
            share.copy<TILE>(
                {Copy{key, queries.stride, writing}, Copy{key + C, queries.stride, writing + TILE_BYTES}}, left - TILE
            );
            commit_copies();
        }
        unsigned int tile_k = reading + lane_offset(), tile_v = tile_k + TILE_BYTES;
        unroll<TILE / QUERIES_PART>([&](auto part) {
            constexpr int FIRST = decltype(part)::value * QUERIES_PART;
            float p[M][N][4] = {}, ds[M][N][4];
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int n = 0; n < N; ++n)
#pragma unroll
                    for (int r = 0; r < 4; ++r) ds[m][n][r] = -row_d[m][r / 2];
            rows_times_rows<FIRST>(p, q, tile_k);
            rows_times_rows<FIRST>(ds, g, tile_v);
            if (left < FIRST + QUERIES_PART) mask<FIRST>(p, left);
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int n = 0; n < N; ++n)
#pragma unroll
                    for (int r = 0; r < 4; ++r) ds[m][n][r] *= power_of_2(fmaf(p[m][n][r], factor, row_lse[m][r / 2]));
            weighted_rows<FIRST>(dq, ds, tile_k);
        });
        unsigned int other = reading;
        reading = writing;
        writing = other;
    }
    float scales[M][2];
#pragma unroll
    for (int m = 0; m < M; ++m) scales[m][0] = scales[m][1] = scale;
    __syncthreads();
    stage_rows(shared, dq, scales);
    __syncthreads();
    share.store<OWN>(dqkv, queries, first, T, shared);
}

// Grid: (ceil(T / (16 WARPS)) blocks that own keys, as many again when SPLIT, and ceil(T / (16 WARPS ROW_TILES)) that own
// queries, NH, B).
// Shared memory: 5 tiles and two floats for each of a tile's rows.
extern "C" __global__ void __launch_bounds__(THREADS, 8 / WARPS) attention_bwd(
    elem* __restrict__ dqkv,        // [B, T, 3 C]
    const elem* __restrict__ dout,  // [B, T, C]
    const elem* __restrict__ qkv,   // [B, T, 3 C]
    const elem* __restrict__ out,   // [B, T, C]
    const float* __restrict__ lse,  // [B, NH, T]
    float scale,                    // 1 / sqrt(HS)
    int B,
    int T,
    int C
) {
    extern __shared__ __align__(128) unsigned char shared[];
    int head = blockIdx.y, b = blockIdx.z, index = blockIdx.x, owners = (T + WARPS * 16 - 1) / (WARPS * 16);
    lse += ((long long)b * gridDim.y + head) * T;
    int first = index % owners * WARPS * 16;
    if (index < owners) {
        gradients_of_keys<true, !SPLIT>(dqkv, dout, qkv, out, lse, scale, b, head, T, C, first, shared);
    } else if (SPLIT && index < 2 * owners) {
        gradients_of_keys<false, SPLIT>(dqkv, dout, qkv, out, lse, scale, b, head, T, C, first, shared);
    } else {
        first = (index - (SPLIT ? 2 : 1) * owners) * WARPS * 16 * ROW_TILES;
        gradients_of_queries(dqkv, dout, qkv, out, lse, scale, b, head, T, C, first, shared);
    }
}

#endif

#else

constexpr int THREADS = 128;
constexpr int ROWS = 32;                        // tokens of a block, and of a tile
constexpr int STRIDE = HS + 1;                  // no bank conflicts along a column
constexpr int LANES = THREADS / ROWS;           // threads that share a row: each has every fourth column,
constexpr int COLUMNS = ROWS / LANES;           // so many of another tile's rows,
constexpr int OWN = (HS + LANES - 1) / LANES;   // and so many elements
constexpr int TILE_FLOATS = ROWS * STRIDE;

// ROWS rows of a head; zeros beyond T.
__device__ __forceinline__ void copy_tile(float* to, const elem* data, Head rows, int first, int T) {
    for (int index = threadIdx.x; index < ROWS * HS; index += THREADS) {
        int row = index / HS, i = index % HS;
        to[row * STRIDE + i] = first + row < T ? data[rows.first + (long long)(first + row) * rows.stride + i] : 0.0f;
    }
}

// Products of a row with this lane's rows of a tile: the row is read once for all of them.
__device__ __forceinline__ void dots(float (&sums)[COLUMNS], const float* row, const float* tile) {
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) sums[j] = 0.0f;
#pragma unroll 4
    for (int i = 0; i < HS; ++i) {
        float x = row[i];
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) sums[j] = fmaf(x, tile[j * LANES * STRIDE + i], sums[j]);
    }
}

// sums += weights of a row times a tile, for this lane's elements.
__device__ __forceinline__ void weighted_rows(float (&sums)[OWN], const float* weights, const float* tile, int rows) {
    for (int s = 0; s < rows; ++s)
#pragma unroll
        for (int i = 0; i < OWN; ++i)
            if ((i + 1) * LANES <= HS || threadIdx.x % LANES + i * LANES < HS)
                sums[i] = fmaf(weights[s], tile[s * STRIDE + i * LANES], sums[i]);
}

// Sum over the threads that share a row.
__device__ __forceinline__ float row_sum(float x) {
#pragma unroll
    for (int other = 1; other < LANES; other *= 2) x += __shfl_xor_sync(0xffffffffu, x, other);
    return x;
}

// D of this thread's row.
__device__ __forceinline__ float row_product(const float* dout, const float* out) {
    float sum = 0.0f;
    for (int i = threadIdx.x % LANES; i < HS; i += LANES) sum = fmaf(dout[i], out[i], sum);
    return row_sum(sum);
}

__device__ __forceinline__ void store_row(elem* data, Head to, int t, int T, const float (&sums)[OWN], float factor) {
    int lane = threadIdx.x % LANES;
    if (t >= T) return;
#pragma unroll
    for (int i = 0; i < OWN; ++i)
        if (lane + i * LANES < HS) data[to.first + (long long)t * to.stride + lane + i * LANES] = sums[i] * factor;
}

// Grid: (ceil(T / 32), NH, B). Shared memory: 3 tiles and [ROWS][ROWS + 1] floats.
extern "C" __global__ void __launch_bounds__(THREADS) attention_fwd(
    elem* __restrict__ out,        // [B, T, C]
    float* __restrict__ lse,       // [B, NH, T]
    const elem* __restrict__ qkv,  // [B, T, 3 C]
    float scale,                   // 1 / sqrt(HS)
    int B,
    int T,
    int C
) {
    extern __shared__ __align__(128) unsigned char shared[];
    float* tile_q = (float*)shared;
    float* tile_k = tile_q + TILE_FLOATS;
    float* tile_v = tile_k + TILE_FLOATS;
    int first = blockIdx.x * ROWS, head = blockIdx.y, b = blockIdx.z;
    int row = threadIdx.x / LANES, lane = threadIdx.x % LANES, t = first + row;
    float* weights = tile_v + TILE_FLOATS + row * (ROWS + 1);
    copy_tile(tile_q, qkv, part_of_qkv(0, b, head, T, C), first, T);
    float sums[OWN] = {}, highest = -INFINITY, total = 0.0f;
    for (int start = 0; start < T; start += ROWS) {
        __syncthreads();
        copy_tile(tile_k, qkv, part_of_qkv(1, b, head, T, C), start, T);
        copy_tile(tile_v, qkv, part_of_qkv(2, b, head, T, C), start, T);
        __syncthreads();
        int keys = min(ROWS, T - start);
        float scores[COLUMNS], previous = highest;
        dots(scores, tile_q + row * STRIDE, tile_k + lane * STRIDE);
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) {
            scores[j] = lane + j * LANES < keys ? scores[j] * scale : -INFINITY;
            highest = fmaxf(highest, scores[j]);
        }
#pragma unroll
        for (int other = 1; other < LANES; other *= 2) highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, other));
        float shrink = expf(previous - highest);
        total *= shrink;
#pragma unroll
        for (int i = 0; i < OWN; ++i) sums[i] *= shrink;
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) {
            float weight = expf(scores[j] - highest);
            weights[lane + j * LANES] = weight;
            total += weight;
        }
        __syncwarp();
        weighted_rows(sums, weights, tile_v + lane, keys);
    }
    total = row_sum(total);
    if (lane == 0 && t < T) lse[((long long)b * gridDim.y + head) * T + t] = highest + logf(total);
    store_row(out, of_activation(b, head, T, C), t, T, sums, 1.0f / total);
}

// Grid: (ceil(T / 32) blocks that own keys and as many that own queries, NH, B).
// Shared memory: 4 tiles, 2 times [ROWS][ROWS + 1] floats, and D of a tile.
extern "C" __global__ void __launch_bounds__(THREADS) attention_bwd(
    elem* __restrict__ dqkv,        // [B, T, 3 C]
    const elem* __restrict__ dout,  // [B, T, C]
    const elem* __restrict__ qkv,   // [B, T, 3 C]
    const elem* __restrict__ out,   // [B, T, C]
    const float* __restrict__ lse,  // [B, NH, T]
    float scale,                    // 1 / sqrt(HS)
    int B,
    int T,
    int C
) {
    extern __shared__ __align__(128) unsigned char shared[];
    float* tile_q = (float*)shared;
    float* tile_k = tile_q + TILE_FLOATS;
    float* tile_v = tile_k + TILE_FLOATS;
    float* tile_dout = tile_v + TILE_FLOATS;
    int owners = gridDim.x / 2, first = blockIdx.x % owners * ROWS, head = blockIdx.y, b = blockIdx.z;
    int row = threadIdx.x / LANES, lane = threadIdx.x % LANES, t = first + row;
    float* p = tile_dout + TILE_FLOATS + row * (ROWS + 1);
    float* ds = p + ROWS * (ROWS + 1);
    float* tile_d = tile_dout + TILE_FLOATS + 2 * ROWS * (ROWS + 1);
    Head queries = part_of_qkv(0, b, head, T, C), keys = part_of_qkv(1, b, head, T, C), values = part_of_qkv(2, b, head, T, C);
    Head upstream = of_activation(b, head, T, C);
    lse += ((long long)b * gridDim.y + head) * T;
    float dp[COLUMNS], scores[COLUMNS];
    if (blockIdx.x < owners) {
        copy_tile(tile_k, qkv, keys, first, T);
        copy_tile(tile_v, qkv, values, first, T);
        float dk[OWN] = {}, dv[OWN] = {};
        for (int start = 0; start < T; start += ROWS) {
            __syncthreads();
            copy_tile(tile_dout, dout, upstream, start, T);
            // Where the queries come next.
            copy_tile(tile_q, out, upstream, start, T);
            __syncthreads();
            float row_d = row_product(tile_dout + row * STRIDE, tile_q + row * STRIDE);
            if (lane == 0) tile_d[row] = row_d;
            __syncthreads();
            copy_tile(tile_q, qkv, queries, start, T);
            __syncthreads();
            int there = min(ROWS, T - start);
            dots(scores, tile_k + row * STRIDE, tile_q + lane * STRIDE);
            dots(dp, tile_v + row * STRIDE, tile_dout + lane * STRIDE);
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j) {
                int s = lane + j * LANES;
                float weight = s < there ? expf(scores[j] * scale - lse[start + s]) : 0.0f;
                p[s] = weight;
                ds[s] = weight * (dp[j] - tile_d[s]);
            }
            __syncwarp();
            weighted_rows(dv, p, tile_dout + lane, there);
            weighted_rows(dk, ds, tile_q + lane, there);
        }
        store_row(dqkv, keys, t, T, dk, scale);
        store_row(dqkv, values, t, T, dv, 1.0f);
    } else {
        copy_tile(tile_q, qkv, queries, first, T);
        copy_tile(tile_dout, dout, upstream, first, T);
        copy_tile(tile_k, out, upstream, first, T);
        __syncthreads();
        float own_d = row_product(tile_dout + row * STRIDE, tile_k + row * STRIDE), own_lse = lse[min(t, T - 1)];
        float dq[OWN] = {};
        for (int start = 0; start < T; start += ROWS) {
            __syncthreads();
            copy_tile(tile_k, qkv, keys, start, T);
            copy_tile(tile_v, qkv, values, start, T);
            __syncthreads();
            int there = min(ROWS, T - start);
            dots(scores, tile_q + row * STRIDE, tile_k + lane * STRIDE);
            dots(dp, tile_dout + row * STRIDE, tile_v + lane * STRIDE);
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j)
                ds[lane + j * LANES] = expf(scores[j] * scale - own_lse) * (dp[j] - own_d);
            __syncwarp();
            weighted_rows(dq, ds, tile_k + lane, there);
        }
        store_row(dqkv, queries, t, T, dq, scale);
    }
}

#endif
