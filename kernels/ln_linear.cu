// Mask, LayerNorm, modulate and linear layer, skipping the inactive channels (formulas: src/ops/ln_linear/mod.rs).
//
//   x [B, T, C] -> read window -> LN -> h = z (1 + scale) + shift -> y = h W^T + b -> (GELU) -> [B, T, N]
//
// Forward:  normalise (h, statistics, what inactive channels hold), inactive (u, v), the product.
// Backward: columns (P, Q, dr; for windows), the product with W (dh; P W and Q W), normalise_bwd (dx, dshift, dscale), the
//           product of weights (dW, db).
//
// h is 0 outside of its sample's window, so a chunk or tile that sticks out of a window adds nothing. dh is written where
// some sample of the tile is active. What is saved for backward: x, h, mean, rstd, inactive, uv, and y before GELU.
#include "gemm.cuh"
#include "ln_linear_rows.cuh"

// A thread a vector.  Grid: (ceil(T / ROW_TOKENS), B) blocks of a thread for every 16 bytes of a row, at most ROW_THREADS.
extern "C" __global__ void __launch_bounds__(ROW_THREADS, ROW_BLOCKS) ln_linear_fwd_normalise(
    elem* __restrict__ h,             // [B, T, C]  0 outside of the window
    float* __restrict__ mean,         // [B, T]
    float* __restrict__ rstd,         // [B, T]
    elem* __restrict__ inactive,      // [B, 2, C]  1 + scale and shift outside of the window, 0 inside
    const elem* __restrict__ x,       // [B, T, C]  any numbers outside of the window
    const int* __restrict__ windows,  // [B, 2]
    const float* __restrict__ shift,  // [B, C]
    const float* __restrict__ scale,  // [B, C]
    int modulation_stride,            // from one sample's shift to the next's
    int T,
    int C
) {
    by_row<FWD_ROWS>(C, [&](auto vector, auto rows) {
        normalise<decltype(vector)::COUNT, decltype(rows)::COUNT>(
            h, mean, rstd, inactive, x, windows, shift, scale, modulation_stride, T, C
        );
    });
}

// u = W[:, I] (1 + scale_I),  v = W[:, I] shift_I.  Grid: tiles of [2 B, N].
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) ln_linear_fwd_inactive(
    float* __restrict__ uv,              // [B, 2, N]
    const elem* __restrict__ inactive,   // [B, 2, C]
    const elem* __restrict__ weight,     // [N, C]
    const __grid_constant__ TensorMap inactive_map,
    const __grid_constant__ TensorMap weight_map,
    int B,
    int C,
    int N
) {
    const TensorMap *of_inactive = &inactive_map, *of_weight = &weight_map;
    int row = blockIdx.y * TILE_M, column = blockIdx.x * TILE_N;
    product<K_INNER, K_INNER>(
        row, 2 * B, column, N, 2 * B, all_of(0, C),
        [=](int) { return Operands{{inactive, C, 2 * B, of_inactive}, {weight, C, N, of_weight}, C}; },
        tiles, store_gradient(uv, N, 0)
    );
}

