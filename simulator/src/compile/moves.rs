//! Moves, selection, and conversions of addresses.

use super::Result;
use super::body::Body;
use crate::lanes::{choose, op1, op1p, op2, op2p, op3, op3p, preds};
use crate::numeric::flush;
use crate::program::*;
use crate::ptx::ast::{Operand, Ty};

impl Body<'_, '_> {
    pub(super) fn moves(&mut self) -> Result<bool> {
        match self.instr.opcode.as_str() {
            "mov" => self.mov(),
            "selp" => self.selp(),
            "slct" => self.slct(),
            "isspacep" => self.isspacep(),
            "cvta" => self.cvta(),
            _ => Ok(false),
        }
    }

    fn selp(&mut self) -> Result<bool> {
        let Some(ty) = self.mods.ty() else {
            return Ok(false);
        };
        self.class = Class::Move;
        self.arity(4, 4)?;
        let (a, b) = (self.src(1, ty)?, self.src(2, ty)?);
        let o = self.operand(3)?;
        let (p, not) = self.pred(o)?;
        let d = self.dst(0, ty)?;
        let alu = match ty.bytes() {
            8 => choose(|a: u64, b: u64, p| if p { a } else { b }),
            _ => choose(|a: u32, b: u32, p| if p { a } else { b }),
        };
        self.alu(alu, d, &[a, b, p], u32::from(not))?;
        Ok(true)
    }

    fn slct(&mut self) -> Result<bool> {
        let ftz = self.mods.take("ftz");
        let (Some(ty), Some(by)) = (self.mods.ty(), self.mods.ty()) else {
            return Ok(false);
        };
        self.class = Class::Move;
        self.arity(4, 4)?;
        let (a, b) = (self.src(1, ty)?, self.src(2, ty)?);
        let c = self.src(3, by)?;
        let d = self.dst(0, ty)?;
        let float = by == Ty::F32;
        // A NaN chooses the second operand; -0 counts as not negative.
        let alu = match (ty.bytes(), float) {
            (8, false) => op3(|a: u64, b: u64, c: u32| if c as i32 >= 0 { a } else { b }),
            (8, true) => op3p(|a: u64, b: u64, c: u32, z| if pick(c, z) >= 0.0 { a } else { b }),
            (_, false) => op3(|a: u32, b: u32, c: u32| if c as i32 >= 0 { a } else { b }),
            (_, true) => op3p(|a: u32, b: u32, c: u32, z| if pick(c, z) >= 0.0 { a } else { b }),
        };
        self.alu(alu, d, &[a, b, c], u32::from(ftz))?;
        Ok(true)
    }

    fn isspacep(&mut self) -> Result<bool> {
        self.arity(2, 2)?;
        let o = self.operand(0)?;
        let d = self.pred_dst(o)?;
        let a = self.src(1, Ty::U64)?;
        let place = self.mods.find(|m| match m {
            "global" => Some(Place::Global),
            "shared" | "shared::cta" | "shared::cluster" => Some(Place::Shared),
            "local" => Some(Place::Local),
            "param" | "param::entry" | "param::func" => Some(Place::Param),
            "const" => Some(Place::Generic),
            _ => None,
        });
        let Some(place) = place else { return Ok(false) };
        self.emit(Inst { d, a, kind: Kind::IsSpace(place), ..self.blank() })?;
        Ok(true)
    }

    fn mov(&mut self) -> Result<bool> {
        let Some(ty) = self.mods.ty() else {
            return Ok(false);
        };
        if ty == Ty::B128 {
            return self.fail("moves of 128 bits are not supported");
        }
        self.class = Class::Move;
        self.arity(2, 2)?;
        if ty == Ty::Pred {
            let (x, o) = (self.operand(1)?, self.operand(0)?);
            let (a, na) = self.pred(x)?;
            let d = self.pred_dst(o)?;
            self.alu(preds(|a, _| a), d, &[a, a], u32::from(na))?;
            return Ok(true);
        }
        match (self.operand(0)?, self.operand(1)?) {
            (Operand::Vector(parts), _) if parts.len() > 1 => self.unpack(parts, ty),
            (_, Operand::Vector(parts)) if parts.len() > 1 => self.pack(parts, ty),
            (_, Operand::Name(n))
                if matches!(
                    n.as_str(),
                    "%clock" | "%clock_hi" | "%clock64" | "%globaltimer" | "%globaltimer_lo" | "%globaltimer_hi"
                ) =>
            {
                let wide = ty.bytes() == 8;
                let d = self.dst(0, ty)?;
                self.emit(Inst { d, kind: Kind::Clock { wide }, ..self.blank() })?;
                Ok(true)
            }
            (to, from) => {
                let single = |o: &Operand| match o {
                    Operand::Vector(v) if v.len() == 1 => v[0].clone(),
                    o => o.clone(),
                };
                let a = self.value(&single(from), ty)?;
                let to = self.dst_of(&single(to))?;
                let alu = match to.words {
                    2 if ty.bytes() == 8 => op1(|a: u64| a),
                    1 if ty.bytes() < 8 => op1(|a: u32| a),
                    _ => return self.fail("the destination does not fit the type"),
                };
                self.alu(alu, to.at, &[a], 0)?;
                Ok(true)
            }
        }
    }

