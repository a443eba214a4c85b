//! Matrix instructions. Fragment layouts are those of the PTX documentation, in one formula: with g = lane / 4 and
//! t = lane % 4, a register of A holds the elements of row g (odd registers: g + 8), columns t * e .. t * e + e of the
//! register's block of 4 * e columns, e being the elements of a register; B is the same with rows and columns swapped.

use super::Step;
use super::access::{Where, resolve};
use super::block::{Block, lanes};
use super::warp::Warp;
use crate::error::FaultClass;
use crate::lanes::WIDE;
use crate::numeric::{self, Round, bf16_to_f32, f16_to_f32, f32_to_f16};
use crate::program::{Addr, MatTy, Mma, Place};

/// Element `j` of the packed register value `v`.
#[inline(always)]
pub(super) fn element(ty: MatTy, v: u64, j: u32) -> f32 {
    match ty {
        MatTy::F16 => f16_to_f32((v >> (16 * j)) as u16),
        MatTy::Bf16 => bf16_to_f32((v >> (16 * j)) as u16),
        // The hardware reads the upper 19 bits.
        MatTy::Tf32 => f32::from_bits(v as u32 & 0xffff_e000),
        MatTy::E4m3 => fp8(numeric::E4M3, (v >> (8 * j)) as u8),
        MatTy::E5m2 => fp8(numeric::E5M2, (v >> (8 * j)) as u8),
        _ => f32::from_bits(v as u32),
    }
}

fn fp8(f: numeric::Format, bits: u8) -> f32 {
    f32::from_bits(numeric::convert(f, bits.into(), numeric::F32, Round::Rn, false) as u32)
}

pub(super) fn integer(ty: MatTy, v: u64, j: u32) -> i32 {
    match ty {
        MatTy::S8 => i32::from((v >> (8 * j)) as i8),
        MatTy::U8 => i32::from((v >> (8 * j)) as u8),
        MatTy::S4 => ((v >> (4 * j)) as i32) << 28 >> 28,
        MatTy::U4 => (v >> (4 * j)) as i32 & 15,
        _ => (v >> j) as i32 & 1,
    }
}

fn is_integer(ty: MatTy) -> bool {
    matches!(ty, MatTy::S8 | MatTy::U8 | MatTy::S4 | MatTy::U4 | MatTy::B1)
}

