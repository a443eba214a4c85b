// The kernels of ln_linear that go over rows: a thread a vector of the row, or lines of threads over COLUMNS columns.
//
// A row is read from memory once: a thread holds a vector of some rows at a time in registers. Where a thread has more than one
// vector of a row (rows of more than 5 KB, or that are no vectors), it is at one row, and reads all but the first again for each
// use: such rows need not be fast.
#pragma once

#include "tensor_core.cuh"
#include "vector.cuh"

constexpr float EPS = 1e-6f;
// Of the kernels with a thread a vector of the row.
constexpr int ROW_THREADS = 320;  // of a block, at most
constexpr int ROW_BLOCKS = 2;     // of a multiprocessor, at least: twice as many of the 160 threads that 1152 channels in bf16 take
constexpr int ROW_TOKENS = 16;    // of one sample: those of a block
constexpr int FWD_ROWS = 4;       // of them at a time, forward
constexpr int BWD_ROWS = 2;       // and backward
// Of the kernel that sums over all tokens: few columns a block, so that all blocks are resident at the same time.
constexpr int COLUMNS = 128;
constexpr int COLUMN_THREADS = 128;
constexpr int COLUMN_BLOCKS = 9;  // of a multiprocessor
constexpr int COLUMN_STAGES = 4;  // a power of two: one is used, the others are on their way

#ifdef ELEM_BF16
constexpr int SPLIT = 2;  // P and Q are sums of many numbers: as products' operands they are split into high and low halves
#else
constexpr int SPLIT = 1;
#endif

// Sums each of COUNT numbers over the threads of the block, in a fixed order: a lane gets the sum of x[lane % COUNT]. `shared`
// may be written again after the block's next barrier.
template <int COUNT>
__device__ __forceinline__ float block_sums(float (&x)[COUNT], float (*shared)[COUNT]) {
    constexpr int LANES = 32 / COUNT;  // that get the same sum
    float sum = warp_sums<COUNT>(x);
    if (threadIdx.x % LANES == 0) shared[threadIdx.x / 32][threadIdx.x % 32 / LANES] = sum;
    __syncthreads();
    // A warp's LANES lanes for a number add up as many warps' sums at a time.
    sum = 0.0f;
#pragma unroll
    for (int first = 0; first < ROW_THREADS / 32; first += LANES) {
        int warp = first + threadIdx.x % 32 / COUNT;
        if (warp < blockDim.x / 32) sum += shared[warp][threadIdx.x % COUNT];
    }
#pragma unroll
    for (int apart = COUNT; apart < 32; apart *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, apart);
    return sum;
}

// x[i] = what lane i of the warp has.
template <int COUNT>
__device__ __forceinline__ void spread(float (&x)[COUNT], float own) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) x[i] = __shfl_sync(0xffffffffu, own, i);
}

template <int ROWS>
struct Rows {
    static constexpr int COUNT = ROWS;
};

// A block's rows of one sample, of which a thread has the vector from channel `c` on.
template <int W, int ROWS>
struct SampleRows {
    static constexpr bool ONE_VECTOR = ROWS > 1;  // is all that a thread has of a row
    Window window;
    int c;           // of the thread's first vector
    int active;      // whether that is one of the row that meets the window
    Vector<W> bits;  // of what it holds of the window
    int first;       // token of the block
    int end;

    __device__ SampleRows(const int* windows, int b, int T, int C)
        : window(windows, b), c(threadIdx.x * W), active(c < C && window.meets(c, W)),
          first(blockIdx.x * ROW_TOKENS), end(min(T, first + ROW_TOKENS)) {
        bits.set_bits([&](int e) { return window.holds(c + e); });
        // "Changed" here, so that it is kept in a register and not found out again for every row.
        asm volatile("" : "+r"(active));
    }

    // Calls `body` with the channel of each vector of the thread but the first.
    template <typename Body>
    __device__ void each_beyond(int C, Body body) const {
        if constexpr (!ONE_VECTOR)
            for (int beyond = c + blockDim.x * W; beyond < C; beyond += blockDim.x * W) body(beyond);
    }

    // Where the thread's first vector of the block's rows starts.
    __device__ long long start(int T, int C) const { return ((long long)blockIdx.y * T + first) * C + c; }

    // The thread's vectors of the rows from t on, the first one at `from`: zeros where there are none.
    __device__ void load(Vector<W> (&to)[ROWS], const elem* from, int t, int C) const {
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            to[i] = Vector<W>{};
            if (active && t + i < end) to[i].load(from + (long long)i * C);
        }
    }
};

