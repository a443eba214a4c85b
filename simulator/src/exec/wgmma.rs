//! Products of a warpgroup, and the descriptors of their operands in shared memory.

use super::Step;
use super::block::Block;
use super::matrix::{element, integer, product};
use super::race::MANY;
use super::warp::Warp;
use crate::numeric::{f16_to_f32, f32_to_f16};
use crate::program::{MatTy, Wgmma};

impl Block<'_> {
    /// One warp's sixteen rows of a warpgroup's product.
    pub(crate) fn wgmma(&mut self, warp: &mut Warp, frame: u16, w: &Wgmma) -> Step {
        self.clocks.advance(warp.id);
        self.check_product_fence(warp, frame, w);
        warp.goes_together(self.pc);
        let (n, k) = (w.n as usize, w.k as usize);
        let bytes = (w.a_ty.bits() / 8) as usize;
        let first_row = 16 * (warp.id as usize % 4);
        // A, as raw elements.
        let mut a = vec![0u64; 16 * k];
        let mut read = Vec::new();
        let lane = warp.live.trailing_zeros();
        if w.a.is_empty() {
            let d = Descriptor::new(warp.get64(frame, w.a_desc, lane));
            self.described(warp, d, (first_row, 16), k, bytes, w.trans_a, &mut read, |r, c, v| a[r * k + c] = v)?;
        } else {
            let e = 4 / bytes;
            for (i, reg) in w.a.iter().enumerate() {
                let v = warp.lane_values(frame, *reg);
                for (lane, v) in v.iter().enumerate() {
                    let (row, column) = (lane / 4 + 8 * (i % 2), (lane % 4) * e + (i / 2) * 4 * e);
                    for j in 0..e {
                        a[row * k + column + j] = u64::from(*v) >> (8 * bytes * j);
                    }
                }
            }
        }
        let d = Descriptor::new(warp.get64(frame, w.b_desc, lane));
        let mut b = vec![0u64; k * n];
        self.described(warp, d, (0, n), k, bytes, w.trans_b, &mut read, |c, r, v| b[r * n + c] = v)?;
        self.product_reads(warp, frame, &w.d, read);
        let keep = warp.pred(frame, w.scale_d.0, w.scale_d.1);
        let (mut acc, mut sums) = (vec![[0f32; 8]; 16 * n / 8], vec![0i32; 16 * n]);
        // Element (row, column) of D: register pair column / 8, lane 4 (row % 8) + (column % 8) / 2.
        let place = |row: usize, column: usize| {
            let lane = 4 * (row % 8) + (column % 8) / 2;
            match w.d_ty {
                MatTy::F16 => (2 * (column / 8) + row / 8, lane as u32),
                _ => (4 * (column / 8) + 2 * (row / 8) + column % 2, lane as u32),
            }
        };
        for row in 0..16 {
            for column in 0..n {
                let (reg, lane) = place(row, column);
                if keep >> lane & 1 == 0 {
                    continue;
                }
                let v = warp.get32(frame, w.d[reg], lane);
                match w.d_ty {
                    MatTy::F16 => {
                        acc[(column / 8) * 16 + row][column % 8] = f16_to_f32((v >> (16 * (column % 2))) as u16)
                    }
                    MatTy::S32 => sums[row * n + column] = v as i32,
                    _ => acc[(column / 8) * 16 + row][column % 8] = f32::from_bits(v),
                }
            }
        }
        if w.d_ty == MatTy::S32 {
            for row in 0..16 {
                for column in 0..n {
                    let mut sum = i64::from(sums[row * n + column]);
                    for c in 0..k {
                        sum += i64::from(integer(w.a_ty, a[row * k + c], 0))
                            * i64::from(integer(w.b_ty, b[c * n + column], 0));
                    }
                    let v = if w.saturate { sum.clamp(i32::MIN.into(), i32::MAX.into()) as i32 } else { sum as i32 };
                    let (reg, lane) = place(row, column);
                    if warp.live >> lane & 1 != 0 {
                        warp.set32(frame, w.d[reg], lane, v as u32);
                    }
                }
            }
            return Ok(());
        }
        let sign = |x: f32, negate: bool| if negate { -x } else { x };
        let af: Vec<f32> = a.iter().map(|v| sign(element(w.a_ty, *v, 0), w.negate_a)).collect();
        for block in 0..n / 8 {
            let bf: Vec<[f32; 8]> = (0..k)
                .map(|r| std::array::from_fn(|c| sign(element(w.b_ty, b[r * n + 8 * block + c], 0), w.negate_b)))
                .collect();
            product(16, k, &af, &bf, &mut acc[16 * block..16 * block + 16]);
        }
        for row in 0..16 {
            for column in (0..n).step_by(if w.d_ty == MatTy::F16 { 2 } else { 1 }) {
                let (reg, lane) = place(row, column);
                let of = |c: usize| acc[(c / 8) * 16 + row][c % 8];
                let v = match w.d_ty {
                    MatTy::F16 => u32::from(f32_to_f16(of(column))) | u32::from(f32_to_f16(of(column + 1))) << 16,
                    _ => of(column).to_bits(),
                };
                if warp.live >> lane & 1 != 0 {
                    warp.set32(frame, w.d[reg], lane, v);
                }
            }
        }
        Ok(())
    }

    /// Reads a matrix that a descriptor describes, in pieces of 16 bytes: `rows` (first and count) along M or N, `k`
    /// along the depth. Gives every element to `put(row - first, k, value)` and the pieces read to `read`.
    #[allow(clippy::too_many_arguments)]
    fn described(
        &mut self,
        warp: &Warp,
        d: Descriptor,
        (first, count): (usize, usize),
        depth: usize,
        bytes: usize,
        trans: bool,
        read: &mut Vec<u32>,
        mut put: impl FnMut(usize, usize, u64),
    ) -> Step {
        let each = 16 / bytes;
        let (row_step, k_step) = if trans { (each, 1) } else { (1, each) };
        for r in (0..count).step_by(row_step) {
            for k in (0..depth).step_by(k_step) {
                let at = d.address(first + r, k, bytes, trans);
                let at = self.shared_at(warp, 0, u32::try_from(at).unwrap_or(u32::MAX), 16, false)?;
                if self.state[at..at + 16].iter().any(|s| *s != 1) {
                    self.bad_state(warp.id, 0, at, 16, false);
                }
                if self.check_shared {
                    self.shared_record(warp.id, MANY, at, 16, super::access::Touch::READ, true);
                }
                if self.check_proxies {
                    self.async_proxy_reads(warp.id, 0, at, 16);
                }
                read.push(at as u32 / 16);
                for (j, piece) in self.shared[at..at + 16].chunks_exact(bytes).enumerate() {
                    let v = super::access::little(piece);
                    if trans { put(r + j, k, v) } else { put(r, k + j, v) }
                }
            }
        }
        Ok(())
    }
}

