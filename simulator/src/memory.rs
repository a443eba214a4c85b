//! Device memory: allocations at 64-bit addresses, each with a map of the bytes that were written.

use crate::error::MemoryError;
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering::Relaxed};

/// Zeroed host memory that several threads may access through relaxed atomics.
pub(crate) struct HostBytes {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: shared access goes through atomics (`load`, `store`, `fill`, and what `a8` to `a64`, `words` and `double_words` give) or, in
// `bulk`, under an exclusive lock.
unsafe impl Send for HostBytes {}
// SAFETY: as above.
unsafe impl Sync for HostBytes {}

impl HostBytes {
    /// Aligned as memory is that comes with zeros from the system, a page at a time as it is touched: of a wider alignment all would be
    /// filled.
    fn layout(len: usize) -> Option<Layout> {
        Layout::from_size_align(len.max(1).checked_next_multiple_of(16)?, 16).ok()
    }

    /// `len` zero bytes, or `None` when the host has no room.
    pub(crate) fn zeroed(len: usize) -> Option<HostBytes> {
        let layout = Self::layout(len)?;
        // SAFETY: the layout's size is not zero.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        Some(HostBytes { start, len })
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    #[inline(always)]
    fn at(&self, offset: usize, bytes: usize) -> *mut u8 {
        assert!(offset.checked_add(bytes).is_some_and(|end| end <= self.len) && offset.is_multiple_of(bytes));
        // SAFETY: the assertion keeps the pointer inside the allocation.
        unsafe { self.start.as_ptr().add(offset) }
    }

    #[inline(always)]
    pub(crate) fn a8(&self, offset: usize) -> &AtomicU8 {
        // SAFETY: inside the allocation (`at`), and only ever accessed atomically while shared.
        unsafe { AtomicU8::from_ptr(self.at(offset, 1)) }
    }
    #[inline(always)]
    pub(crate) fn a16(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: as `a8`; aligned, since the allocation is aligned to 16 and `at` checks the offset.
        unsafe { AtomicU16::from_ptr(self.at(offset, 2).cast()) }
    }
    #[inline(always)]
    pub(crate) fn a32(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: as `a16`.
        unsafe { AtomicU32::from_ptr(self.at(offset, 4).cast()) }
    }
    #[inline(always)]
    pub(crate) fn a64(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: as `a16`.
        unsafe { AtomicU64::from_ptr(self.at(offset, 8).cast()) }
    }

    /// Little-endian load of 1, 2, 4 or 8 bytes at an offset that is a multiple of the size.
    #[inline(always)]
    pub(crate) fn load(&self, offset: usize, bytes: usize) -> u64 {
        match bytes {
            1 => self.a8(offset).load(Relaxed).into(),
            2 => self.a16(offset).load(Relaxed).into(),
            4 => self.a32(offset).load(Relaxed).into(),
            _ => self.a64(offset).load(Relaxed),
        }
    }

    /// Little-endian store of the low 1, 2, 4 or 8 bytes.
    #[inline(always)]
    pub(crate) fn store(&self, offset: usize, bytes: usize, value: u64) {
        match bytes {
            1 => self.a8(offset).store(value as u8, Relaxed),
            2 => self.a16(offset).store(value as u16, Relaxed),
            4 => self.a32(offset).store(value as u32, Relaxed),
            _ => self.a64(offset).store(value, Relaxed),
        }
    }

    /// `n` words of 32 bits from `offset` on, a multiple of 4.
    #[inline(always)]
    pub(crate) fn words(&self, offset: usize, n: usize) -> &[AtomicU32] {
        assert!(offset.is_multiple_of(4) && offset + 4 * n <= self.len);
        // SAFETY: the assertion keeps the slice inside the allocation, which is aligned to 16; its bytes are only ever
        // accessed atomically while shared.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().add(offset).cast(), n) }
    }

    /// `n` words of 64 bits from `offset` on, a multiple of 8.
    #[inline(always)]
    pub(crate) fn double_words(&self, offset: usize, n: usize) -> &[AtomicU64] {
        assert!(offset.is_multiple_of(8) && offset + 8 * n <= self.len);
        // SAFETY: as `words`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().add(offset).cast(), n) }
    }

    /// Sets `bytes` bytes.
    pub(crate) fn fill(&self, offset: usize, bytes: usize, value: u8) {
        for i in offset..offset + bytes {
            self.a8(i).store(value, Relaxed);
        }
    }

    /// The bytes as a slice.
    ///
    /// # Safety
    /// No other thread may access the bytes meanwhile.
    #[allow(clippy::mut_from_ref)]
    unsafe fn bulk(&self) -> &mut [u8] {
        // SAFETY: start and len describe one live allocation; exclusivity is the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for HostBytes {
    fn drop(&mut self) {
        if let Some(layout) = Self::layout(self.len) {
            // SAFETY: allocated in `zeroed` with this layout.
            unsafe { dealloc(self.start.as_ptr(), layout) }
        }
    }
}

/// One live allocation.
pub(crate) struct Allocation {
    pub base: u64,
    pub bytes: u64,
    pub label: String,
    pub data: HostBytes,
    /// One byte per byte of `data`: 1 where it was written. `None` when that is not checked.
    pub valid: Option<HostBytes>,
    /// Read-only for kernels (`.const`).
    pub constant: bool,
}

impl Allocation {
    pub(crate) fn end(&self) -> u64 {
        self.base + self.bytes
    }
}

/// A live allocation as [`crate::Device::leaks`] lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leak {
    /// First byte.
    pub address: u64,
    /// Length.
    pub bytes: u64,
    /// Name given by the caller, or its number.
    pub label: String,
}

/// First device address. Everything below is unmapped, so null pointers with an offset are caught.
const FIRST: u64 = 0x7_0000_0000;
/// Unmapped bytes kept after each allocation.
const GAP: u64 = 4096;

pub(crate) struct Memory {
    allocations: BTreeMap<u64, Arc<Allocation>>,
    freed: BTreeMap<u64, (u64, String)>,
    next: u64,
    used: u64,
    limit: u64,
    serial: u64,
    track: bool,
}

impl Memory {
    pub(crate) fn new(limit: u64, track: bool) -> Memory {
        Memory { allocations: BTreeMap::new(), freed: BTreeMap::new(), next: FIRST, used: 0, limit, serial: 0, track }
    }

