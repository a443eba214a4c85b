// The kernels of ln_linear that go over rows: a warp a row, or a warp a row of COLUMNS columns.
//
// A row is read from memory once: a lane holds `lane_channels` of its channels in registers. What is beyond that many a lane
// (more than 1280 active channels) is read again for each use.
#pragma once

#include "vector.cuh"

constexpr float EPS = 1e-6f;
constexpr int ROW_WARPS = 4;       // of a block of the kernels with a warp a row
constexpr int FWD_TOKENS = 16;     // of one sample: those of a block, forward
constexpr int BWD_TOKENS = 32;     // and backward
constexpr int COLUMN_WARPS = 8;    // rows at a time in the kernel that sums over all tokens
constexpr int COLUMNS = 256;       // its columns

// Channels of a row in a lane's registers. Rows that cannot be read in vectors are rare: they need not be fast.
constexpr int lane_channels(int w) { return w == 1 ? 8 : 40; }

#ifdef ELEM_BF16
constexpr int SPLIT = 2;  // P and Q are sums of many numbers: as products' operands they are split into high and low halves
#else
constexpr int SPLIT = 1;
#endif

// The vectors of a sample's rows that meet its window: vector i of a lane starts at channel `channel(i)`.
template <int W>
struct WindowVectors {
    static constexpr int HELD = lane_channels(W) / W;
    Window window;
    int first;  // vector of the row
    int count;  // of the warp

    __device__ WindowVectors(const int* windows, int b)
        : window(windows, b), first(window.start / W), count((window.end + W - 1) / W - first) {}
    __device__ bool has(int i) const { return i * 32 + (int)threadIdx.x % 32 < count; }
    __device__ int channel(int i) const { return (first + i * 32 + (int)threadIdx.x % 32) * W; }
    // Sets what a vector holds beyond the window to 0.
    __device__ void trim(Vector<W>& v, int i) const {
        if (window.holds_all(channel(i), W)) return;
        float x[W];
        v.unpack(x);
        window.mask(x, channel(i));
        v.pack(x);
    }
    __device__ void load_trimmed(Vector<W>& v, const elem* row, int i) const {
        v.load(row + channel(i));
        trim(v, i);
    }

    // What goes with the held vectors of all lanes in a sample's f32 vector, plus `plus` and 0 outside of the window, to shared
    // memory by all threads of the block.
    __device__ void stage(float* shared, const float* from, float plus, bool aligned) const {
        typedef LaneColumns<W> Lanes;
        constexpr int PIECE = Lanes::PIECE;
        for (int i = threadIdx.x * PIECE; i < min(count, 32 * HELD) * W; i += 32 * ROW_WARPS * PIECE) {
            float x[PIECE];
            load_floats(x, from + first * W + i, aligned);
#pragma unroll
            for (int e = 0; e < PIECE; ++e) x[e] += plus;
            window.mask(x, first * W + i);
            store_floats(shared + Lanes::of(i), x, true);
        }
    }
};

