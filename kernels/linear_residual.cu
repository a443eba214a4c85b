// Linear layer, gate, residual and bypass, computing the written channels only (formulas: src/ops/linear_residual/mod.rs).
//
//   a [B, T, K] -> W [C, K], b [C] -> z -> out [B, T, C]
//   out = (base in its window) + (gate z in the write window) + (bypass outside its window)
//
// Backward: split (dz, dgate, the sums of dz, and what base and bypass get), the product with W (da), the product of
// weights (dW, db). dz is 0 outside of the write window, so a chunk that sticks out of a window adds nothing.
// Saved for backward: a, z.
#include "gemm.cuh"
#include "vector.cuh"

// Of the kernel that sums over tokens: few columns a block, so that there are blocks for all multiprocessors.
constexpr int COLUMNS = 64;
constexpr int COLUMN_THREADS = 128;
constexpr int COLUMN_BLOCKS = 5;  // of a multiprocessor

// What base and bypass hold of a row's columns.
struct Kept {
    Vector<OUT_WIDTH> base, bypass;
};

// Grid: tiles of [B T, C]. A tile that no sample writes has no product, but its base and bypass.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) linear_residual_fwd(
    elem* __restrict__ out,                  // [B, T, C]
    elem* __restrict__ z,                    // [B, T, C] in OUT_WIDTH columns that meet a write window, or null: not kept
    const elem* __restrict__ a,              // [B, T, K]
    const elem* __restrict__ weight,         // [C, K]
    const float* __restrict__ bias,          // [C]
    const float* __restrict__ gate,          // [B, C]
    const elem* __restrict__ base,           // [B, T, C]
    const elem* __restrict__ bypass,         // [B, T, C], or null
    const int* __restrict__ base_windows,    // [B, 2]
    const int* __restrict__ bypass_windows,  // [B, 2], or null
    const int* __restrict__ write_windows,   // [B, 2]
    const __grid_constant__ TensorMap a_map,
    const __grid_constant__ TensorMap weight_map,
    int modulation_stride,                   // from one sample's gate to the next's
    int B,
    int T,
    int K,
    int C
) {
    const TensorMap *of_a = &a_map, *of_weight = &weight_map;
    int row = blockIdx.y * TILE_M, column = blockIdx.x * TILE_N, rows = B * T;
    product<K_INNER, K_INNER>(
        row, rows, column, C, T, windowed_columns(K, window_of_rows(write_windows, row, rows, T), column),
        [=](int) { return Operands{{a, K, rows, of_a}, {weight, K, C, of_weight}, K}; },
        tiles,
        [=](int c, int sample) {
            Window base_window(base_windows, sample), written(write_windows, sample);
            Window bypass_window = bypass ? Window(bypass_windows, sample) : base_window;
            Kept inside;  // bits of the columns that base and bypass pass
            inside.base.set_bits([&](int e) { return base_window.holds(c + e); });
            inside.bypass.set_bits([&](int e) { return !bypass_window.holds(c + e); });
            bool base_passes = base_window.meets(c, OUT_WIDTH);
            bool bypass_passes = bypass && !bypass_window.holds_all(c, OUT_WIDTH);
            bool is_written = written.meets(c, OUT_WIDTH);
            unsigned int own = 0;
#pragma unroll
            for (int e = 0; e < OUT_WIDTH; ++e) own |= written.holds(c + e) << e;
            Wide own_bias, own_gate;
            const float* gates = gate + (long long)sample * modulation_stride;
            load_floats(own_bias.x, bias + c, true);
            load_floats(own_gate.x, gates + c, is_aligned(gates));
            return epilogue_of(
                [=](int i) {
                    Kept kept = {};
                    long long at = (long long)i * C + c;
                    if (base_passes) kept.base.load(base + at);
                    if (bypass_passes) kept.bypass.load(bypass + at);
                    return kept;
                },
                [=](int i, float (&value)[OUT_WIDTH], Kept kept) {
                    long long at = (long long)i * C + c;
                    Wide result, passed;
                    kept.base.keep(inside.base);
                    kept.bypass.keep(inside.bypass);
                    kept.base.unpack(result.x);
                    kept.bypass.unpack(passed.x);
#pragma unroll
                    for (int e = 0; e < OUT_WIDTH; ++e) {
                        value[e] += own_bias.x[e];
                        result.x[e] += passed.x[e];
                        float more = fmaf(own_gate.x[e], value[e], result.x[e]);
                        result.x[e] = own >> e & 1 ? more : result.x[e];
                    }
                    store_wide(z + at, value, z && is_written);
                    store_wide(out + at, result.x);
                }
            );
        }
    );
}

