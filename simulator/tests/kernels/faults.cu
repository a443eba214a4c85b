// One kernel for each class of fault: wrong with -DFAULTY=1, right with -DFAULTY=0.
//
//   y (n), x (n); grid 2, block 64, n = 128 - and `stop` a word that is never zero

extern "C" __global__ void out_of_bounds(float* y, const float* x, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = x[FAULTY ? i + 1 : i];
}

extern "C" __global__ void out_of_bounds_shared(float* y, const float* x, int n) {
    __shared__ float row[64];
    row[threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x];
    __syncthreads();
    y[blockIdx.x * 64 + threadIdx.x] = row[threadIdx.x + (FAULTY ? n : 0) - (FAULTY ? 64 : 0)];
}

extern "C" __global__ void misaligned(float* y, const float* x, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    const char* p = (const char*)x + (FAULTY && i > 0 ? i * 4 - 2 : i * 4);
    y[i] = *(const float*)p;
}

extern "C" __global__ void uninitialised_global(float* y, const float* x, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    // Nobody wrote y.
    y[i] = FAULTY ? y[i] + x[i] : x[i];
}

extern "C" __global__ void uninitialised_shared(float* y, const float* x, int n) {
    __shared__ float row[64];
    if (!FAULTY || threadIdx.x != 5) row[threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x];
    __syncthreads();
    y[blockIdx.x * 64 + threadIdx.x] = row[threadIdx.x];
}

extern "C" __global__ void uninitialised_local(float* y, const float* x, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    float mine[8];
    for (int j = FAULTY ? 1 : 0; j < 8; j++) mine[j * n / 128] = x[i];
    // A copy alone is no fault: compilers copy what they never use.
    y[i] = mine[i * n / 128 % 8] * (n / 128);
}

extern "C" __global__ void race_shared(float* y, const float* x, int n) {
    __shared__ float row[64];
    row[threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x];
#if !FAULTY
    __syncthreads();
#endif
    y[blockIdx.x * 64 + threadIdx.x] = row[63 - threadIdx.x];
}

extern "C" __global__ void race_global(float* y, const float* x, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = x[i];
    __syncthreads();
#if FAULTY
    if (threadIdx.x == 0) y[0] += x[i];
#else
    if (threadIdx.x == 0 && blockIdx.x == 0) y[0] += x[i];
#endif
}

extern "C" __global__ void barrier_divergence(float* y, const float* x, int n) {
    __shared__ float row[64];
    row[threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x];
    // Half of each warp takes another barrier.
    if (FAULTY && threadIdx.x % 2 == 0) {
        __syncthreads();
        row[threadIdx.x] += 1.0f;
    } else {
        __syncthreads();
    }
    y[blockIdx.x * 64 + threadIdx.x] = row[threadIdx.x];
}

extern "C" __global__ void async_copy(float* y, const float* x, int n) {
    __shared__ __align__(16) float row[64];
    if (threadIdx.x < 16) {
        const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(&row[threadIdx.x * 4]));
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(x + blockIdx.x * 64 + threadIdx.x * 4));
        asm volatile("cp.async.commit_group;");
#if !FAULTY
        asm volatile("cp.async.wait_group 0;" ::: "memory");
#endif
    }
    __syncthreads();
    y[blockIdx.x * 64 + threadIdx.x] = row[threadIdx.x];
}

extern "C" __global__ void endless(float* y, const float* x, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = x[i];
    int left = 100;
    while (FAULTY ? ((volatile float*)y)[i] == x[i] : left > 0) left--;
}

extern "C" __global__ void trap(float* y, const float* x, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (FAULTY && i == 7) asm volatile("trap;");
    y[i] = x[i];
}

extern "C" __global__ void out_of_bounds_local(float* y, const float* x, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    float mine[8];
    for (int j = 0; j < 8; j++) mine[j * n / 128] = x[i];
    // Eight floats, but the ninth lies outside.
    y[i] = mine[FAULTY ? 8 * n / 128 : 7 * n / 128];
}

extern "C" __global__ void misaligned_shared(float* y, const float* x, int n) {
    __shared__ __align__(16) float row[68];
    row[threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x];
    if (threadIdx.x < 4) row[64 + threadIdx.x] = 0.0f;
    __syncthreads();
    const float* four = row + threadIdx.x / 4 * 4 + (FAULTY ? n / 128 : 0);
    float v[4];
    const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(four));
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3]) : "r"(at) : "memory");
    const int k = threadIdx.x % 4;
    y[blockIdx.x * 64 + threadIdx.x] = k == 0 ? v[0] : k == 1 ? v[1] : k == 2 ? v[2] : v[3];
}

// Lanes of a warp exchange through shared memory: they run in step only where they are told to.
extern "C" __global__ void warp_hazard(float* y, const float* x, int n) {
    __shared__ float row[64];
    row[threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x];
#if !FAULTY
    __syncwarp();
#endif
    y[blockIdx.x * 64 + threadIdx.x] = row[threadIdx.x ^ 1];
}