template <int W>
__device__ __forceinline__ void normalise(
    elem* h, float* mean, float* rstd, elem* inactive, const elem* x, const int* windows, const float* shift,
    const float* scale, int modulation_stride, int T, int C
) {
    typedef WindowVectors<W> Vectors;
    typedef LaneColumns<W> Lanes;
    constexpr int HELD = Vectors::HELD;
    int b = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Vectors vectors(windows, b);
    const float* own_shift = shift + (long long)b * modulation_stride;
    const float* own_scale = scale + (long long)b * modulation_stride;
    bool aligned = is_aligned(own_shift) && is_aligned(own_scale);
    __shared__ __align__(16) float factors[Lanes::floats(HELD)], terms[Lanes::floats(HELD)];
    vectors.stage(factors, own_scale, 1.0f, aligned);
    vectors.stage(terms, own_shift, 0.0f, aligned);
    __syncthreads();

    int end = min(T, ((int)blockIdx.x + 1) * FWD_TOKENS);
    for (int t = blockIdx.x * FWD_TOKENS + warp; t < end; t += ROW_WARPS) {
        int row = b * T + t;
        const elem* from = x + (long long)row * C;
        Vector<W> held[HELD];
#pragma unroll
        for (int i = 0; i < HELD; ++i)
            if (vectors.has(i)) held[i].load(from + vectors.channel(i));
        float sum = 0.0f;
        auto add = [&](const Vector<W>& v) {
            float values[W];
            v.unpack(values);
#pragma unroll
            for (int e = 0; e < W; ++e) sum += values[e];
        };
#pragma unroll
        for (int i = 0; i < HELD; ++i)
            if (vectors.has(i)) {
                vectors.trim(held[i], i);
                add(held[i]);
            }
        for (int i = HELD; vectors.has(i); ++i) {
            Vector<W> v;
            vectors.load_trimmed(v, from, i);
            add(v);
        }
        float mu = warp_sum(sum) / C;
        // The inactive channels are zeros, and differ from the mean by the mean.
        float squares = 0.0f;
        auto add_square = [&](const Vector<W>& v) {
            float values[W];
            v.unpack(values);
#pragma unroll
            for (int e = 0; e < W; ++e) squares = fmaf(values[e] - mu, values[e] - mu, squares);
        };
#pragma unroll
        for (int i = 0; i < HELD; ++i)
            if (vectors.has(i)) add_square(held[i]);
        for (int i = HELD; vectors.has(i); ++i) {
            Vector<W> v;
            vectors.load_trimmed(v, from, i);
            add_square(v);
        }
        float variance = (warp_sum(squares) + (C - vectors.count * W) * mu * mu) / C;
        float r = 1.0f / sqrtf(variance + EPS);
        if (lane == 0) {
            mean[row] = mu;
            rstd[row] = r;
        }
        elem* to = h + (long long)row * C;
        // Where the window ends inside a vector, factor and term are 0 beyond it.
        auto write = [&](const Vector<W>& v, const float(&factor)[W], const float(&term)[W], int i) {
            float values[W];
            v.unpack(values);
#pragma unroll
            for (int e = 0; e < W; ++e) values[e] = fmaf((values[e] - mu) * r, factor[e], term[e]);
            Vector<W> result;
            result.pack(values);
            result.store(to + vectors.channel(i));
        };
#pragma unroll
        for (int i = 0; i < HELD; ++i)
            if (vectors.has(i)) {
                float factor[W], term[W];
                Lanes::load(factor, factors, i, lane);
                Lanes::load(term, terms, i, lane);
                write(held[i], factor, term, i);
            }
        for (int i = HELD; vectors.has(i); ++i) {
            Vector<W> v;
            float factor[W], term[W];
            vectors.load_trimmed(v, from, i);
            load_floats(factor, own_scale + vectors.channel(i), aligned);
            load_floats(term, own_shift + vectors.channel(i), aligned);
#pragma unroll
            for (int e = 0; e < W; ++e) factor[e] += 1.0f;
            vectors.window.mask(factor, vectors.channel(i));
            vectors.window.mask(term, vectors.channel(i));
            write(v, factor, term, i);
        }
        Vector<W> zeros = {};
        for (int i = lane; i < vectors.first; i += 32) zeros.store(to + i * W);
        for (int i = vectors.first + vectors.count + lane; i < C / W; i += 32) zeros.store(to + i * W);
    }
    if (blockIdx.x > 0) return;
    elem* both = inactive + (long long)b * 2 * C;
    for (int c = threadIdx.x * W; c < C; c += 32 * ROW_WARPS * W) {
        float factor[W], term[W];
        load_floats(factor, own_scale + c, aligned);
        load_floats(term, own_shift + c, aligned);
#pragma unroll
        for (int e = 0; e < W; ++e) {
            bool active = vectors.window.holds(c + e);
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
    constexpr int VECTORS = COLUMNS / 32 / W;
    constexpr int AT_ONCE = W > 1 ? W / 2 : 1;  // rows that a warp reads before it goes on
    typedef LaneColumns<W> Lanes;
    __shared__ __align__(16) float parts[COLUMN_WARPS][2][Lanes::floats(VECTORS)];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, b = blockIdx.y;
    float p_sums[VECTORS][W], q_sums[VECTORS][W], u[VECTORS][W];
    int n[VECTORS];
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        n[v] = blockIdx.x * COLUMNS + (v * 32 + lane) * W;
#pragma unroll
        for (int e = 0; e < W; ++e) p_sums[v][e] = q_sums[v][e] = u[v][e] = 0.0f;
        if (n[v] < N) load_floats(u[v], uv + (long long)b * 2 * N + n[v], true);
    }
    for (int first = warp; first < T; first += COLUMN_WARPS * AT_ONCE) {
        Vector<W> held[AT_ONCE][VECTORS];
        float dots[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            int t = first + i * COLUMN_WARPS;
#pragma unroll
            for (int v = 0; v < VECTORS; ++v)
                if (t < T && n[v] < N) held[i][v].load(g + ((long long)b * T + t) * N + n[v]);
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            int t = first + i * COLUMN_WARPS;
            dots[i] = 0.0f;
            if (t >= T) continue;
            float r = -mean[b * T + t] * rstd[b * T + t];
#pragma unroll
            for (int v = 0; v < VECTORS; ++v) {
                if (n[v] >= N) continue;
                float values[W];
                held[i][v].unpack(values);
#pragma unroll
                for (int e = 0; e < W; ++e) {
                    q_sums[v][e] += values[e];
                    p_sums[v][e] = fmaf(r, values[e], p_sums[v][e]);
                    dots[i] = fmaf(values[e], u[v][e], dots[i]);
                }
            }
        }
        float dot = warp_sums<AT_ONCE>(dots);
        int t = first + lane / (32 / AT_ONCE) * COLUMN_WARPS;
        if (lane % (32 / AT_ONCE) == 0 && t < T) dr[((long long)blockIdx.x * B + b) * T + t] = dot;
    }
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        Lanes::store(parts[warp][0], p_sums[v], v, lane);
        Lanes::store(parts[warp][1], q_sums[v], v, lane);
    }
    __syncthreads();
    int column = blockIdx.x * COLUMNS + threadIdx.x;
    if (column >= N) return;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
        float sum = 0.0f;
        for (int w = 0; w < COLUMN_WARPS; ++w) sum += parts[w][which][Lanes::of(threadIdx.x)];
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

template <int W>
__device__ __forceinline__ void normalise_backward(
    elem* dx, float* dshift, float* dscale, float* parts, unsigned int* finished, const elem* dh, const elem* x,
    const int* windows, const float* scale, const float* mean, const float* rstd, const float* dr, int dr_parts,
    const float* inactive_grads, int modulation_stride, int fresh, int B, int T, int C
) {
    typedef WindowVectors<W> Vectors;
    typedef LaneColumns<W> Lanes;
    constexpr int HELD = Vectors::HELD, PIECE = Lanes::PIECE;
    constexpr int GROUP = 32 * W * HELD;  // channels of the warp in registers
    __shared__ __align__(16) float shared[2][Lanes::floats(HELD)];
    __shared__ __align__(16) float factors[Lanes::floats(HELD)];  // 1 + scale, 0 outside of the window
    __shared__ bool is_last;
    int b = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Vectors vectors(windows, b);
    const float* own_scale = scale + (long long)b * modulation_stride;
    bool aligned = is_aligned(own_scale);
    auto load_factor = [&](float(&factor)[W], int c) {
        load_floats(factor, own_scale + c, aligned);
#pragma unroll
        for (int e = 0; e < W; ++e) factor[e] += 1.0f;
        vectors.window.mask(factor, c);
    };
    vectors.stage(factors, own_scale, 1.0f, aligned);
    __syncthreads();
    float scale_sums[HELD][W], shift_sums[HELD][W];
#pragma unroll
    for (int i = 0; i < HELD; ++i)
#pragma unroll
        for (int e = 0; e < W; ++e) scale_sums[i][e] = shift_sums[i][e] = 0.0f;

    int first_token = blockIdx.x * BWD_TOKENS + warp, end = min(T, ((int)blockIdx.x + 1) * BWD_TOKENS);
    for (int t = first_token; t < end; t += ROW_WARPS) {
        int row = b * T + t;
        const elem* own_x = x + (long long)row * C;
        const elem* own_dh = dh + (long long)row * C;
        Vector<W> xs[HELD], dhs[HELD];
#pragma unroll
        for (int i = 0; i < HELD; ++i)
            if (vectors.has(i)) {
                xs[i].load(own_x + vectors.channel(i));
                dhs[i].load(own_dh + vectors.channel(i));
            }
        float mu = mean[row], r = rstd[row], sum = 0.0f, sum_z = 0.0f;
        // z and dh of a vector.
        auto unpack = [&](float(&z)[W], float(&d)[W], const Vector<W>& from_x, const Vector<W>& from_dh) {
            from_x.unpack(z);
            from_dh.unpack(d);
#pragma unroll
            for (int e = 0; e < W; ++e) z[e] = (z[e] - mu) * r;
        };
        auto add = [&](const float(&z)[W], const float(&d)[W], const float(&factor)[W]) {
#pragma unroll
            for (int e = 0; e < W; ++e) {
                float dz = d[e] * factor[e];
                sum += dz;
                sum_z = fmaf(dz, z[e], sum_z);
            }
        };
#pragma unroll
        for (int i = 0; i < HELD; ++i)
            if (vectors.has(i)) {
                float z[W], d[W], factor[W];
                vectors.trim(xs[i], i);
                vectors.trim(dhs[i], i);
                unpack(z, d, xs[i], dhs[i]);
                Lanes::load(factor, factors, i, lane);
                add(z, d, factor);
#pragma unroll
                for (int e = 0; e < W; ++e) {
                    shift_sums[i][e] += d[e];
                    scale_sums[i][e] = fmaf(d[e], z[e], scale_sums[i][e]);
                }
            }
        for (int i = HELD; vectors.has(i); ++i) {
            Vector<W> from_x, from_dh;
            float z[W], d[W], factor[W];
            vectors.load_trimmed(from_x, own_x, i);
            vectors.load_trimmed(from_dh, own_dh, i);
            load_factor(factor, vectors.channel(i));
            unpack(z, d, from_x, from_dh);
            add(z, d, factor);
        }
        if (dr) {
            float own_dr = 0.0f;
            for (int part = lane; part < dr_parts; part += 32) own_dr += dr[(long long)part * B * T + row];
            sum += own_dr;
            sum_z = fmaf(-mu * r, own_dr, sum_z);
        }
        sum = warp_sum(sum) / C;
        sum_z = warp_sum(sum_z) / C;
        elem* to = dx + (long long)row * C;
        auto write = [&](const float(&z)[W], const float(&d)[W], const float(&factor)[W], int i) {
            float values[W];
#pragma unroll
            for (int e = 0; e < W; ++e) values[e] = r * (d[e] * factor[e] - sum - z[e] * sum_z);
            int c = vectors.channel(i);
            vectors.window.mask(values, c);
            add_or_store(to + c, values, fresh);
        };
#pragma unroll
        for (int i = 0; i < HELD; ++i)
            if (vectors.has(i)) {
                float z[W], d[W], factor[W];
                unpack(z, d, xs[i], dhs[i]);
                Lanes::load(factor, factors, i, lane);
                write(z, d, factor, i);
            }
        for (int i = HELD; vectors.has(i); ++i) {
            Vector<W> from_x, from_dh;
            float z[W], d[W], factor[W];
            vectors.load_trimmed(from_x, own_x, i);
            vectors.load_trimmed(from_dh, own_dh, i);
            load_factor(factor, vectors.channel(i));
            unpack(z, d, from_x, from_dh);
            write(z, d, factor, i);
        }
        if (fresh) {
            Vector<W> zeros = {};
            for (int i = lane; i < vectors.first; i += 32) zeros.store(to + i * W);
            for (int i = vectors.first + vectors.count + lane; i < C / W; i += 32) zeros.store(to + i * W);
        }
    }

    // The block's sums: one warp after the other adds its own, the last one writes them.
    int groups = (C + GROUP - 1) / GROUP;
    float* own_parts = parts + (long long)b * gridDim.x * groups * 2 * GROUP;
    for (int group = 0; group < groups; ++group) {
        if (group > 0) {
#pragma unroll
            for (int i = 0; i < HELD; ++i)
#pragma unroll
                for (int e = 0; e < W; ++e) scale_sums[i][e] = shift_sums[i][e] = 0.0f;
            for (int t = first_token; t < end; t += ROW_WARPS) {
                int row = b * T + t;
                float mu = mean[row], r = rstd[row];
#pragma unroll
                for (int i = 0; i < HELD; ++i) {
                    int beyond = group * HELD + i;
                    if (!vectors.has(beyond)) continue;
                    Vector<W> vector;
                    float z[W], d[W];
                    vectors.load_trimmed(vector, x + (long long)row * C, beyond);
                    vector.unpack(z);
                    vectors.load_trimmed(vector, dh + (long long)row * C, beyond);
                    vector.unpack(d);
#pragma unroll
                    for (int e = 0; e < W; ++e) {
                        shift_sums[i][e] += d[e];
                        scale_sums[i][e] = fmaf(d[e], (z[e] - mu) * r, scale_sums[i][e]);
                    }
                }
            }
        }
        for (int turn = 0; turn < ROW_WARPS; ++turn) {
            __syncthreads();
            if (warp != turn) continue;
#pragma unroll
            for (int i = 0; i < HELD; ++i) {
                if (!vectors.has(group * HELD + i)) continue;
                if (turn > 0) {
                    float before[2][W];
                    Lanes::load(before[0], shared[0], i, lane);
                    Lanes::load(before[1], shared[1], i, lane);
#pragma unroll
                    for (int e = 0; e < W; ++e) {
                        scale_sums[i][e] += before[0][e];
                        shift_sums[i][e] += before[1][e];
                    }
                }
                if (turn < ROW_WARPS - 1) {
                    Lanes::store(shared[0], scale_sums[i], i, lane);
                    Lanes::store(shared[1], shift_sums[i], i, lane);
                } else {
                    float* to = own_parts + ((long long)blockIdx.x * groups + group) * 2 * GROUP;
                    Lanes::store_dense(to, scale_sums[i], i, lane);
                    Lanes::store_dense(to + GROUP, shift_sums[i], i, lane);
                }
            }
        }
    }

    // The last block of a sample adds up the sums of all, in their order.
    __syncthreads();
    if (threadIdx.x == 0) is_last = count_up(finished + b) == gridDim.x - 1;
    __syncthreads();
    if (!is_last) return;
    for (int c = threadIdx.x * PIECE; c < C; c += 32 * ROW_WARPS * PIECE) {
        float sums[2][PIECE];
#pragma unroll
        for (int which = 0; which < 2; ++which)
#pragma unroll
            for (int e = 0; e < PIECE; ++e) sums[which][e] = 0.0f;
        if (vectors.window.meets(c, PIECE)) {
            int column = c - vectors.first * W, group = column / GROUP;
            const float* from = own_parts + (long long)group * 2 * GROUP + Lanes::dense(column % GROUP);
            for (int block = 0; block < gridDim.x; ++block, from += (long long)groups * 2 * GROUP)
#pragma unroll
                for (int which = 0; which < 2; ++which) {
                    float part[PIECE];
                    load_floats(part, from + which * GROUP, true);
#pragma unroll
                    for (int e = 0; e < PIECE; ++e) sums[which][e] += part[e];
                }
        }
#pragma unroll
        for (int which = 0; which < 2; ++which) {
            if (inactive_grads && !vectors.window.holds_all(c, PIECE))
                for (int s = 0; s < SPLIT; ++s) {
                    float part[PIECE];
                    load_floats(part, inactive_grads + (((long long)s * B + b) * 2 + which) * C + c, true);
#pragma unroll
                    for (int e = 0; e < PIECE; ++e)
                        if (!vectors.window.holds(c + e)) sums[which][e] += part[e];
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