/// `acc[16][n] += a[16][k] * b[k][n]`
#[inline(always)]
fn product_body<const N: usize>(rows: usize, k: usize, a: &[f32], b: &[[f32; N]], acc: &mut [[f32; N]]) {
    for (r, acc) in acc.iter_mut().enumerate().take(rows) {
        let mut sum = *acc;
        for (x, b) in a[r * k..(r + 1) * k].iter().zip(b) {
            for c in 0..N {
                sum[c] = x.mul_add(b[c], sum[c]);
            }
        }
        *acc = sum;
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,bmi1,bmi2,lzcnt,popcnt")]
unsafe fn product_wide<const N: usize>(rows: usize, k: usize, a: &[f32], b: &[[f32; N]], acc: &mut [[f32; N]]) {
    product_body(rows, k, a, b, acc);
}

pub(super) fn product<const N: usize>(rows: usize, k: usize, a: &[f32], b: &[[f32; N]], acc: &mut [[f32; N]]) {
    #[cfg(target_arch = "x86_64")]
    if *WIDE {
        // SAFETY: the host has these features.
        return unsafe { product_wide(rows, k, a, b, acc) };
    }
    product_body(rows, k, a, b, acc);
}

impl Block<'_> {
    /// The 16-byte rows of 8x8 matrices: lane 8 i + r gives the address of row r of matrix i.
    fn rows(
        &mut self,
        warp: &Warp,
        frame: u16,
        count: usize,
        address: Addr,
        place: Place,
        write: bool,
    ) -> Step<[usize; 32]> {
        let addresses = self.addresses(warp, frame, address);
        let mut at = [0; 32];
        for (lane, at) in at.iter_mut().enumerate().take(8 * count) {
            match resolve(place, addresses[lane]) {
                Where::Shared(a) => *at = self.shared_at(warp, lane as u32, a, 16, write)?,
                _ => {
                    let a = addresses[lane];
                    return self.fault(FaultClass::OobShared, warp, lane as u32, || {
                        format!("address {a:#x} is not in shared memory")
                    });
                }
            }
        }
        if self.l.options.counters {
            for i in 0..count {
                let list: Vec<u64> = at[8 * i..8 * i + 8].iter().map(|a| *a as u64).collect();
                self.count_shared(&list, 16);
            }
        }
        Ok(at)
    }

    pub(crate) fn ldmatrix(
        &mut self,
        warp: &mut Warp,
        frame: u16,
        regs: &[u32],
        trans: bool,
        address: Addr,
        place: Place,
    ) -> Step {
        let at = self.rows(warp, frame, regs.len(), address, place, false)?;
        self.clocks.advance(warp.id);
        for (i, reg) in regs.iter().enumerate() {
            let mut m = [[0u16; 8]; 8];
            for (r, row) in m.iter_mut().enumerate() {
                let lane = 8 * i + r;
                self.shared_read(warp.id, lane as u32, at[lane], 16, false);
                for (c, x) in row.iter_mut().enumerate() {
                    let b = at[lane] + 2 * c;
                    *x = u16::from_le_bytes([self.shared[b], self.shared[b + 1]]);
                }
            }
            for lane in lanes(warp.live) {
                let (r, c) = (lane as usize / 4, 2 * (lane as usize % 4));
                let (lo, hi) = if trans { (m[c][r], m[c + 1][r]) } else { (m[r][c], m[r][c + 1]) };
                warp.set32(frame, *reg, lane, u32::from(lo) | u32::from(hi) << 16);
            }
        }
        Ok(())
    }

    pub(crate) fn stmatrix(
        &mut self,
        warp: &mut Warp,
        frame: u16,
        regs: &[u32],
        trans: bool,
        address: Addr,
        place: Place,
    ) -> Step {
        let at = self.rows(warp, frame, regs.len(), address, place, true)?;
        self.clocks.advance(warp.id);
        for (i, reg) in regs.iter().enumerate() {
            let v = warp.lane_values(frame, *reg);
            let element = |r: usize, c: usize| (v[4 * r + c / 2] >> (16 * (c % 2))) as u16;
            for r in 0..8 {
                let mut row = [0u8; 16];
                for c in 0..8 {
                    let x = if trans { element(c, r) } else { element(r, c) };
                    row[2 * c..2 * c + 2].copy_from_slice(&x.to_le_bytes());
                }
                let lane = 8 * i + r;
                self.shared_write(warp.id, lane as u32, at[lane], &row, false);
            }
        }
        Ok(())
    }

    pub(crate) fn mma(&mut self, warp: &mut Warp, frame: u16, m: &Mma) {
        self.clocks.advance(warp.id);
        match m.a_ty {
            MatTy::F64 => mma_f64(warp, frame, m),
            t if is_integer(t) => mma_integer(warp, frame, m),
            _ => mma_float(warp, frame, m),
        }
    }
}

/// The fragments of a product, as plain matrices.
struct Fragments {
    a: [f32; 16 * 32],
    b: [[f32; 8]; 32],
    acc: [[f32; 8]; 16],
}

/// Spreads A and B over matrices; `f` reads element `j` of a register.
#[inline(always)]
fn gather(
    warp: &Warp,
    frame: u16,
    m: &Mma,
    x: &mut Fragments,
    e: usize,
    fa: impl Fn(u32, u32) -> f32,
    fb: impl Fn(u32, u32) -> f32,
) {
    let (rows, k) = (m.m as usize, m.k as usize);
    for (i, reg) in m.a.iter().enumerate() {
        let v = warp.lane_values(frame, *reg);
        let (top, left) = if rows == 16 { (8 * (i % 2), i / 2 * 4 * e) } else { (0, i * 4 * e) };
        for j in 0..e {
            let column: [f32; 32] = std::array::from_fn(|lane| fa(v[lane], j as u32));
            for (lane, value) in column.iter().enumerate() {
                x.a[(lane / 4 + top) * k + left + (lane % 4) * e + j] = *value;
            }
        }
    }
    for (i, reg) in m.b.iter().enumerate() {
        let v = warp.lane_values(frame, *reg);
        for j in 0..e {
            let column: [f32; 32] = std::array::from_fn(|lane| fb(v[lane], j as u32));
            for (lane, value) in column.iter().enumerate() {
                x.b[i * 4 * e + (lane % 4) * e + j][lane / 4] = *value;
            }
        }
    }
}

#[inline(always)]
fn mma_float_body(warp: &mut Warp, frame: u16, m: &Mma) {
    let (rows, k) = (m.m as usize, m.k as usize);
    let mut x = Fragments { a: [0.0; 16 * 32], b: [[0.0; 8]; 32], acc: [[0.0; 8]; 16] };
    match (m.a_ty, m.b_ty) {
        (MatTy::Bf16, _) => gather(
            warp,
            frame,
            m,
            &mut x,
            2,
            |v, j| bf16_to_f32((v >> (16 * j)) as u16),
            |v, j| bf16_to_f32((v >> (16 * j)) as u16),
        ),
        (MatTy::F16, _) => gather(
            warp,
            frame,
            m,
            &mut x,
            2,
            |v, j| f16_to_f32((v >> (16 * j)) as u16),
            |v, j| f16_to_f32((v >> (16 * j)) as u16),
        ),
        (a, b) => {
            let e = (32 / a.bits()) as usize;
            gather(warp, frame, m, &mut x, e, |v, j| element(a, v.into(), j), |v, j| element(b, v.into(), j));
        }
    }
    for (i, reg) in m.c.iter().enumerate() {
        let v = warp.lane_values(frame, *reg);
        for (lane, v) in v.iter().enumerate() {
            let (row, column) = (lane / 4, 2 * (lane % 4));
            match m.c_ty {
                MatTy::F16 => {
                    x.acc[row + 8 * i][column] = f16_to_f32(*v as u16);
                    x.acc[row + 8 * i][column + 1] = f16_to_f32((*v >> 16) as u16);
                }
                _ => x.acc[row + 8 * (i / 2)][column + i % 2] = f32::from_bits(*v),
            }
        }
    }
    product_body(rows, k, &x.a[..rows * k], &x.b[..k], &mut x.acc);
    let live = warp.live;
    for (i, reg) in m.d.iter().enumerate() {
        let v: [u32; 32] = std::array::from_fn(|lane| {
            let (row, column) = (lane / 4, 2 * (lane % 4));
            match m.d_ty {
                MatTy::F16 => {
                    let r = x.acc[row + 8 * i];
                    u32::from(f32_to_f16(r[column])) | u32::from(f32_to_f16(r[column + 1])) << 16
                }
                _ => x.acc[row + 8 * (i / 2)][column + i % 2].to_bits(),
            }
        });
        warp.set_lanes(frame, *reg, &v, live);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,bmi1,bmi2,lzcnt,popcnt")]
unsafe fn mma_float_wide(warp: &mut Warp, frame: u16, m: &Mma) {
    mma_float_body(warp, frame, m);
}

fn mma_float(warp: &mut Warp, frame: u16, m: &Mma) {
    #[cfg(target_arch = "x86_64")]
    if *WIDE {
        // SAFETY: the host has these features.
        return unsafe { mma_float_wide(warp, frame, m) };
    }
    mma_float_body(warp, frame, m);
}

fn mma_integer(warp: &mut Warp, frame: u16, m: &Mma) {
    let (rows, k) = (m.m as usize, m.k as usize);
    let mut a = vec![0i32; rows * k];
    let mut b = vec![0i32; k * 8];
    let e = (32 / m.a_ty.bits()) as usize;
    for (i, reg) in m.a.iter().enumerate() {
        let v = warp.lane_values(frame, *reg);
        let (top, left) = if rows == 16 { (8 * (i % 2), i / 2 * 4 * e) } else { (0, i * 4 * e) };
        for (lane, v) in v.iter().enumerate() {
            let at = (lane / 4 + top) * k + left + (lane % 4) * e;
            for j in 0..e {
                a[at + j] = integer(m.a_ty, (*v).into(), j as u32);
            }
        }
    }
    for (i, reg) in m.b.iter().enumerate() {
        let v = warp.lane_values(frame, *reg);
        for (lane, v) in v.iter().enumerate() {
            let at = i * 4 * e + (lane % 4) * e;
            for j in 0..e {
                b[(at + j) * 8 + lane / 4] = integer(m.b_ty, (*v).into(), j as u32);
            }
        }
    }
    let c: Vec<[u32; 32]> = m.c.iter().map(|r| warp.lane_values(frame, *r)).collect();
    let live = warp.live;
    for (i, reg) in m.d.iter().enumerate() {
        for lane in lanes(live) {
            let (row, column) = (lane as usize / 4 + 8 * (i / 2), 2 * (lane as usize % 4) + i % 2);
            let mut sum = i64::from(c[i][lane as usize] as i32);
            for x in 0..k {
                let (p, q) = (a[row * k + x], b[x * 8 + column]);
                sum += i64::from(match m.a_ty {
                    MatTy::B1 if !m.and_popc => p ^ q,
                    _ => p * q,
                });
            }
            let v = if m.satfinite { sum.clamp(i32::MIN.into(), i32::MAX.into()) as i32 } else { sum as i32 };
            warp.set32(frame, *reg, lane, v as u32);
        }
    }
}

fn mma_f64(warp: &mut Warp, frame: u16, m: &Mma) {
    let (rows, k) = (m.m as usize, m.k as usize);
    let mut a = vec![0f64; rows * k];
    let mut b = vec![0f64; k * 8];
    let read = |reg: u32, lane: usize| f64::from_bits(warp.get64(frame, reg, lane as u32));
    for (i, reg) in m.a.iter().enumerate() {
        let (top, left) = if rows == 16 { (8 * (i % 2), i / 2 * 4) } else { (0, i * 4) };
        for lane in 0..32 {
            a[(lane / 4 + top) * k + left + lane % 4] = read(*reg, lane);
        }
    }
    for (i, reg) in m.b.iter().enumerate() {
        for lane in 0..32 {
            b[(i * 4 + lane % 4) * 8 + lane / 4] = read(*reg, lane);
        }
    }
    let c: Vec<Vec<f64>> = m.c.iter().map(|r| (0..32).map(|l| read(*r, l)).collect()).collect();
    let live = warp.live;
    for (i, reg) in m.d.iter().enumerate() {
        for lane in lanes(live) {
            let (row, column) = (lane as usize / 4 + 8 * (i / 2), 2 * (lane as usize % 4) + i % 2);
            let sum = (0..k).fold(c[i][lane as usize], |s, x| a[row * k + x].mul_add(b[x * 8 + column], s));
            warp.set64(frame, *reg, lane, sum.to_bits());
        }
    }
}
