// Mask, LayerNorm, modulate and linear layer, skipping the inactive channels (formulas: src/ops/ln_linear/mod.rs).
//
//   x [B, T, C] -> read window -> LN -> h = z (1 + scale) + shift -> y = h W^T + b -> (GELU) -> [B, T, N]
//
// Forward:  normalise (h, statistics, what inactive channels hold), inactive (u, v), the product.
// Backward: columns (P, Q, dr), inactive_bwd (P W, Q W), the product with W (dh), normalise_bwd (dx), modulation_bwd
//           (dshift, dscale), the product of weights (dW, db).
//
// h is 0 outside of its sample's window, so a chunk or tile that sticks out of a window adds nothing. dh is written where
// some sample of the tile is active. What is saved for backward: x, h, mean, rstd, inactive, uv, and y before GELU.
#include "gemm.cuh"

constexpr float EPS = 1e-6f;
constexpr int ROW_WARPS = 8;     // rows of a block in kernels with a warp a row
constexpr int COLUMN_WARPS = 8;  // rows at a time in kernels that sum over tokens
constexpr int COLUMNS = 64;      // columns of a block in them, two a lane

#ifdef ELEM_BF16
constexpr int SPLIT = 2;  // P and Q are sums of many numbers: as products' operands they are split into high and low halves
#else
constexpr int SPLIT = 1;
#endif

// One warp a row. Grid: ceil(B T / ROW_WARPS) blocks of 32 ROW_WARPS threads.
extern "C" __global__ void __launch_bounds__(256) ln_linear_fwd_normalise(
    elem* __restrict__ h,             // [B, T, C]  0 outside of the window
    float* __restrict__ mean,         // [B, T]
    float* __restrict__ rstd,         // [B, T]
    elem* __restrict__ inactive,      // [B, 2, C]  1 + scale and shift outside of the window, 0 inside
    const elem* __restrict__ x,       // [B, T, C]  not read outside of the window
    const int* __restrict__ windows,  // [B, 2]
    const float* __restrict__ shift,  // [B, C]
    const float* __restrict__ scale,  // [B, C]
    int modulation_stride,            // from one sample's shift to the next's
    int B,
    int T,
    int C
) {
    int row = blockIdx.x * ROW_WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= B * T) return;
    int b = row / T;
    int start = windows[2 * b], end = start + windows[2 * b + 1];
    const elem* from = x + (long long)row * C;
    float sum = 0.0f;
    for (int c = start + lane; c < end; c += 32) sum += to_f32(from[c]);
    float mu = warp_sum(sum) / C;
    // The inactive channels are zeros, and C - width of them differ from the mean by the mean.
    float squares = 0.0f;
    for (int c = start + lane; c < end; c += 32) {
        float centred = to_f32(from[c]) - mu;
        squares = fmaf(centred, centred, squares);
    }
    float variance = (warp_sum(squares) + (C - (end - start)) * mu * mu) / C;
    float r = 1.0f / sqrtf(variance + EPS);
    if (lane == 0) {
        mean[row] = mu;
        rstd[row] = r;
    }
    const float* own_shift = shift + (long long)b * modulation_stride;
    const float* own_scale = scale + (long long)b * modulation_stride;
    elem* to = h + (long long)row * C;
    for (int c = lane; c < C; c += 32) {
        bool active = c >= start && c < end;
        float z = active ? (to_f32(from[c]) - mu) * r : 0.0f;
        from_f32(to[c], active ? fmaf(z, 1.0f + own_scale[c], own_shift[c]) : 0.0f);
    }
    if (row % T == 0) {
        elem* both = inactive + (long long)b * 2 * C;
        for (int c = lane; c < C; c += 32) {
            bool active = c >= start && c < end;
            from_f32(both[c], active ? 0.0f : 1.0f + own_scale[c]);
            from_f32(both[C + c], active ? 0.0f : own_shift[c]);
        }
    }
}