// The same buffer for the next step: reading it must be over before it is written again.
extern "C" __global__ void race_shared_reuse(float* y, const float* x, int n) {
    __shared__ float row[64];
    float sum = 0.0f;
    for (int step = 0; step < 2; step++) {
        row[threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x] * (step + 1);
        __syncthreads();
        sum = row[63 - threadIdx.x] - sum;
#if !FAULTY
        __syncthreads();
#endif
    }
    y[blockIdx.x * 64 + threadIdx.x] = sum;
}

// Two warps come to two barriers, each to the other's second one first.
extern "C" __global__ void deadlock(float* y, const float* x, int n) {
    const bool swapped = FAULTY && threadIdx.x >= 32;
    asm volatile("bar.sync %0, 64;" ::"r"(swapped ? 2 : 1) : "memory");
    asm volatile("bar.sync %0, 64;" ::"r"(swapped ? 1 : 2) : "memory");
    y[blockIdx.x * 64 + threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x];
}

// One warp waits at a barrier for another that waits for what comes after the barrier.
extern "C" __global__ void waits_for_ever(float* y, const float* x, int n) {
    __shared__ int flag;
    if (threadIdx.x == 0) flag = 0;
    __syncthreads();
    if (threadIdx.x >= 32) {
#if FAULTY
        __syncthreads();
        atomicExch(&flag, 1);
#else
        atomicExch(&flag, 1);
        __syncthreads();
#endif
    } else {
        while (atomicAdd(&flag, 0) == 0) {}
        __syncthreads();
    }
    y[blockIdx.x * 64 + threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x];
}

// A barrier that expects more threads than the block has.
extern "C" __global__ void barrier_too_large(float* y, const float* x, int n) {
    const int count = FAULTY ? n : 64;
    asm volatile("bar.sync 1, %0;" ::"r"(count) : "memory");
    y[blockIdx.x * 64 + threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x];
}

// Two copies in flight: the wait for all but one leaves the second out.
extern "C" __global__ void async_copy_groups(float* y, const float* x, int n) {
    __shared__ __align__(16) float row[64];
    const float* from = x + blockIdx.x * 64 + threadIdx.x % 8 * 4;
    const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(&row[threadIdx.x % 8 * 4]));
    for (int half = 0; half < 2; half++) {
        if (threadIdx.x < 8)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + half * 128), "l"(from + half * 32));
        asm volatile("cp.async.commit_group;");
    }
#if FAULTY
    asm volatile("cp.async.wait_group 1;" ::: "memory");
#else
    asm volatile("cp.async.wait_group 0;" ::: "memory");
#endif
    __syncthreads();
    y[blockIdx.x * 64 + threadIdx.x] = row[threadIdx.x];
}

__device__ int mutex;
__device__ float total;

// y[0] = the sum of both blocks' first numbers, added under a lock; the others are copies.
extern "C" __global__ void lock(float* y, const float* x, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i != 0) y[i] = x[i];
    if (threadIdx.x == 0) {
        while (atomicCAS(&mutex, 0, 1) != 0) {}
#if !FAULTY
        __threadfence();
#endif
        total += x[i];
        y[0] = total;
#if !FAULTY
        __threadfence();
#endif
        atomicExch(&mutex, 0);
    }
}

__device__ unsigned finished;
__device__ float partial[2];

// y[0] = the sum of both blocks' sums, by whichever block finishes last; the others are copies.
extern "C" __global__ void last_block(float* y, const float* x, int n) {
    __shared__ bool last;
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i != 0) y[i] = x[i];
    if (threadIdx.x == 0) {
        float sum = 0.0f;
        for (int j = 0; j < 64; j++) sum += x[i + j];
        partial[blockIdx.x] = sum;
#if !FAULTY
        __threadfence();
#endif
        last = atomicInc(&finished, 1) == 1;
    }
    __syncthreads();
    if (last && threadIdx.x == 0) {
#if !FAULTY
        __threadfence();
#endif
        y[0] = partial[0] + partial[1];
    }
}

__device__ int ready;
__device__ float mailbox[64];

// The second block gets the first one's numbers, released by one thread and acquired by one.
extern "C" __global__ void release_acquire(float* y, const float* x, int n) {
    const int t = threadIdx.x;
    if (blockIdx.x == 0) {
        mailbox[t] = x[t];
        y[t] = x[t];
        __syncthreads();
        if (t == 0) {
#if FAULTY
            asm volatile("st.relaxed.gpu.global.u32 [%0], 1;" ::"l"(__cvta_generic_to_global(&ready)) : "memory");
#else
            asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(__cvta_generic_to_global(&ready)) : "memory");
#endif
        }
    } else {
        if (t == 0) {
            int seen = 0;
            while (!seen)
                asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(__cvta_generic_to_global(&ready)) : "memory");
        }
        __syncthreads();
        y[64 + t] = mailbox[t];
    }
}
