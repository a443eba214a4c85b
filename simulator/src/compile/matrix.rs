//! Matrix instructions: ldmatrix, stmatrix, movmatrix, mma and wgmma.

use super::Result;
use super::body::Body;
use super::memory::place;
use crate::program::*;
use crate::ptx::ast::{Operand, Ty};

fn mat_ty(m: &str) -> Option<MatTy> {
    Some(match m {
        "f16" => MatTy::F16,
        "bf16" => MatTy::Bf16,
        "tf32" => MatTy::Tf32,
        "f32" => MatTy::F32,
        "f64" => MatTy::F64,
        "s8" => MatTy::S8,
        "u8" => MatTy::U8,
        "s4" => MatTy::S4,
        "u4" => MatTy::U4,
        "b1" => MatTy::B1,
        "s32" => MatTy::S32,
        "e4m3" => MatTy::E4m3,
        "e5m2" => MatTy::E5m2,
        _ => return None,
    })
}

/// `m16n8k16`
fn shape(m: &str) -> Option<(u32, u32, u32)> {
    let (rows, rest) = m.strip_prefix('m')?.split_once('n')?;
    let (columns, depth) = rest.split_once('k').unwrap_or((rest, "0"));
    Some((rows.parse().ok()?, columns.parse().ok()?, depth.parse().ok()?))
}

impl Body<'_, '_> {
    pub(super) fn matrix(&mut self) -> Result<bool> {
        self.class = Class::Matrix;
        match self.instr.opcode.as_str() {
            "ldmatrix" | "stmatrix" => self.matrix_move(),
            "movmatrix" => {
                self.mods.any(&["sync", "aligned", "m8n8"]);
                if !self.mods.take("trans") || self.mods.ty() != Some(Ty::B16) {
                    return Ok(false);
                }
                self.class = Class::Warp;
                self.arity(2, 2)?;
                let (a, d) = (self.src(1, Ty::B32)?, self.dst(0, Ty::B32)?);
                self.emit(Inst { d, a, kind: Kind::MovMatrix, ..self.blank() })?;
                Ok(true)
            }
            "mma" => self.mma(),
            "wgmma" => self.wgmma(),
            _ => Ok(false),
        }
    }

    fn registers(&mut self, o: &Operand, ty: Ty, destination: bool) -> Result<Vec<u32>> {
        let one = std::slice::from_ref(o);
        let list = match o {
            Operand::Vector(v) => v.as_slice(),
            _ => one,
        };
        let mut out = Vec::new();
        for o in list {
            let at = if destination {
                let r = self.dst_of(o)?;
                if r.ty.bytes() != ty.bytes() {
                    return self.fail("a register of the matrix has the wrong width");
                }
                r.at
            } else {
                self.value(o, ty)?
            };
            out.push(at);
        }
        Ok(out)
    }

    fn matrix_move(&mut self) -> Result<bool> {
        let store = self.instr.opcode == "stmatrix";
        self.mods.any(&["sync", "aligned"]);
        let n = self.mods.find(|m| match m {
            "x1" => Some(1),
            "x2" => Some(2),
            "x4" => Some(4),
            _ => None,
        });
        let trans = self.mods.take("trans");
        let m8n8 = self.mods.take("m8n8");
        let place = self.mods.find(place).unwrap_or(Place::Generic);
        if !m8n8 || self.mods.ty() != Some(Ty::B16) || !matches!(place, Place::Shared | Place::Generic) {
            return self.fail("only m8n8 matrices of .b16 in shared memory are supported");
        }
        self.class = Class::Shared;
        self.arity(2, 2)?;
        let (r, a) = if store { (1, 0) } else { (0, 1) };
        let (regs, address) = (self.operand(r)?, self.operand(a)?);
        let regs = self.registers(regs, Ty::B32, !store)?;
        if Some(regs.len()) != n {
            return self.fail("the number of registers does not fit");
        }
        let address = self.address(address)?;
        let regs = regs.into();
        let kind = if store {
            Kind::StMatrix { regs, trans, address, place }
        } else {
            Kind::LdMatrix { regs, trans, address, place }
        };
        self.emit(Inst { kind, ..self.blank() })?;
        Ok(true)
    }

