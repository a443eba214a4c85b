//! Logic, shifts, bit fields, permutations of bytes, and dot products of small integers.

use super::Result;
use super::body::Body;
use super::integer::s16;
use crate::lanes::{cmp, op1, op2, op3, op3p, op4, preds};
use crate::ptx::ast::{Operand, Ty};

impl Body<'_, '_> {
    pub(super) fn bits(&mut self) -> Result<bool> {
        use Ty::*;
        // The operations below choose by width and know no other types.
        let known = |t: Ty| matches!(t, Pred | B16 | U16 | S16 | B32 | U32 | S32 | B64 | U64 | S64);
        let op = self.instr.opcode.as_str();
        match op {
            "and" | "or" | "xor" | "not" | "cnot" | "shl" | "shr" | "shf" | "lop3" | "popc" | "clz" | "bfind"
            | "brev" | "bfe" | "bfi" | "bmsk" | "szext" | "prmt" | "dp4a" | "dp2a" | "fns"
                if self.last_type().is_some_and(|t| !known(t)) =>
            {
                Ok(false)
            }
            "and" | "or" | "xor" => {
                let Some(ty) = self.mods.ty() else {
                    return Ok(false);
                };
                if ty == Ty::Pred {
                    self.arity(3, 3)?;
                    let (x, y) = (self.operand(1)?, self.operand(2)?);
                    let ((a, na), (b, nb)) = (self.pred(x)?, self.pred(y)?);
                    let o = self.operand(0)?;
                    let d = self.pred_dst(o)?;
                    let alu = match op {
                        "and" => preds(|a, b| a & b),
                        "or" => preds(|a, b| a | b),
                        _ => preds(|a, b| a ^ b),
                    };
                    self.alu(alu, d, &[a, b], u32::from(na) | u32::from(nb) << 1)?;
                    return Ok(true);
                }
                let alu = match (op, ty.bytes()) {
                    ("and", 8) => op2(|a: u64, b: u64| a & b),
                    ("or", 8) => op2(|a: u64, b: u64| a | b),
                    ("xor", 8) => op2(|a: u64, b: u64| a ^ b),
                    ("and", _) => op2(|a: u32, b: u32| a & b),
                    ("or", _) => op2(|a: u32, b: u32| a | b),
                    _ => op2(|a: u32, b: u32| a ^ b),
                };
                self.binary(Some(alu), ty)
            }
            "not" | "cnot" => {
                let Some(ty) = self.mods.ty() else {
                    return Ok(false);
                };
                if ty == Ty::Pred {
                    self.arity(2, 2)?;
                    let (x, o) = (self.operand(1)?, self.operand(0)?);
                    let (a, na) = self.pred(x)?;
                    let d = self.pred_dst(o)?;
                    self.alu(preds(|a, _| !a), d, &[a, a], u32::from(na))?;
                    return Ok(true);
                }
                let alu = match (op, ty.bytes()) {
                    ("not", 2) => op1(|a: u32| !a & 0xffff),
                    ("not", 4) => op1(|a: u32| !a),
                    ("not", _) => op1(|a: u64| !a),
                    (_, 8) => op1(|a: u64| u64::from(a == 0)),
                    _ => op1(|a: u32| u32::from(a == 0)),
                };
                self.unary(Some(alu), ty, ty)
            }
            "shl" | "shr" => {
                let Some(ty) = self.mods.ty() else {
                    return Ok(false);
                };
                self.arity(3, 3)?;
                let (a, b) = (self.src(1, ty)?, self.src(2, Ty::U32)?);
                let d = self.dst(0, ty)?;
                let alu = match (op, ty) {
                    ("shl", Ty::B16 | Ty::U16 | Ty::S16) => {
                        op2(|a: u32, b: u32| if b > 15 { 0 } else { (a << b) & 0xffff })
                    }
                    ("shl", Ty::B32 | Ty::U32 | Ty::S32) => op2(|a: u32, b: u32| if b > 31 { 0 } else { a << b }),
                    ("shl", _) => op2(|a: u64, b: u32| if b > 63 { 0 } else { a << b }),
                    (_, Ty::B16 | Ty::U16) => op2(|a: u32, b: u32| if b > 15 { 0 } else { a >> b }),
                    (_, Ty::B32 | Ty::U32) => op2(|a: u32, b: u32| if b > 31 { 0 } else { a >> b }),
                    (_, Ty::B64 | Ty::U64) => op2(|a: u64, b: u32| if b > 63 { 0 } else { a >> b }),
                    (_, Ty::S16) => op2(|a: u32, b: u32| (s16(a) >> b.min(15)) as u32 & 0xffff),
                    (_, Ty::S32) => op2(|a: u32, b: u32| ((a as i32) >> b.min(31)) as u32),
                    (_, Ty::S64) => op2(|a: u64, b: u32| ((a as i64) >> b.min(63)) as u64),
                    _ => return Ok(false),
                };
                self.alu(alu, d, &[a, b], 0)?;
                Ok(true)
            }
            "shf" => {
                let (left, right) = (self.mods.take("l"), self.mods.take("r"));
                let (clamp, wrap) = (self.mods.take("clamp"), self.mods.take("wrap"));
                if left == right || clamp == wrap || self.mods.ty() != Some(Ty::B32) {
                    return Ok(false);
                }
                self.arity(4, 4)?;
                let (a, b, c) = (self.src(1, Ty::B32)?, self.src(2, Ty::B32)?, self.src(3, Ty::U32)?);
                let d = self.dst(0, Ty::B32)?;
                // The second operand is the high word.
                let alu = match (left, clamp) {
                    (true, true) => {
                        op3(|a: u32, b: u32, c: u32| (((u64::from(b) << 32 | u64::from(a)) << c.min(32)) >> 32) as u32)
                    }
                    (true, false) => {
                        op3(|a: u32, b: u32, c: u32| (((u64::from(b) << 32 | u64::from(a)) << (c & 31)) >> 32) as u32)
                    }
                    (false, true) => {
                        op3(|a: u32, b: u32, c: u32| ((u64::from(b) << 32 | u64::from(a)) >> c.min(32)) as u32)
                    }
                    (false, false) => {
                        op3(|a: u32, b: u32, c: u32| ((u64::from(b) << 32 | u64::from(a)) >> (c & 31)) as u32)
                    }
                };
                self.alu(alu, d, &[a, b, c], 0)?;
                Ok(true)
            }
            "lop3" => {
                let join = self.mods.find(|m| match m {
                    "or" => Some(2u32),
                    "and" => Some(1),
                    _ => None,
                });
                if self.mods.ty() != Some(Ty::B32) {
                    return Ok(false);
                }
                self.arity(if join.is_some() { 6 } else { 5 }, if join.is_some() { 6 } else { 5 })?;
                let (a, b, c) = (self.src(1, Ty::B32)?, self.src(2, Ty::B32)?, self.src(3, Ty::B32)?);
                let Operand::Int(table @ 0..=255) = *self.operand(4)? else {
                    return self.fail("the table must be 0..=255");
                };
                let alu = match table {
                    0x96 => op3(|a: u32, b: u32, c: u32| a ^ b ^ c),
                    0xea => op3(|a: u32, b: u32, c: u32| (a & b) | c),
                    0xf8 => op3(|a: u32, b: u32, c: u32| a | (b & c)),
                    0x80 => op3(|a: u32, b: u32, c: u32| a & b & c),
                    0xfe => op3(|a: u32, b: u32, c: u32| a | b | c),
                    _ => op3p(|a: u32, b: u32, c: u32, t| {
                        let mut r = 0;
                        for k in 0..8u32 {
                            let pick = |x: u32, bit: u32| if k & bit != 0 { x } else { !x };
                            r |= pick(a, 4) & pick(b, 2) & pick(c, 1) & 0u32.wrapping_sub(t >> k & 1);
                        }
                        r
                    }),
                };
                let Some(join) = join else {
                    let d = self.dst(0, Ty::B32)?;
                    self.alu(alu, d, &[a, b, c], table as u32)?;
                    return Ok(true);
                };
                // `lop3.or d|p, a, b, c, table, q`: p = (d != 0) or q.
                let Operand::Pair(x, p) = self.operand(0)? else {
                    return self.fail("expected `d|p`");
                };
                let d = match x.as_ref() {
                    Operand::Sink => self.temp(1)?,
                    x => self.dst_as(x, Ty::B32)?,
                };
                let p = self.pred_dst(p)?;
                let o = self.operand(5)?;
                let (q, not) = self.pred(o)?;
                let zero = self.constant(1, 0)?;
                self.alu(alu, d, &[a, b, c], table as u32)?;
                self.alu(cmp(|a: u32, b: u32| a != b), p, &[d, zero], join | u32::from(not) << 3 | q << 4)?;
                Ok(true)
            }
            "popc" | "clz" | "brev" | "bfind" => {
                let amount = self.mods.take("shiftamt");
                let Some(ty) = self.mods.ty() else {
                    return Ok(false);
                };
                if ty.bytes() < 4 || (amount && op != "bfind") {
                    return Ok(false);
                }
                let wide = ty.bytes() == 8;
                let alu = match (op, wide) {
                    ("popc", false) => op1(|a: u32| a.count_ones()),
                    ("popc", true) => op1(|a: u64| a.count_ones()),
                    ("clz", false) => op1(|a: u32| a.leading_zeros()),
                    ("clz", true) => op1(|a: u64| a.leading_zeros()),
                    ("brev", false) => op1(|a: u32| a.reverse_bits()),
                    ("brev", true) => op1(|a: u64| a.reverse_bits()),
                    (_, false) => match (ty.signed(), amount) {
                        (false, false) => op1(|a: u32| a.checked_ilog2().unwrap_or(u32::MAX)),
                        (false, true) => op1(|a: u32| if a == 0 { u32::MAX } else { a.leading_zeros() }),
                        (true, false) => op1(|a: u32| sign_free(a).checked_ilog2().unwrap_or(u32::MAX)),
                        (true, true) => {
                            op1(|a: u32| if sign_free(a) == 0 { u32::MAX } else { sign_free(a).leading_zeros() })
                        }
                    },
                    (_, true) => match (ty.signed(), amount) {
                        (false, false) => op1(|a: u64| a.checked_ilog2().unwrap_or(u32::MAX)),
                        (false, true) => op1(|a: u64| if a == 0 { u32::MAX } else { a.leading_zeros() }),
                        (true, false) => op1(|a: u64| sign_free64(a).checked_ilog2().unwrap_or(u32::MAX)),
                        (true, true) => {
                            op1(|a: u64| if sign_free64(a) == 0 { u32::MAX } else { sign_free64(a).leading_zeros() })
                        }
                    },
                };
                self.unary(Some(alu), if op == "brev" { ty } else { Ty::U32 }, ty)
            }
            "bfe" => {
                let Some(ty) = self.mods.ty() else {
                    return Ok(false);
                };
                self.arity(4, 4)?;
                let (a, b, c) = (self.src(1, ty)?, self.src(2, Ty::U32)?, self.src(3, Ty::U32)?);
                let d = self.dst(0, ty)?;
                let alu = match ty {
                    Ty::U32 => op3(|a: u32, b: u32, c: u32| extract(a.into(), b, c, 32, false) as u32),
                    Ty::S32 => op3(|a: u32, b: u32, c: u32| extract(a.into(), b, c, 32, true) as u32),
                    Ty::U64 => op3(|a: u64, b: u32, c: u32| extract(a, b, c, 64, false)),
                    Ty::S64 => op3(|a: u64, b: u32, c: u32| extract(a, b, c, 64, true)),
                    _ => return Ok(false),
                };
                self.alu(alu, d, &[a, b, c], 0)?;
                Ok(true)
            }
            "bfi" => {
                let Some(ty) = self.mods.ty() else {
                    return Ok(false);
                };
                self.arity(5, 5)?;
                let (a, b) = (self.src(1, ty)?, self.src(2, ty)?);
                let (c, e) = (self.src(3, Ty::U32)?, self.src(4, Ty::U32)?);
                let d = self.dst(0, ty)?;
                let alu = match ty {
                    Ty::B32 => op4(|a: u32, b: u32, c: u32, l: u32| insert(a.into(), b.into(), c, l, 32) as u32),
                    Ty::B64 => op4(|a: u64, b: u64, c: u32, l: u32| insert(a, b, c, l, 64)),
                    _ => return Ok(false),
                };
                self.alu(alu, d, &[a, b, c], e)?;
                Ok(true)
            }
            "bmsk" => {
                let (clamp, wrap) = (self.mods.take("clamp"), self.mods.take("wrap"));
                if clamp == wrap || self.mods.ty() != Some(Ty::B32) {
                    return Ok(false);
                }
                let alu = match clamp {
                    true => op2(|a: u32, b: u32| mask(a.min(32), b.min(32))),
                    false => op2(|a: u32, b: u32| mask(a & 31, b & 31)),
                };
                self.binary(Some(alu), Ty::U32)
            }
            "szext" => {
                let (clamp, wrap) = (self.mods.take("clamp"), self.mods.take("wrap"));
                let Some(ty @ (Ty::U32 | Ty::S32)) = self.mods.ty() else {
                    return Ok(false);
                };
                if clamp == wrap {
                    return Ok(false);
                }
                let alu = match (clamp, ty) {
                    (true, Ty::U32) => op2(|a: u32, b: u32| if b > 31 { a } else { a & mask(0, b) }),
                    (false, Ty::U32) => op2(|a: u32, b: u32| a & mask(0, b & 31)),
                    (true, _) => op2(|a: u32, b: u32| if b > 31 { a } else { extend(a, b) }),
                    (false, _) => op2(|a: u32, b: u32| extend(a, b & 31)),
                };
                self.binary(Some(alu), ty)
            }
            "prmt" => {
                if self.mods.ty() != Some(Ty::B32) {
                    return Ok(false);
                }
                let mode = self.mods.find(|m| match m {
                    "f4e" => Some(1),
                    "b4e" => Some(2),
                    "rc8" => Some(3),
                    "ecl" => Some(4),
                    "ecr" => Some(5),
                    "rc16" => Some(6),
                    _ => None,
                });
                self.arity(4, 4)?;
                let (a, b, c) = (self.src(1, Ty::B32)?, self.src(2, Ty::B32)?, self.src(3, Ty::B32)?);
                let d = self.dst(0, Ty::B32)?;
                let alu = match mode {
                    None => op3(|a: u32, b: u32, c: u32| {
                        let all = u64::from(b) << 32 | u64::from(a);
                        let byte = |k: u32| {
                            let s = c >> (4 * k) & 15;
                            let v = (all >> (8 * (s & 7))) as u32 & 0xff;
                            let v = if s & 8 != 0 { 0u32.wrapping_sub(v >> 7) & 0xff } else { v };
                            v << (8 * k)
                        };
                        byte(0) | byte(1) | byte(2) | byte(3)
                    }),
                    Some(_) => op3p(|a: u32, b: u32, c: u32, mode| {
                        let all = u64::from(b) << 32 | u64::from(a);
                        let n = c & 3;
                        let pick = match mode {
                            1 => [n, n + 1, n + 2, n + 3],
                            2 => [n, n.wrapping_sub(1) & 7, n.wrapping_sub(2) & 7, n.wrapping_sub(3) & 7],
                            3 => [n; 4],
                            4 => [n, n.max(1), n.max(2), 3],
                            5 => [0, n.min(1), n.min(2), n],
                            _ => [2 * (n & 1), 2 * (n & 1) + 1, 2 * (n & 1), 2 * (n & 1) + 1],
                        };
                        (0..4).fold(0, |r, k| r | ((all >> (8 * pick[k])) as u32 & 0xff) << (8 * k))
                    }),
                };
                self.alu(alu, d, &[a, b, c], mode.unwrap_or(0))?;
                Ok(true)
            }
            "dp4a" | "dp2a" => {
                let hi = self.mods.take("hi");
                self.mods.take("lo");
                let (Some(at), Some(bt)) = (self.mods.ty(), self.mods.ty()) else {
                    return Ok(false);
                };
                self.arity(4, 4)?;
                let (a, b, c) = (self.src(1, Ty::B32)?, self.src(2, Ty::B32)?, self.src(3, Ty::B32)?);
                let d = self.dst(0, Ty::B32)?;
                let alu = match op {
                    "dp4a" => op3p(|a: u32, b: u32, c: u32, e| {
                        (0..4).fold(c, |s, k| s.wrapping_add((part(a, k, 8, e & 1) * part(b, k, 8, e & 2)) as u32))
                    }),
                    _ => op3p(|a: u32, b: u32, c: u32, e| {
                        let first = if e & 4 != 0 { 2 } else { 0 };
                        (0..2).fold(c, |s, k| {
                            s.wrapping_add((part(a, k, 16, e & 1) * part(b, first + k, 8, e & 2)) as u32)
                        })
                    }),
                };
                let flags = u32::from(at.signed()) | u32::from(bt.signed()) << 1 | u32::from(hi) << 2;
                self.alu(alu, d, &[a, b, c], flags)?;
                Ok(true)
            }
            "fns" => {
                if self.mods.ty() != Some(Ty::B32) {
                    return Ok(false);
                }
                self.arity(4, 4)?;
                let (a, b, c) = (self.src(1, Ty::B32)?, self.src(2, Ty::B32)?, self.src(3, Ty::B32)?);
                let d = self.dst(0, Ty::B32)?;
                let alu = op3(|a: u32, base: u32, offset: u32| {
                    let offset = offset as i32;
                    let base = (base & 31) as i32;
                    let mut left = offset.unsigned_abs();
                    if left == 0 {
                        return if a >> base & 1 != 0 { base as u32 } else { u32::MAX };
                    }
                    let mut at = base;
                    while (0..32).contains(&at) {
                        if a >> at & 1 != 0 {
                            left -= 1;
                            if left == 0 {
                                return at as u32;
                            }
                        }
                        at += offset.signum();
                    }
                    u32::MAX
                });
                self.alu(alu, d, &[a, b, c], 0)?;
                Ok(true)
            }
            _ => Ok(false),
        }
    }
}

