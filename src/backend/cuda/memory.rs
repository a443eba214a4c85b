//! The memory of a device: taking it, filling it, copying to and from it.

use super::device::{Device, bind, failed};
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

/// Device memory, freed when dropped, in the order of the stream of the device that gave it.
pub struct Allocation {
    memory: Option<CudaSlice<u8>>, // None on paper
    buffer: Buffer,
}

impl Allocation {
    /// The numbers in it; it does not hold the memory.
    pub fn buffer(&self) -> Buffer {
        self.buffer
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // cudarc frees on whatever thread this is, without binding the context to it.
        if let Some(memory) = &self.memory {
            memory.context().record_err(bind(memory.context()));
        }
    }
}

impl Device {
    /// The numbers of a cudarc slice. It does not hold the slice, which counts as borrowed, mutably where something is written, by work
    /// that is given them.
    ///
    /// # Errors
    /// When the slice belongs to another context.
    pub fn buffer<T: Element>(&self, slice: &CudaSlice<T>) -> Result<Buffer> {
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

    /// The numbers of an allocation that only work on this device's stream uses, and that is freed there.
    pub(crate) fn own(&self, allocation: &Allocation) -> Result<Buffer> {
        let is_own = match (&self.driver, &allocation.memory) {
            (Some(driver), Some(memory)) => driver.stream == *memory.stream(),
            (Some(_), None) => false,
            (None, _) => true,
        };
        match is_own {
            true => Ok(allocation.buffer),
            false => {
                Err(Error::usage(format!("the memory of {} numbers is not that of this device", allocation.buffer.len)))
            }
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
        let gb = |bytes: usize| bytes as f64 / 1e9;
        let none_left = |bytes: usize| {
            let (free, total) = self.memory().unwrap_or((0, 0));
            Error::Stopped(format!(
                "{} has no {:.2} GB left ({:.2} of {:.2} GB are free): choose a smaller --batch-size or model",
                self.name,
                gb(bytes),
                gb(free),
                gb(total)
            ))
        };
        let Some(bytes) = len.checked_mul(dtype.bytes()).map(|bytes| bytes.max(1)) else {
            return Err(none_left(usize::MAX));
        };
        let Some(driver) = &self.driver else {
            let address = self.common.next_address.fetch_add(bytes.next_multiple_of(256), Ordering::Relaxed) as u64;
            return Ok(Allocation { memory: None, buffer: Buffer { address, len, dtype } });
        };
        if self.captures {
            return Err(Error::usage(
                "memory cannot be taken while a graph is captured: it would be that of the graph",
            ));
        }
        // SAFETY: u8 has no invalid values, and nothing is read before a kernel or a copy wrote it: a simulated driver checks.
        let memory = unsafe { driver.stream.alloc::<u8>(bytes) }.map_err(|e| match e.0 {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => none_left(bytes),
            _ => failed("give memory", e),
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
        self.write(&allocation, numbers)?;
        Ok(allocation)
    }

    /// Copies numbers into memory of f32, bf16 or f64, rounding to its type.
    ///
    /// # Errors
    /// When the sizes differ, the memory is another device's, or the copy fails.
    pub fn write(&self, to: &Allocation, numbers: &[f32]) -> Result<()> {
        let to = self.own(to)?;
        if numbers.len() != to.len {
            let what = format!("{} numbers for a buffer of {}", numbers.len(), to.len);
            return Err(Error::Shape { operation: "write", what });
        }
        // SAFETY: all of an allocation of this device, or a part of it.
        let write = |to: Buffer, bytes: &[u8]| unsafe { self.write_buffer(to, bytes) };
        match to.dtype {
            DType::F32 => write(to, bytemuck::cast_slice(numbers)),
            DType::Bf16 => {
                let mut rounded: Vec<u16> = Vec::new();
                for (i, numbers) in numbers.chunks(PIECE).enumerate() {
                    numbers.par_iter().map(|&x| half::bf16::from_f32(x).to_bits()).collect_into_vec(&mut rounded);
                    let place = to.slice(i * PIECE..i * PIECE + numbers.len());
                    write(place, bytemuck::cast_slice(&rounded))?;
                }
                Ok(())
            }
            DType::F64 => {
                let wide: Vec<f64> = numbers.iter().map(|&x| f64::from(x)).collect();
                write(to, bytemuck::cast_slice(&wide))
            }
            DType::U32 | DType::I32 => {
                Err(Error::Shape { operation: "write", what: "floats cannot be written to integers".into() })
            }
        }
    }

    /// Copies bytes into memory of that many bytes, before it returns.
    ///
    /// # Errors
    /// When the sizes differ, the memory is another device's, or the copy or any work before it failed.
    pub fn write_bytes(&self, to: &Allocation, bytes: &[u8]) -> Result<()> {
        // SAFETY: all of an allocation of this device.
        unsafe { self.write_buffer(self.own(to)?, bytes) }
    }

    /// [`Device::write_bytes`] at a buffer.
    ///
    /// # Safety
    /// The buffer is as [`Buffer`] says.
    unsafe fn write_buffer(&self, to: Buffer, bytes: &[u8]) -> Result<()> {
        // SAFETY: the caller answers for the buffer; the copy is waited for before the borrow of `bytes` ends.
        let copied = unsafe { self.write_buffer_later(to, bytes) };
        self.synchronize().and(copied)
    }

    /// Copies bytes into a buffer of that many bytes, in the order of the stream.
    ///
    /// # Safety
    /// The buffer is as [`Buffer`] says, and the bytes stay as they are until the stream has done it.
    ///
    /// # Errors
    /// When the sizes differ, or the copy fails.
    pub(crate) unsafe fn write_buffer_later(&self, to: Buffer, bytes: &[u8]) -> Result<()> {
        if bytes.len() != to.len * to.dtype.bytes() {
            let what = format!("{} bytes for {} numbers of {:?}", bytes.len(), to.len, to.dtype);
            return Err(Error::Shape { operation: "write", what });
        }
        let Some(driver) = self.running()?.filter(|_| !bytes.is_empty()) else { return Ok(()) };
        // SAFETY: both sides have that many bytes, and the caller answers for how long.
        unsafe { result::memcpy_htod_async(to.address, bytes, driver.stream.cu_stream()) }
            .map_err(|e| failed("take numbers", e))
    }

    /// New memory with these unsigned integers.
    ///
    /// # Errors
    /// When there is not enough memory.
    pub fn upload_u32(&self, numbers: &[u32]) -> Result<Allocation> {
        let allocation = self.alloc(numbers.len(), DType::U32)?;
        self.write_bytes(&allocation, bytemuck::cast_slice(numbers))?;
        Ok(allocation)
    }

    /// Waits for all work and copies numbers to main memory.
    ///
    /// # Errors
    /// When the memory is another device's, or the copy or any work before it failed.
    pub fn download(&self, from: &Allocation) -> Result<Vec<f32>> {
        // SAFETY: all of an allocation of this device.
        unsafe { self.download_buffer(self.own(from)?) }
    }

    /// [`Device::download`] from a buffer.
    ///
    /// # Safety
    /// The buffer is as [`Buffer`] says.
    pub(crate) unsafe fn download_buffer(&self, from: Buffer) -> Result<Vec<f32>> {
        let mut bytes = vec![0u8; from.len * from.dtype.bytes()];
        // SAFETY: the caller answers for the buffer.
        unsafe { self.read_buffer(&mut bytes, from) }?;
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

    /// Waits for all work and copies bytes to main memory.
    ///
    /// # Errors
    /// When the sizes differ, the memory is another device's, or the copy or any work before it failed.
    pub fn read_bytes(&self, to: &mut [u8], from: &Allocation) -> Result<()> {
        // SAFETY: all of an allocation of this device.
        unsafe { self.read_buffer(to, self.own(from)?) }
    }

    /// [`Device::read_bytes`] from a buffer.
    ///
    /// # Safety
    /// The buffer is as [`Buffer`] says.
    unsafe fn read_buffer(&self, to: &mut [u8], from: Buffer) -> Result<()> {
        if to.len() != from.len * from.dtype.bytes() {
            let what = format!("{} bytes for {} numbers of {:?}", to.len(), from.len, from.dtype);
            return Err(Error::Shape { operation: "read", what });
        }
        let Some(driver) = self.running()?.filter(|_| !to.is_empty()) else { return Ok(()) };
        // SAFETY: both sides have that many bytes, and the stream is waited for before the borrow of `to` ends.
        let copied = unsafe { result::memcpy_dtoh_async(to, from.address, driver.stream.cu_stream()) };
        self.synchronize().and(copied.map_err(|e| failed("give numbers", e)))
    }

    /// Copies memory to other memory of its size and type.
    ///
    /// # Errors
    /// When they differ, one is another device's, or the copy fails.
    pub fn copy(&self, to: &Allocation, from: &Allocation) -> Result<()> {
        // SAFETY: all of two allocations of this device.
        unsafe { self.copy_buffer(self.own(to)?, self.own(from)?) }
    }

    /// [`Device::copy`] of buffers.
    ///
    /// # Safety
    /// The buffers are as [`Buffer`] says.
    pub(super) unsafe fn copy_buffer(&self, to: Buffer, from: Buffer) -> Result<()> {
        if (to.len, to.dtype) != (from.len, from.dtype) {
            let what = format!("{} numbers of {:?} to {} of {:?}", from.len, from.dtype, to.len, to.dtype);
            return Err(Error::Shape { operation: "copy", what });
        }
        let Some(driver) = self.running()?.filter(|_| to.len > 0) else { return Ok(()) };
        // SAFETY: both buffers have that many bytes, and the caller answers for them.
        unsafe {
            result::memcpy_dtod_async(to.address, from.address, to.len * to.dtype.bytes(), driver.stream.cu_stream())
        }
        .map_err(|e| failed("copy", e))
    }

    /// Sets every byte.
    ///
    /// # Errors
    /// When the memory is another device's, or the driver refuses.
    pub fn fill_bytes(&self, to: &Allocation, byte: u8) -> Result<()> {
        // SAFETY: all of an allocation of this device.
        unsafe { self.fill_buffer(self.own(to)?, byte) }
    }

    /// [`Device::fill_bytes`] of a buffer.
    ///
    /// # Safety
    /// The buffer is as [`Buffer`] says.
    pub(crate) unsafe fn fill_buffer(&self, to: Buffer, byte: u8) -> Result<()> {
        let Some(driver) = self.running()?.filter(|_| to.len > 0) else { return Ok(()) };
        // SAFETY: the buffer has that many bytes, and the caller answers for it.
        unsafe { result::memset_d8_async(to.address, byte, to.len * to.dtype.bytes(), driver.stream.cu_stream()) }
            .map_err(|e| failed("fill memory", e))
    }
}
