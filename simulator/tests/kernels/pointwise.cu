// Small kernels for the driver's tests.

extern "C" __global__ void scale_add(float* y, const float* x, float scale, float add, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = x[i] * scale + add;
}

// Takes parameters of every size, with gaps between them; y has room for six.
extern "C" __global__ void parameters(double* y, unsigned char a, short b, int c, long long d, float e, double f) {
    y[0] = a;
    y[1] = b;
    y[2] = c;
    y[3] = (double)d;
    y[4] = e;
    y[5] = f;
}

__constant__ float table[4];

// y (n) = the dynamic shared memory's reversed copy of x, times table[0]; block n
extern "C" __global__ void reverse(float* y, const float* x) {
    extern __shared__ float row[];
    row[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = row[blockDim.x - 1 - threadIdx.x] * table[0];
}
