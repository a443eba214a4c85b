// C = A B on tensor cores: bf16 operands, f32 sums. cp.async fills one of two stages in shared memory while ldmatrix
// and mma.sync work on the other.
//
//   c (M, N) f32  written with =
//   a (M, K), b (K, N) bf16  row-major
//   grid (ceil(N / 64), ceil(M / 64)), block 128; any M; N and K multiples of 8 (16-byte copies)
//
// Four warps, two by two, each 32 x 32 of the block's 64 x 64: 2 x 4 fragments of 16 x 8.

typedef unsigned short bf16;

#define BM 64
#define BN 64
#define BK 32
// Rows are padded by 16 bytes, so that the eight rows of an ldmatrix fall into different banks.
#define AS (BK + 8)
#define BS (BN + 8)

__device__ __forceinline__ unsigned shared_address(const void* p) {
    return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// Copies 16 bytes, or writes 16 zero bytes when `inside` is false.
__device__ __forceinline__ void copy16(bf16* to, const bf16* from, bool inside) {
    const int bytes = inside ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes));
}

__device__ __forceinline__ void load_stage(bf16 (*as)[AS], bf16 (*bs)[BS], const bf16* a, const bf16* b, int row0,
                                           int col0, int k0, int m, int n, int k) {
    for (int i = threadIdx.x; i < BM * BK / 8; i += blockDim.x) {
        const int r = i / (BK / 8), c = i % (BK / 8) * 8;
        const bool inside = row0 + r < m && k0 + c < k;
        copy16(&as[r][c], inside ? a + (row0 + r) * k + k0 + c : a, inside);
    }
    for (int i = threadIdx.x; i < BK * BN / 8; i += blockDim.x) {
        const int r = i / (BN / 8), c = i % (BN / 8) * 8;
        const bool inside = k0 + r < k && col0 + c < n;
        copy16(&bs[r][c], inside ? b + (k0 + r) * n + col0 + c : b, inside);
    }
    asm volatile("cp.async.commit_group;");
}

extern "C" __global__ void __launch_bounds__(128)
    matmul_bf16(float* __restrict__ c, const bf16* __restrict__ a, const bf16* __restrict__ b, int m, int n, int k) {
    __shared__ __align__(16) bf16 as[2][BM][AS];
    __shared__ __align__(16) bf16 bs[2][BK][BS];
    const int row0 = blockIdx.y * BM, col0 = blockIdx.x * BN;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int wrow = warp / 2 * 32, wcol = warp % 2 * 32;
    float acc[2][4][4] = {};

    load_stage(as[0], bs[0], a, b, row0, col0, 0, m, n, k);
    const int steps = (k + BK - 1) / BK;
    for (int step = 0; step < steps; step++) {
        const int now = step % 2;
        if (step + 1 < steps) {
            load_stage(as[1 - now], bs[1 - now], a, b, row0, col0, (step + 1) * BK, m, n, k);
            asm volatile("cp.async.wait_group 1;");
        } else {
            asm volatile("cp.async.wait_group 0;");
        }
        __syncthreads();
#pragma unroll
        for (int kk = 0; kk < BK; kk += 16) {
            unsigned fa[2][4], fb[4][2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const unsigned p = shared_address(&as[now][wrow + i * 16 + lane % 16][kk + lane / 16 * 8]);
                asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                             : "=r"(fa[i][0]), "=r"(fa[i][1]), "=r"(fa[i][2]), "=r"(fa[i][3])
                             : "r"(p));
            }
#pragma unroll
            for (int j = 0; j < 4; j += 2) {
                const unsigned p = shared_address(&bs[now][kk + lane % 16][wcol + j * 8 + lane / 16 * 8]);
                asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                             : "=r"(fb[j][0]), "=r"(fb[j][1]), "=r"(fb[j + 1][0]), "=r"(fb[j + 1][1])
                             : "r"(p));
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    asm volatile(
                        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                        : "+f"(acc[i][j][0]), "+f"(acc[i][j][1]), "+f"(acc[i][j][2]), "+f"(acc[i][j][3])
                        : "r"(fa[i][0]), "r"(fa[i][1]), "r"(fa[i][2]), "r"(fa[i][3]), "r"(fb[j][0]), "r"(fb[j][1]));
                }
            }
        }
        // The next step's copy overwrites the stage that was just read.
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int row = row0 + wrow + i * 16 + lane / 4 + e / 2 * 8;
                const int col = col0 + wcol + j * 8 + lane % 4 * 2 + e % 2;
                if (row < m && col < n) c[row * n + col] = acc[i][j][e];
            }
        }
    }
}