fn part(x: u32, k: u32, bits: u32, signed: u32) -> i32 {
    let up = 32 - bits;
    let x = (x >> (k * bits)) << up;
    if signed != 0 { x as i32 >> up } else { (x >> up) as i32 }
}

fn mask(start: u32, length: u32) -> u32 {
    ((((1u64 << length) - 1) << start) & 0xffff_ffff) as u32
}

fn extend(a: u32, bits: u32) -> u32 {
    if bits == 0 { 0 } else { ((a << (32 - bits)) as i32 >> (32 - bits)) as u32 }
}

fn sign_free(a: u32) -> u32 {
    a ^ ((a as i32) >> 31) as u32
}

fn sign_free64(a: u64) -> u64 {
    a ^ ((a as i64) >> 63) as u64
}

/// `bfe`: only the low 8 bits of position and length count; beyond the top, the sign (or zero) goes on.
fn extract(a: u64, position: u32, length: u32, bits: u32, signed: bool) -> u64 {
    let (position, length) = (position & 0xff, length & 0xff);
    if length == 0 {
        return 0;
    }
    let top = (position + length - 1).min(bits - 1);
    let sign = signed && a >> top & 1 != 0;
    let body = if position >= bits { 0 } else { a >> position };
    let have = if position >= bits { 0 } else { (bits - position).min(length) };
    let keep = if have >= 64 { u64::MAX } else { (1 << have) - 1 };
    if sign { body & keep | !keep } else { body & keep }
}

/// `bfi`
fn insert(a: u64, b: u64, position: u32, length: u32, bits: u32) -> u64 {
    let (position, length) = (position & 0xff, length & 0xff);
    if length == 0 || position >= bits {
        return b;
    }
    let keep = if length >= 64 { u64::MAX } else { (1 << length) - 1 };
    b & !(keep << position) | (a & keep) << position
}