// y = h W^T over the window + r u + v + b, and GELU.  Grid: tiles of [B T, N]; by wgmma, blocks that go over them.
extern "C" __global__ void __launch_bounds__(TILES_THREADS, BLOCKS) ln_linear_fwd(
    elem* __restrict__ y,             // [B, T, N]
    elem* __restrict__ pre,           // [B, T, N] before GELU, or null: without GELU y, or not kept
    const elem* __restrict__ h,       // [B, T, C]
    const int* __restrict__ windows,  // [B, 2]
    const elem* __restrict__ weight,  // [N, C]
    const float* __restrict__ bias,   // [N]
    const float* __restrict__ uv,     // [B, 2, N], or null: every window is full
    const float* __restrict__ mean,   // [B, T]
    const float* __restrict__ rstd,   // [B, T]
    const __grid_constant__ TensorMap h_map,
    const __grid_constant__ TensorMap weight_map,
    int gelu_follows,
    int B,
    int T,
    int C,
    int N
) {
    int rows = B * T;
    const TensorMap *of_h = &h_map, *of_weight = &weight_map;
    // Two products in one kernel: a branch in each row would keep the rows apart.
    auto all = [=](auto is_gelu) {
        each_tile<K_INNER, K_INNER>(rows, N, [=](int row, int column, auto& product) {
            product(
                row, rows, column, N, T, window_steps(window_of_rows(windows, row, rows, T)),
                [=](int) { return Operands{{h, C, rows, of_h}, {weight, C, N, of_weight}, C}; },
                [=](int n, int sample) {
                    Wide constant, u = {};  // b + v
                    load_floats(constant.x, bias + n, true);
                    if (uv) {
                        Wide v;
                        load_floats(u.x, uv + (long long)sample * 2 * N + n, true);
                        load_floats(v.x, uv + ((long long)sample * 2 + 1) * N + n, true);
#pragma unroll
                        for (int e = 0; e < OUT_WIDTH; ++e) constant.x[e] += v.x[e];
                    }
                    return epilogue_of(
                        [=](int i) { return uv ? -mean[i] * rstd[i] : 0.0f; },
                        [=](int i, float (&value)[OUT_WIDTH], float r) {
                            long long at = (long long)i * N + n;
#pragma unroll
                            for (int e = 0; e < OUT_WIDTH; ++e) value[e] = fmaf(r, u.x[e], value[e] + constant.x[e]);
                            if constexpr (decltype(is_gelu)::value) {
                                store_wide(pre + at, value, pre);
#pragma unroll
                                for (int e = 0; e < OUT_WIDTH; ++e) value[e] = gelu(value[e]);
                            }
                            store_wide(y + at, value);
                        }
                    );
                }
            );
        });
    };
    if (gelu_follows) all(Constant<1>());
    else all(Constant<0>());
}

// g = dy gelu'(pre), in place, where nobody did it on the way.  Grid: ceil(n / (256 WIDTH)) blocks of 256 threads.
extern "C" __global__ void __launch_bounds__(256) ln_linear_bwd_gelu(
    elem* __restrict__ dy,         // [B, T, N]  in and out
    const elem* __restrict__ pre,  // [B, T, N]
    unsigned long long n
) {
    unsigned long long first = ((unsigned long long)blockIdx.x * 256 + threadIdx.x) * WIDTH;
    if (first + WIDTH <= n) {
        Vector<WIDTH> vector;
        float g[WIDTH], before[WIDTH];
        vector.load(pre + first);
        vector.unpack(before);
        vector.load(dy + first);
        vector.unpack(g);
#pragma unroll
        for (int e = 0; e < WIDTH; ++e) g[e] *= gelu_derivative(before[e]);
        vector.pack(g);
        vector.store(dy + first);
    } else {
        for (unsigned long long i = first; i < n; ++i) from_f32(dy[i], to_f32(dy[i]) * gelu_derivative(to_f32(pre[i])));
    }
}

// P = sum_t r_t g_t, Q = sum_t g_t, and of these columns' part of dr_t = g_t . u: only for windows.
// Grid: (ceil(N / COLUMNS), B) blocks of COLUMN_THREADS; each of their lines of threads takes every LINES-th token.
extern "C" __global__ void __launch_bounds__(COLUMN_THREADS, COLUMN_BLOCKS) ln_linear_bwd_columns(
    elem* __restrict__ pq,                // [SPLIT, B, 2, N]  P and Q for products
    float* __restrict__ q,                // [B, N]
    float* __restrict__ dr,               // [ceil(N / COLUMNS), B, T]
    const elem* __restrict__ g,           // [B, T, N]
    const float* __restrict__ mean,       // [B, T]
    const float* __restrict__ rstd,       // [B, T]
    const float* __restrict__ uv,         // [B, 2, N]
    int B,
    int T,
    int N
) {
    by_width(are_vectors(N), [&](auto vector) {
        sum_columns<decltype(vector)::COUNT>(pq, q, dr, g, mean, rstd, uv, B, T, N);
    });
}