    fn mma(&mut self) -> Result<bool> {
        if self.instr.mods.iter().any(|m| m.starts_with("sp")) {
            return self.fail("sparse matrix products are not supported");
        }
        self.mods.any(&["sync", "aligned"]);
        let kind = self.mods.find(|m| m.strip_prefix("kind::").map(str::to_owned));
        if kind.is_some_and(|k| k != "f8f6f4") {
            return self.fail("this kind of matrix product is not supported");
        }
        let Some((m, n, k)) = self.mods.find(shape) else {
            return Ok(false);
        };
        let (row, col) = (self.mods.take("row"), self.mods.take("col"));
        let satfinite = self.mods.take("satfinite");
        let (xor, and) = (self.mods.take("xor"), self.mods.take("and"));
        let popc = self.mods.take("popc");
        let mut next = || self.mods.find(mat_ty);
        let (Some(d_ty), Some(a_ty), Some(b_ty), Some(c_ty)) = (next(), next(), next(), next()) else {
            return Ok(false);
        };
        if !row || !col || (a_ty == MatTy::B1) != (popc && xor != and) {
            return self.fail("this matrix layout is not supported");
        }
        use MatTy::*;
        let shape = (m, n, k);
        let float_out = matches!((d_ty, c_ty), (F32, F32) | (F16, F16) | (F16, F32) | (F32, F16));
        let int_out = (d_ty, c_ty) == (S32, S32);
        let ok = match (a_ty, b_ty) {
            (F16, F16) => matches!(shape, (16, 8, 8 | 16)) && float_out,
            (Bf16, Bf16) => matches!(shape, (16, 8, 8 | 16)) && d_ty == F32 && c_ty == F32,
            (Tf32, Tf32) => matches!(shape, (16, 8, 4 | 8)) && d_ty == F32 && c_ty == F32,
            (F64, F64) => matches!(shape, (8, 8, 4) | (16, 8, 4 | 8 | 16)) && d_ty == F64 && c_ty == F64,
            (S8 | U8, S8 | U8) => matches!(shape, (16, 8, 16 | 32) | (8, 8, 16)) && int_out,
            (S4 | U4, S4 | U4) => matches!(shape, (16, 8, 32 | 64) | (8, 8, 32)) && int_out,
            (B1, B1) => matches!(shape, (16, 8, 128 | 256) | (8, 8, 128)) && int_out,
            (E4m3 | E5m2, E4m3 | E5m2) => matches!(shape, (16, 8, 16 | 32)) && float_out,
            _ => false,
        };
        if !ok {
            return self.fail("this shape and these types of a matrix product are not supported");
        }
        self.arity(4, 4)?;
        let reg = |t: MatTy| match t {
            MatTy::F64 => Ty::F64,
            _ => Ty::B32,
        };
        let (od, oa, ob, oc) = (self.operand(0)?, self.operand(1)?, self.operand(2)?, self.operand(3)?);
        let d = self.registers(od, reg(d_ty), true)?;
        let a = self.registers(oa, reg(a_ty), false)?;
        let b = self.registers(ob, reg(b_ty), false)?;
        let c = self.registers(oc, reg(c_ty), false)?;
        // 32 lanes with registers of 32 bits (64 for f64).
        let count = |elements: u32, t: MatTy| (elements * t.bits() / if t == F64 { 2048 } else { 1024 }) as usize;
        if a.len() != count(m * k, a_ty)
            || b.len() != count(k * n, b_ty)
            || c.len() != count(m * n, c_ty)
            || d.len() != count(m * n, d_ty)
        {
            return self.fail("the number of registers does not fit the shape");
        }
        let mma = Mma { m, n, k, a_ty, b_ty, c_ty, d_ty, satfinite, and_popc: and, d, a, b, c };
        self.emit(Inst { kind: Kind::Mma(Box::new(mma)), ..self.blank() })?;
        Ok(true)
    }