    /// `mov.b64 {a, b}, c`
    fn unpack(&mut self, parts: &[Operand], ty: Ty) -> Result<bool> {
        let bits = ty.bytes() * 8 / parts.len() as u32;
        if bits < 8 || !bits.is_power_of_two() {
            return self.fail("this vector does not fit the type");
        }
        let mut a = self.src(1, ty)?;
        // A part may overwrite the source.
        if ty.bytes() < 8 && bits == 8 {
            let t = self.temp(1)?;
            self.part(op1(|a: u32| a), t, a)?;
            a = t;
        }
        for (k, part) in parts.iter().enumerate() {
            if *part == Operand::Sink {
                continue;
            }
            let d = self.dst_of(part)?;
            if d.words != 1 || (d.ty.bytes() * 8 != bits && d.ty.bytes() * 8 < bits) {
                return self.fail("a part of the vector does not fit");
            }
            let alu = match (ty.bytes() == 8, bits) {
                (true, 32) => op1p(|a: u64, e| (a >> e) as u32),
                (true, 16) => op1p(|a: u64, e| (a >> e) as u32 & 0xffff),
                (true, _) => op1p(|a: u64, e| (a >> e) as u32 & 0xff),
                (false, 16) => op1p(|a: u32, e| a >> e & 0xffff),
                (false, _) => op1p(|a: u32, e| a >> e & 0xff),
            };
            self.alu(alu, d.at, &[a], bits * k as u32)?;
        }
        Ok(true)
    }

    /// `mov.b64 c, {a, b}`
    fn pack(&mut self, parts: &[Operand], ty: Ty) -> Result<bool> {
        let bits = ty.bytes() * 8 / parts.len() as u32;
        let part_ty = match bits {
            8 => Ty::B8,
            16 => Ty::B16,
            32 => Ty::B32,
            _ => return self.fail("this vector does not fit the type"),
        };
        let d = self.dst(0, ty)?;
        let regs = parts.iter().map(|p| self.value(p, part_ty)).collect::<Result<Vec<_>>>()?;
        if let (&[lo, hi], 8) = (regs.as_slice(), ty.bytes()) {
            self.alu(op2(|a: u32, b: u32| u64::from(a) | u64::from(b) << 32), d, &[lo, hi], 0)?;
            return Ok(true);
        }
        if let (&[lo, hi], 32) = (regs.as_slice(), ty.bytes() * 8) {
            self.alu(op2(|a: u32, b: u32| (a & 0xffff) | b << 16), d, &[lo, hi], 0)?;
            return Ok(true);
        }
        let wide = ty.bytes() == 8;
        let t = self.temp(if wide { 2 } else { 1 })?;
        let zero = self.constant(if wide { 2 } else { 1 }, 0)?;
        for (k, reg) in regs.iter().enumerate() {
            let last = k + 1 == regs.len();
            let from = if k == 0 { zero } else { t };
            let shift = (bits * k as u32) | (bits << 8);
            let alu = match wide {
                true => op2p(|a: u64, b: u32, e| a | (u64::from(b) & ((1 << (e >> 8)) - 1)) << (e & 0xff)),
                false => op2p(|a: u32, b: u32, e| a | (b & ((1 << (e >> 8)) - 1)) << (e & 0xff)),
            };
            self.alu(alu, if last { d } else { t }, &[from, *reg], shift)?;
        }
        Ok(true)
    }

    /// Generic addresses to and from those of a space: adds or subtracts the space's window.
    fn cvta(&mut self) -> Result<bool> {
        let to = self.mods.take("to");
        let window = self.mods.find(|m| match m {
            "global" | "const" | "param" | "param::entry" => Some(0),
            "shared" | "shared::cta" | "shared::cluster" => Some(super::SHARED_WINDOW),
            "local" => Some(super::LOCAL_WINDOW),
            _ => None,
        });
        let (Some(window), Some(ty)) = (window, self.mods.ty()) else {
            return Ok(false);
        };
        if ty.bytes() != 8 {
            return self.fail("only 64-bit addresses are supported");
        }
        self.arity(2, 2)?;
        let a = self.src(1, Ty::U64)?;
        let d = self.dst(0, Ty::U64)?;
        let b = self.constant(2, window)?;
        let alu = if to { op2(|a: u64, b: u64| a.wrapping_sub(b)) } else { op2(|a: u64, b: u64| a.wrapping_add(b)) };
        self.alu(alu, d, &[a, b], 0)?;
        Ok(true)
    }
}

fn pick(c: u32, ftz: u32) -> f32 {
    if ftz != 0 { flush(f32::from_bits(c)) } else { f32::from_bits(c) }
}
