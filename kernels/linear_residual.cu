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

// Grid: tiles of [B T, C]. A tile that no sample writes has no product, but its base and bypass.
extern "C" __global__ void __launch_bounds__(THREADS) linear_residual_fwd(
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
    Range written = union_of(write_windows, row / T, (min(row + TILE_M, rows) - 1) / T);
    Accumulators sums;
    clear(sums);
    if (column < written.end && column + TILE_N > written.start)
        accumulate<K_INNER, K_INNER>(
            sums, Operand{a, K, rows}, Operand{weight, K, C}, row, column, WindowedColumns{K, written}, K, tiles
        );
    finish(sums, row, rows, column, C, [=](int i, int c, float value) {
        int b = i / T;
        long long at = (long long)i * C + c;
        float result = 0.0f;
        if (inside(base_windows, b, c)) result = to_f32(base[at]);
        if (inside(write_windows, b, c)) {
            value += bias[c];
            if (z) from_f32(z[at], value);
            result = fmaf(gate[(long long)b * modulation_stride + c], value, result);
        }
        if (bypass && !inside(bypass_windows, b, c)) result += to_f32(bypass[at]);
        from_f32(out[at], result);
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
extern "C" __global__ void __launch_bounds__(THREADS) linear_residual_bwd_input(
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
        sums, Operand{dz, C, rows}, Operand{weight, K, K}, row, column, window_steps(write_windows, row, rows, T), C, tiles
    );
    finish(sums, row, rows, column, K, [=](int i, int k, float value) {
        long long at = (long long)i * K + k;
        if (pre) value *= gelu_derivative(to_f32(pre[at]));
        from_f32(da[at], value);
    });
}

// dW = dz^T a over the samples whose windows meet the tile's rows; db = sums of dz.  Grid: tiles of [C, K].
extern "C" __global__ void __launch_bounds__(THREADS) linear_residual_bwd_weight(
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
        sums, Operand{dz, C, C}, Operand{a, K, K}, row, column, MeetingRows<ROWS_OF_C>{write_windows, T, B * T, row, row + TILE_M},
        B * T, tiles
    );
    finish(sums, row, C, column, K, [=](int c, int k, float value) {
        long long at = (long long)c * K + k;
        dweight[at] = add ? dweight[at] + value : value;
    });
    int c = row + threadIdx.x;
    if (blockIdx.x == 0 && threadIdx.x < TILE_M && c < C) {
        float sum = 0.0f;
        for (int b = 0; b < B; ++b) sum += dz_sums[(long long)b * C + c];
        dbias[c] = add ? dbias[c] + sum : sum;
    }
}
