//! Comparisons: `setp` and `set`.

use super::Result;
use super::body::Body;
use super::integer::s16;
use crate::lanes::{Alu, cmp, op1p, op2, preds, spread};
use crate::numeric::{bf16_to_f32, f16_to_f32, flush};
use crate::program::*;
use crate::ptx::ast::{Operand, Ty};

fn f(x: u32) -> f32 {
    f32::from_bits(x)
}
fn d(x: u64) -> f64 {
    f64::from_bits(x)
}

impl Body<'_, '_> {
    pub(super) fn compare(&mut self) -> Result<bool> {
        let op = self.instr.opcode.as_str();
        if !matches!(op, "setp" | "set") {
            return Ok(false);
        }
        const RELATIONS: [&str; 18] = [
            "eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs", "equ", "neu", "ltu", "leu", "gtu", "geu",
            "num", "nan",
        ];
        let relation = self.mods.find(|m| RELATIONS.iter().position(|r| *r == m));
        let Some(relation) = relation.map(|i| RELATIONS[i]) else {
            return self.fail("the comparison is missing");
        };
        let join = self.mods.find(|m| match m {
            "and" => Some(1u32),
            "or" => Some(2),
            "xor" => Some(3),
            _ => None,
        });
        let ftz = self.mods.take("ftz");
        let to = if op == "set" { self.mods.ty() } else { None };
        let Some(ty) = self.mods.ty() else {
            return Ok(false);
        };
        let n = if join.is_some() { 4 } else { 3 };
        self.arity(n, n)?;
        let Some(alu) = comparison(relation, ty, ftz) else {
            return self.fail(format!("the comparison .{relation} does not go with this type"));
        };
        let (a, b) = (self.src(1, ty)?, self.src(2, ty)?);
        let e = match join {
            None => 0,
            Some(j) => {
                let o = self.operand(3)?;
                let (p, not) = self.pred(o)?;
                j | u32::from(not) << 3 | p << 4
            }
        };
        if matches!(ty, Ty::F16x2 | Ty::Bf16x2) {
            return self.compare_halves(relation, ty, ftz, op, to, (a, b), e);
        }
        if op == "setp" {
            let (p, q) = match self.operand(0)? {
                Operand::Pair(p, q) => (self.pred_dst(p)?, self.pred_dst(q)?),
                p => (self.pred_dst(p)?, NONE),
            };
            self.alu(alu, p, &[a, b, q], e)?;
            return Ok(true);
        }
        // set: all ones, or 1.0 for a float destination.
        let t = self.new_pred()?;
        let one = match to {
            Some(Ty::F32) => 1.0f32.to_bits(),
            Some(Ty::U32 | Ty::S32) => u32::MAX,
            Some(Ty::U16 | Ty::S16) => 0xffff,
            Some(Ty::F16) => 0x3c00,
            Some(Ty::Bf16) => 0x3f80,
            _ => return Ok(false),
        };
        let d = self.dst(0, to.unwrap_or(Ty::U32))?;
        self.alu(alu, t, &[a, b, NONE], e)?;
        self.alu(spread(), d, &[t], one)?;
        Ok(true)
    }

    /// Packed comparisons give one predicate (or one half of a register) for each half.
    #[allow(clippy::too_many_arguments)]
    fn compare_halves(
        &mut self,
        relation: &str,
        ty: Ty,
        ftz: bool,
        op: &str,
        to: Option<Ty>,
        (a, b): (u32, u32),
        e: u32,
    ) -> Result<bool> {
        let single = if ty == Ty::F16x2 { Ty::F16 } else { Ty::Bf16 };
        let Some(alu) = comparison(relation, single, ftz) else {
            return Ok(false);
        };
        let (al, ah, bl, bh) = (self.temp(1)?, self.temp(1)?, self.temp(1)?, self.temp(1)?);
        for (d, s, high) in [(al, a, 0), (ah, a, 16), (bl, b, 0), (bh, b, 16)] {
            self.alu(op1p(|a: u32, e| a >> e & 0xffff), d, &[s], high)?;
        }
        if op == "setp" {
            let Operand::Pair(p, q) = self.operand(0)? else {
                return self.fail("expected `p|q`");
            };
            let (p, q) = (self.pred_dst(p)?, self.pred_dst(q)?);
            // The condition and the guard may be among the results: both are read before either is written, and the
            // guard is written last.
            let (low, high) = (self.new_pred()?, self.new_pred()?);
            self.alu(alu, low, &[al, bl, NONE], e)?;
            self.alu(alu, high, &[ah, bh, NONE], e)?;
            let results = if self.is_guard(p) { [(q, high), (p, low)] } else { [(p, low), (q, high)] };
            for (d, t) in results {
                self.alu(preds(|a, _| a), d, &[t, t], 0)?;
            }
            return Ok(true);
        }
        let one = match to {
            Some(Ty::F16x2) => 0x3c00,
            Some(Ty::Bf16x2) => 0x3f80,
            Some(Ty::U32 | Ty::S32 | Ty::B32) => 0xffff,
            _ => return Ok(false),
        };
        let d = self.dst(0, Ty::B32)?;
        let t = self.new_pred()?;
        self.alu(alu, t, &[al, bl, NONE], e)?;
        self.alu(spread(), al, &[t], one)?;
        self.alu(alu, t, &[ah, bh, NONE], e)?;
        self.alu(spread(), ah, &[t], one)?;
        self.alu(op2(|a: u32, b: u32| a | b << 16), d, &[al, ah], 0)?;
        Ok(true)
    }
}