// dh = g W into the windows, and P W and Q W: dscale and dshift of the inactive channels.
// Grid: tiles of [B T, C], then with windows those of [SPLIT 2 B, C]. Tiles that no window meets end at once.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) ln_linear_bwd_input(
    elem* __restrict__ dh,               // [B, T, C]
    float* __restrict__ inactive_grads,  // [SPLIT, B, 2, C]: dscale, dshift, to be summed over SPLIT; or null, as pq
    unsigned int* __restrict__ counters, // [count] = 0, for the kernels after this one
    const elem* __restrict__ g,          // [B, T, N]
    const elem* __restrict__ pq,         // [SPLIT, B, 2, N], or null: every window is full
    const elem* __restrict__ weight,     // [N, C]
    const int* __restrict__ windows,     // [B, 2]
    const __grid_constant__ TensorMap g_map,
    const __grid_constant__ TensorMap pq_map,
    const __grid_constant__ TensorMap weight_map,
    int count,
    int B,
    int T,
    int C,
    int N
) {
    const TensorMap *of_g = &g_map, *of_pq = &pq_map, *of_weight = &weight_map;
    int row = blockIdx.y * TILE_M, column = blockIdx.x * TILE_N, rows = B * T;
    if (blockIdx.x == 0 && blockIdx.y == 0)
        for (int i = threadIdx.x; i < count; i += THREADS) counters[i] = 0;
    int first_of_pq = (rows + TILE_M - 1) / TILE_M * TILE_M;
    bool is_pq = row >= first_of_pq;
    Range window{0, C};
    if (is_pq) {
        row -= first_of_pq;
        rows = SPLIT * 2 * B;
    } else {
        window = window_of_rows(windows, row, rows, T);
        if (column >= window.end || column + TILE_N <= window.start) return;
    }
    product<K_INNER, K_OUTER>(
        row, rows, column, C, T, windowed_columns(N, window, column),
        [=](int) { return Operands{{is_pq ? pq : g, N, rows, is_pq ? of_pq : of_g}, {weight, C, C, of_weight}, N}; },
        tiles,
        [=](int c, int) {
            return epilogue_of([=](int i, float (&value)[OUT_WIDTH]) {
                if (is_pq) store_floats(inactive_grads + (long long)i * C + c, value, true);
                else store_wide(dh + (long long)i * C + c, value);
            });
        }
    );
}

// LayerNorm backward: dx inside the window, dshift and dscale.  A thread a vector, which sums dshift and dscale over the block's
// tokens; the last block of a sample sums over its blocks.  Grid and blocks as of ln_linear_fwd_normalise.
extern "C" __global__ void __launch_bounds__(ROW_THREADS, ROW_BLOCKS) ln_linear_bwd_normalise(
    elem* __restrict__ dx,                     // [B, T, C]  += inside the window; with `fresh` = there and 0 outside
    float* __restrict__ dshift,                // [B, C] += (each column belongs to one operation)
    float* __restrict__ dscale,                // [B, C] +=
    float* parts,                              // [B, blocks, 2, C] in pieces
    unsigned int* finished,                    // [B] blocks of the sample that have written their parts; 0 before
    const elem* __restrict__ dh,               // [B, T, C]  any numbers outside, in the vectors that meet the window
    const elem* __restrict__ x,                // [B, T, C]  likewise
    const int* __restrict__ windows,           // [B, 2]
    const float* __restrict__ scale,           // [B, C]
    const float* __restrict__ mean,            // [B, T]
    const float* __restrict__ rstd,            // [B, T]
    const float* __restrict__ dr,              // [dr_parts, B, T], or null: every window is full
    const float* __restrict__ inactive_grads,  // [SPLIT, B, 2, C], or null: every window is full
    int dr_parts,
    int modulation_stride,
    int fresh,
    int B,
    int T,
    int C
) {
    by_row<BWD_ROWS>(C, [&](auto vector, auto rows) {
        normalise_backward<decltype(vector)::COUNT, decltype(rows)::COUNT>(
            dx, dshift, dscale, parts, finished, dh, x, windows, scale, mean, rstd, dr, dr_parts, inactive_grads,
            modulation_stride, fresh, B, T, C
        );
    });
}

constexpr int BIAS_COLUMNS = 64;  // outputs of a piece that sums g for db, as in src/ops/cuda/shares.rs

