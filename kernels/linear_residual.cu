// Linear layer, gate, residual and bypass, computing the written channels only (formulas: src/ops/linear_residual/mod.rs).
//
//   a [B, T, K] -> W [C, K], b [C] -> z -> out [B, T, C]
//   out = (base in its window) + (gate z in the write window) + (bypass outside its window)
//
// Backward: split (dz, dgate, the sums of dz, and what base and bypass get), the product with W (da), the product of
// weights (dW, db). dz is 0 outside of the write window, so a chunk that sticks out of a window adds nothing.
// Saved for backward: a, z.
#include "gemm.cuh"

constexpr int COLUMN_WARPS = 8;  // rows at a time in the kernel that sums over tokens
constexpr int COLUMNS = 64;      // its columns, two a lane

__device__ __forceinline__ bool inside(const int* windows, int b, int c) {
    return c >= windows[2 * b] && c < windows[2 * b] + windows[2 * b + 1];
}

__device__ __forceinline__ Range window_of(const int* windows, int b) {
    return Range{windows[2 * b], windows[2 * b] + windows[2 * b + 1]};
}

__device__ __forceinline__ bool holds(Range window, int c) { return c >= window.start && c < window.end; }

// Whether the window holds any of the WIDTH columns from c on.
__device__ __forceinline__ bool meets(Range window, int c) { return c < window.end && c + WIDTH > window.start; }

// Grid: tiles of [B T, C]. A tile that no sample writes has no product, but its base and bypass.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) linear_residual_fwd(
    elem* __restrict__ out,                  // [B, T, C]
    elem* __restrict__ z,                    // [B, T, C] in the write windows, or null: not kept
    const elem* __restrict__ a,              // [B, T, K]
    const elem* __restrict__ weight,         // [C, K]
    const float* __restrict__ bias,          // [C]
    const float* __restrict__ gate,          // [B, C]
    const elem* __restrict__ base,           // [B, T, C]
    const elem* __restrict__ bypass,         // [B, T, C], or null
    const int* __restrict__ base_windows,    // [B, 2]
    const int* __restrict__ bypass_windows,  // [B, 2], or null
    const int* __restrict__ write_windows,   // [B, 2]
    int modulation_stride,                   // from one sample's gate to the next's
    int B,
    int T,
    int K,
    int C
) {
    __shared__ __align__(128) unsigned char tiles[SHARED_BYTES];
    int row = blockIdx.y * TILE_M, column = blockIdx.x * TILE_N, rows = B * T;
    Range written = window_of_rows(write_windows, row, rows, T);
    Accumulators sums;
    clear(sums);
    if (column < written.end && column + TILE_N > written.start)
        accumulate<K_INNER, K_INNER>(
            sums, row, column, windowed_columns(K, written, column),
            [=](int) { return Operands{{a, K, rows}, {weight, K, C}, K}; }, tiles
        );
    finish(sums, row, rows, column, C, tiles, [=](int c) {
        Wide own_bias, own_gate;
        load_wide(own_bias.x, bias + c);
        Range kept, own;
        int b = -1;
        return [=](int i, float (&value)[WIDTH]) mutable {
            if (i / T != b) {
                b = i / T;
                kept = window_of(base_windows, b);
                own = window_of(write_windows, b);
                // One by one: the gate may start anywhere.
#pragma unroll
                for (int e = 0; e < WIDTH; ++e) own_gate.x[e] = gate[(long long)b * modulation_stride + c + e];
            }
            long long at = (long long)i * C + c;
            Wide result, other;
#pragma unroll
            for (int e = 0; e < WIDTH; ++e) result.x[e] = 0.0f;
            if (meets(kept, c)) {
                load_wide(other.x, base + at);
#pragma unroll
                for (int e = 0; e < WIDTH; ++e)
                    if (holds(kept, c + e)) result.x[e] = other.x[e];
            }
            if (meets(own, c)) {
#pragma unroll
                for (int e = 0; e < WIDTH; ++e) {
                    value[e] += own_bias.x[e];
                    if (holds(own, c + e)) result.x[e] = fmaf(own_gate.x[e], value[e], result.x[e]);
                }
                if (z) store_wide(z + at, value);
            }
            if (bypass) {
                Range passed = window_of(bypass_windows, b);
                if (!(holds(passed, c) && holds(passed, c + WIDTH - 1))) {
                    load_wide(other.x, bypass + at);
#pragma unroll
                    for (int e = 0; e < WIDTH; ++e)
                        if (!holds(passed, c + e)) result.x[e] += other.x[e];
                }
            }
            store_wide(out + at, result.x);
        };
    });
}