template <int W>
__device__ __forceinline__ void split(
    elem* dz, float* dz_sums, float* dgate, elem* dbase, elem* dbypass, const elem* dout, const elem* z, const float* gate,
    Window base, Window bypass, Window written, int modulation_stride, int fresh_base, int fresh_bypass, int T, int C
) {
    constexpr int LANES = COLUMNS / W < 32 ? COLUMNS / W : 32;  // of a row
    constexpr int VECTORS = COLUMNS / LANES / W;                // of a lane
    constexpr int LINES = COLUMN_THREADS / LANES;               // rows that the block's threads are at
    constexpr int AT_ONCE = W > 1 ? 2 : 1;                      // rows that a thread reads before it goes on
    typedef LaneColumns<W, LANES> Lanes;
    __shared__ __align__(16) float parts[LINES][2][Lanes::floats(VECTORS)];
    int line = threadIdx.x / LANES, lane = threadIdx.x % LANES, b = blockIdx.y;
    const float* all_gates = gate + (long long)b * modulation_stride;
#pragma unroll 1
    for (int v = 0; v < VECTORS; ++v) {
        int c = blockIdx.x * COLUMNS + (v * LANES + lane) * W;
        float dz_sum[W], dgate_sum[W], gates[W];
#pragma unroll
        for (int e = 0; e < W; ++e) dz_sum[e] = dgate_sum[e] = 0.0f;
        if (c < C) {
            load_floats(gates, all_gates + c, is_aligned(all_gates));
            written.mask(gates, c);
            bool some_written = written.meets(c, W), all_written = written.holds_all(c, W);
            bool base_gets = dbase && (fresh_base ? dbase != dout || !base.holds_all(c, W) : base.meets(c, W));
            bool bypass_gets = dbypass && (fresh_bypass || !bypass.holds_all(c, W));
            // What is added to is read with all else: that of the base, or that of the bypass where nothing is added to the base's.
            // Where both are added to, the bypass is read when its turn comes.
            bool base_has = base_gets && !fresh_base, bypass_has = bypass_gets && !fresh_bypass && !base_has;
            const elem* added_to = base_has ? dbase : dbypass;
            for (int first = line; first < T; first += LINES * AT_ONCE) {
                Vector<W> upstreams[AT_ONCE], zs[AT_ONCE], befores[AT_ONCE];
#pragma unroll
                for (int i = 0; i < AT_ONCE; ++i) {
                    int t = first + i * LINES;
                    if (t >= T) continue;
                    long long at = ((long long)b * T + t) * C + c;
                    upstreams[i].load(dout + at);
                    if (some_written) {
                        if (W <= OUT_WIDTH || all_written) {
                            zs[i].load(z + at);
                        } else {
                            // Forward has written the columns inside the window, and no others.
                            float value[W];
#pragma unroll
                            for (int e = 0; e < W; ++e) value[e] = written.holds(c + e) ? to_f32(z[at + e]) : 0.0f;
                            zs[i].pack(value);
                        }
                    }
                    if (base_has || bypass_has) befores[i].load(added_to + at);
                }
#pragma unroll
                for (int i = 0; i < AT_ONCE; ++i) {
                    int t = first + i * LINES;
                    if (t >= T) continue;
                    long long at = ((long long)b * T + t) * C + c;
                    float upstream[W], value[W];
                    Vector<W> vector;
                    upstreams[i].unpack(upstream);
                    if (some_written) {
                        // What z holds outside of the window is not defined.
                        zs[i].unpack(value);
                        written.mask(value, c);
#pragma unroll
                        for (int e = 0; e < W; ++e) dgate_sum[e] = fmaf(upstream[e], value[e], dgate_sum[e]);
                    }
#pragma unroll
                    for (int e = 0; e < W; ++e) {
                        value[e] = gates[e] * upstream[e];
                        dz_sum[e] += value[e];
                    }
                    vector.pack(value);
                    vector.store(dz + at);
                    auto store_sum = [&](elem* to, float(&x)[W]) {
                        befores[i].unpack(value);
#pragma unroll
                        for (int e = 0; e < W; ++e) x[e] += value[e];
                        vector.pack(x);
                        vector.store(to + at);
                    };
                    if (base_gets) {
                        if (fresh_base && base.holds_all(c, W)) {
                            upstreams[i].store(dbase + at);
                        } else {
                            float given[W];
                            upstreams[i].unpack(given);
                            base.mask(given, c);
                            if (base_has) store_sum(dbase, given);
                            else add_or_store(dbase + at, given, true);
                        }
                    }
                    if (bypass_gets) {
                        if (fresh_bypass && !bypass.meets(c, W)) {
                            upstreams[i].store(dbypass + at);
                        } else if (fresh_bypass && bypass.holds_all(c, W)) {
                            Vector<W>{}.store(dbypass + at);
                        } else {
#pragma unroll
                            for (int e = 0; e < W; ++e)
                                if (bypass.holds(c + e)) upstream[e] = 0.0f;
                            if (bypass_has) store_sum(dbypass, upstream);
                            else add_or_store(dbypass + at, upstream, fresh_bypass);
                        }
                    }
                }
            }
        }
        Lanes::store(parts[line][0], dz_sum, v, lane);
        Lanes::store(parts[line][1], dgate_sum, v, lane);
    }
    __syncthreads();
    int own = threadIdx.x % COLUMNS, c = blockIdx.x * COLUMNS + own;
    if (c >= C) return;
#pragma unroll
    for (int which = threadIdx.x / COLUMNS; which < 2; which += COLUMN_THREADS / COLUMNS) {
        float sum = 0.0f;
#pragma unroll
        for (int l = 0; l < LINES; ++l) sum += parts[l][which][Lanes::of(own)];
        if (which == 0) dz_sums[(long long)b * C + c] = sum;
        else if (written.holds(c)) dgate[(long long)b * modulation_stride + c] += sum;
    }
}