// u = W[:, I] (1 + scale_I),  v = W[:, I] shift_I.  Grid: tiles of [2 B, N].
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) ln_linear_fwd_inactive(
    float* __restrict__ uv,              // [B, 2, N]
    const elem* __restrict__ inactive,   // [B, 2, C]
    const elem* __restrict__ weight,     // [N, C]
    int B,
    int C,
    int N
) {
    __shared__ __align__(128) unsigned char tiles[SHARED_BYTES];
    int row = blockIdx.y * TILE_M, column = blockIdx.x * TILE_N;
    Accumulators sums;
    clear(sums);
    accumulate<K_INNER, K_INNER>(
        sums, row, column, all_of(0, C),
        [=](int) { return Operands{{inactive, C, 2 * B}, {weight, C, N}, C}; }, tiles
    );
    finish(sums, row, 2 * B, column, N, tiles, store_gradient(uv, N, 0));
}

// y = h W^T over the window + r u + v + b, and GELU.  Grid: tiles of [B T, N].
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) ln_linear_fwd(
    elem* __restrict__ y,             // [B, T, N]
    elem* __restrict__ pre,           // [B, T, N] before GELU, or null: without GELU y, or not kept
    const elem* __restrict__ h,       // [B, T, C]
    const int* __restrict__ windows,  // [B, 2]
    const elem* __restrict__ weight,  // [N, C]
    const float* __restrict__ bias,   // [N]
    const float* __restrict__ uv,     // [B, 2, N], or null: every window is full
    const float* __restrict__ mean,   // [B, T]
    const float* __restrict__ rstd,   // [B, T]
    int gelu_follows,
    int B,
    int T,
    int C,
    int N
) {
    __shared__ __align__(128) unsigned char tiles[SHARED_BYTES];
    int row = blockIdx.y * TILE_M, column = blockIdx.x * TILE_N, rows = B * T;
    Accumulators sums;
    clear(sums);
    accumulate<K_INNER, K_INNER>(
        sums, row, column, window_steps(window_of_rows(windows, row, rows, T)),
        [=](int) { return Operands{{h, C, rows}, {weight, C, N}, C}; }, tiles
    );
    finish(sums, row, rows, column, N, tiles, [=](int n) {
        Wide own_bias, u, v;
        load_wide(own_bias.x, bias + n);
        int sample = -1;
        return [=](int i, float (&value)[WIDTH]) mutable {
            float r = 0.0f;
            if (uv) {
                if (i / T != sample) {
                    sample = i / T;
                    load_wide(u.x, uv + (long long)sample * 2 * N + n);
                    load_wide(v.x, uv + ((long long)sample * 2 + 1) * N + n);
                }
                r = -mean[i] * rstd[i];
            }
#pragma unroll
            for (int e = 0; e < WIDTH; ++e) value[e] += own_bias.x[e] + (uv ? fmaf(r, u.x[e], v.x[e]) : 0.0f);
            long long at = (long long)i * N + n;
            if (gelu_follows) {
                if (pre) store_wide(pre + at, value);
#pragma unroll
                for (int e = 0; e < WIDTH; ++e) value[e] = gelu(value[e]);
            }
            store_wide(y + at, value);
        };
    });
}

// g = dy gelu'(pre), in place, where nobody did it on the way.  Grid: ceil(n / 256) blocks of 256 threads.
extern "C" __global__ void __launch_bounds__(256) ln_linear_bwd_gelu(
    elem* __restrict__ dy,         // [B, T, N]  in and out
    const elem* __restrict__ pre,  // [B, T, N]
    unsigned long long n
) {
    unsigned long long i = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) from_f32(dy[i], to_f32(dy[i]) * gelu_derivative(to_f32(pre[i])));
}