// dz = gate dout in the write window and 0 outside; dgate = sum_t dout z; the sums of dz over tokens; dout to base and bypass.
// Grid: (ceil(C / COLUMNS), B) blocks of 32 COLUMN_WARPS threads; warp w takes tokens w, w + COLUMN_WARPS, ..
extern "C" __global__ void __launch_bounds__(256) linear_residual_bwd_split(
    elem* __restrict__ dz,                   // [B, T, C]
    float* __restrict__ dz_sums,             // [B, C]
    float* __restrict__ dgate,               // [B, C] += in the write window (each column belongs to one operation)
    elem* dbase,                             // [B, T, C], or null; may be dout itself
    elem* dbypass,                           // [B, T, C], or null
    const elem* dout,                        // [B, T, C]
    const elem* __restrict__ z,              // [B, T, C]
    const float* __restrict__ gate,          // [B, C]
    const int* __restrict__ base_windows,    // [B, 2]
    const int* __restrict__ bypass_windows,  // [B, 2], or null
    const int* __restrict__ write_windows,   // [B, 2]
    int modulation_stride,
    int fresh_base,    // dbase = dout in its window and 0 outside; else += in its window
    int fresh_bypass,  // dbypass = dout outside of its window and 0 inside; else += outside
    int B,
    int T,
    int C
) {
    __shared__ float parts[COLUMN_WARPS][2][COLUMNS];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, b = blockIdx.y;
    float dz_sum[2] = {0.0f, 0.0f}, dgate_sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        int c = blockIdx.x * COLUMNS + i * 32 + lane;
        if (c >= C) continue;
        bool written = inside(write_windows, b, c), in_base = inside(base_windows, b, c);
        bool bypassed = dbypass && !inside(bypass_windows, b, c);
        float own_gate = gate[(long long)b * modulation_stride + c];
        for (int t = warp; t < T; t += COLUMN_WARPS) {
            long long at = ((long long)b * T + t) * C + c;
            float upstream = to_f32(dout[at]), value = 0.0f;
            if (written) {
                value = own_gate * upstream;
                dz_sum[i] += value;
                dgate_sum[i] = fmaf(upstream, to_f32(z[at]), dgate_sum[i]);
            }
            from_f32(dz[at], value);
            if (dbase) {
                if (fresh_base) from_f32(dbase[at], in_base ? upstream : 0.0f);
                else if (in_base) from_f32(dbase[at], to_f32(dbase[at]) + upstream);
            }
            if (dbypass) {
                if (fresh_bypass) from_f32(dbypass[at], bypassed ? upstream : 0.0f);
                else if (bypassed) from_f32(dbypass[at], to_f32(dbypass[at]) + upstream);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        parts[warp][0][i * 32 + lane] = dz_sum[i];
        parts[warp][1][i * 32 + lane] = dgate_sum[i];
    }
    __syncthreads();
    int which = threadIdx.x / COLUMNS, c = blockIdx.x * COLUMNS + threadIdx.x % COLUMNS;
    if (which >= 2 || c >= C) return;
    float sum = 0.0f;
    for (int w = 0; w < COLUMN_WARPS; ++w) sum += parts[w][which][threadIdx.x % COLUMNS];
    if (which == 0) dz_sums[(long long)b * C + c] = sum;
    else if (inside(write_windows, b, c)) dgate[(long long)b * modulation_stride + c] += sum;
}

// da = dz W over the write windows, and gelu'(pre) where a = gelu(pre).  Grid: tiles of [B T, K].
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) linear_residual_bwd_input(
    elem* __restrict__ da,                  // [B, T, K]: gradient of a, or of pre
    const elem* __restrict__ dz,            // [B, T, C]
    const elem* __restrict__ weight,        // [C, K]
    const elem* __restrict__ pre,           // [B, T, K], or null
    const int* __restrict__ write_windows,  // [B, 2]
    int B,
    int T,
    int K,
    int C
) {
    __shared__ __align__(128) unsigned char tiles[SHARED_BYTES];
    int row = blockIdx.y * TILE_M, column = blockIdx.x * TILE_N, rows = B * T;
    Accumulators sums;
    clear(sums);
    accumulate<K_INNER, K_OUTER>(
        sums, row, column, window_steps(window_of_rows(write_windows, row, rows, T)),
        [=](int) { return Operands{{dz, C, rows}, {weight, K, K}, C}; }, tiles
    );
    finish(sums, row, rows, column, K, tiles, [=](int k) {
        return [=](int i, float (&value)[WIDTH]) {
            long long at = (long long)i * K + k;
            if (pre) {
                Wide before;
                load_wide(before.x, pre + at);
#pragma unroll
                for (int e = 0; e < WIDTH; ++e) value[e] *= gelu_derivative(before.x[e]);
            }
            store_wide(da + at, value);
        };
    });
}

// dW = dz^T a over the samples whose windows meet the tile's rows; db = sums of dz.  Grid: tiles of [C, K].
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) linear_residual_bwd_weight(
    float* __restrict__ dweight,            // [C, K]  = or +=
    float* __restrict__ dbias,              // [C]     = or +=
    const elem* __restrict__ dz,            // [B, T, C]
    const elem* __restrict__ a,             // [B, T, K]
    const float* __restrict__ dz_sums,      // [B, C]
    const int* __restrict__ write_windows,  // [B, 2]
    int add,
    int B,
    int T,
    int K,
    int C
) {
    __shared__ __align__(128) unsigned char tiles[SHARED_BYTES];
    int row = blockIdx.y * TILE_M, column = blockIdx.x * TILE_N;
    Accumulators sums;
    clear(sums);
    accumulate<K_OUTER, K_OUTER>(
        sums, row, column, MeetingRows<ROWS_OF_C>{write_windows, T, B * T, {row, min(row + TILE_M, C)}, 0, 0},
        [=](int) { return Operands{{dz, C, C}, {a, K, K}, B * T}; }, tiles
    );
    finish(sums, row, C, column, K, tiles, store_gradient(dweight, K, add));
    int c = row + threadIdx.x;
    if (blockIdx.x == 0 && threadIdx.x < TILE_M && c < C) {
        float sum = 0.0f;
        for (int b = 0; b < B; ++b) sum += dz_sums[(long long)b * C + c];
        dbias[c] = add ? dbias[c] + sum : sum;
    }
}