    fn wgmma(&mut self) -> Result<bool> {
        let (fence, commit) = (self.mods.take("fence"), self.mods.take("commit_group"));
        if fence || commit {
            self.mods.any(&["sync", "aligned"]);
            self.class = Class::Barrier;
            self.arity(0, 0)?;
            let kind = if commit { Kind::WgmmaCommit } else { Kind::WgmmaFence };
            self.emit(Inst { kind, ..self.blank() })?;
            return Ok(true);
        }
        if self.mods.take("wait_group") {
            self.mods.any(&["sync", "aligned"]);
            self.class = Class::Barrier;
            self.arity(1, 1)?;
            let Operand::Int(n @ 0..=0xffff) = self.operand(0)? else {
                return self.fail("expected the number of groups");
            };
            self.emit(Inst { kind: Kind::WgmmaWait(*n as u32), ..self.blank() })?;
            return Ok(true);
        }
        if !self.mods.take("mma_async") || self.instr.mods.iter().any(|m| m == "sp") {
            return Ok(false);
        }
        self.mods.any(&["sync", "aligned"]);
        let saturate = self.mods.take("satfinite");
        let Some((64, n, k)) = self.mods.find(shape) else {
            return Ok(false);
        };
        let mut next = || self.mods.find(mat_ty);
        let (Some(d_ty), Some(a_ty), Some(b_ty)) = (next(), next(), next()) else {
            return Ok(false);
        };
        use MatTy::*;
        let halves = matches!((a_ty, b_ty), (F16, F16) | (Bf16, Bf16));
        let ok = match (a_ty, b_ty) {
            (F16, F16) => k == 16 && matches!(d_ty, F16 | F32),
            (Bf16, Bf16) => k == 16 && d_ty == F32,
            (Tf32, Tf32) => k == 8 && d_ty == F32,
            (E4m3 | E5m2, E4m3 | E5m2) => k == 32 && matches!(d_ty, F16 | F32),
            (S8 | U8, S8 | U8) => k == 32 && d_ty == S32,
            _ => false,
        };
        if !ok || n == 0 || n > 256 || !n.is_multiple_of(8) {
            return self.fail("this shape and these types of a matrix product are not supported");
        }
        let (od, oa) = (self.operand(0)?, self.operand(1)?);
        let d = self.registers(od, Ty::B32, true)?;
        if d.len() as u32 != if d_ty == F16 { n / 4 } else { n / 2 } {
            return self.fail("the number of registers does not fit the shape");
        }
        let (a, a_desc) = match oa {
            Operand::Vector(_) => (self.registers(oa, Ty::B32, false)?, NONE),
            _ => (Vec::new(), self.src(1, Ty::B64)?),
        };
        if !a.is_empty() && a.len() != 4 {
            return self.fail("the number of registers does not fit the shape");
        }
        let b_desc = self.src(2, Ty::B64)?;
        let scale = self.operand(3)?;
        let scale_d = self.pred(scale)?;
        let flag = |b: &Self, i: usize| match b.instr.operands.get(i) {
            None => Ok(None),
            Some(Operand::Int(v @ (-1..=1))) => Ok(Some(*v)),
            Some(_) => b.fail("scales and transposes are numbers"),
        };
        let integers = d_ty == S32;
        self.arity(4, if integers { 4 } else { 8 })?;
        let (sa, sb) = (flag(self, 4)?, flag(self, 5)?);
        let (ta, tb) = if a.is_empty() { (flag(self, 6)?, flag(self, 7)?) } else { (None, flag(self, 6)?) };
        if !halves && (ta.is_some_and(|t| t != 0) || tb.is_some_and(|t| t != 0)) {
            return self.fail("only 16-bit matrices can be transposed");
        }
        let w = Wgmma {
            n,
            k,
            a_ty,
            b_ty,
            d_ty,
            d,
            a,
            a_desc,
            b_desc,
            scale_d,
            negate_a: sa == Some(-1),
            negate_b: sb == Some(-1),
            trans_a: ta == Some(1),
            trans_b: tb == Some(1),
            saturate,
        };
        self.emit(Inst { kind: Kind::Wgmma(Box::new(w)), ..self.blank() })?;
        Ok(true)
    }
}