// P = sum_t r_t g_t, Q = sum_t g_t, and of these columns' part of dr_t = g_t . u: only for windows.
// Grid: (ceil(N / COLUMNS), B) blocks of 32 COLUMN_WARPS threads; warp w takes tokens w, w + COLUMN_WARPS, ..
extern "C" __global__ void __launch_bounds__(256) ln_linear_bwd_columns(
    elem* __restrict__ pq,          // [SPLIT, B, 2, N]  P and Q for products, or null: every window is full
    float* __restrict__ q,          // [B, N]
    float* __restrict__ dr,         // [ceil(N / COLUMNS), B, T], or null
    const elem* __restrict__ g,     // [B, T, N]
    const float* __restrict__ mean, // [B, T]
    const float* __restrict__ rstd, // [B, T]
    const float* __restrict__ uv,   // [B, 2, N], or null
    int B,
    int T,
    int N
) {
    __shared__ float parts[COLUMN_WARPS][2][COLUMNS];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, b = blockIdx.y;
    float p_sum[2] = {0.0f, 0.0f}, q_sum[2] = {0.0f, 0.0f}, u[2] = {0.0f, 0.0f};
    int n[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        n[i] = blockIdx.x * COLUMNS + i * 32 + lane;
        if (uv && n[i] < N) u[i] = uv[(long long)b * 2 * N + n[i]];
    }
    for (int t = warp; t < T; t += COLUMN_WARPS) {
        int row = b * T + t;
        float r = -mean[row] * rstd[row], dot = 0.0f;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float value = n[i] < N ? to_f32(g[(long long)row * N + n[i]]) : 0.0f;
            p_sum[i] = fmaf(r, value, p_sum[i]);
            q_sum[i] += value;
            dot = fmaf(value, u[i], dot);
        }
        if (dr) {
            dot = warp_sum(dot);
            if (lane == 0) dr[(long long)blockIdx.x * B * T + row] = dot;
        }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        parts[warp][0][i * 32 + lane] = p_sum[i];
        parts[warp][1][i * 32 + lane] = q_sum[i];
    }
    __syncthreads();
    int which = threadIdx.x / COLUMNS, column = blockIdx.x * COLUMNS + threadIdx.x % COLUMNS;
    if (which >= 2 || column >= N) return;
    float sum = 0.0f;
    for (int w = 0; w < COLUMN_WARPS; ++w) sum += parts[w][which][threadIdx.x % COLUMNS];
    if (which == 1) q[(long long)b * N + column] = sum;
    if (pq) {
        long long at = ((long long)b * 2 + which) * N + column;
#pragma unroll
        for (int s = 0; s < SPLIT; ++s) {
            elem part = rounded<elem>(sum);
            pq[(long long)s * B * 2 * N + at] = part;
            sum -= to_f32(part);
        }
    }
}

// dh = g W into the windows, and P W and Q W: dscale and dshift of the inactive channels.
// Grid: tiles of [B T, C], then with windows those of [SPLIT 2 B, C]. Tiles that no window meets end at once.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) ln_linear_bwd_input(
    elem* __restrict__ dh,               // [B, T, C]
    float* __restrict__ inactive_grads,  // [SPLIT, B, 2, C]: dscale, dshift, to be summed over SPLIT; or null, as pq
    const elem* __restrict__ g,          // [B, T, N]
    const elem* __restrict__ pq,         // [SPLIT, B, 2, N], or null: every window is full
    const elem* __restrict__ weight,     // [N, C]
    const int* __restrict__ windows,     // [B, 2]
    int B,
    int T,
    int C,
    int N
) {
    __shared__ __align__(128) unsigned char tiles[SHARED_BYTES];
    int row = blockIdx.y * TILE_M, column = blockIdx.x * TILE_N, rows = B * T;
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
    Accumulators sums;
    clear(sums);
    accumulate<K_INNER, K_OUTER>(
        sums, row, column, windowed_columns(N, window, column),
        [=](int) { return Operands{{is_pq ? pq : g, N, rows}, {weight, C, C}, N}; }, tiles
    );
    finish(sums, row, rows, column, C, tiles, [=](int c) {
        return [=](int i, float (&value)[WIDTH]) {
            if (is_pq) store_wide(inactive_grads + (long long)i * C + c, value);
            else store_wide(dh + (long long)i * C + c, value);
        };
    });
}