// Calls `body` with the vector to use and the rows that a block is at: ROWS, or one where a thread has several vectors of it.
template <int ROWS, typename Body>
__device__ __forceinline__ void by_row(int C, Body body) {
    by_width(are_vectors(C), [&](auto vector) {
        constexpr int W = decltype(vector)::COUNT;
        if constexpr (W > 1)
            if (C <= blockDim.x * W) return body(vector, Rows<ROWS>{});
        body(vector, Rows<1>{});
    });
}

// x as W numbers from channel c on, 0 outside of the window.
template <int W>
__device__ __forceinline__ void load_trimmed(float (&x)[W], const elem* row, int c, Window window) {
    Vector<W> v;
    v.load(row + c);
    v.unpack(x);
    window.mask(x, c);
}

template <int W, int ROWS>
__device__ __forceinline__ void normalise(
    elem* h, float* mean, float* rstd, elem* inactive, const elem* x, const int* windows, const float* shift,
    const float* scale, int modulation_stride, int T, int C
) {
    __shared__ __align__(16) float shared[2][ROW_THREADS / 32][ROWS];
    int b = blockIdx.y;
    SampleRows<W, ROWS> rows(windows, b, T, C);
    Window window = rows.window;
    const float* own_shift = shift + (long long)b * modulation_stride;
    const float* own_scale = scale + (long long)b * modulation_stride;
    bool aligned = is_aligned(own_shift) && is_aligned(own_scale);
    // Both 0 outside of the window.
    auto load_modulation = [&](float(&factor)[W], float(&term)[W], int c) {
        load_floats(factor, own_scale + c, aligned);
        load_floats(term, own_shift + c, aligned);
#pragma unroll
        for (int e = 0; e < W; ++e) factor[e] += 1.0f;
        window.mask(factor, c);
        window.mask(term, c);
    };
    int outside = C - ((window.end + W - 1) / W - window.start / W) * W;  // channels of no vector that is read
    Vector<W> next[ROWS];
    const elem* from = x + rows.start(T, C);
    elem* to = h + rows.start(T, C);
    rows.load(next, from, rows.first, C);
    float factor[W], term[W];
#pragma unroll
    for (int e = 0; e < W; ++e) factor[e] = term[e] = 0.0f;
    if (rows.active) load_modulation(factor, term, rows.c);

    for (int t = rows.first; t < rows.end; t += ROWS) {
        long long row = (long long)b * T + t;
        int count = min(ROWS, rows.end - t);
        float values[ROWS][W], mu[ROWS], r[ROWS];
#pragma unroll
        for (int i = 0; i < ROWS; ++i) mu[i] = r[i] = 0.0f;
        if (rows.active) {
#pragma unroll
            for (int i = 0; i < ROWS; ++i) {
                next[i].keep(rows.bits);
                next[i].unpack(values[i]);
#pragma unroll
                for (int e = 0; e < W; ++e) mu[i] += values[i][e];
            }
        }
        // Under way while these rows are worked on.
        from += (long long)ROWS * C;
        rows.load(next, from, t + ROWS, C);
        rows.each_beyond(C, [&](int c) {
            if (!window.meets(c, W)) return;
            float beyond[W];
            load_trimmed(beyond, x + row * C, c, window);
#pragma unroll
            for (int e = 0; e < W; ++e) mu[0] += beyond[e];
        });
        // A lane computes the statistics of one of the rows.
        float own_mu = block_sums(mu, shared[0]) / C;
        spread(mu, own_mu);
        if (rows.active) {
#pragma unroll
            for (int i = 0; i < ROWS; ++i)
#pragma unroll
                for (int e = 0; e < W; ++e) {
                    values[i][e] -= mu[i];
                    r[i] = fmaf(values[i][e], values[i][e], r[i]);
                }
        }
        rows.each_beyond(C, [&](int c) {
            if (!window.meets(c, W)) return;
            float beyond[W];
            load_trimmed(beyond, x + row * C, c, window);
#pragma unroll
            for (int e = 0; e < W; ++e) r[0] = fmaf(beyond[e] - mu[0], beyond[e] - mu[0], r[0]);
        });
        // The inactive channels are zeros, and differ from the mean by the mean.
        float variance = (block_sums(r, shared[1]) + outside * own_mu * own_mu) / C;
        float own_r = 1.0f / sqrtf(variance + EPS);
        spread(r, own_r);
        if (threadIdx.x < count) {
            mean[row + threadIdx.x] = own_mu;
            rstd[row + threadIdx.x] = own_r;
        }
        if (rows.active) {
#pragma unroll
            for (int i = 0; i < ROWS; ++i) {
                if (i >= count) continue;
#pragma unroll
                for (int e = 0; e < W; ++e) values[i][e] = fmaf(values[i][e] * r[i], factor[e], term[e]);
                Vector<W> result;
                result.pack(values[i]);
                result.store(to + (long long)i * C);
            }
        } else if (rows.c < C) {
            for (int i = 0; i < count; ++i) Vector<W>{}.store(to + (long long)i * C);
        }
        to += (long long)ROWS * C;
        rows.each_beyond(C, [&](int c) {
            Vector<W> result = {};
            if (window.meets(c, W)) {
                float beyond[W], own_factor[W], own_term[W];
                load_trimmed(beyond, x + row * C, c, window);
                load_modulation(own_factor, own_term, c);
#pragma unroll
                for (int e = 0; e < W; ++e) beyond[e] = fmaf((beyond[e] - mu[0]) * r[0], own_factor[e], own_term[e]);
                result.pack(beyond);
            }
            result.store(h + row * C + c);
        });
    }
    if (blockIdx.x > 0) return;
    elem* both = inactive + (long long)b * 2 * C;
    for (int c = rows.c; c < C; c += blockDim.x * W) {
        load_floats(factor, own_scale + c, aligned);
        load_floats(term, own_shift + c, aligned);
#pragma unroll
        for (int e = 0; e < W; ++e) {
            bool active = window.holds(c + e);
            factor[e] = active ? 0.0f : 1.0f + factor[e];
            term[e] = active ? 0.0f : term[e];
        }
        Vector<W> v;
        v.pack(factor);
        v.store(both + c);
        v.pack(term);
        v.store(both + C + c);
    }
}

