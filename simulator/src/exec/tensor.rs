//! Tensor maps: the pieces of a box, and the instructions that change a map.

use super::Step;
use super::access::{Where, resolve};
use super::block::{Block, lanes};
use super::bulk::Piece;
use super::warp::Warp;
use super::wgmma::swizzle;
use crate::error::FaultClass;
use crate::program::{Addr, AtomTy, Bulk, Place};
use crate::tensor_map::{BYTES, TYPE, TensorMap};

impl Block<'_> {
    /// The runs of bytes that a tensor copy moves, box order in shared memory, swizzled in pieces of 16 bytes.
    pub(super) fn tensor_pieces(
        &mut self,
        warp: &mut Warp,
        frame: u16,
        lane: u32,
        b: &Bulk,
        shared: u32,
        map: u64,
    ) -> Step<Vec<Piece>> {
        let mut raw = [0u8; BYTES];
        self.read_bytes(warp, lane, Place::Generic, map, &mut raw)?;
        let map = match TensorMap::decode(&raw) {
            Ok(m) => m,
            Err(e) => return self.fault(FaultClass::Trap, warp, lane, || e.to_string()),
        };
        if map.rank as usize != b.coords.len() {
            let (rank, n) = (map.rank, b.coords.len());
            return self.fault(FaultClass::Trap, warp, lane, || {
                format!("{n} coordinates for a tensor map of {rank} dimensions")
            });
        }
        if !shared.is_multiple_of(128) {
            return self.misaligned(warp, lane, shared.into(), 128);
        }
        let coords: Vec<i64> = b.coords.iter().map(|c| i64::from(warp.get32(frame, *c, lane) as i32)).collect();
        let size = u64::from(map.element_bytes());
        let row = [16, 32, 64, 128][map.swizzle as usize];
        // Of the box every so many elements are copied. Without interleaving the innermost dimension has no stride.
        let step = |d: usize| if d == 0 { 1 } else { map.steps[d].max(1) };
        let counts: [u64; 5] = std::array::from_fn(|d| map.boxes[d].div_ceil(step(d)).into());
        let elements: u64 = counts[..map.rank as usize].iter().product();
        if elements * size > 256 << 10 {
            return self.fault(FaultClass::Trap, warp, lane, || {
                "the box of the tensor map is larger than shared memory".into()
            });
        }
        let fill = if map.fill == 1 { 0x7fff_7fff } else { 0 };
        let ty = match map.data_type {
            3 | 5 => AtomTy::Signed,
            6 => AtomTy::F16,
            7 | 10 | 11 | 12 => AtomTy::F32,
            8 => AtomTy::F64,
            9 => AtomTy::Bf16,
            _ => AtomTy::Unsigned,
        };
        let mut pieces: Vec<Piece> = Vec::new();
        let mut index = [0u64; 5];
        for e in 0..elements {
            let mut rest = e;
            for (d, i) in index.iter_mut().enumerate().take(map.rank as usize) {
                *i = rest % counts[d];
                rest /= counts[d];
            }
            let mut global = Some(map.address);
            for d in 0..map.rank as usize {
                let c = coords[d] + (index[d] * u64::from(step(d))) as i64;
                let stride = if d == 0 { size } else { map.strides[d - 1] };
                let inside = c >= 0 && c < i64::from(map.dims[d]);
                global = if inside { global.map(|g| g.wrapping_add(c as u64 * stride)) } else { None };
            }
            let at = swizzle(u64::from(shared) + e * size, row) as u32;
            if let Some(last) = pieces.last_mut()
                && last.shared + last.bytes == at
                && match (last.global, global) {
                    (Some(a), Some(b)) => a.wrapping_add(last.bytes.into()) == b,
                    (None, None) => true,
                    _ => false,
                }
            {
                last.bytes += size as u32;
                continue;
            }
            pieces.push(Piece { shared: at, global, bytes: size as u32, element: (ty, size as u32), fill });
        }
        Ok(pieces)
    }

    /// `tensormap.replace`: one field of a map in memory.
    pub(crate) fn map_replace(
        &mut self,
        warp: &mut Warp,
        frame: u16,
        value: u32,
        active: u32,
        (address, place, field, bytes): (Addr, Place, u32, u32),
    ) -> Step {
        let addresses = self.addresses(warp, frame, address);
        for lane in lanes(active) {
            let v = if bytes == 8 { warp.get64(frame, value, lane) } else { warp.get32(frame, value, lane).into() };
            // PTX counts f32.ftz, f64, bf16 where the driver's enumeration, and so the map, has f64, bf16, f32.ftz.
            let v = match v {
                8 if field as usize == TYPE => 10,
                9 | 10 if field as usize == TYPE => v - 1,
                _ => v,
            };
            let data = v.to_le_bytes();
            match resolve(place, addresses[lane as usize]) {
                Where::Shared(a) => {
                    let at = self.shared_at(warp, lane, a.wrapping_add(field), bytes, true)?;
                    self.shared_write(warp.id, lane, at, &data[..bytes as usize], false);
                }
                Where::Global(a) => {
                    let a = a.wrapping_add(field.into());
                    let (i, offset) = self.global_at(warp, lane, a, bytes, true)?;
                    let alloc = &self.l.allocations[i];
                    alloc.data.store(offset, bytes as usize, v);
                    if let Some(m) = &alloc.valid {
                        m.fill(offset, bytes as usize, 1);
                    }
                }
                _ => {
                    return self.fault(FaultClass::OobGlobal, warp, lane, || {
                        "a tensor map lies in global or shared memory".into()
                    });
                }
            }
        }
        Ok(())
    }

    /// `tensormap.cp_fenceproxy`: 128 bytes from shared to global memory.
    pub(crate) fn map_copy(&mut self, warp: &mut Warp, frame: u16, active: u32, dst: Addr, src: Addr) -> Step {
        let (to, from) = (self.addresses(warp, frame, dst), self.addresses(warp, frame, src));
        let lane = active.trailing_zeros();
        let mut data = [0u8; BYTES];
        self.read_bytes(warp, lane, Place::Shared, from[lane as usize], &mut data)?;
        let Where::Global(a) = resolve(Place::Generic, to[lane as usize]) else {
            return Ok(());
        };
        let (i, offset) = self.global_span(warp, lane, a, BYTES as u64, true)?;
        let alloc = &self.l.allocations[i];
        for (k, byte) in data.iter().enumerate() {
            alloc.data.store(offset + k, 1, (*byte).into());
        }
        if let Some(m) = &alloc.valid {
            m.fill(offset, BYTES, 1);
        }
        Ok(())
    }
}