// LayerNorm backward: dx inside the window.  One warp a row, grid as the forward pass.
extern "C" __global__ void __launch_bounds__(256) ln_linear_bwd_normalise(
    elem* __restrict__ dx,            // [B, T, C]  += inside the window; with `fresh` = there and 0 outside
    const elem* __restrict__ dh,      // [B, T, C]
    const elem* __restrict__ x,       // [B, T, C]
    const int* __restrict__ windows,  // [B, 2]
    const float* __restrict__ scale,  // [B, C]
    const float* __restrict__ mean,   // [B, T]
    const float* __restrict__ rstd,   // [B, T]
    const float* __restrict__ dr,     // [dr_parts, B, T], or null: every window is full
    int dr_parts,
    int modulation_stride,
    int fresh,
    int B,
    int T,
    int C
) {
    int row = blockIdx.x * ROW_WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= B * T) return;
    int b = row / T;
    int start = windows[2 * b], end = start + windows[2 * b + 1];
    const elem* own_x = x + (long long)row * C;
    const elem* own_dh = dh + (long long)row * C;
    const float* own_scale = scale + (long long)b * modulation_stride;
    float mu = mean[row], r = rstd[row];
    float sum = 0.0f, sum_z = 0.0f;
    for (int c = start + lane; c < end; c += 32) {
        float dz = to_f32(own_dh[c]) * (1.0f + own_scale[c]);
        sum += dz;
        sum_z = fmaf(dz, (to_f32(own_x[c]) - mu) * r, sum_z);
    }
    sum = warp_sum(sum);
    sum_z = warp_sum(sum_z);
    if (dr) {
        float own_dr = 0.0f;
        for (int part = 0; part < dr_parts; ++part) own_dr += dr[(long long)part * B * T + row];
        sum += own_dr;
        sum_z = fmaf(-mu * r, own_dr, sum_z);
    }
    sum /= C;
    sum_z /= C;
    elem* to = dx + (long long)row * C;
    for (int c = (fresh ? 0 : start) + lane; c < (fresh ? C : end); c += 32) {
        float value = 0.0f;
        if (c >= start && c < end) {
            float z = (to_f32(own_x[c]) - mu) * r;
            value = r * (to_f32(own_dh[c]) * (1.0f + own_scale[c]) - sum - z * sum_z);
            if (!fresh) value += to_f32(to[c]);
        }
        from_f32(to[c], value);
    }
}