template <int W>
__device__ __forceinline__ void sum_columns(
    elem* pq, float* q, float* dr, const elem* g, const float* mean, const float* rstd, const float* uv,
    int B, int T, int N
) {
    constexpr int LANES = COLUMNS / W < 32 ? COLUMNS / W : 32;  // of a row
    constexpr int VECTORS = COLUMNS / LANES / W;                // of a lane
    constexpr int LINES = COLUMN_THREADS / LANES;               // rows that the block's threads are at
    constexpr int AT_ONCE = W > 1 ? 2 : 1;                      // rows of a thread in a stage
    constexpr int STEP = LINES * AT_ONCE;
    typedef LaneColumns<W, LANES> Lanes;
    // Each thread copies what it will read itself: no barrier. In the end the memory holds the threads' sums.
    union Memory {
        Vector<W> stages[COLUMN_STAGES][AT_ONCE][VECTORS][COLUMN_THREADS];
        float parts[LINES][2][Lanes::floats(VECTORS)];
    };
    __shared__ __align__(16) unsigned char memory[sizeof(Memory)];
    auto& stages = ((Memory*)memory)->stages;
    auto& parts = ((Memory*)memory)->parts;
    int line = threadIdx.x / LANES, lane = threadIdx.x % LANES, b = blockIdx.y;
    int n = blockIdx.x * COLUMNS + lane * W;  // of the first vector
    g += ((long long)b * T + line) * N + n;
    int first_row = b * T;
    dr += ((long long)blockIdx.x * B + b) * T;
    asm volatile("" : "+l"(dr));  // "changed", so that it is not computed again for each step
    // Zeros beyond the last token and column.
    auto copy = [&](unsigned int stage, int t) {
        if (t - line < T) {
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i)
#pragma unroll
                for (int v = 0; v < VECTORS; ++v) {
                    const elem* from = g + (long long)i * LINES * N + v * LANES * W;
                    Vector<W>& to = stages[stage][i][v][threadIdx.x];
                    bool inside = t + i * LINES < T && n + v * LANES * W < N;
                    if constexpr (sizeof(to) == 16) {
                        copy_async_or_zeros<0>(shared_address(&to), from, inside ? 16 : 0);
                    } else {
                        to = Vector<W>{};
                        if (inside) to.load(from);
                    }
                }
        }
        commit_copies();
        g += (long long)STEP * N;
    };