/// A matrix descriptor of wgmma.
#[derive(Debug, Clone, Copy)]
struct Descriptor {
    start: u64,
    leading: u64,
    stride: u64,
    /// Bytes of a swizzled row: 16 (none), 32, 64 or 128.
    row: u64,
}

impl Descriptor {
    fn new(bits: u64) -> Descriptor {
        let field = |at: u32| (bits >> at & 0x3fff) << 4;
        let row = [16, 128, 64, 32][(bits >> 62) as usize];
        Descriptor { start: field(0), leading: field(16), stride: field(32), row }
    }

    /// Byte address of an element: core matrices of 8 rows of 16 bytes, put together by the two strides; then the
    /// swizzle moves 16-byte pieces within 128-byte lines.
    fn address(self, mn: usize, k: usize, bytes: usize, trans: bool) -> u64 {
        let per_row = 16 / bytes;
        let (mn, k, per_row, bytes) = (mn as u64, k as u64, per_row as u64, bytes as u64);
        let a = if !trans {
            // The depth is contiguous.
            let (piece, within) = (k / per_row, k % per_row);
            let along = if self.row == 16 { piece * self.leading } else { piece * 16 };
            self.start + mn / 8 * self.stride + mn % 8 * self.row + along + within * bytes
        } else {
            // M or N is contiguous.
            let (piece, within) = (mn / per_row, mn % per_row);
            let pieces = self.row / 16;
            if self.row == 16 {
                self.start + within * bytes + piece * self.stride + k % 8 * 16 + k / 8 * self.leading
            } else {
                self.start
                    + within * bytes
                    + piece % pieces * 16
                    + piece / pieces * self.leading
                    + k % 8 * self.row
                    + k / 8 * self.stride
            }
        };
        swizzle(a, self.row)
    }
}

/// Moves a 16-byte piece within its 128-byte line, as TMA and wgmma do with rows of `row` bytes.
pub(crate) fn swizzle(address: u64, row: u64) -> u64 {
    let mask = match row {
        128 => 7,
        64 => 3,
        32 => 1,
        _ => 0,
    };
    address ^ (address >> 7 & mask) << 4
}
