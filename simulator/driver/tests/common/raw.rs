//! Memory by address, for tests of calls that cudarc has no safe form of.

use cudarc::driver::sys::{self, CUresult};
use cudarc::driver::{CudaContext, CudaStream};
use std::sync::Arc;

pub const OK: CUresult = CUresult::CUDA_SUCCESS;
pub const INVALID_VALUE: CUresult = CUresult::CUDA_ERROR_INVALID_VALUE;
pub const INVALID_HANDLE: CUresult = CUresult::CUDA_ERROR_INVALID_HANDLE;
pub const NOT_SUPPORTED: CUresult = CUresult::CUDA_ERROR_NOT_SUPPORTED;

/// A context that the thread has, and its default stream.
pub fn setup() -> (Arc<CudaContext>, Arc<CudaStream>) {
    let context = CudaContext::new(0).unwrap();
    context.bind_to_thread().unwrap();
    let stream = context.default_stream();
    (context, stream)
}

/// Device memory by address, freed at the end.
pub struct Buffer(pub u64, pub usize);

impl Buffer {
    pub fn new(bytes: usize) -> Buffer {
        let mut address = 0;
        // SAFETY: `address` outlives the call.
        assert_eq!(unsafe { sys::cuMemAlloc_v2(&mut address, bytes) }, OK);
        Buffer(address, bytes)
    }

    pub fn of(contents: &[u8]) -> Buffer {
        let buffer = Buffer::new(contents.len());
        buffer.write(contents);
        buffer
    }

    pub fn write(&self, contents: &[u8]) {
        // SAFETY: the source has the bytes that are copied.
        assert_eq!(unsafe { sys::cuMemcpyHtoD_v2(self.0, contents.as_ptr().cast(), contents.len()) }, OK);
    }

    pub fn read(&self) -> Vec<u8> {
        read(self.0, self.1)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated in `new`, freed once.
        unsafe { sys::cuMemFree_v2(self.0) };
    }
}

/// Bytes of device memory.
pub fn read(address: u64, bytes: usize) -> Vec<u8> {
    let mut out = vec![0; bytes];
    // SAFETY: the target has room.
    assert_eq!(unsafe { sys::cuMemcpyDtoH_v2(out.as_mut_ptr().cast(), address, bytes) }, OK);
    out
}
