// Rows read and written 16 bytes a lane.
//
//   W   elements of a vector: WIDTH where rows consist of whole vectors, else 1
//
// Windows start anywhere: kernels read the vectors that meet a window, and take what these hold beyond it as 0.
#pragma once

#include "common.cuh"

constexpr int WIDTH = ELEMS_16B;

// W elements as they lie in memory. As `bits`, those to `keep` have all bits set and the others none.
template <int W>
struct Vector;

__device__ __forceinline__ void set_all_bits(float& x, bool set) { x = __uint_as_float(set ? 0xffffffffu : 0); }
__device__ __forceinline__ void set_all_bits(bf16& x, bool set) { x.bits = set ? 0xffff : 0; }
__device__ __forceinline__ void keep_bits(float& x, float bits) {
    x = __uint_as_float(__float_as_uint(x) & __float_as_uint(bits));
}
__device__ __forceinline__ void keep_bits(bf16& x, bf16 bits) { x.bits &= bits.bits; }

template <>
struct Vector<1> {
    static constexpr int COUNT = 1;
    elem word;

    __device__ void load(const elem* from) { word = *from; }
    __device__ void store(elem* to) const { *to = word; }
    __device__ void unpack(float (&x)[1]) const { x[0] = to_f32(word); }
    __device__ void pack(const float (&x)[1]) { from_f32(word, x[0]); }
    template <typename Holds>
    __device__ void set_bits(Holds holds) {
        set_all_bits(word, holds(0));
    }
    __device__ void keep(const Vector& bits) { keep_bits(word, bits.word); }
};

#ifdef ELEM_BF16

template <>
struct Vector<8> {
    static constexpr int COUNT = 8;
    uint4 words;

    __device__ void load(const elem* from) { words = *(const uint4*)from; }
    __device__ void store(elem* to) const { *(uint4*)to = words; }
    __device__ void unpack(float (&x)[8]) const {
        const unsigned int pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            x[2 * i] = low_bf16(pairs[i]);
            x[2 * i + 1] = high_bf16(pairs[i]);
        }
    }
    __device__ void pack(const float (&x)[8]) {
        words = make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7]));
    }
    template <typename Holds>
    __device__ void set_bits(Holds holds) {
        auto pair = [&](int e) {
            unsigned int both = (holds(e) ? 0xffffu : 0) | (holds(e + 1) ? 0xffff0000u : 0);
            asm volatile("" : "+r"(both));  // "changed", so that it is not computed again for each use
            return both;
        };
        words = make_uint4(pair(0), pair(2), pair(4), pair(6));
    }
    __device__ void keep(const Vector& bits) {
        words.x &= bits.words.x, words.y &= bits.words.y, words.z &= bits.words.z, words.w &= bits.words.w;
    }
};

#else

template <>
struct Vector<4> {
    static constexpr int COUNT = 4;
    float4 words;

    __device__ void load(const elem* from) { words = *(const float4*)from; }
    __device__ void store(elem* to) const { *(float4*)to = words; }
    __device__ void unpack(float (&x)[4]) const { x[0] = words.x, x[1] = words.y, x[2] = words.z, x[3] = words.w; }
    __device__ void pack(const float (&x)[4]) { words = make_float4(x[0], x[1], x[2], x[3]); }
    template <typename Holds>
    __device__ void set_bits(Holds holds) {
        set_all_bits(words.x, holds(0)), set_all_bits(words.y, holds(1));
        set_all_bits(words.z, holds(2)), set_all_bits(words.w, holds(3));
    }
    __device__ void keep(const Vector& bits) {
        keep_bits(words.x, bits.words.x), keep_bits(words.y, bits.words.y);
        keep_bits(words.z, bits.words.z), keep_bits(words.w, bits.words.w);
    }
};

#endif

// to = x, or to += x.
template <int W>
__device__ __forceinline__ void add_or_store(elem* to, float (&x)[W], bool fresh) {
    Vector<W> vector;
    if (!fresh) {
        float before[W];
        vector.load(to);
        vector.unpack(before);
#pragma unroll
        for (int e = 0; e < W; ++e) x[e] += before[e];
    }
    vector.pack(x);
    vector.store(to);
}

// Whether rows of `length` elements consist of whole vectors. In bf16 the launcher has checked it.
__device__ __forceinline__ constexpr bool are_vectors(int length) {
#ifdef ELEM_BF16
    return true;
#else
    return length % WIDTH == 0;
#endif
}

// Calls `body` with the vector to use: of WIDTH elements, or of one.
template <typename Body>
__device__ __forceinline__ void by_width(bool whole, Body body) {
    if (whole) body(Vector<WIDTH>{});
    else body(Vector<1>{});
}

// The channels of a sample that are active.
struct Window {
    int start;
    int end;

