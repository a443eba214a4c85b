//! The memory of a device: taking it, filling it, copying to and from it.

use super::device::{Device, failed};
use super::{Buffer, DType};
use crate::error::{Error, Result};
use cudarc::driver::{CudaSlice, DevicePtr, result, sys};
use rayon::prelude::*;
use std::sync::atomic::Ordering;

/// Numbers that are rounded at a time: all of a large model would take a gigabyte more.
const PIECE: usize = 1 << 24;

/// Numbers that kernels take, as cudarc's slices hold them.
pub trait Element: cudarc::driver::DeviceRepr {
    /// Their type.
    const DTYPE: DType;
}

macro_rules! element {
    ($($number:ty: $dtype:ident)+) => {
        $(impl Element for $number {
            const DTYPE: DType = DType::$dtype;
        })+
    };
}
element!(f32: F32 half::bf16: Bf16 f64: F64 u32: U32 i32: I32);

/// Device memory, freed when dropped.
pub struct Allocation {
    memory: Option<CudaSlice<u8>>, // None on paper
    buffer: Buffer,
}

impl Allocation {
    /// The numbers in it.
    pub fn buffer(&self) -> Buffer {
        self.buffer
    }

    /// cudarc's handle of the memory; None on a device on paper.
    pub fn memory(&self) -> Option<&CudaSlice<u8>> {
        self.memory.as_ref()
    }
}

impl Device {
    /// The numbers of a cudarc slice.
    ///
    /// # Safety
    /// The slice must outlive the last work on the device that is given the buffer, a copy or a part of it, and it counts as
    /// borrowed mutably by work that writes to it.
    ///
    /// # Errors
    /// When the slice belongs to another context.
    pub unsafe fn buffer<T: Element>(&self, slice: &CudaSlice<T>) -> Result<Buffer> {
        match &self.driver {
            Some(driver) if driver.context == *slice.context() => {
                let address = slice.device_ptr(&driver.stream).0;
                Ok(Buffer { address, len: slice.len(), dtype: T::DTYPE })
            }
            _ => Err(Error::usage(format!(
                "the slice of {} numbers belongs to another context than {}",
                slice.len(),
                self.name
            ))),
        }
    }

    /// Free and total bytes of its memory.
    ///
    /// # Errors
    /// When the driver does not tell.
    pub fn memory(&self) -> Result<(usize, usize)> {
        match &self.driver {
            Some(driver) => driver.context.mem_get_info().map_err(|e| failed("tell its memory", e)),
            None => Ok((usize::MAX, usize::MAX)),
        }
    }