// db of BIAS_COLUMNS outputs, from g itself: no window asked for sums over tokens.
__device__ __forceinline__ void sum_rows(float* dbias, const elem* g, int first, int add, int rows, int N, unsigned char* memory) {
    constexpr int LANES = BIAS_COLUMNS / OUT_WIDTH, LINES = THREADS / LANES;  // a line of threads takes every LINES-th row
    float(*shared)[BIAS_COLUMNS] = (float(*)[BIAS_COLUMNS])memory;
    int n = first + threadIdx.x % LANES * OUT_WIDTH, line = threadIdx.x / LANES;
    float sums[OUT_WIDTH] = {};
    if (n < N)
#pragma unroll 16
        for (int row = line; row < rows; row += LINES) {
            float value[OUT_WIDTH];
            load_wide(value, g + (long long)row * N + n);
#pragma unroll
            for (int e = 0; e < OUT_WIDTH; ++e) sums[e] += value[e];
        }
#pragma unroll
    for (int e = 0; e < OUT_WIDTH; ++e) shared[line][threadIdx.x % LANES * OUT_WIDTH + e] = sums[e];
    __syncthreads();
    n = first + threadIdx.x;
    if (threadIdx.x >= BIAS_COLUMNS || n >= N) return;
    float sum = 0.0f;
    for (int l = 0; l < LINES; ++l) sum += shared[l][threadIdx.x];
    dbias[n] = add ? dbias[n] + sum : sum;
}

// dW = g^T h over the samples whose windows meet the tile, plus P (x) (1 + scale_I) + Q (x) shift_I; db = sum_b Q.
// Grid: as planned in even shares (gemm_shares.cuh); without windows, a piece without a tile sums the rows of g for db.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) ln_linear_bwd_weight(
    float* __restrict__ dweight,        // [N, C]  = or +=
    float* __restrict__ dbias,          // [N]     = or +=
    float* parts,                       // [parts, TILE_M TILE_N] in pieces
    unsigned int* counters,             // [1 + parts] lists that were taken, then the parts that are there; 0 before
    const int* __restrict__ plan,       // [gridDim.x + 1], and the pieces
    const elem* __restrict__ g,         // [B, T, N]
    const elem* __restrict__ h,         // [B, T, C]
    const int* __restrict__ windows,    // [B, 2]
    const elem* __restrict__ pq,        // [SPLIT, B, 2, N], or null: every window is full
    const elem* __restrict__ inactive,  // [B, 2, C]
    const float* __restrict__ q,        // [B, N], or null, as pq
    const __grid_constant__ TensorMap g_map,
    const __grid_constant__ TensorMap h_map,
    const __grid_constant__ TensorMap pq_map,
    const __grid_constant__ TensorMap inactive_map,
    int add,
    int B,
    int T,
    int C,
    int N
) {
    const TensorMap *of_g = &g_map, *of_h = &h_map, *of_pq = &pq_map, *of_inactive = &inactive_map;
    for_pieces(plan, counters, [=](const Piece& piece) {
        int row = piece.row, column = piece.column;
        if (column < 0) return sum_rows(dbias, g, row, add, B * T, N, tiles);
        product<K_OUTER, K_OUTER>(
            row, N, column, C, N,
            MeetingRows<COLUMNS_OF_C>{
                windows, T, B * T, piece.start, piece.end, {column, min(column + TILE_N, C)}, piece.more && pq ? SPLIT : 0, 2 * B
            },
            [=](int source) {
                if (source == 0) return Operands{{g, N, N, of_g}, {h, C, C, of_h}, B * T};
                // Rows of the next pair may be read too; those of `inactive` end with its map, so they meet zeros.
                return Operands{
                    {pq + (long long)(source - 1) * B * 2 * N, N, N, of_pq, (source - 1) * B * 2}, {inactive, C, C, of_inactive}, 2 * B
                };
            },
            tiles, store_gradient(dweight, C, add), SharedParts{parts, counters + 1, piece}
        );
        int n = row + threadIdx.x;
        if (pq && piece.part < 0 && column == 0 && threadIdx.x < TILE_M && n < N) {
            float sum = 0.0f;
            for (int b = 0; b < B; ++b) sum += q[(long long)b * N + n];
            dbias[n] = add ? dbias[n] + sum : sum;
        }
    });
}