// dz = gate dout in the write window and 0 outside; dgate = sum_t dout z; the sums of dz over tokens; dout to base and bypass.
// Grid: (ceil(C / COLUMNS), B) blocks of COLUMN_THREADS; each of their lines of threads takes every LINES-th token.
extern "C" __global__ void __launch_bounds__(COLUMN_THREADS, COLUMN_BLOCKS) linear_residual_bwd_split(
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
    int T,
    int C
) {
    Window base(base_windows, blockIdx.y), written(write_windows, blockIdx.y);
    Window bypass = dbypass ? Window(bypass_windows, blockIdx.y) : base;
    by_width(are_vectors(C), [&](auto vector) {
        split<decltype(vector)::COUNT>(
            dz, dz_sums, dgate, dbase, dbypass, dout, z, gate, base, bypass, written, modulation_stride, fresh_base,
            fresh_bypass, T, C
        );
    });
}

// da = dz W over the write windows, and gelu'(pre) where a = gelu(pre).  Grid: tiles of [B T, K]; by wgmma, blocks that go over them.
extern "C" __global__ void __launch_bounds__(TILES_THREADS, BLOCKS) linear_residual_bwd_input(
    elem* __restrict__ da,                  // [B, T, K]: gradient of a, or of pre
    unsigned int* __restrict__ counters,    // [count] = 0, for the product of weights
    const elem* __restrict__ dz,            // [B, T, C]
    const elem* __restrict__ weight,        // [C, K]
    const elem* __restrict__ pre,           // [B, T, K], or null
    const int* __restrict__ write_windows,  // [B, 2]
    const __grid_constant__ TensorMap dz_map,
    const __grid_constant__ TensorMap weight_map,
    int count,
    int B,
    int T,
    int K,
    int C
) {
    if (blockIdx.x == 0 && blockIdx.y == 0)
        for (int i = threadIdx.x; i < count; i += TILES_THREADS) counters[i] = 0;
    int rows = B * T;
    const TensorMap *of_dz = &dz_map, *of_weight = &weight_map;
    // Two products in one kernel: a branch in each row would keep the rows apart.
    auto all = [=](auto is_gelu) {
        each_tile<K_INNER, K_OUTER>(rows, K, [=](int row, int column, auto& product) {
            product(
                row, rows, column, K, T, window_steps(window_of_rows(write_windows, row, rows, T)),
                [=](int) { return Operands{{dz, C, rows, of_dz}, {weight, K, K, of_weight}, C}; },
                [=](int k, int) {
                    return epilogue_of(
                        [=](int i) {
                            Vector<OUT_WIDTH> before = {};
                            if constexpr (decltype(is_gelu)::value) before.load(pre + (long long)i * K + k);
                            return before;
                        },
                        [=](int i, float (&value)[OUT_WIDTH], Vector<OUT_WIDTH> before) {
                            if constexpr (decltype(is_gelu)::value) {
                                Wide x;
                                before.unpack(x.x);
#pragma unroll
                                for (int e = 0; e < OUT_WIDTH; ++e) value[e] *= gelu_derivative(x.x[e]);
                            }
                            store_wide(da + (long long)i * K + k, value);
                        }
                    );
                }
            );
        });
    };
    if (pre) all(Constant<1>());
    else all(Constant<0>());
}

