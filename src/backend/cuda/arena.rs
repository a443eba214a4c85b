//! One block of device memory, cut into the buffers of a step.
//!
//! A step takes and gives back buffers in the same order every time, so it gets the same addresses every time: it can be
//! replayed as a graph. A first pass without launches finds how much memory that takes.

use super::{Buffer, DType};

/// Buffers start at multiples of this many bytes.
const ALIGNMENT: usize = 256;

/// Hands out parts of one block of memory.
#[derive(Clone, Debug)]
pub struct Arena {
    base: u64,
    free: Vec<(usize, usize)>, // offset and bytes of every hole, by offset
    end: usize,                // everything from here on is free
    peak: usize,
}

impl Arena {
    /// An arena over memory at `base`: as much as [`Arena::peak`] of a pass before.
    pub fn new(base: u64) -> Self {
        Arena { base, free: Vec::new(), end: 0, peak: 0 }
    }

    /// Address of the first byte.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Bytes that were in use at the worst moment, holes included.
    pub fn peak(&self) -> usize {
        self.peak
    }

    /// Takes everything back.
    pub fn clear(&mut self) {
        self.free.clear();
        self.end = 0;
    }

    /// A buffer of arbitrary contents: the first hole that is large enough, or new memory at the end.
    pub fn take(&mut self, len: usize, dtype: DType) -> Buffer {
        let bytes = Self::rounded(len, dtype);
        let offset = match self.free.iter().position(|&(_, size)| size >= bytes) {
            Some(hole) => {
                let (offset, size) = self.free[hole];
                match size - bytes {
                    0 => drop(self.free.remove(hole)),
                    left => self.free[hole] = (offset + bytes, left),
                }
                offset
            }
            None => {
                let offset = self.end;
                self.end += bytes;
                self.peak = self.peak.max(self.end);
                offset
            }
        };
        Buffer { address: self.base + offset as u64, len, dtype }
    }

    /// Takes a buffer back.
    pub fn give(&mut self, buffer: Buffer) {
        let (mut offset, mut bytes) = ((buffer.address - self.base) as usize, Self::rounded(buffer.len, buffer.dtype));
        let at = self.free.partition_point(|&(start, _)| start < offset);
        if self.free.get(at).is_some_and(|&(start, _)| start == offset + bytes) {
            bytes += self.free.remove(at).1;
        }
        if at > 0 && self.free[at - 1].0 + self.free[at - 1].1 == offset {
            let (start, size) = self.free.remove(at - 1);
            (offset, bytes) = (start, size + bytes);
        }
        if offset + bytes == self.end {
            self.end = offset;
        } else {
            let at = self.free.partition_point(|&(start, _)| start < offset);
            self.free.insert(at, (offset, bytes));
        }
    }

    fn rounded(len: usize, dtype: DType) -> usize {
        (len * dtype.bytes()).max(1).next_multiple_of(ALIGNMENT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn buffers_never_overlap_and_everything_comes_back(steps in prop::collection::vec((any::<bool>(), 0usize..3000), 1..200)) {
            let mut arena = Arena::new(1 << 20);
            let mut held: Vec<Buffer> = Vec::new();
            for (take, n) in steps {
                if take || held.is_empty() {
                    let new = arena.take(n, if n % 2 == 0 { DType::F32 } else { DType::Bf16 });
                    let end = |b: &Buffer| b.address + Arena::rounded(b.len, b.dtype) as u64;
                    prop_assert!(held.iter().all(|old| end(old) <= new.address || end(&new) <= old.address));
                    prop_assert!(end(&new) - (1 << 20) <= arena.peak() as u64);
                    prop_assert_eq!(new.address % ALIGNMENT as u64, 0);
                    held.push(new);
                } else {
                    arena.give(held.swap_remove(n % held.len()));
                }
            }
            held.into_iter().for_each(|b| arena.give(b));
            prop_assert_eq!((arena.end, arena.free.len()), (0, 0));
        }
    }
}