// dshift and dscale.  Grid: (ceil(C / COLUMNS), B) blocks of 32 COLUMN_WARPS threads.
extern "C" __global__ void __launch_bounds__(256) ln_linear_bwd_modulation(
    float* __restrict__ dshift,                // [B, C] += (each column belongs to one operation)
    float* __restrict__ dscale,                // [B, C] +=
    const elem* __restrict__ dh,               // [B, T, C]
    const elem* __restrict__ x,                // [B, T, C]
    const int* __restrict__ windows,           // [B, 2]
    const float* __restrict__ mean,            // [B, T]
    const float* __restrict__ rstd,            // [B, T]
    const float* __restrict__ inactive_grads,  // [SPLIT, B, 2, C], or null: every window is full
    int modulation_stride,
    int B,
    int T,
    int C
) {
    __shared__ float parts[COLUMN_WARPS][2][COLUMNS];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, b = blockIdx.y;
    int start = windows[2 * b], end = start + windows[2 * b + 1];
    float shift_sum[2] = {0.0f, 0.0f}, scale_sum[2] = {0.0f, 0.0f};
    for (int t = warp; t < T; t += COLUMN_WARPS) {
        int row = b * T + t;
        float mu = mean[row], r = rstd[row];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            int c = blockIdx.x * COLUMNS + i * 32 + lane;
            if (c < start || c >= end) continue;
            float value = to_f32(dh[(long long)row * C + c]);
            shift_sum[i] += value;
            scale_sum[i] = fmaf(value, (to_f32(x[(long long)row * C + c]) - mu) * r, scale_sum[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        parts[warp][0][i * 32 + lane] = scale_sum[i];
        parts[warp][1][i * 32 + lane] = shift_sum[i];
    }
    __syncthreads();
    int which = threadIdx.x / COLUMNS, c = blockIdx.x * COLUMNS + threadIdx.x % COLUMNS;
    if (which >= 2 || c >= C) return;
    float sum = 0.0f;
    if (c >= start && c < end) {
        for (int w = 0; w < COLUMN_WARPS; ++w) sum += parts[w][which][threadIdx.x % COLUMNS];
    } else if (inactive_grads) {
        for (int s = 0; s < SPLIT; ++s) sum += inactive_grads[(((long long)s * B + b) * 2 + which) * C + c];
    }
    float* to = which ? dshift : dscale;
    to[(long long)b * modulation_stride + c] += sum;
}

// db of TILE_M outputs, from g itself: no window asked for sums over tokens.
__device__ __forceinline__ void sum_rows(
    float* dbias, const elem* g, int first, int add, int rows, int N, float (*shared)[TILE_M]
) {
    constexpr int LANES = TILE_M / WIDTH, LINES = THREADS / LANES;  // a line of threads takes every LINES-th row
    int n = first + threadIdx.x % LANES * WIDTH, line = threadIdx.x / LANES;
    float sums[WIDTH] = {};
    if (n < N)
        for (int row = line; row < rows; row += LINES) {
            float value[WIDTH];
            load_wide(value, g + (long long)row * N + n);
#pragma unroll
            for (int e = 0; e < WIDTH; ++e) sums[e] += value[e];
        }
#pragma unroll
    for (int e = 0; e < WIDTH; ++e) shared[line][threadIdx.x % LANES * WIDTH + e] = sums[e];
    __syncthreads();
    n = first + threadIdx.x;
    if (threadIdx.x >= TILE_M || n >= N) return;
    float sum = 0.0f;
    for (int l = 0; l < LINES; ++l) sum += shared[l][threadIdx.x];
    dbias[n] = add ? dbias[n] + sum : sum;
}

// dW = g^T h over the samples whose windows meet the tile, plus P (x) (1 + scale_I) + Q (x) shift_I; db = sum_b Q.
// Grid: tiles of [N, C]; without windows, a first column of blocks sums the rows of g for db.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) ln_linear_bwd_weight(
    float* __restrict__ dweight,        // [N, C]  = or +=
    float* __restrict__ dbias,          // [N]     = or +=
    const elem* __restrict__ g,         // [B, T, N]
    const elem* __restrict__ h,         // [B, T, C]
    const int* __restrict__ windows,    // [B, 2]
    const elem* __restrict__ pq,        // [SPLIT, B, 2, N], or null: every window is full
    const elem* __restrict__ inactive,  // [B, 2, C]
    const float* __restrict__ q,        // [B, N], or null, as pq
    int add,
    int B,
    int T,
    int C,
    int N
) {
    __shared__ __align__(128) unsigned char tiles[SHARED_BYTES];
    int row = blockIdx.y * TILE_M, column = blockIdx.x * TILE_N;
    if (!pq) {
        if (blockIdx.x == 0) return sum_rows(dbias, g, row, add, B * T, N, (float(*)[TILE_M])tiles);
        column -= TILE_N;
    }
    Accumulators sums;
    clear(sums);
    accumulate<K_OUTER, K_OUTER>(
        sums, row, column,
        MeetingRows<COLUMNS_OF_C>{windows, T, B * T, {column, min(column + TILE_N, C)}, pq ? SPLIT : 0, 2 * B},
        [=](int source) {
            if (source == 0) return Operands{{g, N, N}, {h, C, C}, B * T};
            return Operands{{pq + (long long)(source - 1) * B * 2 * N, N, N}, {inactive, C, C}, 2 * B};
        },
        tiles
    );
    finish(sums, row, N, column, C, tiles, store_gradient(dweight, C, add));
    int n = row + threadIdx.x;
    if (pq && blockIdx.x == 0 && threadIdx.x < TILE_M && n < N) {
        float sum = 0.0f;
        for (int b = 0; b < B; ++b) sum += q[(long long)b * N + n];
        dbias[n] = add ? dbias[n] + sum : sum;
    }
}