#pragma unroll
    for (int stage = 0; stage < COLUMN_STAGES - 1; ++stage) copy(stage, line + stage * STEP);
    float means[AT_ONCE], rstds[AT_ONCE];
    auto load_statistics = [&](int t) {
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            bool inside = t + i * LINES < T;
            means[i] = inside ? mean[first_row + t + i * LINES] : 0.0f;
            rstds[i] = inside ? rstd[first_row + t + i * LINES] : 0.0f;
        }
    };
    load_statistics(line);
    float p_sums[VECTORS][W], q_sums[VECTORS][W], u[VECTORS][W];
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
#pragma unroll
        for (int e = 0; e < W; ++e) p_sums[v][e] = q_sums[v][e] = u[v][e] = 0.0f;
        if (n + v * LANES * W < N) load_floats(u[v], uv + (long long)b * 2 * N + n + v * LANES * W, true);
    }
    // A warp is at several lines: it ends its loop as one.
    unsigned int stage = 0;
    for (int t = line; t - line < T; t += STEP) {
        float dots[AT_ONCE], r[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) r[i] = -means[i] * rstds[i];
        load_statistics(t + STEP);
        wait_copies<COLUMN_STAGES - 2>();
        // Into the stage of the step before.
        copy((stage + COLUMN_STAGES - 1) % COLUMN_STAGES, t + (COLUMN_STAGES - 1) * STEP);
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            dots[i] = 0.0f;
#pragma unroll
            for (int v = 0; v < VECTORS; ++v) {
                float values[W];
                stages[stage][i][v][threadIdx.x].unpack(values);
#pragma unroll
                for (int e = 0; e < W; ++e) {
                    q_sums[v][e] += values[e];
                    p_sums[v][e] = fmaf(r[i], values[e], p_sums[v][e]);
                    dots[i] = fmaf(values[e], u[v][e], dots[i]);
                }
            }
        }
        float dot = warp_sums<AT_ONCE, LANES / 2>(dots);
        int token = t + lane / (LANES / AT_ONCE) * LINES;
        if (lane % (LANES / AT_ONCE) == 0 && token < T) dr[token] = dot;
        stage = (stage + 1) % COLUMN_STAGES;
    }
    wait_copies<0>();
    __syncthreads();
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        Lanes::store(parts[line][0], p_sums[v], v, lane);
        Lanes::store(parts[line][1], q_sums[v], v, lane);
    }
    __syncthreads();
    int column = blockIdx.x * COLUMNS + threadIdx.x;
    if (column >= N) return;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
        float sum = 0.0f;
#pragma unroll
        for (int l = 0; l < LINES; ++l) sum += parts[l][which][Lanes::of(threadIdx.x)];
        if (which == 1) q[(long long)b * N + column] = sum;
        long long at = ((long long)b * 2 + which) * N + column;
#pragma unroll
        for (int s = 0; s < SPLIT; ++s) {
            elem part = rounded<elem>(sum);
            pq[(long long)s * B * 2 * N + at] = part;
            sum -= to_f32(part);
        }
    }
}

// Adds one to `counter` and gives what it was before. What the block wrote before is seen by those that find it added.
__device__ __forceinline__ unsigned int count_up(unsigned int* counter) {
    unsigned int before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}