    pub(crate) fn alloc(&mut self, bytes: u64, label: Option<&str>, constant: bool) -> Result<u64, MemoryError> {
        let full = MemoryError::OutOfMemory { asked: bytes, free: self.limit - self.used };
        if bytes > self.limit - self.used {
            return Err(full);
        }
        let host = || HostBytes::zeroed(usize::try_from(bytes).ok()?.checked_next_multiple_of(8)?);
        let Some(data) = host() else { return Err(full) };
        let valid = match self.track {
            true => Some(host().ok_or(full)?),
            false => None,
        };
        let base = self.next;
        self.next = (base + bytes + GAP).next_multiple_of(1024);
        self.used += bytes;
        self.serial += 1;
        let label = label.map_or_else(|| format!("allocation {}", self.serial), str::to_owned);
        let allocation = Allocation { base, bytes, label, data, valid, constant };
        self.allocations.insert(base, Arc::new(allocation));
        Ok(base)
    }

    pub(crate) fn free(&mut self, address: u64) -> Result<(), MemoryError> {
        match self.allocations.remove(&address) {
            Some(a) => {
                self.used -= a.bytes;
                self.freed.insert(a.base, (a.bytes, a.label.clone()));
                // Only reports need these; an endless run of alloc and free must not grow for ever.
                if self.freed.len() > 4096 {
                    self.freed.pop_first();
                }
                Ok(())
            }
            None => Err(MemoryError::Invalid { what: "free", address, bytes: 0, nearest: self.nearest(address, 0) }),
        }
    }

    pub(crate) fn info(&self) -> (u64, u64) {
        (self.limit - self.used, self.limit)
    }

    pub(crate) fn all(&self) -> Vec<Arc<Allocation>> {
        self.allocations.values().cloned().collect()
    }

    fn find(&self, what: &'static str, address: u64, bytes: u64) -> Result<(&Allocation, usize), MemoryError> {
        let found = self.allocations.range(..=address).next_back().map(|(_, a)| a.as_ref());
        match found {
            Some(a) if address - a.base <= a.bytes && bytes <= a.bytes - (address - a.base) => {
                Ok((a, (address - a.base) as usize))
            }
            _ => Err(MemoryError::Invalid { what, address, bytes, nearest: self.nearest(address, bytes) }),
        }
    }

    pub(crate) fn range(&self, address: u64) -> Option<(u64, u64)> {
        let (_, a) = self.allocations.range(..=address).next_back()?;
        (address < a.end()).then_some((a.base, a.bytes))
    }

    pub(crate) fn read(&mut self, address: u64, out: &mut [u8]) -> Result<(), MemoryError> {
        let (a, at) = self.find("read", address, out.len() as u64)?;
        // SAFETY: `&mut self` is the only way to the allocations while no launch holds the lock.
        out.copy_from_slice(&unsafe { a.data.bulk() }[at..at + out.len()]);
        Ok(())
    }