/// The comparison function for a relation and type.
// Unordered relations are true of NaN: `!(a >= b)` is what `ltu` means.
#[allow(clippy::neg_cmp_op_on_partial_ord)]
fn comparison(relation: &str, ty: Ty, ftz: bool) -> Option<Alu> {
    macro_rules! ints {
        ($r:expr, |$a:ident, $b:ident: $t:ty| $x:expr, $y:expr) => {
            match $r {
                "eq" => Some(cmp(|$a: $t, $b: $t| $x == $y)),
                "ne" => Some(cmp(|$a: $t, $b: $t| $x != $y)),
                "lt" | "lo" => Some(cmp(|$a: $t, $b: $t| $x < $y)),
                "le" | "ls" => Some(cmp(|$a: $t, $b: $t| $x <= $y)),
                "gt" | "hi" => Some(cmp(|$a: $t, $b: $t| $x > $y)),
                "ge" | "hs" => Some(cmp(|$a: $t, $b: $t| $x >= $y)),
                _ => None,
            }
        };
    }
    macro_rules! floats {
        ($r:expr, |$a:ident, $b:ident: $t:ty| $x:expr, $y:expr) => {
            match $r {
                "eq" => Some(cmp(|$a: $t, $b: $t| $x == $y)),
                "ne" => Some(cmp(|$a: $t, $b: $t| $x < $y || $x > $y)),
                "lt" => Some(cmp(|$a: $t, $b: $t| $x < $y)),
                "le" => Some(cmp(|$a: $t, $b: $t| $x <= $y)),
                "gt" => Some(cmp(|$a: $t, $b: $t| $x > $y)),
                "ge" => Some(cmp(|$a: $t, $b: $t| $x >= $y)),
                "equ" => Some(cmp(|$a: $t, $b: $t| !($x < $y || $x > $y))),
                "neu" => Some(cmp(|$a: $t, $b: $t| $x != $y)),
                "ltu" => Some(cmp(|$a: $t, $b: $t| !($x >= $y))),
                "leu" => Some(cmp(|$a: $t, $b: $t| !($x > $y))),
                "gtu" => Some(cmp(|$a: $t, $b: $t| !($x <= $y))),
                "geu" => Some(cmp(|$a: $t, $b: $t| !($x < $y))),
                "num" => Some(cmp(|$a: $t, $b: $t| !$x.is_nan() && !$y.is_nan())),
                "nan" => Some(cmp(|$a: $t, $b: $t| $x.is_nan() || $y.is_nan())),
                _ => None,
            }
        };
    }
    let unsigned_only = matches!(relation, "lo" | "ls" | "hi" | "hs");
    if unsigned_only && (ty.signed() || matches!(ty, Ty::F32 | Ty::F64)) {
        return None;
    }
    match ty {
        Ty::U16 | Ty::B16 | Ty::U32 | Ty::B32 => ints!(relation, |a, b: u32| a, b),
        Ty::S16 => ints!(relation, |a, b: u32| s16(a), s16(b)),
        Ty::S32 => ints!(relation, |a, b: u32| a as i32, b as i32),
        Ty::U64 | Ty::B64 => ints!(relation, |a, b: u64| a, b),
        Ty::S64 => ints!(relation, |a, b: u64| a as i64, b as i64),
        Ty::F32 if ftz => floats!(relation, |a, b: u32| flush(f(a)), flush(f(b))),
        Ty::F32 => floats!(relation, |a, b: u32| f(a), f(b)),
        Ty::F64 => floats!(relation, |a, b: u64| d(a), d(b)),
        Ty::F16 | Ty::F16x2 if ftz => floats!(relation, |a, b: u32| flush16(a), flush16(b)),
        Ty::F16 | Ty::F16x2 => floats!(relation, |a, b: u32| f16_to_f32(a as u16), f16_to_f32(b as u16)),
        Ty::Bf16 | Ty::Bf16x2 => floats!(relation, |a, b: u32| bf16_to_f32(a as u16), bf16_to_f32(b as u16)),
        _ => None,
    }
}

fn flush16(a: u32) -> f32 {
    if a & 0x7c00 == 0 { f16_to_f32((a & 0x8000) as u16) } else { f16_to_f32(a as u16) }
}