    __device__ Window(int start, int end) : start(start), end(end) {}
    __device__ Window(const int* windows, int b) : start(windows[2 * b]), end(start + windows[2 * b + 1]) {}
    __device__ bool holds(int c) const { return c >= start && c < end; }
    // The vector of `count` channels from c on: whether some, or all of them are active.
    __device__ bool meets(int c, int count) const { return c < end && c + count > start; }
    __device__ bool holds_all(int c, int count) const { return c >= start && c + count <= end; }

    // x as a vector from channel c on, 0 outside of the window.
    template <int W>
    __device__ void mask(float (&x)[W], int c) const {
        if (holds_all(c, W)) return;
#pragma unroll
        for (int e = 0; e < W; ++e)
            if (!holds(c + e)) x[e] = 0.0f;
    }
};

// Whether 16 bytes can be read at a time from there on.
__device__ __forceinline__ bool is_aligned(const void* pointer) { return ((unsigned long long)pointer & 15) == 0; }

// N floats from `from` on, four at a time where `aligned` says so.
template <int N>
__device__ __forceinline__ void load_floats(float (&x)[N], const float* from, bool aligned) {
    if (N % 4 == 0 && aligned) {
#pragma unroll
        for (int e = 0; e + 3 < N; e += 4) {
            float4 four = *(const float4*)(from + e);
            x[e] = four.x, x[e + 1] = four.y, x[e + 2] = four.z, x[e + 3] = four.w;
        }
    } else {
#pragma unroll
        for (int e = 0; e < N; ++e) x[e] = from[e];
    }
}

template <int N>
__device__ __forceinline__ void store_floats(float* to, const float (&x)[N], bool aligned) {
    if (N % 4 == 0 && aligned) {
#pragma unroll
        for (int e = 0; e + 3 < N; e += 4) *(float4*)(to + e) = make_float4(x[e], x[e + 1], x[e + 2], x[e + 3]);
    } else {
#pragma unroll
        for (int e = 0; e < N; ++e) to[e] = x[e];
    }
}

// Sums COUNT numbers (a power of two) over the lanes of a warp: lane i gets the sum of x[i / (32 / COUNT)]. Of two lanes that are
// APART the lower one goes on with the first half of the numbers, the upper one with the others.
template <int COUNT, int APART = 16, int N>
__device__ __forceinline__ float warp_sums(float (&x)[N]) {
    if constexpr (APART == 0) {
        return x[0];
    } else if constexpr (COUNT == 1) {
        x[0] += __shfl_xor_sync(0xffffffffu, x[0], APART);
        return warp_sums<1, APART / 2>(x);
    } else {
        bool upper = threadIdx.x & APART;
#pragma unroll
        for (int i = 0; i < COUNT / 2; ++i) {
            float given = upper ? x[i] : x[i + COUNT / 2], kept = upper ? x[i + COUNT / 2] : x[i];
            x[i] = kept + __shfl_xor_sync(0xffffffffu, given, APART);
        }
        return warp_sums<COUNT / 2, APART / 2>(x);
    }
}

// Numbers by column, W columns a lane and vector, in shared memory: four columns of a lane at a time, so that no two lanes of a
// quarter warp use the same banks. LANES lanes share a row.
template <int W, int LANES = 32>
struct LaneColumns {
    static constexpr int PIECE = W < 4 ? W : 4;
    static constexpr int PIECES = W / PIECE;                              // of a vector
    static constexpr int STRIDE = LANES * PIECE + (PIECES > 1 ? 16 : 0);  // from piece to piece

    // Floats of `vectors` vectors of each lane.
    static constexpr int floats(int vectors) { return vectors * PIECES * STRIDE; }

    __device__ static void store(float* shared, const float (&x)[W], int vector, int lane) {
#pragma unroll
        for (int p = 0; p < PIECES; ++p) {
            float piece[PIECE];
#pragma unroll
            for (int e = 0; e < PIECE; ++e) piece[e] = x[p * PIECE + e];
            store_floats(shared + (vector * PIECES + p) * STRIDE + lane * PIECE, piece, true);
        }
    }

    __device__ static void load(float (&x)[W], const float* shared, int vector, int lane) {
#pragma unroll
        for (int p = 0; p < PIECES; ++p) {
            float piece[PIECE];
            load_floats(piece, shared + (vector * PIECES + p) * STRIDE + lane * PIECE, true);
#pragma unroll
            for (int e = 0; e < PIECE; ++e) x[p * PIECE + e] = piece[e];
        }
    }

    // Where `column` of those of the row lies.
    __device__ static int of(int column) {
        int vector = column / (LANES * W), lane = column / W % LANES, e = column % W;
        return (vector * PIECES + e / PIECE) * STRIDE + lane * PIECE + e % PIECE;
    }
};