    pub(crate) fn unwritten(&mut self, address: u64, bytes: u64) -> Result<Option<u64>, MemoryError> {
        let (a, at) = self.find("read", address, bytes)?;
        let Some(valid) = &a.valid else {
            return Ok(None);
        };
        // SAFETY: as in `read`.
        let valid = unsafe { valid.bulk() };
        Ok(valid[at..at + bytes as usize].iter().position(|&v| v == 0).map(|i| address + i as u64))
    }

    pub(crate) fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        let (a, at) = self.find("write", address, bytes.len() as u64)?;
        // SAFETY: as in `read`.
        let to = unsafe { a.data.bulk() };
        to[at..at + bytes.len()].copy_from_slice(bytes);
        self.mark(address, bytes.len() as u64, true)
    }

    /// Sets the written map of a range: `true` is initialised.
    pub(crate) fn mark(&mut self, address: u64, bytes: u64, written: bool) -> Result<(), MemoryError> {
        let (a, at) = self.find("write", address, bytes)?;
        if let Some(valid) = &a.valid {
            // SAFETY: as in `read`.
            let map = unsafe { valid.bulk() };
            map[at..at + bytes as usize].fill(u8::from(written));
        }
        Ok(())
    }

    pub(crate) fn fill(&mut self, address: u64, pattern: &[u8], count: u64) -> Result<(), MemoryError> {
        let bytes = (pattern.len() as u64).saturating_mul(count);
        let (a, at) = self.find("memset", address, bytes)?;
        // SAFETY: as in `read`.
        let to = &mut unsafe { a.data.bulk() }[at..at + bytes as usize];
        match pattern {
            [byte] => to.fill(*byte),
            _ => to.chunks_exact_mut(pattern.len().max(1)).for_each(|c| c.copy_from_slice(pattern)),
        }
        self.mark(address, bytes, true)
    }

    pub(crate) fn copy(&mut self, to: u64, from: u64, bytes: u64) -> Result<(), MemoryError> {
        self.find("copy to", to, bytes)?;
        let (source, at) = self.find("copy from", from, bytes)?;
        let range = at..at + bytes as usize;
        // SAFETY: as in `read`; both are copied out before the target is borrowed.
        let data = unsafe { source.data.bulk() }[range.clone()].to_vec();
        // SAFETY: as above.
        let valid = source.valid.as_ref().map(|v| unsafe { v.bulk() }[range].to_vec());
        self.write(to, &data)?;
        let (target, at) = self.find("copy to", to, bytes)?;
        if let (Some(map), Some(valid)) = (&target.valid, valid) {
            // SAFETY: as above. A copy of an unwritten byte stays unwritten.
            let map = unsafe { map.bulk() };
            map[at..at + valid.len()].copy_from_slice(&valid);
        }
        Ok(())
    }

    /// Says in words where `address` lies relative to the nearest allocation.
    pub(crate) fn nearest(&self, address: u64, bytes: u64) -> String {
        let live: Vec<_> = self.allocations.values().map(|a| (a.base, a.bytes, a.label.as_str())).collect();
        let freed: Vec<_> = self.freed.iter().map(|(base, (bytes, label))| (*base, *bytes, label.as_str())).collect();
        describe_nearest(&live, &freed, address, bytes)
    }

    pub(crate) fn freed(&self) -> Vec<(u64, u64, String)> {
        self.freed.iter().map(|(base, (bytes, label))| (*base, *bytes, label.clone())).collect()
    }
}

/// Words for where `address..address+bytes` lies relative to ranges `(base, bytes, label)`.
pub(crate) fn describe_nearest(
    live: &[(u64, u64, &str)],
    freed: &[(u64, u64, &str)],
    address: u64,
    bytes: u64,
) -> String {
    if address < 4096 {
        return "a null pointer".into();
    }
    if let Some((base, size, label)) = freed.iter().find(|(base, size, _)| address >= *base && address < base + size) {
        return format!("{} bytes into {label} ({size} bytes at {base:#x}), which was freed", address - base);
    }
    let distance = |&&(base, size, _): &&(u64, u64, &str)| match address {
        _ if address < base => base - address,
        _ if address >= base + size => address - (base + size) + 1,
        _ => 0,
    };
    match live.iter().min_by_key(distance) {
        None => "there is no allocation".into(),
        Some(&(base, size, label)) if address < base => {
            format!("{} bytes before {label} ({size} bytes at {base:#x})", base - address)
        }
        Some(&(base, size, label)) if address >= base + size => {
            format!("{} bytes after the end of {label} ({size} bytes at {base:#x})", address - base - size)
        }
        Some(&(base, size, label)) => {
            let over = address.saturating_add(bytes).saturating_sub(base + size);
            format!("{over} bytes past the end of {label} ({size} bytes at {base:#x})")
        }
    }
}