// dW = dz^T a over the samples whose windows meet the tile's rows; db = sums of dz.
// Grid: as planned in even shares (gemm_shares.cuh).
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) linear_residual_bwd_weight(
    float* __restrict__ dweight,            // [C, K]  = or +=
    float* __restrict__ dbias,              // [C]     = or +=
    float* parts,                           // [parts, TILE_M TILE_N] in pieces
    unsigned int* counters,                 // [1 + parts] lists that were taken, then the parts that are there; 0 before
    const int* __restrict__ plan,           // [gridDim.x + 1], and the pieces
    const elem* __restrict__ dz,            // [B, T, C]
    const elem* __restrict__ a,             // [B, T, K]
    const float* __restrict__ dz_sums,      // [B, C]
    const int* __restrict__ write_windows,  // [B, 2]
    const __grid_constant__ TensorMap dz_map,
    const __grid_constant__ TensorMap a_map,
    int add,
    int B,
    int T,
    int K,
    int C
) {
    const TensorMap *of_dz = &dz_map, *of_a = &a_map;
    for_pieces(plan, counters, [=](const Piece& piece) {
        int row = piece.row, column = piece.column;
        product<K_OUTER, K_OUTER>(
            row, C, column, K, C,
            MeetingRows<ROWS_OF_C>{write_windows, T, B * T, piece.start, piece.end, {row, min(row + TILE_M, C)}, 0, 0},
            [=](int) { return Operands{{dz, C, C, of_dz}, {a, K, K, of_a}, B * T}; },
            tiles, store_gradient(dweight, K, add), SharedParts{parts, counters + 1, piece}
        );
        int c = row + threadIdx.x;
        if (piece.part < 0 && column == 0 && threadIdx.x < TILE_M && c < C) {
            float sum = 0.0f;
            for (int b = 0; b < B; ++b) sum += dz_sums[(long long)b * C + c];
            dbias[c] = add ? dbias[c] + sum : sum;
        }
    });
}