template <int W, int ROWS>
__device__ __forceinline__ void normalise_backward(
    elem* dx, float* dshift, float* dscale, float* parts, unsigned int* finished, const elem* dh, const elem* x,
    const int* windows, const float* scale, const float* mean, const float* rstd, const float* dr, int dr_parts,
    const float* inactive_grads, int modulation_stride, int fresh, int B, int T, int C
) {
    constexpr int PIECE = W < 4 ? W : 4, PIECES = W / PIECE;
    __shared__ __align__(16) float shared[2][ROW_THREADS / 32][2 * ROWS];
    __shared__ bool is_last;
    int b = blockIdx.y;
    SampleRows<W, ROWS> rows(windows, b, T, C);
    Window window = rows.window;
    const float* own_scale = scale + (long long)b * modulation_stride;
    bool aligned = is_aligned(own_scale);
    auto load_factor = [&](float(&factor)[W], int c) {
        load_floats(factor, own_scale + c, aligned);
#pragma unroll
        for (int e = 0; e < W; ++e) factor[e] += 1.0f;
        window.mask(factor, c);
    };
    // z and dh of a vector that the thread does not hold.
    auto load_beyond = [&](float(&z)[W], float(&d)[W], long long row, int c) {
        load_trimmed(z, x + row * C, c, window);
        load_trimmed(d, dh + row * C, c, window);
        float mu = mean[row], r = rstd[row];
#pragma unroll
        for (int e = 0; e < W; ++e) z[e] = (z[e] - mu) * r;
    };
    // The block's sums of a vector, in pieces: so are threads next to each other in memory.
    float* own_parts = parts + (long long)b * gridDim.x * 2 * C;
    auto part = [&](int which, int c) { return ((which * PIECES + c % W / PIECE) * (C / W) + c / W) * PIECE; };
    auto store_parts = [&](const float(&scale_sums)[W], const float(&shift_sums)[W], int c) {
        float* to = own_parts + (long long)blockIdx.x * 2 * C;
#pragma unroll
        for (int e = 0; e < W; e += PIECE) {
            float piece[2][PIECE];
#pragma unroll
            for (int i = 0; i < PIECE; ++i) piece[0][i] = scale_sums[e + i], piece[1][i] = shift_sums[e + i];
            store_floats(to + part(0, c + e), piece[0], true);
            store_floats(to + part(1, c + e), piece[1], true);
        }
    };
    float factor[W], scale_sums[W], shift_sums[W];
#pragma unroll
    for (int e = 0; e < W; ++e) factor[e] = scale_sums[e] = shift_sums[e] = 0.0f;
    if (rows.active) load_factor(factor, rows.c);

    int turn = 0;
    const elem *from_x = x + rows.start(T, C), *from_dh = dh + rows.start(T, C);
    elem* to = dx + rows.start(T, C);
    Vector<W> next_xs[ROWS], next_dhs[ROWS];
    rows.load(next_xs, from_x, rows.first, C);
    rows.load(next_dhs, from_dh, rows.first, C);
    for (int t = rows.first; t < rows.end; t += ROWS, turn ^= 1) {
        long long row = (long long)b * T + t;
        int count = min(ROWS, rows.end - t);
        Vector<W> xs[ROWS], dhs[ROWS], befores[ROWS];
#pragma unroll
        for (int i = 0; i < ROWS; ++i) xs[i] = next_xs[i], dhs[i] = next_dhs[i];
        // Under way while these rows are worked on.
        if (!fresh) rows.load(befores, to, t, C);
        from_x += (long long)ROWS * C;
        from_dh += (long long)ROWS * C;
        to += (long long)ROWS * C;
        rows.load(next_xs, from_x, t + ROWS, C);
        rows.load(next_dhs, from_dh, t + ROWS, C);
        float mu[ROWS], r[ROWS], sums[2 * ROWS];  // of dz, then of dz (x - mu) r
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            mu[i] = i < count ? mean[row + i] : 0.0f;
            r[i] = i < count ? rstd[row + i] : 0.0f;
            sums[i] = sums[ROWS + i] = 0.0f;
        }
        if (dr) {
#pragma unroll 1
            for (int p = threadIdx.x; p < dr_parts; p += blockDim.x)
#pragma unroll
                for (int i = 0; i < ROWS; ++i)
                    if (i < count) sums[i] += dr[(long long)p * B * T + row + i];
#pragma unroll
            for (int i = 0; i < ROWS; ++i) sums[ROWS + i] = -mu[i] * sums[i];
        }
        if (rows.active) {
#pragma unroll
            for (int i = 0; i < ROWS; ++i) {
                float centred[W], d[W];
                xs[i].keep(rows.bits);
                dhs[i].keep(rows.bits);
                xs[i].unpack(centred);
                dhs[i].unpack(d);
#pragma unroll
                for (int e = 0; e < W; ++e) {
                    centred[e] -= mu[i];
                    float dz = d[e] * factor[e];
                    sums[i] += dz;
                    sums[ROWS + i] = fmaf(dz, centred[e], sums[ROWS + i]);
                    shift_sums[e] += d[e];
                    scale_sums[e] = fmaf(d[e] * r[i], centred[e], scale_sums[e]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < ROWS; ++i) sums[ROWS + i] *= r[i];
        rows.each_beyond(C, [&](int c) {
            if (!window.meets(c, W)) return;
            float z[W], d[W], own_factor[W];
            load_beyond(z, d, row, c);
            load_factor(own_factor, c);
#pragma unroll
            for (int e = 0; e < W; ++e) {
                float dz = d[e] * own_factor[e];
                sums[0] += dz;
                sums[ROWS] = fmaf(dz, z[e], sums[ROWS]);
            }
        });
        spread(sums, block_sums(sums, shared[turn]) / C);
        if (rows.active) {
#pragma unroll
            for (int i = 0; i < ROWS; ++i) {
                if (i >= count) continue;
                float slope = -r[i] * r[i] * sums[ROWS + i], level = -r[i] * sums[i], values[W], d[W];
                xs[i].unpack(values);
                dhs[i].unpack(d);
#pragma unroll
                for (int e = 0; e < W; ++e)
                    values[e] = fmaf(r[i], d[e] * factor[e], fmaf(slope, values[e] - mu[i], level));
                window.mask(values, rows.c);
                if (!fresh) {
                    float before[W];
                    befores[i].unpack(before);
#pragma unroll
                    for (int e = 0; e < W; ++e) values[e] += before[e];
                }
                Vector<W> result;
                result.pack(values);
                result.store(to + (long long)(i - ROWS) * C);
            }
        } else if (fresh && rows.c < C) {
            for (int i = 0; i < count; ++i) Vector<W>{}.store(to + (long long)(i - ROWS) * C);
        }
        rows.each_beyond(C, [&](int c) {
            elem* own_to = dx + row * C + c;
            if (window.meets(c, W)) {
                float z[W], d[W], own_factor[W];
                load_beyond(z, d, row, c);
                load_factor(own_factor, c);
#pragma unroll
                for (int e = 0; e < W; ++e) z[e] = r[0] * (d[e] * own_factor[e] - sums[0] - z[e] * sums[ROWS]);
                window.mask(z, c);
                add_or_store(own_to, z, fresh);
            } else if (fresh) {
                Vector<W>{}.store(own_to);
            }
        });
    }

    if (rows.active) store_parts(scale_sums, shift_sums, rows.c);
    rows.each_beyond(C, [&](int c) {
        if (!window.meets(c, W)) return;
#pragma unroll
        for (int e = 0; e < W; ++e) scale_sums[e] = shift_sums[e] = 0.0f;
        for (int t = rows.first; t < rows.end; ++t) {
            float z[W], d[W];
            load_beyond(z, d, (long long)b * T + t, c);
#pragma unroll
            for (int e = 0; e < W; ++e) {
                shift_sums[e] += d[e];
                scale_sums[e] = fmaf(d[e], z[e], scale_sums[e]);
            }
        }
        store_parts(scale_sums, shift_sums, c);
    });

    // The last block of a sample adds up the sums of all, in their order.
    __syncthreads();
    if (threadIdx.x == 0) is_last = count_up(finished + b) == gridDim.x - 1;
    __syncthreads();
    if (!is_last) return;
    for (int c = threadIdx.x * PIECE; c < C; c += blockDim.x * PIECE) {
        float sums[2][PIECE];
#pragma unroll
        for (int which = 0; which < 2; ++which)
#pragma unroll
            for (int e = 0; e < PIECE; ++e) sums[which][e] = 0.0f;
        if (window.meets(c / W * W, W)) {
            const float *scales = own_parts + part(0, c), *shifts = own_parts + part(1, c);
#pragma unroll 8
            for (int block = 0; block < gridDim.x; ++block, scales += 2 * C, shifts += 2 * C) {
                float pieces[2][PIECE];
                load_floats(pieces[0], scales, true);
                load_floats(pieces[1], shifts, true);
#pragma unroll
                for (int e = 0; e < PIECE; ++e) sums[0][e] += pieces[0][e], sums[1][e] += pieces[1][e];
            }
        }
#pragma unroll
        for (int which = 0; which < 2; ++which) {
            if (inactive_grads && !window.holds_all(c, PIECE))
                for (int s = 0; s < SPLIT; ++s) {
                    float piece[PIECE];
                    load_floats(piece, inactive_grads + (((long long)s * B + b) * 2 + which) * C + c, true);
#pragma unroll
                    for (int e = 0; e < PIECE; ++e)
                        if (!window.holds(c + e)) sums[which][e] += piece[e];
                }
            float* to = (which ? dshift : dscale) + (long long)b * modulation_stride + c;
            float before[PIECE];
            load_floats(before, to, is_aligned(to));
#pragma unroll
            for (int e = 0; e < PIECE; ++e) sums[which][e] += before[e];
            store_floats(to, sums[which], is_aligned(to));
        }
    }
}