    /// Memory for `len` numbers, with arbitrary contents.
    ///
    /// # Errors
    /// When there is not enough memory, and while a graph is captured.
    pub fn alloc(&self, len: usize, dtype: DType) -> Result<Allocation> {
        let bytes = (len * dtype.bytes()).max(1);
        let Some(driver) = &self.driver else {
            let address = self.common.next_address.fetch_add(bytes.next_multiple_of(256), Ordering::Relaxed) as u64;
            return Ok(Allocation { memory: None, buffer: Buffer { address, len, dtype } });
        };
        if self.captures {
            return Err(Error::usage("memory cannot be taken while a graph is captured: it would be that of the graph"));
        }
        // SAFETY: u8 has no invalid values, and nothing is read before a kernel or a copy wrote it: a simulated driver checks.
        let memory = unsafe { driver.stream.alloc::<u8>(bytes) }.map_err(|e| {
            if e.0 != sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                return failed("give memory", e);
            }
            let (free, total) = self.memory().unwrap_or((0, 0));
            let gb = |bytes: usize| bytes as f64 / 1e9;
            Error::Stopped(format!(
                "{} has no {:.2} GB left ({:.2} of {:.2} GB are free): choose a smaller --batch-size or model",
                self.name,
                gb(bytes),
                gb(free),
                gb(total)
            ))
        })?;
        let address = memory.device_ptr(&driver.stream).0;
        Ok(Allocation { memory: Some(memory), buffer: Buffer { address, len, dtype } })
    }

    /// Numbers copied to new memory, rounded to `dtype`.
    ///
    /// # Errors
    /// When there is not enough memory.
    pub fn upload(&self, numbers: &[f32], dtype: DType) -> Result<Allocation> {
        let allocation = self.alloc(numbers.len(), dtype)?;
        self.write(allocation.buffer(), numbers)?;
        Ok(allocation)
    }

    /// Copies numbers into a buffer of f32, bf16 or f64, rounding to its type.
    ///
    /// # Errors
    /// When the sizes differ, or the copy fails.
    pub fn write(&self, to: Buffer, numbers: &[f32]) -> Result<()> {
        if numbers.len() != to.len {
            let what = format!("{} numbers for a buffer of {}", numbers.len(), to.len);
            return Err(Error::Shape { operation: "write", what });
        }
        match to.dtype {
            DType::F32 => self.write_bytes(to, bytemuck::cast_slice(numbers)),
            DType::Bf16 => {
                let mut rounded: Vec<u16> = Vec::new();
                for (i, numbers) in numbers.chunks(PIECE).enumerate() {
                    numbers.par_iter().map(|&x| half::bf16::from_f32(x).to_bits()).collect_into_vec(&mut rounded);
                    let place = to.slice(i * PIECE..i * PIECE + numbers.len());
                    self.write_bytes(place, bytemuck::cast_slice(&rounded))?;
                }
                Ok(())
            }
            DType::F64 => {
                let wide: Vec<f64> = numbers.iter().map(|&x| f64::from(x)).collect();
                self.write_bytes(to, bytemuck::cast_slice(&wide))
            }
            DType::U32 | DType::I32 => {
                Err(Error::Shape { operation: "write", what: "floats cannot be written to integers".into() })
            }
        }
    }

    /// Copies bytes into a buffer of that many bytes, before it returns.
    ///
    /// # Errors
    /// When the sizes differ, or the copy or any work before it failed.
    pub fn write_bytes(&self, to: Buffer, bytes: &[u8]) -> Result<()> {
        // SAFETY: waited for before the borrow of `bytes` ends.
        unsafe { self.write_bytes_later(to, bytes) }?;
        self.synchronize()
    }

    /// Copies bytes into a buffer of that many bytes, in the order of the stream.
    ///
    /// # Safety
    /// They must stay as they are until the stream has done it.
    ///
    /// # Errors
    /// When the sizes differ, or the copy fails.
    pub(crate) unsafe fn write_bytes_later(&self, to: Buffer, bytes: &[u8]) -> Result<()> {
        if bytes.len() != to.len * to.dtype.bytes() {
            let what = format!("{} bytes for {} numbers of {:?}", bytes.len(), to.len, to.dtype);
            return Err(Error::Shape { operation: "write", what });
        }
        let Some(driver) = self.running()?.filter(|_| !bytes.is_empty()) else { return Ok(()) };
        // SAFETY: the buffer holds that many bytes, and the caller answers for when they are read.
        unsafe { result::memcpy_htod_async(to.address, bytes, driver.stream.cu_stream()) }
            .map_err(|e| failed("take numbers", e))
    }

    /// New memory with these unsigned integers.
    ///
    /// # Errors
    /// When there is not enough memory.
    pub fn upload_u32(&self, numbers: &[u32]) -> Result<Allocation> {
        let allocation = self.alloc(numbers.len(), DType::U32)?;
        self.write_bytes(allocation.buffer(), bytemuck::cast_slice(numbers))?;
        Ok(allocation)
    }

    /// Waits for all work and copies the numbers of a buffer of floats.
    ///
    /// # Errors
    /// When the copy or any work before it failed.
    pub fn download(&self, from: Buffer) -> Result<Vec<f32>> {
        let mut bytes = vec![0u8; from.len * from.dtype.bytes()];
        self.read_bytes(&mut bytes, from)?;
        Ok(match from.dtype {
            DType::F32 => bytemuck::pod_collect_to_vec(&bytes),
            DType::Bf16 => bytemuck::pod_collect_to_vec::<u8, u16>(&bytes)
                .into_iter()
                .map(|bits| half::bf16::from_bits(bits).to_f32())
                .collect(),
            DType::F64 => bytemuck::pod_collect_to_vec::<u8, f64>(&bytes).into_iter().map(|x| x as f32).collect(),
            DType::U32 => bytemuck::pod_collect_to_vec::<u8, u32>(&bytes).into_iter().map(|x| x as f32).collect(),
            DType::I32 => bytemuck::pod_collect_to_vec::<u8, i32>(&bytes).into_iter().map(|x| x as f32).collect(),
        })
    }

    /// Waits for all work and copies the bytes of a buffer.
    ///
    /// # Errors
    /// When the sizes differ, or the copy or any work before it failed.
    pub fn read_bytes(&self, to: &mut [u8], from: Buffer) -> Result<()> {
        if to.len() != from.len * from.dtype.bytes() {
            let what = format!("{} bytes for {} numbers of {:?}", to.len(), from.len, from.dtype);
            return Err(Error::Shape { operation: "read", what });
        }
        let Some(driver) = self.running()?.filter(|_| !to.is_empty()) else { return Ok(()) };
        // SAFETY: both sides have that many bytes, and the stream is waited for before `to` is used.
        unsafe { result::memcpy_dtoh_async(to, from.address, driver.stream.cu_stream()) }
            .map_err(|e| failed("give numbers", e))?;
        self.synchronize()
    }

    /// Copies a buffer to another of its size and type.
    ///
    /// # Errors
    /// When they differ, or the copy fails.
    pub fn copy(&self, to: Buffer, from: Buffer) -> Result<()> {
        if (to.len, to.dtype) != (from.len, from.dtype) {
            let what = format!("{} numbers of {:?} to {} of {:?}", from.len, from.dtype, to.len, to.dtype);
            return Err(Error::Shape { operation: "copy", what });
        }
        let Some(driver) = self.running()?.filter(|_| to.len > 0) else { return Ok(()) };
        // SAFETY: both buffers hold that many bytes.
        unsafe {
            result::memcpy_dtod_async(to.address, from.address, to.len * to.dtype.bytes(), driver.stream.cu_stream())
        }
        .map_err(|e| failed("copy", e))
    }

    /// Sets every byte of a buffer.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn fill_bytes(&self, to: Buffer, byte: u8) -> Result<()> {
        let Some(driver) = self.running()?.filter(|_| to.len > 0) else { return Ok(()) };
        // SAFETY: the buffer holds that many bytes.
        unsafe { result::memset_d8_async(to.address, byte, to.len * to.dtype.bytes(), driver.stream.cu_stream()) }
            .map_err(|e| failed("fill memory", e))
    }
}
